"""Flags, type or shared bit: what becomes of a VM if code finds out in one of three ways.

    wrong_rows()                         # which questions each way answers wrong
    trial_rows()                         # what then happens to real VMs, hypothetical ones too

Each trial takes a new VM through the same few deeds. Nobody runs its vCPU; faults are made by hand,
with the error code that its hardware would give, and a mirror's hooks only count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from tdxlab.kvm.external import Hook
from tdxlab.kvm.fault import kvm_mmu_page_fault, kvm_vcpu_pre_fault_memory
from tdxlab.kvm.gmem import GuestMemfds
from tdxlab.kvm.memory_region import kvm_vm_ioctl_set_memory_region
from tdxlab.kvm.page_fault import PFERR_PRIVATE_ACCESS, PFERR_WRITE_MASK, RET_PF_FIXED
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, VmConfig, gfn_shared_bit
from tdxlab.kvm.roots import kvm_mmu_reload
from tdxlab.kvm.set_attributes import kvm_vm_ioctl_set_mem_attributes
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.tdp_set import HostBug
from tdxlab.kvm.user_memory import ProcessMemory
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.kvm.vm_types import (
    HYPOTHETICAL,
    KINDS,
    WAYS,
    VmFeatures,
    VmKind,
    Way,
    nonsense,
    wrong_answers,
)
from tdxlab.machine import Machine
from tdxlab.steps import Operation, run
from tdxlab.study.palette import BLACK, BLUE, ORANGE, VERMILLION, WHITE, Look
from tdxlab.study.plots import Series, stacked_bars
from tdxlab.study.undone import undone
from tdxlab.study.vmtype_lab import words_of
from tdxlab.study.zap_matrix import leaf_places

#: The VMs of the trials: the six types when their launch has ended, and those that nobody has.
REAL = tuple(kind._replace(launched=True) for kind in KINDS)
CASES = (*REAL, *HYPOTHETICAL)

#: Somebody who knows each VM.
TRUTH = "truth"
_ALL_WAYS: dict[str, Way] = {TRUTH: lambda kind: kind.truth, **WAYS}

#: What a use comes to where KVM follows a root that the vCPU does not have.
CRASH = "host crashes"

_PAGES, _HVA = 4, 0x7F00_0000_0000
_SHARED_PAGE = 2


class WrongRow(NamedTuple):
    """How many of the four questions each way answers wrong, and which."""

    vm: str
    flags: int
    type: int
    mask: int
    which: str


class TrialRow(NamedTuple):
    """One VM, one way, and what comes of it.

    slot: answer to a slot with guest_memfd. private, shared: the root that maps a page of the kind
    after its use, or what came instead. hooks: of the external EPT that were called. munmap: what
    the host's own unmapping does to the private page. to_shared: what a conversion does to it.
    pre_fault: KVM_PRE_FAULT_MEMORY. as_true: all of it as if the answers were right.
    """

    vm: str
    way: str
    slot: str
    private: str
    shared: str
    hooks: int
    munmap: str
    to_shared: str
    pre_fault: str
    as_true: bool


class NonsenseRow(NamedTuple):
    """Of the combinations that four booleans can store for a type, those that make sense."""

    vm: str
    combinations: int
    sensible: int
    first_complaint: str


class _CountingHooks:
    """An external EPT that obeys and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def _obey(self) -> Hook:
        yield ("external EPT",)
        self.calls += 1
        return 0

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As ExternalOps."""
        return self._obey()

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As ExternalOps."""
        return self._obey()

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As ExternalOps."""
        return self._obey()

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As ExternalOps."""
        return self._obey()


class Trial:
    """One VM of a kind, whose code is told what `way` answers."""

    def __init__(self, machine: Machine, kind: VmKind, way: str) -> None:
        host = machine.host
        answers = _ALL_WAYS[way](kind)
        self.kind, self.way, self.hooks = kind, way, _CountingHooks()
        self.shared_gfn = gfn_shared_bit(machine.gpaw) if kind.shared_bit else 0
        config = VmConfig(kind.vm_type, gfn_direct_bits=self.shared_gfn, answers=answers)
        self.vm = Vm(
            *(host.journal, host.memory, host.params, config),
            pages=host.pages,
            external=self.hooks,
            name=kind.name,
        )
        self.files, self.process = GuestMemfds(self.vm), ProcessMemory(self.vm, host.pages)
        self.vm.guest_memory, self.vm.user_memory = self.files, self.process
        self.vcpu = Vcpu(self.vm, 0)
        self.vm.vcpus = (self.vcpu,)
        run(kvm_mmu_reload(self.vcpu))

    def row(self) -> TrialRow:
        """Take the VM through all of it."""
        slot = self._make_slot()
        private, shared = self._use(0), self._use(_SHARED_PAGE)
        munmap = self._fate(self.process.munmap(_HVA, _PAGES * PAGE_SIZE))
        self.process.mmap(_HVA, _PAGES * PAGE_SIZE)
        self._use(0)
        to_shared = self._fate(self._set_attributes(0, 1, private=False))
        pre_fault, _ = self._try(kvm_vcpu_pre_fault_memory(self.vcpu, PAGE_SIZE, PAGE_SIZE))
        calls = self.hooks.calls
        return TrialRow(
            *(self.kind.name, self.way, slot, private, shared, calls),
            *(munmap, to_shared, pre_fault, True),
        )

    def _try(self, operation: Operation) -> tuple[str, int]:
        """(what came of it in words, what it returned)."""
        try:
            ret: int = run(operation)
        except HostBug:
            return CRASH, -1
        return words_of(ret), ret

    def _make_slot(self) -> str:
        """A slot as the VM should have it; where that is refused, one of shared memory alone."""
        size, ret = _PAGES * PAGE_SIZE, 0
        self.process.mmap(_HVA, size)
        if self.kind.private_mem:
            gmem = self.files.create(size)
            ret = run(
                kvm_vm_ioctl_set_memory_region(self.vm, 0, 0, size, KVM_MEM_GUEST_MEMFD, _HVA, gmem)
            )
            run(self._set_attributes(0, _SHARED_PAGE, private=True))
        if ret or not self.kind.private_mem:
            run(kvm_vm_ioctl_set_memory_region(self.vm, 0, 0, size, 0, _HVA))
        return words_of(ret) if self.kind.private_mem else "-"

    def _set_attributes(self, first: int, last: int, *, private: bool) -> Operation:
        attribute = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        size = (last - first) * PAGE_SIZE
        return kvm_vm_ioctl_set_mem_attributes(self.vm, first * PAGE_SIZE, size, attribute)

    def _use(self, page: int) -> str:
        """The guest writes to a page in the way in which it should."""
        kind, code, gfn = self.kind, PFERR_WRITE_MASK, page
        if page >= _SHARED_PAGE:
            gfn |= self.shared_gfn
        elif kind.private_mem and kind.vm_type != KVM_X86_SW_PROTECTED_VM:
            code |= PFERR_PRIVATE_ACCESS
        words, ret = self._try(kvm_mmu_page_fault(self.vcpu, gfn << PAGE_SHIFT, code))
        return self._root_of(page) if ret == RET_PF_FIXED else words

    def _root_of(self, page: int) -> str:
        """Where the page is mapped, "" if nowhere."""
        places = leaf_places(self.vm, _PAGES)
        return ", ".join(sorted(root for root, gfn in places if gfn == page))

    def _fate(self, operation: Operation) -> str:
        """What an operation does to the mapping of private page 0."""
        before = self._root_of(0)
        words, ret = self._try(operation)
        if ret and words != "ok":
            return words
        return "-" if not before else "stays" if self._root_of(0) else "goes"


def trial_rows(cases: Sequence[VmKind] = CASES, *, gpaw: int = 48) -> list[TrialRow]:
    """For each VM what happens if the answers are right, and then in each way."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=1, packages=1)
    rows: list[TrialRow] = []
    for kind in cases:
        with undone(machine):
            truth = Trial(machine, kind, TRUTH).row()
        rows.append(truth)
        for way in WAYS:
            with undone(machine):
                row = Trial(machine, kind, way).row()
            rows.append(row._replace(as_true=row[2:] == truth[2:]))
    return rows


def broken_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Those in which something else happens than with right answers."""
    return [row for row in rows if not row.as_true]


def wrong_rows(cases: Sequence[VmKind] = CASES) -> list[WrongRow]:
    """What each way answers wrong about each VM."""
    rows = []
    for kind in cases:
        wrong = {name: wrong_answers(kind, way) for name, way in WAYS.items()}
        which = "; ".join(f"{name}: {', '.join(found)}" for name, found in wrong.items() if found)
        flags, by_type, mask = (len(wrong[name]) for name in ("flags", "type", "mask"))
        rows.append(WrongRow(kind.name, flags, by_type, mask, which or "-"))
    return rows


def nonsense_rows() -> list[NonsenseRow]:
    """All that four booleans can say of each type."""
    rows = []
    for kind in KINDS:
        every = [VmFeatures(*bits) for bits in product((False, True), repeat=4)]
        found = [nonsense(kind.vm_type, each, kind.shared_bit) for each in every]
        complaint = next((each[0] for each in found if each), "-")
        rows.append(NonsenseRow(kind.name, len(every), found.count(()), complaint))
    return rows


#: Way -> its look.
WAY_LOOKS = (
    Look("flags", BLUE, WHITE, "F", ""),
    Look("type", ORANGE, BLACK, "T", "//"),
    Look("mask", VERMILLION, BLACK, "M", "xx"),
)


def plot_wrong(rows: Sequence[WrongRow], ax: Axes) -> Axes:
    """Wrong answers about each VM, by way."""
    values = zip(*((row.flags, row.type, row.mask) for row in rows), strict=True)
    series = [Series(look, each) for look, each in zip(WAY_LOOKS, values, strict=True)]
    names = [row.vm for row in rows]
    return stacked_bars(ax, names, series, unit="wrong answers, of 4 each", title="Who is wrong")
