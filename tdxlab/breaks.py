"""KVM with one of its rules turned off, to see what the rule is for.

    race = build("same-page", vcpus=2)
    with broken("no-freeze"):
        found = race.explore()
    print(found.violations[0].table())

A rule is turned off by putting another function into the place of the one that keeps it, in the
whole process, while the `with` lasts. Build the scenario before: it needs the rule to come about.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from errno import EBUSY, EIO
from typing import Any, NamedTuple

from tdxlab import tlb_races
from tdxlab.abi.leaves import TDH_MEM_SEPT_REMOVE
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_SUCCESS
from tdxlab.arch import HPA_MASK, PAGE_SHIFT, SIZE_2M
from tdxlab.kvm import fault, tdp_mmu, tdp_set, tdx_hooks, tdx_teardown
from tdxlab.kvm.external import Hook
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.locks import READ, Locking, MmuLock
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.seamcalls import sc_retry_ret, tdh_mem_range_block
from tdxlab.kvm.spte import FROZEN_SPTE, PT_PAGE_SIZE_MASK
from tdxlab.kvm.tdp_iter import TdpIter
from tdxlab.kvm.tdx import Tdx
from tdxlab.kvm.vm import Vm
from tdxlab.seam import checks
from tdxlab.steps import Operation, Step

Doing = Generator[Step, None, int]

#: No SPTE has this value.
_NO_SPTE = -1


class Break(NamedTuple):
    """A rule that can be turned off. what: what KVM does then. scenario, vcpus: where that shows.
    found: how the rule that an exploration finds broken there begins. substitutes: (owner,
    name, what takes its place). shows: what can be seen there, with the module's answer if it
    gives one.
    """

    what: str
    scenario: str
    vcpus: int
    found: str
    substitutes: tuple[tuple[Any, str, Any], ...]
    shows: str

    def reaches(self, owner: object) -> bool:
        """True if it puts something else into the place of a function of `owner`."""
        return any(changed is owner for changed, _, _ in self.substitutes)


@contextmanager
def broken(rule: str) -> Iterator[Break]:
    """Turn a rule of BREAKS off for the time of the `with`. Refuses an unknown one: ValueError."""
    if rule not in BREAKS:
        raise ValueError(f"there is no rule {rule!r}; choose one of {', '.join(BREAKS)}")
    with ExitStack() as stack:
        for owner, name, substitute in BREAKS[rule].substitutes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, substitute)
        yield BREAKS[rule]


# -- installing in a mirror


def _hook(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """Do in the external EPT what `new_spte` stands for; 0 or -errno."""
    assert vm.external is not None
    if it.level == 1 or new_spte & PT_PAGE_SIZE_MASK:
        pfn = (new_spte & HPA_MASK) >> PAGE_SHIFT
        return (yield from vm.external.set_external_spte(it.gfn, it.level, pfn))
    child = vm.sp_of(new_spte)
    assert child.external_spt != NO_PAGE
    return (yield from vm.external.link_external_spt(it.gfn, it.level, child.external_spt))


def _changed(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """What a change brings with it; returns 0."""
    old_spte = it.old_spte
    yield from tdp_set.handle_changed_spte(
        vm, it.as_id, it.gfn, old_spte, new_spte, it.level, shared=True
    )
    return 0


def _install_without_freezing(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """The entry keeps its old value until the hook is done."""
    words, word = vm.memory.words, it.word
    yield ("read SPTE", it.gfn, it.level)
    if words.view[word] != it.old_spte:
        return -EBUSY
    error = yield from _hook(vm, it, new_spte)
    if error:
        return error
    yield ("publish SPTE", it.gfn, it.level, new_spte)
    words.cells[word] = new_spte
    return (yield from _changed(vm, it, new_spte))


def _install_published_early(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """The entry has its new value before the hook is called."""
    words, word, old_spte = vm.memory.words, it.word, it.old_spte
    yield ("cmpxchg SPTE", it.gfn, it.level, old_spte, new_spte)
    if words.view[word] != old_spte:
        return -EBUSY
    words.cells[word] = new_spte
    error = yield from _hook(vm, it, new_spte)
    if error:
        yield ("restore SPTE", it.gfn, it.level, old_spte)
        words.cells[word] = old_spte
        return error
    return (yield from _changed(vm, it, new_spte))


def _install_without_restoring(vm: Vm, it: TdpIter, new_spte: int) -> Doing:
    """Where the hook fails the entry stays frozen."""
    words, word = vm.memory.words, it.word
    yield ("cmpxchg FROZEN_SPTE", it.gfn, it.level, it.old_spte)
    if words.view[word] != it.old_spte:
        return -EBUSY
    words.cells[word] = FROZEN_SPTE
    error = yield from _hook(vm, it, new_spte)
    if error:
        return error
    yield ("publish SPTE", it.gfn, it.level, new_spte)
    words.cells[word] = new_spte
    return (yield from _changed(vm, it, new_spte))


# -- locks and invalidations


_lock, _unlock = MmuLock.lock, MmuLock.unlock


def _lock_shared(self: MmuLock, _mode: str) -> Locking:
    return _lock(self, READ)


def _unlock_shared(self: MmuLock, _mode: str) -> None:
    _unlock(self, READ)


def _held_somehow(self: MmuLock, _mode: str) -> bool:
    return self.readers > 0


def _never_stale(*_arguments: object) -> bool:
    return False


def _always(*_arguments: object) -> bool:
    return True


# -- removing and taking apart


def _nothing(*_arguments: object, **_named: object) -> Operation:
    """An operation left out."""
    yield from ()


def _done(*_arguments: object) -> Doing:
    """A SEAMCALL left out; the caller takes it for done."""
    yield from ()
    return TDX_SUCCESS


def _zap_parent_first(tdx: Tdx, gfn: int, _level: int, _pfn: int) -> Hook:
    """Remove the table that maps the page, not the page."""
    host, td, gpa = tdx.host, tdx.td, gfn << PAGE_SHIFT & -SIZE_2M
    answer = yield from tdh_mem_range_block(host, td, gpa, 1)
    if tdx.bug_on("TDH_MEM_RANGE_BLOCK", *answer):
        return -EIO
    yield from tdx_hooks.tdx_track(tdx)
    registers, label = Registers(gpa | 1, td.tdr), ("TDH.MEM.SEPT.REMOVE", gpa, 1)
    answer = yield from sc_retry_ret(host, TDH_MEM_SEPT_REMOVE, registers, label)
    tdx.bug_on("TDH_MEM_SEPT_REMOVE", *answer)
    return -EIO


_SET = "set_external_spte_present"

#: Name -> the rule.
BREAKS: dict[str, Break] = {
    "no-freeze": Break(
        "an entry of a mirror keeps its old value while the external EPT changes",
        "same-page",
        2,
        "vm_bugged",
        ((tdp_set, _SET, _install_without_freezing),),
        "two vCPUs map the page; TDH.MEM.PAGE.AUG answers TDX_EPT_ENTRY_STATE_INCORRECT to one",
    ),
    "early-publish": Break(
        "an entry of a mirror gets its new value before the external EPT changes",
        "fresh-region",
        2,
        "vm_bugged",
        ((tdp_set, _SET, _install_published_early),),
        "a vCPU goes on below a table that the module does not have: TDX_EPT_WALK_FAILED",
    ),
    "no-restore": Break(
        "an entry of a mirror stays frozen where the external EPT could not be changed",
        "hook-failure",
        2,
        "deadlock",
        ((tdp_set, _SET, _install_without_restoring),),
        "every later fault there meets the frozen entry, and nobody will ever thaw it",
    ),
    "overwrite-frozen": Break(
        "a fault that meets a frozen entry goes on",
        "same-page",
        2,
        "Warned",
        ((tdp_mmu, "FROZEN_SPTE", _NO_SPTE),),
        "KVM warns: somebody changes an entry that belongs to another vCPU for the moment",
    ),
    "zap-under-read-lock": Break(
        "who needs mmu_lock for write takes it for read, and keeps nobody out",
        "fault-zap",
        1,
        "invariant 5",
        (
            (MmuLock, "lock", _lock_shared),
            (MmuLock, "unlock", _unlock_shared),
            (MmuLock, "held", _held_somehow),
        ),
        "a fault maps the page again before it goes back to the host: a free page is mapped",
    ),
    "no-retry": Break(
        "a fault maps what it looked up, though it was invalidated since",
        "fault-zap",
        1,
        "invariant 5",
        (
            (fault, "is_page_fault_stale", _never_stale),
            (fault, "mmu_invalidate_retry_gfn_unsafe", _never_stale),
        ),
        "a fault maps a page that was given back to the host after it had looked it up",
    ),
    "no-track": Break(
        "no new TLB epoch begins between blocking a page and removing it",
        "zap-enter",
        1,
        "vm_bugged",
        ((tdx_hooks, "tdx_track", _nothing), (tlb_races, "begin_epoch", _done)),
        "TDH.MEM.PAGE.REMOVE answers TDX_TLB_TRACKING_NOT_DONE: a TLB may still have the page",
    ),
    "no-kick": Break(
        "a new TLB epoch begins, but nobody is taken out of the old one",
        "zap-enter",
        1,
        "vm_bugged",
        ((KvmHost, "kick_all", _nothing), (tlb_races, "kick_everybody", _nothing)),
        "TDH.MEM.PAGE.REMOVE answers TDX_TLB_TRACKING_NOT_DONE: a vCPU is in the old epoch still",
    ),
    "no-tracking": Break(
        "no new TLB epoch begins, and the module removes pages without asking for one",
        "tlb-tracking",
        2,
        "invariant 6",
        (
            (tdx_hooks, "tdx_track", _nothing),
            (tlb_races, "begin_epoch", _done),
            (tlb_races, "kick_everybody", _nothing),
            (checks, "is_tracked", _always),
        ),
        "a TLB still leads to a page of another TD; a vCPU that reads there meets a machine check",
    ),
    "parent-first": Break(
        "a table of the external EPT is removed before the pages below it",
        "zap-enter",
        1,
        "vm_bugged",
        ((tdx_hooks, "tdx_sept_zap_private_spte", _zap_parent_first),),
        "TDH.MEM.SEPT.REMOVE answers TDX_EPT_PAGE_NOT_FREE: only an empty table can go",
    ),
    "no-writeback": Break(
        "a page is cleared and used again before its lines are written back",
        "zap-enter",
        1,
        "invariant 14",
        (
            (tdx_hooks, "tdh_phymem_page_wbinvd_hkid", _done),
            (tlb_races, "write_back", _nothing),
        ),
        "no SEAMCALL refuses; a dirty line of the TD's KeyID can overwrite the page at any time",
    ),
    "keyid-before-flush": Break(
        "a KeyID is given back before the vCPUs are flushed",
        "two-teardowns",
        1,
        "leaked",
        ((tdx_teardown, "tdx_flush_vp_on_cpu", _nothing),),
        "TDH.MNG.VPFLUSHDONE answers TDX_FLUSHVP_NOT_DONE; KeyID and pages are lost",
    ),
    "keyid-before-writeback": Break(
        "a KeyID is given back before the caches are written back",
        "two-teardowns",
        1,
        "vm_bugged",
        ((tdx_teardown, "smp_func_do_phymem_cache_wb", _nothing),),
        "TDH.MNG.KEY.FREEID answers TDX_WBCACHE_NOT_COMPLETE; the KeyID is lost",
    ),
    "reclaim-before-keyid": Break(
        "pages are reclaimed while the TD still has its KeyID",
        "two-teardowns",
        1,
        "Warned",
        (
            (tdx_teardown, "tdx_mmu_release_hkid", _nothing),
            (tdx_teardown, "_reclaim_or_leak", tdx_hooks.tdx_reclaim_page),
        ),
        "TDH.PHYMEM.PAGE.RECLAIM answers TDX_LIFECYCLE_STATE_INCORRECT, and KVM warns",
    ),
}
