"""The CPU, as far as it uses a PAE root: when the four entries are read, checked and refused.

Intel reads all four into registers when CR3 is loaded or the guest is entered, checks them then,
and looks at memory no more. AMD reads each from memory when a walk needs it, and checks it then;
only a native MOV CR3 checks all of them.

Source: Intel SDM volume 3 and AMD APM volume 2, as the review of the RFC quotes them.
Differs: translations are not kept in a TLB. Of other entries than PDPTEs the bits from MAXPHYADDR
up are checked, and no other reserved ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.bits import MASK64
from tdxlab.kvm.pae_pdpte import (
    CR3_PDPT_MASK,
    PDPTES,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    is_legal_table,
    pdpte_index,
    reserved_bits_set,
)
from tdxlab.kvm.page_fault import (
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from tdxlab.kvm.shadow_params import INTEL, NESTED, SHADOW
from tdxlab.kvm.shadow_vm import ShadowVcpu

FINE = "fine"
GP = "#GP"
PF = "#PF"
ENTRY_FAILURE = "VM entry fails"


class Hit(NamedTuple):
    """The walk reached a page. hpa: byte address."""

    hpa: int


class Violation(NamedTuple):
    """The walk ended. error_code: PFERR_* bits; the reserved one says that a table is illegal."""

    error_code: int


# -- the rules alone


def mov_to_cr3(pdptes: Sequence[int], maxphyaddr: int) -> str:
    """What a native MOV CR3 to a table of these four entries comes to; both vendors agree."""
    return FINE if is_legal_table(pdptes, maxphyaddr) else GP


def enter_guest(vendor: str, pdptes: Sequence[int], maxphyaddr: int) -> str:
    """What VM entry (VMRUN) with such a root comes to, without nested paging."""
    return FINE if vendor != INTEL or is_legal_table(pdptes, maxphyaddr) else ENTRY_FAILURE


def walk_pdpte(vendor: str, pdptes: Sequence[int], va: int, maxphyaddr: int) -> str:
    """What the guest's use of `va` comes to, as far as the PDPTE decides it; ENTRY_FAILURE if the
    guest never ran. An entry that is not present is a page fault like any.
    """
    if enter_guest(vendor, pdptes, maxphyaddr) != FINE:
        return ENTRY_FAILURE
    pdpte = pdptes[pdpte_index(va)]
    is_fine = pdpte & PT_PRESENT_MASK and not reserved_bits_set(pdpte, maxphyaddr)
    return FINE if is_fine else PF


# -- with the tables that KVM made


def vm_entry(vcpu: ShadowVcpu) -> str:
    """Enter the guest with the root that KVM made. Returns FINE or ENTRY_FAILURE."""
    vm = vcpu.vm
    vm.count("vm_entries")
    if vm.params.use == SHADOW and vm.params.vendor == INTEL:
        pdptes = tuple(_read_pdpte(vcpu, index) for index in range(PDPTES))
        vm.count("pdptes_checked", PDPTES)
        if not is_legal_table(pdptes, vm.params.maxphyaddr):
            vm.count("entry_failures")
            return ENTRY_FAILURE
        vcpu.hardware = pdptes
    vcpu.in_guest = True
    return FINE


def _read_pdpte(vcpu: ShadowVcpu, index: int) -> int:
    """An entry of the table that a 32-bit CR3 points at: without C-bit, and below 4 GiB."""
    return vcpu.vm.cpu_read(0, (vcpu.root.hpa & CR3_PDPT_MASK) + 8 * index)


def walk(vcpu: ShadowVcpu, va: int, *, write: bool, user: bool) -> Hit | Violation:
    """Use `va` in the guest. Nested paging takes every access for one of user mode."""
    params = vcpu.vm.params
    user = user or params.use != SHADOW
    code = (PFERR_WRITE_MASK if write else 0) | (PFERR_USER_MASK if user else 0)
    top = _top_entry(vcpu, va)
    if not top & PT_PRESENT_MASK:
        return Violation(code)
    if params.use != NESTED and reserved_bits_set(top, params.maxphyaddr):
        return Violation(code | PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
    return _walk_below(vcpu, top, va, code)


def _top_entry(vcpu: ShadowVcpu, va: int) -> int:
    """The entry for 1 GiB: from a register, from the table in memory, or behind the entries of the
    tables above it.
    """
    params, index = vcpu.vm.params, pdpte_index(va)
    if params.use == SHADOW and params.vendor == INTEL:
        return vcpu.hardware[index]
    if params.use == NESTED:
        entry = vcpu.root.hpa | params.me_value
        for _ in range(params.tdp_level - 3):
            entry = vcpu.vm.cpu_read(entry, vcpu.vm.address(entry))
        return vcpu.vm.cpu_read(entry, vcpu.vm.address(entry) + 8 * index)
    vcpu.vm.count("pdptes_checked")
    return _read_pdpte(vcpu, index)


def _walk_below(vcpu: ShadowVcpu, entry: int, va: int, code: int) -> Hit | Violation:
    """Levels 2 and 1, with their permissions. code: what the access is, as PFERR_* bits."""
    vm = vcpu.vm
    above = MASK64 >> vm.params.maxphyaddr << vm.params.maxphyaddr
    allowed = True
    for shift in (21, 12):
        entry = vm.cpu_read(entry, vm.address(entry) + 8 * (va >> shift & 511))
        if not entry & PT_PRESENT_MASK:
            return Violation(code)
        if entry & above:
            return Violation(code | PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
        allowed = allowed and _allows(entry, code)
    if not allowed:
        return Violation(code | PFERR_PRESENT_MASK)
    return Hit(vm.address(entry) | va & 0xFFF)


def _allows(entry: int, code: int) -> bool:
    if code & PFERR_WRITE_MASK and not entry & PT_WRITABLE_MASK:
        return False
    return not code & PFERR_USER_MASK or bool(entry & PT_USER_MASK)
