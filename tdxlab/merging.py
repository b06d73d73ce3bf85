"""All schedules of an exploration, equal states merged.

Each state is looked into once, nearest to the beginning first. What a move does depends on the
machine and on where its actor stands, not on where the others stand. So it is made once for each
such pair, and looked up from then on: nearly all moves of an exploration are.

The graph is whole: states, moves and schedules are counted as they are. vCPUs are not taken for
each other, though they may do the same: KVM goes through them in order, and each has pages of its
own in its caches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from tdxlab.crew import (
    Actor,
    Fault,
    Outcome,
    Standing,
    disturb,
    is_in_vain,
    stand,
)
from tdxlab.search import Limits, Search
from tdxlab.states import Places, States

#: Of the moves that are looked up although the machine is another, one in so many is made too.
_MAKE_EVERY = 64


class Effect(NamedTuple):
    """What a move does, whatever the machine holds at places that it does not look at. gone, come:
    numbers of the values that it takes out of the machine's differences, and puts there.
    """

    outcome: Outcome
    gone: frozenset[int]
    come: frozenset[int]


#: Number of the machine's state after a move, what the move was, where its actor stands then.
Led = tuple[int, Outcome, int]


class Merging(Search):
    """Breadth first through all states. A key of one is the number of the machine's state, then
    those of where the actors stand, then a fault if the last move had one.

    An actor with something of its own does not see what others have for their own. One in so many
    of the moves that are looked up for that reason is made all the same, and compared.
    """

    def __init__(self, actors: Sequence[Actor], states: States, limits: Limits) -> None:
        super().__init__(actors, states, limits)
        self._machine = _MachineStates(actors, states)
        self._nodes: dict[tuple[Hashable, ...], int] = {}
        self._keys: list[tuple[int, ...]] = []
        #: node -> the one before it, and who moved there
        self._parents: list[tuple[int, int]] = []
        #: node that crew and machine stand at, and state that the machine is in; -1 if unknown
        self._here = self._state_here = -1
        self._standings: list[Standing] = []
        self._numbers: dict[Standing, int] = {}
        self._led: dict[tuple[int, int, int], Led | None] = {}
        self._effects: dict[tuple[int, int, int], Effect] = {}
        self._lookups = 0
        #: (actor, where) -> what it does next
        self._labels: dict[tuple[int, int], str] = {}

    def run(self) -> None:
        standings = self._crew.beginning().standings
        for number, standing in enumerate(standings):
            self._labels[number, standing.where] = self._crew.labels[number]
        numbers = map(self._number, standings)
        self._arrive((self._machine.know(frozenset()), *numbers), None, (-1, -1))
        for node, key in enumerate(self._keys):
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
            if known not in self._led:
                self._led[known] = self._lead(node, number, standing, key[0])
            led = self._led[known]
            if led is not None:
                moved = True
                self._follow(node, number, key, led)
        if not moved and not all(standing.ended for standing in standings):
            self._deadlock(node, self._labels_at(standings), standings)
        return True

    def _follow(self, node: int, number: int, key: tuple[int, ...], led: Led) -> None:
        """Note where a move leads; a state that is new is looked into later."""
        state, outcome, to = led
        others = key[1:]
        if outcome.lasting:
            others = tuple(map(self._disturbed, self.actors, others))
        child = (state, *others[:number], to, *others[number + 1 :])
        known = self._nodes.get(child if outcome.fault is None else (*child, outcome.fault))
        if known is None:
            known = self._arrive(child, outcome.fault, (node, number))
        self.graph.connect(node, known, number, outcome.label)

    def _disturbed(self, actor: Actor, number: int) -> int:
        return self._number(disturb(actor, self._standings[number]))

    def _arrive(self, key: tuple[int, ...], fault: Fault | None, parent: tuple[int, int]) -> int:
        """A new node."""
        node, state = self.graph.add(), key[0]
        self._nodes[key if fault is None else (*key, fault)] = node
        self._keys.append(key)
        self._parents.append(parent)
        self._tell(node)
        ended = all(self._standings[number].ended for number in key[1:])
        if fault is None and (state, ended) not in self._checked and self._state_here != state:
            self._dismiss()
            self.states.go_to(self._machine.values(state))
            self._here, self._state_here = -1, state
        fault = fault or self._fault(state, ended)
        if fault is not None:
            self.graph.faults[node] = fault
        return node

    def _lead(self, node: int, number: int, standing: Standing, state: int) -> Led | None:
        """What a move leads to; None: it waits, in vain."""
        machine = self._machine
        effect = self._look_up(node, number, standing.where, state)
        done = effect.outcome
        after = machine.know(machine.values(state) - effect.gone | effect.come)
        if is_in_vain(standing, done, changed=after != state):
            return None
        lasting = machine.lasting
        stands = stand(
            self.actors[number], standing, done, lambda: lasting(state), lambda: lasting(after)
        )
        return after, done, self._number(stands)

    def _look_up(self, node: int, number: int, where: int, state: int) -> Effect:
        """What a move from a node does, made or looked up. One that changes what others have for
        their own, such as a request to a vCPU, is good for this state only.
        """
        machine = self._machine
        seen, exactly = (number, where, machine.seen(number, state)), (number, where, ~state)
        effect = self._effects.get(seen) or self._effects.get(exactly)
        if effect is None:
            effect = self._make(node, number, state)
            values = effect.gone | effect.come
            is_own = all(machine.sees(number, value) for value in values)
            self._effects[seen if is_own else exactly] = effect
        elif self.actors[number].own:
            self._lookups += 1
            if not self._lookups % _MAKE_EVERY and self._make(node, number, state) != effect:
                raise RuntimeError(
                    f"{self.actors[number].name} did something else where only what others have "
                    "for their own was different"
                )
        return effect

    def _make(self, node: int, number: int, state: int) -> Effect:
        """Make a move from a node."""
        self._go_to(node)
        before = self._machine.values(state)
        done = self._crew.advance(number, self.states.differences(before))
        if done.ended or done.fault is None:
            self._labels[number, done.where] = self._crew.labels[number]
        after = frozenset(done.after.values())
        self._here, self._state_here = -1, self._machine.know(after)
        return Effect(done._replace(after={}), before - after, after - before)

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
        labels = self._labels_at([self._standings[number] for number in key[1:]])
        differences = self.states.differences(self._machine.values(key[0]))
        self._return(path[::-1], labels, differences)
        self._here, self._state_here = node, key[0]


class _MachineStates:
    """The machine's states by number, and what each actor sees of them."""

    def __init__(self, actors: Sequence[Actor], states: States) -> None:
        self._states = states
        self._owns = [Places(actor.own) if actor.own else None for actor in actors]
        self._numbers: dict[frozenset[int], int] = {}
        self._values: list[frozenset[int]] = []
        self._lasting: dict[int, int] = {}
        self._seen: dict[tuple[int, int], int] = {}
        #: (actor, value) -> whether the actor may look at it
        self._visible: dict[tuple[int, int], bool] = {}

    def know(self, values: frozenset[int]) -> int:
        """The number of the state whose differences have these values."""
        number = self._numbers.setdefault(values, len(self._numbers))
        if number == len(self._values):
            self._values.append(values)
        return number

    def values(self, state: int) -> frozenset[int]:
        """The values of the differences of a state."""
        return self._values[state]

    def lasting(self, state: int) -> int:
        """The number of a state, whoever holds which lock."""
        if state not in self._lasting:
            lasting = filter(self._states.lasts, self._values[state])
            self._lasting[state] = self._states.number(frozenset(lasting))
        return self._lasting[state]

    def seen(self, actor: int, state: int) -> int:
        """A number for what an actor sees of a state: all but what others have for their own."""
        if self._owns[actor] is None:
            return state
        if (actor, state) not in self._seen:
            seen = frozenset(v for v in self._values[state] if self.sees(actor, v))
            self._seen[actor, state] = self.know(seen)
        return self._seen[actor, state]

    def sees(self, actor: int, value: int) -> bool:
        """False for a value at a place that others have for their own."""
        if self._owns[actor] is None:
            return True
        if (actor, value) not in self._visible:
            place = self._states.place(value)
            self._visible[actor, value] = not any(
                own is not None and number != actor and place in own
                for number, own in enumerate(self._owns)
            )
        return self._visible[actor, value]
