"""Pictures of a policy's run: the pages in both trees, and the local leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdxlab.policy_results import Result
from tdxlab.study.console_views import html_table
from tdxlab.study.palette import BLACK, GREEN, SEPT_LOOKS, VERMILLION, Look
from tdxlab.study.policy_lab import BLOCKED, FREE, MAPPED, Page
from tdxlab.study.policy_tables import result_row
from tdxlab.study.svg import entry_map

#: State of a mirror entry -> its look; an empty one is not drawn.
MIRROR_LOOKS = {
    MAPPED: Look(MAPPED, GREEN, BLACK, "M", ""),
    BLOCKED: Look(BLOCKED, VERMILLION, BLACK, "B", "xx"),
}
_COLUMNS = ("policy", "workload", "seamcalls", "ipis", "most_blocked", "cost", "broken")
_HEAD = ("policy", "workload", "SEAMCALLs", "IPIs", "blocked at a time", "cost", "rule broken")


def mirror_svg(pages: Mapping[int, Page]) -> str:
    """The 512 pages as the mirror has them."""
    cells = {g: MIRROR_LOOKS[p.mirror] for g, p in pages.items() if p.mirror in MIRROR_LOOKS}
    return entry_map(cells, title="mirror, gfns 0 to 511", unit="gfn")


def external_svg(pages: Mapping[int, Page]) -> str:
    """The 512 pages as the Secure EPT has them; those below a closed table as the table is."""
    cells = {g: SEPT_LOOKS[p.external] for g, p in pages.items() if p.external != FREE}
    return entry_map(cells, title="Secure EPT, gfns 0 to 511", unit="gfn")


def board_html(results: Sequence[Result]) -> str:
    """The runs so far: by workload, those that keep the rules first, then by cost."""
    ranked = sorted(results, key=lambda r: (r.workload, r.violation is not None, r.cost))
    rows = [result_row(result)._asdict() for result in ranked]
    return html_table(_HEAD, [[str(row[name]) for name in _COLUMNS] for row in rows])
