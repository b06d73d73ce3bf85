"""Operations that others can observe half-done are generators; this file drives them.

An operation yields exactly where the real code can be interleaved: between atomic operations,
around a SEAMCALL, while it waits for a lock or an IPI. What it yields is a `Step`: a label, then
every local value it still needs, so that (machine, positions, locals) can be hashed. What hardware
does atomically is never split.

A TDX module leaf yields once, with all its locks held and its checks passed, just before its
effects.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

#: (label, local values...), all hashable. Example: ("TDH.MEM.PAGE.AUG", gpa, sept_level, hpa).
Step = tuple[Any, ...]
Operation = Generator[Step, None, Any]


#: Label of a step that cannot go on until another operation has moved: ("wait", for what, ...).
WAIT = "wait"


class Deadlock(RuntimeError):
    """An operation waits, and nobody is there who could end the wait. `step`: what it waits for."""

    def __init__(self, step: Step) -> None:
        super().__init__(f"waits for ever: {step[1:]}")
        self.step = step


def run(operation: Operation) -> Any:
    """Drive one operation to its end with nobody in between; returns what it returns.

    Raises Deadlock if it waits for somebody else.
    """
    try:
        while True:
            step = operation.send(None)
            if step[0] == WAIT:
                operation.close()
                raise Deadlock(step)
    except StopIteration as end:
        return end.value


def finished(result: Any) -> Operation:
    """An operation with nothing left to do: it takes no step and returns `result`."""
    yield from ()
    return result


class Schedule:
    """Several operations in flight, and the order in which they moved.

    operations: generators that have not been started. `history` lists the number of the operation
    that moved at each step: feed it to `replay` to see the same interleaving again.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = list(operations)
        self.results: dict[int, Any] = {}
        self.labels: dict[int, Step] = {}
        self.history: list[int] = []

    @property
    def ready(self) -> list[int]:
        """Numbers of the operations that are not finished."""
        return [number for number in range(len(self._operations)) if number not in self.results]

    def advance(self, number: int) -> bool:
        """Let operation `number` go on to its next yield; False when that finished it.

        Refuses a number that is not in `ready`: ValueError.
        """
        if number in self.results or not 0 <= number < len(self._operations):
            raise ValueError(f"operation {number} cannot move; ready are {self.ready}")
        self.history.append(number)
        try:
            self.labels[number] = next(self._operations[number])
        except StopIteration as end:
            self.results[number] = end.value
            return False
        return True

    def replay(self, history: Sequence[int]) -> None:
        """Move the operations in the order of an earlier `history`."""
        for number in history:
            self.advance(number)

    def close(self) -> None:
        """Give up what is not finished. It lets go of its locks now, and not at some later time."""
        for operation in self._operations:
            operation.close()


def round_robin(operations: Sequence[Operation]) -> Schedule:
    """Run all operations, one step each in turn, until all have ended."""
    schedule = Schedule(operations)
    while ready := schedule.ready:
        for number in ready:
            schedule.advance(number)
    return schedule


def seeded(operations: Sequence[Operation], seed: int) -> Schedule:
    """Run all operations in an order drawn from `seed`: the same seed, the same order."""
    schedule = Schedule(operations)
    choose = random.Random(seed)
    while ready := schedule.ready:
        schedule.advance(choose.choice(ready))
    return schedule


class Rewindable(Protocol):
    """What `exhaustive` needs of a journal."""

    def mark(self) -> Any:
        """Note the present state."""

    def rewind(self, mark: Any) -> None:
        """Go back to it."""

    def forget(self, mark: Any) -> None:
        """Give the mark up."""


def exhaustive(
    make_operations: Callable[[], Sequence[Operation]], journal: Rewindable
) -> Iterator[Schedule]:
    """Every interleaving of a few operations: one finished schedule after the other.

    make_operations: makes the same operations anew each time, not started. journal: the machine's.
    While the caller looks at a schedule, the machine is in the state that it led to; before the
    next one, and at the end, it is back in the state before the first.

    An interleaving is a sequence of moves, each up to an operation's next yield. Generators cannot
    go back, so the schedules are found depth first by running each from its beginning: n operations
    of k moves have (nk)! / (k!)**n of them, and `history` tells them apart. Operations that run
    into each other's locks end early and have fewer.
    Differs: moves are atomic; what the hardware could reorder inside of one is not explored.
    """
    mark = journal.mark()
    prefix: list[int] | None = []
    try:
        while prefix is not None:
            schedule = Schedule(make_operations())
            try:
                untried = _finish(schedule, prefix)
                yield schedule
            finally:
                schedule.close()
                journal.rewind(mark)
            prefix = _next_prefix(schedule.history, untried)
    finally:
        journal.forget(mark)


def _finish(schedule: Schedule, prefix: Sequence[int]) -> list[list[int]]:
    """Move along `prefix`, then always the first operation that can; returns for each move the
    numbers greater than the one that moved, which could have moved too.
    """
    untried = []
    while schedule.ready:
        ready, done = schedule.ready, len(schedule.history)
        number = prefix[done] if done < len(prefix) else ready[0]
        untried.append([other for other in ready if other > number])
        schedule.advance(number)
    return untried


def _next_prefix(history: Sequence[int], untried: Sequence[Sequence[int]]) -> list[int] | None:
    """The moves up to the last one for which there was another choice, with that choice; None at
    the end.
    """
    for place in reversed(range(len(history))):
        if untried[place]:
            return [*history[:place], untried[place][0]]
    return None
