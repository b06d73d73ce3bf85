"""TDH.PHYMEM.*: physical pages and caches, whatever they were used for."""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_KOT,
    OPERAND_ID_RCX,
    OPERAND_ID_WBCACHE,
    TDX_INTERRUPTED_RESUMABLE,
    TDX_LIFECYCLE_STATE_INCORRECT,
    TDX_NO_HKID_READY_TO_WBCACHE,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_TD_ASSOCIATED_PAGES_EXIST,
    TDX_WBCACHE_RESUME_ERROR,
)
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import INVALID_RCX, lock_owner
from tdxlab.seam.keys import Keys
from tdxlab.seam.locks import release_exclusive, release_shared, try_exclusive, try_shared
from tdxlab.seam.page_checks import lock_page, walk_pamt
from tdxlab.seam.pamt import PAGES_OF_SIZE
from tdxlab.seam.rules import PT_EPT, PT_NDA, PT_REG, PT_RSVD, PT_TDR, TD_TEARDOWN
from tdxlab.seam.td import Td, Tdr
from tdxlab.steps import Operation


def tdh_phymem_page_rdmd(call: Call) -> Operation:
    """TDH.PHYMEM.PAGE.RDMD: read the metadata of a page.

    RCX: HPA, 4 KiB aligned. Returns RCX = type, RDX = HPA of the owner's TDR, R8 = size (0 4K, 1
    2M, 2 1G), R9 = BEPOCH of a page that the S-EPT maps or is made of; R10 = R11 = 0; all 0 on
    refusals.
    Refuses, in order: OPERAND_INVALID; OPERAND_ADDR_RANGE_ERROR; OPERAND_BUSY, all with RCX.
    Source: TDX module 1.5.01, tdh_phymem_page_rdmd.c.
    """
    pamt, registers, hpa = call.module.pamt, call.registers, call.registers.rcx
    _clear_outputs(call)
    entry, size = walk_pamt(call, hpa, OPERAND_ID_RCX, exclusive=False)
    yield ("TDH.PHYMEM.PAGE.RDMD", hpa)
    # -- effects: nothing below may fail
    page_type = pamt.page_type(entry)
    registers.rcx = page_type
    registers.rdx = pamt.owner(entry)
    registers.r8 = size
    registers.r9 = pamt.bepoch(entry) if page_type in (PT_REG, PT_EPT) else 0


def _clear_outputs(call: Call) -> None:
    registers = call.registers
    registers.rcx = registers.rdx = registers.r8 = registers.r9 = registers.r10 = registers.r11 = 0


def tdh_phymem_page_reclaim(call: Call) -> Operation:
    """TDH.PHYMEM.PAGE.RECLAIM: take a page of any kind back from a TD that is being torn down. Its
    content is not cleared.

    RCX: HPA, aligned to the page. Returns RCX = type, RDX = HPA of the owner's TDR, R8 = size, also
    when one of the last two checks refuses; R9 = R10 = R11 = 0.
    Refuses, in order: OPERAND_INVALID (RCX); OPERAND_ADDR_RANGE_ERROR (RCX); OPERAND_BUSY (RCX);
    PAGE_METADATA_INCORRECT for a free or reserved page (RCX); RCX not aligned to the page; the
    owner's TDR busy (TDR); LIFECYCLE_STATE_INCORRECT; for a TDR TD_ASSOCIATED_PAGES_EXIST.
    Source: TDX module 1.5.01, tdh_phymem_page_reclaim.c.
    """
    module, registers, hpa = call.module, call.registers, call.registers.rcx
    pamt = module.pamt
    _clear_outputs(call)
    entry, size = walk_pamt(call, hpa, OPERAND_ID_RCX, exclusive=True)
    page_type = pamt.page_type(entry)
    if page_type in (PT_NDA, PT_RSVD):
        raise Refused(TDX_PAGE_METADATA_INCORRECT + OPERAND_ID_RCX)

    registers.rcx, registers.rdx, registers.r8 = page_type, pamt.owner(entry), size
    if hpa & ((1 << (12 + 9 * size)) - 1):
        raise Refused(INVALID_RCX)
    is_tdr = page_type == PT_TDR
    td = Td(module.memory, hpa) if is_tdr else lock_owner(call, entry)
    view = module.memory.words.view
    if view[td.page + Tdr.LIFECYCLE] != TD_TEARDOWN:
        raise Refused(TDX_LIFECYCLE_STATE_INCORRECT)
    if is_tdr and view[td.page + Tdr.CHLDCNT]:
        raise Refused(TDX_TD_ASSOCIATED_PAGES_EXIST)
    yield ("TDH.PHYMEM.PAGE.RECLAIM", hpa)
    # -- effects: nothing below may fail
    if not is_tdr:
        module.add_children(td, -PAGES_OF_SIZE[size])
    pamt.set_type(entry, PT_NDA)


def tdh_phymem_page_wbinvd(call: Call) -> Operation:
    """TDH.PHYMEM.PAGE.WBINVD: write back and invalidate the cache lines of a free page under one
    KeyID.

    RCX: physical address with the KeyID in its top bits; unchanged.
    Refuses, in order: the page, which must be free (RCX).
    Source: TDX module 1.5.01, tdh_phymem_page_wbinvd.c.
    """
    module, pa = call.module, call.registers.rcx
    lock_page(call, pa & ~module.memory.keyid_mask, OPERAND_ID_RCX, PT_NDA)
    yield ("TDH.PHYMEM.PAGE.WBINVD", pa)
    # -- effects: nothing below may fail
    module.memory.write_back_page(*module.memory.split(pa))
    module.trace.count("page_wbinvd")


def tdh_phymem_cache_wb(call: Call) -> Operation:
    """TDH.PHYMEM.CACHE.WB: write back the caller's package for every KeyID that is FLUSHED;
    interruptible between sub-blocks.

    RCX: 0 to start, 1 to resume; unchanged.
    Refuses, in order: RCX; the package's mutex (WBCACHE); KOT lock (KOT); starting,
    NO_HKID_READY_TO_WBCACHE, a warning; resuming, WBCACHE_RESUME_ERROR. Returns
    INTERRUPTED_RESUMABLE when an interrupt is pending before the last sub-block.
    Source: TDX module 1.5.01, tdh_phymem_cache_wb.c.
    """
    keys, resume = call.module.keys, call.registers.rcx
    package = call.module.cpu.package_of[call.lp]
    if resume > 1:
        raise Refused(INVALID_RCX)
    _lock_write_back(call, package)
    saved = keys.wbt_word(package, Keys.SAVED_POINT)
    if resume and not keys.wbt.view[saved]:
        raise Refused(TDX_WBCACHE_RESUME_ERROR)
    if not resume:
        keys.wbt.put(saved, 0)
        flushed = keys.flushed()
        if not flushed:
            raise Refused(TDX_NO_HKID_READY_TO_WBCACHE)
        keys.snapshots.put(package, flushed)
    yield from _write_back(call, package, saved)


def _lock_write_back(call: Call, package: int) -> None:
    """Take the package's mutex, then the KOT shared. Refuses: OPERAND_BUSY with WBCACHE, KOT."""
    keys = call.module.keys
    mutex = keys.wbt_word(package, Keys.MUTEX)
    if not try_exclusive(keys.wbt, mutex):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_WBCACHE)
    call.locks.append((release_exclusive, keys.wbt, mutex))
    if not try_shared(keys.lock, 0):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_KOT)
    call.locks.append((release_shared, keys.lock, 0))


def _write_back(call: Call, package: int, saved: int) -> Operation:
    """Write back sub-block after sub-block from the saved point on; at least one in each call."""
    module = call.module
    block = module.keys.wbt.view[saved]
    while True:
        yield ("TDH.PHYMEM.CACHE.WB", package, block)
        # -- effects: nothing below may fail
        block += 1
        if block >= module.platform.wbinvd_sub_blocks:
            break
        if module.conditions.interrupt_pending:
            module.keys.wbt.put(saved, block)
            call.status = TDX_INTERRUPTED_RESUMABLE
            return
    module.keys.wbt.put(saved, 0)
    module.keys.written_back(package)
    module.trace.count("package_wbinvd")
