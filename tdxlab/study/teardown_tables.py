"""What a teardown costs and what it leaks, as plain tables.

    cost_rows(lab)            SEAMCALLs of each phase, by formula and as counted
    order_rows(sizes)         both orders for TDs of any size, by formula
    leak_rows(lab, order)     what each of some failures leaks, by doing it
    time_rows()               published times beside modelled ones: illustrative

Symbols: N private pages, V vCPUs, P packages, T Secure EPT tables besides the root, c TDCX pages a
vCPU has besides its TDVPR, d TDCS pages.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import NamedTuple

from tdxlab import resources
from tdxlab.abi import status as st
from tdxlab.arch import ENTRIES_PER_TABLE, PAGE_SIZE, SIZE_1G
from tdxlab.study.teardown_lab import (
    CACHE_WB,
    FLUSH,
    FLUSHDONE,
    FREEID,
    KEYID_FIRST,
    KEYID_LAST,
    ORDERS,
    PHASES,
    PRIVATE,
    RELEASE,
    ROLES,
    TABLE_PAGES,
    TABLES,
    TDCS,
    TDCS_PAGES,
    TDR,
    TDR_PAGE,
    VCPU_PAGES,
    Failure,
    TeardownLab,
)

#: Phase -> SEAMCALLs as a formula; {k} are the calls for one private page.
FORMULAS = {
    RELEASE: "{k} N",
    FLUSH: "V",
    FLUSHDONE: "1",
    CACHE_WB: "P",
    FREEID: "1",
    VCPU_PAGES: "V (c + 1)",
    TABLE_PAGES: "T",
    TDCS_PAGES: "d",
    TDR_PAGE: "2",
}

#: Order -> SEAMCALLs for one private page: BLOCK, TRACK, REMOVE and WBINVD, or RECLAIM.
CALLS_PER_PAGE = {KEYID_LAST: 4, KEYID_FIRST: 1}


class Sizes(NamedTuple):
    """What the cost of a teardown depends on; the symbols are those of this file."""

    pages: int
    vcpus: int
    packages: int
    tables: int
    tdcx: int
    tdcs: int

    def calls(self, order: str) -> dict[str, int]:
        """Phase -> SEAMCALLs of a teardown in which nothing fails."""
        return {
            RELEASE: CALLS_PER_PAGE[order] * self.pages,
            FLUSH: self.vcpus,
            FLUSHDONE: 1,
            CACHE_WB: self.packages,
            FREEID: 1,
            VCPU_PAGES: self.vcpus * (self.tdcx + 1),
            TABLE_PAGES: self.tables,
            TDCS_PAGES: self.tdcs,
            TDR_PAGE: 2,
        }

    def total(self, order: str) -> int:
        """All SEAMCALLs of such a teardown."""
        return sum(self.calls(order).values())


def sizes_of(lab: TeardownLab) -> Sizes:
    """The sizes of a lab's TD, counted in it."""
    roles = list(lab.roles.values())
    tables = sum(roles.count(level) for level in TABLES)
    tdcx = roles.count("TDCX") // lab.vcpus
    return Sizes(roles.count(PRIVATE), lab.vcpus, lab.packages, tables, tdcx, roles.count(TDCS))


def tables_for(pages: int, gpaw: int) -> int:
    """Tables besides the root for that many pages in a row from GPA 0: one for each 512 pages, one
    for each 512 of those, and so on below the root.
    """
    levels = 4 if gpaw == 48 else 5
    return sum(-(-pages // ENTRIES_PER_TABLE**level) for level in range(1, levels))


def sizes_for(memory: int, *, vcpus: int, like: TeardownLab) -> Sizes:
    """Sizes of a TD with `memory` bytes of private memory in a row; the rest as in the lab."""
    pages = memory // PAGE_SIZE
    found = sizes_of(like)
    return found._replace(pages=pages, vcpus=vcpus, tables=tables_for(pages, like.gpaw))


# -- the cost


class RoleRow(NamedTuple):
    """What the pages of one role are. pages: how many. module: their type in the PAMT."""

    role: str
    pages: int
    module: str
    host: str


def role_rows(lab: TeardownLab) -> list[RoleRow]:
    """The pages of the TD by role, each combination of the two sides' views in a row."""
    rows = lab.ledger()
    keys = dict.fromkeys((row.role, row.module, row.host) for row in rows)
    seen = [(row.role, row.module, row.host) for row in rows]
    return [RoleRow(role, seen.count((role, m, h)), m, h) for role, m, h in keys]


class CostRow(NamedTuple):
    """SEAMCALLs of one phase. expected: by the formula, if nothing fails; counted: so far."""

    phase: str
    formula: str
    expected: int
    counted: int


def cost_rows(lab: TeardownLab) -> list[CostRow]:
    """Every phase in the order of the tape, then the sum."""
    expected = sizes_of(lab).calls(lab.order)
    counted = lab.calls_per_phase()
    calls = CALLS_PER_PAGE[lab.order]
    order = [*lab.phases(), *(phase for phase in PHASES if phase not in lab.phases())]
    rows = [
        CostRow(phase, _formula(phase, calls), expected[phase], counted[phase]) for phase in order
    ]
    total = f"{_formula(RELEASE, calls)} + T + V (c + 2) + d + P + 4"
    sums = sum(row.expected for row in rows), sum(row.counted for row in rows)
    return [*rows, CostRow("all", total, *sums)]


def _formula(phase: str, calls: int) -> str:
    return FORMULAS[phase].format(k=calls).removeprefix("1 ")


class OrderRow(NamedTuple):
    """SEAMCALLs of a whole teardown in both orders. memory_gib: private memory, in GiB."""

    memory_gib: int
    pages: int
    tables: int
    keyid_last: int
    keyid_first: int


def order_rows(gibs: Sequence[int], *, like: TeardownLab) -> list[OrderRow]:
    """Both orders for TDs of several sizes, by formula."""
    rows = []
    for gib in gibs:
        sizes = sizes_for(gib * SIZE_1G, vcpus=like.vcpus, like=like)
        totals = [sizes.total(order) for order in ORDERS]
        rows.append(OrderRow(gib, sizes.pages, sizes.tables, *totals))
    return rows


# -- the leaks

BUSY, BAD = st.TDX_OPERAND_BUSY, st.TDX_PAGE_METADATA_INCORRECT

#: Failures to try: one at each place where a teardown in the order of Linux 6.16 can fail.
FAILURES = (
    Failure("TDH.MEM.RANGE.BLOCK", 1, BUSY),
    Failure("TDH.MEM.RANGE.BLOCK", 1, BUSY, 2),
    Failure("TDH.MEM.PAGE.REMOVE", 1, BAD),
    Failure("TDH.PHYMEM.PAGE.WBINVD", 1, BAD),
    Failure("TDH.VP.FLUSH", 1, BUSY),
    Failure("TDH.MNG.VPFLUSHDONE", 1, BUSY),
    Failure("TDH.PHYMEM.CACHE.WB", 1, BUSY),
    Failure("TDH.PHYMEM.CACHE.WB", 1, 0),
    Failure("TDH.MNG.KEY.FREEID", 1, BUSY),
    Failure("TDH.PHYMEM.PAGE.RECLAIM", 1, BUSY),
)


class LeakRow(NamedTuple):
    """What one failure leaks. pages: how many of how many; leaked: of which roles; keyid: "lost" or
    "free"; vm: "dead" if KVM found a bug.
    """

    failure: str
    pages: int
    leaked: str
    keyid: str
    vm: str


def leak_rows(
    lab: TeardownLab, order: str = KEYID_LAST, failures: Sequence[Failure] = FAILURES
) -> list[LeakRow]:
    """Tear the lab's TD down with each failure in turn."""
    rows = []
    for failure in failures:
        lab.destroy(order, failure)
        leaked = lab.leaked()
        rows.append(
            LeakRow(
                str(failure).replace("TDH.", ""),
                sum(leaked.values()),
                leak_text(leaked) or "nothing",
                "lost" if lab.keyid_is_lost() else "free",
                "dead" if lab.td.vm.vm_bugged else "fine",
            )
        )
    return rows


def leak_text(leaked: dict[str, int]) -> str:
    """Roles and numbers in words, tables of all levels together."""
    tables = sum(leaked.get(level, 0) for level in TABLES)
    counts = {role: leaked.get(role, 0) for role in ROLES if role not in TABLES}
    parts = [f"{count} {role}" for role, count in counts.items() if count and role != TDR]
    parts += [f"{tables} S-EPT"] * bool(tables) + ["TDR"] * bool(counts[TDR])
    return ", ".join(parts)


# -- published times


class Published(NamedTuple):
    """One published teardown. memory_gb: GB of 2^30 bytes. seconds: as published."""

    vcpus: int
    memory_gb: int
    order: str
    seconds: int
    source: str


def published() -> list[Published]:
    """The published teardown times, smallest TD first."""
    path = resources.data() / "published" / "teardown.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [_published(row) for row in csv.DictReader(file)]


def _published(row: dict[str, str]) -> Published:
    order = KEYID_FIRST if row["condition"] == "KeyID released first" else KEYID_LAST
    memory = int(row["guest_memory_gb"])
    return Published(int(row["vcpus"]), memory, order, int(row["value"]), row["source"])


class TimeRow(NamedTuple):
    """One published time beside a modelled one, in seconds. seamcalls: by the formula. ratio: how
    many times the modelled time the published one is.
    """

    vcpus: int
    memory_gb: int
    order: str
    seamcalls: int
    published_s: int
    modelled_s: int
    ratio: str


def time_rows(lab: TeardownLab) -> list[TimeRow]:
    """Published times, and what they would be if each SEAMCALL took as long as in the smallest TD
    of the same order. ILLUSTRATIVE: the machines are not stated, and the model does not measure.
    """
    rows = published()
    first = {row.order: row for row in reversed(rows)}
    calls = [_calls(row, lab) for row in rows]
    per_call = {order: row.seconds / _calls(row, lab) for order, row in first.items()}
    found = []
    for row, count in zip(rows, calls, strict=True):
        modelled = count * per_call[row.order]
        who = row.vcpus, row.memory_gb, row.order
        ratio = f"{row.seconds / modelled:.2f}"
        found.append(TimeRow(*who, count, row.seconds, round(modelled), ratio))
    return found


def _calls(row: Published, lab: TeardownLab) -> int:
    return sizes_for(row.memory_gb * SIZE_1G, vcpus=row.vcpus, like=lab).total(row.order)
