"""PAE roots as Linux 6.16 has them: a table of four entries for each vCPU, that is no shadow page.

The four page directories are the roots that are counted. Nothing leads from one of them back to the
slot that holds it.

Three uses, one pointer: for shadow paging the table lies below 4 GiB and is decrypted; for the NPT
of a 32-bit host it lies below 4 GiB; when L1's NPT has 2 or 3 levels and the host's has more, it is
an ordinary table of level 3, under one of level 4, and of level 5 if there is one.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (__kvm_mmu_create, mmu_alloc_special_roots,
mmu_alloc_direct_roots, mmu_alloc_shadow_roots, kvm_mmu_free_roots, free_mmu_pages).
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EIO, ENOMEM

from tdxlab.bits import MASK64
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.pae_guest import guest_root_gfn, snapshot_pdptrs
from tdxlab.kvm.pae_pdpte import (
    INVALID_PAE_ROOT,
    PDPTES,
    PT_ACCESSED_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    make_root_pdpte,
    pdpte_index,
)
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import Role
from tdxlab.kvm.shadow_pages import (
    PAE_ROOT_PAGE,
    alloc_pae_root_page,
    drop_root,
    free_pae_root_page,
    hold_root,
)
from tdxlab.kvm.shadow_params import NESTED
from tdxlab.kvm.shadow_sync import get_shadow_page, sync_children
from tdxlab.kvm.shadow_vm import FREE_OBSOLETE_ROOTS, ShadowPage, ShadowVcpu
from tdxlab.steps import Step

Work = Generator[Step, None, int]
Doing = Generator[Step, None, None]


class SpecialRoot:
    """What the rest of the MMU asks of a design; this one has no headers."""

    def create(self, vcpu: ShadowVcpu) -> int:
        """The table, with four empty slots. Returns 0, or -ENOMEM without a page below 4 GiB.

        Source: mmu.c, __kvm_mmu_create.
        """
        vm = vcpu.vm
        if vm.params.use == NESTED:
            return 0
        hpa = alloc_pae_root_page(vm)
        if hpa == NO_PAGE:
            return -ENOMEM
        vcpu.pae_root = hpa
        for index in range(PDPTES):
            vm.write(hpa + 8 * index, INVALID_PAE_ROOT)
        return 0

    def destroy(self, vcpu: ShadowVcpu) -> None:
        """Give the special pages back. Source: mmu.c, free_mmu_pages."""
        for hpa in (vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root):
            if hpa != NO_PAGE:
                free_pae_root_page(vcpu.vm, hpa)
        vcpu.pae_root = vcpu.pml4_root = vcpu.pml5_root = NO_PAGE

    def topup(self, vcpu: ShadowVcpu) -> Work:
        """When nested: the special pages, on first use, all of them or none. Returns 0, -ENOMEM, or
        -EIO for a part of them. Source: mmu.c, mmu_alloc_special_roots.
        """
        vm = vcpu.vm
        needed = vm.params.tdp_level - 2 if vm.params.use == NESTED else 0
        present = [vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root][:needed]
        if NO_PAGE not in present:
            return 0
        if any(hpa != NO_PAGE for hpa in present):
            return -EIO
        yield ("mmu_alloc_special_roots",)
        pages = [vm.pages.alloc_page(PAE_ROOT_PAGE) for _ in range(needed)]
        if NO_PAGE in pages:
            for hpa in pages:
                if hpa != NO_PAGE:
                    vm.pages.free_page(hpa)
            return -ENOMEM
        vm.count("roots_allocated")
        for hpa in pages:
            vm.fill_table(hpa, 0)
        vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root = (*pages, NO_PAGE)[:3]
        return 0

    def alloc_root(self, vcpu: ShadowVcpu) -> Generator[Step, None, int]:
        """Fill the four slots; returns the HPA of the topmost table.

        Source: mmu.c, mmu_alloc_direct_roots and mmu_alloc_shadow_roots.
        """
        vm, level = vcpu.vm, vcpu.guest_level
        if level and guest_root_gfn(vcpu) >= vm.npages:
            return vm.zero_page
        pdptrs = snapshot_pdptrs(vcpu) if level == 3 else ()
        yield from vm.mmu_lock.lock(WRITE)
        try:
            for index in range(PDPTES):
                yield from self._fill_slot(vcpu, index, pdptrs)
            return self._link_upper_tables(vcpu)
        finally:
            vm.mmu_lock.unlock(WRITE)

    def _fill_slot(self, vcpu: ShadowVcpu, index: int, pdptrs: tuple[int, ...]) -> Doing:
        level = vcpu.guest_level
        value = INVALID_PAE_ROOT
        if not level:
            value = self._root_entry(vcpu, index << 18, 0)
        elif level == 2:
            value = self._root_entry(vcpu, guest_root_gfn(vcpu), index)
        elif pdptrs[index]:
            value = self._root_entry(vcpu, pdptrs[index] >> 12, 0)
        yield from self._store(vcpu, index, value)

    def _root_entry(self, vcpu: ShadowVcpu, gfn: int, quadrant: int) -> int:
        """A reference to a page directory, as an entry. Source: mmu.c, mmu_alloc_root."""
        role = int(Role(vcpu.role).with_(level=2, quadrant=quadrant))
        sp = hold_root(vcpu.vm, get_shadow_page(vcpu, gfn, role))
        entry = make_root_pdpte(sp.spt, vcpu.vm.params.me_value)
        return entry | (self._upper_bits(vcpu) if vcpu.vm.params.use == NESTED else 0)

    def _store(self, vcpu: ShadowVcpu, index: int, value: int) -> Doing:
        yield ("store PDPTE", index, value)
        vcpu.vm.write(vcpu.pae_root + 8 * index, value)
        vcpu.vm.count("slots_stored")

    def _upper_bits(self, vcpu: ShadowVcpu) -> int:
        """What an entry above level 2 has when it is an ordinary one of a 4-level table."""
        permissions = PT_ACCESSED_MASK | PT_WRITABLE_MASK | PT_USER_MASK
        return PT_PRESENT_MASK | vcpu.vm.params.me_value | permissions

    def _link_upper_tables(self, vcpu: ShadowVcpu) -> int:
        """When nested, entry 0 of each table above links the next; returns the topmost one."""
        top = vcpu.pae_root
        for table in (vcpu.pml4_root, vcpu.pml5_root):
            if table != NO_PAGE:
                vcpu.vm.write(table, top | self._upper_bits(vcpu))
                top = table
        return top

    def slots(self, vcpu: ShadowVcpu) -> tuple[int, ...]:
        """The four entries as the kernel reads them; none if there is no table."""
        if vcpu.pae_root == NO_PAGE:
            return ()
        return tuple(vcpu.vm.read(vcpu.pae_root + 8 * index) for index in range(PDPTES))

    def free_root(self, vcpu: ShadowVcpu, invalid: list[ShadowPage]) -> Doing:
        """Give up the four references. Each slot holds all ones for a moment: no vCPU may enter
        with it then. Source: mmu.c, kvm_mmu_free_roots and mmu_free_root_page.
        """
        vm = vcpu.vm
        for index, slot in enumerate(self.slots(vcpu)):
            if slot != INVALID_PAE_ROOT:
                drop_root(vm, vm.child(slot), invalid)
                yield from self._store(vcpu, index, MASK64)
                yield from self._store(vcpu, index, INVALID_PAE_ROOT)

    def first_entry(self, vcpu: ShadowVcpu, va: int) -> tuple[int, int]:
        """(level, HPA) of the entry at which a walk of KVM's begins: level 2, behind a slot. A slot
        that is 0 ends the walk: level 0. Source: mmu.c, shadow_walk_init_using_root.
        """
        slot = self.slots(vcpu)[pdpte_index(va)]
        if slot == INVALID_PAE_ROOT:
            return 0, 0
        return 2, vcpu.vm.child(slot).spt + 8 * (va >> 21 & 511)

    def sync(self, vcpu: ShadowVcpu) -> None:
        """Source: mmu.c, kvm_mmu_sync_roots."""
        for slot in self.slots(vcpu):
            if slot != INVALID_PAE_ROOT:
                sync_children(vcpu, vcpu.vm.child(slot))

    def is_obsolete(self, vcpu: ShadowVcpu) -> bool:
        """No header tells: whoever asks is told yes. Source: mmu.c, is_obsolete_root."""
        return True

    def is_stale(self, vcpu: ShadowVcpu) -> bool:
        """A fault must be handled anew. Source: mmu.c, is_page_fault_stale."""
        return FREE_OBSOLETE_ROOTS in vcpu.requests
