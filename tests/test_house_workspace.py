"""The working folder of a reader: fresh copies arrive, nothing is overwritten."""

from pathlib import Path

import pytest

from tdxlab import resources
from tdxlab.workspace import copy_fresh

NAME = "00-a-tds-life.ipynb"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / NAME).write_text("fresh")
    (folder / "images" / "map.svg").write_text("<svg/>")
    return folder


def test_copy_fresh_copies_everything_into_a_new_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert copy_fresh(source, folder) == [folder / NAME, folder / "images" / "map.svg"]
    assert (folder / NAME).read_text() == "fresh"
    assert (folder / "images" / "map.svg").read_text() == "<svg/>"


def test_copy_fresh_leaves_unchanged_files_alone(source: Path, tmp_path: Path) -> None:
    copy_fresh(source, tmp_path / "mine")
    before = (tmp_path / "mine" / NAME).stat().st_mtime_ns
    assert copy_fresh(source, tmp_path / "mine") == []
    assert (tmp_path / "mine" / NAME).stat().st_mtime_ns == before


def test_copy_fresh_gives_new_names_beside_changed_files(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    copy_fresh(source, folder)
    (folder / NAME).write_text("my answers")
    assert copy_fresh(source, folder) == [folder / "00-a-tds-life (2).ipynb"]
    assert copy_fresh(source, folder) == []
    (folder / "00-a-tds-life (2).ipynb").write_text("my second try")
    assert copy_fresh(source, folder) == [folder / "00-a-tds-life (3).ipynb"]
    assert (folder / NAME).read_text() == "my answers"
    assert (folder / "00-a-tds-life (2).ipynb").read_text() == "my second try"


def test_copy_fresh_never_writes_through_a_link(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    copy_fresh(source, folder)
    assert not (tmp_path / "elsewhere").exists()
    assert (folder / "00-a-tds-life (2).ipynb").read_text() == "fresh"


@pytest.mark.parametrize("kept_back", [".ipynb_checkpoints", "instructor"])
def test_copy_fresh_keeps_some_folders_back(source: Path, tmp_path: Path, kept_back: str) -> None:
    (source / kept_back).mkdir()
    (source / kept_back / NAME).write_text("not for readers")
    copy_fresh(source, tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {NAME, "images"}


def test_copy_fresh_refuses_a_folder_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(OSError, match="mine"):
        copy_fresh(source, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "a file"


def test_resources_are_found_in_the_checkout() -> None:
    checkout = Path(__file__).resolve().parent.parent
    assert resources.notebooks() == checkout / "notebooks"
    assert resources.traces() == checkout / "data" / "conformance"
