"""Tests run in several processes at the same time, and must not get into each other's way."""

from __future__ import annotations

import os
import tempfile
from functools import partialmethod
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

from tdxlab.study import exercises


def pytest_configure() -> None:
    """Let kernels talk over Unix sockets: of two processes that look for free TCP ports, the second
    may find those that the first one's kernel is about to take.
    """
    sockets = str(Path(tempfile.gettempdir()) / f"tdxlab-kernel-{os.getpid()}")
    KernelManager.__init__ = partialmethod(KernelManager.__init__, transport="ipc", ip=sockets)


@pytest.fixture(autouse=True)
def _variants_made_anew() -> None:
    """No test is asked what another has made, perhaps of a model that it had damaged."""
    exercises.made.cache_clear()
