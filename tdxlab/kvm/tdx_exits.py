"""What KVM does about a TD exit.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_handle_exit, tdx_handle_ept_violation,
handle_tdvmcall), arch/x86/kvm/vmx/common.h (__vmx_handle_ept_violation).
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EIO

from tdxlab.abi.status import (
    TDX_NON_RECOVERABLE_TD,
    TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE,
    TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE,
    TDX_NON_RECOVERABLE_VCPU,
    TDX_SUCCESS,
)
from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE, PAGE_SHIFT
from tdxlab.kvm.exits import (
    FailEntry,
    InternalError,
    IoExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
    TdxExit,
)
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.mapgpa import (
    TDVMCALL_STATUS_INVALID_OPERAND,
    TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED,
    tdx_map_gpa,
)
from tdxlab.kvm.page_fault import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_RETRY,
)
from tdxlab.kvm.seamcall_args import (
    TD_VCPU_STATE_DETAILS_NON_ARCH,
    TDX_SEAMCALL_STATUS_MASK,
    TDX_SW_ERROR,
)
from tdxlab.kvm.seamcalls import Status, tdh_vp_rd
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.tdx_build import is_private_gpa

# -- VM exit reasons. Source: uapi/asm/vmx.h

EXIT_REASON_EXCEPTION_NMI = 0
EXIT_REASON_EXTERNAL_INTERRUPT = 1
EXIT_REASON_TRIPLE_FAULT = 2
EXIT_REASON_OTHER_SMI = 6
EXIT_REASON_CPUID = 10
EXIT_REASON_HLT = 12
EXIT_REASON_VMCALL = 18
EXIT_REASON_IO_INSTRUCTION = 30
EXIT_REASON_MSR_READ = 31
EXIT_REASON_MSR_WRITE = 32
EXIT_REASON_EPT_VIOLATION = 48
EXIT_REASON_EPT_MISCONFIG = 49
EXIT_REASON_TDCALL = 77
#: No VMX exit reason fits.
NO_EXIT_REASON = 0xFFFF_FFFF
_FAILED_VMENTRY = 1 << 31

# -- TDG.VP.VMCALL subfunctions. Source: asm/shared/tdx.h

TDVMCALL_GET_TD_VM_CALL_INFO = 0x10000
TDVMCALL_MAP_GPA = 0x10001
TDVMCALL_GET_QUOTE = 0x10002
TDVMCALL_REPORT_FATAL_ERROR = 0x10003
TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT = 0x10004

_ERROR_OR_NON_RECOVERABLE = 3 << 62

#: Extended exit qualification: the page is there and the guest has not accepted it.
EXT_EXIT_QUAL_TYPE_PENDING_EPT_VIOLATION = 6
_EPT_VIOLATION_PROT_MASK = 7 << 3
_EPT_VIOLATION_EXEC_FOR_RING3 = 1 << 6

#: Statuses whose lower half is an exit reason.
_EXITS = frozenset(
    (
        TDX_NON_RECOVERABLE_TD,
        TDX_NON_RECOVERABLE_VCPU,
        TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE,
        TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE,
        TDX_SUCCESS,
    )
)

#: VMCALL subfunctions that stand for an instruction or an access, and its exit reason.
_INSTRUCTIONS = {
    EXIT_REASON_CPUID: EXIT_REASON_CPUID,
    EXIT_REASON_HLT: EXIT_REASON_HLT,
    EXIT_REASON_IO_INSTRUCTION: EXIT_REASON_IO_INSTRUCTION,
    EXIT_REASON_MSR_READ: EXIT_REASON_MSR_READ,
    EXIT_REASON_MSR_WRITE: EXIT_REASON_MSR_WRITE,
    EXIT_REASON_EPT_VIOLATION: EXIT_REASON_EPT_MISCONFIG,
}


def tdx_to_vmx_exit_reason(vcpu: TdxVcpu) -> int:
    """The exit reason that VMX would have, or NO_EXIT_REASON.

    Source: tdx.c, tdx_to_vmx_exit_reason and tdcall_to_vmx_exit_reason.
    """
    if vcpu.vp_enter_ret & TDX_SEAMCALL_STATUS_MASK not in _EXITS:
        return NO_EXIT_REASON
    reason = vcpu.vp_enter_ret & 0xFFFF_FFFF
    if reason == EXIT_REASON_EPT_MISCONFIG:
        return NO_EXIT_REASON
    if reason != EXIT_REASON_TDCALL:
        return reason
    if vcpu.arg("r10"):
        return EXIT_REASON_VMCALL
    return _INSTRUCTIONS.get(vcpu.arg("r11"), EXIT_REASON_TDCALL)


def tdx_handle_exit(vcpu: TdxVcpu) -> Status:
    """Handle an exit that no fast path handled.

    Returns 1: enter again; 0: to user space with `vcpu.run`; -errno.
    """
    status, reason = vcpu.vp_enter_ret, vcpu.exit_reason
    if status == EXIT_REASON_EPT_MISCONFIG:
        vcpu.vm.bug("the module reported an EPT misconfiguration")
        return -EIO
    if status & TDX_SW_ERROR == TDX_SW_ERROR:
        vcpu.vm.bug(f"the SEAMCALL instruction failed: {status:#x}")
        return _unhandled(vcpu)
    if reason != NO_EXIT_REASON and reason & _FAILED_VMENTRY:
        vcpu.run = FailEntry(reason, vcpu.cpu)
        return 0
    if status & _ERROR_OR_NON_RECOVERABLE and reason & 0xFFFF != EXIT_REASON_TRIPLE_FAULT:
        return _unhandled(vcpu)
    handler = _HANDLERS.get(reason & 0xFFFF)
    if reason & 0xFFFF == EXIT_REASON_EPT_VIOLATION:
        return (yield from tdx_handle_ept_violation(vcpu))
    if reason & 0xFFFF == EXIT_REASON_HLT:
        return (yield from tdx_emulate_halt(vcpu))
    return handler(vcpu) if handler else _unhandled(vcpu)


def _unhandled(vcpu: TdxVcpu) -> int:
    vcpu.run = InternalError((vcpu.vp_enter_ret, vcpu.cpu))
    return 0


# -- memory


def tdx_handle_ept_violation(vcpu: TdxVcpu) -> Status:
    """An access that Secure EPT or shared EPT did not allow.

    A private fault is handled again at once while it says RETRY, so that the guest does not fault
    on the same instruction over and over: the module would suspect an attack by single steps. In a
    memslot that is being deleted it says so until the vCPU gets an event or a signal: the deletion
    waits for this reader of the memslots.
    Returns 1, or -errno: -EIO: the guest touched a page that it had not accepted, and the VM is
    dead; or what the fault returns.
    """
    gpa, vm = vcpu.arg("r8"), vcpu.vm
    is_private = is_private_gpa(vm, gpa)
    qualification = vcpu.arg("rcx")
    if is_private:
        if tdx_is_sept_violation_unexpected_pending(vcpu):
            vm.emit("pr_warn", f"Guest access before accepting {gpa:#x} on vCPU {vcpu.vcpu_id}")
            vm.kill()
            return -EIO
        qualification = EPT_WRITE
    elif qualification & EPT_EXECUTE:
        vm.bug(f"an instruction fetch from shared memory at {gpa:#x}")
        return -EIO
    while True:
        ret = yield from __vmx_handle_ept_violation(vcpu, gpa, qualification)
        if ret != RET_PF_RETRY or not is_private:
            break
        if vcpu.pending_events or vcpu.signal_pending:
            break
        if vcpu.check_request("VM_DEAD"):
            return -EIO
        yield ("cond_resched", gpa)
    return ret if ret < 0 else 1


def tdx_is_sept_violation_unexpected_pending(vcpu: TdxVcpu) -> bool:
    """The page is mapped and waits to be accepted. Source: tdx.c."""
    if vcpu.arg("rdx") & 0xF != EXT_EXIT_QUAL_TYPE_PENDING_EPT_VIOLATION:
        return False
    permissions = _EPT_VIOLATION_PROT_MASK | _EPT_VIOLATION_EXEC_FOR_RING3
    return not vcpu.arg("rcx") & permissions


def __vmx_handle_ept_violation(vcpu: TdxVcpu, gpa: int, qualification: int) -> Status:
    """Turn an exit qualification into an error code. Returns what `kvm_mmu_page_fault` does.

    Bit 7 of the qualification, "the linear address is valid", reaches no error code: Linux 6.16
    looks for it in the error code. Source: vmx/common.h.
    """
    error_code = 0
    for bits, flag in (
        (EPT_READ, PFERR_USER_MASK),
        (EPT_WRITE, PFERR_WRITE_MASK),
        (EPT_EXECUTE, PFERR_FETCH_MASK),
        (_EPT_VIOLATION_PROT_MASK, PFERR_PRESENT_MASK),
    ):
        if qualification & bits:
            error_code |= flag
    if is_private_gpa(vcpu.vm, gpa):
        error_code |= PFERR_PRIVATE_ACCESS
    return (yield from kvm_mmu_page_fault(vcpu, gpa, error_code))


def tdx_emulate_mmio(vcpu: TdxVcpu) -> int:
    """VMCALL for an access to a device: R12 bytes, R13 1 for a write, R14 GPA, R15 what is written.

    Returns 0: to user space; 1: INVALID_OPERAND for the guest. Source: tdx.c.
    Differs: no device is emulated in the kernel.
    """
    size, write, gpa = vcpu.arg("r12"), vcpu.arg("r13"), vcpu.arg("r14")
    if size not in (1, 2, 4, 8) or write not in (0, 1) or _is_any_private(vcpu, gpa, size):
        vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND)
        return 1
    plain = gpa & ~(vcpu.vm.gfn_direct_bits << PAGE_SHIFT)
    data = vcpu.arg("r15") & (1 << 8 * size) - 1
    vcpu.run = MmioExit(plain, size, data if write else None)
    vcpu.completion = "" if write else "MMIO read"
    return 0


def _is_any_private(vcpu: TdxVcpu, gpa: int, size: int) -> bool:
    return is_private_gpa(vcpu.vm, gpa) or is_private_gpa(vcpu.vm, gpa + size - 1)


def tdx_complete_mmio_read(vcpu: TdxVcpu) -> int:
    """The device's answer goes to the guest in R11; returns 1."""
    vcpu.answer(r11=vcpu.mmio_data)
    return 1


# -- other exits


def tdx_emulate_halt(vcpu: TdxVcpu) -> Status:
    """The guest has nothing to do until something happens; returns 1.

    An interrupt may wait in its virtual APIC, which only the module sees: with interrupts enabled
    (R12 is 0) it is asked. Source: x86.c, __kvm_emulate_halt; tdx.c,
    tdx_protected_apic_has_interrupt.
    """
    if not vcpu.pending_events and not vcpu.arg("r12"):
        status, details = yield from tdh_vp_rd(
            vcpu.tdx.host, vcpu.vp, TD_VCPU_STATE_DETAILS_NON_ARCH
        )
        if vcpu.tdx.bug_on("TDH_VP_RD", status) or details & 1:
            return 1
    vcpu.halted = not vcpu.pending_events
    return 1


def _again(vcpu: TdxVcpu) -> int:
    return 1


def _shutdown(vcpu: TdxVcpu) -> int:
    vcpu.run = ShutdownExit()
    return 0


def tdx_emulate_io(vcpu: TdxVcpu) -> int:
    """VMCALL for a port: R12 bytes, R13 1 for a write, R14 port, R15 what is written.

    Source: tdx.c, tdx_emulate_io.
    """
    size, write, port = vcpu.arg("r12"), vcpu.arg("r13"), vcpu.arg("r14")
    if size not in (1, 2, 4) or write not in (0, 1):
        vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND)
        return 1
    data = vcpu.arg("r15") & (1 << 8 * size) - 1
    vcpu.run = IoExit(port & 0xFFFF, size, data if write else None)
    vcpu.completion = "" if write else "MMIO read"
    return 0


def _refuse(vcpu: TdxVcpu) -> int:
    """Differs: no CPUID and no MSRs are emulated; every access is refused, as an unknown one is."""
    vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND)
    return 1


def _unsupported(vcpu: TdxVcpu) -> int:
    vcpu.answer(r10=TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED)
    return 1


# -- VMCALL


def handle_tdvmcall(vcpu: TdxVcpu) -> int:
    """TDG.VP.VMCALL with a subfunction of its own. Returns 1 or 0. Source: tdx.c."""
    return _TDVMCALLS.get(vcpu.arg("r11"), _unsupported)(vcpu)


def tdx_get_td_vm_call_info(vcpu: TdxVcpu) -> int:
    """R12 is 0: all functions that must be there are, and no more; 1: user space answers."""
    if vcpu.arg("r12") == 0:
        vcpu.answer(r11=0, r13=0, r14=0)
        return 1
    if vcpu.arg("r12") != 1:
        vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND)
        return 1
    return _to_user_space(vcpu, TDVMCALL_GET_TD_VM_CALL_INFO, ("r12",))


def tdx_get_quote(vcpu: TdxVcpu) -> int:
    """R12: GPA of the buffer, which must be shared; R13: bytes. User space gets the quote."""
    if _is_any_private(vcpu, vcpu.arg("r12"), 1):
        vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND)
        return 1
    return _to_user_space(vcpu, TDVMCALL_GET_QUOTE, ("r12", "r13"))


def tdx_setup_event_notify_interrupt(vcpu: TdxVcpu) -> int:
    """R12: a vector from 32 to 255."""
    if not 32 <= vcpu.arg("r12") <= 255:
        vcpu.answer(r10=TDVMCALL_STATUS_INVALID_OPERAND)
        return 1
    return _to_user_space(vcpu, TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT, ("r12",))


def _to_user_space(vcpu: TdxVcpu, nr: int, names: tuple[str, ...]) -> int:
    """KVM_EXIT_TDX; user space's answer becomes R10."""
    vcpu.hypercall_ret = TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED
    vcpu.run = TdxExit(nr, tuple(vcpu.arg(name) for name in names))
    vcpu.completion = "VMCALL"
    return 0


def tdx_complete_simple(vcpu: TdxVcpu) -> int:
    """User space's answer goes to the guest in R10; returns 1. Source: tdx.c."""
    vcpu.answer(r10=vcpu.hypercall_ret)
    return 1


def tdx_report_fatal_error(vcpu: TdxVcpu) -> int:
    """The guest gives up: its registers go to user space. Source: tdx.c."""
    names = ("r10", "r11", "r12", "r13", "r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")
    vcpu.run = SystemEventExit(tuple(vcpu.arg(name) for name in names))
    return 0


_TDVMCALLS: dict[int, Callable[[TdxVcpu], int]] = {
    TDVMCALL_GET_TD_VM_CALL_INFO: tdx_get_td_vm_call_info,
    TDVMCALL_MAP_GPA: tdx_map_gpa,
    TDVMCALL_GET_QUOTE: tdx_get_quote,
    TDVMCALL_REPORT_FATAL_ERROR: tdx_report_fatal_error,
    TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT: tdx_setup_event_notify_interrupt,
}

_HANDLERS: dict[int, Callable[[TdxVcpu], int]] = {
    EXIT_REASON_EXCEPTION_NMI: _again,
    EXIT_REASON_EXTERNAL_INTERRUPT: _again,
    EXIT_REASON_OTHER_SMI: _again,
    EXIT_REASON_TRIPLE_FAULT: _shutdown,
    EXIT_REASON_CPUID: _refuse,
    EXIT_REASON_MSR_READ: _refuse,
    EXIT_REASON_MSR_WRITE: _refuse,
    EXIT_REASON_VMCALL: _unsupported,
    EXIT_REASON_IO_INSTRUCTION: tdx_emulate_io,
    EXIT_REASON_EPT_MISCONFIG: tdx_emulate_mmio,
    EXIT_REASON_TDCALL: handle_tdvmcall,
}
