"""What every notebook of the series has in common: cells that run again, solutions that are right,
exercises that wait for an answer.

That each cell shows what is saved under it is nbval's to say.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tdxlab.study import check, exercises
from tests.notebook_cells import code_cells, run_all, shown_by
from tools.execute_notebooks import notebooks_in

SERIES = {path.stem: path for path in notebooks_in(Path(__file__).parent.parent / "notebooks")}
NUMBERS = {name: list(exercises.table(name[:2])) for name in SERIES}
EXERCISES = [number for numbers in NUMBERS.values() for number in numbers]
#: Cells of these take the last of the calls that they make, and a second time there is none.
ONCE = {"02-inside-the-tdx-module"}

every_notebook = pytest.mark.parametrize("name", SERIES)
every_exercise = pytest.mark.parametrize("number", EXERCISES)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


@pytest.mark.parametrize("name", sorted(SERIES.keys() - ONCE))
def test_cells_can_be_run_twice_and_solutions_are_right(name: str) -> None:
    shown = run_all(SERIES[name], times=2)
    solutions = [text for cell, text in shown.items() if "solution" in cell]
    assert len(solutions) >= len(NUMBERS[name])
    assert all("right" in text for text in solutions)


@every_notebook
def test_only_solutions_are_tagged_as_such(name: str) -> None:
    cells = code_cells(SERIES[name])
    tagged = {cell.id for cell in cells if "solution" in cell.metadata.get("tags", [])}
    assert tagged == {cell.id for cell in cells if "solution" in cell.id}
    assert len(tagged) >= len(NUMBERS[name]) >= 5


@every_notebook
def test_cells_are_short(name: str) -> None:
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(SERIES[name]))
    assert lengths[len(lengths) // 2] <= 2
    assert lengths[len(lengths) * 9 // 10] <= 8
    assert lengths[-1] <= 17


@every_exercise
def test_no_answer_is_no_mistake(number: str) -> None:
    assert check(number, None).state == check(number, ...).state == "unanswered"


def test_a_cell_that_fails_the_second_time_is_noticed(tmp_path: Path) -> None:
    names: dict[str, object] = {"left": [1]}
    assert shown_by("left.pop()", names) == "1"
    with pytest.raises(IndexError):
        shown_by("left.pop()", names)
