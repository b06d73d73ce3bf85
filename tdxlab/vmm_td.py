"""A TD in the hands of its VMM: built, measured, run and taken apart, by ioctls.

Source: QEMU 10, target/i386/kvm/tdx.c; Linux 6.16, Documentation/virt/kvm/x86/intel-tdx.rst.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EBADF, EBUSY, EEXIST, EINVAL, EIO, ENOMEM, ENOSPC

from tdxlab.arch import GPAW_CHOICES, PAGE_SHIFT, PAGE_SIZE
from tdxlab.arguments import checked
from tdxlab.guest import Guest
from tdxlab.kvm.exits import KvmExit
from tdxlab.kvm.params import KVM_X86_TDX_VM, VmConfig
from tdxlab.kvm.tdx import Tdx, TdxVcpu, tdx_vm_init
from tdxlab.kvm.tdx_batching import set_zap_batch
from tdxlab.kvm.tdx_build import (
    KVM_TDX_MEASURE_MEMORY_REGION,
    MemRegion,
    tdx_td_finalize,
    tdx_vcpu_init_mem_region,
)
from tdxlab.kvm.tdx_init import InitVm, tdx_td_init
from tdxlab.kvm.tdx_run import kvm_vcpu_ioctl_run
from tdxlab.kvm.tdx_teardown import kvm_destroy_vm
from tdxlab.kvm.tdx_vcpu import tdx_vcpu_create, tdx_vcpu_init
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE, Vcpu, Vm
from tdxlab.steps import Operation, Step
from tdxlab.vmm import Gate
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_ioctls import Gauge, Progress
from tdxlab.vmm_run import PlayingHost

#: HVA of the buffer from which initial pages are copied.
SOURCE_HVA = 0x7E00_0000_0000

#: TD attribute: a page that is not accepted is no #VE for the guest but an exit.
SEPT_VE_DISABLE = 1 << 28

#: Steps that give one page each back.
_GIVING_BACK = frozenset(("TDH.MEM.PAGE.REMOVE", "TDH.PHYMEM.PAGE.RECLAIM"))

_WHY_INIT = {
    EINVAL: "the TD is initialised already, or its attributes are not supported",
    EBUSY: "vCPUs exist; initialise the TD before creating them",
    ENOSPC: "every private KeyID belongs to a TD; destroy one first",
    ENOMEM: "no free page is left; destroy a VM, or build a machine with more memory",
}
_WHY_CREATE_VCPU = {
    EINVAL: "a TD has at most as many vCPUs as the machine has LPs",
    EEXIST: "this vCPU exists",
    EIO: "vCPUs can be created between KVM_TDX_INIT_VM and KVM_TDX_FINALIZE_VM only",
}
_WHY_INIT_VCPU = {
    EINVAL: "the vCPU is initialised already, or the TD is finalized",
    ENOMEM: _WHY_INIT[ENOMEM],
}
_WHY_REGION = {
    EINVAL: "the TD is finalized, or the GPAs are no private pages with a guest_memfd",
    EEXIST: "a page there has its content already; punch it out first",
    EBUSY: "the module was busy; punch the page out before adding it again",
}
_WHY_FINALIZE = {EINVAL: "the TD is finalized already, or pages wait to be added"}


class Td(Gate):
    """A TD. tdx: KVM's side of it. gpaw: 48 or 52."""

    def __init__(
        self,
        host: PlayingHost,
        *,
        gpaw: int = 48,
        accepts: bool = True,
        discards: bool = False,
        name: str = "TD",
    ) -> None:
        if gpaw not in GPAW_CHOICES:
            raise ValueError(f"GPAW {gpaw} is not a TDX guest address width; choose 48 or 52")
        config = VmConfig(
            vm_type=KVM_X86_TDX_VM, root_level=4 if gpaw == 48 else 5, ignore_guest_pat=False
        )
        vm = Vm(host.journal, host.memory, host.params, config, pages=host.pages, name=name)
        guest = Guest(host.journal, host.machine, gpaw=gpaw, accepts=accepts)
        super().__init__(host, vm, guest, discards=discards)
        self.gpaw = gpaw
        self.tdx: Tdx = tdx_vm_init(host, vm)
        self.tdx.exits_on_map_gpa = True

    @property
    def tdr(self) -> int | None:
        """HPA of the TDR, None without one."""
        return self.tdx.td.tdr or None

    @property
    def keyid(self) -> int | None:
        """The TD's KeyID, None without one."""
        return self.tdx.hkid if self.tdx.is_hkid_assigned else None

    # -- building

    @checked
    def init_vm(self, *, max_vcpus: int = 16, sept_ve_disable: bool = True) -> None:
        """KVM_TDX_INIT_VM: create the TD in the module. Raises IoctlError."""
        attributes = SEPT_VE_DISABLE if sept_ve_disable else 0
        init = InitVm(gpaw=self.gpaw, attributes=attributes, max_vcpus=max_vcpus)
        self._build("KVM_TDX_INIT_VM", tdx_td_init(self.tdx, init), _WHY_INIT)

    def add_vcpu(self) -> Vcpu:
        """KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU, on the LP where it will run. Raises IoctlError."""
        number = len(self.vm.vcpus)
        created: list[TdxVcpu] = []
        self._build("KVM_CREATE_VCPU", self._create_vcpu(number, created), _WHY_CREATE_VCPU)
        vcpu = created[0]
        lp = self.lp_for(vcpu)
        self._build("KVM_TDX_INIT_VCPU", tdx_vcpu_init(vcpu, 0), _WHY_INIT_VCPU, lp)
        return vcpu

    def _create_vcpu(self, number: int, created: list[TdxVcpu]) -> Operation:
        yield from ()
        vcpu = tdx_vcpu_create(self.tdx, number)
        if isinstance(vcpu, int):
            return vcpu
        created.append(vcpu)
        return 0

    @checked
    def add_image(self, gpa: int, content: bytes, *, measure: bool = True) -> None:
        """KVM_TDX_INIT_MEM_REGION: put `content` into the guest's first memory at `gpa`, padded
        with zeros to whole pages; `measure` it. Raises IoctlError.
        """
        size = -(-max(len(content), 1) // PAGE_SIZE) * PAGE_SIZE
        self.user_memory.mmap(SOURCE_HVA, size)
        try:
            for offset in range(0, len(content), PAGE_SIZE):
                piece = content[offset : offset + PAGE_SIZE]
                self.user_memory.write(SOURCE_HVA + offset, piece)
            region = MemRegion(SOURCE_HVA, gpa, size >> PAGE_SHIFT)
            self._build("KVM_TDX_INIT_MEM_REGION", self._add(region, measure), _WHY_REGION, 0)
        finally:
            self.run_thread(self.user_memory.munmap(SOURCE_HVA, size))

    def _add(self, region: MemRegion, measure: bool) -> Operation:
        flags = KVM_TDX_MEASURE_MEMORY_REGION if measure else 0
        vcpu = self.vcpu(0)
        assert isinstance(vcpu, TdxVcpu)
        ret, _ = yield from tdx_vcpu_init_mem_region(vcpu, region, flags)
        return ret

    def finalize(self) -> None:
        """KVM_TDX_FINALIZE_VM: close the measurement; the TD can run. Raises IoctlError."""
        self._build("KVM_TDX_FINALIZE_VM", tdx_td_finalize(self.tdx), _WHY_FINALIZE)

    def _build(
        self, name: str, operation: Operation, reasons: dict[int, str], lp: int | None = None
    ) -> None:
        """An ioctl on `lp`, or an idle one. Raises IoctlError with a reason for its errno."""
        ret = self.drive(name, operation, lp)
        if ret:
            why = reasons.get(-ret) or self.vm.vm_bugged or "the module refused"
            raise IoctlError(name, -ret, why)

    def kvm_run(self, vcpu: Vcpu) -> Generator[Step, None, KvmExit]:
        """KVM_RUN on the current LP."""
        assert isinstance(vcpu, TdxVcpu)
        return kvm_vcpu_ioctl_run(vcpu)

    @checked
    def zap_in_batches(self, pages: int) -> None:
        """From now on KVM removes private pages up to `pages` (1..512) at a time, with one TLB
        flush for all of them; 0: one by one, as at the beginning. Refuses other numbers:
        ValueError.

        Differs: no kernel offers this.
        """
        set_zap_batch(self.tdx, pages)

    @checked
    def interrupt(self, vcpu: int | Vcpu = 0) -> None:
        """Inject an interrupt: a vCPU that waits for one goes on, one in the guest leaves it.

        Refuses a vCPU of another TD: ValueError.
        """
        found = self.own_vcpu(vcpu)
        assert isinstance(found, TdxVcpu)
        found.pending_events |= {"interrupt"}
        self.host.interrupt_vcpu(found)

    # -- the end

    @checked
    def destroy(self, *, progress: Progress | None = None) -> None:
        """Close all file descriptors: private pages are removed, the KeyID goes back, every page is
        reclaimed. progress: told (pages given back, in all).

        Refuses a TD that was destroyed (IoctlError, EBADF), or one of whose vCPUs is in the guest
        (ValueError).
        """
        if self.destroyed:
            raise IoctlError("close", EBADF, f"{self.vm.name} was destroyed already")
        for vcpu in self.vm.vcpus:
            if vcpu.mode != OUTSIDE_GUEST_MODE:
                raise ValueError(f"{vcpu!r} is in the guest; let it exit before you destroy it")
        gauge = None
        if progress is not None:
            total = len(self._private_pages()) + len(self.vm.sps)
            gauge = Gauge(_GIVING_BACK, total, progress)
        self.run_thread(self.destroy_steps(), gauge=gauge)

    def _private_pages(self) -> list[int]:
        pages = []
        for backing in self.backings:
            if backing.gmem >= 0:
                pages += list(self.guest_memory.pages(backing.gmem))
        return pages

    def destroy_steps(self) -> Operation:
        """As `destroy`: the process ends, its files are closed, the VM goes."""
        self.destroyed = True
        yield from self.close_files_steps()
        yield from kvm_destroy_vm(self.tdx)
        self.host.remove_vm(self.vm)
