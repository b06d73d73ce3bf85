"""Makes TDVF images, and says with hashlib alone what their MRTD is; knows nothing of tdxlab.

The small image has a variable store of one page and three pages of code, as text. Its file is made
again with `python -m tests.tdvf_image`, and a test holds the two against each other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

SMALL_FILE = Path(__file__).resolve().parent.parent / "data" / "tdvf" / "small.fd"
FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
METADATA_OFFSET = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
#: An entry that is nobody's business, as images have them for other platforms too.
FOREIGN = UUID("00000000-1111-2222-3333-444444444444").bytes_le

BFV, CFV, TD_HOB, TEMP_MEM = range(4)
MR_EXTEND, PAGE_AUG = 1, 2
RESET_VECTOR = b"reset vector".ljust(32, b"\0")
#: Bytes behind the metadata: two entries of the table, its length and footer, the reset vector.
BEHIND_METADATA = 22 + 20 + 18 + 32


class Made(NamedTuple):
    """A section, in the order of its descriptor."""

    offset: int
    raw_size: int
    gpa: int
    size: int
    type: int
    attributes: int = 0


#: As in Debian 12's OVMF.fd, with the same order, types and attributes, and fewer pages.
SMALL = (
    Made(0x1000, 0x3000, 0xFFFF_D000, 0x3000, BFV, MR_EXTEND),
    Made(0x0000, 0x1000, 0xFFFF_C000, 0x1000, CFV),
    Made(0, 0, 0x81_0000, 0x2000, TEMP_MEM),
    Made(0, 0, 0x80_9000, 0x1000, TD_HOB),
)


def metadata_of(sections: Sequence[Made], size: int = 0x4000) -> int:
    """Byte offset of the metadata of an image with these sections."""
    return size - BEHIND_METADATA - 16 - 32 * len(sections)


def make_image(sections: Sequence[Made] = SMALL, size: int = 0x4000) -> bytes:
    """An image of `size` bytes: text, then metadata, the table of GUIDs and the reset vector."""
    head = struct.pack("<4sIII", b"TDVF", 16 + 32 * len(sections), 1, len(sections))
    metadata = head + b"".join(struct.pack("<IIQQII", *section) for section in sections)
    entries = struct.pack("<IH16s", BEHIND_METADATA + len(metadata), 22, METADATA_OFFSET)
    entries += struct.pack("<2sH16s", b"xx", 20, FOREIGN)
    table = entries + struct.pack("<H16s", len(entries) + 18, FOOTER)
    end = metadata + table + RESET_VECTOR
    return _text(size)[: size - len(end)] + end


def _text(size: int) -> bytes:
    """Text that says of every 256 bytes where they are."""
    return b"".join(
        (b"small image, byte %#06x " % at).ljust(256, b".") for at in range(0, size, 256)
    )


def mrtd(image: bytes, sections: Sequence[Made] = SMALL, *, is_per_section: bool = False) -> str:
    """MRTD of an image with these sections, 96 hex digits."""
    total = hashlib.sha384()
    for section in sections:
        if section.attributes & PAGE_AUG:
            continue
        memory = image[section.offset : section.offset + section.raw_size]
        pages = list(_blocks(section, memory.ljust(section.size, b"\0")))
        if is_per_section:
            pages = [(add, b"") for add, _ in pages] + [(b"", extends) for _, extends in pages]
        for add, extends in pages:
            total.update(add + extends)
    return total.hexdigest()


def _blocks(section: Made, memory: bytes) -> Iterator[tuple[bytes, bytes]]:
    """What adding each page feeds to the hash, and what measuring it does."""
    for page in range(0, section.size, 4096):
        extends = b""
        if section.attributes & MR_EXTEND:
            for chunk in range(page, page + 4096, 256):
                extends += _block(b"MR.EXTEND", section.gpa + chunk) + memory[chunk : chunk + 256]
        yield _block(b"MEM.PAGE.ADD", section.gpa + page), extends


def _block(name: bytes, gpa: int) -> bytes:
    return name.ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104)


if __name__ == "__main__":
    SMALL_FILE.parent.mkdir(parents=True, exist_ok=True)
    SMALL_FILE.write_bytes(make_image())
