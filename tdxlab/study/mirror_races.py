"""Faults that meet: two vCPUs, one of them held in the middle; and calls that answer BUSY.

Table(meeting_rows(lab, 0x200))
Table(busy_rows(lab, 0x200, most=3))

Whatever is done here, the lab is unchanged afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import OPERAND_ID_RCX, TDX_OPERAND_BUSY
from tdxlab.kvm.injection import FailNth
from tdxlab.steps import Operation
from tdxlab.study.mirror_lab import MirrorLab
from tdxlab.study.undone import undone

# -- two vCPUs


class Meeting(NamedTuple):
    """What happens when vCPU 1 faults while vCPU 0 is held in the middle of its own fault.

    held: where. other: gfn of vCPU 1. retries: how often vCPU 1 handled its fault again meanwhile,
    `ROUNDS` at most. mem_calls: its calls of SEPT.ADD and PAGE.AUG meanwhile. finished: it was done
    meanwhile. sept_add, page_aug: calls of both vCPUs until both were done.
    """

    held: str
    other: str
    retries: int
    mem_calls: int
    finished: bool
    sept_add: int
    page_aug: int


#: How often vCPU 1 may try before vCPU 0 is let go.
ROUNDS = 5


def meet(lab: MirrorLab, first: int, second: int, *, hold: str, nth: int = 1) -> Meeting:
    """vCPU 0 faults on gfn `first` and is held before the `nth` step whose label begins with
    `hold`; vCPU 1 faults on gfn `second`; then vCPU 0 goes on, then vCPU 1. The lab is unchanged.

    Refuses a step that does not come: ValueError.
    """
    for gfn in (first, second):
        lab.require(gfn)
    _require_idle(lab)
    with undone(lab.machine):
        before = _mem_calls(lab)
        with closing(lab.fault_steps([first])) as zero:
            _advance(zero, hold, nth)
            with closing(lab.fault_steps([second], vcpu=1)) as one:
                held = _mem_calls(lab)
                retries, finished = _try(one)
                meanwhile = sum(_mem_calls(lab).values()) - sum(held.values())
                for thread in (zero, one):
                    for _ in thread:
                        pass
        after = _mem_calls(lab)
        add, aug = (after[leaf] - before[leaf] for leaf in ("SEPT.ADD", "PAGE.AUG"))
    return Meeting(hold, f"{second:#x}", retries, meanwhile, finished, add, aug)


def meeting_rows(lab: MirrorLab, first: int) -> list[Meeting]:
    """vCPU 0 faults on gfn `first` in a 2 MiB that is new, and is held at every step that counts;
    vCPU 1 faults on the same page, then on its neighbour.
    """
    places = (
        ("cmpxchg FROZEN_SPTE", 1),
        ("TDH.MEM.SEPT.ADD", 2),
        ("publish SPTE", 1),
        ("TDH.MEM.PAGE.AUG", 2),
        ("publish SPTE", 2),
    )
    return [
        meet(lab, first, second, hold=hold, nth=nth)
        for second in (first, first + 1)
        for hold, nth in places
    ]


def _require_idle(lab: MirrorLab) -> None:
    if lab.tape.current is not None:
        raise ValueError(
            f"the tape stands in the middle of {lab.tape.current.name!r}; "
            "seek to the end of that, or of the tape"
        )


def _advance(thread: Operation, label: str, nth: int) -> None:
    """Drive a thread until it stands before the nth step with that label."""
    for step in thread:
        if str(step[0]).startswith(label):
            nth -= 1
            if nth == 0:
                return
    raise ValueError(f"no such step {label!r}: the fault was over before")


def _try(thread: Operation) -> tuple[int, bool]:
    """Drive a thread until it has retried `ROUNDS` times, or is done: (retries, done)."""
    retries = 0
    for step in thread:
        if step[0] == "cond_resched":
            retries += 1
            if retries == ROUNDS:
                return retries, False
    return retries, True


def _mem_calls(lab: MirrorLab) -> dict[str, int]:
    calls = lab.machine.seamcalls
    return {leaf: calls.get(f"TDH.MEM.{leaf}", 0) for leaf in ("SEPT.ADD", "PAGE.AUG")}


# -- BUSY


class BusyRow(NamedTuple):
    """One fault during which calls of a leaf were BUSY. busy: how many. The rest: SEAMCALLs made,
    VP.ENTER among them, and how often the fault was handled again.
    """

    leaf: str
    busy: int
    sept_add: int
    page_aug: int
    vp_enter: int
    retries: int


def busy_fault(lab: MirrorLab, gfn: int, leaf: str, busy: int, *, nth: int = 1) -> BusyRow:
    """What a fault costs if `busy` calls of `leaf` in a row, from the nth on, answer BUSY. The lab
    is unchanged. leaf: "SEPT.ADD" or "PAGE.AUG".
    """
    if leaf not in _LEAF_NUMBERS:
        raise ValueError(f"a fault does not call {leaf!r}; choose one of {list(_LEAF_NUMBERS)}")
    lab.require(gfn)
    _require_idle(lab)
    names = ("TDH.MEM.SEPT.ADD", "TDH.MEM.PAGE.AUG", "TDH.VP.ENTER")
    with undone(lab.machine):
        before = dict(lab.machine.seamcalls)
        retries = 0
        with _answering_busy(lab, leaf, busy, nth):
            for step in lab.fault_steps([gfn]):
                retries += step[0] == "cond_resched"
        after = lab.machine.seamcalls
    refused = {f"TDH.MEM.{leaf}": busy}
    made = [after.get(name, 0) - before.get(name, 0) + refused.get(name, 0) for name in names]
    add, aug, enter = made
    return BusyRow(leaf, busy, add, aug, enter, retries)


def busy_rows(lab: MirrorLab, gfn: int, most: int) -> list[BusyRow]:
    """`busy_fault` for each leaf of a fault and 0..most BUSY answers."""
    return [busy_fault(lab, gfn, leaf, busy) for leaf in _LEAF_NUMBERS for busy in range(most + 1)]


@contextmanager
def _answering_busy(lab: MirrorLab, leaf: str, busy: int, nth: int) -> Iterator[None]:
    if not busy:
        yield
        return
    status = TDX_OPERAND_BUSY | OPERAND_ID_RCX
    with FailNth(lab.machine.host, _LEAF_NUMBERS[leaf], n=nth, status=status, count=busy):
        yield


_LEAF_NUMBERS = {"SEPT.ADD": abi.TDH_MEM_SEPT_ADD, "PAGE.AUG": abi.TDH_MEM_PAGE_AUG}
