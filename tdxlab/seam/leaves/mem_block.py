"""TDH.MEM.RANGE.BLOCK, RANGE.UNBLOCK, TRACK: the TLB side of taking memory away."""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    OPERAND_ID_SEPT_TREE,
    OPERAND_ID_TD_EPOCH,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_GPA_RANGE_ALREADY_BLOCKED,
    TDX_OPERAND_BUSY,
    TDX_PREVIOUS_TLB_EPOCH_BUSY,
    TDX_TLB_TRACKING_NOT_DONE,
)
from tdxlab.arch import HPA_MASK
from tdxlab.seam import epochs, sept
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import (
    begin_mem,
    lock_tdr,
    open_tdcs,
    refuse_entry,
    require_sept_state,
    tracking_applies,
)
from tdxlab.seam.locks import release_exclusive, try_exclusive
from tdxlab.seam.rules import SEPT_BLOCKED, SEPT_RESULT, SEPT_STATE_MASK
from tdxlab.seam.td import Tdcs
from tdxlab.steps import Operation


def tdh_mem_range_block(call: Call) -> Operation:
    """TDH.MEM.RANGE.BLOCK: forbid new translations through one entry and stamp what it maps with
    the present epoch.

    RCX: GPA and level (0 up to the root's). RDX: HPA of the TDR. Returns RCX = RDX = 0.
    Refuses, in order: as `begin_mem` with the tree exclusive; GPA_RANGE_ALREADY_BLOCKED, a warning
    (RCX, details); EPT_ENTRY_STATE_INCORRECT (RCX, details).
    Source: TDX module 1.5.01, tdh_mem_range_block.c.
    """
    module, tdr = call.module, call.registers.rdx
    td, gpa, place = begin_mem(call, 0, None, True)
    word, sept_level, septe = place
    if septe & SEPT_STATE_MASK in SEPT_BLOCKED:
        refuse_entry(TDX_GPA_RANGE_ALREADY_BLOCKED + OPERAND_ID_RCX, place)
    bits = require_sept_state(call, place)
    yield ("TDH.MEM.RANGE.BLOCK", tdr, gpa, sept_level)
    # -- effects: nothing below may fail
    words = module.memory.words
    words.cells[word] = sept.remake(place, SEPT_RESULT[call.leaf][bits])
    module.pamt.set_bepoch(_mapped_entry(call, place), words.view[td.tdcs + Tdcs.TD_EPOCH])


def _mapped_entry(call: Call, place: sept.Place) -> int:
    """PAMT entry of what an S-EPT entry maps: the page at its size, or the 4 KiB S-EPT page."""
    _, sept_level, septe = place
    if septe & sept.LEAF:
        return call.module.pamt.entry(sept.leaf_hpa(place), sept_level)
    return call.module.pamt.entry(septe & HPA_MASK, 0)


def tdh_mem_range_unblock(call: Call) -> Operation:
    """TDH.MEM.RANGE.UNBLOCK: allow translations again through an entry that was blocked; it too
    needs TLB tracking.

    RCX: GPA and level (0 up to the root's). RDX: HPA of the TDR. Returns RCX = RDX = 0.
    Refuses, in order: as `begin_mem` with the tree exclusive; EPT_ENTRY_STATE_INCORRECT (RCX,
    details); once the TD runs, TLB_TRACKING_NOT_DONE (SEPT_TREE).
    Source: TDX module 1.5.01, tdh_mem_range_unblock.c.
    """
    module, tdr = call.module, call.registers.rdx
    td, gpa, place = begin_mem(call, 0, None, exclusive=True)
    bits = require_sept_state(call, place, TDX_EPT_ENTRY_STATE_INCORRECT)
    bepoch = module.pamt.bepoch(_mapped_entry(call, place))
    if tracking_applies(call, td) and not epochs.is_tracked(module.memory.words, td.tdcs, bepoch):
        raise Refused(TDX_TLB_TRACKING_NOT_DONE + OPERAND_ID_SEPT_TREE)
    yield ("TDH.MEM.RANGE.UNBLOCK", tdr, gpa, place.sept_level)
    # -- effects: nothing below may fail
    module.memory.words.cells[place.word] = sept.remake(place, SEPT_RESULT[call.leaf][bits])


def tdh_mem_track(call: Call) -> Operation:
    """TDH.MEM.TRACK: begin the TD's next epoch. The host then kicks every vCPU that is inside.

    RCX: HPA of the TDR; unchanged.
    Refuses, in order: as `lock_tdr` (RCX) and `open_tdcs`; the epoch lock (TD_EPOCH);
    PREVIOUS_TLB_EPOCH_BUSY while a vCPU of the epoch before the present one is inside.
    Source: TDX module 1.5.01, tdh_mem_track.c.
    """
    words, tdr = call.module.memory.words, call.registers.rcx
    td = lock_tdr(call, tdr, OPERAND_ID_RCX)
    open_tdcs(call, td)
    index = td.tdcs + Tdcs.EPOCH_LOCK
    if not try_exclusive(words, index):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_TD_EPOCH)
    call.locks.append((release_exclusive, words, index))
    if epochs.is_previous_busy(words, td.tdcs):
        raise Refused(TDX_PREVIOUS_TLB_EPOCH_BUSY)
    yield ("TDH.MEM.TRACK", tdr)
    # -- effects: nothing below may fail
    epochs.advance(words, td.tdcs)
