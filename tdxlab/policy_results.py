"""What policies came to: a result for each run, and the leaderboard of many.

Zap policies and conversion policies are counted differently, and each kind has a leaderboard of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tdxlab.stopping import Violation


class Result(NamedTuple):
    """What a zap policy did in a workload. pages: taken out. block ... writeback: SEAMCALLs, those
    made again included. kicks, ipis: of the policy's, and of the answer to BUSY. retries: calls
    that were made again or refused. most_blocked: pages that the guest was shut out of at one time.
    violation: the rule that ended the run, None if none did.
    """

    policy: str
    workload: str
    pages: int
    block: int
    unblock: int
    track: int
    remove: int
    writeback: int
    kicks: int
    ipis: int
    retries: int
    most_blocked: int
    violation: Violation | None = None

    @property
    def seamcalls(self) -> int:
        """All of them."""
        return self.block + self.unblock + self.track + self.remove + self.writeback

    @property
    def cost(self) -> int:
        """SEAMCALLs and IPIs: how often a border was crossed. It is no time."""
        return self.seamcalls + self.ipis


class ConversionResult(NamedTuple):
    """What a conversion policy did in a workload, and what came of it; see `ConversionTally`.
    violation: the rule that ended the run, None if none did.
    """

    policy: str
    workload: str
    requests: int
    implicit: int
    attributes: int
    punches: int
    discards: int
    pre_faults: int
    entries: int
    seamcalls: int
    retries: int
    ipis: int
    most_at_once: int
    most_double: int
    violation: Violation | None = None

    @property
    def calls(self) -> int:
        """System calls that the policy made."""
        return self.attributes + self.punches + self.discards + self.pre_faults

    @property
    def cost(self) -> int:
        """System calls, entries into the guest, SEAMCALLs of zaps and faults, IPIs: how often a
        border was crossed. It is no time.
        """
        return self.calls + self.entries + self.seamcalls + self.ipis


AnyResult = Result | ConversionResult


class Standing(NamedTuple):
    """A row of the leaderboard: sums over its workloads. place: 0 without one. saved: cost in
    hundredths of the first policy's that is saved. most_blocked: the most of any. verdict: "keeps
    the rules", or the workload and the rule.
    """

    place: int
    policy: str
    seamcalls: int
    track: int
    ipis: int
    retries: int
    most_blocked: int
    cost: int
    saved: int
    verdict: str


class ConversionStanding(NamedTuple):
    """As `Standing`, of conversion policies. most_at_once, most_double: the most of any."""

    place: int
    policy: str
    requests: int
    calls: int
    entries: int
    seamcalls: int
    retries: int
    ipis: int
    most_at_once: int
    most_double: int
    cost: int
    saved: int
    verdict: str


AnyStanding = Standing | ConversionStanding

_GOOD = "keeps the rules"
#: Fields of which the most of any workload stands in a row, not the sum.
_MOST = ("most_blocked", "most_at_once", "most_double")


def standings(results: Sequence[Sequence[AnyResult]]) -> list[AnyStanding]:
    """The leaderboard of results: one row for each policy's, the first of which others are
    compared with. Who keeps the rules comes first, by cost, then by the most pages that it blocks,
    or that take memory twice.

    Refuses results of zap and of conversion policies together: ValueError.
    """
    require_one_kind(isinstance(result, Result) for of_one in results for result in of_one)
    base = sum(result.cost for result in results[0])
    rows = [_standing(of_one, base) for of_one in results]
    rows.sort(key=lambda row: (row.verdict != _GOOD, row.cost, _most(row)))
    good = sum(row.verdict == _GOOD for row in rows)
    return [row._replace(place=n) if n <= good else row for n, row in enumerate(rows, 1)]


def require_one_kind(are_zaps: Iterable[bool]) -> None:
    """Refuse zap policies and conversion policies in one leaderboard: ValueError."""
    if len(set(are_zaps)) > 1:
        raise ValueError(
            "zap policies and conversion policies are counted differently; make a leaderboard of "
            "each kind"
        )


def _standing(results: Sequence[AnyResult], base: int) -> AnyStanding:
    kind = ConversionStanding if isinstance(results[0], ConversionResult) else Standing
    wrong = [f"{r.workload}: {r.violation.rule}" for r in results if r.violation is not None]
    cost = sum(r.cost for r in results)
    sums = {
        name: (max if name in _MOST else sum)(getattr(r, name) for r in results)
        for name in kind._fields[2:-3]
    }
    saved = 0 if wrong or not base else round(100 * (base - cost) / base)
    verdict = "; ".join(wrong) or _GOOD
    return kind(place=0, policy=results[0].policy, **sums, cost=cost, saved=saved, verdict=verdict)


def _most(row: AnyStanding) -> int:
    return row.most_blocked if isinstance(row, Standing) else row.most_double
