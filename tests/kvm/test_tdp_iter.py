"""The walker of a TDP page table: order, bounds, restarts."""

import pytest
from mmubench import SHARED_BIT, MmuBench, tdx_bench

from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.role import Role
from tdxlab.kvm.spte import spte_to_pfn
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    for_each_tdp_pte,
    for_each_tdp_pte_min_level,
    for_each_tdp_pte_min_level_all,
    gfn_root_bits,
    tdp_mmu_iter_cond_resched,
    tdp_mmu_max_gfn_exclusive,
)
from tdxlab.kvm.vm import Vcpu
from tdxlab.steps import run


@pytest.fixture
def bench() -> MmuBench:
    return MmuBench()


@pytest.fixture
def vcpu(bench: MmuBench) -> Vcpu:
    """A vCPU with gfns 0x1ff and 0x201 mapped by two tables, and 1 GiB from gfn 0x40000 on."""
    vcpu = bench.load()
    bench.map(vcpu, 0x1FF)
    bench.map(vcpu, 0x201)
    bench.map(vcpu, 0x40000, level=3)
    return vcpu


def visits(walk) -> list[tuple[int, int]]:
    return [(it.level, it.gfn) for it in walk]


def test_for_each_tdp_pte_visits_parents_before_children(bench: MmuBench, vcpu: Vcpu) -> None:
    walk = for_each_tdp_pte(bench.vm, bench.root(vcpu), 0x1FE, 0x202)
    assert visits(walk) == [
        (4, 0),
        (3, 0),
        (2, 0),
        (1, 0x1FE),
        (1, 0x1FF),
        (2, 0x200),
        (1, 0x200),
        (1, 0x201),
    ]


def test_for_each_tdp_pte_goes_up_two_levels_where_two_tables_end(
    bench: MmuBench, vcpu: Vcpu
) -> None:
    walk = for_each_tdp_pte(bench.vm, bench.root(vcpu), 0x3FFFF, 0x40001)
    assert visits(walk) == [(4, 0), (3, 0), (2, 0x3FE00), (3, 0x40000)]


def test_for_each_tdp_pte_min_level_stays_above_the_level(bench: MmuBench, vcpu: Vcpu) -> None:
    walk = for_each_tdp_pte_min_level(bench.vm, bench.root(vcpu), 2, 0x1FE, 0x202)
    assert visits(walk) == [(4, 0), (3, 0), (2, 0), (2, 0x200)]


def test_for_each_tdp_pte_min_level_above_the_root_visits_all_levels(
    bench: MmuBench, vcpu: Vcpu
) -> None:
    walk = for_each_tdp_pte_min_level(bench.vm, bench.root(vcpu), 5, 0x1FF, 0x200)
    assert visits(walk) == [(4, 0), (3, 0), (2, 0), (1, 0x1FF)]


def test_walk_stands_behind_the_range_when_it_ends(bench: MmuBench, vcpu: Vcpu) -> None:
    it = TdpIter(bench.vm, bench.root(vcpu), 1, 0x1FF, 0)
    assert len(list(it.walk(0x200))) == 4
    assert (it.valid, it.level, it.gfn) == (True, 2, 0x200)


def test_walk_becomes_invalid_when_it_leaves_the_root(bench: MmuBench, vcpu: Vcpu) -> None:
    it = TdpIter(bench.vm, bench.root(vcpu), 1, (1 << 36) - 1, 0)
    assert visits(it.walk(1 << 40)) == [(4, 511 << 27)]
    assert not it.valid


def test_walk_reads_the_entry_again_before_it_goes_down(bench: MmuBench, vcpu: Vcpu) -> None:
    seen = []
    words = bench.vm.memory.words
    for it in for_each_tdp_pte(bench.vm, bench.root(vcpu), 0x1FF, 0x201):
        seen.append((it.level, it.gfn))
        if seen[-1] == (2, 0):
            words.put(it.word, 0)
    assert (1, 0x1FF) not in seen
    assert seen[-2:] == [(2, 0x200), (1, 0x200)]


def test_walk_restarts_at_the_root_after_a_yield(bench: MmuBench, vcpu: Vcpu) -> None:
    seen = []
    for it in for_each_tdp_pte(bench.vm, bench.root(vcpu), 0x1FE, 0x200):
        seen.append((it.level, it.gfn))
        if seen == [(4, 0), (3, 0), (2, 0), (1, 0x1FE), (1, 0x1FF)]:
            it.yielded = True
    assert seen[5:] == [(4, 0), (3, 0), (2, 0), (1, 0x1FF)]


def test_walk_gives_the_word_and_the_value_of_each_entry(bench: MmuBench, vcpu: Vcpu) -> None:
    vm, root = bench.vm, bench.root(vcpu)
    for it in for_each_tdp_pte(vm, root, 0x201, 0x202):
        assert it.old_spte == vm.memory.words.view[it.word]
        if it.level == 1:
            assert spte_to_pfn(it.old_spte) == 0x201
            assert it.word % 512 == 1


def test_walk_of_a_direct_root_of_a_td_ends_where_the_shared_half_does() -> None:
    bench = tdx_bench()
    vcpu = bench.load()
    bench.map(vcpu, 7)
    root = bench.root(vcpu)
    assert gfn_root_bits(bench.vm, root) == SHARED_BIT
    walk = for_each_tdp_pte(bench.vm, root, 0, 1 << 40)
    assert visits(walk)[-1] == (4, 255 << 27)
    assert bench.leaves(root) == [(1, 7)]


def test_walk_of_a_direct_root_warns_and_visits_nothing_beyond_the_shared_bit() -> None:
    bench = tdx_bench()
    vcpu = bench.load()
    assert visits(for_each_tdp_pte(bench.vm, bench.root(vcpu), SHARED_BIT, SHARED_BIT + 1)) == []
    assert len(bench.told("warn")) == 1


def test_walk_of_a_mirror_root_aliases_beyond_its_levels() -> None:
    bench = tdx_bench()
    vcpu = bench.load()
    bench.map(vcpu, 5, mirror=True)
    root = bench.root(vcpu, mirror=True)
    assert gfn_root_bits(bench.vm, root) == 0
    assert TdpIter(bench.vm, root, 1, 0, 0).is_mirror
    start = (1 << 36) + 5
    assert visits(for_each_tdp_pte(bench.vm, root, start, start + 1))[-1] == (1, start)


def test_for_each_tdp_pte_min_level_all_shows_the_shared_bit_in_gfns() -> None:
    bench = tdx_bench()
    vcpu = bench.load()
    bench.map(vcpu, 7)
    walk = for_each_tdp_pte_min_level_all(bench.vm, bench.root(vcpu), 1)
    assert (1, SHARED_BIT | 7) in visits(walk)


def test_tdp_mmu_max_gfn_exclusive_follows_the_address_width(bench: MmuBench) -> None:
    assert tdp_mmu_max_gfn_exclusive(bench.vm) == 1 << 40


def test_tdpiter_takes_the_address_space_from_the_root(bench: MmuBench, vcpu: Vcpu) -> None:
    root = bench.root(vcpu)
    smm = root._replace(role=int(Role(root.role).with_(smm=1)))
    assert TdpIter(bench.vm, root, 1, 0, 0).as_id == 0
    assert TdpIter(bench.vm, smm, 1, 0, 0).as_id == 1


def test_tdpiter_warns_of_a_level_that_no_root_has(bench: MmuBench, vcpu: Vcpu) -> None:
    root = bench.root(vcpu)
    it = TdpIter(bench.vm, root._replace(role=root.role & ~15), 1, 0, 0)
    assert not it.valid
    assert bench.told("warn")


# -- yielding


def positions(bench: MmuBench, vcpu: Vcpu, mode: str, *, flush: bool) -> list[tuple[int, int]]:
    """What a walk of gfns 0x1fe to 0x1ff visits that offers to yield everywhere."""
    vm = bench.vm
    seen = []
    run(vm.mmu_lock.lock(mode))
    for it in for_each_tdp_pte(vm, bench.root(vcpu), 0x1FE, 0x200):
        seen.append((it.level, it.gfn))
        if run(tdp_mmu_iter_cond_resched(vm, it, flush, mode)):
            continue
    vm.mmu_lock.unlock(mode)
    return seen


def test_cond_resched_stays_if_nobody_wants_the_lock(bench: MmuBench, vcpu: Vcpu) -> None:
    assert len(positions(bench, vcpu, WRITE, flush=True)) == 5
    assert bench.events == []


@pytest.mark.parametrize("mode", [READ, WRITE])
def test_cond_resched_yields_once_there_is_progress(bench: MmuBench, vcpu: Vcpu, mode: str) -> None:
    bench.vm.need_resched = lambda: True
    seen = positions(bench, vcpu, mode, flush=False)
    assert seen[:5] == [(4, 0), (3, 0), (2, 0), (1, 0x1FE), (1, 0x1FF)]
    assert seen[5:] == [(4, 0), (3, 0), (2, 0), (1, 0x1FF)]
    assert bench.events == [("yield", mode)]


def test_cond_resched_flushes_before_it_yields(bench: MmuBench, vcpu: Vcpu) -> None:
    bench.vm.need_resched = lambda: True
    positions(bench, vcpu, WRITE, flush=True)
    assert bench.events == [("kvm_flush_remote_tlbs",), ("yield", WRITE)]


def test_cond_resched_lets_a_waiting_thread_have_the_lock(bench: MmuBench, vcpu: Vcpu) -> None:
    vm = bench.vm
    run(vm.mmu_lock.lock(WRITE))
    waiter = vm.mmu_lock.lock(READ)
    next(waiter)
    assert next(waiter)[0] == "wait"
    walk = for_each_tdp_pte(vm, bench.root(vcpu), 0x1FE, 0x200)
    it = next(walk)
    assert run(tdp_mmu_iter_cond_resched(vm, it, False, WRITE)) is False
    while it.gfn != 0x1FF:
        it = next(walk)
    offer = tdp_mmu_iter_cond_resched(vm, it, False, WRITE)
    next(offer)
    assert list(waiter) == []
    assert vm.mmu_lock.readers == 1
    assert next(offer)[0] == "wait"
    vm.mmu_lock.unlock(READ)
    assert run(offer) is True
    assert it.yielded
    assert vm.mmu_lock.written


def test_cond_resched_warns_of_an_iterator_that_yielded(bench: MmuBench, vcpu: Vcpu) -> None:
    it = next(for_each_tdp_pte(bench.vm, bench.root(vcpu), 0, 1))
    it.yielded = True
    run(tdp_mmu_iter_cond_resched(bench.vm, it, False, WRITE))
    assert bench.told("warn")
