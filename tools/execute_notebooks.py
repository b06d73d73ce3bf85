"""Execute notebooks from a fresh kernel, top to bottom, and save them with their outputs.

`python -m tools.execute_notebooks notebooks` does it for a folder; single files may be named too.
What is saved depends on nothing but the sources: cell ids stay, execution counts run from 1 to N,
and neither timings nor widget state nor the Python version are kept.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

CELL_SECONDS = 60
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def notebooks_in(folder: Path) -> list[Path]:
    """Every notebook below `folder`, sorted, checkpoints left out; a file is itself."""
    if folder.is_file():
        return [folder]
    return sorted(
        path for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
    )


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, in format 4."""
    return nbformat.read(path, as_version=4)


def execute(book: NotebookNode, folder: Path) -> NotebookNode:
    """Run every cell of `book` with `folder` as working directory; returns `book` with new outputs.

    Refuses with nbclient's CellExecutionError if a cell raises.
    """
    client = NotebookClient(
        book,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute()
    drop_widget_views(book)
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return book


def drop_widget_views(book: NotebookNode) -> None:
    """Leave panels their picture and their text: the widget behind them is gone with its kernel."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)


def parameters_cell(book: NotebookNode) -> NotebookNode:
    """The cell tagged `parameters`; ValueError unless there is exactly one."""
    found = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells are tagged `parameters`; tag exactly one")
    return found[0]


def set_gpaw(book: NotebookNode, gpaw: int) -> None:
    """Rewrite GPAW 48 in the `parameters` cell to `gpaw`; ValueError if it is not there."""
    cell = parameters_cell(book)
    cell.source, count = re.subn(r"(?m)^(GPAW\b.*?)\b48\b", rf"\g<1>{gpaw}", cell.source)
    if count != 1:
        raise ValueError(f"the `parameters` cell sets GPAW to 48 {count} times; set it once")


def main(arguments: list[str]) -> int:
    """Execute and save every notebook in the folders, and every file, that `arguments` name."""
    for path in [path for name in arguments for path in notebooks_in(Path(name))]:
        print(path)
        book = execute(read(path), path.parent)
        nbformat.validate(book)
        nbformat.write(book, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
