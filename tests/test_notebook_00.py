"""Notebook 00: its cells can be run again, and damage turns it red."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tests.test_house_notebooks import code_cells
from tools.execute_notebooks import read, set_gpaw

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "notebooks" / "00-a-tds-life.ipynb"

#: What is done to the workshop before the notebook runs -> the first cell that must turn red.
DAMAGES = {
    "nothing": ("pass", None),
    "a broken leaf: MR.EXTEND refuses everything": (
        "from tdxlab.abi import leaves as abi\n"
        "from tdxlab.abi.status import TDX_OPERAND_INVALID\n"
        "from tdxlab.seam.call import Refused\n"
        "from tdxlab.seam.module import LEAVES\n"
        "def broken(call):\n"
        "    yield\n"
        "    raise Refused(TDX_OPERAND_INVALID)\n"
        "LEAVES[abi.TDH_MR_EXTEND] = broken",
        "build",
    ),
    "a button that ignores its slider": (
        "from tdxlab.study import panel_life\n"
        "old = panel_life._COMMANDS['touch']\n"
        "panel_life._COMMANDS['touch'] = lambda lab, page: old(lab, 0)",
        "touch",
    ),
    "a fault path that maps shared memory as if it were private": (
        "from tdxlab.study import life_lab\n"
        "life_lab.LifeLab.touch_shared = life_lab.LifeLab.touch\n"
        "from tdxlab.study import panel_life\n"
        "panel_life._COMMANDS['touch-shared'] = life_lab.LifeLab.touch",
        "touch-shared",
    ),
    "a mirror that is not seen to change": (
        "from tdxlab.study import life_lab\n"
        "old = life_lab._collect\n"
        "def broken(vm, sp, found):\n"
        "    return None if sp.is_mirror else old(vm, sp, found)\n"
        "life_lab._collect = broken",
        "build",
    ),
    "a map filled from the wrong end": (
        "from tdxlab.study import svg\n"
        "old = svg.map_place\n"
        "svg.map_place = lambda index: old(511 - index)",
        "build",
    ),
}


def damaged(source: str) -> NotebookNode:
    """The notebook with a cell at its top that does the damage."""
    book = read(PATH)
    book.cells = [new_code_cell(source, id="damage", execution_count=1), *book.cells]
    return book


def first_red_cell(book: NotebookNode, folder: Path) -> str | None:
    """Name of the first cell that nbval finds different from what is saved; None if none is."""
    nbformat.write(book, folder / "copy.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        "-rf",
        "-x",
    ]
    command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=60", "--color=no"]
    command += [f"--nbval-sanitize-with={ROOT / 'tests' / 'sanitize.cfg'}", "copy.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    red = re.findall(r"^FAILED .*::Cell (\d+)", done.stdout, flags=re.MULTILINE)
    return str(code_cells(book)[int(red[0])].id) if red else None


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_nbval_turns_red_where_something_is_damaged(damage: str, tmp_path: Path) -> None:
    source, red = DAMAGES[damage]
    assert first_red_cell(damaged(source), tmp_path) == red


def test_every_cell_can_be_run_twice() -> None:
    book = read(PATH)
    book.cells = [copy.deepcopy(cell) for cell in book.cells for _ in range(2)]
    shown = run(book)
    assert [text for name, text in shown if name.startswith("solution")] == [
        text for name, text in saved() for _ in range(2) if name.startswith("solution")
    ]


def test_gpaw_can_be_changed_in_the_middle_and_all_below_run_again() -> None:
    wide = read(PATH)
    set_gpaw(wide, 52)
    expected = run(copy.deepcopy(wide))
    middle = read(PATH).cells[:30]
    both = copy.deepcopy(wide)
    both.cells = [*middle, *wide.cells]
    assert run(both)[-len(expected) :] == expected
    assert all("right" in text for name, text in expected if name.startswith("solution"))
    assert expected != saved()


def test_solutions_are_right_and_answers_are_open() -> None:
    shown = dict(saved())
    solutions = [text for name, text in shown.items() if name.startswith("solution")]
    answers = [text for name, text in shown.items() if name.startswith("answer")]
    assert len(solutions) == len(answers) == 7
    assert all(": right, " in text for text in solutions)
    assert all(text.endswith("not answered yet.") for text in answers)


def run(book: NotebookNode) -> list[tuple[str, str]]:
    """Execute `book`; (name, text) of each code cell."""
    NotebookClient(book, timeout=60, kernel_name="python3").execute()
    return texts(book)


def saved() -> list[tuple[str, str]]:
    return texts(read(PATH))


def texts(book: NotebookNode) -> list[tuple[str, str]]:
    return [(cell.id, "".join(map(text_of, cell.outputs))) for cell in code_cells(book)]


def text_of(output: NotebookNode) -> str:
    return str(output.get("text") or output.data["text/plain"])
