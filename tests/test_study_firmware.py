"""The firmware file on the workbench: its table, its changes, and what they do to MRTD."""

from __future__ import annotations

import pytest

from tdxlab.measure import PER_PAGE, PER_SECTION, launch, records
from tdxlab.study.firmware_image import (
    flipped,
    image_of,
    in_order,
    is_measured,
    section_rows,
    small_firmware,
    swapped,
    trials,
)
from tdxlab.study.measurement_log import PAGE_BY_PAGE, SECTION_FIRST, log_of, mrtd
from tdxlab.tdvf import parse
from tests.tdvf_image import PAGE_AUG, SMALL, make_image

IMAGE = small_firmware()


def test_section_rows_say_what_the_metadata_say() -> None:
    rows = section_rows(IMAGE)
    assert [(row.gpa, row.memory, row.data) for row in rows] == [
        (made.gpa, made.size, made.raw_size) for made in SMALL
    ]
    assert [row.file_offset for row in rows] == ["0x1000", "0x0", "", ""]
    assert [row.in_mrtd for row in rows] == ["GPAs and content", "GPAs", "GPAs", "GPAs"]
    later = make_image((*SMALL[:3], SMALL[3]._replace(attributes=PAGE_AUG)))
    assert section_rows(later)[3].in_mrtd == "nothing"


@pytest.mark.parametrize(
    ("command", "study"), [(PER_PAGE, PAGE_BY_PAGE), (PER_SECTION, SECTION_FIRST)]
)
def test_image_of_has_the_log_that_the_command_has(command: str, study: str) -> None:
    firmware = parse(make_image((SMALL[0], *SMALL[2:], SMALL[1]._replace(attributes=PAGE_AUG))))
    log = log_of(image_of(firmware), study)
    calls = records(firmware, command)
    assert [(f"TDH.{record.call}", record.gpa) for record in log] == [
        (call.leaf, call.gpa) for call in calls
    ]
    assert mrtd(log) == launch(firmware, command)


def test_flipped_inverts_one_byte() -> None:
    other = flipped(IMAGE, 0x1234)
    assert other[0x1234] == IMAGE[0x1234] ^ 0xFF
    assert other[:0x1234] + IMAGE[0x1234:0x1235] + other[0x1235:] == IMAGE


def test_swapped_exchanges_two_sections_and_nothing_else() -> None:
    other = swapped(IMAGE, 3, 0)
    assert other == make_image((SMALL[3], *SMALL[1:3], SMALL[0]))[: len(IMAGE)]
    assert swapped(IMAGE, 2, 2) == IMAGE


def test_in_order_leaves_the_file_alone() -> None:
    firmware = in_order(parse(IMAGE), (3, 1, 0, 2))
    assert firmware.image == IMAGE
    assert [section.name for section in firmware.sections] == ["TD_HOB", "CFV", "BFV", "TEMP_MEM"]


def test_wrong_places_are_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match=r"byte 0x4000 .* 0\.\.0x3fff"):
        flipped(IMAGE, len(IMAGE))
    with pytest.raises(ValueError, match=r"byte -0x1 "):
        flipped(IMAGE, -1)
    for number in (4, -1):
        with pytest.raises(ValueError, match=rf"section {number}: this image has 0\.\.3"):
            swapped(IMAGE, 0, number)
    for order in ((0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"name each of 0\.\.3 once"):
            in_order(parse(IMAGE), order)


def test_trials_count_bytes_and_build_each_td() -> None:
    rows = trials(IMAGE)
    assert [row.mrtd for row in rows] == ["stays"] + 4 * ["changes"]
    assert [row.file_bytes for row in rows[:2]] == [1, 1]
    assert [row.measured for row in rows[:2]] == [0, 1]
    assert rows[2].measured == rows[2].file_bytes > 0
    assert [row.file_bytes for row in rows[3:]] == [0, 0]


@pytest.mark.parametrize(("offset", "expected"), [(0xFFF, False), (0x1000, True), (0x3FFF, True)])
def test_is_measured_knows_the_bytes_of_the_code(offset: int, expected: bool) -> None:
    assert is_measured(IMAGE, offset) is expected
