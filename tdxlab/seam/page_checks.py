"""Checks on physical pages: the PAMT is walked, its entries are locked, their types compared.

A check that fails raises `Refused`; locks that it takes are noted in the call and released when the
leaf ends.

Source: TDX module 1.5.01, pamt_manager.c (pamt_walk), helpers.c
(check_and_lock_explicit_private_hpa and its relatives).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_OPERAND_ADDR_RANGE_ERROR,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_PAGE_METADATA_INCORRECT,
)
from tdxlab.arch import PA_LIMIT
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.locks import (
    CONTENDED,
    EXCLUSIVE,
    HP_READER,
    LOCK_MASK,
    PARENT_IN_THE_WAY,
    release_exclusive_hp,
    release_path_exclusive_hp,
    release_path_shared_hp,
    release_shared_hp,
    try_exclusive_hp,
    try_promote_hp,
    try_shared_hp,
)
from tdxlab.seam.pamt import TYPE_MASK, TYPE_SHIFT
from tdxlab.seam.rules import (
    PT_NDA,
    PT_REG,
)

if TYPE_CHECKING:
    from tdxlab.seam.module import Module


#: How `lock_page` takes the last entry: what must be clear in its lock, what is added to it, and
#: how the whole path is let go of.
_SHARED = (CONTENDED, HP_READER, release_path_shared_hp)
_EXCLUSIVELY = (LOCK_MASK, EXCLUSIVE, release_path_exclusive_hp)


def walk_pamt(call: Call, hpa: int, operand: int, exclusive: bool) -> tuple[int, int]:
    """Take the PAMT entry that represents `hpa`, whatever its type; returns (entry, size code).

    The 1G and 2M entries on the way are taken shared, the last one as asked.
    Refuses, in order, all with `operand`: OPERAND_INVALID (unaligned, KeyID bits, 2**52 or more);
    OPERAND_ADDR_RANGE_ERROR (no initialised block); OPERAND_BUSY.
    Source: pamt_manager.c, pamt_walk.
    """
    module = call.module
    if hpa & module.not_an_hpa:
        raise Refused(TDX_OPERAND_INVALID + operand)
    pamt = module.pamt
    if hpa >> 30 not in pamt.blocks:
        raise Refused(TDX_OPERAND_ADDR_RANGE_ERROR + operand)
    words = pamt.words
    for size in (2, 1):
        entry = pamt.entry(hpa, size)
        if _lock_parent(call, entry, operand):
            if exclusive:
                _promote(call, entry, operand)
            return entry, size
    entry = pamt.entry(hpa, 0)
    taken = try_exclusive_hp(words, entry) if exclusive else try_shared_hp(words, entry)
    if not taken:
        raise Refused(TDX_OPERAND_BUSY + operand)
    call.locks.append((release_exclusive_hp if exclusive else release_shared_hp, words, entry))
    return entry, 0


def lock_page(call: Call, hpa: int, operand: int, page_type: int, exclusive: bool = False) -> int:
    """Take the 4 KiB page at `hpa`, which must be of `page_type`; returns its PAMT_4K entry.

    Refuses, all with `operand`: as `walk_pamt`; then PAGE_METADATA_INCORRECT (inside a bigger page,
    or another type). Nearly every SEAMCALL comes here, and nearly always nothing is in the way, no
    bigger page and no sign of contention: then the entries are taken in one go, to the same end.
    Source: helpers.c, check_and_lock_explicit_private_hpa.
    """
    module = call.module
    pamt, pfn = module.pamt, hpa >> 12
    words, block = pamt.words, pamt.blocks.get(pfn >> 18)
    view = words.view
    if block is not None and not hpa & module.not_an_hpa:
        entry_1g, first_2m, first_4k = block
        entry_2m = first_2m + (pfn >> 9 & 511) * 2
        entry: int = first_4k + (pfn & 0x3FFFF) * 2
        word_1g, word_2m, word = view[entry_1g], view[entry_2m], view[entry]
        contended, taken, release = _EXCLUSIVELY if exclusive else _SHARED
        if not (word_1g | word_2m) & PARENT_IN_THE_WAY and not word & contended:
            cells = words.cells
            cells[entry_1g] = word_1g + HP_READER
            cells[entry_2m] = word_2m + HP_READER
            cells[entry] = word + taken
            call.locks.append((release, words, (entry_1g, entry_2m, entry)))
            if (word & TYPE_MASK) >> TYPE_SHIFT != page_type:
                raise Refused(TDX_PAGE_METADATA_INCORRECT + operand)
            return entry
    entry, size = walk_pamt(call, hpa, operand, exclusive)
    if size or (view[entry] & TYPE_MASK) >> TYPE_SHIFT != page_type:
        raise Refused(TDX_PAGE_METADATA_INCORRECT + operand)
    return entry


def _lock_parent(call: Call, entry: int, operand: int) -> bool:
    """Take a 1G or 2M entry shared; True if it maps a page, so that the walk ends there."""
    words = call.module.pamt.words
    if not try_shared_hp(words, entry):
        raise Refused(TDX_OPERAND_BUSY + operand)
    call.locks.append((release_shared_hp, words, entry))
    return (words.view[entry] & TYPE_MASK) >> TYPE_SHIFT == PT_REG


def _promote(call: Call, entry: int, operand: int) -> None:
    """Turn the shared lock that was taken last into an exclusive one."""
    words = call.module.pamt.words
    if not try_promote_hp(words, entry):
        raise Refused(TDX_OPERAND_BUSY + operand)
    call.locks[-1] = (release_exclusive_hp, words, entry)


def lock_free_range(call: Call, hpa: int, operand: int, sept_level: int) -> int:
    """Take the free 4 KiB or 2 MiB page at `hpa` exclusively; returns the index of its PAMT entry
    at that size.

    Refuses as `lock_page`; for 2 MiB also PAGE_METADATA_INCORRECT if one of the 512 pages below is
    not free.
    Source: helpers.c, check_and_lock_free_range_hpa.
    """
    if sept_level == 0:
        return lock_page(call, hpa, operand, PT_NDA, True)
    pamt = call.module.pamt
    if hpa & (call.module.not_an_hpa | 0x1FFFFF):
        raise Refused(TDX_OPERAND_INVALID + operand)
    block = pamt.blocks.get(hpa >> 30)
    if block is None:
        raise Refused(TDX_OPERAND_ADDR_RANGE_ERROR + operand)
    entry_1g, entry = block[0], pamt.entry(hpa, 1)
    if _lock_parent(call, entry_1g, operand):
        _promote(call, entry_1g, operand)
        raise Refused(TDX_PAGE_METADATA_INCORRECT + operand)
    _lock_parent(call, entry, operand)
    _promote(call, entry, operand)
    if pamt.page_type(entry) != PT_NDA or not pamt.is_all_free(hpa):
        raise Refused(TDX_PAGE_METADATA_INCORRECT + operand)
    return entry


def lock_mapped_page(call: Call, entry: int, operand: int = OPERAND_ID_RCX) -> None:
    """Take a PAMT entry that the module found itself, exclusively. Refuses: OPERAND_BUSY."""
    words = call.module.pamt.words
    if not try_exclusive_hp(words, entry):
        raise Refused(TDX_OPERAND_BUSY + operand)
    call.locks.append((release_exclusive_hp, words, entry))


def is_shared_hpa(module: Module, pa: int, alignment: int) -> bool:
    """True for host memory: aligned, below 2**52, no private KeyID, outside the module's range.

    Source: helpers.c, shared_hpa_check.
    """
    return (
        not pa & (alignment - 1)
        and pa < PA_LIMIT
        and not module.platform.seamrr.overlaps(pa, alignment)
        and module.memory.split(pa)[1] < module.platform.private_keyids[0]
    )


def require_shared_hpa(call: Call, pa: int, alignment: int, operand: int) -> None:
    """The operand names host memory, as `is_shared_hpa`. Refuses: OPERAND_INVALID."""
    if not is_shared_hpa(call.module, pa, alignment):
        raise Refused(TDX_OPERAND_INVALID + operand)
