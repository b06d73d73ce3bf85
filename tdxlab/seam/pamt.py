"""The physical address metadata table: who owns each page, and the locks on it.

Each 1 GiB block of a TDMR has one PAMT_1G entry, 512 PAMT_2M entries and 262144 PAMT_4K entries of
16 bytes:

    word 0   63:24 owner (HPA bits 51:12 of the TDR)   23:16 page type   15:0 lock
    word 1   BEPOCH, the TD epoch at which the page was blocked

A page is represented at exactly one level; PT_NDA at 1G or 2M means "look one level down". Clearing
a page writes the type alone: owner and BEPOCH keep stale values, and a read of a free page's
metadata shows them.

Source: TDX module 1.5.01, pamt_manager.c and pamt_manager.h.
Differs: the entries live in the model's own memory and not at the addresses that the host gave to
TDH.SYS.CONFIG; those addresses are checked and then only reserved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT, SIZE_1G, SIZE_2M
from tdxlab.bits import Bits, Word
from tdxlab.journal import Journal, Table, Words
from tdxlab.seam.rules import PT_NDA, PT_RSVD

SIZE_NAMES = ("4K", "2M", "1G")
PAGES_PER_2M = SIZE_2M >> PAGE_SHIFT
PAGES_PER_1G = SIZE_1G >> PAGE_SHIFT

#: 64 KiB of entries that are free and not locked, with nothing stale in them.
_ALL_FREE = bytes(16 * PAGES_PER_2M << 3)

#: Pages of 4 KiB in a page of each size code (4K 0, 2M 1, 1G 2).
PAGES_OF_SIZE = (1, PAGES_PER_2M, PAGES_PER_1G)


class PamtWord(Word):
    """Word 0 of a PAMT entry."""

    lock = Bits(15, 0)
    page_type = Bits(23, 16)
    owner_pfn = Bits(63, 24)


LOCK_MASK = PamtWord.lock.mask
_OFFSET_IN_BLOCK = SIZE_1G - 1
_OWNER_DOWN = PamtWord.owner_pfn.low
TYPE_MASK = PamtWord.page_type.mask
TYPE_SHIFT = PamtWord.page_type.low
_OWNER_UP = PamtWord.owner_pfn.low - PAGE_SHIFT
_RESERVED = PT_RSVD << TYPE_SHIFT
_RESERVED_ENTRY = (PT_RSVD << TYPE_SHIFT).to_bytes(8, "little") + bytes(8)
_ALL_RESERVED = _RESERVED_ENTRY * (PAGES_PER_2M << 3)
#: Words of the pieces in which the PAMT is looked through: 64 KiB, 8 KiB, 512 bytes.
_PIECES = (PAGES_PER_2M << 4, PAGES_PER_2M << 1, PAGES_PER_2M >> 3)


class PamtEntry(NamedTuple):
    """A PAMT entry for people: `size` 0 (4K), 1 (2M), 2 (1G); `owner` an HPA; `lock` the raw lock
    word.
    """

    size: int
    hpa: int
    page_type: int
    owner: int
    bepoch: int
    lock: int


class Pamt:
    """The PAMT of all TDMRs. Entries are named by the index of their word 0 in `words`."""

    def __init__(self, journal: Journal, lowest: int, end: int) -> None:
        """Make room for every 1 GiB block between the HPAs `lowest` and `end`; none is initialised
        yet.
        """
        blocks = range(lowest >> 30, (end + SIZE_1G - 1) >> 30)
        first_2m = 2 * len(blocks)
        first_4k = first_2m + 2 * PAGES_PER_2M * len(blocks)
        self.words = Words(journal, first_4k + 2 * PAGES_PER_1G * len(blocks), sparse=True)
        self._layout = {
            block: (2 * i, first_2m + 2 * PAGES_PER_2M * i, first_4k + 2 * PAGES_PER_1G * i)
            for i, block in enumerate(blocks)
        }
        #: HPA >> 30 of each initialised block -> (index of its 1G entry, of its first 2M entry, of
        #: its first 4K entry)
        self.blocks = Table(journal)

    def open_block(self, base: int) -> None:
        """The 1 GiB block at `base` is completely initialised: its pages can be used."""
        self.blocks.put(base >> 30, self._layout[base >> 30])

    def reserve(self, base: int, end: int) -> None:
        """Mark the 4 KiB pages of [base, end) PT_RSVD; they lie in one block, which is not open
        yet, so that their entries are still all zero.
        """
        first_4k = self._layout[base >> 30][2]
        first = first_4k + ((base & _OFFSET_IN_BLOCK) >> PAGE_SHIFT) * 2
        self.words.fill(first, _RESERVED_ENTRY * ((end - base) >> PAGE_SHIFT))

    def entry(self, hpa: int, size: int) -> int:
        """Index of the entry of `size` (0, 1, 2) that covers `hpa`, whose block must be open."""
        first: int = self.blocks[hpa >> 30][2 - size]
        return first + ((hpa & _OFFSET_IN_BLOCK) >> (12 + 9 * size)) * 2

    def page_type(self, entry: int) -> int:
        """Page type (PT_*) of an entry."""
        return (self.words.view[entry] & TYPE_MASK) >> TYPE_SHIFT

    def type_of(self, hpa: int) -> int:
        """Page type (PT_*) of the 4 KiB page at `hpa`; PT_NDA where no block is open."""
        block = self.blocks.get(hpa >> 30)
        if block is None:
            return PT_NDA
        entry: int = block[2] + (hpa >> 12 & PAGES_PER_1G - 1) * 2
        return (self.words.view[entry] & TYPE_MASK) >> TYPE_SHIFT

    def owner(self, entry: int) -> int:
        """HPA of the owner's TDR, 0 if none; stale on a free page."""
        return self.words.view[entry] >> _OWNER_DOWN << PAGE_SHIFT

    def bepoch(self, entry: int) -> int:
        """BEPOCH of an entry."""
        return self.words.view[entry + 1]

    def set_bepoch(self, entry: int, epoch: int) -> None:
        """Stamp the entry with the TD epoch at which it was blocked."""
        self.words.cells[entry + 1] = epoch

    def set_type(self, entry: int, page_type: int) -> None:
        """Write the type alone; owner and BEPOCH stay."""
        words = self.words
        words.cells[entry] = (words.view[entry] & ~TYPE_MASK) | page_type << TYPE_SHIFT

    def give(self, entry: int, page_type: int, owner: int, bepoch: int = 0) -> None:
        """Give the page to the TD whose TDR is at `owner`; the lock word stays."""
        words = self.words
        lock = words.view[entry] & LOCK_MASK
        words.cells[entry] = lock | page_type << TYPE_SHIFT | owner << _OWNER_UP
        if words.view[entry + 1] != bepoch:
            words.cells[entry + 1] = bepoch

    def is_all_free(self, hpa: int) -> bool:
        """True if the 512 4K entries of the 2 MiB range at `hpa` are PT_NDA."""
        first = self.entry(hpa, 0)
        view = self.words.view
        return not any(view[i] & TYPE_MASK for i in range(first, first + 2 * PAGES_PER_2M, 2))

    def represented_at(self, hpa: int) -> int:
        """Size code (0, 1, 2) of the level at which `hpa` is represented: where a walk ends."""
        for size in (2, 1):
            if self.page_type(self.entry(hpa, size)) != PT_NDA:
                return size
        return 0

    def describe(self, hpa: int, size: int) -> PamtEntry:
        """The entry of `size` that covers `hpa`, for people."""
        entry = self.entry(hpa, size)
        word = PamtWord(self.words.view[entry])
        return PamtEntry(
            size, hpa, word.page_type, self.owner(entry), self.bepoch(entry), word.lock
        )

    def covers(self, entry: int) -> tuple[int, int]:
        """(HPA, size) of the page that the entry at this index stands for."""
        for block, firsts in self._layout.items():
            for size, first in enumerate(reversed(firsts)):
                number = entry - first >> 1
                if 0 <= number < PAGES_PER_1G >> 9 * size:
                    return (block << 30) + (number << PAGE_SHIFT + 9 * size), size
        raise ValueError(f"no entry of the PAMT has the index {entry}; there are {len(self.words)}")

    def is_in_use(self, entry: int) -> bool:
        """True if the entry is not free or reserved, or its lock is not 0."""
        word = self.words.view[entry] & (TYPE_MASK | LOCK_MASK)
        return word != 0 and word & TYPE_MASK != _RESERVED

    def in_use(self) -> Iterator[PamtEntry]:
        """Entries that are not free or reserved, or whose lock is not 0; 1G, 2M, 4K of each TDMR,
        ascending.
        """
        for blocks in self._runs():
            for size in (2, 1, 0):
                for block in blocks:
                    yield from self._used_in_block(block << 30, size)

    def _runs(self) -> Iterator[list[int]]:
        """Open blocks, grouped in runs without a gap (a TDMR, or TDMRs that touch)."""
        run: list[int] = []
        for block in sorted(self.blocks):
            if run and block != run[-1] + 1:
                yield run
                run = []
            run.append(block)
        if run:
            yield run

    def _used_in_block(self, base: int, size: int) -> Iterator[PamtEntry]:
        first = self.entry(base, size)
        step = 1 << (PAGE_SHIFT + 9 * size)
        for entry in self._used_between(first, first + 2 * (SIZE_1G // step)):
            yield self.describe(base + (entry - first >> 1) * step, size)

    def _used_between(self, first: int, end: int) -> Iterator[int]:
        """Indices of the entries in use from `first` up to `end`, ascending. What is free or
        reserved as a whole is passed over in large pieces.
        """
        piece = next((words for words in _PIECES if words < end - first), 0)
        if not piece:
            for entry, word in enumerate(self.words.view[first:end:2].tolist()):
                if word & (TYPE_MASK | LOCK_MASK) and word & TYPE_MASK != _RESERVED:
                    yield first + 2 * entry
            return
        for start in range(first, end, piece):
            behind = min(start + piece, end)
            chunk = self.words.read(start, behind - start)
            if chunk not in (_ALL_FREE[: len(chunk)], _ALL_RESERVED[: len(chunk)]):
                yield from self._used_between(start, behind)
