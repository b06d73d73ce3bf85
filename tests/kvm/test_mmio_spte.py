"""MMIO entries: a GPA and a generation in an entry that is not present."""

from __future__ import annotations

from dataclasses import replace

import pytest
from logging_scene import LoggingScene
from mmubench import MmuBench, tdx_bench

from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.spte import (
    SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
    Masks,
    MmioSpte,
    generation_mmio_spte_mask,
    get_mmio_spte_generation,
    get_mmio_spte_gfn,
    is_mmio_spte,
    is_shadow_present_pte,
    make_mmio_spte,
)
from tdxlab.kvm.vm import Vm


@pytest.fixture
def vm() -> Vm:
    """An ordinary VM."""
    return MmuBench().vm


@pytest.fixture
def td() -> Vm:
    """A TD."""
    return tdx_bench().vm


def test_make_mmio_spte_at_generation_0_is_the_gpa_and_the_vms_value(vm: Vm, td: Vm) -> None:
    assert make_mmio_spte(vm, 0xFEE00, 0) == 0xFEE00006
    assert make_mmio_spte(td, 0xFEE00, 0) == 0xFEE00000


def test_mmio_spte_is_recognised_by_its_own_vm_only(vm: Vm, td: Vm) -> None:
    ours, theirs = make_mmio_spte(vm, 1, 5), make_mmio_spte(td, 1, 5)
    assert [is_mmio_spte(vm, ours), is_mmio_spte(td, ours)] == [True, False]
    assert [is_mmio_spte(vm, theirs), is_mmio_spte(td, theirs)] == [False, True]
    assert not is_mmio_spte(vm, SHADOW_NONPRESENT_VALUE)
    assert not is_shadow_present_pte(ours)


def test_nothing_is_an_mmio_spte_where_mmio_is_not_cached() -> None:
    vm = LoggingScene(params=MmuParams(mmio_caching=False)).vm
    assert not is_mmio_spte(vm, make_mmio_spte(vm, 1, 0))


@pytest.mark.parametrize("generation", [0, 1, 0xFF, 0x100, 0x12345, (1 << 19) - 1])
def test_mmio_spte_keeps_gfn_and_generation(vm: Vm, generation: int) -> None:
    spte = make_mmio_spte(vm, 0xABCDE12345, generation)
    assert get_mmio_spte_generation(spte) == generation
    assert get_mmio_spte_gfn(vm, spte) == 0xABCDE12345
    assert is_mmio_spte(vm, spte)


def test_mmio_generation_is_cut_to_19_bits_around_the_mmu_present_bit() -> None:
    assert generation_mmio_spte_mask(0xFF) == 0x7F8
    assert generation_mmio_spte_mask(0x7FF00) == 0x7FF0_0000_0000_0000
    assert generation_mmio_spte_mask(1 << 63 | 1 << 19 | 1) == 8
    assert not generation_mmio_spte_mask((1 << 64) - 1) & SPTE_MMU_PRESENT_MASK


def test_mmio_spte_with_l1tf_moves_the_top_address_bits_out_of_the_cache() -> None:
    vm = LoggingScene(params=MmuParams(maxphyaddr=46, l1tf=True)).vm
    top = 0x1F << 41
    assert vm.masks.nonpresent_or_rsvd == top
    assert vm.masks.lower_gfn == (1 << 41) - (1 << 12)
    gfn = 0x2_5000_0123  # bit 33 of the gfn is address bit 45
    spte = make_mmio_spte(vm, gfn, 3)
    assert spte & top == top
    assert MmioSpte(spte).gpa >> 46 == gfn >> 29
    assert get_mmio_spte_gfn(vm, spte) == gfn


def test_l1tf_moves_nothing_where_no_address_bits_are_left() -> None:
    params = MmuParams(maxphyaddr=47, l1tf=True)
    assert Masks(params).nonpresent_or_rsvd == 0
    assert Masks(replace(params, maxphyaddr=46, l1tf=False)).nonpresent_or_rsvd == 0


def test_masks_have_no_mmio_value_without_mmio_caching() -> None:
    assert Masks(MmuParams(mmio_caching=False)).mmio_value == 0
    assert Masks(MmuParams()).mmio_value == 6
