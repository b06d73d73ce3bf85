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
from collections.abc import Generator, Sequence
from typing import Any

#: (label, local values...), all hashable. Example: ("TDH.MEM.PAGE.AUG", gpa, sept_level, hpa).
Step = tuple[Any, ...]
Operation = Generator[Step, None, Any]


def run(operation: Operation) -> Any:
    """Drive one operation to its end with nobody in between; returns what it returns."""
    try:
        while True:
            next(operation)
    except StopIteration as end:
        return end.value


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
        if number not in self.ready:
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


def round_robin(operations: Sequence[Operation]) -> Schedule:
    """Run all operations, one step each in turn, until all have ended."""
    schedule = Schedule(operations)
    while schedule.ready:
        for number in schedule.ready:
            schedule.advance(number)
    return schedule


def seeded(operations: Sequence[Operation], seed: int) -> Schedule:
    """Run all operations in an order drawn from `seed`: the same seed, the same order."""
    schedule = Schedule(operations)
    choose = random.Random(seed)
    while schedule.ready:
        schedule.advance(choose.choice(schedule.ready))
    return schedule
