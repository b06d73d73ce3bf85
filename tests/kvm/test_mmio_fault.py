"""Tests of accesses to gfns without memory."""

import pytest

from tdxlab.kvm.mmio_fault import handle_mmio_page_fault, mmio_info_in_cache
from tdxlab.kvm.page_fault import (
    PFERR_RSVD_MASK,
    RET_PF_EMULATE,
    RET_PF_INVALID,
    RET_PF_RETRY,
)
from tdxlab.kvm.params import (
    MmuParams,
)
from tdxlab.kvm.slots import (
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
)
from tests.kvm.fault_scene import HOLE, READ_CODE, fault_in, plain_scene, td_scene

MMIO_CODE = READ_CODE | PFERR_RSVD_MASK


def test_kvm_handle_noslot_fault_emulates_and_installs_an_mmio_spte() -> None:
    scene = plain_scene()
    assert fault_in(scene, HOLE << 12) == (RET_PF_EMULATE, 1)
    assert scene.vcpu.stats["pf_mmio_spte_created"] == 1
    assert mmio_info_in_cache(scene.vcpu, HOLE << 12)


@pytest.mark.parametrize(
    ("gfn", "params"),
    [(HOLE, MmuParams(mmio_caching=False)), (1 << 34, MmuParams(maxphyaddr=46))],
)
def test_kvm_handle_noslot_fault_emulates_without_spte_when_it_cannot_be_cached(
    gfn: int, params: MmuParams
) -> None:
    scene = plain_scene(params=params)
    assert fault_in(scene, gfn << 12)[0] == RET_PF_EMULATE
    assert scene.spte(gfn << 12)[0] == 4
    assert mmio_info_in_cache(scene.vcpu, gfn << 12)


def test_handle_mmio_page_fault_emulates_what_the_vcpu_saw_last() -> None:
    scene = plain_scene(params=MmuParams(mmio_caching=False))
    fault_in(scene, HOLE << 12)
    assert handle_mmio_page_fault(scene.vcpu, HOLE << 12) == RET_PF_EMULATE
    assert handle_mmio_page_fault(scene.vcpu, HOLE + 1 << 12) == RET_PF_RETRY


def test_handle_mmio_page_fault_emulates_what_has_an_mmio_spte() -> None:
    scene = plain_scene()
    fault_in(scene, HOLE << 12)
    fault_in(scene, HOLE + 1 << 12)
    assert not mmio_info_in_cache(scene.vcpu, HOLE << 12)
    assert handle_mmio_page_fault(scene.vcpu, HOLE << 12) == RET_PF_EMULATE
    assert mmio_info_in_cache(scene.vcpu, HOLE << 12)


def test_handle_mmio_page_fault_invalid_when_the_slots_have_changed() -> None:
    scene = plain_scene()
    fault_in(scene, HOLE << 12)
    scene.add_slot(HOLE, 1)
    assert handle_mmio_page_fault(scene.vcpu, HOLE << 12) == RET_PF_INVALID


def test_handle_mmio_page_fault_invalid_while_the_slots_are_changing() -> None:
    scene = plain_scene()
    fault_in(scene, HOLE << 12)
    generation = scene.vm.slots.generation
    scene.vm.slots.set_generation(generation | KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS)
    assert handle_mmio_page_fault(scene.vcpu, HOLE << 12) == RET_PF_INVALID


def test_handle_mmio_page_fault_invalid_for_the_shared_bit_of_a_td() -> None:
    scene = td_scene()
    assert handle_mmio_page_fault(scene.vcpu, scene.shared_gpa(HOLE)) == RET_PF_INVALID
