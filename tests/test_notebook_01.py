"""Notebook 01: the splitter, the exercises, the cells that run again; and that damage shows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tdxlab.arch import PAGE_SHIFT
from tdxlab.study import check, exercises, gpa_lab, gpa_split, gpa_views, panel_gpa
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_01 import EXERCISES, Hex
from tdxlab.study.gpa_split import EXAMPLE_GFN, EXAMPLE_GPA, Split
from tdxlab.study.panel_gpa import GpaSplitter
from tests.exercise_checks import accepted_wrongs, faults_of_check
from tests.notebook_cells import code_cells, shown_by, turns_red
from tests.panel_checks import missing_from_output, story_faults

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


# -- the panel


@pytest.fixture
def panel() -> GpaSplitter:
    return GpaSplitter(gpaw=48)


@WIDTHS
def test_state_is_a_function_of_the_position(gpaw: int) -> None:
    panel = GpaSplitter(gpaw=gpaw)
    assert len(panel.tape) == 11
    assert story_faults(panel, seed=1, places=20) == []


def test_a_story_that_looks_the_same_or_different_again_is_noticed(
    panel: GpaSplitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GpaSplitter, "text", lambda self: "the same")
    assert story_faults(panel, seed=1, places=1) == ["two positions look the same"]
    moment = count()
    monkeypatch.setattr(GpaSplitter, "text", lambda self: str(next(moment)))
    found = story_faults(panel, seed=1, places=1)
    assert [fault.partition(" ")[0] for fault in found] == ["position", "the"]


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
    assert missing_from_output(panel) == []


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


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


def test_numbers_are_written_in_hex() -> None:
    start = EXAMPLE_GFN << PAGE_SHIFT | 1 << 47
    answer = (start, start + 16 * 4096)
    assert repr(check("01.7", answer)) == "01.7: right, 0x800012345000, 0x800012355000."


# -- the notebook's cells


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


def test_gpaw_can_be_changed_and_the_cells_below_run_again() -> None:
    cells, names = code_cells(PATH), {}
    for cell in cells:
        shown_by(cell.source, names)
    names["GPAW"] = 52
    shown = {cell.id: shown_by(cell.source, names) for cell in cells[1:]}
    assert all("right" in text for name, text in shown.items() if name.endswith("-solution"))
    assert "PML5" in shown["levels-walk"]


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
    assert turns_red(PATH, expected)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
