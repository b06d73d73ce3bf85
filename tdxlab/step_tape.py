"""A tape of operations cut into their steps: what `Tape` is for calls, this is for generators.

    tape = StepTape(machine)
    tape.perform("fault", lambda: td.fault_steps(gpa), lp=1)    # runs it to its end, records it
    tape.seek(3)                                                # ... stands behind its third step

A generator cannot go back. To stand in the middle of an operation, the tape rewinds the machine to
the operation's beginning, starts it again and lets it go as far as wanted: the state after k steps
is a function of the starting state, the operations and k. While the tape stands there, the
operation is half-done, with all that it has locked and frozen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

from tdxlab.bare import BareMachine
from tdxlab.steps import WAIT, Deadlock, Operation, Step
from tdxlab.tape import Action, Tape


class Performance(NamedTuple):
    """One operation on the tape. first: position at which it begins; start: makes it anew."""

    name: str
    lp: int
    first: int
    start: Callable[[], Operation]


class StepTape(Tape):
    """The operations performed on one machine since the tape was put in, step by step.

    A position counts steps: `next` was called that often in all. `actions[k]` is step k: its name
    is the step's label, its phase the operation's name; the last step of an operation is its
    return. `result` is what the latest operation returned when it was performed.
    """

    def __init__(self, machine: BareMachine) -> None:
        super().__init__(machine)
        self._operations: list[Performance] = []
        self._position = 0
        self._running: Operation | None = None
        self.result: Any = None

    @property
    def position(self) -> int:
        """How many steps have happened in the machine's present state."""
        return self._position

    @property
    def current(self) -> Performance | None:
        """The operation in whose middle the tape stands; None between two operations."""
        return self._operations[len(self._marks) - 1] if self._running is not None else None

    def perform(self, name: str, start: Callable[[], Operation], *, lp: int = 0) -> Any:
        """Run a new operation to its end and record it; returns what it returns.

        name: what it is, for people. start: makes the operation's generator, the same each time.
        What was recorded ahead of the present position is forgotten, and so is the rest of an
        operation in whose middle the tape stands: it is taken back to its beginning first.
        Raises what the operation raises, and Deadlock if it waits for another; nothing of it stays.
        """
        if self._running is not None:
            self.seek(self._operations[len(self._marks) - 1].first)
        self._forget_ahead()
        operation = Performance(name, lp, self._position, start)
        running = start()
        try:
            while True:
                step = next(running)
                if step[0] == WAIT:
                    running.close()
                    raise Deadlock(step)
                self._note(operation, _words(step))
        except StopIteration as end:
            self.result = end.value
            self._note(operation, f"returns {end.value!r}")
        except BaseException:
            self.machine.rewind(self._marks[-1])
            del self._actions[operation.first :]
            raise
        self._operations.append(operation)
        self._position = len(self._actions)
        self._marks.append(self.machine.mark())
        return self.result

    def seek(self, position: int) -> None:
        """Put the machine into the state after the first `position` steps.

        Refuses a position outside 0..len(tape): ValueError.
        """
        if not 0 <= position <= len(self._actions):
            raise ValueError(f"position {position}; this tape has 0..{len(self._actions)}")
        if position == self._position:
            return
        self._drop_running()
        number = bisect_right([operation.first for operation in self._operations], position) - 1
        if position == len(self._actions):
            number = len(self._operations)
        self._stand_before(number)
        self._position = position
        first = self._operations[number].first if number < len(self._operations) else position
        if position > first:
            self._running = self._operations[number].start()
            for _ in range(position - first):
                next(self._running)

    def _stand_before(self, number: int) -> None:
        """Rewind, or play on, to the beginning of operation `number`; none runs."""
        present = len(self._marks) - 1
        self.machine.rewind(self._marks[min(number, present)])
        del self._marks[min(number, present) + 1 :]
        for operation in self._operations[present:number]:
            for _ in operation.start():
                pass
            self._marks.append(self.machine.mark())

    def _drop_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
            self.machine.rewind(self._marks[-1])

    def _forget_ahead(self) -> None:
        del self._actions[self._position :]
        del self._operations[len(self._marks) - 1 :]

    def _note(self, operation: Performance, words: str) -> None:
        play = _played_as_a_whole
        self._actions.append(Action("step", operation.lp, words, operation.name, {}, play))


def _played_as_a_whole() -> None:
    raise AssertionError("a step is played by its operation, not alone")


def _words(step: Step) -> str:
    """A step's label and values for people: addresses and frame numbers in hexadecimal."""
    label, *values = step
    return " ".join([str(label), *(hex(v) if type(v) is int else str(v) for v in values)])
