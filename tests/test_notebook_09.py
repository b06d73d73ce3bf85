"""Notebook 09: the slot panel, the exercises, the cells that run again; that damage shows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tdxlab.kvm import parking, zap
from tdxlab.study import check, exercises, exercises_09, panel_slot, slot_costs, slot_tables
from tdxlab.study.exercises import Variant
from tdxlab.study.exercises_09 import EXERCISES
from tdxlab.study.panel_slot import SlotPanel
from tdxlab.study.slot_lab import DEFAULT, SlotLab
from tests.notebook_cells import changed_among, code_cells

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "09-deleting-a-memslot.ipynb"
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "09.1": ["F", "T", "B", 7],
    "09.2": ["zeros", "its own data", "nothing: the TD dies", "ones", 0],
    "09.3": [524288, 1, "x"],
    "09.4": [(4104, 2107392), (4105, 4209152), (4105, 1), (1,), 5],
    "09.5": [(524288, 3), (2097152, 2), (1,), {1, 2, 3}, 4],
    "09.6": [(1625292800, 52428800), (1, 2), (1,), 4],
    "09.7": [1, 5000, 0.5, float("nan"), float("inf"), -1, "x", 0],
}


@pytest.fixture
def panel() -> SlotPanel:
    return SlotPanel(gpaw=48)


# -- the panel


def test_state_is_a_function_of_the_position() -> None:
    panel = SlotPanel(gpaw=52)
    seen = [panel.text()]
    while panel.tape.position < len(panel.tape):
        panel.step.click()
        assert panel.error == ""
        seen.append(panel.text())
    assert len(set(seen)) == len(seen) == len(panel.tape) + 1
    for place in random.Random(1).choices(range(len(seen)), k=5):
        panel.scrub.value = place
        assert panel.text() == seen[place]
    panel.reset.click()
    assert panel.text() == seen[0]
    panel.back.click()
    assert "beginning" in panel.error


def panel_faults() -> list[str]:
    """What is wrong with the panel: each button has to do its deed, and choosing none."""
    panel, faults = SlotPanel(gpaw=48, story=False), []
    before = panel.text()
    panel.used.value, panel.policy.value, panel.told.value = 16, "B", False
    if panel.text() != before:
        faults.append("choosing acts")
    panel.use_slot.click()
    if panel.numbers()["slot mapped"] != 16:
        faults.append("ignores how much is used")
    panel.delete.click()
    if panel.numbers()["slot blocked"] != 16:
        faults.append("ignores the policy")
    panel.create.click()
    panel.read.click()
    if "its own data" not in panel.summary():
        faults.append("hides what is read")
    panel.create.click()
    if "delete it first" not in panel.error:
        faults.append("creates what is there")
    panel.kind.value, panel.policy.value, panel.slot_size.value = DEFAULT, None, 64
    panel.use_rest.click()
    panel.delete.click()
    panel.create.click()
    if "The slot of the DEFAULT VM has 64 pages" not in panel.summary():
        faults.append("ignores the VM or the size")
    panel.back.click()
    if "DEFAULT VM is deleted" not in panel.summary():
        faults.append("does not go back")
    return faults


def test_panel_obeys_its_controls() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("_use", lambda self, place: self.lab.use("TD", place, 64), "ignores how much is used"),
        ("_delete", lambda self: self.lab.delete(self.kind.value), "ignores the policy"),
        ("summary", lambda self: "", "hides what is read"),
        ("_create", lambda self: None, "ignores the VM or the size"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotPanel, name, damage)
    assert expected in panel_faults()


def test_the_story_is_as_the_model_tells_it(panel: SlotPanel) -> None:
    panel.scrub.value = 3
    numbers = panel.numbers()
    assert (numbers["slot mapped"], numbers["rest mapped"], numbers["kicks"]) == (0, 64, 64)
    assert set(panel.views()) == {
        "The slot",
        "The slot, for the module",
        "The rest of the VM",
        "The last deed",
    }
    panel.scrub.value = 9
    assert panel.numbers()["rest mapped"] == 0
    assert "The slot, for the module" not in panel.views()


def test_a_dead_td_is_an_error_that_says_what_to_do() -> None:
    """The third thing to try in the notebook."""
    panel = SlotPanel(gpaw=48, story=False)
    panel.told.value = False
    for button in (panel.use_slot, panel.delete, panel.create, panel.read):
        button.click()
    assert "the TD dies" in panel.summary()
    panel.use_slot.click()
    assert "go back or reset" in panel.error


def test_views_have_words_for_those_who_do_not_see_them(panel: SlotPanel) -> None:
    panel.scrub.value = 2
    maps = [view for view in panel.views().values() if "<svg" in view]
    assert len(maps) == 3
    assert all('role="img"' in view and "aria-label=" in view for view in maps)
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == panel.text()
    assert bundle["image/png"].startswith("iVBOR")


# -- the exercises


def variant(number: str, *, gpaw: int = 48, seed: int = 0) -> Variant:
    """A variant, made once."""
    return exercises.variant(number, gpaw=gpaw, seed=seed)


def wrongs(number: str, seed: int, gpaw: int = 48) -> list[Any]:
    """Answers that are wrong for this variant."""
    right = variant(number, gpaw=gpaw, seed=seed).answer
    return [wrong for wrong in WRONG[number] if wrong != right]


def accepted_wrongs(number: str, seed: int, gpaw: int) -> list[Any]:
    """Wrong answers that the check takes."""
    given = wrongs(number, seed, gpaw)
    return [wrong for wrong in given if check(number, wrong, gpaw=gpaw, seed=seed)]


@pytest.mark.parametrize("number", NUMBERS)
@WIDTHS
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    for seed in range(3):
        right = variant(number, gpaw=gpaw, seed=seed).answer
        assert check(number, right, gpaw=gpaw, seed=seed)
        assert accepted_wrongs(number, seed, gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    for seed in range(3):
        right = variant(number, seed=seed).answer
        for wrong in wrongs(number, seed):
            text = check(number, wrong, seed=seed).text
            assert len(text) > 40
            assert str(right) not in text or number in ("09.1", "09.2", "09.7")


def test_advice_names_what_is_wrong() -> None:
    assert "type of the VM" in check("09.1", "F").text
    assert "Those are the leaves" in check("09.3", 524288).text
    assert "Count the tables" in check("09.4", (4104, 2107392)).text
    assert "leave them out" in check("09.4", (4105, 4209152)).text
    assert "There are four passes" in check("09.4", (4105, 1)).text
    assert "four SEAMCALLs" in check("09.5", (524288, 3)).text
    assert "how often" in check("09.5", (2097152, 2)).text
    assert "the slot's own pages" in check("09.6", (1625292800, 52428800)).text
    assert "T visits 262658 entries" in check("09.7", 1).text


def test_an_answer_close_to_the_crossover_is_right() -> None:
    right = variant("09.7").answer
    assert check("09.7", right * 1.04)
    assert not check("09.7", right * 1.2)


# -- the notebook's cells, run in this process


@pytest.fixture(autouse=True)
def _at_gpaw_48(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


# -- damage is noticed


#: Damages that do not hide each other -> (where, name, what takes its place, cell that turns red).
DAMAGES: dict[str, list[tuple[Any, str, Any, str]]] = {
    "in the kernel": [
        (parking, "_is_again", lambda *_: False, "kept-run"),
        (parking, "_is_again", lambda *_: False, "panel-create"),
        (exercises_09, "kvm_memslot_flush_zap_all", lambda vm: True, "exercise-1-solution"),
        (zap, "kvm_memslot_flush_zap_all", lambda vm: False, "decide-run"),
    ],
    "in the study": [
        (slot_costs, "LINES_PER_PAGE", 1, "private-run"),
        (slot_tables, "walked_by_formula", lambda *_: 0, "bill-run"),
        (slot_costs, "_overlap", lambda *_: 1, "huge-run"),
        (slot_costs, "shadow_lookups", lambda npages: slot_costs.Lookups(0, 0), "books-run"),
        (panel_slot, "sept_map", lambda lab: "<svg></svg>", "panel"),
        (SlotPanel, "_use", lambda self, place: None, "panel-drive"),
    ],
    "in the lab": [
        (SlotLab, "_found", lambda self, kind: "zeros", "kept-run"),
        (slot_tables, "vm_flushes", lambda lab: 0, "yield-run"),
    ],
}


@pytest.mark.parametrize("damages", DAMAGES.values(), ids=DAMAGES)
def test_damage_turns_its_cell_red(damages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    exercises.made.cache_clear()
    for where, name, damage, _ in damages:
        monkeypatch.setattr(where, name, damage)
    expected = {name for *_, name in damages}
    ran = [cell.id for cell in code_cells(PATH) if cell.id in expected | _NEEDED]
    assert expected <= set(changed_among(PATH, ran))
    exercises.made.cache_clear()


#: Cells that others need.
_NEEDED = {"parameters", "imports", "panel", "panel-drive"}


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, 0, 48) for number in NUMBERS)
