"""`tdxlab measure`: the MRTD of a firmware image, from a TD that is built with it.

    firmware = parse(image)
    launch(firmware)                   # MRTD as the module has it, 96 hex digits
    records(firmware, PER_SECTION)     # what a host of another sort does, call by call

The TD is built on the model with SEAMCALLs: TDH.MEM.PAGE.ADD for each page, TDH.MR.EXTEND for each
256 bytes of a page that is measured.

Source: Linux 6.16, KVM_TDX_INIT_MEM_REGION; QEMU, hw/i386/tdvf.c.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.arch import shared_bit
from tdxlab.host import Host
from tdxlab.host_td import MEASURED_CHUNK, HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.sizes import format_size
from tdxlab.tdvf import TD_HOB, Firmware, TdvfError, parse

#: Each page and at once its content; or all pages of a section, and then their content.
PER_PAGE = "per-page"
PER_SECTION = "per-section"
ORDERS = (PER_PAGE, PER_SECTION)

PAGE_ADD = "TDH.MEM.PAGE.ADD"
EXTEND = "TDH.MR.EXTEND"
#: Bytes that the name and the GPA of each call put into the hash.
BLOCK_SIZE = 128

#: Exit status where the MRTD is not the expected one.
EXIT_DIFFERENT = 1
#: Bytes, at most: of an image, and of the memory of all its sections that are added.
IMAGE_LIMIT = MEMORY_LIMIT = 1 << 26

#: Width of guest addresses; it is not in MRTD.
_GPAW = 48
_SHOWN_DIGITS = 16

#: Told (calls done, in all).
Progress = Callable[[int, int], None]


class Record(NamedTuple):
    """One call that the module measures.

    leaf: PAGE_ADD or EXTEND. section: its number. gpa: of the page, or of 256 bytes in it. content:
    the page's 4096 bytes, which are not hashed, or the 256 bytes, which are.
    """

    leaf: str
    section: int
    gpa: int
    content: bytes

    @property
    def hashed(self) -> int:
        """Bytes that go into the hash: 128 or 384."""
        return BLOCK_SIZE if self.leaf == PAGE_ADD else BLOCK_SIZE + MEASURED_CHUNK


def records(firmware: Firmware, order: str = PER_PAGE) -> list[Record]:
    """The calls of a host that adds `firmware`, section after section.

    order: PER_PAGE as KVM does it, PER_SECTION as older VMMs did. Refuses another one, and what
    `require_measurable` refuses: ValueError.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is not known; choose one of {', '.join(ORDERS)}")
    require_measurable(firmware)
    return [record for number in _added(firmware) for record in _of(firmware, number, order)]


def require_measurable(firmware: Firmware) -> None:
    """Refuse sections behind the end of private memory, more of them than MEMORY_LIMIT, and a
    measured TD_HOB, whose content the image does not have: TdvfError.
    """
    limit = 1 << shared_bit(_GPAW)
    sections = firmware.sections
    for number in _added(firmware):
        section = sections[number]
        if section.end > limit:
            raise TdvfError(
                f"section {number} ({section.name}) ends at GPA {section.end:#x}; private memory "
                f"of a TD with GPAW {_GPAW} ends at {limit:#x}"
            )
        if section.type == TD_HOB and section.is_measured:
            raise TdvfError(
                f"section {number} (TD_HOB) is measured, and its content is not in the image: "
                "the VMM makes it"
            )
    size = sum(sections[number].size for number in _added(firmware))
    if size > MEMORY_LIMIT:
        raise TdvfError(
            f"its sections have {size:#x} bytes of memory; at most {format_size(MEMORY_LIMIT)} "
            "can be added"
        )


def _added(firmware: Firmware) -> list[int]:
    return [number for number, section in enumerate(firmware.sections) if section.is_added]


def _of(firmware: Firmware, number: int, order: str) -> Iterator[Record]:
    """The calls for one section."""
    section = firmware.sections[number]
    pages = [
        [
            Record(PAGE_ADD, number, gpa, content),
            *(_extends(number, gpa, content) if section.is_measured else ()),
        ]
        for gpa, content in firmware.pages(section)
    ]
    if order == PER_SECTION:
        yield from (page.pop(0) for page in pages)
    yield from chain.from_iterable(pages)


def _extends(number: int, gpa: int, content: bytes) -> Iterator[Record]:
    for start in range(0, len(content), MEASURED_CHUNK):
        yield Record(EXTEND, number, gpa + start, content[start : start + MEASURED_CHUNK])


def launch(firmware: Firmware, order: str = PER_PAGE, *, progress: Progress | None = None) -> str:
    """Build a TD with `firmware` on a machine of its own; returns the MRTD that the module
    computed, 96 hex digits.

    Refuses what `records` refuses: ValueError. progress: told (calls done, in all).
    Differs: TD_HOB holds zeros, not the hand-off list; MRTD does not see it.
    """
    calls = records(firmware, order)
    td = HostTd(Host(booted_machine()), gpaw=_GPAW, max_vcpus=1)
    td.add_vcpu()
    for done, record in enumerate(calls, start=1):
        if record.leaf == PAGE_ADD:
            td.add_page(record.gpa, record.content)
        else:
            td.host.must(0, abi.TDH_MR_EXTEND, rcx=record.gpa, rdx=td.tdr)
        if progress is not None:
            progress(done, len(calls))
    td.finalize()
    return views.mrtd(td.host.machine, td.tdr)


# -- the command


class Measured(NamedTuple):
    """What the command found. expected: what MRTD should be, in lower case, None for anything."""

    path: Path
    order: str
    firmware: Firmware
    mrtd: str
    expected: str | None

    @property
    def is_different(self) -> bool:
        """There is an expected MRTD, and it is another one."""
        return self.expected not in (None, self.mrtd)


def read_firmware(path: Path) -> Firmware:
    """The image at `path`. Refuses one larger than IMAGE_LIMIT, and what `parse` and
    `require_measurable` refuse, with the path in the message: TdvfError; OSError as `open` does.
    """
    with path.open("rb") as file:
        image = file.read(IMAGE_LIMIT + 1)
    try:
        if len(image) > IMAGE_LIMIT:
            raise TdvfError(f"larger than {format_size(IMAGE_LIMIT)}; this is no firmware image")
        firmware = parse(image)
        require_measurable(firmware)
    except TdvfError as mistake:
        raise TdvfError(f"{path}: {mistake}") from None
    return firmware


def command(
    path: Path,
    order: str,
    expected: str | None,
    is_log: bool,
    is_json: bool,
    out: TextIO,
    progress: Progress | None = None,
) -> int:
    """Measure the image at `path` and print what was found; returns the exit status, 1 if the MRTD
    is not `expected` (None for anything). Refuses what `read_firmware` refuses.
    """
    firmware = read_firmware(path)
    found = Measured(path, order, firmware, launch(firmware, order, progress=progress), expected)
    log = records(firmware, order)
    lines = [as_json(found, log, is_log)] if is_json else as_text(found, log, is_log)
    print("\n".join(lines), file=out)
    return EXIT_DIFFERENT if found.is_different else 0


def as_json(found: Measured, log: Sequence[Record], is_log: bool) -> str:
    """One object on one line. log: null unless `is_log`; sha384 there is that of the measured
    bytes. expected: null if nothing is.
    """
    sections = [
        {
            "type": section.name,
            "gpa": section.gpa,
            "memory": section.size,
            "data": section.raw_size,
            "attributes": section.attributes,
        }
        for section in found.firmware.sections
    ]
    whole: dict[str, Any] = {
        "image": str(found.path),
        "bytes": len(found.firmware.image),
        "sections": sections,
        "order": found.order,
        "calls": Counter(record.leaf for record in log),
        "hashed": sum(record.hashed for record in log),
        "log": [_as_dict(record) for record in log] if is_log else None,
        "expected": found.expected,
        "mrtd": found.mrtd,
    }
    return json.dumps(whole)


def _as_dict(record: Record) -> dict[str, Any]:
    return {
        "call": record.leaf,
        "section": record.section,
        "gpa": record.gpa,
        "sha384": _digest(record) or None,
    }


def _digest(record: Record) -> str:
    """SHA-384 of the content if it is measured, else nothing."""
    return "" if record.leaf == PAGE_ADD else hashlib.sha384(record.content).hexdigest()


def as_text(found: Measured, log: Sequence[Record], is_log: bool) -> Iterator[str]:
    """Lines for people; the last is the MRTD alone."""
    yield f"{found.path}: {format_size(len(found.firmware.image))}"
    yield from _sections(found.firmware)
    yield ""
    if is_log:
        yield from (_line(found.firmware, record) for record in log)
        yield ""
    calls = Counter(record.leaf for record in log)
    counts = ", ".join(f"{calls[leaf]:,} {leaf}" for leaf in (PAGE_ADD, EXTEND))
    yield f"{found.order}: {counts}; {sum(record.hashed for record in log):,} bytes hashed"
    if found.expected:
        yield f"expected {found.expected}: {'another one' if found.is_different else 'equal'}"
    yield found.mrtd


def _sections(firmware: Firmware) -> Iterator[str]:
    yield f"{'section':<11}{'GPA':<14}{'memory':>10}{'data':>10}  in MRTD"
    for number, section in enumerate(firmware.sections):
        sizes = f"{format_size(section.size):>10}{format_size(section.raw_size):>10}"
        seen = "GPAs, content" if section.is_measured else "GPAs" if section.is_added else "nothing"
        yield f"{number} {section.name:<9}{section.gpa:<#14x}{sizes}  {seen}"


def _line(firmware: Firmware, record: Record) -> str:
    name = firmware.sections[record.section].name
    seen = _digest(record)[:_SHOWN_DIGITS]
    return f"{record.leaf:<18}{record.gpa:<#14x}{name:<10}{seen}".rstrip()
