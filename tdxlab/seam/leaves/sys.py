"""TDH.SYS.*: the module is brought up, given its memory, and shut down. Reading its fields is in
metadata.py.
"""

from __future__ import annotations

from tdxlab.abi.status import (
    OPERAND_ID_R8,
    OPERAND_ID_RCX,
    OPERAND_ID_RDX,
    TDX_KEY_CONFIGURED,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_RND_NO_ENTROPY,
    TDX_SYS_BUSY,
    TDX_SYS_CONFIG_NOT_PENDING,
    TDX_SYS_INIT_NOT_PENDING,
    TDX_SYS_INVALID_HANDOFF,
    TDX_SYS_KEY_CONFIG_NOT_PENDING,
    TDX_SYS_LP_INIT_DONE,
    TDX_SYS_LP_INIT_NOT_PENDING,
    TDX_SYS_STATE_INCORRECT,
    TDX_TDMR_ALREADY_INITIALIZED,
)
from tdxlab.arch import PAGE_SIZE, SIZE_1G
from tdxlab.journal import Words
from tdxlab.seam import tdmr
from tdxlab.seam.call import Call, Refused
from tdxlab.seam.checks import INVALID_RCX
from tdxlab.seam.leaves.mng import require_pconfig
from tdxlab.seam.locks import release_exclusive, release_shared, try_exclusive, try_shared
from tdxlab.seam.page_checks import require_shared_hpa
from tdxlab.seam.rules import (
    HKID_RESERVED,
    SYS_READY,
    SYS_SHUTDOWN,
    SYSCONFIG_DONE,
    SYSINIT_DONE,
    SYSINIT_PENDING,
)
from tdxlab.seam.system import Sys, Tdmr
from tdxlab.steps import Operation

#: Memory whose PAMT entries one TDH.SYS.TDMR.INIT initialises: 1024 pages.
TDMR_INIT_STEP = 1024 * PAGE_SIZE

#: The hand-off version of this module; nothing older or newer is understood.
HANDOFF_VERSION = 0


def lock_system(call: Call, *, exclusive: bool = True) -> None:
    """Take the module's global lock. Refuses: SYS_BUSY."""
    words = call.module.system
    taken = try_exclusive(words, Sys.LOCK) if exclusive else try_shared(words, Sys.LOCK)
    if not taken:
        raise Refused(TDX_SYS_BUSY)
    call.locks.append((release_exclusive if exclusive else release_shared, words, Sys.LOCK))


def _require_state(call: Call, state: int, status: int) -> None:
    if call.module.system.view[Sys.STATE] != state:
        raise Refused(status)


def tdh_sys_init(call: Call) -> Operation:
    """TDH.SYS.INIT: the module looks at the platform, once, on any LP.

    RCX: attributes, zero. Returns RCX = RDX = R8 = R9 = R10 = 0, also on refusals.
    Refuses, in order: SYS_BUSY; RCX; SYS_INIT_NOT_PENDING; RND_NO_ENTROPY.
    Source: TDX module 1.5.01, tdh_sys_init.c.
    Differs: the platform is always one that the module accepts; a `Platform` with impossible KeyIDs
    or CMRs cannot be made.
    """
    registers, attributes = call.registers, call.registers.rcx
    registers.rcx = registers.rdx = registers.r8 = registers.r9 = registers.r10 = 0
    lock_system(call)
    if attributes:
        raise Refused(INVALID_RCX)
    _require_state(call, SYSINIT_PENDING, TDX_SYS_INIT_NOT_PENDING)
    if call.module.conditions.entropy_fails:
        raise Refused(TDX_RND_NO_ENTROPY)
    yield ("TDH.SYS.INIT",)
    # -- effects: nothing below may fail
    call.module.system.put(Sys.STATE, SYSINIT_DONE)


def tdh_sys_lp_init(call: Call) -> Operation:
    """TDH.SYS.LP.INIT: make one LP known to the module; once on each.

    Returns RCX = RDX = R8 = 0, also on refusals.
    Refuses, in order: SYS_BUSY; SYS_LP_INIT_NOT_PENDING; SYS_LP_INIT_DONE; RND_NO_ENTROPY.
    Source: TDX module 1.5.01, tdh_sys_lp_init.c.
    Differs: all LPs of a platform are alike, so the comparison with it cannot fail.
    """
    registers, words = call.registers, call.module.system
    registers.rcx = registers.rdx = registers.r8 = 0
    lock_system(call, exclusive=False)
    _require_state(call, SYSINIT_DONE, TDX_SYS_LP_INIT_NOT_PENDING)
    if call.module.is_lp_initialised(call.lp):
        raise Refused(TDX_SYS_LP_INIT_DONE)
    if call.module.conditions.entropy_fails:
        raise Refused(TDX_RND_NO_ENTROPY)
    yield ("TDH.SYS.LP.INIT", call.lp)
    # -- effects: nothing below may fail
    words.put(Sys.lp_word(call.lp, Sys.LP_INITIALISED), 1)
    words.put(Sys.INIT_LPS, words.view[Sys.INIT_LPS] + 1)


def tdh_sys_config(call: Call) -> Operation:
    """TDH.SYS.CONFIG: tell the module its TDMRs, their PAMTs and its own KeyID.

    RCX: HPA of an array of pointers to TDMR_INFO. RDX: number of entries, 1 to 64. R8: a private
    KeyID. No register is written.
    Refuses, in order: SYS_BUSY; SYS_CONFIG_NOT_PENDING (state, or an LP is missing); RCX; RDX; R8;
    then for each TDMR the pointer (RCX) and the tests of `tdmr.check`. The KeyID stays RESERVED
    when one of the last refuses.
    Source: TDX module 1.5.01, tdh_sys_config.c.
    """
    module, registers = call.module, call.registers
    lock_system(call)
    _require_state(call, SYSINIT_DONE, TDX_SYS_CONFIG_NOT_PENDING)
    if module.system.view[Sys.INIT_LPS] != len(module.cpu.lps):
        raise Refused(TDX_SYS_CONFIG_NOT_PENDING)
    require_shared_hpa(call, registers.rcx, tdmr.POINTERS_ALIGNMENT, OPERAND_ID_RCX)
    if not 1 <= registers.rdx <= tdmr.MAX_TDMRS:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_RDX)
    lowest, highest = module.platform.private_keyids
    if not lowest <= registers.r8 <= highest:
        raise Refused(TDX_OPERAND_INVALID + OPERAND_ID_R8)
    module.keys.states.put(registers.r8, HKID_RESERVED)
    infos = tdmr.read_and_check(call, registers.rcx, registers.rdx)
    yield ("TDH.SYS.CONFIG", registers.rdx, registers.r8)
    # -- effects: nothing below may fail
    for info in infos:
        reserved = tuple(area for area in info.reserved if area.size)
        module.tdmrs.put(info.base, Tdmr(info.base, info.size, reserved, info.base))
    module.system.put(Sys.STATE, SYSCONFIG_DONE)


def tdh_sys_key_config(call: Call) -> Operation:
    """TDH.SYS.KEY.CONFIG: program the module's own key on the caller's package; the last package
    makes the module ready.

    No register is read or written.
    Refuses, in order: SYS_BUSY; SYS_KEY_CONFIG_NOT_PENDING; KEY_CONFIGURED, a warning; PCONFIG busy
    (KET), KEY_GENERATION_FAILED.
    Source: TDX module 1.5.01, tdh_sys_key_config.c.
    """
    module, words = call.module, call.module.system
    lock_system(call)
    _require_state(call, SYSCONFIG_DONE, TDX_SYS_KEY_CONFIG_NOT_PENDING)
    package = 1 << module.cpu.package_of[call.lp]
    done = words.view[Sys.KEYED_PACKAGES]
    if done & package:
        raise Refused(TDX_KEY_CONFIGURED)
    require_pconfig(call)
    yield ("TDH.SYS.KEY.CONFIG", module.cpu.package_of[call.lp])
    # -- effects: nothing below may fail
    words.put(Sys.KEYED_PACKAGES, done | package)
    if done | package == module.all_packages:
        words.put(Sys.STATE, SYS_READY)


def tdh_sys_tdmr_init(call: Call) -> Operation:
    """TDH.SYS.TDMR.INIT: initialise the PAMT of the next 4 MiB of a TDMR; a 1 GiB block is usable
    when it is complete.

    RCX: base of the TDMR. Returns RDX = progress, rounded down to 1 GiB; 0 on refusals.
    Refuses, in order: RCX (not 1 GiB aligned, KeyID bits, not a TDMR's base); the TDMR's mutex
    (RCX); TDMR_ALREADY_INITIALIZED, a warning.
    Source: TDX module 1.5.01, tdh_sys_tdmr_init.c.
    """
    module, base = call.module, call.registers.rcx
    call.registers.rdx = 0
    if base & (module.not_an_hpa | SIZE_1G - 1) or base not in module.tdmrs:
        raise Refused(INVALID_RCX)
    _lock_tdmr(call, sorted(module.tdmrs).index(base))
    target: Tdmr = module.tdmrs[base]
    if target.initialised_to == target.end:
        raise Refused(TDX_TDMR_ALREADY_INITIALIZED)
    yield ("TDH.SYS.TDMR.INIT", base, target.initialised_to)
    # -- effects: nothing below may fail
    start, stop = target.initialised_to, target.initialised_to + TDMR_INIT_STEP
    for area in target.reserved:
        first, end = max(start, area.base), min(stop, area.end)
        if first < end:
            module.pamt.reserve(first, end)
    if stop % SIZE_1G == 0:
        module.pamt.open_block(stop - SIZE_1G)
    module.tdmrs.put(base, target._replace(initialised_to=stop))
    call.registers.rdx = stop & -SIZE_1G


def _lock_tdmr(call: Call, number: int) -> None:
    """Take the mutex of the TDMR of this number, 0 to 63. Refuses: OPERAND_BUSY with RCX."""
    words = call.module.system
    held = words.view[Sys.TDMR_MUTEXES]
    if held >> number & 1:
        raise Refused(TDX_OPERAND_BUSY + OPERAND_ID_RCX)
    words.put(Sys.TDMR_MUTEXES, held | 1 << number)
    call.locks.append((_release_tdmr, words, number))


def _release_tdmr(words: Words, number: int) -> None:
    words.put(Sys.TDMR_MUTEXES, words.view[Sys.TDMR_MUTEXES] & ~(1 << number))


def tdh_sys_lp_shutdown(call: Call) -> Operation:
    """TDH.SYS.LP.SHUTDOWN: does nothing and always succeeds, in every state.

    Source: TDX module 1.5.01, tdh_sys_lp_shutdown.c.
    """
    yield ("TDH.SYS.LP.SHUTDOWN", call.lp)


def tdh_sys_shutdown(call: Call) -> Operation:
    """TDH.SYS.SHUTDOWN: end the module for good; TDs that live are no obstacle.

    RCX: hand-off version, 0; unchanged.
    Refuses, in order: RCX; SYS_BUSY (the global lock, or another LP is inside the module).
    Source: TDX module 1.5.01, tdh_sys_shutdown.c.
    """
    if call.registers.rcx != HANDOFF_VERSION:
        raise Refused(INVALID_RCX)
    lock_system(call)
    if call.module.calls_suspended:
        raise Refused(TDX_SYS_BUSY)
    yield ("TDH.SYS.SHUTDOWN",)
    # -- effects: nothing below may fail
    call.module.system.put(Sys.STATE, SYS_SHUTDOWN)


def tdh_sys_update(call: Call) -> Operation:
    """TDH.SYS.UPDATE: take over from an older module; refused here, since a fresh platform has no
    hand-off data.

    Refuses, in order: SYS_BUSY; SYS_STATE_INCORRECT; SYS_INVALID_HANDOFF.
    Source: TDX module 1.5.01, tdh_sys_update.c.
    Differs: there never is an older module, so the call cannot succeed.
    """
    module = call.module
    lock_system(call)
    _require_state(call, SYSINIT_DONE, TDX_SYS_STATE_INCORRECT)
    if module.system.view[Sys.INIT_LPS] != len(module.cpu.lps):
        raise Refused(TDX_SYS_STATE_INCORRECT)
    yield ("TDH.SYS.UPDATE",)
    call.status = TDX_SYS_INVALID_HANDOFF
