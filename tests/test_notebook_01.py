"""Notebook 01: addresses taken apart as KVM does it, the panel, the exercises, the cells; and that
damage shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.page_fault import PFERR_PRIVATE_ACCESS, PageFault
from tdxlab.kvm.params import MmuParams, gfn_shared_bit
from tdxlab.kvm.roots import tdp_mmu_get_root_for_fault
from tdxlab.kvm.tdp_iter import for_each_tdp_pte, for_each_tdp_pte_min_level_all
from tdxlab.study import check, exercises, gpa_lab, gpa_split, gpa_views, panel_gpa, plots
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_01 import EXERCISES, Hex
from tdxlab.study.gpa_split import EXAMPLE_GFN, EXAMPLE_GPA, Split, split
from tdxlab.study.panel_gpa import GpaSplitter
from tests.kvm.mmubench import MmuBench, tdx_bench
from tests.notebook_cells import changed_cells, code_cells, run_all, shown_by

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "01-guest-addresses.ipynb"
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "01.1": [("mirror", EXAMPLE_GFN), ("direct", EXAMPLE_GPA >> 12 | 1 << 35), ("direct", 1), (1,)],
    "01.2": [0, 511, "256", (1, 2)],
    "01.3": [0, -1, 1 << 60, 0x7CD, "0x1000"],
    "01.4": [set(), {"a", "b", "c", "d", "e"}, {"x"}, ["a"], "a"],
    "01.5": [(1 << 40) - 1, (1 << 35) - 1, (1 << 39) - 1, 1 << 35, 7, "x"],
    "01.6": [set(), {46}, {1, 2}, [52], 52],
    "01.7": [(0x12345000, 0x12355000), (1, 2), (1,), 5, (0x8_0001_2345, 0x8_0001_2355)],
}


def some_gpas(gpaw: int) -> list[Split]:
    """Edges of the space, the example in both halves, and any others."""
    draw = random.Random(gpaw)
    edges = gpa_lab.edge_gpas(gpaw).values()
    gpas = [EXAMPLE_GPA, EXAMPLE_GPA | 1 << gpaw - 1, *edges, (1 << gpaw) - 1]
    return [split(gpa, gpaw) for gpa in [*gpas, *(draw.randrange(1 << gpaw) for _ in range(20))]]


def bench(gpaw: int) -> MmuBench:
    return tdx_bench(root_level=4 if gpaw == 48 else 5, gfn_direct_bits=gfn_shared_bit(gpaw))


# -- taking apart


def test_split_gives_the_known_example() -> None:
    at = split(0x8000_1234_5678, 48)
    assert (at.is_shared, at.gfn, at.raw_gfn, at.offset) == (True, 0x12345, 0x8_0001_2345, 0x678)
    assert (at.addr, at.alias) == (0x8000_1234_5000, 0x1234_5678)
    assert [at.index(level) for level in (4, 3, 2, 1)] == [256, 0, 145, 325]
    assert (at.table, at.root, at.role) == ("shared EPT", "direct", 0x3784)
    assert split(0x8000_1234_5678, 52).root == "mirror"
    assert [split(1 << 51, 52).index(level) for level in (5, 4)] == [8, 0]
    assert [split(gpa, 52).role for gpa in (0, 1 << 51)] == [0x83785, 0x3785]


@WIDTHS
def test_split_chooses_the_root_that_kvm_chooses(gpaw: int) -> None:
    """KVM's own code, asked about the same addresses."""
    kvm = bench(gpaw)
    vcpu = kvm.load()
    for at in some_gpas(gpaw):
        code = 0 if at.is_shared else PFERR_PRIVATE_ACCESS
        root = tdp_mmu_get_root_for_fault(vcpu, PageFault.from_error_code(at.addr, code))
        assert (root.is_mirror, root.role) == (at.root == "mirror", at.role)


@WIDTHS
def test_index_is_the_one_that_kvm_walks_by(gpaw: int) -> None:
    for at in some_gpas(gpaw):
        kvm = bench(gpaw)
        vcpu, mirror = kvm.load(), not at.is_shared
        kvm.map(vcpu, at.gfn, mirror=mirror)
        walk = for_each_tdp_pte(kvm.vm, kvm.root(vcpu, mirror=mirror), at.gfn, at.gfn + 1)
        visited = {it.level: it.word & 511 for it in walk}
        assert visited == {level: at.index(level) for level in range(1, at.levels + 1)}


@pytest.mark.parametrize(("maxphyaddr", "gpaw"), [(46, 48), (47, 48), (48, 48), (51, 52), (52, 52)])
def test_reach_row_says_what_a_walk_over_the_whole_root_finds(maxphyaddr: int, gpaw: int) -> None:
    kvm = bench(gpaw)
    vcpu = kvm.load()
    kvm.vm.params = MmuParams(maxphyaddr=maxphyaddr)
    walk = for_each_tdp_pte_min_level_all(kvm.vm, kvm.root(vcpu), 4 if gpaw == 48 else 5)
    is_reached = any(it.gfn >= gfn_shared_bit(gpaw) for it in walk)
    row = gpa_split.reach_row(maxphyaddr, gpaw)
    assert row.whole_walk == ("reaches it" if is_reached else "stops below")


@WIDTHS
def test_alias_has_the_same_gfn_and_only_another_index_in_the_root(gpaw: int) -> None:
    for at in some_gpas(gpaw):
        other = split(at.alias, gpaw)
        assert (other.gfn, other.offset, other.half) != (at.gfn, at.offset, at.half)
        assert (other.gfn, other.offset) == (at.gfn, at.offset)
        differ = [level for level in range(1, 6) if other.index(level) != at.index(level)]
        assert differ == [at.levels]
        assert split(other.alias, gpaw) == at


@WIDTHS
def test_with_index_changes_that_index_alone(gpaw: int) -> None:
    at = split(EXAMPLE_GPA, gpaw)
    for level in range(1, at.levels + 1):
        last = gpa_split.last_index(gpaw, level)
        moved = at.with_index(level, last)
        assert moved.index(level) == last
        assert moved.with_index(level, at.index(level)) == at
        with pytest.raises(ValueError, match=rf"index {last + 1} at level {level}.*0\.\.{last}"):
            at.with_index(level, last + 1)


def test_split_refuses_what_the_guest_cannot_form() -> None:
    for gpa in (-1, 1 << 48):
        with pytest.raises(ValueError, match=r"allowed are 0\.\.0xffffffffffff \(GPAW 48\)"):
            split(gpa, 48)
    with pytest.raises(ValueError, match="choose 48 or 52"):
        split(0, 50)
    with pytest.raises(ValueError, match=r"KVM's gfns of this TD are 0\.\.0x7ffffffff"):
        gpa_split.walk_rows(1 << 35, 48)


def test_rows_show_both_widths_and_every_kind_of_vm() -> None:
    root = gpa_split.level_rows(52)[0]
    assert root == (5, "PML5", "51:48", "256 TiB", "0..7", "8..15")
    assert gpa_split.level_rows(48)[0] == (4, "PML4", "47:39", "512 GiB", "0..255", "256..511")
    assert [row.size for row in gpa_split.half_rows()] == ["128 TiB"] * 2 + ["2 PiB"] * 2
    rows = {row.vm: row for row in gpa_split.vm_rows(1 << 47 | 0x5678)}
    assert {name: row.fault_gfn for name, row in rows.items()} == {
        "DEFAULT": "0x800000005",
        "SW_PROTECTED": "0x800000005",
        "TDX, GPAW 48": "0x5",
        "TDX, GPAW 52": "0x800000005",
    }
    assert [row.root for row in rows.values()] == ["direct", "direct", "direct", "mirror"]
    assert gpa_split.vm_rows(1 << 48)[2].private == "#PF in the guest"
    assert gpa_split.last_slot_gfn(46, 48) == (1 << 34) - 1
    assert gpa_split.last_slot_gfn(52, 48) == (1 << 35) - 1


# -- what the model's machine says


@WIDTHS
def test_touch_tells_the_host_the_page_and_its_shared_bit(gpaw: int) -> None:
    lab = gpa_lab.GpaLab(gpaw=gpaw)
    found = lab.touch(EXAMPLE_GPA)
    assert found.host_is_told == "-"
    assert found.outcome.endswith("678")
    for at in some_gpas(gpaw):
        if at.addr == EXAMPLE_GPA & ~0xFFF:
            continue
        assert lab.touch(at.gpa)[1:] == (at.half, "TD exit: EPT violation", f"{at.addr:#x}")
        assert lab.last_gpa == at.gpa
    with pytest.raises(ValueError, match="is not an address of this guest"):
        lab.touch(1 << gpaw)


@WIDTHS
def test_gate_takes_exactly_the_private_half(gpaw: int) -> None:
    gpas = [at.addr for at in some_gpas(gpaw)] + [1 << gpaw, 1 << 52, 1 << 52 | 0x1000]
    for row in gpa_lab.gate(((hex(gpa), gpa) for gpa in gpas), gpaw):
        assert row.taken == (row.gpa < 1 << gpaw - 1)


def test_width_rows_are_the_module_s_answers_to_every_combination() -> None:
    taken = {row[:3] for row in gpa_lab.width_rows((48, 49, 52)) if row.answer == "TDX_SUCCESS"}
    wide = {(host, *legal) for host in (49, 52) for legal in ((48, 4), (48, 5), (52, 5))}
    assert taken == wide | {(48, 48, 4)}


# -- pictures


def test_root_map_shades_the_halves_and_frames_the_index() -> None:
    drawn = gpa_views.root_map(52, split(1 << 51, 52))
    assert "number 8; private: 0..7, shared: 8..15, out of reach: 496" in drawn.text
    x, y = gpa_views.map_place(8)
    assert f'class="tdxlab-chosen" x="{x}" y="{y}"' in drawn.svg
    assert f"M{x} {y}h{8 * gpa_views.CELL}v" in drawn.svg
    assert "tdxlab-chosen" not in gpa_views.root_map(48).svg


@WIDTHS
def test_bit_fields_show_every_bit_of_the_address(gpaw: int) -> None:
    at = split((1 << gpaw - 1) | EXAMPLE_GPA, gpaw)
    drawn = gpa_views.bit_fields(at)
    shown = sum(1 << bit for bit in range(gpaw) if f"<title>bit {bit}: 1</title>" in drawn)
    assert shown == at.gpa
    assert drawn.count("<title>bit") == gpaw
    assert 'aria-label="0x' in drawn


def test_walk_picture_greys_the_table_that_is_not_walked() -> None:
    shared, private = (gpa_views.walk_picture(split(gpa, 48)) for gpa in (1 << 47, 0))
    assert "Secure EPT (KVM&#x27;s mirror root): not looked at" in shared
    assert "shared EPT (KVM&#x27;s direct root): walked" in shared
    assert "Secure EPT (KVM&#x27;s mirror root): walked" in private
    assert "[256]" in shared


def test_halves_move_their_lines_and_keep_their_bars() -> None:
    (ax,) = plots.side_by_side(plots.Canvas(1.2).figure, 1)
    for gpa in (0, 3 << 46):
        marks = [gpa_views.Mark(48, "chosen", gpa), gpa_views.Mark(48, "alias", gpa ^ 1 << 47)]
        gpa_views.halves(marks, ax)
        places = [line.get_xdata()[0] for line in ax.lines]
        assert places == [mark.gpa / 2**40 for mark in marks]
        assert [bar.get_width() for bar in ax.patches] == [128, 128]


# -- the panel


@pytest.fixture
def panel() -> GpaSplitter:
    return GpaSplitter(gpaw=48)


@WIDTHS
def test_state_is_a_function_of_the_position(gpaw: int) -> None:
    panel = GpaSplitter(gpaw=gpaw)
    seen = [panel.text()]
    while panel.tape.position < len(panel.tape):
        panel.step.click()
        assert panel.error == ""
        seen.append(panel.text())
    assert len(seen) == len(set(seen)) == 12
    for place in random.Random(1).choices(range(12), k=20):
        panel.scrub.value = place
        assert panel.text() == seen[place]
    panel.reset.click()
    assert panel.text() == seen[0]


def panel_faults(gpaw: int = 48) -> list[str]:
    """What is wrong with the panel: it has to obey its controls and to draw what they chose."""
    panel, faults = GpaSplitter(gpaw=gpaw), []
    before = panel.machine.digest()
    panel.gpa.value = hex(panel.chosen.alias)
    if panel.numbers()["shared"] != 1 or panel.chosen.gfn != EXAMPLE_GFN:
        faults.append("ignores the text")
    panel.level.value = 1
    panel.index.value = 7
    if panel.chosen.index(1) != 7 or panel.gpa.value != hex(panel.chosen.gpa):
        faults.append("ignores the slider")
    half = panel.chosen.half
    panel.other_half.click()
    if panel.chosen.half == half or f"is {panel.chosen.half}" not in panel.summary():
        faults.append("ignores the other half")
    if panel.machine.digest() != before or panel.tape.position:
        faults.append("choosing touches the machine")
    panel.touch.click()
    if panel.lab.last_gpa != panel.chosen.gpa or panel.numbers()["touches"] != 1:
        faults.append("touches another address")
    return faults


@WIDTHS
def test_panel_obeys_its_controls(gpaw: int) -> None:
    assert panel_faults(gpaw) == []


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (GpaSplitter, "_slid", lambda self, change: None, "ignores the slider"),
        (GpaSplitter, "_typed", lambda self, change: None, "ignores the text"),
        (Split, "alias", property(lambda self: self.gpa), "ignores the other half"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    where: Any, name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert expected in panel_faults()


def test_level_changes_the_range_of_the_index_and_not_the_address(panel: GpaSplitter) -> None:
    wide, before = GpaSplitter(gpaw=52), panel.chosen
    assert [wide.level.value, wide.index.max] == [5, 15]
    for level in (1, 4, 3, 2):
        panel.level.value = level
        assert (panel.index.value, panel.index.max) == (before.index(level), 511)
        wide.level.value = level
        assert (wide.index.value, wide.index.max) == (before.index(level), 511)
    wide.level.value = 5
    assert (wide.index.value, wide.index.max) == (0, 15)
    assert (panel.chosen, wide.chosen.gpa) == (before, before.gpa)


def test_what_is_no_address_is_said_in_the_panel(
    panel: GpaSplitter, capsys: pytest.CaptureFixture[str]
) -> None:
    before = panel.chosen
    for typed, complaint in (("0xzz", "is no number"), ("0x1000000000000", "is not an address")):
        panel.gpa.value = typed
        assert complaint in panel.error
        assert panel.chosen == before
        assert panel.gpa.value == typed
    panel.gpa.value = " 0x8000_0000_0000 "
    assert panel.error == ""
    assert panel.chosen.gpa == 1 << 47
    assert capsys.readouterr() == ("", "")


def test_touch_leaves_the_story_and_retell_brings_it_back(panel: GpaSplitter) -> None:
    story = [action.name for action in panel.tape.actions]
    panel.scrub.value = 4
    panel.other_half.click()
    panel.touch.click()
    assert (panel.tape.position, len(panel.tape)) == (5, 5)
    assert "translated to HPA" in panel.summary()
    panel.back.click()
    assert panel.chosen.is_shared
    panel.retell.click()
    assert panel.tape.position == 0
    assert [action.name for action in panel.tape.actions] == story


def test_kvm_table_compares_with_the_other_width(panel: GpaSplitter) -> None:
    panel.gpa.value = hex(1 << 47)
    shown = panel.views()["What KVM makes of it"]
    assert "gfn 0x800000000, mirror root" in shown
    assert "direct, 0x3784" in shown
    wide = GpaSplitter(gpaw=52)
    wide.gpa.value = hex(1 << 48)
    assert "#PF in the guest" in wide.views()["What KVM makes of it"]


def test_bundle_has_the_widget_a_picture_and_the_text(panel: GpaSplitter) -> None:
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == panel.text()
    assert bundle["image/png"].startswith("iVBOR")
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"]


# -- the exercises


def accepted_wrongs(number: str, seed: int, gpaw: int) -> list[Any]:
    """Wrong answers that the check takes."""
    right = variant(number, gpaw=gpaw, seed=seed).answer
    wrongs = [wrong for wrong in WRONG[number] if wrong != right]
    return [wrong for wrong in wrongs if check(number, wrong, gpaw=gpaw, seed=seed)]


@pytest.mark.parametrize("number", NUMBERS)
@WIDTHS
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    for seed in range(8):
        right = variant(number, gpaw=gpaw, seed=seed).answer
        assert check(number, right, gpaw=gpaw, seed=seed)
        assert accepted_wrongs(number, seed, gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
@WIDTHS
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str, gpaw: int) -> None:
    for seed in range(6):
        right = variant(number, gpaw=gpaw, seed=seed).answer
        for wrong in WRONG[number]:
            verdict = check(number, wrong, gpaw=gpaw, seed=seed)
            if wrong == right:
                continue
            assert verdict.state == "wrong"
            assert len(verdict.text) > 40
            assert not isinstance(right, Hex | tuple) or str(right) not in verdict.text


@pytest.mark.parametrize("number", ["01.4", "01.6"])
def test_the_right_things_in_a_list_are_told_to_be_a_set(number: str) -> None:
    right = variant(number).answer
    assert "in braces" in check(number, sorted(right)).text


@pytest.mark.parametrize("number", NUMBERS)
def test_no_answer_is_no_mistake(number: str) -> None:
    assert check(number, None).state == check(number, ...).state == "unanswered"


@pytest.mark.parametrize("number", NUMBERS)
@WIDTHS
def test_seeds_give_variants_and_each_is_reproducible(number: str, gpaw: int) -> None:
    questions = {variant(number, seed=seed, gpaw=gpaw).question for seed in range(8)}
    assert len(questions) >= 4
    assert (
        variant(number, seed=3, gpaw=gpaw).question == variant(number, seed=3, gpaw=gpaw).question
    )


def test_numbers_are_written_in_hex() -> None:
    start = EXAMPLE_GFN << PAGE_SHIFT | 1 << 47
    answer = (start, start + 16 * 4096)
    assert repr(check("01.7", answer)) == "01.7: right, 0x800012345000, 0x800012355000."


# -- the notebook's cells


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


def test_cells_show_what_is_saved() -> None:
    assert changed_cells(PATH) == []


@WIDTHS
def test_each_cell_can_be_run_twice(gpaw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDXLAB_GPAW", str(gpaw))
    shown = run_all(PATH, times=2)
    solved = [text for name, text in shown.items() if name.endswith("-solution")]
    assert len(solved) == len(NUMBERS)
    assert all("right" in text for text in solved)


def test_gpaw_can_be_changed_and_the_cells_below_run_again() -> None:
    cells, names = code_cells(PATH), {}
    for cell in cells:
        shown_by(cell.source, names)
    names["GPAW"] = 52
    shown = {cell.id: shown_by(cell.source, names) for cell in cells[1:]}
    assert all("right" in text for name, text in shown.items() if name.endswith("-solution"))
    assert "PML5" in shown["levels-walk"]


def test_cells_are_short_and_solutions_are_tagged() -> None:
    cells = code_cells(PATH)
    lengths = sorted(len(cell.source.splitlines()) for cell in cells)
    assert lengths[len(lengths) // 2] <= 2
    tagged = {cell.id for cell in cells if "solution" in cell.metadata.get("tags", [])}
    assert tagged == {f"exercise-{number[-1]}-solution" for number in NUMBERS}


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (Split, "raw_gfn", property(lambda self: self.gfn), "alias-run"),
        (GpaSplitter, "_typed", lambda self, change: None, "panel-drive"),
        (panel_gpa, "root_map", lambda gpaw, at: gpa_views.root_map(gpaw), "panel"),
        (gpa_lab, "is_invalid_operand", lambda status: False, "gate-run"),
        (gpa_split, "gfn_shared_bit", lambda gpaw: 1 << 34, "exercise-5-solution"),
    ],
    ids=["bit not put on", "ignores its text", "no index shown", "no refusals", "another bit"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Callable[..., Any], expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert expected in changed_cells(PATH)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, 0, 48) for number in NUMBERS)
