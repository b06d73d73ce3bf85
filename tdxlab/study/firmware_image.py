"""A firmware image on the workbench: its sections, small changes to its file, its MRTD.

    image = small_firmware()
    Table(section_rows(image))
    Table(trials(image))            # what moves MRTD, and what does not

Source: as `tdxlab.tdvf`.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab import resources
from tdxlab.measure import PER_SECTION, launch
from tdxlab.study.measurement_log import EVERY_CHUNK, Image, Page
from tdxlab.tdvf import DESCRIPTOR, HEADER, Firmware, parse


class SectionRow(NamedTuple):
    """One section. memory, data: bytes. file_offset: of its data, "" without any."""

    section: int
    type: str
    gpa: int
    memory: int
    data: int
    file_offset: str
    in_mrtd: str


class TrialRow(NamedTuple):
    """One change. file_bytes: how many bytes of the file are other ones; measured: how many of them
    lie in a section whose content is measured.
    """

    what: str
    file_bytes: int
    measured: int
    mrtd: str


def small_firmware() -> bytes:
    """The image of 16 KiB that comes with tdxlab: TDVF metadata as real ones have, and text."""
    return (resources.data() / "tdvf" / "small.fd").read_bytes()


def section_rows(image: bytes) -> list[SectionRow]:
    """The sections of a TDVF image in the order of its metadata. Refuses what `parse` refuses."""
    return [
        SectionRow(
            number,
            section.name,
            section.gpa,
            section.size,
            section.raw_size,
            f"{section.offset:#x}" if section.raw_size else "",
            "GPAs and content"
            if section.is_measured
            else "GPAs"
            if section.is_added
            else "nothing",
        )
        for number, section in enumerate(parse(image).sections)
    ]


def image_of(firmware: Firmware) -> Image:
    """The pages that a host adds for `firmware`, for logs of them."""
    return tuple(
        Page(f"{number} {section.name}", gpa, content, EVERY_CHUNK if section.is_measured else ())
        for number, section in enumerate(firmware.sections)
        if section.is_added
        for gpa, content in firmware.pages(section)
    )


def flipped(image: bytes, offset: int) -> bytes:
    """The file with one byte inverted. Refuses an offset that it does not have: ValueError."""
    if not 0 <= offset < len(image):
        raise ValueError(f"byte {offset:#x} is not in the file; choose 0..{len(image) - 1:#x}")
    changed = bytearray(image)
    changed[offset] ^= 0xFF
    return bytes(changed)


def swapped(image: bytes, first: int, second: int) -> bytes:
    """The file with two sections exchanged in its metadata. Refuses one that is not there:
    ValueError.
    """
    firmware = parse(image)
    places = [_descriptor(firmware, number) for number in (first, second)]
    changed = bytearray(image)
    for place, source in zip(places, reversed(places), strict=True):
        changed[place] = image[source]
    return bytes(changed)


def _descriptor(firmware: Firmware, number: int) -> slice:
    """Where in the file the descriptor of a section stands."""
    if not 0 <= number < len(firmware.sections):
        raise ValueError(f"section {number}: this image has 0..{len(firmware.sections) - 1}")
    start = firmware.metadata + HEADER.size + number * DESCRIPTOR.size
    return slice(start, start + DESCRIPTOR.size)


def in_order(firmware: Firmware, order: tuple[int, ...]) -> Firmware:
    """The same file to a host that adds its sections in another order, each of them once.

    Refuses numbers that are not all sections: ValueError.
    """
    if sorted(order) != list(range(len(firmware.sections))):
        raise ValueError(f"order {order}: name each of 0..{len(firmware.sections) - 1} once")
    return firmware._replace(sections=tuple(firmware.sections[number] for number in order))


def trials(image: bytes) -> list[TrialRow]:
    """Changes to the file and to its host, and whether MRTD moves; each TD is built.

    image: code as section 0, variables as section 1, as in `small_firmware`.
    """
    firmware = parse(image)
    code, variables = firmware.sections[:2]
    others = tuple(range(2, len(firmware.sections)))
    changed = {
        "invert the first byte of the variables": flipped(image, variables.offset),
        "invert the first byte of the code": flipped(image, code.offset),
        "swap sections 0 and 1 in the metadata": swapped(image, 0, 1),
    }
    before = launch(firmware)
    rows = [
        _trial(what, image, other, launch(parse(other)), before) for what, other in changed.items()
    ]
    hosts = {
        "same file, section 1 added before section 0": launch(in_order(firmware, (1, 0, *others))),
        "same file, a section's pages added first": launch(firmware, PER_SECTION),
    }
    return rows + [_trial(what, image, image, after, before) for what, after in hosts.items()]


def _trial(what: str, image: bytes, other: bytes, after: str, before: str) -> TrialRow:
    offsets = [offset for offset, (a, b) in enumerate(zip(image, other, strict=True)) if a != b]
    measured = sum(is_measured(image, offset) for offset in offsets)
    return TrialRow(what, len(offsets), measured, "stays" if after == before else "changes")


def is_measured(image: bytes, offset: int) -> bool:
    """True if the byte at `offset` of the file is content that is measured."""
    return any(
        section.is_measured and section.offset <= offset < section.offset + section.raw_size
        for section in parse(image).sections
    )
