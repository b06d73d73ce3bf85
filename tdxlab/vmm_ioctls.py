"""The ioctls of a VM, as its VMM uses them.

An operation has two forms: `punch_hole(...)` does it at once and raises `IoctlError` where KVM
refuses; `punch_hole_steps(...)` is the step generator, for schedules, and returns 0 or -errno.

Source: QEMU 10, accel/kvm/kvm-all.c, for what a VMM does when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EBADF, EIO
from typing import Any, NamedTuple

from tdxlab import steps
from tdxlab.accesses import pages_of
from tdxlab.arch import PAGE_SIZE
from tdxlab.arguments import checked, explained
from tdxlab.guest import Guest
from tdxlab.journal import Field, Fields, Journal, Journalled
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from tdxlab.kvm.gmem import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, GuestMemfds
from tdxlab.kvm.memory_region import kvm_vm_ioctl_set_memory_region
from tdxlab.kvm.set_attributes import kvm_vm_ioctl_set_mem_attributes
from tdxlab.kvm.slot_policy import choose_slot_policy
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.user_memory import ProcessMemory
from tdxlab.kvm.vm import Vm
from tdxlab.sizes import parse_size
from tdxlab.steps import Operation
from tdxlab.vmm_errors import IoctlError, why_attributes, why_dead, why_punch, why_region
from tdxlab.vmm_run import PlayingHost

#: HVA at which the VMM maps the guest's shared memory: GPA 0 lies here.
HVA_BASE = 0x7F00_0000_0000

Progress = Callable[[int, int], None]
#: Answers a conversion: (gpa, size in bytes, to private, nobody asked) -> 0 or -errno.
Converter = Callable[[int, int, bool, bool], Operation]


@contextmanager
def unchanged_on_failure(journal: Journal) -> Iterator[None]:
    """What is done inside is taken back if it ends with an error."""
    mark = journal.mark()
    try:
        yield
    except Exception:
        journal.rewind(mark)
        raise
    finally:
        journal.forget(mark)


class Gauge(NamedTuple):
    """How far an operation is, by its steps. labels: of the steps that do one page each. total:
    pages at most. progress: told (done, in all).
    """

    labels: frozenset[str]
    total: int
    progress: Progress

    def watch(self, operation: Operation) -> Operation:
        """The operation itself; tells its progress on the way."""
        done = 0
        while True:
            try:
                step = next(operation)
            except StopIteration as end:
                self.progress(self.total, self.total)
                return end.value
            if step[0] in self.labels and done < self.total - 1:
                done += 1
                self.progress(done, self.total)
            yield step


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


class Ioctls(Journalled):
    """The ioctls of one VM, and the memory that its VMM gives it with them.

    vm: KVM's side. guest: the software inside. host: the kernel. backings: guest memory, ascending.
    destroyed: all file descriptors are closed. discards: a conversion also throws away the page
    that the guest does not use any more (guest_memfd when it becomes shared). converts: False for a
    VMM that refuses every conversion. converter: does conversions in the place of the VMM's own
    code; None in all that is meant to be a VMM as there are.
    """

    backings: Field[tuple[Backing, ...]] = Field(())
    destroyed = Field(False)
    converts = Field(True)

    def __init__(self, host: PlayingHost, vm: Vm, guest: Guest, *, discards: bool = False) -> None:
        self.host = host
        self.vm = vm
        self.guest = guest
        self.discards = discards
        self.converter: Converter | None = None
        self.fields = Fields(vm.journal, self)
        self.guest_memory = GuestMemfds(vm)
        self.user_memory = ProcessMemory(vm, host.pages)
        vm.guest_memory = self.guest_memory
        vm.user_memory = self.user_memory
        host.add_vm(vm)

    def __repr__(self) -> str:
        return self.vm.name

    # -- ioctls

    def ioctl(self, name: str, operation: Operation, why: Callable[[], str]) -> int:
        """Drive `operation` on an idle LP; returns what it returns, 0 or more.

        Raises IoctlError for -errno, with the text of `why`.
        """
        result: int = self.drive(name, operation)
        if result < 0:
            raise IoctlError(name, -result, why_dead(self.vm) if self.vm.vm_dead else why())
        return result

    def require_alive(self, name: str) -> None:
        """Refuse an ioctl once the VM is destroyed (EBADF) or dead (EIO): IoctlError."""
        if self.destroyed:
            raise IoctlError(name, EBADF, f"{self.vm.name} was destroyed; create another VM")
        if self.vm.vm_dead:
            raise IoctlError(name, EIO, why_dead(self.vm))

    def drive(
        self,
        name: str,
        operation: Operation,
        lp: int | None = None,
        gauge: Gauge | None = None,
    ) -> Any:
        """Run `operation` on `lp`, or an idle one. Refuses once the VM is dead or destroyed."""
        try:
            self.require_alive(name)
        except IoctlError:
            operation.close()
            raise
        return self.run_thread(operation, lp, gauge)

    def run_thread(
        self, operation: Operation, lp: int | None = None, gauge: Gauge | None = None
    ) -> Any:
        """Run `operation` as a thread on `lp`, or an idle one, to its end; returns its result."""
        thread = self.host.on_cpu(self.host.idle_lp() if lp is None else lp, operation)
        return steps.run(thread if gauge is None else gauge.watch(thread))

    @checked
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

    @checked
    def choose_slot_policy(self, policy: str | None, slot: int | None = None) -> None:
        """From now on a memslot that is deleted goes by "F" (zap all), "T" (zap leaves) or "B"
        (block); None: as Linux 6.16 decides. slot: its number; None for all.

        Refuses as `kvm.slot_policy.choose_slot_policy`: ValueError. Differs: no kernel offers this.
        """
        choose_slot_policy(self.vm, policy, slot)

    @checked
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

    @checked
    def punch_hole(self, gpa: int, size: int | str) -> None:
        """fallocate(2) punches the guest_memfd pages behind these GPAs out: their data is lost.

        Raises IoctlError for what fallocate refuses, ValueError for GPAs without a guest_memfd.
        """
        size = parse_size(size)
        backing = self.backing_of(gpa, size)
        if backing is None or backing.gmem < 0:
            raise ValueError(
                f"GPAs {gpa:#x}..{gpa + size - 1:#x} have no guest_memfd; "
                f"those that have: {self.places()}"
            )
        why = lambda: why_punch(backing.gmem, gpa - backing.gpa, size)  # noqa: E731
        self.ioctl("fallocate", self.punch_hole_steps(gpa, size), why)

    def punch_hole_steps(self, gpa: int, size: int) -> Operation:
        """As `punch_hole`: returns 0 or -errno."""
        backing = self.backing_of(gpa, size)
        if backing is None or backing.gmem < 0:
            return -EBADF
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        operation = self.guest_memory.fallocate(backing.gmem, mode, gpa - backing.gpa, size)
        return (yield from operation)

    # -- memory

    @checked
    def add_memory(self, gpa: int, size: int | str, *, private: bool = True) -> Backing:
        """Give the guest memory at `gpa`: a mapping for what is shared, with `private` also a
        guest_memfd, the slot, and the PRIVATE attribute. Returns how it is backed.

        Raises IoctlError or ValueError as the ioctls refuse.
        """
        size = parse_size(size)
        slot = len(self.backings)
        with unchanged_on_failure(self.vm.journal):
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
        self.require_alive("KVM_CREATE_GUEST_MEMFD")
        number = self.guest_memory.create(size)
        if number < 0:
            raise IoctlError(
                "KVM_CREATE_GUEST_MEMFD",
                -number,
                f"a size of {size:#x} bytes; give a multiple of {PAGE_SIZE:#x}",
            )
        return number

    @explained
    def backing_of(self, gpa: int, size: int = 1) -> Backing | None:
        """The memory that has all of these GPAs (without the SHARED bit)."""
        for backing in self.backings:
            if backing.gpa <= gpa and gpa + size <= backing.end:
                return backing
        return None

    def places(self) -> str:
        """The GPAs that have memory, for people."""
        return ", ".join(f"{b.gpa:#x}..{b.end - 1:#x}" for b in self.backings) or "none"

    @checked
    def read_shared(self, gpa: int, size: int) -> bytes:
        """What the VMM sees at these GPAs: its own mapping, the guest's shared memory.

        Refuses GPAs without memory: ValueError.
        """
        hva = self._hva(gpa, size)
        return b"".join(self.user_memory.read(*piece) for piece in pages_of(hva, size))

    @checked
    def write_shared(self, gpa: int, data: bytes) -> None:
        """As `read_shared`, the other way."""
        hva = self._hva(gpa, len(data))
        for start, length in pages_of(hva, len(data)):
            self.user_memory.write(start, data[start - hva : start - hva + length])

    def _hva(self, gpa: int, size: int) -> int:
        backing = self.backing_of(gpa & ~self.guest.shared_mask, size)
        if backing is None:
            raise ValueError(f"GPA {gpa:#x} has no memory; GPAs that have: {self.places()}")
        return backing.hva + (gpa & ~self.guest.shared_mask) - backing.gpa

    def close_files_steps(self) -> Operation:
        """The process ends: first its memory goes, then its guest_memfd files are closed.

        Source: Linux 6.16, kernel/exit.c, do_exit (exit_mm, then exit_files).
        """
        yield from self.user_memory.exit()
        for backing in self.backings:
            if backing.gmem >= 0:
                yield from self.guest_memory.release(backing.gmem)

    def convert_steps(
        self, gpa: int, size: int, *, private: bool, implicit: bool = False
    ) -> Operation:
        """The VMM's part of a conversion: attributes, and what is thrown away. Returns 0 or -errno.

        implicit: the guest did not ask, but has used the memory as the other kind.
        Source: QEMU, accel/kvm/kvm-all.c, kvm_convert_memory.
        """
        if self.converter is not None:
            return (yield from self.converter(gpa, size, private, implicit))
        ret = yield from self.set_memory_attributes_steps(gpa, size, private=private)
        if ret or not self.discards:
            return ret
        backing = self.backing_of(gpa, size)
        if backing is None:
            return 0
        if private:
            return (yield from self.discard_steps(gpa, size))
        return (yield from self.punch_hole_steps(gpa, size))

    def discard_steps(self, gpa: int, size: int) -> Operation:
        """The VMM throws the shared pages of these GPAs away, and keeps the mapping. Returns 0, or
        -EBADF for GPAs without memory.

        Source: QEMU, accel/kvm/kvm-all.c, kvm_convert_memory. Differs: the pages are unmapped, and
        the place is mapped anew.
        """
        backing = self.backing_of(gpa, size)
        if backing is None:
            return -EBADF
        hva = backing.hva + gpa - backing.gpa
        yield from self.user_memory.munmap(hva, size)
        self.user_memory.mmap(hva, size)
        return 0
