"""The undo log itself: marks, rewinds, and what plays changes forwards again.

All that it knows of a store: it can be told where to record its changes, and shows what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

#: What the log notes of a key that was not there.
ABSENT = object()

#: (container, key or slice, value): one entry of the log, or of what plays it forwards.
Change = tuple[Any, Any, Any]


class Store(Protocol):
    """Something that a journal can take back."""

    def switch(self, log: list[Change] | None) -> None:
        """Record every change in `log`, or in nothing."""

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see."""


class Mark:
    """A point of time to which a journal can rewind."""

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position


class Journal:
    """One undo log for one machine; stores register themselves when they are made."""

    def __init__(self) -> None:
        self._log: list[Change] = []
        self._marks: list[Mark] = []
        #: number -> store, in the order in which they came; a rewind forgets those that came later
        self._stores: dict[int, Store] = {}

    @property
    def recording(self) -> bool:
        """True while somebody holds a mark."""
        return bool(self._marks)

    def __len__(self) -> int:
        """Changes that a rewind to the oldest mark would take back."""
        return len(self._log)

    def attach(self, store: Store) -> None:
        """Put `store` under this journal."""
        number = len(self._stores)
        if self._marks:
            self._log.append((self._stores, number, ABSENT))
        self._stores[number] = store
        store.switch(self._log if self._marks else None)

    def mark(self) -> Mark:
        """Note the present state; from now on every change is recorded."""
        if not self._marks:
            self._switch(self._log)
        mark = Mark(len(self._log))
        self._marks.append(mark)
        return mark

    def rewind(self, mark: Mark) -> None:
        """Take back every change made since `mark`. Later marks die, this one stays.

        Refuses a mark that was released, or that died in an earlier rewind: ValueError.
        """
        place = self._place(mark)
        log = self._log
        while len(log) > mark.position:
            target, key, old = log.pop()
            if old is ABSENT:
                del target[key]
            else:
                target[key] = old
        del self._marks[place + 1 :]

    def release(self, mark: Mark) -> None:
        """Give `mark` up, keeping all changes; without marks the journal stops recording."""
        del self._marks[self._place(mark)]
        if not self._marks:
            self._log.clear()
            self._switch(None)

    def after(self, mark: Mark) -> list[Mark]:
        """The held marks that a rewind to `mark` would kill, oldest first."""
        return self._marks[self._place(mark) + 1 :]

    def changes_since(self, mark: Mark) -> list[Change]:
        """What `replay` needs to come from the state at `mark` to the present one."""
        return [(target, key, _now(target, key)) for target, key, _ in self._log[mark.position :]]

    def undone_by(self, mark: Mark) -> list[Change]:
        """What a rewind to `mark` would put back, the oldest change first: its last entry is the
        one that it would take back first.
        """
        return self._log[mark.position :]

    def replay(self, changes: list[Change]) -> None:
        """Make the changes that `changes_since` gave, from the state at its mark."""
        for target, key, value in changes:
            old = _now(target, key)
            if old is value is ABSENT:
                continue
            if self._marks:
                self._log.append((target, key, old))
            if value is ABSENT:
                del target[key]
            else:
                target[key] = value
            if target is self._stores and value is not ABSENT:
                value.switch(self._log if self._marks else None)

    def forget(self, mark: Mark) -> None:
        """As `release`, for a mark that may have died in a rewind already."""
        if any(held is mark for held in self._marks):
            self.release(mark)

    def digest(self, without: Store | None = None) -> str:
        """SHA-256 over the content of every store: equal digests, equal machines.

        without: a store that does not count.
        """
        total = hashlib.sha256()
        for store in self._stores.values():
            if store is without:
                continue
            for piece in store.pieces():
                total.update(piece)
            total.update(b"|")
        return total.hexdigest()

    def _place(self, mark: Mark) -> int:
        for place, held in enumerate(self._marks):
            if held is mark:
                return place
        raise ValueError("this mark is not held any more; take a new one with journal.mark()")

    def _switch(self, log: list[Change] | None) -> None:
        for store in self._stores.values():
            store.switch(log)


def _now(target: Any, key: Any) -> Any:
    """What a container holds at `key` at present, as a value of its own."""
    if isinstance(target, dict):
        return target.get(key, ABSENT)
    return bytes(target[key]) if isinstance(key, slice) else target[key]
