"""TDH.MEM.*: pages and S-EPT pages come and go."""

from __future__ import annotations

from tdxlab.abi.registers import NULL_PA
from tdxlab.abi.status import (
    OPERAND_ID_R8,
    OPERAND_ID_R9,
    OPERAND_ID_RAX,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_EPT_PAGE_NOT_FREE,
    TDX_OPERAND_INVALID,
)
from tdxlab.arch import HPA_MASK, PAGE_SIZE
from tdxlab.bits import MASK64
from tdxlab.seam import measure, sept
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import (
    begin_mem,
    lock_sept_tree,
    lock_septe,
    lock_tdr,
    open_tdcs,
    page_info,
    refuse_entry,
    require_private_gpa,
    require_sept_state,
    require_tracked,
    walk_sept,
)
from tdxlab.seam.page_checks import lock_free_range, lock_mapped_page, lock_page, require_shared_hpa
from tdxlab.seam.pamt import PAGES_OF_SIZE
from tdxlab.seam.rules import (
    MAPPED_BITS,
    NL_MAPPED_BITS,
    PT_EPT,
    PT_NDA,
    PT_REG,
    SEPT_STATE_MASK,
)
from tdxlab.seam.td import ATTRIBUTES_DEBUG, Tdcs
from tdxlab.steps import Operation

_UNUSED_PAGE = 1 << 63
_ALLOW_EXISTING = 1
_SEPT_ADD_RESERVED = MASK64 & ~(HPA_MASK | _ALLOW_EXISTING)
_READ_L2 = 1


def tdh_mem_page_add(call: Call) -> Operation:
    """TDH.MEM.PAGE.ADD: copy one 4 KiB source page into a TD that is not finalised, and measure its
    GPA.

    RCX: GPA, 4 KiB aligned, private, level 0. RDX: HPA of the TDR. R8: HPA of the free target page.
    R9: HPA of the source page, host memory. Returns RCX = RDX = 0.
    Refuses, in order: TDR, taken exclusively (RDX); op-state; RCX; GPA not private (RCX);
    EPT_WALK_FAILED (RCX, details); EPT_ENTRY_STATE_INCORRECT (RCX, details); source (R9); target
    (R8).
    Source: TDX module 1.5.01, tdh_mem_page_add.c.
    """
    module, registers = call.module, call.registers
    operand, tdr, target, source = registers.rcx, registers.rdx, registers.r8, registers.r9
    registers.rcx = registers.rdx = 0
    td = lock_tdr(call, tdr, OPERAND_ID_RDX, exclusive=True)
    open_tdcs(call, td, lock=False)
    gpa, _ = page_info(operand, 0, 0)
    require_private_gpa(call, td, gpa)
    place = walk_sept(call, td, gpa, 0)
    require_sept_state(call, place)
    require_shared_hpa(call, source, PAGE_SIZE, OPERAND_ID_R9)
    entry = lock_page(call, target, OPERAND_ID_R8, PT_NDA, exclusive=True)
    yield ("TDH.MEM.PAGE.ADD", tdr, gpa, target, source)
    # -- effects: nothing below may fail
    source_hpa, keyid = module.memory.split(source)
    content = module.memory.read(source_hpa, PAGE_SIZE, keyid)
    module.memory.write_page(target, content, td.hkid)
    module.memory.words.cells[place.word] = sept.make_leaf(MAPPED_BITS, target)
    block = measure.measured_block(measure.PAGE_ADD_NAME, gpa)
    measure.update(module.measurements, td.tdcs_hpa, block)
    module.pamt.give(entry, PT_REG, tdr)
    module.add_children(td, 1)


def tdh_mem_page_aug(call: Call) -> Operation:
    """TDH.MEM.PAGE.AUG: map a free 4 KiB or 2 MiB page as PENDING; the guest must accept it. Legal
    before finalisation too.

    RCX: GPA and level (0 or 1). RDX: HPA of the TDR. R8: HPA of the page, aligned to its size.
    Returns RCX = RDX = 0.
    Refuses, in order: as `begin_mem`; EPT_ENTRY_STATE_INCORRECT (RCX, details); page (R8).
    Source: TDX module 1.5.01, tdh_mem_page_aug.c.
    """
    module, hpa, tdr = call.module, call.registers.r8, call.registers.rdx
    td, gpa, place = begin_mem(call, 0, 1)
    require_sept_state(call, place)
    word, sept_level = place.word, place.sept_level
    if sept_level == 0:
        entry = lock_page(call, hpa, OPERAND_ID_R8, PT_NDA, True)
    else:
        entry = lock_free_range(call, hpa, OPERAND_ID_R8, sept_level)
    yield ("TDH.MEM.PAGE.AUG", tdr, gpa, sept_level, hpa)
    # -- effects: nothing below may fail
    module.memory.words.cells[word] = sept.PENDING_LEAF | hpa
    module.pamt.give(entry, PT_REG, tdr)
    module.add_children(td, PAGES_OF_SIZE[sept_level])


def tdh_mem_page_remove(call: Call) -> Operation:
    """TDH.MEM.PAGE.REMOVE: unmap a 4 KiB, 2 MiB or 1 GiB page and free it. Its content is not
    cleared.

    RCX: GPA and level (0 to 2). RDX: HPA of the TDR. Returns RCX = HPA of the page, RDX = 0.
    Refuses, in order: as `begin_mem`; EPT_ENTRY_STATE_INCORRECT (RCX, details); the page's PAMT
    entry busy (RCX); once the TD runs, GPA_RANGE_NOT_BLOCKED (RCX, details) and
    TLB_TRACKING_NOT_DONE (RCX).
    Source: TDX module 1.5.01, tdh_mem_page_remove.c.
    """
    module, tdr = call.module, call.registers.rdx
    td, gpa, place = begin_mem(call, 0, 2)
    require_sept_state(call, place)
    word, sept_level, _ = place
    hpa = sept.leaf_hpa(place)
    entry = module.pamt.entry(hpa, sept_level)
    lock_mapped_page(call, entry)
    require_tracked(call, td, place, entry)
    yield ("TDH.MEM.PAGE.REMOVE", tdr, gpa, sept_level, hpa)
    # -- effects: nothing below may fail
    module.memory.words.cells[word] = sept.FREE_ENTRY
    module.add_children(td, -PAGES_OF_SIZE[sept_level])
    module.pamt.set_type(entry, PT_NDA)
    call.registers.rcx = hpa


def tdh_mem_sept_add(call: Call) -> Operation:
    """TDH.MEM.SEPT.ADD: link an empty S-EPT page under the entry at (GPA, level).

    RCX: GPA and level (1 up to the root's). RDX: HPA of the TDR; bit 0 accepts a page that is
    already there. R8: HPA of the free page (bit 63 is ignored); version 1: all ones for none. R9,
    R10, R11: version 1, pages for nested VMs, all ones.
    Returns RCX = RDX = 0; version 1: R8 all ones if consumed, with bit 63 set if a table is there
    already, also when R9..R11 refuse.
    Refuses, in order: version above 1 (RAX); RDX; as `begin_mem`; EPT_ENTRY_STATE_INCORRECT (RCX,
    details); page (R8); R9, R10, R11.
    Source: TDX module 1.5.01, tdh_mem_sept_add.c.
    Differs: pages for nested VMs are refused with their register even where the TD has such VMs.
    """
    module, registers = call.module, call.registers
    new_page, rdx = registers.r8, registers.rdx
    tdr = rdx & HPA_MASK
    if call.version > 1:
        registers.rcx = registers.rdx = 0
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RAX)
    if rdx & _SEPT_ADD_RESERVED:
        registers.rcx = registers.rdx = 0
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RDX)
    td, gpa, place = begin_mem(call, 1, None, flags=_ALLOW_EXISTING)
    bits = require_sept_state(call, place)
    entry = _take_new_page(call, place, new_page, may_exist=bool(rdx & _ALLOW_EXISTING))
    if call.version == 1:
        _require_no_l2_pages(call)
    yield ("TDH.MEM.SEPT.ADD", tdr, gpa, place.sept_level, new_page)
    # -- effects: nothing below may fail
    if bits == NL_MAPPED_BITS:
        return
    assert entry is not None
    hpa = new_page & ~_UNUSED_PAGE
    module.memory.write_page(hpa, sept.FREE_PAGE, td.hkid)
    module.pamt.give(entry, PT_EPT, tdr)
    module.add_children(td, 1)
    module.memory.words.cells[place.word] = sept.make_non_leaf(hpa)
    if call.version == 1:
        registers.r8 = NULL_PA


def _take_new_page(call: Call, place: sept.Place, new_page: int, *, may_exist: bool) -> int | None:
    """Check R8 against the entry; returns the new page's PAMT entry, None if the table is there
    already.
    """
    is_there = place.septe & SEPT_STATE_MASK == NL_MAPPED_BITS
    if new_page == NULL_PA:
        if call.version == 0:
            raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_R8)
        if not is_there:
            refuse_entry(TDX_EPT_ENTRY_STATE_INCORRECT + OPERAND_ID_RCX, place)
        return None
    if is_there:
        if not may_exist:
            refuse_entry(TDX_EPT_ENTRY_STATE_INCORRECT + OPERAND_ID_RCX, place)
        if call.version == 1:
            call.registers.r8 = new_page | _UNUSED_PAGE
        return None
    return lock_page(call, new_page & ~_UNUSED_PAGE, OPERAND_ID_R8, PT_NDA, exclusive=True)


def _require_no_l2_pages(call: Call) -> None:
    """Version 1: R9, R10, R11 name no page. Refuses the first that does."""
    registers = call.registers
    pages = (registers.r9, registers.r10, registers.r11)
    for operand, page in enumerate(pages, start=OPERAND_ID_R9):
        if page != NULL_PA:
            raise Refused(TDX_OPERAND_INVALID + operand)


def tdh_mem_sept_remove(call: Call) -> Operation:
    """TDH.MEM.SEPT.REMOVE: unlink an empty S-EPT page and free it.

    RCX: GPA and level (1 up to the root's). RDX: HPA of the TDR. Returns RCX = HPA of the S-EPT
    page, RDX = 0; version 1: R9 = R10 = R11 = all ones.
    Refuses, in order: version above 1 (RAX); as `begin_mem` with the tree exclusive;
    EPT_ENTRY_STATE_INCORRECT (RCX, details); the page's PAMT entry busy (RCX); once the TD runs,
    GPA_RANGE_NOT_BLOCKED (RCX, details) and TLB_TRACKING_NOT_DONE (RCX); EPT_PAGE_NOT_FREE (RCX,
    details of the parent).
    Source: TDX module 1.5.01, tdh_mem_sept_remove.c.
    """
    module, tdr = call.module, call.registers.rdx
    clear_l2_pages(call)
    td, gpa, place = begin_mem(call, 1, None, exclusive=True)
    require_sept_state(call, place)
    hpa = place.septe & HPA_MASK
    entry = module.pamt.entry(hpa, 0)
    lock_mapped_page(call, entry)
    require_tracked(call, td, place, entry)
    if not sept.is_empty(module.memory, hpa):
        refuse_entry(TDX_EPT_PAGE_NOT_FREE + OPERAND_ID_RCX, place)
    yield ("TDH.MEM.SEPT.REMOVE", tdr, gpa, place.sept_level, hpa)
    # -- effects: nothing below may fail
    module.memory.words.cells[place.word] = sept.FREE_ENTRY
    module.add_children(td, -1)
    module.pamt.set_type(entry, PT_NDA)
    call.registers.rcx = hpa


def clear_l2_pages(call: Call) -> None:
    """Versions above 0 return no nested VMs' pages in R9..R11; versions above 1 do not exist.
    Refuses: RAX.
    """
    registers = call.registers
    if call.version:
        registers.r9 = registers.r10 = registers.r11 = NULL_PA
    if call.version > 1:
        registers.rcx = registers.rdx = 0
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RAX)


def tdh_mem_sept_rd(call: Call) -> Operation:
    """TDH.MEM.SEPT.RD: read an S-EPT entry as far as the host may see it.

    RCX: GPA and level (0 up to the root's). RDX: HPA of the TDR; bit 0 asks a debug TD for nested
    VMs' attributes. Returns the entry in RCX, its level and state in RDX; R8 = 0 if bit 0 asks.
    Refuses, in order: TDR (RDX); op-state; bit 0 and not DEBUG (RDX); RCX; GPA not private
    (RCX); OPERAND_BUSY (SEPT_TREE); EPT_WALK_FAILED (RCX, details); OPERAND_BUSY (RCX, details).
    Source: TDX module 1.5.01, tdh_mem_sept_rd.c.
    Differs: nested VMs are not modelled, so no page has attributes for one.
    """
    module, registers = call.module, call.registers
    operand, rdx = registers.rcx, registers.rdx
    registers.rcx = registers.rdx = 0
    td = lock_tdr(call, rdx & ~_READ_L2, OPERAND_ID_RDX)
    open_tdcs(call, td)
    view, asks_for_l2 = module.memory.words.view, rdx & _READ_L2
    if asks_for_l2 and not view[td.tdcs + Tdcs.ATTRIBUTES] & ATTRIBUTES_DEBUG:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RDX)
    gpa, sept_level = page_info(operand, 0, view[td.tdcs + Tdcs.EPTP] >> 3 & 7)
    require_private_gpa(call, td, gpa)
    lock_sept_tree(call, td)
    place = lock_septe(call, walk_sept(call, td, gpa, sept_level))
    yield ("TDH.MEM.SEPT.RD", td.tdr, gpa, place.sept_level)
    # -- effects: nothing below may fail
    registers.rcx, registers.rdx = sept.report(place.septe, place.sept_level)
    if asks_for_l2:
        registers.r8 = 0
