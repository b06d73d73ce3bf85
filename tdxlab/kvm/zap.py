"""Zapping: everything that takes mappings away, from one leaf to the whole VM.

    cause                               roots                what goes          mmu_lock
    a slot is deleted or moved          all, or zap_all_fast leaves in range    write
    memory turns shared or private      by filter, invalid   leaves in range    write
    the host's mapping changes          direct, invalid      leaves in range    write
    zap_all_fast                        direct               whole trees        read
    the process exits                   direct, invalid      whole trees        write
    the VM is destroyed                 all                  whole trees        write
    NX huge page recovery               by table             one table          write

In a mirror only leaves go while the VM lives, and only with mmu_lock held for write. Who walks long
gives the lock up now and then; if TLBs are still to be flushed, that is done before.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c and mmu.c.
Differs: nothing shadows guest tables, so there are no reverse maps to go through.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import NamedTuple

from tdxlab.kvm.batching import zap_mirror_leafs_in_batches
from tdxlab.kvm.hugepage import unaccount_nx_huge_page
from tdxlab.kvm.invalidation import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from tdxlab.kvm.locks import READ, WRITE
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM
from tdxlab.kvm.parking import park
from tdxlab.kvm.role import INVALID
from tdxlab.kvm.roots import (
    FREE_OBSOLETE_ROOTS,
    KVM_ALL_ROOTS,
    KVM_DIRECT_ROOTS,
    KVM_INVALID_ROOTS,
    KVM_VALID_ROOTS,
    for_each_tdp_mmu_root_yield_safe,
    is_invalid_root,
    kvm_gfn_range_filter_to_root_types,
    kvm_tdp_mmu_invalidate_roots,
    kvm_tdp_mmu_put_root,
)
from tdxlab.kvm.roots import KVM_FILTER_PRIVATE as KVM_FILTER_PRIVATE
from tdxlab.kvm.roots import KVM_FILTER_SHARED as KVM_FILTER_SHARED
from tdxlab.kvm.slot_policy import BLOCK, ZAP_ALL, chosen_slot_policy
from tdxlab.kvm.slots import Slot
from tdxlab.kvm.spte import (
    PT_PAGE_SIZE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
)
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    cond_resched_rwlock,
    for_each_tdp_pte,
    for_each_tdp_pte_min_level_all,
    is_lock_wanted,
    tdp_mmu_iter_need_resched,
    tdp_mmu_iter_resched,
    tdp_mmu_max_gfn_exclusive,
)
from tdxlab.kvm.tdp_set import (
    clear_leaf,
    kvm_mmu_page_as_id,
    not_removed,
    tdp_mmu_iter_set_spte,
    tdp_mmu_set_spte,
    tdp_mmu_set_spte_atomic,
)
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.steps import WAIT, Step

#: An operation in flight; and one that says whether TLBs are still to be flushed.
Work = Generator[Step, None, None]
Flushing = Generator[Step, None, bool]

#: One in so many tables that NX huge pages cost is given up at each recovery.
NX_RECOVERY_RATIO = 60

_BOTH_FILTERS = KVM_FILTER_SHARED | KVM_FILTER_PRIVATE


class GfnRange(NamedTuple):
    """struct kvm_gfn_range: what a range operation means.

    slot: the memslot that the range lies in. start, end: gfns, end exclusive, without the shared
    bit. attr_filter: KVM_FILTER_* bits. may_block: mmu_lock may be given up meanwhile. lockless:
    the caller holds no mmu_lock (ageing).
    """

    slot: Slot
    start: int
    end: int
    attr_filter: int = _BOTH_FILTERS
    may_block: bool = True
    lockless: bool = False


# -- leaves in a range


def tdp_mmu_zap_leafs(
    vm: Vm, root: MmuPage, start: int, end: int, can_yield: bool, flush: bool
) -> Flushing:
    """Clear the present leaves of `root` that map gfns from start to end - 1; tables stay, and a
    large leaf goes whole. mmu_lock held for write.

    flush: TLBs are to be flushed already. Returns whether they are now: leaves of an invalid root
    do not count, and if the lock was given up everything before was flushed then.
    Source: tdp_mmu.c, tdp_mmu_zap_leafs. Differs: a VM can be told to remove a mirror's pages in
    batches, or to keep those of a slot blocked, which then are removed too.
    """
    return _zap_leafs(vm, (root,), start, end, can_yield, flush)


def _zap_leafs(
    vm: Vm, roots: Iterable[MmuPage], start: int, end: int, can_yield: bool, flush: bool
) -> Flushing:
    """`tdp_mmu_zap_leafs` in one root after the other."""
    assert vm.mmu_lock.held(WRITE)
    end = min(end, tdp_mmu_max_gfn_exclusive(vm))
    for root in roots:
        if root.is_mirror and (vm.zap_batch or vm.parked or vm.mirror_zapper):
            flush = yield from zap_mirror_leafs_in_batches(vm, root, start, end, can_yield, flush)
            continue
        wanted = can_yield and is_lock_wanted(vm)
        for it in for_each_tdp_pte(vm, root, start, end):
            if wanted and tdp_mmu_iter_need_resched(vm, it):
                yield from tdp_mmu_iter_resched(vm, it, flush, WRITE)
                flush = False
                wanted = is_lock_wanted(vm)
                continue
            spte = it.old_spte
            if not spte & SPTE_MMU_PRESENT_MASK or (it.level > 1 and not spte & PT_PAGE_SIZE_MASK):
                continue
            removal = clear_leaf(vm, it)
            if removal is not None:
                error = yield from removal
                if error:
                    not_removed(vm, it.gfn, error)
            wanted = can_yield and is_lock_wanted(vm)
            flush = flush or not is_invalid_root(vm, root)
    return flush


def kvm_tdp_mmu_zap_leafs(vm: Vm, start: int, end: int, flush: bool) -> Flushing:
    """`tdp_mmu_zap_leafs` in all valid roots, direct and mirror; the lock may be given up.

    Source: tdp_mmu.c, kvm_tdp_mmu_zap_leafs.
    """
    roots = for_each_tdp_mmu_root_yield_safe(vm, KVM_VALID_ROOTS)
    return _zap_leafs(vm, roots, start, end, True, flush)


def kvm_tdp_mmu_unmap_gfn_range(vm: Vm, gfn_range: GfnRange, flush: bool) -> Flushing:
    """`tdp_mmu_zap_leafs` in the roots that the range's filter means, invalid ones too: who holds
    one may still be using it. Source: tdp_mmu.c, kvm_tdp_mmu_unmap_gfn_range.
    """
    slot, start, end, attr_filter, may_block, _ = gfn_range
    types = kvm_gfn_range_filter_to_root_types(vm, attr_filter) | KVM_INVALID_ROOTS
    roots = for_each_tdp_mmu_root_yield_safe(vm, types, slot.as_id)
    return _zap_leafs(vm, roots, start, end, may_block, flush)


def kvm_unmap_gfn_range(vm: Vm, gfn_range: GfnRange) -> Flushing:
    """Unmap a range of a memslot; returns whether the caller has to flush TLBs. mmu_lock held for
    write, between invalidate_begin and _end, or with the slot marked invalid.

    Source: mmu.c, kvm_unmap_gfn_range. Differs: no APIC access page.
    """
    return kvm_tdp_mmu_unmap_gfn_range(vm, gfn_range, False)


def kvm_zap_gfn_range(vm: Vm, gfn_start: int, gfn_end: int) -> Work:
    """Unmap gfns from gfn_start to gfn_end - 1 in all valid roots and flush that range.

    Source: mmu.c, kvm_zap_gfn_range.
    """
    if gfn_end <= gfn_start:
        vm.warn(f"kvm_zap_gfn_range: {gfn_start:#x} to {gfn_end:#x} is no range")
        return
    yield from vm.mmu_lock.lock(WRITE)
    kvm_mmu_invalidate_begin(vm)
    kvm_mmu_invalidate_range_add(vm, gfn_start, gfn_end)
    flush = yield from kvm_tdp_mmu_zap_leafs(vm, gfn_start, gfn_end, False)
    if flush:
        vm.flush_remote_tlbs_range(gfn_start, gfn_end - gfn_start)
    kvm_mmu_invalidate_end(vm)
    vm.mmu_lock.unlock(WRITE)


# -- whole trees


def _zap_level(vm: Vm, root: MmuPage, shared: bool, zap_level: int) -> Work:
    """Clear what is present at exactly `zap_level`: leaves, and links with all that is below them.

    Source: tdp_mmu.c, __tdp_mmu_zap_root.
    """
    mode = READ if shared else WRITE
    wanted = is_lock_wanted(vm)
    for it in for_each_tdp_pte_min_level_all(vm, root, zap_level):
        is_here = it.level <= zap_level and it.old_spte & SPTE_MMU_PRESENT_MASK
        while wanted or is_here:
            if wanted and tdp_mmu_iter_need_resched(vm, it):
                yield from tdp_mmu_iter_resched(vm, it, False, mode)
                break
            if it.level > zap_level or not it.old_spte & SPTE_MMU_PRESENT_MASK:
                break
            error = yield from _clear_entry(vm, it, shared)
            wanted = is_lock_wanted(vm)
            if not error:
                break


def _clear_entry(vm: Vm, it: TdpIter, shared: bool) -> Generator[Step, None, int]:
    """Empty the entry at `it`. Returns 0, or -EBUSY if it changed meanwhile: then try again."""
    if not shared:
        yield from tdp_mmu_iter_set_spte(vm, it, SHADOW_NONPRESENT_VALUE)
        return 0
    error = yield from tdp_mmu_set_spte_atomic(vm, it, SHADOW_NONPRESENT_VALUE)
    if error and it.is_mirror:
        yield (WAIT, "mirror entry cleared under the shared lock", it.gfn, it.level)
    return error


def tdp_mmu_zap_root(vm: Vm, root: MmuPage, shared: bool) -> Work:
    """Clear everything below `root`, which itself stays: leaves of 4 KiB first, then entries of 2M,
    of 1G, and of the root, each with the tables that they link. A kernel with PROVE_MMU begins with
    those of 1G. No TLB is flushed.

    shared: mmu_lock is held for read, and entries are cleared atomically. A mirror's cannot be: as
    in Linux that is a bug which ends the VM, and the walk hangs.
    Source: tdp_mmu.c, tdp_mmu_zap_root.
    """
    if not vm.root_count.get(root.spt):
        vm.warn("tdp_mmu_zap_root: nobody holds the root")
    for zap_level in (3, root.level) if vm.params.prove_mmu else (1, 2, 3, root.level):
        yield from _zap_level(vm, root, shared, zap_level)


def kvm_tdp_mmu_zap_all(vm: Vm) -> Work:
    """Clear all direct roots, valid and invalid; mmu_lock held for write. Mirror roots stay.

    Source: tdp_mmu.c, kvm_tdp_mmu_zap_all.
    """
    assert vm.mmu_lock.held(WRITE)
    for root in for_each_tdp_mmu_root_yield_safe(vm, KVM_DIRECT_ROOTS | KVM_INVALID_ROOTS):
        yield from tdp_mmu_zap_root(vm, root, shared=False)


def kvm_tdp_mmu_zap_invalidated_roots(vm: Vm, shared: bool) -> Work:
    """Clear the roots that were invalidated, and put the MMU's own references to them. Takes
    mmu_lock, for read if `shared`.

    Source: tdp_mmu.c, kvm_tdp_mmu_zap_invalidated_roots.
    """
    mode = READ if shared else WRITE
    yield from vm.mmu_lock.lock(mode)
    for root in for_each_tdp_mmu_root_yield_safe(vm, KVM_ALL_ROOTS):
        if not root.scheduled_to_zap:
            continue
        if not root.role & INVALID:
            vm.bug("kvm_tdp_mmu_zap_invalidated_roots: a valid root is to be zapped")
        vm.sps.put(root.spt, root._replace(scheduled_to_zap=False))
        yield from tdp_mmu_zap_root(vm, root, shared)
        kvm_tdp_mmu_put_root(vm, root.spt)
    vm.mmu_lock.unlock(mode)


def kvm_mmu_zap_all_fast(vm: Vm) -> Work:
    """Let all vCPUs change to new, empty direct roots, and clear the old ones while they already
    fault again. Mirror roots stay. The caller holds slots_lock. No TLB is flushed: a vCPU does that
    when it loads its new root.

    Source: mmu.c, kvm_mmu_zap_all_fast.
    """
    yield from vm.mmu_lock.lock(WRITE)
    vm.mmu_valid_gen ^= 1
    kvm_tdp_mmu_invalidate_roots(vm, KVM_DIRECT_ROOTS)
    vm.make_all_cpus_request(FREE_OBSOLETE_ROOTS)
    yield from vm.vendor.kick_all(vm, FREE_OBSOLETE_ROOTS)
    vm.mmu_lock.unlock(WRITE)
    yield from kvm_tdp_mmu_zap_invalidated_roots(vm, shared=True)


def kvm_mmu_zap_all(vm: Vm) -> Work:
    """Clear all direct roots. Source: mmu.c, kvm_mmu_zap_all."""
    yield from vm.mmu_lock.lock(WRITE)
    yield from kvm_tdp_mmu_zap_all(vm)
    vm.mmu_lock.unlock(WRITE)


def kvm_flush_shadow_all(vm: Vm) -> Work:
    """The process that owns the VM exits. Source: x86.c, kvm_arch_flush_shadow_all."""
    yield from kvm_mmu_zap_all(vm)


def kvm_mmu_uninit_tdp_mmu(vm: Vm) -> Work:
    """The VM is destroyed: every root goes, with all tables; a mirror's are taken back from the
    external EPT one by one. Source: tdp_mmu.c, kvm_mmu_uninit_tdp_mmu.
    """
    kvm_tdp_mmu_invalidate_roots(vm, KVM_VALID_ROOTS)
    yield from kvm_tdp_mmu_zap_invalidated_roots(vm, shared=False)
    if vm.tdp_mmu_roots:
        vm.warn("kvm_mmu_uninit_tdp_mmu: somebody still holds a root")
    vm.rcu_barrier()


# -- one table


def kvm_tdp_mmu_zap_sp(vm: Vm, sp: MmuPage) -> Flushing:
    """Unlink one table, with everything below it; mmu_lock held for write. Returns whether TLBs are
    to be flushed: not if it was a root, or not linked any more.

    Source: tdp_mmu.c, kvm_tdp_mmu_zap_sp.
    """
    assert vm.mmu_lock.held(WRITE)
    if sp.ptep < 0:
        vm.warn("kvm_tdp_mmu_zap_sp: a root cannot be zapped so")
        return False
    old_spte = vm.memory.words.view[sp.ptep]
    if not old_spte & SPTE_MMU_PRESENT_MASK:
        vm.warn("kvm_tdp_mmu_zap_sp: the table is not linked")
        return False
    yield from tdp_mmu_set_spte(
        vm,
        kvm_mmu_page_as_id(sp),
        sp.ptep,
        old_spte,
        SHADOW_NONPRESENT_VALUE,
        sp.gfn,
        sp.level + 1,
        mirror=sp.is_mirror,
    )
    return True


def kvm_recover_nx_huge_pages(vm: Vm, ratio: int = NX_RECOVERY_RATIO) -> Work:
    """Give up some tables that stand where an executable large page could: the oldest first, one in
    `ratio` of them (0: none), so that the next fault can map a large page again.

    A table of a slot whose dirty pages are logged is only forgotten: it has to stay.
    Source: mmu.c, kvm_recover_nx_huge_pages.
    """
    yield from vm.mmu_lock.lock(WRITE)
    flush = False
    to_zap = -(-vm.stats["nx_lpage_splits"] // ratio) if ratio else 0
    while to_zap and vm.possible_nx_huge_pages:
        to_zap -= 1
        oldest = min(vm.possible_nx_huge_pages, key=vm.possible_nx_huge_pages.__getitem__)
        sp: MmuPage = vm.sps[oldest]
        slot = vm.slots.find(sp.gfn, kvm_mmu_page_as_id(sp))
        if slot is not None and slot.is_dirty_tracked:
            unaccount_nx_huge_page(vm, sp)
        else:
            flush |= yield from kvm_tdp_mmu_zap_sp(vm, sp)
        if (vm.need_resched is not None and vm.need_resched()) or vm.mmu_lock.is_contended:
            if flush:
                vm.flush_remote_tlbs()
            flush = False
            yield from cond_resched_rwlock(vm, WRITE)
    if flush:
        vm.flush_remote_tlbs()
    vm.mmu_lock.unlock(WRITE)


# -- a memslot


def kvm_memslot_flush_zap_all(vm: Vm) -> bool:
    """True if deleting a slot zaps everything: an ordinary VM whose user space did not turn the
    quirk off. Source: mmu.c, kvm_memslot_flush_zap_all.
    """
    return vm.config.vm_type == KVM_X86_DEFAULT_VM and vm.config.slot_zap_all


def kvm_arch_flush_shadow_memslot(vm: Vm, slot: Slot) -> Work:
    """A slot is about to be deleted or moved: nothing may map its pages any more.

    Source: mmu.c, kvm_arch_flush_shadow_memslot and kvm_mmu_zap_memslot.
    Differs: user space can choose another policy (slot_policy.py).
    """
    policy = chosen_slot_policy(vm, slot)
    if policy == ZAP_ALL or (policy is None and kvm_memslot_flush_zap_all(vm)):
        yield from kvm_mmu_zap_all_fast(vm)
        return
    yield from vm.mmu_lock.lock(WRITE)
    gfn_range = GfnRange(slot, slot.base_gfn, slot.end_gfn)
    if policy == BLOCK and slot.can_be_private:
        gfn_range = gfn_range._replace(attr_filter=KVM_FILTER_SHARED)
        yield from park(vm, slot)
    if (yield from kvm_unmap_gfn_range(vm, gfn_range)):
        vm.flush_remote_tlbs()
    vm.mmu_lock.unlock(WRITE)
