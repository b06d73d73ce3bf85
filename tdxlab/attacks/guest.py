"""Attacks on what the guest believes: its memory is swapped, the host lies, watches or does not
run it.
"""

from __future__ import annotations

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import IN_GUEST, GuestOutcome
from tdxlab.abi.status import EXIT_REASON_MASK
from tdxlab.arch import PAGE_SIZE
from tdxlab.attacks.stage import CODE_GPA, DATA_GPA, FREE_GPA, SECRET, VICTIM_LP, Stage
from tdxlab.attacks.verdict import (
    ACCEPTANCE,
    CONTROL,
    DENIAL,
    LIFE_CYCLE,
    NOTHING,
    SHARED_BIT,
    STEPPING,
    TRAFFIC,
    Verdict,
)
from tdxlab.guest import TDVMCALL_MAP_GPA

#: TDG.VP.VMCALL: which registers go to the host.
_PASS_R10_TO_R15 = 0xFC00
#: Times that a host lets the victim run into the same missing page.
_ATTEMPTS = 9


def swap_for_zeros(stage: Stage) -> Verdict:
    """Take the victim's page away by all the rules, and give it another one at the same GPA, so
    that it goes on with zeros.
    """
    _remove_properly(stage)
    tdr, hpa = stage.tdr, stage.spare[0]
    stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=DATA_GPA, rdx=tdr, r8=hpa)
    stage.enter()
    found = stage.guest_read()
    if isinstance(found, bytes) and found != SECRET:
        return Verdict("", CONTROL, "the victim reads zeros and goes on with them")
    return Verdict(ACCEPTANCE, DENIAL, "a #VE tells the victim that the page is a new one")


def lie_about_conversion(stage: Stage) -> Verdict:
    """The victim asks with MapGPA for a page to become private. Say that it is done, and do
    nothing, so that it puts its secrets into memory that is still shared.
    """
    stage.tdcall(
        abi.TDG_VP_VMCALL,
        rcx=_PASS_R10_TO_R15,
        r11=TDVMCALL_MAP_GPA,
        r12=FREE_GPA,
        r13=PAGE_SIZE,
    )
    stage.enter()
    outcome = stage.accept(FREE_GPA)
    if not outcome.exited:
        return Verdict("", CONTROL, "the victim believes that the page is private")
    reason = outcome.status & EXIT_REASON_MASK
    return Verdict(
        ACCEPTANCE, DENIAL, f"to accept what is not there is an exit, reason {reason}, each time"
    )


def lie_about_sharing(stage: Stage) -> Verdict:
    """The victim asks for its data page to become shared. Say that it is done, and leave the
    private page in place, to have the victim mix the two up.
    """
    shared = DATA_GPA | stage.shared_mask
    stage.tdcall(
        abi.TDG_VP_VMCALL, rcx=_PASS_R10_TO_R15, r11=TDVMCALL_MAP_GPA, r12=shared, r13=PAGE_SIZE
    )
    stage.enter()
    found = stage.guest_write(b"for the host to read", shared)
    if isinstance(found, GuestOutcome) and found.exited:
        stage.enter()
        stage.guest_read()
        return Verdict(
            SHARED_BIT, DENIAL, "the SHARED bit never leads to the Secure EPT: an exit, reason 48"
        )
    return Verdict("", CONTROL, "what was to be shared is written into the private page")


def watch_faults(stage: Stage) -> Verdict:
    """Block the victim's pages and see at which of them it stops: a page at a time, not more."""
    tdr = stage.tdr
    for gpa in (CODE_GPA, DATA_GPA):
        stage.seamcall(abi.TDH_MEM_RANGE_BLOCK, rcx=gpa, rdx=tdr)
    stage.seamcall(abi.TDH_MEM_TRACK, rcx=tdr)
    stage.kick()
    stage.enter()
    found = stage.guest_read(DATA_GPA + 0x128)
    if isinstance(found, GuestOutcome) and found.exited and found.registers.r8 == DATA_GPA:
        return Verdict("", TRAFFIC, f"TD exit at GPA {DATA_GPA:#x}, its low 12 bits hidden")
    return Verdict(ACCEPTANCE, NOTHING, "the host is not told where the victim stops")


def step_through_faults(stage: Stage) -> Verdict:
    """Let the victim run into the same missing page again and again, at one instruction, to observe
    that instruction each time.
    """
    _remove_properly(stage)
    for _ in range(_ATTEMPTS):
        if stage.enter() != IN_GUEST:
            return Verdict(STEPPING, TRAFFIC, "TDH.VP.ENTER does not enter until the page is there")
        stage.guest_read()
    return Verdict("", TRAFFIC, f"the instruction has begun {_ATTEMPTS} times")


def never_run(stage: Stage) -> Verdict:
    """Take the vCPU out of its LP, block its memory, and never let it run again."""
    stage.kick()
    for gpa in (CODE_GPA, DATA_GPA):
        stage.seamcall(abi.TDH_MEM_RANGE_BLOCK, rcx=gpa, rdx=stage.tdr)
    if stage.machine.cpu.vcpu_inside(VICTIM_LP):
        return Verdict(LIFE_CYCLE, NOTHING, "the vCPU runs on")
    return Verdict("", DENIAL, "nothing obliges a host to run a TD")


def _remove_properly(stage: Stage) -> None:
    """BLOCK, TRACK, an IPI, REMOVE."""
    tdr = stage.tdr
    stage.seamcall(abi.TDH_MEM_RANGE_BLOCK, rcx=DATA_GPA, rdx=tdr)
    stage.seamcall(abi.TDH_MEM_TRACK, rcx=tdr)
    stage.kick()
    stage.seamcall(abi.TDH_MEM_PAGE_REMOVE, rcx=DATA_GPA, rdx=tdr)
