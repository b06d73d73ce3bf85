"""`tdxlab explore`: one scenario in every order, with all rules or with one turned off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TextIO

from tdxlab import tlb_races
from tdxlab.breaks import BREAKS, broken
from tdxlab.explore import Exploration
from tdxlab.races import SCENARIOS, build

#: Exit status where a rule is broken.
EXIT_VIOLATIONS = 1
#: vCPUs if nobody says how many, in scenarios that are made for as many.
DEFAULT_VCPUS = 2


def command(
    name: str,
    vcpus: int | None,
    rule: str | None,
    is_json: bool,
    out: TextIO,
    progress: Callable[[int, int], None] | None = None,
    *,
    inside_seamcalls: bool = False,
) -> int:
    """Explore the scenario `name` and print what was found; returns the exit status, 1 if a rule is
    broken somewhere.

    vcpus: None for 2, or for as many as the scenario is made for. rule: one to turn off. progress:
    told (states, moves). Refuses what `build` and `broken` refuse: ValueError.
    """
    if rule is not None and rule not in BREAKS:
        raise ValueError(f"there is no rule {rule!r}; choose one of {', '.join(BREAKS)}")
    most = SCENARIOS[name].most if name in SCENARIOS else DEFAULT_VCPUS
    number = min(DEFAULT_VCPUS, most) if vcpus is None else vcpus
    race = build(name, number, inside_seamcalls=inside_seamcalls)
    with nullcontext() if rule is None else broken(rule):
        found = race.explore(progress=progress)
    if is_json:
        print(as_json(name, number, rule, found, inside_seamcalls=inside_seamcalls), file=out)
    else:
        lines = as_text(name, number, rule, found, has_kvm=race.kernel is not None)
        print("\n".join(lines), file=out)
    return EXIT_VIOLATIONS if found.violations else 0


def as_json(
    name: str,
    vcpus: int,
    rule: str | None,
    found: Exploration,
    *,
    inside_seamcalls: bool = False,
) -> str:
    """One object on one line. schedules: null if they cannot be counted, or were not all made."""
    violations = [
        {"invariant": violation.invariant, "schedule": [list(step) for step in violation.schedule]}
        for violation in found.violations
    ]
    return json.dumps(
        {
            "scenario": name,
            "vcpus": vcpus,
            "broken": rule,
            "inside_seamcalls": inside_seamcalls,
            "schedules": found.schedules,
            "states": found.states,
            "transitions": found.transitions,
            "complete": found.complete,
            "violations": violations,
        }
    )


def as_text(
    name: str, vcpus: int, rule: str | None, found: Exploration, *, has_kvm: bool = True
) -> Iterator[str]:
    """Lines for people. has_kvm: the scenario's host is KVM."""
    yield f"{name} with {vcpus} vCPU{'s' if vcpus > 1 else ''}: {SCENARIOS[name].what}"
    if rule is not None:
        yield f"with the break {rule}: {BREAKS[rule].what}"
        yield f"what {BREAKS[rule].scenario} shows: {BREAKS[rule].shows}"
        if not has_kvm and not BREAKS[rule].reaches(tlb_races):
            yield "nothing changes here: it is a rule for KVM, and this scenario's host is another"
    schedules = "schedules without end" if found.complete else "schedules not counted"
    if found.schedules is not None:
        schedules = f"{found.schedules:,} schedules"
    yield f"{schedules}, {found.states:,} states, {found.transitions:,} transitions"
    if not found.complete:
        yield f"not complete: gave up after {found.moves:,} moves"
    if not found.violations:
        yield "no rule is broken"
    for violation in found.violations:
        yield ""
        states = f"{violation.states:,} state{'s' if violation.states > 1 else ''}"
        yield f"{violation.invariant}, in {states}; the shortest schedule:"
        yield violation.table()
