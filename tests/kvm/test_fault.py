"""Tests of the way of a page fault, from the error code to what it returns."""

from errno import EBUSY, EFAULT, ENOMEM

import pytest

from tdxlab.kvm.caches import CAPACITY
from tdxlab.kvm.fault import (
    __kvm_mmu_faultin_pfn,
    is_page_fault_stale,
    kvm_mmu_do_page_fault,
    kvm_mmu_faultin_pfn,
    kvm_mmu_page_fault,
)
from tdxlab.kvm.locks import READ
from tdxlab.kvm.notifier import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.page_fault import (
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_RSVD_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from tdxlab.kvm.params import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    KVM_X86_TDX_VM,
)
from tdxlab.kvm.roots import KVM_DIRECT_ROOTS, kvm_mmu_unload, kvm_tdp_mmu_invalidate_roots
from tdxlab.kvm.slots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
)
from tdxlab.kvm.spte import is_writable_pte, spte_to_pfn
from tdxlab.kvm.vm import MemoryFault
from tdxlab.steps import run
from tests.kvm.fault_scene import (
    BASE,
    GFN,
    HOLE,
    PRIVATE_CODE,
    PRIVATE_PFN,
    READ_CODE,
    SHARED_PFN,
    WRITE_CODE,
    FaultScene,
    a_fault,
    fault_in,
    invalidate,
    plain_scene,
    stop_at,
    td_scene,
)

#: asm-generic/errno.h; Python's errno has no name for it.
EHWPOISON = 133
MMIO_CODE = READ_CODE | PFERR_RSVD_MASK


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
    assert kvm_mmu_faultin_pfn(scene.vcpu, fault) == -EFAULT
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
    assert fault.slot is not None
    assert kvm_mmu_faultin_pfn(scene.vcpu, fault) == RET_PF_CONTINUE
    assert __kvm_mmu_faultin_pfn(scene.vcpu, fault, fault.slot) == RET_PF_CONTINUE
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
