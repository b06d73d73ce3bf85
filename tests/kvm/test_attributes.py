"""Memory attributes: the store against a plain set of gfns, the ioctl, and what it zaps."""

import random
from errno import EFAULT, EINVAL
from itertools import pairwise

import pytest
from fault_scene import HVA
from slots_scene import WRITE_CODE, SlotScene

from tdxlab.journal import Journal
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE, MemAttributes
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.page_fault import RET_PF_FIXED, RET_PF_RETRY
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM
from tdxlab.kvm.set_attributes import kvm_vm_ioctl_set_mem_attributes, kvm_vm_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.steps import Schedule, run, seeded

PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE


def td(slot=(0, 0x400)):
    """A TD with one guest_memfd slot, whose shared memory is mapped in 4 KiB pages."""
    scene = SlotScene(KVM_X86_TDX_VM)
    base, npages = slot
    scene.process.mmap(HVA + (base << 12), npages << 12)
    assert scene.set(0, base, npages, KVM_MEM_GUEST_MEMFD) == 0
    return scene


def convert(scene, start, end, *, private):
    return run(kvm_vm_set_mem_attributes(scene.vm, start, end, private=private))


@pytest.mark.parametrize("seed", range(6))
def test_store_agrees_with_a_set_of_gfns_after_any_changes(seed):
    draw = random.Random(seed)
    attributes, expected, size = MemAttributes(Journal()), set(), 2048
    for _ in range(120):
        unit = draw.choice((1, 7, 512))
        start = draw.randrange(0, size, unit)
        end = min(size, start + unit * draw.randint(1, 3))
        private = draw.random() < 0.5
        attributes.store(start, end, private=private)
        (expected.update if private else expected.difference_update)(range(start, end))
        low = draw.randrange(size)
        high = draw.randint(low + 1, size)
        kinds = {gfn in expected for gfn in range(low, high)}
        for kind in (True, False):
            uniform = attributes.range_has_attrs(low, high, -1, PRIVATE if kind else 0)
            assert uniform == (kinds == {kind})
        assert [gfn for gfn in range(size) if attributes.is_private(gfn)] == sorted(expected)
        runs = list(attributes.runs(low, high))
        assert [g for s, e, kind in runs if kind for g in range(s, e)] == [
            gfn for gfn in range(low, high) if gfn in expected
        ]
        assert all(a[1] == b[0] and a[2] != b[2] for a, b in pairwise(runs))


def test_store_comes_back_to_nothing_when_everything_is_shared_again():
    journal = Journal()
    attributes = MemAttributes(journal)
    attributes.store(5, 1500, private=True)
    attributes.store(0, 2048, private=False)
    assert list(attributes.runs(0, 1 << 40)) == [(0, 1 << 40, False)]


def test_store_keeps_a_terabyte_as_one_entry():
    attributes = MemAttributes(Journal())
    attributes.store(0, 1 << 28, private=True)
    assert attributes._toggles == (0, 1 << 19)
    assert attributes.range_has_attrs(0, 1 << 28, -1, PRIVATE)
    assert not attributes.is_private(1 << 28)


def test_range_has_attrs_looks_only_at_the_bits_of_the_mask():
    attributes = MemAttributes(Journal())
    attributes.store(0, 1, private=True)
    assert attributes.range_has_attrs(0, 2, 0, 0)
    assert not attributes.range_has_attrs(0, 2, PRIVATE, 0)
    assert attributes.get(0) == PRIVATE
    assert attributes.get(1) == 0


@pytest.mark.parametrize(
    ("vm_type", "arguments", "ret"),
    [
        (KVM_X86_TDX_VM, (0, 0x1000, PRIVATE), 0),
        (KVM_X86_SW_PROTECTED_VM, (0, 0x1000, 0), 0),
        (0, (0, 0x1000, 0), 0),
        (0, (0, 0x1000, PRIVATE), -EINVAL),
        (KVM_X86_TDX_VM, (0, 0x1000, 1), -EINVAL),
        (KVM_X86_TDX_VM, (0, 0x1000, PRIVATE, 1), -EINVAL),
        (KVM_X86_TDX_VM, (0, 0, PRIVATE), -EINVAL),
        (KVM_X86_TDX_VM, ((1 << 64) - 0x1000, 0x1000, PRIVATE), -EINVAL),
        (KVM_X86_TDX_VM, (8, 0x1000, PRIVATE), -EINVAL),
        (KVM_X86_TDX_VM, (0, 0x1008, PRIVATE), -EINVAL),
    ],
)
def test_kvm_vm_ioctl_set_mem_attributes_checks_its_arguments(vm_type, arguments, ret):
    scene = SlotScene(vm_type)
    assert run(kvm_vm_ioctl_set_mem_attributes(scene.vm, *arguments)) == ret
    assert scene.vm.attributes.is_private(0) == (ret == 0 and arguments[2] == PRIVATE)


def test_kvm_vm_set_mem_attributes_does_nothing_where_all_is_as_wanted():
    scene = td()
    scene.access(3)
    before = scene.digest()
    assert convert(scene, 0, 0x400, private=False) == 0
    assert scene.digest() == before


def test_kvm_vm_set_mem_attributes_unmaps_shared_pages_of_a_range_that_becomes_private():
    scene = td()
    assert scene.access(3) == scene.access(4) == RET_PF_FIXED
    scene.events.clear()
    assert convert(scene, 3, 4, private=True) == 0
    assert (scene.level(3), scene.level(4)) == (0, 1)
    assert scene.said("kvm_flush_remote_tlbs") == [("kvm_flush_remote_tlbs",)]
    assert scene.hooks.calls == []
    assert (scene.vm.mmu_invalidate_seq, scene.vm.mmu_invalidate_in_progress) == (1, 0)


def test_kvm_vm_set_mem_attributes_removes_private_pages_of_a_range_that_becomes_shared():
    scene = td()
    convert(scene, 0, 0x400, private=True)
    assert scene.access(3, private=True) == scene.access(4, private=True) == RET_PF_FIXED
    scene.hooks.calls.clear()
    assert convert(scene, 3, 4, private=False) == 0
    assert scene.hooks.calls == [("remove", 3, 1)]
    assert (scene.level(3, private=True), scene.level(4, private=True)) == (0, 1)


def test_kvm_vm_set_mem_attributes_changes_gfns_without_a_slot_and_invalidates_nothing():
    scene = td()
    scene.events.clear()
    assert convert(scene, 0x1000, 0x2000, private=True) == 0
    assert scene.vm.attributes.is_private(0x1FFF)
    assert scene.vm.mmu_invalidate_seq == 0
    assert scene.events == []


def test_kvm_vm_set_mem_attributes_invalidates_large_pages_that_stick_out_of_the_range():
    scene = td()
    schedule = Schedule([kvm_vm_set_mem_attributes(scene.vm, 100, 612, private=True)])
    while schedule.labels.get(0, ("",))[0] != "store attributes":
        assert schedule.advance(0)
    vm = scene.vm
    assert vm.mmu_invalidate_in_progress == 1
    assert (vm.mmu_invalidate_range_start, vm.mmu_invalidate_range_end) == (0, 0x400)
    while schedule.advance(0):
        pass
    assert vm.mmu_invalidate_in_progress == 0


def test_kvm_vm_set_mem_attributes_leaves_out_large_pages_that_were_mixed_before():
    scene = td()
    convert(scene, 10, 20, private=True)
    schedule = Schedule([kvm_vm_set_mem_attributes(scene.vm, 30, 40, private=True)])
    while schedule.labels.get(0, ("",))[0] != "store attributes":
        assert schedule.advance(0)
    vm = scene.vm
    assert (vm.mmu_invalidate_range_start, vm.mmu_invalidate_range_end) == (30, 40)
    schedule.close()


@pytest.mark.parametrize("seed", range(40))
def test_kvm_vm_set_mem_attributes_leaves_no_shared_page_behind_whoever_moves_first(seed):
    scene = td()
    change = kvm_vm_set_mem_attributes(scene.vm, 3, 4, private=True)
    fault = kvm_mmu_page_fault(scene.vcpu, scene.shared_gpa(3), WRITE_CODE)
    results = seeded([change, fault], seed).results
    assert results[0] == 0
    assert results[1] in (RET_PF_FIXED, RET_PF_RETRY, -EFAULT)
    assert scene.level(3) == 0
    assert scene.vm.mmu_invalidate_in_progress == 0


def test_kvm_vm_set_mem_attributes_invalidates_a_large_page_of_which_the_range_is_the_beginning():
    scene = td()
    schedule = Schedule([kvm_vm_set_mem_attributes(scene.vm, 0x200, 0x228, private=True)])
    while schedule.labels.get(0, ("",))[0] != "store attributes":
        assert schedule.advance(0)
    vm = scene.vm
    assert (vm.mmu_invalidate_range_start, vm.mmu_invalidate_range_end) == (0x200, 0x400)
    schedule.close()
