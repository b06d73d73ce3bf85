"""Watching which pages the guest writes.

Two ways. By write protection: W is taken away, and the first write faults and gives it back;
MMU-writable stays, so the fast path may. By the D bit, if the CPU logs the pages whose D it sets
(PML): D is cleared, and no write ever faults. Large pages are write-protected even then, so that
the first write splits them.

Functions named kvm_tdp_mmu_* want mmu_lock held; those of mmu.c take it. Private memory of a TD is
never watched: guest_memfd slots cannot log.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c and mmu.c; x86.c (kvm_mmu_slot_apply_flags);
virt/kvm/kvm_main.c (the log itself).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from errno import EINVAL, ENOENT

from tdxlab.arch import LEVEL_BITS
from tdxlab.kvm.ageing import tdp_mmu_clear_spte_bits_atomic
from tdxlab.kvm.dirty_log import BITS_PER_WORD, kvm_dirty_log_manual_protect_and_init_set
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.role import GUEST_MODE
from tdxlab.kvm.roots import (
    KVM_VALID_ROOTS,
    for_each_tdp_mmu_root,
    for_each_tdp_mmu_root_yield_safe,
)
from tdxlab.kvm.slots import KVM_MEM_READONLY, KVM_MR_FLAGS_ONLY, Slot
from tdxlab.kvm.split import (
    kvm_mmu_recover_huge_pages,
    kvm_mmu_slot_try_split_huge_pages,
    kvm_tdp_mmu_try_split_huge_pages,
)
from tdxlab.kvm.spte import DIRTY_MASK, MMU_WRITABLE_MASK, PT_WRITABLE_MASK, is_present_leaf
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    for_each_tdp_pte,
    for_each_tdp_pte_min_level,
    is_lock_wanted,
    tdp_mmu_iter_cond_resched,
    tdp_mmu_iter_need_resched,
    tdp_mmu_iter_resched,
)
from tdxlab.kvm.tdp_set import needs_atomic_write, tdp_mmu_iter_set_spte, tdp_mmu_set_spte_atomic
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.steps import Step

Work = Generator[Step, None, None]
#: An operation in flight that says whether it changed an entry.
Changing = Generator[Step, None, bool]

#: Asks a vCPU to switch its CPU's page-modification log on or off.
UPDATE_CPU_DIRTY_LOGGING = "UPDATE_CPU_DIRTY_LOGGING"


def tdp_mmu_need_write_protect(vm: Vm, root: MmuPage) -> bool:
    """Dirty pages of this root are found by write protection only: the CPU keeps no D bits, or it
    would log guest-physical addresses of a nested guest. Source: tdp_mmu_need_write_protect.
    """
    nested = vm.config.dirty_log_size and root.role & GUEST_MODE
    return bool(nested) or not vm.params.ad_bits


# -- mmu_lock held for read


def kvm_tdp_mmu_wrprot_slot(vm: Vm, slot: Slot, min_level: int) -> Changing:
    """Take W from every leaf of the slot at `min_level` and above, in all valid roots; True if one
    had it. Source: kvm_tdp_mmu_wrprot_slot.
    """
    changed = False
    for root in for_each_tdp_mmu_root_yield_safe(vm, KVM_VALID_ROOTS, slot.as_id):
        wanted = is_lock_wanted(vm)
        for it in for_each_tdp_pte_min_level(vm, root, min_level, slot.base_gfn, slot.end_gfn):
            if wanted and tdp_mmu_iter_need_resched(vm, it):
                yield from tdp_mmu_iter_resched(vm, it, False, READ)
            elif it.old_spte & PT_WRITABLE_MASK and is_present_leaf(it.old_spte, it.level):
                changed |= yield from _wrprot(vm, it)
                wanted = is_lock_wanted(vm)
    return changed


def _wrprot(vm: Vm, it: TdpIter) -> Changing:
    """One entry, a leaf with W. Source: wrprot_gfn_range."""
    while (yield from tdp_mmu_set_spte_atomic(vm, it, it.old_spte & ~PT_WRITABLE_MASK)):
        if (yield from tdp_mmu_iter_cond_resched(vm, it, False, READ)):
            return False
        if not it.old_spte & PT_WRITABLE_MASK or not is_present_leaf(it.old_spte, it.level):
            return False
    return True


def kvm_tdp_mmu_clear_dirty_slot(vm: Vm, slot: Slot) -> Work:
    """Make every leaf of the slot clean, in all valid roots: clear D, or W where D is not kept.

    Source: kvm_tdp_mmu_clear_dirty_slot.
    """
    for root in for_each_tdp_mmu_root_yield_safe(vm, KVM_VALID_ROOTS, slot.as_id):
        bit = PT_WRITABLE_MASK if tdp_mmu_need_write_protect(vm, root) else DIRTY_MASK
        wanted = is_lock_wanted(vm)
        for it in for_each_tdp_pte(vm, root, slot.base_gfn, slot.end_gfn):
            if not is_present_leaf(it.old_spte, it.level):
                continue
            if wanted and tdp_mmu_iter_need_resched(vm, it):
                yield from tdp_mmu_iter_resched(vm, it, False, READ)
            elif it.old_spte & bit:
                yield from _clear_dirty(vm, it, bit)
                wanted = is_lock_wanted(vm)


def _clear_dirty(vm: Vm, it: TdpIter, bit: int) -> Work:
    """One entry, a leaf with `bit`. Source: clear_dirty_gfn_range."""
    while (yield from tdp_mmu_set_spte_atomic(vm, it, it.old_spte & ~bit)):
        if not is_present_leaf(it.old_spte, it.level):
            return
        if (yield from tdp_mmu_iter_cond_resched(vm, it, False, READ)):
            return
        if not it.old_spte & bit:
            return


# -- mmu_lock held for write


def kvm_tdp_mmu_clear_dirty_pt_masked(
    vm: Vm, slot: Slot, gfn: int, mask: int, wrprot: bool
) -> Work:
    """Make 4 KiB leaves clean: of gfn + i for each bit i of `mask`, in all valid roots. Larger
    leaves stay as they are. wrprot: take W instead of clearing D.

    mask: 64 bits, not zero. Source: kvm_tdp_mmu_clear_dirty_pt_masked.
    """
    for root in for_each_tdp_mmu_root(vm, KVM_VALID_ROOTS, slot.as_id):
        need_wrprot = wrprot or tdp_mmu_need_write_protect(vm, root)
        bit = PT_WRITABLE_MASK if need_wrprot else DIRTY_MASK
        yield from _clear_dirty_pt_masked(vm, root, gfn, mask, bit)


def _clear_dirty_pt_masked(vm: Vm, root: MmuPage, gfn: int, mask: int, bit: int) -> Work:
    """One root. Source: clear_dirty_pt_masked."""
    for it in for_each_tdp_pte(vm, root, gfn + _ffs(mask), gfn + BITS_PER_WORD):
        if not mask:
            break
        if it.level > 1 or not is_present_leaf(it.old_spte, 1):
            continue
        here = 1 << it.gfn - gfn
        if not mask & here:
            continue
        mask &= ~here
        if it.old_spte & bit:
            it.old_spte = yield from _tdp_mmu_clear_spte_bits(vm, it, bit)
            vm.emit("spte_changed", it.as_id, 1, it.gfn, it.old_spte, it.old_spte & ~bit)


def _tdp_mmu_clear_spte_bits(vm: Vm, it: TdpIter, mask: int) -> Generator[Step, None, int]:
    """Clear bits of an entry, atomically if something that takes no lock may change it. Returns
    what it was. Source: tdp_iter.h, tdp_mmu_clear_spte_bits.
    """
    if needs_atomic_write(it.old_spte, it.level):
        return (yield from tdp_mmu_clear_spte_bits_atomic(vm, it, mask))
    vm.memory.words.cells[it.word] = it.old_spte & ~mask
    return it.old_spte


def kvm_tdp_mmu_write_protect_gfn(vm: Vm, slot: Slot, gfn: int, min_level: int) -> Changing:
    """Take W and MMU-writable from the leaf that maps `gfn`, at `min_level` or above, in all valid
    roots: only a slow fault gives them back. True if TLBs must be flushed.

    Source: kvm_tdp_mmu_write_protect_gfn.
    """
    changed = False
    for root in for_each_tdp_mmu_root(vm, KVM_VALID_ROOTS, slot.as_id):
        for it in for_each_tdp_pte_min_level(vm, root, min_level, gfn, gfn + 1):
            if not is_present_leaf(it.old_spte, it.level):
                continue
            new_spte = it.old_spte & ~(PT_WRITABLE_MASK | MMU_WRITABLE_MASK)
            if new_spte == it.old_spte:
                break
            yield from tdp_mmu_iter_set_spte(vm, it, new_spte)
            changed = True
    return changed


def kvm_arch_mmu_enable_log_dirty_pt_masked(vm: Vm, slot: Slot, offset: int, mask: int) -> Work:
    """Watch some pages anew: base_gfn + offset + i for each bit i of `mask`.

    offset: in pages, a multiple of 64. mask: 64 bits, not zero. Where the log began with every bit
    set, nothing was done then: large pages are split now, or write-protected, so that they are when
    somebody writes. Source: mmu.c, kvm_arch_mmu_enable_log_dirty_pt_masked.
    """
    first = slot.base_gfn + offset
    if kvm_dirty_log_manual_protect_and_init_set(vm):
        yield from _watch_large_pages(vm, slot, first + _ffs(mask), first + mask.bit_length() - 1)
    wrprot = not vm.config.dirty_log_size
    yield from kvm_tdp_mmu_clear_dirty_pt_masked(vm, slot, first, mask, wrprot)


def _watch_large_pages(vm: Vm, slot: Slot, start: int, last: int) -> Work:
    """Split, or write-protect, the large pages of gfns `start` to `last`, at most 64 of them.

    Two large pages are protected only if `start` and `last`, each rounded up to 2 MiB, differ: the
    second one stays as it is if `last` is its first gfn.
    """
    if vm.params.eager_page_split:
        yield from kvm_tdp_mmu_try_split_huge_pages(vm, slot, start, last + 1, 1, shared=False)
    yield from kvm_tdp_mmu_write_protect_gfn(vm, slot, start, 2)
    if -(-start >> LEVEL_BITS) != -(-last >> LEVEL_BITS):
        yield from kvm_tdp_mmu_write_protect_gfn(vm, slot, last, 2)


def _ffs(mask: int) -> int:
    """Number of the lowest bit that is set. Source: __ffs."""
    return (mask & -mask).bit_length() - 1


# -- logging starts or stops


def kvm_mmu_slot_apply_flags(vm: Vm, old: Slot | None, new: Slot | None, change: int) -> Work:
    """`new` has replaced `old`; begin, end or keep watching its pages.

    old, new: None where there was or is no slot. change: KVM_MR_*. The bitmap comes or goes with
    it. Logging that begins splits large pages (if the host's parameter says so), takes away D or W,
    and flushes; with a log that begins all set it does nothing. Logging that ends maps pages large
    again. Source: x86.c, kvm_mmu_slot_apply_flags; kvm_main.c, kvm_commit_memory_region.
    """
    init_set = kvm_dirty_log_manual_protect_and_init_set(vm)
    vm.dirty.commit(old, new, initially_set=init_set)
    log = new is not None and new.is_dirty_tracked
    toggled = log != (old is not None and old.is_dirty_tracked)
    if toggled:
        kvm_mmu_update_cpu_dirty_logging(vm, log)
    if change != KVM_MR_FLAGS_ONLY or new is None or new.flags & KVM_MEM_READONLY:
        return
    if not toggled:
        vm.warn("kvm_mmu_slot_apply_flags: no flag has changed")
    elif not log:
        yield from kvm_mmu_recover_huge_pages(vm, new)
    elif not init_set:
        yield from _start_logging(vm, new)


def kvm_mmu_update_cpu_dirty_logging(vm: Vm, enable: bool) -> None:
    """With the VM's first slot that logs, or without the last one, tell the vCPUs: their CPUs' logs
    go on or off. Source: x86.c, kvm_mmu_update_cpu_dirty_logging.
    """
    if not vm.config.dirty_log_size:
        return
    slots = vm.dirty.nr_memslots_dirty_logging
    if (enable and slots == 1) or not slots:
        vm.make_all_cpus_request(UPDATE_CPU_DIRTY_LOGGING)


def _start_logging(vm: Vm, slot: Slot) -> Work:
    """Source: x86.c, kvm_mmu_slot_apply_flags; mmu.c, kvm_mmu_slot_leaf_clear_dirty and
    kvm_mmu_slot_remove_write_access.
    """
    if vm.params.eager_page_split:
        yield from kvm_mmu_slot_try_split_huge_pages(vm, slot, 1)
    min_level = 1
    if vm.config.dirty_log_size:
        min_level = 2
        yield from vm.mmu_lock.lock(READ)
        yield from kvm_tdp_mmu_clear_dirty_slot(vm, slot)
        vm.mmu_lock.unlock(READ)
    yield from vm.mmu_lock.lock(READ)
    yield from kvm_tdp_mmu_wrprot_slot(vm, slot, min_level)
    vm.mmu_lock.unlock(READ)
    vm.flush_remote_tlbs_range(slot.base_gfn, slot.npages)


# -- user space reads the log


def kvm_get_dirty_log_protect(
    vm: Vm, slot: Slot
) -> Generator[Step, None, tuple[int, tuple[int, ...]]]:
    """KVM_GET_DIRTY_LOG: (0, gfns of the pages written since the last time), and watch them anew;
    (-ENOENT, ()) if the slot does not log. If user space clears the log itself, nothing changes.

    Source: kvm_main.c, kvm_get_dirty_log_protect. Differs: gfns instead of a bitmap; a vCPU's own
    log of the CPU is the back end's to empty first.
    """
    if not slot.is_dirty_tracked:
        return -ENOENT, ()
    dirty = tuple(slot.base_gfn + offset for offset in vm.dirty.bits(slot))
    if vm.config.manual_dirty_log_protect or not dirty:
        return 0, dirty
    yield from vm.mmu_lock.lock(WRITE)
    dirty = tuple(slot.base_gfn + offset for offset in vm.dirty.bits(slot))
    for number, word in list(vm.dirty.words(slot)):
        vm.dirty.set_word(slot, number, 0)
        yield from kvm_arch_mmu_enable_log_dirty_pt_masked(vm, slot, number * BITS_PER_WORD, word)
    vm.mmu_lock.unlock(WRITE)
    vm.flush_remote_tlbs_range(slot.base_gfn, slot.npages)
    return 0, dirty


def kvm_clear_dirty_log_protect(
    vm: Vm, slot: Slot, gfns: Iterable[int]
) -> Generator[Step, None, int]:
    """KVM_CLEAR_DIRTY_LOG: user space has dealt with these pages; watch those that were dirty anew.

    Returns 0; -ENOENT if the slot does not log; -EINVAL if a gfn is not in the slot.
    Source: kvm_main.c, kvm_clear_dirty_log_protect. Differs: gfns instead of a bitmap.
    """
    if not slot.is_dirty_tracked:
        return -ENOENT
    masks: dict[int, int] = {}
    for gfn in gfns:
        if not slot.base_gfn <= gfn < slot.end_gfn:
            return -EINVAL
        number, bit = divmod(gfn - slot.base_gfn, BITS_PER_WORD)
        masks[number] = masks.get(number, 0) | 1 << bit
    flush = False
    yield from vm.mmu_lock.lock(WRITE)
    for number, mask in sorted(masks.items()):
        word = vm.dirty.word(slot, number)
        if word & mask:
            flush = True
            vm.dirty.set_word(slot, number, word & ~mask)
            yield from kvm_arch_mmu_enable_log_dirty_pt_masked(
                vm, slot, number * BITS_PER_WORD, word & mask
            )
    vm.mmu_lock.unlock(WRITE)
    if flush:
        vm.flush_remote_tlbs_range(slot.base_gfn, slot.npages)
    return 0
