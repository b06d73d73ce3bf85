"""Where notebooks and data lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def notebooks() -> Path:
    """The folder of the notebook series."""
    return _folder("notebooks")


def data() -> Path:
    """The folder of the data, recorded traces among them."""
    return _folder("data")


def traces() -> Path:
    """The folder of the recorded traces that `tdxlab replay` repeats."""
    return data() / "conformance"


def _folder(name: str) -> Path:
    """The folder `name` of the installed wheel, or else of the checkout.

    Refuses with FileNotFoundError if neither has it: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_packaged" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"tdxlab's {name} are missing: install the package again")
