"""Run a zap policy against a workload, count what it does, and compare.

    run(Mine(), "steady")                        # Result: counts, and the rule that it broke
    leaderboard([KernelPolicy(), Mine()])        # over all workloads

Nothing is timed. What is counted is what leaves the host's own code: SEAMCALLs, and IPIs. While a
policy makes a call, each running vCPU makes none to three steps for each step of KVM's, by lot; the
same `seed` draws the same. After every zap the invariants of the machine are checked.

A policy that keeps the rules in all runs may have been lucky: these are some schedules, not all.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from itertools import product, repeat
from typing import NamedTuple

from tdxlab import workloads
from tdxlab.accesses import Access, Hlt, MapGpa, Read, Write
from tdxlab.arch import PAGE_SIZE
from tdxlab.invariants import InvariantBroken, Watch
from tdxlab.kvm.batching import Blocked
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.tdx import Tdx
from tdxlab.kvm.vendor import MirrorZapper
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.machine import Machine
from tdxlab.policy import Op, Surroundings, Tally, ZapHost, ZapPolicy
from tdxlab.steps import WAIT, Operation, Step
from tdxlab.stopping import Stopped, Violation
from tdxlab.vmm_run import RunResult
from tdxlab.vmm_td import Td
from tdxlab.workloads import END, PAGES, SHARED, TOUCH, Event, Workload

#: Leaves that a zap is made of, in the order of a result.
_LEAVES = (
    "TDH.MEM.RANGE.BLOCK",
    "TDH.MEM.RANGE.UNBLOCK",
    "TDH.MEM.TRACK",
    "TDH.MEM.PAGE.REMOVE",
    "TDH.PHYMEM.PAGE.WBINVD",
)
#: A page of each vCPU's own, which no event is about.
_OWN = PAGES * PAGE_SIZE
#: Steps in which a thread must have moved on; more mean that the model is stuck.
_STUCK = 100_000


class Result(NamedTuple):
    """What a policy did in a workload. pages: taken out. block ... writeback: SEAMCALLs, those made
    again included. kicks, ipis: of the policy's, and of the answer to BUSY. retries: calls that
    were made again or refused. most_blocked: pages that the guest was shut out of at one time.
    violation: the rule that ended the run, None if none did.
    """

    policy: str
    workload: str
    pages: int
    block: int
    unblock: int
    track: int
    remove: int
    writeback: int
    kicks: int
    ipis: int
    retries: int
    most_blocked: int
    violation: Violation | None = None

    @property
    def seamcalls(self) -> int:
        """All of them."""
        return self.block + self.unblock + self.track + self.remove + self.writeback

    @property
    def cost(self) -> int:
        """SEAMCALLs and IPIs: how often a border was crossed. It is no time."""
        return self.seamcalls + self.ipis


class Standing(NamedTuple):
    """A row of the leaderboard: sums over its workloads. place: 0 without one. saved: cost in
    hundredths of the first policy's that is saved. most_blocked: the most of any. verdict: "keeps
    the rules", or the workload and the rule.
    """

    place: int
    policy: str
    seamcalls: int
    track: int
    ipis: int
    retries: int
    most_blocked: int
    cost: int
    saved: int
    verdict: str


#: Told of the TD, of what the policy or the workload does, and of what was counted by then.
Watching = Callable[[Td, Op, Tally], object]


def run(
    policy: ZapPolicy | type[ZapPolicy],
    workload: Workload | str,
    *,
    gpaw: int = 48,
    seed: int = 1,
    watch: Watching | None = None,
) -> Result:
    """Let `policy` do all zaps of a workload, on a machine of its own.

    policy: an object, of which a copy is used, or its class. workload: or its name. seed: of the
    vCPUs' pace; 0: one step for each of KVM's. watch: told of each call of the policy
    when it is done, and of each event that begins, as an Op in lower-case letters.
    Refuses what is no policy, an unknown workload, another GPAW: ValueError.
    """
    policy = _own(policy)
    workload = workloads.load(workload) if isinstance(workload, str) else workload
    bench = _Bench(policy, workload, gpaw, seed, watch)
    violation = None
    try:
        for event in workload.events:
            bench.play(event)
    except Stopped as stop:
        violation = stop.violation
    except InvariantBroken as broken:
        rule = f"invariant {broken.number}"
        violation = Violation(rule, f"{broken.name}: {broken.explanation}")
    finally:
        bench.close()
    return bench.result(violation)


def kernels_own(workload: Workload | str, *, gpaw: int = 48, seed: int = 1) -> dict[str, int]:
    """Leaf -> calls that KVM's own code makes in a workload, without any policy: those of the zaps,
    and at the TD's end the write-back of its TDR. Arguments as for `run`.
    """
    workload = workloads.load(workload) if isinstance(workload, str) else workload
    bench = _Bench(None, workload, gpaw, seed, None)
    for event in workload.events:
        bench.play(event)
    bench.close()
    return bench.calls()


def leaderboard(
    policies: Sequence[ZapPolicy | type[ZapPolicy]],
    names: Sequence[str] | None = None,
    *,
    gpaw: int = 48,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> list[Standing]:
    """Run all policies in all workloads; who keeps the rules comes first, by cost, then by how many
    pages it blocks. names: of workloads, None for all. progress: told (runs done, in all).

    Refuses as `run`, and no policies at all: ValueError.
    """
    if not policies:
        raise ValueError("a leaderboard without policies; give one at least")
    names = workloads.names() if names is None else list(names)
    results: list[list[Result]] = [[] for _ in policies]
    for number, (policy, name) in enumerate(product(policies, names)):
        results[number // len(names)].append(run(policy, name, gpaw=gpaw, seed=seed))
        if progress is not None:
            progress(number + 1, len(policies) * len(names))
    return standings(results)


def standings(results: Sequence[Sequence[Result]]) -> list[Standing]:
    """The leaderboard of results: one row for each policy's, the first of which others are
    compared with.
    """
    base = sum(result.cost for result in results[0])
    rows = [_standing(of_one, base) for of_one in results]
    rows.sort(key=lambda row: (row.verdict != _GOOD, row.cost, row.most_blocked))
    good = sum(row.verdict == _GOOD for row in rows)
    return [row._replace(place=n) if n <= good else row for n, row in enumerate(rows, 1)]


_GOOD = "keeps the rules"


def _standing(results: Sequence[Result], base: int) -> Standing:
    wrong = [f"{r.workload}: {r.violation.rule}" for r in results if r.violation is not None]
    cost = sum(r.cost for r in results)
    return Standing(
        0,
        results[0].policy,
        sum(r.seamcalls for r in results),
        sum(r.track for r in results),
        sum(r.ipis for r in results),
        sum(r.retries for r in results),
        max(r.most_blocked for r in results),
        cost,
        0 if wrong or not base else round(100 * (base - cost) / base),
        "; ".join(wrong) or _GOOD,
    )


def _own(policy: ZapPolicy | type[ZapPolicy]) -> ZapPolicy:
    """A policy that nobody else uses."""
    if isinstance(policy, type) and issubclass(policy, ZapPolicy):
        return policy()
    if isinstance(policy, ZapPolicy):
        return copy.deepcopy(policy)
    raise ValueError(f"{policy!r} is no policy; derive a class from ZapPolicy")


class _Bench:
    """One machine with one TD that goes through a workload. `policy` None: KVM's own walk zaps."""

    def __init__(
        self,
        policy: ZapPolicy | None,
        workload: Workload,
        gpaw: int,
        seed: int,
        watch: Watching | None,
    ) -> None:
        self._workload = workload
        self._name = policy.title if policy else "KVM itself"
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=workload.vcpus, packages=1)
        memory = 2 * PAGES * PAGE_SIZE
        self.td = self.machine.create_td(vcpus=workload.vcpus, memory=memory, discards=True)
        self.td.touch(_OWN, workload.vcpus * PAGE_SIZE)
        self._dice = random.Random(seed) if seed else None
        self._watch = watch
        self._runners: list[Operation] = []
        self._is_over = False
        self.tally = Tally()
        if policy is not None:
            around = Surroundings(self.tally, self._let_run, self._note)
            self.td.vm.mirror_zapper = zapper(self.td.tdx, policy, around)
        self._invariants = Watch(self.machine)
        self._before = dict(self.machine.seamcalls)

    def close(self) -> None:
        """Nobody goes on any more."""
        for runner in self._runners:
            runner.close()
        self._invariants.close()

    def play(self, event: Event) -> None:
        """One event, with its vCPUs running; the invariants, if pages were to be taken out."""
        self._note(Op(event.do, event.gfn, event.pages, str(event.running)))
        self._is_over = False
        vcpus = range(1, event.running + 1)
        self._runners = [self.td.run_steps(self._reading(n), vcpu=n) for n in vcpus]
        self._finish(self._thread(event))
        self._is_over = True
        for runner in self._runners:
            self._finish(runner)
        self._runners = []
        if event.do in (SHARED, END):
            self._invariants.check("alive")

    def result(self, violation: Violation | None) -> Result:
        """What has been done so far."""
        name = self._workload.name
        return Result(self._name, name, violation=violation, **asdict(self.tally))

    def calls(self) -> dict[str, int]:
        """The leaves that zaps are made of, and how often each was called."""
        now = self.machine.seamcalls
        return {leaf: now.get(leaf, 0) - self._before.get(leaf, 0) for leaf in _LEAVES}

    # -- threads

    def _thread(self, event: Event) -> Operation:
        """What the event does: vCPU 0's program, or the end of the TD."""
        if event.do == END:
            return self.machine.host.on_cpu(0, self.td.destroy_steps())
        return self._going_on(self.td.run_steps(self._program(event), vcpu=0))

    def _going_on(self, thread: Operation) -> Operation:
        """The guest's program, which has to come to its end."""
        result: RunResult = yield from thread
        if not result.ok:
            text = f"the TD cannot go on: {result.reason}, {result.detail}"
            raise Stopped(Violation("alive", text))

    def _program(self, event: Event) -> list[Access]:
        first, alias = event.gfn * PAGE_SIZE, self.td.guest.alias
        if event.do == TOUCH:
            return [Write(alias(first + page * PAGE_SIZE)) for page in range(event.pages)]
        shared = self.td.guest.shared_mask if event.do == SHARED else 0
        return [MapGpa(first | shared, event.pages * PAGE_SIZE)]

    def _reading(self, vcpu: int) -> Iterator[Access]:
        """What a vCPU does while an event lasts."""
        reads = self._workload.reads_between_exits
        while not self._is_over:
            for _ in range(reads) if reads else repeat(None, 1):
                yield Read(_OWN + vcpu * PAGE_SIZE)
            if reads:
                yield Hlt()

    def _let_run(self) -> None:
        """KVM has made a step: let each running vCPU make one, or as many as the dice say."""
        for runner in self._runners:
            steps = self._dice.randrange(4) if self._dice else 1
            for _ in range(steps):
                next(runner, None)

    def _finish(self, thread: Operation) -> None:
        """Let a thread go on to its end, with the running vCPUs beside it."""
        for number, step in enumerate(thread):
            if number > _STUCK:
                raise AssertionError(f"{self._name} is stuck at {step}")
            if step[0] == WAIT or not self._is_over:
                self._let_run()

    def _note(self, op: Op) -> None:
        if self._watch is not None:
            self._watch(self.td, op, self.tally)


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
