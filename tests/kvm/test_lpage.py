"""How large a page a slot allows: alignment, ends, attributes, the host's mapping."""

import random

import pytest
from fault_scene import HVA
from slots_scene import SlotScene

from tdxlab.arch import SIZE_1G, SIZE_2M
from tdxlab.kvm.lpage import (
    hugepage_test_mixed,
    kvm_mmu_max_mapping_level,
    lpage_disallowed,
    max_mapping_level,
    slot_contains_hugepage,
)
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, HostPage
from tdxlab.steps import run

GIB = 1 << 18


class Hosted:
    """Everything is mapped, at one level."""

    def __init__(self, level):
        self.level = level

    def fault_in(self, hva, *, write):
        return HostPage(hva >> 12, True, self.level)

    def mapping_level(self, hva):
        return self.level


def made(base, npages, hva=HVA, level=3, vm_type=0, flags=0):
    scene = SlotScene(vm_type)
    scene.vm.user_memory = Hosted(level)
    if flags:
        scene.gmem = scene.files.create(npages << 12)
        assert scene.set(0, base, npages, flags, hva=hva, gmem_pgoff=0) == 0
    else:
        assert scene.set(0, base, npages, hva=hva) == 0
    return scene.vm, scene.vm.slots.by_id(0)


@pytest.mark.parametrize(
    ("base", "npages", "hva", "gfn", "level"),
    [
        (0, GIB, HVA, 0x100, 3),
        (0, GIB, HVA + 0x1000, 0x100, 1),
        (0, GIB, HVA + SIZE_2M, 0x100, 2),
        (0x200, GIB, HVA + SIZE_2M, 0x300, 2),
        (0x200, 2 * GIB, HVA + SIZE_2M, GIB, 3),
        (0x1F0, 0x400, HVA + 0x1F0000, 0x1FF, 1),
        (0x1F0, 0x400, HVA + 0x1F0000, 0x200, 2),
        (0x1F0, 0x400, HVA + 0x1F0000, 0x400, 1),
        (0, GIB - 1, HVA, GIB - 2, 1),
        (0, GIB - 1, HVA, 0, 2),
    ],
)
def test_kvm_mmu_max_mapping_level_follows_from_alignment_and_ends(base, npages, hva, gfn, level):
    vm, slot = made(base, npages, hva)
    assert HVA % SIZE_1G == 0
    assert kvm_mmu_max_mapping_level(vm, slot, gfn) == level


@pytest.mark.parametrize("level", [1, 2, 3])
def test_kvm_mmu_max_mapping_level_is_no_more_than_the_hosts_mapping(level):
    vm, slot = made(0, GIB, level=level)
    assert kvm_mmu_max_mapping_level(vm, slot, 5) == level
    assert max_mapping_level(vm, slot, 5, 3, True) == 3


def test_max_mapping_level_is_no_more_than_asked_for():
    vm, slot = made(0, GIB)
    assert [max_mapping_level(vm, slot, 5, level, False) for level in (1, 2, 3)] == [1, 2, 3]


def test_lpage_disallowed_follows_the_mixed_flags_of_both_levels():
    vm, slot = made(0, 2 * GIB, vm_type=KVM_X86_SW_PROTECTED_VM)
    run(kvm_vm_set_mem_attributes(vm, 100, 612, private=True))
    assert [lpage_disallowed(vm, slot, gfn, 2) for gfn in (0, 0x200, 0x400)] == [True, True, False]
    assert [lpage_disallowed(vm, slot, gfn, 3) for gfn in (0, GIB)] == [True, False]
    run(kvm_vm_set_mem_attributes(vm, 0, 100, private=True))
    run(kvm_vm_set_mem_attributes(vm, 612, 1024, private=True))
    assert not lpage_disallowed(vm, slot, 0, 2)
    assert lpage_disallowed(vm, slot, 0, 3)
    run(kvm_vm_set_mem_attributes(vm, 0, GIB, private=True))
    assert not lpage_disallowed(vm, slot, 0, 3)
    assert not vm.slots.mixed


@pytest.mark.parametrize("seed", range(4))
def test_hugepage_test_mixed_agrees_with_the_attributes_after_any_changes(seed):
    draw = random.Random(seed)
    base, npages = 0x1F0, 2 * GIB
    vm, slot = made(base, npages, HVA + (base << 12), vm_type=KVM_X86_SW_PROTECTED_VM)
    for _ in range(25):
        unit = draw.choice((1, 0x200, 0x10000))
        start = draw.randrange(0, base + npages, unit)
        end = start + unit * draw.randint(1, 3)
        run(kvm_vm_set_mem_attributes(vm, start, end, private=draw.random() < 0.5))
    expected = {
        (base, level, gfn)
        for level in (2, 3)
        for gfn in range(0, base + npages, 1 << 9 * (level - 1))
        if slot_contains_hugepage(slot, gfn, level)
        and len(list(vm.attributes.runs(gfn, gfn + (1 << 9 * (level - 1))))) > 1
    }
    assert set(vm.slots.mixed) == expected
    scene_slot = slot._replace(slot_id=1, base_gfn=base)
    assert hugepage_test_mixed(vm, scene_slot, 0x200, 2) == ((base, 2, 0x200) in expected)


def test_a_new_slot_notes_what_is_mixed_already_and_a_deleted_one_forgets_it():
    scene = SlotScene(KVM_X86_SW_PROTECTED_VM)
    vm = scene.vm
    run(kvm_vm_set_mem_attributes(vm, 0x210, 0x400, private=True))
    run(kvm_vm_set_mem_attributes(vm, 0x7F0, 0x900, private=True))
    assert not vm.slots.mixed
    scene.set(0, 0x100, 0x6F8)
    assert set(vm.slots.mixed) == {(0x100, 2, 0x200)}
    scene.set(1, 0x800, GIB, KVM_MEM_GUEST_MEMFD, gmem=scene.files.create(SIZE_1G), gmem_pgoff=0)
    assert set(vm.slots.mixed) == {(0x100, 2, 0x200), (0x800, 2, 0x800)}
    scene.delete(0)
    assert set(vm.slots.mixed) == {(0x800, 2, 0x800)}
    scene.delete(1)
    assert not vm.slots.mixed


def test_kvm_mmu_max_mapping_level_asks_the_host_only_for_shared_memory():
    vm, slot = made(0, GIB, level=1, vm_type=KVM_X86_SW_PROTECTED_VM, flags=KVM_MEM_GUEST_MEMFD)
    assert kvm_mmu_max_mapping_level(vm, slot, 0) == 1
    run(kvm_vm_set_mem_attributes(vm, 0, GIB, private=True))
    assert kvm_mmu_max_mapping_level(vm, slot, 0) == 3
