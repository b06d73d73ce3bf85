"""The exercises of notebook 05: races; schedules that readers give are played on the machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from math import comb, factorial
from typing import Any

from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.protocol import PROTOCOLS, Rule
from tdxlab.study.protocol_search import explore
from tdxlab.study.race_lab import RaceLab
from tdxlab.study.race_tables import fault_once

# -- 05.1, 05.2, 05.3: how many


def _moves(seed: int, count: int, first: tuple[int, ...]) -> tuple[int, ...]:
    """Moves of each of `count` operations; those of seed 0 are given."""
    dice = random.Random(seed)
    return tuple(dice.randrange(2, 6) for _ in range(count)) if seed else first


def _two(gpaw: int, seed: int) -> Variant:
    n, m = _moves(seed, 2, (3, 4))
    right = comb(n + m, n)

    def hint(given: int) -> str:
        if given == 2 ** (n + m):
            return "Not every place is free to choose: each operation makes its moves exactly once."
        if given == factorial(n + m):
            return "The moves of one operation keep their order; divide by what that takes away."
        return (
            f"A schedule says at which of the {n + m} places the first operation moves. In how "
            f"many ways can {n} places be chosen?"
        )

    question = (
        f"Two operations of {n} and {m} moves share nothing. In how many orders can they be done?"
    )
    return Variant(question, right, hint)


def _three(gpaw: int, seed: int) -> Variant:
    moves = _moves(seed, 3, (2, 2, 3))
    right = factorial(sum(moves))
    for count in moves:
        right //= factorial(count)

    def hint(given: int) -> str:
        if given == comb(sum(moves), moves[0]):
            return "That places the first one. The other two still have an order among themselves."
        return "Place the moves of the first among all, then those of the second in what is left."

    a, b, c = moves
    question = (
        f"Three operations of {a}, {b} and {c} moves share nothing. In how many orders can they "
        "be done?"
    )
    return Variant(question, right, hint)


def _states(gpaw: int, seed: int) -> Variant:
    n, m = _moves(seed, 2, (3, 4))
    right = (n + 1) * (m + 1)

    def hint(given: int) -> str:
        if given == n * m:
            return (
                "Nearly. An operation of n moves can stand in how many places, both ends counted?"
            )
        if given == comb(n + m, n):
            return "Those are orders. Many of them come through the same states."
        return "A state says how far each operation has come, and not on which way it came there."

    question = (
        f"Two operations of {n} and {m} moves share nothing. How many states does an exploration "
        "look into that looks into each state once, the first and the last included?"
    )
    return Variant(question, right, hint)


# -- 05.4: held

_RESULTS = ("RET_PF_FIXED", "RET_PF_SPURIOUS", "RET_PF_RETRY")
#: Scenario, and moves that vCPU 0 has made.
_HELD = (
    ("same-page", 5),
    ("same-page", 3),
    ("same-page", 6),
    ("same-page", 7),
    ("fresh-region", 7),
)


@cache
def _held(scenario: str, moves: int) -> tuple[str, str]:
    """(what vCPU 0 stands before, what vCPU 1's fault returns)."""
    lab = RaceLab(scenario)
    lab.play([0] * moves)
    return lab.actors()[0].comes_next, fault_once(lab, 1)


def _what_returns(gpaw: int, seed: int) -> Variant:
    scenario, moves = _HELD[seed % len(_HELD)]
    at, right = _held(scenario, moves)
    stands = "has ended" if at in _RESULTS else f"is held before {at!r}"

    def hint(given: str) -> str:
        if str(given).strip().upper() not in _RESULTS:
            return f"{given!r} is no result of a fault here; choose from {', '.join(_RESULTS)}."
        return (
            "What does vCPU 1 read in the mirror when it comes to the entry: empty, FROZEN or "
            f"present? In the panel, let vCPU 0 move {moves} times and then vCPU 1."
        )

    question = (
        f"{scenario}, 2 vCPUs: vCPU 0 has made {moves} moves and {stands}. Now vCPU 1 faults, and "
        f"vCPU 0 does not move. What does vCPU 1's first fault return: {', '.join(_RESULTS)}?"
    )
    return Variant(question, right, hint)


# -- 05.5: a schedule


def _impossible(lab: RaceLab, numbers: Any) -> str:
    """Play a reader's schedule from the beginning; why it cannot be, "" if it can."""
    if not isinstance(numbers, list | tuple) or not all(type(n) is int for n in numbers):
        return "Give a list of the numbers of vCPUs, one for each move, such as [0, 0, 1]."
    lab.tape.seek(0)
    try:
        lab.play(numbers)
    except ValueError as problem:
        return f"Move {lab.tape.position + 1} cannot be made: {problem}."
    return ""


def _retries(lab: RaceLab) -> list[int]:
    return [row.retries for row in lab.actors()]


def _schedule_variant(
    question: str, scenario: str, rule: str, right: list[int], judge: Callable[[RaceLab], str]
) -> Variant:
    """An exercise that asks for a schedule. judge: what is wrong with it, "" if it is right."""

    @cache
    def stage() -> RaceLab:
        return RaceLab(scenario, rule=rule)

    def complaint(given: Any) -> str:
        return _impossible(stage(), given) or judge(stage())

    return Variant(question, right, complaint, lambda given: not complaint(given))


def _one_retries(gpaw: int, seed: int) -> Variant:
    who = seed % 2
    other = 1 - who
    right = [other] * 4 + [who] * 3 + [other] * 3 + [who] * 3

    def judge(lab: RaceLab) -> str:
        if not lab.tape.player.ended:
            return f"Not all have ended after {lab.tape.position} moves; go on."
        if sum(_retries(lab)) == 0:
            return f"Nobody has started over. When does vCPU {who} have to meet the entry?"
        if _retries(lab)[who] != 1 or _retries(lab)[other]:
            counts = ", ".join(f"vCPU {n} {times}" for n, times in enumerate(_retries(lab)))
            return f"Started over: {counts} times. Give vCPU {other} more moves meanwhile, or less."
        return ""

    question = (
        f"same-page, 2 vCPUs: give a schedule, from the beginning to the end, in which vCPU {who} "
        f"starts over exactly once and vCPU {other} never. A list of the numbers of who moves."
    )
    return _schedule_variant(question, "same-page", "", right, judge)


# -- 05.6: what is found

_FOUND = ("nothing", "vm_bugged", "deadlock", "Warned")
_CASES = (
    ("hook-failure", Rule.NO_RESTORE),
    ("same-page", Rule.NO_RESTORE),
    ("fresh-region", Rule.EARLY_PUBLISH),
    ("same-page", Rule.EARLY_PUBLISH),
    ("same-page", Rule.OVERWRITE_FROZEN),
    ("far-apart", Rule.NO_FREEZE),
)


@cache
def _verdict(scenario: str, rule: Rule) -> str:
    verdicts = explore(PROTOCOLS[scenario](2), rule).verdicts
    return verdicts[0].name if verdicts else "nothing"


def _what_is_found(gpaw: int, seed: int) -> Variant:
    scenario, rule = _CASES[seed % len(_CASES)]
    right = _verdict(scenario, rule)

    def hint(given: str) -> str:
        if str(given).strip().casefold() not in [word.casefold() for word in _FOUND]:
            return f"{given!r} is none of the findings; choose from {', '.join(_FOUND)}."
        return (
            "Ask whether the rule has any work to do in this scenario, and if so who notices first:"
            " the module, KVM, or nobody at all. The panel finds the schedule."
        )

    question = (
        f"{scenario}, 2 vCPUs, with the break {rule.value}: what does exploring all schedules "
        f"find: {', '.join(_FOUND)}?"
    )
    return Variant(question, right, hint)


# -- 05.7: a counter-example

_COUNTERED = ("no-freeze", "overwrite-frozen")


def _counter_example(gpaw: int, seed: int) -> Variant:
    rule = _COUNTERED[seed % len(_COUNTERED)]
    found = explore(PROTOCOLS["same-page"](2), Rule(rule)).verdicts[0]
    right = [vcpu for vcpu, _ in found.schedule]

    def judge(lab: RaceLab) -> str:
        if lab.verdict:
            return ""
        if lab.tape.player.ended:
            return "All have ended and nothing is wrong. Where must the second vCPU come in?"
        return (
            f"Nothing is wrong after {lab.tape.position} moves. Which two things must happen at "
            "the same entry, and what would have kept the second one away?"
        )

    question = (
        f"same-page, 2 vCPUs, with the break {rule}: give a schedule that goes wrong. A list of "
        "the numbers of who moves; the last move is the one that goes wrong."
    )
    return _schedule_variant(question, "same-page", rule, right, judge)


EXERCISES = (
    Exercise("05.1", _two),
    Exercise("05.2", _three),
    Exercise("05.3", _states),
    Exercise("05.4", _what_returns),
    Exercise("05.5", _one_retries),
    Exercise("05.6", _what_is_found),
    Exercise("05.7", _counter_example),
)
