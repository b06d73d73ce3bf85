"""Zap policies: what they are counted, what a wrong one hears, and that none gets around a rule."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tdxlab import policy_bench, workloads
from tdxlab.abi.status import OPERAND_ID_RCX, TDX_OPERAND_BUSY, TDX_SUCCESS
from tdxlab.policies import (
    POLICIES,
    WRONG_POLICIES,
    AllAtOnce,
    Batches,
    KernelPolicy,
    KickFirst,
    NoTrack,
    Patient,
    RegionFirst,
    RegionOnly,
    flush,
)
from tdxlab.policy import SUCCESS, Op, Tally, ZapHost, ZapPolicy
from tdxlab.policy_results import Result, standings
from tdxlab.policy_run import kernels_own, leaderboard, run
from tdxlab.stopping import LineLimit, Stopped, Violation
from tdxlab.study.policy_tables import formula, one_zap
from tdxlab.workloads import Event, Workload
from tools import make_workloads

#: A conversion of 8 pages while two vCPUs run that never leave.
SMALL = one_zap(8, 2)
Zap = Callable[[ZapHost, Sequence[int]], object]


def policy(zap: Zap) -> ZapPolicy:
    """A policy of one function."""

    class Given(ZapPolicy):
        def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
            zap(host, pages)

    return Given()


def broken(zap: Zap | ZapPolicy, workload: Workload | str = SMALL) -> Violation:
    """The rule that ends a run."""
    one = zap if isinstance(zap, ZapPolicy) else policy(zap)
    violation = run(one, workload).violation
    assert violation is not None
    return violation


# -- counts


def test_kernel_policy_makes_the_calls_of_kvm_itself() -> None:
    result = run(KernelPolicy(), "boot")
    calls = kernels_own("boot")
    assert calls == {
        "TDH.MEM.RANGE.BLOCK": result.block,
        "TDH.MEM.RANGE.UNBLOCK": 0,
        "TDH.MEM.TRACK": result.track,
        "TDH.MEM.PAGE.REMOVE": result.remove,
        "TDH.PHYMEM.PAGE.WBINVD": result.writeback,
    }
    zapped = [event.pages for event in workloads.load("boot").events if event.do == "shared"]
    assert result.pages == result.kicks == sum(zapped)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_run_counts_as_the_formula_where_vcpus_always_come_back(size: int) -> None:
    result = run(Batches(size), SMALL, seed=0)
    seamcalls, ipis = formula(8, size, 2)
    assert (result.seamcalls, result.most_blocked) == (seamcalls, size)
    assert 2 <= result.ipis <= ipis
    assert result.cost == result.seamcalls + result.ipis


@pytest.mark.parametrize("kept", POLICIES, ids=repr)
def test_policies_keep_the_rules_at_both_widths(kept: ZapPolicy) -> None:
    for workload, gpaw, seed in ((SMALL, 52, 1), ("boot", 48, 2)):
        result = run(kept, workload, gpaw=gpaw, seed=seed)
        assert result.violation is None
        assert result.block == result.remove - result.retries == result.writeback == result.pages


def test_run_finds_the_end_of_a_td_without_its_pages() -> None:
    result = run(RegionFirst, Workload("end", "", 0, 1, 0, (Event("touch", 0, 9), Event("end"))))
    assert (result.violation, result.pages, result.unblock) == (
        None,
        10,
        2,
    )


def test_patient_sends_no_ipi_where_vcpus_leave_and_kicks_where_they_do_not() -> None:
    leaving = Workload("", "", 0, 2, 4, (*SMALL.events[:1], Event("shared", 0, 8, 1)))
    assert (run(Patient(), leaving).ipis, run(Patient(), leaving).violation) == (0, None)
    staying = run(Patient(), SMALL)
    assert (staying.kicks, staying.retries, staying.violation) == (1, 20, None)


def test_run_is_the_same_for_the_same_seed_and_uses_a_copy_of_the_policy() -> None:
    class Grows(Batches):
        def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
            self.size += 1
            super().zap(host, pages)

    mine = Grows(1)
    assert run(mine, "boot") == run(mine, "boot")
    assert mine.size == 1


def test_run_tells_a_watcher_of_events_and_calls_in_order() -> None:
    seen: list[str] = []

    def watch(_td: object, op: Op, tally: Tally) -> None:
        seen.append(op.name)

    run(KernelPolicy, one_zap(1), watch=watch)
    assert seen == ["touch", "shared", "BLOCK", "TRACK", "KICK", "REMOVE", "WRITEBACK"]


def test_busy_is_answered_with_all_vcpus_kept_out_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses = iter([TDX_OPERAND_BUSY | OPERAND_ID_RCX, TDX_SUCCESS])

    def once_busy(host: Any, td: Any) -> Any:
        yield ("TDH.MEM.TRACK", td.tdr)
        return next(statuses)

    monkeypatch.setattr("tdxlab.policy.tdh_mem_track", once_busy)
    result = run(policy(lambda host, pages: host.track()), one_zap(1))
    assert (result.track, result.retries) == (2, 1)


# -- what a wrong policy hears


EXPECTED = {
    "NoTrack": ("tracking", "TLB_TRACKING_NOT_DONE"),
    "KickFirst": ("tracking", "TLB_TRACKING_NOT_DONE"),
    "NoBlock": ("status", "TDX_GPA_RANGE_NOT_BLOCKED"),
    "RemovesTwice": ("status", "REMOVE of gfn"),
    "ForgetsOne": ("unmapped", "is mapped"),
    "NoWriteback": ("invariant 14", "written back before they change keys"),
    "WaitsForEver": ("end", "8 of 8 pages are still in the TD"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_policy_hears_the_rule_that_it_breaks(name: str) -> None:
    wrong = next(p for p in WRONG_POLICIES if p.title == name)
    violation = broken(wrong, "boot" if name == "KickFirst" else SMALL)
    rule, words = EXPECTED[name]
    assert violation.rule == rule
    assert words in violation.explanation


def test_no_page_is_found_below_a_closed_region() -> None:
    violation = broken(RegionOnly(), one_zap(mapped=1))
    assert violation.rule == "status"
    assert "TDX_EPT_WALK_FAILED" in violation.explanation


def test_a_region_left_closed_is_noticed() -> None:
    def zap(host: ZapHost, pages: Sequence[int]) -> None:
        AllAtOnce().zap(host, pages)
        host.block(host.start, level=2)

    violation = broken(zap, one_zap(mapped=1))
    assert violation.rule == "unmapped"
    assert "level 2 entry above gfn 0x0 is still blocked" in violation.explanation


def test_pages_left_blocked_are_noticed_with_the_last_answer() -> None:
    def zap(host: ZapHost, pages: Sequence[int]) -> None:
        for gfn in pages:
            host.block(gfn)
        host.remove(pages[0])

    violation = broken(zap)
    assert violation.rule == "unmapped"
    assert "gfn 0x0 is blocked; REMOVE of gfn 0x0 was answered TLB_TRA" in violation.explanation


def test_unblock_gives_a_page_back() -> None:
    def zap(host: ZapHost, pages: Sequence[int]) -> None:
        host.block(pages[0])
        flush(host)
        assert host.unblock(pages[0]) == SUCCESS
        AllAtOnce().zap(host, pages)

    result = run(policy(zap), SMALL)
    assert (result.violation, result.block, result.unblock) == (None, 9, 1)


@pytest.mark.parametrize(
    ("zap", "words"),
    [
        (lambda host, pages: host.block(9), "BLOCK of gfn 9"),
        (lambda host, pages: host.remove("x"), "REMOVE of gfn 'x'"),
        (lambda host, pages: host.writeback(-1), "WRITEBACK of gfn -1"),
        (lambda host, pages: host.unblock(77), "UNBLOCK of gfn 77"),
        (lambda host, pages: host.block(0, level=2), "BLOCK of gfn 0x0 at level 2"),
        (lambda host, pages: host.unblock(1, level=2), "UNBLOCK of gfn 0x1 at level 2"),
        (lambda host, pages: host.block(0, level=3), "at level 3"),
    ],
)
def test_a_call_about_other_pages_is_out_of_scope(zap: Zap, words: str) -> None:
    violation = broken(zap)
    assert violation.rule == "scope"
    assert words in violation.explanation


def test_an_exception_is_told_with_its_line() -> None:
    class Divides(ZapPolicy):
        def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
            host.block(pages[0])
            pages[0] / 0

    assert broken(Divides()) == (
        "policy",
        "it raised ZeroDivisionError: division by zero (line 3 of zap)",
    )
    assert "has no `zap`; write one" in broken(ZapPolicy()).explanation


def test_a_policy_that_leaves_python_or_yields_is_told_as_an_exception() -> None:
    assert "it raised SystemExit: 3" in broken(lambda host, pages: sys.exit(3)).explanation

    class Yields(ZapPolicy):
        def zap(self, host: ZapHost, pages: Sequence[int]) -> Any:
            yield host.track()

    assert "it has a `yield` in it" in broken(Yields()).explanation


def test_a_policy_that_cannot_be_made_or_copied_is_refused() -> None:
    class Wants(KernelPolicy):
        def __init__(self, size: int) -> None:
            self.lock = threading.Lock()

    with pytest.raises(ValueError, match=r"cannot be made anew for a run: TypeError: .*size"):
        run(Wants, SMALL)
    with pytest.raises(ValueError, match=r"kernel cannot be made anew .*pickle"):
        run(Wants(1), SMALL)


def test_a_policy_cannot_go_on_after_a_rule_is_broken() -> None:
    def zap(host: ZapHost, pages: Sequence[int]) -> None:
        try:
            host.remove(pages[0])
        except Exception:
            AllAtOnce().zap(host, pages)

    assert broken(zap).rule == "status"


def test_a_bare_except_holds_nothing_back() -> None:
    def loops(host: ZapHost, pages: Sequence[int]) -> None:
        while True:
            # A reader's bare except, which suppress() is not.
            try:  # noqa: SIM105
                host.block(pages[0])
            except:  # noqa: E722
                pass

    def hides(host: ZapHost, pages: Sequence[int]) -> None:
        AllAtOnce().zap(host, pages)
        # A reader's bare except, which suppress() is not.
        try:  # noqa: SIM105
            host.remove(pages[0])
        except:  # noqa: E722
            pass

    assert "GPA_RANGE_ALREADY_BLOCKED" in broken(loops).explanation
    assert "EPT_ENTRY_STATE_INCORRECT" in broken(hides).explanation


def test_a_td_that_cannot_go_on_is_noticed() -> None:
    def zap(host: ZapHost, pages: Sequence[int]) -> None:
        AllAtOnce().zap(host, pages)
        host._tdx.vm.bug("killed by its policy")

    violation = broken(zap)
    assert violation.rule == "alive"
    assert "killed by its policy" in violation.explanation


def test_loops_without_calls_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdxlab.stopping.LineLimit.__init__.__defaults__", (2000,))

    def zap(host: ZapHost, pages: Sequence[int]) -> None:
        host.track()
        while pages:
            pages = list(pages)

    violation = broken(zap)
    assert violation == ("end", "the zap has no end: 2000 lines ran without a call")
    assert sys.gettrace() is None


def test_line_limit_leaves_a_debugger_alone() -> None:
    def trace(frame: Any, event: str, arg: Any) -> Any:
        return trace

    limit = LineLimit("zap", 1)
    sys.settrace(trace)
    try:
        limit.start()
        found = sys.gettrace()
        limit.stop()
        assert sys.gettrace() is found is trace
    finally:
        sys.settrace(None)


def test_stopped_is_no_exception_that_a_policy_catches() -> None:
    assert not issubclass(Stopped, Exception)


def test_a_policy_may_be_lucky_in_one_schedule_and_not_in_another() -> None:
    lucky = [run(KickFirst, "boot", seed=seed).violation is None for seed in (0, 1)]
    assert lucky == [True, False]


# -- the leaderboard


def result(name: str, *, block: int, most: int = 1, broken: bool = False) -> Result:
    """A result with little in it."""
    wrong = Violation("end", "no end") if broken else None
    return Result(name, "boot", 1, block, 0, 0, 0, 0, 0, 0, 0, most, wrong)


def test_standings_rank_by_rules_then_cost_then_pages_blocked() -> None:
    rows = standings(
        [
            [result("kernel", block=100)],
            [result("wide", block=50, most=9)],
            [result("narrow", block=50, most=2)],
            [result("wrong", block=1, broken=True)],
        ]
    )
    assert [(row.place, row.policy, row.saved) for row in rows] == [
        (1, "narrow", 50),
        (2, "wide", 50),
        (3, "kernel", 0),
        (0, "wrong", 0),
    ]
    assert rows[-1].verdict == "boot: end"


def test_leaderboard_adds_workloads_up_and_tells_its_progress() -> None:
    told: list[tuple[int, int]] = []
    rows = leaderboard(
        [KernelPolicy, NoTrack], ["boot"], progress=lambda done, of: told.append((done, of))
    )
    assert told == [(1, 2), (2, 2)]
    assert [row.policy for row in rows] == ["kernel", "NoTrack"]
    assert rows[0].cost == run(KernelPolicy, "boot").cost
    assert rows[1].verdict == "boot: tracking"


def test_what_cannot_be_run_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="derive a class from ZapPolicy"):
        run(7, SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of boot, steady"):
        run(KernelPolicy, "weekend")
    with pytest.raises(ValueError, match="48 or 52"):
        run(KernelPolicy, SMALL, gpaw=50)
    with pytest.raises(ValueError, match="one at least"):
        leaderboard([])
    with pytest.raises(ValueError, match="a list of policies"):
        leaderboard(KernelPolicy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="7 is no workload"):
        run(KernelPolicy, 7)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="choose 1 or more"):
        Batches(0)


def test_damage_to_the_counting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdxlab.policy.Tally.count", lambda self, leaf: None)
    assert run(KernelPolicy, SMALL).seamcalls != formula(8, 1, 2)[0]
    monkeypatch.setattr(policy_bench, "zapper", lambda *_: None)
    assert run(KernelPolicy, SMALL).pages == 0


# -- workloads


@pytest.mark.parametrize("name", workloads.names())
def test_workload_files_are_what_the_tool_draws(name: str) -> None:
    drawn = workloads.generate(name)
    assert (make_workloads.FOLDER / f"{name}.json").read_text() == make_workloads.text_of(drawn)
    assert workloads.load(name) == drawn
    assert workloads.from_json(json.loads(json.dumps(workloads.to_json(drawn)))) == drawn
    assert name == "teardown" or workloads.generate(name, 99).events != drawn.events


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vcpus": 9}, "choose 1..8"),
        ({"reads_between_exits": -1}, "choose 0 or more"),
        ({"events": [{"do": "swap"}]}, "cannot be 'swap'"),
        ({"events": [{"do": "touch", "gfn": 500, "pages": 13}]}, "gfns 0..511"),
        ({"events": [{"do": "touch", "running": 4}]}, "choose 0..3"),
        ({"events": [{"do": "touch", "speed": 4}]}, "this is no workload"),
        ({"speed": 4}, "this is no workload"),
        ({"vcpus": "4"}, "whole numbers"),
        ({"events": [{"do": "touch", "gfn": 1.5}]}, "whole numbers"),
        ({"events": [{"do": "end"}, {"do": "touch"}]}, "let the end be the last"),
    ],
)
def test_from_json_refuses_what_is_no_workload(change: dict[str, Any], words: str) -> None:
    raw = workloads.to_json(workloads.generate("boot")) | change
    with pytest.raises(ValueError, match=words):
        workloads.from_json(raw)


def test_generate_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="choose one of boot"):
        workloads.generate("x")
