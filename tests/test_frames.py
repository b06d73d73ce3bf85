"""Fingerprints of step generators: equal where two go on alike, else different."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tdxlab.frames import Fingerprints
from tdxlab.journal import Journal, Words
from tdxlab.steps import Operation


class Box:
    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


def walk(things: Iterable[int]) -> Operation:
    for thing in things:
        yield ("thing",)
        del thing


def outer(start: Callable[[], Operation]) -> Operation:
    yield from start()


def keep(thing: Any) -> Operation:
    yield ("kept",)
    assert thing


def after(operation: Operation, steps: int) -> Operation:
    for _ in range(steps):
        next(operation)
    return operation


@pytest.mark.parametrize(
    "make",
    [
        lambda: walk([1, 2, 3]),
        lambda: walk(iter((1, 2, 3))),
        lambda: walk(range(3)),
        lambda: walk({1: 0, 2: 0, 3: 0}),
        lambda: walk(number for number in (1, 2, 3)),
        lambda: outer(lambda: walk([1, 2, 3])),
    ],
)
def test_of_tells_the_places_of_a_walk_apart_but_not_two_walks(
    make: Callable[[], Operation],
) -> None:
    prints = Fingerprints()
    first = [prints.of(after(make(), steps)) for steps in range(4)]
    assert first == [prints.of(after(make(), steps)) for steps in range(4)]
    assert len(set(first)) == 4


def test_of_looks_into_what_the_operation_made() -> None:
    prints = Fingerprints()
    same, other = (prints.of(after(keep(Box([n, {"a": n}])), 1)) for n in (1, 2))
    assert same == prints.of(after(keep(Box([1, {"a": 1}])), 1))
    assert same != other


def test_of_takes_what_was_there_before_by_identity() -> None:
    first, second = Box(1), Box(1)
    prints = Fingerprints()
    kept = prints.of(after(keep(first), 1))
    first.content = 2
    assert prints.of(after(keep(first), 1)) == kept
    assert prints.of(after(keep(second), 1)) != kept


def test_of_follows_a_box_that_holds_itself() -> None:
    prints = Fingerprints()

    def knot(content: int) -> Box:
        box = Box(content)
        box.content = [box, content]
        return box

    assert prints.of(after(keep(knot(1)), 1)) == prints.of(after(keep(knot(1)), 1))
    assert prints.of(after(keep(knot(1)), 1)) != prints.of(after(keep(knot(2)), 1))


def test_of_sees_the_same_frame_after_looking_twice() -> None:
    prints = Fingerprints()
    operation = after(walk([1, 2]), 1)
    assert prints.of(operation) == prints.of(operation)


def test_of_refuses_a_store_that_came_later() -> None:
    prints = Fingerprints()
    words = Words(Journal(), 1)
    with pytest.raises(ValueError, match="must exist before"):
        prints.of(after(keep(words), 1))


def test_of_refuses_an_object_that_shows_no_state() -> None:
    prints = Fingerprints()
    with pytest.raises(ValueError, match="shows no state"):
        prints.of(after(keep(memoryview(b"x")), 1))
