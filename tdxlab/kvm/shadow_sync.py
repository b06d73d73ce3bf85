"""Bringing shadow pages into line with the guest's tables, and finding a page that is.

A table of level 1 may be written by the guest without KVM noticing, until the guest invalidates the
TLB: then its entries are compared. All of it happens with mmu_lock held for write.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (kvm_sync_page, mmu_sync_children,
__kvm_mmu_get_shadow_page), mmu/paging_tmpl.h (sync_spte), mmu/spte.c (make_spte).
"""

from __future__ import annotations

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT
from tdxlab.kvm.pae_guest import GuestStep, frame, gpte_access, rsvd_bits
from tdxlab.kvm.pae_pdpte import (
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
)
from tdxlab.kvm.role import ACC_USER_MASK, ACC_WRITE_MASK, Role
from tdxlab.kvm.shadow_pages import (
    commit_zap_page,
    drop_spte,
    find_page,
    new_page,
    prepare_zap_page,
    present_entries,
    set_leaf,
    shadowing,
    try_to_unsync_pages,
    unsync_below,
    write_protect_gfn,
)
from tdxlab.kvm.shadow_params import ShadowRole
from tdxlab.kvm.shadow_vm import ShadowPage, ShadowVcpu, ShadowVm
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK

#: Role bits in which a page may differ from the MMU that syncs it. Source: mmu.c,
#: kvm_sync_page_check; the RFC adds its two.
_MAY_DIFFER = (
    Role.level.mask
    | Role.access.mask
    | Role.quadrant.mask
    | Role.passthrough.mask
    | ShadowRole.level_promoted.mask
    | ShadowRole.pae_root.mask
)


def make_spte(vm: ShadowVm, gfn: int, access: int, *, synchronizing: bool = False) -> int:
    """A leaf that maps `gfn`; not writable if KVM has to see writes to it.

    Source: spte.c, make_spte. Differs: accessed from the beginning, and dirty if writable.
    """
    spte = vm.gfn_to_hpa(gfn) | PT_PRESENT_MASK | PT_ACCESSED_MASK | SPTE_MMU_PRESENT_MASK
    spte |= vm.params.me_value
    if access & ACC_USER_MASK:
        spte |= PT_USER_MASK
    if access & ACC_WRITE_MASK and try_to_unsync_pages(vm, gfn, synchronizing=synchronizing):
        spte |= PT_WRITABLE_MASK | PT_DIRTY_MASK
    return spte


# -- one page


def gpte_of(vm: ShadowVm, sp: ShadowPage, sptep: int) -> GuestStep:
    """The guest's entry that an SPTE of a level-1 page shadows, as it is now.

    Source: paging_tmpl.h, get_level1_sp_gpa.
    """
    role = Role(sp.role)
    size = 4 if role.has_4_byte_gpte else 8
    index = (sptep & PAGE_OFFSET_MASK) // 8 + (role.quadrant << 9)
    gpa = (sp.gfn << PAGE_SHIFT) + index * size
    return GuestStep(1, sp.gfn, gpa, size, vm.read_guest(gpa, size) or 0, role.access)


def sync_spte(vcpu: ShadowVcpu, sp: ShadowPage, sptep: int) -> bool:
    """Bring one present leaf into line; True if a TLB could hold what it was before.

    Source: paging_tmpl.h, sync_spte.
    """
    vm, step = vcpu.vm, gpte_of(vcpu.vm, sp, sptep)
    gfn, old_access = vm.leaves[sptep]
    is_valid = step.value & PT_PRESENT_MASK and step.value & PT_ACCESSED_MASK
    vm.count("synced")
    if not is_valid or step.value & rsvd_bits(vcpu, step) or frame(vcpu, step.value) != gfn:
        drop_spte(vm, sptep)
        return True
    access = step.access & gpte_access(step.value)
    if not step.value & PT_DIRTY_MASK:
        access &= ~ACC_WRITE_MASK
    set_leaf(vm, sptep, make_spte(vm, gfn, access, synchronizing=True), gfn, access)
    return bool(old_access & ~access)


def sync_page(vcpu: ShadowVcpu, sp: ShadowPage, invalid: list[ShadowPage]) -> bool | None:
    """Compare every entry of a page with the guest's; True if something must be flushed. A page
    that this MMU cannot compare is zapped: None. Source: mmu.c, kvm_sync_page.
    """
    if (sp.role ^ vcpu.role) & ~_MAY_DIFFER:
        prepare_zap_page(vcpu.vm, sp, invalid)
        return None
    changed = [sync_spte(vcpu, sp, sptep) for sptep, _ in present_entries(vcpu.vm, sp)]
    return any(changed)


def sync_children(vcpu: ShadowVcpu, parent: ShadowPage) -> None:
    """Bring every page below `parent` into line, and notice from now on if the guest writes the
    tables they shadow. Source: mmu.c, mmu_sync_children.
    """
    vm, invalid = vcpu.vm, list[ShadowPage]()
    pages = unsync_below(vm, parent)
    protected = [write_protect_gfn(vm, sp.gfn) for sp in pages]
    flush = True in protected
    for sp in pages:
        vm.update_sp(vm.sps[sp.spt], unsync=False)
        flush = bool(sync_page(vcpu, vm.sps[sp.spt], invalid)) or flush
    if flush and not invalid:
        vm.flush_remote_tlbs()
    commit_zap_page(vm, invalid)


# -- finding


def get_shadow_page(vcpu: ShadowVcpu, gfn: int, role: int) -> ShadowPage:
    """The page for a gfn and a role: one that is there, in line with the guest's table but still
    out of sync, or a new one. Source: mmu.c, kvm_mmu_get_shadow_page.
    """
    vm, invalid = vcpu.vm, list[ShadowPage]()
    for other in shadowing(vm, gfn):
        if Role(role).level > 1 and other.unsync:
            prepare_zap_page(vm, other, invalid)
    sp = find_page(vm, gfn, role)
    if sp is not None and sp.unsync:
        flush = sync_page(vcpu, sp, invalid)
        if flush:
            vm.flush_remote_tlbs()
        sp = None if flush is None else sp
    commit_zap_page(vm, invalid)
    return sp or new_page(vcpu, gfn, role)
