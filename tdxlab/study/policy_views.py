"""Pictures of a policy's run: the pages in both trees and in memory, and the local leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdxlab.conversion import PRIVATE_PAGE, SHARED_PAGE, TWICE
from tdxlab.policy_results import AnyResult, ConversionResult
from tdxlab.study.console_views import html_table
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    GREEN,
    SEPT_LOOKS,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Look,
)
from tdxlab.study.policy_lab import BLOCKED, FREE, MAPPED, Page
from tdxlab.study.svg import entry_map

#: State of a mirror entry -> its look; an empty one is not drawn.
MIRROR_LOOKS = {
    MAPPED: Look(MAPPED, GREEN, BLACK, "M", ""),
    BLOCKED: Look(BLOCKED, VERMILLION, BLACK, "B", "xx"),
}
#: What memory a page has -> its look.
MEMORY_LOOKS = {
    PRIVATE_PAGE: Look(PRIVATE_PAGE, BLUE, WHITE, "p", ""),
    SHARED_PAGE: Look(SHARED_PAGE, SKY, BLACK, "s", "//"),
    TWICE: Look(TWICE, YELLOW, BLACK, "2", "--"),
}
#: Columns of the leaderboard: name of the field, head.
_COLUMNS = {
    "policy": "policy",
    "workload": "workload",
    "seamcalls": "SEAMCALLs",
    "ipis": "IPIs",
    "most_blocked": "blocked at a time",
    "calls": "system calls",
    "entries": "entries",
    "most_double": "twice in memory",
    "cost": "cost",
}


def mirror_svg(pages: Mapping[int, Page]) -> str:
    """The 512 pages as the mirror has them."""
    cells = {g: MIRROR_LOOKS[p.mirror] for g, p in pages.items() if p.mirror in MIRROR_LOOKS}
    return entry_map(cells, title="mirror, gfns 0 to 511", unit="gfn")


def external_svg(pages: Mapping[int, Page]) -> str:
    """The 512 pages as the Secure EPT has them; those below a closed table as the table is."""
    cells = {g: SEPT_LOOKS[p.external] for g, p in pages.items() if p.external != FREE}
    return entry_map(cells, title="Secure EPT, gfns 0 to 511", unit="gfn")


def memory_svg(pages: Mapping[int, Page]) -> str:
    """The 512 pages as they take the host's memory."""
    cells = {g: MEMORY_LOOKS[p.memory] for g, p in pages.items() if p.memory}
    return entry_map(cells, title="pages of memory, gfns 0 to 511", unit="gfn")


def board_html(results: Sequence[AnyResult]) -> str:
    """The runs so far: zap policies, then conversion policies; by workload, those that keep the
    rules first, then by cost.
    """
    ranked = sorted(results, key=_rank)
    return html_table((*_COLUMNS.values(), "rule broken"), [_texts(result) for result in ranked])


def _texts(result: AnyResult) -> list[str]:
    """A row of the leaderboard: "-" for what the kind is not counted."""
    broken = result.violation.rule if result.violation else "-"
    return [*(str(getattr(result, name, "-")) for name in _COLUMNS), broken]


def _rank(result: AnyResult) -> tuple[bool, str, bool, int]:
    is_conversion = isinstance(result, ConversionResult)
    return is_conversion, result.workload, result.violation is not None, result.cost
