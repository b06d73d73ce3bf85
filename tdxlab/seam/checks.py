"""The checks that leaves share, one function each.

A check that fails raises `Refused` with the module's status, operand and extended information; a
check that passes returns what the leaf goes on with. Locks that a check takes are noted in the call
and released when the leaf ends.

Source: TDX module 1.5.01, helpers.c, pamt_manager.c, sept_manager.c, tdx_locks.h.
"""

from __future__ import annotations

from typing import NoReturn

from tdxlab.abi.registers import MASK64
from tdxlab.abi.status import (
    OPERAND_ID_OP_STATE,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    OPERAND_ID_SEPT_TREE,
    OPERAND_ID_TDR,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_EPT_WALK_FAILED,
    TDX_GPA_RANGE_NOT_BLOCKED,
    TDX_OP_STATE_INCORRECT,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_TD_FATAL,
    TDX_TD_KEYS_NOT_CONFIGURED,
    TDX_TDCS_NOT_ALLOCATED,
    TDX_TDCX_NUM_INCORRECT,
    TDX_TLB_TRACKING_NOT_DONE,
)
from tdxlab.arch import HPA_MASK
from tdxlab.journal import Words
from tdxlab.seam import sept
from tdxlab.seam.call import Call, ModuleFatal, Refused
from tdxlab.seam.epochs import is_tracked
from tdxlab.seam.locks import (
    CONTENDED,
    HP_READER,
    release_exclusive,
    release_shared,
    release_shared_hp,
    try_exclusive,
    try_shared,
    try_shared_hp,
)
from tdxlab.seam.page_checks import lock_page
from tdxlab.seam.pamt import TYPE_MASK, TYPE_SHIFT
from tdxlab.seam.rules import (
    OP_STATE_ACCEPTS,
    PT_NDA,
    PT_RSVD,
    PT_TDR,
    SEPT_ACCEPTS,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_MASK,
    TD_KEYS_CONFIGURED,
    TLB_TRACKING_OP_STATES,
)
from tdxlab.seam.sept import HOST_PRIORITY, LOCKED
from tdxlab.seam.td import (
    MIN_TDCX,
    MIN_TDVPS_PAGES,
    TDVPS_PAGES_PER_L2_VM,
    Td,
    Tdcs,
    Tdr,
    Tdvps,
)

INVALID_RCX = TDX_OPERAND_INVALID + OPERAND_ID_RCX
_LEVEL_MASK = 7

#: Words that nearly every SEAMCALL looks at, so that they are not looked up in their class.
_FATAL, _LIFECYCLE, _NUM_TDCX = Tdr.FATAL, Tdr.LIFECYCLE, Tdr.NUM_TDCX
_TDCX_PA = Tdr.TDCX_PA
_OP_STATE, _OP_STATE_LOCK = Tdcs.OP_STATE, Tdcs.OP_STATE_LOCK
_EPTP, _GPAW, _SEPT_LOCK = Tdcs.EPTP, Tdcs.GPAW, Tdcs.SEPT_LOCK

#: By level: bits that no GPA of an operand has: reserved ones, and those below its frame.
_NO_GPA = tuple(MASK64 & ~(HPA_MASK & -1 << 12 + 9 * level) for level in range(_LEVEL_MASK + 1))
#: How the lock of a TD's whole S-EPT is taken and let go of.
_TREE_SHARED = (try_shared, release_shared)
_TREE_EXCLUSIVE = (try_exclusive, release_exclusive)

#: Either lock bit of an S-EPT entry.
_HELD_OR_WANTED = LOCKED | HOST_PRIORITY


# -- TDs and vCPUs


def lock_tdr(call: Call, hpa: int, operand: int, exclusive: bool = False) -> Td:
    """Take the TD whose TDR is at `hpa`. Refuses as `lock_page` with PT_TDR."""
    lock_page(call, hpa, operand, PT_TDR, exclusive)
    return Td(call.module.memory, hpa)


def lock_owner(call: Call, entry: int) -> Td:
    """Take, shared, the TD that owns the page of a PAMT entry; only the TDR's own entry is locked.

    Refuses: OPERAND_BUSY with operand TDR. An owner that is no page in use halts the module.
    Source: helpers.c, lock_and_map_implicit_tdr.
    """
    pamt = call.module.pamt
    words = pamt.words
    tdr = pamt.owner(entry)
    tdr_entry = pamt.entry(tdr, 0)
    if (words.view[tdr_entry] & TYPE_MASK) >> TYPE_SHIFT in (PT_NDA, PT_RSVD):
        raise ModuleFatal(f"the owner {tdr:#x} of a page is not a page in use")
    if not try_shared_hp(words, tdr_entry):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_TDR)
    call.locks.append((release_shared_hp, words, tdr_entry))
    return Td(call.module.memory, tdr)


def open_tdcs(call: Call, td: Td, lock: bool = True) -> None:
    """The TD is in a state in which this leaf may work on it; maps its TDCS.

    lock: take the op-state lock shared (not when the TDR is held exclusively).
    Refuses, in order: TD_FATAL; TD_KEYS_NOT_CONFIGURED; TDCS_NOT_ALLOCATED; OPERAND_BUSY with
    operand OP_STATE; OP_STATE_INCORRECT.
    Source: helpers.c, check_td_in_correct_build_state and check_any_td_state_map_tdcs_and_lock.
    """
    memory = call.module.memory
    words, page = memory.words, td.page
    view = words.view
    if view[page + _FATAL]:
        raise Refused(TDX_TD_FATAL)
    if view[page + _LIFECYCLE] != TD_KEYS_CONFIGURED:
        raise Refused(TDX_TD_KEYS_NOT_CONFIGURED)
    if view[page + _NUM_TDCX] < MIN_TDCX:
        raise Refused(TDX_TDCS_NOT_ALLOCATED)
    td.tdcs_hpa = hpa = view[page + _TDCX_PA] & memory.page_mask  # as td.map_tdcs, less deeply
    td.tdcs = tdcs = memory.frames[hpa]
    if lock:
        index = tdcs + _OP_STATE_LOCK
        word = view[index]
        if not word & CONTENDED:
            words.cells[index] = word + HP_READER
        elif not try_shared_hp(words, index):
            raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_OP_STATE)
        call.locks.append((release_shared_hp, words, index))
    if view[tdcs + _OP_STATE] not in OP_STATE_ACCEPTS[call.leaf]:
        raise Refused(TDX_OP_STATE_INCORRECT)


def require_tdvps_pages(call: Call, td: Td, tdvpr: int) -> int:
    """The vCPU has all its pages; returns the word index of the TDVPR's frame. Refuses:
    TDCX_NUM_INCORRECT.

    Source: helpers.c, map_tdvps.
    """
    memory = call.module.memory
    view = memory.words.view
    page = memory.frame(tdvpr)
    l2_vms = view[td.tdcs + Tdcs.NUM_L2_VMS]
    if view[page + Tdvps.NUM_PAGES] < MIN_TDVPS_PAGES + TDVPS_PAGES_PER_L2_VM * l2_vms:
        raise Refused(TDX_TDCX_NUM_INCORRECT)
    return page


# -- guest physical addresses and S-EPT entries


def page_info(operand: int, lowest: int, highest: int) -> tuple[int, int]:
    """Split a GPA operand into (gpa, sept_level). Refuses: OPERAND_INVALID with RCX for reserved
    bits, a level outside lowest..highest, or a GPA that is not aligned to its level. Source:
    helpers.c, verify_page_info_input.
    """
    sept_level = operand & _LEVEL_MASK
    gpa = operand - sept_level
    if gpa & _NO_GPA[sept_level] or not lowest <= sept_level <= highest:
        raise Refused(INVALID_RCX)
    return gpa, sept_level


def is_private_gpa(gpa: int, gpaw_flag: int) -> bool:
    """True for a legal private GPA: SHARED bit 0 and no bit above the guest's address width.

    gpaw_flag: 0 for 48 bits, 1 for 52. Source: helpers.c, check_gpa_validity.
    """
    return gpa >> (51 if gpaw_flag else 47) == 0


def require_private_gpa(call: Call, td: Td, gpa: int) -> None:
    """Refuses, with RCX: OPERAND_INVALID for a GPA that is shared or too wide."""
    if not is_private_gpa(gpa, call.module.memory.words.view[td.tdcs + Tdcs.GPAW]):
        raise Refused(INVALID_RCX)


def lock_sept_tree(call: Call, td: Td, exclusive: bool = False) -> None:
    """Take the lock of the TD's whole S-EPT. Refuses: OPERAND_BUSY with operand SEPT_TREE."""
    words = call.module.memory.words
    index = td.tdcs + _SEPT_LOCK
    take, release = _TREE_EXCLUSIVE if exclusive else _TREE_SHARED
    if not take(words, index):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_SEPT_TREE)
    call.locks.append((release, words, index))


def walk_sept(call: Call, td: Td, gpa: int, sept_level: int) -> sept.Place:
    """Walk to the entry for `gpa` at `sept_level`. Refuses, with RCX and details: EPT_WALK_FAILED
    where the walk stops above it.
    """
    memory = call.module.memory
    place = sept.walk(memory, memory.words.view[td.tdcs + Tdcs.EPTP], gpa, sept_level)
    if place.sept_level != sept_level:
        refuse_entry(TDX_EPT_WALK_FAILED + OPERAND_ID_RCX, place)
    return place


def try_lock_septe(call: Call, index: int) -> bool:
    """Take the lock of the entry at word `index`, bit 11. False while it is held; then the host's
    wish stays in bit 52.

    Source: tdx_locks.h, sept_lock_acquire_host.
    """
    words = call.module.memory.words
    septe = words.view[index]
    if septe & LOCKED:
        words.cells[index] = septe | HOST_PRIORITY
        return False
    words.cells[index] = (septe & ~HOST_PRIORITY) | LOCKED
    call.locks.append((_release_septe, words, index))
    return True


def lock_septe(call: Call, place: sept.Place) -> sept.Place:
    """Take the entry's own lock; returns the entry without its lock bits. Refuses, with RCX and
    details: OPERAND_BUSY.
    """
    word, septe = place.word, place.septe
    if septe & _HELD_OR_WANTED:
        if not try_lock_septe(call, word):
            refuse_entry(TDX_OPERAND_BUSY + OPERAND_ID_RCX, place)
        return place._replace(septe=septe & ~HOST_PRIORITY)
    words = call.module.memory.words
    words.cells[word] = septe | LOCKED
    call.locks.append((_release_septe, words, word))
    return place


def _release_septe(words: Words, index: int) -> None:
    septe = words.view[index]
    if septe & LOCKED:
        words.cells[index] = septe & ~LOCKED


def require_sept_state(
    call: Call, place: sept.Place, status: int = TDX_EPT_ENTRY_STATE_INCORRECT
) -> int:
    """The entry is in a state that this leaf goes on with; returns its state bits. Refuses, with
    RCX and details: `status`.
    """
    bits = place.septe & SEPT_STATE_MASK
    if bits not in SEPT_ACCEPTS[call.leaf]:
        refuse_entry(status + OPERAND_ID_RCX, place)
    return bits


def refuse_entry(status: int, place: sept.Place) -> NoReturn:
    """End the leaf with `status` and the extended information of an S-EPT entry in RCX and RDX."""
    raise Refused(status, *sept.report(place.septe, place.sept_level))


def require_tracked(call: Call, td: Td, place: sept.Place, entry: int) -> None:
    """Once the TD runs: the S-EPT entry is blocked, and no TLB can hold it any more.

    entry: PAMT entry of the page or S-EPT page that the entry maps.
    Refuses, with RCX: GPA_RANGE_NOT_BLOCKED, details; TLB_TRACKING_NOT_DONE, no details.
    Source: helpers.h, is_tlb_tracked; the bodies of the leaves.
    """
    state = SEPT_STATE_BY_BITS[place.septe & SEPT_STATE_MASK]
    if not state.tracked or not tracking_applies(call, td):
        return
    if not state.blocked:
        refuse_entry(TDX_GPA_RANGE_NOT_BLOCKED + OPERAND_ID_RCX, place)
    if not is_tracked(call.module.memory.words, td.tdcs, call.module.pamt.bepoch(entry)):
        raise Refused(TDX_TLB_TRACKING_NOT_DONE + OPERAND_ID_RCX)


def tracking_applies(call: Call, td: Td) -> bool:
    """True once vCPUs may run, so that a TLB may hold translations."""
    return call.module.memory.words.view[td.tdcs + Tdcs.OP_STATE] in TLB_TRACKING_OP_STATES


def begin_mem(
    call: Call, lowest: int, highest: int | None, exclusive: bool = False, flags: int = 0
) -> tuple[Td, int, sept.Place]:
    """What most TDH.MEM leaves begin with: the TD that RDX names, and the S-EPT entry that RCX (GPA
    and level) names, under its lock; returns (TD, gpa, entry). RCX and RDX are cleared first.

    lowest, highest: legal levels, None for the root's. exclusive: how the S-EPT tree is locked.
    flags: bits of RDX that are not part of the address.
    Refuses, in order: `lock_tdr` (RDX); `open_tdcs`; `page_info` (RCX); a GPA that is not private
    (RCX); the tree's lock (SEPT_TREE); EPT_WALK_FAILED (RCX, details); the entry's lock (RCX,
    details).
    Source: helpers.c, lock_sept_check_and_walk_internal; the bodies of the leaves.
    """
    registers, memory = call.registers, call.module.memory
    operand, tdr = registers.rcx, registers.rdx
    tdr -= tdr & flags
    registers.rcx = registers.rdx = 0
    lock_page(call, tdr, OPERAND_ID_RDX, PT_TDR)  # as lock_tdr, called less deeply
    td = Td(memory, tdr)
    open_tdcs(call, td)
    words, tdcs = memory.words, td.tdcs
    view, tree_lock = words.view, tdcs + _SEPT_LOCK
    eptp = view[tdcs + _EPTP]
    sept_level = operand & _LEVEL_MASK  # from here on as page_info, then as lock_sept_tree
    gpa = operand - sept_level
    if highest is None:
        highest = eptp >> 3 & 7
    if gpa & _NO_GPA[sept_level] or not lowest <= sept_level <= highest:
        raise Refused(INVALID_RCX)
    if gpa >> 47 and not is_private_gpa(gpa, view[tdcs + _GPAW]):
        raise Refused(INVALID_RCX)
    take, release = _TREE_EXCLUSIVE if exclusive else _TREE_SHARED
    if not take(words, tree_lock):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_SEPT_TREE)
    call.locks.append((release, words, tree_lock))
    place = sept.walk(memory, eptp, gpa, sept_level)
    if place.sept_level != sept_level:
        refuse_entry(TDX_EPT_WALK_FAILED + OPERAND_ID_RCX, place)
    return td, gpa, lock_septe(call, place)
