"""Zapping a mirror's leaves in batches: block many, flush once, remove them all.

    one by one (Linux 6.16)         in batches of `vm.zap_batch`
    BLOCK a, TRACK, kick, REMOVE a  BLOCK a, BLOCK b, BLOCK c
    BLOCK b, TRACK, kick, REMOVE b  TRACK, kick
    BLOCK c, TRACK, kick, REMOVE c  REMOVE a, REMOVE b, REMOVE c

Between its BLOCK and its REMOVE a page is neither mapped nor free. The mirror says so with an
entry of its own kind (`blocked.py`), and mmu_lock may be given up meanwhile: whoever faults there
retries, and whoever zaps there takes the entry over, for he must not return before the page has
left. So each of the two may find that the other has removed it.

Source: the experiment that the reviews of KVM's TDX series left for later.
Differs: no kernel does this.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol, runtime_checkable

from tdxlab.kvm.blocked import is_blocked_spte, make_blocked_spte
from tdxlab.kvm.external import Hook
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.roots import is_invalid_root
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE, is_present_leaf, spte_to_pfn
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    for_each_tdp_pte,
    tdp_mmu_iter_cond_resched,
    tdp_mmu_max_gfn_exclusive,
)
from tdxlab.kvm.tdp_set import handle_changed_spte, write_spte
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.steps import Step

#: An operation in flight; and one that says whether TLBs are still to be flushed.
Work = Generator[Step, None, None]
Flushing = Generator[Step, None, bool]


@runtime_checkable
class BatchedRemoval(Protocol):
    """remove_external_spte in three hooks, for a back end that can block many pages before it
    flushes. Units as in `ExternalOps`; mmu_lock is held for write.
    """

    def block_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """Forbid new translations to the page. Returns 1; 0 if the external EPT never had it;
        -errno, which ends the VM.
        """
        ...

    def flush_external_sptes(self) -> Work:
        """Let no TLB hold a translation to anything that is blocked by now."""
        ...

    def remove_blocked_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """Unmap a page that was blocked, with a flush since. Returns 0; anything else ends the
        VM.
        """
        ...


class Blocked(NamedTuple):
    """A mirror entry that was blocked. word: its index in `memory.words`; spte: its value."""

    as_id: int
    gfn: int
    level: int
    word: int
    spte: int


def zap_mirror_leafs_in_batches(
    vm: Vm, root: MmuPage, start: int, end: int, can_yield: bool, flush: bool
) -> Flushing:
    """`tdp_mmu_zap_leafs` for a mirror of a VM whose `zap_batch` is not 0; arguments and result as
    there. A VM with a `mirror_zapper` leaves what is mapped to that one; pages that a parked slot
    keeps blocked are none of its, and are removed here.
    """
    assert vm.mmu_lock.held(WRITE)
    if vm.mirror_zapper is not None:
        flush = yield from vm.mirror_zapper(root, start, end, flush)
        if not vm.parked:
            return flush
    pending: list[Blocked] = []
    for it in for_each_tdp_pte(vm, root, start, min(end, tdp_mmu_max_gfn_exclusive(vm))):
        if can_yield and (yield from tdp_mmu_iter_cond_resched(vm, it, flush, WRITE)):
            flush = False
            continue
        spte = it.old_spte
        if is_present_leaf(spte, it.level):
            spte = yield from block_leaf(vm, it)
        elif not is_blocked_spte(spte):
            continue
        flush = flush or not is_invalid_root(vm, root)
        if is_blocked_spte(spte):
            pending.append(Blocked(it.as_id, it.gfn, it.level, it.word, spte))
        if len(pending) >= vm.zap_batch:
            yield from _remove(vm, pending)
            pending = []
    yield from _remove(vm, pending)
    return flush


def block_leaf(vm: Vm, it: TdpIter) -> Generator[Step, None, int]:
    """Block the leaf at `it`. Returns what the entry is then: empty, if there is nothing to
    remove.
    """
    pfn = spte_to_pfn(it.old_spte)
    entry = Blocked(it.as_id, it.gfn, it.level, it.word, make_blocked_spte(pfn))
    yield from change(vm, entry, it.old_spte, entry.spte)
    ret = yield from _back_end(vm).block_external_spte(it.gfn, it.level, pfn)
    if ret > 0:
        return entry.spte
    yield from change(vm, entry, entry.spte, SHADOW_NONPRESENT_VALUE)
    if ret:
        vm.bug(f"block_external_spte: gfn {it.gfn:#x} could not be blocked ({ret})")
    return SHADOW_NONPRESENT_VALUE


def _remove(vm: Vm, pending: list[Blocked]) -> Work:
    """Flush once, and remove what is blocked; nothing, if others have removed all of it.

    As when pages go one by one, the mirror entry is emptied before the hook is called.
    """
    view = vm.memory.words.view
    if not any(view[entry.word] == entry.spte for entry in pending):
        return
    yield from _back_end(vm).flush_external_sptes()
    for entry in pending:
        if view[entry.word] != entry.spte:
            continue
        yield from change(vm, entry, entry.spte, SHADOW_NONPRESENT_VALUE)
        error = yield from _back_end(vm).remove_blocked_external_spte(
            entry.gfn, entry.level, spte_to_pfn(entry.spte)
        )
        if error:
            vm.bug(f"remove_blocked_external_spte: gfn {entry.gfn:#x} is not removed ({error})")


def change(vm: Vm, entry: Blocked | TdpIter, old_spte: int, new_spte: int) -> Work:
    """Store `new_spte` where `entry` stands, and keep the books; no hook is called."""
    write_spte(vm, entry.word, old_spte, new_spte, entry.level)
    yield from handle_changed_spte(
        vm, entry.as_id, entry.gfn, old_spte, new_spte, entry.level, shared=False
    )


def _back_end(vm: Vm) -> BatchedRemoval:
    assert isinstance(vm.external, BatchedRemoval)
    return vm.external
