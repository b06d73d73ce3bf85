"""Tests of the way of a page fault, from the error code to what it returns."""

from collections.abc import Generator
from errno import EBUSY, EFAULT, EINTR, EINVAL, EIO, ENOENT, ENOMEM, EOPNOTSUPP
from typing import Any

import pytest

from tdxlab.kvm.caches import CAPACITY
from tdxlab.kvm.fault import (
    is_page_fault_stale,
    kvm_arch_vcpu_pre_fault_memory,
    kvm_mmu_do_page_fault,
    kvm_mmu_faultin_pfn,
    kvm_mmu_page_fault,
    kvm_tdp_map_page,
    kvm_vcpu_pre_fault_memory,
)
from tdxlab.kvm.hugepage import disallowed_hugepage_adjust, kvm_mmu_hugepage_adjust
from tdxlab.kvm.locks import READ
from tdxlab.kvm.mmio_fault import handle_mmio_page_fault, mmio_info_in_cache
from tdxlab.kvm.notifier import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.page_fault import (
    KVM_PFN_ERR_FAULT,
    KVM_PFN_NOSLOT,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    PageFault,
)
from tdxlab.kvm.params import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    KVM_X86_TDX_VM,
    MmuParams,
)
from tdxlab.kvm.roots import KVM_DIRECT_ROOTS, kvm_mmu_unload, kvm_tdp_mmu_invalidate_roots
from tdxlab.kvm.slots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
    KVM_MEMSLOT_INVALID,
)
from tdxlab.kvm.spte import FROZEN_SPTE, is_executable_pte, is_writable_pte, spte_to_pfn
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_fast_pf_get_last_sptep
from tdxlab.kvm.vm import MemoryFault
from tdxlab.steps import Operation, run
from tests.kvm.fault_scene import PRIVATE_CODE, PRIVATE_PFN, READ_CODE, SHARED_PFN, FaultScene

WRITE_CODE = READ_CODE | PFERR_WRITE_MASK
MMIO_CODE = READ_CODE | PFERR_RSVD_MASK
#: asm-generic/errno.h; Python's errno has no name for it.
EHWPOISON = 133
BASE, GFN = 0x1000, 0x1005
HOLE = 0x5000


def td_scene(private: bool = True) -> FaultScene:
    scene = FaultScene(KVM_X86_TDX_VM)
    scene.add_slot(BASE, 0x400, KVM_MEM_GUEST_MEMFD)
    scene.set_private(BASE, BASE + 0x400, private)
    return scene


def plain_scene(flags: int = 0, params: MmuParams | None = None) -> FaultScene:
    scene = FaultScene(params=params)
    scene.add_slot(BASE, 0x400, flags)
    return scene


def fault_in(scene: FaultScene, gpa: int, code: int = READ_CODE) -> tuple[int, int]:
    """(what the fault returned, its goal level)."""
    result: tuple[int, int] = run(kvm_mmu_do_page_fault(scene.vcpu, gpa, code))
    return result


def a_fault(scene: FaultScene, gfn: int, code: int = READ_CODE) -> PageFault:
    """A fault as `kvm_mmu_do_page_fault` fills it in. gfn: with the shared bit or without."""
    fault = PageFault.from_error_code(gfn << 12, code)
    fault.gfn = gfn & ~scene.vm.gfn_direct_bits
    fault.slot = scene.vm.slots.find(fault.gfn)
    return fault


def stop_at(operation: Operation, label: str) -> Operation:
    """The operation, driven up to the first step of that label."""
    while next(operation)[0] != label:
        pass
    return operation


def invalidate(scene: FaultScene, start: int, end: int) -> None:
    kvm_mmu_invalidate_begin(scene.vm)
    kvm_mmu_invalidate_range_add(scene.vm, start, end)
    kvm_mmu_invalidate_end(scene.vm)


# -- whole faults


def test_kvm_mmu_do_page_fault_fixed_maps_a_private_page_in_the_mirror() -> None:
    scene = td_scene()
    assert fault_in(scene, GFN << 12, PRIVATE_CODE) == (RET_PF_FIXED, 1)
    assert scene.hooks.calls == [
        ("link", 0, 4),
        ("link", 0, 3),
        ("link", BASE, 2),
        ("set", GFN, 1),
    ]
    level, spte = scene.spte(GFN << 12)
    assert (level, spte_to_pfn(spte)) == (1, PRIVATE_PFN + GFN)


def test_kvm_mmu_do_page_fault_fixed_maps_a_shared_page_in_the_direct_root() -> None:
    scene = td_scene(private=False)
    assert fault_in(scene, scene.shared_gpa(GFN)) == (RET_PF_FIXED, 2)
    assert scene.hooks.calls == []
    level, spte = scene.spte(scene.shared_gpa(GFN))
    assert (level, spte_to_pfn(spte)) == (2, SHARED_PFN + BASE)


def test_kvm_mmu_do_page_fault_spurious_when_it_is_mapped_already() -> None:
    scene = td_scene()
    fault_in(scene, GFN << 12, PRIVATE_CODE)
    assert fault_in(scene, GFN << 12, PRIVATE_CODE) == (RET_PF_SPURIOUS, 1)


def test_kvm_mmu_do_page_fault_retry_when_a_hook_is_busy() -> None:
    scene = td_scene()
    scene.hooks.errors = [-EBUSY]
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == RET_PF_RETRY
    assert scene.spte(GFN << 12) == (4, 1 << 63)


def test_kvm_mmu_do_page_fault_takes_the_fast_path_before_it_needs_a_page() -> None:
    scene = plain_scene()
    fault_in(scene, GFN << 12)
    scene.vcpu.page_cache = ()
    code = WRITE_CODE | PFERR_PRESENT_MASK
    assert fault_in(scene, GFN << 12, code)[0] == RET_PF_SPURIOUS
    assert scene.vcpu.page_cache == ()


def test_kvm_mmu_do_page_fault_enomem_comes_before_any_look_at_the_page() -> None:
    scene = FaultScene(KVM_X86_TDX_VM, free_pages=2 * CAPACITY)
    scene.vcpu.page_cache = ()
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == -ENOMEM
    assert scene.vcpu.memory_fault is None


def test_kvm_mmu_do_page_fault_leaves_mmu_lock_free_however_it_ends() -> None:
    scene = td_scene()
    fault = kvm_mmu_do_page_fault(scene.vcpu, GFN << 12, PRIVATE_CODE)
    stop_at(fault, "link")
    assert scene.vm.mmu_lock.held(READ)
    fault.close()
    assert not scene.vm.mmu_lock.held(READ)
    fault_in(scene, GFN << 12, PRIVATE_CODE)
    assert not scene.vm.mmu_lock.held(READ)


# -- races with an invalidation


@pytest.mark.parametrize("label", ["faultin_pfn", "read_lock(mmu_lock)"])
def test_kvm_mmu_do_page_fault_retry_when_anything_is_invalidated_meanwhile(label: str) -> None:
    scene = td_scene()
    fault = stop_at(kvm_mmu_do_page_fault(scene.vcpu, GFN << 12, PRIVATE_CODE), label)
    invalidate(scene, HOLE, HOLE + 1)
    assert run(fault) == (RET_PF_RETRY, 1)
    assert scene.hooks.calls == []


def test_kvm_mmu_do_page_fault_retry_when_attributes_change_behind_its_check() -> None:
    scene = td_scene()
    fault = stop_at(kvm_mmu_do_page_fault(scene.vcpu, GFN << 12, PRIVATE_CODE), "faultin_pfn")
    scene.set_private(GFN, GFN + 1, private=False)
    invalidate(scene, GFN, GFN + 1)
    assert run(fault)[0] == RET_PF_RETRY
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == -EFAULT


@pytest.mark.parametrize(("start", "ret"), [(GFN, RET_PF_RETRY), (GFN + 1, RET_PF_FIXED)])
def test_kvm_mmu_do_page_fault_retry_only_inside_an_open_range(start: int, ret: int) -> None:
    scene = td_scene()
    kvm_mmu_invalidate_begin(scene.vm)
    kvm_mmu_invalidate_range_add(scene.vm, start, start + 1)
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == ret


def test_is_page_fault_stale_when_the_direct_root_is_obsolete_even_for_the_mirror() -> None:
    scene = td_scene()
    fault = a_fault(scene, GFN, PRIVATE_CODE)
    assert not is_page_fault_stale(scene.vcpu, fault)
    kvm_tdp_mmu_invalidate_roots(scene.vm, KVM_DIRECT_ROOTS)
    assert is_page_fault_stale(scene.vcpu, fault)
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == RET_PF_RETRY


def test_is_page_fault_stale_never_by_sequence_without_a_slot() -> None:
    scene = plain_scene()
    fault = a_fault(scene, HOLE)
    invalidate(scene, HOLE, HOLE + 1)
    assert not is_page_fault_stale(scene.vcpu, fault)
    assert is_page_fault_stale(scene.vcpu, a_fault(scene, GFN))


# -- which page


def test_kvm_mmu_faultin_pfn_kills_the_vm_when_the_gfn_has_the_shared_bit() -> None:
    scene = td_scene()
    fault = a_fault(scene, GFN)
    fault.gfn |= scene.vm.gfn_direct_bits
    assert run(kvm_mmu_faultin_pfn(scene.vcpu, fault)) == -EFAULT
    assert scene.vm.vm_dead
    assert scene.vcpu.memory_fault is None


@pytest.mark.parametrize(("private", "flags"), [(True, 0), (False, 8)])
def test_kvm_mmu_faultin_pfn_efault_with_an_exit_when_the_gfn_is_of_the_other_kind(
    private: bool, flags: int
) -> None:
    scene = td_scene(private)
    gpa, code = (scene.shared_gpa(GFN), READ_CODE) if private else (GFN << 12, PRIVATE_CODE)
    assert fault_in(scene, gpa, code)[0] == -EFAULT
    assert scene.vcpu.memory_fault == MemoryFault(GFN << 12, 4096, flags)


def test_kvm_mmu_faultin_pfn_checks_the_kind_before_the_slot() -> None:
    scene = td_scene()
    scene.set_private(HOLE, HOLE + 1)
    assert fault_in(scene, scene.shared_gpa(HOLE))[0] == -EFAULT
    assert scene.vcpu.memory_fault == MemoryFault(HOLE << 12, 4096, 0)


def test_kvm_mmu_faultin_pfn_efault_with_an_exit_for_private_memory_without_slot() -> None:
    scene = td_scene()
    scene.set_private(HOLE, HOLE + 1)
    assert fault_in(scene, HOLE << 12, PRIVATE_CODE)[0] == -EFAULT
    assert scene.vcpu.memory_fault == MemoryFault(HOLE << 12, 4096, 8)


def test_kvm_mmu_faultin_pfn_efault_with_an_exit_for_a_slot_without_guest_memfd() -> None:
    scene = FaultScene(KVM_X86_TDX_VM)
    scene.add_slot(BASE, 0x400)
    scene.set_private(GFN, GFN + 1)
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == -EFAULT
    assert scene.vcpu.memory_fault == MemoryFault(GFN << 12, 4096, 8)


def test_kvm_mmu_faultin_pfn_returns_the_errno_of_guest_memfd_with_an_exit() -> None:
    scene = td_scene()
    scene.guest_memory.error = -EHWPOISON
    assert fault_in(scene, GFN << 12, PRIVATE_CODE)[0] == -EHWPOISON
    assert scene.vcpu.memory_fault == MemoryFault(GFN << 12, 4096, 8)


def test_kvm_mmu_faultin_pfn_retry_while_the_slot_is_being_deleted() -> None:
    scene = plain_scene()
    slot = scene.vm.slots.find(GFN)
    assert slot is not None
    scene.put_slot(slot, slot._replace(flags=KVM_MEMSLOT_INVALID))
    scene.user_memory.mapped = False
    assert fault_in(scene, GFN << 12)[0] == RET_PF_RETRY


def test_kvm_mmu_faultin_pfn_limits_private_memory_to_4k() -> None:
    scene = FaultScene(KVM_X86_SW_PROTECTED_VM)
    scene.add_slot(BASE, 0x400, KVM_MEM_GUEST_MEMFD)
    scene.set_private(BASE, BASE + 0x400)
    fault = a_fault(scene, GFN, PRIVATE_CODE)
    assert run(kvm_mmu_faultin_pfn(scene.vcpu, fault)) == RET_PF_CONTINUE
    assert (fault.pfn, fault.max_level, fault.map_writable) == (PRIVATE_PFN + GFN, 1, True)


def test_kvm_mmu_faultin_pfn_efault_without_exit_where_user_space_has_nothing() -> None:
    scene = plain_scene()
    scene.user_memory.mapped = False
    assert fault_in(scene, GFN << 12)[0] == -EFAULT
    assert scene.vcpu.memory_fault is None


def test_kvm_mmu_faultin_pfn_emulates_writes_to_a_read_only_slot() -> None:
    scene = plain_scene(KVM_MEM_READONLY)
    assert fault_in(scene, GFN << 12, WRITE_CODE)[0] == RET_PF_EMULATE
    assert fault_in(scene, GFN << 12)[0] == RET_PF_FIXED
    assert not is_writable_pte(scene.spte(GFN << 12)[1])


def test_kvm_mmu_faultin_pfn_maps_read_only_what_the_host_may_not_write() -> None:
    scene = plain_scene()
    scene.user_memory.writable = False
    assert fault_in(scene, GFN << 12)[0] == RET_PF_FIXED
    assert not is_writable_pte(scene.spte(GFN << 12)[1])


# -- MMIO


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


# -- kvm_mmu_page_fault


def test_kvm_mmu_page_fault_counts_what_came_of_it() -> None:
    scene = plain_scene()
    codes = [(GFN, READ_CODE), (GFN, READ_CODE), (HOLE, READ_CODE), (HOLE, MMIO_CODE)]
    found = [run(kvm_mmu_page_fault(scene.vcpu, gfn << 12, code)) for gfn, code in codes]
    assert found == [RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_EMULATE, RET_PF_EMULATE]
    stats = scene.vcpu.stats
    names = ("pf_taken", "pf_fixed", "pf_spurious", "pf_emulate")
    assert [stats[name] for name in names] == [3, 1, 1, 1]


def test_kvm_mmu_page_fault_retry_and_warns_without_root() -> None:
    scene = plain_scene()
    kvm_mmu_unload(scene.vcpu)
    assert run(kvm_mmu_page_fault(scene.vcpu, GFN << 12, READ_CODE)) == RET_PF_RETRY
    assert scene.said("warn")
    assert scene.vcpu.stats["pf_taken"] == 0


def test_kvm_mmu_page_fault_efault_for_a_misconfiguration_of_private_memory() -> None:
    scene = td_scene()
    code = MMIO_CODE | PFERR_PRIVATE_ACCESS
    assert run(kvm_mmu_page_fault(scene.vcpu, GFN << 12, code)) == -EFAULT
    assert scene.said("warn")


def test_kvm_mmu_page_fault_maps_the_page_when_a_slot_came_over_the_mmio() -> None:
    scene = plain_scene()
    fault_in(scene, HOLE << 12)
    scene.add_slot(HOLE, 1)
    assert run(kvm_mmu_page_fault(scene.vcpu, HOLE << 12, MMIO_CODE)) == RET_PF_FIXED
    assert scene.vcpu.stats["pf_taken"] == 1


def test_kvm_mmu_page_fault_retry_when_the_mmio_spte_is_gone() -> None:
    scene = plain_scene()
    assert run(kvm_mmu_page_fault(scene.vcpu, HOLE << 12, MMIO_CODE)) == RET_PF_RETRY
    assert scene.vcpu.stats["pf_taken"] == 0


@pytest.mark.parametrize(
    ("vm_type", "ret"),
    [(KVM_X86_SW_PROTECTED_VM, RET_PF_FIXED), (KVM_X86_DEFAULT_VM, -EFAULT)],
)
def test_kvm_mmu_page_fault_asks_the_attributes_only_for_software_protected_vms(
    vm_type: int, ret: int
) -> None:
    scene = FaultScene(vm_type)
    scene.add_slot(BASE, 0x400, KVM_MEM_GUEST_MEMFD)
    scene.set_private(GFN, GFN + 1)
    assert run(kvm_mmu_page_fault(scene.vcpu, GFN << 12, READ_CODE)) == ret


# -- levels


@pytest.mark.parametrize("host_level", [1, 2, 3])
def test_kvm_mmu_hugepage_adjust_follows_the_host_up_to_what_the_slot_holds(
    host_level: int,
) -> None:
    scene = plain_scene()
    scene.user_memory.level = host_level
    assert fault_in(scene, GFN << 12) == (RET_PF_FIXED, min(host_level, 2))


def test_kvm_mmu_hugepage_adjust_stays_at_4k_when_writes_are_logged() -> None:
    assert fault_in(plain_scene(KVM_MEM_LOG_DIRTY_PAGES), GFN << 12) == (RET_PF_FIXED, 1)


@pytest.mark.parametrize("pfn", [KVM_PFN_NOSLOT, KVM_PFN_ERR_FAULT])
def test_kvm_mmu_hugepage_adjust_leaves_alone_what_has_no_page(pfn: int) -> None:
    scene = plain_scene()
    fault = a_fault(scene, GFN)
    fault.pfn = pfn
    kvm_mmu_hugepage_adjust(scene.vcpu, fault)
    assert (fault.pfn, fault.req_level, fault.goal_level) == (pfn, 1, 1)


def test_kvm_mmu_hugepage_adjust_keeps_fetches_off_large_pages_but_says_what_they_cost() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    fault = a_fault(scene, GFN, READ_CODE | PFERR_FETCH_MASK)
    fault.nx_huge_page_workaround_enabled = True
    fault.pfn = SHARED_PFN + GFN
    kvm_mmu_hugepage_adjust(scene.vcpu, fault)
    assert fault.huge_page_disallowed
    assert (fault.pfn, fault.req_level, fault.goal_level) == (SHARED_PFN + GFN, 2, 1)


def test_disallowed_hugepage_adjust_keeps_a_read_out_of_a_table_made_for_fetches() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    assert fault_in(scene, GFN << 12, READ_CODE | PFERR_FETCH_MASK) == (RET_PF_FIXED, 1)
    assert scene.vm.stats["nx_lpage_splits"] == 1
    assert fault_in(scene, GFN + 1 << 12) == (RET_PF_FIXED, 1)
    level, spte = scene.spte(GFN + 1 << 12)
    assert (level, spte_to_pfn(spte), is_executable_pte(spte)) == (1, SHARED_PFN + GFN + 1, True)


def test_disallowed_hugepage_adjust_changes_nothing_above_the_goal() -> None:
    scene = plain_scene()
    fault = a_fault(scene, GFN)
    fault.goal_level, fault.pfn = 2, SHARED_PFN
    disallowed_hugepage_adjust(scene.vm, fault, 1 << 63, 3)
    disallowed_hugepage_adjust(scene.vm, fault, 1 << 63, 2)
    assert (fault.goal_level, fault.pfn) == (2, SHARED_PFN)


# -- mapping ahead


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
