"""What can happen to one Secure EPT entry: the moves, and what the matrices say of each.

A move is a SEAMCALL or a TDCALL that takes an entry, or something that decides which of them are
legal (finalising the TD, a new epoch, a vCPU that goes in or out). Nothing here asks the module:
the matrices predict, the module answers, and the tests hold the one against the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.seam.rules import (
    DEMOTED_CHILD,
    GUEST_SEPT_ACCEPTS,
    GUEST_SEPT_RESULT,
    NL_MAPPED_BITS,
    OP_STATE_ACCEPTS,
    OP_STATE_NAMES,
    SEPT_ACCEPTS,
    SEPT_RESULT,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_BY_NAME,
    TLB_TRACKING_OP_STATES,
)

#: The level of the root's entries, whatever it is: 3 at GPAW 48, 4 at 52.
TOP = -1


class Move(NamedTuple):
    """One thing that can be done. name: the leaf's name without its TDH.MEM. or TDG.MEM.

    side: "host" or "guest". leaf: its number, None where it is no call. levels: lowest and highest
    sept_level of the entry it takes, None if it takes no entry.
    new_page: it needs a free page in R8: "page" of the entry's size, "table" of 4 KiB, or "".
    Source of the levels: TDX module 1.5.01, helpers.c (verify_page_info_input) and the leaves.
    """

    name: str
    side: str
    leaf: int | None
    levels: tuple[int, int] | None = None
    new_page: str = ""

    @property
    def full_name(self) -> str:
        """The leaf's name in full, such as "TDH.MEM.PAGE.AUG"."""
        if self.leaf is None:
            return self.name
        return (abi.HOST_LEAVES if self.side == "host" else abi.GUEST_LEAVES)[self.leaf].name

    def takes_level(self, level: int, top: int) -> bool:
        """True if it takes entries of `level` where the root's are at `top`, or takes no entry."""
        if self.levels is None:
            return True
        lowest, highest = self.levels
        return lowest <= level <= (top if highest == TOP else highest)


MOVES: tuple[Move, ...] = (
    Move("SEPT.ADD", "host", abi.TDH_MEM_SEPT_ADD, (1, TOP), "table"),
    Move("PAGE.ADD", "host", abi.TDH_MEM_PAGE_ADD, (0, 0), "page"),
    Move("PAGE.AUG", "host", abi.TDH_MEM_PAGE_AUG, (0, 1), "page"),
    Move("RANGE.BLOCK", "host", abi.TDH_MEM_RANGE_BLOCK, (0, TOP)),
    Move("RANGE.UNBLOCK", "host", abi.TDH_MEM_RANGE_UNBLOCK, (0, TOP)),
    Move("PAGE.REMOVE", "host", abi.TDH_MEM_PAGE_REMOVE, (0, 2)),
    Move("SEPT.REMOVE", "host", abi.TDH_MEM_SEPT_REMOVE, (1, TOP)),
    Move("PAGE.PROMOTE", "host", abi.TDH_MEM_PAGE_PROMOTE, (1, 2)),
    Move("PAGE.DEMOTE", "host", abi.TDH_MEM_PAGE_DEMOTE, (1, 2), "table"),
    Move("PAGE.RELOCATE", "host", abi.TDH_MEM_PAGE_RELOCATE, (0, 0), "page"),
    Move("SEPT.RD", "host", abi.TDH_MEM_SEPT_RD, (0, TOP)),
    Move("PAGE.ACCEPT", "guest", abi.TDG_MEM_PAGE_ACCEPT, (0, 1)),
    Move("read", "guest", None, (0, TOP)),
    Move("write", "guest", None, (0, TOP)),
    Move("MR.FINALIZE", "host", abi.TDH_MR_FINALIZE),
    Move("TRACK", "host", abi.TDH_MEM_TRACK),
    Move("VP.ENTER", "host", abi.TDH_VP_ENTER),
    Move("kick", "host", None),
)
MOVE_BY_NAME: dict[str, Move] = {move.name: move for move in MOVES}

#: Leaves that take an entry away or change its size or page: blocked and tracked first, once the TD
#: runs. Source: TDX module 1.5.01, the bodies of the leaves.
NEEDS_TRACKING = frozenset(
    {"PAGE.REMOVE", "SEPT.REMOVE", "PAGE.PROMOTE", "PAGE.DEMOTE", "PAGE.RELOCATE"}
)

#: States that some move of this model leads to; migration alone makes the others.
REACHED = ("FREE", "NL_MAPPED", "NL_BLOCKED", "PENDING", "PENDING_BLOCKED", "MAPPED", "BLOCKED")
MIGRATION_ONLY = tuple(name for name in SEPT_STATE_BY_NAME if name not in REACHED)


def find_move(name: str) -> Move:
    """The move of that name, short or in full. Refuses an unknown one: ValueError."""
    for move in MOVES:
        if name in (move.name, move.full_name):
            return move
    raise ValueError(f"no move {name!r}; there are {', '.join(MOVE_BY_NAME)}")


class Edge(NamedTuple):
    """A way from one state to another. needs_build: the module takes it before TDH.MR.FINALIZE
    only, because the entry is not blocked or the leaf is for building.
    """

    before: str
    after: str
    move: str
    needs_build: bool


def edges() -> Iterator[Edge]:
    """Every way between two of the states that this model reaches, from the module's matrices."""
    for move in MOVES:
        for before, after in _results(move):
            if before in REACHED and after in REACHED and before != after:
                yield Edge(before, after, move.name, _is_for_building(move, before))


def _results(move: Move) -> Iterator[tuple[str, str]]:
    """(state before, state after) of a move that succeeds."""
    table = GUEST_SEPT_RESULT if move.side == "guest" else SEPT_RESULT
    pairs = list(table.get(-1 if move.leaf is None else move.leaf, {}).items())
    if move.name == "PAGE.DEMOTE":
        pairs = [(bits, NL_MAPPED_BITS) for bits in DEMOTED_CHILD]
    if move.name == "PAGE.PROMOTE":
        merged = sorted(set(DEMOTED_CHILD.values()))
        pairs = [
            (bits, after) for bits in SEPT_ACCEPTS[abi.TDH_MEM_PAGE_PROMOTE] for after in merged
        ]
    for before, after in sorted(pairs):
        yield SEPT_STATE_BY_BITS[before].name, SEPT_STATE_BY_BITS[after].name


def _op_states(move: Move) -> frozenset[int]:
    """Op-states that a host's move is legal in; a kick is, in every one."""
    return frozenset(OP_STATE_NAMES) if move.leaf is None else OP_STATE_ACCEPTS[move.leaf]


def _is_for_building(move: Move, before: str) -> bool:
    state = SEPT_STATE_BY_NAME[before]
    if move.side == "host" and not _op_states(move) & TLB_TRACKING_OP_STATES:
        return True
    return move.name in NEEDS_TRACKING and state.tracked and not state.blocked


def accepted_states(name: str) -> tuple[str, ...]:
    """States of the entry that a leaf goes on with, those of migration included, in the order of
    the table. Refuses an unknown name, or one that takes no entry: ValueError.
    """
    move = find_move(name)
    table = GUEST_SEPT_ACCEPTS if move.side == "guest" else SEPT_ACCEPTS
    if move.leaf not in table:
        raise ValueError(f"{name} looks at no entry's state")
    return tuple(
        SEPT_STATE_BY_BITS[bits].name for bits in SEPT_STATE_BY_BITS if bits in table[move.leaf]
    )


class Situation(NamedTuple):
    """What decides whether a move is legal.

    state: of the entry. level: its sept_level. top: that of the root's entries. reached: a walk
    from the root ends at this entry. op_state: of the TD. inside: a vCPU is in the guest. tracked:
    no TLB can hold what the entry mapped when it was blocked.
    """

    state: str
    level: int
    top: int
    reached: bool
    op_state: int
    inside: bool
    tracked: bool


#: What the matrices say of a move: it may go, it may go after BLOCK and TRACK, it may not.
LEGAL, LATER, ILLEGAL = "legal", "later", "illegal"


class Prospect(NamedTuple):
    """What the matrices say of a move, and why. verdict: LEGAL, LATER or ILLEGAL."""

    verdict: str
    reason: str


def prospect(move: Move, now: Situation) -> Prospect:
    """What the matrices say of `move`, in the order in which the module looks.

    LEGAL is no promise: TDH.MEM.SEPT.REMOVE and TDH.MEM.PAGE.PROMOTE also look at the 512 entries
    below, TDH.MEM.TRACK at who is inside.
    """
    reason = _objection(move, now)
    if reason:
        return Prospect(ILLEGAL, reason)
    if move.levels is None:
        return Prospect(LEGAL, "it looks at no entry")
    state = SEPT_STATE_BY_NAME[now.state]
    if now.op_state in TLB_TRACKING_OP_STATES and state.tracked:
        if move.name in NEEDS_TRACKING and not state.blocked:
            return Prospect(LATER, "TDH.MEM.RANGE.BLOCK has to come first")
        if move.name in NEEDS_TRACKING | {"RANGE.UNBLOCK"} and not now.tracked:
            return Prospect(LATER, "TLB tracking is not done: TDH.MEM.TRACK, then kick the vCPU")
    return Prospect(LEGAL, "the matrices let it pass")


def _objection(move: Move, now: Situation) -> str:
    """Why the move cannot go at all; empty if it can."""
    if move.side == "host" and now.op_state not in _op_states(move):
        return f"not in op-state {OP_STATE_NAMES[now.op_state]}"
    is_entering = move.name == "VP.ENTER"
    minds_vcpu = is_entering or move.name == "kick" or move.side == "guest"
    if minds_vcpu and now.inside == is_entering:
        return "the vCPU is inside already" if now.inside else "no vCPU is inside the guest"
    if move.levels is None:
        return ""
    if not move.takes_level(now.level, now.top):
        return "not at this level"
    if not now.reached:
        return "the walk stops above this entry"
    return _wrong_state(move, now.state)


def _wrong_state(move: Move, state: str) -> str:
    if move.leaf is None:
        return "" if SEPT_STATE_BY_NAME[state].guest_accessible else f"no access in state {state}"
    accepted = accepted_states(move.name)
    if move.name == "SEPT.ADD":
        accepted = ("FREE",)
    return "" if state in accepted else f"not in state {state}"
