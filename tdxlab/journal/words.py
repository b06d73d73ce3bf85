"""Stores of numbers: `Words`, a long row of machine words, and `Row`, a short one."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Literal

from tdxlab.journal.log import Change, Journal

_CHUNK = 4096
#: Memory is looked through in pieces of this size.
_PIECE = 16 * _CHUNK
_ZERO_PIECE = bytes(_PIECE)
#: Linux: reserve address space without promising memory for all of it.
_MAP_NORESERVE = 0x4000


class _Recorder:
    """Stands in for a view while somebody holds a mark: notes the old value, then writes."""

    __slots__ = ("_log", "_view")

    def __init__(self, view: memoryview[int] | list[int], log: list[Change]) -> None:
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

    def switch(self, log: list[Change] | None) -> None:
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

    def switch(self, log: list[Change] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self.cells = self.view if log is None else _Recorder(self.view, log)

    def put(self, index: int, value: int) -> None:
        """Write one number."""
        self.cells[index] = value

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see."""
        yield repr(self.view).encode()


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
