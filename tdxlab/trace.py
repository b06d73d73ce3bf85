"""Counters (always on) and the event log (off by default).

Counters are machine state: stepping back takes the counts back too. The log is a list of `Event`,
one for each SEAMCALL and each guest event, in order; a step back shortens it.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.journal import Journal, Row

#: What is counted besides the SEAMCALLs, in the order of its words.
HARDWARE_COUNTERS = (
    "movdir64b",
    "page_wbinvd",
    "package_wbinvd",
    "ipi",
    "tlb_hit",
    "tlb_walk",
    "tlb_flush",
    "td_entry",
    "td_exit",
)

_LEAVES = 256
_REFUSED = _LEAVES
_GUEST = 2 * _LEAVES
_HARDWARE = 3 * _LEAVES
_HARDWARE_INDEX = {name: _HARDWARE + i for i, name in enumerate(HARDWARE_COUNTERS)}


class Event(NamedTuple):
    """One call or guest event: `kind` is "SEAMCALL", "TDCALL" or "VM exit"; `number` its leaf or
    exit reason.
    """

    kind: str
    lp: int
    number: int
    inputs: dict[str, int]
    status: int
    outputs: dict[str, int]


class Trace:
    """What happened on one machine: counts, and on request every event."""

    def __init__(self, journal: Journal) -> None:
        self.words = Row(journal, _HARDWARE + len(HARDWARE_COUNTERS) + 1)
        self._events: list[Event] = []
        self._length = _HARDWARE + len(HARDWARE_COUNTERS)
        self.logging = False

    def count_seamcall(self, leaf: int, status: int) -> None:
        """Count one SEAMCALL of `leaf` (0..255; greater numbers count as 255)."""
        index = leaf if leaf < _LEAVES else _LEAVES - 1
        words = self.words
        words.cells[index] = words.view[index] + 1
        if status > 0 and status >> 63:
            words.put(_REFUSED + index, words.view[_REFUSED + index] + 1)

    def count_tdcall(self, leaf: int) -> None:
        """Count one TDCALL of `leaf`."""
        index = _GUEST + min(leaf, _LEAVES - 1)
        self.words.put(index, self.words.view[index] + 1)

    def count(self, name: str, amount: int = 1) -> None:
        """Add `amount` to the hardware counter `name` (one of HARDWARE_COUNTERS)."""
        index, words = _HARDWARE_INDEX[name], self.words
        words.cells[index] = words.view[index] + amount

    def seamcalls(self) -> dict[int, int]:
        """Leaf number -> number of SEAMCALLs, leaves that were called only."""
        return self._nonzero(0)

    def refusals(self) -> dict[int, int]:
        """Leaf number -> number of SEAMCALLs that ended with an error status."""
        return self._nonzero(_REFUSED)

    def tdcalls(self) -> dict[int, int]:
        """Leaf number -> number of TDCALLs."""
        return self._nonzero(_GUEST)

    def hardware(self) -> dict[str, int]:
        """Name -> count for every hardware counter."""
        view = self.words.view
        return {name: view[_HARDWARE + i] for i, name in enumerate(HARDWARE_COUNTERS)}

    def _nonzero(self, start: int) -> dict[int, int]:
        view = self.words.view
        return {leaf: view[start + leaf] for leaf in range(_LEAVES) if view[start + leaf]}

    def record(self, event: Event) -> None:
        """Append `event` to the log; events that a rewind took back are overwritten."""
        length = self.words.view[self._length]
        del self._events[length:]
        self._events.append(event)
        self.words.put(self._length, length + 1)

    @property
    def events(self) -> list[Event]:
        """The events logged so far, oldest first."""
        return self._events[: self.words.view[self._length]]
