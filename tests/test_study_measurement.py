"""The measurement log, launches, their changes and their pictures, against module and hashlib."""

import hashlib
import re

import pytest

from tdxlab.seam import measure
from tdxlab.study import launch_changes as changes
from tdxlab.study import measurement_views as drawn
from tdxlab.study.measured_launch import (
    TD_INFO,
    Recipe,
    build,
    build_on,
    bytes_by_leaf,
    digests,
    records_done,
    running_digest,
)
from tdxlab.study.measurement_log import (
    EXTEND,
    ORDERS,
    PAGE_ADD,
    SECTION_FIRST,
    SMALL_IMAGE,
    Image,
    Page,
    Record,
    extend_rtmr,
    flip_byte,
    hashed,
    log_of,
    measure_chunks,
    move_page,
    mrtd,
    replaced,
    swap_with_next,
)
from tdxlab.study.recorded_mrtd import recorded_rows, recorded_tds
from tdxlab.study.report_layout import FIELDS, field

EMPTY_SHA384 = hashlib.sha384(b"").hexdigest()
TWO_PAGES: Image = (Page("A", 0x4000_0000, b"one"), Page("A", 0x4000_1000, b"two"))


# -- records, byte by byte


def test_page_add_record_is_one_block_without_content() -> None:
    data = Record(PAGE_ADD, 0xFFE2_0000, 0).data
    assert len(data) == 128
    assert data[:16] == b"MEM.PAGE.ADD\0\0\0\0"
    assert data[16:24] == bytes.fromhex("0000e2ff00000000")
    assert data[24:] == bytes(104)


def test_extend_record_is_three_blocks_with_the_chunk() -> None:
    content = bytes(range(256))
    data = Record(EXTEND, 0x4000_0100, 0, 1, content).data
    assert len(data) == 384
    assert data[:16] == b"MR.EXTEND\0\0\0\0\0\0\0"
    assert data[16:24] == (0x4000_0100).to_bytes(8, "little")
    assert data[24:128] == bytes(104)
    assert data[128:] == content


def test_names_and_sizes_are_those_of_the_module() -> None:
    assert PAGE_ADD.encode() == measure.PAGE_ADD_NAME
    assert EXTEND.encode() == measure.EXTEND_NAME
    assert drawn.CHUNKS * 256 == 4096
    assert measure.CHUNK_SIZE == 256


@pytest.mark.parametrize("name", [PAGE_ADD, EXTEND])
def test_head_of_a_record_equals_the_module_s_block(name: str) -> None:
    gpa = 0x1_2345_6700
    assert Record(name, gpa, 0).data == measure.measured_block(name.encode(), gpa)


def test_log_of_page_by_page_adds_then_extends_each() -> None:
    log = log_of(TWO_PAGES)
    assert [record.call for record in log] == ([PAGE_ADD] + [EXTEND] * 16) * 2
    assert [record.gpa for record in log[1:17]] == list(range(0x4000_0000, 0x4000_1000, 256))
    assert log[1].content.startswith(b"one\0")


def test_log_of_section_first_adds_all_of_a_section() -> None:
    image = (*TWO_PAGES, Page("B", 0x5000_0000, chunks=(3,)))
    calls = [record.call for record in log_of(image, SECTION_FIRST)]
    assert calls == [PAGE_ADD] * 2 + [EXTEND] * 32 + [PAGE_ADD, EXTEND]


def test_log_of_refuses_an_unknown_order() -> None:
    with pytest.raises(ValueError, match="section first"):
        log_of(TWO_PAGES, "at random")


def test_mrtd_of_nothing_is_sha384_of_nothing() -> None:
    assert mrtd([]) == EMPTY_SHA384
    assert hashed(log_of(TWO_PAGES))[:128] == log_of(TWO_PAGES)[0].data


def test_extend_rtmr_hashes_old_value_and_new() -> None:
    assert extend_rtmr(bytes(48), b"x" * 48) == hashlib.sha384(bytes(48) + b"x" * 48).digest()


# -- the real module's code


def test_recorded_mrtds_are_what_hashlib_gives() -> None:
    rows = recorded_rows()
    assert len(rows) == 16
    assert {row.hashlib for row in rows} == {"equal"}
    assert {row.gpaw for row in rows} == {48, 52}


def test_recorded_mrtd_notices_a_single_wrong_byte() -> None:
    td = next(td for td in recorded_tds() if td.what == "one_page_extend")
    spoiled = [*td.log[:-1], td.log[-1]._replace(content=bytes(256))]
    assert mrtd(td.log) == td.mrtd != mrtd(spoiled)


# -- changes of an image


def test_flip_byte_changes_one_byte() -> None:
    flipped = flip_byte(SMALL_IMAGE, 0, 300)
    before, after = SMALL_IMAGE[0].content, flipped[0].content
    assert [i for i in range(4096) if before[i] != after[i]] == [300]
    assert flipped[1:] == SMALL_IMAGE[1:]


@pytest.mark.parametrize("offset", [-1, 4096])
def test_flip_byte_refuses_an_offset_outside_the_page(offset: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.4095"):
        flip_byte(SMALL_IMAGE, 0, offset)


@pytest.mark.parametrize("place", [-1, 4])
def test_edits_refuse_a_page_that_is_not_there(place: int) -> None:
    for edit in (
        lambda: flip_byte(SMALL_IMAGE, place, 0),
        lambda: swap_with_next(SMALL_IMAGE, place),
        lambda: move_page(SMALL_IMAGE, place, 0x1000),
        lambda: measure_chunks(SMALL_IMAGE, place, ()),
        lambda: replaced(SMALL_IMAGE, place),
    ):
        with pytest.raises(ValueError, match="4 pages"):
            edit()


def test_move_page_refuses_a_taken_address() -> None:
    with pytest.raises(ValueError, match="0xffe21000 is taken"):
        move_page(SMALL_IMAGE, 0, 0xFFE2_1000)


def test_measure_chunks_refuses_chunks_beyond_the_page() -> None:
    with pytest.raises(ValueError, match=r"0\.\.15"):
        measure_chunks(SMALL_IMAGE, 0, (16,))


def test_swap_with_next_of_the_last_page_takes_the_first() -> None:
    assert swap_with_next(TWO_PAGES, 1) == TWO_PAGES[::-1]


# -- launches


@pytest.mark.parametrize("gpaw", [48, 52])
@pytest.mark.parametrize("order", ORDERS)
def test_module_and_log_agree(gpaw: int, order: str) -> None:
    built = build(Recipe(gpaw=gpaw, order=order))
    assert built.mrtd() == mrtd(built.log)
    assert built.agrees()


def test_agrees_notices_a_log_of_another_image() -> None:
    built = build(Recipe())
    assert not built._replace(log=built.log[:-1]).agrees()


def test_an_empty_td_has_the_mrtd_of_nothing() -> None:
    assert build(Recipe(image=())).mrtd() == EMPTY_SHA384


def test_the_running_digest_agrees_with_the_log_at_every_call() -> None:
    built = build(Recipe())
    actions = [action for action, _ in digests(built)]
    for number, (_, digest) in enumerate(digests(built), start=1):
        expected = mrtd(built.log[: records_done(actions[:number])])
        assert digest in (expected, None)
    assert built.tape.position == len(built.tape)


def test_the_running_digest_is_none_before_init_and_looking_changes_nothing() -> None:
    built = build(Recipe())
    for position in (0, 1, 5):
        built.tape.seek(position)
        before = built.tape.machine.digest()
        assert running_digest(built.tape.machine, built.td.tdr) is None
        assert built.tape.machine.digest() == before


def test_bytes_by_leaf_only_two_leaves_move_the_hash() -> None:
    rows = {row.leaf: row for row in bytes_by_leaf(build(Recipe()))}
    assert rows["TDH.MEM.PAGE.ADD"][1:] == (4, 4, 4 * 128)
    assert rows["TDH.MR.EXTEND"][1:] == (32, 32, 32 * 384)
    others = [row for row in rows.values() if row.leaf not in ("TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND")]
    assert {row.leaf for row in others} >= {"TDH.MEM.SEPT.ADD", "TDH.VP.INIT", "TDH.MR.FINALIZE"}
    assert all(row.moved == row.bytes_hashed == 0 for row in others)


def test_build_on_forgets_what_was_on_the_tape() -> None:
    built = build(Recipe())
    shorter = build_on(built.tape, Recipe(image=()))
    assert len(shorter.tape) < 36
    again = build_on(built.tape, Recipe())
    assert again.mrtd() == mrtd(log_of(SMALL_IMAGE))
    assert len(again.tape) == 64


def test_report_holds_mrtd_where_the_layout_says() -> None:
    built = build(Recipe(attributes=1 << 28))
    report = built.report()
    assert len(report) == 1024
    assert report[TD_INFO : TD_INFO + 8] == (1 << 28).to_bytes(8, "little")
    assert report[TD_INFO + 16 : TD_INFO + 64].hex() == built.mrtd()
    assert report[80:128] == hashlib.sha384(report[TD_INFO:]).digest()


def test_report_takes_a_free_page() -> None:
    image = (Page("A", 0x7000_0000), Page("A", 0x7000_1000))
    assert build(Recipe(image)).report()[0] == 0x81


def test_extend_rtmr_of_the_guest_equals_hashlib() -> None:
    built = build(Recipe())
    first = built.extend_rtmr(1, 0x80_9000)
    second = built.extend_rtmr(1, 0x80_9040)
    expected = extend_rtmr(extend_rtmr(bytes(48), first), second)
    rtmrs = built.report()[TD_INFO + 208 : TD_INFO + 400]
    assert rtmrs[48:96] == expected
    assert rtmrs[:48] == bytes(48)
    assert first == SMALL_IMAGE[3].content[:48]


def test_a_refused_call_of_the_guest_is_not_passed_over() -> None:
    with pytest.raises(RuntimeError, match="did not succeed"):
        build(Recipe()).extend_rtmr(4, 0x80_9000)


# -- what the host may do differently


CHANGING = {
    "flip byte 300 of page 0, measured",
    "leave page 3 out",
    "add a page, not measured",
    "add pages 2 and 3 in the other order",
    "move page 2 up by one page",
    "measure 15 chunks of page 0 instead of 16",
    "measure the chunks of page 0 backwards",
    "add both BFV pages, then measure both",
}


@pytest.mark.parametrize("gpaw", [48, 52])
def test_verdicts_name_what_mrtd_sees(gpaw: int) -> None:
    rows = changes.verdicts(Recipe(gpaw=gpaw))
    assert {row.what for row in rows if row.mrtd == "changes"} == CHANGING
    tdinfo = {row.what for row in rows if row.tdinfo == "changes"}
    assert tdinfo - CHANGING == {"set SEPT_VE_DISABLE in ATTRIBUTES"}
    assert all(row.agree for row in rows)


def test_every_change_of_the_list_is_tried() -> None:
    assert {trial.change for trial in changes.TRIALS} == set(changes.CHANGES)
    recipe = Recipe()
    assert all(trial.apply(recipe) != recipe for trial in changes.TRIALS)


# -- pictures


def _fills(svg: str) -> list[str]:
    """The letters of the map's cells, row by row."""
    return re.findall(r'text-anchor="middle">([AEae-])</text></g>', svg)


def _map(image: Image, done: int, order: str = ORDERS[0]) -> str:
    return drawn.image_map(image, log_of(image, order), done, frozenset())


def test_image_map_fills_from_chunk_0_on() -> None:
    letters = _fills(_map(TWO_PAGES, 4))
    assert letters[:17] == ["A"] + ["E"] * 3 + ["e"] * 13
    assert letters[17:] == ["a"] + ["e"] * 16


def test_image_map_shows_what_is_never_hashed() -> None:
    image = (Page("A", 0x4000_0000, chunks=(15,)),)
    assert _fills(_map(image, 2)) == ["A"] + ["-"] * 15 + ["E"]


def test_image_map_frames_the_last_record() -> None:
    svg = _map(TWO_PAGES, 20)
    x, y = re.search(r'class="current" x="(\d+)" y="(\d+)"', svg).groups()  # type: ignore[union-attr]
    cell = re.search(rf'page 1, chunk 1: content hashed</title><rect x="{x}" y="{y}"', svg)
    assert cell is not None
    assert "current" not in _map(TWO_PAGES, 0)


def test_different_cells_point_at_the_flipped_byte() -> None:
    assert drawn.different_cells(flip_byte(SMALL_IMAGE, 1, 4095), SMALL_IMAGE) == {
        drawn.Cell(1, 16)
    }
    moved = move_page(SMALL_IMAGE, 2, 0xFFE0_1000)
    assert drawn.different_cells(moved, SMALL_IMAGE) == {drawn.Cell(2, 0)}
    assert drawn.different_cells(SMALL_IMAGE, SMALL_IMAGE) == set()


def test_hex_lines_show_every_field_of_an_extend() -> None:
    lines = drawn.hex_lines(log_of(TWO_PAGES)[1])
    assert lines[0] == "000  4d522e45 5854454e 44000000 00000000  MR.EXTEND....... name"
    assert lines[1].startswith("010  00000040 00000000")
    assert lines[2] == "*"
    assert [line[:3] for line in lines[3:]] == [f"{offset:03x}" for offset in range(128, 384, 16)]


def test_bytes_by_page_and_over_calls_count_the_same() -> None:
    built = build(Recipe())
    rows = drawn.bytes_by_page(SMALL_IMAGE, built.log)
    assert [row[1:] for row in rows] == [(128, 6144), (128, 6144), (128, 0), (128, 0)]
    points = drawn.bytes_over_calls(built.tape.actions, built.log)
    assert points[-1].hashed == sum(sum(row[1:]) for row in rows) == len(hashed(built.log))
    assert points[-1].calls == sum(action.kind == "SEAMCALL" for action in built.tape.actions)


# -- the report's layout


def test_report_fields_stand_where_the_module_writes_them() -> None:
    built = build(Recipe(attributes=1 << 28))
    event = built.extend_rtmr(2, 0xFFE2_0000)
    report = built.report()
    assert field(report, "MRTD").hex() == built.mrtd()
    assert field(report, "ATTRIBUTES") == (1 << 28).to_bytes(8, "little")
    assert field(report, "XFAM") == (3).to_bytes(8, "little")
    assert field(report, "RTMR 2") == extend_rtmr(bytes(48), event)
    assert field(report, "RTMR 1") == bytes(48)
    assert field(report, "SHA-384 of TDINFO") == hashlib.sha384(report[TD_INFO:]).digest()


def test_report_fields_do_not_overlap_and_the_rest_is_zero() -> None:
    ends = [one.offset + one.size for one in FIELDS]
    assert all(end <= one.offset for end, one in zip(ends, FIELDS[1:], strict=False))
    covered = {byte for one in FIELDS for byte in range(one.offset, one.offset + one.size)}
    report = build(Recipe()).report()
    assert all(report[byte] == 0 for byte in range(1024) if byte not in covered)


def test_field_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="MROWNERCONFIG"):
        field(bytes(1024), "RTMR 4")
