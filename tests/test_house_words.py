"""No tracked file names a package registry or a folder of somebody's machine."""

import re
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
REGISTRY_HOST = re.compile(
    r"(?:py[p]i\.org|python[h]osted\.org|npm[j]s\.(?:org|com)|registry\.yarn[p]kg|pkg\.go[.]dev"
    r"|conda\.anaconda[.]org|crates[.]io|index-[u]rl[ =]+http)"
)
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|work|opt|Users|mnt|builds)/\w|[A-Z]:\\\\Users|\.\./shared\b"
)


def complaints(name: str, text: str) -> list[str]:
    """Every place in `text` that speaks of a registry or of a machine."""
    return [
        f"{name}:{number}: {found.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern in (REGISTRY_HOST, MACHINE_PATH)
        for found in pattern.finditer(line)
    ]


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("this is no git checkout")
    return [CHECKOUT / name for name in listing.stdout.split("\0") if name]


def test_tracked_files_name_no_registry_and_no_machine() -> None:
    texts = {}
    for path in tracked_files():
        if path.is_file() and path.suffix not in (".gz", ".png", ".fd"):
            texts[path.relative_to(CHECKOUT)] = path.read_text(encoding="utf-8")
    assert Path("requirements.lock") in texts
    assert [found for name, text in texts.items() for found in complaints(str(name), text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "see https://" + "py" + "pi.org/simple",
        "--index-" + "url https://packages.example/simple",
        "open('/" + "home/ada/tdxlab/data')",
        "cd /" + "work/main",
        "see .." + "/shared/facts",
    ],
)
def test_complaints_finds_registries_and_machines(line: str) -> None:
    assert complaints("a.py", f"first\n{line}\n") != []


@pytest.mark.parametrize("line", ["/usr/bin/chromium", "../images/map.svg", "network/work/x"])
def test_complaints_lets_ordinary_lines_pass(line: str) -> None:
    assert complaints("a.py", line) == []
