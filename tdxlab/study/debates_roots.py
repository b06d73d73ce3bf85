"""Debates about which roots a zap means: D11, a range zap on a TD; D21, zaps without a filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.kvm import zap
from tdxlab.kvm.notifier import kvm_mmu_notifier_invalidate_range
from tdxlab.kvm.roots import KVM_DIRECT_ROOTS, KVM_VALID_ROOTS
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import Vm
from tdxlab.kvm.zap import kvm_zap_gfn_range
from tdxlab.machine import Machine
from tdxlab.steps import Operation
from tdxlab.study.debate_tools import Substitute, calls, many, substituted
from tdxlab.study.undone import undone
from tdxlab.vmm_ioctls import HVA_BASE
from tdxlab.vmm_td import Td

#: Pages of each kind that a TD here uses, first the private ones; and what stands in each.
_EACH, _DATA = 4, b"kept"


def _mixed_td(gpaw: int) -> tuple[Machine, Td]:
    """A TD with private and shared pages in use."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=SIZE_2M)
    td.convert(_EACH * PAGE_SIZE, _EACH * PAGE_SIZE, to="shared")
    for page in range(2 * _EACH):
        td.write(page * PAGE_SIZE, _DATA)
    return machine, td


# -- D11


class GuardRow(NamedTuple):
    """kvm_zap_gfn_range over all memory of a TD. private, shared: mappings that are gone. lost:
    private pages whose data are gone, or that nobody can read any more. vm: "fine" or "ended".
    """

    guard: str
    private: int
    shared: int
    lost: int
    vm: str


UNGUARDED, BUG_ON, DIRECT_ONLY = "none", "a shared bit is a bug", "direct roots only"


def _bug_on_shared_bit(vm: Vm, start: int, end: int) -> Operation:
    if vm.gfn_direct_bits:
        vm.bug("kvm_zap_gfn_range: a VM with a shared bit")
        return
    yield from kvm_zap_gfn_range(vm, start, end)


def _direct_only(vm: Vm, start: int, end: int) -> Operation:
    with substituted([(zap, "KVM_VALID_ROOTS", KVM_DIRECT_ROOTS)]):
        yield from kvm_zap_gfn_range(vm, start, end)


GUARDS: dict[str, Callable[[Vm, int, int], Operation]] = {
    UNGUARDED: kvm_zap_gfn_range,
    BUG_ON: _bug_on_shared_bit,
    DIRECT_ONLY: _direct_only,
}


def guard_rows(gpaw: int) -> list[GuardRow]:
    """D11: the same call with each guard."""
    machine, td = _mixed_td(gpaw)
    rows = []
    for name, guarded in GUARDS.items():
        with undone(machine):
            private, shared = _mapped(td, "mirror"), _mapped(td, "direct")
            td.run_thread(guarded(td.vm, 0, SIZE_2M // PAGE_SIZE))
            gone = (private - _mapped(td, "mirror"), shared - _mapped(td, "direct"))
            vm = "ended" if td.vm.vm_bugged else "fine"
            rows.append(GuardRow(name, *gone, _lost(machine, td), vm))
    return rows


def judge_guards(rows: Sequence[GuardRow]) -> str:
    """D11 in words."""
    parts = [
        f'Guard "{row.guard}": {row.private} private and {row.shared} shared mappings go, '
        f"{many(row.lost, 'private page')} lost, the VM is {row.vm}"
        for row in rows
    ]
    safe = [row.guard for row in rows if not row.lost and row.vm == "fine"]
    end = f"The guest survives with: {', '.join(safe)}" if safe else "The guest never survives"
    return f"{'; '.join(parts)}. {end}."


# -- D21


class FilterRow(NamedTuple):
    """A storm of MMU notifiers over a TD's whole memory. private, shared: mappings that are gone
    after the first. seamcalls: of the whole storm. lost: private pages whose data are gone. guest:
    what becomes of it when it uses its private memory again.
    """

    filter: str
    events: int
    private: int
    shared: int
    seamcalls: int
    lost: int
    guest: str


FILTERED, UNFILTERED = "by attribute", "none"
_EVENTS = 4


def _all_valid_roots(vm: Vm, attr_filter: int) -> int:
    return KVM_VALID_ROOTS


_FILTERS: dict[str, tuple[Substitute, ...]] = {
    FILTERED: (),
    UNFILTERED: ((zap, "kvm_gfn_range_filter_to_root_types", _all_valid_roots),),
}


def filter_rows(gpaw: int) -> list[FilterRow]:
    """D21: the same storm with and without the filter."""
    machine, td = _mixed_td(gpaw)
    return [_filter_row(machine, td, name) for name in _FILTERS]


def _filter_row(machine: Machine, td: Td, name: str) -> FilterRow:
    """After each notifier the guest uses its shared memory again; at the end its private memory."""
    with undone(machine), substituted(_FILTERS[name]):
        before, gone = calls(machine), (0, 0)
        for event in range(_EVENTS):
            kept = [_mapped(td, kind) for kind in ("mirror", "direct")]
            notifier = kvm_mmu_notifier_invalidate_range(td.vm, HVA_BASE, HVA_BASE + SIZE_2M)
            td.run_thread(notifier)
            if not event:
                private, shared = kept
                gone = (private - _mapped(td, "mirror"), shared - _mapped(td, "direct"))
            td.touch(_EACH * PAGE_SIZE, _EACH * PAGE_SIZE, write=False)
        made = calls(machine) - before
        lost = _lost(machine, td)
        outcome = td.read(0, 4)
    guest = "goes on" if outcome.answers == (_DATA,) else "dies: private memory not accepted"
    return FilterRow(name, _EVENTS, *gone, made, lost, guest)


def _mapped(td: Td, kind: str) -> int:
    """Pages that a VM's mirror or direct root maps."""
    vcpu = td.vm.vcpus[0]
    root = td.vm.sps[vcpu.mirror_root_hpa if kind == "mirror" else vcpu.root_hpa]
    walk = for_each_tdp_pte(td.vm, root, 0, SIZE_2M // PAGE_SIZE)
    return sum(is_present_leaf(it.old_spte, it.level) for it in walk)


def _lost(machine: Machine, td: Td) -> int:
    """Private pages that have not the guest's data any more."""
    lost = 0
    for page in range(_EACH):
        with undone(machine):
            lost += td.vm.vm_dead or td.read(page * PAGE_SIZE, 4).answers != (_DATA,)
    return lost


def judge_filter(rows: Sequence[FilterRow]) -> str:
    """D21 in words."""
    parts = [
        f'Filter "{row.filter}": the first notifier takes {row.private} private and {row.shared} '
        f"shared mappings, the storm costs {many(row.seamcalls, 'SEAMCALL')} and "
        f"{many(row.lost, 'private page')}, and the guest {row.guest}"
        for row in rows
    ]
    lossless = [row.filter for row in rows if not row.lost]
    end = f"Nothing is lost with: {', '.join(lossless)}" if lossless else "Both lose data"
    return f"{'. '.join(parts)}. {end}."
