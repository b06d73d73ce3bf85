"""Where a step generator stands, as a value: two operations with equal fingerprints, on equal
machines, go on alike.

A fingerprint is what Python itself keeps of a suspended generator: its code, the instruction at
which it waits, the names and values of its variables, what lies on its stack (an iterator of a
`for`, the generator of a `yield from`), and so on down the chain. What is made by the operation
counts by value; what was there before counts by identity, for it belongs to the machine, whose
changes are in the journal.

Differs: needs CPython, where `gc.get_referents` shows a generator's stack.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterator
from enum import Enum
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
)
from typing import Any

from tdxlab.journal import Fields, Journal, Table, Words

_PLAIN = (
    int,
    str,
    bytes,
    range,
    float,
    type(None),
    type,
    Enum,
    ModuleType,
    CodeType,
    BuiltinFunctionType,
)
_STORES = (Fields, Table, Words, Journal)


class Fingerprints:
    """Makes fingerprints. Whatever exists when this is made counts by identity from then on."""

    def __init__(self) -> None:
        # The objects are kept, so that no identity is ever given away again.
        self._old_objects = gc.get_objects()
        self._old = frozenset(map(id, self._old_objects))

    def of(self, operation: Any) -> Hashable:
        """The fingerprint of a suspended generator, or of any value that an operation may hold.

        Refuses a journalled store that was made later, and an object without a readable state:
        ValueError.
        """
        return _Reading(self._old).value(operation)


class _Reading:
    """One fingerprint in the making. Objects met again are told by the number of the first time."""

    def __init__(self, old: frozenset[int]) -> None:
        self._old = old
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []

    def value(self, thing: Any) -> Hashable:
        """`thing` as a hashable value."""
        if isinstance(thing, _PLAIN):
            return thing
        if isinstance(thing, tuple):
            return (type(thing), *[self.value(item) for item in thing])
        identity = id(thing)
        if identity in self._old:
            return ("machine", identity)
        if identity in self._met:
            return ("met", self._met[identity])
        self._met[identity] = len(self._met)
        self._kept.append(thing)
        return self._new(thing)

    def _new(self, thing: Any) -> Hashable:
        """An object that the operation made, met for the first time."""
        if isinstance(thing, GeneratorType):
            return self._generator(thing)
        if isinstance(thing, list):
            return (list, *[self.value(item) for item in thing])
        if isinstance(thing, FunctionType):
            return (thing.__code__, self.value(thing.__closure__), self.value(thing.__defaults__))
        if isinstance(thing, MethodType):
            return (self.value(thing.__func__), self.value(thing.__self__))
        if isinstance(thing, CellType):
            return ("cell", *[self.value(content) for content in gc.get_referents(thing)])
        if isinstance(thing, _STORES):
            raise ValueError(
                f"an operation makes {thing!r}; what a journal keeps must exist before"
            )
        if isinstance(thing, dict):
            return (dict, *[(self.value(key), self.value(thing[key])) for key in thing])
        if isinstance(thing, set | frozenset):
            return (type(thing), frozenset(self.value(item) for item in thing))
        return self._object(thing)

    def _generator(self, generator: Any) -> Hashable:
        frame = generator.gi_frame
        if frame is None:
            return ("ended", generator.gi_code)
        # Asking for the variables makes Python keep a copy of them in the frame: no part of it.
        variables = frame.f_locals
        held = [
            self.value(thing)
            for thing in gc.get_referents(generator)
            if thing is not variables and not isinstance(thing, FrameType)
        ]
        return (generator.gi_code, frame.f_lasti, tuple(variables), *held)

    def _object(self, thing: Any) -> Hashable:
        """An exception, an iterator, or an object with slots or a __dict__."""
        if isinstance(thing, BaseException):
            return (type(thing), self.value(thing.args))
        if isinstance(thing, Iterator) and type(thing).__reduce__ is not object.__reduce__:
            return (type(thing), self.value(thing.__reduce__()))
        state = [(name, self.value(getattr(thing, name))) for name in _attributes(thing)]
        if not state and type(thing).__basicsize__ > object.__basicsize__:
            raise ValueError(f"{thing!r} shows no state; an operation cannot keep it over a step")
        return (type(thing), *state)


def _attributes(thing: Any) -> Iterator[str]:
    """Names of what `thing` keeps in slots and in its __dict__."""
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                yield name
    yield from getattr(thing, "__dict__", ())
