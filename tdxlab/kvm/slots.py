"""Memslots: which guest frames have memory behind them, and whose.

State only; `memory_region.py` changes it. Every address space has one set of slots, replaced as a
whole: a reader sees the old set or the new one.

Source: Linux 6.16, include/linux/kvm_host.h (struct kvm_memory_slot, struct kvm_memslots),
virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator
from errno import EBADF, EFAULT
from typing import NamedTuple, Protocol

from tdxlab.journal import Field, Fields, Index, Journal, Journalled, Table
from tdxlab.steps import Step

# -- flags of KVM_SET_USER_MEMORY_REGION2, and the internal one

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEMSLOT_INVALID = 1 << 16

#: KVM_MEM_MAX_NR_PAGES: pages that one slot may have.
MAX_NR_PAGES = (1 << 31) - 1
#: Slots that user space may have in one address space. Source: kvm_host.h, KVM_USER_MEM_SLOTS.
KVM_USER_MEM_SLOTS = 32767 - 3

# -- what becomes of a slot. Source: kvm_host.h, enum kvm_mr_change

KVM_MR_CREATE = 0
KVM_MR_DELETE = 1
KVM_MR_MOVE = 2
KVM_MR_FLAGS_ONLY = 3

#: In a generation: new slots are in place, old readers are not all done yet.
KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS = 1 << 63


class Slot(NamedTuple):
    """struct kvm_memory_slot.

    slot_id, as_id: number, and address space (0, or 1 for SMM). base_gfn, npages: the range, in
    4 KiB frames. userspace_addr: HVA of its shared memory. gmem: number of its guest_memfd file, -1
    without one; gmem_pgoff: page of the file that backs base_gfn.
    """

    slot_id: int
    as_id: int
    base_gfn: int
    npages: int
    flags: int
    userspace_addr: int
    gmem: int = -1
    gmem_pgoff: int = 0

    @property
    def end_gfn(self) -> int:
        """First gfn behind the slot."""
        return self.base_gfn + self.npages

    @property
    def can_be_private(self) -> bool:
        """A guest_memfd backs it. Source: kvm_host.h, kvm_slot_can_be_private."""
        return bool(self.flags & KVM_MEM_GUEST_MEMFD)

    @property
    def is_dirty_tracked(self) -> bool:
        """Source: kvm_host.h, kvm_slot_dirty_track_enabled."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def is_invalid(self) -> bool:
        """It is being deleted or moved: faults retry."""
        return bool(self.flags & KVM_MEMSLOT_INVALID)

    @property
    def userspace_end(self) -> int:
        """First HVA behind its shared memory."""
        return self.userspace_addr + (self.npages << 12)

    def gfn_to_hva(self, gfn: int) -> int:
        """Address of the gfn's shared memory in user space. Source: __gfn_to_hva_memslot."""
        return self.userspace_addr + (gfn - self.base_gfn << 12)

    def gfn_to_gmem_index(self, gfn: int) -> int:
        """Page of the guest_memfd that backs the gfn. Source: guest_memfd.c, kvm_gmem_get_index."""
        return self.gmem_pgoff + gfn - self.base_gfn


class HostPage(NamedTuple):
    """What user space has mapped at an HVA: frame number, may it be written, level (1 to 3) of the
    host's own mapping.
    """

    pfn: int
    writable: bool
    level: int


class UserMemory(Protocol):
    """The memory of the process that owns the VM: what stands behind HVAs."""

    def fault_in(self, hva: int, *, write: bool) -> HostPage | None:
        """The page at `hva`, allocated on first use; None where nothing is mapped."""
        ...

    def mapping_level(self, hva: int) -> int:
        """Level (1 to 3) at which the host maps `hva` at present; 1 where it maps nothing."""
        ...


class GuestMemory(Protocol):
    """The guest_memfd files of one VM."""

    def get_pfn(self, gmem: int, index: int) -> int:
        """Frame number of page `index` of the file, prepared on first use; -errno if it fails."""
        ...

    def get_page(self, pfn: int) -> None:
        """Hold a reference to a page: it is not freed before `put_page`."""
        ...

    def put_page(self, pfn: int) -> None:
        """Give a reference back."""
        ...

    def bind(self, slot: Slot) -> Generator[Step, None, int]:
        """Let the slot's part of its file back the slot. Returns 0 or -errno."""
        ...

    def unbind(self, slot: Slot) -> Generator[Step, None, None]:
        """The slot is gone; its part of the file can back another one."""
        ...


class NoUserMemory:
    """A process that has mapped nothing."""

    def fault_in(self, hva: int, *, write: bool) -> HostPage | None:
        """Nothing is mapped."""
        return None

    def mapping_level(self, hva: int) -> int:
        """Nothing is mapped."""
        return 1


class NoGuestMemory:
    """A VM without guest_memfd files."""

    def get_pfn(self, gmem: int, index: int) -> int:
        """No such file: -EFAULT."""
        return -EFAULT

    def get_page(self, pfn: int) -> None:
        """Nobody has such a page."""

    def put_page(self, pfn: int) -> None:
        """Nobody has such a page."""

    def bind(self, slot: Slot) -> Generator[Step, None, int]:
        """No such file: -EBADF."""
        yield from ()
        return -EBADF

    def unbind(self, slot: Slot) -> Generator[Step, None, None]:
        """Nothing is bound."""
        yield from ()


class SlotSet(NamedTuple):
    """struct kvm_memslots: one address space's slots by ascending gfn, their first gfns, and the
    generation that tells cached MMIO from new.
    """

    slots: tuple[Slot, ...]
    bases: tuple[int, ...]
    generation: int


class MemSlots(Journalled):
    """The memslots of one VM. spaces: address spaces, 1 or 2.

    mixed: (base_gfn of the slot, level, gfn) -> True for each range that could be one large page
    if all of it were private or all of it shared (lpage.py). Part of a slot in Linux.
    nr_pages: pages of all slots. mn_active_invalidate_count: MMU notifiers between start and end;
    no set of slots is replaced meanwhile.
    """

    nr_pages = Field(0)
    mn_active_invalidate_count = Field(0)

    def __init__(self, journal: Journal, spaces: int = 1) -> None:
        self.fields = Fields(journal, self)
        self.mixed = Table(journal)
        self.spaces = spaces
        self._sets = Index(journal)
        for as_id in range(spaces):
            self._sets.put(as_id, SlotSet((), (), as_id))

    @property
    def generation(self) -> int:
        """Of address space 0; another one can be set."""
        return self.generation_of(0)

    @generation.setter
    def generation(self, generation: int) -> None:
        self.set_generation(generation)

    def generation_of(self, as_id: int) -> int:
        """Rises by `spaces` with each new set; bit 63: a grace period has not ended yet."""
        generation: int = self._sets.view[as_id].generation
        return generation

    def set_generation(self, generation: int, as_id: int = 0) -> None:
        """Give the present set another generation."""
        self._sets.put(as_id, self._sets.view[as_id]._replace(generation=generation))

    def find(self, gfn: int, as_id: int = 0) -> Slot | None:
        """The slot that holds `gfn`, or None. Source: kvm_host.h, __gfn_to_memslot."""
        present: SlotSet = self._sets.view[as_id]
        place = bisect_right(present.bases, gfn)
        if not place:
            return None
        slot = present.slots[place - 1]
        return slot if gfn - slot.base_gfn < slot.npages else None

    def all(self, as_id: int = 0) -> tuple[Slot, ...]:
        """All slots of an address space by ascending gfn."""
        slots: tuple[Slot, ...] = self._sets.view[as_id].slots
        return slots

    def by_id(self, slot_id: int, as_id: int = 0) -> Slot | None:
        """The slot of that number, or None. Source: kvm_host.h, id_to_memslot."""
        return next((slot for slot in self.all(as_id) if slot.slot_id == slot_id), None)

    def overlapping(self, start: int, end: int, as_id: int = 0) -> tuple[Slot, ...]:
        """Slots with a gfn in [start, end). Source: kvm_for_each_memslot_in_gfn_range."""
        return tuple(s for s in self.all(as_id) if s.base_gfn < end and start < s.end_gfn)

    def overlapping_hva(self, start: int, end: int, as_id: int = 0) -> tuple[Slot, ...]:
        """Slots with an HVA in [start, end). Source: kvm_for_each_memslot_in_hva_range."""
        return tuple(
            slot
            for slot in sorted(self.all(as_id), key=lambda slot: slot.userspace_addr)
            if slot.userspace_addr < end and start < slot.userspace_end
        )

    def replace(self, old: Slot | None, new: Slot | None, as_id: int) -> None:
        """Put a new set in place, without `old` and with `new`; its generation is marked as in
        progress. Source: kvm_main.c, kvm_replace_memslot and kvm_swap_active_memslots.
        """
        slots = [slot for slot in self.all(as_id) if old is None or slot.slot_id != old.slot_id]
        slots += [new] if new is not None else []
        slots.sort(key=lambda slot: slot.base_gfn)
        generation = self.generation_of(as_id) | KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
        bases = tuple(slot.base_gfn for slot in slots)
        self._sets.put(as_id, SlotSet(tuple(slots), bases, generation))

    def next_generation(self, as_id: int) -> int:
        """What the present set's generation will be when its grace period has ended.

        Generations of different address spaces never meet: each goes up in steps of `spaces`.
        """
        return (self.generation_of(as_id) & ~KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS) + self.spaces
