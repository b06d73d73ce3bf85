"""What this installation has and lacks, and how to mend it; what the model knows by name only."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import NamedTuple, TextIO

from tdxlab import resources
from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES, Leaf

MIN_PYTHON = (3, 11)
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Columns that a line of text fills at most.
WIDTH = 100
#: What the model leaves out, leaves of the module apart.
LEFT_OUT = (
    "KVM: the shadow MMU for guests in long mode, SEV's encryption of memory and registers, SNP's "
    "launch, instruction emulation, the dirty ring, CPU hotplug.",
    "TDX: migration, service TDs, TD partitioning (nested VMs).",
    "Time: calls and steps are counted, nothing says how long they take.",
    "Caches: a write reaches memory at once; of what a cache could still hold, it is noted only "
    "which pages may have dirty lines, and under which KeyID.",
    "Secrecy: encryption shows what a wrong key gives; its keys come from a seed, and keep no "
    "secret.",
)

_FOR_TESTS = re.compile(r"extra == ['\"]test['\"]")


class Finding(NamedTuple):
    """One thing that was looked at.

    what: its name. state: what was found. remedy: how to mend it, empty if all is well.
    required: tdxlab does not work without it.
    """

    what: str
    state: str
    remedy: str = ""
    required: bool = True


def run(out: TextIO) -> int:
    """Print every finding, what it comes to, and what is not modelled.

    Returns 1 if something required is missing, else 0.
    """
    findings = list(examine())
    for finding in findings:
        _print_finding(finding, out)
    missing = sum(bool(finding.remedy) and finding.required for finding in findings)
    print(f"\n{_verdict(missing)}\n\nNot modelled:", file=out)
    for text in (*LEFT_OUT, *_leaves_left_out()):
        print(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    "), file=out)
    return int(missing > 0)


def examine() -> Iterator[Finding]:
    """Look at Python, the packages, notebooks and data, and the browser, in this order."""
    yield _python()
    yield from _packages()
    yield _folders()
    yield _browser()


def not_modelled(leaves: Mapping[int, Leaf]) -> list[str]:
    """The names, sorted, of the leaves that the model knows and does not answer."""
    return sorted(leaf.name for leaf in leaves.values() if not leaf.modelled)


def find_chromium(environment: Mapping[str, str] | None = None) -> str | None:
    """The path of a Chromium that browser tests can drive, None if there is none.

    The environment variable TDXLAB_CHROMIUM names one that is not on the PATH.
    """
    environment = os.environ if environment is None else environment
    candidates = (environment.get("TDXLAB_CHROMIUM", ""), *CHROMIUM_NAMES)
    found = (shutil.which(name, path=environment.get("PATH")) for name in candidates if name)
    return next(filter(None, found), None)


def _python() -> Finding:
    found = platform.python_version()
    wanted = ".".join(map(str, MIN_PYTHON))
    remedy = "" if sys.version_info >= MIN_PYTHON else f"use Python {wanted} or newer"
    return Finding("Python", found, remedy)


def _packages() -> Iterator[Finding]:
    """tdxlab itself and every package it needs to run or to be tested, as its metadata says."""
    try:
        requirements = metadata.requires("tdxlab") or []
    except metadata.PackageNotFoundError:
        yield Finding("tdxlab", "not installed", f"{_pip('-e .')} in the checkout")
        return
    yield _package("tdxlab")
    for requirement in requirements:
        if "extra ==" not in requirement:
            yield _package(requirement)
    yield _test_packages([text for text in requirements if _FOR_TESTS.search(text)])


def _package(requirement: str) -> Finding:
    """One package; requirement: its name, with the oldest version that will do: `numpy>=2.0`."""
    name, oldest = _split(requirement)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", _pip(_quoted(requirement)))
    if _release(found) < _release(oldest):
        return Finding(name, f"{found} is too old", _pip(_quoted(requirement)))
    return Finding(name, found)


def _test_packages(requirements: list[str]) -> Finding:
    """The packages without which notebooks cannot be compared, nor tests be run."""
    lacking = [text for text in requirements if _package(text).remedy]
    if not lacking:
        return Finding("packages for tests", "all there", required=False)
    names = ", ".join(_split(text)[0] for text in lacking)
    remedy = f"only tests and nbval need them: {_pip(*map(_quoted, lacking))}"
    return Finding("packages for tests", f"missing or too old: {names}", remedy, required=False)


def _split(requirement: str) -> tuple[str, str]:
    """The name in `requirement` and the oldest version that will do, "0" if any will."""
    name, _, oldest = requirement.partition(";")[0].strip().partition(">=")
    return name.strip(), oldest.strip() or "0"


def _release(version: str) -> tuple[int, ...]:
    """The numbers that `version` begins with: (8, 1) of "8.1rc2"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else (0,)


def _quoted(requirement: str) -> str:
    """`requirement` as a shell takes it."""
    return shlex.quote(requirement.partition(";")[0].strip())


def _pip(*arguments: str) -> str:
    """The command that installs into the environment that is being examined."""
    return shlex.join([sys.executable, "-m", "pip", "install"]) + " " + " ".join(arguments)


def _folders() -> Finding:
    try:
        places = [resources.notebooks(), resources.traces()]
    except FileNotFoundError as error:
        return Finding("notebooks and data", "missing", str(error))
    return Finding("notebooks and data", ", ".join(map(str, places)))


def _browser() -> Finding:
    found = find_chromium()
    remedy = "" if found else "only browser tests need one: apt-get install chromium"
    return Finding("Chromium", found or "not found", remedy, required=False)


def _verdict(missing: int) -> str:
    """What the findings come to."""
    if not missing:
        return "All that tdxlab needs is here."
    return f"{missing} of the things that tdxlab needs must be mended: see the arrows."


def _leaves_left_out() -> Iterator[str]:
    """A line for each kind of call; the leaves of it that the module has and the model has not."""
    for title, leaves in (("SEAMCALL", HOST_LEAVES), ("TDCALL", GUEST_LEAVES)):
        names = ", ".join(not_modelled(leaves)) or "none"
        yield f"{title} leaves, known by name; they answer TDX_OPERAND_INVALID on RAX: {names}."


def _print_finding(finding: Finding, out: TextIO) -> None:
    mark = "ok" if not finding.remedy else "MISSING" if finding.required else "-"
    remedy = f"  -> {finding.remedy}" if finding.remedy else ""
    print(f"{mark:8}{finding.what:20}{finding.state}{remedy}", file=out)
