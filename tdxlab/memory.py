"""Host RAM: page contents, KeyIDs, TD ownership, integrity and poison.

Contents exist only where somebody wrote them: a page has a frame of 512 words once data is stored
in it, and reads as zeros until then. Every 64-byte line remembers the key it was last written with:
a KeyID, and which of the keys that PCONFIG has put behind it. A private KeyID sets the TD-owner bit
of the line. Encryption is computed when somebody looks with another key.

What a read of a line gives:

    reader's KeyID          line last written with      result
    its key                                             the data
    0                       any other key               what the memory holds: ciphertext
    another shared one      any other key               that ciphertext, deciphered with its key
    private                 a shared KeyID              MachineCheck, and the line is poisoned
    private                 another private key         the same if lines have a MAC, else garbage
    any                     (line is poisoned)          MachineCheck

A whole-line store (MOVDIR64B, or any write that covers the 64 bytes) gives the line the writer's
KeyID and clears poison. A store to a part of a line that belongs to another private KeyID poisons
the line.

Differs: real parts with cryptographic integrity may give a host that reads a TD's line a fixed
pattern instead of ciphertext; our sources do not settle which, so the model shows what encryption
alone would show. Nor do they say how a part without MACs answers; here the TD-owner bit is all that
it checks. KeyID 0 is without encryption, as if it were bypassed. A write reaches memory at once;
what could still be dirty in a cache is only noted (`caches`). Addresses without RAM read as zeros
and swallow what is written.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

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
from tdxlab.caches import Caches
from tdxlab.hardware import Region
from tdxlab.journal import Index, Journal, Row, Table, Words
from tdxlab.trace import Trace

LINE_SIZE = 1 << LINE_SHIFT
ZERO_PAGE = bytes(PAGE_SIZE)

#: A line's tag: the number of the key, the TD-owner bit, poison.
KEY = (1 << 14) - 1
OWNED = 1 << 14
POISON = 1 << 15


class Cipher(Protocol):
    """How lines are enciphered. hpa: address of the line; key: number of a key, 1 or greater; line:
    64 bytes. The two undo each other.
    """

    def encipher(self, hpa: int, key: int, line: bytes) -> bytes:
        """The line as the memory holds it."""
        ...

    def decipher(self, hpa: int, key: int, line: bytes) -> bytes:
        """The line as a reader with the key gets it."""
        ...


class MachineCheck(Exception):
    """A poisoned line was consumed. `hpa` is the byte address of the line."""

    def __init__(self, hpa: int) -> None:
        super().__init__(
            f"machine check: the line at {hpa:#x} is poisoned; "
            "a whole-line store (MOVDIR64B) clears it"
        )
        self.hpa = hpa


class Scramble:
    """The default cipher: other bytes for each address and key, and no secret."""

    def encipher(self, hpa: int, key: int, line: bytes) -> bytes:
        """`line` with a pad that the address and the key give."""
        pad = hashlib.blake2b(b"%d:%d" % (hpa, key), digest_size=LINE_SIZE).digest()
        return bytes(a ^ b for a, b in zip(line, pad, strict=True))

    def decipher(self, hpa: int, key: int, line: bytes) -> bytes:
        """The same pad again."""
        return self.encipher(hpa, key, line)


class Memory:
    """The RAM of one machine.

    ram: ranges that are backed by RAM: low memory first, then the convertible ones.
    keyid_bits: width of the KeyID field at the top of a 52-bit physical address.
    first_private: the lowest private KeyID; it and greater ones set the TD-owner bit.
    encrypted: False models a machine whose memory reads the same under every KeyID (as the recorder
    of the traces had it). has_mac: each line has a MAC, made with its key; without, only the
    TD-owner bit protects a private reader. cipher: what others than the writer see.
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
        has_mac: bool = True,
        cipher: Cipher | None = None,
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
        self.has_mac = has_mac
        self.cipher = cipher or Scramble()
        self._trace = trace
        pages = sum(region.size for region in self.ram) >> PAGE_SHIFT
        self.words = Words(journal, pages * WORDS_PER_PAGE, sparse=True)
        self._index = Index(journal)
        #: HPA of a page -> index of the first word of its frame
        self.frames: dict[int, int] = self._index.view
        pfns = max(region.end for region in self.ram) >> PAGE_SHIFT
        #: by pfn: the tag of all of the page's lines, but for those of pages in `_mixed`
        self.tags = Words(journal, pfns, typecode="H", sparse=True)
        self._mixed = Table(journal)
        #: KeyID -> tag of what is written with it
        self._tag_of = Row(journal, 1 << keyid_bits)
        for keyid in range(1 << keyid_bits):
            self._tag_of.put(keyid, keyid | (OWNED if keyid >= first_private else 0))
        #: what may still be dirty in a cache under a private KeyID
        self.caches = Caches(journal)
        self._cursor = Row(journal, 1)
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
        page = hpa & HPA_MASK
        base = self.frames.get(page)
        if base is None:
            base = self._cursor.view[0]
            self._cursor.put(0, base + WORDS_PER_PAGE)
            self.words.extent = max(self.words.extent, base + WORDS_PER_PAGE)
            self._index.put(page, base)
        return base

    def write_page(self, hpa: int, content: bytes, keyid: int) -> None:
        """Overwrite the page at `hpa` with 4096 bytes under `keyid`: 64 whole-line stores."""
        if content is not ZERO_PAGE or hpa in self.frames:
            self.words.fill(self.frame(hpa), content)
        pfn, tag = hpa >> PAGE_SHIFT, self._tag_of.view[keyid]
        old = self.tags.view[pfn]
        if old != tag:
            if old & OWNED:
                self.caches.change_key(pfn, old)
            self.tags.put(pfn, tag)
        if pfn in self._mixed:
            self._mixed.drop(pfn)

    def clear_page(self, hpa: int, keyid: int = 0) -> None:
        """Zero the page at `hpa` with 64 MOVDIR64B stores under `keyid`; clears poison."""
        self.write_page(hpa, ZERO_PAGE, keyid)
        self._trace.count("movdir64b", LINES_PER_PAGE)

    def page(self, hpa: int) -> bytes:
        """The 4096 bytes stored in the page, whatever their key: for tables, dumps and tests."""
        base = self.frames.get(hpa & HPA_MASK)
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

    # -- keys

    def new_key(self, keyid: int) -> None:
        """Put a new key behind `keyid`; what was written with the old one stays as it is.

        Differs: keys have numbers of 14 bits, of which the lowest are the KeyID: with 6 KeyID bits
        the 257th key of a KeyID is its first one again.
        """
        tag = self._tag_of.view[keyid]
        self._tag_of.put(keyid, tag & OWNED | tag + len(self._tag_of) & KEY)

    def write_back_page(self, hpa: int, keyid: int) -> None:
        """Write back and invalidate the page's lines under `keyid`."""
        pfn, tag = hpa >> PAGE_SHIFT, self._tag_of.view[keyid]
        if tag & OWNED and self.tags.view[pfn] == tag:
            self.caches.pages.put(pfn, tag)

    def write_back_key(self, keyid: int) -> None:
        """Every line under `keyid`, which nobody uses any more, was written back."""
        self.caches.keys.put(self._tag_of.view[keyid], True)

    def keyid_of(self, hpa: int) -> int:
        """The KeyID that the line at `hpa` was last written with."""
        return self.tag(hpa) & len(self._tag_of) - 1

    def is_td_owned(self, hpa: int) -> bool:
        """The TD-owner bit of the line at `hpa`."""
        return bool(self.tag(hpa) & OWNED)

    def is_poisoned(self, hpa: int) -> bool:
        """True if reading the line at `hpa` would be a machine check for everybody."""
        return bool(self.tag(hpa) & POISON)

    def current_tags(self) -> list[int]:
        """The tag that each KeyID writes at present, in the order of the KeyIDs."""
        return list(self._tag_of.view)

    # -- lines

    def tag(self, hpa: int) -> int:
        """What is known of the line at `hpa` besides its content: KEY, OWNED and POISON bits."""
        pfn = hpa >> PAGE_SHIFT
        mixed = self._mixed.get(pfn)
        if mixed is not None:
            return int(mixed[(hpa & PAGE_OFFSET_MASK) >> LINE_SHIFT])
        return int(self.tags.view[pfn])

    def _tag_line(self, line: int, tag: int) -> None:
        if self.tag(line) == tag:
            return
        pfn = line >> PAGE_SHIFT
        tags = list(self._mixed.get(pfn, (self.tags.view[pfn],) * LINES_PER_PAGE))
        tags[(line & PAGE_OFFSET_MASK) >> LINE_SHIFT] = tag
        self._mixed.put(pfn, tuple(tags))

    def _stored(self, line: int) -> bytes:
        base = self.frames.get(line & HPA_MASK)
        if base is None:
            return ZERO_PAGE[:LINE_SIZE]
        return self.words.read(base + ((line & PAGE_OFFSET_MASK) >> 3), LINE_SIZE >> 3)

    def ciphertext(self, line: int) -> bytes:
        """The 64 bytes that the memory holds for the line at `line`."""
        key, data = self.tag(line) & KEY, self._stored(line)
        return self.cipher.encipher(line, key, data) if key and self.encrypted else data

    def put_line(self, line: int, data: bytes, tag: int) -> None:
        """Give the line at `line` a content and a tag, past every check."""
        self.words.fill(self.frame(line) + ((line & PAGE_OFFSET_MASK) >> 3), data)
        self._tag_line(line, tag)

    def _seen(self, line: int, keyid: int) -> bytes:
        """A line as a reader sees it whose key it was not written with."""
        raw, key = self.ciphertext(line), self._tag_of.view[keyid] & KEY
        return self.cipher.decipher(line, key, raw) if key else raw

    def _read_line(self, line: int, keyid: int) -> bytes:
        if not self.is_ram(line):
            return ZERO_PAGE[:LINE_SIZE]
        tag = self.tag(line)
        if not self.encrypted or tag == self._tag_of.view[keyid]:
            return self._stored(line)
        if tag & POISON:
            raise MachineCheck(line)
        if keyid >= self.first_private and (self.has_mac or not tag & OWNED):
            self._tag_line(line, tag | POISON)
            raise MachineCheck(line)
        return self._seen(line, keyid)

    def _write_line(self, line: int, start: int, piece: bytes, keyid: int) -> None:
        if not self.is_ram(line):
            return
        old_tag, new_tag = self.tag(line), self._tag_of.view[keyid]
        data = bytearray(self._stored(line))
        if len(piece) != LINE_SIZE and self.encrypted and old_tag != new_tag:
            if old_tag & (OWNED | POISON):
                new_tag = old_tag | POISON
            else:
                data = bytearray(self._seen(line, keyid))
        data[start : start + len(piece)] = piece
        self.put_line(line, bytes(data), new_tag)


def _lines(hpa: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(line address, first byte, behind the last byte) for each line that `size` bytes at `hpa`
    touch.
    """
    end = hpa + size
    line = hpa & ~(LINE_SIZE - 1)
    while line < end:
        yield line, max(hpa - line, 0), min(end - line, LINE_SIZE)
        line += LINE_SIZE
