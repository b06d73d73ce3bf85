"""User space's side of a VM: its vCPUs, and what its guest does, in a person's words.

A `Gate` is the VMM's handle on one VM. It reaches the VM through ioctls only.

Source: QEMU 10, accel/kvm/kvm-all.c and target/i386/kvm/tdx.c, for what a VMM does when.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from tdxlab.accesses import pages_of
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_1G
from tdxlab.arguments import checked, explained
from tdxlab.guest import Access, Fetch, MapGpa, Program, Read, Write
from tdxlab.kvm.exits import KvmExit
from tdxlab.kvm.vm import Vcpu
from tdxlab.sizes import format_size, parse_size
from tdxlab.steps import Operation, Step
from tdxlab.vmm_ioctls import Gauge, Ioctls, Progress
from tdxlab.vmm_run import RunResult, run_steps

#: Bytes that a guest touches, and reads, in one go: more would take hours, or all memory.
TOUCH_LIMIT, READ_LIMIT = 64 * SIZE_1G, SIZE_1G
#: Steps that convert one page each.
_CONVERTING = frozenset(("TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.AUG"))


class Gate(Ioctls):
    """One VM in the hands of its VMM."""

    # -- running

    @checked
    def vcpu(self, number: int) -> Vcpu:
        """vCPU `number` of this VM. Refuses one that it does not have: ValueError."""
        for vcpu in self.vm.vcpus:
            if vcpu.vcpu_id == number:
                return vcpu
        have = ", ".join(str(vcpu.vcpu_id) for vcpu in self.vm.vcpus) or "none"
        raise ValueError(f"{self.vm.name} has no vCPU {number!r}; it has {have}")

    @checked
    def run(
        self,
        program: Program,
        *,
        vcpu: int | Vcpu = 0,
        lp: int | None = None,
        gauge: Gauge | None = None,
    ) -> RunResult:
        """KVM_RUN, again and again, until the program has ended or cannot go on.

        vcpu: number, or the vCPU itself. lp: where it runs; None for its number modulo the
        number of LPs. gauge: tells how far it is.
        Refuses a vCPU of another VM, an LP that does not exist, a list with something that is no
        access: ValueError. What a generator raises comes out when the vCPU has left the guest.
        """
        self.require_alive("KVM_RUN")
        found = self.own_vcpu(vcpu)
        if isinstance(program, Collection):
            for access in program:
                self.guest.require(access)
        lp = self.lp_for(found) if lp is None else lp
        self.host.hardware.cpu.require_lp(lp)
        operation = run_steps(self, found, program)
        result: RunResult = self.drive("KVM_RUN", operation, lp, gauge)
        return result

    @checked
    def run_steps(
        self, program: Program, *, vcpu: int | Vcpu = 0, lp: int | None = None
    ) -> Operation:
        """As `run`, as a thread for schedules: returns the RunResult."""
        found = self.own_vcpu(vcpu)
        place = self.lp_for(found) if lp is None else lp
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

    @checked
    def own_vcpu(self, vcpu: int | Vcpu) -> Vcpu:
        """The vCPU of this VM that is meant; one of another VM is refused: ValueError."""
        if isinstance(vcpu, int):
            return self.vcpu(vcpu)
        if vcpu.vm is not self.vm:
            raise ValueError(f"{vcpu!r} cannot run {self.vm.name}; use one of {self.vm.vcpus}")
        return vcpu

    @explained
    def lp_for(self, vcpu: Vcpu) -> int:
        """The LP where a vCPU runs if nobody says otherwise."""
        return vcpu.vcpu_id % self.host.hardware.cpu.count

    # -- for people: what the guest does, by the addresses of its memory

    @checked
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
        Refuses more than TOUCH_LIMIT bytes: ValueError.
        """
        size = parse_size(size)
        self.guest.require_gpa(gpa, size)
        _require_at_most(TOUCH_LIMIT, size)
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

    @checked
    def fetch(self, gpa: int, *, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest runs an instruction at `gpa`."""
        return self.run([Fetch(self.guest.alias(gpa))], vcpu=vcpu)

    @checked
    def write(self, gpa: int, data: bytes, *, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest writes `data` at `gpa`, page by page, shared where it has converted a page."""
        self.guest.require_gpa(gpa, len(data))
        pieces = [
            Write(self.guest.alias(start), data[start - gpa : start - gpa + length])
            for start, length in pages_of(gpa, len(data))
        ]
        return self.run(pieces, vcpu=vcpu)

    @checked
    def read(self, gpa: int, size: int, *, vcpu: int | Vcpu = 0) -> RunResult:
        """The guest reads, as `write`; the result's `value` are the bytes that it got.

        Refuses more than READ_LIMIT bytes: ValueError.
        """
        self.guest.require_gpa(gpa, size)
        _require_at_most(READ_LIMIT, size)
        pieces = [Read(self.guest.alias(start), length) for start, length in pages_of(gpa, size)]
        result = self.run(pieces, vcpu=vcpu)
        return result._replace(answers=(b"".join(result.answers),) if result.answers else ())

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
        """The guest has these bytes converted: to="shared" or to="private".

        It asks with MapGPA, the VMM sets the attributes, the guest accepts what became private.
        progress: told (pages done, in all).
        Refuses another word, GPAs that are not whole pages, that have the SHARED bit, or that have
        no memory: ValueError.
        """
        size = parse_size(size)
        self.require_convertible(gpa, size, to)
        asked = gpa | (self.guest.shared_mask if to == "shared" else 0)
        gauge = Gauge(_CONVERTING, size >> PAGE_SHIFT, progress) if progress else None
        return self.run([MapGpa(asked, size)], vcpu=vcpu, gauge=gauge)

    @checked
    def require_convertible(self, gpa: int, size: int, to: str) -> None:
        """Refuse, with a ValueError, what `convert` refuses."""
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
        if self.backing_of(gpa, size) is None:
            raise ValueError(
                f"GPAs {gpa:#x}..{gpa + size - 1:#x} have no memory; those that have: "
                f"{self.places()}"
            )


def _require_at_most(limit: int, size: int) -> None:
    if size > limit:
        raise ValueError(f"{format_size(size)} in one go; give at most {format_size(limit)}")
