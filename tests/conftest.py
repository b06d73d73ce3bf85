"""Tests run in several processes at the same time, and must not get into each other's way."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
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


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the modules that are loaded by now. It looks through
    everything only when much is new beside what is old; machines, which are cycles of objects with
    some MiB of memory each, would pile up to gigabytes until then.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _machines_given_back() -> Iterator[None]:
    """The machines of one file are gone before the next begins."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _variants_made_anew() -> None:
    """No test is asked what another has made, perhaps of a model that it had damaged."""
    exercises.made.cache_clear()
