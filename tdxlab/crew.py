"""Actors in flight: the step generators of one schedule, and where each of them stands.

A move takes one actor from where it stands to its next yield. Three kinds of actor cannot move: one
that has ended; one that waits, as long as what it waits for has not happened; one that has to start
over (its result said so), as long as nothing lasting is different from when it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tdxlab.frames import Fingerprints
from tdxlab.states import Differences, States
from tdxlab.steps import WAIT, Operation, Step

#: What an actor did before its first yield.
START = "start"


def _any_result(_result: Any) -> bool:
    return True


def _never(_result: Any) -> bool:
    return False


def words(step: Step) -> str:
    """A step's label and its plain values for people: numbers in hexadecimal."""
    label, *values = step
    plain = [hex(v) if type(v) is int else str(v) for v in values if isinstance(v, int | str)]
    return " ".join([str(label), *plain])


def outcome(result: Any) -> str:
    """A result for people."""
    return "no result" if result is None else repr(result)


class Actor(NamedTuple):
    """One operation of a scenario. start: makes its generator anew, not started. allowed: says of
    its result whether the scenario expects it. again: says of its result whether it has to start
    over, as a fault has that returned RET_PF_RETRY. own: stores, or parts of stores, at which no
    other actor looks that has something of its own too: a vCPU's registers, for example. An actor
    without any may look at everything. tell: puts its result into words.
    """

    name: str
    start: Callable[[], Operation]
    allowed: Callable[[Any], bool] = _any_result
    again: Callable[[Any], bool] = _never
    own: tuple[object, ...] = ()
    tell: Callable[[Any], str] = outcome


class Standing(NamedTuple):
    """Where an actor stands. where: number of its fingerprint, or of its result. blocked: it has to
    start over, and nothing has changed. began, disturbed: of one that may have to: the lasting
    state when it began, and whether others have changed something since.
    """

    where: int
    ended: bool = False
    waiting: bool = False
    blocked: bool = False
    began: int = -1
    disturbed: bool = False


class Situation(NamedTuple):
    """The machine's differences from the base, and where all actors stand."""

    differences: Differences
    standings: tuple[Standing, ...]

    @property
    def ended(self) -> bool:
        """Every actor has ended."""
        return all(standing.ended for standing in self.standings)

    @property
    def candidates(self) -> list[int]:
        """Numbers of the actors that may be able to move; one that waits has to try."""
        return [
            number
            for number, standing in enumerate(self.standings)
            if not standing.ended and not standing.blocked
        ]


class Fault(NamedTuple):
    """Something that must not be. name: of the rule; explanation: how it was broken."""

    name: str
    explanation: str


class Outcome(NamedTuple):
    """What a move did, wherever the others stand. where: number of the new fingerprint, or of the
    result. ended: it came to its end; again: with a result that says that it has to start over.
    after: the machine's differences from the base. lasting: something that lasts has changed.
    """

    label: str
    where: int
    waiting: bool
    ended: bool
    again: bool
    after: Differences
    lasting: bool
    fault: Fault | None


class Moved(NamedTuple):
    """What a move led to. label: what was done, for people."""

    situation: Situation
    label: str
    fault: Fault | None


class Crew:
    """All actors of one schedule, none of which has started."""

    def __init__(self, actors: Sequence[Actor], states: States, prints: Fingerprints) -> None:
        self._actors = actors
        self._states = states
        self._prints = prints
        self._operations: list[Operation | None] = [None for _ in actors]
        self._steps: list[Step] = [(START,) for _ in actors]

    def beginning(self) -> Situation:
        """The situation before the first move."""
        return Situation({}, tuple(Standing(self._states.number(START)) for _ in self._actors))

    @property
    def labels(self) -> tuple[str, ...]:
        """What each actor will do next, for people."""
        return tuple(map(words, self._steps))

    def close(self) -> None:
        """Give up what is in flight; it lets go of its locks, so the machine changes."""
        for operation in self._operations:
            if operation is not None:
                operation.close()

    def repeat(self, number: int) -> None:
        """The same move as in an earlier crew, without looking at where it leads."""
        try:
            self._next(number)
        except StopIteration:
            self._operations[number], self._steps[number] = None, (START,)

    def _next(self, number: int) -> Step:
        operation = self._operations[number]
        if operation is None:
            operation = self._operations[number] = self._actors[number].start()
        step = next(operation)
        self._steps[number] = step
        return step

    def advance(self, number: int, before: Differences) -> Outcome:
        """Move one actor, whether it waits in vain or not. before: the machine's differences."""
        states, actor = self._states, self._actors[number]
        mark, label = states.journal.mark(), words(self._steps[number])
        waiting = ended = again = False
        fault = None
        try:
            step = self._next(number)
        except StopIteration as end:
            ended, again = True, actor.again(end.value)
            label = f"{label} -> {actor.tell(end.value)}"
            self._operations[number], self._steps[number] = None, (START,)
            where = states.number(START if again else self._prints.of(end.value))
            if not again and not actor.allowed(end.value):
                fault = Fault("result", f"{actor.name} ended with {actor.tell(end.value)}")
        except Exception as error:
            # Whatever an operation raises is a finding, shown with the schedule that led to it.
            label = f"{label} raises {type(error).__name__}"
            fault = Fault(type(error).__name__, f"{actor.name}: {error}")
            where = states.number(START)
        else:
            waiting = step[0] == WAIT
            where = states.number(self._prints.of(self._operations[number]))
        after, lasting = states.update(before, mark)
        states.journal.release(mark)
        return Outcome(label, where, waiting, ended, again, after, lasting, fault)

    def move(self, number: int, at: Situation) -> Moved | None:
        """Move one actor. None: it waits, in vain; then nothing has changed.

        at: the situation in which the machine and this crew are.
        """
        done, lasting = self.advance(number, at.differences), self._states.lasting
        standing = at.standings[number]
        if is_in_vain(standing, done, changed=done.after != at.differences):
            return None
        standing = stand(
            self._actors[number],
            standing,
            done,
            lambda: lasting(at.differences),
            lambda: lasting(done.after),
        )
        standings = list(at.standings)
        if done.lasting:
            standings = list(map(disturb, self._actors, at.standings))
        standings[number] = standing
        return Moved(Situation(done.after, tuple(standings)), done.label, done.fault)


def is_in_vain(standing: Standing, done: Outcome, *, changed: bool) -> bool:
    """True if an actor that waited just went on waiting. changed: the machine is another."""
    return done.waiting and standing.waiting and done.where == standing.where and not changed


def stand(
    actor: Actor,
    standing: Standing,
    done: Outcome,
    before: Callable[[], int],
    after: Callable[[], int],
) -> Standing:
    """Where an actor stands that stood at `standing` and did `done`. before, after: the lasting
    states before and after that move.
    """
    began, disturbed = standing.began, standing.disturbed
    if actor.again is not _never and began < 0:
        began, disturbed = before(), False
    if done.again:
        return Standing(done.where, blocked=not (disturbed or after() != began))
    if done.ended:
        return Standing(done.where, ended=True)
    return Standing(done.where, False, done.waiting, False, began, disturbed)


def disturb(actor: Actor, standing: Standing) -> Standing:
    """Where an actor stands after another has changed something that lasts."""
    if standing.ended or actor.again is _never:
        return standing
    if standing.began < 0:
        return standing._replace(blocked=False)
    # Where it began no longer matters: two actors that differ in nothing else stand alike.
    return standing._replace(blocked=False, began=0, disturbed=True)
