"""The slot lab, its tables, formulas and plots: by their numbers."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from tdxlab.study import slot_costs
from tdxlab.study.slot_costs import (
    contiguous,
    crossover,
    delay,
    pages,
    root_entries,
    walked_in,
)
from tdxlab.study.slot_formulas import (
    USED,
    case_rows,
    cross_rows,
    delay_points,
    near,
    private_rows,
    published_rows,
    repeat_rows,
)
from tdxlab.study.slot_lab import DEFAULT, REST, SLOT, TD, SlotLab
from tdxlab.study.slot_tables import (
    beside_rows,
    bill_rows,
    decision_rows,
    huge_rows,
    kept_rows,
    level_rows,
    yield_rows,
)
from tdxlab.study.slot_views import (
    COST_LOOKS,
    bill_view,
    costs,
    crossing,
    place_map,
    plot_costs,
    plot_delay,
    plot_private,
    sept_map,
    states,
)

WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])


@pytest.fixture
def lab() -> SlotLab:
    return SlotLab()


# -- the lab


def test_a_deed_says_what_it_cost_and_a_seek_takes_it_back(lab: SlotLab) -> None:
    used = lab.use(TD, SLOT, 8)
    assert (used.bill.faults, used.bill.accepts, used.bill.call("AUG")) == (8, 8, 8)
    gone = lab.delete(TD)
    assert gone.bill.calls == (("BLOCK", 8), ("TRACK", 8), ("REMOVE", 8), ("WBINVD", 8))
    assert (gone.bill.seamcalls, gone.bill.kicks, gone.bill.flushes) == (32, 8, 1)
    assert lab.slot(TD) is None
    lab.tape.seek(1)
    assert lab.slot(TD) is not None
    assert lab.read(TD).said == "its own data"
    assert lab.gate(TD).vm.slot_policies == ()


def test_delete_goes_by_the_policy_that_is_given(lab: SlotLab) -> None:
    lab.use(TD, SLOT, 4)
    kept = lab.delete(TD, policy="B").bill
    assert (kept.call("BLOCK"), kept.call("TRACK"), kept.call("REMOVE")) == (4, 1, 0)
    assert lab.create(TD, told=False).bill.call("UNBLOCK") == 4
    assert lab.read(TD).said == "its own data"
    lab.use(DEFAULT, SLOT, 4)
    assert lab.delete(DEFAULT, policy="T").bill.freed == 0
    lab.tape.seek(lab.tape.position - 1)
    bill = lab.delete(DEFAULT, policy="F").bill
    assert (bill.freed, bill.rescanned) == (3, 3 * 512)


def test_a_smaller_slot_removes_what_was_blocked(lab: SlotLab) -> None:
    lab.use(TD, SLOT, 4)
    lab.delete(TD, policy="B")
    bill = lab.create(TD, 16).bill
    assert (bill.call("UNBLOCK"), bill.call("REMOVE")) == (0, 4)


def test_large_leaves_need_no_level_1_tables() -> None:
    lab = SlotLab(leaf_level=2)
    assert lab.use(DEFAULT, SLOT, 512).bill.faults == 1
    bill = lab.delete(DEFAULT, policy="T").bill
    assert (bill.write_lock, bill.cleared) == (slot_costs.zap_leafs(512, leaf_level=2).walked, 1)


def test_quirk_off_makes_linux_zap_leaves() -> None:
    lab = SlotLab(quirk=False)
    lab.use(DEFAULT, SLOT, 4)
    assert lab.delete(DEFAULT).bill.freed == 0


@pytest.mark.parametrize(
    ("deed", "problem"),
    [
        (lambda lab: lab.use("VM", SLOT, 1), "choose 'TD' or 'DEFAULT VM'"),
        (lambda lab: lab.use(TD, "hole", 1), "choose 'rest' or 'slot'"),
        (lambda lab: lab.use(TD, SLOT, 0), "choose of 0..511"),
        (lambda lab: lab.use(TD, SLOT, 2, first=511), "choose of 0..511"),
        (lambda lab: lab.delete(TD, policy="X"), "no policy 'X'"),
        (lambda lab: lab.delete(DEFAULT, policy="B"), "no Secure EPT"),
        (lambda lab: lab.create(TD), "delete it first"),
        (lambda lab: (lab.delete(TD), lab.create(TD, 513)), "choose 1..512"),
        (lambda lab: (lab.delete(TD), lab.delete(TD)), "create it first"),
    ],
)
def test_lab_refuses_what_makes_no_sense(lab: SlotLab, deed: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        deed(lab)
    assert len(lab.tape.deeds) == len(lab.tape)


def test_a_dead_td_is_said_to_be_dead(lab: SlotLab) -> None:
    lab.use(TD, SLOT, 4)
    lab.delete(TD)
    lab.create(TD, told=False)
    assert "the TD dies" in lab.read(TD).said
    with pytest.raises(ValueError, match="go back or reset"):
        lab.read(TD)


# -- measured tables


@WIDTHS
def test_kept_rows_say_who_keeps_its_data(gpaw: int) -> None:
    rows = {(row.vm, row.policy): row for row in kept_rows(gpaw, 8)}
    assert rows[TD, "T"].back_reads == "zeros"
    assert "the TD dies" in rows[TD, "T"].not_told
    assert rows[TD, "B"][3:] == ("memory fault", "its own data", "its own data", 0)
    assert rows[TD, "F"].deleted_reads == "its own data"
    assert rows[DEFAULT, "F"][3:] == ("ones: no memory", "its own data", "its own data", 8)
    assert rows[DEFAULT, "T"].rest_faults == 0


@WIDTHS
def test_decision_rows_say_which_policy_a_deletion_went_by(gpaw: int) -> None:
    rows = [
        (row.vm, row.quirk, row.for_vm + row.for_slot, row.goes_by) for row in decision_rows(gpaw)
    ]
    assert rows == [
        ("DEFAULT VM", "on", "--", "F"),
        ("DEFAULT VM", "off", "--", "T"),
        ("SW_PROTECTED VM", "on", "--", "T"),
        ("TD", "on", "--", "T"),
        ("DEFAULT VM", "on", "T-", "T"),
        ("DEFAULT VM", "on", "TF", "F"),
        ("TD", "on", "B-", "B"),
        ("TD", "on", "BT", "T"),
    ]


@WIDTHS
def test_bill_rows_agree_with_the_formulas(gpaw: int) -> None:
    rows = bill_rows(gpaw, 8)
    assert all(row.write_lock + row.read_lock == row.formula for row in rows)
    private = {row.policy: (row.seamcalls, row.kicks) for row in rows if row.vm == TD}
    assert private == {"T": (32, 8), "F": (0, 1), "B": (9, 1)}
    assert [row.freed for row in rows if row.vm == DEFAULT] == [5, 0]


@WIDTHS
def test_huge_rows_agree_with_the_formulas(gpaw: int) -> None:
    rows = huge_rows(gpaw, 4)
    assert [(row.vm, row.policy) for row in rows] == [
        *((DEFAULT, "F"), (DEFAULT, "T")),
        *((TD, "T"), (TD, "B")),
    ]
    assert all(row.walked == row.formula > 0 for row in rows)
    tables = 10 if gpaw == 48 else 11
    assert [row.cleared for row in rows] == [4 + 10, 4, 4, 4]
    assert [row.tables_before for row in rows] == [10, 10, tables, tables]
    assert [row.tables_after for row in rows] == [0, 10, tables, tables]


def test_faults_come_through_beside_f_and_not_beside_t() -> None:
    zap_all, zap_leafs = beside_rows(4)
    assert zap_all.through > 100
    assert zap_leafs.through == 0


def test_giving_the_lock_up_costs_t_flushes_and_f_none() -> None:
    rows = yield_rows(64)
    assert {row.flushes for row in rows if row.policy == "F"} == {0}
    of_t = [row.flushes for row in rows if row.policy == "T"]
    assert of_t == sorted(of_t)
    assert of_t[0] == 1
    assert of_t[-1] > 2
    assert all(row.yields for row in rows if row.every != "never")


@WIDTHS
def test_level_rows_need_one_call_for_a_whole_entry(gpaw: int) -> None:
    rows = level_rows(gpaw, 8)
    assert [row[:4] for row in rows] == [("4K", 8, 8, 1), ("2M", 8, 1, 1), ("1G", 8, 1, 1)]
    assert {row[4:] for row in rows} == {
        ("EPT violation", 8, "its own data"),
        ("EPT violation", 1, "its own data"),
    }


# -- formulas


def test_f_is_never_less_work_than_t() -> None:
    rows = case_rows()
    for every, leafs in zip(rows[::2], rows[1::2], strict=True):
        assert (every.policy, leafs.policy) == ("F", "T")
        assert every.walked > leafs.walked
        assert every.cleared > leafs.cleared
        assert every.faults > leafs.faults == 0
    assert [row.kept for row in rows if row.slot == "1 TiB"] == [
        "-",
        "2101256 KiB",
        "-",
        "4104 KiB",
    ]


def test_crossover_is_where_both_are_the_same() -> None:
    for used, price, leaf_level in ((100, 10, 1), (pages("4 GiB"), 100, 1), (2048, 100, 2)):
        slot = crossover(used, price, leaf_level=leaf_level)
        unit = slot_costs.per_entry(leaf_level)
        assert slot % unit == 0
        beyond = delay(slot, used, price, leaf_level=leaf_level)
        before = delay(slot - unit, used, price, leaf_level=leaf_level)
        assert beyond.leafs_lock > beyond.all_faults == before.all_faults >= before.leafs_lock


def test_crossover_is_near_the_pages_in_use_times_the_price() -> None:
    assert crossover(pages("4 GiB"), 100) == pytest.approx(100 * pages("4 GiB"), rel=0.003)
    assert [row.slot for row in cross_rows(("4 GiB",))] == ["39.9 GiB", "399.2 GiB", "3.9 TiB"]
    assert near(pages("3 MiB")) == "3.0 MiB"
    assert near(1) == "0.0 MiB"


def test_private_rows_and_repeat_rows_are_multiples_of_the_pages() -> None:
    n = pages("2 GiB")
    ways = {row.way: (row.seamcalls, row.kicks, row.back_calls) for row in private_rows()}
    assert ways["T, one by one"] == (4 * n, n, n)
    assert ways["T, batches of 512"] == (3 * n + n // 512, n // 512, n)
    assert ways["B at 1G"] == (3, 1, 2)
    last = repeat_rows(times=7)[-1]
    assert (last.f_faults, last.t_faults) == (7 * pages("512 GiB"), 7 * n)


@pytest.mark.parametrize(("policy", "faults"), [("F", 16 + 32), ("T", 16)])
def test_a_slot_that_comes_and_goes_costs_the_same_each_time(
    lab: SlotLab, policy: str, faults: int
) -> None:
    """As `repeat_rows` takes it to be."""
    lab.use(DEFAULT, REST, 32)
    lab.use(DEFAULT, SLOT, 16)
    gfns = [*range(32), *range(1 << 18, (1 << 18) + 16)]
    every = slot_costs.zap_all(slot_costs.mapped(gfns)).walked
    walked = every if policy == "F" else walked_in(1 << 18, (1 << 18) + 512, gfns)
    for _ in range(3):
        gone = lab.delete(DEFAULT, policy=policy).bill
        assert gone.read_lock + gone.write_lock == walked
        lab.create(DEFAULT)
        used = [lab.use(DEFAULT, REST, 32).bill, lab.use(DEFAULT, SLOT, 16).bill]
        assert sum(bill.faults for bill in used) == faults


def test_root_entries_end_where_the_host_ends() -> None:
    assert [root_entries(4, bits) for bits in (40, 46, 48, 52)] == [2, 128, 512, 512]
    assert root_entries(5, 52) == 16
    assert contiguous(1, root_level=5).tables == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="choose a root of 4 levels"):
        root_entries(5, 46)


def test_published_rows_are_those_of_the_data() -> None:
    assert [(row.policy, row.ms) for row in published_rows()] == [
        ("zap everything", "46.08"),
        ("zap the slot alone", "21.56"),
    ]


# -- views and plots


def test_maps_show_the_entries_of_both_halves(lab: SlotLab) -> None:
    lab.use(TD, SLOT, 4)
    lab.delete(TD, policy="B")
    assert [look.letter for look in states(lab, TD, SLOT).values()] == ["B"] * 4
    assert states(lab, TD, REST) == {}
    assert "4 blocked" in place_map(lab, TD, SLOT)
    assert "BLOCKED" in sept_map(lab)
    large = SlotLab(leaf_level=2)
    assert states(large, DEFAULT, SLOT) == {}
    large.use(DEFAULT, SLOT, 1)
    assert len(states(large, DEFAULT, SLOT)) == 512


def test_bill_view_leaves_out_what_cost_nothing(lab: SlotLab) -> None:
    assert "nothing has been done" in bill_view(None)
    lab.use(TD, SLOT, 4)
    shown = bill_view(lab.delete(TD))
    assert "kicks" in shown
    assert "faults" not in shown


def test_plot_costs_has_a_bar_for_each_cost(lab: SlotLab) -> None:
    lab.use(DEFAULT, SLOT, 4)
    lab.delete(DEFAULT)
    ax = plot_costs(lab.tape.deeds, Figure().subplots())
    assert [patch.get_width() for patch in ax.patches] == list(costs(lab.tape.deeds).values())
    assert len(ax.patches) == len(COST_LOOKS)
    assert all(patch.get_hatch() for patch in ax.patches if patch.get_facecolor()[:3] != _GREEN)


_GREEN = (0.0, 158 / 255, 115 / 255)


def test_plot_delay_has_a_ring_where_curves_meet() -> None:
    rows = delay_points()
    ax = plot_delay(rows, Figure().subplots())
    assert list(ax.lines[0].get_ydata()) == [row.lock for row in rows]
    rings = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(rings) == 2
    for ring, used in zip(rings, USED, strict=False):
        assert ring.get_xdata()[0] == pytest.approx(crossover(pages(used), 100), rel=0.01)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[2:] == [f"F: faults, {used} in use" for used in USED]
    assert ax.get_xlabel() == "size of the slot"


def test_plot_private_has_the_calls_of_each_way() -> None:
    rows = private_rows("64 MiB")
    ax = plot_private(rows, Figure().subplots())
    assert [patch.get_width() for patch in ax.patches] == [row.seamcalls for row in rows]
    assert ax.get_xlabel() == "SEAMCALLs"


def test_crossing_is_none_for_curves_that_do_not_meet() -> None:
    assert crossing([1, 2, 3], [10, 20, 30], [25, 25, 25]) == 2.5
    assert crossing([1, 2, 3], [10, 20, 30], [5, 5, 5]) is None
    assert crossing([1, 2, 3], [10, 20, 30], [50, 50, 50]) is None
