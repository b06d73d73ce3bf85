"""A page in the TLBs of two vCPUs is taken away: what tracking is for, in every order."""

from __future__ import annotations

import pytest

from tdxlab import tlb_races
from tdxlab.breaks import BREAKS, broken
from tdxlab.explore import explore, replayed
from tdxlab.races import Race, build
from tdxlab.steps import run
from tdxlab.tlb_races import GPA, MINE, PAGE_IS_GONE, READ_ITS_OWN, TAKEN

BOTH = pytest.mark.parametrize("vcpus", [1, 2])


def explore_results(race: Race) -> dict[str, str]:
    """Name of what an exploration finds -> explanation, if nobody looks at the invariants."""
    found = explore(race.actors, race.machine.journal, ignored=race.counters)
    assert found.complete
    return {violation.invariant: violation.explanation for violation in found.violations}


@BOTH
def test_no_guest_reads_a_page_that_is_not_its_own_in_any_order(vcpus: int) -> None:
    race = build("tlb-tracking", vcpus)
    before = race.machine.digest()
    found = race.explore()
    assert (found.complete, found.violations) == (True, ())
    assert found.schedules is not None
    assert found.schedules > 10_000
    assert race.machine.digest() == before


def test_both_good_ends_of_a_guest_occur() -> None:
    race = build("tlb-tracking", 1)
    guest, host = race.actors
    mark = race.machine.mark()
    assert run(guest.start()) == READ_ITS_OWN
    race.machine.rewind(mark)
    assert run(host.start()) == TAKEN
    assert run(guest.start()) == PAGE_IS_GONE


@BOTH
def test_without_tracking_a_tlb_keeps_a_page_that_was_given_away(vcpus: int) -> None:
    race = build("tlb-tracking", vcpus)
    with broken("no-tracking"):
        found = race.explore()
        violation = found.violations[0]
        assert found.complete
        assert violation.invariant.startswith("invariant 6")
        assert "which is not mapped there any more" in violation.explanation
        with replayed(race.actors, race.machine.journal, violation.schedule):
            assert race.check(False) is not None


def test_without_tracking_a_guest_reads_a_page_of_another_td() -> None:
    """The line is under another TD's KeyID: the reader meets a machine check and dies of it."""
    race = build("tlb-tracking", 1)
    with broken("no-tracking"):
        results = explore_results(race)
    assert set(results) == {"result"}
    assert "vCPU 0 ended with" in results["result"]
    assert "TDX_NON_RECOVERABLE_TD" in results["result"]


def test_without_encryption_the_guest_would_read_what_is_stored_there_now() -> None:
    race = build("tlb-tracking", 1)
    race.machine.memory.encrypted = False
    with broken("no-tracking"):
        results = explore_results(race)
    assert set(results) == {"result"}
    assert "vCPU 0 ended with" in results["result"]
    assert repr(MINE.decode()) not in results["result"]


@pytest.mark.parametrize("rule", ["no-track", "no-kick"])
def test_the_module_refuses_a_host_that_forgets_half_of_the_protocol(rule: str) -> None:
    race = build("tlb-tracking", 1)
    with broken(rule):
        found = race.explore()
    assert found.complete
    assert [violation.invariant for violation in found.violations] == ["result"]
    assert "TDX_TLB_TRACKING_NOT_DONE" in found.violations[0].explanation


@BOTH
def test_a_host_that_writes_nothing_back_may_lose_the_page_it_clears(vcpus: int) -> None:
    race = build("tlb-tracking", vcpus)
    with broken("no-writeback"):
        found = race.explore()
        (violation,) = found.violations
        assert found.complete
        assert violation.invariant.startswith(BREAKS["no-writeback"].found)
        assert violation.schedule[-1] == ("host", f"TDH.MEM.PAGE.REMOVE {GPA:#x}")
        with replayed(race.actors, race.machine.journal, violation.schedule):
            assert race.check(False) == (violation.invariant, violation.explanation)
    kvm = build("zap-enter", 1)
    with broken("no-writeback"):
        assert [v.invariant for v in kvm.explore().violations] == [violation.invariant]


def test_breaks_reach_the_host_without_kvm_where_it_keeps_the_same_rule() -> None:
    found = {name for name, rule in BREAKS.items() if rule.reaches(tlb_races)}
    assert found == {"no-track", "no-kick", "no-tracking", "no-writeback"}


def test_tracking_alone_is_enough_where_nobody_is_inside() -> None:
    race = build("tlb-tracking", 1)
    with broken("no-kick"):
        assert run(race.actors[1].start()) == TAKEN


def test_the_page_is_in_the_tlbs_at_the_beginning() -> None:
    machine = build("tlb-tracking", 2).machine
    for lp in range(2):
        assert GPA >> 12 in {gfn for _, gfn in machine.cpu.tlbs[lp]}


def test_no_tracking_turns_off_a_rule_of_both_sides() -> None:
    owners = {owner.__name__.split(".")[1] for owner, _, _ in BREAKS["no-tracking"].substitutes}
    assert owners == {"kvm", "seam", "tlb_races"}
