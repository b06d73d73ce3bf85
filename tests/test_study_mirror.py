"""Tape, tables, races and plots of the mirror notebook, by their numbers."""

from __future__ import annotations

import random

import pytest

from tdxlab.study import mirror_plots, mirror_tables
from tdxlab.study.mirror_lab import MirrorLab
from tdxlab.study.mirror_races import ROUNDS, busy_fault, meet
from tdxlab.study.mirror_tape import step_rows
from tdxlab.study.plots import Canvas, side_by_side


@pytest.fixture
def lab() -> MirrorLab:
    """gfn 0 is mapped."""
    made = MirrorLab(gpaw=48)
    made.fault(0)
    return made


@pytest.fixture(scope="module")
def labs() -> dict[str, MirrorLab]:
    return mirror_tables.layouts(48, pages=8)


def test_table_count_agrees_with_the_model_for_random_sets() -> None:
    dice = random.Random(11)
    for gpaw, levels in ((48, 4), (52, 5)):
        made = MirrorLab(gpaw=gpaw)
        gfns = [dice.choice(made.pieces).gfn + dice.randrange(512) for _ in range(12)]
        made.fault_all(gfns, name="all")
        assert made.count("SEPT.ADD") == mirror_tables.table_count(gfns, levels)
        assert made.count("PAGE.AUG") == len(set(gfns))


@pytest.mark.parametrize("pages", [0, 1, 512, 513, 262144, 262145])
@pytest.mark.parametrize("levels", [4, 5])
def test_contiguous_count_agrees_with_the_set_formula(pages: int, levels: int) -> None:
    counted = mirror_tables.table_count(range(pages), levels)
    assert mirror_tables.contiguous_table_count(pages, levels) == counted


def test_tape_counts_are_those_of_the_machine(lab: MirrorLab) -> None:
    lab.zap(0)
    made = lab.tape.seamcalls()
    assert made["TDH.MEM.PAGE.REMOVE"] == lab.machine.seamcalls["TDH.MEM.PAGE.REMOVE"] == 1
    assert made["TDH.MEM.SEPT.ADD"] == lab.machine.seamcalls["TDH.MEM.SEPT.ADD"] == 3
    assert sum(row.calls for row in lab.tape.phase_counts()) == sum(made.values())
    assert lab.tape.time_points()[-1].calls == sum(made.values())
    lab.tape.seek(0)
    assert sum(lab.tape.seamcalls().values()) == 0


def test_every_step_of_a_fault_and_of_a_zap_has_a_stage(lab: MirrorLab) -> None:
    lab.zap(0)
    rows = step_rows(lab.tape, "fault 0x0") + step_rows(lab.tape, "zap 0x0")
    assert len(rows) == len(lab.tape)
    assert [row.at for row in rows if row.stage == "other"] == []


def test_every_way_of_looking_finds_the_same_pages(labs: dict[str, MirrorLab]) -> None:
    for made in labs.values():
        gfns = range(5 << 9)
        answers = [ask(made, gfns)[0] for ask in mirror_tables.WAYS.values()]
        assert all(answer == answers[0] for answer in answers)
        assert len(answers[0]) in (5, 8)


def test_only_the_mirror_looks_without_seamcalls(labs: dict[str, MirrorLab]) -> None:
    rows = {row.way: row for row in mirror_tables.price_rows(labs["dense"], range(1024))}
    assert [row.seamcalls for row in rows.values()] == [0, 513, 1024, 512 * 4 + 512 * 3]


def test_reading_an_entry_that_is_being_filled_is_refused(lab: MirrorLab) -> None:
    inside = [row.step for row in step_rows(lab.tape, "fault 0x0") if row.stage == "SEAMCALL"]
    lab.tape.seek(inside[-1])
    digest = lab.machine.digest()
    assert mirror_tables.read_now(lab, 0).startswith("TDX_OPERAND_BUSY")
    assert lab.machine.digest() == digest


def test_mirror_and_external_have_the_same_shape(labs: dict[str, MirrorLab]) -> None:
    rows = mirror_tables.occupancy_rows(labs)
    mirror = [(row.layout, row.level, row.tables) for row in rows if row.tree == "mirror"]
    external = [(row.layout, row.level, row.tables) for row in rows if row.tree == "external"]
    assert mirror == external
    assert ("sparse", "4K", 8) in mirror
    assert ("dense", "4K", 1) in mirror


def test_meeting_at_a_frozen_link_retries_without_a_call(lab: MirrorLab) -> None:
    digest = lab.machine.digest()
    met = meet(lab, 0x200, 0x201, hold="publish SPTE")
    assert (met.retries, met.mem_calls, met.finished) == (ROUNDS, 0, False)
    assert (met.sept_add, met.page_aug) == (1, 2)
    assert lab.machine.digest() == digest


def test_meeting_refuses_a_step_that_never_comes(lab: MirrorLab) -> None:
    with pytest.raises(ValueError, match="no such step"):
        meet(lab, 1, 2, hold="TDH.MEM.SEPT.ADD")
    lab.tape.seek(3)
    with pytest.raises(ValueError, match="in the middle of 'fault 0x0'"):
        meet(lab, 1, 2, hold="publish")


@pytest.mark.parametrize(("leaf", "calls"), [("SEPT.ADD", (5, 1)), ("PAGE.AUG", (2, 4))])
def test_busy_costs_one_more_call_of_its_leaf_each(
    lab: MirrorLab, leaf: str, calls: tuple[int, int]
) -> None:
    row = busy_fault(lab, 0x40000, leaf, 3)
    assert (row.sept_add, row.page_aug) == calls
    assert (row.vp_enter, row.retries) == (2, 3)


def test_busy_refuses_a_leaf_that_no_fault_calls(lab: MirrorLab) -> None:
    with pytest.raises(ValueError, match=r"does not call 'PAGE\.ADD'"):
        busy_fault(lab, 1, "PAGE.ADD", 1)


def test_plots_draw_the_numbers_of_their_tables(labs: dict[str, MirrorLab]) -> None:
    rows = mirror_tables.occupancy_rows(labs)
    left, right = side_by_side(Canvas(3).figure, 2)
    mirror_plots.tables_per_level(rows, left)
    widths = [patch.get_width() for patch in left.containers[0].patches]
    assert widths == [row.tables for row in rows]
    mirror_plots.filling(rows, right)
    widths = [patch.get_width() for patch in right.containers[0].patches]
    assert widths == [row.entries / row.tables for row in rows]


def test_price_plot_has_a_curve_for_each_way(labs: dict[str, MirrorLab]) -> None:
    rows = mirror_tables.price_curve(labs["dense"], [1, 16])
    (ax,) = side_by_side(Canvas(3).figure, 1)
    mirror_plots.price(rows, ax)
    drawn = [list(line.get_ydata()) for line in ax.lines]
    assert drawn == [[0, 0], [1, 16], [1, 16], [4, 64]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("N, gfns asked for", "SEAMCALLs")
