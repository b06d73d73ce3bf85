"""What a fault, a store and the host's zaps do to shadow pages on the way, and what is counted."""

from __future__ import annotations

import pytest
from shadow_scene import RWU, Scene

from tdxlab.kvm.pae_cpu import GP
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.page_fault import RET_PF_FIXED, RET_PF_RETRY
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.shadow import (
    guest_store,
    kvm_mmu_invalidate_addr,
    kvm_mmu_page_fault,
    kvm_mmu_zap_all_fast,
    kvm_unmap_gfn,
    shadow_leaf,
    zap_page,
)
from tdxlab.kvm.shadow_pages import free_page_cache, is_obsolete_sp, shadowing
from tdxlab.kvm.shadow_params import AMD, DESIGNS, NESTED, RFC, SPECIAL
from tdxlab.kvm.shadow_run import EMULATED, GUEST_FAULT, NO_MEMORY, OK, set_cr3, store
from tdxlab.steps import run

ALL = pytest.mark.parametrize("design", DESIGNS)
DIRECTORY, TABLE, LARGE = 0x2000, 0x3000, 0x80


def mapped(design: str = RFC) -> Scene:
    """A guest whose addresses 0x3000 and 0x4000 are mapped, and whose first GiB it has used."""
    scene = Scene(2, cr3=DIRECTORY, design=design)
    scene.put(DIRECTORY, 0, TABLE | RWU)
    for entry in (3, 4):
        scene.put(TABLE, entry, 0x5000 | RWU)
    scene.turn_on()
    return scene


def rise(scene: Scene, before: dict[str, int], *names: str) -> list[int]:
    """How much some counts have risen."""
    return [scene.vm.counts[name] - before[name] for name in names]


# -- faults


@ALL
def test_page_fault_walks_links_tables_and_sets_the_leaf(design: str) -> None:
    scene = mapped(design)
    assert scene.access(1 << 22).kind == GUEST_FAULT
    before = scene.vm.counts
    labels = [step[0] for step in kvm_mmu_page_fault(scene.vcpu, 0x3000, 4)]
    links = [] if design == SPECIAL else ["store PDPTE"]
    ready = ["mmu_topup_memory_caches", "walk_addr", "write_lock(mmu_lock)"]
    assert labels == [*ready, *links, "set SPTE"]
    assert rise(scene, before, "slots_stored", "pf_taken", "pf_fixed", "pf_guest") == [
        len(links),
        1,
        1,
        0,
    ]


def test_page_fault_that_is_the_guests_own_is_counted_as_such() -> None:
    scene = mapped()
    before = scene.vm.counts
    assert scene.access(0x9000).kind == GUEST_FAULT
    assert rise(scene, before, "pf_taken", "pf_fixed", "pf_guest") == [1, 0, 1]


def test_fetch_takes_a_leaf_of_another_gfn_away_before_it_sets_the_new_one() -> None:
    scene = mapped()
    scene.access(0x3000)
    leaf = shadow_leaf(scene.vcpu, 0x3000)
    assert scene.guest_put(TABLE, 3, 0x6000 | RWU) == "direct"
    faulting = kvm_mmu_page_fault(scene.vcpu, 0x3000, 4)
    while next(faulting)[0] != "set SPTE":
        pass
    assert not scene.vm.is_present(scene.vm.read(leaf))
    assert leaf not in scene.vm.leaves
    assert run(faulting) == RET_PF_FIXED
    assert scene.vm.leaves[leaf][0] == 6


def test_fetch_below_an_empty_slot_begins_again() -> None:
    """L1 has given its PDPTE since the slots were filled, and did not tell KVM."""
    scene = Scene(3, cr3=0x9000, vendor=AMD, use=NESTED)
    scene.turn_on()
    assert scene.access(0).kind == GUEST_FAULT
    scene.put(0x9000, 0, DIRECTORY | 1)
    scene.put(DIRECTORY, 0, TABLE | RWU)
    scene.put(TABLE, 3, 0x5000 | RWU)
    assert run(kvm_mmu_page_fault(scene.vcpu, 0x3000, 4)) == RET_PF_RETRY


@ALL
def test_shadow_leaf_is_0_where_tables_do_not_lead(design: str) -> None:
    scene = mapped(design)
    assert shadow_leaf(scene.vcpu, 0x3000) == 0
    scene.access(0x3000)
    assert shadow_leaf(scene.vcpu, 0x3000)
    assert shadow_leaf(scene.vcpu, 0x40_3000) == 0
    run(zap_page(scene.vm, shadowing(scene.vm, TABLE >> 12)[0].spt))
    assert shadow_leaf(scene.vcpu, 0x3000) == 0


def test_shadow_leaf_is_0_before_a_nested_guest_has_a_root() -> None:
    assert shadow_leaf(Scene(2, vendor=AMD, use=NESTED).vcpu, 0x3000) == 0


def test_fetch_of_a_leaf_that_becomes_writable_flushes_nothing() -> None:
    scene = mapped()
    scene.access(0x3000)
    before = scene.vm.counts
    assert scene.access(0x3000, write=True).kind == OK
    assert rise(scene, before, "remote_tlb_flush", "pf_fixed") == [0, 1]


def test_fetch_keeps_tables_that_are_linked_whatever_each_page_allows() -> None:
    scene = mapped()
    scene.put(TABLE, 5, 0x6005)
    scene.access(0x3000, write=True)
    before = scene.vm.counts
    for va in (0x4000, 0x5000):
        assert scene.access(va).kind == OK
    assert rise(scene, before, "sp_created", "remote_tlb_flush", "pf_fixed") == [0, 0, 2]


def test_fetch_keeps_the_table_of_a_large_page_whose_access_is_the_same() -> None:
    scene = mapped()
    scene.put(DIRECTORY, 1, LARGE | RWU | 0x60)
    scene.access(0x40_0000)
    before = scene.vm.counts
    assert scene.access(0x40_1000, write=True).kind == OK
    assert rise(scene, before, "sp_created", "remote_tlb_flush", "pf_fixed") == [0, 0, 1]


# -- stores


def test_guest_store_takes_the_vcpu_out_only_if_kvm_has_to_make_it() -> None:
    scene = mapped()
    scene.access(0x3000)
    before = scene.vm.counts
    assert run(guest_store(scene.vcpu, TABLE + 0x100, 0, 4)) == "direct"
    assert scene.vcpu.in_guest
    assert run(guest_store(scene.vcpu, DIRECTORY + 0x100, 0, 4)) == "emulated"
    assert not scene.vcpu.in_guest
    assert rise(scene, before, "write_tracked", "vm_exits") == [1, 1]


def test_guest_store_of_part_of_an_entry_frees_the_pages_after_one_flush() -> None:
    scene = mapped()
    scene.access(0x3000)
    pages = {sp.spt for sp in shadowing(scene.vm, DIRECTORY >> 12)}
    before = scene.vm.counts
    assert run(guest_store(scene.vcpu, DIRECTORY + 1, 0x30, 1)) == "emulated"
    assert not pages & set(scene.vm.sps)
    assert not pages & set(scene.vm.pages.in_use)
    assert rise(scene, before, "remote_tlb_flush") == [1]
    assert complaints(scene.vm) == []


def pae_guest() -> Scene:
    """A PAE guest that has used the first page of two entries of its directory."""
    scene = Scene(3, cr3=0x9000, design=RFC)
    scene.put(0x9000, 0, DIRECTORY | 1)
    for entry in (5, 6):
        scene.put(DIRECTORY, entry, TABLE | RWU)
    scene.put(TABLE, 0, 0x5000 | RWU)
    scene.turn_on()
    for entry in (5, 6):
        assert scene.access(entry << 21).kind == OK
    return scene


@pytest.mark.parametrize(("offset", "size"), [(0, 8), (0, 4), (4, 4)])
def test_guest_store_into_one_entry_of_8_bytes_takes_that_one_away(offset: int, size: int) -> None:
    scene = pae_guest()
    before = scene.vm.counts
    assert run(guest_store(scene.vcpu, DIRECTORY + 5 * 8 + offset, 0, size)) == "emulated"
    assert rise(scene, before, "sp_zapped", "remote_tlb_flush") == [0, 1]
    assert [bool(shadow_leaf(scene.vcpu, entry << 21)) for entry in (5, 6)] == [False, True]


@pytest.mark.parametrize(("offset", "size"), [(6, 4), (0, 2)])
def test_guest_store_across_entries_of_8_bytes_takes_the_page_away(offset: int, size: int) -> None:
    scene = pae_guest()
    assert run(guest_store(scene.vcpu, DIRECTORY + 5 * 8 + offset, 0, size)) == "emulated"
    assert [bool(shadow_leaf(scene.vcpu, entry << 21)) for entry in (5, 6)] == [False, False]


def test_invalidate_addr_of_what_is_not_mapped_does_nothing() -> None:
    scene = mapped()
    before = scene.vm.counts
    run(kvm_mmu_invalidate_addr(scene.vcpu, 0x3000))
    scene.access(0x3000)
    run(kvm_mmu_invalidate_addr(scene.vcpu, 0x40_3000))
    run(kvm_mmu_invalidate_addr(scene.vcpu, 0x3000))
    assert scene.guest_put(TABLE, 9, 0x7000 | RWU) == "direct"
    run(kvm_mmu_invalidate_addr(scene.vcpu, 0x9000))
    assert rise(scene, before, "synced", "remote_tlb_flush") == [0, 0]


@pytest.mark.parametrize(("entry", "kind"), [(0x5000, OK), (DIRECTORY, EMULATED)])
def test_store_changes_the_guests_memory_whoever_makes_it(entry: int, kind: str) -> None:
    scene = mapped()
    scene.put(TABLE, 3, entry | RWU)
    assert run(store(scene.vcpu, 0x3100, 0x1234, 4)).kind == kind
    assert scene.vm.read_guest(entry + 0x100, 4) == 0x1234
    assert not scene.vm.mmu_lock.written


def test_store_that_faults_changes_nothing_and_one_that_hits_needs_no_kvm() -> None:
    scene = mapped()
    assert run(store(scene.vcpu, 0x9000, 0x1234, 4)).kind == GUEST_FAULT
    scene.access(0x3000, write=True)
    before = scene.vm.counts
    assert run(store(scene.vcpu, 0x3000, 0x1234, 4)) == (OK, scene.vm.map.guest.base + 0x5000, 0, 0)
    assert rise(scene, before, "write_tracked", "pf_taken") == [0, 0]


def test_access_without_memory_for_tables_is_told_so() -> None:
    scene = mapped()
    scene.access(0x3000)
    while scene.vm.pages.alloc_page("somebody else's") != NO_PAGE:
        pass
    free_page_cache(scene.vcpu)
    while scene.vm.pages.alloc_page("somebody else's") != NO_PAGE:
        pass
    assert scene.access(0x4000).kind == NO_MEMORY
    assert scene.access(0x3000).kind == OK


def test_set_cr3_to_pdptes_without_memory_is_gp() -> None:
    scene = Scene(3, cr3=0x9020)
    scene.turn_on()
    assert run(set_cr3(scene.vcpu, 0x7000_0000)) == GP
    assert scene.vcpu.cr3 == 0x9020


def test_l1s_pdptes_are_checked_neither_with_cr3_nor_with_cr4() -> None:
    scene = Scene(3, cr3=0x9000, vendor=AMD, use=NESTED)
    scene.put(0x9000, 0, 0x2003)
    scene.turn_on()
    assert run(set_cr3(scene.vcpu, 0x9000)) == "fine"
    assert scene.vm.counts["pdptes_checked"] == 0


def test_l2_uses_l1s_entries_as_a_user_would() -> None:
    scene = Scene(2, cr3=DIRECTORY, vendor=AMD, use=NESTED)
    scene.put(DIRECTORY, 0, TABLE | RWU)
    scene.put(TABLE, 3, 0x5003)
    scene.turn_on()
    assert scene.access(0x3000, user=False).kind == GUEST_FAULT


def test_set_cr3_counts_the_pdptes_that_it_checks() -> None:
    scene = Scene(3, cr3=0x9020)
    scene.turn_on()
    before = scene.vm.counts
    assert run(set_cr3(scene.vcpu, 0x9020)) == "fine"
    assert rise(scene, before, "pdptes_checked") == [4]


@pytest.mark.parametrize(("entry", "flushes"), [(0x6000 | RWU, 1), (0x5000 | RWU, 0)])
def test_invalidate_addr_flushes_if_the_guest_took_something_away(entry: int, flushes: int) -> None:
    scene = mapped()
    scene.access(0x3000, write=True)
    assert scene.guest_put(TABLE, 3, entry | 0x60) == "direct"
    before = scene.vm.counts
    run(kvm_mmu_invalidate_addr(scene.vcpu, 0x3000))
    assert rise(scene, before, "remote_tlb_flush", "synced") == [flushes, 1]


# -- the host


def test_unmap_gfn_leaves_no_entry_that_maps_it() -> None:
    scene = mapped()
    leaves = []
    for va in (0x3000, 0x4000):
        scene.access(va)
        leaves.append(shadow_leaf(scene.vcpu, va))
    assert run(kvm_unmap_gfn(scene.vm, 5)) == 2
    assert not any(scene.vm.is_present(scene.vm.read(leaf)) for leaf in leaves)
    assert 5 not in scene.vm.rmap
    assert not set(leaves) & set(scene.vm.leaves)


@ALL
def test_zap_all_fast_makes_all_obsolete_before_it_zaps_the_first(design: str) -> None:
    scene = mapped(design)
    scene.access(0x3000)
    zapping = kvm_mmu_zap_all_fast(scene.vm)
    assert [next(zapping)[0] for _ in range(2)] == [
        "write_lock(mmu_lock)",
        "kvm_zap_obsolete_pages",
    ]
    assert scene.vm.mmu_valid_gen == 1
    assert all(is_obsolete_sp(scene.vm, sp) for sp in scene.vm.sps.values())
    assert not any(sp.is_invalid for sp in scene.vm.sps.values())
    run(zapping)
    assert all(sp.is_invalid for sp in scene.vm.sps.values())
    assert scene.access(0x3000).kind == "ok"
    assert {sp.valid_gen for sp in scene.vm.sps.values()} == {1}


def test_zap_page_can_be_seen_between_unlinking_and_freeing() -> None:
    scene = mapped()
    scene.access(0x3000)
    page = shadowing(scene.vm, TABLE >> 12)[0]
    zapping = zap_page(scene.vm, page.spt)
    assert next(zapping) == ("write_lock(mmu_lock)",)
    assert next(zapping) == ("kvm_mmu_commit_zap_page", 1)
    assert scene.vm.sps[page.spt].parents == ()
    run(zapping)
    assert page.spt not in scene.vm.sps
