"""Notebook 05: its panel, its exercises; and that damage to them and to its cells is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tdxlab.races import SCENARIOS
from tdxlab.study import check, exercises, exercises_05, race_lab
from tdxlab.study.exercises_05 import EXERCISES
from tdxlab.study.panel_race import RacePanel
from tests.exercise_checks import bad_advice, faults_of_check
from tests.notebook_cells import turns_red
from tests.panel_checks import story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "05-races.ipynb"
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "05.1": [2**7, 5040, 0, -1, "x"],
    "05.2": [35, 21, 0, "x"],
    "05.3": [12, 35, 7, "x"],
    "05.4": ["RET_PF_FIXED", "RET_PF_SPURIOUS", "RET_PF_RETRY", "RET_PF_EMULATE", 1],
    "05.5": [[0] * 7 + [1] * 3, [0, 1], [9], "x"],
    "05.6": ["nothing", "vm_bugged", "deadlock", "Warned", "panic", 1],
    "05.7": [[0] * 7 + [1] * 3, [0, 1], [9], "x"],
}


@pytest.fixture
def panel() -> RacePanel:
    return RacePanel()


# -- the panel


def test_the_story_can_be_gone_through_and_scrubbed(panel: RacePanel) -> None:
    assert (panel.tape.position, len(panel.tape)) == (0, 16)
    assert story_faults(panel, seed=7, places=8) == []


def test_movers_move_and_say_who_cannot(panel: RacePanel) -> None:
    panel.set_up.click()
    for number in [0, 0, 0, 0, 1, 1, 1]:
        panel.movers[number].click()
    assert panel.numbers() == {
        "vCPU 0 moves": 4,
        "vCPU 1 moves": 3,
        "retries": 1,
        "frozen": 1,
        "mirror present": 0,
        "S-EPT mapped": 0,
        "SEAMCALLs": 0,
        "broken": 0,
    }
    assert panel.movers[1].tooltip == "vCPU 1 cannot move"
    panel.movers[1].click()
    assert "vCPU 1 starts over when another has changed something" in panel.error
    panel.movers[3].click()
    assert "there are 2 operations" in panel.error
    panel.run_on.click()
    assert panel.summary().endswith("All have ended, and no rule is broken.")


def test_set_up_takes_what_the_menus_choose_and_nothing_before(panel: RacePanel) -> None:
    before = panel.text()
    panel.scenario.value, panel.vcpus.value, panel.rule.value = "fresh-region", 3, "early-publish"
    assert panel.text() == before
    panel.set_up.click()
    assert (panel.lab.scenario, panel.lab.vcpus, panel.lab.rule) == (
        "fresh-region",
        3,
        "early-publish",
    )
    assert [button.description for button in panel.movers] == ["vCPU 0", "vCPU 1", "vCPU 2", ""]
    panel.violation.click()
    assert panel.numbers()["broken"] == 0
    panel.step.click()
    assert panel.numbers()["broken"] == 1
    assert panel.summary().endswith("Broken, vm_bugged: TDH_MEM_PAGE_AUG TDX_EPT_WALK_FAILED.")


def test_set_up_refuses_more_vcpus_than_the_scenario_is_made_for(
    panel: RacePanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "fault-zap", SCENARIOS["fault-zap"]._replace(most=1))
    before = panel.lab
    panel.scenario.value, panel.vcpus.value = "fault-zap", 2
    panel.set_up.click()
    assert "fault-zap is made for 1 vCPUs at most" in panel.error
    assert panel.lab is before


def test_a_thread_has_a_lane_and_a_button_too(panel: RacePanel) -> None:
    panel.scenario.value, panel.vcpus.value = "fault-zap", 1
    panel.set_up.click()
    assert [b.description for b in panel.movers if b.layout.display != "none"] == [
        "vCPU 0",
        "punch hole",
    ]
    panel.movers[1].click()
    assert panel.numbers()["punch hole moves"] == 1


def test_retell_brings_the_story_back(panel: RacePanel) -> None:
    before = panel.text()
    panel.rule.value = "no-freeze"
    panel.set_up.click()
    panel.retell.click()
    assert panel.text() == before
    assert panel.rule.value == ""


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=48, seeds=2) == []


@pytest.mark.parametrize("number", ["05.1", "05.2", "05.3", "05.5", "05.7"])
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    assert [text for text in bad_advice(number, WRONG[number]) if len(text) <= 40] == []


@pytest.mark.parametrize("number", ["05.4", "05.6"])
def test_an_answer_that_is_no_choice_is_told_the_choices(number: str) -> None:
    assert "choose from" in check(number, "hope").text


def test_a_schedule_that_is_right_may_differ_from_the_one_that_is_shown() -> None:
    assert check("05.5", [1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0])
    assert check("05.7", (1,) * 6 + (0,) * 5)


# -- damage is noticed


def _the_other_one(self: RacePanel, number: int) -> None:
    self.lab.play([1 - number])


def test_a_button_that_moves_somebody_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RacePanel, "_move", _the_other_one)
    panel = RacePanel(story=False)
    panel.movers[0].click()
    assert panel.numbers()["vCPU 0 moves"] == 0


def test_a_lab_that_sees_no_frozen_entry_turns_a_cell_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)
    monkeypatch.setattr(race_lab, "FROZEN_SPTE", 1)
    assert turns_red(PATH, "hold-run")


def test_a_wrong_answer_in_the_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises_05, "comb", lambda n, k: n + k)
    exercises.made.cache_clear()
    assert not check("05.1", 35)
