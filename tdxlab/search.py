"""How an exploration goes through all schedules: merging equal states, or each schedule by itself.

`Merging` looks into each state once, nearest to the beginning first. What a move does depends on
the machine and on where its actor stands, not on where the others stand. So it is made once for
each such pair, and looked up from then on: nearly all moves of an exploration are.

`Tree` merges nothing and looks nothing up: every schedule is played. It is there to be compared
with.

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
    Outcome,
    Situation,
    Standing,
    disturb,
    is_in_vain,
    stand,
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
        self._crew.close()
        self.states.journal.rewind(self.states.base)
        self._crew = Crew(self.actors, self.states, self._prints)
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

    def _deadlock(self, node: int, labels: Sequence[str], standings: Sequence[Standing]) -> None:
        """Nobody can move on from a node at which not all have ended."""
        waiting = [
            f"{actor.name} ({label})"
            for actor, label, standing in zip(self.actors, labels, standings, strict=True)
            if not standing.ended
        ]
        self.graph.faults[node] = Fault("deadlock", "for ever: " + ", ".join(waiting))


class Effect(NamedTuple):
    """What a move does to the machine: the numbers of the state, and of the lasting state, that it
    leads to, and the rest of its outcome.
    """

    state: int
    lasting: int
    outcome: Outcome


class Merging(Search):
    """Breadth first through all states. A key of one is the number of the machine's state, then
    those of where the actors stand, then a fault if the last move had one.
    """

    def __init__(self, actors: Sequence[Actor], states: States, limits: Limits) -> None:
        super().__init__(actors, states, limits)
        self._nodes: dict[tuple[Hashable, ...], int] = {}
        self._keys: list[tuple[int, ...]] = []
        #: node -> the one before it, and who moved there
        self._parents: list[tuple[int, int]] = []
        #: node that the crew stands at; it has just made a move to one that is not noted yet
        self._here, self._is_ahead = 0, False
        self._standings: list[Standing] = []
        self._numbers: dict[Standing, int] = {}
        self._moved: dict[tuple[int, int, int], tuple[Effect, int] | None] = {}
        self._effects: dict[tuple[int, int, int], Effect] = {}
        #: (actor, where) -> what it does next; state -> its differences, and its lasting part
        self._labels: dict[tuple[int, int], str] = {}
        self._differences: dict[int, frozenset[int]] = {}
        self._lasting: dict[int, int] = {}

    def run(self) -> None:
        situation = self._crew.beginning()
        state, _ = self._know(situation.differences)
        for number, standing in enumerate(situation.standings):
            self._labels[number, standing.where] = self._crew.labels[number]
        numbers = map(self._number, situation.standings)
        self._arrive((state, *numbers), None, (-1, -1))
        queue = self._keys
        for node, key in enumerate(queue):
            if node not in self.graph.faults and not self._look_into(node, key):
                return

    def _look_into(self, node: int, key: tuple[int, ...]) -> bool:
        """Make every move from a node; False if the budget is spent."""
        standings = [self._standings[number] for number in key[1:]]
        moved = False
        for number, standing in enumerate(standings):
            if standing.ended or standing.blocked:
                continue
            if self._spent():
                return False
            self.moves += 1
            known = (number, key[number + 1], key[0])
            if known not in self._moved:
                self._moved[known] = self._move(node, number, standing, key[0])
            led_to = self._moved[known]
            if led_to is None:
                self._note_here(node)
            else:
                moved = True
                self._follow(node, number, key, *led_to)
        if not moved and not all(standing.ended for standing in standings):
            labels = self._labels_at(standings)
            self._deadlock(node, labels, standings)
        return True

    def _follow(
        self, node: int, number: int, key: tuple[int, ...], effect: Effect, to: int
    ) -> None:
        """Note where a move leads; a state that is new is looked into later."""
        others = key[1:]
        if effect.outcome.lasting:
            others = tuple(map(self._disturbed, self.actors, others))
        child = (effect.state, *others[:number], to, *others[number + 1 :])
        fault = effect.outcome.fault
        known = self._nodes.get(child if fault is None else (*child, fault))
        if known is None:
            known = self._arrive(child, fault, (node, number))
        self._note_here(known)
        self.graph.connect(node, known, number, effect.outcome.label)

    def _note_here(self, node: int) -> None:
        """If the crew has just made the move that leads to `node`, it stands there."""
        if self._is_ahead:
            self._here, self._is_ahead = node, False

    def _disturbed(self, actor: Actor, number: int) -> int:
        return self._number(disturb(actor, self._standings[number]))

    def _arrive(self, key: tuple[int, ...], fault: Fault | None, parent: tuple[int, int]) -> int:
        """A new node."""
        node = self.graph.add()
        self._nodes[key if fault is None else (*key, fault)] = node
        self._keys.append(key)
        self._parents.append(parent)
        self._tell(node)
        self._note_here(node)
        ended = all(self._standings[number].ended for number in key[1:])
        if fault is None and (key[0], ended) not in self._checked:
            self._go_to(node)
        fault = fault or self._fault(key[0], ended)
        if fault is not None:
            self.graph.faults[node] = fault
        return node

    def _move(
        self, node: int, number: int, standing: Standing, state: int
    ) -> tuple[Effect, int] | None:
        """What a move leads to, and the number of where its actor stands then; None: it waits."""
        known = (number, standing.where, state)
        if known not in self._effects:
            self._effects[known] = self._make(node, number, state)
        effect = self._effects[known]
        done = effect.outcome
        if is_in_vain(standing, done, changed=effect.state != state):
            return None
        before, after = self._lasting[state], effect.lasting
        stands = stand(self.actors[number], standing, done, lambda: before, lambda: after)
        return effect, self._number(stands)

    def _make(self, node: int, number: int, state: int) -> Effect:
        """Make a move from a node."""
        self._go_to(node)
        done = self._crew.advance(number, self._differences_of(state))
        self._is_ahead = True
        state, lasting = self._know(done.after)
        if done.ended or done.fault is None:
            self._labels[number, done.where] = self._crew.labels[number]
        return Effect(state, lasting, done._replace(after={}))

    def _know(self, differences: Differences) -> tuple[int, int]:
        """Numbers of the state and of the lasting state with these differences."""
        state = self.states.state(differences)
        if state not in self._lasting:
            self._differences[state] = frozenset(differences.values())
            self._lasting[state] = self.states.lasting(differences)
        return state, self._lasting[state]

    def _differences_of(self, state: int) -> Differences:
        return self.states.differences(self._differences[state])

    def _number(self, standing: Standing) -> int:
        number = self._numbers.setdefault(standing, len(self._numbers))
        if number == len(self._standings):
            self._standings.append(standing)
        return number

    def _labels_at(self, standings: Sequence[Standing]) -> list[str]:
        """What each actor does next."""
        return [self._labels[number, s.where] for number, s in enumerate(standings)]

    def _go_to(self, node: int) -> None:
        """Bring crew and machine to a node."""
        if self._here == node:
            return
        path, at = [], node
        while at:
            at, number = self._parents[at]
            path.append(number)
        key = self._keys[node]
        standings = [self._standings[number] for number in key[1:]]
        labels = self._labels_at(standings)
        self._return(path[::-1], labels, self._differences_of(key[0]))
        self._here = node


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
