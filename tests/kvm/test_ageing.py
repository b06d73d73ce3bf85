"""Ageing: what counts as young, what looking changes, and that nobody is kept out meanwhile."""

from __future__ import annotations

import pytest
from logging_scene import LARGE_LEAF, LEAF, LoggingScene

from tdxlab.kvm.ageing import kvm_tdp_mmu_age_gfn_range, kvm_tdp_mmu_test_age_gfn
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.params import KVM_X86_TDX_VM, MmuParams
from tdxlab.kvm.spte import ACCESSED_MASK, SHADOW_NONPRESENT_VALUE, is_access_track_spte
from tdxlab.kvm.zap import KVM_FILTER_PRIVATE, KVM_FILTER_SHARED, GfnRange
from tdxlab.steps import Schedule, run

OLD = LEAF & ~ACCESSED_MASK


@pytest.fixture
def scene() -> LoggingScene:
    """gfns 1 and 2 are mapped and young."""
    scene = LoggingScene()
    scene.touch(1, 2)
    return scene


def a_range(
    scene: LoggingScene, start: int, end: int, attr_filter: int = KVM_FILTER_SHARED
) -> GfnRange:
    return GfnRange(scene.slot, start, end, attr_filter, True, True)


def age(scene: LoggingScene, start: int, end: int) -> object:
    return run(kvm_tdp_mmu_age_gfn_range(scene.vm, a_range(scene, start, end)))


def is_young(scene: LoggingScene, start: int, end: int) -> object:
    return run(kvm_tdp_mmu_test_age_gfn(scene.vm, a_range(scene, start, end)))


def test_age_clears_accessed_of_every_leaf_in_the_range(scene: LoggingScene) -> None:
    assert age(scene, 0, 2) is True
    assert scene.leaves() == {1: OLD, 2: LEAF}
    assert age(scene, 0, 0x400) is True
    assert scene.leaves() == {1: OLD, 2: OLD}
    assert age(scene, 0, 0x400) is False


def test_age_tells_of_each_change_and_flushes_nothing(scene: LoggingScene) -> None:
    age(scene, 0, 0x400)
    assert scene.changes() == [(1, 1, LEAF, OLD), (1, 2, LEAF, OLD)]
    assert scene.flushes() == []


def test_age_takes_a_large_leaf_for_one_of_its_gfns() -> None:
    scene = LoggingScene()
    scene.touch(0, level=2)
    assert age(scene, 0x1FF, 0x200) is True
    assert scene.leaves() == {0: LARGE_LEAF & ~ACCESSED_MASK}


def test_test_age_answers_and_changes_nothing(scene: LoggingScene) -> None:
    assert is_young(scene, 0, 0x400) is True
    assert is_young(scene, 3, 0x400) is False
    assert scene.leaves() == {1: LEAF, 2: LEAF}
    assert scene.events == []


def test_test_age_finds_the_cpus_access_again(scene: LoggingScene) -> None:
    age(scene, 0, 0x400)
    assert is_young(scene, 0, 0x400) is False
    scene.set_spte(2, ACCESSED_MASK)
    assert is_young(scene, 0, 2) is False
    assert is_young(scene, 2, 3) is True


def test_age_takes_permissions_away_without_ad_bits() -> None:
    scene = LoggingScene(params=MmuParams(ad_bits=False))
    scene.touch(1)
    young = scene.leaves()[1]
    assert is_young(scene, 0, 0x400) is True
    assert age(scene, 0, 0x400) is True
    old = scene.leaves()[1]
    assert is_access_track_spte(old)
    assert not old & 7
    assert scene.changes() == [(1, 1, young, old)]
    assert is_young(scene, 0, 0x400) is False
    assert age(scene, 0, 0x400) is False


def test_age_gives_permissions_back_at_the_next_fault_without_ad_bits() -> None:
    scene = LoggingScene(params=MmuParams(ad_bits=False))
    scene.touch(1)
    young = scene.leaves()[1]
    age(scene, 0, 0x400)
    scene.touch(1)
    assert scene.leaves()[1] & 7 == young & 7
    assert is_young(scene, 0, 0x400) is True


def test_age_of_shared_memory_leaves_the_mirror_alone() -> None:
    scene = LoggingScene(vm_type=KVM_X86_TDX_VM)
    scene.touch(1)
    assert run(kvm_tdp_mmu_age_gfn_range(scene.vm, a_range(scene, 0, 9, KVM_FILTER_PRIVATE))) is (
        False
    )
    assert age(scene, 0, 9) is True
    assert [gfn for _, gfn, _, _ in scene.changes()] == [1]
    assert scene.hooks.calls == []


def test_age_needs_no_mmu_lock(scene: LoggingScene) -> None:
    run(scene.vm.mmu_lock.lock(WRITE))
    assert age(scene, 0, 0x400) is True
    assert scene.vm.mmu_lock.written


def test_age_keeps_what_the_entry_became_before_the_clearing(scene: LoggingScene) -> None:
    schedule = Schedule([kvm_tdp_mmu_age_gfn_range(scene.vm, a_range(scene, 0, 2))])
    schedule.advance(0)
    assert schedule.labels[0] == ("clear SPTE bits", 1, 1, ACCESSED_MASK)
    scene.set_spte(1, scene.spte(1 << 12)[1] ^ SHADOW_NONPRESENT_VALUE)
    schedule.advance(0)
    assert schedule.results == {0: True}
    assert scene.spte(1 << 12) == (1, SHADOW_NONPRESENT_VALUE)


def test_age_loses_the_race_without_ad_bits_and_the_page_stays_young() -> None:
    scene = LoggingScene(params=MmuParams(ad_bits=False))
    scene.touch(1)
    schedule = Schedule([kvm_tdp_mmu_age_gfn_range(scene.vm, a_range(scene, 0, 2))])
    schedule.advance(0)
    scene.set_spte(1, 2)  # somebody write-protects it
    protected = scene.leaves()[1]
    schedule.advance(0)
    assert schedule.results == {0: True}
    assert scene.leaves() == {1: protected}
    assert scene.changes() == []
