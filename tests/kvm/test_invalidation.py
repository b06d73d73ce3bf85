"""The bracket around every removal of memory."""

from mmubench import MmuBench

from tdxlab.kvm.invalidation import (
    NO_RANGE,
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)


def test_bracket_counts_when_it_closes() -> None:
    vm = MmuBench().vm
    kvm_mmu_invalidate_begin(vm)
    assert (vm.mmu_invalidate_in_progress, vm.mmu_invalidate_seq) == (1, 0)
    kvm_mmu_invalidate_range_add(vm, 5, 9)
    kvm_mmu_invalidate_end(vm)
    assert (vm.mmu_invalidate_in_progress, vm.mmu_invalidate_seq) == (0, 1)


def test_range_add_grows_over_the_gap() -> None:
    vm = MmuBench().vm
    kvm_mmu_invalidate_begin(vm)
    kvm_mmu_invalidate_range_add(vm, 50, 60)
    kvm_mmu_invalidate_range_add(vm, 5, 9)
    assert (vm.mmu_invalidate_range_start, vm.mmu_invalidate_range_end) == (5, 60)


def test_begin_keeps_the_range_of_a_bracket_that_is_open() -> None:
    vm = MmuBench().vm
    kvm_mmu_invalidate_begin(vm)
    kvm_mmu_invalidate_range_add(vm, 5, 9)
    kvm_mmu_invalidate_begin(vm)
    assert vm.mmu_invalidate_range_start == 5
    kvm_mmu_invalidate_end(vm)
    kvm_mmu_invalidate_end(vm)
    kvm_mmu_invalidate_begin(vm)
    assert vm.mmu_invalidate_range_start == NO_RANGE


def test_end_warns_without_a_range() -> None:
    bench = MmuBench()
    kvm_mmu_invalidate_begin(bench.vm)
    kvm_mmu_invalidate_end(bench.vm)
    assert bench.told("warn")


def test_end_is_a_bug_without_a_begin() -> None:
    vm = MmuBench().vm
    kvm_mmu_invalidate_end(vm)
    assert vm.vm_dead


def test_range_add_warns_outside_of_a_bracket() -> None:
    bench = MmuBench()
    kvm_mmu_invalidate_range_add(bench.vm, 1, 2)
    assert bench.told("warn")
