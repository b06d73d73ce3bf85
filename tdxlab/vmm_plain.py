"""A VM without a TDX module behind it, in the hands of its VMM. SNP VMs have a file of their own.

Source: Linux 6.16, Documentation/virt/kvm/api.rst (KVM_X86_SW_PROTECTED_VM).
Differs: VMs of all types live side by side, AMD's too, and run as VMX's do; for SEV and SEV-ES
only what their type decides in KVM's MMU is there, no encryption of memory or registers.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EBADF

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE
from tdxlab.arguments import checked
from tdxlab.cpu import EptMisconfiguration, Translation
from tdxlab.guest import Guest
from tdxlab.kvm.exits import KvmExit
from tdxlab.kvm.params import KVM_X86_TDX_VM, VM_TYPE_NAMES, VmConfig
from tdxlab.kvm.vm import IN_GUEST_MODE, Vcpu, Vm
from tdxlab.kvm.vmx import (
    EXIT_REASON_EPT_MISCONFIG,
    EXIT_REASON_EPT_VIOLATION,
    EXIT_REASON_EXTERNAL_INTERRUPT,
    VmxVcpu,
    vmx_destroy_vm,
    vmx_vcpu_create,
    vmx_vcpu_ioctl_run,
    vmx_vm_init,
)
from tdxlab.sizes import parse_size
from tdxlab.steps import Operation, Step
from tdxlab.vmm import Gate
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_ioctls import Progress
from tdxlab.vmm_run import DONE, PlayingHost, RunResult


class PlainDoor:
    """What the instructions of a VM's guest do: the CPU walks the EPT of the vCPU inside the LP.

    vm: whose vCPUs; None until there is one.
    """

    def __init__(self, host: PlayingHost) -> None:
        self.host = host
        self.vm: Vm | None = None

    def touch(
        self, lp: int, gpa: int, *, write: bool = False, fetch: bool = False
    ) -> Translation | GuestOutcome:
        """Use one byte."""
        access = EPT_EXECUTE if fetch else EPT_READ | EPT_WRITE if write else EPT_READ
        return self._access(lp, gpa, access, Registers(r12=1, r13=int(write)))

    def read_guest(self, lp: int, gpa: int, size: int) -> bytes | GuestOutcome:
        """Read bytes of one page."""
        found = self._access(lp, gpa, EPT_READ, Registers(r12=size))
        if isinstance(found, GuestOutcome):
            return found
        return self.host.memory.read(found.hpa, size)

    def write_guest(self, lp: int, gpa: int, data: bytes) -> Translation | GuestOutcome:
        """Write bytes of one page."""
        value = int.from_bytes(data, "little")
        found = self._access(
            lp, gpa, EPT_READ | EPT_WRITE, Registers(r12=len(data), r13=1, r15=value)
        )
        if isinstance(found, Translation):
            self.host.memory.write(found.hpa, data)
        return found

    def interrupt(self, lp: int) -> GuestOutcome:
        """An interrupt takes the guest out of `lp`."""
        return GuestOutcome(True, EXIT_REASON_EXTERNAL_INTERRUPT, Registers())

    def _access(
        self, lp: int, gpa: int, access: int, registers: Registers
    ) -> Translation | GuestOutcome:
        """The translation, or an exit whose registers tell KVM of the access."""
        assert self.vm is not None
        found = self.host.hardware.cpu.access(
            lp,
            self._root(lp),
            self.vm.config.root_level - 1,
            gpa,
            access,
            ad_bits=self.vm.params.ad_bits,
        )
        if isinstance(found, Translation):
            return found
        registers.r8 = gpa
        if isinstance(found, EptMisconfiguration):
            return GuestOutcome(True, EXIT_REASON_EPT_MISCONFIG, registers)
        registers.rcx = found.qualification
        return GuestOutcome(True, EXIT_REASON_EPT_VIOLATION, registers)

    def _root(self, lp: int) -> int:
        """HPA of the EPT that `lp` walks."""
        assert self.vm is not None
        for vcpu in self.vm.vcpus:
            if vcpu.cpu == lp and vcpu.mode == IN_GUEST_MODE:
                assert isinstance(vcpu, VmxVcpu)
                return vcpu.eptp
        raise ValueError(f"no vCPU of {self.vm.name} is inside LP {lp}; KVM_RUN enters it")


class PlainVm(Gate):
    """A VM of type DEFAULT, SW_PROTECTED, SEV or SEV_ES. door: how its guest gets at memory, None
    for the plain way.
    """

    def __init__(
        self,
        host: PlayingHost,
        config: VmConfig,
        *,
        discards: bool = False,
        name: str = "VM",
        door: PlainDoor | None = None,
    ) -> None:
        if config.vm_type == KVM_X86_TDX_VM or config.vm_type not in VM_TYPE_NAMES:
            raise ValueError(
                f"VM type {config.vm_type}; choose KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, "
                "KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM or KVM_X86_SNP_VM, or make a TD with create_td"
            )
        vm = Vm(host.journal, host.memory, host.params, config, pages=host.pages, name=name)
        door = door or PlainDoor(host)
        door.vm = vm
        width = 48 if config.root_level == 4 else 57
        super().__init__(host, vm, Guest(host.journal, door, width=width), discards=discards)
        vmx_vm_init(host, vm)

    def add_vcpu(self) -> Vcpu:
        """KVM_CREATE_VCPU."""
        vcpu = vmx_vcpu_create(self.host, self.vm, len(self.vm.vcpus))
        if isinstance(vcpu, int):
            raise IoctlError("KVM_CREATE_VCPU", -vcpu, "no more vCPUs are possible")
        return vcpu

    def kvm_run(self, vcpu: Vcpu) -> Generator[Step, None, KvmExit]:
        """KVM_RUN on the current LP."""
        assert isinstance(vcpu, VmxVcpu)
        return vmx_vcpu_ioctl_run(vcpu)

    @checked
    def convert(
        self,
        gpa: int,
        size: int | str,
        *,
        to: str,
        vcpu: int | Vcpu = 0,
        progress: Progress | None = None,
    ) -> RunResult:
        """The VMM converts the memory itself: the guest has nothing to ask with.

        Refuses as `Gate.convert`; to="private" in a VM without private memory: IoctlError.
        """
        size = parse_size(size)
        self.require_convertible(gpa, size, to)
        if self.vm.features.has_private_mem and not self.vm.vm_dead:
            private = to == "private"
            operation = self.convert_steps(gpa, size, private=private)
            self.ioctl("KVM_SET_MEMORY_ATTRIBUTES", operation, lambda: "the conversion failed")
        else:
            self.set_memory_attributes(gpa, size, private=to == "private")
        return RunResult(DONE, (), ())

    def destroy(self) -> None:
        """Close all file descriptors; every page goes back to the host.

        Refuses a VM that was destroyed: IoctlError, EBADF.
        """
        if self.destroyed:
            raise IoctlError("close", EBADF, f"{self.vm.name} was destroyed already")
        self.run_thread(self.destroy_steps())

    def destroy_steps(self) -> Operation:
        """As `destroy`: the process ends, its files are closed, the VM goes."""
        self.destroyed = True
        yield from self.close_files_steps()
        yield from vmx_destroy_vm(self.vm)
        self.host.remove_vm(self.vm)
