"""Every notebook is fit to be compared, read anywhere, and run at GPAW 52, each cell twice."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebook_cells import text_under
from tools.execute_notebooks import execute, notebooks_in, parameters_cell, read, set_gpaw

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SERIES = notebooks_in(FOLDER)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=[\"']([^\"']+)[\"']")
AGAIN = "-once-more"
#: Its cells take the last of the calls that they make: a second time there is none.
ONCE = {"02-inside-the-tdx-module"}
#: Cells that go on from where they ended, so that they show something else when they are run again.
ONWARD = {
    "00-a-tds-life": {"touch", "touch-shared"},
    "01-guest-addresses": {"panel-drive"},
    "03-secure-ept": {
        *("walk-run", "two-ways-pending", "remove-run", "remove-kick", "panel-drive"),
        *("parents-look", "size-demote", "size-promote", "relocate-run", "locks-guest"),
    },
    "04-the-mirror": {"fault-run"},
    "07-converting-memory": {"back-run"},
    "08-tlb-tracking": {"gap-refused", "panel-drive"},
}
NAMED_ID = re.compile(r"(?![0-9a-f]{8}$)[a-z][a-z0-9-]{2,63}")


def code_cells(book: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def complaints(book: NotebookNode, folder: Path) -> list[str]:
    """Everything that makes `book`, which lies in `folder`, unfit; nothing if it is fit."""
    outputs = [output for cell in code_cells(book) for output in cell.outputs]
    tests = {
        "execution counts are not 1..N": [cell.execution_count for cell in code_cells(book)]
        != list(range(1, len(code_cells(book)) + 1)),
        "an output is an error": any(output.output_type == "error" for output in outputs),
        "an output is stderr": any(output.get("name") == "stderr" for output in outputs),
        "widget state is saved": "widgets" in book.metadata,
        "not one `parameters` cell": len(_tagged(book, "parameters")) != 1,
        "a cell ends with ;": any(cell.source.rstrip().endswith(";") for cell in code_cells(book)),
        "a code cell is empty": not all(cell.source.strip() for cell in code_cells(book)),
        "a cell has no name": not all(
            NAMED_ID.fullmatch(cell.get("id", "")) for cell in book.cells
        ),
        "two cells share a name": len({cell.id for cell in book.cells}) != len(book.cells),
        "a link leads nowhere": any(not _exists(link, folder) for link in _links(book)),
    }
    return [text for text, is_bad in tests.items() if is_bad]


def _tagged(book: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", [])]


def _links(book: NotebookNode) -> list[str]:
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    return [markdown or html for markdown, html in LINK.findall(text)]


def _exists(link: str, folder: Path) -> bool:
    """True for a link to a web page, to a heading, or to a file that travels with the notebooks."""
    path = link.partition("#")[0]
    if not path or re.match(r"(?:https?|data|mailto):", link):
        return True
    target = (folder / path).resolve()
    return target.exists() and target.is_relative_to(folder.resolve())


def good_book() -> NotebookNode:
    parameters = new_code_cell(
        "GPAW = 48", id="parameters", metadata={"tags": ["parameters"]}, execution_count=1
    )
    answer = new_code_cell("print(GPAW)", id="answer", execution_count=2)
    answer.outputs = [new_output("stream", name="stdout", text="48\n")]
    return new_notebook(cells=[new_markdown_cell("# What?", id="title"), parameters, answer])


def _spoil(change: Callable[[NotebookNode], object]) -> NotebookNode:
    book = copy.deepcopy(good_book())
    change(book)
    return book


def test_series_starts_with_notebook_00() -> None:
    assert [path.name[:3] for path in SERIES[:1]] == ["00-"]


@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_notebook_is_fit_to_be_compared(path: Path) -> None:
    book = read(path)
    nbformat.validate(book)
    assert complaints(book, path.parent) == []


def with_cells_again(book: NotebookNode) -> NotebookNode:
    """The notebook with each code cell twice in a row."""
    twice = copy.deepcopy(book)
    twice.cells = [each for cell in twice.cells for each in (cell, *_again(cell))]
    return twice


def _again(cell: NotebookNode) -> list[NotebookNode]:
    if cell.cell_type != "code":
        return []
    return [new_code_cell(cell.source, id=cell.id + AGAIN)]


def different_again(texts: dict[str, str]) -> set[str]:
    """Cells that show something else the second time. texts: id -> what is under the cell."""
    return {name for name in texts if texts.get(name + AGAIN, texts[name]) != texts[name]}


@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_notebook_runs_at_gpaw_52_and_each_cell_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)
    book = read(path)
    set_gpaw(book, 52)
    if path.stem not in ONCE:
        book = with_cells_again(book)
    execute(book, path.parent)
    assert complaints(book, path.parent) == []
    texts = {cell.id: text_under(cell) for cell in code_cells(book)}
    assert different_again(texts) == ONWARD.get(path.stem, set())
    solutions = [text for name, text in texts.items() if "solution" in name]
    assert len(solutions) >= 5
    assert [text for text in solutions if "right" not in text] == []


def test_a_cell_that_fails_the_second_time_is_noticed(tmp_path: Path) -> None:
    book = good_book()
    book.cells.append(new_code_cell("left.pop()", id="takes-the-last"))
    book.cells[1].source = "GPAW, left = 48, [1, 2]"
    twice = execute(with_cells_again(book), tmp_path)
    texts = {cell.id: text_under(cell) for cell in code_cells(twice)}
    assert different_again(texts) == {"takes-the-last"}
    book.cells[1].source = "GPAW, left = 48, [1]"
    execute(copy.deepcopy(book), tmp_path)
    with pytest.raises(CellExecutionError, match="pop from empty list"):
        execute(with_cells_again(book), tmp_path)


def test_complaints_is_silent_about_a_good_notebook(tmp_path: Path) -> None:
    assert complaints(good_book(), tmp_path) == []


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("execution counts are not 1..N", lambda b: b.cells[2].update(execution_count=None)),
        ("execution counts are not 1..N", lambda b: b.cells[2].update(execution_count=3)),
        (
            "an output is an error",
            lambda b: b.cells[2].outputs.append(new_output("error", ename="ValueError")),
        ),
        (
            "an output is stderr",
            lambda b: b.cells[2].outputs.append(new_output("stream", name="stderr", text="oh")),
        ),
        ("widget state is saved", lambda b: b.metadata.update(widgets={})),
        ("not one `parameters` cell", lambda b: b.cells[1].metadata.update(tags=[])),
        ("not one `parameters` cell", lambda b: b.cells[2].metadata.update(tags=["parameters"])),
        ("a cell ends with ;", lambda b: b.cells[2].update(source="print(GPAW);\n")),
        ("a code cell is empty", lambda b: b.cells[2].update(source=" \n")),
        ("a cell has no name", lambda b: b.cells[0].update(id="3fa91c07")),
        ("two cells share a name", lambda b: b.cells[0].update(id="answer")),
        ("a link leads nowhere", lambda b: b.cells[0].update(source="[map](images/map.svg)")),
        ("a link leads nowhere", lambda b: b.cells[0].update(source="[up](../README.md)")),
    ],
)
def test_complaints_names_what_is_wrong(
    expected: str, change: Callable[[NotebookNode], object], tmp_path: Path
) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "README.md").touch()
    assert complaints(_spoil(change), folder) == [expected]


def test_complaints_lets_good_links_pass(tmp_path: Path) -> None:
    (tmp_path / "01-guest-addresses.ipynb").touch()
    book = good_book()
    book.cells[0].source = "[next](01-guest-addresses.ipynb#gpaw) [here](#x) [web](https://a.b/c)"
    assert complaints(book, tmp_path) == []


@pytest.mark.parametrize(
    "source",
    ["GPAW = 48", 'import os\n\nGPAW = int(os.environ.get("TDXLAB_GPAW", 48))  # 48 or 52'],
)
def test_set_gpaw_rewrites_the_parameters_cell(source: str) -> None:
    book = good_book()
    book.cells[1].source = source
    set_gpaw(book, 52)
    values: dict[str, object] = {}
    exec(parameters_cell(book).source, values)
    assert values["GPAW"] == 52


def test_set_gpaw_refuses_a_notebook_that_cannot_be_varied() -> None:
    book = good_book()
    book.cells[1].source = "WIDTH = 48"
    with pytest.raises(ValueError, match="0 times"):
        set_gpaw(book, 52)
    book.cells[1].metadata.tags = []
    with pytest.raises(ValueError, match="tag exactly one"):
        set_gpaw(book, 52)


def test_notebooks_in_gives_the_file_itself_and_a_folder_without_checkpoints(
    tmp_path: Path,
) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    files = [tmp_path / name for name in ("a.ipynb", ".ipynb_checkpoints/a.ipynb", "b.ipynb")]
    for file in files:
        file.touch()
    assert notebooks_in(tmp_path) == [files[0], files[2]]
    assert notebooks_in(files[2]) == [files[2]]


def test_execute_gives_reproducible_notebooks(tmp_path: Path) -> None:
    first, second = good_book(), good_book()
    second.metadata.language_info = {"name": "python", "version": "3.0"}
    assert execute(first, tmp_path) == execute(second, tmp_path)
    assert complaints(first, tmp_path) == []
    assert [cell.id for cell in first.cells] == ["title", "parameters", "answer"]


def test_execute_stops_at_a_cell_that_raises(tmp_path: Path) -> None:
    book = good_book()
    book.cells[2].source = "assert GPAW == 52"
    with pytest.raises(CellExecutionError):
        execute(book, tmp_path)
