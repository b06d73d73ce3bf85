"""Notebook 02: its exercises, its cells when they are run again; and that tests notice damage."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tdxlab.study import check, exercises, exercises_02, svg
from tdxlab.study.console import BUILD, TEAR_DOWN
from tdxlab.study.exercises_02 import EXERCISES, ONE_FAULT, TWO_FAULTS, seamcalls_to_run
from tdxlab.study.panel_console import ConsolePanel
from tests.notebook_cells import changed_among, code_cells, saved, shown_by

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "02-inside-the-tdx-module.ipynb"


# -- the exercises


def wrong_answers(right: Any) -> list[Any]:
    """Answers of the right kind that are wrong, and one of another kind."""
    if isinstance(right, int):
        return [right - 1, right + 1, 0, "many"]
    if isinstance(right, str):
        return ["TDX_SUCCESS", "R15", "", 7]
    if isinstance(right, tuple):
        return [right[::-1], (right[0], "R15"), ("TDX_SUCCESS", right[1]), 7]
    swapped = [right[1], right[0], *right[2:]]
    return [right[:-1], [*right, right[-1]], swapped, [], [("TDH.NO.LEAF", 0)], [("x", 99)], 7]


@pytest.mark.parametrize("number", [entry.number for entry in EXERCISES])
@pytest.mark.parametrize("gpaw", [48, 52])
@pytest.mark.parametrize("seed", [0, 1])
def test_check_takes_the_right_answer_and_refuses_wrong_ones(
    number: str, gpaw: int, seed: int
) -> None:
    right = exercises.variant(number, gpaw=gpaw, seed=seed).answer
    assert check(number, right, gpaw=gpaw, seed=seed).state == "right"
    assert check(number, ..., gpaw=gpaw, seed=seed).state == "unanswered"
    for wrong in wrong_answers(right):
        verdict = check(number, wrong, gpaw=gpaw, seed=seed)
        assert verdict.state == "wrong", wrong
        assert len(verdict.text) > len(f"{number}: not yet. ") + 20


@pytest.mark.parametrize("situation", [*ONE_FAULT, *TWO_FAULTS])
def test_every_situation_is_refused(situation: exercises_02.Situation) -> None:
    assert exercises_02._play(situation, 48).answer.kind == "refused"


def test_two_faults_blame_a_register() -> None:
    blamed = {exercises_02._play(situation, 48).answer.operand for situation in TWO_FAULTS}
    assert blamed <= {"RCX", "RDX", "R8", "R9"}
    assert len(blamed) > 1


@pytest.mark.parametrize(("packages", "vcpus", "calls"), [(1, 1, 22), (2, 1, 23), (8, 4, 50)])
def test_seamcalls_to_run_counts_as_one_does_by_hand(packages: int, vcpus: int, calls: int) -> None:
    assert seamcalls_to_run(48, packages, vcpus) == calls
    assert seamcalls_to_run(52, packages, vcpus) == calls + 1


def test_list_of_calls_may_use_any_lp_of_a_package() -> None:
    best = exercises.variant("02.5", seed=0).answer
    other = [(leaf, lp + 1) for leaf, lp in best]
    assert check("02.5", other)


def test_list_of_calls_is_told_where_it_stops() -> None:
    verdict = check("02.5", [("TDH.MNG.CREATE", 0), ("TDH.MNG.ADDCX", 0)])
    assert "Call 2, TDH.MNG.ADDCX: TDX_TD_KEYS_NOT_CONFIGURED" in verdict.text
    assert "cannot be made" in check("02.5", [("TDH.MNG.CREATE", 0), ("TDH.MNG.KEY", 0)]).text
    best = exercises.variant("02.6", seed=0).answer
    late = [*best[:-1], ("TDH.PHYMEM.CACHE.WB", 1), best[-1]]
    assert check("02.6", late).state == "wrong"


# -- the notebook


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


def test_cells_can_be_run_twice_and_gpaw_changed_in_the_middle() -> None:
    cells, names = code_cells(PATH), dict[str, Any]()
    middle = next(i for i, cell in enumerate(cells) if cell.id == "vcpu-create")
    for cell in cells[:middle]:
        for _ in range(2):
            shown_by(cell.source, names)
    names["GPAW"] = 52
    shown = {cell.id: shown_by(cell.source, names) for cell in cells[middle:]}
    assert all("right" in text for name, text in shown.items() if name.startswith("solution"))


def test_outputs_answer_the_question() -> None:
    shown = saved(PATH)
    leaves = ["CREATE", "KEY.CONFIG", "ADDCX", "INIT", "SEPT.ADD", "PAGE.ADD", "FINALIZE", "ENTER"]
    assert [leaf for leaf in leaves if leaf not in shown["answer-build"]] == []
    assert "23 SEAMCALLs to build and enter, 22 to take apart" in shown["answer-count"]


def test_stages_come_in_the_order_of_the_notebook() -> None:
    sources = [cell.source for cell in code_cells(PATH)]
    stages = re.findall(r'desk_before\("([^"]+)"', "\n".join(sources[:-18]))
    places = [(*BUILD, *TEAR_DOWN).index(stage) for stage in stages]
    assert all(one <= other for one, other in pairwise(places))


# -- tests notice damage


#: The cells that are run with damage.
KEPT = ("parameters", "tools", "console", "console-code")


@pytest.mark.parametrize(
    ("where", "name", "damage", "noticed_by"),
    [
        (
            ConsolePanel,
            "_call",
            lambda self: self.desk.call("TDH.MNG.CREATE", rcx="free page", rdx="free KeyID"),
            "console-code",
        ),
        (svg, "map_place", lambda index: _map_place(511 - index), "console"),
    ],
    ids=["a call that ignores its leaf", "a map filled from the wrong end"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Any, noticed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert changed_among(PATH, KEPT) == []
    monkeypatch.setattr(where, name, damage)
    assert noticed_by in changed_among(PATH, KEPT)


_map_place = svg.map_place


def test_exercise_test_notices_a_check_that_accepts_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda _made, _answer: True)
    for entry in EXERCISES:
        with pytest.raises(AssertionError):
            test_check_takes_the_right_answer_and_refuses_wrong_ones(entry.number, 48, 0)
