"""What this installation has and lacks, and how to mend it; what the model knows by name only."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TextIO

from tdxlab import resources
from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES, Leaf

MIN_PYTHON = (3, 11)
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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
    """Print every finding and the leaves that are not modelled.

    Returns 1 if something required is missing, else 0.
    """
    findings = list(examine())
    for finding in findings:
        _print_finding(finding, out)
    print("\nKnown by name, not modelled (they answer TDX_OPERAND_INVALID on RAX):", file=out)
    for title, leaves in (("host", HOST_LEAVES), ("guest", GUEST_LEAVES)):
        print(f"  {title}: {', '.join(not_modelled(leaves)) or 'none'}", file=out)
    return int(any(finding.remedy and finding.required for finding in findings))


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
    """tdxlab itself and every package it needs to run, as its metadata names them."""
    try:
        requirements = metadata.requires("tdxlab") or []
    except metadata.PackageNotFoundError:
        yield Finding("tdxlab", "not installed", "pip install -e . in the checkout")
        return
    yield _package("tdxlab")
    for requirement in requirements:
        if "extra ==" not in requirement:
            yield _package(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


def _package(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", f"pip install {name}")


def _folders() -> Finding:
    try:
        places: list[Path] = [resources.notebooks(), resources.traces()]
    except FileNotFoundError as error:
        return Finding("notebooks and data", "missing", str(error))
    return Finding("notebooks and data", ", ".join(map(str, places)))


def _browser() -> Finding:
    found = find_chromium()
    remedy = "" if found else "only browser tests need one: apt-get install chromium"
    return Finding("Chromium", found or "not found", remedy, required=False)


def _print_finding(finding: Finding, out: TextIO) -> None:
    mark = "ok" if not finding.remedy else "MISSING" if finding.required else "-"
    remedy = f"  -> {finding.remedy}" if finding.remedy else ""
    print(f"{mark:8}{finding.what:20}{finding.state}{remedy}", file=out)
