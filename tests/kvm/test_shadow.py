"""Faults, quadrants, write protection, pages out of sync, and the guest's walk."""

from __future__ import annotations

import pytest
from shadow_scene import EXAMPLE, RWU, Scene

from tdxlab.kvm.pae_guest import GuestFault, GuestWalk, walk_guest
from tdxlab.kvm.pae_pdpte import X86_CR0_PG, X86_CR0_WP, X86_CR4_PAE
from tdxlab.kvm.pae_rules import complaints, quadrants
from tdxlab.kvm.role import ACC_ALL, ACC_USER_MASK, ACC_WRITE_MASK, Role
from tdxlab.kvm.shadow import (
    guest_store,
    kvm_mmu_invalidate_addr,
    kvm_mmu_page_fault,
    kvm_unmap_gfn,
    shadow_leaf,
    zap_page,
)
from tdxlab.kvm.shadow_pages import shadowing
from tdxlab.kvm.shadow_params import DESIGNS
from tdxlab.kvm.shadow_run import (
    EMULATED,
    GUEST_FAULT,
    MMIO,
    OK,
    access,
    set_cr0,
    set_cr3,
    set_cr4,
    store,
)
from tdxlab.kvm.shadow_sync import sync_page
from tdxlab.kvm.shadow_vm import MMU_SYNC, ShadowPage
from tdxlab.steps import run

ALL = pytest.mark.parametrize("design", DESIGNS)
ACCESSED, DIRTY, LARGE = 0x20, 0x40, 0x80


def mapped(levels: int = 2, *, design: str = DESIGNS[0], leaf: int = 0x5000 | RWU) -> Scene:
    """A guest whose address 0x3000 is mapped: directory at 0x2000, table at 0x3000."""
    scene = Scene(levels, design=design, cr3=0x2000 if levels == 2 else 0x9020)
    if levels == 3:
        scene.put(0x9020, 0, 0x2001)
    scene.put(0x2000, 0, 0x3000 | RWU)
    scene.put(0x3000, 3, leaf)
    scene.turn_on()
    return scene


def test_fetch_finds_the_entries_of_the_worked_example() -> None:
    scene = Scene(2, cr3=0x101000, memory_map=EXAMPLE)
    scene.put(0x101000, 768, 0x102000 | RWU)
    scene.put(0x102000, 291, 0x5000 | RWU)
    scene.turn_on()
    assert scene.access(0xC012_3456).hpa == scene.vm.map.guest.base + 0x5456
    sptep = shadow_leaf(scene.vcpu, 0xC012_3456)
    assert sptep & 0xFFF == 8 * 291
    page = scene.vm.sp_of_entry(sptep)
    assert page is not None
    assert Role(page.role).quadrant == 0
    assert scene.vm.is_present(scene.vm.read(0x2_0000_3000))


@ALL
def test_fetch_shadows_one_directory_four_times_and_one_table_twice(design: str) -> None:
    scene = Scene(2, design=design)
    for gib in range(4):
        scene.put(0x1000, gib << 8, 0x2000 | RWU)
    for entry in (0, 512):
        scene.put(0x2000, entry, 0x5000 | RWU)
    scene.turn_on()
    for gib in range(4):
        assert scene.access(gib << 30).kind == scene.access(gib << 30 | 1 << 21).kind == OK
    assert quadrants(scene.vm) == [
        *((1, 2, quadrant) for quadrant in range(4)),
        *((2, 1, quadrant) for quadrant in range(2)),
    ]
    assert complaints(scene.vm) == []


@ALL
@pytest.mark.parametrize("levels", [2, 3])
def test_access_maps_a_large_page_with_direct_tables(design: str, levels: int) -> None:
    scene = Scene(levels, design=design, cr3=0x2000 if levels == 2 else 0x9020)
    scene.put(0x9020, 0, 0x2001)
    scene.put(0x2000, 0, LARGE | RWU)
    scene.turn_on()
    assert scene.access(0x5123, write=True).hpa == scene.vm.map.guest.base + 0x5123
    leaf = scene.vm.sp_of_entry(shadow_leaf(scene.vcpu, 0x5123))
    assert leaf is not None
    assert leaf.is_direct
    assert complaints(scene.vm) == []


@pytest.mark.parametrize(
    ("leaf", "how", "code"),
    [
        (0, {}, 4),
        (0x5001, {}, 5),
        (0x5001, {"user": False}, None),
        (0x5005, {"write": True}, 7),
        (0x5003, {"user": False, "write": True}, None),
        (0x5001 | 1 << 50, {}, 13),
    ],
)
def test_access_gives_the_guest_the_fault_of_its_own_tables(
    leaf: int, how: dict[str, bool], code: int | None
) -> None:
    scene = mapped(3, leaf=leaf)
    came = scene.access(0x3000, **how)
    assert came.kind == (OK if code is None else GUEST_FAULT)
    assert came.error_code == (code or 0)


def test_access_to_a_gfn_without_memory_is_left_to_user_space() -> None:
    assert mapped(leaf=0x7000_0000 | RWU).access(0x3000).kind == MMIO


def test_access_refuses_an_address_of_more_than_32_bits() -> None:
    with pytest.raises(ValueError, match="more than 32 bits"):
        mapped().access(1 << 32)


def test_walk_guest_sets_accessed_and_dirty_bits_where_a_cpu_would() -> None:
    scene = mapped()
    read = walk_guest(scene.vcpu, 0x3000, write=False, user=True)
    assert isinstance(read, GuestWalk)
    assert read.access & 2 == 0
    assert [scene.vm.read_guest(gpa, 4) for gpa in (0x2000, 0x300C)] == [0x3027, 0x5027]
    written = walk_guest(scene.vcpu, 0x3000, write=True, user=True)
    assert isinstance(written, GuestWalk)
    assert written.access & 2
    assert scene.vm.read_guest(0x300C, 4) == 0x5067


def test_walk_guest_that_faults_sets_nothing() -> None:
    scene = mapped(leaf=0x5005)
    before = scene.vm.digest()
    assert walk_guest(scene.vcpu, 0x3000, write=True, user=True) == GuestFault(7)
    assert scene.vm.digest() == before


# -- the guest changes its tables


@ALL
@pytest.mark.parametrize("levels", [2, 3])
def test_guest_store_to_a_directory_is_emulated_and_takes_the_entry_away(
    design: str, levels: int
) -> None:
    scene = mapped(levels, design=design)
    assert scene.access(0x3000).kind == OK
    assert scene.guest_put(0x2000, 0, 0) == "emulated"
    assert scene.access(0x3000).kind == GUEST_FAULT
    assert complaints(scene.vm) == []


def test_guest_store_to_another_entry_leaves_what_is_mapped_alone() -> None:
    scene = mapped()
    assert scene.access(0x3000).kind == OK
    assert scene.guest_put(0x2000, 1, 0x4000 | RWU) == "emulated"
    assert scene.access(0x3000) == (OK, scene.vm.map.guest.base + 0x5000, 0, 0)


@pytest.mark.parametrize(("gpa", "value", "size"), [(0x2001, 0x30, 1), (0x2002, 0, 4)])
def test_guest_store_of_part_of_an_entry_zaps_the_page(gpa: int, value: int, size: int) -> None:
    scene = mapped()
    assert scene.access(0x3000).kind == OK
    assert run(guest_store(scene.vcpu, gpa, value, size)) == "emulated"
    assert scene.access(0x3000).kind == OK
    assert scene.vm.counts["sp_zapped"] >= 4
    assert complaints(scene.vm) == []


@ALL
@pytest.mark.parametrize("flush", ["invlpg", "cr3"])
def test_a_table_of_level_1_is_out_of_sync_until_the_guest_flushes(design: str, flush: str) -> None:
    scene = mapped(design=design)
    old = scene.access(0x3000).hpa
    assert scene.guest_put(0x3000, 3, 0x6000 | RWU) == "direct"
    assert [sp.unsync for sp in shadowing(scene.vm, 3)] == [True]
    assert scene.access(0x3000).hpa == old
    if flush == "invlpg":
        run(kvm_mmu_invalidate_addr(scene.vcpu, 0x3000))
    else:
        run(set_cr3(scene.vcpu, scene.cr3))
    assert scene.access(0x3000).hpa == scene.expected(0x3000) == old + 0x1000
    assert complaints(scene.vm) == []


@ALL
@pytest.mark.parametrize("levels", [2, 3])
def test_load_syncs_what_a_new_root_finds_when_no_other_request_does(
    design: str, levels: int
) -> None:
    scene = mapped(levels, design=design)
    old = scene.access(0x3000).hpa
    assert scene.guest_put(0x3000, 3, 0x6000 | RWU) == "direct"
    for cr0 in (X86_CR0_WP, X86_CR0_WP | X86_CR0_PG):
        assert run(set_cr0(scene.vcpu, cr0)) == "fine"
    assert MMU_SYNC not in scene.vcpu.requests
    assert scene.access(0x3000).hpa == scene.expected(0x3000) == old + 0x1000
    assert complaints(scene.vm) == []


@pytest.mark.parametrize(
    ("before", "after", "access", "flush"),
    [
        (0x5067, 0x5067, ACC_ALL, False),
        (0x5067, 0x6067, None, True),
        (0x5067, 0x5066, None, True),
        (0x5067, 0x5047, None, True),
        (0x5067, 0x5067 | 1 << 50, None, True),
        (0x5067, 0x5027, ACC_ALL & ~ACC_WRITE_MASK, True),
        (0x5067, 0x5065, ACC_ALL & ~ACC_WRITE_MASK, True),
        (0x5067, 0x5063, ACC_ALL & ~ACC_USER_MASK, True),
        (0x5065, 0x5067, ACC_ALL, False),
    ],
)
def test_sync_spte_follows_what_the_guest_wrote(
    before: int, after: int, access: int | None, flush: bool
) -> None:
    scene = mapped(3, leaf=before)
    scene.access(0x3000)
    leaf = shadow_leaf(scene.vcpu, 0x3000)
    scene.guest_put(0x3000, 3, after)
    (page,) = shadowing(scene.vm, 3)
    assert sync_page(scene.vcpu, page, []) is flush
    assert scene.vm.leaves.get(leaf) == (None if access is None else (5, access))
    assert bool(scene.vm.read(leaf) & 2) is bool((access or 0) & ACC_WRITE_MASK)


@pytest.mark.parametrize(("after", "flushes"), [(0x5067, 0), (0x5065, 1)])
def test_sync_children_flushes_what_a_tlb_could_still_allow(after: int, flushes: int) -> None:
    scene = mapped(leaf=0x5067)
    scene.access(0x3000, write=True)
    scene.guest_put(0x3000, 3, after)
    before = scene.vm.counts["remote_tlb_flush"]
    run(set_cr3(scene.vcpu, scene.cr3))
    assert scene.access(0x3000).kind == OK
    assert scene.vm.counts["remote_tlb_flush"] - before == flushes


def test_sync_page_zaps_what_shadows_another_kind_of_table() -> None:
    scene = mapped()
    scene.access(0x3000)
    scene.guest_put(0x3000, 3, 0x6000 | RWU)
    (page,) = shadowing(scene.vm, 3)
    assert run(set_cr3(scene.vcpu, 0x9000)) == "fine"
    assert run(set_cr4(scene.vcpu, X86_CR4_PAE)) == "fine"
    assert scene.vcpu.guest_level == 3
    invalid: list[ShadowPage] = []
    assert sync_page(scene.vcpu, page, invalid) is None
    assert [sp.spt for sp in invalid] == [page.spt]
    assert shadowing(scene.vm, 3) == []


def test_sync_children_protects_the_table_again() -> None:
    scene = mapped()
    scene.put(0x3000, 9, 0x3000 | RWU)
    scene.access(0x3000)
    assert run(store(scene.vcpu, 0x9000, 0x6007, 4)).kind == OK
    leaf = shadow_leaf(scene.vcpu, 0x9000)
    assert scene.vm.read(leaf) & 2
    run(set_cr3(scene.vcpu, scene.cr3))
    scene.access(0x3000)
    assert not scene.vm.read(leaf) & 2
    assert not any(sp.unsync for sp in scene.vm.sps.values())


def test_sync_children_lets_no_table_out_of_sync_that_it_brings_into_line() -> None:
    scene = mapped()
    scene.put(0x3000, 9, 0x3065)
    scene.access(0x9000)
    assert scene.guest_put(0x3000, 9, 0x3067) == "direct"
    run(set_cr3(scene.vcpu, scene.cr3))
    scene.access(0x3000)
    assert scene.vm.leaves[shadow_leaf(scene.vcpu, 0x9000)] == (3, ACC_ALL)
    assert not scene.vm.read(shadow_leaf(scene.vcpu, 0x9000)) & 2
    assert not any(sp.unsync for sp in scene.vm.sps.values())


def test_store_through_a_mapping_of_its_own_directory_is_emulated() -> None:
    scene = mapped()
    scene.put(0x3000, 9, 0x2000 | RWU)
    assert scene.access(0x3000).kind == OK
    assert run(store(scene.vcpu, 0x9000, 0, 4)).kind == EMULATED
    assert scene.vm.read_guest(0x2000, 4) == 0
    assert scene.access(0x3000).kind == GUEST_FAULT
    assert complaints(scene.vm) == []


def test_write_protection_reaches_mappings_made_before_the_page_was_a_table() -> None:
    scene = mapped()
    assert scene.access(0x3000, write=True).kind == OK
    scene.put(0x2000, 1, 0x5000 | RWU)
    scene.put(0x5000, 0, 0x6000 | RWU)
    assert scene.access(0x40_0000).kind == OK
    assert not scene.vm.read(shadow_leaf(scene.vcpu, 0x3000)) & 2


@ALL
def test_kvm_unmap_gfn_takes_all_mappings_and_they_come_back(design: str) -> None:
    scene = mapped(design=design)
    scene.put(0x3000, 4, 0x5000 | RWU)
    for va in (0x3000, 0x4000):
        scene.access(va)
    assert run(kvm_unmap_gfn(scene.vm, 5)) == 2
    assert complaints(scene.vm) == []
    assert scene.access(0x4000).kind == OK


# -- what a TLB could still hold


@pytest.mark.parametrize(("gfn", "flushes"), [(5, 1), (6, 0)])
def test_kvm_unmap_gfn_flushes_once_if_something_was_mapped(gfn: int, flushes: int) -> None:
    scene = mapped()
    scene.access(0x3000)
    before = scene.vm.counts["remote_tlb_flush"]
    run(kvm_unmap_gfn(scene.vm, gfn))
    assert scene.vm.counts["remote_tlb_flush"] - before == flushes


@pytest.mark.parametrize(("entry", "flushes"), [(0, 1), (1, 0)])
def test_track_write_flushes_once_if_an_entry_was_present(entry: int, flushes: int) -> None:
    scene = mapped()
    scene.access(0x3000)
    before = scene.vm.counts["remote_tlb_flush"]
    assert scene.guest_put(0x2000, entry, 0x4000 | RWU) == "emulated"
    assert scene.vm.counts["remote_tlb_flush"] - before == flushes


def test_fetch_flushes_when_a_leaf_gives_way_to_one_of_another_gfn() -> None:
    scene = mapped(leaf=0x5065)
    scene.access(0x3000)
    assert scene.guest_put(0x3000, 3, 0x6067) == "direct"
    before = scene.vm.counts["remote_tlb_flush"]
    assert scene.access(0x3000, write=True).hpa == scene.vm.map.guest.base + 0x6000
    assert scene.vm.counts["remote_tlb_flush"] - before == 1


def test_fetch_flushes_when_a_large_page_gets_another_table() -> None:
    scene = Scene(2, cr3=0x2000)
    scene.put(0x2000, 0, LARGE | RWU)
    scene.turn_on()
    scene.access(0x5000)
    before = scene.vm.counts["remote_tlb_flush"]
    assert scene.access(0x5000, write=True).kind == OK
    assert scene.vm.counts["remote_tlb_flush"] - before == 1


def test_new_page_flushes_when_its_table_could_be_written() -> None:
    scene = mapped()
    scene.put(0x2000, 1, 0x5000 | RWU)
    scene.put(0x5000, 0, 0x6000 | RWU)
    scene.access(0x3000, write=True)
    before = scene.vm.counts["remote_tlb_flush"]
    assert scene.access(0x40_0000).kind == OK
    assert scene.vm.counts["remote_tlb_flush"] - before == 1


# -- meeting others


def test_a_fault_starts_over_when_the_guest_changed_its_tables_meanwhile() -> None:
    scene = mapped()
    scene.access(0x8000)
    faulting = kvm_mmu_page_fault(scene.vcpu, 0x3000, 4)
    while next(faulting) != ("write_lock(mmu_lock)",):
        pass
    scene.put(0x3000, 3, 0x6000 | RWU)
    assert run(faulting) == 1
    assert scene.access(0x3000).hpa == scene.vm.map.guest.base + 0x6000


def test_a_fault_starts_over_when_roots_are_to_be_freed() -> None:
    scene = mapped()
    scene.access(0x8000)
    faulting = kvm_mmu_page_fault(scene.vcpu, 0x3000, 4)
    while next(faulting) != ("write_lock(mmu_lock)",):
        pass
    scene.vm.make_all_cpus_request("MMU_FREE_OBSOLETE_ROOTS")
    assert run(faulting) == 1


@ALL
def test_everything_comes_back_with_a_rewind(design: str) -> None:
    scene = mapped(design=design)
    before, mark = scene.vm.digest(), scene.vm.mark()
    scene.access(0x3000, write=True)
    scene.guest_put(0x3000, 3, 0)
    assert scene.vm.digest() != before
    scene.vm.rewind(mark)
    assert scene.vm.digest() == before


def test_access_in_the_middle_holds_the_lock_that_others_need() -> None:
    scene = mapped()
    scene.access(0x8000)
    operation = access(scene.vcpu, 0x3000)
    labels = []
    for step in operation:
        labels.append(step[0])
        if step[0] == "set SPTE":
            assert scene.vm.mmu_lock.written
    assert "set SPTE" in labels
    assert not scene.vm.mmu_lock.written


# -- pages that are found again


def test_get_shadow_page_brings_a_page_into_line_that_was_not_linked_at_the_flush() -> None:
    scene = mapped()
    scene.put(0x3000, 4, 0x6000 | RWU)
    for va in (0x3000, 0x4000):
        assert scene.access(va).kind == OK
    scene.guest_put(0x2000, 0, 0)
    assert scene.guest_put(0x3000, 4, 0x7000 | RWU) == "direct"
    run(set_cr3(scene.vcpu, scene.cr3))
    scene.access(0x8000)
    scene.guest_put(0x2000, 0, 0x3000 | RWU)
    for va in (0x3000, 0x4000):
        assert scene.access(va).hpa == scene.expected(va)


def test_get_shadow_page_zaps_what_is_out_of_sync_when_the_table_becomes_a_directory() -> None:
    scene = mapped()
    scene.access(0x3000)
    scene.guest_put(0x3000, 9, 0x7000 | RWU)
    assert [sp.level for sp in shadowing(scene.vm, 3)] == [1]
    scene.cr3 = 0x3000
    run(set_cr3(scene.vcpu, 0x3000))
    scene.access(0)
    assert {sp.level for sp in shadowing(scene.vm, 3)} == {2}
    assert complaints(scene.vm) == []


def test_prepare_zap_page_takes_pages_out_of_sync_along() -> None:
    scene = mapped()
    scene.access(0x3000)
    scene.guest_put(0x3000, 9, 0x7000 | RWU)
    directory = next(sp for sp in shadowing(scene.vm, 2) if not Role(sp.role).quadrant)
    run(zap_page(scene.vm, directory.spt))
    assert shadowing(scene.vm, 3) == []
    assert complaints(scene.vm) == []


def test_a_large_page_that_becomes_writable_gets_a_table_of_its_own() -> None:
    scene = Scene(2, cr3=0x2000)
    scene.put(0x2000, 0, LARGE | 5)
    scene.put(0x2000, 1, LARGE | RWU)
    scene.turn_on()
    read_only, writable = 0x5000, 0x40_5000
    assert scene.access(read_only).hpa == scene.access(writable).hpa
    assert scene.access(writable, write=True).kind == OK
    assert scene.access(read_only, write=True).kind == GUEST_FAULT
    assert complaints(scene.vm) == []
