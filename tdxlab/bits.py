"""Named bit fields of a 64-bit word: one declaration for people and for hot loops.

    class Septe(Word):
        read = Bits(0)
        hpa = Bits(51, 12, in_place=True)

    Septe(raw).hpa          # cold code: the field of one word
    raw & Septe.hpa.mask    # hot code: a plain int mask
    Septe(raw).describe()   # for people

The only file that shifts and masks anonymous numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, overload

MASK64 = (1 << 64) - 1


class Bits:
    """Bits `high` down to `low` of a word (both inclusive, 0..63).

    in_place: the field's value keeps its position in the word, as an address does whose low bits
    are zero.
    """

    __slots__ = ("high", "in_place", "low", "mask", "name")

    def __init__(self, high: int, low: int | None = None, *, in_place: bool = False) -> None:
        self.high = high
        self.low = high if low is None else low
        if not 0 <= self.low <= self.high <= 63:
            raise ValueError(f"Bits({high}, {low}): need 0 <= low <= high <= 63")
        self.mask = ((1 << (self.high - self.low + 1)) - 1) << self.low
        self.in_place = in_place
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, word: None, owner: type) -> Bits: ...
    @overload
    def __get__(self, word: Word, owner: type) -> int: ...
    def __get__(self, word: Word | None, owner: type) -> Bits | int:
        return self if word is None else self.extract(word)

    def extract(self, raw: int) -> int:
        """The field's value in `raw`."""
        return raw & self.mask if self.in_place else (raw & self.mask) >> self.low

    def insert(self, raw: int, value: int) -> int:
        """`raw` with this field set to `value`; a value that does not fit is a ValueError."""
        placed = value if self.in_place else value << self.low
        if placed & ~self.mask or value < 0:
            raise ValueError(
                f"{self.name}={value:#x} does not fit bits {self.high}:{self.low}; "
                f"allowed are the values under mask {self.mask:#x}"
            )
        return (raw & ~self.mask) | placed


class Word(int):
    """A 64-bit word with named fields; subclasses declare them with `Bits`."""

    @classmethod
    def fields(cls) -> tuple[Bits, ...]:
        """The declared fields, lowest bit first."""
        found = [field for kind in cls.__mro__ for field in vars(kind).values()]
        return tuple(sorted((f for f in found if isinstance(f, Bits)), key=lambda f: f.low))

    def with_(self, **changes: int) -> Self:
        """The same word with the named fields replaced; every value is range checked."""
        raw = int(self)
        for name, value in changes.items():
            raw = getattr(type(self), name).insert(raw, value)
        return type(self)(raw)

    def describe(self) -> str:
        """The fields that are not zero, in words: `read=1 hpa=0x12000`."""
        parts = [f"{f.name}={f.extract(self):#x}" for f in self.fields() if f.extract(self)]
        return " ".join(parts) or "all fields zero"


def filled(words: Sequence[int], empty: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(place, word) of the words that are none of `empty`, ascending. It looks no further than the
    last of them, so a table with a few entries at its beginning is soon read.
    """
    left = len(words) - sum(words.count(value) for value in empty)
    if not left:
        return
    for place, word in enumerate(words):
        if word not in empty:
            yield place, word
            left -= 1
            if not left:
                return
