"""TDH.MEM.PAGE.PROMOTE, DEMOTE, RELOCATE: the same guest memory in a bigger page, smaller pages,
another page.
"""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_R8,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_EPT_INVALID_PROMOTE_CONDITIONS,
    TDX_INTERRUPTED_RESTARTABLE,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
)
from tdxlab.arch import HPA_MASK, PAGE_SIZE, WORDS_PER_PAGE, level_size
from tdxlab.bits import MASK64
from tdxlab.seam import sept
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import (
    begin_mem,
    refuse_entry,
    require_sept_state,
    require_tracked,
    try_lock_septe,
)
from tdxlab.seam.leaves.mem import clear_l2_pages
from tdxlab.seam.page_checks import lock_mapped_page, lock_page
from tdxlab.seam.rules import (
    DEMOTED_CHILD,
    MAPPED_BITS,
    PENDING_BITS,
    PT_EPT,
    PT_NDA,
    PT_REG,
    SEPT_RESULT,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_MASK,
)
from tdxlab.steps import Operation

_DEMOTE_RESERVED = MASK64 & ~(HPA_MASK | 1)


def tdh_mem_page_promote(call: Call) -> Operation:
    """TDH.MEM.PAGE.PROMOTE: merge 512 pages that follow one another into one; their S-EPT page is
    freed.

    RCX: GPA and level of the merged page (1 or 2). RDX: HPA of the TDR. Returns RCX = HPA of the
    S-EPT page, RDX = 0; version 1: R9 = R10 = R11 = all ones.
    Refuses, in order: version above 1 (RAX); as `begin_mem`; EPT_ENTRY_STATE_INCORRECT (RCX,
    details); the S-EPT page's PAMT entry busy (RCX); once the TD runs, GPA_RANGE_NOT_BLOCKED (RCX,
    details) and TLB_TRACKING_NOT_DONE (RCX); a child's lock, then EPT_INVALID_PROMOTE_CONDITIONS
    (RCX, details of the parent); INTERRUPTED_RESTARTABLE; the merged PAMT entry busy (RCX).
    Source: TDX module 1.5.01, tdh_mem_page_promote.c; pamt_manager.c, pamt_promote.
    """
    module, given = call.module, (call.registers.rcx, call.registers.rdx)
    clear_l2_pages(call)
    td, gpa, place = begin_mem(call, 1, 2)
    require_sept_state(call, place)
    table = place.septe & HPA_MASK
    table_entry = module.pamt.entry(table, 0)
    lock_mapped_page(call, table_entry)
    require_tracked(call, td, place, table_entry)
    first = _lock_children(call, place, module.memory.frame(table))
    _require_no_interrupt(call, given)
    hpa = first & HPA_MASK
    merged = module.pamt.entry(hpa, place.sept_level)
    lock_mapped_page(call, merged)
    yield ("TDH.MEM.PAGE.PROMOTE", td.tdr, gpa, place.sept_level, hpa)
    # -- effects: nothing below may fail
    children = _child_entries(call, hpa, place.sept_level)
    owner, bepoch = module.pamt.owner(children[0]), module.pamt.bepoch(merged)
    for child in children:
        module.pamt.set_type(child, PT_NDA)
    module.pamt.give(merged, PT_REG, owner, bepoch)
    module.memory.words.put(place.word, first)
    module.add_children(td, -1)
    module.pamt.set_type(table_entry, PT_NDA)
    call.registers.rcx = table


def _lock_children(call: Call, parent: sept.Place, frame: int) -> int:
    """Lock the 512 entries of the S-EPT page one by one and compare them; returns the first,
    unlocked.

    Refuses, with RCX and the parent's details: OPERAND_BUSY, or EPT_INVALID_PROMOTE_CONDITIONS.
    """
    view = call.module.memory.words.view
    child_level = parent.sept_level - 1
    counter = sept.ACCEPT_COUNTER.mask if child_level == 1 else 0
    size = level_size(child_level)
    first = 0
    for number in range(WORDS_PER_PAGE):
        if not try_lock_septe(call, frame + number):
            refuse_entry(TDX_OPERAND_BUSY + OPERAND_ID_RCX, parent)
        septe = view[frame + number] & ~(sept.LOCKED | counter)
        if number == 0:
            first = septe
            fits = septe & SEPT_STATE_MASK in (
                MAPPED_BITS,
                PENDING_BITS,
            ) and not septe & HPA_MASK & (level_size(parent.sept_level) - 1)
        else:
            fits = septe == first + number * size
        if not fits:
            refuse_entry(TDX_EPT_INVALID_PROMOTE_CONDITIONS + OPERAND_ID_RCX, parent)
    return first


def _child_entries(call: Call, hpa: int, sept_level: int) -> list[int]:
    """PAMT entries of the 512 pages of the next smaller size in the page at `hpa`."""
    size = level_size(sept_level - 1)
    return [call.module.pamt.entry(hpa + n * size, sept_level - 1) for n in range(WORDS_PER_PAGE)]


def _require_no_interrupt(call: Call, given: tuple[int, int]) -> None:
    """Refuses: INTERRUPTED_RESTARTABLE, with RCX and RDX as the host gave them, while an interrupt
    is pending.
    """
    if call.module.conditions.interrupt_pending:
        raise Refused(TDX_INTERRUPTED_RESTARTABLE, *given)


def tdh_mem_page_demote(call: Call) -> Operation:
    """TDH.MEM.PAGE.DEMOTE: split a 2 MiB or 1 GiB page into 512 smaller ones under a new S-EPT
    page.

    RCX: GPA and level of the page (1 or 2). RDX: HPA of the TDR, bit 0 allowed. R8: HPA of a free
    page. Returns RCX = RDX = 0.
    Refuses, in order: RDX; as `begin_mem`; EPT_ENTRY_STATE_INCORRECT (RCX, details); once the TD
    runs, GPA_RANGE_NOT_BLOCKED (RCX, details) and TLB_TRACKING_NOT_DONE (RCX); page (R8);
    INTERRUPTED_RESTARTABLE; the page's PAMT entry busy (RCX). The last two leave the new page
    overwritten, and free.
    Source: TDX module 1.5.01, tdh_mem_page_demote.c; pamt_manager.c, pamt_demote.
    """
    module, registers = call.module, call.registers
    given, table = (registers.rcx, registers.rdx), registers.r8
    if registers.rdx & _DEMOTE_RESERVED:
        registers.rcx = registers.rdx = 0
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RDX)
    td, gpa, place = begin_mem(call, 1, 2, flags=1)
    bits = require_sept_state(call, place)
    hpa, child_level = sept.leaf_hpa(place), place.sept_level - 1
    entry = module.pamt.entry(hpa, place.sept_level)
    require_tracked(call, td, place, entry)
    table_entry = lock_page(call, table, OPERAND_ID_R8, PT_NDA, exclusive=True)
    _fill_with_children(call, table, td.hkid, DEMOTED_CHILD[bits], hpa, child_level)
    _require_no_interrupt(call, given)
    lock_mapped_page(call, entry)
    yield ("TDH.MEM.PAGE.DEMOTE", td.tdr, gpa, place.sept_level, hpa, table)
    # -- effects: nothing below may fail
    owner = module.pamt.owner(entry)
    for child in _child_entries(call, hpa, place.sept_level):
        module.pamt.give(child, PT_REG, owner)
    module.pamt.set_type(entry, PT_NDA)
    module.memory.words.put(place.word, sept.make_non_leaf(table))
    module.pamt.give(table_entry, PT_EPT, td.tdr, module.pamt.bepoch(table_entry))
    module.add_children(td, 1)


def _fill_with_children(
    call: Call, table: int, hkid: int, state_bits: int, hpa: int, child_level: int
) -> None:
    """Write 512 leaves of one state, for the parts of the page at `hpa`, into the page at
    `table`.
    """
    size = level_size(child_level)
    leaves = (sept.make_leaf(state_bits, hpa + n * size) for n in range(WORDS_PER_PAGE))
    content = b"".join(leaf.to_bytes(8, "little") for leaf in leaves)
    call.module.memory.write_page(table, content, hkid)


def tdh_mem_page_relocate(call: Call) -> Operation:
    """TDH.MEM.PAGE.RELOCATE: move one 4 KiB page to another physical page; the entry is unblocked.

    RCX: GPA, level 0. RDX: HPA of the TDR. R8: HPA of a free page. Returns RCX = HPA of the old
    page, RDX = 0.
    Refuses, in order: as `begin_mem`; EPT_ENTRY_STATE_INCORRECT (RCX, details); R8 is the page
    already there (R8); the old page's PAMT entry busy (RCX); once the TD runs,
    GPA_RANGE_NOT_BLOCKED (RCX, details) and TLB_TRACKING_NOT_DONE (RCX); page (R8).
    Source: TDX module 1.5.01, tdh_mem_page_relocate.c.
    """
    module, target = call.module, call.registers.r8
    td, gpa, place = begin_mem(call, 0, 0)
    bits = require_sept_state(call, place)
    old = place.septe & HPA_MASK
    if target == old:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_R8)
    old_entry = module.pamt.entry(old, 0)
    lock_mapped_page(call, old_entry)
    require_tracked(call, td, place, old_entry)
    new_entry = lock_page(call, target, OPERAND_ID_R8, PT_NDA, exclusive=True)
    yield ("TDH.MEM.PAGE.RELOCATE", td.tdr, gpa, old, target)
    # -- effects: nothing below may fail
    if not SEPT_STATE_BY_BITS[bits].pending:
        content = module.memory.read(old, PAGE_SIZE, td.hkid)
        module.memory.write_page(target, content, td.hkid)
    module.pamt.set_type(old_entry, PT_NDA)
    module.pamt.give(new_entry, PT_REG, td.tdr)
    moved = place._replace(septe=(place.septe & ~HPA_MASK) | target)
    module.memory.words.put(place.word, sept.remake(moved, SEPT_RESULT[call.leaf][bits]))
    call.registers.rcx = old
