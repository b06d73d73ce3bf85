"""Zapping: which entries go, in which order, with which flush, under which lock."""

from types import SimpleNamespace

import pytest
from mmubench import SHARED_BIT, SLOT, MmuBench, tdx_bench

from tdxlab.kvm.hugepage import track_possible_nx_huge_page
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM
from tdxlab.kvm.roots import (
    FREE_OBSOLETE_ROOTS,
    KVM_DIRECT_ROOTS,
    KVM_FILTER_PRIVATE,
    KVM_FILTER_SHARED,
    KVM_VALID_ROOTS,
    kvm_mmu_destroy,
    kvm_mmu_unload,
    kvm_tdp_mmu_invalidate_roots,
)
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.kvm.spte import FROZEN_SPTE
from tdxlab.kvm.vm import INVALID_PAGE, MmuPage, Vcpu
from tdxlab.kvm.zap import (
    GfnRange,
    kvm_arch_flush_shadow_memslot,
    kvm_flush_shadow_all,
    kvm_mmu_uninit_tdp_mmu,
    kvm_mmu_zap_all,
    kvm_mmu_zap_all_fast,
    kvm_recover_nx_huge_pages,
    kvm_tdp_mmu_unmap_gfn_range,
    kvm_tdp_mmu_zap_all,
    kvm_tdp_mmu_zap_invalidated_roots,
    kvm_tdp_mmu_zap_leafs,
    kvm_tdp_mmu_zap_sp,
    kvm_unmap_gfn_range,
    kvm_zap_gfn_range,
    tdp_mmu_zap_leafs,
    tdp_mmu_zap_root,
)
from tdxlab.steps import WAIT, Deadlock, Operation, round_robin, run

#: All of a VM.
ALL = 1 << 40


@pytest.fixture
def bench() -> MmuBench:
    """An ordinary VM: vCPU 0 has gfns 1, 0x1ff and 0x200, and 2 MiB from gfn 0x400 on."""
    bench = MmuBench()
    vcpu = bench.load()
    for gfn in (1, 0x1FF, 0x200):
        bench.map(vcpu, gfn)
    bench.map(vcpu, 0x400, level=2)
    return bench


@pytest.fixture
def td() -> MmuBench:
    """A TD: vCPU 0 has gfns 1 and 0x200 private, gfn 3 and 2 MiB from gfn 0x400 on shared."""
    bench = tdx_bench()
    vcpu = bench.load()
    bench.map(vcpu, 1, mirror=True)
    bench.map(vcpu, 0x200, mirror=True)
    bench.map(vcpu, 3)
    bench.map(vcpu, 0x400, level=2)
    return bench


def vcpu_of(bench: MmuBench) -> Vcpu:
    return bench.vm.vcpus[0]


def direct(bench: MmuBench) -> MmuPage:
    return bench.root(vcpu_of(bench))


def mirror(bench: MmuBench) -> MmuPage:
    return bench.root(vcpu_of(bench), mirror=True)


def locked(bench: MmuBench, operation: Operation, mode: str = WRITE) -> object:
    """What `operation` returns that wants to be run with mmu_lock held."""
    run(bench.vm.mmu_lock.lock(mode))
    result = run(operation)
    bench.vm.mmu_lock.unlock(mode)
    return result


def invalidate(bench: MmuBench, types: int) -> None:
    run(bench.vm.mmu_lock.lock(WRITE))
    kvm_tdp_mmu_invalidate_roots(bench.vm, types)
    bench.vm.mmu_lock.unlock(WRITE)


# -- leaves in a range


def test_zap_leafs_clears_leaves_in_the_range_and_keeps_tables(bench: MmuBench) -> None:
    tables = len(bench.vm.sps)
    assert locked(bench, kvm_tdp_mmu_zap_leafs(bench.vm, 1, 0x200, False)) is True
    assert bench.changes() == [(1, 1), (1, 0x1FF)]
    assert bench.leaves(direct(bench)) == [(1, 0x200), (2, 0x400)]
    assert len(bench.vm.sps) == tables
    assert bench.vm.stats["pages_4k"] == 1


def test_zap_leafs_takes_a_large_leaf_whole_for_one_of_its_gfns(bench: MmuBench) -> None:
    assert locked(bench, kvm_tdp_mmu_zap_leafs(bench.vm, 0x5FF, 0x600, False)) is True
    assert bench.changes() == [(2, 0x400)]


def test_zap_leafs_hands_a_pending_flush_on_when_nothing_is_there(bench: MmuBench) -> None:
    assert locked(bench, kvm_tdp_mmu_zap_leafs(bench.vm, 5, 9, False)) is False
    assert locked(bench, kvm_tdp_mmu_zap_leafs(bench.vm, 5, 9, True)) is True
    assert bench.events == []


def test_zap_leafs_goes_through_direct_and_mirror_roots_in_list_order(td: MmuBench) -> None:
    assert locked(td, kvm_tdp_mmu_zap_leafs(td.vm, 0, ALL, False)) is True
    assert td.changes() == [(1, 3), (2, 0x400), (1, 1), (1, 0x200)]
    assert td.hooks.calls == [("remove", 1, 1, 1), ("remove", 0x200, 1, 0x200)]


def test_zap_leafs_needs_no_flush_for_an_invalid_root(bench: MmuBench) -> None:
    root = direct(bench)
    invalidate(bench, KVM_DIRECT_ROOTS)
    flush = locked(bench, tdp_mmu_zap_leafs(bench.vm, root, 0, ALL, True, False))
    assert flush is False
    assert bench.leaves(root) == []


def test_zap_leafs_flushes_before_a_yield_and_may_return_false_then(bench: MmuBench) -> None:
    # checks: root, 1G, 2M, gfn 0, gfn 1 (zapped), gfn 2 (gives way)
    bench.resched_at(5)
    assert locked(bench, kvm_tdp_mmu_zap_leafs(bench.vm, 0, 3, False)) is False
    names = [event[0] for event in bench.events]
    assert names == ["spte_changed", "kvm_flush_remote_tlbs", "yield"]


def test_zap_leafs_does_not_yield_when_it_may_not(bench: MmuBench) -> None:
    bench.vm.need_resched = lambda: True
    gfn_range = GfnRange(SLOT, 0, 0x1000, KVM_FILTER_SHARED, may_block=False)
    assert locked(bench, kvm_tdp_mmu_unmap_gfn_range(bench.vm, gfn_range, False)) is True
    assert not bench.told("yield")
    assert len(bench.changes()) == 4


def test_zap_leafs_lets_a_fault_in_between_that_waits_for_the_lock(td: MmuBench) -> None:
    vm = td.vm
    order = []

    def fault() -> Operation:
        yield from vm.mmu_lock.lock(READ)
        order.append(len(td.changes()))
        vm.mmu_lock.unlock(READ)

    zap, waiter = kvm_zap_gfn_range(vm, 0, 0x1000), fault()
    while not td.hooks.calls:
        next(zap)
        if vm.mmu_lock.written and not vm.mmu_lock.waiting:
            assert [next(waiter)[0] for _ in range(2)] == ["read_lock(mmu_lock)", WAIT]
    round_robin([zap, waiter])
    assert order == [3]
    assert ("yield", WRITE) in td.events
    assert td.leaves(mirror(td)) == []
    assert (vm.mmu_lock.readers, vm.mmu_lock.written) == (0, False)


# -- ranges of memslots


@pytest.mark.parametrize(
    ("attr_filter", "gone"),
    [
        (KVM_FILTER_SHARED, [(1, 3), (2, 0x400)]),
        (KVM_FILTER_PRIVATE, [(1, 1), (1, 0x200)]),
        (KVM_FILTER_SHARED | KVM_FILTER_PRIVATE, [(1, 3), (2, 0x400), (1, 1), (1, 0x200)]),
    ],
)
def test_unmap_gfn_range_of_a_td_zaps_the_kinds_that_the_filter_means(
    td: MmuBench, attr_filter: int, gone: list[tuple[int, int]]
) -> None:
    gfn_range = GfnRange(SLOT, 0, 0x1000, attr_filter)
    assert locked(td, kvm_unmap_gfn_range(td.vm, gfn_range)) is True
    assert td.changes() == gone


@pytest.mark.parametrize("attr_filter", [KVM_FILTER_SHARED, KVM_FILTER_PRIVATE])
def test_unmap_gfn_range_of_another_vm_ignores_the_filter(
    bench: MmuBench, attr_filter: int
) -> None:
    gfn_range = GfnRange(SLOT, 0, 0x1000, attr_filter)
    assert locked(bench, kvm_unmap_gfn_range(bench.vm, gfn_range)) is True
    assert bench.leaves(direct(bench)) == []


def test_unmap_gfn_range_reaches_invalid_roots(bench: MmuBench) -> None:
    old = direct(bench)
    invalidate(bench, KVM_DIRECT_ROOTS)
    other = bench.load(1)
    bench.map(other, 1)
    assert locked(bench, kvm_unmap_gfn_range(bench.vm, GfnRange(SLOT, 0, 0x1000))) is True
    assert bench.leaves(old) == []
    assert bench.leaves(bench.root(other)) == []


def test_unmap_gfn_range_leaves_other_address_spaces_alone(bench: MmuBench) -> None:
    gfn_range = GfnRange(SLOT._replace(as_id=1), 0, 0x1000)
    assert locked(bench, kvm_unmap_gfn_range(bench.vm, gfn_range)) is False
    assert bench.events == []


def test_a_failing_remove_hook_kills_the_vm_and_the_loop_goes_on(td: MmuBench) -> None:
    td.hooks.errors["remove"] = -5
    gfn_range = GfnRange(SLOT, 0, 0x1000, KVM_FILTER_PRIVATE)
    assert locked(td, kvm_unmap_gfn_range(td.vm, gfn_range)) is True
    assert td.vm.vm_dead
    assert td.leaves(mirror(td)) == []


def test_zap_gfn_range_flushes_the_range_inside_an_invalidation(td: MmuBench) -> None:
    vm = td.vm
    operation = kvm_zap_gfn_range(vm, 0, 2)
    in_progress = [vm.mmu_invalidate_in_progress for _ in operation]
    assert max(in_progress) == 1
    assert (vm.mmu_invalidate_seq, vm.mmu_invalidate_in_progress) == (1, 0)
    assert (vm.mmu_invalidate_range_start, vm.mmu_invalidate_range_end) == (0, 2)
    assert td.events[-1] == ("kvm_flush_remote_tlbs_range", 0, 2)
    assert not vm.mmu_lock.written


def test_zap_gfn_range_flushes_nothing_where_nothing_was(bench: MmuBench) -> None:
    run(kvm_zap_gfn_range(bench.vm, 0x3000, 0x3001))
    assert bench.events == []
    assert bench.vm.mmu_invalidate_seq == 1


def test_zap_gfn_range_warns_of_an_empty_range(bench: MmuBench) -> None:
    run(kvm_zap_gfn_range(bench.vm, 5, 5))
    assert bench.told("warn")
    assert bench.vm.mmu_invalidate_seq == 0


# -- whole roots


def test_zap_root_exclusive_clears_leaves_first_then_tables_by_level(bench: MmuBench) -> None:
    locked(bench, tdp_mmu_zap_root(bench.vm, direct(bench), shared=False))
    assert bench.changes() == [
        (1, 1),
        (1, 0x1FF),
        (1, 0x200),
        (2, 0),
        (2, 0x200),
        (2, 0x400),
        (3, 0),
        (4, 0),
    ]
    assert bench.entries(direct(bench)) == []
    stats = bench.vm.stats
    assert (stats["pages_4k"], stats["pages_2m"], stats["pt_pages"]) == (0, 0, 0)
    assert bench.vm.rcu_pending == 4


def test_zap_root_shared_freezes_all_entries_of_a_table_that_goes(bench: MmuBench) -> None:
    locked(bench, tdp_mmu_zap_root(bench.vm, direct(bench), shared=True), READ)
    changes = [event[1:] for event in bench.told("spte_changed")]
    frozen = [change for change in changes if change[4] == FROZEN_SPTE]
    assert len(frozen) == 4 * 512
    assert bench.entries(direct(bench)) == []


def test_zap_root_gives_gfns_of_a_direct_root_of_a_td_the_shared_bit(td: MmuBench) -> None:
    locked(td, tdp_mmu_zap_root(td.vm, direct(td), shared=False))
    assert td.changes()[0] == (1, SHARED_BIT | 3)


def test_zap_root_takes_a_mirror_apart_leaves_first(td: MmuBench) -> None:
    locked(td, tdp_mmu_zap_root(td.vm, mirror(td), shared=False))
    assert td.hooks.calls == [
        ("remove", 1, 1, 1),
        ("remove", 0x200, 1, 0x200),
        ("free", 0, 1),
        ("free", 0x200, 1),
        ("free", 0, 2),
        ("free", 0, 3),
    ]


def test_zap_root_shared_cannot_end_for_a_mirror(td: MmuBench) -> None:
    run(td.vm.mmu_lock.lock(READ))
    with pytest.raises(Deadlock):
        run(tdp_mmu_zap_root(td.vm, mirror(td), shared=True))
    assert td.vm.vm_dead


def test_zap_root_shared_retries_an_entry_that_changed_meanwhile(bench: MmuBench) -> None:
    vm = bench.vm
    run(vm.mmu_lock.lock(READ))
    zap = tdp_mmu_zap_root(vm, direct(bench), shared=True)
    _, gfn, level, old_spte, _ = next(zap)
    assert (gfn, level) == (1, 1)
    word = next(index for index, spte in enumerate(vm.memory.words.view) if spte == old_spte)
    vm.memory.words.put(word, old_spte & ~2)
    label, gfn, level, seen, _ = next(zap)
    assert (label, gfn, level, seen) == ("cmpxchg SPTE", 1, 1, old_spte & ~2)
    run(zap)
    assert bench.entries(direct(bench)) == []


def test_zap_root_warns_if_nobody_holds_the_root(bench: MmuBench) -> None:
    root = direct(bench)
    bench.vm.root_count.drop(root.spt)
    locked(bench, tdp_mmu_zap_root(bench.vm, root, shared=False))
    assert bench.told("warn")


def test_zap_all_clears_direct_roots_and_leaves_a_mirror(td: MmuBench) -> None:
    run(kvm_mmu_zap_all(td.vm))
    assert td.leaves(direct(td)) == []
    assert td.leaves(mirror(td)) == [(1, 1), (1, 0x200)]
    assert td.hooks.calls == []
    assert not td.told("kvm_flush_remote_tlbs")
    assert not direct(td).scheduled_to_zap


def test_flush_shadow_all_clears_invalid_direct_roots_too(bench: MmuBench) -> None:
    old = direct(bench)
    invalidate(bench, KVM_DIRECT_ROOTS)
    run(kvm_flush_shadow_all(bench.vm))
    assert bench.entries(old) == []
    assert bench.vm.root_count[old.spt] == 2


def test_zap_all_of_the_tdp_mmu_wants_the_write_lock(bench: MmuBench) -> None:
    with pytest.raises(AssertionError):
        run(kvm_tdp_mmu_zap_all(bench.vm))


@pytest.mark.parametrize("shared", [False, True])
def test_zap_invalidated_roots_puts_the_mmus_own_reference(bench: MmuBench, shared: bool) -> None:
    run(kvm_tdp_mmu_zap_invalidated_roots(bench.vm, shared))
    assert bench.events == []
    invalidate(bench, KVM_DIRECT_ROOTS)
    run(kvm_tdp_mmu_zap_invalidated_roots(bench.vm, shared))
    root = direct(bench)
    assert bench.entries(root) == []
    assert bench.vm.root_count[root.spt] == 1
    assert not root.scheduled_to_zap
    bench.events.clear()
    run(kvm_tdp_mmu_zap_invalidated_roots(bench.vm, shared))
    assert bench.events == []
    assert (bench.vm.mmu_lock.readers, bench.vm.mmu_lock.written) == (0, False)


def test_zap_invalidated_roots_frees_a_root_that_no_vcpu_holds(bench: MmuBench) -> None:
    invalidate(bench, KVM_DIRECT_ROOTS)
    hpa = direct(bench).spt
    kvm_mmu_unload(vcpu_of(bench))
    run(kvm_tdp_mmu_zap_invalidated_roots(bench.vm, True))
    bench.vm.rcu_barrier()
    assert hpa not in bench.vm.sps
    assert bench.vm.tdp_mmu_roots == ()


def test_zap_invalidated_roots_calls_a_valid_one_a_bug(bench: MmuBench) -> None:
    root = direct(bench)
    bench.vm.sps.put(root.spt, root._replace(scheduled_to_zap=True))
    run(kvm_tdp_mmu_zap_invalidated_roots(bench.vm, False))
    assert bench.vm.vm_dead


def test_zap_all_fast_swaps_direct_roots_and_keeps_the_mirror(td: MmuBench) -> None:
    run(kvm_mmu_zap_all_fast(td.vm))
    assert td.vm.mmu_valid_gen == 1
    assert td.events[0] == ("kvm_make_all_cpus_request", FREE_OBSOLETE_ROOTS)
    assert not td.told("kvm_flush_remote_tlbs")
    assert all(FREE_OBSOLETE_ROOTS in vcpu.requests for vcpu in td.vm.vcpus)
    assert td.entries(direct(td)) == []
    assert td.leaves(mirror(td)) == [(1, 1), (1, 0x200)]
    old = direct(td)
    assert td.load().root_hpa != old.spt
    run(kvm_mmu_zap_all_fast(td.vm))
    assert td.vm.mmu_valid_gen == 0


def test_zap_all_fast_lets_a_vcpu_fault_while_it_zaps(bench: MmuBench) -> None:
    zap = kvm_mmu_zap_all_fast(bench.vm)
    while not bench.changes():
        next(zap)
    assert bench.vm.mmu_lock.readers == 1
    vcpu = bench.vm.vcpus[0]
    old = vcpu.root_hpa
    bench.load()
    assert vcpu.root_hpa != old
    bench.map(vcpu, 1)
    run(zap)
    assert bench.leaves(bench.root(vcpu)) == [(1, 1)]


def test_uninit_takes_everything_back(td: MmuBench) -> None:
    vm = td.vm
    for vcpu in vm.vcpus:
        kvm_mmu_destroy(vcpu)
    run(kvm_mmu_uninit_tdp_mmu(vm))
    assert vm.tdp_mmu_roots == ()
    assert dict(vm.sps) == {}
    assert dict(vm.root_count) == {}
    assert dict(td.pages.in_use) == {}
    assert [call[0] for call in td.hooks.calls] == ["remove"] * 2 + ["free"] * 4
    assert not td.told("warn")


def test_uninit_warns_if_a_vcpu_still_has_its_root(td: MmuBench) -> None:
    run(kvm_mmu_uninit_tdp_mmu(td.vm))
    assert len(td.told("warn")) == 1
    assert len(td.vm.tdp_mmu_roots) == 2


def test_uninit_leaks_a_table_whose_free_hook_fails(td: MmuBench) -> None:
    td.hooks.errors["free"] = -5
    for vcpu in td.vm.vcpus:
        kvm_mmu_destroy(vcpu)
    run(kvm_mmu_uninit_tdp_mmu(td.vm))
    assert len(td.pages.leaked) == 4
    assert not td.vm.vm_dead


# -- one table


def table_at(bench: MmuBench, level: int, gfn: int) -> MmuPage:
    """The table of `level` whose first gfn is `gfn`, of the direct root."""
    return next(
        sp
        for sp in bench.vm.sps.values()
        if (sp.level, sp.gfn, sp.is_mirror) == (level, gfn, False) and sp.ptep >= 0
    )


def test_zap_sp_unlinks_a_table_with_all_below_it(bench: MmuBench) -> None:
    sp = table_at(bench, 2, 0)
    assert locked(bench, kvm_tdp_mmu_zap_sp(bench.vm, sp)) is True
    assert bench.changes()[0] == (3, 0)
    assert bench.entries(direct(bench)) == [(4, 0)]
    assert bench.vm.rcu_pending == 3


def test_zap_sp_refuses_a_root_and_a_table_that_is_not_linked(bench: MmuBench) -> None:
    sp = table_at(bench, 1, 0)
    assert locked(bench, kvm_tdp_mmu_zap_sp(bench.vm, direct(bench))) is False
    locked(bench, kvm_tdp_mmu_zap_sp(bench.vm, sp))
    assert locked(bench, kvm_tdp_mmu_zap_sp(bench.vm, sp)) is False
    assert len(bench.told("warn")) == 2


# -- NX huge page recovery


def split_for_nx(bench: MmuBench, *gfns: int, flags: int = 0) -> None:
    """Pretend that the tables at these gfns stand where executable 2M pages could."""
    for gfn in gfns:
        sp = table_at(bench, 1, gfn)
        bench.vm.sps.put(sp.spt, sp._replace(nx_huge_page_disallowed=True))
        track_possible_nx_huge_page(bench.vm, sp)
    slot = SLOT._replace(flags=flags)
    bench.vm.slots = SimpleNamespace(find=lambda gfn, as_id: slot)  # type: ignore[assignment]


def test_recover_nx_zaps_a_share_of_the_oldest_tables_and_flushes(bench: MmuBench) -> None:
    split_for_nx(bench, 0x200, 0)
    run(kvm_recover_nx_huge_pages(bench.vm))
    assert bench.changes()[0] == (2, 0x200)
    assert bench.events[-1] == ("kvm_flush_remote_tlbs",)
    assert bench.vm.stats["nx_lpage_splits"] == 1
    assert len(bench.vm.possible_nx_huge_pages) == 1
    run(kvm_recover_nx_huge_pages(bench.vm))
    assert bench.leaves(direct(bench)) == [(2, 0x400)]
    assert not bench.vm.mmu_lock.written


@pytest.mark.parametrize(("ratio", "left"), [(0, 2), (1, 0), (2, 1), (60, 1)])
def test_recover_nx_rounds_its_share_up(bench: MmuBench, ratio: int, left: int) -> None:
    split_for_nx(bench, 0, 0x200)
    run(kvm_recover_nx_huge_pages(bench.vm, ratio))
    assert bench.vm.stats["nx_lpage_splits"] == left


def test_recover_nx_only_forgets_tables_of_a_dirty_logged_slot(bench: MmuBench) -> None:
    split_for_nx(bench, 0, flags=KVM_MEM_LOG_DIRTY_PAGES)
    run(kvm_recover_nx_huge_pages(bench.vm))
    assert bench.events == []
    assert bench.vm.stats["nx_lpage_splits"] == 0
    assert not table_at(bench, 1, 0).nx_huge_page_disallowed


def test_recover_nx_flushes_before_it_yields(bench: MmuBench) -> None:
    split_for_nx(bench, 0, 0x200)
    bench.resched_at(0)
    run(kvm_recover_nx_huge_pages(bench.vm, 1))
    names = [event[0] for event in bench.events if event[0] != "spte_changed"]
    assert names == ["kvm_flush_remote_tlbs", "yield", "kvm_flush_remote_tlbs"]


# -- memslots


def test_flush_shadow_memslot_swaps_roots_of_an_ordinary_vm(bench: MmuBench) -> None:
    run(kvm_arch_flush_shadow_memslot(bench.vm, SLOT))
    assert bench.told("kvm_make_all_cpus_request")
    assert not bench.told("kvm_flush_remote_tlbs")
    assert bench.entries(direct(bench)) == []


def other_vms() -> list[MmuBench]:
    return [
        MmuBench(slot_zap_all=False),
        MmuBench(KVM_X86_SW_PROTECTED_VM),
        tdx_bench(),
    ]


@pytest.mark.parametrize("number", range(3), ids=["quirk off", "SW-protected", "TD"])
def test_flush_shadow_memslot_zaps_leaves_of_the_slot_elsewhere(number: int) -> None:
    bench = other_vms()[number]
    vcpu = bench.load()
    bench.map(vcpu, 1)
    bench.map(vcpu, 0x1000)
    run(kvm_arch_flush_shadow_memslot(bench.vm, SLOT))
    assert bench.changes() == [(1, 1)]
    assert bench.events[-1] == ("kvm_flush_remote_tlbs",)
    assert bench.leaves(bench.root(vcpu)) == [(1, 0x1000)]
    bench.events.clear()
    run(kvm_arch_flush_shadow_memslot(bench.vm, SLOT))
    assert bench.events == []
    assert not bench.vm.mmu_lock.written


def test_flush_shadow_memslot_zaps_private_and_shared_leaves_of_a_td(td: MmuBench) -> None:
    run(kvm_arch_flush_shadow_memslot(td.vm, SLOT))
    assert td.leaves(direct(td)) == []
    assert td.leaves(mirror(td)) == []
    assert td.told("kvm_flush_remote_tlbs") == [("kvm_flush_remote_tlbs",)]


def test_everything_comes_back_with_a_rewind(td: MmuBench) -> None:
    before = td.journal.digest()
    mark = td.journal.mark()
    invalidate(td, KVM_VALID_ROOTS)
    for vcpu in td.vm.vcpus:
        kvm_mmu_destroy(vcpu)
    run(kvm_mmu_uninit_tdp_mmu(td.vm))
    assert vcpu_of(td).mirror_root_hpa == INVALID_PAGE
    td.journal.rewind(mark)
    td.journal.release(mark)
    assert td.journal.digest() == before
    assert td.leaves(mirror(td)) == [(1, 1), (1, 0x200)]
