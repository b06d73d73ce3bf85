"""Notebook 12: its panel, its exercises, its cells; and that damage to any of them is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tdxlab.attacks import ATTACKS, life
from tdxlab.attacks.memory import FORGED
from tdxlab.attacks.stage import SECRET
from tdxlab.attacks.verdict import LIFE_CYCLE, NOTHING, Verdict
from tdxlab.study import (
    attack_tables,
    check,
    exercises,
    exercises_12,
    panel_attack,
)
from tdxlab.study.aes_xts import AesXts
from tdxlab.study.attack_tables import POISONED
from tdxlab.study.exercises_12 import EXERCISES
from tdxlab.study.panel_attack import AttackPanel
from tests.exercise_checks import (
    accepted_wrongs,
    bad_advice,
    faults_of_check,
)
from tests.notebook_cells import turns_red
from tests.panel_checks import maps_with_words, missing_from_output, story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "12-a-hostile-host.ipynb"
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "12.1": ["PAMT", "encryption", "TLB tracking", "hope", "MAC", 3],
    "12.2": [3, 64, 0, 1, 17, "x"],
    "12.3": ["TDX_SUCCESS", "TDX_OPERAND_BUSY", "x", 0],
    "12.4": [{"x"}, {"never-run"}, set(ATTACKS), 7],
    "12.5": [-1, 9, 2, "x", (1, 2)],
    "12.6": ["nobody", "victim", "host", "poisoned", 0],
    "12.7": ["own", "x", "old", "garbage", "machine check", 0],
}


@pytest.fixture
def panel() -> AttackPanel:
    return AttackPanel(gpaw=48)


@pytest.fixture(autouse=True)
def _fresh_tables() -> None:
    """What one test damages must not be found in the memory of another one."""
    attack_tables.try_attack.cache_clear()


def tried(panel: AttackPanel, attack: str, lacks: str = "nothing") -> AttackPanel:
    panel.attack.value, panel.lacks.value = attack, lacks
    panel.run.click()
    assert panel.error == ""
    return panel


# -- the panel


@WIDTHS
def test_state_is_a_function_of_the_position(gpaw: int) -> None:
    panel = tried(AttackPanel(gpaw=gpaw), "replay-on-the-bus", "MACs")
    assert len(panel.tape) == 4
    assert story_faults(panel, seed=1, places=6) == []
    panel.back.click()
    assert "beginning" in panel.error


def test_finish_leads_to_the_verdict_and_then_says_that_it_is_over(panel: AttackPanel) -> None:
    tried(panel, "stale-tlb")
    assert "Stopped by" not in panel.summary()
    panel.finish.click()
    assert "Stopped by: TLB tracking" in panel.summary()
    assert panel.numbers()["refused"] == 2
    panel.finish.click()
    assert "all moves are made" in panel.error


def panel_faults() -> list[str]:
    """What is wrong with the panel: run has to do what the menus say, choosing does nothing."""
    panel, faults = AttackPanel(gpaw=52), []
    before = panel.text()
    panel.attack.value, panel.lacks.value = "forge-on-the-bus", "MACs"
    if panel.text() != before:
        faults.append("choosing acts")
    panel.run.click()
    report = panel.lab.report
    if (report.name, report.lacks, report.gpaw) != ("forge-on-the-bus", "MACs", 52):
        faults.append("ignores a menu")
    panel.scrub.value = len(panel.tape)
    if not panel.numbers()["not stopped"]:
        faults.append("has no verdict")
    panel.reset.click()
    if panel.lab.stage.tape.position:
        faults.append("resets another tape")
    return faults


def test_panel_obeys_its_menus() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("_run", lambda self: None, "ignores a menu"),
        ("numbers", lambda self: {"not stopped": 0}, "has no verdict"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttackPanel, name, damage)
    assert expected in panel_faults()


@pytest.mark.parametrize("name", ["corrupt-mirror", "read-leftovers", "overwrite-secure-ept"])
def test_panel_shows_every_move_of_any_stage(panel: AttackPanel, name: str) -> None:
    tried(panel, name)
    while panel.tape.position < len(panel.tape):
        panel.step.click()
        assert panel.error == ""
    moves = panel.views()["What is tried"]
    assert moves.count("<li") == moves.count("&rarr;") == len(panel.tape)


def test_answers_of_moves_to_come_are_not_told(panel: AttackPanel) -> None:
    tried(panel, "stale-tlb")
    assert "&rarr;" not in panel.views()["What is tried"]
    panel.step.click()
    shown = panel.views()["What is tried"]
    assert shown.count("&rarr;") == shown.count('aria-current="step"') == 1


def test_numbers_are_those_of_the_machine(panel: AttackPanel) -> None:
    tried(panel, "write-private", "encryption and integrity").finish.click()
    assert panel.numbers() == {
        "moves": 2,
        "of": 2,
        "refused": 0,
        "bytes as written": 4096 - 64 + sum(map(int.__eq__, FORGED, SECRET)),
        "lines poisoned": 0,
        "victim dead": 0,
        "not stopped": 1,
    }
    tried(panel, "write-private").finish.click()
    numbers = panel.numbers()
    assert (numbers["lines poisoned"], numbers["victim dead"], numbers["not stopped"]) == (1, 1, 0)
    assert numbers["bytes as written"] < 64


def test_figure_is_drawn_anew_only_when_memory_has_changed(panel: AttackPanel) -> None:
    tried(panel, "stale-tlb")
    before = panel.png()
    panel.step.click()
    assert panel.png() is before
    tried(panel, "write-private").finish.click()
    assert panel.png() != before


def test_views_have_words_for_those_who_do_not_see_them(panel: AttackPanel) -> None:
    assert maps_with_words(panel) == [True, True]
    assert missing_from_output(panel) == []


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@WIDTHS
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", ["12.2", "12.3", "12.4", "12.5"])
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    assert bad_advice(number, WRONG[number]) == []


@pytest.mark.parametrize("number", ["12.1", "12.6", "12.7"])
def test_an_answer_that_is_no_choice_is_told_the_choices(number: str) -> None:
    assert "none of" in check(number, "hope").text
    others = [one for one in WRONG[number] if isinstance(one, str)]
    told = {check(number, one).text for one in others if not check(number, one)}
    assert len(told) >= 2
    assert all(len(text) > 40 for text in told)


# -- the notebook's cells, run in this process


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


# -- damage is noticed


def no_cipher(_self: Any, _hpa: int, _key: int, line: bytes) -> bytes:
    return line


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (AesXts, "encipher", no_cipher, "read-run"),
        (life, "refused", lambda _: Verdict(LIFE_CYCLE, NOTHING, "no"), "order-run"),
        (attack_tables, "block_differences", lambda *_: [0] * 4, "blocks-run"),
        (panel_attack, "owner_svg", lambda _: "<svg></svg>", "panel"),
        (AttackPanel, "_run", lambda self: None, "panel-drive"),
    ],
    ids=["no cipher", "wrong verdict", "no blocks", "no map", "no run"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, expected)


def test_a_wrong_answer_of_the_model_turns_a_solution_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exercises_12, "owners", lambda _: [POISONED])
    assert check("12.6", "victim").state == "wrong"


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
