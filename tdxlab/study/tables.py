"""What a machine looks like, as plain tables: lists of NamedTuples, one class for each kind of row.

Everything here only reads. Functions that take a machine show its present state; those that take a
tape count the actions up to its present position.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tdxlab import views
from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.status import is_error
from tdxlab.arch import SEPT_LEVEL_NAMES
from tdxlab.bare import BareMachine
from tdxlab.seam.pamt import PAGES_OF_SIZE, SIZE_NAMES
from tdxlab.seam.rules import (
    OP_STATE_NAMES,
    PAGE_TYPES,
    PT_NDA,
    PT_RSVD,
    SEPT_STATES,
    TD_LIFECYCLE_NAMES,
    TD_TEARDOWN,
)
from tdxlab.tape import Action, Tape

#: Page types that a page can have while somebody uses it, in the module's order.
USED_PAGE_TYPES = tuple(kind.name for kind in PAGE_TYPES if kind.value not in (PT_NDA, PT_RSVD))

#: S-EPT states in the order of the module's table.
STATE_ORDER = {state.name: place for place, state in enumerate(SEPT_STATES)}


class SeptCount(NamedTuple):
    """How many entries of one Secure EPT are in one state at one level. level: "4K" to "PML5"."""

    tdr: int
    level: str
    state: str
    entries: int


class PamtCount(NamedTuple):
    """How many 4 KiB pages the PAMT shows as one type."""

    page_type: str
    pages: int


class LeafCount(NamedTuple):
    """How often one SEAMCALL leaf was called, and how many of the calls were refused."""

    leaf: str
    group: str
    calls: int
    refused: int


class PhaseCount(NamedTuple):
    """How many SEAMCALLs one phase of a tape made."""

    phase: str
    calls: int


class TimePoint(NamedTuple):
    """SEAMCALLs made in the first `position` actions of a tape; `phase`: of the last of them."""

    position: int
    phase: str
    calls: int


class KeyOwner(NamedTuple):
    """One private KeyID in use. owner: TDR of the TD that has it, 0 if no TD has.
    pending_packages: how many packages still have to write their caches back.
    """

    keyid: int
    state: str
    owner: int
    pending_packages: int


class TdRow(NamedTuple):
    """One TD. pages: 4 KiB pages that it owns besides the TDR. epoch: of its TLBs. op_state, vcpus
    and epoch are "-" or 0 while its control pages are not in use.
    """

    tdr: int
    keyid: int
    lifecycle: str
    op_state: str
    vcpus: int
    pages: int
    epoch: int


class HardwareCount(NamedTuple):
    """One hardware counter."""

    counter: str
    total: int


# -- the state of a machine


def sept_occupancy(machine: BareMachine) -> list[SeptCount]:
    """Entries that are not free, for each TD, level (top first) and state."""
    counts: Counter[tuple[int, int, str]] = Counter()
    for tdr in views.tds(machine):
        counts.update((tdr, -row.sept_level, row.state) for row in views.sept_rows(machine, tdr))
    places = sorted(counts, key=lambda place: (*place[:2], STATE_ORDER.get(place[2], -1)))
    return [
        SeptCount(tdr, SEPT_LEVEL_NAMES[-level], state, counts[tdr, level, state])
        for tdr, level, state in places
    ]


def sept_states(machine: BareMachine) -> dict[str, int]:
    """S-EPT state -> number of entries in it, over all TDs and levels; used states only."""
    counts: Counter[str] = Counter()
    for row in sept_occupancy(machine):
        counts[row.state] += row.entries
    return dict(counts)


def pamt_pages(machine: BareMachine) -> list[PamtCount]:
    """4 KiB pages of each type that is in use; a type without pages has a row with 0.

    A 2 MiB page counts as 512, a 1 GiB page as 262144. Free (PT_NDA) and reserved pages are left
    out.
    """
    counts: Counter[str] = Counter()
    for row in views.pamt_rows(machine):
        counts[row.page_type] += PAGES_OF_SIZE[SIZE_NAMES.index(row.size)]
    return [PamtCount(kind, counts[kind]) for kind in USED_PAGE_TYPES]


def tds(machine: BareMachine) -> list[TdRow]:
    """Every TD that is there, by the HPA of its TDR."""
    return [_td_row(machine, tdr) for tdr in views.tds(machine)]


def _td_row(machine: BareMachine, tdr: int) -> TdRow:
    info = views.td_info(machine, tdr)
    has_control_pages = "op_state" in info and info["lifecycle_state"] != TD_TEARDOWN
    return TdRow(
        tdr,
        info["hkid"],
        TD_LIFECYCLE_NAMES[info["lifecycle_state"]],
        OP_STATE_NAMES[info["op_state"]] if has_control_pages else "-",
        info["num_vcpus"] if has_control_pages else 0,
        info["chldcnt"],
        info["td_epoch"] if has_control_pages else 0,
    )


def keyids(machine: BareMachine) -> list[KeyOwner]:
    """Every KeyID that is not free, with the TD that has it.

    After TDH.MNG.KEY.FREEID the TD keeps the number in its TDR, and the KeyID is free: no row.
    """
    owners = {row.keyid: row.tdr for row in tds(machine) if row.lifecycle != "TD_TEARDOWN"}
    return [
        KeyOwner(row.keyid, row.state, owners.get(row.keyid, 0), row.pending_packages.bit_count())
        for row in views.key_rows(machine)
    ]


def hardware(machine: BareMachine) -> list[HardwareCount]:
    """Every hardware counter since the machine was built."""
    return [HardwareCount(name, total) for name, total in machine.trace.hardware().items()]


def seamcalls(machine: BareMachine) -> list[LeafCount]:
    """SEAMCALLs of each leaf since the machine was built, in the order of the leaf numbers."""
    refused = machine.trace.refusals()
    return [
        LeafCount(*_name_and_group(number), calls, refused.get(number, 0))
        for number, calls in sorted(machine.trace.seamcalls().items())
    ]


def _name_and_group(number: int) -> tuple[str, str]:
    leaf = HOST_LEAVES.get(number)
    return (leaf.name, leaf.group) if leaf else (f"leaf {number}", "other")


# -- what a tape says


def played(tape: Tape) -> list[Action]:
    """The actions up to the tape's present position."""
    return tape.actions[: tape.position]


def is_seamcall(action: Action) -> bool:
    """True if the host called the module."""
    return action.kind == "SEAMCALL"


def is_refused(action: Action) -> bool:
    """True if the module refused the call; reaching the guest and leaving it are no refusals."""
    return action.status not in (None, IN_GUEST) and is_error(action.status or 0)


def seamcalls_per_leaf(tape: Tape) -> list[LeafCount]:
    """SEAMCALLs of each leaf, in the order of their first use on the whole tape.

    Leaves that are called later on the tape have a row with 0, so that bars keep their places.
    """
    names = dict.fromkeys(
        _name_and_group(action.inputs["rax"] & 0xFFFF)
        for action in tape.actions
        if is_seamcall(action)
    )
    made = [action for action in played(tape) if is_seamcall(action)]
    calls = Counter(action.name for action in made)
    refused = Counter(action.name for action in made if is_refused(action))
    return [LeafCount(name, group, calls[name], refused[name]) for name, group in names]


def seamcalls_per_phase(tape: Tape) -> list[PhaseCount]:
    """SEAMCALLs of each phase, in the order of the tape; later phases have a row with 0."""
    phases = dict.fromkeys(action.phase for action in tape.actions if is_seamcall(action))
    calls = Counter(action.phase for action in played(tape) if is_seamcall(action))
    return [PhaseCount(phase, calls[phase]) for phase in phases]


def seamcalls_over_time(tape: Tape) -> list[TimePoint]:
    """SEAMCALLs made so far, after each action up to the present position; the first row is 0."""
    points = [TimePoint(0, "", 0)]
    for position, action in enumerate(played(tape), start=1):
        points.append(TimePoint(position, action.phase, points[-1].calls + is_seamcall(action)))
    return points
