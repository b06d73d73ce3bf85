"""`tdxlab faults`: let the SEAMCALLs of a TD's life fail, and see what is lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from tdxlab.campaign import Progress, play_all, ways_of
from tdxlab.verdicts import Row, Verdict, rows

#: Exit status where some run does not balance.
EXIT_BROKEN = 1


def command(
    gpaw: int,
    seed: int,
    runs: int | None,
    leaves: Collection[str],
    only: int | None,
    is_json: bool,
    out: TextIO,
    progress: Progress | None = None,
) -> int:
    """Play a campaign and print what was found; returns the exit status, 1 if a run does not
    balance. The arguments are those of `campaign.play_all`, which says what it refuses: ValueError.
    """
    found = play_all(gpaw, seed=seed, runs=runs, leaves=leaves, only=only, progress=progress)
    if is_json:
        print(as_json(gpaw, seed, found), file=out)
    else:
        print("\n".join(as_text(gpaw, seed, found)), file=out)
    return EXIT_BROKEN if any(one.broken for one in found) else 0


def as_json(gpaw: int, seed: int, found: Sequence[Verdict]) -> str:
    """One object on one line: every run with what came of it."""
    runs = [
        {
            "failures": [failure._asdict() for failure in one.run.failures],
            "way": one.run.way,
            "number": one.run.number,
            "struck": one.struck,
            "deeds": one.deeds,
            "deed": one.deed,
            "outcome": one.outcome,
            "said": one.said,
            "leaks": dict(one.leaks),
            "keyid_lost": one.keyid_lost,
            "looped": one.looped,
            "broken": one.broken,
        }
        for one in found
    ]
    balanced = not any(one.broken for one in found)
    return json.dumps({"gpaw": gpaw, "seed": seed, "balanced": balanced, "runs": runs})


def as_text(gpaw: int, seed: int, found: Sequence[Verdict]) -> Iterator[str]:
    """Lines for people: the systematic part as a table, the random lives counted, what is wrong."""
    systematic = [one for one in found if one.run.seed is None]
    lives = [one for one in found if one.run.seed is not None]
    if systematic:
        yield f"Each call of a TD's life fails, GPAW {gpaw}: {len(systematic)} lives"
        yield ""
        yield from _table(rows(systematic))
        yield ""
        yield from _endless(systematic)
    if len(lives) == 1:
        yield from _one(lives[0])
    elif lives:
        outcomes = Counter(one.outcome if one.struck else "nothing failed" for one in lives)
        counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        yield f"{len(lives)} random lives of seed {seed}: {counts}"
    yield from _broken(found)


def _table(table: Sequence[Row]) -> Iterator[str]:
    yield f"{'leaf':<24}{'calls':<14}{'fails':<36}{'outcome':<15}{'KVM says':<12}leaked"
    leaf = ""
    for row in table:
        name = "" if row.leaf == leaf else row.leaf
        leaf = row.leaf
        ways = ", ".join(row.ways).replace(", BUSY", ",")
        if len(row.ways) == len(ways_of(row.leaf)):
            ways = "in every way"
        yield f"{name:<24}{row.calls:<14}{ways:<36}{row.outcome:<15}{row.said:<12}{row.leaked}"


def _endless(found: Sequence[Verdict]) -> Iterator[str]:
    """What never ended by itself."""
    leaves = dict.fromkeys(one.run.failures[0].target for one in found if one.looped)
    if leaves:
        yield f"For ever, until a signal comes, KVM calls again: {', '.join(leaves)}"


def _one(one: Verdict) -> Iterator[str]:
    """A random life by itself."""
    yield str(one.run)
    yield f"the life: {', '.join(one.deeds)}"
    where = f", the first at: {one.deed}" if one.struck else ""
    yield f"{one.struck} calls failed{where}"
    yield f"{one.outcome}; KVM says {one.said}; leaked: {one.leaked}"


def _broken(found: Sequence[Verdict]) -> Iterator[str]:
    wrong = [one for one in found if one.broken]
    if not wrong:
        yield "every page is free, or leaked with a cause"
    for one in wrong:
        yield ""
        yield f"does not balance: {one.run}"
        yield f"  {one.broken}"
        yield f"  again: {one.run.command}"
