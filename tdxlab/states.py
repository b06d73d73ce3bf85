"""States of a machine as small values: what differs from a base, told by the journal.

A state is the set of all places that hold something else than at the base, with what they hold.
A place is a key of a table, a field, or a few neighbouring words. Places and values are numbered as
they turn up, so that a state is a set of small numbers: exact, and cheap to keep and to compare.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from tdxlab.journal import ABSENT, Change, Index, Journal, Mark, Row, Words

#: Bytes of words that count as one place.
CHUNK = 256

Place = tuple[int, Hashable]
#: Place -> number of what it holds, for each place that differs from the base.
Differences = dict[Place, int]


class Part(NamedTuple):
    """Some of what a store keeps. store: a store, or an object with fields. key: of an entry, the
    name of a field, or the number of the first of `length` words.
    """

    store: object
    key: Hashable
    length: int = 1


class Places:
    """Whole stores and parts of stores, to be asked whether a place is among them."""

    def __init__(self, things: Iterable[object]) -> None:
        self._whole: set[int] = set()
        self._parts: set[Place] = set()
        for thing in things:
            if isinstance(thing, Part):
                self._parts.update(_places_of(thing))
            else:
                self._whole |= containers_of(thing)

    def __contains__(self, place: Place) -> bool:
        return place[0] in self._whole or place in self._parts


def _places_of(part: Part) -> Iterator[Place]:
    """The places that lie within a part: of words, those that it fills."""
    store, key, length = part
    if not isinstance(store, Words):
        yield id(vars(store)) if not isinstance(store, dict | Row | Index) else _only(store), key
        return
    assert isinstance(key, int)
    first, end = key * store.itemsize, (key + length) * store.itemsize
    for chunk in range(-(-first // CHUNK), end // CHUNK):
        yield _only(store), chunk


def _only(store: object) -> int:
    (container,) = containers_of(store)
    return container


def containers_of(thing: object) -> frozenset[int]:
    """Identities under which a journal knows what `thing` keeps: a store, or an object with fields
    and stores of its own, such as a lock.
    """
    if isinstance(thing, Words):
        return frozenset((id(thing.view.obj),))
    if isinstance(thing, dict):
        return frozenset((id(thing),))
    if isinstance(thing, Row | Index):
        return frozenset((id(thing.view),))
    own = vars(thing)
    stores = (value for value in own.values() if isinstance(value, Words | Row))
    return frozenset((id(own), *(i for store in stores for i in containers_of(store))))


class States:
    """Tells states of a machine apart, as seen from the state in which this is made.

    journal: the machine's; it is held at a mark, `base`, until `close`. ignored: stores, parts of
    stores, or objects, whose content does not count, such as statistics. locks: likewise such as
    count, but hold nothing that lasts.
    """

    def __init__(
        self, journal: Journal, ignored: Iterable[object] = (), locks: Iterable[object] = ()
    ) -> None:
        self.journal = journal
        self.base: Mark = journal.mark()
        self._ignored, self._locks = Places(ignored), Places(locks)
        self._numbers: dict[Hashable, int] = {}
        #: number of a value at a place -> that place; -> the value, as the store keeps it
        self._place_of: dict[int, Place] = {}
        self._stored: dict[int, Any] = {}
        self._at_base: dict[Place, Hashable] = {}
        #: containers met so far, by identity: words as bytes, dicts and lists
        self._bytes: dict[int, memoryview[int]] = {}
        self._tables: dict[int, Any] = {}

    def close(self) -> None:
        """Go back to the base and give its mark up."""
        self.journal.rewind(self.base)
        self.release()

    def release(self) -> None:
        """Give the mark up; the machine stays as it is."""
        self.journal.release(self.base)

    def number(self, value: Hashable) -> int:
        """A small number for `value`; equal values, equal numbers."""
        return self._numbers.setdefault(value, len(self._numbers))

    def state(self, differences: Differences) -> int:
        """The number of the state that differs from the base so."""
        return self.number(frozenset(differences.values()))

    def differences(self, values: Iterable[int]) -> Differences:
        """The differences whose values are these: what `Differences.values()` gave."""
        return {self._place_of[value]: value for value in values}

    def lasting(self, differences: Differences) -> int:
        """As `state`, whoever holds which lock."""
        return self.number(frozenset(n for place, n in differences.items() if self._lasts(place)))

    def update(self, before: Differences, mark: Mark) -> tuple[Differences, bool]:
        """The differences now, if they were `before` at `mark`; and whether something that lasts
        has changed since.
        """
        changes = self.journal.undone_by(mark)
        if not changes:
            return before, False
        after, lasting = dict(before), False
        for place in {place for change in changes for place in self._places(change)}:
            stored = self._now(place)
            value = _as_value(stored)
            if value == self._base_value(place):
                after.pop(place, None)
            else:
                after[place] = number = self.number((place, value))
                self._place_of[number], self._stored[number] = place, stored
            if after.get(place) != before.get(place) and self._lasts(place):
                lasting = True
        return after, lasting

    def _lasts(self, place: Place) -> bool:
        return place not in self._locks

    def place(self, number: int) -> Place:
        """The place that holds the value of that number."""
        return self._place_of[number]

    def lasts(self, number: int) -> bool:
        """True if the value of that number is not who holds a lock."""
        return self._lasts(self._place_of[number])

    def go_to(self, values: Iterable[int]) -> None:
        """Let the machine be in the state whose differences have these values; counters, and what
        else is ignored, are those of the base.
        """
        self.journal.rewind(self.base)
        changes: list[Change] = []
        for number in values:
            container, key = self._place_of[number]
            if container in self._bytes:
                assert isinstance(key, int)
                chunk = slice(key * CHUNK, (key + 1) * CHUNK)
                changes.append((self._bytes[container], chunk, self._stored[number]))
            else:
                changes.append((self._tables[container], key, self._stored[number]))
        self.journal.replay(changes)

    def _places(self, change: Change) -> Iterator[Place]:
        """The places that a change touched."""
        target, key, _ = change
        container = id(target.obj) if isinstance(target, memoryview) else id(target)
        if not isinstance(target, memoryview):
            self._tables[container] = target
            if (container, key) not in self._ignored:
                yield container, key
            return
        self._bytes.setdefault(container, memoryview(target.obj).cast("B"))
        first, last = _bytes_of(target, key)
        for chunk in range(first // CHUNK, last // CHUNK + 1):
            if (container, chunk) not in self._ignored:
                yield container, chunk

    def _now(self, place: Place) -> Any:
        """What a place holds now, as the store keeps it."""
        container, key = place
        if container in self._bytes:
            assert isinstance(key, int)
            return bytes(self._bytes[container][key * CHUNK : (key + 1) * CHUNK])
        table: Any = self._tables[container]
        return table.get(key, ABSENT) if isinstance(table, dict) else table[key]

    def _base_value(self, place: Place) -> Hashable:
        """What a place held at the base."""
        if place not in self._at_base:
            changes = self.journal.undone_by(self.base)
            find = self._chunk_before if place[0] in self._bytes else _entry_before
            self._at_base[place] = find(place, changes)
        found: Hashable = self._at_base[place]
        return found

    def _chunk_before(self, place: Place, changes: list[Change]) -> Hashable:
        """The words of a chunk as they were before all `changes`."""
        container, chunk = place
        assert isinstance(chunk, int)
        start = chunk * CHUNK
        content = bytearray(self._bytes[container][start : start + CHUNK])
        for target, key, old in reversed(changes):
            if not isinstance(target, memoryview) or id(target.obj) != container:
                continue
            data = old if isinstance(key, slice) else old.to_bytes(target.itemsize, "little")
            first = _bytes_of(target, key)[0] - start
            for offset, byte in enumerate(data, first):
                if 0 <= offset < len(content):
                    content[offset] = byte
        return bytes(content)


def _entry_before(place: Place, changes: list[Change]) -> Hashable:
    """The entry of a dict or list as it was before all `changes`, one of which touched it."""
    container, wanted = place
    old = next(old for target, key, old in changes if id(target) == container and key == wanted)
    return _as_value(old)


def _as_value(value: Any) -> Hashable:
    """A stored value; of a hash object, what it says."""
    found: Hashable = value.digest() if hasattr(value, "hexdigest") else value
    return found


def _bytes_of(target: memoryview[int], key: Any) -> tuple[int, int]:
    """First and last byte that a key of a row of words means."""
    if isinstance(key, slice):
        return key.start, key.stop - 1
    return key * target.itemsize, (key + 1) * target.itemsize - 1
