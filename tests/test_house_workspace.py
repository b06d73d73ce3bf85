"""The working folder of a reader: fresh copies arrive, nothing of theirs is overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest

from tdxlab import resources
from tdxlab.workspace import copy_fresh, without_solutions

NAME = "00-a-tds-life.ipynb"
SECOND = "00-a-tds-life (2).ipynb"
THIRD = "00-a-tds-life (3).ipynb"


def code(name: str, count: int | None, *tags: str) -> dict[str, Any]:
    """A code cell that ran as the `count`th and had the text `name` as its result."""
    result = {"output_type": "execute_result", "execution_count": count, "metadata": {}}
    outputs = [] if count is None else [result | {"data": {"text/plain": name}}]
    return {
        "cell_type": "code",
        "execution_count": count,
        "id": name,
        "metadata": {"tags": list(tags)} if tags else {},
        "outputs": outputs,
        "source": name,
    }


def text(name: str, *tags: str) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "markdown", "id": name, "metadata": metadata, "source": f"é {name}"}


def book(*cells: dict[str, Any]) -> bytes:
    """A notebook as it is saved: keys sorted, indented by one."""
    whole = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return (json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


FULL = book(
    text("title"),
    code("answer", 1, "parameters"),
    code("solution", 2, "solution", "hide"),
    text("why", "solution"),
    code("later", 3),
    code("never", None),
)
PLAIN = book(text("title"), code("answer", 1, "parameters"), code("later", 2), code("never", None))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "instructor").mkdir()
    (folder / NAME).write_bytes(FULL)
    (folder / "images" / "map.svg").write_text("<svg/>")
    (folder / "instructor" / "00.md").write_text("notes")
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A reader's folder, not made yet."""
    return tmp_path / "a" / "mine"


def test_without_solutions_drops_tagged_cells_and_counts_anew() -> None:
    assert without_solutions(FULL).decode() == PLAIN.decode()


def test_without_solutions_leaves_a_notebook_without_solutions_as_it_is() -> None:
    unusual = PLAIN.replace(b"\n", b"").replace(b'"execution_count": 2', b'"execution_count": 7')
    assert without_solutions(unusual) == unusual


def test_without_solutions_refuses_what_is_not_json() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        without_solutions(b"cells")


def test_copy_fresh_gives_readers_everything_but_solutions_and_notes(
    source: Path, mine: Path
) -> None:
    assert copy_fresh(source, mine) == [mine / NAME, mine / "images" / "map.svg"]
    assert (mine / NAME).read_bytes() == PLAIN
    assert (mine / "images" / "map.svg").read_text() == "<svg/>"
    assert {path.name for path in mine.iterdir()} == {NAME, "images"}


def test_copy_fresh_gives_instructors_solutions_and_notes(source: Path, mine: Path) -> None:
    names = {NAME, "images/map.svg", "instructor/00.md"}
    assert set(copy_fresh(source, mine, instructor=True)) == {mine / name for name in names}
    assert (mine / NAME).read_bytes() == FULL
    assert (mine / "instructor" / "00.md").read_text() == "notes"


@pytest.mark.parametrize("instructor", [False, True])
def test_copy_fresh_leaves_unchanged_files_alone(
    source: Path, mine: Path, instructor: bool
) -> None:
    copy_fresh(source, mine, instructor)
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    assert copy_fresh(source, mine, instructor) == []
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


@pytest.mark.parametrize("instructor", [False, True])
def test_copy_fresh_gives_new_names_beside_changed_files(
    source: Path, mine: Path, instructor: bool
) -> None:
    copy_fresh(source, mine, instructor)
    (mine / NAME).write_text("my answers")
    assert copy_fresh(source, mine, instructor) == [mine / SECOND]
    assert copy_fresh(source, mine, instructor) == []
    (mine / SECOND).write_text("my second try")
    assert copy_fresh(source, mine, instructor) == [mine / THIRD]
    assert (mine / NAME).read_text() == "my answers"
    assert (mine / SECOND).read_text() == "my second try"


@pytest.mark.parametrize("instructor", [False, True])
def test_copy_fresh_exchanges_unchanged_copies_of_the_other_edition(
    source: Path, mine: Path, instructor: bool
) -> None:
    copy_fresh(source, mine, not instructor)
    before = set(mine.rglob("*"))
    written = copy_fresh(source, mine, instructor)
    assert written == [mine / NAME, *([mine / "instructor" / "00.md"] if instructor else [])]
    assert (mine / NAME).read_bytes() == (FULL if instructor else PLAIN)
    assert set(mine.rglob("*")) - before <= {mine / "instructor", mine / "instructor" / "00.md"}


@pytest.mark.parametrize("instructor", [False, True])
def test_copy_fresh_keeps_changed_files_when_the_edition_changes(
    source: Path, mine: Path, instructor: bool
) -> None:
    copy_fresh(source, mine, instructor=True)
    (mine / NAME).write_text("my answers")
    (mine / "instructor" / "00.md").write_text("my notes")
    for edition in (instructor, not instructor, True):
        copy_fresh(source, mine, edition)
        assert (mine / SECOND).read_bytes() == (FULL if edition else PLAIN)
    assert (mine / NAME).read_text() == "my answers"
    assert (mine / "instructor" / "00.md").read_text() == "my notes"
    assert (mine / "instructor" / "00 (2).md").read_text() == "notes"
    assert not (mine / THIRD).exists()


@pytest.mark.parametrize("instructor", [False, True])
def test_copy_fresh_never_writes_through_a_link(
    source: Path, mine: Path, tmp_path: Path, instructor: bool
) -> None:
    mine.mkdir(parents=True)
    (mine / NAME).symlink_to(tmp_path / "elsewhere")
    copy_fresh(source, mine, instructor)
    assert not (tmp_path / "elsewhere").exists()
    assert (mine / SECOND).read_bytes() == (FULL if instructor else PLAIN)


def test_copy_fresh_exchanges_no_link(source: Path, mine: Path, tmp_path: Path) -> None:
    mine.mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(FULL)
    (mine / NAME).symlink_to(tmp_path / "elsewhere")
    assert mine / SECOND in copy_fresh(source, mine)
    assert (mine / NAME).is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == FULL


@pytest.mark.parametrize("instructor", [False, True])
def test_copy_fresh_copies_nothing_hidden(source: Path, mine: Path, instructor: bool) -> None:
    (source / ".ipynb_checkpoints").mkdir()
    (source / ".ipynb_checkpoints" / NAME).write_bytes(FULL)
    copy_fresh(source, mine, instructor)
    assert not (mine / ".ipynb_checkpoints").exists()


def test_copy_fresh_refuses_a_folder_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(OSError, match="mine"):
        copy_fresh(source, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "a file"


def test_resources_are_found_in_the_checkout() -> None:
    checkout = Path(__file__).resolve().parent.parent
    assert resources.notebooks() == checkout / "notebooks"
    assert resources.traces() == checkout / "data" / "conformance"
