"""Notebook 08: the epoch panel, the exercises, the cells that run again; that damage shows."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tdxlab.seam import epochs
from tdxlab.study import (
    check,
    epoch_lab,
    epoch_tables,
    exercises,
    exercises_08,
    panel_epoch,
)
from tdxlab.study.epoch_lab import HOST_MOVES
from tdxlab.study.exercises import Variant
from tdxlab.study.exercises_08 import EXERCISES
from tdxlab.study.panel_epoch import STORY, EpochPanel
from tests.notebook_cells import turns_red
from tests.panel_checks import maps_with_words, missing_from_output

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "08-tlb-tracking.ipynb"
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "08.1": ["TDX_OPERAND_INVALID", "nonsense", 7],
    "08.2": [(1, 0, 0), (3, 0, 2), (3,), {1, 2, 3}, 5],
    "08.3": [{7}, {0, 1, 2}, [0], 1],
    "08.4": ["from memory", "#VE", 0],
    "08.5": [(2048, 27), (1544, 24), (1,), {1, 2}, 4],
    "08.6": [0, 1, 4096, "x"],
    "08.7": [[], ["REMOVE"] * 2, ["fly"], ["BLOCK", "TRACK", "TRACK", "kick", "REMOVE"], "BLOCK"],
}


@pytest.fixture
def panel() -> EpochPanel:
    return EpochPanel(gpaw=48)


# -- the panel


def test_state_is_a_function_of_the_position() -> None:
    panel = EpochPanel(gpaw=52)
    seen = [panel.text()]
    for _ in STORY:
        panel.step.click()
        assert panel.error == ""
        seen.append(panel.text())
    assert len(set(seen)) == len(STORY) + 1 == len(panel.tape) + 1
    for place in random.Random(1).choices(range(len(seen)), k=5):
        panel.scrub.value = place
        assert panel.text() == seen[place]
    panel.reset.click()
    assert panel.text() == seen[0]
    panel.back.click()
    assert "beginning" in panel.error


def panel_faults() -> list[str]:
    """What is wrong with the panel: each button has to make its move, and choosing none."""
    panel, faults = EpochPanel(gpaw=48, story=False), []
    before = panel.text()
    panel.vcpu.value = 1
    if panel.text() != before:
        faults.append("choosing acts")
    for name in ("enter", "read", "BLOCK", "TRACK"):
        panel.moves[name].click()
    if [row.inside for row in panel.lab.vcpu_rows()] != [False, True, False]:
        faults.append("ignores who was chosen")
    panel.moves["REMOVE"].click()
    if "TDX_TLB_TRACKING_NOT_DONE" not in panel.views()["The last answer"]:
        faults.append("hides the answer")
    panel.moves["UNBLOCK"].click()
    panel.moves["kick"].click()
    panel.moves["REMOVE"].click()
    if (panel.numbers()["IPIs"], panel.lab.page_state()) != (1, "FREE"):
        faults.append("takes no page")
    panel.moves["leave"].click()
    if "runs the host" not in panel.error:
        faults.append("lets a vCPU leave that is outside")
    panel.back.click()
    if panel.lab.page_state() != "BLOCKED":
        faults.append("does not go back")
    return faults


def test_panel_obeys_its_controls() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("_move", lambda self, name: None, "ignores who was chosen"),
        ("_move", lambda self, name: self.lab.do(name), "ignores who was chosen"),
        ("_answer", lambda self: "", "hides the answer"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpochPanel, name, damage)
    assert expected in panel_faults()


def test_the_story_is_as_the_module_tells_it(panel: EpochPanel) -> None:
    panel.scrub.value = 10
    assert panel.numbers() == {
        "td_epoch": 2,
        "even": 1,
        "odd": 2,
        "BEPOCH": 1,
        "tracked": 0,
        "TLBs with the page": 1,
        "IPIs": 0,
        "TLB flushes": panel.machine.trace.hardware()["tlb_flush"],
    }
    assert "PREVIOUS_TLB_EPOCH_BUSY" in panel.summary()
    assert "not tracked: 2 of epoch 1 are still inside" in panel.summary()
    panel.scrub.value = 14
    assert "TDH.MEM.PAGE.REMOVE on LP 3: SUCCESS" in panel.summary()


def test_the_page_goes_without_a_kick_while_two_vcpus_are_inside() -> None:
    """The third thing to try in the notebook."""
    panel = EpochPanel(gpaw=48, story=False)
    panel.lab.play("BLOCK", "TRACK", "enter 0", "enter 1", "REMOVE")
    assert (panel.lab.page_state(), len(panel.lab.inside())) == ("FREE", 2)


def test_views_have_words_for_those_who_do_not_see_them(panel: EpochPanel) -> None:
    assert maps_with_words(panel) == [True, True]
    assert missing_from_output(panel) == []


# -- the exercises


def variant(number: str, *, gpaw: int = 48, seed: int = 0) -> Variant:
    """A variant, made once."""
    return exercises.variant(number, gpaw=gpaw, seed=seed)


def accepted_wrongs(number: str, seed: int, gpaw: int) -> list[Any]:
    """Wrong answers that the check takes."""
    right = variant(number, gpaw=gpaw, seed=seed).answer
    wrongs = [wrong for wrong in WRONG[number] if wrong != right]
    return [wrong for wrong in wrongs if check(number, wrong, gpaw=gpaw, seed=seed)]


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
        for wrong in WRONG[number]:
            if wrong != right:
                text = check(number, wrong, seed=seed).text
                assert len(text) > 40
                assert str(right) not in text or number == "08.4"


def test_advice_names_what_is_wrong() -> None:
    assert "shared EPT" in check("08.5", (1544, 24)).text
    assert "BLOCK, REMOVE and WBINVD" in check("08.5", (2048, 27)).text
    assert "Fewer will do" in check("08.3", {0, 1, 2}).text
    assert "One more" in check("08.3", {0}).text
    assert "a smaller one does" in check("08.6", 512).text
    assert "The epoch is right" in check("08.2", (3, 0, 2)).text
    assert "TRACK: SUCCESS; REMOVE: TLB_TRACKING_NOT_DONE" in (
        check("08.7", ["BLOCK", "TRACK", "REMOVE"]).text
    )
    assert "fewer moves" in check("08.7", ["BLOCK", "TRACK", "kick", "kick", "REMOVE"]).text


def test_every_way_of_taking_the_page_that_is_as_short_is_right() -> None:
    assert check("08.7", ["BLOCK", "TRACK", "kick", "REMOVE"])
    assert check("08.7", ("kick", "BLOCK", "TRACK", "REMOVE"))


# -- the notebook's cells, run in this process

_RULES, _BATCHES = cache(epoch_tables.rule_rows), cache(epoch_tables.batch_rows)


@pytest.fixture(autouse=True)
def _explored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells that take longest run once for all tests of this file."""
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)
    monkeypatch.setattr(epoch_tables, "rule_rows", _RULES)
    monkeypatch.setattr(epoch_tables, "batch_rows", _BATCHES)


# -- damage is noticed


def _never_flushes(lab: Any) -> list[Any]:
    return [row._replace(cached=True) for row in _VCPU_ROWS(lab)]


_VCPU_ROWS = epoch_lab.EpochLab.vcpu_rows


#: Damages that do not hide each other -> (where, name, what takes its place, cell that turns red).
DAMAGES: dict[str, list[tuple[Any, str, Any, str]]] = {
    "in five places": [
        (epochs, "is_previous_busy", lambda *_: False, "two-run"),
        (epoch_tables, "_OVERWRITTEN", b"a new secret", "stale-run"),
        (panel_epoch, "books_svg", lambda row: "<svg></svg>", "panel"),
        (EpochPanel, "_move", lambda self, name: None, "panel-drive"),
        (exercises_08, "batch_formula", lambda *_: (1, 1, 1), "exercise-5-solution"),
    ],
    "in what is seen": [
        (epoch_lab.EpochLab, "vcpu_rows", _never_flushes, "gap-run"),
        (panel_epoch, "why", lambda row: "", "panel"),
    ],
}


@pytest.mark.parametrize("damages", DAMAGES.values(), ids=DAMAGES)
def test_damage_turns_its_cell_red(damages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name, damage, _ in damages:
        monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, *(expected for *_, expected in damages))


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, 0, 48) for number in NUMBERS)


def test_moves_of_the_host_have_tooltips(panel: EpochPanel) -> None:
    assert all(panel.moves[name].tooltip for name in HOST_MOVES)
