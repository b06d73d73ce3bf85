"""A machine with one TD that goes through a workload, under a policy.

While a policy makes a call, each running vCPU makes none to three steps for each step of KVM's, by
lot. After every event that takes pages away the invariants of the machine are checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from itertools import repeat
from operator import sub
from typing import Any

from tdxlab.abi.leaves import (
    TDH_MEM_PAGE_AUG,
    TDH_MEM_PAGE_REMOVE,
    TDH_MEM_RANGE_BLOCK,
    TDH_MEM_SEPT_ADD,
    TDH_MEM_TRACK,
    TDH_PHYMEM_PAGE_WBINVD,
)
from tdxlab.accesses import Access, Hlt, MapGpa, Program, Read, Write
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.conversion import (
    FAULT,
    MAPGPA,
    PRE_FAULT,
    ConversionPolicy,
    ConversionTally,
    ConvertingVmm,
    Request,
    doubles,
)
from tdxlab.invariants import Watch
from tdxlab.kvm.batching import Blocked
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.tdx import Tdx
from tdxlab.kvm.vendor import MirrorZapper
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.machine import Machine
from tdxlab.policy import Op, Surroundings, Tally, ZapHost, ZapPolicy
from tdxlab.policy_results import ConversionResult, Result
from tdxlab.steps import WAIT, Operation, Step
from tdxlab.stopping import Stopped, Violation
from tdxlab.vmm_run import RunResult
from tdxlab.vmm_td import Td
from tdxlab.workloads import END, PAGES, PRIVATE, SHARED, TOUCH, Event, Workload

#: Leaves that a zap is made of, in the order of a result.
_ZAP_LEAVES = (
    "TDH.MEM.RANGE.BLOCK",
    "TDH.MEM.RANGE.UNBLOCK",
    "TDH.MEM.TRACK",
    "TDH.MEM.PAGE.REMOVE",
    "TDH.PHYMEM.PAGE.WBINVD",
)
#: Leaves that conversions lead to: zaps, and faults.
_LEAVES = (
    TDH_MEM_RANGE_BLOCK,
    TDH_MEM_TRACK,
    TDH_MEM_PAGE_REMOVE,
    TDH_PHYMEM_PAGE_WBINVD,
    TDH_MEM_SEPT_ADD,
    TDH_MEM_PAGE_AUG,
)
#: A page of each vCPU's own, which no event is about.
_OWN = PAGES * PAGE_SIZE
#: Steps in which a thread must have moved on; more mean that the model is stuck.
_STUCK = 100_000

#: Told of the TD, of what the policy or the workload does, and of what was counted by then.
Watching = Callable[[Td, Op, Tally | ConversionTally], object]


class Bench:
    """One run of a workload, without any policy: KVM and the VMM do what they do.

    seed: of the vCPUs' pace; 0: one step for each of KVM's. watch: told of what happens.
    """

    name = "KVM itself"
    #: events after which the invariants are checked
    checked: tuple[str, ...] = (SHARED, END)

    def __init__(
        self, workload: Workload, gpaw: int, seed: int = 1, watch: Watching | None = None
    ) -> None:
        self.workload = workload
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=workload.vcpus, packages=1)
        memory = 2 * PAGES * PAGE_SIZE
        self.td = self.machine.create_td(vcpus=workload.vcpus, memory=memory, discards=True)
        self.td.touch(_OWN, workload.vcpus * PAGE_SIZE)
        self.tally: Tally | ConversionTally = Tally()
        self._dice = random.Random(seed) if seed else None
        self._watch = watch
        self._runners: list[Operation] = []
        self._is_over = False
        self._invariants = Watch(self.machine)
        self._before = dict(self.machine.seamcalls)

    def close(self) -> None:
        """Nobody goes on any more."""
        for runner in self._runners:
            runner.close()
        self._invariants.close()

    def play(self, event: Event) -> None:
        """One event, with its vCPUs running; the invariants, if pages were to be taken out."""
        self.note(Op(event.do, event.gfn, event.pages, str(event.running)))
        self._is_over = False
        vcpus = range(1, event.running + 1)
        self._runners = [self.td.run_steps(self._reading(n), vcpu=n) for n in vcpus]
        self._finish(self._thread(event))
        self._is_over = True
        for runner in self._runners:
            self._finish(runner)
        self._runners = []
        if event.do in self.checked:
            self._invariants.check("alive")

    def result(self, violation: Violation | None) -> Result | ConversionResult:
        """What has been done so far."""
        name = self.workload.name
        return Result(self.name, name, violation=violation, **asdict(self.tally))

    def calls(self) -> dict[str, int]:
        """The leaves that zaps are made of, and how often each was called."""
        now, before = self.machine.seamcalls, self._before
        return {leaf: now[leaf] - before.get(leaf, 0) for leaf in _ZAP_LEAVES}

    def note(self, op: Op) -> None:
        """Tell the watcher."""
        if self._watch is not None:
            self._watch(self.td, op, self.tally)

    def let_run(self) -> None:
        """KVM has made a step: let each running vCPU make one, or as many as the dice say."""
        for runner in self._runners:
            steps = self._dice.randrange(4) if self._dice else 1
            for _ in range(steps):
                next(runner, None)

    # -- threads

    def _thread(self, event: Event) -> Operation:
        """What the event does: vCPU 0's program, or the end of the TD."""
        if event.do == END:
            return self.machine.host.on_cpu(0, self.td.destroy_steps())
        return self._going_on(self.td.run_steps(self.program(event), vcpu=0))

    def _going_on(self, thread: Operation) -> Operation:
        """The guest's program, which has to come to its end."""
        result: RunResult = yield from thread
        if not result.ok:
            text = f"the TD cannot go on: {result.reason}, {result.detail}{self.why()}"
            raise Stopped(Violation("alive", text))

    def program(self, event: Event) -> Program:
        """What the guest does on vCPU 0."""
        first, alias = event.gfn * PAGE_SIZE, self.td.guest.alias
        if event.do == TOUCH:
            return [Write(alias(first + page * PAGE_SIZE)) for page in range(event.pages)]
        return [self.asking(event)]

    def asking(self, event: Event) -> MapGpa:
        """The guest asks for a conversion."""
        shared = self.td.guest.shared_mask if event.do == SHARED else 0
        return MapGpa(event.gfn * PAGE_SIZE | shared, event.pages * PAGE_SIZE)

    def why(self) -> str:
        """What is known about why a TD cannot go on, "" if nothing."""
        return ""

    def _reading(self, vcpu: int) -> Iterator[Access]:
        """What a vCPU does while an event lasts."""
        reads = self.workload.reads_between_exits
        while not self._is_over:
            for _ in range(reads) if reads else repeat(None, 1):
                yield Read(_OWN + vcpu * PAGE_SIZE)
            if reads:
                yield Hlt()

    def _finish(self, thread: Operation) -> None:
        """Let a thread go on to its end, with the running vCPUs beside it."""
        for number, step in enumerate(thread):
            if number > _STUCK:
                raise AssertionError(f"{self.name} is stuck at {step}")
            if step[0] == WAIT or not self._is_over:
                self.let_run()


class ZapBench(Bench):
    """A zap policy takes the pages out."""

    def __init__(
        self, policy: ZapPolicy, workload: Workload, gpaw: int, seed: int, watch: Watching | None
    ) -> None:
        super().__init__(workload, gpaw, seed, watch)
        self.name = policy.title
        assert isinstance(self.tally, Tally)
        around = Surroundings(self.tally, self.let_run, self.note)
        self.td.vm.mirror_zapper = zapper(self.td.tdx, policy, around)


class ConversionBench(Bench):
    """A conversion policy answers the guest. What the guest shares it writes to; after a conversion
    it looks whether other pages that the policy has dealt with hold what it had written there.
    """

    checked = (SHARED, PRIVATE, END)

    def __init__(
        self,
        policy: ConversionPolicy,
        workload: Workload,
        gpaw: int,
        seed: int,
        watch: Watching | None,
    ) -> None:
        super().__init__(workload, gpaw, seed, watch)
        self.name = policy.title
        self.tally: ConversionTally = ConversionTally()
        self._policy = policy
        self._vmm = ConvertingVmm(self.td, self.tally, self.let_run, self.note)
        self._lost: Violation | None = None
        self._stores = 0
        #: gfn -> what the guest has written there; a page that it has accepted has zeros
        self._written = dict.fromkeys(range(PAGES, PAGES + workload.vcpus), b"\1")
        self._is_converting = False
        #: it is vCPU 0 that moves
        self._asks = False
        self._counted = self._sums()
        self.td.converter = self._convert

    def play(self, event: Event) -> None:
        """As `Bench.play`; and that the guest has found what it has written."""
        self._is_converting = event.do in (SHARED, PRIVATE)
        self._counted = self._sums()
        super().play(event)
        self._count()
        if self._lost is not None:
            raise Stopped(self._lost)

    def result(self, violation: Violation | None) -> ConversionResult:
        """What has been done so far."""
        self._count()
        counts = asdict(self.tally)
        del counts["pages"]
        return ConversionResult(self.name, self.workload.name, violation=violation, **counts)

    def note(self, op: Op) -> None:
        """Count before the watcher looks."""
        self._count(look=op.name in (MAPGPA, FAULT, PRE_FAULT) or op.name.islower())
        super().note(op)

    def let_run(self) -> None:
        """As `Bench.let_run`; it is not vCPU 0 that moves."""
        asks, self._asks = self._asks, False
        super().let_run()
        self._asks = asks

    def program(self, event: Event) -> Generator[Access, Any, None]:
        """The guest asks, and uses what it has got."""
        gfns = range(event.gfn, event.gfn + event.pages)
        if event.do in (SHARED, PRIVATE):
            for gfn in gfns:
                self._written.pop(gfn, None)
            yield self.asking(event)
        if event.do == PRIVATE:
            self._written.update(dict.fromkeys(gfns, bytes(8)))
        if event.do in (SHARED, TOUCH):
            for gfn in gfns:
                self._stores += 1
                self._written[gfn] = self._stores.to_bytes(8, "little")
                yield Write(self._alias(gfn), self._written[gfn])
        if event.do in (SHARED, PRIVATE):
            yield from self._looking()

    def why(self) -> str:
        """Which call has taken a page from the guest."""
        if not self._vmm.taken:
            return ""
        gfn, op = next(iter(self._vmm.taken.items()))
        return (
            f". {op.name} of gfns {op.gfn:#x}..{op.gfn + op.level - 1:#x} took {gfn:#x}, which the "
            "guest had accepted and not given up"
        )

    def _looking(self) -> Generator[Access, bytes, None]:
        """The guest reads what it has written into pages that calls were about unasked."""
        unasked = sorted(self._vmm.unasked & self._written.keys())
        self._vmm.unasked.clear()
        for gfn in unasked:
            data = self._written[gfn]
            found = yield Read(self._alias(gfn), len(data))
            if found != data:
                text = f"the guest wrote {data.hex()} to gfn {gfn:#x}, and reads {found.hex()}"
                self._lost = self._lost or Violation("data", text)

    def _alias(self, gfn: int) -> int:
        return self.td.guest.alias(gfn << PAGE_SHIFT)

    def _convert(self, gpa: int, size: int, private: bool, implicit: bool) -> Operation:
        """What `Td.converter` has to be for the policy to answer. vCPUs beside vCPU 0 use nothing
        but a page of their own: they ask only if that was taken from them.
        """
        request = Request(gpa >> PAGE_SHIFT, size >> PAGE_SHIFT, private, implicit)
        yield ("conversion policy", *request)
        if not self._asks:
            text = f"KVM exited for a page that a vCPU uses, gfn {request.gfn:#x}{self.why()}"
            raise Stopped(Violation("alive", text))
        self._vmm.answer(self._policy, request)
        return 0

    def _thread(self, event: Event) -> Operation:
        """As `Bench._thread`, its entries into the guest counted."""
        thread, result = super()._thread(event), None
        while True:
            self._asks = True
            try:
                step = next(thread)
            except StopIteration:
                return result
            finally:
                self._asks = False
            self.tally.entries += self._is_converting and step == _ENTRY
            yield step

    def _count(self, look: bool = True) -> None:
        """Bring the tally up to date with the machine; what others than conversions do is left
        out. look: for memory that is taken twice, which costs time. It grows while the guest runs
        and with PRE-FAULT.
        """
        tally, before = self.tally, self._counted
        if look:
            tally.most_double = max(tally.most_double, doubles(self.td))
        self._counted = self._sums()
        if self._is_converting:
            seamcalls, retries, pages, ipis = map(sub, self._counted, before)
            tally.seamcalls += seamcalls
            tally.retries += retries
            tally.pages += pages
            tally.ipis += ipis

    def _sums(self) -> tuple[int, int, int, int]:
        """SEAMCALLs, those that were refused, pages taken out, IPIs: all until now."""
        trace, ipis = self.machine.trace, self.machine.host.counts["ipi"]
        calls, refused = trace.seamcalls(), trace.refusals()
        return (
            sum(calls.get(leaf, 0) for leaf in _LEAVES),
            sum(refused.get(leaf, 0) for leaf in _LEAVES),
            calls.get(TDH_MEM_PAGE_REMOVE, 0) - refused.get(TDH_MEM_PAGE_REMOVE, 0),
            ipis,
        )


#: vCPU 0 is about to enter.
_ENTRY: Step = ("vcpu_enter_guest", 0)


def zapper(tdx: Tdx, policy: ZapPolicy, around: Surroundings) -> MirrorZapper:
    """What `Vm.mirror_zapper` has to be for `policy` to take the TD's pages out."""

    def zap(root: MmuPage, start: int, end: int, flush: bool) -> Generator[Step, None, bool]:
        leaves = _leaves(tdx.vm, root, start, end)
        if not leaves:
            return flush
        yield ("zap policy", start, end)
        ZapHost(tdx, leaves, start, end, around).perform(policy)
        return True

    return zap


def _leaves(vm: Vm, root: MmuPage, start: int, end: int) -> list[Blocked]:
    """The present leaves of a range."""
    return [
        Blocked(it.as_id, it.gfn, it.level, it.word, it.old_spte)
        for it in for_each_tdp_pte(vm, root, start, end)
        if is_present_leaf(it.old_spte, it.level)
    ]
