"""Notebook 15: the sandbox, the exercises, the cells that run again; that damage shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tdxlab import policy, policy_bench, policy_run, workloads
from tdxlab.conversion import ConversionPolicy, ConvertingVmm, Request
from tdxlab.conversions import AsQemu, OneTooMany, PreFaults
from tdxlab.policies import AllAtOnce, Batches, ForgetsOne, KernelPolicy, Patient
from tdxlab.policy import ZapHost, ZapPolicy
from tdxlab.study import check, exercise, exercises, exercises_15, panel_policy, policy_tables
from tdxlab.study.exercises_15 import CONVERSION_GOALS, EXERCISES, GOALS
from tdxlab.study.panel_policy import PolicyPanel
from tests.exercise_checks import bad_advice, faults_of_check
from tests.notebook_cells import changed_among

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "15-your-own-policy.ipynb"
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "15.1": [(1, 1), (2048, 512), (1,), {1, 2}, 5],
    "15.2": [0, 768, 577, "x"],
    "15.3": ["policy", "scope", "nonsense", 7],
    "15.4": [0, 1, 400, 5000, "x"],
    "15.5": ["TDX_OPERAND_BUSY", "OPERAND_INVALID", 7],
    "15.6": [AsQemu, OneTooMany(), 7, ConversionPolicy, AllAtOnce],
    "15.7": [KernelPolicy, ForgetsOne(), 7, ZapPolicy, AsQemu],
}


class Mine(ZapPolicy):
    """A reader's policy."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """As the kernel."""
        KernelPolicy().zap(host, pages)


class MyVmm(ConversionPolicy):
    """A reader's conversion policy."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """As QEMU."""
        AsQemu().convert(vmm, request)


@pytest.fixture
def panel() -> PolicyPanel:
    return PolicyPanel(gpaw=48, mine=[Mine, MyVmm()])


# -- the panel


def test_state_is_a_function_of_the_position(panel: PolicyPanel) -> None:
    panel.scrub.value = 160
    seen = [panel.text()]
    for _ in range(20):
        panel.step.click()
        assert panel.error == ""
        seen.append(panel.text())
    assert len(set(seen)) == len(seen)
    for place in random.Random(1).choices(range(len(seen)), k=5):
        panel.scrub.value = 160 + place
        assert panel.text() == seen[place]
    panel.reset.click()
    panel.back.click()
    assert "beginning" in panel.error


def panel_faults() -> list[str]:
    """What is wrong with the panel: buttons have effects, menus none."""
    panel, faults = PolicyPanel(gpaw=52, mine=Mine), []
    before = panel.text()
    panel.policy.value, panel.workload.value = "Mine", "boot"
    if panel.text() != before:
        faults.append("choosing acts")
    panel.policy.value = "all at once"
    panel.run.click()
    if "all at once in boot is done" not in panel.summary():
        faults.append("runs something else")
    if set(panel.board) != {("kernel", "boot"), ("all at once", "boot")}:
        faults.append("keeps no board")
    result = panel.board.get(("all at once", "boot"))
    numbers = panel.numbers()
    if result and (numbers["SEAMCALLs"], numbers["IPIs"]) != (result.seamcalls, result.ipis):
        faults.append("counts wrong")
    panel.reset.click()
    panel.event.click()
    panel.event.click()
    if panel.numbers()["event"] != 2:
        faults.append("finds no event")
    panel.policy.value = "NoBlock"
    panel.run.click()
    if "TDX_GPA_RANGE_NOT_BLOCKED" not in panel.summary():
        faults.append("hides the rule")
    panel.clear.click()
    if panel.numbers()["runs"]:
        faults.append("keeps what was cleared")
    return faults


def test_panel_obeys_its_controls() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("_run", lambda self: None, "runs something else"),
        ("_enter", lambda self, result: None, "keeps no board"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PolicyPanel, name, damage)
    assert expected in panel_faults()


def test_the_readers_policies_are_first_in_the_menu(panel: PolicyPanel) -> None:
    assert panel.policy.options[:2] == (("zap: Mine", "Mine"), ("conversion: MyVmm", "MyVmm"))
    panel.policy.value = "Mine"
    panel.run.click()
    mine, kernel = panel.board["Mine", "boot"], panel.board["kernel", "boot"]
    assert mine == kernel._replace(policy="Mine")


def test_a_readers_policy_goes_before_one_of_the_same_name() -> None:
    class Other(AllAtOnce):
        name = "kernel"

    panel = PolicyPanel(gpaw=48, mine=Other)
    assert panel.policy.options[0] == ("zap: kernel", "kernel")
    panel.run.click()
    assert panel.board["kernel", "boot"].track == 4


def test_panel_says_how_far_a_run_has_come(
    panel: PolicyPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(panel, "say", said.append)
    panel.workload.value = "steady"
    panel.run.click()
    events = len(workloads.load("steady").events)
    assert said[-1] == f"kernel runs in steady: {events - 1} of {events} events done."


def test_panel_counts_conversions_and_shows_their_memory(panel: PolicyPanel) -> None:
    panel.policy.value = "keeps both"
    panel.run.click()
    result = panel.board["keeps both", "boot"]
    numbers = panel.numbers()
    assert (numbers["system calls"], numbers["entries"]) == (result.calls, result.entries)
    assert (numbers["SEAMCALLs"], numbers["twice"]) == (result.seamcalls, result.most_double)
    assert f"{result.calls} system calls, {result.entries} entries" in panel.summary()
    assert f"{result.most_double} twice" in panel.views()["What the host has"]
    assert [heading for heading, view in panel.views().items() if "<table" in view] == [
        "Leaderboard of this panel"
    ]
    panel.reset.click()
    for _ in range(2):
        panel.event.click()
    panel.step.click()
    assert (
        panel.summary() == "keeps both in boot, event 2: MapGPA of 16 pages from gfn 0x0, shared."
    )
    panel.policy.value = "OneTooMany"
    panel.run.click()
    assert "took 0x10, which the guest had accepted" in panel.summary()


def test_views_have_words_for_those_who_do_not_see_them(panel: PolicyPanel) -> None:
    panel.scrub.value = 180
    maps = [view for view in panel.views().values() if "<svg" in view]
    assert len(maps) == 2
    assert all('role="img"' in view and "aria-label=" in view for view in maps)
    assert panel._repr_mimebundle_()["image/png"].startswith("iVBOR")
    panel.clear.click()
    assert panel.error == ""


# -- runs that several tests need are made once

_RUN = policy_run.run
_RUNS: dict[Any, Any] = {}


def _run_once(one: Any, workload: Any, *, gpaw: int = 48, seed: int = 1, watch: Any = None) -> Any:
    if watch is not None:
        return _RUN(one, workload, gpaw=gpaw, seed=seed, watch=watch)
    key = (repr(one() if isinstance(one, type) else one), workload, gpaw, seed)
    if key not in _RUNS:
        _RUNS[key] = _RUN(one, workload, gpaw=gpaw, seed=seed)
    return _RUNS[key]


@pytest.fixture
def runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal runs are made once for all tests that ask for this; none of them damages anything."""
    for module in (policy_run, policy_tables, exercises_15):
        monkeypatch.setattr(module, "run", _run_once)


# -- the exercises


@pytest.mark.usefixtures("runs_once")
@pytest.mark.parametrize("number", NUMBERS)
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=52 if number < "15.3" else 48) == []


@pytest.mark.usefixtures("runs_once")
@pytest.mark.parametrize("number", [n for n in NUMBERS if n not in ("15.4", "15.6", "15.7")])
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    assert bad_advice(number, WRONG[number]) == []


@pytest.mark.usefixtures("runs_once")
def test_advice_names_what_is_wrong() -> None:
    assert "whom does that meet" in check("15.1", (2048, 512)).text
    assert "That is the kernel's" in check("15.2", 12 * 64).text
    assert "cannot serve several zaps" in check("15.2", 577).text
    assert "a smaller one is, too" in check("15.4", 400).text
    assert "with 32 system calls, at most 7 pages at once" in check("15.6", AsQemu).text
    assert "took 0x38" in check("15.6", OneTooMany).text
    assert "derive a class from ConversionPolicy" in check("15.6", AllAtOnce).text
    assert "derive a class from ZapPolicy" in check("15.7", AsQemu).text
    assert "unmapped: 1 of 16 pages" in check("15.7", ForgetsOne).text
    assert "cost of 293" in check("15.7", KernelPolicy()).text
    assert "derive a class" in check("15.7", 7).text


@pytest.mark.usefixtures("runs_once")
def test_every_conversion_goal_is_reached_by_its_solution_and_not_by_qemu() -> None:
    for seed, goal in enumerate(CONVERSION_GOALS):
        assert check("15.6", goal.solution, seed=seed)
        assert not check("15.6", AsQemu, seed=seed)
    assert not check("15.6", PreFaults, seed=1)


@pytest.mark.usefixtures("runs_once")
def test_which_rule_is_asked_for_conversions_too() -> None:
    assert check("15.3", "data", seed=11)
    hint = check("15.3", "tracking", seed=11).text
    assert "who has taken what from it" in hint
    assert "conversion_rule_rows" in check("15.3", "nonsense", seed=11).text
    assert "`tables.there_and_back()`" in str(exercise("15.3", seed=11))


@pytest.mark.usefixtures("runs_once")
def test_every_goal_is_reached_by_its_solution_and_not_by_the_kernel() -> None:
    for seed, goal in enumerate(GOALS):
        assert check("15.7", goal.solution, seed=seed)
        assert not check("15.7", KernelPolicy, seed=seed)
    assert check("15.7", AllAtOnce)
    assert not check("15.7", Batches(8), seed=3)
    assert check("15.7", Patient, seed=1)


# -- damage is noticed

_FIRST = ("parameters", "imports", "mine", "convert-mine")


def test_damage_turns_its_cell_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "WAITS", ())
    monkeypatch.setattr(policy_tables, "formula", lambda *_: (1, 1))
    monkeypatch.setattr(panel_policy, "mirror_svg", lambda pages: "<svg></svg>")
    monkeypatch.setattr(PolicyPanel, "_run", lambda self: None)
    monkeypatch.setattr(exercises_15, "formula", lambda *_: (1, 1))
    red = ("patient-run", "batch-run", "panel", "panel-drive", "exercise-1-solution")
    assert changed_among(PATH, (*_FIRST, *red)) == list(red)


def test_damage_to_kvms_part_turns_its_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_bench, "zapper", lambda *_: None)
    red = ("mine-run", "region-run", "raises-run", "luck-run")
    assert changed_among(PATH, (*_FIRST, *red)) == list(red)


def test_damage_to_conversions_turns_their_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvertingVmm, "pre_fault", lambda self, gfn, pages: "SUCCESS")
    monkeypatch.setattr(ConvertingVmm, "_take", lambda self, op: None)
    red = ("convert-wrong", "exercise-6-solution")
    assert changed_among(PATH, (*_FIRST, *red)) == list(red)


@pytest.mark.usefixtures("runs_once")
def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(faults_of_check(n, WRONG[n], gpaw=48, seeds=1) for n in NUMBERS)
