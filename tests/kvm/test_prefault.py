"""Tests of mapping memory that nobody has accessed yet."""

from collections.abc import Generator
from errno import EBUSY, EFAULT, EINTR, EINVAL, EIO, ENOENT, EOPNOTSUPP
from typing import Any

import pytest

from tdxlab.kvm.fault import (
    kvm_arch_vcpu_pre_fault_memory,
    kvm_tdp_map_page,
    kvm_vcpu_pre_fault_memory,
)
from tdxlab.kvm.spte import FROZEN_SPTE
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_fast_pf_get_last_sptep
from tdxlab.steps import run
from tests.kvm.fault_scene import (
    BASE,
    GFN,
    HOLE,
    PRIVATE_CODE,
    READ_CODE,
    FaultScene,
    plain_scene,
    stop_at,
    td_scene,
)


def map_page(scene: FaultScene, gpa: int, code: int) -> Any:
    return run(kvm_tdp_map_page(scene.vcpu, gpa, code))


def test_kvm_tdp_map_page_maps_without_access() -> None:
    scene = td_scene()
    assert map_page(scene, GFN << 12, PRIVATE_CODE) == (0, 1)
    assert not scene.spte(GFN << 12)[1] & 0x100
    assert map_page(scene, GFN << 12, PRIVATE_CODE) == (0, 1)


def test_kvm_tdp_map_page_repeats_while_it_is_told_to_retry() -> None:
    scene = td_scene()
    scene.hooks.errors = [-EBUSY, -EBUSY]
    assert map_page(scene, GFN << 12, PRIVATE_CODE) == (0, 1)
    assert [call[0] for call in scene.hooks.calls] == ["link"] * 5 + ["set"]


def test_kvm_tdp_map_page_enoent_where_no_memory_is() -> None:
    scene = plain_scene()
    assert map_page(scene, HOLE << 12, READ_CODE) == (-ENOENT, 1)


def test_kvm_tdp_map_page_returns_the_errno_of_the_fault() -> None:
    scene = td_scene()
    assert map_page(scene, scene.shared_gpa(GFN), READ_CODE) == (-EFAULT, 1)


def test_kvm_tdp_map_page_eintr_comes_before_eio() -> None:
    scene = td_scene()
    scene.vm.kill()
    scene.vcpu.signal_pending = True
    assert map_page(scene, GFN << 12, PRIVATE_CODE)[0] == -EINTR
    scene.vcpu.signal_pending = False
    assert map_page(scene, GFN << 12, PRIVATE_CODE)[0] == -EIO
    assert scene.hooks.calls == []


def test_kvm_tdp_map_page_ends_when_the_vm_dies_under_it() -> None:
    scene = td_scene()
    place = kvm_tdp_mmu_fast_pf_get_last_sptep(scene.vcpu, GFN)
    assert place is not None
    root = scene.vm.table_base(scene.vcpu.mirror_root_hpa)
    scene.vm.memory.words.put(root, FROZEN_SPTE)
    mapping = kvm_tdp_map_page(scene.vcpu, GFN << 12, PRIVATE_CODE)
    for _ in range(50):
        next(mapping)
    scene.vm.kill()
    assert run(mapping) == (-EIO, 1)


def pre_fault(scene: FaultScene, gpa: int, size: int) -> Any:
    return run(kvm_arch_vcpu_pre_fault_memory(scene.vcpu, gpa, size))


def test_kvm_arch_vcpu_pre_fault_memory_eopnotsupp_before_the_td_is_finalized() -> None:
    scene = td_scene()
    assert pre_fault(scene, scene.shared_gpa(GFN), 4096) == -EOPNOTSUPP
    scene.vm.pre_fault_allowed = True
    assert pre_fault(scene, scene.shared_gpa(GFN), 4096) == -EINVAL
    assert pre_fault(scene, GFN << 12, 4096) == 4096
    assert scene.hooks.calls[-1] == ("set", GFN, 1)


def test_kvm_arch_vcpu_pre_fault_memory_chooses_the_tree_by_the_attribute() -> None:
    scene = td_scene(private=False)
    scene.vm.pre_fault_allowed = True
    assert pre_fault(scene, GFN << 12, 0x3000) == 0x3000
    assert scene.hooks.calls == []
    assert scene.spte(scene.shared_gpa(GFN))[0] == 2


def test_kvm_arch_vcpu_pre_fault_memory_ends_with_the_page_that_it_mapped() -> None:
    scene = plain_scene()
    assert pre_fault(scene, BASE + 0x1FF << 12, 1 << 30) == 4096
    assert pre_fault(scene, BASE + 0x200 << 12, 1 << 30) == 0x200000


def test_kvm_vcpu_pre_fault_memory_goes_on_to_the_end_of_the_range() -> None:
    scene = td_scene()
    scene.vm.pre_fault_allowed = True
    assert run(kvm_vcpu_pre_fault_memory(scene.vcpu, GFN << 12, 0x3000)) == 0x3000
    assert [call for call in scene.hooks.calls if call[0] == "set"] == [
        ("set", GFN + page, 1) for page in range(3)
    ]


def test_kvm_vcpu_pre_fault_memory_says_how_far_it_came() -> None:
    scene = plain_scene()
    ioctl = kvm_vcpu_pre_fault_memory
    assert run(ioctl(scene.vcpu, BASE + 0x3FF << 12, 0x4000)) == 0x1000
    assert run(ioctl(scene.vcpu, BASE + 0x400 << 12, 0x3000)) == -ENOENT


@pytest.mark.parametrize(("gpa", "size"), [(1, 4096), (0, 4095), (0, 0), ((1 << 64) - 4096, 4096)])
def test_kvm_vcpu_pre_fault_memory_einval_for_what_is_no_range(gpa: int, size: int) -> None:
    assert run(kvm_vcpu_pre_fault_memory(plain_scene().vcpu, gpa, size)) == -EINVAL


def test_kvm_vcpu_pre_fault_memory_eintr_only_before_the_first_page() -> None:
    scene = plain_scene()
    scene.vcpu.signal_pending = True
    assert run(kvm_vcpu_pre_fault_memory(scene.vcpu, BASE << 12, 4096)) == -EINTR
    scene.vcpu.signal_pending = False
    ioctl: Generator[Any, None, int] = kvm_vcpu_pre_fault_memory(scene.vcpu, BASE << 12, 1 << 22)
    stop_at(ioctl, "cond_resched")
    scene.vcpu.signal_pending = True
    assert run(ioctl) == 1 << 21
