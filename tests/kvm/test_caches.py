"""Tests of the vCPU's page caches."""

from errno import ENOMEM

import pytest

from tdxlab.kvm.caches import (
    CAPACITY,
    MIN_OBJECTS,
    mmu_free_memory_caches,
    mmu_topup_memory_caches,
    take_external_page,
    take_table_page,
)
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM
from tests.kvm.fault_scene import FaultScene


def uses(scene: FaultScene) -> dict[str, int]:
    """Pages that are out, by what they are for."""
    found = list(scene.pages.in_use.values())
    return {use: found.count(use) for use in set(found)}


def test_mmu_topup_memory_caches_fills_to_capacity_when_loaded() -> None:
    scene = FaultScene(KVM_X86_TDX_VM)
    assert len(scene.vcpu.page_cache) == CAPACITY - 2  # two roots were taken
    assert len(scene.vcpu.external_spt_cache) == CAPACITY
    assert uses(scene) == {"page table": CAPACITY, "external page table": CAPACITY}


def test_mmu_topup_memory_caches_keeps_no_external_pages_without_mirror() -> None:
    scene = FaultScene(KVM_X86_DEFAULT_VM)
    assert scene.vcpu.external_spt_cache == ()
    assert uses(scene) == {"page table": CAPACITY}


def test_mmu_topup_memory_caches_leaves_alone_what_holds_enough() -> None:
    scene = FaultScene()
    while len(scene.vcpu.page_cache) > MIN_OBJECTS:
        take_table_page(scene.vcpu)
    assert mmu_topup_memory_caches(scene.vcpu) == 0
    assert len(scene.vcpu.page_cache) == MIN_OBJECTS
    take_table_page(scene.vcpu)
    assert mmu_topup_memory_caches(scene.vcpu) == 0
    assert len(scene.vcpu.page_cache) == CAPACITY


def test_mmu_topup_memory_caches_is_content_with_the_minimum() -> None:
    scene = FaultScene(free_pages=MIN_OBJECTS + 1)
    assert scene.load_error == 0
    assert len(scene.vcpu.page_cache) == MIN_OBJECTS


def test_mmu_topup_memory_caches_fails_and_keeps_its_pages_without_memory() -> None:
    scene = FaultScene(free_pages=MIN_OBJECTS - 1)
    assert scene.load_error == -ENOMEM
    assert len(scene.vcpu.page_cache) == MIN_OBJECTS - 1
    assert scene.pages.free == 0


def test_mmu_topup_memory_caches_asks_for_external_pages_first() -> None:
    scene = FaultScene(KVM_X86_TDX_VM, free_pages=CAPACITY + 1)
    assert scene.load_error == -ENOMEM
    assert len(scene.vcpu.external_spt_cache) == CAPACITY
    assert len(scene.vcpu.page_cache) == 1


def test_take_table_page_warns_when_nobody_topped_up() -> None:
    scene = FaultScene()
    scene.vcpu.page_cache = ()
    assert take_table_page(scene.vcpu) in scene.pages.in_use
    assert scene.said("warn")


def test_take_external_page_is_a_host_bug_when_there_is_no_memory_either() -> None:
    scene = FaultScene(KVM_X86_TDX_VM, free_pages=2 * CAPACITY)
    scene.vcpu.external_spt_cache = ()
    with pytest.raises(RuntimeError, match="external page table"):
        take_external_page(scene.vcpu)


def test_take_table_page_comes_back_with_a_rewind() -> None:
    scene = FaultScene()
    before = scene.vcpu.page_cache
    mark = scene.journal.mark()
    assert take_table_page(scene.vcpu) == before[-1]
    assert scene.vcpu.page_cache == before[:-1]
    scene.journal.rewind(mark)
    assert scene.vcpu.page_cache == before


def test_mmu_free_memory_caches_returns_every_page() -> None:
    scene = FaultScene(KVM_X86_TDX_VM)
    mmu_free_memory_caches(scene.vcpu)
    assert scene.vcpu.page_cache == scene.vcpu.external_spt_cache == ()
    assert uses(scene) == {"page table": 2}
