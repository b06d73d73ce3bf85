"""Roots: references, walks over them, allocation, invalidation, loading."""

import pytest
from mmubench import SHARED_BIT, MmuBench, tdx_bench

from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.page_fault import PageFault
from tdxlab.kvm.role import INVALID, IS_MIRROR
from tdxlab.kvm.roots import (
    FREE_OBSOLETE_ROOTS,
    KVM_ALL_ROOTS,
    KVM_DIRECT_ROOTS,
    KVM_FILTER_PRIVATE,
    KVM_FILTER_SHARED,
    KVM_INVALID_ROOTS,
    KVM_MIRROR_ROOTS,
    KVM_VALID_ROOTS,
    for_each_tdp_mmu_root,
    for_each_tdp_mmu_root_yield_safe,
    is_obsolete_root,
    kvm_gfn_range_filter_to_root_types,
    kvm_is_addr_direct,
    kvm_mmu_destroy,
    kvm_mmu_free_obsolete_roots,
    kvm_mmu_load,
    kvm_mmu_reload,
    kvm_mmu_reset_context,
    kvm_mmu_unload,
    kvm_tdp_mmu_alloc_root,
    kvm_tdp_mmu_get_root,
    kvm_tdp_mmu_invalidate_roots,
    kvm_tdp_mmu_put_root,
    tdp_mmu_get_root_for_fault,
    tdp_mmu_root_match,
)
from tdxlab.kvm.vm import INVALID_PAGE, Vcpu
from tdxlab.steps import run


@pytest.fixture
def bench() -> MmuBench:
    return tdx_bench()


@pytest.fixture
def vcpu(bench: MmuBench) -> Vcpu:
    return bench.load()


def invalidate(bench: MmuBench, types: int) -> None:
    run(bench.vm.mmu_lock.lock(WRITE))
    kvm_tdp_mmu_invalidate_roots(bench.vm, types)
    bench.vm.mmu_lock.unlock(WRITE)


def counts(bench: MmuBench) -> list[int]:
    """References to each root, in list order."""
    return [bench.vm.root_count[hpa] for hpa in bench.vm.tdp_mmu_roots]


# -- loading


def test_load_allocates_the_mirror_first_so_the_direct_root_leads_the_list(
    bench: MmuBench, vcpu: Vcpu
) -> None:
    assert bench.vm.tdp_mmu_roots == (vcpu.root_hpa, vcpu.mirror_root_hpa)
    assert [bench.vm.sps[hpa].role for hpa in bench.vm.tdp_mmu_roots] == [0x3784, 0x83784]
    assert counts(bench) == [2, 2]


def test_load_gives_a_vm_without_a_mirror_a_direct_root_only() -> None:
    bench = MmuBench()
    vcpu = bench.load()
    assert bench.vm.tdp_mmu_roots == (vcpu.root_hpa,)
    assert vcpu.mirror_root_hpa == INVALID_PAGE


def test_load_tells_the_cpu_and_flushes(bench: MmuBench) -> None:
    vcpu = bench.vm.vcpus[1]
    assert run(kvm_mmu_load(vcpu)) == 0
    assert bench.events == [("load_mmu_pgd", 1, vcpu.root_hpa, 4), ("flush_tlb_current", 1)]


def test_load_shares_roots_between_vcpus(bench: MmuBench, vcpu: Vcpu) -> None:
    other = bench.load(1)
    assert (other.root_hpa, other.mirror_root_hpa) == (vcpu.root_hpa, vcpu.mirror_root_hpa)
    assert counts(bench) == [3, 3]


def test_load_fails_without_memory(bench: MmuBench) -> None:
    while bench.pages.alloc_page("ballast") >= 0:
        pass
    assert run(kvm_mmu_load(bench.vm.vcpus[0])) == -12
    assert bench.vm.tdp_mmu_roots == ()


def test_reload_does_nothing_while_there_is_a_root(bench: MmuBench, vcpu: Vcpu) -> None:
    assert run(kvm_mmu_reload(vcpu)) == 0
    assert bench.events == []
    assert counts(bench) == [2, 2]


def test_reload_leaves_an_invalid_root_when_requested(bench: MmuBench, vcpu: Vcpu) -> None:
    old, mirror = vcpu.root_hpa, vcpu.mirror_root_hpa
    invalidate(bench, KVM_DIRECT_ROOTS)
    assert run(kvm_mmu_reload(vcpu)) == 0
    assert vcpu.root_hpa == old
    vcpu.make_request(FREE_OBSOLETE_ROOTS)
    assert run(kvm_mmu_reload(vcpu)) == 0
    assert bench.vm.tdp_mmu_roots == (vcpu.root_hpa, old, mirror)
    assert counts(bench) == [2, 1, 2]
    assert vcpu.mirror_root_hpa == mirror
    assert not vcpu.requests


def test_reload_keeps_a_valid_root_when_requested(bench: MmuBench, vcpu: Vcpu) -> None:
    root = vcpu.root_hpa
    vcpu.make_request(FREE_OBSOLETE_ROOTS)
    assert run(kvm_mmu_reload(vcpu)) == 0
    assert vcpu.root_hpa == root
    assert not vcpu.requests
    assert bench.events == []


def test_reload_keeps_an_invalid_mirror_root(bench: MmuBench, vcpu: Vcpu) -> None:
    mirror = vcpu.mirror_root_hpa
    invalidate(bench, KVM_VALID_ROOTS)
    kvm_mmu_unload(vcpu)
    run(kvm_mmu_reload(vcpu))
    assert vcpu.mirror_root_hpa == mirror
    other = bench.load(1)
    assert other.mirror_root_hpa not in (mirror, INVALID_PAGE)
    assert bench.vm.tdp_mmu_roots[0] == other.mirror_root_hpa


# -- giving up


def test_unload_drops_the_direct_root_only(bench: MmuBench, vcpu: Vcpu) -> None:
    kvm_mmu_unload(vcpu)
    kvm_mmu_unload(vcpu)
    assert vcpu.root_hpa == INVALID_PAGE
    assert vcpu.mirror_root_hpa != INVALID_PAGE
    assert counts(bench) == [1, 2]


def test_reset_context_keeps_the_root_for_the_next_load(bench: MmuBench, vcpu: Vcpu) -> None:
    hpa = vcpu.root_hpa
    kvm_mmu_reset_context(vcpu)
    run(kvm_mmu_reload(vcpu))
    assert vcpu.root_hpa == hpa
    assert counts(bench) == [2, 2]


def test_free_obsolete_roots_keeps_a_valid_root(bench: MmuBench, vcpu: Vcpu) -> None:
    kvm_mmu_free_obsolete_roots(vcpu)
    assert vcpu.root_hpa != INVALID_PAGE
    assert not is_obsolete_root(bench.vm, vcpu.root_hpa)
    invalidate(bench, KVM_DIRECT_ROOTS)
    assert is_obsolete_root(bench.vm, vcpu.root_hpa)
    kvm_mmu_free_obsolete_roots(vcpu)
    assert vcpu.root_hpa == INVALID_PAGE
    assert not is_obsolete_root(bench.vm, vcpu.root_hpa)


def test_destroy_drops_both_roots_and_the_caches(bench: MmuBench, vcpu: Vcpu) -> None:
    kvm_mmu_destroy(vcpu)
    assert counts(bench) == [1, 1]
    assert (vcpu.root_hpa, vcpu.mirror_root_hpa) == (INVALID_PAGE, INVALID_PAGE)
    assert len(bench.pages.in_use) == 2


# -- references


def test_put_root_frees_an_invalid_root_after_the_grace_period(bench: MmuBench, vcpu: Vcpu) -> None:
    hpa = vcpu.root_hpa
    invalidate(bench, KVM_DIRECT_ROOTS)
    kvm_mmu_unload(vcpu)
    kvm_tdp_mmu_put_root(bench.vm, hpa)
    assert bench.vm.tdp_mmu_roots == (vcpu.mirror_root_hpa,)
    assert hpa in bench.pages.in_use
    assert bench.vm.rcu_pending == 1
    bench.vm.rcu_barrier()
    assert hpa not in bench.pages.in_use
    assert not bench.vm.vm_bugged


def test_put_root_is_a_bug_for_the_last_reference_to_a_valid_root(
    bench: MmuBench, vcpu: Vcpu
) -> None:
    kvm_tdp_mmu_put_root(bench.vm, vcpu.root_hpa)
    kvm_tdp_mmu_put_root(bench.vm, vcpu.root_hpa)
    assert "valid root" in bench.vm.vm_bugged


def test_get_root_fails_for_a_dead_root(bench: MmuBench, vcpu: Vcpu) -> None:
    hpa = vcpu.root_hpa
    assert kvm_tdp_mmu_get_root(bench.vm, hpa)
    assert bench.vm.root_count[hpa] == 3
    invalidate(bench, KVM_DIRECT_ROOTS)
    for _ in range(3):
        kvm_tdp_mmu_put_root(bench.vm, hpa)
    assert not kvm_tdp_mmu_get_root(bench.vm, hpa)


def test_alloc_root_takes_the_root_of_another_thread_that_was_faster(bench: MmuBench) -> None:
    first, second = bench.vm.vcpus
    for vcpu in (first, second):
        vcpu.page_cache = (bench.pages.alloc_page("page table"),)
    slow = kvm_tdp_mmu_alloc_root(first, mirror=False)
    while next(slow)[0] != "spin_lock(tdp_mmu_pages_lock)":
        pass
    run(kvm_tdp_mmu_alloc_root(second, mirror=False))
    run(slow)
    assert first.root_hpa == second.root_hpa
    assert counts(bench) == [3]
    assert len(first.page_cache) == 1
    assert bench.vm.mmu_lock.readers == 0


# -- types of roots


@pytest.mark.parametrize(
    ("types", "is_mirror", "is_invalid", "matches"),
    [
        (KVM_VALID_ROOTS, False, False, True),
        (KVM_VALID_ROOTS, True, False, True),
        (KVM_VALID_ROOTS, False, True, False),
        (KVM_ALL_ROOTS, True, True, True),
        (KVM_DIRECT_ROOTS, True, False, False),
        (KVM_MIRROR_ROOTS, False, False, False),
        (KVM_DIRECT_ROOTS | KVM_INVALID_ROOTS, True, True, False),
        (KVM_DIRECT_ROOTS | KVM_INVALID_ROOTS, False, True, True),
    ],
)
def test_root_match_needs_kind_and_validity(
    bench: MmuBench, vcpu: Vcpu, types: int, is_mirror: bool, is_invalid: bool, matches: bool
) -> None:
    role = 0x3784 | (IS_MIRROR if is_mirror else 0) | (INVALID if is_invalid else 0)
    root = bench.root(vcpu)._replace(role=role)
    assert tdp_mmu_root_match(bench.vm, root, types) is matches
    assert not bench.told("warn")


def test_root_match_warns_without_a_kind(bench: MmuBench, vcpu: Vcpu) -> None:
    assert not tdp_mmu_root_match(bench.vm, bench.root(vcpu), KVM_INVALID_ROOTS)
    assert bench.told("warn")


@pytest.mark.parametrize(
    ("attr_filter", "types"),
    [
        (KVM_FILTER_SHARED, KVM_DIRECT_ROOTS),
        (KVM_FILTER_PRIVATE, KVM_MIRROR_ROOTS),
        (KVM_FILTER_SHARED | KVM_FILTER_PRIVATE, KVM_VALID_ROOTS),
    ],
)
def test_filter_to_root_types_means_both_kinds_only_with_a_mirror(
    bench: MmuBench, attr_filter: int, types: int
) -> None:
    assert kvm_gfn_range_filter_to_root_types(bench.vm, attr_filter) == types
    assert kvm_gfn_range_filter_to_root_types(MmuBench().vm, attr_filter) == KVM_DIRECT_ROOTS


def test_filter_to_root_types_warns_of_an_empty_filter(bench: MmuBench) -> None:
    assert kvm_gfn_range_filter_to_root_types(bench.vm, 0) == 0
    assert bench.told("warn")


# -- walks over roots


def test_yield_safe_walk_holds_the_present_root_only(bench: MmuBench, vcpu: Vcpu) -> None:
    held = []
    for root in for_each_tdp_mmu_root_yield_safe(bench.vm, KVM_VALID_ROOTS):
        held.append((root.is_mirror, counts(bench)))
    assert held == [(False, [3, 2]), (True, [2, 3])]
    assert counts(bench) == [2, 2]


def test_yield_safe_walk_drops_its_reference_when_left_early(bench: MmuBench, vcpu: Vcpu) -> None:
    for _ in for_each_tdp_mmu_root_yield_safe(bench.vm, KVM_VALID_ROOTS):
        break
    assert counts(bench) == [2, 2]


def test_yield_safe_walk_frees_a_root_that_it_held_last(bench: MmuBench, vcpu: Vcpu) -> None:
    hpa = vcpu.root_hpa
    invalidate(bench, KVM_DIRECT_ROOTS)
    seen = []
    for root in for_each_tdp_mmu_root_yield_safe(bench.vm, KVM_ALL_ROOTS):
        seen.append(root.spt)
        if root.spt == hpa:
            kvm_mmu_unload(vcpu)
            kvm_tdp_mmu_put_root(bench.vm, hpa)
            assert bench.vm.root_count[hpa] == 1
    assert seen == [hpa, vcpu.mirror_root_hpa]
    assert hpa not in bench.vm.root_count


def test_yield_safe_walk_goes_on_behind_its_root_when_a_new_one_leads(
    bench: MmuBench, vcpu: Vcpu
) -> None:
    walk = for_each_tdp_mmu_root_yield_safe(bench.vm, KVM_ALL_ROOTS)
    assert next(walk).spt == vcpu.root_hpa
    invalidate(bench, KVM_DIRECT_ROOTS)
    bench.load(1)
    assert [root.spt for root in walk] == [vcpu.mirror_root_hpa]


def test_walk_takes_roots_of_the_address_space_only(bench: MmuBench, vcpu: Vcpu) -> None:
    for walk in (for_each_tdp_mmu_root, for_each_tdp_mmu_root_yield_safe):
        assert len(list(walk(bench.vm, KVM_VALID_ROOTS, 0))) == 2
        assert list(walk(bench.vm, KVM_VALID_ROOTS, 1)) == []
    assert counts(bench) == [2, 2]


# -- invalidation


def test_invalidate_roots_schedules_valid_roots_of_the_type(bench: MmuBench, vcpu: Vcpu) -> None:
    invalidate(bench, KVM_DIRECT_ROOTS)
    direct, mirror = bench.root(vcpu), bench.root(vcpu, mirror=True)
    assert (direct.role, direct.scheduled_to_zap) == (0x3F84, True)
    assert (mirror.role, mirror.scheduled_to_zap) == (0x83784, False)
    assert counts(bench) == [2, 2]


def test_invalidate_roots_leaves_roots_alone_that_are_invalid_already(
    bench: MmuBench, vcpu: Vcpu
) -> None:
    invalidate(bench, KVM_DIRECT_ROOTS)
    bench.vm.sps.put(vcpu.root_hpa, bench.root(vcpu)._replace(scheduled_to_zap=False))
    invalidate(bench, KVM_ALL_ROOTS)
    assert bench.told("warn")
    assert not bench.root(vcpu).scheduled_to_zap


# -- the root of a fault


def test_root_for_fault_follows_the_shared_bit_of_the_address(bench: MmuBench, vcpu: Vcpu) -> None:
    private = PageFault(0x1000, 0)
    shared = PageFault(SHARED_BIT << 12 | 0x1000, 1 << 49)
    assert tdp_mmu_get_root_for_fault(vcpu, private).is_mirror
    assert not tdp_mmu_get_root_for_fault(vcpu, shared).is_mirror
    assert not kvm_is_addr_direct(bench.vm, private.addr)
    assert kvm_is_addr_direct(bench.vm, shared.addr)


def test_root_for_fault_is_the_direct_one_in_a_vm_without_a_shared_bit() -> None:
    bench = MmuBench()
    vcpu = bench.load()
    fault = PageFault(0x1000, 1 << 49)
    assert tdp_mmu_get_root_for_fault(vcpu, fault) == bench.root(vcpu)
    assert kvm_is_addr_direct(bench.vm, 0)


# -- the journal


def test_roots_come_back_with_a_rewind(bench: MmuBench, vcpu: Vcpu) -> None:
    before = bench.journal.digest()
    mark = bench.journal.mark()
    run(bench.vm.mmu_lock.lock(READ))
    bench.vm.mmu_lock.unlock(READ)
    invalidate(bench, KVM_VALID_ROOTS)
    kvm_mmu_destroy(vcpu)
    bench.journal.rewind(mark)
    bench.journal.release(mark)
    assert bench.journal.digest() == before
    assert counts(bench) == [2, 2]
