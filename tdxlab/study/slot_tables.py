"""Tables on deleting a memslot: what each policy costs, keeps and breaks, measured on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.accesses import Write
from tdxlab.arch import PAGE_SIZE, SIZE_1G
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, VmConfig
from tdxlab.machine import Machine
from tdxlab.scenarios import booted_machine
from tdxlab.study import slot_costs
from tdxlab.study.slot_lab import DEFAULT, MOST_PAGES, PLACES, REST, SLOT, TD, Meter, SlotLab
from tdxlab.vmm import Gate

# -- what goes and what stays

#: VM and policy -> who does it.
CHOICES: dict[tuple[str, str], str] = {
    (DEFAULT, "F"): "Linux 6.16",
    (DEFAULT, "T"): "Linux 6.16, quirk off",
    (TD, "T"): "Linux 6.16",
    (TD, "F"): "nobody",
    (TD, "B"): "nobody yet",
}


class KeptRow(NamedTuple):
    """A slot with pages in use is deleted and comes back. deleted_reads: what the guest finds there
    in between; back_reads: afterwards; a guest that is not told uses its memory as before.
    rest_faults: on the rest of the VM, all of it used again.
    """

    vm: str
    policy: str
    done_by: str
    deleted_reads: str
    back_reads: str
    not_told: str
    rest_faults: int


def kept_rows(gpaw: int, npages: int = 64) -> list[KeptRow]:
    """One row for each of CHOICES."""
    lab = SlotLab(gpaw=gpaw)
    return [_kept_row(lab, vm, policy, what, npages) for (vm, policy), what in CHOICES.items()]


def _kept_row(lab: SlotLab, vm: str, policy: str, what: str, npages: int) -> KeptRow:
    _use_and_delete(lab, vm, policy, npages)
    there = lab.tape.position
    while_deleted = lab.read(vm).said
    lab.tape.seek(there)
    faults = lab.use(vm, REST, npages).bill.faults
    back, not_told = _read_again(lab, vm, there, policy != "B"), _read_again(lab, vm, there, False)
    return KeptRow(vm, policy, what, while_deleted, back, not_told, faults)


def _read_again(lab: SlotLab, vm: str, there: int, told: bool) -> str:
    """What the guest finds when the slot, deleted at position `there`, is created again."""
    lab.tape.seek(there)
    lab.create(vm, told=told)
    return lab.read(vm).said


def _use_and_delete(lab: SlotLab, vm: str, policy: str | None, npages: int) -> None:
    lab.tape.seek(0)
    lab.use(vm, REST, npages)
    lab.use(vm, SLOT, npages)
    lab.delete(vm, policy=policy)


# -- who decides


class DecisionRow(NamedTuple):
    """A slot is deleted. quirk: SLOT_ZAP_ALL. for_vm, for_slot: what user space chose, "-" without
    a choice. goes_by: the policy that it went by.
    """

    vm: str
    quirk: str
    for_vm: str
    for_slot: str
    goes_by: str


_SW_PROTECTED = "SW_PROTECTED VM"
#: VM; whether the quirk is on; choices for the VM and for the slot.
_DECISIONS: tuple[tuple[str, bool, str | None, str | None], ...] = (
    (DEFAULT, True, None, None),
    (DEFAULT, False, None, None),
    (_SW_PROTECTED, True, None, None),
    (TD, True, None, None),
    (DEFAULT, True, "T", None),
    (DEFAULT, True, "T", "F"),
    (TD, True, "B", None),
    (TD, True, "B", "T"),
)


def decision_rows(gpaw: int) -> list[DecisionRow]:
    """One row for each of several VMs: what Linux 6.16 does, then what a choice does."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    return [_decision_row(machine, *decision) for decision in _DECISIONS]


def _decision_row(
    machine: Machine, kind: str, quirk: bool, for_vm: str | None, for_slot: str | None
) -> DecisionRow:
    number = KVM_X86_SW_PROTECTED_VM if kind == _SW_PROTECTED else KVM_X86_DEFAULT_VM
    config = VmConfig(vm_type=number, slot_zap_all=quirk)
    gate: Gate = (
        machine.create_td(memory=PAGE_SIZE)
        if kind == TD
        else machine.create_vm(memory=PAGE_SIZE, config=config)
    )
    gate.choose_slot_policy(for_vm)
    gate.choose_slot_policy(for_slot, 0)
    gate.touch(0)
    generation = gate.vm.mmu_valid_gen
    gate.set_user_memory_region(0, 0, 0)
    is_new = gate.vm.mmu_valid_gen != generation
    goes_by = "F" if is_new else "B" if gate.vm.parked else "T"
    return DecisionRow(kind, "on" if quirk else "off", for_vm or "-", for_slot or "-", goes_by)


# -- what it costs


class BillRow(NamedTuple):
    """What the deletion of a slot costs; as `slot_lab.Bill`. seamcalls: all of them. formula: the
    entries that it walks through, by `slot_costs`.
    """

    vm: str
    policy: str
    write_lock: int
    read_lock: int
    formula: int
    cleared: int
    freed: int
    flushes: int
    seamcalls: int
    kicks: int


def bill_rows(gpaw: int, npages: int = 64) -> list[BillRow]:
    """One row for each of CHOICES: `npages` used pages in the slot, as many in the rest."""
    lab, rows = SlotLab(gpaw=gpaw), []
    for vm, policy in CHOICES:
        _use_and_delete(lab, vm, policy, npages)
        bill = lab.tape.deeds[-1].bill
        walked = walked_by_formula(lab, vm, policy, npages)
        row = (bill.write_lock, bill.read_lock, walked, bill.cleared, bill.freed, bill.flushes)
        rows.append(BillRow(vm, policy, *row, bill.seamcalls, bill.kicks))
    return rows


class HugeRow(NamedTuple):
    """A slot of 1 TiB is deleted by the model, with few of its pages in use, far apart. used: how
    many; walked: entries visited, counted; formula: the same by `slot_costs`; cleared: SPTEs;
    tables_before, tables_after: page tables of the VM.
    """

    vm: str
    policy: str
    used: int
    walked: int
    formula: int
    cleared: int
    tables_before: int
    tables_after: int


def huge_rows(gpaw: int, used: int = 64) -> list[HugeRow]:
    """One row for each of CHOICES that does its job."""
    choices = [choice for choice in CHOICES if choice != (TD, "F")]
    return [_huge_row(gpaw, vm, policy, used) for vm, policy in choices]


def _huge_row(gpaw: int, kind: str, policy: str, used: int) -> HugeRow:
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    create: Callable[..., Gate] = machine.create_td if kind == TD else machine.create_vm
    gate = create(memory=PAGE_SIZE)
    slot = gate.add_memory(_HUGE, _HUGE, private=kind == TD)
    gfns = range(_HUGE // PAGE_SIZE, 2 * _HUGE // PAGE_SIZE, _HUGE // PAGE_SIZE // used)
    for gfn in gfns:
        gate.touch(gfn * PAGE_SIZE)
    level, before = gate.vm.config.root_level, gate.vm.stats["pt_pages"]
    gate.choose_slot_policy(policy)
    with Meter(gate.vm).on() as meter:
        gate.set_user_memory_region(slot.slot, slot.gpa, 0)
    walked, cleared = meter.walked.total(), meter.events["cleared"]
    formula = _huge_formula(gfns, policy, level, kind == TD)
    return HugeRow(kind, policy, used, walked, formula, cleared, before, gate.vm.stats["pt_pages"])


def _huge_formula(gfns: Sequence[int], policy: str, level: int, is_td: bool) -> int:
    """Entries to visit; a TD has an empty direct root besides."""
    if policy == "F":
        return slot_costs.zap_all(slot_costs.mapped(gfns, root_level=level)).walked
    start, end = _HUGE // PAGE_SIZE, 2 * _HUGE // PAGE_SIZE
    roots = [gfns, []] if is_td else [gfns]
    return sum(slot_costs.walked_in(start, end, root, root_level=level) for root in roots)


#: Bytes: the slot's size, and where it begins.
_HUGE = 1 << 40


def walked_by_formula(lab: SlotLab, vm: str, policy: str, npages: int) -> int:
    """Entries that the deletion visits, in all roots of a VM of the lab where `npages` pages of the
    slot and as many of the rest are mapped.
    """
    level = lab.gate(vm).vm.config.root_level
    first = PLACES[SLOT] // PAGE_SIZE
    gfns = [*range(npages), *range(first, first + npages)]
    nothing: list[int] = []
    if policy == "F":
        direct = gfns if vm == DEFAULT else nothing
        return slot_costs.zap_all(slot_costs.mapped(direct, root_level=level)).walked
    roots = [gfns] if vm == DEFAULT else [gfns, nothing]
    end = first + MOST_PAGES
    return sum(slot_costs.walked_in(first, end, root, root_level=level) for root in roots)


# -- what "fast" is


class BesideRow(NamedTuple):
    """A vCPU uses new pages while the slot is deleted on another LP. steps: at which others can
    come in; through: faults that were done by the time it returned.
    """

    policy: str
    walked: int
    steps: int
    through: int


def beside_rows(npages: int = 64) -> list[BesideRow]:
    """F and T on a DEFAULT VM."""
    return [_beside_row(policy, npages) for policy in "FT"]


def _beside_row(policy: str, npages: int) -> BesideRow:
    lab = SlotLab()
    gate = lab.gate(DEFAULT)
    lab.use(DEFAULT, REST, 1)
    lab.use(DEFAULT, SLOT, npages)
    walked = lab.delete(DEFAULT, policy=policy).bill
    lab.tape.seek(lab.tape.position - 1)
    gate.choose_slot_policy(policy)
    using = gate.run_steps((Write(gfn * PAGE_SIZE, b"1") for gfn in count(1)), vcpu=0)
    going = gate.host.on_cpu(1, gate.set_user_memory_region_steps(1, SIZE_1G, 0, hva=0))
    before = gate.vm.vcpus[0].stats["pf_fixed"]
    steps = 0
    for _ in going:
        steps += 1
        if gate.vm.vcpus[0].stats["pf_fixed"] - before < _NEW_PAGES:
            _go_on(using)
    through = gate.vm.vcpus[0].stats["pf_fixed"] - before
    using.close()
    return BesideRow(policy, walked.write_lock + walked.read_lock, steps, through)


#: The vCPU stops after so many new pages: the rest has no more.
_NEW_PAGES = 500


def _go_on(using: Iterator[object]) -> None:
    """Let the vCPU take one step."""
    for _ in islice(using, 1):
        pass


class YieldRow(NamedTuple):
    """Somebody always wants mmu_lock, and the walk offers it after every so many entries. yields:
    how often it gave the lock up; flushes: remote TLB flushes of the deletion.
    """

    policy: str
    every: str
    yields: int
    flushes: int


def yield_rows(npages: int = 256) -> list[YieldRow]:
    """F and T on a DEFAULT VM, offering never, and ever more often."""
    lab = SlotLab()
    return [_yield_row(lab, policy, every, npages) for policy in "FT" for every in (0, 256, 64, 16)]


def _yield_row(lab: SlotLab, policy: str, every: int, npages: int) -> YieldRow:
    lab.tape.seek(0)
    lab.use(DEFAULT, SLOT, npages)
    gate = lab.gate(DEFAULT)
    gate.choose_slot_policy(policy)
    vm, seen, heard = gate.vm, count(1), [0, vm_flushes(lab)]

    def hear(event: tuple[object, ...]) -> None:
        heard[0] += event[0] == "yield"

    vm.listener = hear
    vm.need_resched = (lambda: next(seen) % every == 0) if every else None
    try:
        gate.set_user_memory_region(1, SIZE_1G, 0)
    finally:
        vm.listener = vm.need_resched = None
    often = f"{every} entries" if every else "never"
    return YieldRow(policy, often, heard[0], vm_flushes(lab) - heard[1])


def vm_flushes(lab: SlotLab) -> int:
    """Remote TLB flushes of the DEFAULT VM so far."""
    return lab.gate(DEFAULT).vm.stats["remote_tlb_flush"]


# -- what one BLOCK can cover


class LevelRow(NamedTuple):
    """BLOCK and UNBLOCK at one level, on so many pages in a row. deleted_reads, back_reads: what
    the guest finds in the first and the last of them.
    """

    level: str
    pages: int
    blocks: int
    tracks: int
    deleted_reads: str
    unblocks: int
    back_reads: str


def level_rows(gpaw: int, npages: int = 64) -> list[LevelRow]:
    """At 4K, 2M and 1G, without KVM: the module alone. npages: up to 512."""
    names = enumerate(("4K", "2M", "1G"))
    return [_level_row(gpaw, name, number, npages) for number, name in names]


def _level_row(gpaw: int, name: str, sept_level: int, npages: int) -> LevelRow:
    machine = booted_machine(lps=2, packages=1)
    td = HostTd(Host(machine), gpaw=gpaw)
    td.add_vcpu(lp=0)
    last = SIZE_1G + (npages - 1) * PAGE_SIZE
    step = npages * PAGE_SIZE if sept_level else PAGE_SIZE
    for gpa in range(SIZE_1G, last + 1, PAGE_SIZE):
        td.add_page(gpa, b"kept")
    td.finalize()
    places = range(SIZE_1G, last + 1, step)
    for gpa in places:
        td.host.must(1, abi.TDH_MEM_RANGE_BLOCK, rcx=gpa | sept_level, rdx=td.tdr)
    td.host.must(1, abi.TDH_MEM_TRACK, rcx=td.tdr)
    gone = _reads(td, (SIZE_1G, last))
    for gpa in places:
        td.host.must(1, abi.TDH_MEM_RANGE_UNBLOCK, rcx=gpa | sept_level, rdx=td.tdr)
    back = _reads(td, (SIZE_1G, last))
    calls = machine.seamcalls
    blocks, unblocks = calls["TDH.MEM.RANGE.BLOCK"], calls["TDH.MEM.RANGE.UNBLOCK"]
    return LevelRow(name, npages, blocks, calls["TDH.MEM.TRACK"], gone, unblocks, back)


def _reads(td: HostTd, gpas: Sequence[int]) -> str:
    """What the guest finds at each of the GPAs; once, if it is the same everywhere."""
    found = []
    for gpa in gpas:
        td.enter(0, lp=0)
        seen = td.host.machine.read_guest(0, gpa, 4)
        is_out = isinstance(seen, GuestOutcome)
        found.append("EPT violation" if is_out else "its own data")
        if not is_out:
            td.host.machine.interrupt(0)
    return " / ".join(dict.fromkeys(found))
