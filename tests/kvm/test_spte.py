"""SPTEs: worked values, predicates, what is made of what."""

from __future__ import annotations

import pytest
from mmubench import MmuBench, tdx_bench

from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm.pages import HostPages
from tdxlab.kvm.params import MmuParams, VmConfig
from tdxlab.kvm.role import ACC_ALL, AD_DISABLED, GUEST_MODE, tdp_root_role
from tdxlab.kvm.spte import (
    ACCESSED_MASK,
    DIRTY_MASK,
    FROZEN_SPTE,
    HOST_WRITABLE_MASK,
    MMU_WRITABLE_MASK,
    PT_WRITABLE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_TDP_AD_DISABLED,
    SPTE_TDP_AD_WRPROT_ONLY,
    Spte,
    check_spte_writable_invariants,
    is_access_allowed,
    is_access_track_spte,
    is_accessed_spte,
    is_ept_ve_possible,
    is_executable_pte,
    is_frozen_spte,
    is_large_pte,
    is_last_spte,
    is_mmio_spte,
    is_present_leaf,
    is_shadow_present_pte,
    is_writable_pte,
    leaf_spte_change_needs_tlb_flush,
    make_huge_spte,
    make_nonleaf_spte,
    make_small_spte,
    make_spte,
    mark_spte_for_access_track,
    restore_acc_track_spte,
    spte_ad_enabled,
    spte_ad_need_write_protect,
    spte_needs_atomic_update,
    spte_to_pfn,
)
from tdxlab.kvm.vm import Vm
from tdxlab.memory import Memory
from tdxlab.trace import Trace

LEAF = 0x8600_0000_0000_0B77
LARGE_LEAF = 0x8600_0000_0000_0BF7
TD_LEAF = 0x8600_0000_0000_0B37
TD_LARGE_LEAF = 0x8600_0000_0000_0BB7
NONLEAF = 0x8000_0000_0000_0907
ROLE = tdp_root_role(4, ad_bits=True) & ~7


@pytest.fixture
def vm() -> Vm:
    """An ordinary VM."""
    return MmuBench().vm


@pytest.fixture
def td() -> Vm:
    """A TD. Its quirk of ignoring the guest's PAT is off, as KVM has it."""
    return tdx_bench(ignore_guest_pat=False).vm


def vm_with(params: MmuParams, **config: int) -> Vm:
    journal = Journal()
    region = Region(0, 1 << 20)
    memory = Memory(journal, Trace(journal), [region])
    pages = HostPages(journal, [region])
    return Vm(journal, memory, params, VmConfig(**config), pages=pages)


def leaf(
    vm: Vm,
    *,
    level: int = 1,
    role: int = ROLE,
    access: int = ACC_ALL,
    pfn: int = 0,
    prefetch: bool = False,
    host_writable: bool = True,
) -> int:
    """A leaf for pfn 0 with all permissions, unless it is to be otherwise. role: without level."""
    role |= level
    return make_spte(
        vm, role=role, access=access, pfn=pfn, prefetch=prefetch, host_writable=host_writable
    )


# -- worked values


def test_special_values() -> None:
    assert SHADOW_NONPRESENT_VALUE == 0x8000_0000_0000_0000
    assert FROZEN_SPTE == 0x8000_0000_0000_05A0


def test_make_spte_of_an_ordinary_vm(vm: Vm) -> None:
    assert leaf(vm) == LEAF
    assert leaf(vm, level=2) == leaf(vm, level=3) == LARGE_LEAF
    assert leaf(vm, prefetch=True) == 0x8600_0000_0000_0A77
    assert leaf(vm, host_writable=False) == 0x8000_0000_0000_0975


def test_make_spte_of_a_td(td: Vm) -> None:
    assert leaf(td) == TD_LEAF
    assert leaf(td, level=2) == TD_LARGE_LEAF
    assert leaf(td, prefetch=True) == 0x8600_0000_0000_0A37


def test_make_spte_without_write_access_is_neither_writable_nor_dirty(vm: Vm) -> None:
    assert leaf(vm, access=5) == LEAF & ~(PT_WRITABLE_MASK | MMU_WRITABLE_MASK | DIRTY_MASK)


def test_make_spte_gives_no_more_than_the_access_asked_for(vm: Vm) -> None:
    assert leaf(vm, access=6) & 7 == 3
    assert leaf(vm, access=1) & 7 == 4


def test_make_spte_keeps_the_pfn(vm: Vm) -> None:
    spte = leaf(vm, pfn=0xABCDE12345)
    assert spte == LEAF | 0xABCDE12345 << 12
    assert spte_to_pfn(spte) == 0xABCDE12345
    assert Spte(spte).hpa == 0xABCDE12345000


def test_make_spte_of_a_device_is_uncached(vm: Vm) -> None:
    vm.is_mmio_pfn = lambda pfn: pfn == 7
    assert leaf(vm, pfn=7) & 0x78 == 0
    assert leaf(vm, pfn=8) & 0x78 == 0x70


def test_make_spte_of_a_large_page_is_not_executable_under_the_nx_workaround() -> None:
    vm = vm_with(MmuParams(nx_huge_pages=True))
    assert leaf(vm, level=2) == LARGE_LEAF & ~4
    assert leaf(vm) == LEAF


def test_make_spte_without_ad_bits_is_tagged_and_a_prefetched_one_tracked() -> None:
    vm = vm_with(MmuParams(ad_bits=False))
    role = ROLE | AD_DISABLED
    assert leaf(vm, role=role) == LEAF | SPTE_TDP_AD_DISABLED
    prefetched = leaf(vm, role=role, prefetch=True)
    assert is_access_track_spte(prefetched)
    assert restore_acc_track_spte(prefetched) & 7 == 5


def test_make_spte_for_a_nested_guest_is_tagged_only_with_a_cpu_log() -> None:
    role = ROLE | GUEST_MODE
    with_log = vm_with(MmuParams(), dirty_log_size=512)
    assert leaf(with_log, role=role) == LEAF | SPTE_TDP_AD_WRPROT_ONLY
    assert leaf(vm_with(MmuParams()), role=role) == LEAF


def test_make_spte_is_always_readable_on_a_cpu_without_execute_only() -> None:
    vm = vm_with(MmuParams(execute_only=False))
    assert vm.masks.present == SHADOW_NONPRESENT_VALUE | 1
    assert leaf(vm, access=1) & 7 == 5


def test_make_nonleaf_spte_has_all_permissions(vm: Vm) -> None:
    assert make_nonleaf_spte(vm, 0x5000, ad_disabled=False) == NONLEAF | 0x5000
    without = NONLEAF & ~ACCESSED_MASK | SPTE_TDP_AD_DISABLED
    assert make_nonleaf_spte(vm, 0, ad_disabled=True) == without


# -- predicates


def test_nothing_that_is_not_mmu_present_is_a_leaf() -> None:
    """FROZEN has the bits of a large and accessed page."""
    assert is_large_pte(FROZEN_SPTE)
    assert is_accessed_spte(FROZEN_SPTE)
    for spte in (FROZEN_SPTE, SHADOW_NONPRESENT_VALUE, 0):
        assert not is_shadow_present_pte(spte)
        assert not is_present_leaf(spte, 1)
        assert not is_present_leaf(spte, 2)


def test_frozen_is_one_value_and_no_mmio(vm: Vm, td: Vm) -> None:
    assert is_frozen_spte(FROZEN_SPTE)
    assert not is_frozen_spte(SHADOW_NONPRESENT_VALUE)
    assert not is_mmio_spte(vm, FROZEN_SPTE)
    assert not is_mmio_spte(td, FROZEN_SPTE)
    assert not is_writable_pte(FROZEN_SPTE)
    assert not is_executable_pte(FROZEN_SPTE)
    assert not is_ept_ve_possible(FROZEN_SPTE)
    assert spte_to_pfn(FROZEN_SPTE) == 0


@pytest.mark.parametrize(
    ("spte", "level", "last"),
    [(LEAF, 1, True), (NONLEAF, 2, False), (LARGE_LEAF, 2, True), (LARGE_LEAF, 3, True)],
)
def test_is_last_spte_by_level_or_page_size(spte: int, level: int, last: bool) -> None:
    assert is_last_spte(spte, level) is last
    assert is_present_leaf(spte, level) is last


def test_how_a_and_d_are_kept() -> None:
    disabled, wrprot_only = LEAF | SPTE_TDP_AD_DISABLED, LEAF | SPTE_TDP_AD_WRPROT_ONLY
    enabled = [spte_ad_enabled(spte) for spte in (LEAF, wrprot_only, disabled)]
    assert enabled == [True, True, False]
    protect = [spte_ad_need_write_protect(spte) for spte in (LEAF, wrprot_only, disabled)]
    assert protect == [False, True, True]


def test_accessed_is_a_bit_with_and_without_ad() -> None:
    for spte in (LEAF, LEAF | SPTE_TDP_AD_DISABLED):
        assert is_accessed_spte(spte)
        assert not is_accessed_spte(spte & ~ACCESSED_MASK)
        assert not is_accessed_spte(mark_spte_for_access_track(spte))


@pytest.mark.parametrize(
    ("spte", "atomic"),
    [
        (LEAF, False),
        (LEAF & ~ACCESSED_MASK, False),
        (LEAF & ~DIRTY_MASK, True),
        (LEAF & ~PT_WRITABLE_MASK, True),
        (LEAF & ~(PT_WRITABLE_MASK | MMU_WRITABLE_MASK), False),
        (LEAF | SPTE_TDP_AD_DISABLED, True),
        (LEAF & ~(PT_WRITABLE_MASK | MMU_WRITABLE_MASK) | SPTE_TDP_AD_DISABLED, True),
    ],
)
def test_needs_atomic_update_if_something_without_a_lock_may_change_it(
    spte: int, atomic: bool
) -> None:
    assert spte_needs_atomic_update(spte) is atomic


def test_needs_tlb_flush_only_if_mmu_writable_goes() -> None:
    protected = LEAF & ~PT_WRITABLE_MASK
    shadowed = protected & ~MMU_WRITABLE_MASK
    assert not leaf_spte_change_needs_tlb_flush(LEAF, protected)
    assert leaf_spte_change_needs_tlb_flush(LEAF, shadowed)
    assert leaf_spte_change_needs_tlb_flush(protected, shadowed)
    assert not leaf_spte_change_needs_tlb_flush(shadowed, LEAF)


@pytest.mark.parametrize(
    ("cleared", "wrong"),
    [
        (0, ""),
        (PT_WRITABLE_MASK, ""),
        (PT_WRITABLE_MASK | MMU_WRITABLE_MASK | HOST_WRITABLE_MASK, ""),
        (MMU_WRITABLE_MASK, "writable, but not MMU-writable"),
        (HOST_WRITABLE_MASK, "MMU-writable, but not host-writable"),
    ],
)
def test_writable_invariants_name_what_is_wrong(cleared: int, wrong: str) -> None:
    assert check_spte_writable_invariants(LEAF & ~cleared) == wrong


@pytest.mark.parametrize(
    ("bits", "read", "write", "execute"),
    [
        (1, True, False, False),
        (3, True, True, False),
        (4, False, False, True),
        (0, False, False, False),
    ],
)
def test_is_access_allowed_by_the_kind_of_fault(
    bits: int, read: bool, write: bool, execute: bool
) -> None:
    spte = LEAF & ~7 | bits
    assert is_access_allowed(spte, write=False, execute=False) is read
    assert is_access_allowed(spte, write=True, execute=False) is write
    assert is_access_allowed(spte, write=False, execute=True) is execute


def test_ve_is_possible_only_without_suppression_and_misconfiguration() -> None:
    assert is_ept_ve_possible(0)
    assert not is_ept_ve_possible(6)
    assert not is_ept_ve_possible(SHADOW_NONPRESENT_VALUE)
    assert is_ept_ve_possible(LEAF & ~SHADOW_NONPRESENT_VALUE)


# -- access tracking


def test_access_track_with_ad_bits_clears_accessed_only() -> None:
    assert mark_spte_for_access_track(LEAF) == LEAF & ~ACCESSED_MASK


def test_access_track_without_ad_bits_saves_r_and_x_and_restore_gives_them_back() -> None:
    spte = LEAF | SPTE_TDP_AD_DISABLED
    tracked = mark_spte_for_access_track(spte)
    assert tracked & 7 == 0
    assert (Spte(tracked).saved_read, Spte(tracked).saved_execute) == (1, 1)
    assert mark_spte_for_access_track(tracked) == tracked
    restored = restore_acc_track_spte(tracked)
    assert restored == spte & ~(PT_WRITABLE_MASK | ACCESSED_MASK)


# -- splitting and merging


@pytest.mark.parametrize(("index", "pfn"), [(0, 0x40000), (3, 0x40003), (511, 0x401FF)])
def test_make_small_spte_of_a_2m_leaf(vm: Vm, index: int, pfn: int) -> None:
    huge = LARGE_LEAF | 0x40000 << 12
    assert make_small_spte(vm, huge, ROLE | 1, index) == LEAF | pfn << 12


def test_make_small_spte_of_a_1g_leaf_is_large(vm: Vm) -> None:
    huge = LARGE_LEAF | 0x40000 << 12
    assert make_small_spte(vm, huge, ROLE | 2, 3) == LARGE_LEAF | 0x40600 << 12


def test_make_small_spte_gives_x_back_at_4k_under_the_nx_workaround() -> None:
    vm = vm_with(MmuParams(nx_huge_pages=True))
    assert make_small_spte(vm, LARGE_LEAF & ~4, ROLE | 1, 0) == LEAF
    assert make_small_spte(vm, LARGE_LEAF & ~4, ROLE | 2, 0) == LARGE_LEAF & ~4


def test_make_small_spte_keeps_an_access_tracked_leaf_tracked_under_the_nx_workaround() -> None:
    vm = vm_with(MmuParams(nx_huge_pages=True))
    tracked = mark_spte_for_access_track(LARGE_LEAF & ~4 | SPTE_TDP_AD_DISABLED)
    small = make_small_spte(vm, tracked, ROLE | 1, 0)
    assert small == mark_spte_for_access_track(LEAF | SPTE_TDP_AD_DISABLED)
    assert restore_acc_track_spte(small) & 7 == 5


@pytest.mark.parametrize("spte", [FROZEN_SPTE, SHADOW_NONPRESENT_VALUE, NONLEAF])
def test_make_small_spte_of_no_large_leaf_is_a_bug(vm: Vm, spte: int) -> None:
    assert make_small_spte(vm, spte, ROLE | 1, 0) == SHADOW_NONPRESENT_VALUE
    assert vm.vm_bugged


def test_make_huge_spte_rounds_the_address_down(vm: Vm) -> None:
    small = LEAF | 0x40203 << 12
    assert make_huge_spte(vm, small, 2) == LARGE_LEAF | 0x40200 << 12
    assert make_huge_spte(vm, small, 3) == LARGE_LEAF | 0x40000 << 12
    assert not vm.vm_bugged


def test_make_huge_spte_is_not_executable_under_the_nx_workaround() -> None:
    assert make_huge_spte(vm_with(MmuParams(nx_huge_pages=True)), LEAF, 2) == LARGE_LEAF & ~4


def test_make_huge_spte_takes_x_from_an_access_tracked_leaf_under_the_nx_workaround() -> None:
    tracked = mark_spte_for_access_track(LEAF | SPTE_TDP_AD_DISABLED)
    huge = make_huge_spte(vm_with(MmuParams(nx_huge_pages=True)), tracked, 2)
    assert huge == mark_spte_for_access_track(LARGE_LEAF & ~4 | SPTE_TDP_AD_DISABLED)
    assert restore_acc_track_spte(huge) & 7 == 1


@pytest.mark.parametrize(("spte", "level"), [(FROZEN_SPTE, 2), (LEAF, 1)])
def test_make_huge_spte_of_nothing_present_or_to_4k_is_a_bug(vm: Vm, spte: int, level: int) -> None:
    assert make_huge_spte(vm, spte, level) == SHADOW_NONPRESENT_VALUE
    assert vm.vm_bugged
