"""struct kvm_page_fault: one fault on its way, and what can come of it.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu_internal.h; arch/x86/include/asm/kvm_host.h (PFERR_*).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdxlab.kvm.slots import Slot

# -- what a fault handler returns; negative numbers are -errno

RET_PF_CONTINUE = 0
RET_PF_RETRY = 1
RET_PF_EMULATE = 2
RET_PF_WRITE_PROTECTED = 3
RET_PF_INVALID = 4
RET_PF_FIXED = 5
RET_PF_SPURIOUS = 6

RET_PF_NAMES = {
    RET_PF_CONTINUE: "RET_PF_CONTINUE",
    RET_PF_RETRY: "RET_PF_RETRY",
    RET_PF_EMULATE: "RET_PF_EMULATE",
    RET_PF_WRITE_PROTECTED: "RET_PF_WRITE_PROTECTED",
    RET_PF_INVALID: "RET_PF_INVALID",
    RET_PF_FIXED: "RET_PF_FIXED",
    RET_PF_SPURIOUS: "RET_PF_SPURIOUS",
}

# -- error code bits

PFERR_PRESENT_MASK = 1 << 0
PFERR_WRITE_MASK = 1 << 1
PFERR_USER_MASK = 1 << 2
PFERR_RSVD_MASK = 1 << 3
PFERR_FETCH_MASK = 1 << 4
PFERR_GUEST_FINAL_MASK = 1 << 32
#: Synthetic: the access is to private memory.
PFERR_PRIVATE_ACCESS = 1 << 49

#: pfn of a gfn that no memslot backs. Source: kvm_host.h, KVM_PFN_NOSLOT.
KVM_PFN_NOSLOT = 1 << 63
#: pfn of a lookup that failed. Source: kvm_host.h, KVM_PFN_ERR_FAULT.
KVM_PFN_ERR_FAULT = 0x7FF << 52


class PageFault:
    """One fault. addr: GPA as the CPU saw it, shared bit included. error_code: PFERR_* bits, which
    say what kind of access it was. prefetch: nobody accessed the page yet. gfn: without the shared
    bit. slot: the memslot that holds the gfn, None without one.

    max_level: the greatest level that may be mapped; req_level: what the host's page would allow;
    goal_level: what will be mapped. mmu_seq: `mmu_invalidate_seq` when the pfn was looked up.
    """

    __slots__ = (
        *("addr", "error_code", "prefetch", "is_private", "gfn", "slot"),
        *("max_level", "req_level", "goal_level", "nx_huge_page_workaround_enabled"),
        *("huge_page_disallowed", "mmu_seq", "pfn", "map_writable"),
    )

    def __init__(
        self,
        addr: int,
        error_code: int,
        prefetch: bool = False,
        gfn: int = 0,
        slot: Slot | None = None,
    ) -> None:
        self.addr = addr
        self.error_code = error_code
        self.prefetch = prefetch
        self.is_private = error_code & PFERR_PRIVATE_ACCESS != 0
        self.gfn = gfn
        self.slot = slot
        self.max_level = 3
        self.req_level = self.goal_level = 1
        self.nx_huge_page_workaround_enabled = self.huge_page_disallowed = False
        self.mmu_seq = 0
        self.pfn = KVM_PFN_ERR_FAULT
        self.map_writable = False

    @property
    def execute(self) -> bool:
        """An instruction fetch."""
        return self.error_code & PFERR_FETCH_MASK != 0

    @property
    def write(self) -> bool:
        """A write."""
        return self.error_code & PFERR_WRITE_MASK != 0
