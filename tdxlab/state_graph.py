"""The states that an exploration has found and the moves between them, as rows of small numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tdxlab.crew import Fault
from tdxlab.player import Schedule

#: (node before it, actor, number of the label) of a move.
Step = tuple[int, int, int]


class StateGraph:
    """States are numbered as they are found; 0 is the beginning.

    faults: node -> what is wrong there. Nobody moves on from such a state.
    """

    def __init__(self) -> None:
        self.nodes = 0
        self.faults: dict[int, Fault] = {}
        self._sources, self._targets = array("i"), array("i")
        self._movers, self._labels = array("b"), array("i")
        self._numbers: dict[str, int] = {}
        self._leaving: tuple[array[int], array[int]] | None = None

    @property
    def transitions(self) -> int:
        """Moves between states."""
        return len(self._targets)

    def add(self) -> int:
        """A new node."""
        self.nodes += 1
        return self.nodes - 1

    def connect(self, source: int, target: int, mover: int, label: str) -> None:
        """`mover` (number of an actor) does what `label` says, which leads from node to node."""
        self._sources.append(source)
        self._targets.append(target)
        self._movers.append(mover)
        self._labels.append(self._numbers.setdefault(label, len(self._numbers)))

    def _edges_by(self, ends: array[int]) -> tuple[array[int], array[int]]:
        """Edges sorted by node, and where those of each node begin: one number more than nodes."""
        first = array("i", bytes(4 * (self.nodes + 1)))
        for node in ends:
            first[node + 1] += 1
        for node in range(self.nodes):
            first[node + 1] += first[node]
        place, edges = first[:], array("i", bytes(4 * len(ends)))
        for edge, node in enumerate(ends):
            edges[place[node]] = edge
            place[node] += 1
        return edges, first

    def _from(self, node: int) -> Sequence[int]:
        """Numbers of the edges that leave a node."""
        if self._leaving is None:
            self._leaving = self._edges_by(self._sources)
        edges, first = self._leaving
        return edges[first[node] : first[node + 1]]

    def schedules(self) -> int | None:
        """Ways from the beginning to an end, None if there are circles: every node is asked only
        after all from which it can be reached.
        """
        awaited = array("i", bytes(4 * self.nodes))
        for target in self._targets:
            awaited[target] += 1
        ways, total, done, ready = [0] * self.nodes, 0, 0, [0]
        ways[0] = 1
        if awaited[0]:
            return None
        while ready:
            node = ready.pop()
            done += 1
            edges = self._from(node)
            if not edges:
                total += ways[node]
            for edge in edges:
                target = self._targets[edge]
                ways[target] += ways[node]
                awaited[target] -= 1
                if not awaited[target]:
                    ready.append(target)
        return total if done == self.nodes else None

    def find_livelocks(self) -> None:
        """Note the states from which no end can be reached."""
        edges, first = self._edges_by(self._targets)
        ends = [node for node in range(self.nodes) if not self._from(node)]
        good = bytearray(self.nodes)
        for node in ends:
            good[node] = 1
        while ends:
            node = ends.pop()
            for edge in edges[first[node] : first[node + 1]]:
                before = self._sources[edge]
                if not good[before]:
                    good[before] = 1
                    ends.append(before)
        for node in range(self.nodes):
            if not good[node]:
                self.faults[node] = Fault("livelock", "the actors go round in a circle for ever")

    def violations(self, names: Sequence[str]) -> Iterator[tuple[Fault, Schedule, int]]:
        """Each rule that is broken: how, by a shortest schedule, and in how many states. The one
        with the shortest schedule comes first. names: of the actors.
        """
        if not self.faults:
            return
        came_from = self._shortest()
        found: dict[str, list[int]] = {}
        for node in came_from:
            if node in self.faults:
                found.setdefault(self.faults[node].name, []).append(node)
        labels = list(self._numbers)
        for nodes in found.values():
            steps = []
            node = nodes[0]
            while (step := came_from[node]) is not None:
                node, mover, label = step
                steps.append((names[mover], labels[label]))
            yield self.faults[nodes[0]], tuple(reversed(steps)), len(nodes)

    def _shortest(self) -> dict[int, Step | None]:
        """Node -> the last move of a shortest way from the beginning, in order of distance."""
        came_from: dict[int, Step | None] = {0: None}
        queue = [0]
        for node in queue:
            for edge in self._from(node):
                target = self._targets[edge]
                if target not in came_from:
                    came_from[target] = (node, self._movers[edge], self._labels[edge])
                    queue.append(target)
        return came_from
