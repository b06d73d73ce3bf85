"""`tdxlab measure`: the module's MRTD of an image against hashlib's, and the command around it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tdxlab import measure
from tdxlab.cli import main
from tdxlab.machine import Machine
from tdxlab.measure import PER_PAGE, PER_SECTION, launch, records
from tdxlab.tdvf import TdvfError, parse
from tests.tdvf_image import (
    BFV,
    CFV,
    MR_EXTEND,
    PAGE_AUG,
    SMALL,
    SMALL_FILE,
    TD_HOB,
    TEMP_MEM,
    Made,
    make_image,
    mrtd,
)

IMAGE = make_image()
#: Sections that test every rule: measured, zeros behind the data, added later, out of order.
MIXED = (
    Made(0x0100, 0x0F01, 0x7000_0000, 0x2000, CFV, MR_EXTEND),
    Made(0x0000, 0x1000, 0x1000, 0x1000, BFV, PAGE_AUG | MR_EXTEND),
    Made(0x0000, 0x0001, 0x7FFF_FFFF_F000, 0x1000, BFV),
    Made(0, 0, 0, 0x1000, TEMP_MEM, MR_EXTEND),
)
OVMF = Path("/usr/share/ovmf/OVMF.fd")


# -- what the module computes


@pytest.mark.parametrize("sections", [SMALL, SMALL[::-1], MIXED])
@pytest.mark.parametrize("order", [PER_PAGE, PER_SECTION])
def test_launch_gives_the_mrtd_that_hashlib_gives(sections: tuple[Made, ...], order: str) -> None:
    image = make_image(sections)
    expected = mrtd(image, sections, is_per_section=order == PER_SECTION)
    assert launch(parse(image), order) == expected


def test_the_orders_give_one_image_two_mrtds() -> None:
    assert mrtd(IMAGE) != mrtd(IMAGE, is_per_section=True)


def test_launch_gives_what_kvm_measures() -> None:
    firmware = parse(IMAGE)
    machine = Machine(memory="1 GiB")
    td = machine.create_td(memory="4 MiB", launch=False)
    for section in firmware.sections:
        td.add_memory(section.gpa, section.size)
        content = b"".join(content for _, content in firmware.pages(section))
        td.add_image(section.gpa, content, measure=section.is_measured)
    td.finalize()
    assert td.tdr is not None
    assert measure.views.mrtd(machine, td.tdr) == launch(firmware)


@pytest.mark.parametrize(("offset", "moves"), [(0x0FFF, False), (0x1000, True), (0x3FFF, True)])
def test_a_flipped_byte_moves_mrtd_only_where_content_is_measured(offset: int, moves: bool) -> None:
    changed = bytearray(IMAGE)
    changed[offset] ^= 0x80
    assert (launch(parse(bytes(changed))) != launch(parse(IMAGE))) is moves


def test_records_are_the_calls_in_their_order() -> None:
    firmware = parse(make_image(MIXED))
    by_page, by_section = records(firmware), records(firmware, PER_SECTION)
    assert Counter(by_page) == Counter(by_section)
    assert Counter(record.leaf for record in by_page) == {measure.PAGE_ADD: 4, measure.EXTEND: 48}
    leaves = [record.leaf for record in by_section]
    assert leaves[:3] == [measure.PAGE_ADD, measure.PAGE_ADD, measure.EXTEND]
    assert by_page[1:3] == [
        measure.Record(measure.EXTEND, 0, 0x7000_0000, IMAGE[0x100:0x200]),
        measure.Record(measure.EXTEND, 0, 0x7000_0100, IMAGE[0x200:0x300]),
    ]
    assert [record.hashed for record in by_page[:2]] == [128, 384]
    assert {record.section for record in by_page} == {0, 2, 3}


def test_launch_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    launch(parse(IMAGE), progress=lambda *now: told.append(now))
    assert told == [(done, 55) for done in range(1, 56)]


@pytest.mark.parametrize(
    ("number", "changes", "word"),
    [
        (2, {"gpa": (1 << 47) - 0x1000}, "ends at GPA 0x800000001000"),
        (2, {"gpa": (1 << 64) - 0x1000}, "ends at GPA 0x10000000000001000"),
        (2, {"gpa": 1 << 40, "size": 1 << 63}, "ends at GPA 0x8000010000000000"),
        (2, {"gpa": 1 << 40, "size": 1 << 40}, "at most 64 MiB"),
        (2, {"gpa": 1 << 40, "size": (1 << 26) - 0x4000}, "at most 64 MiB"),
        (3, {"attributes": MR_EXTEND}, "section 3 (TD_HOB) is measured"),
    ],
)
def test_records_refuses_what_cannot_be_added(
    number: int, changes: dict[str, int], word: str
) -> None:
    sections = list(SMALL)
    sections[number] = sections[number]._replace(**changes)
    with pytest.raises(TdvfError, match=word.replace("(", r"\(").replace(")", r"\)")):
        records(parse(make_image(sections)))


def test_records_takes_memory_of_any_size_that_comes_later() -> None:
    later = Made(0, 0, 1 << 40, 1 << 46, TEMP_MEM, PAGE_AUG)
    hob = Made(0, 0, 1 << 30, 1 << 12, TD_HOB, PAGE_AUG | MR_EXTEND)
    image = make_image((*SMALL, later, hob))
    assert launch(parse(image)) == mrtd(image, (*SMALL, later, hob))


def test_records_refuses_another_order() -> None:
    with pytest.raises(ValueError, match="'backwards' is not known; choose one of per-page"):
        records(parse(IMAGE), "backwards")


# -- the command


def measured(*arguments: str | Path) -> int:
    return main(["measure", *map(str, arguments)])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    """The lines of a command that succeeds."""
    assert measured(*arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out.splitlines()


def test_command_prints_sections_and_at_last_the_bare_mrtd(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, SMALL_FILE)
    assert lines[0] == f"{SMALL_FILE}: 16 KiB"
    assert lines[2].split() == ["0", "BFV", "0xffffd000", *("12", "KiB") * 2, "GPAs,", "content"]
    assert lines[4].split() == ["2", "TEMP_MEM", "0x810000", "8", "KiB", "0", "B", "GPAs"]
    counts = "7 TDH.MEM.PAGE.ADD, 48 TDH.MR.EXTEND; 19,328 bytes hashed"
    assert lines[-2:] == [f"per-page: {counts}", mrtd(IMAGE)]
    other = printed(capsys, SMALL_FILE, "--order", "per-section")
    assert other[-2:] == [f"per-section: {counts}", mrtd(IMAGE, is_per_section=True)]


def test_command_says_of_sections_that_come_later_that_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed.fd").write_bytes(make_image(MIXED))
    assert printed(capsys, tmp_path / "mixed.fd")[3].endswith("4 KiB     4 KiB  nothing")


def test_command_prints_each_record_with_the_digest_of_what_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, SMALL_FILE, "--log")
    assert lines[7].split() == ["TDH.MEM.PAGE.ADD", "0xffffd000", "BFV"]
    digest = hashlib.sha384(IMAGE[0x1000:0x1100]).hexdigest()
    assert lines[8].split() == ["TDH.MR.EXTEND", "0xffffd000", "BFV", digest[:16]]
    assert lines[7 + 54].split() == ["TDH.MEM.PAGE.ADD", "0x809000", "TD_HOB"]
    assert lines[-1] == mrtd(IMAGE)


def test_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed(capsys, SMALL_FILE, "--json")
    found = json.loads(line)
    assert found["mrtd"] == mrtd(IMAGE)
    assert found["calls"] == {"TDH.MEM.PAGE.ADD": 7, "TDH.MR.EXTEND": 48}
    assert (found["bytes"], found["hashed"], found["order"]) == (16384, 19328, "per-page")
    sizes = {"memory": 0x3000, "data": 0x3000}
    assert found["sections"][0] == sizes | {"type": "BFV", "gpa": 0xFFFF_D000, "attributes": 1}
    assert (found["log"], found["expected"]) == (None, None)


def test_command_puts_the_log_into_the_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed(capsys, SMALL_FILE, "--json", "--log", "--expect", mrtd(IMAGE))
    found = json.loads(line)
    assert len(found["log"]) == 55
    added = {"call": "TDH.MEM.PAGE.ADD", "section": 0, "gpa": 0xFFFF_D000, "sha384": None}
    assert found["log"][0] == added
    assert found["log"][1]["sha384"] == hashlib.sha384(IMAGE[0x1000:0x1100]).hexdigest()
    assert found["expected"] == found["mrtd"]


def test_command_compares_with_an_expected_mrtd(capsys: pytest.CaptureFixture[str]) -> None:
    right = mrtd(IMAGE)
    lines = printed(capsys, SMALL_FILE, "--expect", right.upper())
    assert lines[-2:] == [f"expected {right}: equal", right]
    other = "0" + right[1:]
    assert other != right
    assert measured(SMALL_FILE, "--expect", other) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"expected {other}: another one", right]


@pytest.mark.parametrize("text", ["", "abc", "g" * 96, "0" * 95, "0" * 97, "\u0660" * 96])
def test_command_refuses_what_is_no_mrtd(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        measured(SMALL_FILE, "--expect", text)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "give an MRTD, 96 hex digits" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no TDVF image"),
        (IMAGE[:-1], "no TDVF image"),
        (IMAGE[0x1000:], "give the whole image"),
        (make_image((SMALL[0], SMALL[0])), "overlap"),
        (make_image((SMALL[0], SMALL[2]._replace(gpa=1 << 40, size=1 << 60))), "GPAW 48"),
        (make_image((SMALL[0], SMALL[2]._replace(gpa=1 << 40, size=1 << 40))), "64 MiB"),
    ],
)
def test_command_complains_in_one_line_about_a_damaged_image(
    content: bytes, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.fd"
    path.write_bytes(content)
    assert measured(path) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"tdxlab: {path}: ")
    assert output.err.count("\n") == 1
    assert word in output.err


def test_command_complains_about_a_file_that_is_not_there_a_folder_and_a_huge_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "IMAGE_LIMIT", len(IMAGE) - 1)
    for path, word in (
        (tmp_path / "none.fd", "No such file"),
        (tmp_path, "Is a directory"),
        (SMALL_FILE, "larger than"),
    ):
        assert measured(path) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"tdxlab: {path}: {word}")
        assert error.count("\n") == 1


def test_launch_measures_or_refuses_mutated_sections() -> None:
    draw, built = Random(11), 0
    for _ in range(300):
        sections = list(SMALL)
        number = draw.randrange(len(sections))
        field = draw.choice(Made._fields)
        value = draw.choice((0, 1, 2, 3, 0x1000, 0x80_0000, 1 << 26, 1 << 31))
        sections[number] = sections[number]._replace(**{field: value})
        image = make_image(sections)
        try:
            firmware = parse(image)
            records(firmware)
        except TdvfError:
            continue
        if built < 12:
            built += 1
            assert launch(firmware) == mrtd(image, sections)
    assert built == 12


# -- a real image


def test_launch_measures_the_installed_ovmf_image() -> None:
    if not OVMF.is_file():
        pytest.skip(f"{OVMF} is not there: Debian's package ovmf is not installed")
    image = OVMF.read_bytes()
    if b"TDVF" not in image:
        pytest.skip(f"{OVMF} is not made for TDX")
    firmware = parse(image)
    sections = [
        Made(section.offset, section.raw_size, section.gpa, section.size, *section[::5])
        for section in firmware.sections
    ]
    for order in (PER_PAGE, PER_SECTION):
        assert launch(firmware, order) == mrtd(image, sections, is_per_section=order == PER_SECTION)
