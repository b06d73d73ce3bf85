"""Your own zap policy: how private pages are taken out of a running TD, as a small class.

    class Mine(ZapPolicy):
        def zap(self, host, pages):
            for gfn in pages:
                host.block(gfn)
            host.track()
            host.kick()
            for gfn in pages:
                host.remove(gfn)
                host.writeback(gfn)

KVM calls `zap` with mmu_lock held, in the place of its own walk, whenever private pages become
shared, or are punched out of their file, or the TD ends. What `host` offers are KVM's SEAMCALLs and
its kick; each answers with the module's status as a word. Steps are hidden: while a call is made
the TD's vCPUs go on. When `zap` returns the host clears the pages and gives them to others.

What a policy does wrong is no exception for its author: it is a `Violation`, which names the rule.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c, for what KVM does; `policies.py` has it as a policy.
Differs: no kernel has such an interface. KVM may give mmu_lock up between two pages; here it is
held until `zap` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tdxlab.abi.status import TDX_SUCCESS, describe, status_name
from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.batching import Blocked, change
from tdxlab.kvm.blocked import is_blocked_spte, make_blocked_spte
from tdxlab.kvm.seamcall_args import Answer, pg_level_to_tdx_sept_level, tdx_operand_busy
from tdxlab.kvm.seamcalls import (
    tdh_mem_page_remove,
    tdh_mem_range_block,
    tdh_mem_range_unblock,
    tdh_mem_track,
    tdh_phymem_page_wbinvd_hkid,
)
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE, spte_to_pfn
from tdxlab.kvm.tdx import Tdx
from tdxlab.kvm.tdx_hooks import retry_without_vcpus, tdx_clear_page
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE, gfn_to_gpa, pages_per_level
from tdxlab.steps import Operation, Step
from tdxlab.stopping import LineLimit, Stopped, Violation

#: What a call answers that did what it should.
SUCCESS = "SUCCESS"
#: Answers that a policy may get and go on: a vCPU of an old epoch is still inside.
WAITS = ("TLB_TRACKING_NOT_DONE", "PREVIOUS_TLB_EPOCH_BUSY")

#: Rule -> what it asks of a policy; besides these, the machine's invariants must hold.
RULES = {
    "tracking": "a page whose REMOVE had to wait is not treated as removed",
    "status": "the module refuses no call for good: in KVM that ends the TD",
    "unmapped": "when zap returns every page is out of the TD, and no table is closed",
    "scope": "calls are about the pages of the zap alone",
    "end": "zap returns",
    "policy": "zap raises nothing",
    "alive": "the TD goes on afterwards",
}

#: Calls that a policy may make in one zap: so many, and so many more for each page.
MOST_CALLS, MOST_CALLS_A_PAGE = 64, 12

T = TypeVar("T", int, Answer)
Steps = Generator[Step, None, T]


class Policy:
    """What somebody wrote, of whatever kind."""

    name = ""

    @property
    def title(self) -> str:
        """What a leaderboard calls it: its name, or its class's."""
        return self.name or type(self).__name__

    def __repr__(self) -> str:
        return self.title


class ZapPolicy(Policy):
    """How pages are taken out of a TD. Write `zap`, and give it a `name` if you like."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Remove all of `pages` from the TD, and write each back.

        host: what can be done. pages: the gfns that are mapped privately, ascending, one at least.
        """
        raise NotImplementedError(f"{self.title} has no `zap`; write one")


class Op(NamedTuple):
    """One call of a policy. name: "BLOCK", "TRACK", "KICK", "REMOVE", "WRITEBACK" or "UNBLOCK".
    gfn: -1 for a call about none. level: KVM's, 0 without gfn. answer: a status, or IPIs.
    """

    name: str
    gfn: int
    level: int
    answer: str


@dataclass
class Tally:
    """What policies have done: pages removed; calls of each leaf, kicks, IPIs of kicks, those that
    answer BUSY included; calls made again or refused; most pages that were blocked at a time.
    """

    pages: int = 0
    block: int = 0
    unblock: int = 0
    track: int = 0
    remove: int = 0
    writeback: int = 0
    kicks: int = 0
    ipis: int = 0
    retries: int = 0
    most_blocked: int = 0

    @property
    def seamcalls(self) -> int:
        """All of them."""
        return self.block + self.unblock + self.track + self.remove + self.writeback

    def count(self, leaf: str) -> None:
        """One call of a leaf, by the name of its Op."""
        name = leaf.lower()
        setattr(self, name, getattr(self, name) + 1)


class Surroundings(NamedTuple):
    """What a policy runs in. tally: what it does is added there. meanwhile: called after each of
    KVM's steps, so that vCPUs go on. note: called with each Op.
    """

    tally: Tally
    meanwhile: Callable[[], object]
    note: Callable[[Op], object]


class ZapHost:
    """What a policy can do in one zap. start, end: gfns of the range, end exclusive.

    A status that the rules allow is returned; any other ends the run with a `Violation`, as it ends
    a TD in KVM. A busy operand is not seen: as KVM does, the call is made once more with all vCPUs
    kept out.
    """

    def __init__(
        self, tdx: Tdx, entries: Sequence[Blocked], start: int, end: int, around: Surroundings
    ) -> None:
        self.start, self.end = start, end
        self._tdx = tdx
        self._entries = {entry.gfn: entry for entry in entries}
        self._around = around
        self._blocked = 0
        self._regions: set[tuple[int, int]] = set()
        self._last: dict[int, Op] = {}
        self._calls_left = MOST_CALLS + MOST_CALLS_A_PAGE * len(entries)
        self._limit = LineLimit("zap")

    # -- what a policy calls

    @property
    def inside(self) -> int:
        """How many vCPUs are in the guest, as KVM knows it."""
        return sum(vcpu.mode != OUTSIDE_GUEST_MODE for vcpu in self._tdx.vm.vcpus)

    def block(self, gfn: int, level: int = 1) -> str:
        """TDH.MEM.RANGE.BLOCK: no new translation. level: 1 for the page; 2 for the 2 MiB that
        begin at `gfn`, all of which must lie in the range. Returns SUCCESS.
        """
        self._require("BLOCK", gfn, level)
        if level == 1:
            self._set_mirror(gfn, is_blocked=True)
        return self._about(gfn, "BLOCK", level, tdh_mem_range_block)

    def unblock(self, gfn: int, level: int = 1) -> str:
        """TDH.MEM.RANGE.UNBLOCK, of what was blocked and tracked. Returns SUCCESS or a wait."""
        self._require("UNBLOCK", gfn, level)
        return self._about(gfn, "UNBLOCK", level, tdh_mem_range_unblock)

    def track(self) -> str:
        """TDH.MEM.TRACK: the TD's next TLB epoch begins. Returns SUCCESS or a wait."""
        tdx = self._tdx
        return self._seamcall(Op("TRACK", -1, 0, ""), lambda: tdh_mem_track(tdx.host, tdx.td))

    def kick(self) -> int:
        """IPI every vCPU that is in the guest and wait until it has left. Returns the IPIs."""
        self._begin()
        tally, host = self._around.tally, self._tdx.host
        before = tally.ipis
        self._drive(host.kick_all(self._tdx.vm, "OUTSIDE_GUEST_MODE"))
        tally.kicks += 1
        sent = tally.ipis - before
        self._end(Op("KICK", -1, 0, f"{sent} IPI{'s' * (sent != 1)}"))
        return sent

    def remove(self, gfn: int) -> str:
        """TDH.MEM.PAGE.REMOVE of a page that is blocked and tracked. Returns SUCCESS or a wait."""
        self._require("REMOVE", gfn)
        return self._about(gfn, "REMOVE", 1, tdh_mem_page_remove)

    def writeback(self, gfn: int) -> str:
        """TDH.PHYMEM.PAGE.WBINVD: write the page's lines in the caches back. Returns SUCCESS."""
        self._require("WRITEBACK", gfn)
        tdx, hpa = self._tdx, self._pfn(gfn) << PAGE_SHIFT
        make = lambda: tdh_phymem_page_wbinvd_hkid(tdx.host, tdx.hkid, hpa)  # noqa: E731
        return self._seamcall(Op("WRITEBACK", gfn, 1, ""), make)

    # -- how it is done

    def perform(self, policy: ZapPolicy) -> None:
        """Let the policy do its work, and see that it is done. Raises Stopped for what is wrong."""
        self._limit.run(policy.zap, self, list(self._entries))
        self._require_done()
        self._give_back()

    def _about(
        self, gfn: int, name: str, level: int, leaf: Callable[..., Generator[Step, None, Answer]]
    ) -> str:
        """A SEAMCALL about a private GPA."""
        tdx, place = self._tdx, (gfn_to_gpa(gfn), pg_level_to_tdx_sept_level(level))
        return self._seamcall(Op(name, gfn, level, ""), lambda: leaf(tdx.host, tdx.td, *place))

    def _seamcall(self, op: Op, make: Callable[[], Steps[T]]) -> str:
        """One call, with KVM's answer to BUSY; returns the status as a word."""
        self._begin()
        answer: T = self._drive(self._until_not_busy(op.name, make))
        status = _status(answer)
        word = SUCCESS if status == TDX_SUCCESS else status_name(status).removeprefix("TDX_")
        op, before = op._replace(answer=word), self._last.get(op.gfn)
        if word in WAITS:
            self._around.tally.retries += 1
        elif word == SUCCESS:
            self._take_effect(op)
        self._end(op)
        if word != SUCCESS and word not in WAITS:
            self._limit.insist(Stopped(_refused(op, status, before)))
        return word

    def _take_effect(self, op: Op) -> None:
        """What a call that succeeded means for the mirror and the books."""
        name, gfn, level, _ = op
        tally = self._around.tally
        if level > 1:
            (self._regions.add if name == "BLOCK" else self._regions.discard)((gfn, level))
        elif name == "BLOCK":
            self._blocked += 1
            tally.most_blocked = max(tally.most_blocked, self._blocked)
        elif name == "UNBLOCK":
            self._blocked -= 1
            self._set_mirror(gfn, is_blocked=False)
        elif name == "REMOVE":
            self._blocked -= 1
            tally.pages += 1
            self._store(gfn, SHADOW_NONPRESENT_VALUE)

    def _until_not_busy(self, name: str, make: Callable[[], Steps[T]]) -> Steps[T]:
        tally = self._around.tally
        tally.count(name)
        answer = yield from make()
        if tdx_operand_busy(_status(answer)):
            tally.count(name)
            tally.retries += 1
            answer = yield from retry_without_vcpus(self._tdx, make())
        return answer

    def _drive(self, operation: Steps[T] | Generator[Step, None, None]) -> T:
        """Make one of KVM's operations, and let the vCPUs go on meanwhile."""
        host = self._tdx.host
        before = host.counts["ipi"]
        result: T = drive(operation, self._around.meanwhile)
        self._around.tally.ipis += host.counts["ipi"] - before
        return result

    def _begin(self) -> None:
        self._limit.stop()
        self._calls_left -= 1
        if self._calls_left < 0:
            self._limit.insist(Stopped(Violation("end", f"the zap has no end: {self._left()}")))

    def _end(self, op: Op) -> None:
        if op.gfn >= 0:
            self._last[op.gfn] = op
        self._around.note(op)
        self._limit.start()

    # -- the mirror

    def _pfn(self, gfn: int) -> int:
        return spte_to_pfn(self._entries[gfn].spte)

    def _set_mirror(self, gfn: int, *, is_blocked: bool) -> None:
        """The mirror's entry says that the page is blocked, or is a leaf again."""
        spte = self._entries[gfn].spte
        self._store(gfn, make_blocked_spte(spte_to_pfn(spte)) if is_blocked else spte)

    def _store(self, gfn: int, spte: int) -> None:
        entry, vm = self._entries[gfn], self._tdx.vm
        now = vm.memory.words.view[entry.word]
        for _ in change(vm, entry, now, spte):
            pass

    def _word(self, entry: Blocked) -> int:
        spte: int = self._tdx.vm.memory.words.view[entry.word]
        return spte

    # -- what must hold

    def _require(self, name: str, gfn: int, level: int = 1) -> None:
        """The call is about a page of the zap, or about a region all of which is in its range."""
        size = pages_per_level(2)
        if level == 1 and gfn not in self._entries:
            text = f"{name} of gfn {gfn!r}, which is not among the zap's pages"
            self._limit.insist(Stopped(Violation("scope", text)))
        if level != 1 and (level != 2 or gfn % size or gfn < self.start or gfn + size > self.end):
            text = (
                f"{name} of gfn {gfn:#x} at level {level}: level 2 wants {size} gfns in a row in "
                f"{self.start:#x}..{self.end - 1:#x}, the first a multiple of {size}"
            )
            self._limit.insist(Stopped(Violation("scope", text)))

    def _left(self) -> str:
        """How many pages are not out yet, in words."""
        left = list(self._remaining())
        return f"{len(left)} of {len(self._entries)} pages are still in the TD"

    def _remaining(self) -> Iterator[Blocked]:
        return (e for e in self._entries.values() if self._word(e) != SHADOW_NONPRESENT_VALUE)

    def _require_done(self) -> None:
        """All pages are out, and no table above them is closed."""
        first = next(self._remaining(), None)
        if first is not None:
            state = "blocked" if is_blocked_spte(self._word(first)) else "mapped"
            last = self._last.get(first.gfn)
            said = f"; {_told(last)}" if last else ""
            text = f"{self._left()} when `zap` returns: gfn {first.gfn:#x} is {state}{said}"
            raise Stopped(Violation("unmapped", text))
        for gfn, level in sorted(self._regions):
            text = f"the level {level} entry above gfn {gfn:#x} is still blocked: nothing can go in"
            raise Stopped(Violation("unmapped", text))

    def _give_back(self) -> None:
        """The host clears the pages, and takes them for others."""
        vm = self._tdx.vm
        for gfn in self._entries:
            pfn = self._pfn(gfn)
            tdx_clear_page(self._tdx.host, pfn << PAGE_SHIFT)
            vm.guest_memory.put_page(pfn)


def drive(operation: Operation, meanwhile: Callable[[], object]) -> Any:
    """Make an operation to its end, `meanwhile` after each step; returns what it returns."""
    try:
        while True:
            next(operation)
            meanwhile()
    except StopIteration as end:
        return end.value


def _status(answer: int | Answer) -> int:
    return answer if isinstance(answer, int) else answer[0]


def _refused(op: Op, status: int, before: Op | None) -> Violation:
    """What is wrong with a call that the module refuses for good. before: the last one about the
    same page.
    """
    if before is not None and before.answer in WAITS:
        text = f"{_told(before)}, and the policy went on as if the page were out"
        return Violation("tracking", text)
    return Violation("status", f"{_call(op)}: {describe(status)}")


def _told(op: Op) -> str:
    """A call in words, and its answer."""
    return f"{_call(op)} was answered {op.answer}"


def _call(op: Op) -> str:
    where = f" of gfn {op.gfn:#x}" if op.gfn >= 0 else ""
    level = f" at level {op.level}" if op.level > 1 else ""
    return f"{op.name}{where}{level}"
