"""What the exercises of every notebook have to do with right and with wrong answers.

wrong: answers that are wrong for most variants; where one of them is right, it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tdxlab.study import check, exercises


def accepted_wrongs(number: str, wrong: Sequence[Any], *, seed: int, gpaw: int = 48) -> list[Any]:
    """Wrong answers that the check takes."""
    right = exercises.variant(number, gpaw=gpaw, seed=seed).answer
    return [one for one in wrong if one != right and check(number, one, gpaw=gpaw, seed=seed)]


def faults_of_check(number: str, wrong: Sequence[Any], *, gpaw: int, seeds: int = 3) -> list[Any]:
    """Right answers that the check refuses, and wrong ones that it takes."""
    faults: list[Any] = []
    for seed in range(seeds):
        right = exercises.variant(number, gpaw=gpaw, seed=seed).answer
        if not check(number, right, gpaw=gpaw, seed=seed):
            faults.append(right)
        faults += accepted_wrongs(number, wrong, seed=seed, gpaw=gpaw)
    return faults


def advised(number: str, wrong: Sequence[Any], *, seeds: int = 3) -> Iterator[tuple[Any, str]]:
    """(right answer, what a wrong one is told) for some seeds."""
    for seed in range(seeds):
        right = exercises.variant(number, seed=seed).answer
        for one in wrong:
            if one != right:
                yield right, check(number, one, seed=seed).text


def bad_advice(number: str, wrong: Sequence[Any]) -> list[str]:
    """Advice that says next to nothing, or gives the answer away."""
    return [
        text
        for right, text in advised(number, wrong)
        if len(text) <= 40
        or (isinstance(right, int | str) and str(right) in text.removeprefix(number))
    ]


def different_questions(number: str, *, seeds: int = 8) -> int:
    """How many questions that many seeds give; of those made again each must be the same."""
    asked = [exercises.variant(number, seed=seed).question for seed in range(seeds)]
    exercises.made.cache_clear()
    again = [exercises.variant(number, seed=seed).question for seed in range(0, seeds, 3)]
    assert asked[::3] == again
    return len(set(asked))
