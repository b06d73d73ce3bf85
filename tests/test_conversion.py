"""Conversion policies: what they are counted, what a wrong one hears, that the VMM is as before."""

from __future__ import annotations

from collections.abc import Callable
from errno import EINTR

import pytest

from tdxlab import policy_bench
from tdxlab.abi.leaves import TDH_MEM_RANGE_BLOCK
from tdxlab.arch import PAGE_SIZE
from tdxlab.conversion import ConversionPolicy, ConvertingVmm, Request, memory_of
from tdxlab.conversions import (
    CONVERSION_POLICIES,
    WRONG_CONVERSIONS,
    AsQemu,
    KeepsBoth,
    Lazy,
    OneTooMany,
    Pieces,
    PreFaults,
    PunchesLate,
    PunchesTooLate,
    runs,
)
from tdxlab.machine import Machine
from tdxlab.policies import KernelPolicy
from tdxlab.policy import SUCCESS, Op
from tdxlab.policy_results import ConversionResult, ConversionStanding, standings
from tdxlab.policy_run import leaderboard, run
from tdxlab.steps import finished
from tdxlab.stopping import Violation
from tdxlab.trace import Trace
from tdxlab.workloads import Event, Workload

Convert = Callable[[ConvertingVmm, Request], object]


def workload(*events: Event) -> Workload:
    """Memory in use, and then these events."""
    return Workload("small", "", 0, 2, 4, (Event("touch", 0, 12), *events))


#: Four pages are shared while another vCPU runs; they become private again, and are used.
THERE_AND_BACK = workload(Event("shared", 2, 4, 1), Event("private", 2, 4, 1), Event("touch", 2, 4))


Take = Callable[[ConvertingVmm, int, int], str]


def share(vmm: ConvertingVmm, gfn: int, pages: int) -> str:
    """Pages become shared."""
    return vmm.set_attributes(gfn, pages, private=False)


def policy(convert: Convert) -> ConversionPolicy:
    """A policy of one function."""

    class Given(ConversionPolicy):
        def convert(self, vmm: ConvertingVmm, request: Request) -> None:
            convert(vmm, request)

    return Given()


def broken(one: Convert | ConversionPolicy, events: Workload | str = THERE_AND_BACK) -> Violation:
    """The rule that ends a run."""
    given = one if isinstance(one, ConversionPolicy) else policy(one)
    violation = run(given, events).violation
    assert violation is not None
    return violation


# -- counts


def test_run_counts_what_a_vmm_pays_for_two_conversions() -> None:
    result = run(AsQemu, THERE_AND_BACK)
    assert (result.violation, result.requests, result.implicit) == (None, 2, 0)
    assert (result.attributes, result.punches, result.discards, result.pre_faults) == (2, 1, 1, 0)
    assert result.calls == 4
    # each program enters once, and after MapGPA; each page faults once, shared and then private
    assert result.entries == 2 * 2 + 2 * 4
    # four zaps of four calls, four pages mapped again
    assert result.seamcalls == 4 * 4 + 4
    assert (result.most_at_once, result.most_double) == (4, 0)
    assert result.cost == result.calls + result.entries + result.seamcalls + result.ipis


def test_pre_faults_save_one_entry_for_each_page() -> None:
    result, qemu = run(PreFaults, THERE_AND_BACK), run(AsQemu, THERE_AND_BACK)
    assert qemu.entries - result.entries == 2 * 4
    assert result.calls - qemu.calls == 2
    assert result.seamcalls == qemu.seamcalls


def test_lazy_converts_each_page_when_it_is_used() -> None:
    result = run(Lazy, THERE_AND_BACK)
    assert (result.requests, result.implicit, result.attributes) == (2 + 8, 8, 8)
    assert (result.most_at_once, result.violation) == (1, None)
    unused = workload(Event("shared", 2, 4))
    assert run(policy(lambda vmm, request: None), unused).violation is not None


def test_keeps_both_takes_memory_twice() -> None:
    result = run(KeepsBoth, THERE_AND_BACK)
    assert (result.most_double, result.calls, result.violation) == (4, 2, None)


def test_pieces_set_few_attributes_at_once() -> None:
    result = run(Pieces(3), THERE_AND_BACK)
    assert (result.most_at_once, result.attributes, result.violation) == (3, 4, None)


def test_punches_late_joins_neighbours_and_spares_what_is_private_again() -> None:
    twice = workload(
        Event("shared", 0, 2), Event("shared", 2, 2), Event("private", 1, 1), Event("shared", 9, 2)
    )
    seen: list[Op] = []
    result = run(PunchesLate(3), twice, watch=lambda td, op, tally: seen.append(op))
    punched = [(op.gfn, op.level) for op in seen if op.name == "PUNCH"]
    assert (punched, result.violation) == ([(0, 4)], None)
    assert list(runs({7, 3, 4, 5, 9})) == [(3, 3), (7, 1), (9, 1)]


@pytest.mark.parametrize("kept", CONVERSION_POLICIES, ids=repr)
def test_policies_keep_the_rules_at_both_widths(kept: ConversionPolicy) -> None:
    for name, gpaw, seed in ((THERE_AND_BACK, 52, 0), ("steady", 48, 2)):
        assert run(kept, name, gpaw=gpaw, seed=seed).violation is None


def test_retries_are_seamcalls_of_kvms_that_were_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = run(AsQemu, THERE_AND_BACK).seamcalls // 5
    refusals = Trace.refusals

    def every_block_once(trace: Trace) -> dict[int, int]:
        return refusals(trace) | {
            TDH_MEM_RANGE_BLOCK: trace.seamcalls().get(TDH_MEM_RANGE_BLOCK, 0)
        }

    monkeypatch.setattr(Trace, "refusals", every_block_once)
    assert run(AsQemu, THERE_AND_BACK).retries == pages == 4


def test_the_end_of_a_td_and_first_uses_are_no_conversions() -> None:
    events = workload(Event("shared", 2, 4), Event("end"))
    one, more = run(AsQemu, events), run(AsQemu, events._replace(events=events.events[:2]))
    assert one == more


def test_run_uses_a_copy_and_a_policy_may_remember() -> None:
    mine = PunchesLate(1)
    assert run(mine, THERE_AND_BACK) == run(mine, THERE_AND_BACK)
    assert mine.waiting == set()


def test_run_tells_a_watcher_of_requests_and_calls_in_order() -> None:
    seen: list[Op] = []
    run(PreFaults, workload(Event("shared", 2, 4)), watch=lambda td, op, tally: seen.append(op))
    assert seen[1:] == [
        Op("shared", 2, 4, "0"),
        Op("MapGPA", 2, 4, "shared"),
        Op("SET SHARED", 2, 4, SUCCESS),
        Op("PUNCH", 2, 4, SUCCESS),
        Op("PRE-FAULT", 2, 4, SUCCESS),
    ]


def test_calls_answer_as_kvm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([-EINTR, PAGE_SIZE])
    monkeypatch.setattr(
        "tdxlab.conversion.kvm_vcpu_pre_fault_memory", lambda *_: finished(next(results))
    )
    answers: list[object] = []

    def convert(vmm: ConvertingVmm, request: Request) -> None:
        answers.append(vmm.set_attributes(request.gfn, request.pages, private=False))
        answers.extend((vmm.is_private(request.gfn), vmm.pages))
        answers.extend(vmm.pre_fault(request.gfn, 2) for _ in range(2))

    run(policy(convert), workload(Event("shared", 2, 4)))
    assert answers == [SUCCESS, False, 1024, "EINTR", "1 of 2 pages"]


# -- what a wrong policy hears


EXPECTED = {
    "OneTooFew": ("answered", "used gfn 0x5 as shared memory"),
    "OneTooMany": ("alive", "SET SHARED of gfns 0x2..0x6 took 0x6"),
    "OtherWay": ("answered", "it is still private"),
    "PunchesTooLate": ("alive", "took 0x2"),
    "TidiesUp": ("data", "reads 0000000000000000"),
    "WaitsForKvm": ("end", "the conversion has no end"),
}


@pytest.mark.parametrize("wrong", WRONG_CONVERSIONS, ids=repr)
def test_a_wrong_policy_hears_the_rule_that_it_breaks(
    wrong: ConversionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdxlab.stopping.LineLimit.__init__.__defaults__", (2000,))
    events = workload(
        Event("shared", 2, 4),
        Event("private", 2, 2),
        Event("touch", 2, 2),
        Event("shared", 8, 2),
    )
    if isinstance(wrong, PunchesTooLate):
        wrong = PunchesTooLate()
        wrong.most = 4
    violation = broken(wrong, events)
    rule, words = EXPECTED[wrong.title]
    assert violation.rule == rule
    assert words in violation.explanation


def test_a_shared_page_that_is_made_private_unasked_loses_its_data() -> None:
    events = (Event("shared", 0, 12), Event("private", 2, 3))
    violation = broken(OneTooMany(), Workload("", "", 0, 1, 0, events))
    assert violation.rule == "data"
    assert "to gfn 0x5, and reads 0000000000000000" in violation.explanation


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("takes", [ConvertingVmm.punch, share])
def test_a_page_that_another_vcpu_uses_must_not_be_taken(takes: Take, seed: int) -> None:
    def convert(vmm: ConvertingVmm, request: Request) -> None:
        AsQemu().convert(vmm, request)
        takes(vmm, 513, 1)

    violation = run(policy(convert), THERE_AND_BACK, seed=seed).violation
    assert violation is not None
    assert violation.rule == "alive"
    assert "of gfns 0x201..0x201 took 0x201" in violation.explanation


def test_a_page_that_was_accepted_and_not_used_yet_must_not_be_taken() -> None:
    events = workload(Event("shared", 2, 4), Event("private", 2, 4), Event("shared", 8, 2))

    def convert(vmm: ConvertingVmm, request: Request) -> None:
        AsQemu().convert(vmm, request)
        if request.gfn == 8:
            vmm.punch(5, 1)

    violation = broken(convert, events)
    assert violation.rule == "alive"
    assert "PUNCH of gfns 0x5..0x5 took 0x5" in violation.explanation


def test_a_bare_except_does_not_hide_that_a_page_in_use_was_taken() -> None:
    def convert(vmm: ConvertingVmm, request: Request) -> None:
        while True:
            # A reader's bare except, which suppress() is not.
            try:  # noqa: SIM105
                share(vmm, 513, 1)
            except:  # noqa: E722
                pass

    violation = broken(convert)
    assert violation.rule == "alive"
    assert "KVM exited for a page that a vCPU uses, gfn 0x201" in violation.explanation


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (
            lambda vmm, r: vmm.punch(1024, 1),
            "PUNCH of gfns from 1024 on, 1 in all; there are 0..1023",
        ),
        (lambda vmm, r: vmm.discard(1023, 2), "DISCARD of gfns from 1023 on, 2 in"),
        (lambda vmm, r: vmm.pre_fault(0, 0), "PRE-FAULT of gfns from 0 on, 0 in"),
        (
            lambda vmm, r: vmm.set_attributes(-1, 1, private=True),
            "SET PRIVATE of gfns from -1",
        ),
        (
            lambda vmm, r: vmm.set_attributes("2", 1, private=False),
            "SET SHARED of gfns from '2'",
        ),
        (lambda vmm, r: vmm.punch(0, 1.5), "on, 1.5 in all"),
    ],
)
def test_a_call_about_no_memory_is_out_of_scope(convert: Convert, words: str) -> None:
    violation = broken(convert)
    assert violation.rule == "scope"
    assert words in violation.explanation


def test_too_many_calls_end() -> None:
    def convert(vmm: ConvertingVmm, request: Request) -> None:
        while True:
            vmm.punch(request.gfn, request.pages)

    assert broken(convert) == ("end", "the conversion has no end: 4 pages were asked for")


def test_an_exception_is_told_with_its_line_and_a_bare_except_holds_nothing_back() -> None:
    class Divides(ConversionPolicy):
        def convert(self, vmm: ConvertingVmm, request: Request) -> None:
            request.gfn / 0

    text = "it raised ZeroDivisionError: division by zero (line 2 of convert)"
    assert broken(Divides()) == ("policy", text)
    assert "has no `convert`; write one" in broken(ConversionPolicy()).explanation

    def hides(vmm: ConvertingVmm, request: Request) -> None:
        # A reader's bare except, which suppress() is not.
        try:  # noqa: SIM105
            vmm.punch(0, 0)
        except:  # noqa: E722
            pass

    assert broken(hides).rule == "scope"


def test_invariants_are_checked_after_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdxlab.kvm.tdx_hooks.tdh_phymem_page_wbinvd_hkid", _no_writeback)
    assert broken(AsQemu()).rule == "invariant 14"


def _no_writeback(*_: object) -> object:
    yield from ()
    return 0


# -- the leaderboard


def result(name: str, *, calls: int, double: int = 0, wrong: bool = False) -> ConversionResult:
    """A result with little in it."""
    violation = Violation("data", "gone") if wrong else None
    return ConversionResult(name, "boot", 1, 0, calls, 0, 0, 0, 5, 4, 0, 1, 7, double, violation)


def test_standings_rank_conversions_by_cost_then_by_memory_taken_twice() -> None:
    rows = standings(
        [
            [result("first", calls=10)],
            [result("twice", calls=5, double=9)],
            [result("once", calls=5)],
            [result("wrong", calls=1, wrong=True)],
        ]
    )
    assert all(isinstance(row, ConversionStanding) for row in rows)
    assert [(row.place, row.policy, row.cost, row.saved) for row in rows] == [
        (1, "once", 15, 25),
        (2, "twice", 15, 25),
        (3, "first", 20, 0),
        (0, "wrong", 11, 0),
    ]
    assert rows[-1].verdict == "boot: data"


def test_leaderboard_adds_up_but_keeps_the_most() -> None:
    (row,) = leaderboard([KeepsBoth], ["teardown", "boot"])
    one, other = run(KeepsBoth, "teardown"), run(KeepsBoth, "boot")
    assert row.cost == one.cost + other.cost
    assert row.most_double == max(one.most_double, other.most_double)


def test_both_kinds_together_are_refused() -> None:
    with pytest.raises(ValueError, match="make a leaderboard of each kind"):
        leaderboard([AsQemu, KernelPolicy], ["teardown"])


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="choose 1 or more"):
        Pieces(0)
    with pytest.raises(ValueError, match="choose 1 or more"):
        PunchesLate(0)


# -- the VMM


def test_a_vmm_without_a_policy_converts_as_before() -> None:
    td = Machine(memory="1 GiB").create_td(memory="4 MiB", discards=True)
    td.touch(0, 4 << 12)
    td.convert(0, 4 << 12, to="shared")
    td.touch(0, 2 << 12)
    assert td.converter is None
    assert policy_bench.doubles(td) == 0
    td.discards = False
    td.convert(0, 4 << 12, to="private")
    td.touch(0, 4 << 12)
    assert policy_bench.doubles(td) == 2
    kinds = memory_of(td)
    assert [kinds[gfn] for gfn in range(4)] == ["twice", "twice", "private", "private"]


def test_damage_to_the_counting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_bench, "doubles", lambda td: 0)
    assert run(KeepsBoth, THERE_AND_BACK).most_double == 0
    monkeypatch.setattr(policy_bench, "_ENTRY", ("nobody", 0))
    assert run(AsQemu, THERE_AND_BACK).entries == 0
