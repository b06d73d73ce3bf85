"""The yardstick's host: KVM's mirror EPT over `Baseline`, in the plainest Python that is right.

A mirror table is a list of 512 entries, in a dict keyed by its page frame; a memslot is a tuple,
and the private gfns are a sorted list of the places where private and shared change. A fault makes
the kernel's checks in the kernel's order, freezes the entry while the SEAMCALL runs, and publishes
it; a conversion clears the entries, then blocks, tracks, kicks, removes and writes back. There is
no journal, no step generator, no event, and of statistics only those that a user can see.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c, tdp_mmu.c, arch/x86/kvm/vmx/tdx.c, virt/kvm/kvm_main.c,
guest_memfd.c.
Differs: private memory only; one VM, whose vCPUs are all out of the guest; one guest_memfd behind
the one memslot; tables are never freed; page contents do not exist.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from tdxlab.bench.baseline import Baseline

EMPTY, FROZEN = 1 << 63, 1 << 63 | 0x5A0
PRESENT, HUGE, HPA_MASK = 1 << 11, 1 << 7, 0x000FFFFFFFFFF000
LINK, LEAF, WRITABLE = 0x8000000000000907, 0x8200000000000B35, 0x0400000000000002
EFAULT, EINVAL, EIO, EHWPOISON = -14, -22, -5, -133
RETRY, FIXED, SPURIOUS = 1, 5, 6
BUSY_CLASS = 0x80000200
SEPT_ADD, AUG, BLOCK, WBINVD, REMOVE, TRACK = 3, 6, 7, 41, 29, 38
READONLY, INVALID = 2, 1 << 16
CACHE_LEAST, CACHE_FULL = 5, 40
NO_GFN = (1 << 64) - 1


class BaselineMmu:
    """One TD's private memory on a host. tdr, hkid: the TD, runnable. pages: byte addresses of free
    pages. base, npages: the one memslot, in frames, all of it private. levels: of the S-EPT.
    """

    def __init__(
        self,
        module: Baseline,
        tdr: int,
        hkid: int,
        pages: Iterator[int],
        base: int,
        npages: int,
        levels: int = 4,
    ) -> None:
        self.module, self.tdr, self.hkid, self.pages = module, tdr, hkid, pages
        self.levels = levels
        self.shared_bit = 1 << (35 if levels == 4 else 39)
        self.slots = [(base, npages, 0, base)]  # first gfn, pages, flags, gfn of page 0 of the file
        self.file: dict[int, list[int]] = {}  # page -> [HPA, prepared, poisoned]
        self.file_open = True
        self.private = [base, base + npages]
        self.tables: dict[int, list[int]] = {0: [EMPTY] * 512}
        self.caches: tuple[list[int], list[int]] = ([], [])  # for tables, for their S-EPT pages
        self.root_invalid = False
        self.readers = 0
        self.writer = False
        self.seq = self.in_progress = 0
        self.invalid = (NO_GFN, NO_GFN)
        self.leaves = self.taken = self.fixed = self.spurious = self.flushes = self.kicks = 0
        self.dead = False
        self.vcpus = [False]
        self.flush_requests = [False]
        self.references: dict[int, int] = {}

    # -- a fault

    def fault(self, gpa: int) -> int:
        """A write to the private `gpa`: RET_PF_* or -errno."""
        if self.dead:
            return EIO
        while True:
            self.taken += 1
            result = self._try_fault(gpa >> 12)
            if result != RETRY or self.dead:
                break
        if result == FIXED:
            self.fixed += 1
        elif result == SPURIOUS:
            self.spurious += 1
        return result

    def _try_fault(self, gfn: int) -> int:
        slot = self._slot(gfn)
        for cache in self.caches:
            if len(cache) < CACHE_LEAST:
                self._top_up(cache)
        if gfn & self.shared_bit:
            self.dead = True
            return EFAULT
        seq = self.seq
        if not bisect_right(self.private, gfn) & 1:
            return EFAULT
        if slot is None:
            return EFAULT
        if slot[2] & INVALID or self._is_invalidated(gfn, seq):
            return RETRY
        hpa = self._page(slot, gfn)
        if hpa < 0:
            return hpa
        if self._is_invalidated(gfn, seq) or self.writer:
            return RETRY
        self.readers += 1
        if self.root_invalid or self._is_invalidated(gfn, seq):
            result = RETRY
        else:
            result = self._map(gfn, hpa, not slot[2] & READONLY)
        self.readers -= 1
        return result

    def _slot(self, gfn: int) -> tuple[int, int, int, int] | None:
        for slot in self.slots:
            if slot[0] <= gfn < slot[0] + slot[1]:
                return slot
        return None

    def _top_up(self, cache: list[int]) -> None:
        while len(cache) < CACHE_FULL:
            cache.append(next(self.pages))

    def _is_invalidated(self, gfn: int, seq: int) -> bool:
        if self.in_progress and self.invalid[0] <= gfn < self.invalid[1]:
            return True
        return seq != self.seq

    def _page(self, slot: tuple[int, int, int, int], gfn: int) -> int:
        """The page of the guest_memfd: allocated on first use, cleared once; -errno."""
        if not self.file_open:
            return EFAULT
        number = gfn - slot[3]
        if not 0 <= number < slot[1]:
            return EIO
        page = self.file.get(number)
        if page is None:
            page = self.file[number] = [next(self.pages), 0, 0]
        if page[2]:
            return EHWPOISON
        if not page[1]:
            page[1] = 1
        return page[0]

    def _map(self, gfn: int, hpa: int, writable: bool) -> int:
        table = self.tables[0]
        level = self.levels
        while True:
            index = gfn >> 9 * (level - 1) & 511
            entry = table[index]
            if entry == FROZEN:
                return RETRY
            if level == 1:
                return self._map_leaf(table, index, entry, gfn, hpa, writable)
            if not entry & PRESENT:
                if self._link(table, index, entry, gfn, level):
                    return RETRY
                entry = table[index]
            table = self.tables[(entry & HPA_MASK) >> 12]
            level -= 1

    def _map_leaf(
        self, table: list[int], index: int, entry: int, gfn: int, hpa: int, writable: bool
    ) -> int:
        new = LEAF | hpa
        if writable:
            new |= WRITABLE
        if entry & PRESENT and entry & WRITABLE:
            return SPURIOUS
        if table[index] != entry:
            return RETRY
        table[index] = FROZEN
        self.references[hpa] = self.references.get(hpa, 0) + 1
        status = self.module.seamcall(0, AUG, [gfn << 12, self.tdr, hpa, 0, 0, 0])
        if status:
            table[index] = entry
            self.references[hpa] -= 1
            self.dead = status >> 32 != BUSY_CLASS
            return RETRY
        table[index] = new
        self.leaves += 1
        return FIXED

    def _link(self, table: list[int], index: int, entry: int, gfn: int, level: int) -> int:
        mirror, external = self.caches[0].pop(), self.caches[1].pop()
        self.tables[mirror >> 12] = [EMPTY] * 512
        table[index] = FROZEN
        gpa = gfn >> 9 * (level - 1) << 9 * (level - 1) + 12
        status = self.module.seamcall(0, SEPT_ADD, [gpa | level - 1, self.tdr, external, 0, 0, 0])
        table[index] = entry if status else LINK | mirror
        self.dead = bool(status) and status >> 32 != BUSY_CLASS
        return status

    # -- a conversion

    def convert(self, start: int, end: int, private: bool) -> int:
        """Make gfns start to end - 1 private or shared: 0 or -errno. What was mapped goes."""
        if not 0 <= start < end:
            return EINVAL
        low, high = bisect_right(self.private, start), bisect_left(self.private, end)
        if low == high and low & 1 == private:
            return 0
        ranges = [
            (max(start, slot[0]), min(end, slot[0] + slot[1]))
            for slot in self.slots
            if slot[0] < end and start < slot[0] + slot[1]
        ]
        if ranges:
            self.writer = True
            self.in_progress += 1
            self.invalid = (min(first for first, _ in ranges), max(last for _, last in ranges))
            zapped = 0
            for first, last in ranges:
                zapped += 0 if private else self._zap(first, last)
            if zapped:
                self.flushes += 1
                self.flush_requests = [True] * len(self.vcpus)
            self.writer = False
        self._store(start, end, private)
        if ranges:
            self.seq += 1
            self.in_progress -= 1
        return 0

    def _store(self, start: int, end: int, private: bool) -> None:
        low, high = bisect_left(self.private, start), bisect_right(self.private, end)
        middle = [start] if low & 1 != private else []
        if high & 1 != private:
            middle.append(end)
        self.private[low:high] = middle

    def _zap(self, start: int, end: int) -> int:
        """Take the pages of gfns start to end - 1 away; returns how many were mapped."""
        zapped = 0
        gfn = start
        while gfn < end:
            table = self._leaf_table(gfn)
            for index in range(gfn & 511, min(512, (gfn & 511) + end - gfn)):
                if table is not None and table[index] & PRESENT:
                    zapped += 1
                    self._remove(table, index, (gfn & ~511) + index)
            gfn = (gfn & ~511) + 512
        return zapped

    def _leaf_table(self, gfn: int) -> list[int] | None:
        table = self.tables[0]
        for level in range(self.levels, 1, -1):
            entry = table[gfn >> 9 * (level - 1) & 511]
            if not entry & PRESENT:
                return None
            table = self.tables[(entry & HPA_MASK) >> 12]
        return table

    def _remove(self, table: list[int], index: int, gfn: int) -> None:
        hpa = table[index] & HPA_MASK
        table[index] = EMPTY
        self.leaves -= 1
        if not self.hkid:
            self.dead = True
            return
        gpa, call = gfn << 12, self.module.seamcall
        if self._patiently(BLOCK, [gpa, self.tdr, 0, 0, 0, 0]):
            self.dead = True
            return
        if self._patiently(TRACK, [self.tdr, 0, 0, 0, 0, 0]):
            self.dead = True
        self._kick()
        if self._patiently(REMOVE, [gpa, self.tdr, 0, 0, 0, 0]):
            self.dead = True
            return
        keyed = hpa | self.hkid << self.module.hkid_shift
        if call(0, WBINVD, [keyed, 0, 0, 0, 0, 0]):
            self.dead = True
            return
        self.references[hpa] -= 1
        if not self.references[hpa]:
            del self.references[hpa]

    def _patiently(self, leaf: int, regs: list[int]) -> int:
        status = self.module.seamcall(0, leaf, list(regs))
        if status >> 32 == BUSY_CLASS:
            self._kick()
            status = self.module.seamcall(0, leaf, list(regs))
        return status

    def _kick(self) -> None:
        self.kicks += 1
        for number, inside in enumerate(self.vcpus):
            if inside:
                self.vcpus[number] = False
