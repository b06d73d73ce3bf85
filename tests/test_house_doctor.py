"""`tdxlab doctor`: what is there, what is missing, how to mend it, what is not modelled."""

import re
import sys
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest

from tdxlab import doctor, resources
from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES

ROOT = Path(__file__).resolve().parents[1]
PIP = f"{sys.executable} -m pip install"
ABSENT = "nosuchpackage"
PRESENT = metadata.version("numpy")


def examined() -> tuple[int, str]:
    """The exit status of the doctor, and what it says."""
    out = StringIO()
    return doctor.run(out), out.getvalue()


def require(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    """Let tdxlab's metadata name `requirements`, and nothing else."""
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: list(requirements))


def line_about(what: str, text: str) -> str:
    """The one line in `text` whose subject is `what`."""
    (found,) = (line for line in text.splitlines() if line[8:].startswith(f"{what} "))
    return found


def test_doctor_is_content_with_this_installation() -> None:
    status, text = examined()
    assert status == 0
    assert "All that tdxlab needs is here." in text
    for name in ("Python", "tdxlab", "jupyterlab", "numpy", "matplotlib", "ipywidgets", "tqdm"):
        assert line_about(name, text).startswith("ok  ")
    assert line_about("numpy", text).endswith(PRESENT)
    assert "packages for tests  all there" in text


def test_doctor_lists_exactly_the_leaves_that_are_not_modelled() -> None:
    _, text = examined()
    listed = set(text.partition("Not modelled:")[2].replace(",", " ").replace(". ", " ").split())
    for leaf in (*HOST_LEAVES.values(), *GUEST_LEAVES.values()):
        assert ({leaf.name, f"{leaf.name}."} & listed != set()) is not leaf.modelled, leaf.name


def test_doctor_says_what_else_is_left_out_in_lines_that_fit() -> None:
    _, text = examined()
    left_out = text.partition("Not modelled:")[2]
    subjects = ("KVM", "TDX", "Time", "Caches", "Secrecy")
    assert all(f"\n  {subject}: " in left_out for subject in subjects)
    assert max(map(len, left_out.splitlines())) <= doctor.WIDTH


def test_doctor_leaves_out_what_the_architecture_says_is_left_out() -> None:
    text = " ".join((ROOT / "docs/architecture.md").read_text().split())
    module, _, rest = text.partition("Not modelled: ")[2].partition(". Their leaves ")
    kvm = rest.partition("Of KVM: ")[2].partition(". ")[0]
    listed = re.sub(r" \(that for [^)]*\)", "", f"{module}, {kvm}").split(", ")
    assert len(listed) >= 6
    said = " ".join(doctor.LEFT_OUT)
    assert [name for name in listed if name not in said] == []


@pytest.mark.parametrize(
    ("requirement", "state", "remedy"),
    [
        (f"{ABSENT}>=1.0", "missing", f"{PIP} '{ABSENT}>=1.0'"),
        (ABSENT, "missing", f"{PIP} {ABSENT}"),
        ("numpy>=999", f"{PRESENT} is too old", f"{PIP} 'numpy>=999'"),
        (f"numpy>={PRESENT}.1", f"{PRESENT} is too old", f"{PIP} 'numpy>={PRESENT}.1'"),
    ],
)
def test_doctor_says_how_to_mend_a_package(
    requirement: str, state: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(monkeypatch, requirement)
    status, text = examined()
    line = line_about(requirement.partition(">=")[0], text)
    assert status == 1
    assert line.startswith("MISSING ")
    assert line.endswith(f"{state}  -> {remedy}")
    assert "1 of the things that tdxlab needs must be mended" in text


@pytest.mark.parametrize("oldest", ["1", PRESENT, f"{PRESENT}rc1"])
def test_doctor_takes_a_version_that_is_new_enough(
    oldest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(monkeypatch, f"numpy>={oldest}")
    status, text = examined()
    assert status == 0
    assert line_about("numpy", text).startswith("ok  ")


def test_doctor_compares_versions_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    require(monkeypatch, "numpy>=9.2")
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "10.1")
    assert examined()[0] == 0


def test_doctor_can_do_without_packages_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    require(
        monkeypatch,
        f'{ABSENT}>=2 ; extra == "test"',
        "numpy>=1; extra == 'test'",
        "nosuchlinter; extra == 'dev'",
    )
    status, text = examined()
    assert status == 0
    assert f"missing or too old: {ABSENT}  -> " in text
    assert f"need them: {PIP} '{ABSENT}>=2'\n" in text
    assert "nosuchlinter" not in text


def test_doctor_says_how_to_install_tdxlab_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", refuse)
    status, text = examined()
    assert status == 1
    assert f"{PIP} -e . in the checkout" in text


def test_doctor_says_how_to_mend_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    status, text = examined()
    assert status == 1
    assert "use Python 3.11 or newer" in text


def test_doctor_says_how_to_mend_missing_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_PACKAGE", Path("/nonexistent/tdxlab"))
    status, text = examined()
    assert status == 1
    assert "install the package again" in text


def test_doctor_can_do_without_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("TDXLAB_CHROMIUM", raising=False)
    status, text = examined()
    assert status == 0
    assert "apt-get install chromium" in text


def test_find_chromium_prefers_the_one_that_is_named(tmp_path: Path) -> None:
    for name in ("chromium", "mine"):
        (tmp_path / name).touch(mode=0o755)
    named = str(tmp_path / "mine")
    assert doctor.find_chromium({"PATH": str(tmp_path)}) == str(tmp_path / "chromium")
    assert doctor.find_chromium({"PATH": str(tmp_path), "TDXLAB_CHROMIUM": named}) == named
    assert doctor.find_chromium({"PATH": ""}) is None
