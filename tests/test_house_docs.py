"""What the documents for teachers promise exists: files, names, commands, extras."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
GLOSSARY = (CHECKOUT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| (?P<term>.+?) \| (?P<meaning>.+) \| `(?P<file>[\w/.]+)`(?: `(?P<name>\w+)`)? \|$"
)
EXPECTED_TERMS = (
    *("TD", "TDX module", "SEAMCALL", "TDCALL", "TDR", "TDCS", "TDVPR", "TDVPS", "PAMT", "S-EPT"),
    *("mirror EPT", "external EPT", "direct EPT", "KeyID, HKID", "KOT", "epoch", "BEPOCH"),
    *("tracking", "frozen", "shared bit", "GPAW", "MRTD", "RTMR"),
)


def lost(text: str) -> list[str]:
    """The terms in `text`, a glossary, whose file or whose name in that file does not exist."""
    return [row["term"] for row in map(ROW.match, text.splitlines()) if row and not _exists(row)]


def _exists(row: re.Match[str]) -> bool:
    path = CHECKOUT / "tdxlab" / row["file"]
    if row["name"] is None:
        return path.exists()
    defined = rf"^\s*(?:def |class )?{row['name']}\b(?=[:(= ])"
    return path.is_file() and re.search(defined, path.read_text(), re.MULTILINE) is not None


def test_glossary_explains_every_term_once() -> None:
    terms = [row["term"] for row in map(ROW.match, GLOSSARY.splitlines()) if row]
    assert set(EXPECTED_TERMS) <= set(terms)
    assert len(set(terms)) == len(terms)


def test_glossary_has_no_row_without_a_place() -> None:
    explained = GLOSSARY.partition("## Names of the first")[0].splitlines()
    rows = [line for line in explained if line.startswith("| ") and "| where |" not in line]
    assert [line for line in rows if not ROW.match(line)] == []


def test_glossary_names_only_what_exists() -> None:
    assert lost(GLOSSARY) == []


@pytest.mark.parametrize("place", ["`seam/keyz.py`", "`seam/keys.py` `Keyz`", "`cpu.py` `leav`"])
def test_lost_finds_what_does_not_exist(place: str) -> None:
    assert lost(f"| KOT | a table. | {place} |") == ["KOT"]


# ---- The workflow for a class ------------------------------------------------------------------

WORKFLOW = CHECKOUT / "docs" / "ci-for-your-class.yml"


def steps() -> list[dict[str, Any]]:
    """The steps of the one job in the workflow."""
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    found: list[dict[str, Any]] = job["steps"]
    return found


def commands() -> list[str]:
    """Every command line of the workflow, in order."""
    return [line for step in steps() for line in step.get("run", "").splitlines()]


def run_step(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the step called `name` in `folder`, with the Python of the tests."""
    (step,) = (step for step in steps() if step.get("name") == name)
    (command,) = step["run"].splitlines()
    words = command.split()
    assert words[0] == "python"
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=os.environ | step.get("env", {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def class_repository(tmp_path: Path) -> Path:
    """A repository as the workflow finds it: a notebook, and tdxlab beside it."""
    (tmp_path / "tdxlab").symlink_to(CHECKOUT)
    (tmp_path / "notebooks").mkdir()
    save_notebook(tmp_path, "128\n")
    return tmp_path


def save_notebook(repository: Path, printed: str) -> None:
    """A notebook about a TD's GPAW, saved with `printed` as its output."""
    source = "from tdxlab.study.parameters import gpaw\nprint(gpaw(48) + 80)"
    cell = nbformat.v4.new_code_cell(source, id="width", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(book, repository / "notebooks" / "mine.ipynb")


def test_workflow_runs_on_pushes_and_may_only_read() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_workflow_names_files_and_extras_that_exist() -> None:
    text = "\n".join(commands())
    named = re.findall(r"tdxlab/([\w./-]+)", text)
    assert {"requirements.lock", "tests/sanitize.cfg"} == set(named)
    assert all((CHECKOUT / name).is_file() for name in named)
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert [extra for extra in re.findall(r"tdxlab\[(\w+)\]", text) if extra not in extras] == []
    assert "nbval" in "\n".join(extras["test"])


def test_workflow_compares_every_output(class_repository: Path) -> None:
    done = run_step("Compare every output", class_repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    save_notebook(class_repository, "129\n")
    done = run_step("Compare every output", class_repository)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout


def test_workflow_runs_at_gpaw_52_without_comparing(class_repository: Path) -> None:
    name = "Run at a guest address width of 52 bits"
    done = run_step(name, class_repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    (step,) = (step for step in steps() if step.get("name") == name)
    assert step["env"] == {"TDXLAB_GPAW": "52"}
