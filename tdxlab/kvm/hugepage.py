"""How large a page one fault may map.

Three things lower the level: what the pfn lookup said (guest_memfd gives 4 KiB pages), what the
slot allows around this gfn, and the iTLB multihit workaround, under which nothing executable is
mapped large.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

from tdxlab.kvm import lpage
from tdxlab.kvm.page_fault import KVM_PFN_ERR_FAULT, KVM_PFN_NOSLOT, PageFault
from tdxlab.kvm.spte import PT_PAGE_SIZE_MASK, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.vm import MmuPage, Vcpu, Vm, pages_per_level

_ERROR_OR_NOSLOT = KVM_PFN_ERR_FAULT | KVM_PFN_NOSLOT


def kvm_mmu_hugepage_adjust(vcpu: Vcpu, fault: PageFault) -> None:
    """Choose `goal_level`, and round the pfn down to it; mmu_lock held for read.

    req_level is what could be mapped if instruction fetches were not to be kept off large pages.
    Leaves 4 KiB where max_level is 4 KiB, where there is no page, and where writes are logged.
    Source: kvm_mmu_hugepage_adjust.
    """
    fault.huge_page_disallowed = fault.nx_huge_page_workaround_enabled and fault.execute
    slot = fault.slot
    if fault.max_level == 1 or fault.pfn & _ERROR_OR_NOSLOT or slot is None:
        return
    if slot.is_dirty_tracked:
        return
    fault.req_level = lpage.max_mapping_level(
        vcpu.vm, slot, fault.gfn, fault.max_level, fault.is_private
    )
    if fault.req_level == 1 or fault.huge_page_disallowed:
        return
    fault.goal_level = fault.req_level
    mask = pages_per_level(fault.goal_level) - 1
    if (fault.gfn ^ fault.pfn) & mask:
        vcpu.vm.warn("kvm_mmu_hugepage_adjust: gfn and pfn are aligned differently")
    fault.pfn &= ~mask


def disallowed_hugepage_adjust(vm: Vm, fault: PageFault, spte: int, level: int) -> None:
    """Go one level deeper where a table stands in for a large page that must not be executable.

    spte, level: of the entry that the walk has reached. Source: disallowed_hugepage_adjust.
    """
    if level == 1 or level != fault.goal_level:
        return
    if not spte & SPTE_MMU_PRESENT_MASK or spte & PT_PAGE_SIZE_MASK:
        return
    if vm.sp_of(spte).nx_huge_page_disallowed:
        fault.pfn |= fault.gfn & (pages_per_level(level) - pages_per_level(level - 1))
        fault.goal_level = level - 1


def track_possible_nx_huge_page(vm: Vm, sp: MmuPage) -> None:
    """Remember a table that stands where an executable large page could.

    Source: mmu.c, track_possible_nx_huge_page.
    """
    if sp.spt not in vm.possible_nx_huge_pages:
        newest = max(vm.possible_nx_huge_pages.values(), default=0)
        vm.possible_nx_huge_pages.put(sp.spt, newest + 1)
        vm.add_stat("nx_lpage_splits", 1)


def unaccount_nx_huge_page(vm: Vm, sp: MmuPage) -> None:
    """The table no longer stands for an executable large page. Source: mmu.c."""
    vm.sps.put(sp.spt, sp._replace(nx_huge_page_disallowed=False))
    if sp.spt in vm.possible_nx_huge_pages:
        vm.possible_nx_huge_pages.drop(sp.spt)
        vm.add_stat("nx_lpage_splits", -1)
