"""The conversion lab and its tables: where a page stands, what a conversion costs and loses."""

from __future__ import annotations

import re

import pytest

from tdxlab.kvm.exits import HypercallExit, MemoryFaultExit
from tdxlab.kvm.spte import FROZEN_SPTE
from tdxlab.study.convert_lab import (
    LEAVES,
    PAGES,
    PRIVATE,
    PRIVATE_CONTENT,
    SHARED,
    SHARED_CONTENT,
    ZEROS,
    ConvertLab,
    PageRow,
    entry_state,
    undone,
)
from tdxlab.study.convert_steps import MEANINGS, meaning, step_rows
from tdxlab.study.convert_tables import (
    CALLS_PER_ZAP,
    ChunkRow,
    chunk_rows,
    content_rows,
    cost_rows,
    costs,
    kick_rows,
    way_rows,
)
from tdxlab.study.convert_views import CALL_LOOKS, STRIPS, short_name, strips
from tdxlab.study.plots import Canvas, side_by_side

FRESH = PageRow(0, PRIVATE, "mapped", "MAPPED", "-", "page", PRIVATE, PRIVATE_CONTENT, ZEROS)


@pytest.fixture(params=[48, 52])
def lab(request: pytest.FixtureRequest) -> ConvertLab:
    return ConvertLab(gpaw=request.param)


def stand_at(lab: ConvertLab, label: str) -> None:
    """Put the tape at the first step of that label in the last operation."""
    names = [action.name for action in lab.tape.actions]
    lab.tape.seek(next(i for i, name in enumerate(names, start=1) if name.startswith(label)))


# -- the lab


def test_every_page_begins_private_mapped_and_written(lab: ConvertLab) -> None:
    assert lab.rows() == [FRESH._replace(page=page) for page in range(PAGES)]
    assert set(lab.seamcalls().values()) == {0}
    assert lab.lost() == 0


def test_convert_to_shared_moves_the_pages_asked_for_and_no_others(lab: ConvertLab) -> None:
    (result,) = lab.convert(4, 2, to=SHARED)
    assert result.ok
    assert [type(exit_) for exit_ in result.exits] == [HypercallExit]
    for row in lab.rows():
        if row.page in (4, 5):
            expected = PageRow(row.page, SHARED, "-", "FREE", "-", "page", SHARED, ZEROS, ZEROS)
        else:
            expected = FRESH._replace(page=row.page)
        assert row == expected
    assert list(lab.seamcalls().values()) == [2, 2, 2, 2, 0, 0]
    assert lab.lost() == 2


def test_access_as_shared_is_seen_by_the_vmm_and_needs_no_seamcall(lab: ConvertLab) -> None:
    lab.convert(4, 1, to=SHARED)
    before = lab.seamcalls()
    lab.access(4, write=True)
    row = lab.rows()[4]
    assert (row.direct, row.guest_reads, row.vmm_reads) == ("mapped", *[SHARED_CONTENT] * 2)
    assert lab.seamcalls() == before


def test_back_to_private_maps_nothing_before_the_access(lab: ConvertLab) -> None:
    lab.convert(4, 1, to=SHARED)
    before = lab.seamcalls()
    lab.convert(4, 1, to=PRIVATE)
    assert lab.seamcalls() == before
    assert lab.rows()[4][1:5] == (PRIVATE, "-", "FREE", "-")
    assert lab.access(4).answers == (bytes(16),)
    assert lab.rows()[4][1:5] == (PRIVATE, "mapped", "MAPPED", "-")
    assert lab.seamcalls()["TDH.MEM.PAGE.AUG"] == 1
    assert lab.seamcalls()["TDH.MEM.SEPT.ADD"] == 0


def test_steps_stand_between_mirror_external_and_attribute(lab: ConvertLab) -> None:
    lab.convert(0, 1, to=SHARED)
    seen = {}
    for label in ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.PHYMEM", "store attributes"):
        stand_at(lab, label)
        row = lab.rows()[0]
        seen[label] = (row.attribute, row.mirror, row.external, lab.lost())
    assert seen == {
        "TDH.MEM.RANGE.BLOCK": (PRIVATE, "-", "MAPPED", 0),
        "TDH.MEM.TRACK": (PRIVATE, "-", "BLOCKED", 0),
        "TDH.PHYMEM": (PRIVATE, "-", "FREE", 1),
        "store attributes": (PRIVATE, "-", "FREE", 1),
    }
    lab.tape.seek(len(lab.tape))
    assert lab.rows()[0].attribute == SHARED


def test_mirror_is_frozen_while_the_page_is_added(lab: ConvertLab) -> None:
    lab.convert(0, 1, to=SHARED)
    lab.convert(0, 1, to=PRIVATE)
    lab.access(0)
    stand_at(lab, "TDH.MEM.PAGE.AUG")
    assert (lab.rows()[0].mirror, lab.rows()[0].external) == ("frozen", "FREE")
    stand_at(lab, "publish SPTE")
    assert (lab.rows()[0].mirror, lab.rows()[0].external) == ("frozen", "PENDING")


def test_entry_state_knows_the_three_kinds() -> None:
    assert [entry_state(0), entry_state(FROZEN_SPTE), entry_state(1 << 11)] == [
        "-",
        "frozen",
        "mapped",
    ]


def test_batches_cost_flushes_and_not_kicks() -> None:
    counts = {}
    for batch in (0, 1, 3):
        lab = ConvertLab()
        results = lab.convert(2, 8, to=SHARED, batch=batch)
        assert all(result.ok for result in results)
        counts[batch] = (len(results), lab.counts()["kicks"], lab.counts()["remote flushes"])
        assert [row.attribute for row in lab.rows()].count(SHARED) == 8
    assert counts == {0: (1, 8, 1), 1: (8, 8, 8), 3: (3, 8, 3)}


def test_punch_takes_the_page_out_of_the_file(lab: ConvertLab) -> None:
    lab.convert(1, 2, to=SHARED, punch=True)
    assert [row.guest_memfd for row in lab.rows()[:4]] == ["page", "-", "-", "page"]
    assert not lab.td.discards


@pytest.mark.parametrize(("to", "flags"), [(SHARED, 0), (PRIVATE, 8)])
def test_access_unasked_ends_in_one_memory_fault_for_each_page(
    to: str, flags: int, lab: ConvertLab
) -> None:
    if to == PRIVATE:
        lab.convert(3, 2, to=SHARED)
    exits = lab.access_unasked(3, 2, to=to).exits
    assert exits == tuple(MemoryFaultExit(lab.gpa(page), 4096, flags) for page in (3, 4))
    assert [row.attribute for row in lab.rows()[3:5]] == [to, to]


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (0, 0), (15, 2), (0, 17)])
def test_lab_refuses_pages_that_are_not_there(first: int, pages: int) -> None:
    lab = ConvertLab()
    for act in (lab.access, lambda *span: lab.convert(*span, to=SHARED)):
        with pytest.raises(ValueError, match=r"choose from 0\.\.15"):
            act(first, pages)
    assert len(lab.tape) == 0


def test_looking_changes_nothing(lab: ConvertLab) -> None:
    lab.convert(4, 2, to=SHARED)
    for position in range(0, len(lab.tape) + 1, 5):
        lab.tape.seek(position)
        before = lab.machine.digest()
        lab.rows(), lab.lost(), lab.counts()
        assert lab.machine.digest() == before


def fail_after_a_touch(lab: ConvertLab) -> None:
    with undone(lab.machine):
        lab.td.touch(0)
        raise RuntimeError(lab.machine.digest())


def test_undone_takes_everything_back_whatever_happens() -> None:
    lab = ConvertLab()
    before = lab.machine.digest()
    with pytest.raises(RuntimeError) as caught:
        fail_after_a_touch(lab)
    assert str(caught.value) != before
    assert lab.machine.digest() == before


# -- steps in words


def test_every_step_of_the_conversions_has_a_meaning() -> None:
    lab = ConvertLab()
    lab.convert(0, 1, to=SHARED, punch=True)
    lab.access(0, write=True)
    lab.convert(0, 1, to=PRIVATE, punch=True)
    lab.access(0)
    labels = tuple(MEANINGS)
    unknown = {
        action.name
        for action in lab.tape.actions
        if not action.name.startswith((*labels, "returns", "filemap_invalidate_lock"))
    }
    assert unknown == set()


def test_step_rows_tell_one_operation_with_each_seamcall_once() -> None:
    lab = ConvertLab()
    assert step_rows(lab.tape) == []
    assert meaning(lab.tape.last) == "nothing has happened yet"
    lab.access(7)
    lab.convert(0, 2, to=SHARED)
    rows = step_rows(lab.tape)
    assert rows[0].step == len([a for a in lab.tape.actions if a.phase.startswith("read")]) + 1
    calls = [row.at.split()[0] for row in rows if row.at.startswith("TDH.") and "VP" not in row.at]
    page = [*LEAVES[:4]]
    assert calls == page * 2
    assert "store attributes 0x200" in [row.at for row in rows]
    assert meaning(lab.tape.last) == "done: MapGPA pages 0..1 to shared"


# -- tables


@pytest.mark.parametrize("gpaw", [48, 52])
@pytest.mark.parametrize("pages", [1, 3, 512])
def test_costs_are_those_of_the_formula(gpaw: int, pages: int) -> None:
    rows = {row.step: row for row in cost_rows(gpaw, pages)}
    assert [row.calls for row in rows.values()] == [row.formula for row in rows.values()]
    shared = rows["to shared"]
    assert (shared.block, shared.track, shared.remove, shared.wbinvd) == (pages,) * CALLS_PER_ZAP
    assert (shared.kicks, shared.flushes, shared.exits) == (pages, 1, 1)
    assert (rows["to private"].calls, rows["to private"].flushes) == (0, 1)
    again = rows["first use as private again"]
    assert (again.aug, again.sept_add) == (pages, 0)
    assert (rows["to shared once more"].flushes, rows["to shared, never used"].flushes) == (0, 0)


@pytest.mark.parametrize("pages", [0, 513])
def test_cost_rows_refuses_more_than_2_mib(pages: int) -> None:
    with pytest.raises(ValueError, match="choose 1 to 512"):
        cost_rows(48, pages)


def test_costs_plot_shows_the_counts() -> None:
    rows = cost_rows(48, 5)
    (ax,) = side_by_side(Canvas().figure, 1)
    costs(rows, ax)
    widths = [[patch.get_width() for patch in bars.patches] for bars in ax.containers]
    assert [sum(column) for column in zip(*widths, strict=True)] == [row.calls for row in rows]
    assert ax.get_xlabel().startswith("SEAMCALLs: B RANGE.BLOCK")
    assert ax.get_title(loc="left") == "SEAMCALLs for 20 KiB"
    assert [label.get_text() for label in ax.get_yticklabels()] == [row.step for row in rows]


def test_map_gpa_comes_in_pieces_of_2_mib() -> None:
    rows = chunk_rows(48)
    assert [row.exits for row in rows] == [row.formula for row in rows] == [1, 1, 1, 2, 4]
    assert rows[-1] == ChunkRow("8 MiB", 4, 4, "2 MiB")


def test_ways_differ_in_exits_and_flushes_and_not_in_seamcalls() -> None:
    rows = way_rows(48, 3)
    assert [row.exits for row in rows] == [
        "1 HypercallExit",
        "3 HypercallExit",
        "3 MemoryFaultExit",
    ]
    assert {row.seamcalls for row in rows} == {12}
    assert [row.flushes for row in rows] == [1, 3, 3]
    assert rows[0].td_exits < rows[2].td_exits < rows[1].td_exits


@pytest.mark.parametrize(("punch", "last"), [(False, SHARED_CONTENT), (True, ZEROS)])
def test_private_data_is_lost_and_shared_data_stays_until_discarded(punch: bool, last: str) -> None:
    rows = content_rows(52, punch=punch)
    assert [row.guest_reads for row in rows] == [
        PRIVATE_CONTENT,
        ZEROS,
        SHARED_CONTENT,
        ZEROS,
        PRIVATE_CONTENT,
        last,
    ]
    assert ("-" in {row.guest_memfd for row in rows}) == punch


def test_kicks_reach_every_other_vcpu_for_every_page() -> None:
    rows = kick_rows(48, 4, 2)
    assert [(row.others, row.kicks, row.flushes, row.ipis) for row in rows] == [
        (0, 4, 1, 0),
        (1, 4, 1, 5),
        (2, 4, 1, 10),
    ]
    assert all(row.ipis == row.formula for row in rows)


# -- drawings


def test_strips_show_each_page_in_its_place() -> None:
    lab = ConvertLab()
    lab.convert(4, 2, to=SHARED)
    views = strips(lab.rows(), range(4, 6))
    assert list(views) == [strip.heading for strip in STRIPS]
    hints = re.findall(r"<title>page (\d+): ([\w ]+)</title>", views["Attributes"])
    assert [(int(page), kind) for page, kind in hints if kind == SHARED] == [
        (4, SHARED),
        (5, SHARED),
    ]
    mirror = views["Mirror EPT (KVM's copy)"]
    assert "14 mapped, the rest empty" in mirror
    assert 'class="tdxlab-chosen" x="94"' in mirror
    assert 'role="img"' in mirror
    assert "14 MAPPED, the rest FREE" in views["External: the Secure EPT"]
    assert views["Attributes"].count("the rest") == 0


def test_every_call_has_a_look_with_letter_and_hatch_of_its_own() -> None:
    looks = [CALL_LOOKS[short_name(leaf)] for leaf in LEAVES]
    assert len({look.letter for look in looks}) == len({look.colour for look in looks}) == 6
