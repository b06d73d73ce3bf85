"""Tables about Secure EPT entries: encodings, walks, moves, what the host sees; from the code."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tdxlab import views
from tdxlab.arch import HPA_MASK, SEPT_LEVEL_NAMES, table_index
from tdxlab.seam import sept
from tdxlab.seam.rules import SEPT_STATES, SeptState
from tdxlab.seam.sept import Septe
from tdxlab.study.sept_entry import hidden_fields
from tdxlab.study.sept_lab import FIRST_GPA, Seen, SeptLab
from tdxlab.study.sept_moves import MIGRATION_ONLY, MOVES, NEEDS_TRACKING, REACHED, TOP, Move, edges


class StateRow(NamedTuple):
    """One state of an entry. raw: its state bits; in_rdx: the byte that the host is shown."""

    letter: str
    state: str
    raw: int
    in_rdx: str
    kind: str
    made_by: str


def state_rows() -> list[StateRow]:
    """All sixteen states, in the order of the module's table."""
    return [
        StateRow(
            state.letter,
            state.name,
            state.bits,
            f"{state.public:#04x}",
            _kind(state),
            "migration, not modelled" if state.name in MIGRATION_ONLY else "this model",
        )
        for state in SEPT_STATES
    ]


def _kind(state: SeptState) -> str:
    """What an entry in that state maps."""
    if state.is_leaf:
        return "page"
    return "table" if state.name.startswith("NL_") else "nothing"


class WalkRow(NamedTuple):
    """One step of a walk from the root. hpa: of the table; number: of the entry in it."""

    level: str
    hpa: int
    number: int
    raw: int
    state: str


def walk_rows(lab: SeptLab, gpa: int = FIRST_GPA, level: int = 0) -> list[WalkRow]:
    """The entries that the module's walk looks at on its way to the entry for `gpa` at `level`."""
    memory, rows, table = lab.machine.memory, [], lab.eptp & HPA_MASK
    end = lab.walk(gpa, level).sept_level
    for at in range(lab.top, end - 1, -1):
        index = table_index(gpa, at)
        raw = memory.words.view[memory.frame(table) + index]
        rows.append(WalkRow(SEPT_LEVEL_NAMES[at], table, index, raw, Septe(raw).state))
        table = raw & HPA_MASK
    return rows


class MoveRow(NamedTuple):
    """One leaf that takes an entry: at which levels, and how it changes the state.

    changes: "before | before -> after" of the states that this model reaches. once_final: what the
    module asks for besides once TDH.MR.FINALIZE is done.
    """

    leaf: str
    levels: str
    changes: str
    once_final: str


def move_rows() -> list[MoveRow]:
    """A row for each leaf that changes an entry, from the matrices."""
    return [
        MoveRow(move.full_name, _levels(move), _changes(move), _once_final(move))
        for move in MOVES
        if _changes(move)
    ]


def _changes(move: Move) -> str:
    """All changes of a move; states that become the same one stand together."""
    before: dict[str, list[str]] = {}
    for edge in edges():
        if edge.move == move.name:
            before.setdefault(edge.after, []).append(edge.before)
    return "; ".join(f"{' | '.join(states)} -> {after}" for after, states in before.items())


def _levels(move: Move) -> str:
    assert move.levels is not None
    lowest, highest = move.levels
    names = [SEPT_LEVEL_NAMES[lowest], "root" if highest == TOP else SEPT_LEVEL_NAMES[highest]]
    return names[0] if lowest == highest else " to ".join(names)


def _once_final(move: Move) -> str:
    """What is asked for once the TD is finalised."""
    if move.name in NEEDS_TRACKING:
        return "blocked and tracked"
    if move.name == "RANGE.UNBLOCK":
        return "tracked"
    if all(edge.needs_build for edge in edges() if edge.move == move.name):
        return "refused"
    return "a vCPU inside" if move.side == "guest" else "nothing"


class ShownRow(NamedTuple):
    """An entry in memory, and what the host is shown of it. hidden: fields that differ."""

    state: str
    raw: int
    rcx: str
    rdx: str
    hidden: str


def shown_rows(hpa: int = 0x1_0020_0000, level: int = 1) -> list[ShownRow]:
    """What TDH.MEM.SEPT.RD shows of an entry at `level` with `hpa`, in each state reached here."""
    states = [state for state in SEPT_STATES if state.name in REACHED]
    return [_shown(state, _make_entry(state, hpa, level), level) for state in states]


def _make_entry(state: SeptState, hpa: int, level: int) -> int:
    if state.name == "FREE":
        return sept.FREE_ENTRY
    return sept.remake(sept.Place(0, level, sept.make_non_leaf(hpa)), state.bits)


def _shown(state: SeptState, raw: int, level: int) -> ShownRow:
    seen = Seen(*sept.report(raw, level))
    hidden = " ".join(hidden_fields(raw, seen)) or "-"
    return ShownRow(state.name, raw, f"{seen.rcx:#018x}", f"{seen.rdx:#06x}", hidden)


class SizeRow(NamedTuple):
    """PAMT entries of one size and type that a TD owns."""

    size: str
    page_type: str
    entries: int


def size_rows(lab: SeptLab) -> list[SizeRow]:
    """The TD's private pages and S-EPT pages in the PAMT: entries by size and type."""
    counts = Counter(
        (row.size, row.page_type)
        for row in views.pamt_rows(lab.machine)
        if row.owner == lab.tdr and row.page_type in ("PT_REG", "PT_EPT")
    )
    return [SizeRow(*place, count) for place, count in sorted(counts.items(), reverse=True)]


class StateCount(NamedTuple):
    """How many entries of a TD are in one state, over all levels."""

    state: str
    entries: int


def state_counts(lab: SeptLab) -> list[StateCount]:
    """A row for each state that this model reaches."""
    counts = lab.states()
    return [StateCount(state, counts[state]) for state in REACHED]
