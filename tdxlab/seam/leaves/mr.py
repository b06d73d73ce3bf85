"""TDH.MR.EXTEND and TDH.MR.FINALIZE: measuring what the host built."""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_EPT_ENTRY_NOT_PRESENT,
    TDX_NO_VCPUS,
)
from tdxlab.seam import measure
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import INVALID_RCX, lock_tdr, open_tdcs, require_private_gpa
from tdxlab.seam.leaves.mem_data import leaf_address, walk_to_leaf
from tdxlab.seam.rules import OP_RUNNABLE, SEPT_ACCEPTS, SEPT_STATE_MASK
from tdxlab.seam.td import Tdcs
from tdxlab.steps import Operation


def tdh_mr_extend(call: Call) -> Operation:
    """TDH.MR.EXTEND: measure the content of 256 bytes of a TD that is not finalised.

    RCX: private GPA, 256-byte aligned. RDX: HPA of the TDR. Returns RCX = RDX = 0.
    Refuses, in order: TDR, taken exclusively (RDX); op-state; RCX not aligned; GPA not private
    (RCX); EPT_ENTRY_NOT_PRESENT (RCX, details) for a free, pending or blocked page, and without
    operand for a readable page that is not MAPPED.
    Source: TDX module 1.5.01, tdh_mr_extend.c.
    """
    module, registers = call.module, call.registers
    gpa, tdr = registers.rcx, registers.rdx
    registers.rcx = registers.rdx = 0
    td = lock_tdr(call, tdr, OPERAND_ID_RDX, exclusive=True)
    open_tdcs(call, td, lock=False)
    if gpa % measure.CHUNK_SIZE:
        raise Refused(INVALID_RCX)
    require_private_gpa(call, td, gpa)
    place = walk_to_leaf(call, td, gpa)
    if place.septe & SEPT_STATE_MASK not in SEPT_ACCEPTS[call.leaf]:
        raise Refused(TDX_EPT_ENTRY_NOT_PRESENT)
    yield ("TDH.MR.EXTEND", tdr, gpa)
    # -- effects: nothing below may fail
    chunk = module.memory.read(leaf_address(place, gpa), measure.CHUNK_SIZE, td.hkid)
    block = measure.measured_block(measure.EXTEND_NAME, gpa)
    measure.update(module.measurements, td.tdcs_hpa, block + chunk)


def tdh_mr_finalize(call: Call) -> Operation:
    """TDH.MR.FINALIZE: close MRTD; from now on vCPUs may run, and pages come by AUG and ACCEPT
    alone.

    RCX: HPA of the TDR; unchanged.
    Refuses, in order: TDR, taken exclusively (RCX); op-state; NO_VCPUS.
    Source: TDX module 1.5.01, tdh_mr_finalize.c.
    """
    module, tdr = call.module, call.registers.rcx
    words = module.memory.words
    td = lock_tdr(call, tdr, OPERAND_ID_RCX, exclusive=True)
    open_tdcs(call, td, lock=False)
    if not words.view[td.tdcs + Tdcs.NUM_VCPUS]:
        raise Refused(TDX_NO_VCPUS)
    yield ("TDH.MR.FINALIZE", tdr)
    # -- effects: nothing below may fail
    words.fill(td.tdcs + Tdcs.MRTD, measure.finish(module.measurements, td.tdcs_hpa))
    words.put(td.tdcs + Tdcs.OP_STATE, OP_RUNNABLE)
