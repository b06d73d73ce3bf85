"""Attacks with pages: the host gives away what is not its own, or the same thing twice."""

from __future__ import annotations

from tdxlab.abi import leaves as abi
from tdxlab.arch import SIZE_2M
from tdxlab.attacks.stage import DATA_GPA, FREE_GPA, Stage
from tdxlab.attacks.verdict import CONTROL, LEAKED, Verdict, refused

#: A GPA for which no Secure EPT page is there yet, but the ones above it are.
_NEXT_2M = (DATA_GPA & -SIZE_2M) + SIZE_2M


def map_at_two_gpas(stage: Stage) -> Verdict:
    """Map the victim's data page a second time, at another of its GPAs."""
    tdr, hpa = stage.tdr, stage.data_hpa
    status = stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=FREE_GPA, rdx=tdr, r8=hpa)
    return _judge([status], "one page answers at two GPAs")


def map_in_two_tds(stage: Stage) -> Verdict:
    """Map the victim's data page into a TD of the host's own."""
    tdr, hpa = stage.rival.tdr, stage.data_hpa
    status = stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=DATA_GPA, rdx=tdr, r8=hpa)
    return _judge([status], "two TDs have the page")


def reuse_page_in_use(stage: Stage) -> Verdict:
    """Give the victim's data page to the module as a Secure EPT page, as a control page, as a
    vCPU, and as another TD.
    """
    rival, hpa, keyid = stage.rival, stage.data_hpa, stage.rival.keyid - 2
    statuses = [
        stage.seamcall(abi.TDH_MEM_SEPT_ADD, rcx=_NEXT_2M | 1, rdx=rival.tdr, r8=hpa),
        stage.seamcall(abi.TDH_MNG_ADDCX, rcx=hpa, rdx=rival.tdr),
        stage.seamcall(abi.TDH_VP_CREATE, rcx=hpa, rdx=rival.tdr),
        stage.seamcall(abi.TDH_MNG_CREATE, rcx=hpa, rdx=keyid),
    ]
    return _judge(statuses, "the page serves two purposes")


def replace_page(stage: Stage) -> Verdict:
    """Map a page of the host's at a GPA where the victim has one."""
    tdr, hpa = stage.tdr, stage.spare[0]
    status = stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=DATA_GPA, rdx=tdr, r8=hpa)
    return _judge([status], "the victim has another page than before")


def use_shared_gpa(stage: Stage) -> Verdict:
    """Ask for Secure EPT entries at GPAs with the SHARED bit, which the host's own EPT serves."""
    gpa, tdr, hpa = FREE_GPA | stage.shared_mask, stage.tdr, stage.spare[0]
    statuses = [
        stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=gpa, rdx=tdr, r8=hpa),
        stage.seamcall(abi.TDH_MEM_RANGE_BLOCK, rcx=gpa, rdx=tdr),
        stage.seamcall(abi.TDH_MEM_SEPT_ADD, rcx=gpa & -SIZE_2M | 1, rdx=tdr, r8=hpa),
    ]
    return _judge(statuses, "the Secure EPT maps shared GPAs")


def copy_through_the_module(stage: Stage) -> Verdict:
    """Have the module copy the victim's page into a TD of the host's own: the source operand of
    TDH.MEM.PAGE.ADD with the victim's KeyID in it, which the module may use.
    """
    source = stage.machine.memory.join(stage.data_hpa, stage.keyid)
    tdr, hpa = stage.rival.tdr, stage.spare[0]
    status = stage.seamcall(abi.TDH_MEM_PAGE_ADD, rcx=DATA_GPA, rdx=tdr, r8=hpa, r9=source)
    return _judge([status], "the host's TD has a copy", LEAKED)


def fake_keyid(stage: Stage) -> Verdict:
    """Create a TD with the victim's KeyID, with the module's own, and with a shared one."""
    platform, hpa = stage.machine.platform, stage.spare[0]
    taken = (stage.keyid, platform.global_keyid, platform.private_keyids[0] - 1)
    statuses = [stage.seamcall(abi.TDH_MNG_CREATE, rcx=hpa, rdx=keyid) for keyid in taken]
    return _judge(statuses, "two TDs have one key")


def look_with_debug_calls(stage: Stage) -> Verdict:
    """Read and write the victim's memory with the calls that are there for debug TDs."""
    tdr = stage.tdr
    statuses = [
        stage.seamcall(abi.TDH_MEM_RD, rcx=DATA_GPA, rdx=tdr),
        stage.seamcall(abi.TDH_MEM_WR, rcx=DATA_GPA, rdx=tdr, r8=0),
    ]
    return _judge(statuses, "the module reads the victim's memory for the host", LEAKED)


def _judge(statuses: list[int], reached: str, gain: str = CONTROL) -> Verdict:
    return refused(statuses) or Verdict("", gain, reached)
