"""A reader's working folder: notebooks are copied into it, nothing in it is ever overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

#: The folder of notes and answers for those who teach; readers get no copy of it.
INSTRUCTOR_FOLDER = "instructor"


def copy_fresh(source: Path, folder: Path) -> list[Path]:
    """Copy every file of a reader's below `source` into `folder`, beside what a reader has there.

    A file that is in `folder` already and unchanged is left alone. If the reader changed it, theirs
    stays and the fresh copy gets the next free name, `00-a-tds-life (2).ipynb` for one.
    Returns the new files, in order. Refuses with OSError if `folder` cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = (_copy(path, folder / path.relative_to(source)) for path in _visible_files(source))
    return [copy for copy in copies if copy is not None]


def _visible_files(source: Path) -> list[Path]:
    """The files below `source` that are a reader's, sorted: none hidden, none for instructors."""
    return sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and not any(map(_is_kept_back, path.relative_to(source).parts))
    )


def _is_kept_back(name: str) -> bool:
    """True for hidden files and folders, `.ipynb_checkpoints` for one, and for the instructor's."""
    return name.startswith(".") or name == INSTRUCTOR_FOLDER


def _copy(path: Path, wanted: Path) -> Path | None:
    """Copy `path` to the first free name of `wanted`; None if a name before it holds the same."""
    fresh = path.read_bytes()
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for name in _names(wanted):
        if name.is_file() and name.read_bytes() == fresh:
            return None
        if _write_new(name, fresh):
            return name
    raise AssertionError("the names never end")


def _names(wanted: Path) -> Iterator[Path]:
    """`a.ipynb`, `a (2).ipynb`, `a (3).ipynb` and so on."""
    yield wanted
    for number in count(2):
        yield wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")


def _write_new(path: Path, content: bytes) -> bool:
    """Write `content` to `path` if nothing has that name yet; False if something has."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True
