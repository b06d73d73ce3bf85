"""The invalidation protocol: how a fault learns that the page it looked up may be gone.

Who takes memory away opens a bracket, adds the gfns that it means, zaps them, and closes the
bracket. A fault that finds its gfn inside an open bracket, or a bracket closed since it looked its
page up, retries. Everything here happens with mmu_lock held for write.

Source: Linux 6.16, virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from tdxlab.kvm.vm import Vm

#: "No range yet": what the ends of the range hold when a bracket opens. Source: INVALID_GPA.
NO_RANGE = (1 << 64) - 1


def kvm_mmu_invalidate_begin(vm: Vm) -> None:
    """Open a bracket; the outermost one starts without a range."""
    vm.mmu_invalidate_in_progress += 1
    if vm.mmu_invalidate_in_progress == 1:
        vm.mmu_invalidate_range_start = NO_RANGE
        vm.mmu_invalidate_range_end = NO_RANGE


def kvm_mmu_invalidate_range_add(vm: Vm, start: int, end: int) -> None:
    """Let the bracket mean gfns from `start` to `end` - 1 too. There is one range only: it grows
    over the gaps.
    """
    if not vm.mmu_invalidate_in_progress:
        vm.warn("kvm_mmu_invalidate_range_add: no invalidation is in progress")
    if vm.mmu_invalidate_range_start == NO_RANGE:
        vm.mmu_invalidate_range_start = start
        vm.mmu_invalidate_range_end = end
    else:
        vm.mmu_invalidate_range_start = min(vm.mmu_invalidate_range_start, start)
        vm.mmu_invalidate_range_end = max(vm.mmu_invalidate_range_end, end)


def kvm_mmu_invalidate_end(vm: Vm) -> None:
    """Close the bracket; faults that looked their page up before now will retry."""
    vm.mmu_invalidate_seq += 1
    vm.mmu_invalidate_in_progress -= 1
    if vm.mmu_invalidate_in_progress < 0:
        vm.bug("kvm_mmu_invalidate_end: no invalidation was in progress")
    if vm.mmu_invalidate_range_start == NO_RANGE:
        vm.warn("kvm_mmu_invalidate_end: nobody said which range was meant")
