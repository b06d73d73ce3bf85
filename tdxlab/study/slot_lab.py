"""A lab for memslots: a TD and a DEFAULT VM, each with a slot that comes and goes.

    lab = SlotLab(gpaw=48)
    lab.use("TD", "slot", 256)          # the guest uses so many pages of it
    lab.delete("TD", policy="B")        # ... "F", "T", or None: as Linux 6.16 decides
    lab.create("TD", 256)               # the slot is there again
    lab.read("TD")                      # what the guest finds in its first page

Each VM has a slot 0 at GPA 0, "rest", which nobody deletes, and slot 1 at 1 GiB, "slot", of up to
512 pages. Everything goes over a tape of deeds, each with its bill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.params import MmuParams, VmConfig
from tdxlab.kvm.slot_policy import SLOT_POLICIES
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, Slot
from tdxlab.kvm.spte import FROZEN_SPTE, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.vm import Vm
from tdxlab.machine import Machine
from tdxlab.tape import Action, Tape
from tdxlab.vmm import Gate
from tdxlab.vmm_run import RunResult
from tdxlab.vmm_td import Td

TD, DEFAULT = "TD", "DEFAULT VM"
KINDS = (TD, DEFAULT)

#: Where a VM's memory begins; REST is slot 0, SLOT is slot 1, of as many pages at most.
REST, SLOT = "rest", "slot"
PLACES = {REST: 0, SLOT: SIZE_1G}
MOST_PAGES = ENTRIES_PER_TABLE
_NUMBER = 1

CONTENT = b"kept here"
#: What a guest can find in its first page -> in words. Where no memory is, a device would answer.
_FOUND = {
    CONTENT: "its own data",
    bytes(len(CONTENT)): "zeros",
    b"\xff" * len(CONTENT): "ones: no memory",
}

_LEAVES = {
    "BLOCK": "TDH.MEM.RANGE.BLOCK",
    "TRACK": "TDH.MEM.TRACK",
    "REMOVE": "TDH.MEM.PAGE.REMOVE",
    "WBINVD": "TDH.PHYMEM.PAGE.WBINVD",
    "UNBLOCK": "TDH.MEM.RANGE.UNBLOCK",
    "AUG": "TDH.MEM.PAGE.AUG",
    "SEPT.ADD": "TDH.MEM.SEPT.ADD",
}


class Bill(NamedTuple):
    """What a deed cost. write_lock, read_lock: entries visited by walks with mmu_lock held so;
    rescanned: entries of freed tables; cleared: SPTEs that were present; freed: tables; faults:
    EPT violations; flushes: remote TLB flushes; kicks: of all vCPUs; calls: SEAMCALLs by their
    short names, without VP.ENTER; accepts: pages accepted by the guest.
    """

    write_lock: int = 0
    read_lock: int = 0
    rescanned: int = 0
    cleared: int = 0
    freed: int = 0
    faults: int = 0
    flushes: int = 0
    kicks: int = 0
    accepts: int = 0
    calls: tuple[tuple[str, int], ...] = ()

    @property
    def seamcalls(self) -> int:
        """All of them."""
        return sum(count for _, count in self.calls)

    def call(self, name: str) -> int:
        """How often one was made, by its short name such as BLOCK."""
        return dict(self.calls).get(name, 0)


@dataclass
class SlotDeed(Action):
    """One deed on the tape. kind: whose. said: what came of it. bill: what it cost."""

    kind_of_vm: str = ""
    what: str = ""
    said: str = ""
    bill: Bill = field(default_factory=Bill)

    def note(self, result: Any) -> None:
        """Keep what came of it."""
        self.said, self.bill = result
        self.name = f"{self.what}: {self.said}" if self.said else self.what


class SlotTape(Tape):
    """A tape of deeds; a position counts whole deeds."""

    def perform(self, vm: str, what: str, play: Callable[[], tuple[str, Bill]]) -> SlotDeed:
        """Do something and record it. play: the same each time."""
        deed = SlotDeed(vm, 0, what, vm, {}, play, kind_of_vm=vm, what=what)
        self._do(deed)
        return deed

    @property
    def deeds(self) -> list[SlotDeed]:
        """The deeds up to the present position."""
        return [deed for deed in self._actions[: self.position] if isinstance(deed, SlotDeed)]


class Meter:
    """Counts what KVM does in one VM while it listens. A walk asks `vm.need_resched` at every
    entry that it visits, and is told no; who takes a freed table apart freezes every entry of it.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.walked: Counter[bool] = Counter()
        self.events: Counter[str] = Counter()

    def hear(self, event: tuple[Any, ...]) -> None:
        """The VM's listener."""
        name = event[0]
        if name == "spte_changed":
            was, now = event[4] & SPTE_MMU_PRESENT_MASK, event[5] & SPTE_MMU_PRESENT_MASK
            self.events["rescanned"] += event[5] == FROZEN_SPTE
            name = "cleared" if was and not now else name
        self.events[name] += 1

    def visit(self) -> bool:
        """The walk is at an entry; nobody wants its lock."""
        self.walked[self.vm.mmu_lock.held(WRITE)] += 1
        return False

    @contextmanager
    def on(self) -> Iterator[Meter]:
        """Listen while the `with` lasts."""
        vm = self.vm
        vm.listener, vm.need_resched = self.hear, self.visit
        try:
            yield self
        finally:
            vm.listener = vm.need_resched = None


class SlotLab:
    """The two VMs, with one vCPU each. gpaw: 48 or 52, of the TD; the DEFAULT VM has four levels.

    machine, tape: what it lives on. gates: TD and DEFAULT -> the VM. leaf_level: 2 gives the
    DEFAULT VM's slot host pages of 2 MiB. quirk: SLOT_ZAP_ALL is on in the DEFAULT VM.
    """

    def __init__(self, *, gpaw: int = 48, leaf_level: int = 1, quirk: bool = True) -> None:
        params = MmuParams()
        self.gpaw = gpaw
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1, params=params)
        td = self.machine.create_td(memory=SIZE_2M)
        backing = td.add_memory(SIZE_1G, MOST_PAGES * PAGE_SIZE)
        vm = self.machine.create_vm(memory=SIZE_2M, config=VmConfig(slot_zap_all=quirk))
        self.gates: dict[str, Gate] = {TD: td, DEFAULT: vm}
        self._gmem = {TD: backing.gmem, DEFAULT: -1}
        vm.user_memory.mmap(backing.hva, MOST_PAGES * PAGE_SIZE, level=leaf_level)
        self._hva = backing.hva
        vm.set_user_memory_region(_NUMBER, SIZE_1G, MOST_PAGES * PAGE_SIZE, hva=self._hva)
        self.tape = SlotTape(self.machine)

    def gate(self, kind: str) -> Gate:
        """The VM of a kind; ValueError for another."""
        if kind not in self.gates:
            raise ValueError(f"there is no {kind!r} here; choose {' or '.join(map(repr, KINDS))}")
        return self.gates[kind]

    def slot(self, kind: str) -> Slot | None:
        """The memslot as it is now, None while there is none."""
        return self.gate(kind).vm.slots.by_id(_NUMBER)

    # -- deeds

    def use(self, kind: str, place: str, npages: int, *, first: int = 0) -> SlotDeed:
        """The guest writes to each of `npages` pages of "slot" or "rest", from page `first` on.

        Refuses another place, or pages that are not there: ValueError.
        """
        gate = self.gate(kind)
        if place not in PLACES:
            raise ValueError(
                f"no memory is called {place!r}; choose {' or '.join(map(repr, PLACES))}"
            )
        if not (npages >= 1 and 0 <= first <= MOST_PAGES - npages):
            raise ValueError(f"{npages} pages from page {first} on; choose of 0..{MOST_PAGES - 1}")
        gpa = PLACES[place] + first * PAGE_SIZE

        def play() -> str:
            result = gate.touch(gpa, npages * PAGE_SIZE)
            if result.ok and place == SLOT and not first:
                result = gate.write(gpa, CONTENT)
            return _came(result)

        return self._perform(kind, f"the guest uses {npages} pages of the {place}", play)

    def share(self, npages: int) -> SlotDeed:
        """The TD's guest converts the first pages of the slot to shared memory, and uses them."""
        gate = self.gates[TD]

        def play() -> str:
            result = gate.convert(SIZE_1G, npages * PAGE_SIZE, to="shared")
            return _came(gate.touch(SIZE_1G, npages * PAGE_SIZE) if result.ok else result)

        return self._perform(TD, f"the guest shares {npages} pages of the slot", play)

    def delete(self, kind: str, *, policy: str | None = None) -> SlotDeed:
        """The VMM deletes the slot. policy: F, T or B; None: as Linux 6.16 decides.

        Refuses a slot that is not there, and as `choose_slot_policy`: ValueError.
        """
        gate = self.gate(kind)
        if self.slot(kind) is None:
            raise ValueError("the slot is deleted already; create it first")

        def play() -> str:
            gate.choose_slot_policy(policy)
            self._run(gate, 0)
            return ""

        name = SLOT_POLICIES.get(policy, policy) if policy else "as Linux 6.16 does"
        return self._perform(kind, f"delete the slot, {name}", play)

    def create(self, kind: str, npages: int = MOST_PAGES, *, told: bool = True) -> SlotDeed:
        """The VMM creates the slot again, on the first pages of the same memory. told: the guest
        knows that its memory was gone, so it will accept pages before it uses them.

        Refuses a slot that is there, and too many pages: ValueError.
        """
        gate = self.gate(kind)
        if self.slot(kind) is not None:
            raise ValueError("the slot is there; delete it first")
        if not 1 <= npages <= MOST_PAGES:
            raise ValueError(f"a slot of {npages} pages; choose 1..{MOST_PAGES}")

        def play() -> str:
            self._run(gate, npages)
            if told and kind == TD:
                gate.guest.note_conversion(SIZE_1G, MOST_PAGES * PAGE_SIZE)
            return ""

        knows = ", and the guest is told" if told and kind == TD else ""
        return self._perform(kind, f"create the slot with {npages} pages{knows}", play)

    def read(self, kind: str) -> SlotDeed:
        """The guest reads the first page of the slot."""
        return self._perform(kind, "the guest reads its first page", lambda: self._found(kind))

    def _found(self, kind: str) -> str:
        result = self.gate(kind).read(SIZE_1G, len(CONTENT))
        if not result.ok:
            return _came(result)
        return _FOUND.get(result.value, "other data")

    def _run(self, gate: Gate, npages: int) -> None:
        """KVM_SET_USER_MEMORY_REGION2 for the slot, in the size given; 0 deletes it."""
        private = isinstance(gate, Td)
        gate.set_user_memory_region(
            _NUMBER,
            SIZE_1G,
            npages * PAGE_SIZE,
            flags=KVM_MEM_GUEST_MEMFD if private and npages else 0,
            hva=self._hva,
            gmem=self._gmem[TD] if private else -1,
        )

    # -- bills

    def _perform(self, kind: str, what: str, play: Callable[[], str]) -> SlotDeed:
        if self.gate(kind).vm.vm_dead:
            raise ValueError(f"the {kind} is dead; go back or reset")
        return self.tape.perform(kind, what, lambda: self._billed(kind, play))

    def _billed(self, kind: str, play: Callable[[], str]) -> tuple[str, Bill]:
        """Do it, and say what it cost."""
        vm = self.gate(kind).vm
        before = self._counters(kind)
        with Meter(vm).on() as meter:
            said = play()
        gained = {name: n - before.get(name, 0) for name, n in self._counters(kind).items()}
        calls = tuple((name, gained[name]) for name in _LEAVES if gained[name])
        return said, Bill(
            write_lock=meter.walked[True],
            read_lock=meter.walked[False],
            rescanned=meter.events["rescanned"],
            cleared=meter.events["cleared"],
            freed=max(-gained["tables"], 0),
            faults=gained["faults"],
            flushes=gained["flushes"],
            kicks=gained["kicks"],
            accepts=max(gained["accepted"], 0),
            calls=calls,
        )

    def _counters(self, kind: str) -> dict[str, int]:
        vm, calls = self.gate(kind).vm, self.machine.seamcalls
        return {
            **{name: calls.get(leaf, 0) for name, leaf in _LEAVES.items()},
            "tables": vm.stats["pt_pages"],
            "faults": sum(vcpu.stats["pf_taken"] for vcpu in vm.vcpus),
            "flushes": vm.stats["remote_tlb_flush"],
            "kicks": self.machine.host.counts["kick"],
            "accepted": len(self.gate(kind).guest.accepted),
        }


def _came(result: RunResult) -> str:
    """How a run of the guest ended, in a few words; empty if all is well."""
    if result.ok:
        return ""
    return "the TD dies: private memory that was not accepted" if result.error else result.reason
