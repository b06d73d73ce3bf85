"""D20: the shape of the SEAMCALL wrappers, measured by who notices the mistakes of a caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.study.debate_tools import many
from tdxlab.study.phymem_bugs import OUTCOMES, bug_rows, drawn_bugs
from tdxlab.study.phymem_scene import PhymemScene
from tdxlab.study.phymem_styles import STYLES

#: Mistakes, drawn with this seed from all that the raw style can have.
BUGS, SEED = 10, 0


class StyleRow(NamedTuple):
    """One style. impossible: bugs for which it has no place. types, status: noticed by a type, or
    by the module. nobody: by nobody. harmless: bugs that change nothing.
    """

    style: str
    impossible: int
    types: int
    status: int
    nobody: int
    harmless: int


def style_rows(gpaw: int) -> list[StyleRow]:
    """D20: the same bugs in each style."""
    found = bug_rows(PhymemScene(gpaw=gpaw), drawn_bugs(seed=SEED, count=BUGS))
    rows = []
    for number, style in enumerate(STYLES, 1):
        counts = Counter(row[number] for row in found)
        rows.append(StyleRow(style.name, *(counts[outcome] for outcome in OUTCOMES)))
    return rows


def judge_styles(rows: Sequence[StyleRow]) -> str:
    """D20 in words."""
    caught = {row.style: row.impossible + row.types for row in rows}
    bugs = sum(rows[0][1:])
    best = [style for style, count in caught.items() if count == max(caught.values())]
    words = ", ".join(f"{style} {count}" for style, count in caught.items())
    silent = ", ".join(f"{row.style} {row.nobody}" for row in rows)
    return (
        f"Of {many(bugs, 'bug')} a style rules out, or its types tell: {words}. Noticed by nobody: "
        f"{silent}. Most is told by: {', '.join(best)}."
    )
