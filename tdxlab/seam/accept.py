"""TDG.MEM.PAGE.ACCEPT: the guest takes a page that the host has added while it runs.

Source: TDX module 1.5.01, tdg_mem_page_accept.c; td_other_exits.c, async_tdexit_ept_violation.
"""

from __future__ import annotations

from tdxlab.abi.leaves import TDG_MEM_PAGE_ACCEPT
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_OPERAND_BUSY,
    TDX_PAGE_ALREADY_ACCEPTED,
    TDX_PAGE_SIZE_MISMATCH,
    TDX_SUCCESS,
)
from tdxlab.arch import EPT_RWX, EPT_WRITE, PAGE_SIZE, WORDS_PER_PAGE
from tdxlab.seam import sept
from tdxlab.seam.call import Refused
from tdxlab.seam.checks import INVALID_RCX, is_private_gpa, page_info
from tdxlab.seam.exits import EXIT_EPT_VIOLATION, Guest, async_exit
from tdxlab.seam.gpa import LeaveGuest
from tdxlab.seam.rules import (
    FREE_BITS,
    GUEST_SEPT_ACCEPTS,
    GUEST_SEPT_RESULT,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_MASK,
)
from tdxlab.seam.td import Tdcs

_ACCEPT_VIOLATION = 1


def tdg_mem_page_accept(guest: Guest) -> int:
    """TDG.MEM.PAGE.ACCEPT: zero a PENDING page and map it.

    RCX: GPA and level (0 or 1). No register but RAX is written.
    Refuses, in order: RCX; PAGE_ALREADY_ACCEPTED, a warning with the level found, for a bigger page
    in the way; a TD exit where the walk stops; OPERAND_BUSY (RCX) while the entry is locked or the
    host waits for it; PAGE_SIZE_MISMATCH with the level where a table is; PAGE_ALREADY_ACCEPTED; a
    TD exit for any state but PENDING. A 2 MiB page is zeroed in steps of 4 KiB; an interrupt
    between two stops it, and running the TDCALL again goes on from there.
    """
    gpa, sept_level = page_info(guest.registers.rcx, 0, 1)
    if not is_private_gpa(gpa, guest.td_field(Tdcs.GPAW)):
        raise Refused(INVALID_RCX)
    memory = guest.module.memory
    place = sept.walk(memory, guest.td_field(Tdcs.EPTP), gpa, sept_level)
    state = SEPT_STATE_BY_BITS[place.septe & SEPT_STATE_MASK]
    if place.sept_level != sept_level:
        if state.guest_accessible:
            return TDX_PAGE_ALREADY_ACCEPTED + place.sept_level
        _exit(guest, gpa, sept_level, place)
    if place.septe & (sept.LOCKED | sept.HOST_PRIORITY):
        return TDX_OPERAND_BUSY + OPERAND_ID_RCX
    if state.bits != FREE_BITS and not state.is_leaf:
        return TDX_PAGE_SIZE_MISMATCH + sept_level
    if state.guest_accessible:
        return TDX_PAGE_ALREADY_ACCEPTED + sept_level
    if state.bits not in GUEST_SEPT_ACCEPTS[TDG_MEM_PAGE_ACCEPT]:
        _exit(guest, gpa, sept_level, place)
    _zero(guest, place)
    accepted = GUEST_SEPT_RESULT[TDG_MEM_PAGE_ACCEPT][state.bits]
    memory.words.put(place.word, sept.remake(place, accepted))
    return TDX_SUCCESS


def _zero(guest: Guest, place: sept.Place) -> None:
    """Zero the page; an interrupt before the last 4 KiB leaves the guest at the same instruction,
    the counter in the entry.
    """
    memory, hpa = guest.module.memory, sept.leaf_hpa(place)
    if place.sept_level == 0:
        memory.clear_page(hpa, guest.td.hkid)
        return
    start = sept.ACCEPT_COUNTER.extract(place.septe)
    for number in range(start, WORDS_PER_PAGE):
        memory.clear_page(hpa + number * PAGE_SIZE, guest.td.hkid)
        if guest.module.conditions.interrupt_pending and number + 1 < WORDS_PER_PAGE:
            counted = sept.ACCEPT_COUNTER.insert(place.septe, number + 1)
            memory.words.put(place.word, counted)
            raise LeaveGuest(guest.resume())


def _exit(guest: Guest, gpa: int, sept_level: int, place: sept.Place) -> None:
    """TD exit as an EPT violation that tells the host what the guest wanted and what stood in the
    way.
    """
    state = SEPT_STATE_BY_BITS[place.septe & SEPT_STATE_MASK]
    info = sept_level | place.sept_level << 3 | state.public << 6 | state.is_leaf << 14
    raise LeaveGuest(
        async_exit(
            guest,
            EXIT_EPT_VIOLATION,
            qualification=EPT_WRITE | (place.septe & EPT_RWX) << 3,
            extended=_ACCEPT_VIOLATION | info << 32,
            gpa=gpa,
        )
    )
