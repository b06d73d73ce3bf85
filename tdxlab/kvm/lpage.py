"""How large a page one slot allows at a gfn: struct kvm_lpage_info.

A large page must lie inside its slot, its gfns and their HVAs must be aligned alike, and all of it
must be private or all of it shared. The first two follow from the slot; the third is kept by hand,
as the attributes change: `vm.slots.mixed` holds those that are not uniform.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c; x86.c, kvm_alloc_memslot_metadata.
Differs: no count of other reasons; here nobody tracks writes to single frames.
"""

from __future__ import annotations

from collections.abc import Iterator

from tdxlab.arch import LEVEL_BITS, PAGE_SHIFT
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.vm import Vm, pages_per_level, round_gfn

#: Greatest level of a large page: 1 GiB. Source: kvm_host.h, KVM_MAX_HUGEPAGE_LEVEL.
KVM_MAX_HUGEPAGE_LEVEL = 3
HUGEPAGE_LEVELS = range(2, KVM_MAX_HUGEPAGE_LEVEL + 1)


def slot_contains_hugepage(slot: Slot, gfn: int, level: int) -> bool:
    """True if the whole large page that starts at `gfn` lies in the slot."""
    return gfn >= slot.base_gfn and gfn + pages_per_level(level) <= slot.end_gfn


def lpage_disallowed(vm: Vm, slot: Slot, gfn: int, level: int) -> bool:
    """True if no large page of `level` (2 or 3) may cover `gfn`.

    Source: mmu.c, lpage_info_slot and disallow_lpage; x86.c, kvm_alloc_memslot_metadata.
    """
    start = round_gfn(gfn, level)
    if not slot_contains_hugepage(slot, start, level):
        return True
    if (slot.base_gfn ^ slot.userspace_addr >> PAGE_SHIFT) & pages_per_level(level) - 1:
        return True
    return hugepage_test_mixed(vm, slot, start, level)


def max_mapping_level(vm: Vm, slot: Slot, gfn: int, max_level: int, is_private: bool) -> int:
    """Greatest level, up to `max_level`, at which `gfn` may be mapped. For shared memory, the
    host's own mapping is a limit too.

    Source: mmu.c, __kvm_mmu_max_mapping_level.
    """
    level = min(max_level, KVM_MAX_HUGEPAGE_LEVEL)
    while level > 1 and lpage_disallowed(vm, slot, gfn, level):
        level -= 1
    if is_private or level == 1:
        return level
    return min(level, host_pfn_mapping_level(vm, slot, gfn))


def kvm_mmu_max_mapping_level(vm: Vm, slot: Slot, gfn: int) -> int:
    """Greatest level at which `gfn` may be mapped as what it is, private or shared."""
    is_private = slot.can_be_private and vm.attributes.is_private(gfn)
    return max_mapping_level(vm, slot, gfn, KVM_MAX_HUGEPAGE_LEVEL, is_private)


def host_pfn_mapping_level(vm: Vm, slot: Slot, gfn: int) -> int:
    """Level at which user space has the gfn's memory mapped; 1 if it has nothing there.

    Source: mmu.c, host_pfn_mapping_level.
    """
    return vm.user_memory.mapping_level(slot.gfn_to_hva(gfn))


# -- large pages with both kinds of memory


def hugepage_test_mixed(vm: Vm, slot: Slot, gfn: int, level: int) -> bool:
    """True if the large page at `gfn` has both kinds, as far as KVM has taken note."""
    return (slot.base_gfn, level, gfn) in vm.slots.mixed


def hugepage_set_mixed(vm: Vm, slot: Slot, gfn: int, level: int, mixed: bool) -> None:
    """Note whether it has. Source: mmu.c, hugepage_set_mixed and hugepage_clear_mixed."""
    key = (slot.base_gfn, level, gfn)
    if mixed and key not in vm.slots.mixed:
        vm.slots.mixed.put(key, True)
    elif not mixed and key in vm.slots.mixed:
        vm.slots.mixed.drop(key)


def hugepage_has_attrs(vm: Vm, slot: Slot, gfn: int, level: int, attrs: int) -> bool:
    """True if the whole large page at `gfn` has exactly `attrs`. At 1 GiB this builds on what was
    noted for 2 MiB. Source: mmu.c, hugepage_has_attrs.
    """
    end = gfn + pages_per_level(level)
    if level == 2:
        return vm.attributes.range_has_attrs(gfn, end, -1, attrs)
    return all(
        not hugepage_test_mixed(vm, slot, part, level - 1) and vm.attributes.get(part) == attrs
        for part in range(gfn, end, pages_per_level(level - 1))
    )


def clear_mixed_inside(vm: Vm, slot: Slot, start: int, end: int, level: int) -> None:
    """Note that the large pages of `level` in [start, end) are uniform; both ends aligned."""
    for gfn in list(_mixed_between(vm, slot, start, end, level)):
        hugepage_set_mixed(vm, slot, gfn, level, False)


def kvm_mmu_init_memslot_memory_attributes(vm: Vm, slot: Slot) -> None:
    """Note for a new slot which of its large pages have both kinds.

    Source: mmu.c, kvm_mmu_init_memslot_memory_attributes. Differs: only those at which the
    attribute changes are looked at; the others are uniform.
    """
    changes = [start for start, _, _ in vm.attributes.runs(slot.base_gfn, slot.end_gfn)][1:]
    for level in HUGEPAGE_LEVELS:
        for change in changes:
            gfn = round_gfn(change, level)
            if gfn < change and slot_contains_hugepage(slot, gfn, level):
                hugepage_set_mixed(vm, slot, gfn, level, True)


def free_lpage_info(vm: Vm, slot: Slot) -> None:
    """Forget what was noted for a slot that is gone. Source: x86.c, kvm_arch_free_memslot."""
    for key in [key for key in vm.slots.mixed if key[0] == slot.base_gfn]:
        vm.slots.mixed.drop(key)


def _mixed_between(vm: Vm, slot: Slot, start: int, end: int, level: int) -> Iterator[int]:
    """First gfns in [start, end) of the slot's mixed pages of one level: asks for each page, or
    looks through what was noted, whichever is less.
    """
    if end - start >> LEVEL_BITS * (level - 1) < len(vm.slots.mixed):
        pages = range(start, end, pages_per_level(level))
        yield from (gfn for gfn in pages if hugepage_test_mixed(vm, slot, gfn, level))
    else:
        for base, noted, gfn in vm.slots.mixed:
            if base == slot.base_gfn and noted == level and start <= gfn < end:
                yield gfn
