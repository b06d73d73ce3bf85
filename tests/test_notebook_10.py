"""Notebook 10: the teardown panel, the exercises, the cells that run again; that damage shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tdxlab.study import (
    check,
    exercises,
    exercises_10,
    panel_teardown,
    phymem_bugs,
    teardown_tables,
    teardown_tries,
)
from tdxlab.study.exercises import Variant
from tdxlab.study.exercises_10 import EXERCISES
from tdxlab.study.panel_teardown import NO_FAILURE, STATUSES, TIMES, TeardownPanel
from tdxlab.study.phymem_locks import LockScene
from tdxlab.study.teardown_lab import KEYID_FIRST, KEYID_LAST, RELEASE, Failure, TeardownLab
from tests.exercise_checks import (
    accepted_wrongs,
    bad_advice,
    faults_of_check,
)
from tests.notebook_cells import changed_among, turns_red
from tests.panel_checks import maps_with_words, missing_from_output, story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "10-teardown.ipynb"
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])
NUMBERS = [exercise.number for exercise in EXERCISES]
ROLES = {"private", "TDVPR", "TDCX", "S-EPT", "TDCS", "TDR"}
WRONG: dict[str, list[Any]] = {
    "10.1": [0, 53, "x", (1, 2)],
    "10.2": [0, 1048576, 4 * 1048576, "x"],
    "10.3": [0, 1, 2052, 4107, "x"],
    "10.4": [{"TDH.NO"}, set(teardown_tries.CALLS), {"TDH.PHYMEM.PAGE.WBINVD"}, 7],
    "10.5": [(3, "free"), (3, "lost"), (1,), 16, "lost"],
    "10.6": [set(), {"TDR"}, ROLES, {"private", "TDR"}, "TDR"],
    "10.7": ["TDX_SUCCESS", "TDX_OPERAND_BUSY", "nonsense", 0],
    "10.8": [set(), set("abcde"), {"b"}, {"z"}, 3, "a"],
    "10.9": [("types",), 4 * ("harmless",), ("nobody", "types", "types", "nonsense"), 4, "types"],
}


@pytest.fixture
def panel() -> TeardownPanel:
    return TeardownPanel(gpaw=48)


# -- the panel


@WIDTHS
def test_state_is_a_function_of_the_position(gpaw: int) -> None:
    panel = TeardownPanel(gpaw=gpaw)
    panel.order.value, panel.leaf.value, panel.n.value = KEYID_FIRST, "TDH.PHYMEM.PAGE.RECLAIM", 2
    panel.pages.value = panel.vcpus.value = panel.packages.value = 1
    panel.run.click()
    assert story_faults(panel, seed=1, places=8) == []
    panel.back.click()
    assert "beginning" in panel.error


def test_next_phase_goes_through_all_phases_and_then_ends(panel: TeardownPanel) -> None:
    stops = []
    for _ in panel.lab.phases():
        panel.phase.click()
        stops.append(panel.tape.position)
    assert stops == list(panel.lab.phases().values())
    panel.phase.click()
    assert panel.tape.position == len(panel.tape)
    assert "the VM is gone" in panel.summary()
    panel.phase.click()
    assert "the TD is gone" in panel.error


def test_next_leak_finds_each_leak_and_says_when_there_is_none(panel: TeardownPanel) -> None:
    panel.leak.click()
    assert "no page leaks from here on" in panel.error
    assert panel.tape.position == 0
    panel.leaf.value, panel.n.value = "TDH.PHYMEM.PAGE.RECLAIM", 3
    panel.run.click()
    leaked = []
    for _ in range(2):
        panel.leak.click()
        assert panel.error == ""
        leaked.append(panel.numbers()["leaked"])
    assert leaked == [1, 2]
    assert "TDX_TD_ASSOCIATED_PAGES_EXIST" in panel.views()["What leaked, and why"]


def panel_faults() -> list[str]:
    """What is wrong with the panel: run has to do what the controls say, choosing nothing."""
    panel, faults = TeardownPanel(gpaw=48), []
    before = panel.text()
    panel.pages.value, panel.vcpus.value, panel.packages.value = 3, 1, 4
    panel.spread.value, panel.order.value = True, KEYID_FIRST
    panel.leaf.value, panel.n.value = "TDH.MNG.KEY.FREEID", 1
    panel.status.value, panel.times.value = "RND_NO_ENTROPY", "twice"
    if panel.text() != before:
        faults.append("choosing acts")
    panel.run.click()
    lab = panel.lab
    if (lab.pages, lab.vcpus, lab.packages) != (3, 1, 4):
        faults.append("ignores a slider")
    if list(lab.roles.values()).count("S-EPT 4K") != 3:
        faults.append("ignores the box")
    if lab.order != KEYID_FIRST:
        faults.append("ignores the order")
    if lab.failure != Failure("TDH.MNG.KEY.FREEID", 1, STATUSES["RND_NO_ENTROPY"], TIMES["twice"]):
        faults.append("ignores the failure")
    panel.scrub.value = len(panel.tape)
    if lab.tape.position != len(lab.tape) or panel.numbers()["refused"] != 2:
        faults.append("stands on another tape")
    panel.reset.click()
    if lab.tape.position:
        faults.append("resets another tape")
    return faults


def test_panel_obeys_its_controls() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("failure", lambda self: None, "ignores the failure"),
        ("_run", lambda self: None, "ignores a slider"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeardownPanel, name, damage)
    assert expected in panel_faults()


def test_panel_says_that_the_chosen_call_never_came(panel: TeardownPanel) -> None:
    panel.leaf.value, panel.n.value = "TDH.MNG.KEY.FREEID", 2
    panel.run.click()
    assert "nothing failed" not in panel.summary()
    panel.scrub.value = len(panel.tape)
    assert "no call number 2 of TDH.MNG.KEY.FREEID" in panel.summary()
    panel.leaf.value = NO_FAILURE
    panel.run.click()
    panel.scrub.value = len(panel.tape)
    assert "nothing failed" not in panel.summary()


def test_numbers_are_those_of_the_machine(panel: TeardownPanel) -> None:
    panel.scrub.value = panel.lab.phases()["CACHE.WB"]
    assert panel.numbers() == {
        "SEAMCALLs": 27,
        "expected in all": 53,
        "refused": 0,
        "in use": 22,
        "free": 6,
        "leaked": 0,
        "kept by the module": 22,
        "KeyID lost": 0,
    }


def test_views_have_words_for_those_who_do_not_see_them(panel: TeardownPanel) -> None:
    assert maps_with_words(panel) == [True, True]
    assert missing_from_output(panel) == []


# -- the exercises


def variant(number: str, *, gpaw: int = 48, seed: int = 0) -> Variant:
    """A variant, made once."""
    return exercises.variant(number, gpaw=gpaw, seed=seed)


@pytest.mark.parametrize("number", NUMBERS)
@WIDTHS
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    assert bad_advice(number, WRONG[number]) == []


@pytest.mark.parametrize("number", ["10.4", "10.6", "10.8"])
def test_the_right_things_in_a_list_are_told_to_be_a_set(number: str) -> None:
    verdict = check(number, sorted(variant(number).answer))
    assert verdict.state == "right" or "in braces" in verdict.text


def test_the_styles_that_are_wrong_are_named() -> None:
    *rest, last = variant("10.9").answer
    assert "Not for typed." in check("10.9", (*rest, "harmless")).text
    assert "Give 4 of the words impossible" in check("10.9", tuple(rest)).text
    assert "1 too many, 1 missing" in check("10.8", {"b"} | variant("10.8").answer - {"a"}).text
    assert last != "harmless"


def test_a_forgotten_phase_is_named() -> None:
    right = variant("10.1").answer
    assert "guest_memfd release" in check("10.1", right - 40).text
    assert "twice" in check("10.1", right + 40).text
    assert "the root" in check("10.3", variant("10.3").answer + 1).text.lower()
    assert "each of them save" in check("10.2", 1 << 20).text


# -- the notebook's cells, run in this process


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


# -- damage is noticed


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (teardown_tries, "try_remove", lambda lab: "fine", "legal-look"),
        (teardown_tables, "CALLS_PER_PAGE", {KEYID_LAST: 5, KEYID_FIRST: 1}, "order-run"),
        (TeardownLab, "leaked", lambda self: {}, "leaks-run"),
        (panel_teardown, "host_svg", lambda rows: "<svg></svg>", "panel"),
        (TeardownPanel, "failure", lambda self: None, "panel-drive"),
        (exercises_10, "tables_for", lambda *_: 7, "exercise-3-solution"),
    ],
    ids=["removable", "wrong formula", "no leaks", "no map", "nothing fails", "wrong answer"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, expected)


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (phymem_bugs, "judged", lambda *_: "nobody", ["styles-bugs", "styles-counts"]),
        (phymem_bugs, "VARIABLES", ("tdr",), ["styles-bugs", "styles-counts"]),
        (LockScene, "reclaim", lambda *_: "TDX_SUCCESS", ["locks-run", "locks-look"]),
        (TeardownLab, "leaked", lambda self: {}, ["retries-run"]),
    ],
    ids=["nobody notices", "few variables", "no locks", "no leaks"],
)
def test_damage_turns_the_cells_about_the_calls_red(
    where: Any, name: str, damage: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = (
        *("calls-imports", "styles-calls", "styles-bugs", "styles-counts"),
        *("retries-run", "locks-run", "locks-look"),
    )
    monkeypatch.setattr(where, name, damage)
    changed = changed_among(PATH, ("parameters", "imports", *cells))
    assert set(changed) == set(expected)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)


def test_the_lab_can_be_left_in_the_middle_and_used_again() -> None:
    lab = TeardownLab(gpaw=48)
    lab.destroy(KEYID_FIRST)
    lab.go_to(RELEASE)
    lab.destroy(KEYID_LAST)
    assert lab.tape.position == len(lab.tape)
    assert lab.leaked() == {}
