"""Stores of values by key, `Table` and the faster `Index`, and how any stored value looks to a
digest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from tdxlab.journal.log import ABSENT, Change, Journal


class Table(dict[Any, Any]):
    """A dict that a journal can take back. Write through `put` and `drop`; read like any dict.

    Keys and values must be immutable: a change is a new value.
    """

    __slots__ = ("_log", "put")

    put: Callable[[Hashable, Any], None]

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        journal.attach(self)

    def switch(self, log: list[Change] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self._log = log
        self.put = self.__setitem__ if log is None else self._put_recorded

    def _put_recorded(self, key: Hashable, value: Any) -> None:
        assert self._log is not None
        self._log.append((self, key, self.get(key, ABSENT)))
        self[key] = value

    def drop(self, key: Hashable) -> None:
        """Remove `key`, which must be there."""
        old = self.pop(key)
        if self._log is not None:
            self._log.append((self, key, old))

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see; order of insertion does not count."""
        return _pieces(self)


class Index:
    """A `Table` that grows only, for what is looked up at every step of a walk.

    Read through `view`, a plain dict: Python looks into one twice as fast as into any dict of a
    class of its own. Write through `put`.
    """

    __slots__ = ("_log", "put", "view")

    put: Callable[[Hashable, Any], None]

    def __init__(self, journal: Journal) -> None:
        self.view: dict[Any, Any] = {}
        journal.attach(self)

    def switch(self, log: list[Change] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self._log = log
        self.put = self.view.__setitem__ if log is None else self._put_recorded

    def _put_recorded(self, key: Hashable, value: Any) -> None:
        assert self._log is not None
        self._log.append((self.view, key, self.view.get(key, ABSENT)))
        self.view[key] = value

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see, as of a `Table`."""
        return _pieces(self.view)


def _pieces(entries: dict[Any, Any]) -> Iterator[bytes]:
    for line in sorted(f"{key!r}={text_of(value)}" for key, value in entries.items()):
        yield line.encode()


def text_of(value: Any) -> str:
    """A stable text of a stored value; a hash object shows its digest."""
    return value.hexdigest() if hasattr(value, "hexdigest") else repr(value)
