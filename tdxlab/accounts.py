"""What the page tables of a VM cost: tables, entries in use and bytes, for each tree and level.

    mirror     KVM's copy of the private tables, in host memory
    external   the Secure EPT itself, in pages that KVM gave to the module; its root is one of the
               TD's control pages
    direct     shared memory of a TD, all memory of any other VM

KVM cannot look into the external tree; the lab bench can.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, HPA_MASK, PAGE_SIZE, SEPT_LEVEL_NAMES
from tdxlab.bare import BareMachine
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK, is_last_spte
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.seam import sept
from tdxlab.seam.rules import FREE_BITS, SEPT_STATE_BY_BITS, SEPT_STATE_MASK
from tdxlab.seam.td import SEPT_ROOT_PAGE, Tdcs, Tdr

MIRROR, EXTERNAL, DIRECT = "mirror", "external", "direct"
TREES = (MIRROR, EXTERNAL, DIRECT)


class Occupancy(NamedTuple):
    """The tables of one level. tables: pages. entries: those in use, of 512 in each table. bytes:
    of the tables.
    """

    tables: int = 0
    entries: int = 0

    @property
    def capacity(self) -> int:
        """Entries in all."""
        return self.tables * ENTRIES_PER_TABLE

    @property
    def bytes(self) -> int:
        """Memory that the tables take."""
        return self.tables * PAGE_SIZE

    def add(self, tables: int, entries: int) -> Occupancy:
        """This, and as much more."""
        return Occupancy(self.tables + tables, self.entries + entries)

    def as_dict(self) -> dict[str, int]:
        """The figures by name, for JSON and for tables."""
        return {
            "tables": self.tables,
            "entries": self.entries,
            "capacity": self.capacity,
            "bytes": self.bytes,
        }


#: Name of a level, such as "4K" for the tables of 4 KiB entries -> what its tables hold.
Levels = dict[str, Occupancy]


def tables(machine: BareMachine, vm: Vm, tdr: int | None = None) -> dict[str, Levels]:
    """Occupancy of each tree and level of a VM, the highest level first; levels without a table are
    left out.

    tdr: HPA of the TD's TDR, None for a VM that is no TD or a TD that has none.
    """
    counted: dict[str, list[Occupancy]] = {
        tree: [Occupancy()] * len(SEPT_LEVEL_NAMES) for tree in TREES
    }
    for root in vm.tdp_mmu_roots:
        sp: MmuPage = vm.sps[root]
        _count_spt(vm, sp, counted[MIRROR if sp.is_mirror else DIRECT])
    if tdr is not None:
        _count_sept(machine, tdr, counted[EXTERNAL])
    named = {tree: _named(levels) for tree, levels in counted.items()}
    return {tree: levels for tree, levels in named.items() if levels}


def _named(levels: list[Occupancy]) -> Levels:
    top_down = reversed(list(zip(SEPT_LEVEL_NAMES, levels, strict=True)))
    return {name: level for name, level in top_down if level.tables}


def _count_spt(vm: Vm, sp: MmuPage, levels: list[Occupancy]) -> None:
    """Count KVM's table `sp` and those below it."""
    start = vm.table_base(sp.spt)
    spts = vm.memory.words.view[start : start + ENTRIES_PER_TABLE]
    present = [spte for spte in spts if spte & SPTE_MMU_PRESENT_MASK]
    levels[sp.level - 1] = levels[sp.level - 1].add(1, len(present))
    for spte in present:
        if not is_last_spte(spte, sp.level):
            _count_spt(vm, vm.sp_of(spte), levels)


def _count_sept(machine: BareMachine, tdr: int, levels: list[Occupancy]) -> None:
    """Count the Secure EPT of a TD; one whose root is not there yet has no tables."""
    memory = machine.memory
    view, page = memory.words.view, memory.frame(tdr)
    if view[page + Tdr.NUM_TDCX] <= SEPT_ROOT_PAGE:
        return
    tdcs = memory.frame(view[page + Tdr.TDCX_PA] & memory.pa_mask & HPA_MASK)
    eptp = view[tdcs + Tdcs.EPTP]
    if not eptp:
        return
    top = eptp >> 3 & 7
    levels[top] = levels[top].add(1, 0)
    for level, _gpa, entry, _place in sept.entries(memory, eptp):
        state = SEPT_STATE_BY_BITS.get(entry & SEPT_STATE_MASK)
        if state is not None and state.bits == FREE_BITS:
            continue  # locked, by a call that is about to fill it
        levels[level] = levels[level].add(0, 1)
        if level and state is not None and not state.is_leaf:
            levels[level - 1] = levels[level - 1].add(1, 0)
