"""What can come of each scenario: nothing that the rules forbid, whatever the order."""

from math import comb

import pytest

from tdxlab.crew import Actor, Fault
from tdxlab.explore import replayed
from tdxlab.races import SCENARIOS, build
from tdxlab.steps import Operation, run

AFFORDABLE = [
    ("same-page", 2),
    ("far-apart", 2),
    ("hook-failure", 2),
    ("fresh-region", 1),
    ("fault-zap", 1),
    ("fault-convert", 2),
    ("slot-delete", 1),
    ("zap-enter", 1),
    ("accept-block", 1),
]


@pytest.mark.parametrize(("name", "vcpus"), AFFORDABLE)
def test_explore_finds_nothing_wrong_in_any_order(name: str, vcpus: int) -> None:
    race = build(name, vcpus)
    before = race.machine.digest()
    found = race.explore()
    assert found.complete
    assert [violation.table() for violation in found.violations] == []
    assert race.machine.digest() == before


def test_explore_counts_the_schedules_of_vcpus_that_never_meet() -> None:
    alone = build("far-apart", 1).explore()
    moves = alone.transitions
    assert alone.schedules == 1
    assert build("far-apart", 2).explore().schedules == comb(2 * moves, moves)


def test_explore_counts_more_schedules_where_vcpus_meet() -> None:
    met, apart = (build(name, 2).explore() for name in ("same-page", "far-apart"))
    assert met.schedules is not None
    assert apart.schedules is not None
    assert met.schedules > apart.schedules


def test_explore_of_a_guest_that_meets_a_zap_enters_it_again() -> None:
    race = build("zap-enter", 1)
    labels = set()
    found = race.explore()
    assert found.violations == ()
    for actor in race.actors:
        labels |= {step[0] for step in _steps_alone(actor.start())}
    assert {"TDH.VP.ENTER", "TDH.MEM.TRACK", "kvm_make_all_cpus_request"} <= labels


def _steps_alone(operation: object) -> list[tuple[object, ...]]:
    return list(operation)  # type: ignore[call-overload, no-any-return]


def test_two_teardowns_one_after_the_other_leave_nothing_behind() -> None:
    race = build("two-teardowns", 2)
    for actor in race.actors:
        assert actor.allowed(run(actor.start()))
    assert race.machine.host.vm_list == ()
    assert race.check(True) is None


def test_two_teardowns_are_clean_as_far_as_a_budget_reaches() -> None:
    found = build("two-teardowns", 2).explore(budget=4000)
    assert not found.complete
    assert found.schedules is None
    assert found.violations == ()


def test_check_names_a_vm_that_was_declared_buggy() -> None:
    race = build("same-page", 1)
    race.vms[0].bug("for a test")
    assert race.check(False) == Fault("vm_bugged", "TD 1: for a test")


def test_explore_names_a_result_that_the_scenario_does_not_allow() -> None:
    race = build("same-page", 1)
    (actor,) = race.actors
    race = race._replace(actors=(actor._replace(allowed=lambda result: False),))
    (violation,) = race.explore().violations
    assert violation.invariant == "result"
    with replayed(race.actors, race.machine.journal, violation.schedule) as fault:
        assert fault is not None
        assert fault.explanation == violation.explanation


def test_explore_names_a_warning() -> None:
    race = build("same-page", 1)

    def warning() -> Operation:
        yield ("step",)
        race.vms[0].warn("for a test")

    race = race._replace(actors=(Actor("thread", warning),))
    (violation,) = race.explore().violations
    assert (violation.invariant, violation.explanation) == ("Warned", "thread: for a test")


def test_build_refuses_an_unknown_scenario_and_too_many_vcpus() -> None:
    with pytest.raises(ValueError, match="no scenario 'other'; choose one of same-page, fresh"):
        build("other")
    with pytest.raises(ValueError, match="4 vCPUs; same-page is made for 1 to 3"):
        build("same-page", 4)


def test_scenarios_say_what_they_are() -> None:
    assert len(SCENARIOS) == 11
    assert all(scenario.what for scenario in SCENARIOS.values())
