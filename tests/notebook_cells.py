"""A notebook's cells, run in this process: what they show, and which show something new."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from tools.execute_notebooks import read

Cells = dict[str, str]


def code_cells(path: Path) -> list[NotebookNode]:
    """The code cells of the notebook at `path`."""
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def shown_by(source: str, names: dict[str, Any]) -> str:
    """Run a cell; what it prints, and then the text of its last expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    return printed.getvalue() + ("" if value is None else repr(value))


def run_all(path: Path) -> Cells:
    """Every cell in order -> what it shows."""
    names: dict[str, Any] = {}
    return {cell.id: shown_by(cell.source, names) for cell in code_cells(path)}


def text_under(cell: NotebookNode) -> str:
    """The text of a code cell's outputs."""
    outputs = cell.outputs
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)


def saved(path: Path) -> Cells:
    """What the notebook has saved under each code cell."""
    return {cell.id: text_under(cell) for cell in code_cells(path)}


def changed_among(path: Path, cells: Iterable[str]) -> list[str]:
    """As `changed_cells`, but these cells alone are run, in the order given."""
    sources = {cell.id: cell.source for cell in code_cells(path)}
    kept, names = saved(path), dict[str, Any]()
    return [name for name in cells if shown_by(sources[name], names) != kept[name]]


def changed_cells(path: Path) -> list[str]:
    """Cells that show something else than what is saved: those that nbval would turn red."""
    now = run_all(path)
    return [name for name, text in saved(path).items() if now[name] != text]


def judged_cells(path: Path) -> Iterator[tuple[str, bool]]:
    """Run the notebook; (name, is it red) of each cell: red if it fails or shows something else
    than what is saved.
    """
    kept, names = saved(path), dict[str, Any]()
    for cell in code_cells(path):
        try:
            is_red = shown_by(cell.source, names) != kept[cell.id]
        except Exception:  # whatever a damaged cell raises: nbval would show it in red
            is_red = True
        yield cell.id, is_red


def first_red_cell(path: Path) -> str | None:
    """Name of the first cell that is red, None if none is; cells behind it are not run."""
    return next((name for name, is_red in judged_cells(path) if is_red), None)


def turns_red(path: Path, *expected: str) -> bool:
    """True if each of these cells is red; cells behind the last of them are not run.

    Refuses a cell that the notebook does not have: ValueError.
    """
    red, missing = set(), set(expected)
    if not missing <= saved(path).keys():
        raise ValueError(f"{path.name} has no cells {missing - saved(path).keys()}")
    for name, is_red in judged_cells(path):
        if is_red:
            red.add(name)
        missing.discard(name)
        if not missing:
            break
    return red.issuperset(expected)
