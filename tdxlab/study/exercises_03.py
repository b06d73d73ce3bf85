"""The exercises of notebook 03: the states of a Secure EPT entry; every answer is the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from tdxlab.abi.status import status_name
from tdxlab.arch import PAGE_SIZE, SEPT_LEVEL_NAMES, level_size
from tdxlab.seam import sept
from tdxlab.seam.rules import SEPT_STATE_BY_NAME
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.sept_entry import state_bits_text
from tdxlab.study.sept_lab import FIRST_GPA, Answer, Seen, SeptLab
from tdxlab.study.sept_moves import MOVE_BY_NAME, REACHED, accepted_states

_TABLES = ("NL_MAPPED", "NL_BLOCKED")


def _entry_in(state: str, hpa: int) -> int:
    """A raw entry in that state, as the module would write it."""
    if state == "FREE":
        return sept.FREE_ENTRY
    if state in _TABLES:
        linked = sept.Place(0, 1, sept.make_non_leaf(hpa))
        return sept.remake(linked, SEPT_STATE_BY_NAME[state].bits)
    return sept.make_leaf(SEPT_STATE_BY_NAME[state].bits, hpa)


# -- 03.1 and 03.2: encodings


def _read_raw(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    state = dice.choice(REACHED) if seed else "PENDING_BLOCKED"
    raw = _entry_in(state, dice.randrange(1 << 20, 1 << 21) * PAGE_SIZE)

    def hint(given: str) -> str:
        named = str(given).strip().upper()
        if named not in SEPT_STATE_BY_NAME:
            return f"{given!r} is no state; choose from {', '.join(REACHED)}."
        other = state_bits_text(SEPT_STATE_BY_NAME[named].bits)
        return (
            f"An entry that is {named} has {other}. Write down bits 56, 55, 54, 53, 9, 7 and 6 of "
            f"this one, or print state_bits_text({raw:#x}), and compare."
        )

    return Variant(f"Which state is the entry {raw:#018x} in?", state, hint)


def _encode_rdx(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    states = [state for state in REACHED if state != "FREE"]
    state, level = (dice.choice(states), dice.randrange(1, 3)) if seed else ("NL_BLOCKED", 1)
    _, right = sept.report(_entry_in(state, 1 << 32), level)
    name = SEPT_LEVEL_NAMES[level]

    def hint(given: int) -> str:
        low, byte = right & 7, right >> 8
        wrong = [
            f"bits 2:0 hold the level, 4K is 0; yours say {given & 7}" * (given & 7 != low),
            f"bits 15:8 hold the state's byte; yours is {given >> 8:#x}" * (given >> 8 != byte),
        ]
        said = "; ".join(filter(None, wrong)) or "all other bits are 0"
        return f"In RDX {said}. SEPT_STATE_BY_NAME['{state}'].public is the byte of the state."

    question = f"TDH.MEM.SEPT.RD reads a {name} entry that is {state}. What is RDX afterwards?"
    return Variant(question, right, hint)


# -- 03.3: the shortest way out

#: Start of the story -> the moves that lead there, besides the tables.
_STARTS: dict[str, tuple[str, ...]] = {
    "MAPPED, the TD runs and its vCPU is inside": ("PAGE.ADD", "MR.FINALIZE", "VP.ENTER"),
    "MAPPED, the TD runs and no vCPU is inside": ("PAGE.ADD", "MR.FINALIZE"),
    "MAPPED, the TD is not finalised": ("PAGE.ADD",),
    "BLOCKED since before TDH.MR.FINALIZE, no vCPU is inside": (
        "PAGE.ADD",
        "RANGE.BLOCK",
        "MR.FINALIZE",
    ),
    "PENDING, the vCPU went in, then TDH.MEM.TRACK was called": (
        "PAGE.AUG",
        "MR.FINALIZE",
        "VP.ENTER",
        "TRACK",
    ),
}
_TOOLS = ("PAGE.REMOVE", "RANGE.BLOCK", "TRACK", "kick")
_LONGEST = 5


def _start(gpaw: int, moves: Sequence[str]) -> SeptLab:
    lab = SeptLab(gpaw=gpaw)
    lab.build()
    lab.play(*moves)
    return lab


def _first_refusal(lab: SeptLab, moves: Sequence[str]) -> Answer | None:
    """Make the moves; the first that is refused, None if all went well."""
    for name in moves:
        answer = lab.do(name)
        if answer.is_refused:
            return answer
    return None


def _is_way_out(lab: SeptLab, moves: Sequence[str]) -> bool:
    """True if the moves free the entry, none of them refused; the lab stands as before."""
    here = lab.tape.position
    is_out = _first_refusal(lab, moves) is None and lab.state() == "FREE"
    lab.tape.seek(here)
    return is_out


def _shortest_way(lab: SeptLab) -> tuple[str, ...]:
    """The first of the shortest ways out; found by trying all."""
    for length in range(1, _LONGEST + 1):
        for moves in product(_TOOLS, repeat=length):
            if _is_way_out(lab, moves):
                return moves
    raise AssertionError("no way out of this start")


def _way_out(gpaw: int, seed: int) -> Variant:
    start = list(_STARTS)[seed % len(_STARTS)]
    lab = _start(gpaw, _STARTS[start])
    shortest = _shortest_way(lab)

    def is_list(given: Any) -> bool:
        return isinstance(given, list | tuple) and all(name in MOVE_BY_NAME for name in given)

    def hint(given: Any) -> str:
        if not is_list(given):
            return f"Give a list of moves, each one of {', '.join(_TOOLS)}."
        return _told(_start(gpaw, _STARTS[start]), given, len(shortest))

    def accepts(given: Any) -> bool:
        return is_list(given) and len(given) == len(shortest) and _is_way_out(lab, given)

    question = (
        f"An entry is {start}. Give the shortest list of moves that makes it FREE, none of them "
        f"refused. Moves: {', '.join(_TOOLS)}."
    )
    return Variant(question, shortest, hint, accepts)


def _told(lab: SeptLab, given: Sequence[str], shortest: int) -> str:
    """What happens when the moves are made in a lab that stands at the start."""
    refused = _first_refusal(lab, given)
    if refused is not None:
        return f"Played in a SeptLab, {refused.call} answers {refused.outcome}."
    if lab.state() != "FREE":
        return f"Nothing is refused, but the entry ends as {lab.state()}."
    return f"It works with {len(given)} moves, and a way of {shortest} exists. What can go?"


# -- 03.4: the matrices

_ROWS = ("RANGE.BLOCK", "PAGE.REMOVE", "PAGE.DEMOTE", "RANGE.UNBLOCK", "PAGE.PROMOTE", "PAGE.AUG")


def _matrix_row(gpaw: int, seed: int) -> Variant:
    name = _ROWS[seed % len(_ROWS)]
    right = frozenset(state for state in accepted_states(name) if state in REACHED)

    def hint(given: Any) -> str:
        answered = {str(state).strip().upper() for state in given}
        too_many, missing = answered - right, right - answered
        if too_many:
            return f"It does not go on with {min(too_many)}: bring an entry there and try."
        return (
            f"{len(missing)} more. Think of the states without a bit of permission, and of tables."
        )

    full = MOVE_BY_NAME[name].full_name
    question = f"With which of {', '.join(REACHED)} does {full} go on, by its matrix? Give a set."
    return Variant(question, right, hint)


# -- 03.5: blocked parents


def _blocked_parent(gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    lab = _start(gpaw, ("PAGE.ADD",))
    blocked = dice.randrange(1, lab.top + 1) if seed else 2
    call = dice.choice(("PAGE.REMOVE", "RANGE.BLOCK", "SEPT.RD")) if seed else "PAGE.REMOVE"
    lab.do("RANGE.BLOCK", FIRST_GPA & -level_size(blocked), blocked)
    answer = lab.do(call)
    assert isinstance(answer.seen, Seen)
    right = (answer.seen.level, answer.seen.state)

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 2:
            return "Give a pair: the level as a number, and the state's name."
        if given[0] != right[0]:
            return (
                f"The walk starts at level {lab.top} and goes down while an entry has permissions. "
                f"Where does it meet the first one without? Not at {given[0]}."
            )
        return (
            "RDX describes the entry where the walk stopped, not the one that was asked for. "
            f"Block the {SEPT_LEVEL_NAMES[blocked]} entry in a SeptLab and look at its state()."
        )

    question = (
        f"A MAPPED 4 KiB page lies below a {SEPT_LEVEL_NAMES[blocked]} entry, and that entry is "
        f"blocked. {MOVE_BY_NAME[call].full_name} on the page fails: which level and which state "
        'does RDX report? Give a pair such as (0, "MAPPED").'
    )
    return Variant(question, right, hint)


# -- 03.6: promotion

#: What is done to page 7 of the 512 before they are merged.
_CHANGES: dict[str, tuple[str, ...]] = {
    "is moved with TDH.MEM.PAGE.RELOCATE": ("PAGE.RELOCATE",),
    "is left alone": (),
    "is blocked": ("RANGE.BLOCK",),
    "is blocked and unblocked": ("RANGE.BLOCK", "RANGE.UNBLOCK"),
    "is removed": ("PAGE.REMOVE",),
}


def _promotion(gpaw: int, seed: int) -> Variant:
    change = list(_CHANGES)[seed % len(_CHANGES)]
    lab = SeptLab(gpaw=gpaw)
    lab.build(level=1)
    lab.play("PAGE.AUG", "PAGE.DEMOTE", level=1)
    lab.play(*_CHANGES[change], gpa=FIRST_GPA + 7 * PAGE_SIZE)
    before = lab.info["chldcnt"]
    answer = lab.do("PAGE.PROMOTE", level=1)
    right = (status_name(answer.status or 0), lab.info["chldcnt"] - before)

    def hint(given: Sequence[Any]) -> str:
        if len(given) != 2:
            return "Give a pair: the status without its operand, and the change of TDR.chldcnt."
        if str(given[0]).strip().upper() != right[0]:
            return (
                "The 512 entries must be equal but for the address, and the address must grow by "
                "4 KiB from one to the next. Print lab.raw() of pages 6 and 7."
            )
        return (
            "TDR.chldcnt counts the 4 KiB pages that the TD owns, its S-EPT pages among them. "
            "Which of them does the TD still own afterwards?"
        )

    question = (
        "Before TDH.MR.FINALIZE a 2 MiB page is augmented and demoted to 512 PENDING pages. Page 7 "
        f"{change}. What does TDH.MEM.PAGE.PROMOTE answer, and by how much does it change "
        'TDR.chldcnt? Give a pair such as ("TDX_SUCCESS", 0).'
    )
    return Variant(question, right, hint)


EXERCISES = (
    Exercise("03.1", _read_raw),
    Exercise("03.2", _encode_rdx),
    Exercise("03.3", _way_out),
    Exercise("03.4", _matrix_row),
    Exercise("03.5", _blocked_parent),
    Exercise("03.6", _promotion),
)
