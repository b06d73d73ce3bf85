"""A VM in the surroundings that the recorder of the traces had.

One CPU, locks that nobody waits for, pages of host memory at addresses that follow from what they
back, hooks that do what an injection says, and a grace period after each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from tdxlab.arch import PAGE_SIZE
from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm.external import ExternalOps, Hook
from tdxlab.kvm.locks import NoLock
from tdxlab.kvm.params import MmuParams, VmConfig
from tdxlab.kvm.role import INVALID
from tdxlab.kvm.slots import HostPage, Slot
from tdxlab.kvm.vm import MmuPage, Vcpu, Vm
from tdxlab.memory import Memory
from tdxlab.mmu_conformance.decode import Args
from tdxlab.mmu_conformance.record import FAILED, FLUSHES, Recorder, Row, split_spte
from tdxlab.steps import Step, run
from tdxlab.trace import Trace

#: Where page-table pages come from.
TABLES = Region(0x1000_0000, 1 << 34)

_USER_BASE = 1 << 40
_LEVEL_SHIFT = 39
_SLOT_BYTES = 0x10_0000_0000
_SHARED_PFN = 0x2_0000_0000
_SHARED_PFNS_OF_LEVEL = 0x800_0000
_PRIVATE_PFN = 0x1_0000_0000
_PRIVATE_PFNS_OF_SLOT = 0x1000_0000
#: Frames from here on are a device's.
_MMIO_PFN = 0x3_8000_0000

#: Requests that the recorder knew by name; it called all others "other".
_KNOWN_REQUESTS = ("MMU_FREE_OBSOLETE_ROOTS", "OUTSIDE_GUEST_MODE", "VM_DEAD")
#: Events that a trace shows as the model tells them; it has no ear for warnings.
_AS_IT_IS = (*FLUSHES, "flush_tlb_current")


def hva_of_slot(slot_id: int, host_level: int, page_offset: int) -> int:
    """Where the recorder's process had the memory of a slot. host_level: of its own mapping, 1..3.
    page_offset: pages that it starts behind the usual place.
    """
    level = host_level - 1 << _LEVEL_SHIFT
    return _USER_BASE + level + slot_id * _SLOT_BYTES + page_offset * PAGE_SIZE


def host_level_of(hva: int) -> int:
    """Level, 1 to 3, at which the recorder's process has `hva` mapped."""
    return (hva - _USER_BASE >> _LEVEL_SHIFT) + 1


class UserPages:
    """The recorder's user memory: the frame and the level follow from the address."""

    def fault_in(self, hva: int, *, write: bool) -> HostPage:
        """The page at `hva`, always there and writable."""
        level = host_level_of(hva)
        inside = (hva & (1 << _LEVEL_SHIFT) - 1) >> 12
        return HostPage(_SHARED_PFN + (level - 1) * _SHARED_PFNS_OF_LEVEL + inside, True, level)

    def mapping_level(self, hva: int) -> int:
        """The level at which it is mapped."""
        return host_level_of(hva)


class GuestPages:
    """The recorder's guest_memfd files, one for each slot, numbered like it."""

    def get_pfn(self, gmem: int, index: int) -> int:
        """Frame number of page `index`; there is always one."""
        return _PRIVATE_PFN + gmem * _PRIVATE_PFNS_OF_SLOT + index

    def bind(self, slot: Slot) -> Generator[Step, None, int]:
        """Every slot has its own file."""
        yield from ()
        return 0

    def unbind(self, slot: Slot) -> Generator[Step, None, None]:
        """Nothing to give up."""
        yield from ()

    def get_page(self, pfn: int) -> None:
        """Pages do not come or go: references need no count."""

    def put_page(self, pfn: int) -> None:
        """Pages do not come or go."""


class FreshPages:
    """Page-table pages that are never used twice, so that an address names one table for ever."""

    def __init__(self) -> None:
        self._next = TABLES.base

    def alloc_page(self, use: str) -> int:
        """The next page."""
        self._next += PAGE_SIZE
        return self._next - PAGE_SIZE

    def free_page(self, hpa: int) -> None:
        """It is not used again."""

    def leak(self, hpa: int, why: str) -> None:
        """It is not used again."""


class Countdown:
    """Something that happens at the n-th next call, and at `count` - 1 calls after it.

    what: the value that it gives. n, count: from 1.
    """

    def __init__(self, n: int, count: int, what: Any) -> None:
        self.what = what
        self._first = n
        self._last = n + count - 1
        self._calls = 0

    def count(self) -> None:
        """A call begins."""
        self._calls += 1

    @property
    def is_due(self) -> bool:
        """True if the latest call to begin is one of those."""
        return self._first <= self._calls <= self._last


class Resched:
    """need_resched() of a CPU on which somebody else wants to run at every n-th look."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._looks = 0
        self._pending = False

    def __call__(self) -> bool:
        """True from a multiple of n on, until the CPU was given up."""
        self._looks += 1
        if self._looks % self._every == 0:
            self._pending = True
        return self._pending

    def given_up(self) -> None:
        """Somebody else has run."""
        self._pending = False


class Rig:
    """One VM with its recorder.

    at_hook, at_yield: what is to run in the middle of an operation, by hook, and at the next yield.
    failing: when hooks are to fail, by hook. real: the back end of the hooks, None if they only are
    to be called.
    """

    def __init__(self, params: MmuParams, config: VmConfig, vcpus: int) -> None:
        journal = Journal()
        memory = Memory(journal, Trace(journal), (TABLES,), encrypted=False)
        self.at_hook: dict[str, Countdown] = {}
        self.at_yield: str | None = None
        self.failing: dict[str, Countdown] = {}
        self.real: ExternalOps | None = None
        self._command = ""
        self.resched: Resched | None = None
        self.run_nested: Callable[[str], Row | dict[str, Any]] = lambda command: {}
        self.vm = vm = Vm(
            journal,
            memory,
            params,
            config,
            pages=FreshPages(),
            external=RecordedHooks(self),
            mmu_lock=NoLock(journal),
        )
        vm.user_memory = UserPages()
        vm.guest_memory = GuestPages()
        vm.is_mmio_pfn = lambda pfn: pfn >= _MMIO_PFN
        self.record()
        vm.vcpus = tuple(Vcpu(vm, number) for number in range(vcpus))

    def vcpu(self, args: Args) -> Vcpu:
        """The vCPU that an operation is for; the first if it does not say."""
        return self.vm.vcpus[args.number("vcpu", 0)]

    def root(self, kind: str) -> MmuPage | None:
        """The first root that the traces call `kind`."""
        roots = (self.vm.sps[hpa] for hpa in self.vm.tdp_mmu_roots)
        return next((root for root in roots if root_kind(root) == kind), None)

    def yield_every(self, n: int) -> None:
        """Walkers are to be asked for the CPU at every n-th look; 0: never."""
        self.resched = Resched(n) if n else None
        self.vm.need_resched = self.resched

    # -- events

    def record(self) -> None:
        """A new operation begins."""
        self._record_with(Recorder(self._tell))

    def _record_with(self, recorder: Recorder) -> None:
        self.recorder = self.vm.listener = recorder

    def _tell(self, event: Row) -> None:
        """Put an event of the model into the words of a trace."""
        name = event[0]
        if name == "yield":
            self._yielded(event)
        elif name == "kvm_make_all_cpus_request":
            self.recorder.add((name, event[1] if event[1] in _KNOWN_REQUESTS else "other"))
        elif name == "load_mmu_pgd":
            self.recorder.add((name, event[1], root_kind(self.vm.sps[event[2]]), event[3]))
        elif name == "fast_page_fault":
            level, gfn, ret, old, new = event[1:]
            self.recorder.add(
                (name, level, gfn, ret, *split_spte(old, level), *split_spte(new, level))
            )
        elif name in _AS_IT_IS:
            self.recorder.add(event)

    def _yielded(self, event: Row) -> None:
        self.recorder.add(event)
        if self.resched:
            self.resched.given_up()
        if self.at_yield is not None:
            command, self.at_yield = self.at_yield, None
            self.nest(event[1], command)

    def nest(self, where: str, command: str) -> None:
        """Run another vCPU's operation now, in the middle of the present one.

        The recorder kept the text of a nested operation in one place, and noted it at the end: of
        two that were inside each other both show the inner one's.
        """
        self._command = command
        outer = self.recorder
        self.record()
        try:
            result = self.run_nested(command)
        finally:
            self._record_with(outer)
        outer.add(("nested", where, self._command, result))


class RecordedHooks:
    """The external EPT of a VM: each call is recorded, may be made to fail, and may be passed on to
    a real back end.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """See ExternalOps."""
        name = "link_external_spt"
        return self._call(
            (name, gfn, level), lambda to: to.link_external_spt(gfn, level, external_spt)
        )

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """See ExternalOps."""
        name = "set_external_spte"
        return self._call((name, gfn, level, pfn), lambda to: to.set_external_spte(gfn, level, pfn))

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """See ExternalOps."""
        name = "remove_external_spte"
        return self._call(
            (name, gfn, level, pfn), lambda to: to.remove_external_spte(gfn, level, pfn)
        )

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """See ExternalOps."""
        name = "free_external_spt"
        return self._call(
            (name, gfn, level), lambda to: to.free_external_spt(gfn, level, external_spt)
        )

    def _call(self, event: Row, pass_on: Callable[[ExternalOps], Hook]) -> Hook:
        rig, name = self._rig, event[0]
        rig.recorder.add(event)
        nested, failing = rig.at_hook.get(name), rig.failing.get(name)
        if failing:
            failing.count()
        if nested:
            nested.count()
            if nested.is_due:
                del rig.at_hook[name]
                rig.nest(name, nested.what)
        if failing and failing.is_due:
            error: int = failing.what
        elif rig.real:
            error = yield from pass_on(rig.real)
        else:
            error = 0
        if error:
            rig.recorder.add((FAILED, error))
        return error


def root_kind(root: MmuPage) -> str:
    """What the traces call a root."""
    kind = "mirror" if root.is_mirror else "direct"
    return f"{kind}-invalid" if root.role & INVALID else kind


def finish(operation: Generator[Any, None, Any]) -> Any:
    """Drive one operation of the model to its end; returns what it returns."""
    return run(operation)
