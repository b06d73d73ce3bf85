"""TDH.VP.*: vCPUs are created, associated with an LP, and flushed from it. Entering is in
enter.py.
"""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_MAX_VCPUS_EXCEEDED,
    TDX_TD_KEYS_NOT_CONFIGURED,
    TDX_TDCX_NUM_INCORRECT,
    TDX_VCPU_ASSOCIATED,
    TDX_VCPU_NOT_ASSOCIATED,
    TDX_VCPU_STATE_INCORRECT,
)
from tdxlab.arch import HPA_MASK
from tdxlab.memory import ZERO_PAGE
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import lock_owner, lock_tdr, open_tdcs, require_tdvps_pages
from tdxlab.seam.page_checks import lock_page
from tdxlab.seam.rules import (
    PT_NDA,
    PT_TDCX,
    PT_TDVPR,
    TD_KEYS_CONFIGURED,
    VCPU_READY,
    VCPU_UNINITIALIZED,
)
from tdxlab.seam.td import (
    ALL_ONES,
    EXIT_FAULT_LIKE,
    GPR_NAMES,
    MAX_TDVPS_PAGES,
    NO_LP,
    NO_POSTED_VECTOR,
    Td,
    Tdcs,
    Tdr,
    Tdvps,
)
from tdxlab.steps import Operation

#: Indices of vCPU pages that are filled with ones; the others are zeroed.
_TDVPS_ALL_ONES = frozenset((7, 8, 10, 11, 13, 14))


def tdh_vp_create(call: Call) -> Operation:
    """TDH.VP.CREATE: turn a free page into the TDVPR, the root page of a new vCPU.

    RCX: HPA of the page. RDX: HPA of the TDR. Both unchanged. There is no limit on the number here;
    TDH.VP.INIT has it.
    Refuses, in order: TDR (RDX); op-state; page (RCX).
    Source: TDX module 1.5.01, tdh_vp_create.c.
    """
    module, hpa = call.module, call.registers.rcx
    td = lock_tdr(call, call.registers.rdx, OPERAND_ID_RDX)
    open_tdcs(call, td)
    entry = lock_page(call, hpa, OPERAND_ID_RCX, PT_NDA, exclusive=True)
    yield ("TDH.VP.CREATE", td.tdr, hpa)
    # -- effects: nothing below may fail
    module.memory.write_page(hpa, ZERO_PAGE, td.hkid)
    page, words = module.memory.frame(hpa), module.memory.words
    words.put(page + Tdvps.NUM_PAGES, 1)
    words.put(page + Tdvps.PAGE_PA, module.memory.join(hpa, td.hkid))
    words.put(page + Tdvps.ASSOC_LPID, NO_LP)
    module.add_children(td, 1)
    module.pamt.give(entry, PT_TDVPR, td.tdr, module.pamt.bepoch(entry))


def tdh_vp_addcx(call: Call) -> Operation:
    """TDH.VP.ADDCX: give a vCPU one more page; six in all, the TDVPR included, are enough to run.

    RCX: HPA of the free page. RDX: HPA of the TDVPR. Both unchanged.
    Refuses, in order: TDVPR, taken exclusively (RDX); its TDR (TDR); op-state;
    VCPU_STATE_INCORRECT; TDCX_NUM_INCORRECT beyond 15 pages; page (RCX).
    Source: TDX module 1.5.01, tdh_vp_addcx.c.
    """
    module, hpa, tdvpr = call.module, call.registers.rcx, call.registers.rdx
    words = module.memory.words
    tdvpr_entry = lock_page(call, tdvpr, OPERAND_ID_RDX, PT_TDVPR, exclusive=True)
    td = lock_owner(call, tdvpr_entry)
    open_tdcs(call, td)
    page = module.memory.frame(tdvpr)
    if words.view[page + Tdvps.STATE] != VCPU_UNINITIALIZED:
        raise Refused(TDX_VCPU_STATE_INCORRECT)
    index = words.view[page + Tdvps.NUM_PAGES]
    if index >= MAX_TDVPS_PAGES:
        raise Refused(TDX_TDCX_NUM_INCORRECT)
    entry = lock_page(call, hpa, OPERAND_ID_RCX, PT_NDA, exclusive=True)
    yield ("TDH.VP.ADDCX", tdvpr, hpa)
    # -- effects: nothing below may fail
    filling = ALL_ONES if index in _TDVPS_ALL_ONES else ZERO_PAGE
    module.memory.write_page(hpa, filling, td.hkid)
    words.put(page + Tdvps.PAGE_PA + index, module.memory.join(hpa, td.hkid))
    words.put(page + Tdvps.NUM_PAGES, index + 1)
    module.add_children(td, 1)
    module.pamt.give(entry, PT_TDCX, td.tdr, module.pamt.bepoch(entry))


def tdh_vp_init(call: Call) -> Operation:
    """TDH.VP.INIT: make the vCPU ready to run and associate it with the calling LP.

    RCX: HPA of the TDVPR. RDX: a value that the guest finds in RCX and R8. Both unchanged.
    Refuses, in order: TDVPR, taken exclusively (RCX); its TDR (TDR); op-state; TDCX_NUM_INCORRECT;
    VCPU_STATE_INCORRECT; MAX_VCPUS_EXCEEDED.
    Source: TDX module 1.5.01, tdh_vp_init.c.
    Differs: IA32_TSC_ADJUST never changes here, so INCONSISTENT_MSR cannot occur.
    """
    module, tdvpr = call.module, call.registers.rcx
    words = module.memory.words
    td = lock_owner(call, lock_page(call, tdvpr, OPERAND_ID_RCX, PT_TDVPR, exclusive=True))
    open_tdcs(call, td)
    page = require_tdvps_pages(call, td, tdvpr)
    if words.view[page + Tdvps.STATE] != VCPU_UNINITIALIZED:
        raise Refused(TDX_VCPU_STATE_INCORRECT)
    index = words.view[td.tdcs + Tdcs.NUM_VCPUS]
    if index >= words.view[td.tdcs + Tdcs.MAX_VCPUS]:
        raise Refused(TDX_MAX_VCPUS_EXCEEDED)
    yield ("TDH.VP.INIT", tdvpr)
    # -- effects: nothing below may fail
    words.put(td.tdcs + Tdcs.NUM_VCPUS, index + 1)
    words.put(page + Tdvps.INDEX, index)
    words.put(page + Tdvps.STATE, VCPU_READY)
    words.put(page + Tdvps.LAST_TD_EXIT, EXIT_FAULT_LIKE)
    words.put(page + Tdvps.ASSOC_LPID, call.lp)
    words.put(td.tdcs + Tdcs.NUM_ASSOC_VCPUS, words.view[td.tdcs + Tdcs.NUM_ASSOC_VCPUS] + 1)
    _set_initial_state(call, td, page)


def _set_initial_state(call: Call, td: Td, page: int) -> None:
    """What the guest finds in its registers at the first entry, and the host's initial controls."""
    module, words = call.module, call.module.memory.words
    initial = {
        "rcx": call.registers.rdx,
        "r8": call.registers.rdx,
        "rbx": 52 if words.view[td.tdcs + Tdcs.GPAW] else 48,
        "rdx": module.platform.native_cpuid_1_eax,
        "rsi": words.view[page + Tdvps.INDEX],
    }
    for name, value in initial.items():
        words.put(page + Tdvps.GPRS + GPR_NAMES.index(name), value)
    words.put(page + Tdvps.POSTED_VECTOR, NO_POSTED_VECTOR)
    words.put(page + Tdvps.POSTED_DESCRIPTOR, (1 << 64) - 1)
    words.put(page + Tdvps.SHARED_EPTP, words.view[page + Tdvps.PAGE_PA + 4] & HPA_MASK)


def associate(call: Call, td: Td, page: int) -> bool:
    """Tie the vCPU (frame of its TDVPR at word `page`) to the calling LP; True if it was on no LP
    before.

    Refuses: VCPU_ASSOCIATED if it is on another LP. Source: TDX module 1.5.01, helpers.c,
    associate_vcpu.
    """
    words = call.module.memory.words
    lp = words.view[page + Tdvps.ASSOC_LPID]
    if lp == call.lp:
        return False
    if lp != NO_LP:
        raise Refused(TDX_VCPU_ASSOCIATED)
    words.put(page + Tdvps.ASSOC_LPID, call.lp)
    words.put(td.tdcs + Tdcs.NUM_ASSOC_VCPUS, words.view[td.tdcs + Tdcs.NUM_ASSOC_VCPUS] + 1)
    return True


def tdh_vp_flush(call: Call) -> Operation:
    """TDH.VP.FLUSH: drop everything the calling LP has cached of a vCPU; it may run elsewhere
    afterwards.

    RCX: HPA of the TDVPR; unchanged.
    Refuses, in order: TDVPR, taken exclusively (RCX); its TDR (TDR); TD_KEYS_NOT_CONFIGURED;
    TDCX_NUM_INCORRECT; VCPU_NOT_ASSOCIATED with this LP.
    Source: TDX module 1.5.01, tdh_vp_flush.c.
    """
    module, tdvpr = call.module, call.registers.rcx
    words = module.memory.words
    td = lock_owner(call, lock_page(call, tdvpr, OPERAND_ID_RCX, PT_TDVPR, exclusive=True))
    if words.view[td.page + Tdr.LIFECYCLE] != TD_KEYS_CONFIGURED:
        raise Refused(TDX_TD_KEYS_NOT_CONFIGURED)
    td.map_tdcs(module.memory)
    page = require_tdvps_pages(call, td, tdvpr)
    if words.view[page + Tdvps.ASSOC_LPID] != call.lp:
        raise Refused(TDX_VCPU_NOT_ASSOCIATED)
    yield ("TDH.VP.FLUSH", tdvpr)
    # -- effects: nothing below may fail
    module.flush_tlb(call.lp, td)
    words.put(page + Tdvps.ASSOC_LPID, NO_LP)
    words.put(td.tdcs + Tdcs.NUM_ASSOC_VCPUS, words.view[td.tdcs + Tdcs.NUM_ASSOC_VCPUS] - 1)
    module.forget_last_vcpu(call.lp)
