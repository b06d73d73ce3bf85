"""User space's side of a VM: memory, attributes, vCPUs, and what it does about exits.

A `Gate` is the VMM's handle on one VM. It reaches the VM through ioctls only. An operation has two
forms: `punch_hole(...)` does it at once and raises `IoctlError` where KVM refuses;
`punch_hole_steps(...)` is the step generator, for schedules, and returns 0 or -errno.

Source: QEMU 10, accel/kvm/kvm-all.c and target/i386/kvm/tdx.c, for what a VMM does when.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from errno import EBADF, EIO
from typing import Any, NamedTuple

from tdxlab import steps
from tdxlab.arch import PAGE_SIZE
from tdxlab.guest import Access, Fetch, Guest, MapGpa, Program, Read, Write
from tdxlab.journal import Field, Table
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from tdxlab.kvm.exits import KvmExit
from tdxlab.kvm.gmem import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, GuestMemfds
from tdxlab.kvm.memory_region import kvm_vm_ioctl_set_memory_region
from tdxlab.kvm.set_attributes import kvm_vm_ioctl_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.user_memory import ProcessMemory
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.sizes import parse_size
from tdxlab.steps import Operation, Step
from tdxlab.vmm_errors import IoctlError, why_attributes, why_dead, why_punch, why_region
from tdxlab.vmm_run import PlayingHost, RunResult, run_steps

#: HVA at which the VMM maps the guest's shared memory: GPA 0 lies here.
HVA_BASE = 0x7F00_0000_0000

Progress = Callable[[int, int], None]


class Backing(NamedTuple):
    """One piece of guest memory as the VMM keeps it. gpa, size: bytes. gmem: guest_memfd, -1 for
    shared memory alone. hva: of its shared memory.
    """

    slot: int
    gpa: int
    size: int
    gmem: int
    hva: int

    @property
    def end(self) -> int:
        """First GPA behind it."""
        return self.gpa + self.size


class Gate:
    """One VM in the hands of its VMM.

    vm: KVM's side. guest: the software inside. host: the kernel. backings: guest memory, ascending.
    destroyed: all file descriptors are closed. discards: a conversion also throws away the page
    that the guest does not use any more (guest_memfd when it becomes shared). converts: False for a
    VMM that refuses every conversion.
    """

    backings: Field[tuple[Backing, ...]] = Field(())
    destroyed = Field(False)

    converts = Field(True)

    def __init__(self, host: PlayingHost, vm: Vm, guest: Guest, *, discards: bool = False) -> None:
        self.host = host
        self.vm = vm
        self.guest = guest
        self.discards = discards
        self.fields = Table(vm.journal)
        self.guest_memory = GuestMemfds(vm)
        self.user_memory = ProcessMemory(vm, host.pages)
        vm.guest_memory = self.guest_memory
        vm.user_memory = self.user_memory

    def __repr__(self) -> str:
        return self.vm.name

    # -- ioctls

    def ioctl(self, name: str, operation: Operation, why: Callable[[], str]) -> int:
        """Drive `operation` on an idle LP; returns what it returns, 0 or more.

        Raises IoctlError for -errno, with the text of `why`.
        """
        result: int = self._drive(name, operation)
        if result < 0:
            raise IoctlError(name, -result, why_dead(self.vm) if self.vm.vm_dead else why())
        return result

    def _drive(self, name: str, operation: Operation, lp: int | None = None) -> Any:
        """Run `operation` on `lp`, or an idle one. Refuses once the VM is dead or destroyed."""
        if self.destroyed:
            operation.close()
            raise IoctlError(name, EBADF, f"{self.vm.name} was destroyed; create another VM")
        if self.vm.vm_dead:
            operation.close()
            raise IoctlError(name, EIO, why_dead(self.vm))
        place = self.host.idle_lp() if lp is None else lp
        return steps.run(self.host.on_cpu(place, operation))

    def set_user_memory_region(
        self,
        slot: int,
        gpa: int,
        size: int | str,
        *,
        flags: int = 0,
        hva: int | None = None,
        gmem: int = -1,
        gmem_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2. size: 0 deletes the slot. hva: None for HVA_BASE + gpa.

        Raises IoctlError as `kvm_vm_ioctl_set_memory_region` refuses.
        """
        size = parse_size(size) if size else 0
        hva = HVA_BASE + gpa if hva is None else hva
        operation = self.set_user_memory_region_steps(
            slot, gpa, size, flags=flags, hva=hva, gmem=gmem, gmem_offset=gmem_offset
        )
        values = (slot, gpa, size, flags, hva, gmem, gmem_offset)
        self.ioctl("KVM_SET_USER_MEMORY_REGION2", operation, lambda: why_region(self.vm, *values))

    def set_user_memory_region_steps(
        self,
        slot: int,
        gpa: int,
        size: int,
        *,
        flags: int = 0,
        hva: int,
        gmem: int = -1,
        gmem_offset: int = 0,
    ) -> Operation:
        """As `set_user_memory_region`: returns 0 or -errno."""
        operation = kvm_vm_ioctl_set_memory_region(
            self.vm, slot, gpa, size, flags, hva, gmem, gmem_offset
        )
        return (yield from operation)

    def set_memory_attributes(self, gpa: int, size: int | str, *, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES. Raises IoctlError as `kvm_vm_ioctl_set_mem_attributes`
        refuses.
        """
        size = parse_size(size)
        operation = self.set_memory_attributes_steps(gpa, size, private=private)
        why = lambda: why_attributes(self.vm, gpa, size)  # noqa: E731
        self.ioctl("KVM_SET_MEMORY_ATTRIBUTES", operation, why)

    def set_memory_attributes_steps(self, gpa: int, size: int, *, private: bool) -> Operation:
        """As `set_memory_attributes`: returns 0 or -errno."""
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        return (yield from kvm_vm_ioctl_set_mem_attributes(self.vm, gpa, size, attributes))

    def punch_hole(self, gpa: int, size: int | str) -> None:
        """fallocate(2) punches the guest_memfd pages behind these GPAs out: their data is lost.

        Raises IoctlError for what fallocate refuses, ValueError for GPAs without a guest_memfd.
        """
        size = parse_size(size)
        backing = self._backing(gpa, size)
        if backing is None or backing.gmem < 0:
            raise ValueError(
                f"GPAs {gpa:#x}..{gpa + size - 1:#x} have no guest_memfd; "
                f"those that have: {self._places()}"
            )
        why = lambda: why_punch(backing.gmem, gpa - backing.gpa, size)  # noqa: E731
        self.ioctl("fallocate", self.punch_hole_steps(gpa, size), why)

    def punch_hole_steps(self, gpa: int, size: int) -> Operation:
        """As `punch_hole`: returns 0 or -errno."""
        backing = self._backing(gpa, size)
        if backing is None or backing.gmem < 0:
            return -EBADF
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        operation = self.guest_memory.fallocate(backing.gmem, mode, gpa - backing.gpa, size)
        return (yield from operation)

    # -- memory

    def add_memory(self, gpa: int, size: int | str, *, private: bool = True) -> Backing:
        """Give the guest memory at `gpa`: a mapping for what is shared, with `private` also a
        guest_memfd, the slot, and the PRIVATE attribute. Returns how it is backed.

        Raises IoctlError or ValueError as the ioctls refuse.
        """
        size = parse_size(size)
        slot = len(self.backings)
        gmem = self._create_guest_memfd(size) if private else -1
        flags = KVM_MEM_GUEST_MEMFD if private else 0
        self.set_user_memory_region(slot, gpa, size, flags=flags, gmem=gmem)
        backing = Backing(slot, gpa, size, gmem, HVA_BASE + gpa)
        self.user_memory.mmap(backing.hva, size)
        self.backings = tuple(sorted((*self.backings, backing), key=lambda b: b.gpa))
        if private:
            self.set_memory_attributes(gpa, size, private=True)
        return backing

    def _create_guest_memfd(self, size: int) -> int:
        number = self.guest_memory.create(size)
        if number < 0:
            raise IoctlError(
                "KVM_CREATE_GUEST_MEMFD",
                -number,
                f"a size of {size:#x} bytes; give a multiple of {PAGE_SIZE:#x}",
            )
        return number

    def _backing(self, gpa: int, size: int = 1) -> Backing | None:
        """The memory that has all of these GPAs (without the SHARED bit)."""
        for backing in self.backings:
            if backing.gpa <= gpa and gpa + size <= backing.end:
                return backing
        return None

    def _places(self) -> str:
        """The GPAs that have memory, for people."""
        return ", ".join(f"{b.gpa:#x}..{b.end - 1:#x}" for b in self.backings) or "none"

    def read_shared(self, gpa: int, size: int) -> bytes:
        """What the VMM sees at these GPAs of one page: its own mapping, the guest's shared memory.

        Refuses GPAs without memory: ValueError.
        """
        return self.user_memory.read(self._hva(gpa, size), size)

    def write_shared(self, gpa: int, data: bytes) -> None:
        """As `read_shared`, the other way."""
        self.user_memory.write(self._hva(gpa, len(data)), data)

    def _hva(self, gpa: int, size: int) -> int:
        backing = self._backing(gpa & ~self.guest.shared_mask, size)
        if backing is None:
            raise ValueError(f"GPA {gpa:#x} has no memory; GPAs that have: {self._places()}")
        return backing.hva + (gpa & ~self.guest.shared_mask) - backing.gpa

    # -- running

    def vcpu(self, number: int) -> Vcpu:
        """vCPU `number` of this VM. Refuses one that it does not have: ValueError."""
        for vcpu in self.vm.vcpus:
            if vcpu.vcpu_id == number:
                return vcpu
        have = ", ".join(str(vcpu.vcpu_id) for vcpu in self.vm.vcpus) or "none"
        raise ValueError(f"{self.vm.name} has no vCPU {number!r}; it has {have}")

    def run(
        self,
        program: Program,
        *,
        vcpu: int | Vcpu = 0,
        lp: int | None = None,
    ) -> RunResult:
        """KVM_RUN, again and again, until the program has ended or cannot go on.

        vcpu: number, or the vCPU itself. lp: where it runs; None for LP number modulo LPs.
        Refuses a vCPU of another VM, an LP that does not exist: ValueError.
        """
        found = self._own_vcpu(vcpu)
        lp = self._lp_for(found) if lp is None else lp
        self.host.hardware.cpu.require_lp(lp)
        result: RunResult = self._drive("KVM_RUN", run_steps(self, found, program), lp)
        return result

    def run_steps(
        self, program: Program, *, vcpu: int | Vcpu = 0, lp: int | None = None
    ) -> Operation:
        """As `run`, as a thread for schedules: returns the RunResult."""
        found = self._own_vcpu(vcpu)
        place = self._lp_for(found) if lp is None else lp
        return self.host.on_cpu(place, run_steps(self, found, program))

    def kvm_run(self, vcpu: Vcpu) -> Generator[Step, None, KvmExit]:
        """KVM_RUN on the current LP."""
        raise NotImplementedError(f"{self.vm.name} is of no type that can run")

    def answer(self, vcpu: Vcpu, **values: int) -> None:
        """Leave what KVM asked for in `struct kvm_run`: hypercall_ret or mmio_data."""
        for name, value in values.items():
            setattr(vcpu, name, value)

    def device(self, gpa: int, size: int, data: int | None) -> int:
        """What a device at `gpa` does: nobody is there, so reads give ones, and writes are lost.

        size: bytes. data: what is written, None for a read.
        """
        return (1 << 8 * size) - 1

    def _own_vcpu(self, vcpu: int | Vcpu) -> Vcpu:
        if isinstance(vcpu, int):
            return self.vcpu(vcpu)
        if vcpu.vm is not self.vm:
            raise ValueError(f"{vcpu!r} cannot run {self.vm.name}; use one of {self.vm.vcpus}")
        return vcpu

    def _lp_for(self, vcpu: Vcpu) -> int:
        return vcpu.vcpu_id % self.host.hardware.cpu.count

    # -- for people: what the guest does, by the addresses of its memory

    def touch(
        self,
        gpa: int,
        size: int | str = 1,
        *,
        write: bool = True,
        vcpu: int | Vcpu = 0,
        progress: Progress | None = None,
    ) -> RunResult:
        """The guest uses one byte of each page of `size` bytes at `gpa`, in the way in which its
        page tables map them: shared where it has converted them. progress: told (done, in all).
        """
        size = parse_size(size)
        pages = range(gpa & -PAGE_SIZE, gpa + size, PAGE_SIZE)
        return self.run(self._touching(gpa, pages, write, progress), vcpu=vcpu)

    def _touching(
        self, gpa: int, pages: range, write: bool, progress: Progress | None
    ) -> Iterator[Access]:
        """The program behind `touch`."""
        alias = self.guest.alias
        for number, page in enumerate(pages):
            byte = alias(max(page, gpa))
            yield Write(byte) if write else Read(byte, 1)
            if progress is not None:
                progress(number + 1, len(pages))

    def fetch(self, gpa: int, *, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest runs an instruction at `gpa`."""
        return self.run([Fetch(self.guest.alias(gpa))], vcpu=vcpu)

    def write(self, gpa: int, data: bytes, *, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest writes `data` at `gpa`, shared where it has converted the page."""
        return self.run([Write(self.guest.alias(gpa), data)], vcpu=vcpu)

    def read(self, gpa: int, size: int, *, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest reads; the result's `value` are the bytes."""
        return self.run([Read(self.guest.alias(gpa), size)], vcpu=vcpu)

    def convert(self, gpa: int, size: int | str, *, to: str, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest has these bytes converted: to="shared" or to="private".

        It asks with MapGPA, the VMM sets the attributes, the guest accepts what became private.
        Refuses another word, GPAs that are not whole pages, that have the SHARED bit, or that have
        no memory: ValueError.
        """
        size = parse_size(size)
        self._require_convertible(gpa, size, to)
        asked = gpa | (self.guest.shared_mask if to == "shared" else 0)
        return self.run([MapGpa(asked, size)], vcpu=vcpu)

    def _require_convertible(self, gpa: int, size: int, to: str) -> None:
        if to not in ("shared", "private"):
            raise ValueError(f"memory cannot become {to!r}; choose 'shared' or 'private'")
        if gpa & self.guest.shared_mask:
            raise ValueError(
                f"GPA {gpa:#x} has the SHARED bit; give {gpa & ~self.guest.shared_mask:#x} "
                "and say with `to` what it shall become"
            )
        if gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(
                f"{size:#x} bytes at GPA {gpa:#x} are not whole pages; both must be multiples of "
                f"{PAGE_SIZE:#x}"
            )
        if self._backing(gpa, size) is None:
            raise ValueError(
                f"GPAs {gpa:#x}..{gpa + size - 1:#x} have no memory; those that have: "
                f"{self._places()}"
            )

    def close_files_steps(self) -> Operation:
        """The process ends: first its memory goes, then its guest_memfd files are closed.

        Source: Linux 6.16, kernel/exit.c, do_exit (exit_mm, then exit_files).
        """
        yield from self.user_memory.exit()
        for backing in self.backings:
            if backing.gmem >= 0:
                yield from self.guest_memory.release(backing.gmem)

    # -- what the VMM does about exits

    def convert_steps(self, gpa: int, size: int, *, private: bool) -> Operation:
        """The VMM's part of a conversion: attributes, and what is thrown away. Returns 0 or -errno.

        Source: QEMU, accel/kvm/kvm-all.c, kvm_convert_memory.
        """
        ret = yield from self.set_memory_attributes_steps(gpa, size, private=private)
        if ret or not self.discards:
            return ret
        backing = self._backing(gpa, size)
        if backing is None:
            return 0
        if private:
            hva = backing.hva + gpa - backing.gpa
            yield from self.user_memory.munmap(hva, size)
            self.user_memory.mmap(hva, size)
            return 0
        return (yield from self.punch_hole_steps(gpa, size))
