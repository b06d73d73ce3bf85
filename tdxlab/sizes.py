"""Sizes of memory as people write them: 4096, "64MiB", "4 GiB"."""

from __future__ import annotations

import re

_UNITS = {"B": 0, "KIB": 10, "MIB": 20, "GIB": 30, "TIB": 40, "PIB": 50}
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FORM = re.compile(r"\s*(\d+|0[xX][0-9a-fA-F]+)\s*([A-Za-z]*)\s*")


def parse_size(size: int | str) -> int:
    """Bytes of a size that is an int, or a whole number with a unit B, KiB, MiB, GiB, TiB or PiB.

    Capitals do not matter; no unit means bytes; 0x4000 is a number too.
    Refuses anything else, and what is not above 0: ValueError.
    """
    if isinstance(size, str):
        size = _parse(size)
    elif isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"{size!r} is no size: give an int of bytes, or a string like '64 MiB'")
    if size <= 0:
        raise ValueError(f"a size of {size} bytes: give at least 1")
    return size


def _parse(text: str) -> int:
    match = _FORM.fullmatch(text)
    shift = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or shift is None:
        units = ", ".join(_NAMES)
        raise ValueError(
            f"{text!r} is no size: give a whole number and one of {units}, such as '64 MiB'"
        )
    return int(match[1], 0 if match[1][:2] in ("0x", "0X") else 10) << shift


def format_size(size: int) -> str:
    """`size` bytes in the largest unit that leaves a whole number, such as "64 MiB"."""
    unit = 0
    while size and size % 1024 == 0 and unit < len(_NAMES) - 1:
        size //= 1024
        unit += 1
    return f"{size} {_NAMES[unit]}"
