"""Shared memory on a tape: the lab, its tables, its pictures."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tdxlab.kvm.spte import FROZEN_SPTE, SHADOW_NONPRESENT_VALUE, get_mmio_spte_generation
from tdxlab.study import plots, shared_tables, shared_views
from tdxlab.study.panel_shared import tell
from tdxlab.study.shared_lab import DEVICE_GPA, PAGES, TD, VM, SharedLab, changes
from tdxlab.study.shared_tables import (
    age_rows,
    bit_rows,
    call_rows,
    deed_rows,
    kind_of,
    leaf_points,
    letters,
    log_rows,
    mmio_rows,
    size_rows,
    walk_rows,
)

WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])


@pytest.fixture(scope="module")
def _td() -> SharedLab:
    return SharedLab()


@pytest.fixture(scope="module")
def _vm() -> SharedLab:
    return SharedLab(kind=VM)


@pytest.fixture
def lab(_td: SharedLab) -> SharedLab:
    """A TD that has done nothing yet."""
    _td.tape.seek(0)
    return _td


@pytest.fixture
def plain(_vm: SharedLab) -> SharedLab:
    """A default VM that has done nothing yet."""
    _vm.tape.seek(0)
    return _vm


# -- the lab


@WIDTHS
def test_walk_begins_at_the_entry_of_the_shared_bit(gpaw: int) -> None:
    lab = SharedLab(gpaw=gpaw)
    assert lab.walk(lab.gpa("2M")) == []
    lab.touch("2M", 3)
    found = lab.walk(lab.gpa("2M", 3))
    root = (5, 8) if gpaw == 52 else (4, 256)
    assert (found[0].level, found[0].place) == root
    assert [(entry.level, entry.place) for entry in found[-2:]] == [(3, 2), (2, 0)]
    assert [row.kind for row in walk_rows(lab, lab.gpa("2M", 3))][-2:] == ["table", "leaf"]


@pytest.mark.parametrize(("size", "level"), [("4K", 1), ("2M", 2), ("1G", 3)])
def test_leaf_is_as_large_as_the_host_page(lab: SharedLab, size: str, level: int) -> None:
    lab.touch(size, 700)
    entry = lab.entry(size, 700)
    assert entry is not None
    assert entry.level == level
    assert lab.table(lab.gpa(size, 700), level)[entry.place] == entry.raw


def test_deeds_can_be_taken_back_and_done_again(lab: SharedLab) -> None:
    tell(lab)
    end, counts, digest = len(lab.tape), lab.counts(), lab.machine.digest()
    said = [deed.name for deed in lab.tape.deeds]
    lab.tape.seek(0)
    assert lab.counts()["faults"] == 0
    lab.tape.seek(end)
    assert (lab.counts(), lab.machine.digest()) == (counts, digest)
    assert [deed.name for deed in lab.tape.deeds] == said


def test_eager_parameter_holds_for_one_deed_only(lab: SharedLab) -> None:
    lab.touch("2M", 0)
    lab.log("2M", eager=False)
    assert lab.gate.vm.params.eager_page_split
    assert lab.counts()["pages_2m"] == 1
    lab.stop("2M")
    lab.log("2M")
    assert (lab.counts()["pages_2m"], lab.counts()["pages_4k"]) == (0, 512)


def test_splitting_the_one_gib_page_makes_every_leaf(lab: SharedLab) -> None:
    lab.touch("1G", 0)
    gained = lab.log("1G").gained
    assert (gained["pages_1g"], gained["pages_4k"], gained["tables"]) == (-1, PAGES, 513)
    gained = lab.stop("1G").gained
    assert (gained["pages_1g"], gained["pages_4k"], gained["tables"]) == (1, -PAGES, -513)


def test_recovered_leaf_takes_after_the_first_small_one(lab: SharedLab) -> None:
    for written, has_w in ((0, True), (1, False)):
        lab.tape.seek(0)
        lab.touch("2M", 0)
        lab.log("2M")
        lab.touch("2M", written, write=True)
        lab.stop("2M")
        entry = lab.entry("2M", 0)
        assert entry is not None
        assert ("W" in letters(entry.raw).split()) == has_w


def test_dirty_log_has_written_pages_once(lab: SharedLab) -> None:
    assert lab.dirty("4K") == []
    lab.log("4K")
    lab.touch("4K", 5, 2, write=True)
    lab.touch("4K", 9)
    assert lab.dirty("4K") == [5, 6, 9]
    assert "dirty: 5, 6, 9" in lab.get_log("4K").said
    lab.touch("4K", 9)
    assert lab.dirty("4K") == []
    lab.touch("4K", 9, write=True)
    assert lab.dirty("4K") == [9]


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (lambda lab: lab.touch("8K", 0), "choose 4K, 2M, 1G"),
        (lambda lab: lab.touch("4K", PAGES), "choose from 0"),
        (lambda lab: lab.get_log("4K"), "not being logged"),
        (lambda lab: lab.stop("2M"), "not being logged"),
        (lambda lab: lab.fetch("4K", 0), "take a default VM"),
    ],
)
def test_a_mistake_says_what_to_do_and_leaves_no_trace(
    lab: SharedLab, deed: object, message: str
) -> None:
    assert callable(deed)
    before = lab.machine.digest()
    with pytest.raises(ValueError, match=message):
        deed(lab)
    assert (lab.machine.digest(), len(lab.tape.deeds)) == (before, 0)


def test_an_unknown_kind_of_vm_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 'TD' or 'default VM'"):
        SharedLab(kind="SNP")


def test_changes_are_told_in_one_order() -> None:
    assert changes({"flushes": 1, "faults": 2, "TD entries": 9}) == "faults +2, flushes +1"
    assert changes({}) == "nothing changes"


# -- tables


@WIDTHS
def test_no_seamcall_maps_a_shared_page(gpaw: int) -> None:
    lab = SharedLab(gpaw=gpaw)
    before = lab.machine.digest()
    rows = {row.leaf: (row.private, row.shared) for row in call_rows(lab, 10)}
    assert rows == {
        "TDH.VP.ENTER": (11, 11),
        "TDH.MEM.PAGE.AUG": (10, 0),
        "TDH.MEM.SEPT.ADD": (3 if gpaw == 48 else 4, 0),
        "TDH.VP.WR": (1, 1),
    }
    assert lab.machine.digest() == before


def test_each_host_page_is_one_fault(lab: SharedLab) -> None:
    rows = {row.memory: row for row in size_rows(lab, 600)}
    assert [rows[size].faults for size in ("4K", "2M", "1G")] == [600, 2, 1]
    assert [rows[size].leaves for size in ("4K", "2M", "1G")] == [600, 2, 1]
    assert rows["2M"].table_bytes == rows["2M"].tables * 4096
    assert lab.tape.position == 0


def test_lazy_split_moves_the_cost_to_the_guest(lab: SharedLab) -> None:
    rows = {(row.memory, row.split): row for row in log_rows(lab)}
    eager, lazy = rows["2M", "at the start"], rows["2M", "at the first write"]
    assert (eager.at_start, eager.slow, eager.fast) == (1026, 0, 8)
    assert (lazy.at_start, lazy.slow, lazy.fast) == (2, 2, 6)
    assert eager.tables == lazy.tables == 2
    assert rows["4K", "at the start"][2:] == rows["4K", "at the first write"][2:]


def test_a_td_never_notices_ram_behind_an_mmio_entry(lab: SharedLab, plain: SharedLab) -> None:
    rows = mmio_rows([lab, plain])
    td, vm = ([row for row in rows if row.vm == kind] for kind in (TD, VM))
    assert [row.faults for row in td] == [1, 0, 0, 0, 0, 0]
    assert [row.faults for row in vm] == [1, 0, 0, 1, 0, 1]
    assert [row.kind for row in td] == ["MMIO"] * 6
    assert vm[-1].kind == "leaf"
    assert (td[0].raw & 7, td[0].raw >> 63, vm[0].raw & 7) == (0, 0, 6)
    assert get_mmio_spte_generation(vm[0].raw) == vm[0].slots == int(vm[0].generation)
    assert int(td[-1].generation) < td[-1].slots


def test_only_a_walk_makes_an_old_page_young(lab: SharedLab, plain: SharedLab) -> None:
    bare = SharedLab(kind=VM, ad_bits=False)
    rows = age_rows([lab, plain, bare])
    assert [row.young for row in rows] == [
        *(True, False, False, False, False),
        *(True, False, False, False, True),
        *(True, False, False, False, True),
    ]
    assert [row.faults for row in rows] == [1, 0, 0, 0, 0] * 2 + [1, 0, 0, 0, 1]
    assert rows[11].bits == "D MP HW MW SV"


def test_leaf_points_follow_the_tape(lab: SharedLab) -> None:
    tell(lab)
    points = leaf_points(lab)
    assert len(points) == len(lab.tape) + 1
    assert [(p.pages_4k, p.pages_2m, p.pages_1g) for p in points][5:7] == [(1, 1, 1), (513, 0, 1)]
    lab.tape.seek(6)
    assert leaf_points(lab) == points[:7]
    rows = deed_rows(lab.tape.deeds)
    assert (len(rows), rows[4].by, rows[0].by) == (6, "VMM", "guest")


def test_kinds_and_bits_of_entries(lab: SharedLab) -> None:
    assert kind_of(lab, SHADOW_NONPRESENT_VALUE, 1) == "empty"
    assert kind_of(lab, FROZEN_SPTE, 1) == "frozen"
    assert letters(0) == "none"
    assert [row.bit for row in bit_rows(0)] == [0, 1, 2, 7, 8, 9, 11, 57, 58, 63]
    assert letters(1 << 63 | 1 << 58 | 2) == "W MW SV"


# -- pictures


def test_every_look_has_a_letter_of_its_own() -> None:
    for looks in (
        shared_views.ENTRY_LOOKS,
        shared_views.SIZE_LOOKS,
        shared_views.CALL_LOOKS,
        shared_views.FAULT_LOOKS,
    ):
        assert len({look.letter for look in looks.values()}) == len(looks)
        assert len({look.colour for look in looks.values()}) >= len(looks) - 1


def test_maps_are_drawings_with_a_label(lab: SharedLab) -> None:
    lab.touch("4K", 1)
    lab.device()
    for gpa, level in ((lab.gpa("4K", 1), 1), (lab.gpa("4K", 1), 3), (DEVICE_GPA, 1)):
        root = ElementTree.fromstring(shared_views.table_view(lab, gpa, level))
        assert root.get("role") == "img"
        assert "in use" not in (root.get("aria-label") or "in use")
    assert "1 MMIO" in shared_views.table_view(lab, DEVICE_GPA, 1)


def test_bit_strip_says_each_bit(lab: SharedLab) -> None:
    lab.touch("4K", 1)
    lab.device()
    (leaf, device) = (lab.walk(gpa)[-1].raw for gpa in (lab.gpa("4K", 1), DEVICE_GPA))
    shown = ElementTree.fromstring(shared_views.bit_strip(leaf, level=1, kind="leaf"))
    assert "R 1, W 1, X 1, PS 0" in (shown.get("aria-label") or "")
    assert "generation" in shared_views.bit_strip(device, level=1, kind="MMIO")
    assert "EPT violation" in shared_views.bit_strip(1 << 63, level=1, kind="empty")


def test_call_and_log_bars_show_the_counts(lab: SharedLab) -> None:
    (ax,) = plots.side_by_side(plots.Canvas().figure, 1)
    shared_views.call_bars(call_rows(lab, 10), ax)
    widths = [[patch.get_width() for patch in bars.patches] for bars in ax.containers]
    assert widths == [[1, 1], [11, 11], [3, 0], [10, 0]]
    (ax,) = plots.side_by_side(plots.Canvas().figure, 1)
    shared_views.log_bars(log_rows(lab, sizes=["2M"]), ax)
    widths = [[patch.get_width() for patch in bars.patches] for bars in ax.containers]
    assert widths == [[0, 2], [8, 6]]


def test_fault_bars_show_the_faults(lab: SharedLab) -> None:
    (ax,) = plots.side_by_side(plots.Canvas().figure, 1)
    shared_views.fault_bars(size_rows(lab, 20), ax)
    assert [patch.get_width() for patch in ax.patches] == [20, 1, 1]
    assert ax.get_xlabel() == "EPT violations"


def test_leaf_curves_go_through_the_points(lab: SharedLab) -> None:
    tell(lab)
    points = leaf_points(lab)
    (ax,) = plots.side_by_side(plots.Canvas().figure, 1)
    shared_views.leaf_curves(points, ax)
    shared_views.leaf_curves(points, ax)
    curves = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert curves == {
        "4K leaves": [point.pages_4k for point in points],
        "2M leaves": [point.pages_2m for point in points],
        "1G leaves": [point.pages_1g for point in points],
        "tables": [point.tables for point in points],
    }
    assert max(curves["4K leaves"]) < ax.get_ylim()[1]
    assert (ax.get_xlabel(), ax.get_yscale()) == ("deeds", "symlog")


def test_looks_need_no_table(lab: SharedLab) -> None:
    assert "ends at the root" in shared_views.table_view(lab, lab.gpa("4K"), 1)
    assert "no bitmap" in shared_views.dirty_view(lab, "4K", 0)
    assert shared_tables.walk_rows(lab, lab.gpa("4K")) == []
