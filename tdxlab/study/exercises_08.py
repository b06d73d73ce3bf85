"""The exercises of notebook 08: TLB tracking; every answer is what the module does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from tdxlab.study.epoch_lab import HOST_MOVES, EpochLab
from tdxlab.study.epoch_tables import batch_formula
from tdxlab.study.exercises import Exercise, Variant

_VCPUS = 3


def _lab(gpaw: int, moves: Sequence[str]) -> EpochLab:
    """The lab behind some moves."""
    lab = EpochLab(gpaw=gpaw, vcpus=_VCPUS)
    lab.play(*moves)
    return lab


def _told(moves: Sequence[str]) -> str:
    return f"A TD with {_VCPUS} vCPUs, all outside, in epoch 1. Then: {', '.join(moves)}."


def _chosen(stories: Sequence[tuple[str, ...]], seed: int) -> tuple[str, ...]:
    return stories[seed % len(stories)]


def _is_row(given: Any, length: int) -> bool:
    """An answer whose parts have their places, as many as there should be."""
    return isinstance(given, list | tuple) and len(given) == length


# -- 08.1: what is it answered?

_ASKED = (
    ("enter 0", "BLOCK", "TRACK", "REMOVE"),
    ("BLOCK", "REMOVE"),
    ("enter 0", "TRACK", "enter 1", "TRACK"),
    ("enter 0", "BLOCK", "TRACK", "leave 0", "UNBLOCK", "REMOVE"),
    ("enter 0", "BLOCK", "TRACK", "leave 0", "enter 0", "REMOVE"),
    ("BLOCK", "UNBLOCK"),
    ("TRACK", "BLOCK", "enter 0", "TRACK", "REMOVE"),
    ("enter 0", "enter 1", "BLOCK", "TRACK", "leave 0", "REMOVE"),
)


def _status(gpaw: int, seed: int) -> Variant:
    moves = _chosen(_ASKED, seed)
    right = _lab(gpaw, moves[:-1]).do(moves[-1]).answer

    def plain(given: Any) -> str:
        return str(given).strip().upper().removeprefix("TDX_")

    def hint(given: Any) -> str:
        return (
            f"{plain(given)} is not it. Before the last move, ask three things: is the page "
            "blocked, in which epoch was that, and who inside has entered no later than that? "
            f"EpochLab(vcpus=3).play(...) with all moves but {moves[-1]} shows it."
        )

    question = f"{_told(moves)} What does the module answer the last move? Give the status's name."
    return Variant(question, right, hint, lambda given: plain(given) == right)


# -- 08.2: the books

_BOOKS = (
    ("enter 0", "TRACK", "enter 1", "enter 2", "leave 0", "TRACK"),
    ("enter 0", "enter 1", "TRACK", "enter 2", "TRACK"),
    ("TRACK", "enter 0", "TRACK", "enter 1", "TRACK", "enter 2"),
    ("enter 0", "TRACK", "kick", "enter 0", "enter 1", "TRACK"),
    ("enter 2", "TRACK", "leave 2", "TRACK", "enter 2", "enter 1", "TRACK"),
)


def _books(gpaw: int, seed: int) -> Variant:
    moves = _chosen(_BOOKS, seed)
    row = _lab(gpaw, moves).row()
    right = (row.td_epoch, row.even, row.odd)

    def hint(given: Sequence[Any]) -> str:
        if not _is_row(given, len(right)):
            return "Give three numbers: the TD's epoch, inside of even epochs, inside of odd ones."
        if given[0] != right[0]:
            return "Count the TRACKs that succeed: one is refused while the epoch before has users."
        return (
            "The epoch is right. A vCPU stays in the counter of the epoch that it entered in until "
            "it leaves, whatever the TD's epoch is by then."
        )

    question = (
        f"{_told(moves)} Give the TD's epoch, and how many inside are counted for even and for "
        "odd epochs, such as (1, 0, 2)."
    )
    return Variant(question, right, hint)


# -- 08.3: who has to leave?

_LEAVING = (
    ("enter 0", "enter 1", "BLOCK", "TRACK", "enter 2"),
    ("enter 0", "TRACK", "enter 1", "BLOCK", "leave 0", "TRACK", "enter 2"),
    ("enter 0", "TRACK", "BLOCK", "enter 1", "leave 0", "TRACK", "enter 0"),
    ("enter 0", "enter 1", "enter 2", "BLOCK", "TRACK", "leave 1", "enter 1"),
    ("enter 1", "BLOCK", "TRACK", "leave 1", "enter 1", "enter 0"),
)


def _leaving(gpaw: int, seed: int) -> Variant:
    moves = _chosen(_LEAVING, seed)
    lab = _lab(gpaw, moves)
    old = lab.bepoch()
    right = frozenset(row.vcpu for row in lab.vcpu_rows() if row.inside and row.epoch <= old)

    def hint(given: Any) -> str:
        answered = frozenset(given)
        if not isinstance(given, set | frozenset):
            return "Give a set, such as {0, 2}; set() if nobody has to."
        if answered > right:
            return "Fewer will do. Whose TLB was flushed after the page had been blocked?"
        if answered < right:
            return "One more holds the counter of the epoch in which the page was blocked."
        return "Compare for each vCPU inside the epoch that it entered in with the page's BEPOCH."

    question = (
        f"{_told(moves)} Which vCPUs have to leave before REMOVE succeeds? "
        "Give a set of numbers, set() for none."
    )
    return Variant(question, right, hint)


# -- 08.4: where does the translation come from?

_READS = (
    ("enter 0", "read 0", "BLOCK", "read 0"),
    ("enter 0", "BLOCK", "read 0"),
    ("enter 0", "read 0", "leave 0", "enter 0", "read 0"),
    ("enter 0", "read 0", "TRACK", "leave 0", "enter 0", "read 0"),
    ("enter 0", "read 0", "BLOCK", "leave 0", "enter 0", "read 0"),
    ("enter 0", "read 0", "BLOCK", "TRACK", "leave 0", "enter 0", "read 0"),
    ("enter 0", "read 0", "enter 1", "BLOCK", "read 1"),
)


def _last_read(gpaw: int, seed: int) -> Variant:
    moves = _chosen(_READS, seed)
    right = _lab(gpaw, moves[:-1]).do(moves[-1]).answer.partition(":")[0]
    choices = ("from the TLB", "by a walk", "EPT violation")

    def hint(given: Any) -> str:
        if str(given).strip().casefold() not in map(str.casefold, choices):
            return f"Choose one of {', '.join(choices)}."
        return (
            "A TLB keeps what it has until it is flushed, and that happens at an entry in a newer "
            "epoch, not at an exit. Where the TLB has nothing, the Secure EPT as it is now decides."
        )

    question = (
        f"{_told(moves)} How does the last read come to its translation? Give "
        f"{', '.join(repr(choice) for choice in choices[:-1])} or {choices[-1]!r}."
    )
    return Variant(question, right, hint)


# -- 08.5, 08.6: batches


def _numbers(seed: int) -> tuple[int, int, int]:
    dice = random.Random(seed)
    if not seed:
        return 512, 3, 64
    return dice.randrange(50, 2000), dice.randrange(1, 16), dice.choice((8, 16, 64, 128))


def _costs(_gpaw: int, seed: int) -> Variant:
    pages, others, batch = _numbers(seed)
    _, ipis, calls = batch_formula(pages, others, batch)
    right = (calls, ipis)

    def hint(given: Sequence[Any]) -> str:
        if not _is_row(given, len(right)):
            return "Give a pair: SEAMCALLs, IPIs."
        if given[0] != calls:
            return (
                "BLOCK, REMOVE and WBINVD come once a page, TRACK once a batch, and the last batch "
                "may not be full."
            )
        if given[1] == ipis - others:
            return "The kicks are right. At its end the zap also flushes the shared EPT's TLBs."
        return "Each batch is one kick, which interrupts every vCPU; what comes at the very end?"

    question = (
        f"{pages} private pages become shared in one zap while {others} vCPUs run and always come "
        f"back; KVM removes {batch} pages at a time. How many SEAMCALLs, VP.ENTER aside, and how "
        "many IPIs? Give a pair."
    )
    return Variant(question, right, hint)


def _smallest(_gpaw: int, seed: int) -> Variant:
    pages, others, batch = _numbers(seed + 100 if seed else 0)
    most = batch_formula(pages, others, batch)[1]
    right = next(b for b in range(1, batch + 1) if batch_formula(pages, others, b)[1] <= most)

    def hint(given: int) -> str:
        if not isinstance(given, int) or given < 1:
            return "Give a whole number of pages, 1 or more."
        ipis = batch_formula(pages, others, given)[1]
        if ipis <= most:
            return f"Batches of {given} keep within it ({ipis} IPIs), but a smaller one does, too."
        return f"Batches of {given} cost {ipis} IPIs; that is more than {most}."

    question = (
        f"{pages} pages, {others} vCPUs that run and come back. What is the smallest batch with "
        f"which the whole zap sends at most {most} IPIs?"
    )
    return Variant(question, right, hint)


# -- 08.7: do it

_SITUATIONS = (
    ("enter 0", "enter 1"),
    ("enter 0", "TRACK", "BLOCK"),
    ("enter 0", "BLOCK", "TRACK", "enter 1"),
    ("enter 0", "TRACK", "enter 1", "BLOCK", "leave 1"),
    ("BLOCK", "enter 2", "TRACK", "leave 2", "enter 2"),
    ("enter 0", "TRACK", "kick", "BLOCK"),
)
_MOST_MOVES = 4


def shortest(gpaw: int, situation: Sequence[str]) -> tuple[str, ...]:
    """The shortest list of the host's moves after which the page is gone; the first of several."""
    lab = _lab(gpaw, situation)
    for length in range(1, _MOST_MOVES + 1):
        for moves in product(HOST_MOVES, repeat=length):
            if moves[-1] == "REMOVE" and _is_gone(lab, moves):
                return moves
    raise AssertionError("BLOCK, TRACK, kick, REMOVE always does it")


def _is_gone(lab: EpochLab, moves: Sequence[str]) -> bool:
    """True if the page is gone after the moves, which are taken back."""
    start = lab.tape.position
    lab.play(*moves)
    is_gone = lab.page_state() == "FREE"
    lab.tape.seek(start)
    return is_gone


def _do_it(gpaw: int, seed: int) -> Variant:
    situation = _chosen(_SITUATIONS, seed)
    right = shortest(gpaw, situation)

    def accepts(given: Any) -> bool:
        return not _objection(gpaw, situation, right, given)

    def hint(given: Any) -> str:
        return _objection(gpaw, situation, right, given)

    question = (
        f"{_told(situation)} Now the host wants the page. Give the shortest list of its moves, of "
        f"{', '.join(HOST_MOVES)}, after which the page has left the TD. Nobody enters meanwhile."
    )
    return Variant(question, list(right), hint, accepts)


def _objection(gpaw: int, situation: Sequence[str], right: Sequence[str], given: Any) -> str:
    """What is wrong with a list of moves; empty if nothing is."""
    if not isinstance(given, list | tuple):
        return 'Give a list of moves, such as ["BLOCK", "REMOVE"].'
    unknown = [move for move in given if move not in HOST_MOVES]
    if unknown:
        return f"{unknown[0]!r} is none of the host's moves: {', '.join(HOST_MOVES)}."
    lab = _lab(gpaw, situation)
    rows = lab.play(*given)
    if lab.page_state() != "FREE":
        said = [f"{row.move}: {row.answer}" for row in rows] or ["no move"]
        return f"The page is still {lab.page_state()}. The answers were: {'; '.join(said)}."
    if len(given) > len(right):
        return "That does it, but it can be done with fewer moves. Which of them changed nothing?"
    return ""


EXERCISES = (
    Exercise("08.1", _status),
    Exercise("08.2", _books),
    Exercise("08.3", _leaving),
    Exercise("08.4", _last_read),
    Exercise("08.5", _costs),
    Exercise("08.6", _smallest),
    Exercise("08.7", _do_it),
)
