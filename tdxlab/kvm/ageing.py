"""Ageing: was a page accessed since somebody last looked?

The host's memory management asks, to find out which of a process's pages are cold. With A/D bits
the CPU sets A, and looking clears it. Without them an aged entry loses R, W and X, and the next
access faults and gives them back. Neither flushes TLBs: a page that is only seen through a stale
translation looks colder than it is, and nothing worse.

Nobody takes mmu_lock for this: entries may change at any time, and are changed atomically.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.kvm.roots import for_each_tdp_mmu_root, kvm_gfn_range_filter_to_root_types
from tdxlab.kvm.spte import (
    ACCESSED_MASK,
    is_accessed_spte,
    is_present_leaf,
    mark_spte_for_access_track,
    spte_ad_enabled,
)
from tdxlab.kvm.tdp_iter import TdpIter, for_each_tdp_pte
from tdxlab.kvm.tdp_set import tdp_mmu_set_spte_atomic
from tdxlab.kvm.vm import Vm
from tdxlab.kvm.zap import GfnRange
from tdxlab.steps import Step

#: An operation in flight that answers yes or no.
Asking = Generator[Step, None, bool]
#: One that returns what an entry was.
Clearing = Generator[Step, None, int]


def kvm_tdp_mmu_age_gfn_range(vm: Vm, gfn_range: GfnRange) -> Asking:
    """Make every leaf of the range old; True if one was young. No lock, no flush.

    Of valid roots that the range's filter names. Source: kvm_tdp_mmu_age_gfn_range.
    """
    return (yield from _age_gfn_range(vm, gfn_range, test_only=False))


def kvm_tdp_mmu_test_age_gfn(vm: Vm, gfn_range: GfnRange) -> Asking:
    """True if a leaf of the range is young; nothing changes. Source: kvm_tdp_mmu_test_age_gfn."""
    return (yield from _age_gfn_range(vm, gfn_range, test_only=True))


def _age_gfn_range(vm: Vm, gfn_range: GfnRange, *, test_only: bool) -> Asking:
    """Source: __kvm_tdp_mmu_age_gfn_range."""
    types = kvm_gfn_range_filter_to_root_types(vm, gfn_range.attr_filter)
    young = False
    for root in for_each_tdp_mmu_root(vm, types, gfn_range.slot.as_id):
        for it in for_each_tdp_pte(vm, root, gfn_range.start, gfn_range.end):
            if not is_present_leaf(it.old_spte, it.level) or not is_accessed_spte(it.old_spte):
                continue
            if test_only:
                return True
            young = True
            yield from kvm_tdp_mmu_age_spte(vm, it)
    return young


def kvm_tdp_mmu_age_spte(vm: Vm, it: TdpIter) -> Generator[Step, None, None]:
    """Make one leaf old. Without A/D bits this may lose against another change, and then the page
    counts as young once more. Source: kvm_tdp_mmu_age_spte.
    """
    if not spte_ad_enabled(it.old_spte):
        yield from tdp_mmu_set_spte_atomic(vm, it, mark_spte_for_access_track(it.old_spte))
        return
    it.old_spte = yield from tdp_mmu_clear_spte_bits_atomic(vm, it, ACCESSED_MASK)
    new_spte = it.old_spte & ~ACCESSED_MASK
    vm.emit("spte_changed", it.as_id, it.level, it.gfn, it.old_spte, new_spte)


def tdp_mmu_clear_spte_bits_atomic(vm: Vm, it: TdpIter, mask: int) -> Clearing:
    """Clear the bits `mask` in the entry, whatever it is by now. Returns what it was.

    Source: tdp_iter.h, tdp_mmu_clear_spte_bits_atomic.
    """
    yield ("clear SPTE bits", it.gfn, it.level, mask)
    words = vm.memory.words
    old_spte = words.view[it.word]
    words.cells[it.word] = old_spte & ~mask
    return old_spte
