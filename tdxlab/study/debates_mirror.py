"""Debates about the mirror: D5, what calls its hooks; D16, whether to have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.kvm import fault as kvm_fault
from tdxlab.kvm import tdp_iter, tdp_mmu
from tdxlab.kvm.external import ExternalOps, Hook
from tdxlab.kvm.page_fault import PageFault
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_iter import TdpIter
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_map
from tdxlab.kvm.tdp_set import Doing
from tdxlab.kvm.vm import Vcpu
from tdxlab.kvm.vm_types import KVM_X86_SNP_VM
from tdxlab.machine import Machine
from tdxlab.study.debate_tools import (
    calls,
    many,
    substituted,
)
from tdxlab.vmm import Gate
from tdxlab.vmm_snp import SnpVm
from tdxlab.vmm_td import Td

# -- D5


class HookRow(NamedTuple):
    """The life of one VM under one key. changes: entries of page tables that became present, or
    ceased to be. known: of those, the ones at which the key's question can be answered; unknown:
    at which it cannot. hooks: calls that follow from the answers. tables: of those, the ones that
    are about a table and not about a page. rmp: what changed in the RMP in this life, by the hooks
    of guest_memfd.
    """

    vm: str
    key: str
    changes: int
    known: int
    unknown: int
    hooks: int
    tables: int
    rmp: int


MIRROR_KEY, PRIVATE_KEY = "mirror's table", "private gfn"
TDX, SNP = "TDX", "SNP"
_SOME = 4


class _Change(NamedTuple):
    """private: the fault that brought the change is; None outside of a fault. is_table: the entry
    links one.
    """

    private: bool | None
    is_table: bool


class _CountedHooks:
    """The hooks of a VM's back end, counted. pages, tables: calls about pages and about tables."""

    def __init__(self, behind: ExternalOps) -> None:
        self.behind = behind
        self.pages = self.tables = 0

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As behind."""
        self.tables += 1
        return self.behind.link_external_spt(gfn, level, external_spt)

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As behind."""
        self.pages += 1
        return self.behind.set_external_spte(gfn, level, pfn)

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As behind."""
        self.pages += 1
        return self.behind.remove_external_spte(gfn, level, pfn)

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As behind."""
        self.tables += 1
        return self.behind.free_external_spt(gfn, level, external_spt)


def hook_rows(gpaw: int) -> list[HookRow]:
    """D5: both keys in a TD, and in an SNP VM, which has private memory and no mirror."""
    rows = []
    for name in (TDX, SNP):
        changes, hooks, rmp = _life(gpaw, name)
        pages, tables = (hooks.pages, hooks.tables) if hooks else (0, 0)
        total = len(changes)
        rows.append(HookRow(name, MIRROR_KEY, total, total, 0, pages + tables, tables, rmp))
        known = [change for change in changes if change.private is not None]
        called = [change for change in known if change.private]
        tables = sum(change.is_table for change in called)
        unknown = total - len(known)
        rows.append(
            HookRow(name, PRIVATE_KEY, total, len(known), unknown, len(called), tables, rmp)
        )
    return rows


def _life(gpaw: int, name: str) -> tuple[list[_Change], _CountedHooks | None, int]:
    """(changes, hooks that were called, changes of the RMP): pages are used, converted and punched
    out, and the VM is destroyed.
    """
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    gate: Gate
    if name == TDX:
        gate = machine.create_td(memory=SIZE_2M)
    else:
        gate = machine.create_vm(vm_type=KVM_X86_SNP_VM, memory=SIZE_2M)
    hooks = None
    if gate.vm.external is not None:
        gate.vm.external = hooks = _CountedHooks(gate.vm.external)
    size = _SOME * PAGE_SIZE
    with _changes(gate) as changes:
        gate.touch(0, 2 * size)
        gate.convert(size, size, to="shared")
        gate.touch(size, size)
        gate.punch_hole(0, PAGE_SIZE)
        gate.run_thread(gate.destroy_steps())
    rmp = gate.rmp.made_private + gate.rmp.made_shared if isinstance(gate, SnpVm) else 0
    return changes, hooks, rmp


@contextmanager
def _changes(gate: Gate) -> Iterator[list[_Change]]:
    """Every change of an entry's presence while it lasts."""
    changes: list[_Change] = []
    faults: list[PageFault] = []

    def mapping(vcpu: Vcpu, fault: PageFault) -> Doing:
        faults.append(fault)
        try:
            return (yield from kvm_tdp_mmu_map(vcpu, fault))
        finally:
            faults.pop()

    def listen(event: tuple[Any, ...]) -> None:
        if event[0] == "spte_changed" and (event[4] ^ event[5]) & SPTE_MMU_PRESENT_MASK:
            private = faults[-1].is_private if faults else None
            changes.append(_Change(private, event[2] > 1))

    before, gate.vm.listener = gate.vm.listener, listen
    try:
        with substituted([(kvm_fault, "kvm_tdp_mmu_map", mapping)]):
            yield changes
    finally:
        gate.vm.listener = before


def judge_hooks(rows: Sequence[HookRow]) -> str:
    """D5 in words."""
    parts = []
    for key in dict.fromkeys(row.key for row in rows):
        mine = [row for row in rows if row.key == key]
        unknown, changes = sum(row.unknown for row in mine), sum(row.changes for row in mine)
        parts.append(
            f'"{key}" cannot be answered at {unknown} of {changes} changes'
            if unknown
            else f'"{key}" is answered at all {changes} changes'
        )
    for row in rows:
        if row.rmp:
            hooks = many(row.hooks, "hook")
            if row.hooks:
                hooks += f", {row.tables or 'none'} of them about a table"
            words = f'for {row.vm}, "{row.key}" calls {hooks}'
            parts.append(f"{words}, and guest_memfd's change the RMP {many(row.rmp, 'time')}")
    return "; ".join(parts) + "."


# -- D16


class ReadRow(NamedTuple):
    """One deed. reads: mirror entries that KVM looks at. seamcalls: with the mirror; without: if
    each of the reads were a TDH.MEM.SEPT.RD. mirror_tables: pages of the mirror below its root at
    the end of the deed, for as many of the Secure EPT.
    """

    deed: str
    reads: int
    seamcalls: int
    without: int
    mirror_tables: int


def read_rows(gpaw: int) -> list[ReadRow]:
    """D16: some deeds, one after the other."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=1, packages=1)
    td = machine.create_td(memory=2 * SIZE_1G)
    td.touch(0)
    page = PAGE_SIZE
    deeds = {
        "first page of another GiB": lambda: td.touch(SIZE_1G),
        "the page beside it": lambda: td.touch(SIZE_1G + page),
        "7 more": lambda: td.touch(SIZE_1G + 2 * page, 7 * page),
        "2 MiB become shared, 9 mapped": lambda: td.convert(SIZE_1G, SIZE_2M, to="shared"),
        "2 MiB become shared, none mapped": lambda: td.convert(SIZE_2M, SIZE_2M, to="shared"),
    }
    return [_read_row(machine, td, name, deed) for name, deed in deeds.items()]


def _read_row(machine: Machine, td: Td, name: str, deed: Callable[[], object]) -> ReadRow:
    reads = 0

    class Counting(TdpIter):
        """An iterator that counts the entries of mirrors at which it looks."""

        __slots__ = ()

        def descend(self, goal: int) -> None:
            nonlocal reads
            level = self.level + (self.word < 0)
            super().descend(goal)
            reads += self.is_mirror * (level - self.level)

        def walk(self, end: int) -> Iterator[TdpIter]:
            nonlocal reads
            for it in super().walk(end):
                reads += self.is_mirror
                yield it

    before = calls(machine)
    with substituted([(tdp_iter, "TdpIter", Counting), (tdp_mmu, "TdpIter", Counting)]):
        deed()
    made, tables = calls(machine) - before, td.vm.stats["pt_pages_mirror"]
    return ReadRow(name, reads, made, made + reads, tables)


def judge_reads(rows: Sequence[ReadRow]) -> str:
    """D16 in words."""
    made, without = sum(row.seamcalls for row in rows), sum(row.without for row in rows)
    most = max(rows, key=lambda row: row.without - row.seamcalls)
    tables = max(row.mirror_tables for row in rows)
    more = "no SEAMCALL more" if without == made else f"{without - made} SEAMCALLs more"
    return (
        f"Without a mirror there would be {more}: {without} instead of {made}. Most is read when: "
        f"{most.deed} ({most.reads} entries). The mirror's price: {many(tables, 'page')} of tables "
        "below its root."
    )
