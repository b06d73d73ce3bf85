"""Invalidation and MMU notifiers; the process memory that they come from."""

import pytest
from fault_scene import HVA
from slots_scene import WRITE_CODE, SlotScene

from tdxlab.arch import SIZE_2M
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.invalidation import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.notifier import (
    hva_ranges,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_clear_young,
    kvm_mmu_notifier_invalidate_range,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_mmu_notifier_release,
    kvm_mmu_notifier_test_young,
    mmu_invalidate_retry_gfn,
    mmu_invalidate_retry_gfn_unsafe,
)
from tdxlab.kvm.page_fault import RET_PF_FIXED, RET_PF_RETRY
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.steps import run, seeded

PAGE = 0x1000


def scene_with_memory(vm_type=0, flags=0, pages=0x400):
    """A slot at gfn 0 with its shared memory mapped; accessing gfn 3 and 4 has worked."""
    scene = SlotScene(vm_type)
    scene.process.mmap(HVA, pages * PAGE)
    assert scene.set(0, 0, pages, flags) == 0
    assert scene.access(3) == scene.access(4) == RET_PF_FIXED
    scene.events.clear()
    return scene


def test_mmu_invalidate_retry_gfn_says_yes_inside_the_range_and_after_the_end():
    vm = SlotScene().vm
    seq = vm.mmu_invalidate_seq
    kvm_mmu_invalidate_begin(vm)
    kvm_mmu_invalidate_range_add(vm, 10, 20)
    kvm_mmu_invalidate_range_add(vm, 30, 31)
    for asked in (mmu_invalidate_retry_gfn, mmu_invalidate_retry_gfn_unsafe):
        answers = [asked(vm, seq, gfn) for gfn in (9, 10, 25, 30, 31)]
        assert answers == [False, True, True, True, False]
    kvm_mmu_invalidate_end(vm)
    for asked in (mmu_invalidate_retry_gfn, mmu_invalidate_retry_gfn_unsafe):
        assert asked(vm, seq, 9)
        assert not asked(vm, vm.mmu_invalidate_seq, 15)


def test_mmu_invalidate_retry_gfn_says_yes_and_warns_where_no_range_was_added():
    scene = SlotScene()
    kvm_mmu_invalidate_begin(scene.vm)
    assert not mmu_invalidate_retry_gfn_unsafe(scene.vm, 0, 5)
    assert mmu_invalidate_retry_gfn(scene.vm, 0, 5)
    assert len(scene.said("warn")) == 1


def test_kvm_mmu_notifier_invalidate_range_start_unmaps_and_keeps_faults_out_until_the_end():
    scene = scene_with_memory()
    assert (
        run(kvm_mmu_notifier_invalidate_range_start(scene.vm, HVA + 3 * PAGE, HVA + 4 * PAGE)) == 0
    )
    assert (scene.level(3), scene.level(4)) == (0, 1)
    assert len(scene.said("kvm_flush_remote_tlbs")) == 1
    assert scene.access(3) == RET_PF_RETRY
    assert scene.access(5) == RET_PF_FIXED
    assert scene.vm.mmu_invalidate_seq == 0
    assert run(kvm_mmu_notifier_invalidate_range_end(scene.vm, HVA + 3 * PAGE, HVA + 4 * PAGE)) == 0
    assert scene.access(3) == RET_PF_FIXED
    assert scene.vm.mmu_invalidate_seq == 1
    assert scene.vm.slots.mn_active_invalidate_count == 0


def test_kvm_mmu_notifier_invalidate_range_does_nothing_outside_of_all_slots():
    scene = scene_with_memory()
    run(kvm_mmu_notifier_invalidate_range(scene.vm, HVA - PAGE, HVA))
    assert scene.vm.mmu_invalidate_seq == 0
    assert scene.level(3) == 1
    assert scene.events == []


def test_kvm_mmu_notifier_invalidate_range_end_warns_without_a_start():
    scene = SlotScene()
    run(kvm_mmu_notifier_invalidate_range_end(scene.vm, HVA, HVA + PAGE))
    assert len(scene.said("warn")) == 1
    assert scene.vm.slots.mn_active_invalidate_count == 0


def test_kvm_mmu_notifier_invalidate_range_leaves_private_pages_of_a_td_alone():
    scene = scene_with_memory(KVM_X86_TDX_VM, KVM_MEM_GUEST_MEMFD)
    run(kvm_vm_set_mem_attributes(scene.vm, 8, 9, private=True))
    assert scene.access(8, private=True) == RET_PF_FIXED
    run(kvm_mmu_notifier_invalidate_range(scene.vm, HVA, HVA + 0x400 * PAGE))
    assert scene.level(3) == 0
    assert scene.level(8, private=True) == 1


def test_kvm_mmu_notifier_invalidate_range_unmaps_private_pages_too_without_a_mirror():
    scene = scene_with_memory(KVM_X86_SW_PROTECTED_VM, KVM_MEM_GUEST_MEMFD)
    run(kvm_vm_set_mem_attributes(scene.vm, 8, 9, private=True))
    assert scene.access(8, private=True) == RET_PF_FIXED
    run(kvm_mmu_notifier_invalidate_range(scene.vm, HVA, HVA + 0x400 * PAGE))
    assert scene.level(8, private=True) == 0


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (HVA, HVA + PAGE, [(0x10, 0x11)]),
        (HVA + 0x800, HVA + PAGE + 1, [(0x10, 0x12)]),
        (HVA - PAGE, HVA + 0x100 * PAGE, [(0x10, 0x18), (0x100, 0x104)]),
        (HVA + 8 * PAGE, HVA + 16 * PAGE, []),
        (HVA + PAGE, HVA + PAGE, []),
        (HVA + 2 * PAGE, HVA + PAGE, []),
    ],
)
def test_hva_ranges_has_every_gfn_whose_page_is_touched(start, end, expected):
    scene = SlotScene()
    scene.set(0, 0x10, 8, hva=HVA)
    scene.set(1, 0x100, 4, hva=HVA + 0x20 * PAGE)
    found = hva_ranges(scene.vm, start, end, may_block=False, lockless=True)
    assert [(gfns.start, gfns.end) for gfns in found] == expected
    assert all(gfns.lockless and not gfns.may_block for gfns in found)


def test_young_notifiers_report_a_use_once_and_test_young_again_and_again():
    scene = scene_with_memory()
    vm, start, end = scene.vm, HVA + 3 * PAGE, HVA + 4 * PAGE
    assert run(kvm_mmu_notifier_test_young(vm, start, end))
    assert run(kvm_mmu_notifier_test_young(vm, start, end))
    assert run(kvm_mmu_notifier_clear_flush_young(vm, start, end))
    assert not run(kvm_mmu_notifier_clear_young(vm, start, end))
    assert not run(kvm_mmu_notifier_test_young(vm, start, end))
    assert run(kvm_mmu_notifier_clear_young(vm, start, end + PAGE))
    assert scene.said("kvm_flush_remote_tlbs") == []


def test_kvm_mmu_notifier_release_zaps_everything_shared():
    scene = scene_with_memory()
    run(kvm_mmu_notifier_release(scene.vm))
    assert scene.vm.stats["pages_4k"] == 0


# -- process memory


def test_munmap_unmaps_and_frees_and_the_next_access_fails():
    scene = scene_with_memory()
    free = scene.pages.free
    run(scene.process.munmap(HVA + 3 * PAGE, PAGE))
    assert scene.pages.free == free + 1
    assert (scene.level(3), scene.level(4)) == (0, 1)
    assert scene.access(3) < 0
    assert scene.process.area(HVA + 4 * PAGE) is not None


def test_migrate_moves_content_and_the_guest_finds_it_again():
    scene = scene_with_memory()
    scene.process.write(HVA + 3 * PAGE, b"kept")
    _, before = scene.spte(3 << 12)
    assert run(scene.process.migrate(HVA + 3 * PAGE + 9))
    assert scene.level(3) == 0
    assert scene.process.read(HVA + 3 * PAGE, 4) == b"kept"
    assert scene.access(3) == RET_PF_FIXED
    _, after = scene.spte(3 << 12)
    assert (before ^ after) & scene.vm.masks.address
    assert not run(scene.process.migrate(HVA + 9 * PAGE))


def test_fault_in_gives_large_pages_that_kvm_maps_large():
    scene = SlotScene()
    scene.process.mmap(HVA, 2 * SIZE_2M, level=2)
    scene.set(0, 0, 0x400)
    assert scene.process.mapping_level(HVA) == 1
    assert scene.access(0x203) == RET_PF_FIXED
    assert scene.level(0x203) == 2
    assert scene.process.mapping_level(HVA + SIZE_2M) == 2
    assert len(scene.pages.huge) == 1
    run(scene.process.munmap(HVA, 2 * SIZE_2M))
    assert scene.level(0x203) == 0
    assert not scene.pages.huge


def test_fault_in_finds_nothing_unmapped_and_nothing_to_write_where_writing_is_not_allowed():
    scene = SlotScene()
    scene.process.mmap(HVA, PAGE, writable=False)
    assert scene.process.fault_in(HVA + PAGE, write=False) is None
    assert scene.process.fault_in(HVA, write=True) is None
    page = scene.process.fault_in(HVA, write=False)
    assert page is not None
    assert not page.writable


def test_exit_frees_all_memory_of_the_process():
    scene = scene_with_memory()
    run(scene.process.exit())
    assert scene.vm.stats["pages_4k"] == 0
    assert "user memory" not in scene.pages.in_use.values()


@pytest.mark.parametrize(
    ("hva", "size", "level", "word"),
    [
        (HVA, PAGE, 4, "level 4"),
        (HVA + 1, PAGE, 1, "whole pages"),
        (HVA, PAGE, 2, "whole pages"),
        (HVA, 0, 1, "whole pages"),
        (HVA + 16 * PAGE, PAGE, 1, "already"),
    ],
)
def test_mmap_refuses_what_cannot_be_mapped(hva, size, level, word):
    scene = SlotScene()
    scene.process.mmap(HVA + 16 * PAGE, PAGE)
    with pytest.raises(ValueError, match=word):
        scene.process.mmap(hva, size, level=level)


def test_munmap_refuses_to_cut_a_large_page():
    scene = SlotScene()
    scene.process.mmap(HVA, SIZE_2M, level=2)
    with pytest.raises(ValueError, match="inside a page"):
        run(scene.process.munmap(HVA, PAGE))


@pytest.mark.parametrize("seed", range(40))
def test_munmap_leaves_no_mapping_of_a_freed_page_whoever_moves_first(seed):
    scene = scene_with_memory()
    gone = scene.process.munmap(HVA, 0x10 * PAGE)
    fault = kvm_mmu_page_fault(scene.vcpu, 5 << 12, WRITE_CODE)
    results = seeded([gone, fault], seed).results
    assert results[1] in (RET_PF_FIXED, RET_PF_RETRY, -14)
    assert scene.level(5) == 0
