"""TDH.MEM.RD and TDH.MEM.WR: eight bytes of a debug TD's private memory."""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_EPT_ENTRY_NOT_PRESENT,
    TDX_TD_NON_DEBUG,
)
from tdxlab.arch import EPT_RWX
from tdxlab.seam import sept
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import (
    INVALID_RCX,
    lock_sept_tree,
    lock_septe,
    lock_tdr,
    open_tdcs,
    refuse_entry,
    require_private_gpa,
    require_sept_state,
)
from tdxlab.seam.td import ATTRIBUTES_DEBUG, Td, Tdcs
from tdxlab.steps import Operation


def tdh_mem_rd(call: Call) -> Operation:
    """TDH.MEM.RD: read 8 bytes of private memory of a debug TD.

    RCX: private GPA, 8-byte aligned. RDX: HPA of the TDR. Returns the bytes in R8; RCX = RDX = 0;
    R8 = 0 on refusals.
    Refuses, in order: TDR (RDX); op-state; TD_NON_DEBUG; RCX not aligned; the S-EPT tree's lock
    (SEPT_TREE); GPA not private (RCX); EPT_ENTRY_NOT_PRESENT (RCX, details); the entry's lock (RCX,
    details); EPT_ENTRY_STATE_INCORRECT (RCX, details).
    Source: TDX module 1.5.01, tdh_mem_rd_wr.c.
    """
    td, hpa = yield from _begin(call)
    # -- effects: nothing below may fail
    data = call.module.memory.read(hpa, 8, td.hkid)
    call.registers.r8 = int.from_bytes(data, "little")


def tdh_mem_wr(call: Call) -> Operation:
    """TDH.MEM.WR: write 8 bytes of private memory of a debug TD.

    RCX, RDX as for TDH.MEM.RD. R8: the bytes. Returns the bytes that were there in R8. Refuses as
    TDH.MEM.RD.
    Source: TDX module 1.5.01, tdh_mem_rd_wr.c.
    """
    memory, new = call.module.memory, call.registers.r8
    td, hpa = yield from _begin(call)
    # -- effects: nothing below may fail
    old = memory.read(hpa, 8, td.hkid)
    memory.write(hpa, new.to_bytes(8, "little"), td.hkid)
    call.registers.r8 = int.from_bytes(old, "little")


def _begin(call: Call) -> Operation:
    """The checks that reading and writing share; yields the leaf's step and returns (TD, HPA of the
    bytes).
    """
    registers, memory = call.registers, call.module.memory
    gpa, tdr = registers.rcx, registers.rdx
    registers.rcx = registers.rdx = registers.r8 = 0
    td = lock_tdr(call, tdr, OPERAND_ID_RDX)
    open_tdcs(call, td)
    if not memory.words.view[td.tdcs + Tdcs.ATTRIBUTES] & ATTRIBUTES_DEBUG:
        raise Refused(TDX_TD_NON_DEBUG)
    if gpa & 7:
        raise Refused(INVALID_RCX)
    lock_sept_tree(call, td)
    require_private_gpa(call, td, gpa)
    place = lock_septe(call, walk_to_leaf(call, td, gpa))
    require_sept_state(call, place)
    hpa = leaf_address(place, gpa)
    yield ("TDH.MEM.RD/WR", tdr, gpa, hpa)
    return td, hpa


def walk_to_leaf(call: Call, td: Td, gpa: int) -> sept.Place:
    """Walk to whatever leaf maps `gpa`. Refuses, with RCX and details: EPT_ENTRY_NOT_PRESENT where
    no accessible leaf does.

    Source: TDX module 1.5.01, helpers.c, check_and_walk_private_gpa_to_leaf.
    """
    memory = call.module.memory
    place = sept.walk(memory, memory.words.view[td.tdcs + Tdcs.EPTP], gpa, 0)
    if not (place.septe & sept.LEAF and place.septe & EPT_RWX):
        refuse_entry(TDX_EPT_ENTRY_NOT_PRESENT + OPERAND_ID_RCX, place)
    return place


def leaf_address(place: sept.Place, gpa: int) -> int:
    """HPA of the byte at `gpa` in the page that the leaf at `place` maps."""
    return sept.leaf_hpa(place) | gpa & ((1 << (12 + 9 * place.sept_level)) - 1)
