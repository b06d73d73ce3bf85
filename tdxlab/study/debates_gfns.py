"""D1: does a gfn inside the walker contain the shared bit?

The same random life of a TD's shared memory, with its dirty pages logged and its pages taken away
by the host now and then, in four versions of the walker. Whoever is given a gfn by the walker
expects one of a memslot.
Differs: faults and zaps walk with raw gfns, the dirty log itself does not. A bit for a gfn outside
of the slot is not set; Linux would set it behind the end of the bitmap. A macro that adds the bit,
two gfns in every iterator, and the bit in the root's own page are not run: each gives the MMU the
gfns of one of these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.guest import Write
from tdxlab.kvm import tdp_mmu, zap
from tdxlab.kvm.dirty import kvm_get_dirty_log_protect
from tdxlab.kvm.dirty_log import mark_page_dirty_in_slot
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES, Slot
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE, SPTE_MMU_PRESENT_MASK, is_present_leaf
from tdxlab.kvm.tdp_iter import (
    TdpIter,
    for_each_tdp_pte,
    for_each_tdp_pte_min_level,
    gfn_root_bits,
    tdp_mmu_max_gfn_exclusive,
)
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.machine import Machine
from tdxlab.steps import run
from tdxlab.study.debate_tools import Substitute, heard, many, substituted
from tdxlab.study.undone import undone
from tdxlab.vmm_ioctls import HVA_BASE
from tdxlab.vmm_td import Td

#: Shared pages, and what is done with them: that many times, drawn with this seed.
PAGES, DEEDS, SEED = 4, 24, 0
_SLOT, _GPA = 1, SIZE_2M


class GfnRow(NamedTuple):
    """One version of the walker. wrong_gfns: calls that were given a gfn of no memslot. dirty_lost:
    written pages that the dirty log does not have. left_mapped: pages that the host took away and
    that stayed mapped. root_entries: that a walk over the whole direct root looks at; unseen: those
    of Linux's walk that it does not, and of them unseen_used: those that link a table. true_events:
    events that name the gfn which is really mapped, in percent. flush_misses: leaves that were
    cleared under a gfn that no TLB has, so that a flush of that gfn would leave them in use.
    """

    walker: str
    wrong_gfns: int
    dirty_lost: int
    left_mapped: int
    root_entries: int
    unseen: int
    unseen_used: int
    true_events: int
    flush_misses: int


# -- the versions


def _raw_iter(vm: Vm, root: MmuPage, min_level: int, gfn: int, gfn_bits: int) -> TdpIter:
    """An iterator whose gfn has the shared bit; nothing is added at the index."""
    return TdpIter(vm, root, min_level, gfn | gfn_bits, 0)


def _raw_walk(vm: Vm, root: MmuPage, start: int, end: int) -> Iterator[TdpIter]:
    """Who zaps converts its range."""
    bits = gfn_root_bits(vm, root)
    return TdpIter(vm, root, 1, start | bits, 0).walk(end | bits)


def _unconverted_walk(vm: Vm, root: MmuPage, start: int, end: int) -> Iterator[TdpIter]:
    """Who zaps has forgotten to."""
    return TdpIter(vm, root, 1, start, 0).walk(end)


def _masked_all(vm: Vm, root: MmuPage, min_level: int) -> Iterator[TdpIter]:
    """A walk of everything that adds the bit as any other walk does."""
    end = tdp_mmu_max_gfn_exclusive(vm)
    return for_each_tdp_pte_min_level(vm, root, min_level, 0, end)


CLEAN, MASKED = "clean gfns", "clean, whole root with the bit"
CONVERTED, FORGOTTEN = "raw gfns, zaps convert", "raw gfns, zaps forget"

WALKERS: dict[str, tuple[Substitute, ...]] = {
    CLEAN: (),
    MASKED: ((zap, "for_each_tdp_pte_min_level_all", _masked_all),),
    CONVERTED: ((tdp_mmu, "TdpIter", _raw_iter), (zap, "for_each_tdp_pte", _raw_walk)),
    FORGOTTEN: ((tdp_mmu, "TdpIter", _raw_iter), (zap, "for_each_tdp_pte", _unconverted_walk)),
}


# -- the life


def gfn_rows(gpaw: int) -> list[GfnRow]:
    """D1: the same life with each walker."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=SIZE_2M)
    td.add_memory(_GPA, PAGES * PAGE_SIZE, private=False)
    flags = KVM_MEM_LOG_DIRTY_PAGES
    td.set_user_memory_region(_SLOT, _GPA, PAGES * PAGE_SIZE, flags=flags)
    _use(td, 0)
    return [_row(td, machine, name, places) for name, places in WALKERS.items()]


def _row(td: Td, machine: Machine, name: str, substitutes: Sequence[Substitute]) -> GfnRow:
    wrong: list[int] = []

    def mark(vm: Vm, slot: Slot | None, gfn: int) -> None:
        if slot is not None and not slot.base_gfn <= gfn < slot.end_gfn:
            wrong.append(gfn)
            return
        mark_page_dirty_in_slot(vm, slot, gfn)

    listening = (tdp_mmu, "mark_page_dirty_in_slot", mark)
    with undone(machine), substituted([*substitutes, listening]), heard(td.vm) as events:
        lost, left = _live(td)
        seen = _root_words(td.vm)
    names = [event for event in events if event[0] == "spte_changed" and event[2] == 1]
    false = [event for event in names if not event[3] & td.vm.gfn_direct_bits]
    missed = sum(event[5] == SHADOW_NONPRESENT_VALUE for event in false)
    unseen = _root_words(td.vm) - seen
    used = sum(bool(machine.memory.words.view[word] & SPTE_MMU_PRESENT_MASK) for word in unseen)
    percent = 100 * (len(names) - len(false)) // len(names)
    return GfnRow(name, len(wrong), lost, left, len(seen), len(unseen), used, percent, missed)


def _live(td: Td) -> tuple[int, int]:
    """(written pages that the log lost, pages that stayed mapped though they were taken away)."""
    lot, lost, left = random.Random(SEED), 0, 0
    written: set[int] = set()
    _harvest(td)
    for _ in range(DEEDS):
        page = lot.randrange(PAGES)
        deed = lot.choice((_use, _use, _take_away, None))
        if deed is None:
            lost += len(written - _harvest(td))
            written = set()
        else:
            deed(td, page)
            written |= {page} if deed is _use else set()
        if deed is _take_away:
            left += _is_mapped(td.vm, page)
    return lost + len(written - _harvest(td)), left


def _use(td: Td, page: int) -> None:
    td.run([Write(_GPA + page * PAGE_SIZE | td.guest.shared_mask)])


def _take_away(td: Td, page: int) -> None:
    """The host unmaps the page, and maps a new one at the same place."""
    hva = HVA_BASE + _GPA + page * PAGE_SIZE
    td.run_thread(td.user_memory.munmap(hva, PAGE_SIZE))
    td.user_memory.mmap(hva, PAGE_SIZE)


def _harvest(td: Td) -> set[int]:
    """KVM_GET_DIRTY_LOG: pages of the slot."""
    slot = td.vm.slots.by_id(_SLOT)
    assert slot is not None
    _, gfns = run(td.host.on_cpu(1, kvm_get_dirty_log_protect(td.vm, slot)))
    return {gfn - slot.base_gfn for gfn in gfns if slot.base_gfn <= gfn < slot.end_gfn}


def _is_mapped(vm: Vm, page: int) -> bool:
    gfn = (_GPA // PAGE_SIZE) + page
    root = vm.sps[vm.vcpus[0].root_hpa]
    walk = for_each_tdp_pte(vm, root, gfn, gfn + 1)
    return any(is_present_leaf(it.old_spte, it.level) for it in walk)


def _root_words(vm: Vm) -> set[int]:
    """Entries of the direct root at which a walk of the whole root looks."""
    root = vm.sps[vm.vcpus[0].root_hpa]
    walk = vars(zap)["for_each_tdp_pte_min_level_all"]  # as it is substituted at present
    return {it.word for it in walk(vm, root, root.level)}


def judge_gfns(rows: Sequence[GfnRow]) -> str:
    """D1 in words."""
    parts = []
    for row in rows:
        bugs = []
        if row.wrong_gfns:
            bugs.append(f"{many(row.wrong_gfns, 'call')} got a gfn of no memslot")
        if row.dirty_lost:
            bugs.append(f"the dirty log lost {many(row.dirty_lost, 'page')}")
        if row.left_mapped:
            bugs.append(f"{many(row.left_mapped, 'page')} stayed mapped behind the host's back")
        if row.unseen:
            bugs.append(
                f"a full zap never looks at {row.unseen} entries of the root, "
                f"{row.unseen_used or 'none'} of them in use"
            )
        if row.flush_misses:
            bugs.append(f"a TLB flush of its gfns would miss {many(row.flush_misses, 'page')}")
        good = "no bug" if not bugs else ", ".join(bugs)
        parts.append(f'"{row.walker}": {good}; {row.true_events} % of events name the mapped gfn')
    return ". ".join(parts) + "."
