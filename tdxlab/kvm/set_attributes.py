"""KVM_SET_MEMORY_ATTRIBUTES: turn gfns private or shared.

The old kind is unmapped first, then the attributes change, all inside one invalidation, so that no
fault maps by the old ones. A large page that the change splits into both kinds is invalidated
whole: nobody may map it large until its mixed flag is set.

Source: Linux 6.16, virt/kvm/kvm_main.c; arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from errno import EINVAL

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT
from tdxlab.kvm import lpage, zap
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from tdxlab.kvm.invalidation import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.notifier import kvm_handle_gfn_range
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.vm import Vm, pages_per_level, round_gfn
from tdxlab.kvm.zap import KVM_FILTER_PRIVATE, KVM_FILTER_SHARED, GfnRange
from tdxlab.steps import Step, finished

_ADDRESS_LIMIT = 1 << 64


def kvm_supported_mem_attributes(vm: Vm) -> int:
    """Attributes that user space may set: none without private memory."""
    return KVM_MEMORY_ATTRIBUTE_PRIVATE if vm.features.has_private_mem else 0


def kvm_vm_ioctl_set_mem_attributes(
    vm: Vm, address: int, size: int, attributes: int, flags: int = 0
) -> Generator[Step, None, int]:
    """The ioctl. address, size: bytes. attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE or 0.

    Returns 0, or -EINVAL for, in order: flags; attributes that the VM does not have; no size, or an
    end beyond 64 bits; an address or size that is no multiple of 4 KiB.
    Source: kvm_main.c, kvm_vm_ioctl_set_mem_attributes.
    """
    if flags or attributes & ~kvm_supported_mem_attributes(vm):
        return finished(-EINVAL)
    if size <= 0 or not 0 <= address < _ADDRESS_LIMIT - size:
        return finished(-EINVAL)
    if (address | size) & PAGE_OFFSET_MASK:
        return finished(-EINVAL)
    start, end = address >> PAGE_SHIFT, address + size >> PAGE_SHIFT
    return kvm_vm_set_mem_attributes(vm, start, end, private=bool(attributes))


def kvm_vm_set_mem_attributes(
    vm: Vm, start: int, end: int, private: bool
) -> Generator[Step, None, int]:
    """Make the gfns in [start, end) private, or shared; takes slots_lock. Returns 0.

    Where all have the attribute already, nothing happens at all. Gfns without a slot change too,
    without any zapping.
    Differs: the memory for the new attributes is always there (-ENOMEM in Linux).
    """
    attrs = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    yield from vm.slots_lock.lock()
    try:
        if vm.attributes.range_has_attrs(start, end, -1, attrs):
            return 0
        yield from kvm_handle_gfn_range(vm, start, end, _before(attrs), kvm_mmu_invalidate_begin)
        yield ("store attributes", start, end, private)
        vm.attributes.store(start, end, private=private)
        yield from kvm_handle_gfn_range(vm, start, end, _after(attrs), kvm_mmu_invalidate_end)
    finally:
        vm.slots_lock.unlock()
    return 0


Handling = Generator[Step, None, bool]


def _before(attrs: int) -> Callable[[Vm, GfnRange], Handling]:
    """What is done to each slot before the attributes become `attrs`."""

    def handler(vm: Vm, gfn_range: GfnRange) -> Handling:
        kvm_mmu_invalidate_range_add(vm, gfn_range.start, gfn_range.end)
        return kvm_arch_pre_set_memory_attributes(vm, gfn_range, attrs)

    return handler


def _after(attrs: int) -> Callable[[Vm, GfnRange], Handling]:
    """What is done to each slot after they became `attrs`."""

    def handler(vm: Vm, gfn_range: GfnRange) -> Handling:
        kvm_arch_post_set_memory_attributes(vm, gfn_range, attrs)
        return finished(False)

    return handler


def kvm_arch_pre_set_memory_attributes(vm: Vm, gfn_range: GfnRange, attrs: int) -> Handling:
    """Invalidate the large pages that the change will make mixed, and unmap what has the kind that
    the gfns lose. mmu_lock held for write. Returns True if a flush is due.

    Source: mmu.c, kvm_arch_pre_set_memory_attributes.
    """
    for level in lpage.HUGEPAGE_LEVELS:
        _invalidate_ends(vm, gfn_range, level)
    becomes_private = bool(attrs & KVM_MEMORY_ATTRIBUTE_PRIVATE)
    losing = KVM_FILTER_SHARED if becomes_private else KVM_FILTER_PRIVATE
    return zap.kvm_unmap_gfn_range(vm, gfn_range._replace(attr_filter=losing))


def _invalidate_ends(vm: Vm, gfn_range: GfnRange, level: int) -> None:
    """Add the large pages of one level that stick out of the range at its ends, where they lie in
    the slot and were uniform until now.
    """
    slot, pages = gfn_range.slot, pages_per_level(level)
    head, tail = round_gfn(gfn_range.start, level), round_gfn(gfn_range.end, level)
    if head != gfn_range.start or head + pages > gfn_range.end:
        _invalidate_uniform(vm, slot, head, level)
    if tail != head and tail + pages > gfn_range.end:
        _invalidate_uniform(vm, slot, tail, level)


def _invalidate_uniform(vm: Vm, slot: Slot, gfn: int, level: int) -> None:
    if not lpage.slot_contains_hugepage(slot, gfn, level):
        return
    if not lpage.hugepage_test_mixed(vm, slot, gfn, level):
        kvm_mmu_invalidate_range_add(vm, gfn, gfn + pages_per_level(level))


def kvm_arch_post_set_memory_attributes(vm: Vm, gfn_range: GfnRange, attrs: int) -> None:
    """Note which large pages are mixed now: 2 MiB first, 1 GiB builds on it. Those at the ends are
    looked at, those in between are uniform. mmu_lock held for write.

    Source: mmu.c, kvm_arch_post_set_memory_attributes.
    """
    slot = gfn_range.slot
    for level in lpage.HUGEPAGE_LEVELS:
        pages = pages_per_level(level)
        gfn = round_gfn(gfn_range.start, level)
        if gfn != gfn_range.start or gfn + pages > gfn_range.end:
            _update_mixed(vm, slot, gfn, level, attrs)
            gfn += pages
        last = max(gfn, round_gfn(gfn_range.end, level))
        lpage.clear_mixed_inside(vm, slot, gfn, last, level)
        if last < gfn_range.end:
            _update_mixed(vm, slot, last, level, attrs)


def _update_mixed(vm: Vm, slot: Slot, gfn: int, level: int, attrs: int) -> None:
    if lpage.slot_contains_hugepage(slot, gfn, level):
        uniform = lpage.hugepage_has_attrs(vm, slot, gfn, level, attrs)
        lpage.hugepage_set_mixed(vm, slot, gfn, level, not uniform)
