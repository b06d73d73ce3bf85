"""TLB tracking: epochs, and who may still hold a translation of an older one.

A TD counts epochs (TDH.MEM.TRACK). A vCPU belongs to the epoch in which it entered; two counters,
one for even and one for odd epochs, say how many vCPUs are inside. TDH.MEM.RANGE.BLOCK stamps a
page with the present epoch; the page may go when no vCPU of that epoch, or of an older one, is
inside any more.

Source: TDX module 1.5.01, helpers.c (adjust_tlb_tracking_state), helpers.h (is_tlb_tracked),
tdh_mem_track.c.
"""

from __future__ import annotations

from tdxlab.journal import Words
from tdxlab.seam.td import Tdcs

FIRST_EPOCH = 1
#: A BEPOCH with this bit holds a migration epoch instead.
MIGRATION_EPOCH = 1 << 63

#: Words of the TDCS: the present epoch; two counts of vCPUs inside.
_EPOCH, _REFCOUNT = Tdcs.TD_EPOCH, Tdcs.REFCOUNT


def is_tracked(words: Words, tdcs: int, bepoch: int) -> bool:
    """True if no TLB can hold a translation that was made before the page was blocked in epoch
    `bepoch`.
    """
    view = words.view
    epoch = view[tdcs + _EPOCH]
    if bepoch & MIGRATION_EPOCH:
        return False
    if bepoch == epoch - 1:
        return bool(view[tdcs + _REFCOUNT + (bepoch & 1)] == 0)
    return bool(bepoch < epoch - 1)


def is_previous_busy(words: Words, tdcs: int) -> bool:
    """True while a vCPU is inside that entered in the epoch before the present one."""
    view = words.view
    return view[tdcs + _REFCOUNT + (1 - (view[tdcs + _EPOCH] & 1))] != 0


def advance(words: Words, tdcs: int) -> None:
    """Begin the next epoch; its counter is the one just seen as 0."""
    index = tdcs + _EPOCH
    words.cells[index] = words.view[index] + 1


def join(words: Words, tdcs: int) -> int:
    """One more vCPU is inside; returns the epoch that it belongs to."""
    epoch = words.view[tdcs + _EPOCH]
    counter = tdcs + _REFCOUNT + (epoch & 1)
    words.put(counter, words.view[counter] + 1)
    return epoch


def part(words: Words, tdcs: int, vcpu_epoch: int) -> None:
    """A vCPU that had entered in `vcpu_epoch` is outside again."""
    counter = tdcs + _REFCOUNT + (vcpu_epoch & 1)
    words.put(counter, words.view[counter] - 1)
