"""Tables of notebook 05: one fault alone, two that meet, all schedules, and what each rule is for.

Table(step_rows())
Table(hold_rows("same-page"))
Table(scenario_rows())
Table(break_rows(["no-freeze", "no-restore"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import comb
from typing import NamedTuple

from tdxlab.breaks import BREAKS, broken
from tdxlab.study.protocol import PROTOCOLS, Rule
from tdxlab.study.protocol_search import explore
from tdxlab.study.race_lab import RaceLab, first_words, make_race, moves_of, result_of

#: Step -> what the move does that begins with it.
MEANINGS: dict[str, str] = {
    "start": "note the invalidation sequence, find the memslot",
    "faultin_pfn": "find the page in the guest_memfd; no lock is held",
    "read_lock(mmu_lock)": "take mmu_lock for read, walk down, read the entry",
    "cmpxchg FROZEN_SPTE": "if the entry still is what was read, freeze it",
    "TDH.MEM.PAGE.AUG": "the hook calls; the module checks and takes its locks",
    "TDH.MEM.PAGE.AUG inside": "the module changes the Secure EPT and lets go of its locks",
    "TDH.MEM.SEPT.ADD": "the hook calls; the module checks and takes its locks",
    "TDH.MEM.SEPT.ADD inside": "the module links the table and lets go of its locks",
    "publish SPTE": "store the new value: the entry is no longer frozen",
    "restore SPTE": "the call failed: store the old value",
}


class StepRow(NamedTuple):
    """One move of a fault. step: what it begins with."""

    move: int
    step: str
    does: str
    result: str


def step_rows(scenario: str = "same-page") -> list[StepRow]:
    """One vCPU that faults, alone."""
    lab = RaceLab(scenario, vcpus=1)
    lab.run_on()
    return [
        StepRow(number, step, MEANINGS[step], result)
        for number, (_, step, result) in enumerate(moves_of(lab.tape), 1)
    ]


class HoldRow(NamedTuple):
    """vCPU 0 is held before a step, and vCPU 1 faults once. mirror, external: of the entry that
    vCPU 0 works at. seamcalls: made by vCPU 1.
    """

    vcpu_0_before: str
    mirror: str
    external: str
    vcpu_1: str
    seamcalls: int


def hold_rows(scenario: str = "same-page") -> list[HoldRow]:
    """vCPU 0 is held before each of its steps in turn, and behind the last."""
    lab = RaceLab(scenario)
    fault_once(lab, 0)
    moves = len(lab.tape)
    rows = []
    for held in range(moves + 1):
        lab.tape.seek(0)
        lab.play([0] * held)
        at, before = lab.actors()[0].comes_next, lab.seamcalls()
        entry = lab.entries()[0]
        result = fault_once(lab, 1)
        rows.append(HoldRow(at, entry.mirror, entry.external, result, lab.seamcalls() - before))
    return rows


def fault_once(lab: RaceLab, number: int) -> str:
    """Let an operation move until it has a result; returns that, or what is wrong."""
    while True:
        did = lab.tape.move(lab.names[number])
        if lab.verdict:
            return lab.verdict.partition(":")[0]
        if result_of(did):
            return result_of(did)


# -- all schedules


class BinomialRow(NamedTuple):
    """Two operations of n and m moves that share nothing. counted: by exploring."""

    n: int
    m: int
    formula: int
    counted: int | None


def binomial_rows() -> list[BinomialRow]:
    """vCPUs that fault far apart, alone and together, as the protocol has them."""
    alone = explore(PROTOCOLS["far-apart"](1)).transitions
    both = explore(PROTOCOLS["far-apart"](2)).schedules
    return [BinomialRow(alone, alone, comb(2 * alone, alone), both)]


class ScenarioRow(NamedTuple):
    """All schedules of one scenario. wrong: how many of its states break a rule."""

    scenario: str
    vcpus: int
    schedules: int | None
    states: int
    transitions: int
    wrong: int


#: What is explored for `scenario_rows`: scenario, vCPUs.
_SIZES = (
    ("far-apart", 2),
    ("same-page", 2),
    ("hook-failure", 2),
    ("fresh-region", 2),
    ("same-page", 3),
    ("hook-failure", 3),
)


def scenario_rows() -> list[ScenarioRow]:
    """Scenarios with all rules kept, explored on the protocol."""
    rows = []
    for name, vcpus in _SIZES:
        found = explore(PROTOCOLS[name](vcpus))
        wrong = sum(verdict.states for verdict in found.verdicts)
        rows.append(
            ScenarioRow(name, vcpus, found.schedules, found.states, found.transitions, wrong)
        )
    return rows


class DepthRow(NamedTuple):
    """States that are `moves` moves away from the beginning."""

    vcpus: int
    moves: int
    states: int


def depth_rows(scenario: str = "same-page") -> list[DepthRow]:
    """States of a scenario by their distance, with 1, 2 and 3 vCPUs."""
    return [
        DepthRow(vcpus, moves, states)
        for vcpus in (1, 2, 3)
        for moves, states in enumerate(explore(PROTOCOLS[scenario](vcpus)).by_depth)
    ]


# -- rules


class AgreementRow(NamedTuple):
    """The machine and the protocol, explored in the same scenario with the same break.
    machine, protocol: schedules; then what is wrong, and after how many moves at least.
    """

    broken_by: str
    machine: int | None
    protocol: int | None
    machine_found: str
    protocol_found: str


def agreement_rows(scenario: str = "same-page", vcpus: int = 2) -> list[AgreementRow]:
    """All rules kept, then one after the other turned off."""
    rows = []
    for rule in Rule:
        race = make_race(scenario, vcpus)
        with broken(rule.value) if rule is not Rule.ALL else nullcontext():
            real = race.explore()
        small = explore(PROTOCOLS[scenario](vcpus), rule)
        rows.append(
            AgreementRow(
                rule.value or "nothing",
                real.schedules,
                small.schedules,
                _found([(v.invariant, len(v.schedule)) for v in real.violations]),
                _found([(v.name, len(v.schedule)) for v in small.verdicts]),
            )
        )
    return rows


def _found(verdicts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} after {moves} moves" for name, moves in verdicts) or "nothing"


class BreakRow(NamedTuple):
    """A rule that is broken. found: the first words of what is wrong then; moves: of the
    shortest schedule to it.
    """

    broken_by: str
    scenario: str
    vcpus: int
    found: str
    moves: int


def break_rows(rules: Sequence[str]) -> list[BreakRow]:
    """Each rule, in the scenario that shows what it is for, on the machine."""
    rows = []
    for name in rules:
        rule = BREAKS[name]
        lab = RaceLab(rule.scenario, vcpus=rule.vcpus, rule=name)
        lab.find_violation()
        lab.tape.seek(len(lab.tape))
        rows.append(
            BreakRow(name, rule.scenario, rule.vcpus, first_words(lab.verdict), len(lab.tape))
        )
    return rows


class MeaningRow(NamedTuple):
    """What KVM does without a rule."""

    broken_by: str
    what_kvm_does: str


def meaning_rows(rules: Sequence[str]) -> list[MeaningRow]:
    """The rules in words."""
    return [MeaningRow(name, BREAKS[name].what) for name in rules]
