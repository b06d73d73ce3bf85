"""The epoch lab, its tables and plots: by their numbers."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tdxlab.study.epoch_lab import EpochLab, EpochRow
from tdxlab.study.epoch_tables import (
    batch_formula,
    batch_row,
    mirror_rows,
    order_rows,
    rule_rows,
    stale_rows,
)
from tdxlab.study.epoch_views import (
    EpochPoint,
    books_svg,
    epoch_picture,
    epoch_points,
    lps_svg,
    plot_batches,
    plot_epochs,
    why,
)

WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])


def test_lab_moves_are_those_of_the_module() -> None:
    lab = EpochLab(vcpus=2)
    answers = [row.answer for row in lab.play("enter 0", "read 0", "BLOCK", "read 0", "TRACK")]
    assert answers == ["inside", "by a walk", "SUCCESS", "from the TLB", "SUCCESS"]
    row = lab.do("kick")
    assert (row.answer, row.td_epoch, row.even, row.odd, row.bepoch) == ("1 IPI", 2, 0, 0, 1)
    assert lab.do("UNBLOCK").page == "MAPPED"
    assert lab.do("kick").answer == "0 IPIs"
    row = lab.play("enter 0", "read 0", "leave 0")[-1]
    assert (row.answer, row.inside, row.cached) == ("outside", "-", "0")


@pytest.mark.parametrize("move", ["fly", "enter", "enter 2", "BLOCK 0", "read x", ""])
def test_do_refuses_moves_that_do_not_exist(move: str) -> None:
    lab = EpochLab(vcpus=2)
    with pytest.raises(ValueError, match=r"there is no move .*; choose of BLOCK, .*enter 0\.\.1"):
        lab.do(move)
    assert len(lab.tape) == 0


def test_do_refuses_what_cannot_be_asked_and_changes_nothing() -> None:
    lab = EpochLab(vcpus=1)
    before = lab.machine.digest()
    with pytest.raises(ValueError, match="runs the host"):
        lab.do("read 0")
    lab.do("enter 0")
    with pytest.raises(ValueError, match="LP 0"):
        lab.do("enter 0")
    lab.tape.seek(0)
    assert lab.machine.digest() == before


@pytest.mark.parametrize("vcpus", [0, 5])
def test_lab_refuses_other_numbers_of_vcpus(vcpus: int) -> None:
    with pytest.raises(ValueError, match=f"{vcpus} vCPUs; choose 1..4"):
        EpochLab(vcpus=vcpus)


def test_over_time_comes_back_to_where_it_was() -> None:
    lab = EpochLab(vcpus=2)
    lab.play("enter 1", "TRACK", "leave 1", "TRACK")
    lab.tape.seek(3)
    assert epoch_points(lab) == [
        EpochPoint(0, 1, (0, 0)),
        EpochPoint(1, 1, (0, 1)),
        EpochPoint(2, 2, (0, 1)),
        EpochPoint(3, 2, (0, 0)),
    ]
    assert (lab.tape.position, len(lab.tape)) == (3, 4)


@WIDTHS
def test_order_rows_allow_remove_after_all_three_steps_only(gpaw: int) -> None:
    rows = {row.after: row for row in order_rows(gpaw)}
    done = [after for after, row in rows.items() if row.remove == "SUCCESS"]
    assert done == ["BLOCK, TRACK, kick", "BLOCK, TRACK, kick, enter"]
    assert all(rows[after].unblock == "SUCCESS" for after in done)
    assert rows["BLOCK, TRACK"].track == "PREVIOUS_TLB_EPOCH_BUSY"
    assert [after for after, row in rows.items() if row.guest_reads.startswith("EPT")] == done[1:]


@WIDTHS
def test_stale_rows_show_what_tracking_prevents(gpaw: int) -> None:
    rows = stale_rows(gpaw)
    with_it, without = rows[:3], rows[3:]
    assert {(row.guest_reads, row.owner_finds) for row in with_it} == {
        ("an EPT violation", "'a new secret'")
    }
    assert [(row.guest_reads, row.owner_finds) for row in without] == [
        ("'a new secret'", "'overwritten!'"),
        ("a machine check, the TD dies", "a machine check, the TD dies"),
        ("a machine check, the TD dies", "ciphertext"),
    ]


def test_rule_rows_find_something_wherever_a_rule_is_off() -> None:
    kept, *off = rule_rows(1)
    assert (kept.found, kept.vcpus) == ("nothing", 1)
    assert [row.found.partition(":")[0] for row in off] == [
        "TLB_TRACKING_NOT_DONE",
        "TLB_TRACKING_NOT_DONE",
        "invariant 6",
    ]


@pytest.mark.parametrize(
    ("gpaw", "pages", "others", "batch"), [(48, 7, 0, 3), (52, 9, 1, 4), (48, 5, 3, 5)]
)
def test_batches_cost_what_the_formula_says(gpaw: int, pages: int, others: int, batch: int) -> None:
    row = batch_row(gpaw, pages, others, batch)
    assert (row.tracks, row.ipis, row.seamcalls) == row.by_formula
    assert row.by_formula == batch_formula(pages, others, batch)


def test_mirror_rows_block_a_batch_before_they_remove_it() -> None:
    rows = mirror_rows(48, pages=3, batch=2)
    assert [(row.step, row.blocked) for row in rows if row.step == "TDH.MEM.TRACK"] == [
        ("TDH.MEM.TRACK", 2),
        ("TDH.MEM.TRACK", 1),
    ]
    assert rows[-1][1:] == (0, 0, 3)
    assert all(sum(row[1:]) == 3 for row in rows)


def test_why_says_which_of_the_two_tests_decides() -> None:
    row = EpochRow("", "", 3, 0, 2, "BLOCKED", 3, "", "")
    assert why(row) == "not tracked: blocked in the present epoch, 3"
    assert why(row._replace(td_epoch=4)) == "not tracked: 2 of epoch 3 are still inside"
    assert why(row._replace(td_epoch=4, odd=1)) == "not tracked: 1 of epoch 3 is still inside"
    assert why(row._replace(td_epoch=4, odd=0)).startswith("tracked: nobody inside")
    assert why(row._replace(td_epoch=5)).startswith("tracked: nobody inside")
    assert why(row._replace(page="MAPPED")) == "the page is not blocked"


def test_why_agrees_with_the_module_over_a_story() -> None:
    lab = EpochLab(vcpus=2)
    for move in ("BLOCK", "enter 0", "TRACK", "leave 0", "enter 1", "enter 0", "TRACK"):
        lab.do(move)
        assert why(lab.row()).startswith("tracked") == lab.is_tracked()


def test_maps_tell_old_vcpus_and_the_present_counter() -> None:
    lab = EpochLab(vcpus=2)
    lab.play("enter 0", "read 0", "TRACK", "enter 1")
    picture = lps_svg(lab.vcpu_rows(), lab.row().td_epoch)
    assert "vCPU 0: inside since an older epoch, epoch 1, page in the TLB" in picture
    assert "vCPU 1: inside, epoch 2, page not in the TLB" in picture
    books = books_svg(lab.row())
    assert "1 inside of even epochs, the present one; 1 inside of odd epochs" in books


def test_plot_epochs_has_a_line_for_the_td_and_for_each_vcpu() -> None:
    rows = [EpochPoint(0, 1, (0, 0)), EpochPoint(1, 1, (1, 0)), EpochPoint(2, 2, (1, 2))]
    ax = plot_epochs(rows, Figure().subplots())
    td, first, second = ax.lines
    assert list(td.get_ydata()) == [1, 1, 2]
    assert list(first.get_xdata()) == [1, 2]
    assert [int(y) for y in first.get_ydata()] == [1, 1]
    assert [int(y) for y in second.get_ydata()] == [2]
    assert list(ax.lines) == list(plot_epochs(rows[:1], ax).lines)
    assert list(second.get_xdata()) == []
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("action", "epoch entered in")


def test_plot_batches_shows_the_rows() -> None:
    rows = [batch_row(48, 4, 1, batch) for batch in (1, 4)]
    ax = plot_batches(rows, Figure().subplots())
    found = {str(line.get_label()): [int(y) for y in line.get_ydata()] for line in ax.lines}
    assert found == {"SEAMCALLs": [16, 13], "IPIs": [5, 2], "TRACKs": [4, 1]}
    assert ax.get_xlabel() == "pages in a batch"


def test_epoch_picture_says_its_numbers() -> None:
    lab = EpochLab(vcpus=1)
    lab.do("TRACK")
    assert repr(epoch_picture(lab)).splitlines()[-1].split() == ["1", "2", "(0,)"]
