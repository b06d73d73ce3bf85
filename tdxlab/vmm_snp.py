"""An SNP VM in the hands of its VMM: private memory without a mirror, behind an RMP.

    vm = machine.create_vm(vm_type=KVM_X86_SNP_VM)
    vm.write(0x1000, b"mine")                    # the page is assigned, then mapped
    vm.convert(0x1000, 0x1000, to="shared")

Source: Linux 6.16, arch/x86/kvm/svm/sev.c; Documentation/virt/kvm/x86/amd-memory-encryption.rst.
Differs: the guest asks for a conversion without the page in which a real one writes its requests,
and validates nothing. Its vCPUs run as VMX's do. See `kvm/rmp.py` for the rest.
"""

from __future__ import annotations

from errno import EINVAL

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.arch import EPT_EXECUTE, EPT_READ, EPT_WRITE, PAGE_SHIFT, PAGE_SIZE
from tdxlab.arguments import checked
from tdxlab.cpu import Translation
from tdxlab.journal import Field
from tdxlab.kvm.params import VmConfig
from tdxlab.kvm.rmp import PFERR_GUEST_ENC_MASK, SVM_EXIT_NPF, Rmp, SnpGmem, snp_launch_finish
from tdxlab.kvm.vm import Vcpu
from tdxlab.sizes import parse_size
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_ioctls import Progress
from tdxlab.vmm_plain import PlainDoor, PlainVm
from tdxlab.vmm_run import PlayingHost, RunResult

#: What the walk allowed, in the bits of an exit's qualification.
_ALLOWED = (EPT_READ | EPT_WRITE | EPT_EXECUTE) << 3


class SnpDoor(PlainDoor):
    """The guest's instructions: its page tables have the C-bit wherever it has converted nothing,
    and the CPU looks into the RMP after each walk.
    """

    def __init__(self, host: PlayingHost, owner: SnpVm) -> None:
        super().__init__(host)
        self.owner = owner

    def _access(
        self, lp: int, gpa: int, access: int, registers: Registers
    ) -> Translation | GuestOutcome:
        """As a plain VM's; then the RMP is asked. What it forbids is a nested page fault too."""
        gfn = gpa >> PAGE_SHIFT
        encrypted = gfn not in self.owner.guest.shared
        c_bit = PFERR_GUEST_ENC_MASK if encrypted else 0
        found = super()._access(lp, gpa, access, registers)
        if isinstance(found, GuestOutcome):
            found.registers.rcx |= c_bit
            return found
        rmp, asid = self.owner.rmp, self.owner.asid
        if rmp.allows(found.hpa >> PAGE_SHIFT, asid, gfn, encrypted=encrypted):
            return found
        registers.r8, registers.rcx = gpa, access | _ALLOWED | c_bit
        return GuestOutcome(True, SVM_EXIT_NPF, registers)


class SnpVm(PlainVm):
    """A VM of type SNP. rmp: of the machine. asid: its own number there. launched: its launch has
    ended.
    """

    launched = Field(False)

    def __init__(
        self,
        host: PlayingHost,
        config: VmConfig,
        *,
        rmp: Rmp,
        discards: bool = False,
        name: str = "VM",
    ) -> None:
        super().__init__(host, config, discards=discards, name=name, door=SnpDoor(host, self))
        arch = SnpGmem(rmp)
        self.rmp, self.asid = rmp, arch.asid
        self.guest_memory.arch = arch

    def launch_finish(self) -> None:
        """KVM_SEV_SNP_LAUNCH_FINISH: from now on memory can be mapped ahead of any access.

        Refuses a second time: IoctlError, EINVAL. Differs: nothing was measured, and vCPUs may run
        before.
        """
        self.require_alive("KVM_SEV_SNP_LAUNCH_FINISH")
        if self.launched:
            raise IoctlError("KVM_SEV_SNP_LAUNCH_FINISH", EINVAL, "the launch has ended already")
        snp_launch_finish(self.vm)
        self.launched = True

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
        """The VMM converts the memory, and the guest's page tables follow: the C-bit goes where it
        became shared. Refuses as `Gate.convert`.
        """
        size = parse_size(size)
        result = super().convert(gpa, size, to=to, vcpu=vcpu, progress=progress)
        shared = self.guest.shared
        for gfn in range(gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT):
            if to == "shared":
                shared.put(gfn, None)
            elif gfn in shared:
                shared.drop(gfn)
        return result

    def owned(self) -> dict[int, int]:
        """GPA -> HPA of the pages that the RMP says are this guest's."""
        entries = self.rmp.entries(self.asid)
        return {gfn * PAGE_SIZE: pfn * PAGE_SIZE for pfn, gfn in entries.items()}
