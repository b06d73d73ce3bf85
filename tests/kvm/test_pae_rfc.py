"""PAE roots with headers: kept ready, found, shared, linked, unlinked, freed."""

from __future__ import annotations

import pytest
from shadow_scene import EXAMPLE, RWU, Scene, small_map

from tdxlab.hardware import Region
from tdxlab.kvm.pae_rfc import make_default_pdpte
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.shadow import kvm_mmu_zap_all_fast, zap_page
from tdxlab.kvm.shadow_params import AMD, INTEL, REVIEWED, RFC, ShadowParams, ShadowRole
from tdxlab.kvm.shadow_roots import design_of, kvm_mmu_free_roots, kvm_mmu_load, topup_caches
from tdxlab.kvm.shadow_run import GUEST_FAULT, NO_MEMORY, OK, STUCK, destroy_vcpu, set_cr3, start
from tdxlab.kvm.shadow_vm import NO_ROOT, ShadowVm
from tdxlab.steps import run

DESIGNS = pytest.mark.parametrize("design", [RFC, REVIEWED])
ZERO_PAGE = Region(0x1_2345_6000, 0x1000)


def slots(scene: Scene) -> tuple[int, ...]:
    return design_of(scene.vm).slots(scene.vcpu)


def mapped(design: str, **params: object) -> Scene:
    """A guest of two levels that can use the first page of each GiB."""
    scene = Scene(2, cr3=0x10000, design=design, **params)  # type: ignore[arg-type]
    for gib in range(4):
        scene.put(0x10000, gib << 8, 0x2000 | RWU)
    scene.put(0x2000, 0, 0x5000 | RWU)
    scene.turn_on()
    return scene


def test_make_default_pdpte_is_that_of_the_worked_example() -> None:
    memory_map = EXAMPLE._replace(normal=(ZERO_PAGE, *EXAMPLE.normal))
    scene = mapped(RFC, memory_map=memory_map)
    assert scene.vm.default_pdpte == 0x1_2345_6001
    for gib in range(4):
        assert scene.access(gib << 30).kind == OK
    linked = [0x140001801, 0x55555801, 0x200003801, 0x200004801]
    assert list(slots(scene)) == linked
    assert mapped(REVIEWED).vm.default_pdpte == 0


@DESIGNS
def test_fetch_links_a_directory_when_its_gibibyte_is_used(design: str) -> None:
    scene = mapped(design)
    empty = scene.vm.default_pdpte
    assert run(kvm_mmu_load(scene.vcpu)) == 0
    assert slots(scene) == (empty,) * 4
    assert scene.access(3 << 30).kind == OK
    assert [slot == empty for slot in slots(scene)] == [True, True, True, False]
    root = scene.vm.root_sp(scene.vcpu)
    assert root is not None
    assert ShadowRole(root.role).pae_root == 1
    children = [sp for sp in scene.vm.sps.values() if sp.spt != root.spt]
    assert {ShadowRole(sp.role).pae_root for sp in children} == {0}
    assert root.spt < 1 << 32
    assert complaints(scene.vm) == []


@DESIGNS
def test_drop_parent_pte_puts_the_empty_value_back(design: str) -> None:
    scene = mapped(design)
    scene.access(3 << 30)
    directory = scene.vm.address(slots(scene)[3])
    run(zap_page(scene.vm, directory))
    assert slots(scene)[3] == scene.vm.default_pdpte
    assert directory not in scene.vm.sps
    assert complaints(scene.vm) == []
    assert scene.access(3 << 30).kind == OK


@DESIGNS
def test_two_vcpus_share_one_root(design: str) -> None:
    scene = mapped(design, vcpus=2)
    for vcpu in scene.vm.vcpus:
        assert scene.access(0, vcpu=vcpu).kind == OK
    first, second = scene.vm.vcpus
    assert first.root == second.root
    assert scene.vm.sps[first.root.hpa].root_count == 2
    assert scene.vm.counts["sp_created"] == 3
    assert complaints(scene.vm) == []


def test_a_special_root_is_shared_by_nobody() -> None:
    scene = mapped("special root", vcpus=2)
    for vcpu in scene.vm.vcpus:
        assert scene.access(0, vcpu=vcpu).kind == OK
    first, second = scene.vm.vcpus
    assert first.root.hpa != second.root.hpa


@DESIGNS
def test_topup_fills_the_cache_again_after_its_page_was_taken(design: str) -> None:
    scene = mapped(design)
    assert run(topup_caches(scene.vcpu)) == 0
    ready = scene.vcpu.pae_root_cache
    assert run(topup_caches(scene.vcpu)) == 0
    assert scene.vcpu.pae_root_cache == ready
    scene.access(0)
    assert scene.vcpu.root.hpa == ready
    assert scene.vcpu.pae_root_cache not in (NO_PAGE, ready)
    assert scene.vm.counts["roots_allocated"] == 2


@DESIGNS
def test_topup_without_a_low_page_fails_cleanly_and_loses_nothing(design: str) -> None:
    scene = mapped(design, memory_map=small_map(low=0))
    assert scene.access(0).kind == NO_MEMORY
    assert scene.vcpu.root == NO_ROOT
    assert complaints(scene.vm) == []
    run(destroy_vcpu(scene.vcpu))
    assert len(scene.vm.pages.in_use) == (1 if design == RFC else 0)


@DESIGNS
def test_pages_are_encrypted_again_when_root_and_cache_are_freed(design: str) -> None:
    scene = mapped(design, vendor=AMD, c_bit=45)
    assert scene.access(3 << 30).kind == OK
    assert len(scene.vm.plain) == 2
    assert slots(scene)[3] & 1 << 45
    assert complaints(scene.vm) == []
    run(destroy_vcpu(scene.vcpu))
    run(kvm_mmu_zap_all_fast(scene.vm))
    assert scene.vm.counts["decrypted"] == scene.vm.counts["encrypted"] == 2
    assert not scene.vm.plain
    assert complaints(scene.vm) == []


@DESIGNS
def test_zap_page_of_a_root_in_use_frees_it_with_its_last_reference(design: str) -> None:
    scene = mapped(design)
    scene.access(0)
    spt = scene.vcpu.root.hpa
    run(zap_page(scene.vm, spt))
    assert scene.vm.sps[spt].is_invalid
    assert scene.access(0).kind == OK
    assert scene.vcpu.root.hpa != spt
    assert spt not in scene.vm.sps
    assert complaints(scene.vm) == []


@DESIGNS
def test_alloc_root_while_paging_is_off_does_not_look_at_cr3(design: str) -> None:
    scene = Scene(0, design=design, cr3=0x7000_0000)
    scene.turn_on()
    assert slots(scene) == ()
    assert scene.access(0x5000).kind == OK
    root = scene.vm.root_sp(scene.vcpu)
    assert root is not None
    assert (root.gfn, root.pdptes) == (0, ())


@DESIGNS
def test_alloc_root_has_pdptes_in_the_key_of_a_pae_guest_only(design: str) -> None:
    for levels, pdptes in ((2, ()), (3, (0x2001, 0, 0, 0))):
        scene = Scene(levels, cr3=0x9000, design=design)
        scene.vm.write_guest(0x9000, 0x2001, 8)
        scene.turn_on()
        scene.vcpu.pdptrs = (0x2001, 0, 0, 0)
        assert run(kvm_mmu_load(scene.vcpu)) == 0
        root = scene.vm.root_sp(scene.vcpu)
        assert root is not None
        assert (root.gfn, root.pdptes) == (9, pdptes)


# -- what the key must tell apart


def pae_guest_with_two_tables(*, pdptes_in_key: bool) -> Scene:
    """Two PDPTs in one page, 32 bytes apart, whose first GiB leads to different pages."""
    scene = Scene(3, cr3=0x9000, design=REVIEWED, pdptes_in_key=pdptes_in_key)
    for number, (table, directory) in enumerate(((0x9000, 0x2000), (0x9020, 0x4000))):
        scene.put(table, 0, directory | 1)
        scene.put(directory, 0, directory + 0x1000 | RWU)
        scene.put(directory + 0x1000, 0, 0x10000 + 0x1000 * number | RWU)
    scene.turn_on()
    return scene


def test_two_pdpts_in_one_page_have_roots_of_their_own() -> None:
    scene = pae_guest_with_two_tables(pdptes_in_key=True)
    assert scene.access(0).hpa == scene.expected(0)
    scene.cr3 = 0x9020
    assert run(set_cr3(scene.vcpu, 0x9020)) == "fine"
    assert scene.access(0).hpa == scene.expected(0)


def test_a_key_of_gfn_and_role_alone_gives_the_guest_the_wrong_page() -> None:
    scene = pae_guest_with_two_tables(pdptes_in_key=False)
    first = scene.access(0).hpa
    scene.cr3 = 0x9020
    assert run(set_cr3(scene.vcpu, 0x9020)) == "fine"
    assert scene.expected(0) != first
    assert scene.access(0).hpa == first


# -- steps left out


def test_children_that_inherit_the_bit_take_low_pages_and_let_nothing_through() -> None:
    scene = mapped(REVIEWED, forget=frozenset({"clear role"}))
    before = scene.vm.pages.dma32.free
    assert scene.access(0).kind == STUCK
    assert before - scene.vm.pages.dma32.free > 2
    said = complaints(scene.vm)
    assert any("called a PAE root, at level 2" in text for text in said)
    assert "pages that are out, and pages that are known, differ" not in said


@pytest.mark.parametrize(("kicks", "is_stale"), [(True, False), (False, True)])
def test_a_flush_that_kicks_nobody_leaves_a_freed_directory_in_a_register(
    kicks: bool, is_stale: bool
) -> None:
    scene = mapped(REVIEWED, vcpus=2, vendor=INTEL, kicks=kicks)
    other = scene.vm.vcpus[1]
    assert scene.access(0, vcpu=other).kind == OK
    directory = scene.vm.address(slots(scene)[0]) if slots(scene) else 0
    directory = directory or scene.vm.address(other.hardware[0])
    run(zap_page(scene.vm, directory))
    is_freed = directory not in scene.vm.pages.in_use
    assert is_freed
    assert (other.in_guest and scene.vm.address(other.hardware[0]) == directory) == is_stale


@DESIGNS
def test_a_pae_guests_absent_pdpte_is_its_own_fault(design: str) -> None:
    scene = Scene(3, cr3=0x9020, design=design)
    scene.turn_on()
    assert scene.access(0).kind == GUEST_FAULT


# -- pages that had another use before


def test_make_default_pdpte_clears_its_directory() -> None:
    vm = ShadowVm(ShadowParams(design=RFC), memory_map=small_map())
    first = small_map().normal[0].base
    vm.write(first + 8 * 5, 0x1234)
    assert make_default_pdpte(vm) == 0
    assert vm.default_pdpte == first | 1
    assert set(vm.read_table(first)) == {0}


def test_start_refuses_a_host_without_a_page_for_the_default_directory() -> None:
    with pytest.raises(ValueError, match="0 are free below 4 GiB"):
        start(ShadowParams(design=RFC), memory_map=small_map(low=0, normal=0))
    assert start(ShadowParams(design=REVIEWED), memory_map=small_map(low=0, normal=0)).vcpus


@pytest.mark.parametrize(("design", "stored"), [(RFC, 4), (REVIEWED, 0)])
def test_topup_clears_its_page_and_counts_the_default_entries(design: str, stored: int) -> None:
    scene = Scene(2, design=design, vendor=AMD, c_bit=45)
    low = small_map().dma32[0].base
    scene.vm.write(low + 8 * 300, 0x1234)
    assert run(topup_caches(scene.vcpu)) == 0
    assert scene.vcpu.pae_root_cache == low
    table = [scene.vm.cpu_read(0, low + 8 * index) for index in range(512)]
    assert table == [scene.vm.default_pdpte] * 4 + [0] * 508
    assert scene.vm.counts["slots_stored"] == stored


@DESIGNS
def test_alloc_root_without_memory_behind_cr3_installs_the_dummy_root(design: str) -> None:
    scene = Scene(2, design=design, cr3=0x7000_0000)
    scene.turn_on()
    assert scene.access(0x5000).kind == GUEST_FAULT
    assert scene.vcpu.root.hpa == scene.vm.zero_page
    assert len(scene.vm.sps) == 0
    assert complaints(scene.vm) == []
    run(kvm_mmu_free_roots(scene.vcpu))
    assert scene.vcpu.root == NO_ROOT
