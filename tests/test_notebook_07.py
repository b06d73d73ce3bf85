"""Notebook 07: the panel, the exercises, the cells when they run again; and that damage shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxlab.kvm import set_attributes
from tdxlab.study import check, convert_views, exercises, exercises_07
from tdxlab.study.convert_lab import PRIVATE, SHARED, ConvertLab, PageRow
from tdxlab.study.convert_views import Strip, strip_svg
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_07 import EXERCISES
from tdxlab.study.panel_convert import ConvertPanel
from tests.exercise_checks import accepted_wrongs, faults_of_check
from tests.notebook_cells import code_cells, shown_by, turns_red
from tests.panel_checks import missing_from_output, story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "07-converting-memory.ipynb"
WRONG: dict[str, list[Any]] = {
    "07.1": [{"external"}, {"shared"}, set(), "mirror", 1],
    "07.2": [1, 0, 2048, "400", (4,)],
    "07.3": [0, 1, 2561, "6"],
    "07.4": ["nothing", "garbage", 0],
    "07.5": [(1, 1), (0, 99), (5,), 5],
    "07.6": [(4, False), (0, True), (8,), (8, 1), 8],
    "07.7": [("HypercallExit", 1), ("MemoryFaultExit", 99), ("MmioExit", 2), (1,), 6],
}
NUMBERS = [exercise.number for exercise in EXERCISES]


@pytest.fixture
def panel() -> ConvertPanel:
    return ConvertPanel(gpaw=48)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


# -- the panel


@pytest.mark.parametrize(("gpaw", "length"), [(48, 109), (52, 110)])
def test_the_story_can_be_gone_through_and_scrubbed(gpaw: int, length: int) -> None:
    panel = ConvertPanel(gpaw=gpaw)
    assert (panel.tape.position, len(panel.tape)) == (0, length)
    assert story_faults(panel, seed=7, places=12) == []


def test_convert_acts_on_the_chosen_pages_and_ends_the_story(panel: ConvertPanel) -> None:
    panel.first.value, panel.pages.value, panel.batch.value = 2, 5, 2
    panel.convert.click()
    assert panel.error == ""
    assert panel.tape.position == len(panel.tape)
    assert panel.numbers()["private"] == 11
    assert panel.numbers()["kicks"] == 5
    assert panel.numbers()["remote flushes"] == 3
    assert panel.summary() == (
        "done: MapGPA page 6 to shared. 5 of 16 pages have lost their private data."
    )
    panel.to.value = PRIVATE
    panel.convert.click()
    panel.read.click()
    assert panel.numbers()["PAGE.AUG"] == 5
    assert panel.numbers()["private data lost"] == 5
    panel.write.click()
    assert panel.numbers()["private data lost"] == 0


def test_read_without_map_gpa_converts_page_by_page(panel: ConvertPanel) -> None:
    panel.unasked.click()
    assert panel.tape.last.phase == "read pages 4..5 as shared"
    numbers = panel.numbers()
    assert (numbers["private"], numbers["direct leaves"], numbers["remote flushes"]) == (14, 2, 2)


def test_punch_is_seen_in_the_file(panel: ConvertPanel) -> None:
    panel.punch.value = True
    panel.convert.click()
    assert panel.numbers()["guest_memfd pages"] == 14


def test_choosing_changes_nothing_but_the_marks(panel: ConvertPanel) -> None:
    panel.scrub.value = 12
    digest, views = panel.machine.digest(), panel.views()
    panel.first.value, panel.pages.value, panel.to.value = 14, 9, PRIVATE
    panel.batch.value, panel.punch.value = 1, True
    assert panel.chosen == range(14, 16)
    assert (panel.machine.digest(), panel.tape.position) == (digest, 12)
    assert panel.views() != views


def test_next_change_stops_where_something_moved(panel: ConvertPanel) -> None:
    places, states = [], [panel._state()]
    while panel.tape.position < len(panel.tape):
        panel.change.click()
        assert panel.error == ""
        places.append(panel.tape.position)
        assert panel._state() != states[-1] or panel.tape.position == len(panel.tape)
        states.append(panel._state())
    assert places[:3] == [9, 11, 13]
    assert len(places) < len(panel.tape) // 2
    panel.change.click()
    assert "this is the end of the tape" in panel.error


def test_retell_brings_the_story_back(panel: ConvertPanel) -> None:
    before = panel.text()
    panel.pages.value = 1
    panel.convert.click()
    panel.pages.value = 2
    panel.retell.click()
    assert panel.text() == before


def test_drawing_leaves_the_machine_where_it_was(panel: ConvertPanel) -> None:
    for place in range(0, 109, 20):
        panel.scrub.value = place
        digest = panel.machine.digest()
        panel.draw()
        assert (panel.machine.digest(), panel.tape.position) == (digest, place)


def test_bundle_has_the_widget_a_picture_and_the_text(panel: ConvertPanel) -> None:
    assert missing_from_output(panel) == []


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    for seed in range(6):
        right = variant(number, seed=seed).answer
        for wrong in WRONG[number]:
            verdict = check(number, wrong, seed=seed)
            if wrong == right:
                continue
            assert verdict.state == "wrong"
            assert len(verdict.text) > 40
            is_named = isinstance(right, str | frozenset)
            assert is_named or f" {right}" not in verdict.text.removeprefix(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_answers_do_not_depend_on_the_width(number: str) -> None:
    for seed in range(3):
        answers = [variant(number, seed=seed, gpaw=gpaw).answer for gpaw in (48, 52)]
        assert answers[0] == answers[1]


# -- the notebook's cells, run in this process


@pytest.mark.parametrize("place", [4, 12, 24])
def test_gpaw_can_be_changed_in_the_middle(place: int) -> None:
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(PATH)):
        shown = shown_by(cell.source, names)
        if number == place:
            names["GPAW"] = 52
        if cell.id.endswith("-solution"):
            assert "right" in shown


# -- damage is noticed


def _one_page(self: ConvertPanel) -> None:
    """A button that ignores the slider for the number of pages."""
    self.lab.convert(self.first.value, 1, to=SHARED)


def _from_the_wrong_end(strip: Strip, rows: list[PageRow], chosen: range) -> str:
    return strip_svg(strip, [row._replace(page=15 - row.page) for row in rows], chosen)


def _no_access(self: ConvertLab, first: int, pages: int = 1, *, write: bool = False) -> None:
    """A guest that never gets to its access."""


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (ConvertPanel, "_convert", _one_page, "panel-drive"),
        (convert_views, "strip_svg", _from_the_wrong_end, "panel"),
        (set_attributes, "KVM_FILTER_PRIVATE", 1, "matrix-short"),
        (ConvertLab, "access", _no_access, "first-run"),
        (exercises_07, "_calls_back", lambda *_: (1, 1), "exercise-5-solution"),
    ],
    ids=[
        "ignores a slider",
        "strip from the wrong end",
        "wrong filter",
        "no access",
        "wrong answer",
    ],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Callable[..., Any], expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, expected)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
