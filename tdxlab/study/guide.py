"""Which SEAMCALL comes next: on the way to a running TD, and on the way back to free pages.

The answer follows from the machine's books alone, so it is right after a detour too. `stage` names
the part of a TD's life that a call belongs to.

Source: TDX module 1.5.01, the file of each leaf, for what each needs; Linux 6.16,
arch/x86/kvm/vmx/tdx.c, for the order among calls that the module leaves open.
Differs: it builds a TD with one vCPU and one page, and measures no content.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab import views
from tdxlab.arch import level_size, sept_levels
from tdxlab.bare import BareMachine
from tdxlab.scenarios import CODE_GPA
from tdxlab.seam.rules import (
    OP_INITIALIZED,
    OP_RUNNABLE,
    OP_UNINITIALIZED,
    TD_BLOCKED,
    TD_HKID_ASSIGNED,
    TD_KEYS_CONFIGURED,
    TD_TEARDOWN,
    VCPU_UNINITIALIZED,
)
from tdxlab.seam.td import MIN_TDCX, MIN_TDVPS_PAGES
from tdxlab.study.books import pages, vcpu
from tdxlab.study.things import owned

#: Stages of a build, then those of a teardown, in their order.
BUILD = ("create", "keys", "control pages", "init", "vCPU", "S-EPT", "page", "finalize", "enter")
TEAR_DOWN = ("leave", "flush", "write back", "free the KeyID", "reclaim")

#: Not a SEAMCALL: an interrupt makes the guest leave its LP.
INTERRUPT = "interrupt"


class Next(NamedTuple):
    """A call to make. registers: register -> the name of a thing in `things`."""

    stage: str
    leaf: str
    lp: int
    registers: dict[str, str]


def next_to_build(machine: BareMachine, gpaw: int) -> Next | None:
    """The call that brings the first TD nearer to running; None once it runs, or on its way out.

    gpaw: 48 or 52, as in its parameters.
    """
    tdrs = pages(machine, "PT_TDR")
    if not tdrs:
        return Next("create", "TDH.MNG.CREATE", 0, {"rcx": "free page", "rdx": "free KeyID"})
    tdr = tdrs[0].hpa
    info = views.td_info(machine, tdr)
    if info["lifecycle_state"] == TD_HKID_ASSIGNED:
        package = _first_package(machine, ~info["pkg_config_bitmap"])
        return Next("keys", "TDH.MNG.KEY.CONFIG", lp_of(machine, package), {"rcx": "TDR"})
    if info["lifecycle_state"] != TD_KEYS_CONFIGURED:
        return None
    if info["num_tdcx"] < MIN_TDCX:
        operands = {"rcx": "free page", "rdx": "TDR"}
        return Next("control pages", "TDH.MNG.ADDCX", 0, operands)
    if info["op_state"] == OP_UNINITIALIZED:
        return Next("init", "TDH.MNG.INIT", 0, {"rcx": "TDR", "rdx": "TD_PARAMS"})
    if info["op_state"] == OP_INITIALIZED:
        return _next_vcpu(machine) or _next_page(machine, tdr, gpaw)
    return _next_entry(machine) if info["op_state"] == OP_RUNNABLE else None


def next_to_tear_down(machine: BareMachine) -> Next | None:
    """The call that brings the first TD nearer to its end; None if there is no TD."""
    tdrs = pages(machine, "PT_TDR")
    if not tdrs:
        return None
    tdr = tdrs[0].hpa
    info = views.td_info(machine, tdr)
    inside = [lp for lp in machine.cpu.lps if machine.cpu.tdr_inside(lp) == tdr]
    if inside:
        return Next("leave", INTERRUPT, inside[0], {})
    if info["lifecycle_state"] == TD_TEARDOWN:
        return _next_reclaim(machine, tdr)
    if info["lifecycle_state"] == TD_BLOCKED:
        pending = machine.module.keys.pending_packages.view[info["hkid"]]
        if pending:
            lp = lp_of(machine, _first_package(machine, pending))
            return Next("write back", "TDH.PHYMEM.CACHE.WB", lp, {"rcx": "0"})
        return Next("free the KeyID", "TDH.MNG.KEY.FREEID", 0, {"rcx": "TDR"})
    return _next_flush(machine, tdr)


def lp_of(machine: BareMachine, package: int) -> int:
    """The first LP of a package that runs no guest; of all of them the first."""
    cpu = machine.cpu
    lps = [lp for lp in cpu.lps if cpu.package_of[lp] == package]
    return next((lp for lp in lps if not cpu.vcpu_inside(lp)), lps[0])


def _first_package(machine: BareMachine, bitmap: int) -> int:
    return next(package for package in machine.cpu.packages if bitmap >> package & 1)


def _next_vcpu(machine: BareMachine) -> Next | None:
    """A vCPU: its root page, five more, and TDH.VP.INIT; None when there is one."""
    tdvprs = pages(machine, "PT_TDVPR")
    if not tdvprs:
        return Next("vCPU", "TDH.VP.CREATE", 0, {"rcx": "free page", "rdx": "TDR"})
    first = vcpu(machine, tdvprs[0])
    if first.pages < MIN_TDVPS_PAGES:
        return Next("vCPU", "TDH.VP.ADDCX", 0, {"rcx": "free page", "rdx": "TDVPR"})
    if first.state == VCPU_UNINITIALIZED:
        return Next("vCPU", "TDH.VP.INIT", 0, {"rcx": "TDVPR", "rdx": "0"})
    return None


def _next_page(machine: BareMachine, tdr: int, gpaw: int) -> Next:
    """The tables above the page from the root down, the page, and the end of the build."""
    there = {(row.sept_level, row.gpa) for row in views.sept_rows(machine, tdr)}
    for level in range(sept_levels(gpaw) - 1, 0, -1):
        if (level, CODE_GPA & -level_size(level)) not in there:
            operands = {"rcx": f"GPA, level {level}", "rdx": "TDR", "r8": "free page"}
            return Next("S-EPT", "TDH.MEM.SEPT.ADD", 0, operands)
    if (0, CODE_GPA) not in there:
        operands = {"rcx": "GPA, level 0", "rdx": "TDR", "r8": "free page", "r9": "source page"}
        return Next("page", "TDH.MEM.PAGE.ADD", 0, operands)
    return Next("finalize", "TDH.MR.FINALIZE", 0, {"rcx": "TDR"})


def _next_entry(machine: BareMachine) -> Next | None:
    first = pages(machine, "PT_TDVPR")[0]
    if any(machine.cpu.vcpu_inside(lp) == first.hpa for lp in machine.cpu.lps):
        return None
    lp = vcpu(machine, first).lp
    return Next("enter", "TDH.VP.ENTER", lp or 0, {"rcx": "TDVPR"})


def _next_flush(machine: BareMachine, tdr: int) -> Next:
    """Every association ends on its own LP, then the TD's work."""
    for row in pages(machine, "PT_TDVPR"):
        associated = vcpu(machine, row).lp
        if row.owner == tdr and associated is not None:
            return Next("flush", "TDH.VP.FLUSH", associated, {"rcx": _name(machine, row.hpa)})
    return Next("flush", "TDH.MNG.VPFLUSHDONE", 0, {"rcx": "TDR"})


def _next_reclaim(machine: BareMachine, tdr: int) -> Next:
    """Any page of the TD but the TDR, which comes last."""
    children = (row for row in views.pamt_rows(machine) if row.owner == tdr)
    hpa = next((row.hpa for row in children if row.page_type != "PT_NDA"), tdr)
    return Next("reclaim", "TDH.PHYMEM.PAGE.RECLAIM", 0, {"rcx": _name(machine, hpa)})


def _name(machine: BareMachine, hpa: int) -> str:
    return next(name for name, value in owned(machine).items() if value == hpa)
