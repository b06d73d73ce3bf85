"""TDVF: the firmware image of a TD, and what it says about how it wants to be loaded.

    firmware = parse(image)
    for section in firmware.sections:
        section.name, section.is_measured, list(firmware.pages(section))

An image is searched from its end. Below the reset vector, its last 32 bytes, stands a table that is
read backwards, entry by entry; one entry tells where the TDVF metadata lie, and these list the
sections:

    ... | data, u16 length, GUID | data, u16 length, GUID | u16 length, footer GUID | reset vector

Source: edk2, OvmfPkg, IntelTdxMetadata.asm; QEMU, hw/i386/tdvf.c and pc_sysfw_ovmf.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple
from uuid import UUID

from tdxlab.arch import PAGE_SIZE

#: GUID under the table, and GUID of the entry with the place of the metadata.
FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
METADATA_OFFSET = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")

#: Bytes of the reset vector, behind the table.
RESET_VECTOR_SIZE = 32

SIGNATURE = b"TDVF"
VERSION = 1
#: An image has at least as many sections.
FEWEST_SECTIONS = 2

#: Types of sections: code, variables, the VMM's hand-off list, memory for the firmware's start.
BFV, CFV, TD_HOB, TEMP_MEM = range(4)
TYPE_NAMES = ("BFV", "CFV", "TD_HOB", "TEMP_MEM")
_WITH_DATA = (BFV, CFV)

#: Attributes: the content is measured; the pages come later, with TDH.MEM.PAGE.AUG.
MR_EXTEND = 1 << 0
PAGE_AUG = 1 << 1

#: Of the metadata: signature, length, version, number of sections; and then of each section the
#: offset and size of its data, GPA and size of its memory, type, attributes.
HEADER = struct.Struct("<4sIII")
DESCRIPTOR = struct.Struct("<IIQQII")

_GUID_SIZE = 16
_ENTRY_END = struct.Struct("<H16s")


class TdvfError(ValueError):
    """This is no TDVF image, or a damaged one."""


class Section(NamedTuple):
    """One section. offset, raw_size: where in the image its data are, in bytes; zeros follow them
    in memory.

    gpa: byte address of its place in the guest, 4 KiB aligned. size: bytes of memory, whole pages.
    attributes: MR_EXTEND, PAGE_AUG; other bits mean nothing.
    """

    type: int
    gpa: int
    size: int
    offset: int
    raw_size: int
    attributes: int

    @property
    def name(self) -> str:
        """Name of its type, such as "BFV"."""
        return TYPE_NAMES[self.type]

    @property
    def end(self) -> int:
        """First GPA behind it."""
        return self.gpa + self.size

    @property
    def is_added(self) -> bool:
        """Its pages are in the TD before it is finalised, so that their GPAs are measured."""
        return not self.attributes & PAGE_AUG

    @property
    def is_measured(self) -> bool:
        """Its content is measured too."""
        return self.is_added and bool(self.attributes & MR_EXTEND)


class Firmware(NamedTuple):
    """A TDVF image. metadata: byte offset of its metadata."""

    image: bytes
    metadata: int
    sections: tuple[Section, ...]

    def pages(self, section: Section) -> Iterator[tuple[int, bytes]]:
        """GPA and content, 4096 bytes, of each page of a section.

        Differs: a VMM fills TD_HOB with the hand-off list; here it holds zeros.
        """
        end = section.offset + section.raw_size
        for start in range(0, section.size, PAGE_SIZE):
            first = section.offset + start
            content = self.image[first : min(first + PAGE_SIZE, end)]
            yield section.gpa + start, content.ljust(PAGE_SIZE, b"\0")


def parse(image: bytes) -> Firmware:
    """The sections of a TDVF image, in the order of its metadata.

    Refuses, in order: no table or no entry for the metadata; metadata beyond the image; a wrong
    signature, version, number of sections or length; then of each section a type that does not
    exist, data where its type has none or none where it must have some, data beyond the image,
    memory below the size of its data, memory that is no whole pages or none at all; then sections
    that share a page: TdvfError.
    """
    offset = _metadata_offset(image)
    count = _section_count(image, offset)
    start = offset + HEADER.size
    sections = tuple(
        _section(image, number, start + number * DESCRIPTOR.size) for number in range(count)
    )
    _require_apart(sections)
    return Firmware(image, offset, sections)


# -- the table of GUIDs


def _metadata_offset(image: bytes) -> int:
    """Byte offset of the metadata."""
    for guid, data in _table(image):
        if guid == METADATA_OFFSET:
            if len(data) != 4:
                raise TdvfError(f"the offset of its metadata has {len(data)} bytes; 4 are right")
            from_end = int.from_bytes(data, "little")
            if not HEADER.size <= from_end <= len(image):
                raise TdvfError(
                    f"its metadata would begin {from_end:#x} bytes before the end of an image of "
                    f"{len(image):#x} bytes"
                )
            return len(image) - from_end
    raise TdvfError(
        f"this firmware is not made for TDX: its table has no entry {METADATA_OFFSET}; "
        "give an image with TDVF metadata"
    )


def _table(image: bytes) -> Iterator[tuple[UUID, bytes]]:
    """GUID and data of each entry of the table, from the last to the first."""
    end = len(image) - RESET_VECTOR_SIZE
    if end < _ENTRY_END.size or image[end - _GUID_SIZE : end] != FOOTER.bytes_le:
        raise TdvfError(
            f"this is no TDVF image: footer GUID {FOOTER} does not stand before its last "
            f"{RESET_VECTOR_SIZE} bytes; give a whole firmware image, such as OVMF.fd"
        )
    length, _ = _ENTRY_END.unpack_from(image, end - _ENTRY_END.size)
    if not _ENTRY_END.size <= length <= end:
        raise TdvfError(f"its table of GUIDs claims {length} bytes, of {end} that are there")
    start, end = end - length, end - _ENTRY_END.size
    while end > start:
        size, guid = _entry_end(image, start, end)
        yield guid, image[end - size : end - _ENTRY_END.size]
        end -= size


def _entry_end(image: bytes, start: int, end: int) -> tuple[int, UUID]:
    """Size and GUID of the entry that ends at byte `end` of a table that begins at `start`."""
    if end - start >= _ENTRY_END.size:
        size, guid = _ENTRY_END.unpack_from(image, end - _ENTRY_END.size)
        if _ENTRY_END.size <= size <= end - start:
            return size, UUID(bytes_le=guid)
    raise TdvfError(f"its table of GUIDs is damaged: the entry before byte {end:#x} does not fit")


# -- the metadata


def _section_count(image: bytes, offset: int) -> int:
    """Number of sections in the metadata at byte `offset`."""
    count: int
    signature, length, version, count = HEADER.unpack_from(image, offset)
    if signature != SIGNATURE:
        raise TdvfError(f"its metadata begin with {signature!r}; {SIGNATURE!r} is right")
    if version != VERSION:
        raise TdvfError(f"its metadata have version {version}; only {VERSION} is known")
    if count < FEWEST_SECTIONS:
        raise TdvfError(f"it has sections: {count}; at least {FEWEST_SECTIONS} are needed")
    right = HEADER.size + count * DESCRIPTOR.size
    if length != right:
        raise TdvfError(f"its metadata claim {length} bytes; {count} sections have {right}")
    if offset + length > len(image):
        raise TdvfError(f"its metadata end at byte {offset + length:#x} of {len(image):#x}")
    return count


def _section(image: bytes, number: int, place: int) -> Section:
    """Section `number`, whose descriptor stands at byte `place`."""
    offset, raw_size, gpa, size, kind, attributes = DESCRIPTOR.unpack_from(image, place)
    if kind >= len(TYPE_NAMES):
        raise TdvfError(f"section {number} is of type {kind}; only 0..{len(TYPE_NAMES) - 1} exist")
    name = f"section {number} ({TYPE_NAMES[kind]})"
    if (kind in _WITH_DATA) != bool(raw_size):
        must = "some" if kind in _WITH_DATA else "none"
        raise TdvfError(f"{name} has {raw_size:#x} bytes of data; its type must have {must}")
    if offset + raw_size > len(image):
        raise TdvfError(
            f"{name} has its data at {offset:#x}..{offset + raw_size - 1:#x} of an image of "
            f"{len(image):#x} bytes; give the whole image, code and variables together"
        )
    if size < raw_size:
        raise TdvfError(f"{name} has {size:#x} bytes of memory for {raw_size:#x} bytes of data")
    if gpa % PAGE_SIZE or size % PAGE_SIZE or not size:
        raise TdvfError(
            f"{name} has {size:#x} bytes of memory at GPA {gpa:#x}; both must be multiples of "
            f"{PAGE_SIZE:#x}, and memory above 0"
        )
    return Section(kind, gpa, size, offset, raw_size, attributes)


def _require_apart(sections: tuple[Section, ...]) -> None:
    """Refuse sections that share a page. Neighbours in order of their GPAs tell."""
    order = sorted(range(len(sections)), key=lambda number: sections[number].gpa)
    for low, high in pairwise(order):
        if sections[low].end > sections[high].gpa:
            raise TdvfError(
                f"sections {low} ({sections[low].name}) and {high} ({sections[high].name}) "
                f"overlap at GPA {sections[high].gpa:#x}"
            )
