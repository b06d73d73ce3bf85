"""What the model does during one operation, folded as a trace folds it, and the comparison.

Values are as `decode.plain` gives recorded ones: tuples of ints, words and places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdxlab.arch import HPA_MASK, LEVEL_BITS, PAGE_SHIFT
from tdxlab.kvm.spte import PT_PAGE_SIZE_MASK, SPTE_MMU_PRESENT_MASK
from tdxlab.mmu_conformance.decode import Place

#: Events that are also listed apart: calls of the external EPT, and flushes.
HOOKS = (
    "link_external_spt",
    "set_external_spte",
    "remove_external_spte",
    "free_external_spt",
)
FAILED = "->"
FLUSHES = ("kvm_flush_remote_tlbs", "kvm_flush_remote_tlbs_range")

Row = tuple[Any, ...]


def split_spte(spte: int, level: int) -> tuple[int, Place | None]:
    """(bits without address, address) of an SPTE; a non-present one has its whole value, None."""
    if not spte & SPTE_MMU_PRESENT_MASK:
        return spte, None
    hpa, bits = spte & HPA_MASK, spte & ~HPA_MASK
    if level == 1 or spte & PT_PAGE_SIZE_MASK:
        return bits, ("pfn", hpa >> PAGE_SHIFT)
    return bits, ("pt", hpa)


def stride(spte: int, level: int) -> int | None:
    """What to add to an SPTE to get its neighbour's, if a run goes on: a page's size for a leaf, 0
    for a non-present one; None for a table, behind which none goes on.
    """
    if not spte & SPTE_MMU_PRESENT_MASK:
        return 0
    if level > 1 and not spte & PT_PAGE_SIZE_MASK:
        return None
    return 1 << PAGE_SHIFT + LEVEL_BITS * (level - 1)


class Recorder:
    """Everything that happens during one operation. Call it with each event: (name, values...).

    SPTE changes, ("spte_changed", as_id, level, gfn, old SPTE, new SPTE), are kept apart;
    neighbours that go alike are one row with a count. tell: gets all other events of the model, and
    calls `add` with those that a trace shows, in its words.
    """

    __slots__ = ("_events", "_next", "_runs", "_strides", "_tell")

    def __init__(self, tell: Callable[[Row], None] | None = None) -> None:
        self._tell = tell or self.add
        self._events: list[list[Any]] = []
        self._runs: list[list[int]] = []
        #: the event that would go on with the last run, and what comes on top of it for the next
        self._next: Row = ()
        self._strides = (0, 0, 0)

    def __call__(self, event: Row) -> None:
        """The model says what happens."""
        if event == self._next:
            self._runs[-1][5] += 1
            name, as_id, level, gfn, old, new = event
            pages, of_old, of_new = self._strides
            self._next = (name, as_id, level, gfn + pages, old + of_old, new + of_new)
        elif event[0] == "spte_changed":
            self._new_run(event)
        else:
            self._tell(event)

    def _new_run(self, event: Row) -> None:
        name, as_id, level, gfn, old, new = event
        self._runs.append([as_id, level, gfn, old, new, 1])
        of_old, of_new = stride(old, level), stride(new, level)
        if of_old is None or of_new is None:
            self._next = ()
            return
        pages = 1 << LEVEL_BITS * (level - 1)
        self._strides = (pages, of_old, of_new)
        self._next = (name, as_id, level, gfn + pages, old + of_old, new + of_new)

    def add(self, event: Row) -> None:
        """Something happened that a trace shows."""
        events = self._events
        if events and events[-1][0] == event:
            events[-1][1] += 1
        else:
            events.append([event, 1])

    def changes(self) -> list[Row]:
        """(as_id, level, gfn, old bits, old address, new bits, new address, [count])."""
        found = []
        for as_id, level, gfn, old, new, count in self._runs:
            row: Row = (as_id, level, gfn, *split_spte(old, level), *split_spte(new, level))
            found.append(row if count == 1 else (*row, count))
        return found

    def events(self) -> list[Row]:
        """All events; equal neighbours are one, with {"x": count} at its end."""
        return [event if count == 1 else (*event, {"x": count}) for event, count in self._events]

    def unfolded(self) -> list[Row]:
        """All events, one by one."""
        return [event for event, count in self._events for _ in range(count)]

    def hooks(self) -> list[Row]:
        """The calls of the external EPT, and what failed of them."""
        return [row for row in self.events() if row[0] in HOOKS or row[0] == FAILED]

    def flushes(self) -> list[Row]:
        """The flushes of remote TLBs."""
        return [row for row in self.events() if row[0] in FLUSHES]


class TableNames:
    """Which of our tables is which of the recorder's; a bijection that grows at first sight.

    A table of ours never gets an address that another one had before, so no pair ever ends.
    """

    def __init__(self) -> None:
        self._ours: dict[int, int] = {}
        self._theirs: dict[int, int] = {}

    def same(self, recorded: Any, ours: Any) -> bool:
        """True if both say the same; tables that have not been seen yet become a pair."""
        if isinstance(recorded, tuple):
            if not isinstance(ours, tuple) or len(recorded) != len(ours):
                return False
            if recorded and recorded[0] == "pt":
                return ours[0] == "pt" and self._is_pair(recorded[1], ours[1])
            return all(map(self.same, recorded, ours))
        if isinstance(recorded, dict) and isinstance(ours, dict):
            return recorded.keys() == ours.keys() and all(
                self.same(value, ours[key]) for key, value in recorded.items()
            )
        return bool(recorded == ours)

    def _is_pair(self, name: int, hpa: int) -> bool:
        known, other = self._ours.setdefault(name, hpa), self._theirs.setdefault(hpa, name)
        return known == hpa and other == name


def show(value: Any) -> str:
    """A value for people, as a trace writes it."""
    if isinstance(value, tuple):
        if len(value) == 2 and value[0] in ("pfn", "pt"):
            return f"{value[0]}:{value[1]:#x}"
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int) and not isinstance(value, bool) and value > 9:
        return f"{value:#x}"
    return str(value)
