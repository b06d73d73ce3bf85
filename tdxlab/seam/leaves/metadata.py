"""TDH.MNG.RD and WR, TDH.VP.RD and WR, TDH.SYS.RD, RDALL and INFO; and what the guest has of them.

The host's leaves are step generators as everywhere. The guest's functions are plain: they are given
the module, the TD, the word index of the frame of the TDVPR, the guest's registers and the version
of the call, and return the guest's RAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_METADATA_FIELD,
    OPERAND_ID_R8,
    OPERAND_ID_R9,
    OPERAND_ID_RAX,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
    TDX_SYS_LP_INIT_NOT_DONE,
    TDX_VCPU_STATE_INCORRECT,
)
from tdxlab.arch import PAGE_SIZE
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import lock_owner, lock_tdr, open_tdcs, require_tdvps_pages
from tdxlab.seam.fields import GUEST, NULL_FIELD_ID, PRODUCTION_HOST
from tdxlab.seam.fields_system import MAX_CMRS
from tdxlab.seam.leaves.vp import associate
from tdxlab.seam.metadata import Access, Element, host_of, system_access, td_access, vcpu_access
from tdxlab.seam.page_checks import lock_page, require_shared_hpa
from tdxlab.seam.rules import PT_TDVPR, VCPU_DISABLED, VCPU_READY
from tdxlab.seam.sysinfo import (
    CMR_INFO_ALIGNMENT,
    TDSYSINFO_SIZE,
    make_cmr_info,
    make_tdsysinfo,
)
from tdxlab.seam.td import Td, Tdvps
from tdxlab.steps import Operation

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

_INVALID_RAX = TDX_OPERAND_INVALID + OPERAND_ID_RAX
_INVALID_RCX = TDX_OPERAND_INVALID + OPERAND_ID_RCX

_READABLE_STATES = (VCPU_READY, VCPU_DISABLED)
_WRITABLE_STATES = (VCPU_READY,)


# -- one element, for host and guest


def _preset(registers: Registers, *, gives_next: bool) -> None:
    """What a refused read leaves: R8 = 0 and, where there is a next id, RDX = all ones."""
    registers.r8 = 0
    if gives_next:
        registers.rdx = NULL_FIELD_ID


def _find_readable(access: Access, raw: int, *, gives_next: bool) -> Element:
    """The element that `raw` names, if the asker may read it.

    Refuses, in order: METADATA_FIRST_FIELD_ID_IN_CONTEXT for all ones, with the first id in RDX, if
    there is a next id at all; METADATA_FIELD_ID_INCORRECT; METADATA_FIELD_NOT_READABLE.
    """
    if gives_next and access.is_null(raw):
        raise Refused(TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT, rdx=access.first_id())
    element = access.find_single(raw)
    access.require_readable(element)
    return element


def _answer(
    registers: Registers, access: Access, element: Element, raw: int, *, gives_next: bool
) -> None:
    """A read that succeeded: the value in R8, the next id in RDX."""
    registers.r8 = access.read(element)
    if gives_next:
        registers.rdx = access.next_id(element, raw)


# -- TDs


def tdh_mng_rd(call: Call) -> Operation:
    """TDH.MNG.RD: read one metadata field of a TD.

    RCX: HPA of the TDR. RDX: field id; in version 1 all ones ask for the first one. Returns R8 =
    the value, 0 on refusals; version 1: RDX = the next id, all ones after the last and on refusals.
    Refuses, in order: version above 1 (RAX); TDR (RCX); op-state; as `_find_readable`.
    Source: TDX module 1.5.01, tdh_mng_rd_wr.c.
    """
    module, registers = call.module, call.registers
    tdr, raw, gives_next = registers.rcx, registers.rdx, call.version > 0
    _preset(registers, gives_next=gives_next)
    if call.version > 1:
        raise Refused(_INVALID_RAX)
    td = lock_tdr(call, tdr, OPERAND_ID_RCX)
    open_tdcs(call, td)
    access = td_access(module, td, host_of(module, td))
    element = _find_readable(access, raw, gives_next=gives_next)
    yield ("TDH.MNG.RD", tdr, raw)
    # -- effects: nothing below may fail
    _answer(registers, access, element, raw, gives_next=gives_next)


def tdh_mng_wr(call: Call) -> Operation:
    """TDH.MNG.WR: write one metadata field of a TD.

    RCX: HPA of the TDR. RDX: field id. R8: the new value. R9: mask of the bits to write. Returns
    R8 = the old value, 0 on refusals.
    Refuses, in order: TDR (RCX); op-state; METADATA_FIELD_ID_INCORRECT; as `Access.require_change`;
    OPERAND_BUSY (METADATA_FIELD) if another writer was faster.
    Source: TDX module 1.5.01, tdh_mng_rd_wr.c.
    """
    module, registers = call.module, call.registers
    tdr, raw, value, mask = registers.rcx, registers.rdx, registers.r8, registers.r9
    registers.r8 = 0
    td = lock_tdr(call, tdr, OPERAND_ID_RCX)
    open_tdcs(call, td)
    access = td_access(module, td, host_of(module, td))
    element = access.find_single(raw)
    change = access.require_change(element, value, mask)
    old = access.read(element)
    yield ("TDH.MNG.WR", tdr, raw, change)
    if access.read(element) != old:
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_METADATA_FIELD)
    # -- effects: nothing below may fail
    access.write(element, change)
    registers.r8 = old


# -- vCPUs


def _begin_vcpu(call: Call, tdvpr: int, states: tuple[int, ...]) -> Access:
    """The vCPU whose TDVPR is at `tdvpr`, tied to the calling LP; it stays so whatever comes after.

    Refuses, in order: TDVPR (RCX); its TDR (TDR); op-state; TDCX_NUM_INCORRECT;
    VCPU_STATE_INCORRECT outside `states`; VCPU_ASSOCIATED with another LP.
    """
    module = call.module
    td = lock_owner(call, lock_page(call, tdvpr, OPERAND_ID_RCX, PT_TDVPR))
    open_tdcs(call, td)
    page = require_tdvps_pages(call, td, tdvpr)
    if module.memory.words.view[page + Tdvps.STATE] not in states:
        raise Refused(TDX_VCPU_STATE_INCORRECT)
    associate(call, td, page)
    return vcpu_access(module, td, page, host_of(module, td))


def tdh_vp_rd(call: Call) -> Operation:
    """TDH.VP.RD: read one metadata field of a vCPU, which is tied to the calling LP afterwards.

    RCX: HPA of the TDVPR. RDX, R8: as TDH.MNG.RD.
    Refuses, in order: version above 1 (RAX); as `_begin_vcpu`, READY or DISABLED; as
    `_find_readable`.
    Source: TDX module 1.5.01, tdh_vp_rd_wr.c.
    """
    registers = call.registers
    tdvpr, raw, gives_next = registers.rcx, registers.rdx, call.version > 0
    _preset(registers, gives_next=gives_next)
    if call.version > 1:
        raise Refused(_INVALID_RAX)
    access = _begin_vcpu(call, tdvpr, _READABLE_STATES)
    element = _find_readable(access, raw, gives_next=gives_next)
    yield ("TDH.VP.RD", tdvpr, raw)
    # -- effects: nothing below may fail
    _answer(registers, access, element, raw, gives_next=gives_next)


def tdh_vp_wr(call: Call) -> Operation:
    """TDH.VP.WR: write one metadata field of a vCPU, which is tied to the calling LP afterwards.

    RCX: HPA of the TDVPR. RDX, R8, R9: as TDH.MNG.WR.
    Refuses, in order: as `_begin_vcpu`, READY; METADATA_FIELD_ID_INCORRECT; as
    `Access.require_change`.
    Source: TDX module 1.5.01, tdh_vp_rd_wr.c.
    """
    registers = call.registers
    tdvpr, raw, value, mask = registers.rcx, registers.rdx, registers.r8, registers.r9
    registers.r8 = 0
    access = _begin_vcpu(call, tdvpr, _WRITABLE_STATES)
    element = access.find_single(raw)
    change = access.require_change(element, value, mask)
    yield ("TDH.VP.WR", tdvpr, raw, change)
    # -- effects: nothing below may fail
    registers.r8 = access.read(element)
    access.write(element, change)


# -- the module


def _require_lp(call: Call) -> None:
    if not call.module.is_lp_initialised(call.lp):
        raise Refused(TDX_SYS_LP_INIT_NOT_DONE)


def _write(call: Call, pa: int, data: bytes) -> None:
    """Store `data` in the host's memory; pa: with its KeyID bits."""
    memory = call.module.memory
    hpa, keyid = memory.split(pa)
    memory.write(hpa, data, keyid)
    call.module.notice_store(hpa, len(data))


def tdh_sys_rd(call: Call) -> Operation:
    """TDH.SYS.RD: read one metadata field of the module.

    RDX: field id; all ones ask for the first one. Returns R8 = the value, 0 on refusals, and
    RDX = the next id, all ones after the last and on refusals. RCX is ignored.
    Refuses, in order: SYS_LP_INIT_NOT_DONE; as `_find_readable`.
    Source: TDX module 1.5.01, tdh_sys_rd.c.
    """
    registers, raw = call.registers, call.registers.rdx
    _preset(registers, gives_next=True)
    _require_lp(call)
    access = system_access(call.module)
    element = _find_readable(access, raw, gives_next=True)
    yield ("TDH.SYS.RD", raw)
    # -- effects: nothing below may fail
    _answer(registers, access, element, raw, gives_next=True)


def dump_system(module: Module, asker: int, raw: int) -> bytes:
    """What TDH.SYS.RDALL and TDG.SYS.RDALL write: the readable fields from id `raw` on.

    raw: u64, all ones to begin with the first field. Returns up to 3128 bytes, which fit one page.
    Refuses: METADATA_FIELD_ID_INCORRECT, as `Access.find_first_of_list`.
    """
    access = system_access(module, asker)
    return access.dump(access.find_first_of_list(raw))


def tdh_sys_rdall(call: Call) -> Operation:
    """TDH.SYS.RDALL: write all metadata fields of the module to a page of the host.

    RDX: HPA of the page, 4 KiB aligned, host memory. R8: id of the first field, all ones for the
    first of all. Returns R8 = all ones; bytes of the page behind the list stay as they were.
    Refuses, in order: SYS_LP_INIT_NOT_DONE; RDX; METADATA_FIELD_ID_INCORRECT.
    Source: TDX module 1.5.01, tdh_sys_rdall.c.
    Differs: METADATA_LIST_OVERFLOW cannot occur, since all fields fit one page.
    """
    registers, raw = call.registers, call.registers.r8
    registers.r8 = NULL_FIELD_ID
    _require_lp(call)
    require_shared_hpa(call, registers.rdx, PAGE_SIZE, OPERAND_ID_RDX)
    content = dump_system(call.module, PRODUCTION_HOST, raw)
    yield ("TDH.SYS.RDALL", registers.rdx, raw)
    # -- effects: nothing below may fail
    _write(call, registers.rdx, content)


def tdh_sys_info(call: Call) -> Operation:
    """TDH.SYS.INFO: write TDSYSINFO and the list of CMRs to host memory.

    RCX: HPA of 1024 bytes, aligned to 1024. RDX: their number, at least 1024. R8: HPA of 512 bytes,
    aligned to 512. R9: CMR entries that fit there, at least 32. Returns RDX = 1024 and R9 = 32,
    both 0 on refusals.
    Refuses, in order: SYS_LP_INIT_NOT_DONE; RCX; RDX; R8; R9. The last two find the 1024 bytes
    zeroed already.
    Source: TDX module 1.5.01, tdh_sys_info.c.
    """
    registers = call.registers
    info_pa, info_size, cmr_pa, cmr_entries = (
        registers.rcx,
        registers.rdx,
        registers.r8,
        registers.r9,
    )
    registers.rdx = registers.r9 = 0
    _require_lp(call)
    require_shared_hpa(call, info_pa, TDSYSINFO_SIZE, OPERAND_ID_RCX)
    if info_size < TDSYSINFO_SIZE:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RDX)
    _write(call, info_pa, bytes(TDSYSINFO_SIZE))
    require_shared_hpa(call, cmr_pa, CMR_INFO_ALIGNMENT, OPERAND_ID_R8)
    if cmr_entries < MAX_CMRS:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_R9)
    yield ("TDH.SYS.INFO", info_pa, cmr_pa)
    # -- effects: nothing below may fail
    target = system_access(call.module).target
    _write(call, info_pa, make_tdsysinfo(target))
    _write(call, cmr_pa, make_cmr_info(target))
    registers.rdx, registers.r9 = TDSYSINFO_SIZE, MAX_CMRS


# -- the guest


def _guest_read(access: Access, registers: Registers, raw: int, *, gives_next: bool) -> int:
    try:
        element = _find_readable(access, raw, gives_next=gives_next)
    except Refused as refusal:
        if refusal.rdx is not None:
            registers.rdx = refusal.rdx
        return refusal.status
    _answer(registers, access, element, raw, gives_next=gives_next)
    return TDX_SUCCESS


def _guest_write(access: Access, registers: Registers, value: int) -> int:
    try:
        element = access.find_single(registers.rdx)
        change = access.require_change(element, value, registers.r9)
    except Refused as refusal:
        return refusal.status
    registers.r8 = access.read(element)
    access.write(element, change)
    return TDX_SUCCESS


def tdg_vm_rd(module: Module, td: Td, _tdvpr_page: int, registers: Registers, version: int) -> int:
    """TDG.VM.RD: the guest reads one metadata field of its TD.

    RCX: 0. RDX: field id; in version 1 all ones ask for the first one. Returns as TDH.MNG.RD.
    Refuses, in order: version above 1 (RAX); RCX; as `_find_readable`.
    Source: TDX module 1.5.01, metadata_td.c.
    """
    raw, gives_next = registers.rdx, version > 0
    _preset(registers, gives_next=gives_next)
    if version > 1:
        return _INVALID_RAX
    if registers.rcx:
        return _INVALID_RCX
    return _guest_read(td_access(module, td, GUEST), registers, raw, gives_next=gives_next)


def tdg_vm_wr(module: Module, td: Td, _tdvpr_page: int, registers: Registers, _version: int) -> int:
    """TDG.VM.WR: the guest writes one metadata field of its TD.

    RCX: 0. RDX, R8, R9: as TDH.MNG.WR. Returns R8 = the old value, 0 on refusals.
    Refuses, in order: RCX; METADATA_FIELD_ID_INCORRECT; as `Access.require_change`.
    Source: TDX module 1.5.01, metadata_td.c.
    """
    value, registers.r8 = registers.r8, 0
    if registers.rcx:
        return _INVALID_RCX
    return _guest_write(td_access(module, td, GUEST), registers, value)


def tdg_vp_rd(module: Module, td: Td, tdvpr_page: int, registers: Registers, _version: int) -> int:
    """TDG.VP.RD: the guest reads one metadata field of the vCPU that asks.

    RCX: 0. RDX: field id; all ones ask for the first one. Returns R8 and RDX as TDH.SYS.RD.
    Refuses, in order: RCX; as `_find_readable`.
    Source: TDX module 1.5.01, metadata_vp.c.
    """
    raw = registers.rdx
    _preset(registers, gives_next=True)
    if registers.rcx:
        return _INVALID_RCX
    access = vcpu_access(module, td, tdvpr_page, GUEST)
    return _guest_read(access, registers, raw, gives_next=True)


def tdg_vp_wr(module: Module, td: Td, tdvpr_page: int, registers: Registers, _version: int) -> int:
    """TDG.VP.WR: the guest writes one metadata field of the vCPU that asks.

    RCX, RDX, R8, R9: as TDG.VM.WR, refusals too.
    Source: TDX module 1.5.01, metadata_vp.c.
    """
    value, registers.r8 = registers.r8, 0
    if registers.rcx:
        return _INVALID_RCX
    return _guest_write(vcpu_access(module, td, tdvpr_page, GUEST), registers, value)


def tdg_sys_rd(
    module: Module, _td: Td, _tdvpr_page: int, registers: Registers, _version: int
) -> int:
    """TDG.SYS.RD: the guest reads one metadata field of the module. Registers as TDH.SYS.RD.

    Refuses: as `_find_readable`. Source: TDX module 1.5.01, metadata_sys.c.
    """
    raw = registers.rdx
    _preset(registers, gives_next=True)
    return _guest_read(system_access(module, GUEST), registers, raw, gives_next=True)
