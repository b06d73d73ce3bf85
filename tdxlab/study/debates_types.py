"""D18: how code asks whether a VM is the TDX-like case, tried on VMs that nobody has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.kvm.vm_types import HYPOTHETICAL, WAYS, VmFeatures, wrong_answers
from tdxlab.study.vmtype_ways import CASES, TRUTH, TrialRow, trial_rows

_YES, _NO, NOTHING = "yes", "no", "-"


class AskRow(NamedTuple):
    """One VM, asked in one way. exists: it is a type of Linux 6.16, with its launch ended. wrong:
    answers that are, of 4; predicates: to which questions. otherwise: what comes out otherwise than
    with right answers, by the columns of `vmtype_ways.TrialRow`.
    """

    vm: str
    exists: str
    way: str
    wrong: int
    predicates: str
    otherwise: str


def ask_rows(gpaw: int) -> list[AskRow]:
    """D18: each way asked about each VM, and believed."""
    trials = {(row.vm, row.way): row for row in trial_rows(gpaw=gpaw)}
    rows = []
    for kind in CASES:
        for name, way in WAYS.items():
            wrong = wrong_answers(kind, way)
            otherwise = _otherwise(trials[kind.name, name], trials[kind.name, TRUTH])
            exists = _NO if kind in HYPOTHETICAL else _YES
            words = ", ".join(wrong) or NOTHING
            rows.append(AskRow(kind.name, exists, name, len(wrong), words, otherwise))
    return rows


def _otherwise(row: TrialRow, truth: TrialRow) -> str:
    """Columns in which two trials differ, but for the way and whether they do."""
    columns = [name for name in row._fields if name not in ("way", "as_true")]
    return ", ".join(n for n in columns if getattr(row, n) != getattr(truth, n)) or NOTHING


def judge_asking(rows: Sequence[AskRow]) -> str:
    """D18 in words."""
    ways = list(dict.fromkeys(row.way for row in rows))
    parts = [f'"{way}": {_words([row for row in rows if row.way == way])}' for way in ways]
    wrong = {way: sum(row.wrong for row in rows if row.way == way) for way in ways}
    best = [way for way in ways if wrong[way] == min(wrong.values())]
    end = "No way is always right" if all(wrong.values()) else "Some way is always right"
    return f"{'; '.join(parts)}. Least is wrong with: {', '.join(best)}. {end}."


def _words(rows: Sequence[AskRow]) -> str:
    """One way: wrong answers about types that exist and about others, and what comes of them."""
    counts = []
    for word in (_YES, _NO):
        mine = [row for row in rows if row.exists == word]
        counts.append((sum(row.wrong for row in mine), len(mine) * len(VmFeatures._fields)))
    (real, asked), (others, asked_too) = counts
    otherwise = sum(row.otherwise != NOTHING for row in rows)
    return (
        f"{real} of {asked} answers are wrong about types that exist and {others} of {asked_too} "
        f"about others, and {otherwise} of {len(rows)} VMs fare otherwise than with right ones"
    )
