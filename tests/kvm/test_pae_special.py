"""The special root of Linux 6.16: made, filled, freed, destroyed; alone, on NPT, and nested."""

from __future__ import annotations

from errno import EIO, ENOMEM
from itertools import pairwise

import pytest
from shadow_scene import EXAMPLE, RWU, Scene, small_map

from tdxlab.bits import MASK64
from tdxlab.kvm.pae_cpu import ENTRY_FAILURE, vm_entry
from tdxlab.kvm.pae_rules import complaints, quadrants
from tdxlab.kvm.pae_special import SpecialRoot
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.shadow import kvm_mmu_zap_all_fast, zap_page
from tdxlab.kvm.shadow_params import AMD, NESTED, NPT
from tdxlab.kvm.shadow_roots import design_of, kvm_mmu_free_roots, kvm_mmu_load
from tdxlab.kvm.shadow_run import (
    GUEST_FAULT,
    ILLEGAL_TABLE,
    INTERNAL_ERROR,
    NO_MEMORY,
    STUCK,
    destroy_vcpu,
    start,
)
from tdxlab.kvm.shadow_vm import FREE_OBSOLETE_ROOTS, NO_ROOT, ShadowVm
from tdxlab.kvm.vm import INVALID_PAGE
from tdxlab.steps import run


def slots(scene: Scene) -> tuple[int, ...]:
    return design_of(scene.vm).slots(scene.vcpu)


def loaded(levels: int = 2, **params: object) -> Scene:
    """A scene whose vCPU has its root."""
    scene = Scene(levels, **params)  # type: ignore[arg-type]
    scene.turn_on()
    assert run(kvm_mmu_load(scene.vcpu)) == 0
    return scene


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (0x140001001, 0x140002001, 0x55555001, 0x200003001)),
        (
            {"maxphyaddr": 48, "c_bit": 47, "vendor": AMD},
            (0x800140001001, 0x800140002001, 0x800055555001, 0x800200003001),
        ),
    ],
)
def test_alloc_root_fills_the_slots_of_the_worked_example(
    params: dict[str, object], expected: tuple[int, ...]
) -> None:
    scene = loaded(cr3=0x101000, memory_map=EXAMPLE, **params)
    assert scene.vcpu.root.hpa == 0x7F3A_5000
    assert slots(scene) == expected
    assert quadrants(scene.vm) == [(0x101, 2, quadrant) for quadrant in range(4)]
    assert [sp.root_count for sp in scene.vm.sps.values()] == [1, 1, 1, 1]
    assert complaints(scene.vm) == []


def test_alloc_root_takes_the_present_pdptes_with_memory_of_a_pae_guest() -> None:
    scene = Scene(3, cr3=0x9020)
    for index, pdpte in enumerate((0x2001, 0x3000, 0x40_0000_0001, 0x4001)):
        scene.put(0x9020, index, pdpte)
    scene.turn_on()
    assert run(kvm_mmu_load(scene.vcpu)) == 0
    assert [bool(slot) for slot in slots(scene)] == [True, False, False, True]
    assert len(scene.vm.sps) == 2
    assert sum(sp.root_count for sp in scene.vm.sps.values()) == 2
    assert scene.access(1 << 30).kind == scene.access(2 << 30).kind == GUEST_FAULT


def test_alloc_root_maps_four_gibibytes_directly_while_paging_is_off() -> None:
    scene = loaded(0)
    assert sorted(sp.gfn for sp in scene.vm.sps.values()) == [i << 18 for i in range(4)]
    assert scene.access(0x5123).hpa == scene.vm.map.guest.base + 0x5123


def test_alloc_root_while_paging_is_off_does_not_look_at_cr3() -> None:
    scene = Scene(0, cr3=0x7000_0000)
    scene.turn_on()
    assert scene.access(0x5123).hpa == scene.vm.map.guest.base + 0x5123
    assert scene.vcpu.root.hpa == scene.vcpu.pae_root


@pytest.mark.parametrize("params", [{}, {"vendor": AMD, "c_bit": 45}])
def test_alloc_root_without_memory_behind_cr3_installs_the_dummy_root(
    params: dict[str, object],
) -> None:
    scene = loaded(2, cr3=0x7000_0000, **params)
    assert scene.vcpu.root.hpa == scene.vm.zero_page
    assert scene.access(0x5000).kind == GUEST_FAULT
    run(kvm_mmu_free_roots(scene.vcpu))
    assert scene.vcpu.root == NO_ROOT
    assert complaints(scene.vm) == []


def test_free_roots_empties_all_slots_and_twice_is_no_mistake() -> None:
    scene = loaded()
    run(kvm_mmu_free_roots(scene.vcpu))
    assert slots(scene) == (0, 0, 0, 0)
    assert scene.vcpu.root.hpa == INVALID_PAGE
    assert [sp.root_count for sp in scene.vm.sps.values()] == [0, 0, 0, 0]
    before = scene.vm.digest()
    run(kvm_mmu_free_roots(scene.vcpu))
    assert scene.vm.digest() == before


def test_entering_while_a_slot_holds_all_ones_fails() -> None:
    scene = loaded()
    freeing = kvm_mmu_free_roots(scene.vcpu)
    seen = []
    for step in freeing:
        if step[0] == "store PDPTE":
            seen.append(step[2])
            ones = MASK64 in slots(scene)
            assert (vm_entry(scene.vcpu) == ENTRY_FAILURE) == ones
            scene.vm.exit_guest(scene.vcpu)
    assert seen == [MASK64, 0] * 4


def test_zap_page_of_a_root_leaves_the_slot_and_asks_for_new_roots() -> None:
    scene = loaded()
    spt = scene.vm.address(slots(scene)[1])
    run(zap_page(scene.vm, spt))
    assert scene.vm.address(slots(scene)[1]) == spt
    assert scene.vm.sps[spt].is_invalid
    assert FREE_OBSOLETE_ROOTS in scene.vcpu.requests
    assert scene.access(0x4000_0000).kind == GUEST_FAULT
    assert spt not in scene.vm.sps or not scene.vm.sps[spt].is_invalid
    assert complaints(scene.vm) == []


def test_zap_all_fast_frees_a_root_when_its_last_vcpu_lets_go() -> None:
    scene = Scene(2, vcpus=2)
    scene.turn_on()
    for vcpu in scene.vm.vcpus:
        assert run(kvm_mmu_load(vcpu)) == 0
    assert {sp.root_count for sp in scene.vm.sps.values()} == {2}
    run(kvm_mmu_zap_all_fast(scene.vm))
    assert all(sp.is_invalid for sp in scene.vm.sps.values())
    run(kvm_mmu_free_roots(scene.vm.vcpus[0]))
    assert len(scene.vm.sps) == 4
    run(kvm_mmu_free_roots(scene.vm.vcpus[1]))
    assert len(scene.vm.sps) == 0
    assert complaints(scene.vm) == []


def test_destroy_vcpu_gives_everything_back_but_the_hashed_pages() -> None:
    scene = loaded(vendor=AMD, c_bit=45)
    run(destroy_vcpu(scene.vcpu))
    assert len(scene.vm.pages.in_use) == len(scene.vm.sps) == 4
    run(kvm_mmu_zap_all_fast(scene.vm))
    assert scene.vm.pages.in_use == {}
    assert scene.vm.counts["decrypted"] == scene.vm.counts["encrypted"] == 1
    assert not scene.vm.plain


def test_start_refuses_a_host_without_pages_below_4g() -> None:
    with pytest.raises(ValueError, match="0 are free below 4 GiB"):
        start(vcpus=3, memory_map=small_map(low=2))


def test_a_forgotten_decryption_makes_the_cpu_read_noise() -> None:
    scene = Scene(2, vendor=AMD, c_bit=45, forget=frozenset({"decrypt"}))
    for gib in range(4):
        scene.put(0x1000, gib << 8, 0x2000 | RWU)
    scene.put(0x2000, 0, 0x5000 | RWU)
    scene.turn_on()
    kinds = [scene.access(gib << 30).kind for gib in range(4)]
    assert kinds == [STUCK, STUCK, ILLEGAL_TABLE, ILLEGAL_TABLE]
    assert any("the CPU refuses" in text for text in complaints(scene.vm))


# -- NPT of a 32-bit host


def test_npt_of_a_32_bit_host_has_its_table_low_and_not_decrypted() -> None:
    scene = loaded(2, vendor=AMD, use=NPT)
    assert scene.vcpu.root.hpa < 1 << 32
    assert scene.vm.counts["decrypted"] == 0
    assert scene.access(0x5123).hpa == scene.vm.map.guest.base + 0x5123
    assert complaints(scene.vm) == []


# -- nested


@pytest.mark.parametrize("tdp_level", [4, 5])
@pytest.mark.parametrize("levels", [2, 3])
def test_nested_npt_hangs_the_slots_below_entry_0(tdp_level: int, levels: int) -> None:
    me_value = 1 << 45
    scene = Scene(levels, cr3=0x9000, vendor=AMD, use=NESTED, tdp_level=tdp_level, c_bit=45)
    vcpu = scene.vcpu
    scene.turn_on()
    assert (vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root) == (NO_PAGE,) * 3
    if levels == 3:
        scene.put(0x9000, 3, 0x2001)
        scene.put(0x2000, 0, 0x3000 | RWU)
        scene.put(0x3000, 5, 0x5000 | RWU)
    else:
        scene.put(0x9000, 768, 0x3000 | RWU)
        scene.put(0x3000, 5, 0x5000 | RWU)
    assert scene.access(0xC000_5123).hpa == scene.vm.map.guest.base + 0x5123
    tables = [vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root][: tdp_level - 2]
    assert vcpu.root.hpa == tables[-1]
    assert min(tables) >= 1 << 32
    for below, table in pairwise(tables):
        assert scene.vm.read(table) == below | 0x27 | me_value
    assert all(slot == 0 or slot & 0xFFF == 0x27 for slot in slots(scene))
    assert scene.vm.counts["decrypted"] == 0
    assert complaints(scene.vm) == []


def test_nested_npt_has_all_special_pages_or_none() -> None:
    scene = Scene(2, vendor=AMD, use=NESTED, tdp_level=5, memory_map=small_map(low=0, normal=42))
    scene.turn_on()
    assert run(kvm_mmu_load(scene.vcpu)) == -ENOMEM
    assert scene.vcpu.pae_root == NO_PAGE
    assert complaints(scene.vm) == []
    assert scene.vm.pages.free == 2


def test_topup_calls_a_mixture_of_special_pages_an_error() -> None:
    scene = Scene(2, vendor=AMD, use=NESTED, tdp_level=5)
    scene.vcpu.pae_root = scene.vm.pages.alloc_page("PAE root")
    assert run(SpecialRoot().topup(scene.vcpu)) == -EIO
    assert scene.access(0).kind == INTERNAL_ERROR


# -- memory runs out


def test_load_without_memory_fails_cleanly_and_loses_nothing() -> None:
    scene = Scene(2, memory_map=small_map(low=1, normal=4))
    scene.turn_on()
    assert scene.access(0x5000).kind == NO_MEMORY
    assert scene.vcpu.root == NO_ROOT
    assert complaints(scene.vm) == []
    for hpa in list(scene.vm.pages.in_use):
        if hpa != scene.vcpu.pae_root:
            assert hpa in scene.vcpu.page_cache
    run(destroy_vcpu(scene.vcpu))
    assert scene.vm.pages.free == 5


# -- pages that had another use before, and what is counted


def test_create_empties_the_four_slots_of_a_page_that_held_something() -> None:
    vm = ShadowVm(memory_map=small_map())
    low = small_map().dma32[0].base
    for index in range(5):
        vm.write(low + 8 * index, 0x1234)
    assert SpecialRoot().create(vm.vcpus[0]) == 0
    assert SpecialRoot().slots(vm.vcpus[0]) == (0,) * 4
    assert vm.read(low + 32) == 0x1234
    assert vm.counts["roots_allocated"] == 1


def test_topup_clears_the_special_pages_of_a_nested_guest_and_counts_them_once() -> None:
    scene = Scene(2, vendor=AMD, use=NESTED, tdp_level=5)
    vm, vcpu = scene.vm, scene.vcpu
    assert SpecialRoot().slots(vcpu) == ()
    first = small_map().normal[0].base
    for number in range(3):
        vm.write(first + (number << 12) + 8 * 100, 0x1234)
    assert run(SpecialRoot().topup(vcpu)) == 0
    assert run(SpecialRoot().topup(vcpu)) == 0
    tables = (vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root)
    assert tables == tuple(first + (number << 12) for number in range(3))
    assert {entry for hpa in tables for entry in vm.read_table(hpa)} == {0}
    assert vm.counts["roots_allocated"] == 1


def test_slots_are_counted_when_they_are_stored() -> None:
    scene = Scene(2)
    scene.turn_on()
    before = scene.vm.counts["slots_stored"]
    assert run(kvm_mmu_load(scene.vcpu)) == 0
    assert scene.vm.counts["slots_stored"] == before + 4
    run(kvm_mmu_free_roots(scene.vcpu))
    assert scene.vm.counts["slots_stored"] == before + 4 + 8


@pytest.mark.parametrize("params", [{}, {"vendor": AMD, "use": NESTED, "tdp_level": 5}])
def test_destroy_vcpu_forgets_its_pages(params: dict[str, object]) -> None:
    scene = loaded(**params)
    run(destroy_vcpu(scene.vcpu))
    vcpu = scene.vcpu
    assert {vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root, vcpu.pae_root_cache} == {NO_PAGE}
    run(destroy_vcpu(vcpu))
    assert len(scene.vm.pages.in_use) == len(scene.vm.sps)
