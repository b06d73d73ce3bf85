"""The parser of TDVF images: what it reads, what it refuses and in which order, and that it never
crashes.
"""

from __future__ import annotations

import struct
from random import Random

import pytest

from tdxlab import tdvf
from tdxlab.tdvf import Firmware, Section, TdvfError, parse
from tests.tdvf_image import (
    BEHIND_METADATA,
    BFV,
    CFV,
    FOOTER,
    METADATA_OFFSET,
    MR_EXTEND,
    PAGE_AUG,
    SMALL,
    SMALL_FILE,
    TEMP_MEM,
    Made,
    make_image,
    metadata_of,
)

IMAGE = make_image()
METADATA = metadata_of(SMALL)
#: Places in the image: the u16 of the whole table, of the foreign entry, of the metadata's entry.
TABLE_LENGTH = len(IMAGE) - 32 - 18
FOREIGN_LENGTH = TABLE_LENGTH - 18
OFFSET_LENGTH = FOREIGN_LENGTH - 20
OFFSET = OFFSET_LENGTH - 4


def patched(place: int, form: str, *values: int | bytes, image: bytes = IMAGE) -> bytes:
    """The small image with `values` packed at byte `place`."""
    changed = bytearray(image)
    struct.pack_into(form, changed, place, *values)
    return bytes(changed)


def with_section(number: int, **changes: int) -> bytes:
    """The small image with one section changed."""
    sections = list(SMALL)
    sections[number] = sections[number]._replace(**changes)
    return make_image(sections)


def complaint(image: bytes) -> str:
    """What the parser says to an image that it refuses."""
    with pytest.raises(TdvfError) as refused:
        parse(image)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- what it reads


def test_parse_gives_every_section_in_order() -> None:
    firmware = parse(IMAGE)
    assert firmware == Firmware(
        IMAGE,
        METADATA,
        tuple(
            Section(made.type, made.gpa, made.size, made.offset, made.raw_size, made.attributes)
            for made in SMALL
        ),
    )
    assert [section.name for section in firmware.sections] == ["BFV", "CFV", "TEMP_MEM", "TD_HOB"]
    assert [section.is_measured for section in firmware.sections] == [True, False, False, False]


def test_parse_reads_the_image_that_is_in_the_data() -> None:
    assert SMALL_FILE.read_bytes() == IMAGE


def test_pages_are_the_data_and_then_zeros() -> None:
    sections = (*SMALL[1:], Made(0x1010, 0x1234, 0xFFFF_D000, 0x3000, BFV))
    firmware = parse(make_image(sections))
    pages = list(firmware.pages(firmware.sections[-1]))
    assert [gpa for gpa, _ in pages] == [0xFFFF_D000, 0xFFFF_E000, 0xFFFF_F000]
    assert pages[0][1] == IMAGE[0x1010:0x2010]
    assert pages[1][1] == IMAGE[0x2010:0x2244] + bytes(4096 - 0x234)
    assert pages[2][1] == bytes(4096)
    assert list(firmware.pages(firmware.sections[1])) == [
        (0x81_0000, bytes(4096)),
        (0x81_1000, bytes(4096)),
    ]


@pytest.mark.parametrize(
    ("attributes", "is_added", "is_measured"),
    [(0, True, False), (MR_EXTEND, True, True), (PAGE_AUG, False, False), (3, False, False)],
)
def test_attributes_say_what_is_added_and_measured(
    attributes: int, is_added: bool, is_measured: bool
) -> None:
    for other_bits in (0, 0xFFFF_FFFC):
        section = parse(with_section(0, attributes=attributes | other_bits)).sections[0]
        assert (section.is_added, section.is_measured) == (is_added, is_measured)


def test_parse_takes_data_up_to_the_last_byte_and_memory_up_to_the_next_section() -> None:
    sections = parse(with_section(1, gpa=0xFFFF_C000, size=0x1000, offset=0x3000)).sections
    assert sections[1].end == sections[0].gpa


# -- what it refuses


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (b"", "footer GUID"),
        (bytes(32), "footer GUID"),
        (FOOTER + bytes(32), "footer GUID"),
        (bytes(1 << 16), "footer GUID"),
        (IMAGE[:-1], "footer GUID"),
        (patched(TABLE_LENGTH, "<H", 17), "claims 17 bytes"),
        (patched(TABLE_LENGTH, "<H", 0xFFFF), "claims 65535 bytes"),
        (patched(FOREIGN_LENGTH, "<H", 17), f"entry before byte {TABLE_LENGTH:#x} does not fit"),
        (patched(FOREIGN_LENGTH, "<H", 43), f"entry before byte {TABLE_LENGTH:#x} does not fit"),
        (patched(TABLE_LENGTH, "<H", 30), f"entry before byte {TABLE_LENGTH:#x} does not fit"),
        (bytes(5) + struct.pack("<H16s", 23, FOOTER) + bytes(32), "entry before byte 0x5 does not"),
        (patched(TABLE_LENGTH, "<H", 38), f"no entry {tdvf.METADATA_OFFSET}"),
        (patched(OFFSET_LENGTH + 2, "<Q", 0), f"no entry {tdvf.METADATA_OFFSET}"),
        (patched(OFFSET_LENGTH, "<H", 20), "has 2 bytes; 4 are right"),
        (patched(OFFSET, "<I", 15), "0xf bytes before the end"),
        (patched(OFFSET, "<I", 0), "0x0 bytes before the end"),
        (patched(OFFSET, "<I", len(IMAGE) + 1), "0x4001 bytes before the end"),
        (patched(OFFSET, "<I", len(IMAGE)), r"begin with b'smal'"),
        (patched(METADATA, "4s", b"TDVG"), r"begin with b'TDVG'"),
        (patched(METADATA + 4, "<I", 143), "claim 143 bytes; 4 sections have 144"),
        (patched(METADATA + 8, "<I", 2), "version 2"),
        (patched(METADATA + 12, "<I", 1), "sections: 1; at least 2"),
        (patched(METADATA + 12, "<I", 3), "claim 144 bytes; 3 sections have 112"),
        (patched(METADATA + 12, "<I", 0xFFFF_FFFF), "4294967295 sections"),
        (with_section(3, type=4), "section 3 is of type 4"),
        (with_section(2, raw_size=1), "section 2 (TEMP_MEM) has 0x1 bytes of data"),
        (with_section(3, raw_size=1), "section 3 (TD_HOB) has 0x1 bytes of data"),
        (with_section(0, raw_size=0), "section 0 (BFV) has 0x0 bytes of data"),
        (with_section(1, raw_size=0), "section 1 (CFV) has 0x0 bytes of data"),
        (with_section(0, offset=0x1001), "0x1001..0x4000 of an image of 0x4000 bytes"),
        (with_section(0, offset=0xFFFF_FFFF), "give the whole image"),
        (with_section(0, size=0x2FFF), "0x2fff bytes of memory for 0x3000 bytes of data"),
        (with_section(0, gpa=0xFFFF_D001), "multiples of 0x1000"),
        (with_section(2, size=0x1FFF), "multiples of 0x1000"),
        (with_section(2, size=0), "memory above 0"),
        (with_section(2, gpa=0x80_9000), "sections 2 (TEMP_MEM) and 3 (TD_HOB) overlap"),
        (with_section(3, gpa=0x81_1000), "overlap at GPA 0x811000"),
        (with_section(3, gpa=0x80_F000, size=0x4000), "sections 3 (TD_HOB) and 2 (TEMP_MEM)"),
        (with_section(1, gpa=0xFFFF_E000), "sections 0 (BFV) and 1 (CFV) overlap"),
    ],
)
def test_parse_refuses_what_is_damaged(image: bytes, word: str) -> None:
    assert word in complaint(image)


def test_parse_names_the_metadata_that_end_beyond_the_image() -> None:
    sections = (*SMALL, SMALL[0])
    image = make_image(sections)
    last = len(image) - 16
    image = patched(last, "<4sIII", b"TDVF", 176, 1, 5, image=image)
    image = patched(len(image) - BEHIND_METADATA, "<I", 16, image=image)
    assert f"end at byte {last + 176:#x} of 0x4000" in complaint(image)


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ((TABLE_LENGTH, "<H", 17), (OFFSET, "<I", 0), "claims 17 bytes"),
        ((OFFSET, "<I", 0), (METADATA, "4s", b"no"), "before the end"),
        ((METADATA, "4s", b"no"), (METADATA + 8, "<I", 0), "begin with"),
        ((METADATA + 8, "<I", 0), (METADATA + 12, "<I", 1), "version 0"),
        ((METADATA + 12, "<I", 1), (METADATA + 4, "<I", 0), "at least 2"),
        ((METADATA + 4, "<I", 0), (METADATA + 16 + 24, "<I", 9), "claim 0 bytes"),
        ((METADATA + 16 + 24, "<I", 9), (METADATA + 16 + 4, "<I", 0), "of type 9"),
        ((METADATA + 16 + 4, "<I", 0), (METADATA + 16 + 8, "<Q", 1), "has 0x0 bytes of data"),
        ((METADATA + 16 + 4, "<I", 0x9000), (METADATA + 16 + 16, "<Q", 1), "of an image of"),
        ((METADATA + 16 + 16, "<Q", 1), (METADATA + 16 + 8, "<Q", 1), "0x1 bytes of memory for"),
        ((METADATA + 16 + 8, "<Q", 1), (METADATA + 48 + 24, "<I", 9), "section 0 (BFV)"),
        ((METADATA + 48 + 24, "<I", 9), (METADATA + 16 + 8, "<Q", 0x81_0000), "section 1 is"),
    ],
)
def test_parse_names_the_earlier_of_two_faults(
    first: tuple[int, str, int], second: tuple[int, str, int], word: str
) -> None:
    assert word in complaint(patched(*first))
    assert word in complaint(patched(*second, image=patched(*first)))


def test_parse_takes_the_entry_nearest_to_the_footer() -> None:
    nearer = patched(FOREIGN_LENGTH + 2, "16s", METADATA_OFFSET)
    assert "has 2 bytes" in complaint(nearer)


# -- that it never crashes


def test_parse_refuses_every_truncated_image() -> None:
    for size in (*range(0, len(IMAGE), 61), *range(len(IMAGE) - 300, len(IMAGE))):
        complaint(IMAGE[:size])
        complaint(IMAGE[-size:] if size else b"")


def mutated(draw: Random) -> bytes:
    """The small image with one to four changes, mostly where its structure is."""
    image = bytearray(IMAGE)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(METADATA, len(image)) if draw.random() < 0.9 else draw.randrange(1, 256)
        kind = draw.randrange(4)
        if kind == 0:
            image[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            image[at : at + 4] = draw.choice((b"\0" * 4, b"\xff" * 4, b"\0\x10\0\0", b"\1\0\0\0"))
        elif kind == 2:
            del image[at : at + draw.randint(1, 64)]
        else:
            image[at:at] = draw.randbytes(draw.randint(1, 64))
    return bytes(image)


def test_parse_reads_or_refuses_ten_thousand_mutated_images() -> None:
    draw, read = Random(20), 0
    for _ in range(10_000):
        try:
            firmware = parse(mutated(draw))
        except TdvfError:
            continue
        read += 1
        for section in firmware.sections:
            assert section.offset + section.raw_size <= len(firmware.image)
            assert section.raw_size <= section.size
            assert section.type in (BFV, CFV, TEMP_MEM, tdvf.TD_HOB)
    assert 100 < read < 9_000
