"""What conversions cost and lose: counted on the model, beside what a formula says.

Every function builds a machine of its own and measures it; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.guest import MapGpa, Read
from tdxlab.kvm.exits import HypercallExit
from tdxlab.machine import Machine
from tdxlab.sizes import format_size
from tdxlab.steps import round_robin
from tdxlab.study.convert_lab import LEAVES, PRIVATE, SHARED, ConvertLab
from tdxlab.study.convert_views import CALL_LOOKS, short_name
from tdxlab.study.plots import Series, stacked_bars
from tdxlab.vmm_td import Td

PAGES_2M = SIZE_2M // PAGE_SIZE

#: SEAMCALLs for each mapped page that a zap of private leaves makes: block, track, remove, write
#: back.
CALLS_PER_ZAP = 4


class CostRow(NamedTuple):
    """What one step of a conversion costs. block to aug: SEAMCALLs of each leaf. calls: their sum.
    formula: what the sum should be. kicks: kvm_make_all_cpus_request. flushes: remote TLB flushes.
    exits: that came to the VMM.
    """

    step: str
    pages: int
    block: int
    track: int
    remove: int
    wbinvd: int
    sept_add: int
    aug: int
    calls: int
    formula: int
    kicks: int
    flushes: int
    exits: int


class _Step(NamedTuple):
    """One step of the experiment. formula: pages -> SEAMCALLs."""

    name: str
    do: Callable[[Td, int], int]
    formula: Callable[[int], int]


def _convert(to: str, gpa: int = 0) -> Callable[[Td, int], int]:
    return lambda td, pages: len(td.convert(gpa, pages * PAGE_SIZE, to=to).exits)


def _touch(td: Td, pages: int) -> int:
    return len(td.touch(0, pages * PAGE_SIZE).exits)


#: In this order, on the same pages.
_STEPS = (
    _Step("first use as private", _touch, lambda pages: pages + new_tables(pages)),
    _Step("to shared", _convert(SHARED), lambda pages: CALLS_PER_ZAP * pages),
    _Step("to shared once more", _convert(SHARED), lambda _: 0),
    _Step("first use as shared", _touch, lambda _: 0),
    _Step("to private", _convert(PRIVATE), lambda _: 0),
    _Step("first use as private again", _touch, lambda pages: pages),
    _Step("to shared, never used", _convert(SHARED, SIZE_2M), lambda _: 0),
)


def new_tables(pages: int) -> int:
    """Secure EPT tables for that many pages from GPA 0 of a TD that has one page at 1 GiB: the
    table for each 2 MiB, and the one for the first 1 GiB.
    """
    return -(-pages // PAGES_2M) + 1


def cost_rows(gpaw: int, pages: int = PAGES_2M) -> list[CostRow]:
    """The life of some pages, step by step. pages: 1 to 512.

    The guest of this table accepts memory at its first use, and one vCPU is all that runs.
    """
    if not 1 <= pages <= PAGES_2M:
        raise ValueError(f"{pages} pages; choose 1 to {PAGES_2M}")
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
    td = machine.create_td(memory=2 * SIZE_2M)
    td.add_memory(1 << 30, PAGE_SIZE)
    td.touch(1 << 30)
    td.guest.accepts = True
    rows = []
    for step in _STEPS:
        td.guest.accepts = not step.name.startswith("to ")
        rows.append(_measured(machine, td, step, pages))
    return rows


def _measured(machine: Machine, td: Td, step: _Step, pages: int) -> CostRow:
    before, host = dict(machine.seamcalls), machine.host.counts
    flushes = td.vm.stats["remote_tlb_flush"]
    exits = step.do(td, pages)
    block, track, remove, wbinvd, sept_add, aug = calls = [
        machine.seamcalls.get(leaf, 0) - before.get(leaf, 0) for leaf in LEAVES
    ]
    return CostRow(
        step=step.name,
        pages=pages,
        block=block,
        track=track,
        remove=remove,
        wbinvd=wbinvd,
        sept_add=sept_add,
        aug=aug,
        calls=sum(calls),
        formula=step.formula(pages),
        kicks=machine.host.counts["kick"] - host["kick"],
        flushes=td.vm.stats["remote_tlb_flush"] - flushes,
        exits=exits,
    )


def costs(rows: Sequence[CostRow], ax: Axes) -> Axes:
    """SEAMCALLs of each step, stacked by leaf. rows: of `cost_rows`."""
    columns = ("block", "track", "remove", "wbinvd", "sept_add", "aug")
    series = [
        Series(CALL_LOOKS[short_name(leaf)], [getattr(row, column) for row in rows])
        for leaf, column in zip(LEAVES, columns, strict=True)
    ]
    title = f"SEAMCALLs for {format_size(rows[0].pages * PAGE_SIZE)}"
    return stacked_bars(ax, [row.step for row in rows], series, unit="SEAMCALLs", title=title)


# -- MapGPA


class ChunkRow(NamedTuple):
    """One MapGPA. exits: KVM_EXIT_HYPERCALLs that the VMM saw. formula: size / 2 MiB, rounded up.
    largest: bytes that one exit asked for.
    """

    size: str
    exits: int
    formula: int
    largest: str


_SIZES = (PAGE_SIZE, SIZE_2M - PAGE_SIZE, SIZE_2M, SIZE_2M + PAGE_SIZE, 4 * SIZE_2M)


def chunk_rows(gpaw: int) -> list[ChunkRow]:
    """MapGPA of several sizes, each of memory that was never used."""
    rows = []
    for size in _SIZES:
        td = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1).create_td(memory=4 * SIZE_2M)
        exits = td.convert(0, size, to=SHARED).exits
        largest = max(exit_.args[1] for exit_ in exits if isinstance(exit_, HypercallExit))
        rows.append(
            ChunkRow(
                format_size(size), len(exits), -(-size // SIZE_2M), format_size(largest * PAGE_SIZE)
            )
        )
    return rows


class WayRow(NamedTuple):
    """One way of converting and using `pages` pages. exits: to the VMM, by their names. the rest:
    SEAMCALLs, remote flushes, TD exits that were necessary in all.
    """

    way: str
    pages: int
    exits: str
    seamcalls: int
    flushes: int
    td_exits: int


def way_rows(gpaw: int, pages: int = 8) -> list[WayRow]:
    """The guest asks for all pages at once, for each page, or does not ask at all; then it reads
    them.
    """
    ways: dict[str, Callable[[ConvertLab], list[object]]] = {
        "one MapGPA": lambda lab: _asked(lab, pages, 0),
        "a MapGPA for each page": lambda lab: _asked(lab, pages, 1),
        "no MapGPA": lambda lab: list(lab.access_unasked(0, pages, to=SHARED).exits),
    }
    return [_way(gpaw, name, pages, do) for name, do in ways.items()]


def _asked(lab: ConvertLab, pages: int, batch: int) -> list[object]:
    done = lab.convert(0, pages, to=SHARED, batch=batch)
    return [exit_ for result in (*done, lab.access(0, pages)) for exit_ in result.exits]


def _way(gpaw: int, name: str, pages: int, do: Callable[[ConvertLab], list[object]]) -> WayRow:
    lab = ConvertLab(gpaw=gpaw)
    before = lab.machine.trace.hardware()["td_exit"]
    exits = [type(exit_).__name__ for exit_ in do(lab)]
    said = ", ".join(f"{exits.count(kind)} {kind}" for kind in dict.fromkeys(exits))
    after = lab.machine.trace.hardware()["td_exit"]
    calls = sum(lab.seamcalls().values())
    return WayRow(name, pages, said, calls, lab.counts()["remote flushes"], after - before)


# -- what is in a page


class ContentRow(NamedTuple):
    """One page after one step. guest_memfd: whether the file has a page for it."""

    after: str
    guest_reads: str
    vmm_reads: str
    guest_memfd: str


def content_rows(gpaw: int, *, punch: bool = False) -> list[ContentRow]:
    """What one page holds, for the guest and for the VMM, through a life of conversions.

    punch: the VMM discards the copy that is not used.
    """
    lab = ConvertLab(gpaw=gpaw)
    steps: dict[str, Callable[[], object]] = {
        "private, written": lambda: None,
        "to shared": lambda: lab.convert(0, 1, to=SHARED, punch=punch),
        "shared, written": lambda: lab.access(0, 1, write=True),
        "to private": lambda: lab.convert(0, 1, to=PRIVATE, punch=punch),
        "private, written again": lambda: lab.access(0, 1, write=True),
        "to shared again": lambda: lab.convert(0, 1, to=SHARED, punch=punch),
    }
    rows = []
    for name, do in steps.items():
        do()
        row = lab.rows()[0]
        rows.append(ContentRow(name, row.guest_reads, row.vmm_reads, row.guest_memfd))
    return rows


# -- other vCPUs


class KickRow(NamedTuple):
    """A conversion of `pages` pages while other vCPUs run. ipis: that were sent. formula: each
    kick and each remote flush interrupts every other vCPU.
    """

    others: int
    pages: int
    kicks: int
    flushes: int
    ipis: int
    formula: int


def kick_rows(gpaw: int, pages: int = 8, most: int = 3) -> list[KickRow]:
    """Conversions beside 0 to `most` other vCPUs that read all the time, everybody moving in
    turn.
    """
    return [_kicks(gpaw, pages, others) for others in range(most + 1)]


def _kicks(gpaw: int, pages: int, others: int) -> KickRow:
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=others + 1, packages=1)
    td = machine.create_td(vcpus=others + 1, memory=2 * SIZE_2M)
    td.touch(0, pages * PAGE_SIZE)
    td.touch(SIZE_2M)
    before, flushed = machine.host.counts, td.vm.stats["remote_tlb_flush"]
    asked = td.guest.shared_mask
    converting = td.run_steps([MapGpa(asked, pages * PAGE_SIZE)])
    reading = [
        td.run_steps([Read(SIZE_2M)] * 40 * pages, vcpu=number) for number in range(1, others + 1)
    ]
    round_robin([converting, *reading])
    kicks = machine.host.counts["kick"] - before["kick"]
    ipis = machine.host.counts["ipi"] - before["ipi"]
    flushes = td.vm.stats["remote_tlb_flush"] - flushed
    return KickRow(others, pages, kicks, flushes, ipis, (kicks + flushes) * others)
