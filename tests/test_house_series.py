"""What every notebook of the series has in common: short cells, tagged solutions, exercises that
wait for an answer.

That each cell shows what is saved under it is nbval's to say; that it can be run twice, and that
solutions are right at GPAW 52 too, `test_house_notebooks` says.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tdxlab.study import check, exercises
from tests.exercise_checks import different_questions
from tests.notebook_cells import code_cells, saved
from tools.execute_notebooks import notebooks_in

SERIES = {path.stem: path for path in notebooks_in(Path(__file__).parent.parent / "notebooks")}
NUMBERS = {name: list(exercises.table(name[:2])) for name in SERIES}
EXERCISES = [number for numbers in NUMBERS.values() for number in numbers]

#: Exercise -> different questions among those of 8 seeds, where they may be few.
FEWEST = {"00.1": 1, "00.4": 1, "00.7": 3, "02.5": 3, "05.5": 2, "05.7": 2, "11.2": 2}

every_notebook = pytest.mark.parametrize("name", SERIES)
every_exercise = pytest.mark.parametrize("number", EXERCISES)


@every_notebook
def test_only_solutions_are_tagged_as_such(name: str) -> None:
    cells = code_cells(SERIES[name])
    tagged = {cell.id for cell in cells if "solution" in cell.metadata.get("tags", [])}
    assert tagged == {cell.id for cell in cells if "solution" in cell.id}
    assert len(tagged) >= len(NUMBERS[name]) >= 5


@every_notebook
def test_solutions_are_saved_with_the_verdict_right(name: str) -> None:
    verdicts = {cell: text for cell, text in saved(SERIES[name]).items() if "solution" in cell}
    assert [cell for cell, text in verdicts.items() if "right" not in text] == []


@every_notebook
def test_cells_are_short(name: str) -> None:
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(SERIES[name]))
    assert lengths[len(lengths) // 2] <= 2
    assert lengths[len(lengths) * 9 // 10] <= 8
    assert lengths[-1] <= 17


@every_exercise
def test_no_answer_is_no_mistake(number: str) -> None:
    assert check(number, None).state == check(number, ...).state == "unanswered"


@every_exercise
def test_seeds_give_variants_and_each_is_reproducible(number: str) -> None:
    assert different_questions(number) >= FEWEST.get(number, 4)
