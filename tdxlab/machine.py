"""The root object: a machine with Linux on it, the TDX module up, and VMs.

    machine = Machine(gpaw=48, memory="4 GiB", lps=4, packages=2)
    td = machine.create_td(vcpus=2, memory="64 MiB")
    td.touch(0x1000)
    td.convert(0x0, "2 MiB", to="shared")
    td.destroy()
    machine.seamcalls["TDH.MEM.PAGE.AUG"]

Two machines share nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from tdxlab import accounts, steps
from tdxlab.arch import GPAW_CHOICES, PAGE_SIZE, SIZE_1G, shared_bit
from tdxlab.arguments import checked
from tdxlab.bare import BareMachine
from tdxlab.failures import Failure, Pace, injected
from tdxlab.hardware import default_platform
from tdxlab.journal import Field, Fields, Journalled
from tdxlab.kvm.injection import Nth
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, MmuParams, VmConfig
from tdxlab.kvm.rmp import Rmp
from tdxlab.kvm.tdx_module import tdx_bringup
from tdxlab.kvm.vm_types import KVM_X86_SNP_VM
from tdxlab.sizes import format_size, parse_size
from tdxlab.vmm import Gate
from tdxlab.vmm_ioctls import unchanged_on_failure
from tdxlab.vmm_plain import PlainVm
from tdxlab.vmm_run import PlayingHost
from tdxlab.vmm_snp import SnpVm
from tdxlab.vmm_td import Td

#: Where firmware ends, as on a PC.
FIRMWARE_END = 4 * SIZE_1G


class Machine(BareMachine, Journalled):
    """A machine that Linux has booted on, with KVM and the TDX module ready for TDs.

    gpaw: guest address width of the TDs it creates, 48 or 52. memory: for guests and for what KVM
    and the module need for them: a multiple of 1 GiB, as an int of bytes or as "4 GiB". lps: 1 to
    256 logical processors, spread over `packages` (1 to 8). params: CPU facts and module parameters
    of KVM. encrypted: as for `BareMachine`. rmp: whose each page is, for SNP VMs.
    Refuses values out of range: ValueError.
    """

    _created = Field(0)

    @checked
    def __init__(
        self,
        *,
        gpaw: int = 48,
        memory: int | str = "4 GiB",
        lps: int = 4,
        packages: int = 2,
        params: MmuParams | None = None,
        encrypted: bool = True,
    ) -> None:
        if gpaw not in GPAW_CHOICES:
            raise ValueError(f"GPAW {gpaw} is not a TDX guest address width; choose 48 or 52")
        size = parse_size(memory)
        if size % SIZE_1G:
            raise ValueError(
                f"{format_size(size)} of memory; choose a multiple of 1 GiB, such as '4 GiB'"
            )
        platform = default_platform(tdmr_gib=size // SIZE_1G, lps=lps, packages=packages)
        super().__init__(platform, encrypted=encrypted)
        self.gpaw = gpaw
        self.fields = Fields(self.journal, self)
        self.host = PlayingHost(self, params=params)
        self.rmp = Rmp(self.journal)
        failed = steps.run(self.host.on_cpu(0, tdx_bringup(self.host)))
        if failed:
            raise ValueError(f"the TDX module did not come up: errno {-failed}; more memory helps")

    # -- VMs

    @checked
    def create_td(
        self,
        *,
        vcpus: int = 1,
        memory: int | str = "64 MiB",
        gpaw: int | None = None,
        image: bytes = b"",
        accepts: bool = True,
        sept_ve_disable: bool = True,
        discards: bool = False,
        launch: bool = True,
        name: str = "",
    ) -> Td:
        """A TD with its memory at GPA 0, private and not yet mapped, ready to run.

        vcpus: 1 to the machine's number of LPs. memory: bytes, or such as "64 MiB"; a multiple of
        4 KiB. gpaw: None for the machine's. image: firmware, measured and mapped at its place below
        4 GiB. accepts: the guest accepts private pages before use. sept_ve_disable: using a page
        that is not accepted is no #VE for the guest but the TD's death. discards: a conversion
        throws the other copy of the page away. launch: False leaves `finalize` to the caller.
        Refuses values out of range: ValueError; what KVM refuses: IoctlError. The machine is then
        unchanged.
        """
        size = self._memory_size(memory, self.gpaw if gpaw is None else gpaw)
        if not 1 <= vcpus <= self.cpu.count:
            raise ValueError(
                f"{vcpus} vCPUs; choose 1 to {self.cpu.count}: KVM gives a TD no more vCPUs "
                "than the machine has LPs"
            )
        with unchanged_on_failure(self.journal):
            td = Td(
                self.host,
                gpaw=self.gpaw if gpaw is None else gpaw,
                accepts=accepts,
                discards=discards,
                name=name or self._name("TD"),
            )
            td.init_vm(max_vcpus=vcpus, sept_ve_disable=sept_ve_disable)
            for _ in range(vcpus):
                td.add_vcpu()
            td.add_memory(0, size)
            if image:
                self.add_firmware(td, image)
            if launch:
                td.finalize()
        return td

    @checked
    def create_vm(
        self,
        *,
        vm_type: int = KVM_X86_DEFAULT_VM,
        vcpus: int = 1,
        memory: int | str = "64 MiB",
        config: VmConfig | None = None,
        discards: bool = False,
        name: str = "",
        launch: bool = True,
    ) -> PlainVm:
        """A VM that is no TD, with its memory at GPA 0 (private if its type has private memory).

        vm_type: KVM_X86_*_VM, all but TDX. vcpus: 0 to 1024. config: for more than the type; None
        for the defaults. launch: for an SNP VM (an `SnpVm`); False leaves `launch_finish` to the
        caller. The rest as for `create_td`.
        """
        if vcpus < 0:
            raise ValueError(f"{vcpus} vCPUs; choose 0 to 1024")
        size = self._memory_size(memory, 48)
        config = config or VmConfig(vm_type=vm_type)
        with unchanged_on_failure(self.journal):
            name = name or self._name("VM")
            if config.vm_type == KVM_X86_SNP_VM:
                snp = SnpVm(self.host, config, rmp=self.rmp, discards=discards, name=name)
                if launch:
                    snp.launch_finish()
                vm: PlainVm = snp
            else:
                vm = PlainVm(self.host, config, discards=discards, name=name)
            for _ in range(vcpus):
                vm.add_vcpu()
            vm.add_memory(0, size, private=vm.vm.features.has_private_mem)
        return vm

    @checked
    def add_firmware(self, td: Td, image: bytes) -> int:
        """Give a TD that is not finalized measured firmware: memory that ends at 4 GiB as on a PC,
        or behind the TD's memory where that is larger. Returns its GPA.
        """
        size = -(-len(image) // PAGE_SIZE) * PAGE_SIZE
        end = max((backing.end for backing in td.backings), default=0)
        gpa = FIRMWARE_END - size if end <= FIRMWARE_END - size else end
        with unchanged_on_failure(self.journal):
            td.add_memory(gpa, size)
            td.add_image(gpa, image)
        return gpa

    def _name(self, kind: str) -> str:
        self._created += 1
        return f"{kind} {self._created}"

    def _memory_size(self, memory: int | str, gpaw: int) -> int:
        size = parse_size(memory)
        limit = 1 << shared_bit(gpaw)
        if size % PAGE_SIZE or size > limit:
            raise ValueError(
                f"{size:#x} bytes of memory; choose a multiple of {PAGE_SIZE:#x}, "
                f"at most {format_size(limit)} (GPAW {gpaw})"
            )
        return size

    @checked
    def failing(
        self, *failures: Failure, td: Td | None = None, pace: Pace | None = None
    ) -> AbstractContextManager[list[Nth]]:
        """Let SEAMCALLs, hooks of `td` or allocations fail while the `with` lasts; see
        `tdxlab.failures`.
        """
        return injected(self.host, failures, tdx=None if td is None else td.tdx, pace=pace)

    # -- counts

    @checked
    def tables(self, vm: Gate) -> dict[str, accounts.Levels]:
        """Occupancy of a VM's page tables: tree ("mirror", "external", "direct") -> name of a level
        ("4K" for the tables of 4 KiB entries) -> tables, entries, bytes.

        Refuses a VM of another machine: ValueError.
        """
        if vm.host is not self.host:
            raise ValueError(f"{vm!r} is a VM of another machine; ask that one")
        tdr = vm.tdr if isinstance(vm, Td) else None
        return accounts.tables(self, vm.vm, tdr)
