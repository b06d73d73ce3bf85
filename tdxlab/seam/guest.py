"""What the module does when the guest leaves its instruction stream: the dispatcher of VM exits.

An exit ends in one of four ways: the guest goes on, it goes on with an injected exception, it runs
the same instruction again, or the vCPU leaves for the host (TD exit).

Source: TDX module 1.5.01, tdx_td_dispatcher.c, td_ept_violation.c, td_other_exits.c.
Differs: exits whose handling needs the guest's instruction (CPUID, MSR and control register
accesses) take the module's path for an access that it does not emulate, a #VE; nested VMs are not
modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_NON_RECOVERABLE_TD, TDX_NON_RECOVERABLE_VCPU
from tdxlab.arch import shared_bit
from tdxlab.seam import sept, stepping, tdcalls
from tdxlab.seam.call import ModuleFatal
from tdxlab.seam.exits import (
    EXIT_EPT_MISCONFIGURATION,
    EXIT_EPT_VIOLATION,
    EXIT_EXCEPTION,
    EXIT_HLT,
    EXIT_INTERRUPT,
    EXIT_TDCALL,
    EXIT_TRIPLE_FAULT,
    VECTOR_GENERAL_PROTECTION,
    VECTOR_INVALID_OPCODE,
    VECTOR_PAGE_FAULT,
    Guest,
    async_exit,
    fatal_exit,
    inaccessible_exit,
    inject_exception,
    inject_ve,
)
from tdxlab.seam.rules import VCPU_DISABLED
from tdxlab.seam.td import ATTRIBUTES_DEBUG, TD_CTLS_PENDING_VE_DISABLE, Tdcs, Tdr, Tdvps

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

#: Interruption information: an external interrupt on vector 0x20.
DEFAULT_INTERRUPTION = 0x8000_0020

#: Extended qualification of an exit for a page that the guest has not accepted.
PENDING_PAGE = 6

_LINEAR_ADDRESS_VALID = 1 << 7
_SEEN_BY_HOST = ~(0x3F << 7)
_UNUSED_AT_48 = 0xF << 48
_NMI_TYPE = 2
_MACHINE_CHECK_VECTOR = 18

#: INIT, SMI, task switch, bus lock: handed to the host as they are.
_PASSED_ON = frozenset((3, 6, 9, 42, 74))
#: CPUID, HLT, INVD, VMCALL, RDPMC, CR and I/O accesses, RDMSR, WRMSR, MWAIT, MONITOR, WBINVD, APIC
#: write, PCONFIG.
_VIRTUALISED = frozenset((10, EXIT_HLT, 13, 18, 28, 30, 31, 32, 36, 39, 54, 56, 65))
#: GETSEC, RSM, the VMX instructions, VMFUNC, ENCLS, ENCLV, ENQCMDS, SEAMCALL.
_INVALID_OPCODE = frozenset((11, 17, *range(19, 28), 50, 53, 59, 60, 70, 73, 76))
#: RDPMC, XSETBV, ENQCMD.
_GENERAL_PROTECTION = frozenset((15, 55, 72))


def handle(
    module: Module,
    lp: int,
    reason: int,
    rax: int,
    registers: Registers,
    qualification: int,
    gpa: int,
    rip: int | None,
    interruption: int,
) -> GuestOutcome:
    """One VM exit of the vCPU inside `lp`; arguments as `Module.vm_exit`."""
    guest = Guest(module, lp, rax, registers)
    guest.save_registers()
    if rip is not None:
        guest.set_field(Tdvps.RIP, rip)
    if module.memory.words.view[guest.td.page + Tdr.FATAL]:
        return inaccessible_exit(guest, reason)
    stepping.reset_if_moved(module.memory, guest.page)
    if reason == EXIT_TDCALL:
        return tdcalls.dispatch(guest)
    if reason == EXIT_EPT_VIOLATION:
        return _ept_violation(guest, qualification, gpa)
    if reason == EXIT_EXCEPTION:
        return _exception(guest, interruption)
    handler = _HANDLERS.get(reason, _unexpected)
    return handler(guest, reason, gpa, interruption)


Handler = Callable[[Guest, int, int, int], GuestOutcome]


def _interrupt(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    return async_exit(guest, reason, interruption=interruption)


def _triple_fault(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    return async_exit(guest, reason, status=TDX_NON_RECOVERABLE_VCPU, vcpu_state=VCPU_DISABLED)


def _pass_on(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    return async_exit(guest, reason)


def _virtualise(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    return inject_ve(guest, reason)


def _invalid_opcode(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    return inject_exception(guest, VECTOR_INVALID_OPCODE)


def _general_protection(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    return inject_exception(guest, VECTOR_GENERAL_PROTECTION)


def _misconfiguration(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    if not is_shared(guest, gpa):
        raise ModuleFatal(f"an EPT misconfiguration at the private GPA {gpa:#x}")
    return async_exit(guest, reason, gpa=gpa & ~0xFFF)


def _unexpected(guest: Guest, reason: int, gpa: int, interruption: int) -> GuestOutcome:
    if guest.td_field(Tdcs.ATTRIBUTES) & ATTRIBUTES_DEBUG:
        return async_exit(guest, reason)
    return fatal_exit(guest, reason, TDX_NON_RECOVERABLE_TD)


_HANDLERS: dict[int, Handler] = {
    EXIT_INTERRUPT: _interrupt,
    EXIT_TRIPLE_FAULT: _triple_fault,
    EXIT_EPT_MISCONFIGURATION: _misconfiguration,
    **dict.fromkeys(_PASSED_ON, _pass_on),
    **dict.fromkeys(_VIRTUALISED, _virtualise),
    **dict.fromkeys(_INVALID_OPCODE, _invalid_opcode),
    **dict.fromkeys(_GENERAL_PROTECTION, _general_protection),
}


def _exception(guest: Guest, interruption: int) -> GuestOutcome:
    """An NMI goes to the host; a machine check ends the TD; any other exception is only seen with a
    debug TD.
    """
    if interruption >> 8 & 7 == _NMI_TYPE:
        return async_exit(guest, EXIT_EXCEPTION, interruption=interruption)
    if interruption & 0xFF == _MACHINE_CHECK_VECTOR:
        return inaccessible_exit(guest, EXIT_EXCEPTION)
    if guest.td_field(Tdcs.ATTRIBUTES) & ATTRIBUTES_DEBUG:
        return async_exit(guest, EXIT_EXCEPTION, interruption=interruption)
    raise ModuleFatal(
        f"an exception exit (information {interruption:#x}) of a TD that is no debug TD"
    )


def is_shared(guest: Guest, gpa: int) -> bool:
    """The SHARED bit of a GPA."""
    return bool(gpa >> shared_bit(52 if guest.td_field(Tdcs.GPAW) else 48) & 1)


def _ept_violation(guest: Guest, qualification: int, gpa: int) -> GuestOutcome:
    """An access that the EPT refused.

    Shared memory, and private memory without an accepted page, is the host's business; a page that
    waits for acceptance is the guest's own, unless it asked not to be told. Source: TDX module
    1.5.01, td_ept_violation.c.
    """
    is_narrow = not guest.td_field(Tdcs.GPAW)
    if is_narrow and gpa & _UNUSED_AT_48 and qualification & _LINEAR_ADDRESS_VALID:
        return inject_exception(guest, VECTOR_PAGE_FAULT)
    seen, page = qualification & _SEEN_BY_HOST, gpa & ~0xFFF
    if is_shared(guest, gpa):
        return async_exit(guest, EXIT_EPT_VIOLATION, qualification=seen, gpa=page)
    memory = guest.module.memory
    extended = 0
    if sept.is_pending(sept.walk(memory, guest.td_field(Tdcs.EPTP), gpa, 0).septe):
        if not guest.td_field(Tdcs.TD_CTLS) & TD_CTLS_PENDING_VE_DISABLE:
            return inject_ve(guest, EXIT_EPT_VIOLATION, qualification=qualification, gpa=gpa)
        extended = PENDING_PAGE
    stepping.note_violation(memory, guest.page, gpa)
    return async_exit(guest, EXIT_EPT_VIOLATION, qualification=seen, extended=extended, gpa=page)
