"""Memslots: which guest frames have memory behind them, and whose.

Source: Linux 6.16, include/linux/kvm_host.h (struct kvm_memory_slot), virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

# -- flags of KVM_SET_USER_MEMORY_REGION2, and the internal one

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEMSLOT_INVALID = 1 << 16

#: KVM_MEM_MAX_NR_PAGES: pages that one slot may have.
MAX_NR_PAGES = (1 << 31) - 1


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

    def gfn_to_hva(self, gfn: int) -> int:
        """Address of the gfn's shared memory in user space. Source: __gfn_to_hva_memslot."""
        return self.userspace_addr + (gfn - self.base_gfn << 12)


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


class GuestMemory(Protocol):
    """The guest_memfd files of one VM."""

    def get_pfn(self, gmem: int, index: int) -> int:
        """Frame number of page `index` of the file, prepared on first use; -errno if it fails."""
        ...
