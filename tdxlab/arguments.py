"""Arguments of the wrong kind, refused by their names before anything is done.

    @checked
    def touch(self, gpa: int, size: int | str = 1) -> RunResult: ...

    td.touch("0x1000")            # ValueError: touch: gpa is '0x1000'; give an int

What a parameter takes is what its annotation says. Numbers of other libraries that are whole, such
as NumPy's, become ints, and other bytes become bytes. Functions that run millions of times do
without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, wraps
from inspect import Parameter, signature
from itertools import chain, repeat
from operator import index
from reprlib import repr as shortened
from types import UnionType
from typing import Any, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
T = TypeVar("T")

_WORDS = {
    "NoneType": "None",
    "bool": "True or False",
    "bytes": "bytes",
    "Callable": "a function",
}
_PLACES = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_BYTES = (bytearray, memoryview)


class Kind(NamedTuple):
    """What a parameter takes. types: classes of it; words: for people."""

    types: tuple[type, ...]
    words: str

    def fit(self, where: str, name: str, value: Any) -> Any:
        """`value`, or what it becomes. Refuses what is of another kind: ValueError."""
        if type(value) in self.types:
            return value
        if not isinstance(value, bool):
            if isinstance(value, self.types):
                return value
            if int in self.types and hasattr(type(value), "__index__"):
                return index(value)
        if bytes in self.types and isinstance(value, _BYTES):
            return bytes(value)
        raise ValueError(f"{where}: {name} is {shortened(value)}; give {self.words}")


class Kinds(NamedTuple):
    """Those of a function. where: its name for people. of: name of a parameter -> what it takes,
    unless that is anything. places: names of those that can be given by their place. rest: of the
    one that takes all others, "" without.
    """

    where: str
    of: Mapping[str, Kind]
    places: tuple[str, ...]
    rest: str


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which refuses, with a ValueError, what its annotations do not name."""

    @wraps(function)
    def asking(*positional: P.args, **named: P.kwargs) -> T:
        places, others = _fitted(function, positional, named)
        return function(*places, **others)

    return asking


def explained(function: Callable[P, T]) -> Callable[P, T]:
    """As `checked`, for functions that are called too often to look first: `function` is asked, and
    only when it stumbles over a type are its arguments looked at. It must not have changed anything
    until then.
    """

    @wraps(function)
    def asking(*positional: P.args, **named: P.kwargs) -> T:
        try:
            return function(*positional, **named)
        except (AttributeError, TypeError):
            _fitted(function, positional, named)
            raise

    return asking


def _fitted(
    function: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments as `function` takes them. Refuses what it does not take: ValueError."""
    kinds = _kinds(function)

    def fit(name: str, value: Any) -> Any:
        return kinds.of[name].fit(kinds.where, name, value) if name in kinds.of else value

    places = zip(chain(kinds.places, repeat(kinds.rest)), positional, strict=False)
    return [fit(*pair) for pair in places], {name: fit(name, named[name]) for name in named}


@cache
def _kinds(function: Callable[..., Any]) -> Kinds:
    """What the parameters of `function` take, found out when it is first called."""
    parameters = signature(function).parameters.values()
    hints = get_type_hints(function)
    kinds = {p.name: _kind(hints[p.name]) for p in parameters if p.name in hints}
    owner, _, name = function.__qualname__.rpartition(".")
    return Kinds(
        owner if name == "__init__" else name,
        {name: kind for name, kind in kinds.items() if object not in kind.types},
        tuple(p.name for p in parameters if p.kind in _PLACES),
        "".join(p.name for p in parameters if p.kind == Parameter.VAR_POSITIONAL),
    )


def one_line(text: str) -> str:
    """`text` on one line: line breaks, and what cannot be printed, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _kind(hint: Any) -> Kind:
    """What an annotation takes."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = tuple(object if choice is Any else get_origin(choice) or choice for choice in choices)
    return Kind(types, " or ".join(map(_words, types)))


def _words(type_: type) -> str:
    """A class for people."""
    if type_.__name__ in _WORDS:
        return _WORDS[type_.__name__]
    return f"{'an' if type_.__name__[0] in 'aeiouAEIO' else 'a'} {type_.__name__}"
