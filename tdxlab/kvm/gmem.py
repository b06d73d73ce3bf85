"""guest_memfd: files whose pages are a guest's private memory, and that user space cannot map.

A page comes with its first use, and is zeroed before the guest gets it ("prepared"). It goes when a
hole is punched, or with the file; what maps it goes before. A back end that gives a page to the
guest holds a reference: such a page leaves its file at once, but is not free before the reference
is given back.

Source: Linux 6.16, virt/kvm/guest_memfd.c.
Differs: a file has one opener and one VM, and ends with `release`; a lookup takes no reference of
its own, since an invalidation makes its user look again before anything is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from errno import EBADF, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT, WORDS_PER_PAGE
from tdxlab.journal import Row, Table, Words
from tdxlab.kvm.folios import FOLIO_HPA, IN_USE, POISONED, PREPARED, Folio, Folios, as_folio
from tdxlab.kvm.gmem_arch import GmemArch
from tdxlab.kvm.invalidation import kvm_mmu_invalidate_begin, kvm_mmu_invalidate_end
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.notifier import clip_to_gmem, handle_ranges, kvm_mmu_unmap_gfn_range
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.vm import Vm
from tdxlab.kvm.zap import GfnRange
from tdxlab.memory import ZERO_PAGE
from tdxlab.steps import WAIT, Step

#: errno of a page whose memory failed. Source: include/uapi/asm-generic/errno.h.
EHWPOISON = 133

# -- modes of fallocate. Source: include/uapi/linux/falloc.h

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

#: What memory_failure() is told: the page stays in the file. Source: include/linux/mm.h.
MF_DELAYED = 1

Work = Generator[Step, None, None]
Doing = Generator[Step, None, int]
#: (gfn, pfn, number of the page from the start) -> operation that fills it, returning 0 or -errno.
PostPopulate = Callable[[int, int, int], Doing]

_EVERYTHING = 1 << 52


class GuestMemfds:
    """The guest_memfd files of one VM. A file's number is given when it is created.

    page_refs: by pfn, references that back ends hold beyond the file's own. orphans: pfn -> "its
    memory failed", of referenced pages that are in no file. arch: what is done to each page.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        #: files that were created
        self._created = Row(vm.journal, 1)
        pfns = max(region.end for region in vm.memory.ram) >> PAGE_SHIFT
        self.page_refs = Words(vm.journal, pfns, typecode="H", sparse=True)
        self.page_refs.extent = 0
        #: file -> size in pages
        self._sizes = Table(vm.journal)
        #: file -> slots that it backs, ascending in the file
        self._bindings = Table(vm.journal)
        self._folios = Folios(vm.journal, len(vm.memory.words) // WORDS_PER_PAGE)
        self.orphans = Table(vm.journal)
        #: file -> None: somebody holds its invalidate lock
        self._locked = Table(vm.journal)
        self.arch: GmemArch | None = None

    # -- files

    def create(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD. size: bytes. Returns the file's number.

        -EINVAL: flags; no size, or one that is no multiple of 4 KiB. Source: kvm_gmem_create.
        """
        if flags or size <= 0 or size & PAGE_OFFSET_MASK:
            return -EINVAL
        number = self._created.view[0]
        self._created.put(0, number + 1)
        self._sizes.put(number, size >> PAGE_SHIFT)
        self._bindings.put(number, ())
        return number

    def is_open(self, gmem: int) -> bool:
        """True until the file is released."""
        return gmem in self._sizes

    def size(self, gmem: int) -> int:
        """Pages of an open file."""
        return int(self._sizes[gmem])

    def folio(self, gmem: int, index: int) -> Folio | None:
        """What the file has at page `index` now; nothing is allocated."""
        word = self._folios.get(gmem, index)
        return as_folio(word) if word else None

    def pages(self, gmem: int) -> dict[int, Folio]:
        """Page of the file -> Folio, for all pages that it has."""
        return {index: as_folio(word) for index, word in self._folios.pages(gmem, 0, _EVERYTHING)}

    def owned(self) -> list[int]:
        """Frame numbers of all pages that are out for files, or still referenced by a back end."""
        pfns = ((word & FOLIO_HPA) >> PAGE_SHIFT for word in self._folios.all())
        return [*pfns, *self.orphans]

    # -- slots

    def bind(self, slot: Slot) -> Doing:
        """Let the slot's part of its file back the slot.

        Returns 0, or in order: -EBADF: no such file; -EINVAL: the part does not lie in the file, or
        backs another slot. Source: kvm_gmem_bind.
        """
        if not self.is_open(slot.gmem):
            return -EBADF
        end = slot.gmem_pgoff + slot.npages
        if slot.gmem_pgoff < 0 or end > self._sizes[slot.gmem]:
            return -EINVAL
        yield from self._lock(slot.gmem)
        try:
            bound = self._bindings[slot.gmem]
            if any(clip_to_gmem(other, slot.gmem_pgoff, end) is not None for other in bound):
                return -EINVAL
            slots = sorted((*bound, slot), key=lambda slot: slot.gmem_pgoff)
            self._bindings.put(slot.gmem, tuple(slots))
        finally:
            self._unlock(slot.gmem)
        return 0

    def unbind(self, slot: Slot) -> Work:
        """The slot is gone; nothing to do where the file is. Source: kvm_gmem_unbind."""
        if not self.is_open(slot.gmem):
            return
        yield from self._lock(slot.gmem)
        rest = [s for s in self._bindings[slot.gmem] if s.gmem_pgoff != slot.gmem_pgoff]
        self._bindings.put(slot.gmem, tuple(rest))
        self._unlock(slot.gmem)

    # -- pages

    def get_pfn(self, gmem: int, index: int) -> int:
        """Frame number of page `index` for a fault: allocated and zeroed if it is new.

        -EFAULT: the file is released; -EIO: no slot is bound there; -ENOMEM; -EHWPOISON; what
        `arch` refuses it with. Source: kvm_gmem_get_pfn, kvm_gmem_prepare_folio.
        """
        place = self._place(gmem, index)
        if place < 0:
            return place
        words = self._folios.words
        word = words.view[place] or self._new_folio()
        if word < 0 or word & POISONED:
            return word if word < 0 else -EHWPOISON
        hpa = word & FOLIO_HPA
        if not word & PREPARED:
            self.vm.memory.write_page(hpa, ZERO_PAGE, 0)
            if self.arch is not None:
                words.cells[place] = word
                (found,) = self._ranges(gmem, index, index + 1)
                error = self.arch.prepare(found.start, hpa >> PAGE_SHIFT)
                if error:
                    return error
            words.cells[place] = word | PREPARED
        return hpa >> PAGE_SHIFT

    def get_page(self, pfn: int) -> None:
        """Hold a reference to a page: it is not freed before `put_page`."""
        refs = self.page_refs
        if pfn >= refs.extent:
            refs.extent = pfn + 1
        refs.cells[pfn] = refs.view[pfn] + 1

    def put_page(self, pfn: int) -> None:
        """Give a reference back; frees the page if it was the last and no file has the page.

        Refuses a page that nobody holds a reference to: ValueError.
        """
        refs = self.page_refs
        count = refs.view[pfn]
        if not count:
            raise ValueError(f"nobody holds a reference to pfn {pfn:#x}; get_page comes first")
        refs.cells[pfn] = count - 1
        if count == 1 and pfn in self.orphans:
            poisoned = self.orphans[pfn]
            self.orphans.drop(pfn)
            self._free(pfn, poisoned)

    def populate(
        self,
        start_gfn: int,
        npages: int,
        post_populate: PostPopulate,
        signal_pending: Callable[[], bool] = lambda: False,
    ) -> Doing:
        """Let `post_populate` fill pages that the guest has never had, from `start_gfn` on;
        slots_lock held. The file's invalidate lock is held all the time.

        Returns the number of pages done if there are any, or else for the first: -EINVAL: no pages,
        or no slot with a guest_memfd; -EFAULT: the file is released; -EINTR: a signal; what
        `get_pfn` returns; -EEXIST: the page is prepared already; -EINVAL: the gfn is shared; what
        `post_populate` returns. Source: kvm_gmem_populate.
        """
        slot = self.vm.slots.find(start_gfn)
        if npages <= 0 or slot is None or not slot.can_be_private:
            return -EINVAL
        if not self.is_open(slot.gmem):
            return -EFAULT
        yield from self._lock(slot.gmem)
        try:
            for done in range(min(npages, slot.end_gfn - start_gfn)):
                ret = -EINTR
                if not signal_pending():
                    ret = yield from self._populate_one(slot, start_gfn + done, done, post_populate)
                if ret:
                    return done or ret
        finally:
            self._unlock(slot.gmem)
        return min(npages, slot.end_gfn - start_gfn)

    def _populate_one(self, slot: Slot, gfn: int, number: int, fill: PostPopulate) -> Doing:
        """One page of `populate`; returns 0 or -errno."""
        index = slot.gfn_to_gmem_index(gfn)
        place, words = self._place(slot.gmem, index), self._folios.words
        if place < 0:
            return place
        word = words.view[place] or self._new_folio()
        if word < 0 or word & POISONED:
            return word if word < 0 else -EHWPOISON
        if word & PREPARED:
            return -EEXIST
        words.put(place, word)
        if not self.vm.attributes.is_private(gfn):
            return -EINVAL
        ret = yield from fill(gfn, as_folio(word).pfn, number)
        if not ret:
            words.put(place, word | PREPARED)
        return ret

    # -- taking pages away

    def fallocate(self, gmem: int, mode: int, offset: int, size: int) -> Doing:
        """fallocate(2) on the file. offset, size: bytes.

        Returns 0, or in order: -EBADF: the file is released; -EINVAL: nothing, or negative;
        -EOPNOTSUPP: the file would change its size, or another mode; -EINVAL: no multiples of
        4 KiB, or pages beyond the file (a hole may be there); -ENOMEM. Source: kvm_gmem_fallocate.
        """
        if not self.is_open(gmem):
            return -EBADF
        if offset < 0 or size <= 0:
            return -EINVAL
        punch = bool(mode & FALLOC_FL_PUNCH_HOLE)
        if mode & ~FALLOC_FL_PUNCH_HOLE != FALLOC_FL_KEEP_SIZE:
            return -EOPNOTSUPP
        if (offset | size) & PAGE_OFFSET_MASK:
            return -EINVAL
        start, end = offset >> PAGE_SHIFT, offset + size >> PAGE_SHIFT
        if punch:
            return (yield from self.punch_hole(gmem, start, end))
        return (yield from self._allocate(gmem, start, end))

    def punch_hole(self, gmem: int, start: int, end: int) -> Doing:
        """Unmap and free the file's pages from `start` to `end` - 1. Returns 0.

        Source: kvm_gmem_punch_hole.
        """
        yield from self._lock(gmem)
        try:
            yield from self._invalidate_begin(gmem, start, end)
            yield ("truncate_inode_pages_range", gmem, start, end)
            self._truncate(gmem, start, end)
            yield from self._invalidate_end(gmem, start, end)
        finally:
            self._unlock(gmem)
        return 0

    def release(self, gmem: int) -> Work:
        """The last close: unmap all, then free all. A slot that was bound keeps faulting, with
        -EFAULT. Takes slots_lock. Source: kvm_gmem_release.
        """
        yield from self.vm.slots_lock.lock()
        yield from self._lock(gmem)
        try:
            yield from self._invalidate_begin(gmem, 0, _EVERYTHING)
            yield from self._invalidate_end(gmem, 0, _EVERYTHING)
            self._bindings.drop(gmem)
            self._sizes.drop(gmem)
        finally:
            self._unlock(gmem)
            self.vm.slots_lock.unlock()
        self._truncate(gmem, 0, _EVERYTHING)

    def error_folio(self, gmem: int, index: int) -> Doing:
        """The memory of a page has failed: unmap it. It stays in the file, and a fault on it gives
        -EHWPOISON. Returns MF_DELAYED. Source: kvm_gmem_error_folio; mm/memory-failure.c.
        """
        word = self._folios.get(gmem, index)
        if not word:
            raise ValueError(f"file {gmem} has no page {index}; only a page in use can fail")
        self._folios.put(gmem, index, word | POISONED)
        yield from self._lock(gmem)
        try:
            yield from self._invalidate_begin(gmem, index, index + 1)
            yield from self._invalidate_end(gmem, index, index + 1)
        finally:
            self._unlock(gmem)
        return MF_DELAYED

    def _invalidate_begin(self, gmem: int, start: int, end: int) -> Work:
        """Unmap what slots map of the pages in [start, end). Source: kvm_gmem_invalidate_begin."""
        ranges = self._ranges(gmem, start, end)
        yield from handle_ranges(self.vm, ranges, kvm_mmu_unmap_gfn_range, kvm_mmu_invalidate_begin)

    def _invalidate_end(self, gmem: int, start: int, end: int) -> Work:
        """Source: kvm_gmem_invalidate_end."""
        if self._ranges(gmem, start, end):
            yield from self.vm.mmu_lock.lock(WRITE)
            kvm_mmu_invalidate_end(self.vm)
            self.vm.mmu_lock.unlock(WRITE)

    def _ranges(self, gmem: int, start: int, end: int) -> list[GfnRange]:
        """The gfns that the pages in [start, end) back, per slot."""
        clipped = (clip_to_gmem(slot, start, end) for slot in self._bindings[gmem])
        return [gfn_range for gfn_range in clipped if gfn_range is not None]

    # -- folios

    def _place(self, gmem: int, index: int) -> int:
        """Where the FolioWord of a page is in the words of `_folios`; -errno if a fault may not
        have the page.

        Source: __kvm_gmem_get_pfn, kvm_gmem_get_folio.
        """
        bound = self._bindings.get(gmem)
        if bound is None:
            return -EFAULT
        for slot in bound:
            if 0 <= index - slot.gmem_pgoff < slot.npages:
                break
        else:
            self.vm.warn(f"__kvm_gmem_get_pfn: no slot is bound to page {index} of file {gmem}")
            return -EIO
        return self._folios.place(gmem, index)

    def _new_folio(self) -> int:
        """The FolioWord of a page that is in no file yet, -ENOMEM without one."""
        hpa = self.vm.pages.alloc_page("guest_memfd")
        return -ENOMEM if hpa == NO_PAGE else hpa | IN_USE

    def _allocate(self, gmem: int, start: int, end: int) -> Doing:
        """Have pages for [start, end) without preparing them. Source: kvm_gmem_allocate."""
        if end > self.size(gmem):
            return -EINVAL
        yield from self._lock(gmem)
        try:
            for index in range(start, end):
                word = self._folios.get(gmem, index) or self._new_folio()
                if word < 0:
                    return word
                self._folios.put(gmem, index, word)
        finally:
            self._unlock(gmem)
        return 0

    def _truncate(self, gmem: int, start: int, end: int) -> None:
        """Take the pages in [start, end) out of the file, and free those without references."""
        for index, word in list(self._folios.pages(gmem, start, end)):
            folio = as_folio(word)
            self._folios.put(gmem, index, 0)
            if self.page_refs.view[folio.pfn]:
                self.orphans.put(folio.pfn, folio.poisoned)
            else:
                self._free(folio.pfn, folio.poisoned)

    def _free(self, pfn: int, poisoned: bool) -> None:
        """Give the page back to the host, which does not use it again if its memory failed."""
        if self.arch is not None:
            self.arch.invalidate(pfn)
        if poisoned:
            self.vm.pages.leak(pfn << PAGE_SHIFT, "memory failure")
        else:
            self.vm.pages.free_page(pfn << PAGE_SHIFT)

    # -- the file's invalidate lock

    def _lock(self, gmem: int) -> Work:
        """Differs: nobody shares it; allocation and memory failure do in Linux."""
        yield ("filemap_invalidate_lock", gmem)
        while gmem in self._locked:
            yield (WAIT, "filemap_invalidate_lock", gmem)
        self._locked.put(gmem, None)

    def _unlock(self, gmem: int) -> None:
        self._locked.drop(gmem)
