"""TDCALL: what the guest asks of the module.

Source: TDX module 1.5.01, tdx_td_dispatcher.c (td_call), and one file for each function under
vm_exits.
Differs: service-TD, partitioning, page attribute and report verification functions are known by
number and answer OPERAND_INVALID on RAX; the clock by which a guest's wait for a lock times out
does not run here.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.status import (
    OPERAND_ID_RAX,
    OPERAND_ID_RCX,
    TDX_NO_VALID_VE_INFO,
    TDX_OPERAND_INVALID,
    TDX_SUCCESS,
)
from tdxlab.seam import accept, attest, guest_metadata
from tdxlab.seam.call import Refused
from tdxlab.seam.exits import Guest, vmcall_exit
from tdxlab.seam.gpa import LeaveGuest
from tdxlab.seam.td import CONFIG_NO_RBP_MOD, Tdcs, Tdvps

_INVALID_RAX = TDX_OPERAND_INVALID + OPERAND_ID_RAX
_INVALID_RCX = TDX_OPERAND_INVALID + OPERAND_ID_RCX

#: Bits of a VMCALL mask that must be 0: RAX, RCX, RSP, and everything above the XMM registers.
_NEVER_PASSED = 1 << 0 | 1 << 1 | 1 << 4 | ~0xFFFF_FFFF
_RBP = 1 << 5

_VE_INFO_WORDS = (
    ("rcx", Tdvps.VE_REASON),
    ("rdx", Tdvps.VE_QUALIFICATION),
    ("r8", Tdvps.VE_GLA),
    ("r9", Tdvps.VE_GPA),
    ("r10", Tdvps.VE_INFO),
)


def dispatch(guest: Guest) -> GuestOutcome:
    """One TDCALL of the guest; RAX holds leaf and version, and the status afterwards.

    A TDCALL that exits like a fault, or that an interrupt stopped, leaves RAX and RIP alone: the
    guest runs it again.
    """
    leaf, version = guest.rax & 0xFFFF, guest.rax >> 16 & 0xFF
    guest.module.trace.count_tdcall(leaf)
    handler = HANDLERS.get(leaf)
    if guest.rax >> 24 or (version and leaf != abi.TDG_VM_RD) or handler is None:
        return _answer(guest, _INVALID_RAX)
    try:
        return _answer(guest, handler(guest))
    except Refused as refusal:
        return _answer(guest, refusal.status)
    except LeaveGuest as leave:
        return leave.outcome


def _answer(guest: Guest, status: int) -> GuestOutcome:
    """The function is done: status in RAX, on to the next instruction."""
    guest.rax = status
    guest.advance()
    return guest.resume()


def tdg_vp_vmcall(guest: Guest) -> int:
    """TDG.VP.VMCALL: leave for the host, showing it the registers that RCX selects.

    RCX: bits 15:0 general registers, 31:16 XMM registers. The host's answer arrives in the same
    registers.
    Refuses: RCX, if it selects RAX, RCX or RSP, RBP while CONFIG_FLAGS.NO_RBP_MOD is set, or has
    bits 63:32.
    Source: TDX module 1.5.01, tdg_vp_vmcall.c.
    Differs: XMM registers are not modelled; a mask may select them and nothing is passed.
    """
    mask = guest.registers.rcx
    keeps_rbp = guest.td_field(Tdcs.CONFIG_FLAGS) & CONFIG_NO_RBP_MOD
    if mask & _NEVER_PASSED or (keeps_rbp and mask & _RBP):
        return _INVALID_RCX
    guest.advance()
    raise LeaveGuest(vmcall_exit(guest))


def tdg_vp_info(guest: Guest) -> int:
    """TDG.VP.INFO: what the guest may know of itself.

    Returns RCX = guest address width, RDX = ATTRIBUTES, R8 = vCPUs initialised and, in bits 63:32,
    allowed, R9 = vCPU index, R10 = 1 (TDG.SYS.RD exists), R11 = 0.
    Source: TDX module 1.5.01, tdg_vp_info.c.
    """
    registers = guest.registers
    registers.rcx = 52 if guest.td_field(Tdcs.GPAW) else 48
    registers.rdx = guest.td_field(Tdcs.ATTRIBUTES)
    registers.r8 = guest.td_field(Tdcs.NUM_VCPUS) | guest.td_field(Tdcs.MAX_VCPUS) << 32
    registers.r9 = guest.field(Tdvps.INDEX)
    registers.r10, registers.r11 = 1, 0
    return TDX_SUCCESS


def tdg_vp_veinfo_get(guest: Guest) -> int:
    """TDG.VP.VEINFO.GET: why the last #VE came; reading it makes room for the next one.

    Returns RCX = exit reason, RDX = qualification, R8 = GLA, R9 = GPA, R10 = instruction length and
    information; all 0 on refusals.
    Refuses: NO_VALID_VE_INFO.
    Source: TDX module 1.5.01, tdg_vp_veinfo_get.c.
    """
    is_valid = guest.field(Tdvps.VE_VALID)
    for name, word in _VE_INFO_WORDS:
        setattr(guest.registers, name, guest.field(word) if is_valid else 0)
    if not is_valid:
        return TDX_NO_VALID_VE_INFO
    guest.set_field(Tdvps.VE_VALID, 0)
    return TDX_SUCCESS


def tdg_vp_cpuidve_set(guest: Guest) -> int:
    """TDG.VP.CPUIDVE.SET: ask for a #VE at every CPUID. RCX: bit 0 in supervisor mode, bit 1 in
    user mode.

    Refuses: RCX, for other bits. Source: TDX module 1.5.01, tdg_vp_cpuidve_set.c.
    """
    if guest.registers.rcx >> 2:
        return _INVALID_RCX
    guest.set_field(Tdvps.CPUID_SUPERVISOR_VE, guest.registers.rcx & 1)
    guest.set_field(Tdvps.CPUID_USER_VE, guest.registers.rcx >> 1)
    return TDX_SUCCESS


#: Every guest function that is modelled, by leaf number.
HANDLERS: dict[int, Callable[[Guest], int]] = {
    abi.TDG_VP_VMCALL: tdg_vp_vmcall,
    abi.TDG_VP_INFO: tdg_vp_info,
    abi.TDG_MR_RTMR_EXTEND: attest.tdg_mr_rtmr_extend,
    abi.TDG_VP_VEINFO_GET: tdg_vp_veinfo_get,
    abi.TDG_MR_REPORT: attest.tdg_mr_report,
    abi.TDG_VP_CPUIDVE_SET: tdg_vp_cpuidve_set,
    abi.TDG_MEM_PAGE_ACCEPT: accept.tdg_mem_page_accept,
    **guest_metadata.HANDLERS,
}
