"""What the module and KVM would answer at some point of a teardown; nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tdxlab import steps, views
from tdxlab.abi.status import status_name
from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.seamcalls import (
    tdh_mem_range_block,
    tdh_mem_track,
    tdh_mng_key_freeid,
    tdh_mng_vpflushdone,
    tdh_phymem_page_reclaim,
    tdh_phymem_page_wbinvd_hkid,
)
from tdxlab.seam.rules import TD_LIFECYCLE_NAMES
from tdxlab.steps import Operation
from tdxlab.study.teardown_lab import PRIVATE, TeardownLab


def _reclaim(lab: TeardownLab) -> Operation:
    return (yield from tdh_phymem_page_reclaim(lab.machine.host, a_page(lab))).status


def _block(lab: TeardownLab) -> Operation:
    err, _, _ = yield from tdh_mem_range_block(lab.machine.host, lab.td.tdx.td, 0, 0)
    return err


#: Leaf -> how to call it on a lab's TD, for a private page where it needs one.
CALLS: dict[str, Callable[[TeardownLab], Operation]] = {
    "TDH.MEM.RANGE.BLOCK": _block,
    "TDH.MEM.TRACK": lambda lab: tdh_mem_track(lab.machine.host, lab.td.tdx.td),
    "TDH.PHYMEM.PAGE.WBINVD": lambda lab: tdh_phymem_page_wbinvd_hkid(
        lab.machine.host, lab.keyid, a_page(lab)
    ),
    "TDH.MNG.VPFLUSHDONE": lambda lab: tdh_mng_vpflushdone(lab.machine.host, lab.td.tdx.td),
    "TDH.MNG.KEY.FREEID": lambda lab: tdh_mng_key_freeid(lab.machine.host, lab.td.tdx.td),
    "TDH.PHYMEM.PAGE.RECLAIM": _reclaim,
}


def a_page(lab: TeardownLab) -> int:
    """HPA of the page at GPA 0."""
    return min(hpa for hpa, role in lab.roles.items() if role == PRIVATE)


def try_call(lab: TeardownLab, leaf: str) -> str:
    """Name of the status that a leaf of CALLS would answer now."""
    return status_name(_undone(lab, CALLS[leaf](lab))[0])


def try_remove(lab: TeardownLab) -> str:
    """What KVM would say to removing the page at GPA 0 now: "fine", or why the VM is dead."""
    hook = lab.td.tdx.remove_external_spte(0, 1, a_page(lab) >> PAGE_SHIFT)
    ret, bugged = _undone(lab, hook)
    return "fine" if not ret else bugged


def try_free_table(lab: TeardownLab) -> str:
    """What KVM would say to freeing a table of the Secure EPT now."""
    table = next(hpa for hpa, role in lab.roles.items() if role.startswith("S-EPT"))
    ret, bugged = _undone(lab, lab.td.tdx.free_external_spt(0, 2, table))
    return "fine" if not ret else bugged


def _undone(lab: TeardownLab, operation: Operation) -> tuple[int, str]:
    """Run an operation and take it back. Returns what it returned, and the VM's bug."""
    machine = lab.machine
    mark = machine.mark()
    try:
        return steps.run(operation), lab.td.vm.vm_bugged
    finally:
        machine.rewind(mark)
        machine.journal.forget(mark)


class TryRow(NamedTuple):
    """What would be answered before a phase. td: life cycle of the TD. reclaim, block: statuses for
    a private page; remove, free_table: what KVM's hooks would do.
    """

    before: str
    td: str
    block: str
    reclaim: str
    remove: str
    free_table: str


def try_rows(lab: TeardownLab) -> list[TryRow]:
    """Before every phase of the teardown on the tape until the first page is reclaimed, while the
    page at GPA 0 is the TD's.
    """
    rows = []
    for phase, place in lab.phases().items():
        lab.tape.seek(place)
        if lab.ledger()[0].module != "PT_REG":
            break
        state = views.td_info(lab.machine, lab.td.tdx.td.tdr)["lifecycle_state"]
        answers = [try_call(lab, leaf) for leaf in ("TDH.MEM.RANGE.BLOCK", _RECLAIM)]
        hooks = ["fine" if said(lab) == "fine" else "VM dead" for said in _HOOKS]
        rows.append(TryRow(phase, TD_LIFECYCLE_NAMES[state], *answers, *hooks))
    return rows


_RECLAIM = "TDH.PHYMEM.PAGE.RECLAIM"
_HOOKS = (try_remove, try_free_table)
