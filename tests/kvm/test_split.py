"""Splitting large pages, and putting them together again."""

from __future__ import annotations

import pytest
from logging_scene import LARGE_LEAF, LEAF, LoggingScene

from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.role import Role
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.kvm.split import (
    kvm_mmu_recover_huge_pages,
    kvm_mmu_slot_try_split_huge_pages,
    kvm_tdp_mmu_try_split_huge_pages,
)
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE
from tdxlab.steps import WAIT, Schedule, run

TABLE = 0x8000_0000_0000_0907
SIZE_1G = 1 << 18


@pytest.fixture
def scene() -> LoggingScene:
    """Two large leaves of 2 MiB: gfns 0 and 0x200."""
    scene = LoggingScene()
    scene.touch(0, 0x200, level=2)
    assert scene.leaves() == {0: LARGE_LEAF, 0x200: LARGE_LEAF}
    return scene


def split(scene: LoggingScene, start: int, end: int, target: int = 1, shared: bool = True) -> None:
    lock, mode = scene.vm.mmu_lock, READ if shared else WRITE
    run(lock.lock(mode))
    run(kvm_tdp_mmu_try_split_huge_pages(scene.vm, scene.slot, start, end, target, shared))
    lock.unlock(mode)


def recover(scene: LoggingScene) -> None:
    run(kvm_mmu_recover_huge_pages(scene.vm, scene.slot))


# -- splitting


@pytest.mark.parametrize("shared", [True, False])
def test_split_replaces_a_large_leaf_by_512_small_ones(scene: LoggingScene, shared: bool) -> None:
    old_pfn = scene.spte(0)[1] >> 12 & 0xFFFFFFFFFF
    split(scene, 0, 0x200, shared=shared)
    leaves = scene.leaves()
    assert leaves == dict.fromkeys(range(0x200), LEAF) | {0x200: LARGE_LEAF}
    level, spte = scene.spte(0x1FF << 12)
    assert (level, spte >> 12 & 0xFFFFFFFFFF) == (1, old_pfn + 0x1FF)


def test_split_tells_of_the_large_leaf_alone_and_flushes_nothing(scene: LoggingScene) -> None:
    split(scene, 0, 0x200)
    assert scene.changes() == [(2, 0, LARGE_LEAF, TABLE)]
    assert scene.flushes() == []


def test_split_counts_512_small_pages_for_a_large_one(scene: LoggingScene) -> None:
    before = scene.vm.stats
    split(scene, 0, 0x200)
    after = scene.vm.stats
    assert after["pages_4k"] - before["pages_4k"] == 512
    assert after["pages_2m"] - before["pages_2m"] == -1
    assert after["pages_1g"] == before["pages_1g"]
    assert after["pt_pages"] - before["pt_pages"] == 1


def test_split_gives_the_new_table_its_role_and_place(scene: LoggingScene) -> None:
    split(scene, 0x200, 0x201)
    words = scene.vm.memory.words
    table = next(sp for sp in scene.vm.sps.values() if sp.level == 1 and sp.gfn == 0x200)
    assert table.role == Role(scene.vcpu.root_role).with_(level=1)
    assert words.view[table.ptep] & 0xFFFFFFFFFF000 == table.spt


def test_split_stops_at_the_target_level() -> None:
    scene = LoggingScene(npages=SIZE_1G)
    scene.touch(0, level=3)
    split(scene, 0, SIZE_1G, target=2)
    assert scene.leaves() == dict.fromkeys(range(0, SIZE_1G, 0x200), LARGE_LEAF)
    assert scene.vm.stats["pages_2m"] == 512


def test_split_leaves_what_is_outside_of_the_range(scene: LoggingScene) -> None:
    split(scene, 0x200, 0x400)
    assert scene.leaves()[0] == LARGE_LEAF


def test_split_keeps_the_page_for_the_next_leaf_only_if_there_is_one(scene: LoggingScene) -> None:
    in_use = scene.pages.free
    split(scene, 0, 0x400)
    assert in_use - scene.pages.free == 2
    split(scene, 0, 0x400)
    assert in_use - scene.pages.free == 2


def test_split_lets_go_of_mmu_lock_while_it_allocates(scene: LoggingScene) -> None:
    vm = scene.vm
    run(vm.mmu_lock.lock(WRITE))
    doing = kvm_tdp_mmu_try_split_huge_pages(vm, scene.slot, 0, 0x200, 1, False)
    assert next(doing) == ("alloc_page", "page table")
    assert not vm.mmu_lock.held(READ)
    run(vm.mmu_lock.lock(READ))
    assert next(doing) == ("write_lock(mmu_lock)",)
    assert next(doing) == (WAIT, "mmu_lock", WRITE)
    vm.mmu_lock.unlock(READ)
    run(doing)
    assert vm.mmu_lock.written


def test_split_frees_its_page_if_the_leaf_vanished_meanwhile(scene: LoggingScene) -> None:
    vm = scene.vm
    free = scene.pages.free
    run(vm.mmu_lock.lock(READ))
    doing = kvm_tdp_mmu_try_split_huge_pages(vm, scene.slot, 0, 0x200, 1, True)
    labels = []
    for step in doing:
        labels.append(step[0])
        if step[0] == "cmpxchg SPTE":
            scene.set_spte(0, scene.spte(0)[1] ^ SHADOW_NONPRESENT_VALUE)
    assert labels.count("cmpxchg SPTE") == 1
    assert scene.leaves() == {0x200: LARGE_LEAF}
    assert scene.pages.free == free
    assert all(sp.level > 1 for sp in vm.sps.values())


def test_split_tries_again_if_the_leaf_changed_meanwhile(scene: LoggingScene) -> None:
    vm = scene.vm
    run(vm.mmu_lock.lock(READ))
    doing = kvm_tdp_mmu_try_split_huge_pages(vm, scene.slot, 0, 0x200, 1, True)
    tries = 0
    for step in doing:
        if step[0] == "cmpxchg SPTE":
            tries += 1
            if tries == 1:
                scene.set_spte(0, 0x200)  # the dirty bit goes
    assert tries == 2
    assert scene.leaves()[0] == LEAF & ~0x200


def test_split_gives_up_without_memory_and_keeps_what_it_has_done() -> None:
    scene = LoggingScene()
    scene.touch(0, 0x200, level=2)
    while scene.pages.free > 1:
        scene.pages.alloc_page("somebody else's")
    split(scene, 0, 0x400)
    assert scene.leaves() == dict.fromkeys(range(0x200), LEAF) | {0x200: LARGE_LEAF}
    root = scene.vcpu.root_hpa
    assert scene.vm.root_count[root] == 2


def test_split_yields_to_a_waiter_and_goes_on_where_it_was(scene: LoggingScene) -> None:
    scene.vm.need_resched = lambda: True
    split(scene, 0, 0x400)
    assert scene.leaves() == dict.fromkeys(range(0x400), LEAF)
    assert scene.said("yield") == [("yield", "read")]


def test_split_gives_execution_back_to_small_pages_under_the_nx_workaround() -> None:
    scene = LoggingScene(params=MmuParams(nx_huge_pages=True))
    scene.touch(0, level=2)
    assert not scene.leaves()[0] & 4
    split(scene, 0, 0x200)
    assert set(scene.leaves().values()) == {LEAF}


def test_slot_split_covers_the_whole_slot_and_lets_go_of_the_lock(scene: LoggingScene) -> None:
    run(kvm_mmu_slot_try_split_huge_pages(scene.vm, scene.slot, 1))
    assert scene.leaves() == dict.fromkeys(range(0x400), LEAF)
    assert not scene.vm.mmu_lock.held(READ)


# -- putting together


def test_recover_replaces_a_table_by_a_large_leaf(scene: LoggingScene) -> None:
    large = scene.spte(0)
    split(scene, 0, 0x400)
    scene.user_memory.level = 2
    scene.events.clear()
    recover(scene)
    assert scene.leaves() == {0: LARGE_LEAF, 0x200: LARGE_LEAF}
    assert scene.spte(0) == large
    assert scene.flushes() == [("kvm_flush_remote_tlbs_range", 0, 0x400)]
    assert scene.vm.stats["pages_4k"] == 0
    assert scene.vm.rcu_pending == 2
    assert not scene.vm.mmu_lock.held(READ)


def test_recover_looks_at_the_first_leaf_only() -> None:
    scene = LoggingScene()
    scene.touch(5, 7)
    scene.set_spte(7, 2)
    scene.user_memory.level = 2
    recover(scene)
    assert scene.leaves() == {0: LARGE_LEAF}
    assert scene.spte(0)[1] & 0xFFFFFFFFFF000 == 0x200000 << 12


def test_recover_leaves_a_table_without_leaves(scene: LoggingScene) -> None:
    split(scene, 0, 0x200)
    for gfn in range(0x200):
        scene.set_spte(gfn, scene.spte(gfn << 12)[1] ^ SHADOW_NONPRESENT_VALUE)
    scene.events.clear()
    recover(scene)
    assert scene.events == []


def test_recover_leaves_what_the_host_maps_small(scene: LoggingScene) -> None:
    split(scene, 0, 0x400)
    scene.user_memory.level = 1
    scene.events.clear()
    recover(scene)
    assert scene.events == []


def test_recover_leaves_a_table_that_reaches_out_of_the_slot() -> None:
    scene = LoggingScene(npages=0x300)
    scene.touch(0, 0x200)
    scene.user_memory.level = 2
    recover(scene)
    assert scene.leaves() == {0: LARGE_LEAF, 0x200: LEAF}


def test_recover_warns_and_does_nothing_while_writes_are_logged(scene: LoggingScene) -> None:
    split(scene, 0, 0x400)
    scene.events.clear()
    scene.slot = scene.slot._replace(flags=KVM_MEM_LOG_DIRTY_PAGES)
    recover(scene)
    assert [event[0] for event in scene.events] == ["warn"]


def test_recover_flushes_before_it_yields_and_not_again(scene: LoggingScene) -> None:
    split(scene, 0, 0x400)
    scene.user_memory.level = 2
    scene.events.clear()
    #: checked at both upper levels, at gfn 0, below it, and at gfn 0x200
    wanted = iter((False, False, False, False, True))
    scene.vm.need_resched = lambda: next(wanted, False)
    recover(scene)
    names = [event[0] for event in scene.events if event[0] != "spte_changed"]
    assert names == ["kvm_flush_remote_tlbs", "yield", "kvm_flush_remote_tlbs_range"]
    assert scene.leaves() == {0: LARGE_LEAF, 0x200: LARGE_LEAF}


def test_recover_lets_go_of_the_lock_before_it_replaces_a_table(scene: LoggingScene) -> None:
    split(scene, 0, 0x400)
    scene.user_memory.level = 2
    scene.events.clear()
    #: the last one: below gfn 0x200, where only the table's entry may be left
    wanted = iter((False, False, False, False, False, True, True))
    scene.vm.need_resched = lambda: next(wanted, False)
    recover(scene)
    assert [event[0] for event in scene.events if event[0] != "spte_changed"] == [
        "kvm_flush_remote_tlbs",
        "yield",
        "kvm_flush_remote_tlbs_range",
    ]
    assert scene.leaves() == {0: LARGE_LEAF, 0x200: LARGE_LEAF}


def test_recover_tries_again_if_somebody_changed_the_link(scene: LoggingScene) -> None:
    split(scene, 0, 0x200)
    scene.user_memory.level = 2
    schedule = Schedule([kvm_mmu_recover_huge_pages(scene.vm, scene.slot)])
    tries = 0
    while schedule.advance(0):
        if schedule.labels[0][0] == "cmpxchg SPTE":
            tries += 1
            if tries == 1:
                word = next(sp.ptep for sp in scene.vm.sps.values() if sp.level == 1)
                words = scene.vm.memory.words
                words.put(word, words.view[word] ^ 0x100)
    assert tries == 2
    assert scene.leaves()[0] == LARGE_LEAF
