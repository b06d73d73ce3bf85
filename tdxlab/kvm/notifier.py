"""The MMU notifiers: how the host's memory management tells KVM that it takes memory away, and
what a fault asks to notice it.

What happens between start and end of an invalidation stands in `invalidation.py`. A fault that
looked up its page before the end finds, under mmu_lock, its gfn in the range that is being
invalidated, or another sequence number, and tries again.

Source: Linux 6.16, virt/kvm/kvm_main.c; include/linux/kvm_host.h (mmu_invalidate_retry_gfn).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.kvm import ageing, zap
from tdxlab.kvm.invalidation import (
    NO_RANGE,
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.vm import Vm
from tdxlab.kvm.zap import KVM_FILTER_PRIVATE, KVM_FILTER_SHARED, GfnRange
from tdxlab.steps import Step

Zapping = Generator[Step, None, bool]
#: Does something to the gfns of one slot; True if the TLBs must be flushed for it.
Handler = Callable[[Vm, GfnRange], Zapping]


# -- what a fault asks


def mmu_invalidate_retry_gfn(vm: Vm, seq: int, gfn: int) -> bool:
    """True if a fault that read `mmu_invalidate_seq` as `seq` must try again; mmu_lock held.

    Source: kvm_host.h, mmu_invalidate_retry_gfn.
    """
    if vm.mmu_invalidate_in_progress:
        if vm.mmu_invalidate_range_start == NO_RANGE:
            vm.warn("mmu_invalidate_retry_gfn: mmu_lock was dropped before a range was added")
            return True
        if vm.mmu_invalidate_range_start <= gfn < vm.mmu_invalidate_range_end:
            return True
    return vm.mmu_invalidate_seq != seq


def mmu_invalidate_retry_gfn_unsafe(vm: Vm, seq: int, gfn: int) -> bool:
    """The same question without mmu_lock: a yes saves work, a no decides nothing."""
    if (
        vm.mmu_invalidate_in_progress
        and vm.mmu_invalidate_range_start <= gfn < vm.mmu_invalidate_range_end
    ):
        return True
    return vm.mmu_invalidate_seq != seq


def kvm_mmu_unmap_gfn_range(vm: Vm, gfn_range: GfnRange) -> Zapping:
    """Add the range to the invalidation, and unmap it. Returns True if a flush is due.

    Source: kvm_main.c, kvm_mmu_unmap_gfn_range.
    """
    kvm_mmu_invalidate_range_add(vm, gfn_range.start, gfn_range.end)
    return zap.kvm_unmap_gfn_range(vm, gfn_range)


# -- ranges of gfns: for attributes


def gfn_ranges(vm: Vm, start: int, end: int) -> Iterator[GfnRange]:
    """The part of [start, end) that each slot has, as ranges of both kinds of memory."""
    both = KVM_FILTER_SHARED | KVM_FILTER_PRIVATE
    for as_id in range(vm.slots.spaces):
        for slot in vm.slots.overlapping(start, end, as_id):
            yield GfnRange(
                slot, max(start, slot.base_gfn), min(end, slot.end_gfn), both, True, False
            )


def kvm_handle_gfn_range(
    vm: Vm, start: int, end: int, handler: Handler, on_lock: Callable[[Vm], None]
) -> Zapping:
    """Call `handler` for what each slot has of the gfns in [start, end), all under one mmu_lock for
    write; flush if it says so. `on_lock` runs first. Without a slot nothing happens at all.

    Source: kvm_main.c, kvm_handle_gfn_range.
    """
    return handle_ranges(vm, list(gfn_ranges(vm, start, end)), handler, on_lock)


def handle_ranges(
    vm: Vm, ranges: list[GfnRange], handler: Handler, on_lock: Callable[[Vm], None]
) -> Zapping:
    """`on_lock`, then `handler` for each range, under one mmu_lock for write; flush if a handler
    says so, and return whether one did. Without a range nothing happens at all.
    """
    if not ranges:
        return False
    yield from vm.mmu_lock.lock(WRITE)
    try:
        on_lock(vm)
        flush = False
        for gfn_range in ranges:
            flush |= yield from handler(vm, gfn_range)
        if flush:
            vm.flush_remote_tlbs()
    finally:
        vm.mmu_lock.unlock(WRITE)
    return flush


# -- MMU notifiers: ranges of HVAs


def hva_ranges(vm: Vm, start: int, end: int, *, may_block: bool, lockless: bool) -> list[GfnRange]:
    """The gfns whose shared memory touches the HVAs in [start, end), per slot. Private memory has
    no HVA, so only shared memory is meant; nothing is in a range without bytes, and such a one is
    warned of. Source: kvm_main.c, kvm_handle_hva_range.
    """
    if end <= start:
        vm.warn(f"kvm_handle_hva_range: {start:#x} to {end:#x} is no range")
        return []
    return [
        _hva_range(slot, start, end)._replace(may_block=may_block, lockless=lockless)
        for as_id in range(vm.slots.spaces)
        for slot in vm.slots.overlapping_hva(start, end, as_id)
    ]


def _hva_range(slot: Slot, start: int, end: int) -> GfnRange:
    first = max(start, slot.userspace_addr) - slot.userspace_addr
    last = min(end, slot.userspace_end) - slot.userspace_addr
    return GfnRange(
        slot,
        slot.base_gfn + (first >> PAGE_SHIFT),
        slot.base_gfn + (last + PAGE_SIZE - 1 >> PAGE_SHIFT),
        KVM_FILTER_SHARED,
        True,
        False,
    )


def kvm_mmu_notifier_invalidate_range_start(
    vm: Vm, start: int, end: int, blockable: bool = True
) -> Generator[Step, None, int]:
    """The host takes away what is mapped at the HVAs in [start, end): zap it, and keep faults out
    until the end. blockable: the zapping may offer mmu_lock to others. Returns 0.
    """
    vm.slots.mn_active_invalidate_count += 1
    ranges = hva_ranges(vm, start, end, may_block=blockable, lockless=False)
    yield from handle_ranges(vm, ranges, kvm_mmu_unmap_gfn_range, kvm_mmu_invalidate_begin)
    return 0


def kvm_mmu_notifier_invalidate_range_end(
    vm: Vm, start: int, end: int
) -> Generator[Step, None, int]:
    """It is taken away. start, end: as at the start. Returns 0."""
    if hva_ranges(vm, start, end, may_block=True, lockless=False):
        yield from vm.mmu_lock.lock(WRITE)
        kvm_mmu_invalidate_end(vm)
        vm.mmu_lock.unlock(WRITE)
    if not vm.slots.mn_active_invalidate_count:
        vm.warn("kvm_mmu_notifier_invalidate_range_end: there was no start")
        return 0
    vm.slots.mn_active_invalidate_count -= 1
    return 0


def kvm_mmu_notifier_invalidate_range(
    vm: Vm, hva_start: int, hva_end: int, blockable: bool = True
) -> Generator[Step, None, None]:
    """Start and end with nothing in between: the host's page table was changed before."""
    yield from kvm_mmu_notifier_invalidate_range_start(vm, hva_start, hva_end, blockable)
    yield ("host page table changed", hva_start, hva_end)
    yield from kvm_mmu_notifier_invalidate_range_end(vm, hva_start, hva_end)


def kvm_mmu_notifier_clear_flush_young(vm: Vm, start: int, end: int) -> Zapping:
    """Was the memory at the HVAs in [start, end) used since it was last asked? No TLB is flushed
    on x86, so a use through one may be missed.
    """
    return (yield from _age(vm, start, end, ageing.kvm_tdp_mmu_age_gfn_range))


def kvm_mmu_notifier_clear_young(vm: Vm, start: int, end: int) -> Zapping:
    """The same question, from who never wanted a flush."""
    return (yield from _age(vm, start, end, ageing.kvm_tdp_mmu_age_gfn_range))


def kvm_mmu_notifier_test_young(vm: Vm, start: int, end: int) -> Zapping:
    """The same question, leaving the answer as it is for the next time."""
    return (yield from _age(vm, start, end, ageing.kvm_tdp_mmu_test_age_gfn))


def kvm_mmu_notifier_release(vm: Vm) -> Generator[Step, None, None]:
    """The process is gone, and with it all of its memory: zap all direct roots."""
    yield from zap.kvm_flush_shadow_all(vm)


def _age(vm: Vm, start: int, end: int, handler: Handler) -> Zapping:
    """Ageing takes no lock. Source: kvm_main.c, kvm_age_hva_range."""
    young = False
    for gfn_range in hva_ranges(vm, start, end, may_block=False, lockless=True):
        young |= yield from handler(vm, gfn_range)
    return young


def clip_to_gmem(slot: Slot, start: int, end: int) -> GfnRange | None:
    """The gfns of a bound slot that pages [start, end) of its file back; None if there are none."""
    first = max(start, slot.gmem_pgoff)
    last = min(end, slot.gmem_pgoff + slot.npages)
    if first >= last:
        return None
    shift = slot.base_gfn - slot.gmem_pgoff
    return GfnRange(slot, first + shift, last + shift, KVM_FILTER_PRIVATE, True, False)
