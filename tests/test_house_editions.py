"""What `tdxlab lab` hands out: notebooks that run without their solutions, or have them all."""

import json
from pathlib import Path

import pytest

from tdxlab import lab, resources
from tdxlab.cli import main
from tdxlab.workspace import copy_fresh
from tests.notebook_cells import changed_cells, code_cells
from tools.execute_notebooks import notebooks_in

SERIES = [path.name for path in notebooks_in(resources.notebooks())]


def solutions(path: Path) -> list[str]:
    """The ids of the cells in the notebook at `path` that are tagged `solution`."""
    cells = json.loads(path.read_bytes())["cells"]
    return [cell["id"] for cell in cells if "solution" in cell["metadata"].get("tags", [])]


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the edition of readers."""
    folder = tmp_path_factory.mktemp("students")
    copy_fresh(resources.notebooks(), folder)
    return folder


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends `tdxlab lab` when the copies are made, just before the server would start."""

    def refuse(_folder: Path, _port: int) -> lab.Server:
        raise lab.LabError("no server in this test")

    monkeypatch.setattr(lab, "start", refuse)


@pytest.mark.parametrize("name", SERIES)
def test_a_copy_without_solutions_runs_and_gives_the_same_outputs(
    name: str, handed_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)
    counts = [cell.execution_count for cell in code_cells(handed_out / name)]
    assert counts == list(range(1, len(counts) + 1))
    assert changed_cells(handed_out / name) == []


@pytest.mark.usefixtures("no_server")
def test_lab_hands_out_no_solutions_and_no_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "--no-browser", "--dir", str(tmp_path)]) == 2
    assert {path.name for path in tmp_path.glob("*.ipynb")} == set(SERIES)
    assert [solutions(tmp_path / name) for name in SERIES] == [[] for _ in SERIES]
    assert not (tmp_path / "instructor").exists()
    assert "without solutions" in capsys.readouterr().out


@pytest.mark.usefixtures("no_server")
def test_lab_for_instructors_hands_out_solutions_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "--no-browser", "--instructor", "--dir", str(tmp_path)]) == 2
    assert all(len(solutions(tmp_path / name)) >= 5 for name in SERIES)
    for path in (path for path in resources.notebooks().rglob("*") if path.suffix == ".md"):
        copy = tmp_path / path.relative_to(resources.notebooks())
        assert copy.read_bytes() == path.read_bytes()
    notes = {path.name for path in (tmp_path / "instructor").iterdir()}
    assert {f"{name[:2]}.md" for name in SERIES} <= notes
    assert "with solutions and notes" in capsys.readouterr().out


@pytest.mark.usefixtures("no_server")
def test_lab_takes_solutions_out_of_unchanged_copies_again(tmp_path: Path) -> None:
    main(["lab", "--no-browser", "--instructor", "--dir", str(tmp_path)])
    main(["lab", "--no-browser", "--dir", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.ipynb")} == set(SERIES)
    assert [solutions(tmp_path / name) for name in SERIES] == [[] for _ in SERIES]
