"""The page cache of guest_memfd: which page of RAM stands for which page of a file.

One word for each page of a file, in chunks of 512 that come when the first of their pages does:

    51:12 HPA of the page     2 poisoned     1 prepared     0 in use

Source: Linux 6.16, virt/kvm/guest_memfd.c; include/linux/page-flags.h (uptodate, hwpoison).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT
from tdxlab.bits import Bits, Word
from tdxlab.journal import Journal, Table, Words

_CHUNK_SHIFT = 9
_CHUNK = 1 << _CHUNK_SHIFT
_LAST = _CHUNK - 1


class FolioWord(Word):
    """One page of a file; 0 where the file has no page."""

    in_use = Bits(0)
    prepared = Bits(1)
    poisoned = Bits(2)
    hpa = Bits(51, 12, in_place=True)


IN_USE = FolioWord.in_use.mask
PREPARED = FolioWord.prepared.mask
POISONED = FolioWord.poisoned.mask
FOLIO_HPA = FolioWord.hpa.mask


class Folio(NamedTuple):
    """One page of a file. prepared: the guest may have it as it is. poisoned: its memory failed."""

    pfn: int
    prepared: bool = False
    poisoned: bool = False


def as_folio(word: int) -> Folio:
    """A word of a page that is in use, for people."""
    return Folio((word & FOLIO_HPA) >> PAGE_SHIFT, bool(word & PREPARED), bool(word & POISONED))


class Folios:
    """The pages of all files of one VM. limit: chunks of 512 pages that can be used in all.

    words: one for each page; `place` says where.
    """

    def __init__(self, journal: Journal, limit: int) -> None:
        self.words = Words(journal, limit << _CHUNK_SHIFT, sparse=True)
        self.words.extent = 0
        #: (file, index >> 9) -> word of the chunk's first page
        self._chunks = Table(journal)

    def get(self, gmem: int, index: int) -> int:
        """The word of page `index` of a file, 0 if the file has no such page."""
        base = self._chunks.get((gmem, index >> _CHUNK_SHIFT))
        return 0 if base is None else self.words.view[base + (index & _LAST)]

    def place(self, gmem: int, index: int) -> int:
        """Where in `words` the word of page `index` of a file is, which is 0 without such a page.

        Raises MemoryError where no room is left for the page's chunk.
        """
        base = self._chunks.get((gmem, index >> _CHUNK_SHIFT))
        if base is None:
            base = self._add_chunk(gmem, index >> _CHUNK_SHIFT)
        word: int = base + (index & _LAST)
        return word

    def put(self, gmem: int, index: int, word: int) -> None:
        """Set the word of page `index` of a file; 0 takes the page out of it."""
        self.words.put(self.place(gmem, index), word)

    def _add_chunk(self, gmem: int, chunk: int) -> int:
        base = len(self._chunks) << _CHUNK_SHIFT
        if base >= len(self.words):
            raise MemoryError(f"guest_memfd: {len(self._chunks)} ranges of 2 MiB are in use")
        self._chunks.put((gmem, chunk), base)
        self.words.extent = max(self.words.extent, base + _CHUNK)
        return base

    def pages(self, gmem: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(index, word) of every page that a file has from `start` to `end` - 1, ascending."""
        for chunk in self._chunks_of(gmem, start >> _CHUNK_SHIFT, end - 1 >> _CHUNK_SHIFT):
            base, first = self._chunks[gmem, chunk], chunk << _CHUNK_SHIFT
            low, high = max(start - first, 0), min(end - first, _CHUNK)
            words = self.words.view[base + low : base + high].tolist()
            yield from ((first + low + place, word) for place, word in enumerate(words) if word)

    def _chunks_of(self, gmem: int, first: int, last: int) -> list[int]:
        """Numbers of the file's chunks from `first` to `last`, ascending."""
        if last - first < len(self._chunks):
            return [chunk for chunk in range(first, last + 1) if (gmem, chunk) in self._chunks]
        return sorted(n for file, n in self._chunks if file == gmem and first <= n <= last)

    def all(self) -> Iterator[int]:
        """The words of all pages of all files."""
        used = self.words.view[: len(self._chunks) << _CHUNK_SHIFT].tolist()
        return (word for word in used if word)
