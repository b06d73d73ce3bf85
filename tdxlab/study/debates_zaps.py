"""Debates about zapping a TD's pages: D7, TLB tracking for each page or for many; D12, with
mmu_lock shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.breaks import BREAKS
from tdxlab.guest import Read
from tdxlab.kvm import zap
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.external import Hook
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.spte import (
    FROZEN_SPTE,
    SHADOW_NONPRESENT_VALUE,
    spte_to_pfn,
)
from tdxlab.kvm.tdp_iter import TdpIter
from tdxlab.kvm.tdp_set import handle_changed_spte
from tdxlab.kvm.vm import Vm
from tdxlab.kvm.zap import kvm_tdp_mmu_zap_leafs
from tdxlab.machine import Machine
from tdxlab.steps import Operation
from tdxlab.study.debate_tools import (
    Faulting,
    Substitute,
    go_on,
    heard,
    many,
    status_in,
    substituted,
)
from tdxlab.study.epoch_tables import batch_row
from tdxlab.study.undone import undone
from tdxlab.vmm_td import Td

# -- D7

#: Pages that go, and vCPUs that run meanwhile.
_PAGES, _OTHERS = 64, 2
BATCHES = (1, 8, 64)


class BatchRow(NamedTuple):
    """Pages taken away in batches. tracks: new TLB epochs. ipis: to the vCPUs that run meanwhile.
    seamcalls: in all, but for entries. blocked: mirror entries, at most, that are neither mapped
    nor empty at one time. retries, steps: of a fault that comes to the first page as soon as that
    is not mapped any more, until it has a page again.
    """

    batch: int
    pages: int
    tracks: int
    ipis: int
    seamcalls: int
    blocked: int
    retries: int
    steps: int


def batch_rows(gpaw: int) -> list[BatchRow]:
    """D7: batches of several sizes; of 1 is what Linux 6.16 does."""
    rows = []
    for batch in BATCHES:
        found = batch_row(gpaw, _PAGES, _OTHERS, batch)
        machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
        td = machine.create_td(memory=SIZE_2M)
        td.touch(0, _PAGES * PAGE_SIZE)
        td.zap_in_batches(batch if batch > 1 else 0)
        with undone(machine):
            fault = _met_by_a_fault(td)
        costs = found.tracks, found.ipis, found.seamcalls, _most_blocked(td)
        rows.append(BatchRow(batch, _PAGES, *costs, fault.retries, fault.steps))
    return rows


def _met_by_a_fault(td: Td) -> Faulting:
    """A fault on the first page that a zap has begun to take, to its end; the two take turns.

    Differs: as in `atomic_rows`, no invalidation turns the fault back.
    """
    fault = Faulting(td, 0)
    zapping = td.host.on_cpu(1, _zapping(td, 0, _PAGES))
    with heard(td.vm) as events:
        while go_on(zapping) and not any(event[0] == "spte_changed" for event in events):
            pass
    coming = td.host.on_cpu(0, fault.operation())
    while go_on(coming):
        go_on(zapping)
    zapping.close()
    return fault


def _most_blocked(td: Td) -> int:
    """Entries, at most, that are blocked at one time while all pages go."""
    blocked = most = 0
    with heard(td.vm) as events:
        td.punch_hole(0, _PAGES * PAGE_SIZE)
    for event in events:
        if event[0] == "spte_changed":
            blocked += is_blocked_spte(event[5]) - is_blocked_spte(event[4])
            most = max(most, blocked)
    return most


def judge_batches(rows: Sequence[BatchRow]) -> str:
    """D7 in words."""
    first, last = min(rows), max(rows)
    saved = first.seamcalls - last.seamcalls
    if saved <= 0 and last.ipis >= first.ipis:
        return f"Batches of {last.batch} save nothing."
    return (
        f"From batches of {first.batch} to {last.batch} pages, {first.tracks} epochs become "
        f"{last.tracks}, {first.ipis} IPIs become {last.ipis}, and {100 * saved // first.seamcalls}"
        f" % of the SEAMCALLs go. The price: up to {last.blocked} entries in a state of their own, "
        f"instead of {first.blocked}, and a fault there that takes {many(last.steps, 'step')} and "
        f"{many(last.retries, 'repetition')}, instead of {first.steps} and {first.retries}."
    )


# -- D12


class AtomicRow(NamedTuple):
    """One way to zap, and what comes to it meanwhile. starts: moments at which it came: before
    each step of the zap. waits, retries: of a fault, at most. longest: its steps, at most. dead:
    moments from which on the VM was ended. why: what the module answered then.
    """

    zap: str
    meets: str
    starts: int
    waits: int
    retries: int
    longest: int
    dead: int
    why: str


EXCLUSIVE = "mmu_lock for write"
ATOMIC, CLEARED = "frozen, mmu_lock for read", "cleared, mmu_lock for read"
BESIDE, THERE, ANOTHER = "a fault beside", "a fault there", "another zap"
#: Pages that are zapped, that are mapped next to them, and another slot's.
_ZAPPED, _BESIDE, _OTHER_GPA = 4, 8, SIZE_2M


def _freeze_leaf(vm: Vm, it: TdpIter) -> Hook:
    """In the place of clear_leaf: the entry is frozen until its page has left the TD."""
    old_spte, word = it.old_spte, it.word
    as_id, gfn, level = it.as_id, it.gfn, it.level
    vm.memory.words.cells[word] = FROZEN_SPTE
    return _remove_frozen(vm, (as_id, gfn, level, word), old_spte)


def _remove_frozen(vm: Vm, place: tuple[int, int, int, int], old_spte: int) -> Hook:
    as_id, gfn, level, word = place
    yield from handle_changed_spte(vm, as_id, gfn, old_spte, FROZEN_SPTE, level, shared=True)
    assert vm.external is not None
    error = yield from vm.external.remove_external_spte(gfn, level, spte_to_pfn(old_spte))
    yield ("publish SPTE", gfn, level, SHADOW_NONPRESENT_VALUE)
    vm.memory.words.cells[word] = SHADOW_NONPRESENT_VALUE
    return error


_ZAPS: dict[str, tuple[Substitute, ...]] = {
    EXCLUSIVE: (),
    ATOMIC: (*BREAKS["zap-under-read-lock"].substitutes, (zap, "clear_leaf", _freeze_leaf)),
    CLEARED: BREAKS["zap-under-read-lock"].substitutes,
}


def _zapping(td: Td, gpa: int, pages: int) -> Operation:
    """The leaves of some pages go, and nothing but mmu_lock and their entries holds faults back."""
    vm, gfn = td.vm, gpa // PAGE_SIZE
    yield from vm.mmu_lock.lock(WRITE)
    yield from kvm_tdp_mmu_zap_leafs(vm, gfn, gfn + pages, False)
    vm.mmu_lock.unlock(WRITE)


def atomic_rows(gpaw: int) -> list[AtomicRow]:
    """D12: each way, met by a fault on a neighbour, by one on a page that goes, by another zap.

    Differs: no kernel zaps a mirror under the shared lock. Here everybody who takes mmu_lock for
    write takes it for read, and a leaf stays frozen until the hook has removed its page, or is
    cleared before as under the exclusive lock. In Linux an invalidation in progress turns faults on
    the range back besides; it would hide what the lock and the freeze do.
    """
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=4, packages=1)
    td = machine.create_td(vcpus=2, memory=SIZE_2M)
    td.add_memory(_OTHER_GPA, SIZE_2M)
    for gpa in (0, _OTHER_GPA):
        td.touch(gpa, _ZAPPED * PAGE_SIZE)
    td.touch(_BESIDE * PAGE_SIZE, vcpu=1)
    cases = [(way, meets) for way in _ZAPS for meets in (BESIDE, THERE, ANOTHER)]
    return [_atomic_row(machine, td, way, meets) for way, meets in cases]


def _atomic_row(machine: Machine, td: Td, way: str, meets: str) -> AtomicRow:
    starts, faults = 0, list[Faulting]()
    dead: list[str] = []
    with substituted(_ZAPS[way]):
        while True:
            with undone(machine):
                fault, ended = _meeting(td, meets, starts)
                bug = td.vm.vm_bugged
            if ended:
                break
            faults.append(fault)
            dead += [bug] if bug else []
            starts += 1
    waits = max(fault.waits for fault in faults)
    retries = max(fault.retries for fault in faults)
    longest = max(fault.steps for fault in faults)
    why = ", ".join(sorted({status_in(text) for text in dead}))
    return AtomicRow(way, meets, starts, waits, retries, longest, len(dead), why or "-")


def _meeting(td: Td, meets: str, start: int) -> tuple[Faulting, bool]:
    """A zap with a vCPU inside the guest; before its step `start` the other one comes, and all take
    turns. Returns the fault, and True if the zap had ended before.
    """
    page = 0 if meets == THERE else _BESIDE + 1
    fault = Faulting(td, page * PAGE_SIZE)
    reading = td.run_steps(repeat(Read(_BESIDE * PAGE_SIZE)), vcpu=1)
    zapping = td.host.on_cpu(2, _zapping(td, 0, _ZAPPED))
    if meets == ANOTHER:
        coming = td.host.on_cpu(3, _zapping(td, _OTHER_GPA, _ZAPPED))
    else:
        coming = td.host.on_cpu(0, fault.operation())
    go_on(reading, 16)
    ended = False
    for _ in range(start):
        ended = not go_on(zapping)
        go_on(reading, 2)
    threads = [zapping, coming]
    while threads and not td.vm.vm_bugged:
        threads = [thread for thread in threads if go_on(thread)]
        go_on(reading, 2)
    for thread in (zapping, coming, reading):
        thread.close()
    return fault, ended


def judge_atomic(rows: Sequence[AtomicRow]) -> str:
    """D12 in words."""
    parts = []
    for meets in (BESIDE, THERE):
        exclusive, atomic = (_find(rows, way, meets) for way in (EXCLUSIVE, ATOMIC))
        parts.append(
            f"{meets.capitalize()} takes up to {_cost(exclusive)} with {EXCLUSIVE}, and up to "
            f"{_cost(atomic)} with the entry {ATOMIC}"
        )
    dead = [row for row in rows if row.dead]
    parts += [
        f"{row.meets.capitalize()} ends the VM from {row.dead} of {row.starts} moments if the way "
        f"is: {row.zap} ({row.why})"
        for row in dead
    ]
    deadly = {(row.zap, row.meets) for row in dead}
    if not dead:
        parts.append("No meeting ends the VM")
    if (CLEARED, THERE) in deadly and (ATOMIC, THERE) not in deadly:
        parts.append("The freeze keeps faults away")
    if (ATOMIC, ANOTHER) in deadly and (EXCLUSIVE, ANOTHER) not in deadly:
        parts.append("What mmu_lock for write buys is that nobody else tracks meanwhile")
    return ". ".join(parts) + "."


def _cost(row: AtomicRow) -> str:
    waiting = f"{row.waits or 'none'} of them waiting"
    return f"{many(row.longest, 'step')} ({waiting}; {many(row.retries, 'repetition')})"


def _find(rows: Sequence[AtomicRow], way: str, meets: str) -> AtomicRow:
    return next(row for row in rows if (row.zap, row.meets) == (way, meets))
