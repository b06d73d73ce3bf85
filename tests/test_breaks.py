"""What each rule is for: what an exploration finds where it is turned off, and only there."""

import pytest

from tdxlab.breaks import BREAKS, broken
from tdxlab.explore import replayed
from tdxlab.kvm import tdp_set
from tdxlab.races import SCENARIOS, build


@pytest.mark.parametrize("rule", BREAKS)
def test_explore_finds_a_rule_turned_off_with_a_schedule_that_replays(rule: str) -> None:
    choice = BREAKS[rule]
    race = build(choice.scenario, choice.vcpus)
    before = race.machine.digest()
    with broken(rule):
        found = race.explore()
        violation = found.violations[0]
        assert violation.invariant.startswith(choice.found)
        with replayed(race.actors, race.machine.journal, violation.schedule) as fault:
            if choice.found == "Warned":
                assert fault is not None
            elif choice.found != "deadlock":
                again = race.check(False) or race.check(True)
                assert again is not None
                assert (again.name, again.explanation) == violation[:2]
    assert found.complete
    assert race.machine.digest() == before
    kept = race.explore()
    assert (kept.complete, kept.violations) == (True, ())


@pytest.mark.parametrize(
    "rule", ["overwrite-frozen", "zap-under-read-lock", "no-retry", "no-track"]
)
def test_explore_finds_the_same_without_hashing(rule: str) -> None:
    race = build(BREAKS[rule].scenario, BREAKS[rule].vcpus)
    with broken(rule):
        merged = race.explore()
        tree = race.explore(hashing=False)
    assert tree.complete
    wanted = [(v.invariant, len(v.schedule)) for v in merged.violations]
    assert [(v.invariant, len(v.schedule)) for v in tree.violations] == wanted
    assert tree.schedules == merged.schedules
    assert tree.states > merged.states


def test_broken_puts_everything_back() -> None:
    rule = tdp_set.set_external_spte_present
    with broken("no-freeze"):
        assert tdp_set.set_external_spte_present is not rule
    assert tdp_set.set_external_spte_present is rule
    with pytest.raises(ZeroDivisionError), broken("no-freeze"):
        _ = 1 // 0
    assert tdp_set.set_external_spte_present is rule


def test_broken_refuses_an_unknown_rule() -> None:
    with (
        pytest.raises(ValueError, match="no rule 'other'; choose one of no-freeze"),
        broken("other"),
    ):
        pass


def test_breaks_name_scenarios_that_exist() -> None:
    for choice in BREAKS.values():
        assert choice.vcpus <= SCENARIOS[choice.scenario].most
        assert choice.what
