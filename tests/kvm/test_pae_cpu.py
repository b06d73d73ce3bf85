"""Who checks a PDPTE, when, and with which outcome."""

from __future__ import annotations

import pytest
from shadow_scene import RWU, Scene

from tdxlab.bits import MASK64
from tdxlab.kvm import pae_cpu
from tdxlab.kvm.pae_cpu import ENTRY_FAILURE, FINE, GP, PF
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.shadow_params import AMD, DESIGNS, INTEL, RFC, SPECIAL
from tdxlab.kvm.shadow_run import ILLEGAL_TABLE, OK, set_cr3
from tdxlab.steps import run

GOOD = 0x1_4000_1001
BAD = GOOD | 2


@pytest.mark.parametrize(
    ("pdptes", "mov_cr3", "intel", "amd"),
    [
        ((GOOD,) * 4, FINE, FINE, FINE),
        ((0,) * 4, FINE, FINE, FINE),
        ((GOOD, GOOD, BAD, GOOD), GP, ENTRY_FAILURE, FINE),
        ((MASK64 - 1,) * 4, FINE, FINE, FINE),
        ((MASK64,) * 4, GP, ENTRY_FAILURE, FINE),
    ],
)
def test_vendors_agree_on_bad_tables_and_differ_in_when(
    pdptes: tuple[int, ...], mov_cr3: str, intel: str, amd: str
) -> None:
    assert pae_cpu.mov_to_cr3(pdptes, 46) == mov_cr3
    assert pae_cpu.enter_guest(INTEL, pdptes, 46) == intel
    assert pae_cpu.enter_guest(AMD, pdptes, 46) == amd


def test_walk_pdpte_faults_on_amd_only_where_the_bad_entry_is_used() -> None:
    pdptes = (GOOD, 0, BAD, GOOD)
    outcomes = [pae_cpu.walk_pdpte(AMD, pdptes, gib << 30, 46) for gib in range(4)]
    assert outcomes == [FINE, PF, PF, FINE]
    assert {pae_cpu.walk_pdpte(INTEL, pdptes, gib << 30, 46) for gib in range(4)} == {ENTRY_FAILURE}


@pytest.mark.parametrize("value", [0x1_4000_1827, MASK64, 0x1_4000_1021])
def test_vm_entry_fails_on_intel_with_a_bad_slot(value: int) -> None:
    scene = mapped(SPECIAL, INTEL)
    scene.vm.write(scene.vcpu.root.hpa, value)
    assert scene.access(0xC000_0000).kind == ENTRY_FAILURE
    assert scene.vm.counts["entry_failures"] == 1
    assert not scene.vcpu.in_guest


def test_walk_meets_a_bad_slot_on_amd_only_when_it_uses_it() -> None:
    scene = mapped(SPECIAL, AMD)
    scene.vm.write(scene.vcpu.root.hpa, 0x1_4000_1827)
    assert scene.access(0xC000_0000).kind == OK
    assert scene.access(0).kind == ILLEGAL_TABLE


@pytest.mark.parametrize("design", DESIGNS)
def test_registers_keep_what_was_loaded_on_intel_and_nothing_is_kept_on_amd(design: str) -> None:
    kinds = {}
    for vendor in (INTEL, AMD):
        scene = mapped(design, vendor)
        assert scene.access(0xC000_0000).kind == OK
        scene.vm.write(scene.vcpu.root.hpa + 24, 0)
        found = pae_cpu.walk(scene.vcpu, 0xC000_0000, write=False, user=True)
        kinds[vendor] = type(found).__name__
    assert kinds == {INTEL: "Hit", AMD: "Violation"}


def mapped(design: str, vendor: str) -> Scene:
    """A guest of two levels that has used its address 3 GiB and is out again."""
    scene = Scene(2, design=design, vendor=vendor)
    scene.put(0x1000, 768, 0x2000 | RWU)
    scene.put(0x2000, 0, 0x5000 | RWU)
    scene.turn_on()
    assert scene.access(0xC000_0000).kind == OK
    scene.vm.exit_guest(scene.vcpu)
    return scene


def test_the_default_pdpte_is_present_and_leads_nowhere() -> None:
    scene = mapped(RFC, INTEL)
    assert scene.vm.default_pdpte & 1
    found = pae_cpu.walk(scene.vcpu, 0, write=False, user=True)
    assert found == pae_cpu.Violation(4)


def test_a_guests_bad_table_is_gp_on_both_vendors() -> None:
    for vendor in (INTEL, AMD):
        scene = Scene(3, cr3=0x9020, vendor=vendor)
        scene.turn_on()
        scene.vm.write_guest(0xA000, 0x5003, 8)
        assert run(set_cr3(scene.vcpu, 0xA000)) == GP
        assert scene.vcpu.cr3 == 0x9020


def test_a_root_above_4g_is_read_where_32_bits_lead() -> None:
    scene = mapped(SPECIAL, AMD)
    vm, vcpu = scene.vm, scene.vcpu
    high = vm.pages.alloc_page("table")
    for index in range(4):
        vm.write(high + 8 * index, vm.read(vcpu.root.hpa + 8 * index))
    vcpu.root = vcpu.root._replace(hpa=high)
    assert pae_cpu.walk(vcpu, 0xC000_0000, write=False, user=True) == pae_cpu.Violation(4)
    assert "vCPU 0: the root lies above 4 GiB" in complaints(vm)
