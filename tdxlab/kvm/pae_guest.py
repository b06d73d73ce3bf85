"""The guest's own page tables: two levels of four-byte entries, or PAE with eight-byte ones.

KVM walks them in guest memory as the guest's CPU would, sets accessed and dirty bits, and finds the
fault that the guest must be given, if any.

Source: Linux 6.16, arch/x86/kvm/mmu/paging_tmpl.h (walk_addr_generic, update_accessed_dirty_bits),
mmu.c (__reset_rsvds_bits_mask).
Differs: CR0.WP is always 1; EFER.NXE, SMEP, SMAP and PSE-36 do not exist for the guest.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT
from tdxlab.bits import MASK64
from tdxlab.kvm.pae_pdpte import (
    CR3_PDPT_MASK,
    PDPTES,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    pdpte_index,
)
from tdxlab.kvm.page_fault import (
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from tdxlab.kvm.role import ACC_ALL, ACC_USER_MASK, ACC_WRITE_MASK
from tdxlab.kvm.shadow_params import NESTED
from tdxlab.kvm.shadow_vm import ShadowVcpu, ShadowVm

#: Present, writable, user: what a guest usually sets.
RWU = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK

VA_LIMIT = 1 << 32


class GuestStep(NamedTuple):
    """One entry that was read. level: 2 or 1. table_gfn: of its table. gpa, size: where it stands.
    value: with the bits that KVM has set. access: ACC_* that the levels above allow.
    """

    level: int
    table_gfn: int
    gpa: int
    size: int
    value: int
    access: int


class GuestWalk(NamedTuple):
    """A translation. level: of the last entry, 3 while paging is off. gfn: of the 4 KiB page.
    access: ACC_* of the mapping; without write while its dirty bit is clear.
    """

    level: int
    gfn: int
    access: int
    steps: tuple[GuestStep, ...]

    def step(self, level: int) -> GuestStep:
        """The entry that was read at a level."""
        return next(step for step in self.steps if step.level == level)


class GuestFault(NamedTuple):
    """The guest must be given a page fault. error_code: PFERR_* bits."""

    error_code: int


def entry_size(levels: int) -> int:
    """Bytes of an entry in tables of 2 or 3 levels."""
    return 4 if levels == 2 else 8


def entry_gpa(levels: int, table_gfn: int, level: int, va: int) -> int:
    """GPA of the entry for `va` in a table at level 2 or 1. levels: of the guest, 2 or 3."""
    size = entry_size(levels)
    bits = 10 if size == 4 else 9
    index = va >> PAGE_SHIFT + bits * (level - 1) & (1 << bits) - 1
    return (table_gfn << PAGE_SHIFT) + index * size


def large_page_gfns(levels: int) -> int:
    """4 KiB frames of a large page: 4 MiB in tables of 2 levels, 2 MiB with PAE."""
    return 1 << (10 if levels == 2 else 9)


def read_pdpte(vm: ShadowVm, cr3: int, index: int) -> int | None:
    """One entry of a PAE guest's top table in guest memory; None if there is no memory."""
    return vm.read_guest((cr3 & CR3_PDPT_MASK) + 8 * index, 8)


def get_pdptr(vcpu: ShadowVcpu, index: int) -> int:
    """The PDPTE that counts: the one that was loaded, or for L1's NPT what stands in memory now, 0
    if that cannot be read. Source: kvm_cache_regs.h, kvm_pdptr_read; svm/nested.c,
    nested_svm_get_tdp_pdptr.
    """
    if vcpu.vm.params.use == NESTED:
        return read_pdpte(vcpu.vm, vcpu.cr3, index) or 0
    return vcpu.pdptrs[index]


def guest_root_gfn(vcpu: ShadowVcpu) -> int:
    """gfn of the page that CR3 points into."""
    return (vcpu.cr3 & CR3_PDPT_MASK) >> PAGE_SHIFT


def walk_guest(
    vcpu: ShadowVcpu, va: int, *, write: bool, user: bool, set_bits: bool = True
) -> GuestWalk | GuestFault:
    """Translate `va` (below 4 GiB) with the guest's tables.

    set_bits: set accessed and dirty bits, as a guest's access does. Faults, in order, at each
    level: the entry is not there, not present, has reserved bits; then the permissions.
    Source: paging_tmpl.h, walk_addr_generic.
    """
    levels = vcpu.guest_level
    if not levels:
        return GuestWalk(3, va >> PAGE_SHIFT, ACC_ALL, ())
    code = (PFERR_WRITE_MASK if write else 0) | (PFERR_USER_MASK if user else 0)
    table = _first_table(vcpu, va)
    if table is None:
        return GuestFault(code)
    steps, access = _read_entries(vcpu, va, table)
    last = steps[-1].value if steps else 0
    if not last & PT_PRESENT_MASK:
        return GuestFault(code)
    if last & rsvd_bits(vcpu, steps[-1]):
        return GuestFault(code | PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
    if (write and not access & ACC_WRITE_MASK) or (user and not access & ACC_USER_MASK):
        return GuestFault(code | PFERR_PRESENT_MASK)
    if set_bits:
        steps = _set_accessed_dirty(vcpu.vm, steps, write=write)
    if not steps[-1].value & PT_DIRTY_MASK:
        access &= ~ACC_WRITE_MASK
    return GuestWalk(steps[-1].level, _leaf_gfn(vcpu, steps[-1], va), access, tuple(steps))


def _first_table(vcpu: ShadowVcpu, va: int) -> int | None:
    """gfn of the page directory for `va`, None if its PDPTE is not present."""
    if vcpu.guest_level == 2:
        return guest_root_gfn(vcpu)
    pdpte = get_pdptr(vcpu, pdpte_index(va))
    return frame(vcpu, pdpte) if pdpte & PT_PRESENT_MASK else None


def _read_entries(vcpu: ShadowVcpu, va: int, table: int) -> tuple[list[GuestStep], int]:
    """The entries from level 2 on, down to the one that ends the walk; what all of them allow."""
    levels, access = vcpu.guest_level, ACC_ALL
    steps: list[GuestStep] = []
    for level in (2, 1):
        gpa = entry_gpa(levels, table, level, va)
        value = vcpu.vm.read_guest(gpa, entry_size(levels))
        if value is None:
            return [], 0
        steps.append(GuestStep(level, table, gpa, entry_size(levels), value, access))
        access &= gpte_access(value)
        if not value & PT_PRESENT_MASK or value & rsvd_bits(vcpu, steps[-1]):
            break
        if is_last_gpte(vcpu, level, value):
            break
        table = frame(vcpu, value)
    return steps, access


def _set_accessed_dirty(vm: ShadowVm, steps: list[GuestStep], *, write: bool) -> list[GuestStep]:
    """Set A in every entry, and D in the last one after a write."""
    done = []
    for step in steps:
        bits = PT_ACCESSED_MASK | (PT_DIRTY_MASK if write and step is steps[-1] else 0)
        if step.value | bits != step.value:
            vm.write_guest(step.gpa, step.value | bits, step.size)
        done.append(step._replace(value=step.value | bits))
    return done


def frame(vcpu: ShadowVcpu, gpte: int) -> int:
    """The gfn in an entry."""
    return (gpte & (1 << vcpu.vm.params.maxphyaddr) - 1) >> PAGE_SHIFT


def gpte_access(gpte: int) -> int:
    """What an entry allows, as ACC_* bits."""
    access = ACC_ALL
    if not gpte & PT_WRITABLE_MASK:
        access &= ~ACC_WRITE_MASK
    return access if gpte & PT_USER_MASK else access & ~ACC_USER_MASK


def is_last_gpte(vcpu: ShadowVcpu, level: int, gpte: int) -> bool:
    """Nothing follows the entry: level 1, or a large page. Source: paging_tmpl.h."""
    return level == 1 or bool(gpte & PT_PAGE_SIZE_MASK and vcpu.has_pse)


def rsvd_bits(vcpu: ShadowVcpu, step: GuestStep) -> int:
    """The bits that must be 0 in an entry. Source: mmu.c, __reset_rsvds_bits_mask."""
    is_large = step.level == 2 and is_last_gpte(vcpu, 2, step.value)
    if step.size == 4:
        return 0x3F_E000 if is_large else 0
    above = MASK64 >> vcpu.vm.params.maxphyaddr << vcpu.vm.params.maxphyaddr
    return above | (0x1F_E000 if is_large else 0)


def _leaf_gfn(vcpu: ShadowVcpu, step: GuestStep, va: int) -> int:
    gfn = frame(vcpu, step.value)
    if step.level == 1:
        return gfn
    size = large_page_gfns(vcpu.guest_level)
    return gfn & -size | va >> PAGE_SHIFT & size - 1


def snapshot_pdptrs(vcpu: ShadowVcpu) -> tuple[int, ...]:
    """The four PDPTEs that a PAE root is built from: absent ones, and those whose page directory
    no memslot holds, as 0. Source: mmu.c, mmu_alloc_shadow_roots.
    """
    found = [get_pdptr(vcpu, index) for index in range(PDPTES)]
    return tuple(
        pdpte if pdpte & PT_PRESENT_MASK and frame(vcpu, pdpte) < vcpu.vm.npages else 0
        for pdpte in found
    )
