"""A guest with shared memory in host pages of three sizes, on a tape of deeds.

    lab = SharedLab(gpaw=48)
    lab.touch("2M", 3, write=True)      # the guest writes page 3 of the memory in 2 MiB pages
    lab.log("2M")                       # the VMM has KVM log which pages are written
    lab.get_log("2M")                   # ... and asks for the log
    lab.stop("2M")                      # no more logging: large pages again
    lab.counts()["pages_4k"]

Each size has a memslot of 1 GiB; pages are counted from its start, 4 KiB each. None of it has a
guest_memfd: all of it is shared memory, mapped by the direct EPT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, PAGE_SHIFT, PAGE_SIZE, SEPT_LEVEL_NAMES, SIZE_1G
from tdxlab.guest import Access, Fetch, Read, Write
from tdxlab.kvm.dirty import kvm_get_dirty_log_protect
from tdxlab.kvm.notifier import kvm_mmu_notifier_clear_flush_young, kvm_mmu_notifier_test_young
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES, Slot
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import INVALID_PAGE, Vcpu
from tdxlab.machine import Machine
from tdxlab.tape import Action, Tape
from tdxlab.vmm import Gate
from tdxlab.vmm_ioctls import HVA_BASE

#: Size of the host's pages -> KVM's level of such a page, which is also the number of the memslot
#: and its place: slot n begins at GPA n GiB.
REGIONS = {"4K": 1, "2M": 2, "1G": 3}
PAGES = SIZE_1G // PAGE_SIZE
#: GPA at which no memslot is, without the shared bit: a device.
DEVICE_GPA = 8 * SIZE_1G

TD, VM = "TD", "default VM"


class Outcome(NamedTuple):
    """What came of a deed. said: in words. gained: count -> by how much it changed. after: all
    counts afterwards.
    """

    said: str
    gained: dict[str, int]
    after: dict[str, int]


@dataclass
class Deed(Action):
    """One deed of guest, VMM or host on the tape. what: which; `name` also says what came of it."""

    what: str = ""
    outcome: Outcome = field(default_factory=lambda: Outcome("", {}, {}))

    def note(self, result: Any) -> None:
        """Keep the outcome."""
        self.outcome = result
        self.name = f"{self.what}: {result.said}"


class DeedTape(Tape):
    """A tape of deeds; a position counts whole deeds."""

    def perform(self, by: str, what: str, play: Callable[[], Outcome]) -> Outcome:
        """Do something and record it. by: who. play: does it, the same each time."""
        done: Outcome = self._do(Deed(by, 0, what, by, {}, play, what=what))
        return done

    @property
    def deeds(self) -> list[Deed]:
        """The deeds up to the present position."""
        return [deed for deed in self._actions[: self.position] if isinstance(deed, Deed)]


class Entry(NamedTuple):
    """One entry of the direct EPT on the way to a page. level: KVM's (4K is 1). place: its number
    in its table. raw: the SPTE.
    """

    level: int
    place: int
    raw: int


class SharedLab:
    """One VM with one vCPU and three memslots of shared memory.

    gpaw: 48 or 52, of a TD. kind: TD, or VM for one that is no TD. ad_bits: the CPU's EPTs have A
    and D bits.
    """

    def __init__(self, *, gpaw: int = 48, kind: str = TD, ad_bits: bool = True) -> None:
        if kind not in (TD, VM):
            raise ValueError(f"there is no kind {kind!r} of VM here; choose {TD!r} or {VM!r}")
        params = MmuParams(ad_bits=ad_bits)
        self.machine = Machine(gpaw=gpaw, memory="3 GiB", lps=1, packages=1, params=params)
        self.kind = kind
        self.gate: Gate = (
            self.machine.create_td(memory="2 MiB")
            if kind == TD
            else self.machine.create_vm(memory="2 MiB")
        )
        for size, level in REGIONS.items():
            self.gate.user_memory.mmap(self.hva(size), SIZE_1G, level=level)
            self._set_slot(size, 0)
        self.tape = DeedTape(self.machine)
        self._before = dict(self.machine.seamcalls)

    # -- names of places

    def gpa(self, size: str, page: int = 0) -> int:
        """GPA of a page, without the shared bit. Refuses another size or page: ValueError."""
        if size not in REGIONS:
            raise ValueError(f"no memory here has {size!r} pages; choose {', '.join(REGIONS)}")
        if not 0 <= page < PAGES:
            raise ValueError(f"page {page} is not there; choose from 0..{PAGES - 1}")
        return REGIONS[size] * SIZE_1G + page * PAGE_SIZE

    def hva(self, size: str, page: int = 0) -> int:
        """Where the VMM has the page."""
        return HVA_BASE + self.gpa(size, page)

    def gfn(self, size: str, page: int = 0) -> int:
        """Frame number of the page, without the shared bit."""
        return self.gpa(size, page) >> PAGE_SHIFT

    def slot(self, size: str) -> Slot:
        """The memslot as it is now."""
        found = self.gate.vm.slots.find(self.gfn(size))
        assert found is not None
        return found

    @property
    def vcpu(self) -> Vcpu:
        """The only one."""
        return self.gate.vm.vcpus[0]

    # -- what the guest does

    def touch(
        self, size: str, first: int, pages: int = 1, *, write: bool = False, step: int = 1
    ) -> Outcome:
        """The guest reads, or writes, one byte in each of `pages` pages, every `step`-th from
        `first` on.
        """
        places = [self.gpa(size, first + number * step) for number in range(pages)]
        shared = self.gate.guest.shared_mask
        kind = "write" if write else "read"
        span = f"page {first}" if pages == 1 else f"{pages} pages from {first}"
        accesses: list[Access] = [
            Write(gpa | shared) if write else Read(gpa | shared, 1) for gpa in places
        ]
        return self._run(f"{kind} {span} of the {size} memory", accesses)

    def fetch(self, size: str, page: int) -> Outcome:
        """The guest runs an instruction in the page.

        Refuses a TD's: ValueError. Differs: its CPU raises a page fault in the guest, whatever the
        direct EPT says; that is not modelled.
        """
        if self.kind == TD:
            raise ValueError(
                "a TD does not run code in shared memory: its CPU refuses before it looks at the "
                "direct EPT; take a default VM"
            )
        gpa = self.gpa(size, page) | self.gate.guest.shared_mask
        return self._run(f"fetch from page {page} of the {size} memory", [Fetch(gpa)])

    def device(self, page: int = 0, *, times: int = 1) -> Outcome:
        """The guest reads 4 bytes of page `page` behind `DEVICE_GPA`, where no memslot is."""
        gpa = DEVICE_GPA + page * PAGE_SIZE | self.gate.guest.shared_mask
        often = f" {times} times" if times > 1 else ""
        return self._run(f"read device page {page}{often}", [Read(gpa, 4)] * times)

    def _run(self, what: str, accesses: list[Access]) -> Outcome:
        def play() -> str:
            result = self.gate.run(list(accesses))
            if not result.ok:
                return result.detail
            return f"to the VMM as MMIO: {len(result.exits)}" if result.exits else ""

        return self._perform("guest", what, play)

    # -- what the VMM and the host do

    def log(self, size: str, *, eager: bool = True) -> Outcome:
        """Start dirty logging. eager: the host's parameter eager_page_split at that moment.

        Refuses a slot that logs already: ValueError.
        """
        if self.is_logging(size):
            raise ValueError(f"the {size} memory is being logged already; stop that first")
        how = "large pages are split now" if eager else "large pages are split when written"
        return self._perform(
            "VMM", f"log the {size} memory ({how})", lambda: self._start_logging(size, eager)
        )

    def _start_logging(self, size: str, eager: bool) -> str:
        vm = self.gate.vm
        params = vm.params
        vm.params = replace(params, eager_page_split=eager)
        try:
            self._set_slot(size, KVM_MEM_LOG_DIRTY_PAGES)
        finally:
            vm.params = params
        return ""

    def get_log(self, size: str) -> Outcome:
        """KVM_GET_DIRTY_LOG: which pages were written since the last time; watch them anew.

        Refuses a slot that is not logged: ValueError.
        """
        self._require_logging(size)

        def play() -> str:
            operation = kvm_get_dirty_log_protect(self.gate.vm, self.slot(size))
            _, gfns = self.gate.drive("KVM_GET_DIRTY_LOG", operation)
            return f"dirty: {_span([gfn - self.gfn(size) for gfn in gfns])}"

        return self._perform("VMM", f"get the dirty log of the {size} memory", play)

    def stop(self, size: str) -> Outcome:
        """Stop dirty logging; KVM maps large again what it can. Refuses as `get_log`."""
        self._require_logging(size)
        return self._perform(
            "VMM", f"stop logging the {size} memory", lambda: self._set_slot(size, 0)
        )

    def age(self, size: str, first: int = 0, pages: int = PAGES) -> Outcome:
        """The host asks whether the pages were used lately, and makes them old."""
        start, end = self.hva(size, first), self.hva(size, first + pages - 1) + PAGE_SIZE

        def play() -> str:
            operation = kvm_mmu_notifier_clear_flush_young(self.gate.vm, start, end)
            young = self.gate.drive("clear_flush_young", operation)
            return "young, old from now on" if young else "old"

        span = f"page {first}" if pages == 1 else f"pages {first}..{first + pages - 1}"
        return self._perform("host", f"age {span} of the {size} memory", play)

    def add_slot(self, page: int) -> Outcome:
        """The VMM puts RAM where device page `page` is: a new memslot of one page."""
        gpa, size = DEVICE_GPA + page * PAGE_SIZE, PAGE_SIZE
        number = len(self.gate.vm.slots.all())

        def play() -> str:
            self.gate.user_memory.mmap(HVA_BASE + gpa, size)
            self.gate.set_user_memory_region(number, gpa, size)
            return f"memslot generation {self.gate.vm.slots.generation}"

        return self._perform("VMM", f"add RAM at device page {page}", play)

    def flush(self) -> Outcome:
        """KVM has every vCPU flush its TLB, as it does now and then."""

        def play() -> str:
            self.gate.vm.flush_remote_tlbs()
            return ""

        return self._perform("KVM", "flush the TLBs", play)

    def _set_slot(self, size: str, flags: int) -> str:
        self.gate.set_user_memory_region(
            REGIONS[size], self.gpa(size), SIZE_1G, flags=flags, hva=self.hva(size)
        )
        return ""

    def _require_logging(self, size: str) -> None:
        if not self.is_logging(size):
            raise ValueError(f"the {size} memory is not being logged; start that first")

    def _perform(self, by: str, what: str, play: Callable[[], str]) -> Outcome:
        return self.tape.perform(by, what, lambda: self._watched(play))

    def _watched(self, play: Callable[[], str]) -> Outcome:
        """Do it, and say what changed."""
        before = self.counts()
        with self._listening() as heard:
            said = play()
        after = self.counts()
        gained = {name: n - before[name] for name, n in after.items() if n != before[name]}
        gained |= {"SPTE changes": heard["spte_changed"]} if heard["spte_changed"] else {}
        return Outcome("; ".join(filter(None, [said, changes(gained)])), gained, after)

    @contextmanager
    def _listening(self) -> Iterator[Counter[str]]:
        heard: Counter[str] = Counter()
        vm = self.gate.vm
        vm.listener = lambda event: heard.update((event[0],))
        try:
            yield heard
        finally:
            vm.listener = None

    # -- looking

    def is_logging(self, size: str) -> bool:
        """The slot is dirty-logged."""
        return self.slot(size).is_dirty_tracked

    def dirty(self, size: str) -> list[int]:
        """Pages that the log has, ascending."""
        return self.gate.vm.dirty.bits(self.slot(size)) if self.is_logging(size) else []

    def is_young(self, size: str, page: int) -> bool:
        """The host would be told that the page was used; changes nothing."""
        start = self.hva(size, page)
        operation = kvm_mmu_notifier_test_young(self.gate.vm, start, start + PAGE_SIZE)
        return bool(self.gate.drive("test_young", operation))

    def counts(self) -> dict[str, int]:
        """Leaves by size, tables below the root, faults, flushes, and since the lab began
        SEAMCALLs: entries of the TD, and all others.
        """
        vm, stats = self.gate.vm, self.vcpu.stats
        calls = self.machine.seamcalls
        made = sum(calls.values()) - sum(self._before.values())
        entries = calls.get("TDH.VP.ENTER", 0) - self._before.get("TDH.VP.ENTER", 0)
        return {
            "pages_4k": vm.stats["pages_4k"],
            "pages_2m": vm.stats["pages_2m"],
            "pages_1g": vm.stats["pages_1g"],
            "tables": vm.stats["pt_pages"] - vm.stats["pt_pages_mirror"],
            "faults": stats["pf_taken"],
            "fast": stats["pf_fast"],
            "MMIO SPTEs": stats["pf_mmio_spte_created"],
            "flushes": vm.stats["remote_tlb_flush"],
            "TD entries": entries,
            "other SEAMCALLs": made - entries,
        }

    def walk(self, gpa: int) -> list[Entry]:
        """The entries of the direct EPT on the way to a GPA (without shared bit), from the root."""
        vm = self.gate.vm
        if self.vcpu.root_hpa == INVALID_PAGE:
            return []
        root, gfn = vm.sps[self.vcpu.root_hpa], gpa >> PAGE_SHIFT
        return [
            Entry(it.level, it.word % ENTRIES_PER_TABLE, it.old_spte)
            for it in for_each_tdp_pte(vm, root, gfn, gfn + 1)
        ]

    def entry(self, size: str, page: int) -> Entry | None:
        """The last entry on the way to a page; None before the guest has used any shared memory."""
        found = self.walk(self.gpa(size, page))
        return found[-1] if found else None

    def table(self, gpa: int, level: int) -> list[int]:
        """The 512 SPTEs of the table at `level` on the way to a GPA; [] if there is none."""
        vm, gfn = self.gate.vm, gpa >> PAGE_SHIFT
        if self.vcpu.root_hpa == INVALID_PAGE:
            return []
        for it in for_each_tdp_pte(vm, vm.sps[self.vcpu.root_hpa], gfn, gfn + 1):
            if it.level == level:
                start = it.word & -ENTRIES_PER_TABLE
                return list(vm.memory.words.view[start : start + ENTRIES_PER_TABLE])
        return []


#: Counts that `changes` puts into words, in its order.
_TOLD = (
    "faults",
    "fast",
    "MMIO SPTEs",
    "pages_4k",
    "pages_2m",
    "pages_1g",
    "tables",
    "SPTE changes",
    "flushes",
)


def changes(gained: dict[str, int]) -> str:
    """What changed, in words: "faults +1, pages_2m +1"."""
    told = [f"{name} {gained[name]:+d}" for name in _TOLD if name in gained]
    return ", ".join(told) or "nothing changes"


def level_name(level: int) -> str:
    """KVM's level of an entry as a name: 1 is "4K"."""
    return SEPT_LEVEL_NAMES[level - 1]


def _span(pages: list[int]) -> str:
    """Numbers of pages; of many only how many."""
    return ", ".join(map(str, pages)) if 0 < len(pages) <= 8 else f"{len(pages)} pages"
