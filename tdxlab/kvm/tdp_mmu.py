"""The TDP MMU's faults: how an access becomes a mapping, and lookups.

One fault installs every missing table, from the top down, and then the leaf, all in one section of
mmu_lock held for read. Whatever gets in its way makes it retry.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm import caches
from tdxlab.kvm.dirty_log import mark_page_dirty_in_slot
from tdxlab.kvm.hugepage import (
    disallowed_hugepage_adjust,
    kvm_mmu_hugepage_adjust,
    track_possible_nx_huge_page,
)
from tdxlab.kvm.page_fault import (
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    PageFault,
)
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import ACC_ALL, IS_MIRROR, LEVEL_MASK, child_role
from tdxlab.kvm.roots import tdp_mmu_get_root_for_fault
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.kvm.spte import (
    FROZEN_SPTE,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    SPTE_MMU_PRESENT_MASK,
    is_access_allowed,
    is_last_spte,
    is_mmio_spte,
    leaf_spte_change_needs_tlb_flush,
    make_mmio_spte,
    make_spte,
    spte_to_pfn,
)
from tdxlab.kvm.tdp_iter import TdpIter, for_each_tdp_pte
from tdxlab.kvm.tdp_set import (
    Doing,
    tdp_mmu_link_sp,
    tdp_mmu_set_spte_atomic,
    tdp_mmu_split_huge_page,
)
from tdxlab.kvm.vm import MmuPage, Vcpu, Vm

#: What a role says besides the level.
_NOT_LEVEL = ~LEVEL_MASK


def alloc_child_sp(vcpu: Vcpu, it: TdpIter) -> MmuPage:
    """A new table for below the entry at `it`, from the vCPU's caches; with an external page in a
    mirror. Source: tdp_mmu_alloc_sp, tdp_mmu_init_child_sp, kvm_mmu_alloc_external_spt.
    """
    role = child_role(it.root.role & _NOT_LEVEL | it.level)
    external_spt = caches.take_external_page(vcpu) if it.is_mirror else NO_PAGE
    sp = MmuPage(caches.take_table_page(vcpu), role, it.gfn, external_spt, it.word)
    vcpu.vm.init_table(sp)
    return sp


# -- faults


def kvm_tdp_mmu_map(vcpu: Vcpu, fault: PageFault) -> Doing:
    """Install every missing level and the leaf for a fault; mmu_lock held for read.

    Returns RET_PF_RETRY if an entry is frozen or changed meanwhile; else RET_PF_FIXED, _SPURIOUS,
    or _EMULATE (an MMIO entry).
    Source: kvm_tdp_mmu_map, tdp_mmu_map_handle_target_level. Differs: nothing shadows guest tables,
    so no write is ever left to the emulator (RET_PF_WRITE_PROTECTED).
    """
    vm = vcpu.vm
    root = tdp_mmu_get_root_for_fault(vcpu, fault)
    if fault.max_level > 1 or fault.nx_huge_page_workaround_enabled:
        kvm_mmu_hugepage_adjust(vcpu, fault)
    it = TdpIter(vm, root, 1, fault.gfn, 0 if root.role & IS_MIRROR else vm.gfn_direct_bits)
    installed = 0
    while it.valid:
        it.descend(fault.goal_level)
        spte, level = it.old_spte, it.level
        if fault.nx_huge_page_workaround_enabled:
            disallowed_hugepage_adjust(vm, fault, spte, level)
        if spte == FROZEN_SPTE:
            break
        if level == fault.goal_level:
            is_present = spte & SPTE_MMU_PRESENT_MASK
            new_spte = (_wanted_leaf if is_present else _make_leaf)(vm, fault, it)
            if new_spte != spte and (yield from tdp_mmu_set_spte_atomic(vm, it, new_spte)):
                break
            if not is_present and fault.slot is not None:
                return RET_PF_FIXED
            return _leaf_installed(vcpu, fault, it, spte, new_spte)
        if spte & SPTE_MMU_PRESENT_MASK and not spte & PT_PAGE_SIZE_MASK:
            continue
        if level == installed or (yield from _install_table(vcpu, fault, it)):
            break
        installed = level
    return RET_PF_RETRY


def _install_table(vcpu: Vcpu, fault: PageFault, it: TdpIter) -> Doing:
    """Put a table below the entry at `it`, which is empty or a large leaf; 0 or an errno."""
    vm = vcpu.vm
    sp = alloc_child_sp(vcpu, it)
    if fault.huge_page_disallowed:
        sp = sp._replace(nx_huge_page_disallowed=True)
        vm.sps.put(sp.spt, sp)
    if it.old_spte & SPTE_MMU_PRESENT_MASK:
        if it.is_mirror:
            vm.bug("kvm_tdp_mmu_map: a large page in a mirror")
        error = yield from tdp_mmu_split_huge_page(vm, it, sp, shared=True)
    else:
        error = yield from tdp_mmu_link_sp(vm, it, sp, shared=True)
    if error:
        vm.free_table(sp)
        return error
    if (
        fault.huge_page_disallowed
        and fault.req_level >= it.level
        and vm.sps[sp.spt].nx_huge_page_disallowed
    ):
        track_possible_nx_huge_page(vm, sp)
    return 0


def _wanted_leaf(vm: Vm, fault: PageFault, it: TdpIter) -> int:
    """The leaf to install at `it`, where something is: a leaf that allows the access stays."""
    old_spte = it.old_spte
    if is_last_spte(old_spte, it.level):
        allowed = is_access_allowed(old_spte, write=fault.write, execute=fault.execute)
        if fault.prefetch or allowed:
            if fault.pfn != spte_to_pfn(old_spte):
                vm.warn("a spurious fault found another page than the one mapped")
            return old_spte
    return _make_leaf(vm, fault, it)


def _leaf_installed(vcpu: Vcpu, fault: PageFault, it: TdpIter, old_spte: int, new_spte: int) -> int:
    """What became of the fault: RET_PF_FIXED, _SPURIOUS, or _EMULATE for an MMIO entry."""
    vm = vcpu.vm
    ret = RET_PF_SPURIOUS if new_spte == old_spte else RET_PF_FIXED
    if old_spte & SPTE_MMU_PRESENT_MASK and ret == RET_PF_FIXED:
        _flush_replaced(vm, it, old_spte, new_spte)
    if fault.slot is None and is_mmio_spte(vm, new_spte):
        vcpu.count("pf_mmio_spte_created")
        return RET_PF_EMULATE
    return ret


def _make_leaf(vm: Vm, fault: PageFault, it: TdpIter) -> int:
    """The leaf that answers the fault; a writable one marks its page dirty, if that is logged."""
    if fault.slot is None:
        return make_mmio_spte(vm, it.gfn, vm.slots.generation)
    role = it.root.role & _NOT_LEVEL | it.level
    spte = make_spte(vm, role, ACC_ALL, fault.pfn, fault.prefetch, fault.map_writable)
    if fault.slot.flags & KVM_MEM_LOG_DIRTY_PAGES and spte & PT_WRITABLE_MASK:
        mark_page_dirty_in_slot(vm, fault.slot, it.gfn)
    return spte


def _flush_replaced(vm: Vm, it: TdpIter, old_spte: int, new_spte: int) -> None:
    """A present entry was replaced by a leaf: flush if it was a table, or lost its write bit."""
    was_table = not is_last_spte(old_spte, it.level)
    lost_write = not was_table and leaf_spte_change_needs_tlb_flush(old_spte, new_spte)
    if lost_write:
        vm.warn("a fault took write permission away")
    if was_table or lost_write:
        vm.flush_remote_tlbs_gfn(it.gfn, it.level)


# -- lookups


def kvm_tdp_mmu_get_walk(vcpu: Vcpu, gpa: int, root: MmuPage) -> dict[int, int]:
    """Level -> SPTE, from the root down to where the walk for `gpa` ends; lockless.

    gpa: without the shared bit; one that has it finds nothing. Source: __kvm_tdp_mmu_get_walk.
    """
    gfn = gpa >> PAGE_SHIFT
    return {it.level: it.old_spte for it in for_each_tdp_pte(vcpu.vm, root, gfn, gfn + 1)}


def kvm_tdp_mmu_gpa_is_mapped(vcpu: Vcpu, gpa: int) -> bool:
    """True if a present leaf maps `gpa` in the tree that its shared bit chooses.

    Source: kvm_tdp_mmu_gpa_is_mapped.
    """
    vm = vcpu.vm
    direct = not vm.gfn_direct_bits or gpa >> PAGE_SHIFT & vm.gfn_direct_bits
    root = vm.sps[vcpu.root_hpa if direct else vcpu.mirror_root_hpa]
    walk = kvm_tdp_mmu_get_walk(vcpu, gpa, root)
    if not walk:
        return False
    level = min(walk)
    return bool(walk[level] & SPTE_MMU_PRESENT_MASK) and is_last_spte(walk[level], level)


def kvm_tdp_mmu_fast_pf_get_last_sptep(vcpu: Vcpu, gfn: int) -> tuple[int, int, int] | None:
    """(index in `memory.words`, SPTE, level) of the last entry on the way to `gfn` in the direct
    tree, None if the walk cannot start. Source: kvm_tdp_mmu_fast_pf_get_last_sptep.
    """
    found = None
    for it in for_each_tdp_pte(vcpu.vm, vcpu.vm.sps[vcpu.root_hpa], gfn, gfn + 1):
        found = it.word, it.old_spte, it.level
    return found
