"""Your own conversion policy: what the VMM does when memory is to become the other kind.

    class Mine(ConversionPolicy):
        def convert(self, vmm, request):
            vmm.set_attributes(request.gfn, request.pages, private=request.private)
            if request.private:
                vmm.discard(request.gfn, request.pages)
            else:
                vmm.punch(request.gfn, request.pages)

The VMM calls `convert` when KVM_RUN comes back to it because the guest has asked with MapGPA
(KVM_EXIT_HYPERCALL, 2 MiB at most), or has used a page as the other kind without having asked
(KVM_EXIT_MEMORY_FAULT). What `vmm` offers are the system calls that a VMM has for this. When
`convert` returns, MapGPA has succeeded for the guest, and its vCPU goes on. Steps are hidden: while
a call is made the TD's other vCPUs go on.

What a policy does wrong is no exception for its author: it is a `Violation`, which names the rule.

Source: QEMU 10, accel/kvm/kvm-all.c, kvm_convert_memory, for what a VMM does; `conversions.py` has
it as a policy.
Differs: no VMM has such an interface. A policy cannot refuse a request, or leave the rest of it for
later, as a VMM can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import errorcode
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.fault import kvm_vcpu_pre_fault_memory
from tdxlab.policy import MOST_CALLS, MOST_CALLS_A_PAGE, SUCCESS, Op, Policy, drive
from tdxlab.steps import Operation
from tdxlab.stopping import LineLimit, Stopped, Violation
from tdxlab.vmm_td import Td

#: Rule -> what it asks of a policy; besides these, the machine's invariants must hold.
CONVERSION_RULES = {
    "answered": "a page that the guest used as the other kind is of that kind afterwards",
    "alive": "the TD goes on: no page that it has accepted is taken from it unasked",
    "data": "what the guest has written into shared memory is still there",
    "scope": "calls are about gfns of the TD's memory",
    "end": "convert returns",
    "policy": "convert raises nothing",
}

#: Names of a request's Op and of a call's.
MAPGPA, FAULT = "MapGPA", "Memory fault"
SET_PRIVATE, SET_SHARED = "SET PRIVATE", "SET SHARED"
PUNCH, DISCARD, PRE_FAULT = "PUNCH", "DISCARD", "PRE-FAULT"
#: Ops whose `level` is a number of pages.
PAGES_OPS = frozenset((MAPGPA, FAULT, SET_PRIVATE, SET_SHARED, PUNCH, DISCARD, PRE_FAULT))

#: What memory a gfn has: of guest_memfd, of the VMM's own, both.
PRIVATE_PAGE, SHARED_PAGE, TWICE = "private", "shared", "twice"


class Request(NamedTuple):
    """What KVM came to the VMM with. gfn, pages: which. private: the kind that they are to be.

    implicit: nobody has asked; the guest has used the page as the kind that it is not.
    """

    gfn: int
    pages: int
    private: bool
    implicit: bool

    @property
    def gfns(self) -> range:
        """All that it is about."""
        return range(self.gfn, self.gfn + self.pages)


class ConversionPolicy(Policy):
    """How a VMM converts memory. Write `convert`, and give it a `name` if you like."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Answer a request.

        vmm: what can be done. An object lives for a whole workload, and may remember things.
        """
        raise NotImplementedError(f"{self.title} has no `convert`; write one")


@dataclass
class ConversionTally:
    """What conversions have been. requests: exits to user space that a policy was asked at;
    implicit: those of them for memory faults. attributes ... pre_faults: its system calls.

    From the guest's asking to its first use of what it has got: entries of its vCPU, one for each
    exit; seamcalls of zaps and of pages that are mapped; retries: those of them that were refused,
    and are made again; ipis; pages taken out of the TD.

    most_at_once: most pages that one call had its attributes set for. most_double: most pages that
    took memory twice, as private and as shared memory.
    """

    requests: int = 0
    implicit: int = 0
    attributes: int = 0
    punches: int = 0
    discards: int = 0
    pre_faults: int = 0
    entries: int = 0
    seamcalls: int = 0
    retries: int = 0
    ipis: int = 0
    pages: int = 0
    most_at_once: int = 0
    most_double: int = 0

    @property
    def calls(self) -> int:
        """System calls that the policy made."""
        return self.attributes + self.punches + self.discards + self.pre_faults


class ConvertingVmm:
    """What a policy can do, in one run of a workload. Each call returns SUCCESS, or the name of the
    errno. td: whose memory it is. tally: what it does is added there. meanwhile, note: as in
    `policy.Surroundings`. unasked: gfns that calls were about and the guest's requests not. taken:
    gfn -> the call that took this page from a guest that had accepted it and did not give it up.
    """

    def __init__(
        self,
        td: Td,
        tally: ConversionTally,
        meanwhile: Callable[[], object],
        note: Callable[[Op], object],
    ) -> None:
        self.unasked: set[int] = set()
        self.taken: dict[int, Op] = {}
        self._td, self._tally = td, tally
        self._meanwhile, self._note = meanwhile, note
        self._request = Request(0, 0, False, False)
        self._limit = LineLimit("conversion")
        self._calls_left = 0

    # -- what a policy calls

    @property
    def pages(self) -> int:
        """How many gfns the TD's memory has, from gfn 0 on."""
        return sum(backing.size for backing in self._td.backings) >> PAGE_SHIFT

    def is_private(self, gfn: int) -> bool:
        """The kind of a gfn, by its attribute."""
        return self._td.vm.attributes.is_private(gfn)

    def set_attributes(self, gfn: int, pages: int, *, private: bool) -> str:
        """KVM_SET_MEMORY_ATTRIBUTES: KVM unmaps the old kind, and refuses it from then on."""
        op = self._begin(SET_PRIVATE if private else SET_SHARED, gfn, pages)
        self._tally.attributes += 1
        self._tally.most_at_once = max(self._tally.most_at_once, pages)
        if not private:
            self._take(op)
        steps = self._td.set_memory_attributes_steps
        return self._make(op, steps(gfn << PAGE_SHIFT, pages << PAGE_SHIFT, private=private))

    def punch(self, gfn: int, pages: int) -> str:
        """fallocate(2) with PUNCH_HOLE: KVM unmaps the private pages, guest_memfd frees them."""
        op = self._begin(PUNCH, gfn, pages)
        self._tally.punches += 1
        self._take(op)
        steps = self._td.punch_hole_steps
        return self._make(op, steps(gfn << PAGE_SHIFT, pages << PAGE_SHIFT))

    def discard(self, gfn: int, pages: int) -> str:
        """The VMM throws the shared pages away, as `Gate.discard_steps`."""
        op = self._begin(DISCARD, gfn, pages)
        self._tally.discards += 1
        steps = self._td.discard_steps
        return self._make(op, steps(gfn << PAGE_SHIFT, pages << PAGE_SHIFT))

    def pre_fault(self, gfn: int, pages: int) -> str:
        """KVM_PRE_FAULT_MEMORY: KVM maps every page as the kind that it is. A private one waits to
        be accepted. Returns "n of m pages" if these are not all.
        """
        op = self._begin(PRE_FAULT, gfn, pages)
        self._tally.pre_faults += 1
        vcpu, size = self._td.vcpu(0), pages << PAGE_SHIFT
        return self._make(op, kvm_vcpu_pre_fault_memory(vcpu, gfn << PAGE_SHIFT, size), size)

    # -- how it is done

    def answer(self, policy: ConversionPolicy, request: Request) -> None:
        """Let the policy answer, and see that it has. Raises Stopped for what is wrong."""
        gfn, pages, private, implicit = request
        self._tally.requests += 1
        self._tally.implicit += implicit
        self._request = request
        self._calls_left = MOST_CALLS + MOST_CALLS_A_PAGE * pages
        self._note(Op(FAULT if implicit else MAPGPA, gfn, pages, _kind(private)))
        self._limit.run(policy.convert, self, request)
        if implicit and self.is_private(gfn) != private:
            text = (
                f"the guest used gfn {gfn:#x} as {_kind(private)} memory, KVM exited for it, and "
                f"when `convert` returns it is still {_kind(not private)}: the guest would exit "
                "again for ever"
            )
            raise Stopped(Violation("answered", text))

    def _begin(self, name: str, gfn: int, pages: int) -> Op:
        """A call begins. Refuses what is no memory of the TD's, and one call too many: Stopped."""
        self._limit.stop()
        self._calls_left -= 1
        if self._calls_left < 0:
            text = f"the conversion has no end: {self._request.pages} pages were asked for"
            self._limit.insist(Stopped(Violation("end", text)))
        numbers = isinstance(gfn, int) and isinstance(pages, int)
        if not (numbers and pages > 0 and 0 <= gfn <= self.pages - pages):
            text = (
                f"{name} of gfns from {gfn!r} on, {pages!r} in all; there are 0..{self.pages - 1}"
            )
            self._limit.insist(Stopped(Violation("scope", text)))
        self.unasked.update(set(range(gfn, gfn + pages)) - set(self._request.gfns))
        return Op(name, gfn, pages, "")

    def _take(self, op: Op) -> None:
        """Note which private pages go that the guest did not give up."""
        accepted, asked = self._td.guest.accepted, self._request.gfns
        for gfn in range(op.gfn, op.gfn + op.level):
            if gfn in accepted and gfn not in asked:
                self.taken.setdefault(gfn, op)

    def _make(self, op: Op, call: Operation, wanted: int = 0) -> str:
        """Make a call that is to return `wanted`; returns how it went as a word."""
        try:
            result: int = drive(call, self._meanwhile)
        except Stopped as stopped:
            self._limit.insist(stopped)
        answer = SUCCESS
        if result != wanted:
            answer = (
                errorcode[-result] if result < 0 else f"{result >> PAGE_SHIFT} of {op.level} pages"
            )
        self._note(op._replace(answer=answer))
        self._limit.start()
        return answer


def _kind(private: bool) -> str:
    return "private" if private else "shared"


def memory_of(td: Td) -> dict[int, str]:
    """Gfn -> PRIVATE_PAGE, SHARED_PAGE or TWICE, for all that have memory."""
    found: dict[int, str] = {}
    for backing in td.backings:
        first = backing.gpa >> PAGE_SHIFT
        if td.guest_memory.is_open(backing.gmem):
            pages = td.guest_memory.pages(backing.gmem)
            found |= dict.fromkeys((first + index for index in pages), PRIVATE_PAGE)
        for hva in td.user_memory.resident(backing.hva, backing.hva + backing.size):
            gfn = first + (hva - backing.hva >> PAGE_SHIFT)
            found[gfn] = TWICE if gfn in found else SHARED_PAGE
    return found


def doubles(td: Td) -> int:
    """How many gfns take memory twice."""
    return sum(kind == TWICE for kind in memory_of(td).values())
