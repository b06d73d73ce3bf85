"""The shadow MMU step by step: what comes when, under which lock, and which requests are left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shadow_scene import RWU, Scene

from tdxlab.kvm.pae_pdpte import X86_CR0_PG
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.shadow import (
    guest_store,
    kvm_mmu_invalidate_addr,
    kvm_mmu_page_fault,
    kvm_mmu_zap_all_fast,
    kvm_unmap_gfn,
    zap_page,
)
from tdxlab.kvm.shadow_params import DESIGNS, REVIEWED, RFC, SPECIAL
from tdxlab.kvm.shadow_roots import (
    is_root_usable,
    kvm_mmu_free_obsolete_roots,
    kvm_mmu_free_roots,
    kvm_mmu_load,
    kvm_mmu_sync_roots,
)
from tdxlab.kvm.shadow_run import access, destroy_vcpu, set_cr3, store, vcpu_enter_guest
from tdxlab.kvm.shadow_vm import LOAD_MMU_PGD, MMU_SYNC, NO_ROOT, TLB_FLUSH, Root, ShadowVm
from tdxlab.steps import Operation, run

ALL = pytest.mark.parametrize("design", DESIGNS)

TOPUP, LOCK, LOAD = "mmu_topup_memory_caches", "write_lock(mmu_lock)", "load_mmu_pgd"
READY = "mmu_topup_pae_root_cache"
FIRST, OTHER = 0x10000, 0x11000


def guest(design: str, levels: int = 2) -> Scene:
    """A guest with two processes of two pages each."""
    scene = Scene(levels, design=design, cr3=FIRST)
    for number, top in enumerate((FIRST, OTHER)):
        scene.put(top, 0, 0x20000 + 0x1000 * number | RWU)
        scene.put(0x20000 + 0x1000 * number, 0, 0x50000 + 0x1000 * number | RWU)
        scene.put(0x20000 + 0x1000 * number, 2, 0x54000 | RWU)
    scene.turn_on()
    return scene


def labels(operation: Operation) -> list[str]:
    """Names of the steps of an operation, which is done afterwards."""
    return [str(step[0]) for step in operation]


@pytest.mark.parametrize(
    ("design", "levels", "steps"),
    [
        (SPECIAL, 2, [TOPUP, LOCK, *["store PDPTE"] * 4, LOCK, LOAD]),
        (SPECIAL, 0, [TOPUP, LOCK, *["store PDPTE"] * 4, LOAD]),
        (RFC, 2, [TOPUP, READY, LOCK, LOCK, LOAD]),
        (RFC, 0, [TOPUP, READY, LOCK, LOAD]),
    ],
)
def test_load_gets_pages_fills_the_root_syncs_and_loads_it(
    design: str, levels: int, steps: list[str]
) -> None:
    scene = guest(design, levels)
    vcpu, before = scene.vcpu, scene.vm.counts
    vcpu.make_request(LOAD_MMU_PGD)
    assert labels(kvm_mmu_load(vcpu)) == steps
    assert (vcpu.requests & {LOAD_MMU_PGD, MMU_SYNC}) == set()
    assert vcpu.root.pgd == (FIRST if levels else 0)
    assert scene.vm.counts["roots_built"] == before["roots_built"] + 1
    assert scene.vm.counts["tlb_flush_current"] == before["tlb_flush_current"] + 1


def test_enter_guest_loads_a_root_that_was_kept_and_enters() -> None:
    scene = guest(RFC)
    for cr3 in (FIRST, OTHER, FIRST):
        assert run(set_cr3(scene.vcpu, cr3)) == "fine"
        steps = labels(vcpu_enter_guest(scene.vcpu))
    assert steps == [LOCK, LOAD, "VM entry"]
    assert scene.vcpu.requests == set()
    assert scene.vcpu.in_guest
    assert scene.vm.counts["roots_reused"] == 1


def test_enter_guest_begins_again_for_a_request_that_came_meanwhile() -> None:
    scene = guest(RFC)
    entering = vcpu_enter_guest(scene.vcpu)
    while next(entering) != ("VM entry", 0):
        pass
    scene.vm.flush_remote_tlbs()
    flushes = scene.vm.counts["tlb_flush_current"]
    assert labels(entering) == ["VM entry"]
    assert scene.vm.counts["tlb_flush_current"] == flushes + 1
    assert scene.vcpu.requests == set()


def test_access_of_a_vcpu_inside_is_one_step() -> None:
    scene = guest(RFC)
    assert scene.access(0).exits == 1
    assert labels(access(scene.vcpu, 0)) == ["guest"]


# -- the lock


def used(design: str) -> Scene:
    """A guest that has used its page, and stored to its table of level 1 since."""
    scene = guest(design)
    assert scene.access(0, write=True).kind == "ok"
    assert scene.guest_put(0x20000, 0, 0x52000 | RWU) == "direct"
    return scene


def books(vm: ShadowVm) -> list[object]:
    """What mmu_lock protects, and an entry of the guest's."""
    tables = (vm.sps, vm.leaves, vm.rmap, vm.mmu_page_hash)
    return [vm.read_guest(0x20000, 4), *(dict(table.items()) for table in tables)]


UNDER_LOCK: dict[str, Callable[[Scene], Operation]] = {
    "page fault": lambda s: kvm_mmu_page_fault(s.vcpu, 0x2000, 4),
    "sync": lambda s: kvm_mmu_sync_roots(s.vcpu),
    "free roots": lambda s: kvm_mmu_free_roots(s.vcpu),
    "unmap": lambda s: kvm_unmap_gfn(s.vm, 0x50),
    "zap page": lambda s: zap_page(s.vm, next(iter(s.vm.sps))),
    "zap all": lambda s: kvm_mmu_zap_all_fast(s.vm),
    "guest store": lambda s: guest_store(s.vcpu, 0x20000, 0, 4),
    "emulated store": lambda s: guest_store(s.vcpu, FIRST, 0, 4),
    "INVLPG": lambda s: kvm_mmu_invalidate_addr(s.vcpu, 0),
}


@ALL
@pytest.mark.parametrize("name", UNDER_LOCK)
def test_nothing_changes_before_mmu_lock_is_held_and_it_is_free_at_the_end(
    design: str, name: str
) -> None:
    scene = used(design)
    operation, before = UNDER_LOCK[name](scene), books(scene.vm)
    while next(operation)[0] != LOCK:
        pass
    assert books(scene.vm) == before
    assert not scene.vm.mmu_lock.written
    assert all(scene.vm.mmu_lock.written for _ in operation)
    assert not scene.vm.mmu_lock.written
    assert books(scene.vm) != before


def test_an_emulated_store_through_the_guests_mapping_is_made_under_mmu_lock() -> None:
    scene = guest(RFC)
    scene.put(0x20000, 9, FIRST | RWU)
    assert run(store(scene.vcpu, 0x9000, scene.vm.read_guest(FIRST, 4) or 0, 4)).kind == "emulated"
    steps = labels(store(scene.vcpu, 0x9000, 0, 4))
    assert steps[-1] == LOCK
    assert steps.count(LOCK) == 2
    assert not scene.vm.mmu_lock.written


@pytest.mark.parametrize("levels", [0, 2])
def test_sync_roots_takes_no_lock_where_nothing_can_be_out_of_sync(levels: int) -> None:
    scene = Scene(levels, cr3=0x7000_0000)
    scene.turn_on()
    assert labels(kvm_mmu_sync_roots(scene.vcpu)) == []
    assert run(kvm_mmu_load(scene.vcpu)) == 0
    scene.vcpu.make_request(MMU_SYNC)
    assert labels(kvm_mmu_sync_roots(scene.vcpu)) == []
    assert MMU_SYNC not in scene.vcpu.requests


# -- roots that go, and roots that stay


@ALL
def test_free_roots_without_roots_takes_no_lock(design: str) -> None:
    scene = guest(design)
    assert labels(kvm_mmu_free_roots(scene.vcpu, previous=True)) == []
    assert labels(kvm_mmu_free_obsolete_roots(scene.vcpu)) == []


def test_free_roots_of_kept_roots_lets_the_present_one_stay() -> None:
    scene = two_roots()
    root = scene.vcpu.root
    run(kvm_mmu_free_roots(scene.vcpu, current=False, previous=True))
    assert scene.vcpu.root == root
    assert set(scene.vcpu.prev_roots) == {NO_ROOT}
    assert complaints(scene.vm) == []


def test_free_obsolete_roots_gives_up_what_was_zapped_and_nothing_else() -> None:
    for place in (0, 1):
        scene = two_roots()
        roots = [scene.vcpu.root, scene.vcpu.prev_roots[0]]
        run(zap_page(scene.vm, roots[place].hpa))
        run(kvm_mmu_free_obsolete_roots(scene.vcpu))
        roots[place] = NO_ROOT
        assert [scene.vcpu.root, scene.vcpu.prev_roots[0]] == roots
        assert complaints(scene.vm) == []


def test_set_cr3_finds_a_kept_root_when_there_is_no_present_one() -> None:
    scene = two_roots()
    kept = scene.vcpu.prev_roots[0]
    run(kvm_mmu_free_roots(scene.vcpu))
    before = scene.vm.counts
    assert run(set_cr3(scene.vcpu, FIRST)) == "fine"
    assert scene.vcpu.root == kept
    assert set(scene.vcpu.prev_roots) == {NO_ROOT}
    assert scene.vm.counts["roots_reused"] == before["roots_reused"] + 1
    assert scene.vcpu.requests == {LOAD_MMU_PGD, MMU_SYNC, TLB_FLUSH}


def test_set_cr3_without_a_root_that_fits_asks_for_none_to_be_loaded() -> None:
    scene = guest(REVIEWED)
    assert run(set_cr3(scene.vcpu, OTHER)) == "fine"
    assert scene.vcpu.requests == {MMU_SYNC, TLB_FLUSH}
    assert scene.vm.counts["roots_reused"] == 0


@pytest.mark.parametrize("pdptes_in_key", [True, False])
def test_set_cr3_finds_the_kept_root_of_a_pae_guest_whose_pdptes_are_the_same(
    pdptes_in_key: bool,
) -> None:
    scene = Scene(3, cr3=FIRST, design=REVIEWED, pdptes_in_key=pdptes_in_key)
    for top in (FIRST, OTHER):
        scene.put(top, 1, 0x20001)
    scene.turn_on()
    for cr3 in (FIRST, OTHER, FIRST):
        assert run(set_cr3(scene.vcpu, cr3)) == "fine"
        scene.access(0)
    assert scene.vm.counts["roots_reused"] == 1
    assert scene.vm.counts["roots_built"] == 2


def test_set_cr3_keeps_a_direct_root_whatever_cr3_says() -> None:
    scene = Scene(0, design=RFC)
    scene.access(0x5000)
    root = scene.vcpu.root
    assert run(set_cr3(scene.vcpu, OTHER)) == "fine"
    assert scene.vcpu.root == root
    assert scene.vm.counts["roots_reused"] == 1


def test_is_root_usable_asks_for_page_role_and_cr3() -> None:
    scene = two_roots()
    vcpu, kept = scene.vcpu, scene.vcpu.prev_roots[0]
    assert is_root_usable(vcpu, vcpu.root)
    assert not is_root_usable(vcpu, kept)
    assert is_root_usable(vcpu, kept._replace(pgd=OTHER))
    assert not is_root_usable(vcpu, Root(0x1234_5000, OTHER))
    vcpu.cr0 ^= X86_CR0_PG
    assert not is_root_usable(vcpu, vcpu.root)


def test_set_cr3_gives_no_kept_root_up_when_there_is_no_present_one() -> None:
    scene = two_roots()
    for cr3 in (0x12000, 0x13000):
        assert run(set_cr3(scene.vcpu, cr3)) == "fine"
        scene.access(0)
    kept = scene.vcpu.prev_roots
    assert NO_ROOT not in kept
    run(kvm_mmu_free_roots(scene.vcpu))
    assert run(set_cr3(scene.vcpu, 0x14000)) == "fine"
    assert scene.vcpu.prev_roots == kept
    assert scene.vcpu.root == NO_ROOT
    assert run(set_cr3(scene.vcpu, OTHER)) == "fine"
    assert scene.vcpu.root == kept[1]
    assert scene.vcpu.prev_roots == (kept[0], kept[2], NO_ROOT)


def two_roots() -> Scene:
    """A guest whose first process has a root that is kept while the other one runs."""
    scene = guest(RFC)
    scene.access(0)
    assert run(set_cr3(scene.vcpu, OTHER)) == "fine"
    scene.access(0)
    return scene


@ALL
def test_destroy_vcpu_takes_it_out_of_the_guest(design: str) -> None:
    scene = guest(design)
    scene.access(0)
    assert scene.vcpu.in_guest
    exits = scene.vm.counts["vm_exits"]
    run(destroy_vcpu(scene.vcpu))
    assert not scene.vcpu.in_guest
    assert scene.vm.counts["vm_exits"] == exits + 1


@ALL
@pytest.mark.parametrize("cr3", [FIRST, OTHER])
def test_set_cr3_takes_the_vcpu_out_and_asks_for_a_sync_and_a_flush(design: str, cr3: int) -> None:
    scene = guest(design)
    scene.access(0)
    assert run(set_cr3(scene.vcpu, cr3)) == "fine"
    assert not scene.vcpu.in_guest
    assert scene.vcpu.requests >= {MMU_SYNC, TLB_FLUSH}
