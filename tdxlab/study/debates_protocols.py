"""D15: what keeps vCPUs apart that fault at once and would change one entry of the external EPT.

Three protocols: the mirror entry is frozen meanwhile; the fault holds mmu_lock for write; or nobody
is kept away, and the module refuses whoever comes second.
Differs: the optimist that was discussed would undo what he did if his compare-exchange then failed.
Here that cannot come: of two who call the module for one entry it serves one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EBUSY
from typing import NamedTuple

from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.breaks import BREAKS
from tdxlab.kvm import seamcalls
from tdxlab.kvm.external import Hook
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.locks import WRITE, MmuLock
from tdxlab.kvm.seamcall_args import tdx_operand_busy
from tdxlab.kvm.seamcalls import Answered, sc_retry_ret, tdh_mem_page_aug, tdh_mem_sept_add
from tdxlab.kvm.tdx import Tdx
from tdxlab.machine import Machine
from tdxlab.steps import Operation, Step
from tdxlab.study.debate_tools import (
    Faulting,
    Substitute,
    calls,
    go_on,
    many,
    status_in,
    substituted,
)
from tdxlab.study.undone import undone
from tdxlab.vmm_td import Td


class ProtocolRow(NamedTuple):
    """vCPUs that fault on neighbouring pages whose table is missing, in several `starts`: all at
    once, or each some steps behind the one before. rounds: until all are done if they start at
    once, each making one step a round. wasted: SEAMCALLs that mapped or linked nothing, and of them
    busy: those that met another one inside the module; retries: faults that had to be repeated; all
    three at most, of the starts that the VM survives. dead: starts that end the VM; why: the
    module's answer then.
    """

    protocol: str
    vcpus: int
    starts: int
    rounds: int
    wasted: int
    busy: int
    retries: int
    dead: int
    why: str


class _Tried(NamedTuple):
    """One start. bug: why the VM was ended, "" if it was not."""

    rounds: int
    wasted: int
    busy: int
    retries: int
    bug: str


#: Columns of `_Tried` of which a row has the greatest value.
_AT_MOST = ("wasted", "busy", "retries")


class _Forgiving:
    """The hooks of a TD; where the module refuses to link or to map, somebody else was faster."""

    def __init__(self, tdx: Tdx) -> None:
        self.tdx = tdx

    def link_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """0 or -EBUSY."""
        gpa = gfn << PAGE_SHIFT
        host, td = self.tdx.host, self.tdx.td
        err, _, _ = yield from tdh_mem_sept_add(host, td, gpa, level - 1, external_spt)
        return -EBUSY if err else 0

    def set_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """0 or -EBUSY."""
        tdx, gpa, hpa = self.tdx, gfn << PAGE_SHIFT, pfn << PAGE_SHIFT
        tdx.vm.guest_memory.get_page(pfn)
        err, _, _ = yield from tdh_mem_page_aug(tdx.host, tdx.td, gpa, level - 1, hpa)
        if not err:
            return 0
        tdx.vm.guest_memory.put_page(pfn)
        return -EBUSY

    def remove_external_spte(self, gfn: int, level: int, pfn: int) -> Hook:
        """As the TD's own."""
        return self.tdx.remove_external_spte(gfn, level, pfn)

    def free_external_spt(self, gfn: int, level: int, external_spt: int) -> Hook:
        """As the TD's own."""
        return self.tdx.free_external_spt(gfn, level, external_spt)


_try_lock, _unlock = MmuLock.try_lock, MmuLock.unlock


def _try_lock_alone(self: MmuLock, _mode: str) -> bool:
    return _try_lock(self, WRITE)


def _unlock_alone(self: MmuLock, _mode: str) -> None:
    _unlock(self, WRITE)


FREEZE, LOCK = "freeze", "mmu_lock for write"
HOPE, FORGIVE = "optimistic", "optimistic, refusals forgiven"

_PROTOCOLS: dict[str, tuple[Substitute, ...]] = {
    FREEZE: (),
    LOCK: ((MmuLock, "try_lock", _try_lock_alone), (MmuLock, "unlock", _unlock_alone)),
    HOPE: BREAKS["no-freeze"].substitutes,
    FORGIVE: BREAKS["no-freeze"].substitutes,
}
VCPUS = (1, 2, 4)
#: How many rounds each vCPU starts behind the one before.
_BEHIND = range(8)


def protocol_rows(gpaw: int) -> list[ProtocolRow]:
    """D15: every protocol with more and more vCPUs."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=max(VCPUS), packages=1)
    td = machine.create_td(vcpus=max(VCPUS), memory=2 * SIZE_2M)
    for number in range(max(VCPUS)):
        td.touch(0, vcpu=number)
    return [_protocol_row(machine, td, name, vcpus) for name in _PROTOCOLS for vcpus in VCPUS]


def _protocol_row(machine: Machine, td: Td, name: str, vcpus: int) -> ProtocolRow:
    own = td.vm.external
    td.vm.external = _Forgiving(td.tdx) if name == FORGIVE else own
    with substituted(_PROTOCOLS[name]):
        tried = [_tried(machine, td, vcpus, behind) for behind in _BEHIND]
    td.vm.external = own
    fine = [each for each in tried if not each.bug]
    wasted, busy, retries = (
        max((getattr(each, column) for each in fine), default=0) for column in _AT_MOST
    )
    counts = (len(tried), tried[0].rounds, wasted, busy, retries, len(tried) - len(fine))
    why = ", ".join(sorted({status_in(each.bug) for each in tried if each.bug}))
    return ProtocolRow(name, vcpus, *counts, why or "-")


def _tried(machine: Machine, td: Td, vcpus: int, behind: int) -> _Tried:
    """All vCPUs fault, each `behind` rounds after the one before."""
    faults = [Faulting(td, SIZE_2M + n * PAGE_SIZE, n) for n in range(vcpus)]
    with undone(machine), _busy() as busy:
        before, done = calls(machine), _entries(td)
        rounds = _take_turns(td, faults, behind)
        wasted = calls(machine) - before - (_entries(td) - done)
        bug = td.vm.vm_bugged
    return _Tried(rounds, wasted, len(busy), sum(fault.retries for fault in faults), bug)


@contextmanager
def _busy() -> Iterator[list[int]]:
    """The answers, while it lasts, that say that another call has the lock."""
    answers: list[int] = []

    def listening(host: KvmHost, leaf: int, registers: Registers, label: Step) -> Answered:
        answer = yield from sc_retry_ret(host, leaf, registers, label)
        if tdx_operand_busy(answer[0]):
            answers.append(answer[0])
        return answer

    with substituted([(seamcalls, "sc_retry_ret", listening)]):
        yield answers


def _take_turns(td: Td, faults: Sequence[Faulting], behind: int) -> int:
    """Let all fault, one step each in turn, to the end or to the VM's; returns the rounds."""
    host, every, rounds = td.host, list[Operation](), 0
    threads: list[Operation] = []
    while (threads or len(every) < len(faults)) and not td.vm.vm_bugged:
        while len(every) < len(faults) and len(every) * behind <= rounds:
            fault = faults[len(every)]
            every.append(host.on_cpu(fault.vcpu, fault.operation()))
            threads.append(every[-1])
        threads = [thread for thread in threads if go_on(thread)]
        rounds += 1
    for thread in every:
        thread.close()
    return rounds


def _entries(td: Td) -> int:
    """Entries of the mirror that are present: pages and tables."""
    stats = td.vm.stats
    return stats["pages_4k"] + stats["pt_pages_mirror"]


def judge_protocols(rows: Sequence[ProtocolRow]) -> str:
    """D15 in words."""
    most = max(row.vcpus for row in rows)
    last = [row for row in rows if row.vcpus == most]
    parts = [f'"{row.protocol}" {_words(row)}' for row in last]
    works = [row for row in last if not row.dead]
    best = min(works, key=lambda row: (row.wasted, row.rounds)) if works else None
    end = f'Least in vain, then fewest rounds: "{best.protocol}"' if best else "None works"
    return f"With {many(most, 'vCPU')}: {'; '.join(parts)}. {end}."


def _words(row: ProtocolRow) -> str:
    if row.dead:
        return f"ends the VM in {row.dead} of {row.starts} starts ({row.why})"
    busy = f" (up to {row.busy} of them BUSY)" if row.busy else ""
    return (
        f"takes {row.rounds} rounds if all start at once, with {many(row.retries, 'fault')} and "
        f"{many(row.wasted, 'SEAMCALL')}{busy} in vain at most"
    )
