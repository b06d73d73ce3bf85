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

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tdxlab.crew import Actor, Crew, Fault, Moved, Situation
from tdxlab.frames import Fingerprints
from tdxlab.journal import Journal
from tdxlab.player import Check, Player, Schedule, nothing_to_check, schedule_table
from tdxlab.states import States

#: Moves, repeated ones too, after which an exploration gives up.
BUDGET = 20_000_000
#: The whole machine is compared at one in so many returns, what the actors do next at each.
_COMPARE_EVERY = 16
#: Progress is told once in so many states.
_TELL_EVERY = 256


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
    search = _Search(actors, states, check, hashing, budget, progress)
    try:
        search.run()
    finally:
        search.crew.close()
        states.close()
    return search.report()


class _Stop(NamedTuple):
    """A state on the present path. untried: actors that may have another move here."""

    node: int
    key: Hashable
    situation: Situation
    labels: tuple[str, ...]
    untried: list[int]


class _Search:
    """Depth first through all states."""

    def __init__(
        self,
        actors: Sequence[Actor],
        states: States,
        check: Check,
        hashing: bool,
        budget: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._actors, self._states, self._check = actors, states, check
        self._hashing, self._budget, self._progress = hashing, budget, progress
        self._prints = Fingerprints()
        self.crew = Crew(actors, states, self._prints)
        self._path: list[_Stop] = []
        #: the moves that lead along the path, and to where crew and machine are
        self._taken: list[int] = []
        self._nodes: dict[Hashable, int] = {}
        self._graph = _Graph()
        self._checked: dict[tuple[int, bool], Fault | None] = {}
        self._moves = self._returns = 0
        self._complete = True

    def run(self) -> None:
        """Look into everything."""
        self._enter(self.crew.beginning(), None)
        lost = False
        while self._path:
            stop = self._path[-1]
            if not stop.untried:
                self._leave(stop)
                lost = True
                continue
            if self._moves >= self._budget:
                self._complete = False
                return
            if lost:
                self._return(stop)
            moved = self._try(stop, stop.untried.pop(0))
            lost = moved is not None and not self._follow(stop, moved)

    def report(self) -> Exploration:
        """What was found."""
        graph = self._graph
        if self._complete:
            graph.find_livelocks()
        return Exploration(
            graph.schedules if self._complete else None,
            len(graph.edges),
            sum(map(len, graph.edges)),
            tuple(graph.violations(self._actors)),
            self._complete,
            self._moves,
        )

    def _try(self, stop: _Stop, number: int) -> Moved | None:
        self._moves += 1
        moved = self.crew.move(number, stop.situation)
        if moved is not None:
            self._taken.append(number)
        return moved

    def _follow(self, stop: _Stop, moved: Moved) -> bool:
        """Note where a move led; True if that is a new state, which is then on the path."""
        key = (self._states.state(moved.situation.differences), moved.situation.standings)
        known = self._nodes.get((key, moved.fault))
        if known is None:
            node, new = self._enter(moved.situation, moved.fault)
        else:
            node, new = known, False
        self._graph.edges[stop.node].append((self._taken[-1], node, moved.label))
        if not new:
            self._taken.pop()
        return new

    def _enter(self, situation: Situation, fault: Fault | None) -> tuple[int, bool]:
        """A new state; True if there is something to look into."""
        state = self._states.state(situation.differences)
        key = ((state, situation.standings), fault)
        node = self._graph.add()
        self._nodes[key] = node
        fault = fault or self._fault(state, situation.ended)
        if self._progress is not None and not node % _TELL_EVERY:
            self._progress(node, self._moves)
        if fault is not None:
            self._graph.faults[node] = fault
        if fault is not None or situation.ended:
            self._graph.paths[node] = 1
            self._drop(key)
            return node, False
        labels = self.crew.labels
        self._path.append(_Stop(node, key, situation, labels, situation.candidates))
        return node, True

    def _fault(self, state: int, ended: bool) -> Fault | None:
        if (state, ended) not in self._checked:
            self._checked[state, ended] = self._check(ended)
        return self._checked[state, ended]

    def _leave(self, stop: _Stop) -> None:
        """All moves from a state have been made."""
        self._path.pop()
        if self._taken:
            self._taken.pop()
        self._drop(stop.key)
        if not self._graph.edges[stop.node]:
            waiting = [
                f"{actor.name} ({label})"
                for actor, label, standing in zip(
                    self._actors, stop.labels, stop.situation.standings, strict=True
                )
                if not standing.ended
            ]
            self._graph.faults[stop.node] = Fault("deadlock", "for ever: " + ", ".join(waiting))
        self._graph.count(stop.node)

    def _drop(self, key: Hashable) -> None:
        """Without hashing only the states on the path are known, so that circles are seen."""
        if not self._hashing:
            del self._nodes[key]

    def _return(self, stop: _Stop) -> None:
        """Go back to the beginning, and repeat the moves that lead to the end of the path."""
        self.crew.close()
        self._states.journal.rewind(self._states.base)
        self.crew = Crew(self._actors, self._states, self._prints)
        for number in self._taken:
            self.crew.repeat(number)
        self._moves += len(self._taken)
        self._returns += 1
        same = self.crew.labels == stop.labels
        if same and not self._returns % _COMPARE_EVERY:
            differences, _ = self._states.update({}, self._states.base)
            same = differences == stop.situation.differences
        if not same:
            raise RuntimeError(
                "the same moves led to another state: an operation keeps something that the "
                "journal cannot take back"
            )


class _Graph:
    """All states and the moves between them.

    edges: of each node, (actor, node that it leads to, label) of every move from there.
    """

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int, str]]] = []
        self.faults: dict[int, Fault] = {}
        #: node -> schedules from there; only of nodes all of whose successors are known
        self.paths: dict[int, int] = {}
        self._circular = False

    def add(self) -> int:
        """A new node."""
        self.edges.append([])
        return len(self.edges) - 1

    def count(self, node: int) -> None:
        """Count the schedules from a node whose successors have been counted, but for circles."""
        successors = [child for _, child, _ in self.edges[node]]
        if any(child not in self.paths for child in successors):
            self._circular = True
        self.paths[node] = sum(self.paths.get(child, 0) for child in successors) or 1

    @property
    def schedules(self) -> int | None:
        """Schedules from the beginning; None if there are circles."""
        return None if self._circular else self.paths[0]

    def find_livelocks(self) -> None:
        """Note the states from which no end can be reached."""
        if not self._circular:
            return
        before: list[list[int]] = [[] for _ in self.edges]
        for node, edges in enumerate(self.edges):
            for _, child, _ in edges:
                before[child].append(node)
        ends = [node for node, edges in enumerate(self.edges) if not edges]
        good = set(ends)
        while ends:
            for node in before[ends.pop()]:
                if node not in good:
                    good.add(node)
                    ends.append(node)
        for node in range(len(self.edges)):
            if node not in good:
                self.faults[node] = Fault("livelock", "the actors go round in a circle for ever")

    def violations(self, actors: Sequence[Actor]) -> Iterator[Violation]:
        """Each rule that is broken, with the shortest schedule; the shortest one first."""
        came_from = self._shortest()
        found: dict[str, list[int]] = {}
        for node in came_from:
            if node in self.faults:
                found.setdefault(self.faults[node].name, []).append(node)
        for name, nodes in found.items():
            steps = []
            node = nodes[0]
            while (step := came_from[node]) is not None:
                node, number, label = step
                steps.append((actors[number].name, label))
            explanation = self.faults[nodes[0]].explanation
            yield Violation(name, explanation, tuple(reversed(steps)), len(nodes))

    def _shortest(self) -> dict[int, tuple[int, int, str] | None]:
        """Node -> (node before it, actor, label) on a shortest way from the beginning, in order of
        distance.
        """
        came_from: dict[int, tuple[int, int, str] | None] = {0: None}
        queue = deque([0])
        while queue:
            node = queue.popleft()
            for number, child, label in self.edges[node]:
                if child not in came_from:
                    came_from[child] = (node, number, label)
                    queue.append(child)
        return came_from


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
