"""How an exploration goes through schedules: what its two ways share, and the plain one.

`Tree` merges no states and looks no moves up: every schedule is played. It is there to be compared
with `merging.Merging`, which is what explores.

Both go back to the beginning and repeat the moves to come to a state: generators cannot be copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from tdxlab.crew import (
    Actor,
    Crew,
    Fault,
    Moved,
    Situation,
    Standing,
)
from tdxlab.frames import Fingerprints
from tdxlab.player import Check
from tdxlab.state_graph import StateGraph
from tdxlab.states import Differences, States

#: The whole machine is compared at one in so many returns, what the actors do next at each.
_COMPARE_EVERY = 16
#: Progress is told once in so many states.
_TELL_EVERY = 256

Progress = Callable[[int, int], None]


class Limits(NamedTuple):
    """check: asked in every state. budget: moves, repeated ones too, after which to give up.
    progress: told (states, moves) now and then.
    """

    check: Check
    budget: int
    progress: Progress | None


class Search(ABC):
    """What both ways share: the graph, a crew to make moves with, and the way back to a state.

    complete: everything was looked into. moves: made in all, repeated ones too.
    """

    def __init__(self, actors: Sequence[Actor], states: States, limits: Limits) -> None:
        self.actors, self.states, self._limits = tuple(actors), states, limits
        self.graph = StateGraph()
        self.moves, self.complete = 0, True
        self._prints = Fingerprints()
        self._crew = Crew(self.actors, states, self._prints)
        self._checked: dict[tuple[int, bool], Fault | None] = {}
        self._returns = 0

    @abstractmethod
    def run(self) -> None:
        """Look into everything."""

    def close(self) -> None:
        """Give up what is in flight."""
        self._crew.close()

    def _spent(self) -> bool:
        """True if the budget is; then the search is not complete."""
        if self.moves >= self._limits.budget:
            self.complete = False
        return not self.complete

    def _fault(self, state: int, ended: bool) -> Fault | None:
        """What is wrong with the machine, which is in the state of that number."""
        if (state, ended) not in self._checked:
            self._checked[state, ended] = self._limits.check(ended)
        return self._checked[state, ended]

    def _tell(self, node: int) -> None:
        if self._limits.progress is not None and not node % _TELL_EVERY:
            self._limits.progress(node, self.moves)

    def _return(self, path: Sequence[int], labels: Sequence[str], differences: Differences) -> None:
        """Go back to the beginning and make the moves of `path`: numbers of actors.

        labels: what everybody does next then. Refuses to go on if it is something else, or if, now
        and then, the machine's differences are: RuntimeError.
        """
        self._dismiss()
        self.states.journal.rewind(self.states.base)
        for number in path:
            self._crew.repeat(number)
        self.moves += len(path)
        self._returns += 1
        same = all(is_ == was for is_, was in zip(self._crew.labels, labels, strict=True))
        if same and not self._returns % _COMPARE_EVERY:
            same = self.states.update({}, self.states.base)[0] == differences
        if not same:
            raise RuntimeError(
                "the same moves led to another state: an operation keeps something that the "
                "journal cannot take back"
            )

    def _dismiss(self) -> None:
        """Give up what is in flight, while the machine is where that has led; a new crew waits."""
        self._crew.close()
        self._crew = Crew(self.actors, self.states, self._prints)

    def _deadlock(self, node: int, labels: Sequence[str], standings: Sequence[Standing]) -> None:
        """Nobody can move on from a node at which not all have ended."""
        waiting = [
            f"{actor.name} ({label})"
            for actor, label, standing in zip(self.actors, labels, standings, strict=True)
            if not standing.ended
        ]
        self.graph.faults[node] = Fault("deadlock", "for ever: " + ", ".join(waiting))


class _Stop(NamedTuple):
    """A state on the present path. untried: actors that may have another move here."""

    node: int
    key: Hashable
    situation: Situation
    labels: tuple[str, ...]
    untried: list[int]


class Tree(Search):
    """Depth first along every schedule. Only the states on the present path are known, so that
    circles are seen.
    """

    def __init__(self, actors: Sequence[Actor], states: States, limits: Limits) -> None:
        super().__init__(actors, states, limits)
        self._path: list[_Stop] = []
        #: the moves that lead along the path, and to where crew and machine are
        self._taken: list[int] = []
        self._nodes: dict[Hashable, int] = {}
        #: nodes from which somebody has moved
        self._left: set[int] = set()

    def run(self) -> None:
        self._enter(self._crew.beginning(), None)
        lost = False
        while self._path:
            stop = self._path[-1]
            if not stop.untried:
                self._leave(stop)
                lost = True
                continue
            if self._spent():
                return
            if lost:
                self._return(self._taken, stop.labels, stop.situation.differences)
            moved = self._try(stop, stop.untried.pop(0))
            lost = moved is not None and not self._follow(stop, moved)

    def _try(self, stop: _Stop, number: int) -> Moved | None:
        self.moves += 1
        moved = self._crew.move(number, stop.situation)
        if moved is not None:
            self._taken.append(number)
        return moved

    def _follow(self, stop: _Stop, moved: Moved) -> bool:
        """Note where a move led; True if that state is now the end of the path."""
        known = self._nodes.get(self._key(moved.situation, moved.fault))
        if known is None:
            node, is_end = self._enter(moved.situation, moved.fault)
        else:
            node, is_end = known, False
        self.graph.connect(stop.node, node, self._taken[-1], moved.label)
        self._left.add(stop.node)
        if not is_end:
            self._taken.pop()
        return is_end

    def _key(self, situation: Situation, fault: Fault | None) -> Hashable:
        return (self.states.state(situation.differences), situation.standings, fault)

    def _enter(self, situation: Situation, fault: Fault | None) -> tuple[int, bool]:
        """Another node; True if there is something to look into."""
        node = self.graph.add()
        state = self.states.state(situation.differences)
        fault = fault or self._fault(state, situation.ended)
        self._tell(node)
        if fault is not None:
            self.graph.faults[node] = fault
        if fault is not None or situation.ended:
            return node, False
        key = self._key(situation, None)
        self._nodes[key] = node
        stop = _Stop(node, key, situation, self._crew.labels, situation.candidates)
        self._path.append(stop)
        return node, True

    def _leave(self, stop: _Stop) -> None:
        """All moves from a state have been made."""
        self._path.pop()
        if self._taken:
            self._taken.pop()
        del self._nodes[stop.key]
        if stop.node not in self._left:
            self._deadlock(stop.node, stop.labels, stop.situation.standings)
