"""Host RAM: page contents, KeyIDs, TD ownership, integrity and poison.

Contents exist only where somebody wrote them: a page has a frame of 512 words once data is stored
in it, and reads as zeros until then. Every 64-byte line remembers the KeyID it was last written
with; a private KeyID sets the TD-owner bit of the line. Encryption is computed when somebody looks
with another key.

What a read of a line gives:

    reader's KeyID          line last written with      result
    the same                                            the data
    shared                  a private KeyID             ciphertext-like bytes
    shared                  another shared KeyID        ciphertext-like bytes
    private                 any other KeyID             MachineCheck, and the line is poisoned
    any                     (line is poisoned)          MachineCheck

A whole-line store (MOVDIR64B, or any write that covers the 64 bytes) gives the line the writer's
KeyID and clears poison. A store to a part of a line that belongs to another private KeyID poisons
the line.

Differs: real parts with cryptographic integrity may give a host that reads a TD's line a fixed
pattern instead of ciphertext; our sources do not settle which, so the model shows what encryption
alone would show. Caches are not modelled: a write reaches memory at once, and a write-back only
counts. Addresses without RAM read as zeros and swallow what is written.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from tdxlab.arch import (
    HPA_MASK,
    LINE_SHIFT,
    LINES_PER_PAGE,
    MAX_PA_BITS,
    PA_LIMIT,
    PAGE_OFFSET_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    WORDS_PER_PAGE,
)
from tdxlab.hardware import Region
from tdxlab.journal import Journal, Table, Words
from tdxlab.trace import Trace

LINE_SIZE = 1 << LINE_SHIFT
ZERO_PAGE = bytes(PAGE_SIZE)

_KEYID = (1 << 14) - 1
_OWNED = 1 << 14
_POISON = 1 << 15

Cipher = Callable[[int, int, int, bytes], bytes]


class MachineCheck(Exception):
    """A poisoned line was consumed. `hpa` is the byte address of the line."""

    def __init__(self, hpa: int) -> None:
        super().__init__(
            f"machine check: the line at {hpa:#x} is poisoned; "
            "a whole-line store (MOVDIR64B) clears it"
        )
        self.hpa = hpa


def scramble(hpa: int, written: int, reader: int, data: bytes) -> bytes:
    """The default cipher: `data` of one line as it looks under the wrong key.

    hpa: address of the line; written, reader: the two KeyIDs. Deterministic, and different for each
    address and key.
    """
    seed = b"%d:%d:%d" % (hpa, written, reader)
    pad = hashlib.blake2b(seed, digest_size=LINE_SIZE).digest()
    return bytes(a ^ b for a, b in zip(data, pad, strict=True))


class Memory:
    """The RAM of one machine.

    ram: ranges that are backed by RAM: low memory first, then the convertible ones.
    keyid_bits: width of the KeyID field at the top of a 52-bit physical address.
    first_private: the lowest private KeyID; it and greater ones set the TD-owner bit.
    encrypted: False models a machine whose memory reads the same under every KeyID (as the recorder
    of the traces had it).
    """

    def __init__(
        self,
        journal: Journal,
        trace: Trace,
        ram: Sequence[Region],
        *,
        keyid_bits: int = 6,
        first_private: int = 32,
        encrypted: bool = True,
        cipher: Cipher = scramble,
    ) -> None:
        self.ram = tuple(ram)
        #: ends of the ranges of RAM, ascending: from an even place up to the next one it is RAM
        self._bounds = tuple(end for r in sorted(self.ram) for end in (r.base, r.end))
        self.keyid_shift = MAX_PA_BITS - keyid_bits
        self.pa_mask = (1 << self.keyid_shift) - 1
        #: address bits of a page, without KeyID
        self.page_mask = self.pa_mask & HPA_MASK
        self.keyid_mask = (PA_LIMIT - 1) & ~self.pa_mask
        self.first_private = first_private
        self.encrypted = encrypted
        self._cipher = cipher
        self._trace = trace
        pages = sum(region.size for region in self.ram) >> PAGE_SHIFT
        self.words = Words(journal, pages * WORDS_PER_PAGE, sparse=True)
        #: pfn -> index of the first word of the page's frame
        self.frames = Table(journal)
        pfns = max(region.end for region in self.ram) >> PAGE_SHIFT
        self._tags = Words(journal, pfns, typecode="H", sparse=True)
        self._mixed = Table(journal)
        self._cursor = Words(journal, 1)
        self.words.extent = 0

    # -- addresses

    def split(self, pa: int) -> tuple[int, int]:
        """(hpa, KeyID) of a physical address with KeyID bits."""
        return pa & self.pa_mask, (pa & (PA_LIMIT - 1)) >> self.keyid_shift

    def join(self, hpa: int, keyid: int) -> int:
        """The physical address that names `hpa` under `keyid`."""
        return hpa | keyid << self.keyid_shift

    def is_ram(self, hpa: int, size: int = 1) -> bool:
        """True if all `size` bytes at `hpa` are RAM."""
        place = bisect_right(self._bounds, hpa)
        return place & 1 == 1 and hpa + size <= self._bounds[place]

    def require_ram(self, hpa: int, size: int) -> None:
        """Refuse, with a ValueError, bytes that are not RAM."""
        if not self.is_ram(hpa, size):
            ranges = ", ".join(f"{r.base:#x}..{r.end - 1:#x}" for r in self.ram)
            raise ValueError(
                f"{size} bytes at {hpa:#x} are not in this machine's memory; "
                f"its RAM is {ranges}: choose an address there"
            )

    # -- frames, for those who keep tables in pages

    def frame(self, hpa: int) -> int:
        """Word index of the frame of the page at `hpa`; a page without one gets a zeroed frame."""
        pfn = hpa >> PAGE_SHIFT
        base = self.frames.get(pfn)
        if base is None:
            base = self._cursor.view[0]
            self._cursor.put(0, base + WORDS_PER_PAGE)
            self.words.extent = max(self.words.extent, base + WORDS_PER_PAGE)
            self.frames.put(pfn, base)
        return int(base)

    def write_page(self, hpa: int, content: bytes, keyid: int) -> None:
        """Overwrite the page at `hpa` with 4096 bytes under `keyid`: 64 whole-line stores."""
        pfn = hpa >> PAGE_SHIFT
        if content is not ZERO_PAGE or pfn in self.frames:
            self.words.fill(self.frame(hpa), content)
        self._tag_page(pfn, keyid)

    def clear_page(self, hpa: int, keyid: int = 0) -> None:
        """Zero the page at `hpa` with 64 MOVDIR64B stores under `keyid`; clears poison."""
        self.write_page(hpa, ZERO_PAGE, keyid)
        self._trace.count("movdir64b", LINES_PER_PAGE)

    def page(self, hpa: int) -> bytes:
        """The 4096 bytes stored in the page, whatever their key: for tables, dumps and tests."""
        base = self.frames.get(hpa >> PAGE_SHIFT)
        return ZERO_PAGE if base is None else self.words.read(base, WORDS_PER_PAGE)

    # -- reads and writes as a bus agent sees them

    def read(self, hpa: int, size: int, keyid: int = 0) -> bytes:
        """`size` bytes at `hpa` as a reader with `keyid` gets them.

        Raises MachineCheck where integrity fails or the line is poisoned.
        """
        return b"".join(
            self._read_line(line, keyid)[start:stop] for line, start, stop in _lines(hpa, size)
        )

    def write(self, hpa: int, data: bytes, keyid: int = 0) -> None:
        """Store `data` at `hpa` under `keyid`."""
        offset = 0
        for line, start, stop in _lines(hpa, len(data)):
            piece = data[offset : offset + stop - start]
            offset += stop - start
            self._write_line(line, start, piece, keyid)

    def movdir64b(self, hpa: int, data: bytes, keyid: int = 0) -> None:
        """Store one whole 64-byte line; the line takes `keyid` and loses its poison. hpa: 64-byte
        aligned.
        """
        if len(data) != LINE_SIZE or hpa % LINE_SIZE:
            raise ValueError(
                f"MOVDIR64B stores 64 bytes at a 64-byte boundary, not {len(data)} at {hpa:#x}"
            )
        self._write_line(hpa, 0, data, keyid)
        self._trace.count("movdir64b")

    def keyid_of(self, hpa: int) -> int:
        """The KeyID that the line at `hpa` was last written with."""
        return self._tag(hpa) & _KEYID

    def is_td_owned(self, hpa: int) -> bool:
        """The TD-owner bit of the line at `hpa`."""
        return bool(self._tag(hpa) & _OWNED)

    def is_poisoned(self, hpa: int) -> bool:
        """True if reading the line at `hpa` would be a machine check for everybody."""
        return bool(self._tag(hpa) & _POISON)

    # -- lines

    def _make_tag(self, keyid: int) -> int:
        return keyid | (_OWNED if keyid >= self.first_private else 0)

    def _tag(self, hpa: int) -> int:
        pfn = hpa >> PAGE_SHIFT
        mixed = self._mixed.get(pfn)
        if mixed is not None:
            return int(mixed[(hpa & PAGE_OFFSET_MASK) >> LINE_SHIFT])
        return int(self._tags.view[pfn])

    def _tag_page(self, pfn: int, keyid: int) -> None:
        tag = self._make_tag(keyid)
        if self._tags.view[pfn] != tag:
            self._tags.put(pfn, tag)
        if pfn in self._mixed:
            self._mixed.drop(pfn)

    def _tag_line(self, line: int, tag: int) -> None:
        if self._tag(line) == tag:
            return
        pfn = line >> PAGE_SHIFT
        tags = list(self._mixed.get(pfn, (self._tags.view[pfn],) * LINES_PER_PAGE))
        tags[(line & PAGE_OFFSET_MASK) >> LINE_SHIFT] = tag
        self._mixed.put(pfn, tuple(tags))

    def _stored(self, line: int) -> bytes:
        base = self.frames.get(line >> PAGE_SHIFT)
        if base is None:
            return ZERO_PAGE[:LINE_SIZE]
        return self.words.read(base + ((line & PAGE_OFFSET_MASK) >> 3), LINE_SIZE >> 3)

    def _read_line(self, line: int, keyid: int) -> bytes:
        if not self.is_ram(line):
            return ZERO_PAGE[:LINE_SIZE]
        data = self._stored(line)
        tag = self._tag(line)
        if not self.encrypted or tag == self._make_tag(keyid):
            return data
        if tag & _POISON:
            raise MachineCheck(line)
        if keyid >= self.first_private:
            self._tag_line(line, tag | _POISON)
            raise MachineCheck(line)
        return self._cipher(line, tag & _KEYID, keyid, data)

    def _write_line(self, line: int, start: int, piece: bytes, keyid: int) -> None:
        if not self.is_ram(line):
            return
        old_tag, new_tag = self._tag(line), self._make_tag(keyid)
        data = bytearray(self._stored(line))
        if len(piece) != LINE_SIZE and self.encrypted and old_tag != new_tag:
            if old_tag & (_OWNED | _POISON):
                new_tag = old_tag | _POISON
            else:
                data = bytearray(self._cipher(line, old_tag & _KEYID, keyid, bytes(data)))
        data[start : start + len(piece)] = piece
        self.words.fill(self.frame(line) + ((line & PAGE_OFFSET_MASK) >> 3), bytes(data))
        self._tag_line(line, new_tag)


def _lines(hpa: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(line address, first byte, behind the last byte) for each line that `size` bytes at `hpa`
    touch.
    """
    end = hpa + size
    line = hpa & ~(LINE_SIZE - 1)
    while line < end:
        yield line, max(hpa - line, 0), min(end - line, LINE_SIZE)
        line += LINE_SIZE
