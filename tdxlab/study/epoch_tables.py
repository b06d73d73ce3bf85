"""Tables of TLB tracking: what is refused when, what a stale TLB does, what batches save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice, repeat
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.accesses import Read
from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.breaks import broken
from tdxlab.host_td import HostTd
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.machine import Machine
from tdxlab.memory import MachineCheck
from tdxlab.races import build
from tdxlab.study.epoch_lab import GPA, EpochLab
from tdxlab.study.undone import undone
from tdxlab.vmm_td import Td

# -- what is refused when

#: What has been done before -> the moves that lead there; vCPU 0 is in the guest all the time.
STAGES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "BLOCK": ("BLOCK",),
    "BLOCK, TRACK": ("BLOCK", "TRACK"),
    "BLOCK, kick": ("BLOCK", "kick"),
    "BLOCK, TRACK, kick": ("BLOCK", "TRACK", "kick"),
    "BLOCK, TRACK, kick, enter": ("BLOCK", "TRACK", "kick", "enter 0"),
    "TRACK, kick, enter, read, BLOCK": ("TRACK", "kick", "enter 0", "read 0", "BLOCK"),
}


class OrderRow(NamedTuple):
    """What the module answers after some moves: to REMOVE, to UNBLOCK, and to TRACK; and how a
    guest inside that has used the page reads it: "-" if none is inside.
    """

    after: str
    remove: str
    unblock: str
    track: str
    guest_reads: str


def order_rows(gpaw: int) -> list[OrderRow]:
    """One row for each of STAGES."""
    return [_order_row(gpaw, after, moves) for after, moves in STAGES.items()]


def _order_row(gpaw: int, after: str, moves: Sequence[str]) -> OrderRow:
    tried = ("REMOVE", "UNBLOCK", "TRACK", "read 0")
    return OrderRow(after, *(_try(gpaw, moves, move) for move in tried))


def _try(gpaw: int, moves: Sequence[str], move: str) -> str:
    """What `move` is answered after the moves."""
    lab = EpochLab(gpaw=gpaw, vcpus=1)
    lab.play("enter 0", "read 0", *moves)
    return lab.do(move).answer if lab.inside() or move != "read 0" else "-"


# -- what a stale translation does


class StaleRow(NamedTuple):
    """A page goes to a new owner while the old one runs. guest_reads: what the old owner finds
    there then. owner_finds: what the new owner finds after the old one has tried to write.
    """

    host_did: str
    new_owner: str
    guest_reads: str
    owner_finds: str


_SECRET, _OVERWRITTEN = b"a new secret", b"overwritten!"
_OTHER_GPA = GPA + PAGE_SIZE
_NEW_VCPU = 1

Reading = Callable[[], bytes | GuestOutcome]
Giving = Callable[[EpochLab, HostTd], Reading]


def stale_rows(gpaw: int) -> list[StaleRow]:
    """Each new owner, with tracking and without it. Without it means: the host does not do it, and
    the module, against its own rules, does not ask for it.
    """
    owners: dict[str, Giving] = {
        "the same TD": _give_to_same,
        "another TD": _give_to_other,
        "the host": _give_to_host,
    }
    return [
        _stale_row(gpaw, is_tracked, owner, give)
        for is_tracked in (True, False)
        for owner, give in owners.items()
    ]


def _stale_row(gpaw: int, is_tracked: bool, owner: str, give: Giving) -> StaleRow:
    lab = EpochLab(gpaw=gpaw, vcpus=3)
    other = HostTd(lab.td.host, gpaw=gpaw)
    other.add_vcpu(lp=2)
    other.finalize()
    other.map_tables(GPA)
    lab.play("enter 0", "read 0", "BLOCK")
    if is_tracked:
        lab.play("TRACK", "kick", "enter 0")
    with nullcontext() if is_tracked else broken("no-tracking"):
        lab.do("REMOVE")
    machine = lab.machine
    lab.td.host.must(
        lab.host_lp, abi.TDH_PHYMEM_PAGE_WBINVD, rcx=machine.memory.join(lab.hpa, lab.td.keyid)
    )
    machine.clear(lab.hpa)
    find = give(lab, other)
    with undone(machine):
        reads = _found(lambda: machine.read_guest(0, GPA, len(_SECRET)))
    with undone(machine):
        machine.write_guest(0, GPA, _OVERWRITTEN)
        finds = _found(find)
    did = "BLOCK, TRACK, kick, REMOVE" if is_tracked else "BLOCK, REMOVE"
    return StaleRow(did, owner, reads, finds)


def _give_to_same(lab: EpochLab, _other: HostTd) -> Reading:
    """The page becomes another page of the same TD; its vCPU 1 accepts it and writes there."""
    return _fill(lab, lab.td, _NEW_VCPU, _NEW_VCPU, _OTHER_GPA)


def _give_to_other(lab: EpochLab, other: HostTd) -> Reading:
    return _fill(lab, other, 0, 2, GPA)


def _fill(lab: EpochLab, td: HostTd, vcpu: int, lp: int, gpa: int) -> Reading:
    lab.td.host.must(lab.host_lp, abi.TDH_MEM_PAGE_AUG, rcx=gpa, rdx=td.tdr, r8=lab.hpa)
    td.enter(vcpu, lp=lp)
    td.accept(lp, gpa)
    lab.machine.write_guest(lp, gpa, _SECRET)
    return lambda: lab.machine.read_guest(lp, gpa, len(_SECRET))


def _give_to_host(lab: EpochLab, _other: HostTd) -> Reading:
    """The host keeps the page, and stores something there under KeyID 0."""
    lab.machine.store(lab.hpa, _SECRET)
    return lambda: lab.machine.memory.read(lab.hpa, len(_SECRET))


def _found(read: Reading) -> str:
    """What a read leads to, in words."""
    try:
        found = read()
    except MachineCheck:
        return "a machine check"
    if isinstance(found, GuestOutcome):
        is_dead = found.status >> 32
        return "a machine check, the TD dies" if is_dead else "an EPT violation"
    return repr(found.decode()) if found in (_SECRET, _OVERWRITTEN) else "ciphertext"


# -- schedules


class RuleRow(NamedTuple):
    """All schedules of vCPUs that read a page and a host that takes it away. found: what is wrong
    in some of them.
    """

    rule_off: str
    vcpus: int
    schedules: int
    states: int
    found: str


def rule_rows(vcpus: int = 2) -> list[RuleRow]:
    """With all rules and `vcpus` vCPUs; then with one vCPU and one rule off at a time."""
    rules = [(None, vcpus), ("no-track", 1), ("no-kick", 1), ("no-tracking", 1)]
    return [_rule_row(rule, number) for rule, number in rules]


def _rule_row(rule: str | None, vcpus: int) -> RuleRow:
    race = build("tlb-tracking", vcpus)
    with nullcontext() if rule is None else broken(rule):
        found = race.explore()
    wrong = "; ".join(_short(v.invariant, v.explanation) for v in found.violations) or "nothing"
    return RuleRow(rule or "-", vcpus, found.schedules or 0, found.states, wrong)


def _short(invariant: str, explanation: str) -> str:
    """A finding in a few words."""
    if invariant == "result":
        return explanation.rpartition("'TDX_")[2].rstrip("'") or explanation
    return invariant


# -- batches


class BatchRow(NamedTuple):
    """`pages` pages are taken away while `others` vCPUs run, in batches. tracks, ipis, seamcalls:
    counted; by_formula: the same by formula.
    """

    batch: int
    pages: int
    others: int
    tracks: int
    ipis: int
    seamcalls: int
    by_formula: tuple[int, int, int]


def batch_rows(gpaw: int, pages: int = 32, others: int = 2) -> list[BatchRow]:
    """Batches of 1 page (what Linux 6.16 does), 2, 4, ... up to all."""
    sizes = [1 << shift for shift in range(pages.bit_length())]
    return [batch_row(gpaw, pages, others, size) for size in sizes]


def batch_row(gpaw: int, pages: int, others: int, batch: int) -> BatchRow:
    """One of them. The vCPUs read another page all the time and come back after each kick."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=others + 1, packages=1)
    td = machine.create_td(vcpus=max(others, 1), memory=2 * SIZE_2M)
    td.touch(0, pages * PAGE_SIZE)
    td.touch(SIZE_2M)
    td.zap_in_batches(batch)
    reading = [td.run_steps(repeat(Read(SIZE_2M)), vcpu=number) for number in range(others)]
    _let_in(reading)
    calls, host = dict(machine.seamcalls), machine.host.counts
    for _ in machine.host.on_cpu(others, td.punch_hole_steps(0, pages * PAGE_SIZE)):
        _let_in(reading)
    made = {leaf: n - calls.get(leaf, 0) for leaf, n in machine.seamcalls.items()}
    ipis = machine.host.counts["ipi"] - host["ipi"]
    for operation in reading:
        operation.close()
    total = sum(n for leaf, n in made.items() if leaf != "TDH.VP.ENTER")
    tracks = made["TDH.MEM.TRACK"]
    formula = batch_formula(pages, others, batch)
    return BatchRow(batch, pages, others, tracks, ipis, total, formula)


def batch_formula(pages: int, others: int, batch: int) -> tuple[int, int, int]:
    """(TRACKs, IPIs, SEAMCALLs): a TRACK and a kick for each batch, and at the end of the zap one
    remote flush for the shared EPT; BLOCK, REMOVE and WBINVD for each page.
    """
    tracks = -(-pages // batch)
    return tracks, (tracks + 1) * others, 3 * pages + tracks


class MirrorRow(NamedTuple):
    """A step of a zap in batches, and how many 4K entries of the mirror are what by then."""

    step: str
    mapped: int
    blocked: int
    empty: int


def mirror_rows(gpaw: int, pages: int = 4, batch: int = 2) -> list[MirrorRow]:
    """The SEAMCALLs and kicks of a zap, each with the mirror as it is when it is about to begin."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=SIZE_2M)
    td.touch(0, pages * PAGE_SIZE)
    td.zap_in_batches(batch)
    rows, last = [], ""
    for step in machine.host.on_cpu(1, td.punch_hole_steps(0, pages * PAGE_SIZE)):
        if step[0].startswith(("TDH.", "kvm_make_all")) and step[0] != last:
            rows.append(MirrorRow(step[0], *_mirror_counts(td, pages)))
        last = "" if step[0] == last else step[0]
    rows.append(MirrorRow("the end", *_mirror_counts(td, pages)))
    return rows


def _mirror_counts(td: Td, pages: int) -> tuple[int, int, int]:
    """(mapped, blocked, empty) entries of the first pages."""
    vm = td.vm
    root = vm.sps[vm.vcpus[0].mirror_root_hpa]
    entries = [it.old_spte for it in for_each_tdp_pte(vm, root, 0, pages) if it.level == 1]
    mapped = sum(is_present_leaf(spte, 1) for spte in entries)
    blocked = sum(map(is_blocked_spte, entries))
    return mapped, blocked, pages - mapped - blocked


def _let_in(reading: Sequence[object]) -> None:
    """Let each vCPU go on until it is surely in the guest again."""
    for operation in reading:
        for _ in islice(operation, 16):  # type: ignore[call-overload]
            pass
