"""Notebook 03: the walker, the exercises, the cells when they run again; and that damage shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxlab.seam import checks
from tdxlab.study import check, exercises, exercises_03, panel_sept, svg
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_03 import EXERCISES
from tdxlab.study.panel_sept import SeptWalker
from tdxlab.study.sept_moves import ILLEGAL, LATER, LEGAL, MOVES, REACHED
from tests.exercise_checks import accepted_wrongs, faults_of_check
from tests.notebook_cells import code_cells, shown_by, turns_red
from tests.panel_checks import missing_from_output, story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "03-secure-ept.ipynb"
WRONG: dict[str, list[Any]] = {
    "03.1": ["REMOVED", "nonsense", 7, ("FREE",)],
    "03.2": [0, 0xFFFF, "0x8101", (1, 2)],
    "03.3": [[], ["RANGE.BLOCK"], ["RANGE.BLOCK", "PAGE.REMOVE"], ["kick"] * 5, "kick", ["x"], 3],
    "03.4": [set(), set(REACHED), {"REMOVED"}, "FREE"],
    "03.5": [(0, "MAPPED"), (1, "NL_MAPPED"), (1,), "NL_BLOCKED"],
    "03.6": [("TDX_SUCCESS", 0), ("TDX_SUCCESS", 1), ("TDX_OPERAND_BUSY", 0), (1,), 0],
}
NUMBERS = [exercise.number for exercise in EXERCISES]


@pytest.fixture
def panel() -> SeptWalker:
    return SeptWalker(gpaw=48)


# -- the panel


@pytest.mark.parametrize(("gpaw", "length"), [(48, 25), (52, 26)])
def test_the_story_ends_as_it_was_recorded(gpaw: int, length: int) -> None:
    panel = SeptWalker(gpaw=gpaw)
    assert (panel.tape.position, len(panel.tape)) == (0, length)
    assert story_faults(panel, seed=3, places=20) == []
    panel.scrub.value = length
    assert panel.state == "MAPPED"


def test_a_move_acts_on_the_chosen_entry_and_ends_the_story(panel: SeptWalker) -> None:
    panel.scrub.value = 2
    panel.entry.value = "2M 0x40200000"
    panel.moves["PAGE.AUG"].click()
    assert (panel.tape.position, len(panel.tape)) == (3, 3)
    assert panel.lab.state(0x4020_0000, 1) == panel.state == "PENDING"
    assert panel.last_change() == ("FREE", "PENDING")
    assert "is PENDING, was FREE before the last call" in panel.summary()
    panel.back.click()
    assert panel.state == "FREE"
    panel.retell.click()
    assert (panel.tape.position, len(panel.tape)) == (0, 25)


def test_choosing_an_entry_changes_nothing_but_the_views(panel: SeptWalker) -> None:
    panel.scrub.value = 9
    digest, views = panel.machine.digest(), set()
    for name in panel.places:
        panel.entry.value = name
        views.add(panel.views()["State of the chosen entry"])
        assert panel.machine.digest() == digest
        assert panel.tape.position == 9
    assert len(views) > 3


def test_drawing_leaves_the_machine_where_it_was(panel: SeptWalker) -> None:
    for place in range(0, 26, 5):
        panel.scrub.value = place
        digest = panel.machine.digest()
        panel.draw()
        assert (panel.machine.digest(), panel.tape.position) == (digest, place)


def test_buttons_carry_what_the_matrices_say_and_never_colour_alone(panel: SeptWalker) -> None:
    panel.scrub.value = 9
    seen = {panel.lab.prospects()[move.name].verdict for move in MOVES}
    assert seen == {LEGAL, LATER, ILLEGAL}
    for name, (verdict, reason) in panel.prospects().items():
        button = panel.moves[name]
        assert button.icon == {LEGAL: "check", LATER: "clock-o", ILLEGAL: "times"}[verdict]
        assert reason in button.tooltip


def test_an_illegal_move_is_answered_by_the_module(panel: SeptWalker) -> None:
    panel.scrub.value = 3
    panel.moves["PAGE.REMOVE"].click()
    assert panel.error == ""
    assert "TDX_EPT_ENTRY_STATE_INCORRECT" in panel.views()["The last answer"]


def test_what_cannot_be_asked_is_a_sentence_in_the_panel(
    panel: SeptWalker, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.moves["PAGE.ACCEPT"].click()
    assert "TDH.VP.ENTER comes first" in panel.error
    assert len(panel.tape) == 25
    panel.step.click()
    assert panel.error == ""
    assert capsys.readouterr() == ("", "")


def test_entry_out_of_reach_is_said_in_words(panel: SeptWalker) -> None:
    panel.scrub.value = 21
    assert "out of reach: the walk stops at the 2M entry above" in panel.summary()
    panel.reset.click()
    assert "no table" in panel.summary()


def test_map_shows_the_entries_of_the_table_in_their_places(panel: SeptWalker) -> None:
    panel.scrub.value = 4
    panel.entry.value = "4K 0x40001000"
    panel.moves["PAGE.AUG"].click()
    shown = panel.views()["Its table"]
    assert re.findall(r"<title>(entry \d+: \w+)</title>", shown) == [
        "entry 0: MAPPED",
        "entry 1: PENDING",
    ]
    assert "chosen one is number 1" in shown
    for x, y in (svg.map_place(0), svg.map_place(1)):
        assert f'<rect x="{x}" y="{y}" width="{svg.CELL}"' in shown
    x, y = svg.map_place(1)
    assert f'class="tdxlab-chosen" x="{x}" y="{y}"' in shown


def test_numbers_are_those_of_the_machine(panel: SeptWalker) -> None:
    panel.scrub.value = 9
    assert panel.numbers() == {
        "FREE": 2044,
        "NL_MAPPED": 3,
        "NL_BLOCKED": 0,
        "PENDING": 0,
        "PENDING_BLOCKED": 0,
        "MAPPED": 0,
        "BLOCKED": 1,
        "td_epoch": 1,
        "vCPUs inside": 1,
        "chldcnt": 16,
        "legal moves": 3,
    }


def test_bundle_has_the_widget_a_picture_and_the_text(panel: SeptWalker) -> None:
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
            lists_all = all(state in verdict.text for state in REACHED)
            assert lists_all or str(right) not in verdict.text.removeprefix(number)


def test_every_way_out_of_the_right_length_is_accepted() -> None:
    assert check("03.3", ["kick", "RANGE.BLOCK", "TRACK", "PAGE.REMOVE"])
    assert check("03.3", ("RANGE.BLOCK", "kick", "TRACK", "PAGE.REMOVE"))
    too_long = ["RANGE.BLOCK", "TRACK", "kick", "TRACK", "PAGE.REMOVE"]
    assert "a way of 4 exists" in check("03.3", too_long).text


# -- the notebook's cells, run in this process


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


@pytest.mark.parametrize("place", [4, 12, 30])
def test_gpaw_can_be_changed_in_the_middle(place: int) -> None:
    cells, names = code_cells(PATH), {}
    for number, cell in enumerate(cells):
        shown = shown_by(cell.source, names)
        if number == place:
            names["GPAW"] = 52
        if cell.id.endswith("-solution"):
            assert "right" in shown
    assert names["race"].top == (4 if place < 30 else 3)


# -- damage is noticed


def _ignore(self: SeptWalker, name: str) -> None:
    """A move's button that does nothing."""


def _from_the_wrong_end(cells: dict[int, svg.Look], *, title: str) -> str:
    return svg.entry_map({511 - index: look for index, look in cells.items()}, title=title)


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (SeptWalker, "_make", _ignore, "panel-drive"),
        (panel_sept, "entry_map", _from_the_wrong_end, "panel"),
        (checks, "is_tracked", lambda *_: True, "remove-run"),
        (exercises_03, "_shortest_way", lambda _: (), "exercise-3-solution"),
    ],
    ids=["ignores its button", "map from the wrong end", "no tracking", "wrong answer"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Callable[..., Any], expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, expected)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
