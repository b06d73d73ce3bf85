"""The protocol on small values has the schedules, the states and the verdicts of the machine."""

from __future__ import annotations

import random
from contextlib import closing, nullcontext
from math import comb

import pytest

from tdxlab.breaks import broken
from tdxlab.crew import Actor, Fault
from tdxlab.explore import Exploration, explore
from tdxlab.invariants import Watch
from tdxlab.journal import Table
from tdxlab.kvm.page_fault import RET_PF_FIXED, RET_PF_RETRY, RET_PF_SPURIOUS
from tdxlab.steps import WAIT, Operation
from tdxlab.study import protocol_search
from tdxlab.study.protocol import (
    FIXED,
    INSIDE,
    PROTOCOLS,
    SPURIOUS,
    START,
    Protocol,
    Rule,
    Standing,
    can_move,
    disturb,
    move,
)
from tdxlab.study.protocol_search import sound_states
from tdxlab.study.race_lab import RaceLab

#: What a vCPU comes to after the result of its operation.
AFTER = {RET_PF_RETRY: START, RET_PF_FIXED: FIXED, RET_PF_SPURIOUS: SPURIOUS}

COMPARED = [
    *[("same-page", 2, rule) for rule in Rule],
    ("hook-failure", 2, Rule.NO_RESTORE),
    ("fresh-region", 1, Rule.ALL),
]


def told(actor: Actor, number: int, places: Table[int, str]) -> Actor:
    """The same actor, which keeps in `places` where it stands."""

    def steps() -> Operation:
        last = ""
        with closing(actor.start()) as operation:
            while True:
                try:
                    step = next(operation)
                except StopIteration as end:
                    places.put(number, AFTER.get(end.value, f"ended with {end.value}"))
                    return end.value
                is_second = step[0] == last and last.startswith("TDH.")
                label = " ".join(step[:2]) if step[0] == WAIT else step[0]
                places.put(number, label + INSIDE if is_second else label)
                last = step[0]
                yield step

    return actor._replace(start=steps)


def machine_states(
    name: str, vcpus: int, rule: Rule
) -> tuple[Exploration, frozenset[protocol_search.Projected]]:
    """What exploring the machine finds, and all its states as the protocol tells them apart."""
    lab = RaceLab(name, vcpus=vcpus)
    race = lab.race
    lab.tape.player.close()
    places: Table[int, str] = Table(race.machine.journal)
    seen = set()

    def check(ended: bool) -> Fault | None:
        fault = watched.check(ended)
        if fault is None:
            rows, who = lab.entries(), tuple(places.get(n, START) for n in range(vcpus))
            seen.add((tuple(r.mirror for r in rows), tuple(r.external for r in rows), who))
        return fault

    actors = [told(actor, number, places) for number, actor in enumerate(race.actors)]
    turned_off = broken(rule.value) if rule is not Rule.ALL else nullcontext()
    with closing(Watch(race.machine)) as watch, turned_off:
        watched, locks = race._replace(watch=watch), [*race.locks, places]
        found = explore(actors, race.machine.journal, check, ignored=race.counters, locks=locks)
    return found, frozenset(seen)


@pytest.mark.parametrize(("name", "vcpus", "rule"), COMPARED)
def test_protocol_has_the_machines_states_schedules_and_verdicts(
    name: str, vcpus: int, rule: Rule
) -> None:
    found, states = machine_states(name, vcpus, rule)
    mine = protocol_search.explore(PROTOCOLS[name](vcpus), rule)
    assert mine.schedules == found.schedules
    assert states == sound_states(PROTOCOLS[name](vcpus), rule)
    assert [(v.name, len(v.schedule)) for v in mine.verdicts] == [
        (v.invariant, len(v.schedule)) for v in found.violations
    ]


@pytest.mark.parametrize(
    ("name", "vcpus"),
    [("fresh-region", 2), ("far-apart", 2), ("hook-failure", 2), ("same-page", 3)],
)
def test_protocol_has_as_many_schedules_as_the_machine(name: str, vcpus: int) -> None:
    found = RaceLab(name, vcpus=vcpus).race.explore()
    mine = protocol_search.explore(PROTOCOLS[name](vcpus))
    assert found.complete
    assert mine.schedules == found.schedules
    assert mine.verdicts == found.violations == ()


# -- by lot, where exploring the machine takes too long


class Stepper:
    """The protocol in the hands of somebody who says who moves next."""

    def __init__(self, protocol: Protocol, rule: Rule) -> None:
        self.protocol, self.rule = protocol, rule
        self.shared = protocol.beginning()
        self.standings = [Standing(START) for _ in protocol.ways]

    def movable(self) -> list[int]:
        """Numbers of the vCPUs that can move."""
        return [n for n, s in enumerate(self.standings) if can_move(self.shared, s)]

    def move(self, number: int) -> None:
        """Let one of them move."""
        way = self.protocol.ways[number]
        shared, standing = move(way, self.rule, self.shared, self.standings[number])
        if shared != self.shared:
            self.standings = [disturb(other) for other in self.standings]
        self.shared, self.standings[number] = shared, standing


@pytest.mark.parametrize(
    ("name", "vcpus", "rule"),
    [
        ("fresh-region", 2, Rule.ALL),
        ("fresh-region", 2, Rule.EARLY_PUBLISH),
        ("same-page", 3, Rule.ALL),
        ("hook-failure", 3, Rule.ALL),
    ],
)
def test_protocol_goes_along_with_the_machine_in_orders_drawn_by_lot(
    name: str, vcpus: int, rule: Rule
) -> None:
    lab = RaceLab(name, vcpus=vcpus, rule=rule.value)
    for seed in range(2):
        lot, mine = random.Random(seed), Stepper(PROTOCOLS[name](vcpus), rule)
        lab.tape.seek(0)
        while mine.movable():
            assert lab.tape.player.movable == [lab.names[n] for n in mine.movable()]
            number = lot.choice(mine.movable())
            mine.move(number)
            lab.play([number])
            assert [row.mirror for row in lab.entries()] == list(mine.shared.mirror)
            assert [row.external for row in lab.entries()] == list(mine.shared.external)
            assert bool(lab.tape.player.fault) == bool(mine.shared.broken)
            if not mine.shared.broken:
                assert [row.comes_next for row in lab.actors()] == [s.at for s in mine.standings]
        assert lab.tape.player.movable == []


def test_explore_counts_as_the_binomial_says_where_nobody_meets() -> None:
    alone = protocol_search.explore(PROTOCOLS["far-apart"](1))
    both = protocol_search.explore(PROTOCOLS["far-apart"](2))
    moves = alone.transitions
    assert both.schedules == comb(2 * moves, moves)
    assert both.verdicts == ()


def test_explore_tells_that_a_circle_has_no_end() -> None:
    edges = {(0,): [(1,)], (1,): [(0,)]}
    assert protocol_search._count(edges, (0,)) is None


def test_explore_counts_states_by_their_distance() -> None:
    found = protocol_search.explore(PROTOCOLS["same-page"](2))
    assert found.by_depth[:3] == (1, 2, 3)
    assert sum(found.by_depth) == found.states


def test_explore_gives_a_schedule_that_goes_wrong_on_the_machine_too() -> None:
    lab = RaceLab("fresh-region", rule="early-publish")
    lab.find_violation()
    assert lab.verdict == ""
    lab.tape.seek(len(lab.tape))
    assert lab.verdict.startswith("vm_bugged: TD 1: SEAMCALL TDH_MEM_PAGE_AUG failed")
    assert "TDX_EPT_WALK_FAILED" in lab.verdict


def test_comparison_notices_a_protocol_that_lets_nobody_be_disturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = protocol_search.explore(PROTOCOLS["same-page"](2))
    monkeypatch.setattr(protocol_search, "disturb", lambda standing: standing)
    spoilt = protocol_search.explore(PROTOCOLS["same-page"](2))
    assert (spoilt.schedules, spoilt.verdicts) != (kept.schedules, kept.verdicts)
