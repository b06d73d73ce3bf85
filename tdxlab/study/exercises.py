"""Exercises with checks that teach: what is wrong with an answer, and how to find out.

    check("02.3", answer)                    # right, wrong with a hint, or not answered yet
    exercise("02.4", seed=7)                 # another variant of the same exercise
    check("02.4", answer, seed=7)
    exercise("02.4", seed=7, show_answer=True)

The exercises of notebook NN stand in `tdxlab/study/exercises_NN.py`, which holds one table:

    EXERCISES = (
        Exercise("02.1", make_first),
        Exercise("02.2", make_second),
    )

`make(gpaw, seed)` returns a `Variant`: the question as the reader sees it, the right answer
computed from the model, and `hint(answer)`, which says what is wrong with a wrong answer and how to
find out, without giving the right one away. The same `gpaw` and `seed` give the same variant; draw
with `random.Random(seed)`. An exercise without variants ignores the seed.

Right answers are ints, strings (capitals and spaces around do not count), booleans, tuples or sets.
A list may stand for a tuple. A `Variant` with `accepts` judges answers itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tdxlab.arch import shared_bit


@dataclass(frozen=True)
class Variant:
    """One exercise to be answered. answer: the right one. hint: wrong answer -> advice.
    accepts: answer -> whether it is right, where equality with `answer` is too narrow.
    """

    question: str
    answer: Any
    hint: Callable[[Any], str]
    accepts: Callable[[Any], bool] | None = None


class Exercise(NamedTuple):
    """An exercise by its number, such as "02.3". make: (gpaw, seed) -> variant."""

    number: str
    make: Callable[[int, int], Variant]


class Verdict(NamedTuple):
    """What `check` says. state: "right", "wrong" or "unanswered"."""

    state: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return self.state == "right"


class Question:
    """An exercise as a cell shows it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def table(notebook: str) -> dict[str, Exercise]:
    """Number -> exercise of a notebook ("00", "02", ...).

    Refuses a notebook without exercises: ValueError.
    """
    name = f"tdxlab.study.exercises_{notebook}"
    if not notebook.isdecimal() or importlib.util.find_spec(name) is None:
        raise ValueError(f'notebook "{notebook}" has no exercises; write numbers like "00.1"')
    module = importlib.import_module(name)
    return {entry.number: entry for entry in module.EXERCISES}


def find(number: str) -> Exercise:
    """The exercise with a number such as "00.1". Refuses an unknown one: ValueError."""
    exercises = table(str(number).partition(".")[0])
    if number not in exercises:
        raise ValueError(f'there is no exercise "{number}"; choose from {", ".join(exercises)}')
    return exercises[number]


def variant(number: str, *, gpaw: int = 48, seed: int = 0) -> Variant:
    """One variant of an exercise, made once and kept: many a one has to run a machine first.

    Refuses an unknown number and a wrong GPAW: ValueError.
    """
    shared_bit(gpaw)
    return made(number, gpaw, seed)


@lru_cache(maxsize=64)
def made(number: str, gpaw: int, seed: int) -> Variant:
    """As `variant`; `made.cache_clear()` forgets what was made of a model that has changed since.

    Refuses an unknown number: ValueError.
    """
    return find(number).make(gpaw, seed)


def exercise(number: str, *, seed: int = 0, gpaw: int = 48, show_answer: bool = False) -> Question:
    """The question of one variant; with `show_answer` the right answer too.

    seed: any int; each gives a variant of its own. gpaw: 48 or 52.
    """
    asked = variant(number, gpaw=gpaw, seed=seed)
    answer = f"\nAnswer: {_written(asked.answer)}" if show_answer else ""
    return Question(f"{number} (seed {seed}). {asked.question}{answer}")


def check(number: str, answer: Any = None, *, seed: int = 0, gpaw: int = 48) -> Verdict:
    """Judge an answer. None and ... are no answer yet; a wrong one is told how to find out.

    seed, gpaw: those of the variant that was asked.
    """
    asked = variant(number, gpaw=gpaw, seed=seed)
    if answer is None or answer is ...:
        return Verdict("unanswered", f"{number}: not answered yet.")
    if is_right(asked, answer):
        return Verdict("right", f"{number}: right, {_written(asked.answer)}.")
    return Verdict("wrong", f"{number}: not yet. {_advice(asked, answer)}")


def is_right(asked: Variant, answer: Any) -> bool:
    """True if `answer` answers the variant."""
    if asked.accepts is not None:
        return bool(asked.accepts(answer))
    return _kind(answer) == _kind(asked.answer) and _plain(answer) == _plain(asked.answer)


def _advice(asked: Variant, answer: Any) -> str:
    if asked.accepts is None:
        if _kind(answer) != _kind(asked.answer):
            return f"{answer!r} is not {_kind(asked.answer)}, and that is what is asked for."
        if isinstance(answer, list | tuple) and any(isinstance(one, list | dict) for one in answer):
            return f"{answer!r} has lists in it, and plain values are asked for."
    return asked.hint(answer)


def _kind(answer: Any) -> str:
    """What sort of answer it is; lists and tuples are one sort, bool is no int."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "True or False"),
        (int, "a whole number"),
        (str, "a text"),
        ((set, frozenset), "a set in braces"),
        ((list, tuple), "a tuple or a list"),
    )
    return next((name for kind, name in kinds if isinstance(answer, kind)), type(answer).__name__)


def _plain(answer: Any) -> Any:
    """An answer in the form in which answers are compared."""
    if isinstance(answer, str):
        return answer.strip().casefold()
    if isinstance(answer, set | frozenset):
        return frozenset(map(_plain, answer))
    if isinstance(answer, list | tuple):
        return tuple(map(_plain, answer))
    return answer


def _written(answer: Any) -> str:
    """An answer as people write it."""
    if isinstance(answer, set | frozenset):
        return "{" + ", ".join(sorted(map(str, answer))) + "}"
    if isinstance(answer, list | tuple):
        return ", ".join(map(str, answer))
    return str(answer)
