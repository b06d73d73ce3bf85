"""VMs that are no TDs: the CPU walks KVM's direct EPT itself, no module is asked.

KVM_RUN enters, handles the exit, enters again, until user space is needed.

Source: Linux 6.16, arch/x86/kvm/vmx/vmx.c (vmx_load_mmu_pgd, handle_ept_violation,
handle_ept_misconfig), arch/x86/kvm/vmx/common.h, arch/x86/kvm/x86.c (vcpu_run, vcpu_enter_guest).
Differs: no instruction is decoded: an exit says what the access was.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EEXIST, EINTR, EINVAL, EIO
from functools import partial

from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE
from tdxlab.journal import Field
from tdxlab.kvm.entry import announce_entry, stop_reading_memslots
from tdxlab.kvm.exits import (
    Failed,
    InternalError,
    KvmExit,
    MmioExit,
    ShutdownExit,
    make_exit,
)
from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.host import Doing, KvmHost
from tdxlab.kvm.page_fault import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
)
from tdxlab.kvm.rmp import PFERR_GUEST_ENC_MASK, SVM_EXIT_NPF
from tdxlab.kvm.roots import kvm_mmu_destroy, kvm_mmu_reload, kvm_mmu_unload
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE, Vcpu, Vm
from tdxlab.kvm.zap import kvm_flush_shadow_all, kvm_mmu_uninit_tdp_mmu
from tdxlab.steps import Step

EXIT_REASON_EXTERNAL_INTERRUPT = 1
EXIT_REASON_TRIPLE_FAULT = 2
EXIT_REASON_EPT_VIOLATION = 48
EXIT_REASON_EPT_MISCONFIG = 49

#: Bit of an exit qualification -> bit of a page fault's error code.
_ERROR_CODE = (
    (EPT_READ, PFERR_USER_MASK),
    (EPT_WRITE, PFERR_WRITE_MASK),
    (EPT_EXECUTE, PFERR_FETCH_MASK),
    (7 << 3, PFERR_PRESENT_MASK),
    (PFERR_GUEST_ENC_MASK, PFERR_PRIVATE_ACCESS),
)

Running = Generator[Step, None, int]


class VmxVcpu(Vcpu):
    """struct vcpu_vmx. eptp: HPA of the EPT that the CPU walks. run: what user space is to do.

    mmio_data: what user space answered to an MMIO read. emulated: the bytes of an instruction that
    was emulated, None if the CPU is to run it.
    """

    eptp = Field(0)
    run: Field[KvmExit | None] = Field(None)
    mmio_data = Field(0)
    emulated: Field[bytes | None] = Field(None)

    def __init__(self, host: KvmHost, vm: Vm, vcpu_id: int) -> None:
        super().__init__(vm, vcpu_id)
        self.host = host


class Vmx:
    """The Vendor of a VM that is no TD."""

    def __init__(self, host: KvmHost) -> None:
        self.host = host

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> Doing:
        """Let the CPU walk this root. Source: vmx.c, vmx_load_mmu_pgd."""
        assert isinstance(vcpu, VmxVcpu)
        yield ("VMWRITE EPT_POINTER", vcpu.vcpu_id, root_hpa)
        vcpu.eptp = root_hpa

    def flush_tlb_current(self, vcpu: Vcpu) -> Doing:
        """INVEPT of the vCPU's root. Source: vmx.c, vmx_flush_tlb_current."""
        yield ("INVEPT", self.host.current_lp, vcpu.root_hpa)
        self.host.hardware.cpu.invept(self.host.current_lp, vcpu.root_hpa)

    def kick_all(self, vm: Vm, request: str) -> Doing:
        """As `KvmHost.kick_all`."""
        return self.host.kick_all(vm, request)

    def private_max_mapping_level(self, vm: Vm, pfn: int) -> int:
        """No limit of its own."""
        return 0


def vmx_vm_init(host: KvmHost, vm: Vm) -> None:
    """Give a VM its back end. Source: vmx.c, vmx_vm_init."""
    vm.vendor = Vmx(host)
    vm.kick_vcpus = partial(host.interrupt_all, vm)


def vmx_vcpu_create(host: KvmHost, vm: Vm, vcpu_id: int, *, max_vcpus: int = 1024) -> VmxVcpu | int:
    """KVM_CREATE_VCPU. vcpu_id: 0 to max_vcpus - 1. Returns the vCPU, -EINVAL or -EEXIST.

    Source: kvm_main.c, kvm_vm_ioctl_create_vcpu.
    """
    if not 0 <= vcpu_id < max_vcpus:
        return -EINVAL
    if any(vcpu.vcpu_id == vcpu_id for vcpu in vm.vcpus):
        return -EEXIST
    vcpu = VmxVcpu(host, vm, vcpu_id)
    vm.vcpus = (*vm.vcpus, vcpu)
    return vcpu


def vmx_vcpu_load(vcpu: VmxVcpu) -> None:
    """The vCPU's thread now runs on the current LP; what an earlier visit left there in the TLB is
    old. Source: vmx.c, vmx_vcpu_load_vmcs.
    """
    if vcpu.cpu != vcpu.host.current_lp:
        vcpu.make_request("TLB_FLUSH")
        vcpu.cpu = vcpu.host.current_lp


def vmx_vcpu_ioctl_run(vcpu: VmxVcpu) -> Generator[Step, None, KvmExit]:
    """KVM_RUN on the current LP. Returns how it came back to user space; Failed(-EIO): the VM is
    dead. Source: x86.c, kvm_arch_vcpu_ioctl_run.
    """
    vm = vcpu.vm
    if vm.vm_dead:
        return Failed(-EIO)
    vmx_vcpu_load(vcpu)
    vcpu.srcu_index = vm.srcu.read_lock()
    _complete_emulated_mmio(vcpu)
    vcpu.run, vcpu.memory_fault = None, None
    try:
        ret = yield from vcpu_run(vcpu)
    finally:
        stop_reading_memslots(vcpu)
    return make_exit(ret, vcpu.run, vcpu.memory_fault)


def _complete_emulated_mmio(vcpu: VmxVcpu) -> None:
    """The access that went to user space is done. Source: x86.c, complete_emulated_mmio."""
    if isinstance(vcpu.run, MmioExit):
        is_read = vcpu.run.data is None
        size = vcpu.run.size
        value = vcpu.mmio_data if is_read else 0
        vcpu.emulated = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def vcpu_run(vcpu: VmxVcpu) -> Running:
    """Enter again and again. Returns 0: to user space with `vcpu.run`; -errno. Source: x86.c."""
    ret = 1
    while ret > 0:
        ret = yield from vcpu_enter_guest(vcpu)
        if ret > 0 and vcpu.signal_pending:
            return -EINTR
    return ret


def vcpu_enter_guest(vcpu: VmxVcpu) -> Running:
    """One attempt to enter. Returns 1: come again; 0: to user space; -errno. Source: x86.c."""
    host, vm = vcpu.host, vcpu.vm
    yield ("vcpu_enter_guest", vcpu.vcpu_id)
    if vcpu.check_request("VM_DEAD"):
        return -EIO
    ret = yield from kvm_mmu_reload(vcpu)
    if ret:
        return ret
    if vcpu.check_request("TLB_FLUSH"):
        yield from vm.vendor.flush_tlb_current(vcpu)
    goes_in = yield from announce_entry(vcpu)
    if goes_in:
        yield from host.run_guest(vcpu, host.current_lp)
    vcpu.mode = OUTSIDE_GUEST_MODE
    host.enable_interrupts(host.current_lp)
    vcpu.srcu_index = vm.srcu.read_lock()
    if not goes_in:
        return 1
    reason, registers = host.take_exit(host.current_lp)
    return (yield from vmx_handle_exit(vcpu, reason, dict(registers)))


def vmx_handle_exit(vcpu: VmxVcpu, reason: int, exit_: dict[str, int]) -> Running:
    """Handle an exit. exit_: "rcx" the qualification, or of an SNP guest's private access with
    PFERR_GUEST_ENC_MASK of AMD's error code in it; "r8" the GPA, "r12" bytes of the access,
    "r13" 1 for a write, "r15" what is written.

    SVM_EXIT_NPF: the RMP forbids the access.
    Returns 1: enter again; 0: to user space; -errno. Source: vmx.c; svm/svm.c, npf_interception.
    Differs: where KVM's tables allow what the RMP forbids, user space is told; Linux looks for a
    large RMP entry to split.
    """
    if reason == EXIT_REASON_EXTERNAL_INTERRUPT:
        return 1
    if reason == EXIT_REASON_TRIPLE_FAULT:
        vcpu.run = ShutdownExit()
        return 0
    gpa = exit_.get("r8", 0)
    if reason == EXIT_REASON_EPT_MISCONFIG:
        ret = yield from kvm_mmu_page_fault(vcpu, gpa, PFERR_RSVD_MASK)
    elif reason in (EXIT_REASON_EPT_VIOLATION, SVM_EXIT_NPF):
        qualification = exit_.get("rcx", 0)
        error_code = sum(flag for bits, flag in _ERROR_CODE if qualification & bits)
        ret = yield from kvm_mmu_page_fault(vcpu, gpa, error_code)
        if reason == SVM_EXIT_NPF and ret > 0:
            vcpu.run = InternalError((reason, vcpu.cpu))
            return 0
    else:
        vcpu.run = InternalError((reason, vcpu.cpu))
        return 0
    if ret == RET_PF_EMULATE:
        data = exit_.get("r15", 0) if exit_.get("r13") else None
        vcpu.run = MmioExit(gpa, exit_.get("r12", 1), data)
        return 0
    return ret if ret < 0 else 1


def vmx_destroy_vm(vm: Vm) -> Doing:
    """The last reference to the VM is gone. Source: kvm_main.c, kvm_destroy_vm."""
    yield from kvm_flush_shadow_all(vm)
    for vcpu in vm.vcpus:
        kvm_mmu_unload(vcpu)
        kvm_mmu_destroy(vcpu)
    vm.vcpus = ()
    yield from kvm_mmu_uninit_tdp_mmu(vm)
    vm.rcu_barrier()
