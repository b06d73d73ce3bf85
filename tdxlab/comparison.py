"""Comparing what the real code answered with what the model answers, one value after the other.

A difference is (name, recorded, ours), all three as text for people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import status_name
from tdxlab.recorded import Step, number, require_register

Difference = tuple[str, str, str]
Answer = TypeVar("Answer")


class NoAnswer(Exception):
    """The model could not do what the trace has done: its state is another one, or it is broken."""


def ask(question: Callable[[], Answer]) -> Answer:
    """What the model says. However it fails, the replay goes on: a mismatch, not an end."""
    try:
        return question()
    except Exception as error:
        raise NoAnswer(f"no answer ({type(error).__name__}: {error})") from error


def _show(value: Any) -> str:
    return f"{value:#x}" if isinstance(value, int) else str(value)


def differ(name: str, recorded: Any, ours: Any) -> list[Difference]:
    """Nothing if both are equal; dicts are compared key by key."""
    if isinstance(recorded, dict) and isinstance(ours, dict):
        pairs = ((key, recorded.get(key), ours.get(key)) for key in sorted({*recorded, *ours}))
        return [row for key, left, right in pairs for row in differ(f"{name} {key}", left, right)]
    return [] if recorded == ours else [(name, _show(recorded), _show(ours))]


def compare(name: str, recorded: Any, question: Callable[[], Any]) -> list[Difference]:
    """Compare with what the model says to `question`, which it may fail to answer."""
    try:
        return differ(name, recorded, ask(question))
    except NoAnswer as failure:
        return [(name, _show(recorded), str(failure))]


def compare_lists(
    name: str, recorded: list[Step], question: Callable[[], list[Step]]
) -> list[Difference]:
    """The first place where two lists of rows differ."""
    try:
        ours = ask(question)
    except NoAnswer as failure:
        return [(name, f"{len(recorded)} rows", str(failure))]
    for place in range(max(len(recorded), len(ours))):
        left = recorded[place] if place < len(recorded) else "nothing"
        right = ours[place] if place < len(ours) else "nothing"
        if left != right:
            return [(f"{name}, row {place}", str(left), str(right))]
    return []


def _show_status(status: int) -> str:
    return "IN_GUEST" if status == IN_GUEST else f"{status:#018x} {status_name(status)}"


def compare_answer(recorded: str, out: Step, status: int, ours: Registers) -> list[Difference]:
    """Status and every recorded register."""
    expected = IN_GUEST if recorded == "IN_GUEST" else number(recorded)
    found: list[Difference] = []
    if expected != status:
        found.append(("status", _show_status(expected), _show_status(status)))
    for name, value in out.items():
        require_register(name)
        found += differ(name, number(value), getattr(ours, name))
    return found
