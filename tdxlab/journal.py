"""The undo log under everything that can change.

A machine's whole state lives in four kinds of store: `Words` (many machine words), `Row` (a few
numbers), `Table` (a dict) and `Fields` (attributes of an object). All write through `put`. While
nobody holds a mark, `put` is the container's own `__setitem__` and costs nothing more. While
somebody does, each `put` first notes the old value; `rewind` plays the notes backwards.

    mark = journal.mark()
    ...                      # anything at all
    journal.rewind(mark)     # bit for bit as it was; the mark can be used again
    journal.release(mark)

Snapshots of recorded traces, a panel's step back and the explorer's branching are all rewinds of
this one log.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, overload

#: What the log notes of a key that was not there.
ABSENT = object()
_CHUNK = 4096
#: Memory is looked through in pieces of this size.
_PIECE = 16 * _CHUNK
_ZERO_PIECE = bytes(_PIECE)
#: Linux: reserve address space without promising memory for all of it.
_MAP_NORESERVE = 0x4000


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
        self._log: list[tuple[Any, Any, Any]] = []
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

    def _switch(self, log: list[tuple[Any, Any, Any]] | None) -> None:
        for store in self._stores.values():
            store.switch(log)


class _Recorder:
    """Stands in for a view while somebody holds a mark: notes the old value, then writes."""

    __slots__ = ("_log", "_view")

    def __init__(self, view: memoryview[int] | list[int], log: list[tuple[Any, Any, Any]]) -> None:
        self._view = view
        self._log = log

    def __setitem__(self, index: int, value: int) -> None:
        view = self._view
        self._log.append((view, index, view[index]))
        view[index] = value


class Words:
    """A row of unsigned machine words that a journal can take back.

    count: number of words, all zero at first. typecode: "Q" (64 bit) or "H" (16 bit).
    sparse: back it with private anonymous memory of which only touched 4 KiB pages cost anything.

    Read through `view[i]`; write through `put(i, value)`, `fill`, or in hot loops through `cells`,
    which is `view` itself while nothing is recorded: look it up at each use.
    extent: words from here on were never written; who writes upwards may lower it, so that a digest
    need not look at them.
    """

    __slots__ = ("_log", "_raw", "cells", "extent", "itemsize", "view")

    cells: memoryview[int] | _Recorder
    view: memoryview[int]

    def __init__(
        self,
        journal: Journal,
        count: int,
        *,
        typecode: Literal["Q", "H"] = "Q",
        sparse: bool = False,
    ) -> None:
        self.itemsize = 8 if typecode == "Q" else 2
        size = max(count, 1) * self.itemsize
        buffer: mmap.mmap | bytearray = _reserve(size) if sparse else bytearray(size)
        self._raw = memoryview(buffer)
        self.view = self._raw.cast(typecode)
        self.extent = len(self.view)
        journal.attach(self)

    def __len__(self) -> int:
        return len(self.view)

    def switch(self, log: list[tuple[Any, Any, Any]] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self._log = log
        self.cells = self.view if log is None else _Recorder(self.view, log)

    def put(self, index: int, value: int) -> None:
        """Write one word."""
        self.cells[index] = value

    def fill(self, start: int, data: bytes) -> None:
        """Overwrite whole words from word `start` on with the bytes of `data` (little endian)."""
        place = slice(start * self.itemsize, start * self.itemsize + len(data))
        if self._log is not None:
            self._log.append((self._raw, place, bytes(self._raw[place])))
        self._raw[place] = data

    def read(self, start: int, count: int) -> bytes:
        """The bytes of `count` words from word `start` on."""
        return bytes(self._raw[start * self.itemsize : (start + count) * self.itemsize])

    def touched(self) -> Iterator[tuple[int, bytes]]:
        """(byte offset, content) of each 4 KiB chunk that is not all zero."""
        # Whole chunks: what a digest sees must not depend on how far the extent has grown.
        raw = self._raw[: -(-self.extent * self.itemsize // _CHUNK) * _CHUNK]
        for start in range(0, len(raw), _PIECE):
            piece = bytes(raw[start : start + _PIECE])
            if piece == _ZERO_PIECE[: len(piece)]:
                continue
            for offset in range(0, len(piece), _CHUNK):
                chunk = piece[offset : offset + _CHUNK]
                if chunk != _ZERO_PIECE[: len(chunk)]:
                    yield start + offset, chunk

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see."""
        for offset, chunk in self.touched():
            yield offset.to_bytes(8, "little")
            yield chunk


class Row:
    """A few numbers that a journal can take back, all 0 at first: counters, for example. Kept in a
    list, they are read and written several times as fast as `Words`.

    Read through `view[i]`; write through `put(i, value)`, or in hot loops through `cells`, as with
    `Words`.
    """

    __slots__ = ("cells", "view")

    cells: list[int] | _Recorder

    def __init__(self, journal: Journal, count: int) -> None:
        self.view = [0] * count
        journal.attach(self)

    def __len__(self) -> int:
        return len(self.view)

    def switch(self, log: list[tuple[Any, Any, Any]] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self.cells = self.view if log is None else _Recorder(self.view, log)

    def put(self, index: int, value: int) -> None:
        """Write one number."""
        self.cells[index] = value

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see."""
        yield repr(self.view).encode()


class Table(dict[Any, Any]):
    """A dict that a journal can take back. Write through `put` and `drop`; read like any dict.

    Keys and values must be immutable: a change is a new value.
    """

    __slots__ = ("_log", "put")

    put: Callable[[Hashable, Any], None]

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        journal.attach(self)

    def switch(self, log: list[tuple[Any, Any, Any]] | None) -> None:
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
        for line in sorted(f"{key!r}={_text(value)}" for key, value in self.items()):
            yield line.encode()


class Fields:
    """The values of an object's `Field` attributes, under a journal. They are kept in the object's
    own `__dict__`, so that they read as fast as any attribute. names: of the fields.
    """

    __slots__ = ("_log", "_values", "names", "put")

    put: Callable[[str, Any], None]

    def __init__(self, journal: Journal, owner: Journalled) -> None:
        defaults = owner.defaults
        # A dict of its own: Python reads an attribute out of one faster than out of a shared one.
        owner.__dict__ = self._values = {**defaults, **vars(owner)}
        self.names = defaults.keys()
        journal.attach(self)

    def switch(self, log: list[tuple[Any, Any, Any]] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self._log = log
        self.put = self._values.__setitem__ if log is None else self._put_recorded

    def _put_recorded(self, name: str, value: Any) -> None:
        assert self._log is not None
        self._log.append((self._values, name, self._values[name]))
        self._values[name] = value

    def as_dict(self) -> dict[str, Any]:
        """Name -> value of each field."""
        return {name: self._values[name] for name in self.names}

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see."""
        for name, value in sorted(self.as_dict().items()):
            yield f"{name!r}={_text(value)}".encode()


T = TypeVar("T")


class Field(Generic[T]):
    """An attribute that a journal can take back, of a class that is `Journalled`.

        class Counter(Journalled):
            count = Field(0)

            def __init__(self, journal: Journal) -> None:
                self.fields = Fields(journal, self)

    default: what it reads as before it is set. Values must be immutable: assign new ones.
    """

    __slots__ = ("default",)

    def __init__(self, default: T) -> None:
        self.default = default

    if TYPE_CHECKING:

        @overload
        def __get__(self, owner: None, kind: type) -> Self: ...
        @overload
        def __get__(self, owner: Journalled, kind: type) -> T: ...
        def __get__(self, owner: Journalled | None, kind: type) -> Self | T: ...

        def __set__(self, owner: Journalled, value: T) -> None: ...


class Journalled:
    """A class some of whose attributes are `Field`s. Objects make their `fields` first.

    defaults: name -> default of every field, inherited ones too. The fields themselves are taken
    out of the class when it is made: an object's attribute reads faster where its class has none
    of that name.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    fields: Fields

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = {name: field.default for name, field in vars(cls).items() if isinstance(field, Field)}
        for name in own:
            delattr(cls, name)
        cls.defaults = {**cls.defaults, **own}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a field through its journal. Refuses a field that is set before there
        are `Fields`: AttributeError.
        """
        if name not in self.defaults:
            object.__setattr__(self, name, value)
            return
        try:
            fields = self.fields
        except AttributeError:
            first = "self.fields = Fields(journal, self)"
            raise AttributeError(f"{name} is a Field; set {first} first") from None
        fields.put(name, value)


def _now(target: Any, key: Any) -> Any:
    """What a container holds at `key` at present, as a value of its own."""
    if isinstance(target, dict):
        return target.get(key, ABSENT)
    return bytes(target[key]) if isinstance(key, slice) else target[key]


def _text(value: Any) -> str:
    """A stable text of a stored value; a hash object shows its digest."""
    return value.hexdigest() if hasattr(value, "hexdigest") else repr(value)


def _reserve(size: int) -> mmap.mmap:
    """Private anonymous memory of `size` bytes: address space now, pages only when touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        area = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        raise ValueError(
            f"cannot reserve {size} bytes of address space ({error}); "
            "build a machine with less memory (smaller TDMRs)"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    return area
