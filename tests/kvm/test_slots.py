"""Memslots: what the ioctl refuses, how sets of slots change, and what goes with a slot."""

from errno import EBADF, EEXIST, EINVAL

import pytest
from fault_scene import HVA
from slots_scene import WRITE_CODE, SlotScene

from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.memory_region import (
    USER_LIMIT,
    kvm_set_memory_region,
    kvm_vm_ioctl_set_memory_region,
)
from tdxlab.kvm.page_fault import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_RETRY
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM
from tdxlab.kvm.roots import kvm_mmu_reload
from tdxlab.kvm.slots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
    KVM_USER_MEM_SLOTS,
    MAX_NR_PAGES,
)
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.steps import WAIT, Schedule, run, seeded

GMEM = KVM_MEM_GUEST_MEMFD


def test_kvm_set_memory_region_creates_a_slot_that_is_found_by_its_gfns():
    scene = SlotScene()
    assert scene.set(3, 0x100, 0x80) == 0
    slots = scene.vm.slots
    found = slots.find(0x17F)
    assert found is not None
    assert (found.slot_id, found.base_gfn, found.npages) == (3, 0x100, 0x80)
    assert slots.find(0xFF) is slots.find(0x180) is slots.find(0x100, as_id=1) is None
    assert slots.nr_pages == 0x80


@pytest.mark.parametrize(
    ("vm_type", "flags", "ret"),
    [
        (0, KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES, 0),
        (0, GMEM, -EINVAL),
        (0, 1 << 3, -EINVAL),
        (KVM_X86_SW_PROTECTED_VM, GMEM, 0),
        (KVM_X86_SW_PROTECTED_VM, KVM_MEM_READONLY, 0),
        (KVM_X86_SW_PROTECTED_VM, GMEM | KVM_MEM_READONLY, -EINVAL),
        (KVM_X86_SW_PROTECTED_VM, GMEM | KVM_MEM_LOG_DIRTY_PAGES, -EINVAL),
        (KVM_X86_TDX_VM, GMEM, 0),
        (KVM_X86_TDX_VM, KVM_MEM_LOG_DIRTY_PAGES, 0),
        (KVM_X86_TDX_VM, KVM_MEM_READONLY, -EINVAL),
    ],
)
def test_kvm_set_memory_region_takes_the_flags_that_the_vm_type_has(vm_type, flags, ret):
    assert SlotScene(vm_type).set(0, 0, 0x40, flags) == ret


@pytest.mark.parametrize(
    ("base", "npages", "others"),
    [
        (0, 1, {"as_id": 2}),
        (0, 1, {"hva": HVA + 1}),
        (0, 1, {"hva": USER_LIMIT}),
        (0, MAX_NR_PAGES + 1, {}),
        ((1 << 52) - 1, 1, {"hva": HVA}),
        (1 << 40, 1, {"hva": HVA}),
    ],
)
def test_kvm_set_memory_region_is_invalid_beyond_every_limit(base, npages, others):
    scene = SlotScene()
    assert scene.set(0, base, npages, **others) == -EINVAL
    assert scene.set(KVM_USER_MEM_SLOTS, 0, 1) == -EINVAL
    assert scene.vm.slots.all() == ()
    assert scene.vm.slots.generation == 0


def test_kvm_set_memory_region_is_invalid_with_the_shared_bit_in_a_gfn():
    scene = SlotScene(KVM_X86_TDX_VM)
    bit = scene.vm.gfn_direct_bits
    assert scene.set(0, bit - 1, 2, hva=HVA) == -EINVAL
    assert scene.set(0, bit - 1, 1, hva=HVA) == 0


@pytest.mark.parametrize(
    ("arguments", "ret"),
    [
        ((0, 0x1000, 0x1000, 0, HVA), 0),
        ((1 << 16, 0x1000, 0x1000, 0, HVA), 0),
        ((0, 0x1001, 0x1000, 0, HVA), -EINVAL),
        ((0, 0x1000, 0x1008, 0, HVA), -EINVAL),
        ((0, 0x1000, 0x1000, 0, HVA + 8), -EINVAL),
        ((0xFFFF, 0x1000, 0x1000, 0, HVA), -EINVAL),
        ((0, 0x1000, 0x1000, 1 << 5, HVA), -EINVAL),
    ],
)
def test_kvm_vm_ioctl_set_memory_region_wants_whole_pages(arguments, ret):
    scene = SlotScene()
    assert run(kvm_vm_ioctl_set_memory_region(scene.vm, *arguments)) == ret


def test_kvm_set_memory_region_fails_where_another_slot_is():
    scene = SlotScene()
    assert scene.set(0, 0x100, 0x100) == 0
    assert scene.set(1, 0x1FF, 1) == -EEXIST
    assert scene.set(1, 0x1FF, 1, as_id=1) == 0
    assert scene.set(1, 0x200, 1) == 0


def test_kvm_set_memory_region_refuses_to_change_size_address_or_readonly():
    scene = SlotScene()
    assert scene.set(0, 0x100, 0x100) == 0
    assert scene.set(0, 0x100, 0x80) == -EINVAL
    assert scene.set(0, 0x100, 0x100, hva=HVA) == -EINVAL
    assert scene.set(0, 0x100, 0x100, KVM_MEM_READONLY) == -EINVAL
    assert scene.delete(1) == -EINVAL


def test_kvm_set_memory_region_changes_nothing_where_nothing_differs():
    scene = SlotScene()
    scene.set(0, 0x100, 0x100)
    before = scene.digest()
    assert scene.set(0, 0x100, 0x100) == 0
    assert scene.digest() == before


def test_kvm_set_memory_region_refuses_any_change_to_a_guest_memfd_slot_but_deletion():
    scene = SlotScene(KVM_X86_TDX_VM)
    assert scene.set(0, 0x100, 0x40, GMEM) == 0
    assert scene.set(0, 0x100, 0x40, GMEM) == -EINVAL
    assert scene.set(0, 0x200, 0x40, GMEM, hva=HVA + 0x100000) == -EINVAL
    assert scene.delete(0) == 0


def test_kvm_set_memory_region_fails_with_a_file_that_is_not_there_or_too_small():
    scene = SlotScene(KVM_X86_TDX_VM)
    assert scene.set(0, 0, 1, GMEM, gmem=7) == -EBADF
    assert scene.set(0, 0, 2, GMEM, gmem_pgoff=1023) == -EINVAL
    assert scene.set(0, 0, 1, GMEM, gmem_pgoff=1023) == 0
    assert scene.set(1, 8, 2, GMEM, gmem_pgoff=1022) == -EINVAL


def test_kvm_set_memory_region_frees_the_file_again_where_the_slot_is_refused():
    scene = SlotScene(KVM_X86_TDX_VM)
    bit = scene.vm.gfn_direct_bits
    assert scene.set(0, bit, 4, GMEM, hva=HVA, gmem_pgoff=0) == -EINVAL
    assert scene.set(0, 0, 4, GMEM, gmem_pgoff=0) == 0


@pytest.mark.parametrize(
    ("vm_type", "created", "deleted"), [(0, 2, 6), (KVM_X86_SW_PROTECTED_VM, 1, 3)]
)
def test_generation_goes_up_by_the_number_of_address_spaces_per_swap(vm_type, created, deleted):
    scene = SlotScene(vm_type)
    scene.set(0, 0, 0x40)
    assert scene.vm.slots.generation == created
    scene.delete(0)
    assert scene.vm.slots.generation == deleted


def test_generations_of_two_address_spaces_never_meet():
    scene = SlotScene()
    scene.set(0, 0, 1)
    scene.set(0, 0, 1, as_id=1)
    assert (scene.vm.slots.generation_of(0), scene.vm.slots.generation_of(1)) == (2, 3)


def test_kvm_set_memory_region_zaps_all_where_the_generation_of_mmio_sptes_starts_again():
    scene = SlotScene()
    scene.vm.slots.generation = (1 << 19) - 4
    scene.set(0, 0, 1)
    assert scene.vm.mmu_valid_gen == 0
    scene.set(1, 1, 1)
    assert scene.vm.mmu_valid_gen == 1


def test_kvm_set_memory_region_moves_a_slot_with_nothing_of_it_mapped():
    scene = SlotScene(KVM_X86_SW_PROTECTED_VM)
    scene.process.mmap(HVA, 0x40000)
    scene.set(0, 0, 0x40, hva=HVA)
    assert scene.access(3) == RET_PF_FIXED
    assert scene.set(0, 0x20, 0x40, hva=HVA) == 0
    assert scene.level(3) == 0
    moved = scene.vm.slots.by_id(0)
    assert moved is not None
    assert moved.base_gfn == 0x20
    assert scene.vm.slots.nr_pages == 0x40


def test_kvm_set_memory_region_brings_a_slot_back_that_it_cannot_move():
    scene = SlotScene(KVM_X86_SW_PROTECTED_VM)
    scene.process.mmap(HVA, 0x40000)
    scene.set(0, 0, 0x40, hva=HVA)
    slot = scene.vm.slots.by_id(0)
    scene.access(3)
    assert scene.set(0, 1 << 41, 0x40, hva=HVA) == -EINVAL
    assert scene.vm.slots.by_id(0) == slot
    assert scene.level(3) == 0
    assert scene.vm.slots.generation == 3


def test_kvm_set_memory_region_deletes_a_slot_in_two_swaps_and_faults_retry_in_between():
    scene = SlotScene(KVM_X86_SW_PROTECTED_VM)
    scene.process.mmap(HVA, 0x40000)
    scene.set(0, 0, 0x40)
    schedule = Schedule([kvm_set_memory_region(scene.vm, 0, 0, 0, 0, HVA)])
    while schedule.labels.get(0, ("",))[0] != "synchronize_srcu(srcu)":
        assert schedule.advance(0)
    found = scene.vm.slots.find(0)
    assert found is not None
    assert found.is_invalid
    assert scene.vm.slots.generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
    assert scene.access(0) == RET_PF_RETRY
    while schedule.advance(0):
        pass
    assert schedule.results[0] == 0
    assert scene.vm.slots.find(0) is None
    assert scene.vm.slots.nr_pages == 0


def test_kvm_set_memory_region_waits_for_readers_of_the_old_slots():
    scene = SlotScene()
    reader = scene.vm.srcu.read_lock()
    schedule = Schedule([kvm_set_memory_region(scene.vm, 0, 0, 1, 0, HVA)])
    for _ in range(9):
        schedule.advance(0)
    assert schedule.labels[0] == (WAIT, "srcu")
    later = scene.vm.srcu.read_lock()
    scene.vm.srcu.read_unlock(reader)
    while schedule.advance(0):
        pass
    scene.vm.srcu.read_unlock(later)
    assert schedule.results == {0: 0}


def test_kvm_set_memory_region_waits_while_an_mmu_notifier_is_between_start_and_end():
    scene = SlotScene()
    scene.vm.slots.mn_active_invalidate_count += 1
    schedule = Schedule([kvm_set_memory_region(scene.vm, 0, 0, 1, 0, HVA)])
    for _ in range(5):
        schedule.advance(0)
    assert schedule.labels[0] == (WAIT, "mn_active_invalidate_count")
    assert scene.vm.slots.all() == ()
    scene.vm.slots.mn_active_invalidate_count -= 1
    while schedule.advance(0):
        pass
    assert len(scene.vm.slots.all()) == 1


def test_kvm_set_memory_region_keeps_two_callers_apart():
    scene = SlotScene()
    calls = [kvm_set_memory_region(scene.vm, n, 0, 1, 0, HVA) for n in (0, 1)]
    schedule = Schedule(calls)
    while len(schedule.ready) == 2:
        schedule.advance(0)
        if schedule.ready == [0, 1]:
            schedule.advance(1)
    assert schedule.labels[1] == (WAIT, "slots_lock")
    while schedule.advance(1):
        pass
    assert schedule.results == {0: 0, 1: -EEXIST}


def test_kvm_set_memory_region_is_taken_back_by_a_rewind():
    scene = SlotScene(KVM_X86_TDX_VM)
    before = scene.digest()
    mark = scene.journal.mark()
    scene.set(0, 0x100, 0x40, GMEM)
    assert scene.digest() != before
    scene.journal.rewind(mark)
    assert scene.digest() == before
    assert scene.set(0, 0x100, 0x40, GMEM) == 0


@pytest.mark.parametrize("vm_type", [0, KVM_X86_SW_PROTECTED_VM])
@pytest.mark.parametrize("seed", range(40))
def test_kvm_set_memory_region_deletes_with_no_mapping_left_whoever_moves_first(vm_type, seed):
    scene = SlotScene(vm_type)
    scene.process.mmap(HVA, 0x40000)
    scene.set(0, 0, 0x40)
    vm, gfn = scene.vm, 5

    def vcpu_exit():
        index = vm.srcu.read_lock()
        ret = yield from kvm_mmu_page_fault(scene.vcpu, gfn << 12, WRITE_CODE)
        vm.srcu.read_unlock(index)
        return ret

    deletion = kvm_set_memory_region(vm, 0, 0, 0, 0, HVA)
    results = seeded([deletion, vcpu_exit()], seed).results
    assert results[0] == 0
    assert results[1] in (RET_PF_FIXED, RET_PF_RETRY, RET_PF_EMULATE)
    run(kvm_mmu_reload(scene.vcpu))
    level, spte = scene.spte(gfn << 12)
    assert results[1] == RET_PF_EMULATE or not is_present_leaf(spte, level)
