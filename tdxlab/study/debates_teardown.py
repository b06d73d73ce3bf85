"""Debates about orders in which things go: D8, the KeyID before or after the private pages; D14,
children before or after their parents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.breaks import broken
from tdxlab.kvm.tdx_teardown import kvm_destroy_vm, tdx_mmu_release_hkid
from tdxlab.machine import Machine
from tdxlab.steps import Operation
from tdxlab.study.debate_tools import calls, many, status_in
from tdxlab.study.teardown_lab import KEYID_FIRST, KEYID_LAST
from tdxlab.study.teardown_order import destroy_keyid_first
from tdxlab.study.undone import undone
from tdxlab.vmm_td import Td

# -- D8

#: Pages of the two TDs whose difference tells what a page costs: both need the same tables.
_FEW, _MANY = 8, 40
SAME_HOOKS = "KeyID first, hooks as in Linux 6.16"
FINE = "fine"


class KeyIdRow(NamedTuple):
    """The end of a TD in one order. seamcalls: of all of it. per_page: how many more there are for
    each private page more. lost: pages that the host never gets back, a TDR with them. vm: "fine",
    or what KVM says.
    """

    order: str
    pages: int
    seamcalls: int
    per_page: int
    lost: int
    vm: str


def _keyid_first_only(td: Td) -> Operation:
    """The KeyID goes back first; private pages are then removed by the hook that Linux has."""
    td.destroyed = True
    yield from tdx_mmu_release_hkid(td.tdx)
    yield from td.close_files_steps()
    yield from kvm_destroy_vm(td.tdx)
    td.host.remove_vm(td.vm)


ORDERS: dict[str, Callable[[Td], Operation]] = {
    KEYID_LAST: Td.destroy_steps,
    KEYID_FIRST: destroy_keyid_first,
    SAME_HOOKS: _keyid_first_only,
}


def keyid_rows(gpaw: int) -> list[KeyIdRow]:
    """D8: a TD in each order."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=2)
    rows = []
    for name, order in ORDERS.items():
        few, _, _ = _ended(machine, order, _FEW)
        made, lost, vm = _ended(machine, order, _MANY)
        per_page = (made - few) // (_MANY - _FEW)
        rows.append(KeyIdRow(name, _MANY, made, per_page, lost, vm))
    return rows


def _ended(machine: Machine, order: Callable[[Td], Operation], pages: int) -> tuple[int, int, str]:
    """(SEAMCALLs, pages lost, what KVM says) of the end of a TD with so many private pages."""
    with undone(machine):
        td = machine.create_td(memory=SIZE_2M)
        td.touch(0, pages * PAGE_SIZE)
        before, leaked = calls(machine), len(machine.host.pages.leaked)
        td.run_thread(order(td))
        made = calls(machine) - before
        lost = len(machine.host.pages.leaked) - leaked
        return made, lost, td.vm.vm_bugged or FINE


def judge_keyid(rows: Sequence[KeyIdRow]) -> str:
    """D8 in words."""
    fails = [row for row in rows if row.lost or row.vm != FINE]
    works = sorted((row for row in rows if row not in fails), key=lambda row: row.seamcalls)
    parts = []
    if len(works) > 1:
        best, worst = works[0], works[-1]
        saved = (worst.per_page - best.per_page) * (SIZE_1G // PAGE_SIZE)
        parts.append(
            f'"{best.order}" needs {many(best.seamcalls, "SEAMCALL")} and {best.per_page} for each '
            f'page more, "{worst.order}" {worst.seamcalls} and {worst.per_page}; for each GiB '
            f"that is a difference of {saved}"
        )
    parts += [f'"{row.order}" loses {many(row.lost, "page")}: {row.vm}' for row in fails]
    return ". ".join(parts) + "."


# -- D14


class OrderRow(NamedTuple):
    """A page is taken away in one order. asked: leaves that the zap called, by number. answer:
    the first error of the module. vm: "fine", or "ended".
    """

    order: str
    asked: str
    answer: str
    vm: str


CHILDREN, PARENT = "the page, then its table", "the table that maps the page"


def order_rows(gpaw: int) -> list[OrderRow]:
    """D14: a page with the order of Linux, and with its table first."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=SIZE_2M)
    td.touch(0, 2 * PAGE_SIZE)
    rows = [_order_row(machine, td, CHILDREN)]
    with broken("parent-first"):
        rows.append(_order_row(machine, td, PARENT))
    return rows


def _order_row(machine: Machine, td: Td, order: str) -> OrderRow:
    with undone(machine):
        before = dict(machine.seamcalls)
        td.run_thread(td.punch_hole_steps(0, PAGE_SIZE))
        bug = td.vm.vm_bugged
        made = [leaf for leaf, count in machine.seamcalls.items() if count > before.get(leaf, 0)]
    asked = ", ".join(leaf.removeprefix("TDH.") for leaf in made)
    return OrderRow(order, asked, status_in(bug) if bug else "-", "ended" if bug else FINE)


def judge_order(rows: Sequence[OrderRow]) -> str:
    """D14 in words."""
    parts = [
        f'"{row.order}" goes well'
        if row.vm == FINE
        else f'"{row.order}" is refused with {row.answer}, which ends the VM'
        for row in rows
    ]
    return "; ".join(parts) + "."
