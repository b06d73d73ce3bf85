"""A TD beside a simple model of what its memory holds: gfn -> unmapped, pending, private with a
value, shared with a value. A value is the first byte of a page.
"""

from __future__ import annotations

from tdxlab import Machine
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.guest import Access, MapGpa, Read, Write
from tdxlab.invariants.host_picture import VmPicture
from tdxlab.kvm.dirty import kvm_get_dirty_log_protect
from tdxlab.kvm.fault import kvm_vcpu_pre_fault_memory
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.tdx_associate import tdx_vcpu_load
from tdxlab.steps import Operation
from tdxlab.vmm_ioctls import HVA_BASE, Backing
from tdxlab.vmm_run import RunResult

PRIVATE, SHARED = "private", "shared"

#: Pages of each of the two memories that have both kinds; the second begins in another table.
PAGES = 24
SECOND = 1 << 21 >> PAGE_SHIFT
#: A memory that is only shared: 2 MiB that the VMM maps as one page.
LARGE, LARGE_PAGES = 1 << 22 >> PAGE_SHIFT, 512
LARGE_SLOT = 7
FIRMWARE = b"\x90" * 100

#: A page that the guest has not accepted; a value that is not known.
PENDING, UNKNOWN = -1, -2


#: What is mapped: private pages with their values, shared pages.
Model = tuple[dict[int, int], set[int]]


class Life:
    """A TD, and the model of it.

    private: gfn -> value, PENDING or UNKNOWN, of private pages that are mapped. mapped_shared: gfns
    of shared pages that are mapped. shared: gfn -> value of the VMM's memory; 0 where there is
    nothing. gone: slots that are deleted. written: gfns of the large memory since its log was read
    last, None while it is not logged.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.td = td = machine.create_td(vcpus=2, memory=PAGES * PAGE_SIZE, launch=False)
        td.add_memory(SECOND << PAGE_SHIFT, PAGES * PAGE_SIZE)
        td.add_image(0, FIRMWARE)
        td.finalize()
        td.guest.accepted.put(0, None)
        td.user_memory.mmap(HVA_BASE + (LARGE << PAGE_SHIFT), LARGE_PAGES * PAGE_SIZE, level=2)
        self.private: dict[int, int] = {0: FIRMWARE[0]}
        self.mapped_shared: set[int] = set()
        self.shared: dict[int, int] = {}
        self.gone: set[int] = set()
        self.written: set[int] | None = None
        self.set_large(0)

    def copy(self) -> Life:
        """The same TD with a model of its own: for another run from the same moment."""
        copied = object.__new__(Life)
        copied.__dict__ = {**vars(self), "private": dict(self.private), "shared": {}}
        copied.mapped_shared, copied.gone = set(self.mapped_shared), set(self.gone)
        return copied

    def model(self) -> Model:
        """What the tables are compared with."""
        return dict(self.private), set(self.mapped_shared)

    @property
    def is_alive(self) -> bool:
        """False once something ended it: then it can only be destroyed."""
        return not self.td.vm.vm_dead

    def kind(self, gfn: int) -> str:
        """How the guest uses a page."""
        return SHARED if gfn in self.td.guest.shared else PRIVATE

    def backing(self, gfn: int) -> Backing:
        """The memory of a page."""
        return self.td.backings[gfn >= SECOND]

    def gfns(self, gfn: int, size: int) -> range:
        """`size` pages from `gfn` on, as far as the memory goes."""
        return range(gfn, min(gfn + size, self.backing(gfn).end >> PAGE_SHIFT))

    def has_slot(self, gfn: int) -> bool:
        """False while the slot is deleted."""
        return self.backing(gfn).slot not in self.gone

    def hva(self, gfn: int) -> int:
        """Where the VMM has a page."""
        backing = self.backing(gfn)
        return backing.hva + (gfn << PAGE_SHIFT) - backing.gpa

    # -- what the guest does

    def use(self, gfns: range, value: int | None, vcpu: int) -> RunResult:
        """The guest writes `value` to pages as it has them, or reads them."""
        return self.td.run(self.program(gfns, value), vcpu=vcpu)

    def program(self, gfns: range, value: int | None) -> list[Access]:
        """The guest's program behind `use`."""
        gpas = [self.td.guest.alias(gfn << PAGE_SHIFT) for gfn in gfns]
        return [Read(gpa, 1) if value is None else Write(gpa, bytes([value])) for gpa in gpas]

    def used(self, gfns: range, value: int | None) -> None:
        """The model of it."""
        for gfn in gfns:
            if self.kind(gfn) == SHARED:
                self.mapped_shared.add(gfn)
                if value is not None:
                    self.shared[gfn] = value
            elif value is not None:
                self.private[gfn] = value
            elif self.private.get(gfn, PENDING) == PENDING:
                self.private[gfn] = 0

    def value(self, gfn: int) -> int:
        """What the guest reads, or UNKNOWN."""
        if self.kind(gfn) == SHARED:
            return self.shared.get(gfn, 0)
        return max(self.private.get(gfn, PENDING), 0) if self.is_known(gfn) else UNKNOWN

    def is_known(self, gfn: int) -> bool:
        """False for a private page of which only the schedule knows the value."""
        return self.private.get(gfn) != UNKNOWN

    def use_large(self, gfn: int, value: int | None) -> RunResult:
        """As `use`, one page of the large memory."""
        gpa = gfn << PAGE_SHIFT | self.td.guest.shared_mask
        access: Access = Read(gpa, 1) if value is None else Write(gpa, bytes([value]))
        result = self.td.run([access])
        if value is not None:
            self.shared[gfn] = value
            if self.written is not None:
                self.written.add(gfn)
        return result

    def convert(self, gfns: range, to: str) -> RunResult:
        """The guest has pages converted."""
        bit = self.td.guest.shared_mask if to == SHARED else 0
        gpa = gfns.start << PAGE_SHIFT | bit
        return self.td.run([MapGpa(gpa, len(gfns) * PAGE_SIZE)])

    def converted(self, gfns: range, to: str) -> None:
        """The model of it: what becomes private is accepted at once, and empty."""
        self.lose(gfns, PRIVATE if to == SHARED else SHARED)
        if to == PRIVATE:
            for gfn in gfns:
                if self.private.get(gfn, PENDING) == PENDING:
                    self.private[gfn] = 0

    # -- what the VMM and the host do

    def lose(self, gfns: range, kind: str) -> None:
        """The model: nothing maps these as `kind` any more; the guest is told."""
        for gfn in gfns:
            if kind == SHARED:
                self.mapped_shared.discard(gfn)
                continue
            self.private.pop(gfn, None)
            if gfn in self.td.guest.accepted:
                self.td.guest.accepted.drop(gfn)

    def forget(self, gfns: range) -> None:
        """The model: only the tables know what a schedule has left of these."""
        found = self.found()
        accepted = self.td.guest.accepted
        for gfn in gfns:
            self.private.pop(gfn, None)
            self.mapped_shared.discard(gfn)
            if found.get(gfn) == SHARED:
                self.mapped_shared.add(gfn)
            elif found.get(gfn) == PRIVATE:
                self.private[gfn] = UNKNOWN if gfn in accepted else PENDING
            elif gfn in accepted:
                accepted.drop(gfn)

    def prefaulting(self, vcpu: int, gfns: range) -> Operation:
        """KVM_PRE_FAULT_MEMORY."""
        found = self.td.vcpu(vcpu)
        assert isinstance(found, TdxVcpu)
        yield from tdx_vcpu_load(found)
        size = len(gfns) * PAGE_SIZE
        return (yield from kvm_vcpu_pre_fault_memory(found, gfns.start << PAGE_SHIFT, size))

    def prefaulted(self, gfns: range) -> None:
        """The model of it: a private page that was not there waits for the guest."""
        for gfn in gfns:
            if not self.td.vm.attributes.is_private(gfn):
                self.mapped_shared.add(gfn)
            else:
                self.private.setdefault(gfn, PENDING)

    def punching(self, gfns: range) -> Operation:
        """fallocate(2) punches private pages out."""
        return self.td.punch_hole_steps(gfns.start << PAGE_SHIFT, len(gfns) * PAGE_SIZE)

    def remapping(self, gfns: range) -> Operation:
        """munmap and mmap of the VMM's pages: the MMU notifier."""
        hva, size = self.hva(gfns.start), len(gfns) * PAGE_SIZE
        yield from self.td.user_memory.munmap(hva, size)
        self.td.user_memory.mmap(hva, size)

    def remapped(self, gfns: range) -> None:
        """The model of it: the memory is new."""
        self.lose(gfns, SHARED)
        for gfn in gfns:
            self.shared.pop(gfn, None)

    def setting_slot(self, backing: Backing, size: int) -> Operation:
        """KVM_SET_USER_MEMORY_REGION2 of a slot, or its deletion."""
        return self.td.set_user_memory_region_steps(
            backing.slot,
            backing.gpa,
            size,
            flags=KVM_MEM_GUEST_MEMFD,
            hva=backing.hva,
            gmem=backing.gmem,
        )

    def set_large(self, flags: int) -> None:
        """Let the large memory be a slot with these flags."""
        self.td.set_user_memory_region(
            LARGE_SLOT, LARGE << PAGE_SHIFT, LARGE_PAGES * PAGE_SIZE, flags=flags
        )
        self.written = set() if flags & KVM_MEM_LOG_DIRTY_PAGES else None

    def dirty(self) -> set[int]:
        """KVM_GET_DIRTY_LOG of the large memory; it is watched anew."""
        slot = self.td.vm.slots.find(LARGE)
        assert slot is not None
        error, gfns = self.td.drive("log", kvm_get_dirty_log_protect(self.td.vm, slot))
        assert error == 0
        self.written = set()
        return set(gfns)

    # -- model against tables

    def found(self) -> dict[int, str]:
        """gfn -> kind of what mirror and direct root map of the two memories."""
        direct_bits = self.td.vm.gfn_direct_bits
        return {
            leaf.gfn & ~direct_bits: PRIVATE if leaf.is_mirror else SHARED
            for leaf in VmPicture(self.td.vm).leaves
            if leaf.gfn & ~direct_bits < LARGE
        }

    def expect_model(self) -> None:
        """The tables map what the model says; what the guest has accepted it has not lost."""
        expected = dict.fromkeys(self.private, PRIVATE) | dict.fromkeys(self.mapped_shared, SHARED)
        assert self.found() == expected
        pending = {gfn for gfn, value in self.private.items() if value == PENDING}
        assert not pending & set(self.td.guest.accepted)
