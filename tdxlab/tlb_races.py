"""TLB tracking without KVM: a host of few lines takes a page away from vCPUs that have it in their
TLBs, and gives it to another TD at once.

    vCPU n of the first TD        the host, on an LP of its own
    enter, read, read, ...        BLOCK, TRACK, kick everybody, REMOVE, WBINVD, clear, AUG
                                  ... and the other TD's guest accepts the page and writes to it

The operations are those of a real host, in its order; `races.py` makes a scenario of them. A vCPU
that is kicked enters again at once, and may do so between any two of the host's calls. TRACK and
VP.ENTER stop once in their middle, so that they meet each other's locks; other calls are one move.

Source: TDX module 1.5.01, tdh_mem_track.c, for what the host has to do.
Differs: the host's thread holds nothing that KVM would hold, and knows of one page only.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import IN_GUEST, GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_TD_EPOCH,
    TDX_OPERAND_BUSY,
    TDX_SUCCESS,
    status_name,
)
from tdxlab.arch import SIZE_1G
from tdxlab.bare import BareMachine
from tdxlab.crew import Actor
from tdxlab.hardware import default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.journal import Table
from tdxlab.seam.locks import EXCLUSIVE
from tdxlab.seam.td import Td, Tdcs
from tdxlab.steps import WAIT, Operation, Step

#: Where the guests have the page, the one before and the other after.
GPA = SIZE_1G
#: What its first owner has stored there.
MINE = b"my own data"

#: LPs of the host's thread and of the other TD's vCPU; vCPUs of the first TD have those below.
HOST_LP, OTHER_LP = 3, 4
#: Times that each vCPU reads the page.
READS = 2

#: How a vCPU may end: it read its own data to the end, or found the page gone.
READ_ITS_OWN, PAGE_IS_GONE = "read its own data", "the page is gone"
#: How the host ends if nothing failed.
TAKEN = status_name(TDX_SUCCESS)
_GOOD_ENDS = (READ_ITS_OWN, PAGE_IS_GONE)

Calling = Generator[Step, None, int]

_EPOCH_BUSY = TDX_OPERAND_BUSY + OPERAND_ID_TD_EPOCH


class Threads:
    """The host's side of the first TD's vCPUs. going_in: LPs whose vCPU is inside, or about to be;
    ipis: those with an interrupt that is not taken yet.
    """

    def __init__(self, td: HostTd) -> None:
        self.td = td
        self.machine = td.host.machine
        self.going_in = Table(self.machine.journal)
        self.ipis = Table(self.machine.journal)

    @property
    def is_epoch_locked(self) -> bool:
        """TDH.MEM.TRACK is at work. A host cannot see that; it would just try again and again."""
        page = Td(self.machine.memory, self.td.tdr)
        page.map_tdcs(self.machine.memory)
        return bool(self.machine.memory.words.view[page.tdcs + Tdcs.EPOCH_LOCK] & EXCLUSIVE)

    def call(self, leaf: int, **registers: int) -> int:
        """SEAMCALL by the host's thread; returns the status."""
        return self.td.host.call(HOST_LP, leaf, **registers)[0]

    def leave(self, lp: int) -> None:
        """The vCPU on `lp` is outside; the LP takes its interrupts."""
        for table in (self.going_in, self.ipis):
            if lp in table:
                table.drop(lp)


def tracking(vcpus: int) -> tuple[BareMachine, tuple[Actor, ...]]:
    """A machine with two TDs, the page in the TLBs of all vCPUs of the first one, and the actors.

    vcpus: of the first TD, 1 to 3.
    """
    machine = BareMachine(default_platform(tdmr_gib=1, lps=OTHER_LP + 1, packages=1))
    host = Host(machine)
    host.boot()
    td, other = _td(host, [*range(vcpus)], MINE), _td(host, [OTHER_LP])
    for lp in range(vcpus):
        td.enter(lp, lp=lp)
        machine.read_guest(lp, GPA, len(MINE))
        machine.interrupt(lp)
    other.map_tables(GPA)
    other.enter(0, lp=OTHER_LP)
    threads = Threads(td)
    guests = [
        Actor(f"vCPU {lp}", partial(reading, threads, lp), lambda result: result in _GOOD_ENDS)
        for lp in range(vcpus)
    ]
    taking = Actor("host", partial(taking_away, threads, other), lambda result: result == TAKEN)
    return machine, (*guests, taking)


def _td(host: Host, lps: list[int], content: bytes | None = None) -> HostTd:
    """A TD that can run, one vCPU on each of `lps`; with the page, if it has content."""
    td = HostTd(host)
    for lp in lps:
        td.add_vcpu(lp=lp)
    if content is not None:
        td.add_page(GPA, content)
    td.finalize()
    return td


# -- the guest


def reading(threads: Threads, lp: int) -> Operation:
    """The vCPU of LP `lp`: enter, read the page again and again, leave.

    Returns one of READ_ITS_OWN and PAGE_IS_GONE; else what it read instead, or why it ended.
    """
    machine, done = threads.machine, 0
    while done < READS:
        if not machine.cpu.vcpu_inside(lp):
            yield ("smp_store_release(mode)", lp)
            threads.going_in.put(lp, True)
            status = yield from _entering(threads, lp)
            if status not in (IN_GUEST, _EPOCH_BUSY):
                return status_name(status)
        yield ("the guest reads", GPA, done)
        if not machine.cpu.vcpu_inside(lp):
            continue
        found = machine.read_guest(lp, GPA, len(MINE))
        if isinstance(found, GuestOutcome):
            threads.leave(lp)
            return PAGE_IS_GONE if not found.status >> 32 else status_name(found.status)
        if found != MINE:
            return found.decode("latin-1")
        done += 1
    return READ_ITS_OWN


def _entering(threads: Threads, lp: int) -> Calling:
    """TDH.VP.ENTER; an interrupt that waits is taken at once. Where the epoch is locked it comes to
    nothing, and the vCPU waits until it is not.
    """
    machine = threads.machine
    yield ("TDH.VP.ENTER", lp)
    call = Registers(rcx=threads.td.vcpus[lp])
    status: int = yield from machine.seamcall_steps(lp, abi.TDH_VP_ENTER, call)
    if status == _EPOCH_BUSY:
        threads.leave(lp)
        while threads.is_epoch_locked:
            yield (WAIT, "the TD's epoch", lp)
        return status
    if lp in threads.ipis and status == IN_GUEST:
        machine.interrupt(lp)
    if not machine.cpu.vcpu_inside(lp):
        threads.leave(lp)
    return status


# -- the host


def taking_away(threads: Threads, other: HostTd) -> Operation:
    """Take the page from the TD and give it to `other`, whose guest accepts it and writes to it.

    Returns the name of the status of the last call: TAKEN if none failed.
    """
    td, machine = threads.td, threads.machine
    hpa = td.pages[GPA][0]
    yield ("TDH.MEM.RANGE.BLOCK", GPA)
    status = threads.call(abi.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=td.tdr)
    if not status:
        status = yield from begin_epoch(threads)
    if not status:
        yield from kick_everybody(threads)
        yield ("TDH.MEM.PAGE.REMOVE", GPA)
        status = threads.call(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    if status:
        return status_name(status)
    yield from write_back(threads, hpa)
    machine.clear(hpa)
    yield ("TDH.MEM.PAGE.AUG", GPA)
    status = threads.call(abi.TDH_MEM_PAGE_AUG, rcx=GPA, rdx=other.tdr, r8=hpa)
    yield ("the other guest accepts and writes", GPA)
    machine.tdcall(OTHER_LP, abi.TDG_MEM_PAGE_ACCEPT, Registers(rcx=GPA))
    machine.write_guest(OTHER_LP, GPA, b"not yours")
    return status_name(status)


def write_back(threads: Threads, hpa: int) -> Operation:
    """TDH.PHYMEM.PAGE.WBINVD: write back what caches have of the page under its old KeyID."""
    yield ("TDH.PHYMEM.PAGE.WBINVD", hpa)
    rcx = threads.machine.memory.join(hpa, threads.td.keyid)
    threads.call(abi.TDH_PHYMEM_PAGE_WBINVD, rcx=rcx)


def begin_epoch(threads: Threads) -> Calling:
    """TDH.MEM.TRACK; returns the status."""
    yield ("TDH.MEM.TRACK", threads.td.tdr)
    call = Registers(rcx=threads.td.tdr)
    status: int = yield from threads.machine.seamcall_steps(HOST_LP, abi.TDH_MEM_TRACK, call)
    return status


def kick_everybody(threads: Threads) -> Operation:
    """An IPI to every vCPU that is inside or about to be; wait until it is taken."""
    for lp in sorted(threads.going_in):
        yield ("IPI", lp)
        if threads.machine.cpu.vcpu_inside(lp):
            threads.machine.kick(lp)
            threads.leave(lp)
        elif lp in threads.going_in:
            threads.ipis.put(lp, True)
            while lp in threads.ipis:
                yield (WAIT, "IPI", lp)
