"""Notebook 00: GPAW can be changed in the middle, and damage turns it red, in nbval too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import TDX_OPERAND_INVALID
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.module import LEAVES
from tdxlab.study import life_lab, panel_life, svg
from tdxlab.study.life_lab import LifeLab
from tests.notebook_cells import code_cells, first_red_cell, run_all, saved, shown_by
from tools.execute_notebooks import read

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "notebooks" / "00-a-tds-life.ipynb"


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


def test_gpaw_can_be_changed_in_the_middle_and_all_below_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells, names = code_cells(PATH), dict[str, Any]()
    for cell in cells[:12]:
        shown_by(cell.source, names)
    monkeypatch.setenv("TDXLAB_GPAW", "52")
    shown = {cell.id: shown_by(cell.source, names) for cell in cells}
    assert shown == run_all(PATH)
    assert all("right" in text for name, text in shown.items() if name.startswith("solution"))
    assert shown != saved(PATH)


def test_solutions_are_right_and_answers_are_open() -> None:
    shown = saved(PATH)
    solutions = [text for name, text in shown.items() if name.startswith("solution")]
    answers = [text for name, text in shown.items() if name.startswith("answer")]
    assert len(solutions) == len(answers) == 7
    assert all(": right, " in text for text in solutions)
    assert all(text.endswith("not answered yet.") for text in answers)


# -- damage is noticed


def test_nbval_turns_the_cell_red_whose_button_ignores_its_slider(tmp_path: Path) -> None:
    book = read(PATH)
    damage = (
        "from tdxlab.study import panel_life\n"
        "old = panel_life._COMMANDS['touch']\n"
        "panel_life._COMMANDS['touch'] = lambda lab, page: old(lab, 0)"
    )
    book.cells = [new_code_cell(damage, id="damage", execution_count=1), *book.cells]
    assert first_red_in_nbval(book, tmp_path) == "touch"


def first_red_in_nbval(book: NotebookNode, folder: Path) -> str | None:
    """Name of the first cell that nbval finds different from what is saved; None if none is."""
    nbformat.write(book, folder / "copy.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-rf"]
    command += ["-x", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=60", "--color=no"]
    command += [f"--nbval-sanitize-with={ROOT / 'tests' / 'sanitize.cfg'}", "copy.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    red = re.findall(r"^FAILED .*::Cell (\d+)", done.stdout, flags=re.MULTILINE)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    return str(cells[int(red[0])].id) if red else None


def _refuse(_call: Call) -> Iterator[Any]:
    yield
    raise Refused(TDX_OPERAND_INVALID)


def _collect_no_mirror(vm: Vm, sp: MmuPage, found: list[Any]) -> None:
    if not sp.is_mirror:
        _collect(vm, sp, found)


_collect, _map_place = life_lab._collect, svg.map_place


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (LEAVES, abi.TDH_MR_EXTEND, _refuse, "build"),
        (life_lab, "_collect", _collect_no_mirror, "build"),
        (svg, "map_place", lambda index: _map_place(511 - index), "build"),
        (panel_life._COMMANDS, "touch-shared", LifeLab.touch, "touch-shared"),
    ],
    ids=["a leaf refuses", "mirror not seen", "map from the wrong end", "shared as if private"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: Any, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, damage)
    else:
        monkeypatch.setattr(where, name, damage)
    assert first_red_cell(PATH) == expected
