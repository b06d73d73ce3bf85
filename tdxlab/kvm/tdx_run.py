"""KVM_RUN for a vCPU of a TD: enter, handle the exit, enter again, until user space is needed.

Source: Linux 6.16, arch/x86/kvm/x86.c (kvm_arch_vcpu_ioctl_run, vcpu_run, vcpu_enter_guest),
arch/x86/kvm/vmx/tdx.c (tdx_vcpu_pre_run, tdx_vcpu_run, tdx_vcpu_enter_exit).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from errno import EINTR, EINVAL, EIO

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import Registers
from tdxlab.kvm.entry import announce_entry, stop_reading_memslots
from tdxlab.kvm.exits import Failed, KvmExit, make_exit
from tdxlab.kvm.host import Doing
from tdxlab.kvm.mapgpa import tdx_complete_vmcall_map_gpa
from tdxlab.kvm.roots import kvm_mmu_reload
from tdxlab.kvm.seamcall_args import MASK_8, TD_VCPU_PEND_NMI, tdx_operand_busy
from tdxlab.kvm.seamcalls import Status, tdh_vp_enter, tdh_vp_wr
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.tdx_associate import tdx_vcpu_load
from tdxlab.kvm.tdx_exits import (
    tdx_complete_mmio_read,
    tdx_complete_simple,
    tdx_handle_exit,
    tdx_to_vmx_exit_reason,
)
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE
from tdxlab.steps import WAIT, Step

# -- what a fast path says. Source: asm/kvm_host.h

EXIT_FASTPATH_NONE = "EXIT_FASTPATH_NONE"
EXIT_FASTPATH_EXIT_HANDLED = "EXIT_FASTPATH_EXIT_HANDLED"

_COMPLETIONS: dict[str, Callable[[TdxVcpu], int]] = {
    "MapGPA": tdx_complete_vmcall_map_gpa,
    "MMIO read": tdx_complete_mmio_read,
    "VMCALL": tdx_complete_simple,
}


def kvm_vcpu_ioctl_run(vcpu: TdxVcpu) -> Generator[Step, None, KvmExit]:
    """KVM_RUN on the current LP. Returns how it came back to user space.

    Failed(-EIO): the VM is dead; Failed(-EINVAL): the vCPU is not initialised, or the TD not
    finalized. Source: kvm_main.c, kvm_vcpu_ioctl; x86.c, kvm_arch_vcpu_ioctl_run.
    """
    vm = vcpu.vm
    if vm.vm_dead:
        return Failed(-EIO)
    yield from tdx_vcpu_load(vcpu)
    vcpu.srcu_index = vm.srcu.read_lock()
    vcpu.run, vcpu.memory_fault = None, None
    try:
        ret = yield from _run(vcpu)
    finally:
        stop_reading_memslots(vcpu)
    return make_exit(ret, vcpu.run, vcpu.memory_fault)


def _run(vcpu: TdxVcpu) -> Status:
    completion, vcpu.completion = vcpu.completion, ""
    if completion and _COMPLETIONS[completion](vcpu) <= 0:
        return 0
    if not (vcpu.is_initialised and vcpu.tdx.is_runnable):
        return -EINVAL
    return (yield from vcpu_run(vcpu))


def vcpu_run(vcpu: TdxVcpu) -> Status:
    """Enter again and again. Returns 0: to user space with `vcpu.run`; -errno. Source: x86.c."""
    ret = 1
    while ret > 0:
        if vcpu.halted:
            yield from vcpu_block(vcpu)
        else:
            ret = yield from vcpu_enter_guest(vcpu)
        if ret > 0 and vcpu.signal_pending:
            return -EINTR
        if vcpu.tdx.wait_for_sept_zap:
            yield (WAIT, "wait_for_sept_zap", vcpu.vcpu_id)
    return ret


def vcpu_block(vcpu: TdxVcpu) -> Doing:
    """Sleep until an event, a signal or a request ends the halt. Source: x86.c, vcpu_block."""
    yield ("kvm_vcpu_block", vcpu.vcpu_id)
    while not (vcpu.pending_events or vcpu.signal_pending or vcpu.requests):
        yield (WAIT, "an event", vcpu.vcpu_id)
    vcpu.halted = False


def vcpu_enter_guest(vcpu: TdxVcpu) -> Status:
    """One attempt to enter. Returns 1: come again; 0: to user space; -errno.

    The mode becomes IN_GUEST_MODE before the last look at the requests: who makes a request and
    then looks at the mode either sees the vCPU inside and interrupts it, or is seen.
    Source: x86.c.
    """
    host, vm = vcpu.tdx.host, vcpu.vm
    yield ("vcpu_enter_guest", vcpu.vcpu_id)
    if vcpu.requests:
        if vcpu.check_request("VM_DEAD"):
            return -EIO
        yield from _handle_requests(vcpu)
    ret = yield from kvm_mmu_reload(vcpu)
    if ret:
        return ret
    if vcpu.pending_events:
        yield from _inject_events(vcpu)
    goes_in = yield from announce_entry(vcpu)
    fastpath = EXIT_FASTPATH_EXIT_HANDLED
    if goes_in:
        fastpath = yield from tdx_vcpu_run(vcpu)
    vcpu.mode = OUTSIDE_GUEST_MODE
    host.enable_interrupts(host.current_lp)
    vcpu.srcu_index = vm.srcu.read_lock()
    if fastpath != EXIT_FASTPATH_NONE:
        return 1
    return (yield from tdx_handle_exit(vcpu))


def _handle_requests(vcpu: TdxVcpu) -> Doing:
    """What others asked of the vCPU. Source: x86.c, vcpu_enter_guest; tdx.c, tdx_flush_tlb_all."""
    host = vcpu.tdx.host
    if vcpu.check_request("TLB_FLUSH"):
        yield ("INVEPT global", host.current_lp)
        host.invept_global(host.current_lp)


def _inject_events(vcpu: TdxVcpu) -> Doing:
    """An NMI is left with the module; an interrupt waits in the posted-interrupt descriptor.

    Source: tdx.c, tdx_inject_nmi.
    """
    events, vcpu.pending_events = vcpu.pending_events, frozenset()
    if "NMI" in events:
        status = yield from tdh_vp_wr(vcpu.tdx.host, vcpu.vp, TD_VCPU_PEND_NMI, 1, MASK_8)
        vcpu.tdx.bug_on("TDH_VP_WR", status)


def tdx_vcpu_run(vcpu: TdxVcpu) -> Generator[Step, None, str]:
    """One TDH.VP.ENTER, unless a Secure EPT entry is being zapped and vCPUs must stay outside.

    Returns EXIT_FASTPATH_EXIT_HANDLED: nothing is left to handle; EXIT_FASTPATH_NONE. A locked
    operand (the S-EPT tree while the module watches for single steps, the epoch while it is
    tracked) is nothing to handle: the vCPU just comes again, after it took its interrupts.
    Source: tdx.c, tdx_vcpu_run and tdx_exit_handlers_fastpath.
    """
    if vcpu.tdx.wait_for_sept_zap:
        return EXIT_FASTPATH_EXIT_HANDLED
    yield from tdx_vcpu_enter_exit(vcpu)
    if tdx_operand_busy(vcpu.vp_enter_ret):
        return EXIT_FASTPATH_EXIT_HANDLED
    return EXIT_FASTPATH_NONE


def tdx_vcpu_enter_exit(vcpu: TdxVcpu) -> Doing:
    """TDH.VP.ENTER, the guest, and its exit. An interrupt that waits takes the guest out at once.

    Source: tdx.c, tdx_vcpu_enter_exit.
    """
    host = vcpu.tdx.host
    lp = host.current_lp
    registers = Registers(**dict(vcpu.args))
    status = yield from tdh_vp_enter(host, vcpu.vp, registers)
    if status == IN_GUEST:
        if lp in host.ipis:
            host.take_out(lp)
        else:
            yield from host.run_guest(vcpu, lp)
        vcpu.vp_enter_ret, vcpu.args = host.take_exit(lp)
    else:
        values = registers.as_dict().items()
        vcpu.vp_enter_ret = status
        vcpu.args = tuple((name, value) for name, value in values if value)
    vcpu.exit_reason = tdx_to_vmx_exit_reason(vcpu)
