"""Dirty logging: what is taken from which leaves, and when logging starts and stops."""

from __future__ import annotations

import pytest
from logging_scene import LARGE_LEAF, LEAF, LoggingScene, slot_of

from tdxlab.kvm.dirty import (
    UPDATE_CPU_DIRTY_LOGGING,
    kvm_arch_mmu_enable_log_dirty_pt_masked,
    kvm_mmu_slot_apply_flags,
    kvm_tdp_mmu_clear_dirty_pt_masked,
    kvm_tdp_mmu_clear_dirty_slot,
    kvm_tdp_mmu_write_protect_gfn,
    kvm_tdp_mmu_wrprot_slot,
    tdp_mmu_need_write_protect,
)
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.role import GUEST_MODE
from tdxlab.kvm.slots import (
    KVM_MEM_READONLY,
    KVM_MR_CREATE,
    KVM_MR_DELETE,
    KVM_MR_FLAGS_ONLY,
    KVM_MR_MOVE,
)
from tdxlab.kvm.spte import DIRTY_MASK, MMU_WRITABLE_MASK, PT_WRITABLE_MASK
from tdxlab.steps import Operation, Schedule, run

CLEAN = LEAF & ~DIRTY_MASK
PROTECTED = LEAF & ~PT_WRITABLE_MASK
FLUSH = [("kvm_flush_remote_tlbs_range", 0, 0x400)]


@pytest.fixture
def scene() -> LoggingScene:
    """Small leaves at gfns 1 and 0x41, a large one at 0x200."""
    scene = LoggingScene()
    scene.touch(1, 0x41)
    scene.touch(0x200, level=2)
    return scene


def locked(scene: LoggingScene, operation: Operation, mode: str = WRITE) -> object:
    """What `operation` returns that wants mmu_lock held."""
    run(scene.vm.mmu_lock.lock(mode))
    result = run(operation)
    scene.vm.mmu_lock.unlock(mode)
    return result


def clear_masked(scene: LoggingScene, gfn: int, mask: int, wrprot: bool = False) -> None:
    locked(scene, kvm_tdp_mmu_clear_dirty_pt_masked(scene.vm, scene.slot, gfn, mask, wrprot))


# -- write protection of a slot


def test_wrprot_slot_takes_w_and_leaves_mmu_writable(scene: LoggingScene) -> None:
    vm = scene.vm
    assert locked(scene, kvm_tdp_mmu_wrprot_slot(vm, scene.slot, 1), READ) is True
    large = LARGE_LEAF & ~PT_WRITABLE_MASK
    assert scene.leaves() == {1: PROTECTED, 0x41: PROTECTED, 0x200: large}
    assert scene.changes()[0] == (1, 1, LEAF, PROTECTED)
    assert locked(scene, kvm_tdp_mmu_wrprot_slot(vm, scene.slot, 1), READ) is False
    assert scene.flushes() == []


def test_wrprot_slot_stays_above_the_least_level(scene: LoggingScene) -> None:
    assert locked(scene, kvm_tdp_mmu_wrprot_slot(scene.vm, scene.slot, 2), READ) is True
    assert [gfn for _, gfn, _, _ in scene.changes()] == [0x200]
    assert locked(scene, kvm_tdp_mmu_wrprot_slot(scene.vm, scene.slot, 3), READ) is False


def test_wrprot_slot_tries_again_if_the_cpu_set_a_bit_meanwhile(scene: LoggingScene) -> None:
    scene.set_spte(1, DIRTY_MASK)
    run(scene.vm.mmu_lock.lock(READ))
    schedule = Schedule([kvm_tdp_mmu_wrprot_slot(scene.vm, scene.slot._replace(npages=2), 1)])
    assert schedule.advance(0)
    scene.set_spte(1, DIRTY_MASK)
    while schedule.advance(0):
        pass
    assert schedule.results == {0: True}
    assert scene.changes() == [(1, 1, LEAF, PROTECTED)]


def test_wrprot_slot_yields_and_misses_nothing(scene: LoggingScene) -> None:
    scene.vm.need_resched = lambda: True
    locked(scene, kvm_tdp_mmu_wrprot_slot(scene.vm, scene.slot, 1), READ)
    assert scene.said("yield")
    assert [gfn for _, gfn, _, _ in scene.changes()] == [1, 0x41, 0x200]


# -- clearing dirty


def test_clear_dirty_slot_clears_d_of_every_leaf(scene: LoggingScene) -> None:
    locked(scene, kvm_tdp_mmu_clear_dirty_slot(scene.vm, scene.slot), READ)
    assert scene.leaves() == {1: CLEAN, 0x41: CLEAN, 0x200: LARGE_LEAF & ~DIRTY_MASK}
    scene.events.clear()
    locked(scene, kvm_tdp_mmu_clear_dirty_slot(scene.vm, scene.slot), READ)
    assert scene.events == []


def test_clear_dirty_slot_takes_w_without_ad_bits() -> None:
    scene = LoggingScene(params=MmuParams(ad_bits=False))
    scene.touch(1)
    before = scene.leaves()[1]
    locked(scene, kvm_tdp_mmu_clear_dirty_slot(scene.vm, scene.slot), READ)
    assert scene.leaves() == {1: before & ~PT_WRITABLE_MASK}


def test_need_write_protect_for_a_nested_root_with_a_cpu_log(scene: LoggingScene) -> None:
    root = scene.vm.sps[scene.vcpu.root_hpa]
    nested = root._replace(role=root.role | GUEST_MODE)
    assert not tdp_mmu_need_write_protect(scene.vm, nested)
    with_log = LoggingScene(dirty_log_size=512).vm
    assert tdp_mmu_need_write_protect(with_log, nested)
    assert not tdp_mmu_need_write_protect(with_log, root)


@pytest.mark.parametrize(("wrprot", "after"), [(False, CLEAN), (True, PROTECTED)])
def test_clear_dirty_pt_masked_touches_the_mask_only(
    scene: LoggingScene, wrprot: bool, after: int
) -> None:
    clear_masked(scene, 0, 1 << 1 | 1 << 9, wrprot)
    assert scene.leaves() == {1: after, 0x41: LEAF, 0x200: LARGE_LEAF}
    assert scene.changes() == [(1, 1, LEAF, after)]
    scene.events.clear()
    clear_masked(scene, 0x40, 2, wrprot)
    assert scene.changes() == [(1, 0x41, LEAF, after)]


def test_clear_dirty_pt_masked_takes_w_without_ad_bits() -> None:
    scene = LoggingScene(params=MmuParams(ad_bits=False))
    scene.touch(1)
    before = scene.leaves()[1]
    clear_masked(scene, 0, 2)
    assert scene.leaves() == {1: before & ~PT_WRITABLE_MASK}


def test_clear_dirty_pt_masked_leaves_large_leaves_alone(scene: LoggingScene) -> None:
    clear_masked(scene, 0x200, (1 << 64) - 1)
    assert scene.events == []


def test_clear_dirty_pt_masked_reports_what_the_entry_really_was(scene: LoggingScene) -> None:
    scene.set_spte(1, PT_WRITABLE_MASK)
    run(scene.vm.mmu_lock.lock(WRITE))
    doing = kvm_tdp_mmu_clear_dirty_pt_masked(scene.vm, scene.slot, 0, 2, False)
    assert next(doing) == ("clear SPTE bits", 1, 1, DIRTY_MASK)
    scene.set_spte(1, PT_WRITABLE_MASK)  # a fast page fault
    run(doing)
    assert scene.leaves()[1] == CLEAN
    assert scene.changes() == [(1, 1, LEAF, CLEAN)]


# -- write protection of a gfn


@pytest.mark.parametrize(("gfn", "at"), [(1, 1), (0x3FF, 0x200)])
def test_write_protect_gfn_takes_w_and_mmu_writable(scene: LoggingScene, gfn: int, at: int) -> None:
    before = scene.leaves()[at]
    protect = kvm_tdp_mmu_write_protect_gfn
    assert locked(scene, protect(scene.vm, scene.slot, gfn, 1)) is True
    assert scene.leaves()[at] == before & ~(PT_WRITABLE_MASK | MMU_WRITABLE_MASK)
    assert locked(scene, protect(scene.vm, scene.slot, gfn, 1)) is False
    assert len(scene.changes()) == 1


def test_write_protect_gfn_leaves_small_pages_for_a_greater_least_level(
    scene: LoggingScene,
) -> None:
    assert locked(scene, kvm_tdp_mmu_write_protect_gfn(scene.vm, scene.slot, 1, 2)) is False
    assert scene.events == []


# -- watching pages anew


def test_enable_log_takes_w_without_a_cpu_log(scene: LoggingScene) -> None:
    enable = kvm_arch_mmu_enable_log_dirty_pt_masked
    locked(scene, enable(scene.vm, scene.slot, 0x40, 3))
    assert scene.changes() == [(1, 0x41, LEAF, PROTECTED)]


def test_enable_log_clears_d_with_a_cpu_log() -> None:
    scene = LoggingScene(dirty_log_size=512)
    scene.touch(1)
    locked(scene, kvm_arch_mmu_enable_log_dirty_pt_masked(scene.vm, scene.slot, 0, 2))
    assert scene.changes() == [(1, 1, LEAF, CLEAN)]


def test_enable_log_splits_large_pages_of_a_log_that_began_full() -> None:
    scene = LoggingScene(manual_dirty_log_protect=3)
    scene.touch(0, 0x200, level=2)
    locked(scene, kvm_arch_mmu_enable_log_dirty_pt_masked(scene.vm, scene.slot, 0x200, 3))
    leaves = scene.leaves()
    assert leaves[0] == LARGE_LEAF
    assert [leaves[gfn] for gfn in (0x200, 0x201, 0x202)] == [PROTECTED, PROTECTED, LEAF]


@pytest.mark.parametrize(
    ("base", "mask", "protected"),
    [
        (0, 1 << 63, {0}),
        (2, 1 | 1 << 63, {0, 0x200}),
        (0x40, 1 | 1 << 63, {0x200}),
        (1, 1 | 1 << 62, {0}),
        (1, 1 | 1 << 63, {0}),  # gfn 0x200 is left out, as in Linux
    ],
)
def test_enable_log_write_protects_large_pages_without_eager_split(
    base: int, mask: int, protected: set[int]
) -> None:
    """The last word of the first large page, seen from slots that begin at different gfns."""
    scene = LoggingScene(params=MmuParams(eager_page_split=False), manual_dirty_log_protect=3)
    scene.touch(0, 0x200, level=2)
    slot = scene.slot._replace(base_gfn=base)
    locked(scene, kvm_arch_mmu_enable_log_dirty_pt_masked(scene.vm, slot, 0x1C0, mask))
    lost = {gfn for gfn, spte in scene.leaves().items() if not spte & MMU_WRITABLE_MASK}
    assert lost == protected


# -- logging starts and stops


def test_logging_starts_with_write_protection_and_one_flush(scene: LoggingScene) -> None:
    scene.log(True)
    leaves = scene.leaves()
    assert set(leaves.values()) == {PROTECTED}
    assert set(leaves) == {1, 0x41, *range(0x200, 0x400)}
    assert scene.flushes() == FLUSH
    assert scene.said("kvm_make_all_cpus_request") == []
    assert not scene.vm.mmu_lock.held(READ)


def test_logging_starts_without_split_if_it_is_not_eager() -> None:
    scene = LoggingScene(params=MmuParams(eager_page_split=False))
    scene.touch(0, level=2)
    scene.log(True)
    assert scene.leaves() == {0: LARGE_LEAF & ~PT_WRITABLE_MASK}


def test_logging_starts_with_clear_d_and_protects_large_pages_with_a_cpu_log() -> None:
    scene = LoggingScene(params=MmuParams(eager_page_split=False), dirty_log_size=512)
    scene.touch(1)
    scene.touch(0x200, level=2)
    scene.log(True)
    assert scene.leaves() == {1: CLEAN, 0x200: LARGE_LEAF & ~DIRTY_MASK & ~PT_WRITABLE_MASK}
    assert scene.flushes() == FLUSH
    assert scene.vcpu.check_request(UPDATE_CPU_DIRTY_LOGGING)


def test_logging_starts_with_nothing_if_the_log_begins_full() -> None:
    scene = LoggingScene(manual_dirty_log_protect=3)
    scene.touch(0, level=2)
    scene.log(True)
    assert scene.leaves() == {0: LARGE_LEAF}
    assert scene.events == []
    assert scene.vm.dirty.bits(scene.slot) == list(range(0x400))


def test_logging_stops_with_recovery_of_large_pages(scene: LoggingScene) -> None:
    scene.log(True)
    scene.user_memory.level = 2
    scene.events.clear()
    scene.log(False)
    assert scene.leaves() == dict.fromkeys((0, 0x200), LARGE_LEAF & ~PT_WRITABLE_MASK)
    assert scene.flushes() == FLUSH


def test_a_write_after_logging_started_is_logged_and_allowed_again(scene: LoggingScene) -> None:
    scene.log(True)
    scene.touch(1, 0x201)
    assert scene.vm.dirty.bits(scene.slot) == [1, 0x201]
    assert scene.leaves()[0x201] & PT_WRITABLE_MASK


def test_cpu_logging_is_switched_with_the_first_and_the_last_slot_only() -> None:
    scene = LoggingScene(dirty_log_size=512)
    vm, first, second = scene.vm, slot_of(5), slot_of(6)
    requests = []
    for old, new, change in (
        (None, first, KVM_MR_CREATE),
        (None, second, KVM_MR_CREATE),
        (first, first._replace(base_gfn=0x8000), KVM_MR_MOVE),
        (second, None, KVM_MR_DELETE),
        (first, None, KVM_MR_DELETE),
    ):
        scene.events.clear()
        run(kvm_mmu_slot_apply_flags(vm, old, new, change))
        requests.append(len(scene.events))
    assert requests == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("change", [KVM_MR_CREATE, KVM_MR_MOVE, KVM_MR_DELETE])
def test_apply_flags_touches_no_leaf_unless_only_flags_change(
    scene: LoggingScene, change: int
) -> None:
    old = scene.slot if change != KVM_MR_CREATE else None
    new = scene.slot._replace(flags=1) if change != KVM_MR_DELETE else None
    run(kvm_mmu_slot_apply_flags(scene.vm, old, new, change))
    assert scene.events == []


def test_apply_flags_touches_no_leaf_of_a_read_only_slot(scene: LoggingScene) -> None:
    new = scene.slot._replace(flags=1 | KVM_MEM_READONLY)
    run(kvm_mmu_slot_apply_flags(scene.vm, scene.slot, new, KVM_MR_FLAGS_ONLY))
    assert scene.events == []


def test_apply_flags_warns_if_nothing_was_toggled(scene: LoggingScene) -> None:
    run(kvm_mmu_slot_apply_flags(scene.vm, scene.slot, scene.slot, KVM_MR_FLAGS_ONLY))
    assert [event[0] for event in scene.events] == ["warn"]
