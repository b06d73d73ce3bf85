"""Try something on a machine, and have it not happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tdxlab.bare import BareMachine
from tdxlab.journal import Mark


@contextmanager
def undone(machine: BareMachine) -> Iterator[Mark]:
    """Whatever is done inside has not happened afterwards."""
    mark = machine.mark()
    try:
        yield mark
    finally:
        machine.rewind(mark)
        machine.journal.forget(mark)
