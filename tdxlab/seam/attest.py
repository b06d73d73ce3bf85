"""TDG.MR.RTMR.EXTEND and TDG.MR.REPORT: what a guest measures itself, and what it can prove to
others.

Source: TDX module 1.5.01, tdg_mr_rtmr_extend.c, tdg_mr_report.c; tdx_api_defs.h (td_info_t,
td_report_t).
"""

from __future__ import annotations

import hashlib

from tdxlab.abi.status import (
    OPERAND_ID_R8,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    OPERAND_ID_RTMR,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
)
from tdxlab.seam.exits import Guest
from tdxlab.seam.gpa import LeaveGuest, map_any, map_private
from tdxlab.seam.locks import (
    guest_try_exclusive_hp,
    guest_try_shared_hp,
    release_exclusive_hp,
    release_shared_hp,
)
from tdxlab.seam.measure import DIGEST_SIZE, RTMR_COUNT, extend_rtmr
from tdxlab.seam.td import Tdcs

REPORT_SIZE = 1024
REPORT_DATA_SIZE = 64
TD_INFO_SIZE = 512
TEE_TCB_INFO_SIZE = 256
_REPORT_TYPE_TDX = 0x81

_WORDS_PER_DIGEST = DIGEST_SIZE // 8
_RTMR_BUSY = TDX_OPERAND_BUSY + OPERAND_ID_RTMR


def tdg_mr_rtmr_extend(guest: Guest) -> int:
    """TDG.MR.RTMR.EXTEND: RTMR[i] becomes SHA-384 of itself and 48 bytes of guest memory.

    RCX: private GPA of the bytes, 64-byte aligned. RDX: i, 0 to 3.
    Refuses, in order: RCX not aligned; GPA as `map_private` (RCX); RDX; the RTMRs' lock (RTMR).
    """
    registers, words = guest.registers, guest.module.memory.words
    if registers.rcx % 64:
        return TDX_OPERAND_INVALID + OPERAND_ID_RCX
    where = map_private(guest, registers.rcx, OPERAND_ID_RCX)
    if registers.rdx >= RTMR_COUNT:
        return TDX_OPERAND_INVALID + OPERAND_ID_RDX
    lock = guest.td.tdcs + Tdcs.RTMR_LOCK
    if not guest_try_exclusive_hp(words, lock):
        return _RTMR_BUSY
    value = guest.module.memory.read(where.hpa, DIGEST_SIZE, where.keyid)
    first = guest.td.tdcs + Tdcs.RTMR + registers.rdx * _WORDS_PER_DIGEST
    words.fill(first, extend_rtmr(words.read(first, _WORDS_PER_DIGEST), value))
    release_exclusive_hp(words, lock)
    return TDX_SUCCESS


def tdg_mr_report(guest: Guest) -> int:
    """TDG.MR.REPORT: write a report of 1024 bytes that another TD or an enclave on this machine can
    verify.

    RCX: GPA of the report, 1024-byte aligned. RDX: GPA of 64 bytes to be bound to it, 64-byte
    aligned. R8: sub-type, 0. Both GPAs may be private or shared.
    Refuses, in order: RCX not aligned; RDX not aligned; RDX as `map_any`; R8; the RTMRs' lock
    (RTMR); an interrupt stops it, to run again; RCX as `map_any`.
    Differs: TEE_TCB_INFO, the CPU's security version and the MAC come from the CPU; here
    TEE_TCB_INFO is zero, and the MAC a plain SHA-256 of the report without a secret, so it proves
    nothing.
    """
    registers, memory = guest.registers, guest.module.memory
    for register, alignment, operand in (
        (registers.rcx, REPORT_SIZE, OPERAND_ID_RCX),
        (registers.rdx, REPORT_DATA_SIZE, OPERAND_ID_RDX),
    ):
        if register % alignment:
            return TDX_OPERAND_INVALID + operand
    source = map_any(guest, registers.rdx, OPERAND_ID_RDX)
    if registers.r8:
        return TDX_OPERAND_INVALID + OPERAND_ID_R8
    lock = guest.td.tdcs + Tdcs.RTMR_LOCK
    if not guest_try_shared_hp(memory.words, lock):
        return _RTMR_BUSY
    try:
        if guest.module.conditions.interrupt_pending:
            raise LeaveGuest(guest.resume())
        target = map_any(guest, registers.rcx, OPERAND_ID_RCX, write=True)
        data = memory.read(source.hpa, REPORT_DATA_SIZE, source.keyid)
        memory.write(target.hpa, make_report(td_info(guest), data), target.keyid)
        if target.keyid != guest.td.hkid:
            guest.module.notice_store(target.hpa, REPORT_SIZE)
    finally:
        release_shared_hp(memory.words, lock)
    return TDX_SUCCESS


def td_info(guest: Guest) -> bytes:
    """TDINFO, 512 bytes: attributes, measurements and owner ids of the TD."""
    words, tdcs = guest.module.memory.words, guest.td.tdcs
    parts = (
        (Tdcs.ATTRIBUTES, 1),
        (Tdcs.XFAM, 1),
        (Tdcs.MRTD, _WORDS_PER_DIGEST),
        (Tdcs.MRCONFIGID, 3 * _WORDS_PER_DIGEST),
        (Tdcs.RTMR, RTMR_COUNT * _WORDS_PER_DIGEST),
        (Tdcs.SERVTD_HASH, _WORDS_PER_DIGEST),
    )
    return b"".join(words.read(tdcs + word, count) for word, count in parts).ljust(
        TD_INFO_SIZE, b"\0"
    )


def make_report(info: bytes, data: bytes) -> bytes:
    """The 1024 bytes of a report: REPORTMACSTRUCT (256), TEE_TCB_INFO (256), TDINFO (512)."""
    tcb_info = bytes(TEE_TCB_INFO_SIZE)
    mac_struct = bytearray(256)
    mac_struct[0] = _REPORT_TYPE_TDX
    mac_struct[32:80] = hashlib.sha384(tcb_info).digest()
    mac_struct[80:128] = hashlib.sha384(info).digest()
    mac_struct[128:192] = data
    mac_struct[224:256] = hashlib.sha256(mac_struct[:224]).digest()
    return bytes(mac_struct) + tcb_info + info
