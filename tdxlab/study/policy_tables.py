"""Tables of policies: workloads, counts, the rules that are broken, what a formula says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab import workloads
from tdxlab.conversion import CONVERSION_RULES
from tdxlab.conversions import WRONG_CONVERSIONS
from tdxlab.invariants import INVARIANTS
from tdxlab.policies import WRONG_POLICIES, AllAtOnce, Batches, KernelPolicy, RegionFirst
from tdxlab.policy import RULES, ZapPolicy
from tdxlab.policy_results import AnyResult, AnyStanding, ConversionResult, standings
from tdxlab.policy_run import AnyPolicy, Given, kernels_own, run
from tdxlab.study import plots
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Look,
)
from tdxlab.study.plots import Series, stacked_bars
from tdxlab.workloads import PRIVATE, SHARED, Event, Workload

#: What the bars of a policy are made of: field of a Result -> its look.
COST_LOOKS = {
    "block": Look("BLOCK", VERMILLION, BLACK, "B", "xx"),
    "unblock": Look("UNBLOCK", WHITE, BLACK, "U", ".."),
    "track": Look("TRACK", BLUE, WHITE, "T", ""),
    "remove": Look("REMOVE", GREEN, BLACK, "R", ""),
    "writeback": Look("WBINVD", SKY, BLACK, "W", "//"),
    "ipis": Look("IPIs", YELLOW, BLACK, "I", "--"),
}
#: As `COST_LOOKS`, of a conversion policy.
CONVERSION_LOOKS = {
    "calls": Look("system calls", PURPLE, BLACK, "C", ".."),
    "entries": Look("entries", GREEN, BLACK, "E", ""),
    "seamcalls": Look("SEAMCALLs", SKY, BLACK, "S", "//"),
    "ipis": COST_LOOKS["ipis"],
}
_COST = Look("cost", BLUE, WHITE, "c", "")
_SHUT = Look("most pages blocked at a time", GREY, BLACK, "b", "")


class WorkloadRow(NamedTuple):
    """A workload. zaps: events that take private pages away; most: pages of the largest."""

    workload: str
    about: str
    vcpus: int
    events: int
    zaps: int
    most: int


def workload_rows() -> list[WorkloadRow]:
    """All workloads."""
    return [_workload_row(workloads.load(name)) for name in workloads.names()]


def _workload_row(workload: Workload) -> WorkloadRow:
    zaps = [e for e in workload.events if e.do in (SHARED, workloads.END)]
    most = max((e.pages for e in zaps if e.do == SHARED), default=0)
    return WorkloadRow(
        workload.name, workload.about, workload.vcpus, len(workload.events), len(zaps), most
    )


class ResultRow(NamedTuple):
    """A zap policy's result in short; see `policy_results.Result`."""

    policy: str
    workload: str
    pages: int
    seamcalls: int
    track: int
    kicks: int
    ipis: int
    retries: int
    most_blocked: int
    cost: int
    broken: str


def result_row(result: AnyResult) -> ResultRow | AnyStanding:
    """A result in short; a conversion policy's is a row of a leaderboard of its own."""
    if isinstance(result, ConversionResult):
        return standings([[result]])[0]
    return ResultRow(
        result.policy,
        result.workload,
        result.pages,
        result.seamcalls,
        result.track,
        result.kicks,
        result.ipis,
        result.retries,
        result.most_blocked,
        result.cost,
        result.violation.rule if result.violation else "-",
    )


def result_rows(
    policies: Sequence[Given], workload: str, gpaw: int
) -> list[ResultRow | AnyStanding]:
    """Several policies in one workload."""
    return [result_row(run(policy, workload, gpaw=gpaw)) for policy in policies]


class OwnRow(NamedTuple):
    """Calls of one leaf: by KVM's own code, and by the policy that imitates it."""

    leaf: str
    kvm_itself: int
    kernel_policy: int


def own_rows(workload: str, gpaw: int) -> list[OwnRow]:
    """Whether the kernel policy is the kernel's."""
    result = run(KernelPolicy(), workload, gpaw=gpaw)
    by_policy = (result.block, result.unblock, result.track, result.remove, result.writeback)
    calls = kernels_own(workload, gpaw=gpaw)
    return [OwnRow(leaf, n, m) for (leaf, n), m in zip(calls.items(), by_policy, strict=True)]


class RuleRow(NamedTuple):
    """A rule that a policy can break."""

    rule: str
    asks: str


def rule_rows() -> list[RuleRow]:
    """The zap policies' own, and the invariant that such a policy can reach."""
    name = next(one.name for one in INVARIANTS if one.number == 14)
    return [*(RuleRow(*item) for item in RULES.items()), RuleRow("invariant 14", name)]


def conversion_rule_rows() -> list[RuleRow]:
    """The conversion policies' own."""
    return [RuleRow(*item) for item in CONVERSION_RULES.items()]


class WrongRow(NamedTuple):
    """A policy that breaks a rule, and where that comes out first."""

    policy: str
    workload: str
    rule: str
    what: str


def wrong_rows(gpaw: int) -> list[WrongRow]:
    """The zap policies that break a rule each."""
    return [wrong_row(policy, gpaw) for policy in WRONG_POLICIES]


def wrong_conversion_rows(gpaw: int) -> list[WrongRow]:
    """The conversion policies that break a rule each."""
    return [wrong_row(policy, gpaw) for policy in WRONG_CONVERSIONS]


def wrong_row(policy: AnyPolicy, gpaw: int) -> WrongRow:
    """Where a policy breaks a rule, as far as a few workloads show it."""
    zaps = ("boot", one_zap(8, 2), "teardown")
    for workload in zaps if isinstance(policy, ZapPolicy) else ("boot", there_and_back()):
        result = run(policy, workload, gpaw=gpaw)
        if result.violation is not None:
            return WrongRow(policy.title, result.workload, *result.violation)
    return WrongRow(policy.title, "-", "-", "nothing was found")


class RegionRow(NamedTuple):
    """`pages` pages of one region are taken out while nobody runs."""

    policy: str
    pages: int
    block: int
    unblock: int
    track: int
    seamcalls: int


def region_rows(gpaw: int) -> list[RegionRow]:
    """A whole region of 2 MiB, with its table closed first and without."""
    results = [run(policy, one_zap(), gpaw=gpaw) for policy in (AllAtOnce(), RegionFirst())]
    return [RegionRow(r.policy, r.pages, r.block, r.unblock, r.track, r.seamcalls) for r in results]


def one_zap(
    pages: int = workloads.PAGES, running: int = 0, *, mapped: int | None = None
) -> Workload:
    """`mapped` pages are touched (None: all), and `pages` become shared while `running` vCPUs never
    leave.
    """
    touched = Event("touch", 0, pages if mapped is None else mapped)
    events = (touched, Event(SHARED, 0, pages, running))
    return Workload("one zap", "", 0, running + 1, 0, events)


def there_and_back(running: int = 0) -> Workload:
    """Pages become shared, some of them private again, and then others shared."""
    events = (
        Event("touch", 0, 48),
        Event(SHARED, 0, 20, running),
        Event(PRIVATE, 4, 8, running),
        Event("touch", 4, 8),
        Event(SHARED, 32, 16, running),
    )
    return Workload("there and back", "", 0, running + 1, 0, events)


def conversion_formula(pages: int, requests: int, *, pre_faults: bool = False) -> tuple[int, int]:
    """(system calls, entries) of `requests` conversions of `pages` in all that the guest uses: as
    QEMU makes them, or pre-faulted. An entry before each request and after; one for each fault.
    """
    if pre_faults:
        return 3 * requests, 2 * requests
    return 2 * requests, 2 * requests + pages


def formula(pages: int, batch: int, inside: int) -> tuple[int, int]:
    """(SEAMCALLs, IPIs) of one zap in batches while `inside` vCPUs are always inside: BLOCK, REMOVE
    and WBINVD for each page, a TRACK and a kick for each batch.
    """
    flushes = -(-pages // batch)
    return 3 * pages + flushes, flushes * inside


class BatchRow(NamedTuple):
    """A zap in batches. by_formula: SEAMCALLs."""

    batch: int
    pages: int
    seamcalls: int
    by_formula: int
    ipis: int
    cost: int
    most_blocked: int


def batch_rows(gpaw: int, pages: int = 32, running: int = 3) -> list[BatchRow]:
    """Batches of 1, 2, 4, ... pages, up to all."""
    sizes = [1 << shift for shift in range(pages.bit_length())]
    rows = []
    for size in sizes:
        r = run(Batches(size), one_zap(pages, running), gpaw=gpaw)
        calls, _ = formula(pages, size, running)
        rows.append(BatchRow(size, pages, r.seamcalls, calls, r.ipis, r.cost, r.most_blocked))
    return rows


# -- plots


def plot_batches(rows: Sequence[BatchRow], ax: Axes) -> Axes:
    """Cost, and the most pages blocked at a time, against the size of a batch."""
    ax.clear()
    sizes = [row.batch for row in rows]
    for look, values in (
        (_COST, [row.cost for row in rows]),
        (_SHUT, [row.most_blocked for row in rows]),
    ):
        ax.plot(sizes, values, color=look.colour, marker=f"${look.letter}$", label=look.name)
    ax.set_xscale("log", base=2)
    title = f"{rows[0].pages} pages taken out while vCPUs run" if rows else ""
    ax.set_title(title, fontsize=plots.FONT + 1, loc="left")
    ax.set_xlabel("pages in a batch", fontsize=plots.FONT)
    ax.set_ylabel("SEAMCALLs and IPIs; pages", fontsize=plots.FONT)
    ax.tick_params(labelsize=plots.FONT)
    ax.legend(fontsize=plots.FONT, frameon=False)
    return ax


def plot_costs(rows: Sequence[AnyResult], ax: Axes) -> Axes:
    """What each result's cost is made of. rows: of one kind, each policy and workload once."""
    conversions = bool(rows) and isinstance(rows[0], ConversionResult)
    looks = CONVERSION_LOOKS if conversions else COST_LOOKS
    title = "System calls, entries, SEAMCALLs, IPIs" if conversions else "SEAMCALLs and IPIs"
    series = [
        Series(look, [int(getattr(row, field)) for row in rows]) for field, look in looks.items()
    ]
    names = [f"{row.policy}, {row.workload}" for row in rows]
    return stacked_bars(ax, names, series, unit="calls", title=title)
