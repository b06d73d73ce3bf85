"""Debates about one fault: D2, which of its values keeps the shared bit; D3, what selects its root.

In both every alternative handles the same faults, each on a VM as it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import errorcode
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.kvm import fault as kvm_fault
from tdxlab.kvm import tdp_mmu
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.page_fault import RET_PF_FIXED, RET_PF_NAMES, PageFault
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM
from tdxlab.kvm.roots import tdp_mmu_get_root_for_fault
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.tdp_set import HostBug
from tdxlab.kvm.vm import INVALID_PAGE, MmuPage, Vcpu, Vm
from tdxlab.kvm.vm_types import KVM_X86_SNP_VM
from tdxlab.machine import Machine
from tdxlab.steps import run
from tdxlab.study.debate_tools import PRIVATE_WRITE, SHARED_WRITE, Substitute, many, substituted
from tdxlab.study.undone import undone
from tdxlab.vmm import Gate

#: Pages of a VM here, by number: one to load the roots with, a private one, a shared one.
_FIRST, _PRIVATE, _SHARED = range(3)

MIRROR, DIRECT = "mapped in the mirror", "mapped in the direct root"
CRASH, BUGGED, NOTHING = "the host crashes", "the VM is ended", "-"


#: VM types here that have one root for everything.
_PLAIN_TYPES = {
    "SNP": KVM_X86_SNP_VM,
    "SW_PROTECTED": KVM_X86_SW_PROTECTED_VM,
    "DEFAULT": KVM_X86_DEFAULT_VM,
}


def _scene(gpaw: int, vm_type: str) -> tuple[Machine, Gate]:
    """A VM whose roots are loaded, with a page of each kind that nobody has used."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    gate: Gate
    if vm_type == "TDX":
        gate = machine.create_td(memory=SIZE_2M)
    else:
        gate = machine.create_vm(vm_type=_PLAIN_TYPES[vm_type], memory=SIZE_2M)
    if gate.vm.features.has_private_mem:
        gate.convert(_SHARED * PAGE_SIZE, PAGE_SIZE, to="shared")
    gate.touch(_FIRST * PAGE_SIZE)
    return machine, gate


def _handled(machine: Machine, gate: Gate, page: int, substitutes: Sequence[Substitute]) -> str:
    """What comes of a write to `page`, which is taken back."""
    gpa, private = gate.guest.alias(page * PAGE_SIZE), page == _PRIVATE
    code = PRIVATE_WRITE if private else SHARED_WRITE
    with undone(machine), substituted(substitutes):
        try:
            ret = run(machine.host.on_cpu(0, kvm_mmu_page_fault(gate.vcpu(0), gpa, code)))
        except HostBug:
            return CRASH
        if gate.vm.vm_bugged:
            return BUGGED
        if ret == RET_PF_FIXED:
            return _place(gate.vm, page)
        return RET_PF_NAMES[ret] if ret >= 0 else f"-{errorcode[-ret]}"


def _place(vm: Vm, gfn: int) -> str:
    """Which root maps the gfn."""
    vcpu = vm.vcpus[0]
    for words, root in ((MIRROR, vcpu.mirror_root_hpa), (DIRECT, vcpu.root_hpa)):
        if root == INVALID_PAGE:
            continue
        for it in for_each_tdp_pte(vm, vm.sps[root], gfn, gfn + 1):
            if is_present_leaf(it.old_spte, it.level):
                return words
    return "mapped at another gfn"


# -- D2


class AddressRow(NamedTuple):
    """What comes of a write to private and to shared memory of a TD, where the fault's `address`
    and `gfn` keep the shared bit ("raw") or not ("clean"), and the root is chosen by `root`.
    """

    address: str
    gfn: str
    root: str
    private_write: str
    shared_write: str


#: (address is clean, gfn is clean, what chooses the root).
_ADDRESS_WAYS = (
    (False, True, "address"),
    (True, True, "address"),
    (True, True, "error code"),
    (False, False, "address"),
)


def address_rows(gpaw: int) -> list[AddressRow]:
    """D2: every combination that was proposed, and what happens without the strip."""
    machine, gate = _scene(gpaw, "TDX")
    rows = []
    for clean_address, clean_gfn, root in _ADDRESS_WAYS:
        places: list[Substitute] = [
            (kvm_fault, "_make_fault", _fault_maker(clean_address, clean_gfn))
        ]
        if root == "error code":
            places.append((tdp_mmu, "tdp_mmu_get_root_for_fault", _by_privateness))
        private, shared = (_handled(machine, gate, page, places) for page in (_PRIVATE, _SHARED))
        address, gfn = ("clean" if clean else "raw" for clean in (clean_address, clean_gfn))
        rows.append(AddressRow(address, gfn, root, private, shared))
    return rows


def _fault_maker(clean_address: bool, clean_gfn: bool) -> Callable[[Vm, int, int, bool], PageFault]:
    def make_fault(vm: Vm, gpa: int, error_code: int, prefetch: bool) -> PageFault:
        plain = gpa & ~(vm.gfn_direct_bits << PAGE_SHIFT)
        gfn = (plain if clean_gfn else gpa) >> PAGE_SHIFT
        address = plain if clean_address else gpa
        return PageFault(address, error_code, prefetch, gfn, vm.slots.find(gfn))

    return make_fault


def _is_right(row: AddressRow) -> bool:
    return (row.private_write, row.shared_write) == (MIRROR, DIRECT)


def judge_addresses(rows: Sequence[AddressRow]) -> str:
    """D2 in words."""
    right = [row for row in rows if _is_right(row)]
    wrong = [row for row in rows if not _is_right(row)]
    parts = [f"{len(right)} of {len(rows)} ways map both pages where they belong"]
    parts += [f"{_words(row)} does" for row in right]
    parts += [
        f"{_words(row)} does not: the private write is {_state(row.private_write)}, the shared "
        f"one {_state(row.shared_write)}"
        for row in wrong
    ]
    return "; ".join(parts) + "."


def _state(outcome: str) -> str:
    return {CRASH: "the host's crash", BUGGED: "the end of the VM"}.get(outcome, outcome)


def _words(row: AddressRow) -> str:
    return f"a {row.address} address with a {row.gfn} gfn and the root by {row.root}"


# -- D3


class RootRow(NamedTuple):
    """What comes of a write to private and to shared memory of a VM if `rule` selects the root."""

    vm: str
    rule: str
    private_write: str
    shared_write: str


def _root(vcpu: Vcpu, fault: PageFault, is_mirror: bool) -> MmuPage:
    root_hpa = vcpu.mirror_root_hpa if is_mirror else vcpu.root_hpa
    if root_hpa == INVALID_PAGE:
        raise HostBug(f"{vcpu!r} has no root in which {fault.addr:#x} could be mapped")
    root: MmuPage = vcpu.vm.sps[root_hpa]
    return root


def _by_privateness(vcpu: Vcpu, fault: PageFault) -> MmuPage:
    return _root(vcpu, fault, fault.is_private)


def _by_privateness_and_mask(vcpu: Vcpu, fault: PageFault) -> MmuPage:
    return _root(vcpu, fault, fault.is_private and vcpu.vm.gfn_direct_bits != 0)


def _by_privateness_and_mirror(vcpu: Vcpu, fault: PageFault) -> MmuPage:
    return _root(vcpu, fault, fault.is_private and vcpu.vm.has_mirrored_tdp)


ROOT_RULES: dict[str, Callable[[Vcpu, PageFault], MmuPage]] = {
    "is_private": _by_privateness,
    "is_private, if there is a shared bit": _by_privateness_and_mask,
    "is_private, if there is a mirror": _by_privateness_and_mirror,
    "address bit": tdp_mmu_get_root_for_fault,
}


def root_rows(gpaw: int) -> list[RootRow]:
    """D3: each rule on a VM of each type."""
    rows = []
    for vm_type in ("TDX", *_PLAIN_TYPES):
        machine, gate = _scene(gpaw, vm_type)
        for name, rule in ROOT_RULES.items():
            places = [(tdp_mmu, "tdp_mmu_get_root_for_fault", rule)]
            private = NOTHING
            if gate.vm.features.has_private_mem:
                private = _handled(machine, gate, _PRIVATE, places)
            shared = _handled(machine, gate, _SHARED, places)
            rows.append(RootRow(vm_type, name, private, shared))
    return rows


def _is_where_it_belongs(row: RootRow) -> bool:
    private = MIRROR if row.vm == "TDX" else DIRECT
    return row.private_write in (private, NOTHING) and row.shared_write == DIRECT


def judge_roots(rows: Sequence[RootRow]) -> str:
    """D3 in words."""
    parts = []
    for rule in dict.fromkeys(row.rule for row in rows):
        mine = [row for row in rows if row.rule == rule]
        wrong = [row for row in mine if not _is_where_it_belongs(row)]
        if not wrong:
            parts.append(f'"{rule}" works in all {len(mine)} VM types')
            continue
        crashed = [row.vm for row in wrong if CRASH in (row.private_write, row.shared_write)]
        lost = [row.vm for row in wrong if row.vm not in crashed]
        words = []
        if crashed:
            words.append(
                f"crashes the host in {_of_types(crashed, mine)}: it takes a root that nobody has"
            )
        if lost:
            words.append(f"maps pages where they do not belong in {_of_types(lost, mine)}")
        parts.append(f'"{rule}" {", and ".join(words)}')
    return "; ".join(parts) + "."


def _of_types(vms: Sequence[str], rows: Sequence[RootRow]) -> str:
    return f"{many(len(vms), 'VM type')} of {len(rows)} ({', '.join(vms)})"
