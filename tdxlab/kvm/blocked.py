"""A third state of a mirror entry: blocked in the external EPT, and not removed from it yet.

     63  62        52 51       12 11 10        0
    +---+------------+-----------+--+-----------+
    |sVE|          0 | address   |MP| 0x320     |      MP, MMU-present, is 0
    +---+------------+-----------+--+-----------+

The entry is no leaf any more, so nothing may be mapped through it, and not empty yet, so nothing
may be installed in it: a fault that meets it retries, as with FROZEN_SPTE. It keeps the frame that
the external EPT still has there.

Differs: no kernel has this state. Linux 6.16 blocks and removes a page in one hook, page by page,
and needs no name for what is in between. See `batching.py` for what it is good for.
"""

from __future__ import annotations

from tdxlab.arch import HPA_MASK, PAGE_SHIFT
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE

_BLOCKED = SHADOW_NONPRESENT_VALUE | 0x320


def make_blocked_spte(pfn: int) -> int:
    """The entry that stood for the frame `pfn`, blocked."""
    return _BLOCKED | pfn << PAGE_SHIFT


def is_blocked_spte(spte: int) -> bool:
    """True for an entry that is blocked and not removed yet."""
    return spte & ~HPA_MASK == _BLOCKED
