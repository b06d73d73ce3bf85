"""TDH.MNG.*: a TD as a whole is created, keyed, given its pages, and taken apart."""

from __future__ import annotations

import hashlib

from tdxlab.abi.status import (
    OPERAND_ID_KET,
    OPERAND_ID_KOT,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_FLUSHVP_NOT_DONE,
    TDX_HKID_NOT_FREE,
    TDX_KEY_CONFIGURED,
    TDX_KEY_GENERATION_FAILED,
    TDX_LIFECYCLE_STATE_INCORRECT,
    TDX_OP_STATE_INCORRECT,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_RND_NO_ENTROPY,
    TDX_TD_FATAL,
    TDX_TD_KEYS_NOT_CONFIGURED,
    TDX_TDCX_NUM_INCORRECT,
    TDX_WBCACHE_NOT_COMPLETE,
)
from tdxlab.cpu import PCONFIG_BUSY, PCONFIG_OK
from tdxlab.memory import ZERO_PAGE
from tdxlab.seam import sept
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import lock_tdr
from tdxlab.seam.locks import release_exclusive, try_exclusive
from tdxlab.seam.page_checks import lock_page
from tdxlab.seam.rules import (
    HKID_ASSIGNED,
    HKID_FLUSHED,
    HKID_FREE,
    OP_STATE_ACCEPTS,
    OP_UNINITIALIZED,
    PT_NDA,
    PT_TDCX,
    PT_TDR,
    TD_BLOCKED,
    TD_HKID_ASSIGNED,
    TD_KEYS_CONFIGURED,
    TD_TEARDOWN,
)
from tdxlab.seam.td import ALL_ONES, MAX_TDCX, MIN_TDCX, SEPT_ROOT_PAGE, Td, Tdcs, Tdr
from tdxlab.steps import Operation

#: What TDH.MNG.ADDCX fills the page of each index with; pages not named here are zeroed.
_TDCX_FILLING = {2: ALL_ONES, SEPT_ROOT_PAGE: sept.FREE_PAGE}


def tdh_mng_create(call: Call) -> Operation:
    """TDH.MNG.CREATE: turn a free page into the TDR of a new TD and take a KeyID for it.

    RCX: HPA of the page. RDX: private KeyID in bits 15:0, the rest zero. Both unchanged.
    Refuses, in order: RDX; page (RCX); KOT lock (KOT); HKID_NOT_FREE; RND_NO_ENTROPY, which leaves
    the page zeroed.
    Source: TDX module 1.5.01, tdh_mng_create.c.
    Differs: the UUID is not random but computed from the page and the KeyID, so that runs repeat.
    """
    module, hpa, hkid = call.module, call.registers.rcx, call.registers.rdx
    lowest, highest = module.platform.private_keyids
    if not lowest <= hkid <= highest:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RDX)
    entry = lock_page(call, hpa, OPERAND_ID_RCX, PT_NDA, exclusive=True)
    lock_kot(call)
    if module.keys.states.view[hkid] != HKID_FREE:
        raise Refused(TDX_HKID_NOT_FREE)
    module.memory.write_page(hpa, ZERO_PAGE, module.platform.global_keyid)
    if module.conditions.entropy_fails:
        raise Refused(TDX_RND_NO_ENTROPY)
    yield ("TDH.MNG.CREATE", hpa, hkid)
    # -- effects: nothing below may fail
    page = module.memory.frame(hpa)
    module.keys.states.put(hkid, HKID_ASSIGNED)
    module.memory.words.put(page + Tdr.HKID, hkid)
    module.memory.words.fill(page + Tdr.UUID, hashlib.sha256(b"%d %d" % (hpa, hkid)).digest())
    module.pamt.give(entry, PT_TDR, 0, module.pamt.bepoch(entry))


def lock_kot(call: Call) -> None:
    """Take the KOT exclusively. Refuses: OPERAND_BUSY with operand KOT."""
    words = call.module.keys.lock
    if not try_exclusive(words, 0):
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_KOT)
    call.locks.append((release_exclusive, words, 0))


def tdh_mng_key_config(call: Call) -> Operation:
    """TDH.MNG.KEY.CONFIG: program the TD's key on the caller's package; the last package completes
    it.

    RCX: HPA of the TDR; unchanged.
    Refuses, in order: TDR, taken exclusively (RCX); TD_FATAL; LIFECYCLE_STATE_INCORRECT;
    KEY_CONFIGURED, a warning; PCONFIG busy (KET), KEY_GENERATION_FAILED.
    Source: TDX module 1.5.01, tdh_mng_key_config.c. Differs: all packages have the same key, made
    with the first.
    """
    module, words = call.module, call.module.memory.words
    td = lock_tdr(call, call.registers.rcx, OPERAND_ID_RCX, exclusive=True)
    if words.view[td.page + Tdr.FATAL]:
        raise Refused(TDX_TD_FATAL)
    if words.view[td.page + Tdr.LIFECYCLE] != TD_HKID_ASSIGNED:
        raise Refused(TDX_LIFECYCLE_STATE_INCORRECT)
    package = 1 << module.cpu.package_of[call.lp]
    done = words.view[td.page + Tdr.PKG_CONFIG_BITMAP]
    if done & package:
        raise Refused(TDX_KEY_CONFIGURED)
    require_pconfig(call)
    yield ("TDH.MNG.KEY.CONFIG", td.tdr)
    # -- effects: nothing below may fail
    if not done:
        module.memory.new_key(td.hkid)
    words.put(td.page + Tdr.PKG_CONFIG_BITMAP, done | package)
    if done | package == module.all_packages:
        words.put(td.page + Tdr.LIFECYCLE, TD_KEYS_CONFIGURED)


def require_pconfig(call: Call) -> None:
    """PCONFIG programs a key. Refuses: OPERAND_BUSY with operand KET; KEY_GENERATION_FAILED."""
    result = call.module.conditions.pconfig_result
    if result == PCONFIG_BUSY:
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_KET)
    if result != PCONFIG_OK:
        raise Refused(TDX_KEY_GENERATION_FAILED)


def tdh_mng_addcx(call: Call) -> Operation:
    """TDH.MNG.ADDCX: give the TD one more page for its control structures, six to nine in all; the
    fourth is the S-EPT root.

    RCX: HPA of the free page. RDX: HPA of the TDR. Both unchanged.
    Refuses, in order: TDR, taken exclusively (RDX); TD_FATAL; TD_KEYS_NOT_CONFIGURED;
    TDCX_NUM_INCORRECT; page (RCX); on the sixth page RND_NO_ENTROPY, from the seventh on
    OP_STATE_INCORRECT.
    Source: TDX module 1.5.01, tdh_mng_add_cx.c.
    """
    module, hpa, words = call.module, call.registers.rcx, call.module.memory.words
    td = lock_tdr(call, call.registers.rdx, OPERAND_ID_RDX, exclusive=True)
    if words.view[td.page + Tdr.FATAL]:
        raise Refused(TDX_TD_FATAL)
    if words.view[td.page + Tdr.LIFECYCLE] != TD_KEYS_CONFIGURED:
        raise Refused(TDX_TD_KEYS_NOT_CONFIGURED)
    index = words.view[td.page + Tdr.NUM_TDCX]
    if index >= MAX_TDCX:
        raise Refused(TDX_TDCX_NUM_INCORRECT)
    entry = lock_page(call, hpa, OPERAND_ID_RCX, PT_NDA, exclusive=True)
    if index == MIN_TDCX - 1 and module.conditions.entropy_fails:
        raise Refused(TDX_RND_NO_ENTROPY)
    if index >= MIN_TDCX:
        td.map_tdcs(module.memory)
        if words.view[td.tdcs + Tdcs.OP_STATE] not in OP_STATE_ACCEPTS[call.leaf]:
            raise Refused(TDX_OP_STATE_INCORRECT)
    yield ("TDH.MNG.ADDCX", td.tdr, hpa)
    # -- effects: nothing below may fail
    module.memory.write_page(hpa, _TDCX_FILLING.get(index, ZERO_PAGE), td.hkid)
    module.memory.frame(hpa)  # has to be there before a call that is refused looks at a field
    words.put(td.page + Tdr.TDCX_PA + index, module.memory.join(hpa, td.hkid))
    words.put(td.page + Tdr.NUM_TDCX, index + 1)
    module.add_children(td, 1)
    module.pamt.give(entry, PT_TDCX, td.tdr, module.pamt.bepoch(entry))


def tdh_mng_vpflushdone(call: Call) -> Operation:
    """TDH.MNG.VPFLUSHDONE: no vCPU is on any LP any more; the TD's memory is inaccessible from here
    on.

    RCX: HPA of the TDR; unchanged. Legal straight after TDH.MNG.CREATE.
    Refuses, in order: TDR, taken exclusively (RCX); KOT lock (KOT); LIFECYCLE_STATE_INCORRECT;
    FLUSHVP_NOT_DONE.
    Source: TDX module 1.5.01, tdh_mng_vpflushdone.c.
    """
    module, words = call.module, call.module.memory.words
    td = lock_tdr(call, call.registers.rcx, OPERAND_ID_RCX, exclusive=True)
    lock_kot(call)
    if words.view[td.page + Tdr.LIFECYCLE] not in (TD_HKID_ASSIGNED, TD_KEYS_CONFIGURED):
        raise Refused(TDX_LIFECYCLE_STATE_INCORRECT)
    if _has_associated_vcpus(call, td):
        raise Refused(TDX_FLUSHVP_NOT_DONE)
    yield ("TDH.MNG.VPFLUSHDONE", td.tdr)
    # -- effects: nothing below may fail
    module.keys.pending_packages.put(td.hkid, module.all_packages)
    module.keys.states.put(td.hkid, HKID_FLUSHED)
    words.put(td.page + Tdr.LIFECYCLE, TD_BLOCKED)


def _has_associated_vcpus(call: Call, td: Td) -> bool:
    memory = call.module.memory
    view = memory.words.view
    if view[td.page + Tdr.NUM_TDCX] < MIN_TDCX:
        return False
    td.map_tdcs(memory)
    return bool(
        view[td.tdcs + Tdcs.OP_STATE] != OP_UNINITIALIZED and view[td.tdcs + Tdcs.NUM_ASSOC_VCPUS]
    )


def tdh_mng_key_freeid(call: Call) -> Operation:
    """TDH.MNG.KEY.FREEID: the KeyID can go to another TD; now the pages can be reclaimed.

    RCX: HPA of the TDR; unchanged.
    Refuses, in order: TDR, taken exclusively (RCX); LIFECYCLE_STATE_INCORRECT; KOT lock (KOT);
    WBCACHE_NOT_COMPLETE.
    Source: TDX module 1.5.01, tdh_mng_key_freeid.c.
    """
    module, words = call.module, call.module.memory.words
    td = lock_tdr(call, call.registers.rcx, OPERAND_ID_RCX, exclusive=True)
    if words.view[td.page + Tdr.LIFECYCLE] != TD_BLOCKED:
        raise Refused(TDX_LIFECYCLE_STATE_INCORRECT)
    lock_kot(call)
    if module.keys.pending_packages.view[td.hkid]:
        raise Refused(TDX_WBCACHE_NOT_COMPLETE)
    yield ("TDH.MNG.KEY.FREEID", td.tdr)
    # -- effects: nothing below may fail
    module.keys.states.put(td.hkid, HKID_FREE)
    module.memory.write_back_key(td.hkid)
    words.put(td.page + Tdr.LIFECYCLE, TD_TEARDOWN)


def tdh_mng_key_reclaimid(call: Call) -> Operation:
    """TDH.MNG.KEY.RECLAIMID: does nothing and always succeeds; kept by the module for old hosts.

    Source: TDX module 1.5.01, tdh_mng_key_reclaimid.c.
    """
    yield ("TDH.MNG.KEY.RECLAIMID",)
