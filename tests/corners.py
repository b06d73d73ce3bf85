"""What the tests of the corners share: the bench of the leaf tests, and hands on PAMT locks.

PAMT lock words: 1 exclusive, 2 the host waits, 4 for each reader.
"""

from __future__ import annotations

from tdxlab.abi import status as s
from tests.leaves.leafbench import Bench, BuiltTd

RCX, RDX, R8 = 1, 2, 8
GPA = 0x4000_0000
BUSY = s.TDX_OPERAND_BUSY
READER, WANTED = 4, 2


def lock_of(bench: Bench, hpa: int, size: int = 0) -> int:
    """The lock word of the PAMT entry of `size` that covers `hpa`."""
    return bench.pamt(hpa, size).lock


def hold(bench: Bench, hpa: int, lock: int, size: int = 0) -> None:
    """Somebody else holds the PAMT entry of `size` that covers `hpa`."""
    pamt = bench.machine.module.pamt
    entry = pamt.entry(hpa, size)
    pamt.words.put(entry, (pamt.words.view[entry] & ~0xFFFF) | lock)


def runnable(bench: Bench, **params: int) -> BuiltTd:
    """A finalised TD with one vCPU."""
    td = bench.td(**params)
    td.start()
    return td
