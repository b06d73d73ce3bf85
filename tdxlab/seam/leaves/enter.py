"""TDH.VP.ENTER: run a vCPU on the calling LP, until something takes it out again."""

from __future__ import annotations

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import MASK64
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    OPERAND_ID_TD_EPOCH,
    TDX_OPERAND_BUSY,
    TDX_SUCCESS,
    TDX_VCPU_STATE_INCORRECT,
)
from tdxlab.arch import HPA_MASK
from tdxlab.seam import epochs, stepping
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import (
    INVALID_RCX,
    lock_owner,
    lock_sept_tree,
    open_tdcs,
    require_tdvps_pages,
)
from tdxlab.seam.exits import EXIT_EPT_VIOLATION, load_guest_registers
from tdxlab.seam.leaves.vp import associate
from tdxlab.seam.locks import release_shared, try_shared
from tdxlab.seam.page_checks import lock_page
from tdxlab.seam.rules import PT_TDVPR, VCPU_ACTIVE, VCPU_READY
from tdxlab.seam.td import EXIT_TRAP_LIKE, Td, Tdcs, Tdvps
from tdxlab.steps import Operation

_RECOVERABILITY_HINT = 1 << 52
_RESUME_L1 = 1 << 53
_RESERVED = MASK64 & ~(HPA_MASK | _RECOVERABILITY_HINT | _RESUME_L1)


def tdh_vp_enter(call: Call) -> Operation:
    """TDH.VP.ENTER: enter the guest. The status IN_GUEST means that the vCPU is inside; its TD exit
    answers the call later.

    RCX: HPA of the TDVPR; bit 52 the host's recoverability hint, bit 53 asks to resume a nested
    VM's parent. After an exit by TDG.VP.VMCALL the selected registers go to the guest. While the
    guest runs the TDVPR and the TDR stay locked shared.
    Refuses, in order: RCX; TDVPR (RCX); its TDR (TDR); op-state; TDCX_NUM_INCORRECT;
    VCPU_STATE_INCORRECT; VCPU_ASSOCIATED with another LP; bit 52 after an exit that was not
    trap-like, bit 53 (RCX), both with the vCPU associated already; epoch lock (TD_EPOCH); with the
    zero-step filter armed the S-EPT tree's lock (SEPT_TREE), then RAX = 48 for a logged GPA that
    still faults.
    Source: TDX module 1.5.01, tdh_vp_enter.c.
    Differs: the MSR and TSC tests cannot fail here; nested VMs are not modelled.
    """
    module, rcx = call.module, call.registers.rcx
    words = module.memory.words
    if rcx & _RESERVED:
        raise Refused(INVALID_RCX)
    td = lock_owner(call, lock_page(call, rcx & HPA_MASK, OPERAND_ID_RCX, PT_TDVPR))
    inside = list(call.locks)
    open_tdcs(call, td)
    page = require_tdvps_pages(call, td, rcx & HPA_MASK)
    if words.view[page + Tdvps.STATE] != VCPU_READY:
        raise Refused(TDX_VCPU_STATE_INCORRECT)
    is_new_here = associate(call, td, page)
    is_trap_like = words.view[page + Tdvps.LAST_TD_EXIT] == EXIT_TRAP_LIKE
    if rcx & _RESUME_L1 or (rcx & _RECOVERABILITY_HINT and not is_trap_like):
        raise Refused(INVALID_RCX)
    _join_epoch(call, td, page, is_new_here)
    if stepping.logged(module.memory, page):
        _require_logged_pages(call, td, page)
    yield ("TDH.VP.ENTER", rcx)
    # -- effects: nothing below may fail
    if not module.is_last_vcpu(call.lp, rcx & HPA_MASK):
        module.flush_tlb(call.lp, td)
    words.put(page + Tdvps.STATE, VCPU_ACTIVE)
    words.put(page + Tdvps.RIP_AT_ENTRY, words.view[page + Tdvps.RIP])
    load_guest_registers(call, page, hint=bool(rcx & _RECOVERABILITY_HINT))
    call.keep(inside)
    module.cpu.enter(call.lp, rcx & HPA_MASK, td.tdr)
    call.status = IN_GUEST


def _join_epoch(call: Call, td: Td, page: int, is_new_here: bool) -> None:
    """Count the vCPU into the present epoch and flush what it may hold from an older one.

    Refuses: OPERAND_BUSY with operand TD_EPOCH. Source: TDX module 1.5.01, helpers.c,
    adjust_tlb_tracking_state.
    """
    module, words = call.module, call.module.memory.words
    lock = td.tdcs + Tdcs.EPOCH_LOCK
    if not try_shared(words, lock):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_TD_EPOCH)
    epoch = epochs.join(words, td.tdcs)
    release_shared(words, lock)
    if epoch != words.view[page + Tdvps.VCPU_EPOCH]:
        if not is_new_here:
            module.flush_tlb(call.lp, td)
        words.put(page + Tdvps.VCPU_EPOCH, epoch)


def _require_logged_pages(call: Call, td: Td, page: int) -> None:
    """The zero-step filter is armed: every logged GPA must be mapped. Whatever refuses, the vCPU is
    counted out again.
    """
    module, words = call.module, call.module.memory.words
    try:
        lock_sept_tree(call, td, exclusive=True)
        gpa = stepping.still_failing(module.memory, page, td.tdcs)
        if gpa is not None:
            _show_violation(call, gpa)
            raise Refused(TDX_SUCCESS | EXIT_EPT_VIOLATION)
    except Refused:
        epochs.part(words, td.tdcs, words.view[page + Tdvps.VCPU_EPOCH])
        raise


def _show_violation(call: Call, gpa: int) -> None:
    """What the host finds in its registers when the filter answers for the guest: a write violation
    at `gpa`.
    """
    registers = call.registers
    for name in registers.__slots__:
        if name != "rbp":
            setattr(registers, name, 0)
    registers.rcx = 2
    registers.r8 = gpa & ~0xFFF
