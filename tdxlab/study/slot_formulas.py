"""Deleting a memslot by formula, for sizes that no model goes through entry by entry; and what has
been published on it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import NamedTuple

from tdxlab import resources
from tdxlab.arch import PAGE_SIZE
from tdxlab.sizes import format_size
from tdxlab.study import slot_costs
from tdxlab.study.slot_costs import Private, pages


class CaseRow(NamedTuple):
    """A deletion by formula. leaves: size of all mappings. walked: entries visited, with those of
    freed tables; freed, kept: tables; faults: at most, when all memory that is left is used again.
    """

    slot: str
    rest: str
    leaves: str
    policy: str
    walked: int
    cleared: int
    freed: int
    kept: str
    faults: int


#: The two cases that the review quoted, beside VMs of some size.
CASES = (("2 GiB", "6 GiB"), ("2 GiB", "62 GiB"), ("1 TiB", "4 GiB"))
#: Physical address width of the host in the cases.
CASE_BITS = 46


def case_rows() -> list[CaseRow]:
    """F and T for each of CASES, with leaves of 4K and of 2M."""
    return [
        row
        for slot, rest in CASES
        for leaf_level in (1, 2)
        for row in _case(slot, rest, leaf_level)
    ]


def _case(slot: str, rest: str, leaf_level: int) -> tuple[CaseRow, CaseRow]:
    of_slot, of_rest, name = pages(slot), pages(rest), ("4K", "2M")[leaf_level - 1]
    tree = slot_costs.contiguous(of_slot + of_rest, leaf_level=leaf_level, maxphyaddr=CASE_BITS)
    every, leafs = slot_costs.zap_all(tree), slot_costs.zap_leafs(of_slot, leaf_level=leaf_level)
    faults = slot_costs.covering(of_rest, leaf_level)
    kept = format_size(leafs.kept * PAGE_SIZE) if leafs.kept else "-"
    walked = every.walked + every.rescanned
    return (
        CaseRow(slot, rest, name, "F", walked, every.cleared, every.freed, "-", faults),
        CaseRow(slot, rest, name, "T", leafs.walked, leafs.cleared, 0, kept, 0),
    )


class PrivateRow(NamedTuple):
    """Deleting a slot of private pages, by formula: calls, kicks and MOVDIR64B stores; then coming
    back: calls, and pages to accept.
    """

    slot: str
    way: str
    seamcalls: int
    kicks: int
    lines: int
    back_calls: int
    accepts: int


def private_rows(size: str = "2 GiB") -> list[PrivateRow]:
    """T as Linux 6.16 does it, T in batches, and B at three levels."""
    n = pages(size)
    ways: dict[str, Private] = {
        "T, one by one": slot_costs.remove_private(n),
        "T, batches of 512": slot_costs.remove_private(n, batch=512),
        "B at 4K": slot_costs.block_private(n, level=1),
        "B at 2M": slot_costs.block_private(n, level=2),
        "B at 1G": slot_costs.block_private(n, level=3),
    }
    return [
        PrivateRow(size, way, c.seamcalls, c.kicks, c.lines, c.unblocks + c.augs, c.accepts)
        for way, c in ways.items()
    ]


class RepeatRow(NamedTuple):
    """A slot is deleted and created again and again, all memory in use, by formula. used: memory of
    the rest that the guest uses all the time. walked: entries, F and T; faults: F and T.
    """

    times: int
    rest: str
    f_walked: int
    f_faults: int
    t_walked: int
    t_faults: int


def repeat_rows(times: int = 100, slot: str = "2 GiB") -> list[RepeatRow]:
    """Beside ever more memory in 4K pages."""
    leafs = slot_costs.zap_leafs(pages(slot))
    rows = []
    for rest in ("2 GiB", "6 GiB", "62 GiB", "510 GiB"):
        tree = slot_costs.contiguous(pages(slot) + pages(rest), maxphyaddr=CASE_BITS)
        every = slot_costs.zap_all(tree)
        walked = times * (every.walked + every.rescanned)
        rows.append(
            RepeatRow(
                times,
                rest,
                walked,
                times * every.faults,
                times * leafs.walked,
                times * leafs.faults,
            )
        )
    return rows


class DelayPoint(NamedTuple):
    """What holds up vCPUs that use other memory while a slot of so many pages goes, in entries
    visited. lock: T, with mmu_lock held for write. small, middle, large: F, its faults on a rest of
    USED, at a price of a fault. work: all that F visits beside the vCPUs, with the middle rest.
    """

    slot: str
    pages: int
    lock: int
    small: int
    middle: int
    large: int
    work: int


#: Memory of the rest that the guest uses all the time.
USED = ("64 MiB", "4 GiB", "62 GiB")


def delay_points(price: int = 100, smallest: str = "1 MiB") -> list[DelayPoint]:
    """Slots from the smallest to 1 TiB, each four times as large as the one before. price: entries
    visited that one fault is worth, a choice.
    """
    points, npages, used = [], pages(smallest), [pages(size) for size in USED]
    while npages <= pages("1 TiB"):
        every = slot_costs.zap_all(slot_costs.contiguous(npages + used[1], maxphyaddr=CASE_BITS))
        lock = slot_costs.zap_leafs(npages).walked
        small, middle, large = (price * each for each in used)
        name, work = format_size(npages * PAGE_SIZE), every.walked + every.rescanned
        points.append(DelayPoint(name, npages, lock, small, middle, large, work))
        npages *= 4
    return points


class CrossRow(NamedTuple):
    """From which slot on F holds up the vCPUs less than T. used: memory of the rest that they use
    again. price: entries visited that one fault is worth, a choice.
    """

    used: str
    price: int
    slot: str


def cross_rows(used: Sequence[str] = USED) -> list[CrossRow]:
    """For each rest in use, and three prices of a fault."""
    return [
        CrossRow(size, price, near(slot_costs.crossover(pages(size), price)))
        for size in used
        for price in (10, 100, 1000)
    ]


def near(npages: int) -> str:
    """So many pages as a size to the nearest unit, for people."""
    size, unit = npages * PAGE_SIZE, 1 << 20
    for name, unit in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / unit:.1f} MiB"


# -- published


class PublishedRow(NamedTuple):
    """One published time. policy: as far as its source says it. ms: milliseconds."""

    policy: str
    vcpus: int
    memory_gb: int
    ms: str
    condition: str
    source: str


def published_rows() -> list[PublishedRow]:
    """All published times of deleting a memslot that are known here."""
    path = resources.data() / "published" / "slot_deletion.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [
            PublishedRow(
                row["policy"],
                int(row["vcpus"]),
                int(row["guest_memory_gb"]),
                row["value"],
                row["condition"],
                row["source"],
            )
            for row in csv.DictReader(file)
        ]
