"""The house keeps its layers, and its lower floors run on the standard library alone."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
BLOCKED = ("IPython", "cryptography", "ipywidgets", "matplotlib", "numpy")

IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({BLOCKED}))
import tdxlab
names = [info.name for info in pkgutil.walk_packages(tdxlab.__path__, "tdxlab.", onerror=print)]
core = [name for name in names if name.split(".")[1] not in ("study", "bulk", "__main__")]
for name in core:
    importlib.import_module(name)
print(*core)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold the contracts of pyproject.toml against the tree in `folder`."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "tdxlab", tmp_path / "tdxlab", ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_file_of_kvm_is_either_free_of_tdx_or_about_it() -> None:
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(c for c in contracts["contracts"] if "know nothing of TDX" in c["name"])
    free = set(contract["source_modules"])
    about = {name for name in contract["forbidden_modules"] if name.startswith("tdxlab.kvm.")}
    files = {f"tdxlab.kvm.{path.stem}" for path in (CHECKOUT / "tdxlab/kvm").glob("[!_]*.py")}
    # vmx runs the vCPUs of VMs that are no TDs, on the same host.
    assert free | about | {"tdxlab.kvm.vmx"} == files
    assert not free & about


def test_contracts_are_kept(copied_tree: Path) -> None:
    done = lint_imports(copied_tree)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("kvm/external.py", "from tdxlab.seam import sept", "kvm and seam never meet"),
        ("seam/sept.py", "from tdxlab.kvm import external", "kvm and seam never meet"),
        ("kvm/external.py", "from tdxlab.abi import leaves", "know nothing of TDX"),
        ("kvm/tdp_mmu.py", "from tdxlab.kvm import tdx_hooks", "know nothing of TDX"),
        ("bits.py", "from tdxlab import memory", "Layers"),
        ("memory.py", "from tdxlab import cpu", "Layers"),
        ("cpu.py", "import numpy", "standard library"),
        ("seam/leaves/mem.py", "import matplotlib.figure", "standard library"),
    ],
)
def test_a_planted_import_breaks_a_contract(
    copied_tree: Path, module: str, line: str, broken: str
) -> None:
    planted = copied_tree / "tdxlab" / module
    assert planted.is_file()
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    done = lint_imports(copied_tree)
    assert done.returncode == 1, done.stdout
    verdicts = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(broken in verdict for verdict in verdicts)
    assert f"tdxlab.{module.removesuffix('.py').replace('/', '.')} -> " in done.stdout


def test_a_module_without_a_layer_breaks_a_contract(copied_tree: Path) -> None:
    (copied_tree / "tdxlab" / "stray.py").touch()
    done = lint_imports(copied_tree)
    assert done.returncode == 1, done.stdout
    assert "- tdxlab.stray" in done.stdout


def test_everything_below_study_imports_without_third_party_packages() -> None:
    done = python(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert {"tdxlab.cli", "tdxlab.cpu", "tdxlab.seam.sept"} <= set(done.stdout.split())


def test_a_blocked_package_cannot_be_imported() -> None:
    done = python(IMPORT_ALL.replace("import tdxlab\n", "import tdxlab, numpy\n"))
    assert done.returncode == 1
    assert "numpy" in done.stderr


def test_import_tdxlab_loads_nothing_heavy() -> None:
    done = python("import sys, tdxlab, tdxlab.cli; print(*sys.modules)")
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "tdxlab" in loaded
    assert loaded.isdisjoint({*BLOCKED, "jupyterlab", "tornado"})
