"""D20: the shape of the SEAMCALL wrappers, measured by who notices the mistakes of a caller."""

from __future__ import annotations

from collections.abc import Sequence

from tdxlab.study import phymem_bugs
from tdxlab.study.debate_tools import many
from tdxlab.study.phymem_bugs import StyleRow, drawn_bugs
from tdxlab.study.phymem_scene import PhymemScene

#: Mistakes, drawn with this seed from all that the raw style can have.
BUGS, SEED = 10, 0


def style_rows(gpaw: int) -> list[StyleRow]:
    """D20: the same bugs, of all kinds, in each style."""
    rows = phymem_bugs.style_rows(PhymemScene(gpaw=gpaw), drawn_bugs(seed=SEED, count=BUGS))
    return [row for row in rows if row.kind == "all"]


def judge_styles(rows: Sequence[StyleRow]) -> str:
    """D20 in words."""
    caught = {row.style: row.impossible + row.types for row in rows}
    bugs = sum(rows[0][2:])
    best = [style for style, count in caught.items() if count == max(caught.values())]
    words = ", ".join(f"{style} {count}" for style, count in caught.items())
    silent = ", ".join(f"{row.style} {row.nobody}" for row in rows)
    return (
        f"Of {many(bugs, 'bug')} a style rules out, or its types tell: {words}. Noticed by nobody: "
        f"{silent}. Most is told by: {', '.join(best)}."
    )
