"""The life of a vCPU's root: made when the vCPU wants to enter, kept or freed when CR3 changes,
given up when it is obsolete. What it is made of is the design's.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (kvm_mmu_load, kvm_mmu_free_roots, kvm_mmu_new_pgd,
fast_pgd_switch, kvm_mmu_free_obsolete_roots, kvm_mmu_sync_roots).
"""

from __future__ import annotations

from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.pae_guest import snapshot_pdptrs
from tdxlab.kvm.pae_rfc import HeaderRoot
from tdxlab.kvm.pae_special import Doing, SpecialRoot, Work
from tdxlab.kvm.shadow_pages import (
    commit_zap_page,
    drop_root,
    is_obsolete_sp,
    topup_page_cache,
)
from tdxlab.kvm.shadow_params import SPECIAL
from tdxlab.kvm.shadow_vm import (
    LOAD_MMU_PGD,
    MMU_SYNC,
    NO_ROOT,
    Root,
    ShadowPage,
    ShadowVcpu,
    ShadowVm,
)
from tdxlab.kvm.vm import INVALID_PAGE

_SPECIAL_ROOT = SpecialRoot()
_HEADER_ROOT = HeaderRoot()


def design_of(vm: ShadowVm) -> SpecialRoot | HeaderRoot:
    """What the VM's PAE roots are made of."""
    return _SPECIAL_ROOT if vm.params.design == SPECIAL else _HEADER_ROOT


def topup_caches(vcpu: ShadowVcpu) -> Work:
    """Get everything that may be needed under mmu_lock. Returns 0, or -ENOMEM; then nothing has
    changed but that some of it is there. Source: mmu.c, mmu_topup_memory_caches.
    """
    yield ("mmu_topup_memory_caches", vcpu.vcpu_id)
    return topup_page_cache(vcpu) or (yield from design_of(vcpu.vm).topup(vcpu))


def kvm_mmu_load(vcpu: ShadowVcpu) -> Work:
    """Give a vCPU without a root one. Returns 0 or -errno."""
    vm = vcpu.vm
    error = yield from topup_caches(vcpu)
    if error:
        return error
    hpa = yield from design_of(vm).alloc_root(vcpu)
    vcpu.root = Root(hpa, vcpu.cr3 if vcpu.guest_level else 0)
    vm.count("roots_built")
    yield from kvm_mmu_sync_roots(vcpu)
    yield ("load_mmu_pgd", hpa)
    vcpu.requests -= {LOAD_MMU_PGD}
    vm.count("tlb_flush_current")
    return 0


def kvm_mmu_sync_roots(vcpu: ShadowVcpu) -> Doing:
    """Bring what the guest may have written unnoticed into line, before it runs on."""
    vm = vcpu.vm
    if vcpu.guest_level and vcpu.root.hpa not in (INVALID_PAGE, vm.zero_page):
        yield from vm.mmu_lock.lock(WRITE)
        design_of(vm).sync(vcpu)
        vm.mmu_lock.unlock(WRITE)
    vcpu.requests -= {MMU_SYNC}


def kvm_mmu_free_roots(vcpu: ShadowVcpu, *, current: bool = True, previous: bool = False) -> Doing:
    """Give up the present root, the kept ones, or both. Twice is no mistake."""
    vm = vcpu.vm
    kept = [root for root in vcpu.prev_roots if previous and root.hpa != INVALID_PAGE]
    is_held = current and vcpu.root.hpa != INVALID_PAGE
    if not kept and not is_held:
        return
    invalid: list[ShadowPage] = []
    yield from vm.mmu_lock.lock(WRITE)
    for root in kept:
        drop_root(vm, vm.sps[root.hpa], invalid)
        at = vcpu.prev_roots.index(root)
        vcpu.prev_roots = (*vcpu.prev_roots[:at], NO_ROOT, *vcpu.prev_roots[at + 1 :])
    if is_held and vcpu.root.hpa != vm.zero_page:
        yield from design_of(vm).free_root(vcpu, invalid)
    if is_held:
        vcpu.root = NO_ROOT
    commit_zap_page(vm, invalid)
    vm.mmu_lock.unlock(WRITE)


def kvm_mmu_free_obsolete_roots(vcpu: ShadowVcpu) -> Doing:
    """Give up what is obsolete; a root without a header always is."""
    vm = vcpu.vm
    if design_of(vm).is_obsolete(vcpu):
        yield from kvm_mmu_free_roots(vcpu)
    if any(r.hpa != INVALID_PAGE and is_obsolete_sp(vm, vm.sps[r.hpa]) for r in vcpu.prev_roots):
        yield from kvm_mmu_free_roots(vcpu, current=False, previous=True)


def kvm_mmu_new_pgd(vcpu: ShadowVcpu) -> Doing:
    """CR3 has another value: take a root that was kept for it, or give up the present one.

    A root without a header is never kept. One that was may be out of sync; who loads CR3 sees to
    that. Source: mmu.c, kvm_mmu_new_pgd and fast_pgd_switch.
    """
    vm = vcpu.vm
    if vm.root_sp(vcpu) is None:
        yield from kvm_mmu_free_roots(vcpu)
    if vcpu.root.hpa == INVALID_PAGE:
        _find_without_current(vcpu)
    else:
        yield from _find_and_keep_current(vcpu)
    if vcpu.root.hpa != INVALID_PAGE:
        vm.count("roots_reused")
        vcpu.make_request(LOAD_MMU_PGD)


def is_root_usable(vcpu: ShadowVcpu, root: Root) -> bool:
    """The root was made for what CR3 says now. Source: mmu.c, is_root_usable."""
    sp = vcpu.vm.sps.get(root.hpa)
    if sp is None or sp.role != vcpu.role or (root.pgd != vcpu.cr3 and not sp.is_direct):
        return False
    is_pae = vcpu.guest_level == 3 and vcpu.vm.params.pdptes_in_key
    return not is_pae or bool(sp.pdptes == snapshot_pdptrs(vcpu))


def _find_without_current(vcpu: ShadowVcpu) -> None:
    """Source: mmu.c, cached_root_find_without_current."""
    for place, root in enumerate(vcpu.prev_roots):
        if is_root_usable(vcpu, root):
            vcpu.root = root
            rest = vcpu.prev_roots[:place] + vcpu.prev_roots[place + 1 :]
            vcpu.prev_roots = (*rest, NO_ROOT)
            return


def _find_and_keep_current(vcpu: ShadowVcpu) -> Doing:
    """The present root becomes the newest of the kept ones; if none of them is wanted, the oldest
    goes. Source: mmu.c, cached_root_find_and_keep_current.
    """
    roots = [vcpu.root, *vcpu.prev_roots]
    for place, root in enumerate(roots):
        if is_root_usable(vcpu, root):
            del roots[place]
            vcpu.root, vcpu.prev_roots = root, tuple(roots)
            return
    vcpu.root, vcpu.prev_roots = roots[-1], tuple(roots[:-1])
    yield from kvm_mmu_free_roots(vcpu)
