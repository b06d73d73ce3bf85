"""MRTD from a log, with `hashlib` alone: what a verifier does who never sees the machine.

    log = log_of(image)               # the records of a host that adds `image`
    mrtd(log)                         # 96 hex digits

A record is what one call feeds to SHA-384, in whole blocks of 128 bytes:

    MEM.PAGE.ADD   name, 16 bytes | GPA, 8 bytes little endian | 104 zeros
    MR.EXTEND      name, 16 bytes | GPA, 8 bytes little endian | 104 zeros | 256 bytes of the page

Nothing here asks the model of the module: names and sizes stand here a second time, so that two
independent computations can be held against each other.

Source: TDX module 1.5.01, tdh_mem_page_add.c, tdh_mr_extend.c, tdh_mr_finalize.c.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

PAGE_ADD = "MEM.PAGE.ADD"
EXTEND = "MR.EXTEND"
BLOCK_SIZE = 128
PAGE_SIZE = 4096
CHUNK_SIZE = 256
CHUNKS = PAGE_SIZE // CHUNK_SIZE
EVERY_CHUNK = tuple(range(CHUNKS))

#: Orders of the calls: each page and then its chunks, or first all pages of a section.
PAGE_BY_PAGE = "page by page"
SECTION_FIRST = "section first"
ORDERS = (PAGE_BY_PAGE, SECTION_FIRST)


class Page(NamedTuple):
    """One page of an image.

    section: name of the part it belongs to. gpa: byte address, 4 KiB aligned. content: at most 4096
    bytes, zeros behind. chunks: numbers (0..15) of the 256-byte chunks to be measured, in the order
    of the calls.
    """

    section: str
    gpa: int
    content: bytes = b""
    chunks: tuple[int, ...] = EVERY_CHUNK

    def chunk(self, number: int) -> bytes:
        """The 256 bytes of chunk `number`."""
        start = number * CHUNK_SIZE
        return self.content.ljust(PAGE_SIZE, b"\0")[start : start + CHUNK_SIZE]


Image = tuple[Page, ...]


class Record(NamedTuple):
    """What one call adds to the measurement. page: place of its page in the image; chunk: number of
    the chunk, None for PAGE_ADD; content: the 256 bytes of the chunk.
    """

    call: str
    gpa: int
    page: int
    chunk: int | None = None
    content: bytes = b""

    @property
    def data(self) -> bytes:
        """The bytes that are hashed: 128 or 384."""
        name = self.call.encode().ljust(16, b"\0")
        head = name + self.gpa.to_bytes(8, "little")
        return head.ljust(BLOCK_SIZE, b"\0") + self.content


def log_of(image: Image, order: str = PAGE_BY_PAGE) -> list[Record]:
    """The records of a host that adds `image`. order: one of ORDERS.

    A section is a run of neighbours with the same name. Refuses another order: ValueError.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is not known; choose one of {', '.join(ORDERS)}")
    if order == PAGE_BY_PAGE:
        return [record for place in range(len(image)) for record in _whole(image, place)]
    return [record for section in sections(image) for record in _adds_first(image, section)]


def sections(image: Image) -> Iterator[list[int]]:
    """The places of the pages of each section, in order."""
    for _, places in groupby(range(len(image)), key=lambda place: image[place].section):
        yield list(places)


def _whole(image: Image, place: int) -> list[Record]:
    return [_add(image, place), *_extends(image, place)]


def _adds_first(image: Image, section: list[int]) -> list[Record]:
    adds = [_add(image, place) for place in section]
    return adds + [record for place in section for record in _extends(image, place)]


def _add(image: Image, place: int) -> Record:
    return Record(PAGE_ADD, image[place].gpa, place)


def _extends(image: Image, place: int) -> list[Record]:
    page = image[place]
    return [
        Record(EXTEND, page.gpa + number * CHUNK_SIZE, place, number, page.chunk(number))
        for number in page.chunks
    ]


def hashed(log: Iterable[Record]) -> bytes:
    """Everything that is fed to SHA-384, one record behind the other."""
    return b"".join(record.data for record in log)


def mrtd(log: Iterable[Record]) -> str:
    """MRTD after the records of `log`: SHA-384 as 96 hex digits."""
    return hashlib.sha384(hashed(log)).hexdigest()


def extend_rtmr(rtmr: bytes, value: bytes) -> bytes:
    """An RTMR after it was extended by `value`; 48 bytes each."""
    return hashlib.sha384(rtmr + value).digest()


# -- a small image, and ways to change one


def _text_page(section: str, number: int) -> bytes:
    """A page that says of each chunk which one it is."""
    labels = (f"{section} page {number}, chunk {chunk:2} " for chunk in range(CHUNKS))
    return b"".join(label.encode().ljust(CHUNK_SIZE, b".") for label in labels)


#: Four pages at the addresses, and measured or not, as in the sections of Debian 12's OVMF.fd: two
#: of the firmware's code (BFV), one of its variables (CFV), one of the hand-off list (TD_HOB).
#: Source: package ovmf 2022.11-6+deb12u2, TDVF metadata. Differs: one or two pages of each section,
#: the sections without pages of their own left out, and text instead of the real bytes.
SMALL_IMAGE: Image = (
    Page("BFV", 0xFFE2_0000, _text_page("BFV", 0)),
    Page("BFV", 0xFFE2_1000, _text_page("BFV", 1)),
    Page("CFV", 0xFFE0_0000, _text_page("CFV", 0), chunks=()),
    Page("TD_HOB", 0x80_9000, _text_page("TD_HOB", 0), chunks=()),
)


def replaced(image: Image, place: int, *pages: Page) -> Image:
    """`image` with `pages` (none, one or more) instead of the one at `place`."""
    _require_place(image, place)
    return (*image[:place], *pages, *image[place + 1 :])


def flip_byte(image: Image, place: int, offset: int) -> Image:
    """`image` with one byte of a page inverted. offset: 0..4095, else a ValueError."""
    if not 0 <= offset < PAGE_SIZE:
        raise ValueError(f"offset {offset} is not in a page; choose 0..{PAGE_SIZE - 1}")
    _require_place(image, place)
    content = bytearray(image[place].content.ljust(PAGE_SIZE, b"\0"))
    content[offset] ^= 0xFF
    return replaced(image, place, image[place]._replace(content=bytes(content)))


def swap_with_next(image: Image, place: int) -> Image:
    """`image` with the pages at `place` and behind it exchanged; the last changes with the
    first.
    """
    _require_place(image, place)
    other = (place + 1) % len(image)
    pages = list(image)
    pages[place], pages[other] = pages[other], pages[place]
    return tuple(pages)


def move_page(image: Image, place: int, gpa: int) -> Image:
    """`image` with one page at another GPA. Refuses one that another page has: ValueError."""
    _require_place(image, place)
    if any(page.gpa == gpa for number, page in enumerate(image) if number != place):
        raise ValueError(f"GPA {gpa:#x} is taken by another page; choose a free one")
    return replaced(image, place, image[place]._replace(gpa=gpa))


def measure_chunks(image: Image, place: int, chunks: tuple[int, ...]) -> Image:
    """`image` with other chunks of one page measured, in the order given."""
    if not set(chunks) <= set(EVERY_CHUNK):
        raise ValueError(f"chunks {chunks} are not all in 0..{CHUNKS - 1}")
    _require_place(image, place)
    return replaced(image, place, image[place]._replace(chunks=chunks))


def _require_place(image: Image, place: int) -> None:
    if not 0 <= place < len(image):
        raise ValueError(f"page {place}: this image has {len(image)} pages, counted from 0")
