"""What each rule is for: what an exploration finds where it is turned off, and only there."""

import pytest

from tdxlab.abi.leaves import TDH_MNG_VPFLUSHDONE
from tdxlab.breaks import BREAKS, broken
from tdxlab.explore import replayed
from tdxlab.kvm import tdp_set
from tdxlab.races import SCENARIOS, build

#: What an exploration says of each rule: in words, with the module's answer if it gave one.
SAID = {
    "no-freeze": "TDH_MEM_PAGE_AUG failed: 0xc0000b0d00000001 (TDX_EPT_ENTRY_STATE_INCORRECT",
    "early-publish": "TDH_MEM_PAGE_AUG failed: 0xc0000b0000000001 (TDX_EPT_WALK_FAILED",
    "no-restore": "for ever: vCPU 0 (start), vCPU 1 (start)",
    "overwrite-frozen": "the iterator yielded, or saw a frozen entry",
    "zap-under-read-lock": "(PT_REG) is free for the host",
    "no-retry": "(PT_REG) is free for the host",
    "no-track": "TDH_MEM_PAGE_REMOVE failed: 0xc0000b0800000001 (TDX_TLB_TRACKING_NOT_DONE",
    "no-kick": "TDH_MEM_PAGE_REMOVE failed: 0xc0000b0800000001 (TDX_TLB_TRACKING_NOT_DONE",
    "no-tracking": "which is not mapped there any more",
    "parent-first": "TDH_MEM_SEPT_REMOVE failed: 0xc0000b0e00000001 (TDX_EPT_PAGE_NOT_FREE",
    "no-writeback": "while lines of its old one may be dirty in a cache",
    "keyid-before-flush": "the TD's KeyID could not be given back",
    "keyid-before-writeback": "TDH_MNG_KEY_FREEID failed: 0x8000081700000000 (TDX_WBCACHE_NOT_C",
    "reclaim-before-keyid": "TDH_PHYMEM_PAGE_RECLAIM failed: 0xc000060700000000 (TDX_LIFECYCLE",
}


def test_breaks_are_the_rules_that_are_pinned_here() -> None:
    assert list(SAID) == list(BREAKS)


@pytest.mark.parametrize("rule", BREAKS)
def test_explore_finds_a_rule_turned_off_with_a_schedule_that_replays(rule: str) -> None:
    choice = BREAKS[rule]
    race = build(choice.scenario, choice.vcpus)
    before = race.machine.digest()
    with broken(rule):
        found = race.explore()
        violation = found.violations[0]
        assert violation.invariant.startswith(choice.found)
        assert SAID[rule] in violation.explanation
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


def test_keyid_before_flush_shows_that_the_module_refuses() -> None:
    race = build("two-teardowns", 1)
    with broken("keyid-before-flush"):
        (violation,) = race.explore().violations
        with replayed(race.actors, race.machine.journal, violation.schedule):
            assert race.machine.trace.refusals()[TDH_MNG_VPFLUSHDONE] == 1


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
        assert choice.shows
