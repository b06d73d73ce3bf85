"""All schedules of a few operations: every state that they can lead to, and what is wrong there.

    found = explore(actors, machine.journal, check)
    found.schedules, found.states, found.transitions
    print(found.violations[0].table())
    with replayed(actors, machine.journal, found.violations[0].schedule):
        ...                                        # the machine stands where the rule is broken

States are kept as values: what differs from the beginning, and where each actor stands. A state
that was seen before is not looked into again. Branching goes back to the beginning and repeats the
moves, for generators cannot be copied.

Differs: moves are atomic; what the hardware could reorder inside of one is not explored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tdxlab.crew import Actor, Fault
from tdxlab.journal import Journal
from tdxlab.merging import Merging
from tdxlab.player import Check, Player, Schedule, nothing_to_check, schedule_table
from tdxlab.search import Limits, Search, Tree
from tdxlab.states import States

#: Moves, repeated ones too, after which an exploration gives up.
BUDGET = 20_000_000


class Violation(NamedTuple):
    """A rule that some schedule breaks. invariant: its name, or "deadlock", "livelock", "result",
    or the name of an exception. schedule: the shortest one. states: in how many states.
    """

    invariant: str
    explanation: str
    schedule: Schedule
    states: int

    def table(self) -> str:
        """The schedule as a table: one column for each actor, one line for each move."""
        return f"{schedule_table(self.schedule)}\n{self.invariant}: {self.explanation}"


class Exploration(NamedTuple):
    """What was found. schedules: how many there are, each to its end or to a violation; None if
    they cannot be counted, because actors can go round in a circle, or because the exploration is
    not complete: its budget of moves ran out. transitions: moves between states. moves: made in
    all, repeated ones too.
    """

    schedules: int | None
    states: int
    transitions: int
    violations: tuple[Violation, ...]
    complete: bool
    moves: int


def explore(
    actors: Sequence[Actor],
    journal: Journal,
    check: Check = nothing_to_check,
    *,
    ignored: Iterable[object] = (),
    locks: Iterable[object] = (),
    hashing: bool = True,
    budget: int = BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """All schedules of `actors` from the machine's present state, in which it is again at the end.

    journal: the machine's. check: asked in every state. ignored: stores that only count what
    happens, and locks: see `States`. hashing: False looks into each state again each time it is
    reached. budget: moves that may be made. progress: told (states, moves) now and then.
    """
    states = States(journal, ignored, locks)
    limits = Limits(check, budget, progress)
    search = Merging(actors, states, limits) if hashing else Tree(actors, states, limits)
    try:
        search.run()
    finally:
        search.close()
        states.close()
    return _report(search)


def _report(search: Search) -> Exploration:
    """What was found."""
    graph, schedules = search.graph, None
    if search.complete:
        schedules = graph.schedules()
        if schedules is None:
            graph.find_livelocks()
    violations = graph.violations([actor.name for actor in search.actors])
    return Exploration(
        schedules,
        graph.nodes,
        graph.transitions,
        tuple(
            Violation(fault.name, fault.explanation, schedule, states)
            for fault, schedule, states in violations
        ),
        search.complete,
        search.moves,
    )


@contextmanager
def replayed(
    actors: Sequence[Actor], journal: Journal, schedule: Sequence[tuple[str, str]]
) -> Iterator[Fault | None]:
    """Make the moves of a violation's schedule; inside, the machine is where they lead. Gives what
    the last move itself broke, None if nothing. Afterwards the machine is as before.

    Refuses a schedule whose moves do not happen as it says: ValueError.
    """
    with Player(actors, journal) as player:
        player.follow(schedule)
        yield player.fault
