"""Slots that were deleted by blocking their private pages: parked, until something decides.

    the slot is deleted                its pages are blocked; one TLB flush for all of them
    the same slot is created again     its pages are unblocked, with their content
    another slot needs the gfns, or    its pages are removed; so they are when a hole is punched
    the pages of the file              into the file, and when it is closed

"The same" is: the same gfns on the same pages of the same guest_memfd. A parked slot is in no set
of slots, so faults find nothing there; but it stays bound to its file, which is how holes and the
last close find its pages. Meanwhile the host has the memory of none of them back.

Source: the policy that the review of memslot zapping named besides the two that Linux has.
Differs: no kernel does this, and Linux 6.16 has no wrapper for UNBLOCK. Pages are blocked one by
one; the module would take whole entries of 2M or 1G.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol, runtime_checkable

from tdxlab.kvm.batching import BatchedRemoval, block_leaf, change, zap_mirror_leafs_in_batches
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.external import Hook
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.role import ACC_ALL, LEVEL_MASK
from tdxlab.kvm.roots import (
    KVM_INVALID_ROOTS,
    KVM_MIRROR_ROOTS,
    for_each_tdp_mmu_root_yield_safe,
)
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.spte import is_present_leaf, make_spte, spte_to_pfn
from tdxlab.kvm.tdp_iter import TdpIter, for_each_tdp_pte, tdp_mmu_iter_cond_resched
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.steps import Step

Work = Generator[Step, None, None]


@runtime_checkable
class Unblocking(Protocol):
    """What parking asks of a back end besides `BatchedRemoval`."""

    def unblock_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """Allow translations to a blocked page again; there was a flush since it was blocked.

        mmu_lock is held for write. Returns 0; anything else ends the VM.
        """
        ...


def is_parked(vm: Vm, gfn: int) -> bool:
    """True for a gfn of a parked slot: its mirror entry may be blocked for good."""
    return any(slot.base_gfn <= gfn < slot.end_gfn for slot in vm.parked)


def park(vm: Vm, slot: Slot) -> Work:
    """The slot goes: block its private pages, flush once. mmu_lock held for write; it may be given
    up between two pages.
    """
    vm.parked = (*vm.parked, slot)
    for root in _mirrors(vm, slot):
        for it in for_each_tdp_pte(vm, root, slot.base_gfn, slot.end_gfn):
            if (yield from tdp_mmu_iter_cond_resched(vm, it, False, WRITE)):
                continue
            if is_present_leaf(it.old_spte, it.level):
                yield from block_leaf(vm, it)
    assert isinstance(vm.external, BatchedRemoval)
    yield from vm.external.flush_external_sptes()


def make_room(vm: Vm, new: Slot) -> Work:
    """A slot is about to be created or moved. Parked slots that it meets lose their pages, but the
    one that it is again waits for `unpark`. slots_lock held.
    """
    for slot in vm.parked:
        if _is_again(slot, new):
            yield from vm.guest_memory.unbind(slot)
        elif _meets(slot, new):
            yield from vm.mmu_lock.lock(WRITE)
            for root in _mirrors(vm, slot):
                yield from zap_mirror_leafs_in_batches(
                    vm, root, slot.base_gfn, slot.end_gfn, True, False
                )
            vm.mmu_lock.unlock(WRITE)
            yield from vm.guest_memory.unbind(slot)
            vm.parked = tuple(other for other in vm.parked if other != slot)


def unpark(vm: Vm, new: Slot) -> Work:
    """The slot is there again: unblock its pages; those that became shared meanwhile, or that the
    file has lost, are removed. slots_lock held.
    """
    if not any(_is_again(slot, new) for slot in vm.parked):
        return
    yield from vm.mmu_lock.lock(WRITE)
    for root in _mirrors(vm, new):
        for it in for_each_tdp_pte(vm, root, new.base_gfn, new.end_gfn):
            if (yield from tdp_mmu_iter_cond_resched(vm, it, False, WRITE)):
                continue
            if is_blocked_spte(it.old_spte):
                yield from _unblock(vm, root, it, new)
    vm.mmu_lock.unlock(WRITE)
    vm.parked = tuple(slot for slot in vm.parked if not _is_again(slot, new))


def _unblock(vm: Vm, root: MmuPage, it: TdpIter, slot: Slot) -> Work:
    """Give the entry at `it` its leaf back, after the external EPT has; remove a page that is not
    the one to be there any more.
    """
    gfn, pfn = it.gfn, spte_to_pfn(it.old_spte)
    in_file = vm.guest_memory.get_pfn(slot.gmem, slot.gfn_to_gmem_index(gfn))
    if in_file != pfn or not vm.attributes.is_private(gfn):
        yield from zap_mirror_leafs_in_batches(vm, root, gfn, gfn + 1, False, False)
        return
    assert isinstance(vm.external, Unblocking)
    error = yield from vm.external.unblock_external_spte(gfn, it.level, pfn)
    if error:
        vm.bug(f"unblock_external_spte: gfn {gfn:#x} stays blocked ({error})")
        return
    leaf = make_spte(vm, root.role & ~LEVEL_MASK | it.level, ACC_ALL, pfn)
    yield from change(vm, it, it.old_spte, leaf)


def _mirrors(vm: Vm, slot: Slot) -> Iterator[MmuPage]:
    types = KVM_MIRROR_ROOTS | KVM_INVALID_ROOTS
    return for_each_tdp_mmu_root_yield_safe(vm, types, slot.as_id)


def _is_again(slot: Slot, new: Slot) -> bool:
    """`new` is where `slot` was, on the same pages."""
    place = (slot.as_id, slot.base_gfn, slot.npages, slot.gmem, slot.gmem_pgoff)
    return place == (new.as_id, new.base_gfn, new.npages, new.gmem, new.gmem_pgoff)


def _meets(slot: Slot, new: Slot) -> bool:
    """The two have a gfn in common, or a page of a file."""
    if slot.base_gfn < new.end_gfn and new.base_gfn < slot.end_gfn:
        return True
    start, end = new.gmem_pgoff, new.gmem_pgoff + new.npages
    in_file = slot.gmem_pgoff < end and start < slot.gmem_pgoff + slot.npages
    return slot.gmem == new.gmem and in_file
