"""All schedules of a protocol: states as small numbers, every move worked out once.

found = explore(PROTOCOLS["same-page"](2), Rule.NO_FREEZE)
found.states, found.schedules, found.verdicts
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, NamedTuple, TypeVar

from tdxlab.study.protocol import (
    DEADLOCK,
    START,
    Protocol,
    Rule,
    Shared,
    Standing,
    can_move,
    disturb,
    move,
)

#: (vCPU, the step that it took) of each move.
Schedule = tuple[tuple[int, str], ...]
#: Number of what all see, then of where each vCPU stands.
State = tuple[int, ...]
#: State -> what a move of each vCPU leads to; the state itself for one that cannot move.
Edges = dict[State, list[State]]
#: The mirror, the Secure EPT, and the step that comes next of each vCPU.
Projected = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


class Verdict(NamedTuple):
    """Something that must not be. schedule: the shortest to it. states: in how many."""

    name: str
    schedule: Schedule
    states: int


class Explored(NamedTuple):
    """What was found. schedules: each to its end or to a verdict; None if they go round in circles.
    by_depth: states at each distance from the beginning.
    """

    schedules: int | None
    states: int
    transitions: int
    by_depth: tuple[int, ...]
    verdicts: tuple[Verdict, ...]


T = TypeVar("T", Shared, Standing)


class _Numbers(Generic[T]):
    """Values of one kind, each with a small number: numbers are cheap to keep and to compare."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def of(self, value: T) -> int:
        """The number of `value`, the same each time."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


#: After a move: numbers of what all see and of where the vCPU stands; whether others see a change.
_Found = tuple[int, int, bool]


class _Moves:
    """Every move, worked out once: it depends on what all see and on where one vCPU stands, not on
    where the others are.
    """

    def __init__(self, protocol: Protocol, rule: Rule) -> None:
        self._ways, self._rule = protocol.ways, rule
        self._shared: _Numbers[Shared] = _Numbers()
        self._standings: _Numbers[Standing] = _Numbers()
        self._known: dict[tuple[int, int, int], _Found | None] = {}
        self._disturbed: dict[int, int] = {}
        starts = [self._number(Standing(START)) for _ in protocol.ways]
        self.beginning: State = (self._shared.of(protocol.beginning()), *starts)

    def after(self, state: State) -> list[State]:
        """The states that a move leads to, the first vCPU's first; itself of one that cannot."""
        known, disturb_ = self._known, self._disturbed
        shared, places = state[0], state[1:]
        after = []
        for vcpu, place in enumerate(places):
            key = shared, vcpu, place
            found = known[key] if key in known else self._find(key)
            if found is None:
                after.append(state)
                continue
            now, there, changed = found
            others = [disturb_[n] for n in places] if changed else [*places]
            others[vcpu] = there
            after.append((now, *others))
        return after

    def _find(self, key: tuple[int, int, int]) -> _Found | None:
        shared, vcpu, place = key
        seen, here = self._shared.values[shared], self._standings.values[place]
        found = None
        if can_move(seen, here):
            now, there = move(self._ways[vcpu], self._rule, seen, here)
            found = self._shared.of(now), self._number(there), now != seen
        self._known[key] = found
        return found

    def _number(self, standing: Standing) -> int:
        """The number of a standing, whose disturbed form then has a number too."""
        number, other = self._standings.of(standing), self._standings.of(disturb(standing))
        self._disturbed[number] = self._disturbed[other] = other
        return number

    def project(self, state: State) -> Projected:
        """What a state looks like from outside."""
        shared = self._shared.values[state[0]]
        places = [self._standings.values[number].at for number in state[1:]]
        return shared.mirror, shared.external, tuple(places)

    def is_broken(self, state: State) -> bool:
        """KVM has found something wrong."""
        return bool(self._shared.values[state[0]].broken)

    def verdict(self, state: State) -> str:
        """What is wrong with a state in which nobody can move; "" if nothing."""
        has_ended = all(self._standings.values[number].ended for number in state[1:])
        return self._shared.values[state[0]].broken or ("" if has_ended else DEADLOCK)


# -- all schedules


def explore(protocol: Protocol, rule: Rule = Rule.ALL) -> Explored:
    """All schedules of `protocol` with `rule`; every state is looked into once, nearest first."""
    moves = _Moves(protocol, rule)
    edges, before, by_depth = _look_into(moves)
    verdicts = tuple(
        Verdict(name, _schedule(moves, edges, before, states[0]), len(states))
        for name, states in _verdicts(moves, edges).items()
    )
    return Explored(
        _count(edges, moves.beginning),
        len(edges),
        sum(child != state for state, after in edges.items() for child in after),
        by_depth,
        verdicts,
    )


def shortest(protocol: Protocol, rule: Rule, most: int = 100_000) -> Schedule:
    """A shortest schedule that goes wrong, () if none does. most: states to look into.

    Refuses where there are more: ValueError.
    """
    moves = _Moves(protocol, rule)
    edges: Edges = {}
    before: dict[State, State] = {}
    queue = deque([moves.beginning])
    while queue:
        state = queue.popleft()
        edges[state] = after = moves.after(state)
        if all(child == state for child in after) and moves.verdict(state):
            return _schedule(moves, edges, before, state)
        new = [child for child in after if child not in before and child != moves.beginning]
        before.update(dict.fromkeys(new, state))
        queue.extend(dict.fromkeys(new))
        if len(before) > most:
            raise ValueError(f"nothing goes wrong in {most} states; choose fewer vCPUs")
    return ()


def sound_states(protocol: Protocol, rule: Rule = Rule.ALL) -> frozenset[Projected]:
    """What the states look like from outside in which KVM has found nothing wrong."""
    moves = _Moves(protocol, rule)
    edges, _, _ = _look_into(moves)
    return frozenset(moves.project(state) for state in edges if not moves.is_broken(state))


def _look_into(moves: _Moves) -> tuple[Edges, dict[State, State], tuple[int, ...]]:
    """All states with the moves from there, in the order of their distance from the beginning; the
    state before each on a shortest way; the states at each distance.
    """
    edges: Edges = {}
    before: dict[State, State] = {}
    layer, by_depth = [moves.beginning], []
    while layer:
        by_depth.append(len(layer))
        further = []
        for state in layer:
            edges[state] = after = moves.after(state)
            for child in after:
                if child not in before and child not in edges:
                    before[child] = state
                    further.append(child)
        layer = further
    return edges, before, tuple(by_depth)


def _verdicts(moves: _Moves, edges: Edges) -> dict[str, list[State]]:
    """Verdict -> the states that have it, the nearest first."""
    found: dict[str, list[State]] = {}
    for state, after in edges.items():
        if all(child == state for child in after) and (verdict := moves.verdict(state)):
            found.setdefault(verdict, []).append(state)
    return found


def _schedule(moves: _Moves, edges: Edges, before: dict[State, State], end: State) -> Schedule:
    """The moves that lead to a state on a shortest way."""
    steps: list[tuple[int, str]] = []
    while end in before:
        start = before[end]
        vcpu = edges[start].index(end)
        steps.append((vcpu, moves.project(start)[2][vcpu]))
        end = start
    return tuple(reversed(steps))


def _count(edges: Edges, beginning: State) -> int | None:
    """Ways from the beginning to states without successors; None if there are circles."""
    ahead = Counter(child for state, after in edges.items() for child in after if child != state)
    ways: Counter[State] = Counter({beginning: 1})
    ready, ends, seen = [beginning], 0, 0
    while ready:
        state = ready.pop()
        seen += 1
        children = [child for child in edges[state] if child != state]
        ends += 0 if children else ways[state]
        for child in children:
            ways[child] += ways[state]
            ahead[child] -= 1
            if not ahead[child]:
                ready.append(child)
    return ends if seen == len(edges) else None
