"""The PAMT entries in use of a machine that changes little: what has changed is read again."""

from __future__ import annotations

from tdxlab.bare import BareMachine
from tdxlab.seam.pamt import PamtEntry

#: Words of an entry.
_WORDS = 2


class PamtRows:
    """What `Pamt.in_use` gives. The journal is held at a mark until `close`, or until `move_on`
    takes another; a rewind beyond it is the end of this.
    """

    def __init__(self, machine: BareMachine) -> None:
        self._journal, self._pamt = machine.journal, machine.module.pamt
        pamt = self._pamt
        #: index of each entry in use at the mark -> the entry
        self._then = {pamt.entry(row.hpa, row.size): row for row in pamt.in_use()}
        self._mark = self._journal.mark()

    def move_on(self) -> None:
        """Hold the journal at the present instead: what has changed before need not be read again,
        and no rewind may go behind the present.
        """
        then = self._entries_now()
        self._journal.forget(self._mark)
        self._then, self._mark = then, self._journal.mark()

    def close(self) -> None:
        """Give up the mark."""
        self._journal.forget(self._mark)

    def now(self) -> list[PamtEntry]:
        """The entries in use at present, ascending by index: 1G, 2M, 4K."""
        rows = self._entries_now()
        return [rows[entry] for entry in sorted(rows)]

    def _entries_now(self) -> dict[int, PamtEntry]:
        """Index of each entry in use at present -> the entry."""
        pamt, rows = self._pamt, dict(self._then)
        for entry in self._changed():
            if pamt.is_in_use(entry):
                rows[entry] = pamt.describe(*pamt.covers(entry))
            else:
                rows.pop(entry, None)
        return rows

    def _changed(self) -> set[int]:
        """Indices of all entries that were written since the mark."""
        buffer, found = self._pamt.words.view.obj, set[int]()
        for target, key, _ in self._journal.undone_by(self._mark):
            if isinstance(target, memoryview) and target.obj is buffer:
                found.update(_entries(target, key))
        return found


def _entries(target: memoryview[int], key: int | slice) -> range:
    """Indices of the entries that a key of a row of words means."""
    size = target.itemsize
    first, end = (key.start, key.stop) if isinstance(key, slice) else (key, key + 1)
    first, end = first * size // 8 // _WORDS * _WORDS, -(-end * size // 8)
    return range(first, end, _WORDS)
