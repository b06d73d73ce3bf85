"""`tdxlab attack`: one attack move by move, or all of them in a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TextIO

from tdxlab.attacks import ATTACKS, Report, attack
from tdxlab.attacks.stage import Move
from tdxlab.memory import Cipher

ALL = "all"
_NOBODY = "NOT STOPPED"


def command(
    name: str,
    gpaw: int,
    is_json: bool,
    out: TextIO,
    *,
    lacks: str = "nothing",
    cipher: Cipher | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Try the attack `name`, or "all", and print what came of it; returns the exit status 0.

    lacks: what the stage is without. progress: told (attacks done, in all). Refuses what `attack`
    refuses: ValueError.
    """
    names = list(ATTACKS) if name == ALL else [name]
    reports = []
    for number, one in enumerate(names):
        reports.append(attack(one, gpaw=gpaw, lacks=lacks, cipher=cipher))
        if progress is not None:
            progress(number + 1, len(names))
    if is_json:
        print(json.dumps([as_dict(report) for report in reports]), file=out)
    else:
        lines = as_table(reports) if name == ALL else as_text(reports[0])
        print("\n".join(lines), file=out)
    return 0


def as_dict(report: Report) -> dict[str, object]:
    """A report for JSON. stopped_by: null if nothing stopped the attack."""
    return {
        "name": report.name,
        "what": report.what,
        "gpaw": report.gpaw,
        "lacks": report.lacks,
        "stopped_by": report.stopped_by or None,
        "gained": report.gained,
        "evidence": report.evidence,
        "moves": [
            {"actor": move.actor, "what": move.name, "answer": move.answer} for move in report.moves
        ],
    }


def as_text(report: Report) -> Iterator[str]:
    """Lines for people: the moves of one attack, and what came of it."""
    yield f"{report.name}: {report.what}"
    yield ""
    for number, move in enumerate(report.moves, 1):
        yield f"{number:>3}  {move.actor:<9}  {move_text(move)}  ->  {move.answer}"
    yield ""
    yield f"stopped by: {report.stopped_by or _NOBODY}"
    yield f"evidence:   {report.evidence}"
    yield f"the host has: {report.gained}"


def move_text(move: Move) -> str:
    """What was done, with the addresses in it."""
    given = (f"{name.upper()}={value:#x}" for name, value in move.inputs.items())
    return "  ".join([move.name, " ".join(given)]).rstrip()


def as_table(reports: list[Report]) -> Iterator[str]:
    """A line for each attack."""
    yield f"{'attack':<24} {'stopped by':<17} {'the host has':<18} evidence"
    for report in reports:
        stopper = report.stopped_by or _NOBODY
        yield f"{report.name:<24} {stopper:<17} {report.gained:<18} {report.evidence}"
