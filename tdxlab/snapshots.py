"""States of a machine kept by name: marks of a journal, and the ways between them."""

from __future__ import annotations

from collections.abc import Hashable

from tdxlab.journal import Change, Journal, Mark


class Snapshots:
    """States of a machine kept by name, to be restored in any order; marks alone go back only."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._marks: dict[Hashable, Mark] = {}
        #: name -> (mark of an earlier state, the way from there): states that a rewind went behind
        self._ways: dict[Hashable, tuple[Mark, list[Change]]] = {}

    def keep(self, name: Hashable) -> None:
        """Keep the present state as `name`; an older state of that name is forgotten."""
        self._ways.pop(name, None)
        old = self._marks.pop(name, None)
        self._marks[name] = self._journal.mark()
        if old is not None and any(start is old for start, _ in self._ways.values()):
            self._marks[object()] = old
        elif old is not None:
            self._journal.release(old)

    def restore(self, name: Hashable) -> None:
        """Bring back the state kept as `name`. Refuses a name that was never kept: KeyError."""
        if name not in self._ways:
            self._go_back(self._marks[name])
            return
        start, way = self._ways.pop(name)
        self._go_back(start)
        self._journal.replay(way)
        self._marks[name] = self._journal.mark()

    def _go_back(self, mark: Mark) -> None:
        """Rewind; of each state that this goes behind, latest first, keep the way back to it."""
        names = {id(held): name for name, held in self._marks.items()}
        for later in reversed(self._journal.after(mark)):
            self._journal.rewind(later)
            way = self._journal.changes_since(mark)
            for other, (start, rest) in self._ways.items():
                if start is later:
                    self._ways[other] = (mark, way + rest)
            name = names[id(later)]
            del self._marks[name]
            self._ways[name] = (mark, way)
        self._journal.rewind(mark)
