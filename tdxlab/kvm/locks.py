"""mmu_lock: many readers or one writer, as a lock that generators can wait for.

A thread that cannot have the lock yields ("wait", "mmu_lock", mode) until it can, so a schedule
sees who is blocked. Readers may hold it together: vCPUs fault in parallel.

Source: Linux 6.16, include/linux/kvm_host.h (mmu_lock, an rwlock_t on x86).
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.journal import Field, Journal, Table
from tdxlab.steps import WAIT, Step

READ = "read"
WRITE = "write"

Locking = Generator[Step, None, None]


class MmuLock:
    """One VM's mmu_lock.

    readers: how many hold it shared. written: somebody holds it exclusively. waiting: threads that
    want it and cannot have it: a walker that sees them offers to let go (rwlock_is_contended).
    Differs: a waiting writer does not keep new readers out.
    """

    readers = Field(0)
    written = Field(False)
    waiting = Field(0)

    def __init__(self, journal: Journal) -> None:
        self.fields = Table(journal)

    @property
    def is_contended(self) -> bool:
        """True if somebody waits for it."""
        return self.waiting > 0

    def held(self, mode: str) -> bool:
        """True if somebody holds it in `mode`; exclusively counts as shared too."""
        return self.written or (mode == READ and self.readers > 0)

    def lock(self, mode: str) -> Locking:
        """Take it. mode: READ or WRITE. Yields once before it tries, then while it cannot."""
        yield (f"{mode}_lock(mmu_lock)",)
        if not self._try(mode):
            self.waiting += 1
            try:
                while not self._try(mode):
                    yield (WAIT, "mmu_lock", mode)
            finally:
                self.waiting -= 1

    def unlock(self, mode: str) -> None:
        """Let go of it."""
        if mode == READ:
            self.readers -= 1
        else:
            self.written = False

    def _try(self, mode: str) -> bool:
        if self.written or (mode == WRITE and self.readers):
            return False
        if mode == READ:
            self.readers += 1
        else:
            self.written = True
        return True


class NoLock(MmuLock):
    """A lock that never makes anybody wait, for a recorder that had one CPU and stubbed locks."""

    def lock(self, mode: str) -> Locking:
        """Yield where a lock would be taken, and go on."""
        yield (f"{mode}_lock(mmu_lock)",)

    def unlock(self, mode: str) -> None:
        """Nothing to let go of."""

    def held(self, mode: str) -> bool:
        """Every assertion about the lock holds."""
        return True
