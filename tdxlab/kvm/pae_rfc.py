"""PAE roots as an RFC of December 2021 wanted them: shadow pages like any other, told apart by a
bit in the role. And as its review wanted them.

The root has a header, stands in the hash, is shared by vCPUs, and can be kept while the vCPU uses
another one. Its page has to lie below 4 GiB, so one is kept ready for each vCPU. The RFC lets slots
that link nothing hold a default entry, which is present and leads to a directory of zeros. The
review found no reason for that: a CPU takes an entry that is not present.

Source: the RFC and its review, on the mailing list; in Linux 6.16 nothing of it.
Differs: its mail does not say what becomes of a PAE guest's root when the guest changes a PDPTE, or
has two tables in one page. Here such a root is found by the four PDPTEs too that it was made for
(`pdptes_in_key`), and no write to the guest's table concerns it. The mail asks the allocator for
zeros and decrypts afterwards; zeros read as noise then, so here the page is cleared at the end.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import ENOMEM

from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.pae_guest import guest_root_gfn, snapshot_pdptrs
from tdxlab.kvm.pae_pdpte import PDPTES, make_root_pdpte, pdpte_index
from tdxlab.kvm.pae_special import Doing, Work
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.shadow_pages import (
    TABLE_PAGE,
    alloc_pae_root_page,
    drop_root,
    find_page,
    free_pae_root_page,
    hold_root,
    init_page,
    is_obsolete_sp,
)
from tdxlab.kvm.shadow_params import RFC
from tdxlab.kvm.shadow_sync import sync_children
from tdxlab.kvm.shadow_vm import ShadowPage, ShadowVcpu, ShadowVm
from tdxlab.steps import Step


def make_default_pdpte(vm: ShadowVm) -> int:
    """When the module is loaded: a directory of zeros, and the entry that leads to it. Returns 0,
    or -ENOMEM.
    """
    if vm.params.design != RFC:
        return 0
    hpa = vm.pages.alloc_page(TABLE_PAGE)
    if hpa == NO_PAGE:
        return -ENOMEM
    vm.fill_table(hpa, 0)
    vm.default_pdpte = make_root_pdpte(hpa, vm.params.me_value)
    assert not vm.is_present(vm.default_pdpte)
    return 0


class HeaderRoot:
    """The design with headers, default PDPTE or not."""

    def create(self, vcpu: ShadowVcpu) -> int:
        """Nothing is needed yet."""
        return 0

    def destroy(self, vcpu: ShadowVcpu) -> None:
        """Give back the page that was kept ready."""
        if vcpu.pae_root_cache != NO_PAGE:
            free_pae_root_page(vcpu.vm, vcpu.pae_root_cache)
            vcpu.pae_root_cache = NO_PAGE

    def topup(self, vcpu: ShadowVcpu) -> Work:
        """Have one page below 4 GiB ready. Returns 0, or -ENOMEM."""
        vm = vcpu.vm
        if vcpu.pae_root_cache != NO_PAGE:
            return 0
        yield ("mmu_topup_pae_root_cache",)
        hpa = alloc_pae_root_page(vm)
        if hpa == NO_PAGE:
            return -ENOMEM
        vm.fill_table(hpa, 0)
        vcpu.pae_root_cache = hpa
        for index in range(PDPTES if vm.default_pdpte else 0):
            vm.write(hpa + 8 * index, vm.default_pdpte)
            vm.count("slots_stored")
        return 0

    def alloc_root(self, vcpu: ShadowVcpu) -> Generator[Step, None, int]:
        """Find the root, or take the page that was kept ready; returns its HPA."""
        vm, level = vcpu.vm, vcpu.guest_level
        if level and guest_root_gfn(vcpu) >= vm.npages:
            return vm.zero_page
        pdptrs = snapshot_pdptrs(vcpu) if level == 3 and vm.params.pdptes_in_key else ()
        yield from vm.mmu_lock.lock(WRITE)
        try:
            gfn = guest_root_gfn(vcpu) if level else 0
            sp = find_page(vm, gfn, vcpu.role, pdptrs)
            if sp is None:
                sp = init_page(vm, vcpu.pae_root_cache, gfn, vcpu.role, pdptrs)
                vcpu.pae_root_cache = NO_PAGE
            return hold_root(vm, sp).spt
        finally:
            vm.mmu_lock.unlock(WRITE)

    def slots(self, vcpu: ShadowVcpu) -> tuple[int, ...]:
        """The four entries of the present root; none without one."""
        sp = vcpu.vm.root_sp(vcpu)
        return () if sp is None else vcpu.vm.read_table(sp.spt)[:PDPTES]

    def free_root(self, vcpu: ShadowVcpu, invalid: list[ShadowPage]) -> Doing:
        """Give up the reference to the present root."""
        sp = vcpu.vm.root_sp(vcpu)
        assert sp is not None
        yield ("mmu_free_root_page", sp.spt)
        drop_root(vcpu.vm, vcpu.vm.sps[sp.spt], invalid)

    def first_entry(self, vcpu: ShadowVcpu, va: int) -> tuple[int, int]:
        """(level, HPA) of the entry at which a walk begins: level 3; level 0 on a dummy root."""
        sp = vcpu.vm.root_sp(vcpu)
        return (0, 0) if sp is None else (3, sp.spt + 8 * pdpte_index(va))

    def sync(self, vcpu: ShadowVcpu) -> None:
        """The pages below the root."""
        sp = vcpu.vm.root_sp(vcpu)
        assert sp is not None
        sync_children(vcpu, sp)

    def is_obsolete(self, vcpu: ShadowVcpu) -> bool:
        """As the header says; a dummy root has none. Source: mmu.c, is_obsolete_root."""
        sp = vcpu.vm.root_sp(vcpu)
        return sp is None or is_obsolete_sp(vcpu.vm, sp)

    def is_stale(self, vcpu: ShadowVcpu) -> bool:
        """A fault must be handled anew. Source: mmu.c, is_page_fault_stale."""
        return self.is_obsolete(vcpu)
