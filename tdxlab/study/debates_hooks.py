"""D5: what calls the hooks of a back end, a private gfn or an entry of a mirror."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.kvm import fault as kvm_fault
from tdxlab.kvm.external import ExternalOps, Hook
from tdxlab.kvm.page_fault import PageFault
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK, spte_to_pfn
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_map
from tdxlab.kvm.tdp_set import Doing
from tdxlab.kvm.vm import Vcpu
from tdxlab.kvm.vm_types import KVM_X86_SNP_VM
from tdxlab.machine import Machine
from tdxlab.study.debate_tools import many, substituted
from tdxlab.views import pamt_rows
from tdxlab.vmm_snp import SnpVm
from tdxlab.vmm_td import Td


class HookRow(NamedTuple):
    """The life of one VM under one key. changes: entries of page tables that became present, or
    ceased to be. known: of those, the ones at which the key's question can be answered; unknown:
    at which it cannot, so that nobody is called. hooks: calls that are made. tables: of those, the
    ones that are about a table and not about a page. rmp: what changed in the RMP in this life.
    left: pages that are still the VM's when it is gone, by the RMP or by the PAMT.
    """

    vm: str
    key: str
    changes: int
    known: int
    unknown: int
    hooks: int
    tables: int
    rmp: int
    left: int


MIRROR_KEY, PRIVATE_KEY = "mirror's table", "private gfn"
TDX, SNP = "TDX", "SNP"
_SOME = 4


class _Watch:
    """Changes of one VM's entries, what is known at each, and who is called.

    changes, known: so far; pages, tables: calls about them. private: of the fault that is being
    handled, None outside of one.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.changes = self.known = self.pages = self.tables = 0
        self.private: bool | None = None

    def note(self) -> None:
        """An entry has changed."""
        self.changes += 1
        self.known += self.key == MIRROR_KEY or self.private is not None

    def call(self, *, about_table: bool) -> None:
        """A hook is called."""
        self.tables += about_table
        self.pages += not about_table


class _KeyedHooks:
    """The hooks of a TD, called if the key says so; who cannot be asked is not told."""

    def __init__(self, behind: ExternalOps, watch: _Watch) -> None:
        self.behind, self.watch = behind, watch

    def _passed_on(self, hook: Hook, *, about_table: bool) -> Hook:
        if self.watch.key == PRIVATE_KEY and not self.watch.private:
            return 0
        self.watch.call(about_table=about_table)
        return (yield from hook)

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As behind, or nothing."""
        hook = self.behind.link_external_spt(gfn, level, external_spt)
        return self._passed_on(hook, about_table=True)

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As behind, or nothing."""
        return self._passed_on(self.behind.set_external_spte(gfn, level, pfn), about_table=False)

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As behind, or nothing."""
        return self._passed_on(self.behind.remove_external_spte(gfn, level, pfn), about_table=False)

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As behind, or nothing."""
        hook = self.behind.free_external_spt(gfn, level, external_spt)
        return self._passed_on(hook, about_table=True)


def hook_rows(gpaw: int) -> list[HookRow]:
    """D5: both keys in a TD, and in an SNP VM, which has private memory and no mirror.

    With private gfns as the key the RMP of an SNP VM is kept by hooks of the MMU; with the other
    one by those of guest_memfd, as in Linux.

    Differs: outside of faults nobody asks the attributes instead; they may be others by then than
    when the entry was made.
    """
    return [
        *(_td_row(gpaw, key) for key in (MIRROR_KEY, PRIVATE_KEY)),
        *(_snp_row(gpaw, key) for key in (MIRROR_KEY, PRIVATE_KEY)),
    ]


def _td_row(gpaw: int, key: str) -> HookRow:
    machine, watch = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1), _Watch(key)
    td = machine.create_td(memory=SIZE_2M)
    tdr = td.tdr
    assert td.vm.external is not None
    td.vm.external = _KeyedHooks(td.vm.external, watch)
    _live(td, watch, lambda _gfn, _level, _spte: None)
    left = sum(row.owner == tdr for row in pamt_rows(machine))
    return _row(TDX, watch, 0, left)


def _snp_row(gpaw: int, key: str) -> HookRow:
    machine, watch = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1), _Watch(key)
    vm = machine.create_vm(vm_type=KVM_X86_SNP_VM, memory=SIZE_2M)
    assert isinstance(vm, SnpVm)

    def hook(gfn: int, level: int, spte: int) -> None:
        watch.call(about_table=level > 1)
        if level == 1:
            vm.rmp.make_private(spte_to_pfn(spte), gfn, vm.asid)

    if key == PRIVATE_KEY:
        vm.guest_memory.arch = None
    _live(vm, watch, hook if key == PRIVATE_KEY else lambda _gfn, _level, _spte: None)
    return _row(SNP, watch, vm.rmp.made_private + vm.rmp.made_shared, len(vm.owned()))


def _row(name: str, watch: _Watch, rmp: int, left: int) -> HookRow:
    unknown, hooks = watch.changes - watch.known, watch.pages + watch.tables
    counts = (watch.changes, watch.known, unknown, hooks, watch.tables)
    return HookRow(name, watch.key, *counts, rmp, left)


def _live(gate: Td | SnpVm, watch: _Watch, hook: Callable[[int, int, int], None]) -> None:
    """Pages are used, converted and punched out, and the VM is destroyed. hook: called with gfn,
    level and SPTE of each entry that is installed for a private fault.
    """

    def mapping(vcpu: Vcpu, fault: PageFault) -> Doing:
        watch.private = fault.is_private
        try:
            return (yield from kvm_tdp_mmu_map(vcpu, fault))
        finally:
            watch.private = None

    def listen(event: tuple[Any, ...]) -> None:
        if event[0] != "spte_changed":
            return
        _, _, level, gfn, old_spte, new_spte = event
        if (old_spte ^ new_spte) & SPTE_MMU_PRESENT_MASK:
            watch.note()
            if watch.private:
                hook(gfn, level, new_spte)

    gate.vm.listener = listen
    size = _SOME * PAGE_SIZE
    with substituted([(kvm_fault, "kvm_tdp_mmu_map", mapping)]):
        gate.touch(0, 2 * size)
        gate.convert(size, size, to="shared")
        gate.touch(size, size)
        gate.punch_hole(0, PAGE_SIZE)
        gate.destroy()


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
        parts += [_words(row) for row in mine]
    return "; ".join(parts) + "."


def _words(row: HookRow) -> str:
    tables = f" ({row.tables} about tables)" if row.hooks else ""
    left = f"leaves it {many(row.left, 'page')} when it is gone"
    return f"for {row.vm} that calls {many(row.hooks, 'hook')}{tables} and {left}"
