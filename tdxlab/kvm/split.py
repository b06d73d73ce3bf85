"""Large pages split before anybody faults on them, and put together again afterwards.

Dirty logging works on 4 KiB pages. A large page is split when logging begins (eager page split), or
else by the first write to it. When logging ends, tables whose pages could be mapped large are
replaced by large leaves.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c and mmu.c.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EAGAIN, ENOENT, ENOMEM

from tdxlab.kvm import lpage
from tdxlab.kvm.caches import TABLE_PAGE
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import LEVEL_MASK, child_role
from tdxlab.kvm.roots import KVM_VALID_ROOTS, for_each_tdp_mmu_root_yield_safe
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.spte import (
    PT_PAGE_SIZE_MASK,
    SPTE_MMU_PRESENT_MASK,
    is_last_spte,
    is_present_leaf,
    make_huge_spte,
)
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    for_each_tdp_pte,
    for_each_tdp_pte_min_level,
    tdp_mmu_iter_cond_resched,
    tdp_mmu_iter_need_resched,
)
from tdxlab.kvm.tdp_set import Doing, tdp_mmu_set_spte_atomic, tdp_mmu_split_huge_page
from tdxlab.kvm.vm import MmuPage, Vm, pages_per_level
from tdxlab.steps import Step

Work = Generator[Step, None, None]

#: The greatest level of a leaf: 1 GiB. Source: KVM_MAX_HUGEPAGE_LEVEL.
MAX_HUGEPAGE_LEVEL = 3

_LARGE_LEAF = SPTE_MMU_PRESENT_MASK | PT_PAGE_SIZE_MASK


# -- splitting


def kvm_mmu_slot_try_split_huge_pages(vm: Vm, slot: Slot, target_level: int) -> Work:
    """Split every page of the slot that is larger than `target_level`, as far as memory reaches.

    Takes mmu_lock for read. No flush: a split changes no translation.
    Source: mmu.c, kvm_mmu_slot_try_split_huge_pages.
    """
    yield from vm.mmu_lock.lock(READ)
    yield from kvm_tdp_mmu_try_split_huge_pages(
        vm, slot, slot.base_gfn, slot.end_gfn, target_level, shared=True
    )
    vm.mmu_lock.unlock(READ)


def kvm_tdp_mmu_try_split_huge_pages(
    vm: Vm, slot: Slot, start: int, end: int, target_level: int, shared: bool
) -> Work:
    """Split the large pages of gfns start to end - 1 down to `target_level`, in all valid roots of
    the slot's address space. mmu_lock held for read if shared, else for write; it is let go of for
    every new table. Ends early, and says nothing, when there is no memory for one.

    Source: kvm_tdp_mmu_try_split_huge_pages.
    """
    for root in for_each_tdp_mmu_root_yield_safe(vm, KVM_VALID_ROOTS, slot.as_id):
        if (yield from _split_root(vm, root, start, end, target_level, READ if shared else WRITE)):
            return


def _split_root(vm: Vm, root: MmuPage, start: int, end: int, target_level: int, mode: str) -> Doing:
    """0 or -ENOMEM. Source: tdp_mmu_split_huge_pages_root."""
    spt = NO_PAGE
    for it in for_each_tdp_pte_min_level(vm, root, target_level + 1, start, end):
        while True:
            if (yield from tdp_mmu_iter_cond_resched(vm, it, False, mode)):
                break
            if it.old_spte & _LARGE_LEAF != _LARGE_LEAF:
                break
            if spt == NO_PAGE:
                spt = yield from _alloc_sp_for_split(vm, mode)
                if spt == NO_PAGE:
                    return -ENOMEM
                it.yielded = True
                break
            if not (yield from _split_with(vm, it, spt, mode)):
                spt = NO_PAGE
                break
    if spt != NO_PAGE:
        vm.pages.free_page(spt)
    return 0


def _alloc_sp_for_split(vm: Vm, mode: str) -> Doing:
    """HPA of a page for a table, or NO_PAGE. Whoever sleeps for memory holds no mmu_lock.

    Source: tdp_mmu_alloc_sp_for_split. No page for an external table: nothing in a mirror is large.
    """
    vm.mmu_lock.unlock(mode)
    yield ("alloc_page", TABLE_PAGE)
    spt = vm.pages.alloc_page(TABLE_PAGE)
    yield from vm.mmu_lock.lock(mode)
    return spt


def _split_with(vm: Vm, it: TdpIter, spt: int, mode: str) -> Doing:
    """Split the leaf at `it` into the page `spt`. Returns 0, or -EBUSY if the leaf has changed."""
    role = child_role(it.root.role & ~LEVEL_MASK | it.level)
    sp = MmuPage(spt, role, it.gfn, NO_PAGE, it.word)
    vm.sps.put(spt, sp)
    error = yield from tdp_mmu_split_huge_page(vm, it, sp, shared=mode == READ)
    if error:
        vm.sps.drop(spt)
    return error


# -- putting together


def kvm_mmu_recover_huge_pages(vm: Vm, slot: Slot) -> Work:
    """Map the slot's pages large again wherever that is possible; takes mmu_lock for read.

    Source: mmu.c, kvm_mmu_recover_huge_pages.
    """
    yield from vm.mmu_lock.lock(READ)
    yield from kvm_tdp_mmu_recover_huge_pages(vm, slot)
    vm.mmu_lock.unlock(READ)


def kvm_tdp_mmu_recover_huge_pages(vm: Vm, slot: Slot) -> Work:
    """Replace tables by large leaves in all valid roots of the slot's address space; mmu_lock held
    for read. Source: kvm_tdp_mmu_recover_huge_pages.
    """
    for root in for_each_tdp_mmu_root_yield_safe(vm, KVM_VALID_ROOTS, slot.as_id):
        yield from recover_huge_pages_range(vm, root, slot)


def recover_huge_pages_range(vm: Vm, root: MmuPage, slot: Slot) -> Work:
    """Replace each table of `root` that lies in the slot and could be a large leaf by one; flush
    the slot at the end if there was any. Source: recover_huge_pages_range.
    """
    if slot.is_dirty_tracked:
        vm.warn("recover_huge_pages_range: writes to the slot are still logged")
        return
    flush = False
    for it in for_each_tdp_pte_min_level(vm, root, 2, slot.base_gfn, slot.end_gfn):
        while True:
            if (yield from tdp_mmu_iter_cond_resched(vm, it, flush, READ)):
                flush = False
                break
            if not _is_recoverable(vm, it, slot):
                break
            error, huge_spte = _make_huge_spte(vm, it)
            if error == -EAGAIN:
                continue
            if error:
                break
            if not (yield from tdp_mmu_set_spte_atomic(vm, it, huge_spte)):
                flush = True
                break
    if flush:
        vm.flush_remote_tlbs_range(slot.base_gfn, slot.npages)


def _is_recoverable(vm: Vm, it: TdpIter, slot: Slot) -> bool:
    """True if the entry links a table that lies in the slot, whose pages may be mapped large."""
    if it.level > MAX_HUGEPAGE_LEVEL or not it.old_spte & SPTE_MMU_PRESENT_MASK:
        return False
    if is_last_spte(it.old_spte, it.level) or not slot.base_gfn <= it.gfn < slot.end_gfn:
        return False
    return lpage.kvm_mmu_max_mapping_level(vm, slot, it.gfn) >= it.level


def _make_huge_spte(vm: Vm, parent: TdpIter) -> tuple[int, int]:
    """(0, large leaf) in place of the table at `parent`, made after the first leaf below it;
    (-EAGAIN, 0) if mmu_lock is to be let go of first, (-ENOENT, 0) if there is no leaf.

    Source: tdp_mmu_make_huge_spte.
    """
    table = vm.sp_of(parent.old_spte)
    end = parent.gfn + pages_per_level(parent.level)
    for it in for_each_tdp_pte(vm, table, parent.gfn, end):
        if is_present_leaf(it.old_spte, it.level):
            if tdp_mmu_iter_need_resched(vm, parent):
                return -EAGAIN, 0
            return 0, make_huge_spte(vm, it.old_spte, parent.level)
    return -ENOENT, 0
