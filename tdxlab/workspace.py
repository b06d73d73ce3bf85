"""A working folder: notebooks are copied into it, with or without their solutions.

Nothing that a reader wrote is ever overwritten. A notebook has two editions, that of readers and
that of instructors; a copy that nobody changed may be exchanged for the other edition.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

#: The folder of notes and answers for those who teach; readers get no copy of it.
INSTRUCTOR_FOLDER = "instructor"
#: The tag of the cells that instructors see and readers do not.
SOLUTION_TAG = "solution"


class _Edition(NamedTuple):
    """A file as this reader is to have it (`fresh`), and as the other kind of reader has it."""

    fresh: bytes
    other: bytes


def copy_fresh(source: Path, folder: Path, instructor: bool = False) -> list[Path]:
    """Copy every file of a reader's below `source` into `folder`, beside what a reader has there.

    instructor: with the solutions and with the notes in `instructor/`; readers get neither. A file
    that is in `folder` already is left alone. One that the reader changed stays and the fresh copy
    gets the next free name, `00-a-tds-life (2).ipynb` for one; an unchanged copy of the other
    edition gives its name to the fresh one.
    Returns the files that were written, in order. Refuses with OSError if `folder` cannot be made
    or written, with ValueError if a notebook below `source` is not JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = (
        _copy(_edition(path, instructor), folder / path.relative_to(source))
        for path in _visible_files(source, instructor)
    )
    return [copy for copy in copies if copy is not None]


def without_solutions(notebook: bytes) -> bytes:
    """`notebook`, in nbformat 4 as JSON, without its cells tagged `solution`.

    The cells that stay keep ids and outputs. If any cell goes, executed cells are numbered anew,
    1, 2, 3 and so on, as a run of what is left from top to bottom would do.
    Returns the very same bytes if no cell has the tag. Refuses with ValueError what is not JSON.
    """
    book = json.loads(notebook)
    kept = [cell for cell in book["cells"] if SOLUTION_TAG not in cell["metadata"].get("tags", [])]
    if len(kept) == len(book["cells"]):
        return notebook
    book["cells"] = kept
    executed = (cell for cell in kept if cell.get("execution_count") is not None)
    for number, cell in enumerate(executed, start=1):
        _number(cell, number)
    return (json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _number(cell: dict[str, Any], number: int) -> None:
    """Let `cell` and its results say that it was the `number`th one to run."""
    cell["execution_count"] = number
    for output in cell["outputs"]:
        if "execution_count" in output:
            output["execution_count"] = number


def _edition(path: Path, instructor: bool) -> _Edition:
    """Both editions of the file at `path`; only those of a notebook can differ."""
    full = path.read_bytes()
    plain = without_solutions(full) if path.suffix == ".ipynb" else full
    return _Edition(full, plain) if instructor else _Edition(plain, full)


def _visible_files(source: Path, instructor: bool) -> list[Path]:
    """The files below `source` that this reader gets, sorted; hidden ones nobody gets."""
    return sorted(
        path
        for path in source.rglob("*")
        if path.is_file()
        and not any(_is_kept_back(part, instructor) for part in path.relative_to(source).parts)
    )


def _is_kept_back(name: str, instructor: bool) -> bool:
    """True for hidden files and folders, `.ipynb_checkpoints` for one, and for the instructor's."""
    return name.startswith(".") or (name == INSTRUCTOR_FOLDER and not instructor)


def _copy(edition: _Edition, wanted: Path) -> Path | None:
    """Write the fresh edition to the first name of `wanted` that is free or holds the other one.

    Returns that name, None if a name before it holds the fresh edition already.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for name in _names(wanted):
        present = name.read_bytes() if name.is_file() else None
        if present == edition.fresh:
            return None
        if present == edition.other and not name.is_symlink():
            _exchange(name, edition.fresh)
            return name
        if _write_new(name, edition.fresh):
            return name
    raise AssertionError("the names never end")


def _names(wanted: Path) -> Iterator[Path]:
    """`a.ipynb`, `a (2).ipynb`, `a (3).ipynb` and so on."""
    yield wanted
    for number in count(2):
        yield wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")


def _exchange(path: Path, content: bytes) -> None:
    """Put `content` in the place of the file at `path`, whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("xb") as file:
        file.write(content)
    fresh.replace(path)


def _write_new(path: Path, content: bytes) -> bool:
    """Write `content` to `path` if nothing has that name yet; False if something has."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True
