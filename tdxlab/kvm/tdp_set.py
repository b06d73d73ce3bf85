"""Setting an SPTE, and everything that a change brings with it.

Two ways. Shared: mmu_lock held for read, vCPUs fault in parallel, an entry changes with a
compare-exchange and a loser retries. Exclusive: mmu_lock held for write.

In a mirror EPT every change has to reach an external EPT that only hooks can write. Shared, where
entries are only ever installed:

    cmpxchg old -> FROZEN    nobody else touches the entry now; a fault that meets it retries
    hook                     the external EPT gets its table or page
    store new                published; where the hook failed: store old

Exclusive, where leaves are only ever removed, the other way round: the mirror entry is cleared
first, then the hook takes the page out of the external EPT.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EBUSY
from struct import pack

from tdxlab.arch import ENTRIES_PER_TABLE, HPA_MASK, PAGE_SHIFT
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.hugepage import unaccount_nx_huge_page
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import AD_DISABLED, Role
from tdxlab.kvm.spte import (
    FROZEN_SPTE,
    HOST_WRITABLE_MASK,
    MMU_WRITABLE_MASK,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
    check_spte_writable_invariants,
    is_last_spte,
    is_mmio_spte,
    make_nonleaf_spte,
    make_small_spte,
    spte_needs_atomic_update,
    spte_to_pfn,
)
from tdxlab.kvm.tdp_iter import TdpIter
from tdxlab.kvm.vm import MmuPage, Vm, pages_per_level
from tdxlab.steps import WAIT, Step

#: What a leaf has that a guest may write; then its write bits are as they should be.
_WRITE_MASKS = PT_WRITABLE_MASK | MMU_WRITABLE_MASK | HOST_WRITABLE_MASK

#: An operation in flight that returns 0, a negative errno, or RET_PF_*.
Doing = Generator[Step, None, int]
#: One that returns nothing.
Work = Generator[Step, None, None]


class HostBug(RuntimeError):
    """BUG(): the whole host would crash, not only the VM."""


# -- setting an SPTE with mmu_lock shared


def tdp_mmu_set_spte_atomic(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """Replace the entry at `it` if it still is what the iterator saw; mmu_lock held for read.

    Returns 0; -EBUSY if somebody was faster (`it.old_spte` is then up to date, unless the entry is
    a mirror's); what a failing hook returned.
    Source: tdp_mmu_set_spte_atomic and __tdp_mmu_set_spte_atomic.
    """
    if it.yielded or it.old_spte == FROZEN_SPTE:
        vm.warn("tdp_mmu_set_spte_atomic: the iterator yielded, or saw a frozen entry")
    if it.is_mirror and new_spte != FROZEN_SPTE:
        return set_external_spte_present(vm, it, new_spte)
    return _set_spte_shared(vm, it, new_spte)


def _set_spte_shared(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """`tdp_mmu_set_spte_atomic` where there is nothing to tell an external EPT."""
    old_spte = it.old_spte
    yield ("cmpxchg SPTE", it.gfn, it.level, old_spte, new_spte)
    words = vm.memory.words
    current = words.view[it.word]
    if current != old_spte:
        it.old_spte = current
        return -EBUSY
    words.cells[it.word] = new_spte
    removed = _note_change(vm, it.as_id, it.gfn, old_spte, new_spte, it.level)
    if removed is not None:
        yield from handle_removed_pt(vm, removed, shared=True)
    return 0


def set_external_spte_present(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """`tdp_mmu_set_spte_atomic` in a mirror: install `new_spte`, and what it stands for in the
    external EPT.

    Returns 0; -EBUSY if the entry changed meanwhile, or its page is blocked; what the hook returned
    if that failed: the old value is back then. Clearing an entry ends the VM.
    Source: set_external_spte_present.
    """
    old_spte, gfn, level, word = it.old_spte, it.gfn, it.level, it.word
    if not new_spte & SPTE_MMU_PRESENT_MASK:
        vm.bug("a mirror entry cannot be cleared under the shared lock")
        return -EBUSY
    if old_spte != SHADOW_NONPRESENT_VALUE:
        if is_blocked_spte(old_spte):
            return -EBUSY
        if old_spte & SPTE_MMU_PRESENT_MASK:
            vm.bug("set_external_spte_present: the mirror entry is present already")
    yield ("cmpxchg FROZEN_SPTE", gfn, level, old_spte)
    words = vm.memory.words
    if words.view[word] != old_spte:
        return -EBUSY
    words.cells[word] = FROZEN_SPTE
    assert vm.external is not None
    if level == 1 or new_spte & PT_PAGE_SIZE_MASK:
        pfn = (new_spte & HPA_MASK) >> PAGE_SHIFT
        error = yield from vm.external.set_external_spte(gfn, level, pfn)
    else:
        external_spt = _external_spt(vm, gfn, level, new_spte)
        error = yield from vm.external.link_external_spt(gfn, level, external_spt)
    if error:
        yield ("restore SPTE", gfn, level, old_spte)
        words.cells[word] = old_spte
        return error
    yield ("publish SPTE", gfn, level, new_spte)
    words.cells[word] = new_spte
    removed = _note_change(vm, it.as_id, gfn, old_spte, new_spte, level)
    if removed is not None:
        yield from handle_removed_pt(vm, removed, shared=True)
    return 0


def _external_spt(vm: Vm, gfn: int, level: int, new_spte: int) -> int:
    """The external page of the table that `new_spte` links. Source: get_external_spt."""
    child = vm.sp_of(new_spte)
    if child.level + 1 != level or child.gfn != gfn:
        vm.warn("get_external_spt: the table does not belong under this entry")
    if child.external_spt == NO_PAGE:
        vm.bug("get_external_spt: the table has no external page")
    return child.external_spt


# -- setting an SPTE with mmu_lock exclusive


def tdp_mmu_iter_set_spte(vm: Vm, it: TdpIter, new_spte: int) -> Work:
    """Replace the entry at `it`; mmu_lock held for write. Source: tdp_mmu_iter_set_spte."""
    if it.yielded:
        vm.warn("tdp_mmu_iter_set_spte: the iterator yielded")
    it.old_spte = yield from tdp_mmu_set_spte(
        vm, it.as_id, it.word, it.old_spte, new_spte, it.gfn, it.level, mirror=it.is_mirror
    )


def tdp_mmu_set_spte(
    vm: Vm,
    as_id: int,
    word: int,
    old_spte: int,
    new_spte: int,
    gfn: int,
    level: int,
    mirror: bool,
) -> Doing:
    """Replace the SPTE in word `word`; mmu_lock held for write. Returns what it really was.

    mirror: the entry is one of a mirror EPT. Source: tdp_mmu_set_spte.
    """
    if old_spte == FROZEN_SPTE or new_spte == FROZEN_SPTE:
        vm.warn("tdp_mmu_set_spte: frozen entries exist under the shared lock only")
    old_spte = write_spte(vm, word, old_spte, new_spte, level)
    removed = _note_change(vm, as_id, gfn, old_spte, new_spte, level)
    if removed is not None:
        yield from handle_removed_pt(vm, removed, shared=False)
    if mirror:
        if new_spte & SPTE_MMU_PRESENT_MASK:
            vm.bug("tdp_mmu_set_spte: a mirror entry is installed under the exclusive lock")
        yield from remove_external_spte(vm, gfn, old_spte, level)
    return old_spte


def clear_leaf(vm: Vm, it: TdpIter) -> Doing | None:
    """As `tdp_mmu_iter_set_spte`, to empty the present leaf at `it`: returns the operation that
    takes the page out of the external EPT, None without one; `not_removed` is for its errors.
    """
    gfn, level, words = it.gfn, it.level, vm.memory.words
    old_spte = words.view[it.word]  # an xchg, whether it is needed or not
    words.cells[it.word] = SHADOW_NONPRESENT_VALUE
    _note_change(vm, it.as_id, gfn, old_spte, SHADOW_NONPRESENT_VALUE, level)
    return _remove_leaf(vm, gfn, old_spte, level) if it.is_mirror else None


def write_spte(vm: Vm, word: int, old_spte: int, new_spte: int, level: int) -> int:
    """Store `new_spte`, with an xchg if something that takes no lock may change the entry. Returns
    what was there. Source: tdp_iter.h, kvm_tdp_mmu_write_spte.
    """
    words = vm.memory.words
    if needs_atomic_write(old_spte, level):
        old_spte = words.view[word]
    words.cells[word] = new_spte
    return old_spte


def needs_atomic_write(spte: int, level: int) -> bool:
    """True for a present leaf that can change under the holder of the write lock.

    Source: tdp_iter.h, kvm_tdp_mmu_spte_need_atomic_update.
    """
    return bool(
        spte & SPTE_MMU_PRESENT_MASK
        and (level == 1 or spte & PT_PAGE_SIZE_MASK)
        and spte_needs_atomic_update(spte)
    )


def remove_external_spte(vm: Vm, gfn: int, old_spte: int, level: int) -> Work:
    """The mirror entry is gone; take its page out of the external EPT. mmu_lock held for write.

    Links are not removed here: tables go through free_external_spt. A failing hook is a bug.
    Source: remove_external_spte.
    """
    if is_last_spte(old_spte, level):
        error = yield from _remove_leaf(vm, gfn, old_spte, level)
        if error:
            not_removed(vm, gfn, error)


def _remove_leaf(vm: Vm, gfn: int, old_spte: int, level: int) -> Doing:
    """The hook's operation for a leaf that is gone."""
    assert vm.mmu_lock.held(WRITE)
    assert vm.external is not None
    return vm.external.remove_external_spte(gfn, level, spte_to_pfn(old_spte))


def not_removed(vm: Vm, gfn: int, error: int) -> None:
    """The hook could not take a page out of the external EPT: the VM is dead."""
    vm.bug(f"remove_external_spte: gfn {gfn:#x} could not be removed ({error})")


# -- what a change brings with it


def handle_changed_spte(
    vm: Vm, as_id: int, gfn: int, old_spte: int, new_spte: int, level: int, *, shared: bool
) -> Work:
    """Keep statistics right, and take apart the table that a vanished link pointed at.

    Source: handle_changed_spte.
    """
    removed = _note_change(vm, as_id, gfn, old_spte, new_spte, level)
    if removed is not None:
        yield from handle_removed_pt(vm, removed, shared=shared)


def _note_change(
    vm: Vm, as_id: int, gfn: int, old_spte: int, new_spte: int, level: int
) -> MmuPage | None:
    """The bookkeeping of a change; returns the table that nothing links any more, if one.

    Raises HostBug where a leaf was exchanged for another page: someone forgot to zap.
    """
    if level > 1 and gfn & (1 << 9 * (level - 1)) - 1:
        vm.warn(f"handle_changed_spte: gfn {gfn:#x} is not aligned to level {level}")
    if old_spte == new_spte:
        return None
    was_present = old_spte & SPTE_MMU_PRESENT_MASK
    is_present = new_spte & SPTE_MMU_PRESENT_MASK
    was_leaf = was_present and (level == 1 or old_spte & PT_PAGE_SIZE_MASK)
    is_leaf = is_present and (level == 1 or new_spte & PT_PAGE_SIZE_MASK)
    if was_leaf and is_leaf and (old_spte ^ new_spte) & HPA_MASK:
        raise HostBug(
            f"gfn {gfn:#x}: a present leaf changed its page ({old_spte:#x} -> {new_spte:#x})"
        )
    if vm.listener is not None:
        vm.listener(("spte_changed", as_id, level, gfn, old_spte, new_spte))
    if not was_present and not is_present:
        if new_spte != FROZEN_SPTE:
            _check_nonpresent_change(vm, old_spte, new_spte)
        return None
    if is_leaf:
        if new_spte & _WRITE_MASKS != _WRITE_MASKS and (
            wrong := check_spte_writable_invariants(new_spte)
        ):
            vm.warn(f"check_spte_writable_invariants: {wrong}")
        if not was_leaf:
            vm.update_page_stats(level, 1)
    elif was_leaf:
        vm.update_page_stats(level, -1)
    if not was_present or was_leaf:
        return None
    is_still_linked = is_present and not is_leaf and not (old_spte ^ new_spte) & HPA_MASK
    return None if is_still_linked else vm.sp_of(old_spte)


def _check_nonpresent_change(vm: Vm, old_spte: int, new_spte: int) -> None:
    """Of entries that are not present, only MMIO ones change, blocked ones are emptied, and others
    are frozen.
    """
    if is_blocked_spte(old_spte) and new_spte == SHADOW_NONPRESENT_VALUE:
        return
    if not is_mmio_spte(vm, old_spte) and not is_mmio_spte(vm, new_spte):
        vm.warn(f"unexpected change of a non-present SPTE: {old_spte:#x} -> {new_spte:#x}")


def handle_removed_pt(vm: Vm, sp: MmuPage, *, shared: bool) -> Work:
    """Take apart a table that has just been unlinked, and everything below it.

    Every entry becomes FROZEN, so that walkers who still look at the table install nothing there.
    Children go first. A mirror's table can only be taken apart with mmu_lock exclusive.
    Source: handle_removed_pt.
    """
    unlink_sp(vm, sp)
    level, is_mirror = sp.level, sp.is_mirror
    size, base = pages_per_level(level), vm.table_base(sp.spt)
    as_id, words = kvm_mmu_page_as_id(sp), vm.memory.words
    for index in range(ENTRIES_PER_TABLE):
        gfn, word = sp.gfn + index * size, base + index
        if shared:
            yield ("xchg FROZEN_SPTE", gfn, level)
            while (old_spte := words.view[word]) == FROZEN_SPTE:
                yield (WAIT, "frozen SPTE", gfn, level)
            words.cells[word] = FROZEN_SPTE
        else:
            old_spte = words.view[word]
            if not old_spte & SPTE_MMU_PRESENT_MASK:
                continue
            old_spte = write_spte(vm, word, old_spte, FROZEN_SPTE, level)
        removed = _note_change(vm, as_id, gfn, old_spte, FROZEN_SPTE, level)
        if removed is not None:
            yield from handle_removed_pt(vm, removed, shared=shared)
        if is_mirror:
            if shared:
                vm.bug("handle_removed_pt: a mirror's table goes under the shared lock")
            yield from remove_external_spte(vm, gfn, old_spte, level)
    if is_mirror:
        sp = yield from _free_external_spt(vm, sp)
    vm.call_rcu(sp)


def _free_external_spt(vm: Vm, sp: MmuPage) -> Generator[Step, None, MmuPage]:
    """Take the table's page back from the external EPT; where that fails, leak it."""
    assert vm.external is not None
    error = yield from vm.external.free_external_spt(sp.gfn, sp.level, sp.external_spt)
    if not error:
        return sp
    vm.warn(f"free_external_spt failed ({error}): the page {sp.external_spt:#x} is leaked")
    vm.pages.leak(sp.external_spt, "free_external_spt failed")
    sp = sp._replace(external_spt=NO_PAGE)
    vm.sps.put(sp.spt, sp)
    return sp


def kvm_mmu_page_as_id(sp: MmuPage) -> int:
    """The address space that a table belongs to: 1 for SMM. Source: kvm_mmu_page_as_id."""
    return int(bool(sp.role & Role.smm.mask))


# -- tables


def tdp_mmu_link_sp(vm: Vm, it: TdpIter, sp: MmuPage, *, shared: bool) -> Doing:
    """Let the entry at `it` point at the table `sp`. Returns 0 or what setting the entry returned.

    Source: tdp_mmu_link_sp.
    """
    spte = make_nonleaf_spte(vm, sp.spt, ad_disabled=bool(sp.role & AD_DISABLED))
    if shared:
        error = yield from tdp_mmu_set_spte_atomic(vm, it, spte)
        if error:
            return error
    else:
        yield from tdp_mmu_iter_set_spte(vm, it, spte)
    vm.account_table(sp, 1)
    return 0


def tdp_mmu_split_huge_page(vm: Vm, it: TdpIter, sp: MmuPage, *, shared: bool) -> Doing:
    """Replace the large leaf at `it` by the table `sp` of 512 smaller ones. Returns as
    `tdp_mmu_link_sp`. Source: tdp_mmu_split_huge_page.
    """
    huge_spte, level = it.old_spte, it.level
    first, shift = make_small_spte(vm, huge_spte, sp.role, 0), PAGE_SHIFT + 9 * (sp.level - 1)
    children = (first | index << shift for index in range(ENTRIES_PER_TABLE))
    vm.memory.words.fill(vm.table_base(sp.spt), pack(f"<{ENTRIES_PER_TABLE}Q", *children))
    error = yield from tdp_mmu_link_sp(vm, it, sp, shared=shared)
    if not error:
        vm.update_page_stats(level - 1, ENTRIES_PER_TABLE)
    return error


def unlink_sp(vm: Vm, sp: MmuPage) -> None:
    """A table is no longer linked: neither counted nor watched. Source: tdp_mmu_unlink_sp."""
    vm.account_table(sp, -1)
    if sp.nx_huge_page_disallowed:
        unaccount_nx_huge_page(vm, sp)
