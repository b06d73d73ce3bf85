"""What generators can wait for: mmu_lock, mutexes, and the readers of the memslots.

A thread that cannot have mmu_lock yields ("wait", "mmu_lock", mode) until it can, so a schedule
sees who is blocked. Readers may hold it together: vCPUs fault in parallel. Mutexes and SRCU grace
periods wait the same way.

Source: Linux 6.16, include/linux/kvm_host.h (mmu_lock, an rwlock_t on x86; slots_lock; srcu).
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.journal import Field, Fields, Journal, Journalled, Row
from tdxlab.steps import WAIT, Step

READ = "read"
WRITE = "write"

#: What is yielded before mmu_lock is tried in a mode.
LOCKING: dict[str, Step] = {mode: (f"{mode}_lock(mmu_lock)",) for mode in (READ, WRITE)}

Locking = Generator[Step, None, None]


class MmuLock:
    """One VM's mmu_lock.

    readers: how many hold it shared. written: somebody holds it exclusively. waiting: threads that
    want it and cannot have it: a walker that sees them offers to let go (rwlock_is_contended).
    Differs: a waiting writer does not keep new readers out.
    """

    #: False for a lock that makes nobody wait.
    waits = True

    def __init__(self, journal: Journal) -> None:
        self._holders = Row(journal, 2)  # readers; 1 if written
        self._waiting = Row(journal, 1)

    @property
    def readers(self) -> int:
        """How many hold it shared."""
        return self._holders.view[0]

    @property
    def written(self) -> bool:
        """Somebody holds it exclusively."""
        return self._holders.view[1] == 1

    @property
    def waiting(self) -> int:
        """How many wait for it."""
        return self._waiting.view[0]

    @property
    def is_contended(self) -> bool:
        """True if somebody waits for it."""
        return self._waiting.view[0] > 0

    def held(self, mode: str) -> bool:
        """True if somebody holds it in `mode`; exclusively counts as shared too."""
        readers, written = self._holders.view
        return written == 1 or (mode == READ and readers > 0)

    def lock(self, mode: str) -> Locking:
        """Take it. mode: READ or WRITE. Yields once before it tries, then while it cannot."""
        yield LOCKING[mode]
        if not self.try_lock(mode):
            yield from self.wait(mode)

    def wait(self, mode: str) -> Locking:
        """Take it after a `try_lock` that failed; yields while it cannot."""
        self._waiting.put(0, self.waiting + 1)
        try:
            while not self.try_lock(mode):
                yield (WAIT, "mmu_lock", mode)
        finally:
            self._waiting.put(0, self.waiting - 1)

    def unlock(self, mode: str) -> None:
        """Let go of it."""
        holders = self._holders
        if mode == READ:
            holders.cells[0] = holders.view[0] - 1
        else:
            holders.cells[1] = 0

    def try_lock(self, mode: str) -> bool:
        """Take it if it can be had at once."""
        holders = self._holders
        readers, written = holders.view
        if written or (mode == WRITE and readers):
            return False
        if mode == READ:
            holders.cells[0] = readers + 1
        else:
            holders.cells[1] = 1
        return True


class NoLock(MmuLock):
    """A lock that never makes anybody wait, for a recorder that had one CPU and stubbed locks."""

    waits = False

    @property
    def is_contended(self) -> bool:
        """Nobody waits."""
        return False

    def try_lock(self, mode: str) -> bool:
        """Nobody has to wait."""
        return True

    def unlock(self, mode: str) -> None:
        """Nothing to let go of."""

    def held(self, mode: str) -> bool:
        """Every assertion about the lock holds."""
        return True


class Mutex(Journalled):
    """A lock for one. name: as Linux calls it. waits: False makes it keep nobody out."""

    held = Field(False)

    def __init__(self, journal: Journal, name: str, *, waits: bool = True) -> None:
        self.fields = Fields(journal, self)
        self.name = name
        self._waits = waits

    def lock(self) -> Locking:
        """Take it. Yields once before it tries, then while it cannot."""
        yield (f"mutex_lock({self.name})",)
        while self.held and self._waits:
            yield (WAIT, self.name)
        self.held = True

    def unlock(self) -> None:
        """Let go of it."""
        self.held = False


class Srcu(Journalled):
    """Sleepable RCU: a writer waits until every reader that may still use the old memslots is done.

    A vCPU is a reader while it handles an exit, and no reader while it is in the guest.
    waits: False makes a grace period end at once.
    Source: Linux 6.16, kernel/rcu/srcutree.c, as far as one writer at a time needs it.
    """

    _index = Field(0)
    _readers: Field[tuple[int, int]] = Field((0, 0))

    def __init__(self, journal: Journal, name: str, *, waits: bool = True) -> None:
        self.fields = Fields(journal, self)
        self.name = name
        self._waits = waits

    def read_lock(self) -> int:
        """Become a reader; returns what `read_unlock` needs."""
        self._add(self._index, 1)
        return self._index

    def read_unlock(self, index: int) -> None:
        """No reader any more. index: what `read_lock` gave."""
        self._add(index, -1)

    def synchronize(self) -> Locking:
        """Wait until all present readers are done; later ones do not count."""
        yield (f"synchronize_srcu({self.name})",)
        old = self._index
        self._index = 1 - old
        while self._readers[old] and self._waits:
            yield (WAIT, self.name)

    def _add(self, index: int, amount: int) -> None:
        first, second = self._readers
        self._readers = (first, second + amount) if index else (first + amount, second)
