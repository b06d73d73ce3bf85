"""State diagrams with counts: which states there are, what leads from one to another.

`state_diagram` draws any; `sept_diagram` draws the states of a Secure EPT entry, with the arrows
taken from the module's own tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES
from tdxlab.seam.rules import GUEST_SEPT_RESULT, SEPT_RESULT, SEPT_STATE_BY_BITS
from tdxlab.study.palette import BLACK, SEPT_LOOKS, Look
from tdxlab.study.plots import FONT

#: Where the states that an unmigrated TD reaches stand in the diagram.
SEPT_PLACES: dict[str, tuple[float, float]] = {
    "FREE": (0.5, 0.66),
    "NL_MAPPED": (0.14, 0.95),
    "NL_BLOCKED": (0.86, 0.95),
    "MAPPED": (0.14, 0.35),
    "BLOCKED": (0.86, 0.35),
    "PENDING": (0.22, 0.05),
    "PENDING_BLOCKED": (0.78, 0.05),
}

#: Pixels between an arrow and the line between its two states.
_SIDE = 8
#: Where an arrow's label stands, as a part of the way from its start.
_LABEL_AT = 0.36


class Arrow(NamedTuple):
    """An edge of a state diagram: from state to state, with what makes the change."""

    start: str
    end: str
    label: str


def state_diagram(
    counts: Mapping[str, int],
    ax: Axes,
    *,
    places: Mapping[str, tuple[float, float]],
    arrows: Sequence[Arrow],
    looks: Mapping[str, Look],
    current: str | None = None,
) -> Axes:
    """States as boxes with their counts, and arrows between them; `current` has a thick frame.

    counts: state -> number, 0 where it is missing. places: state -> centre of its box, both
    coordinates 0..1. looks: state -> look.
    """
    key = repr((sorted(places.items()), list(arrows)))
    if ax.get_gid() != key:
        _build_diagram(ax, places, arrows, looks)
        ax.set_gid(key)
    for label, state in zip(ax.texts[-len(places) :], places, strict=True):
        look = looks[state]
        label.set_text(f"{look.letter}  {state}\n{counts.get(state, 0)}")
        frame = label.get_bbox_patch()
        assert frame is not None
        frame.set_linewidth(3 if state == current else 0.8)
    return ax


def _build_diagram(
    ax: Axes,
    places: Mapping[str, tuple[float, float]],
    arrows: Sequence[Arrow],
    looks: Mapping[str, Look],
) -> None:
    ax.clear()
    ax.set_axis_off()
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    for arrow in arrows:
        _draw_arrow(ax, arrow, places)
    for state, (x, y) in places.items():
        look = looks[state]
        box = {"boxstyle": "round,pad=0.4", "facecolor": look.colour, "edgecolor": BLACK}
        ax.text(
            x, y, state, ha="center", va="center", fontsize=FONT, color=look.ink, bbox=box, zorder=3
        )


def _draw_arrow(ax: Axes, arrow: Arrow, places: Mapping[str, tuple[float, float]]) -> None:
    """A straight arrow with its label nearer to its start; opposite arrows run side by side."""
    (x0, y0), (x1, y1) = places[arrow.start], places[arrow.end]
    across, up = (x1 - x0) * ax.bbox.width, (y1 - y0) * ax.bbox.height
    length = math.hypot(across, up)
    aside = (_SIDE * up / length / ax.bbox.width, -_SIDE * across / length / ax.bbox.height)
    tail, head = (x0 + aside[0], y0 + aside[1]), (x1 + aside[0], y1 + aside[1])
    style = {
        "arrowstyle": "-|>",
        "color": "#555555",
        "shrinkA": _edge(arrow.start, across / length, up / length),
        "shrinkB": _edge(arrow.end, across / length, up / length),
    }
    ax.annotate("", xy=head, xytext=tail, arrowprops=style)
    place = (tail[0] + _LABEL_AT * (x1 - x0), tail[1] + _LABEL_AT * (y1 - y0))
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    ax.annotate(arrow.label, xy=place, ha="center", va="center", fontsize=FONT - 1, bbox=box)


def _edge(state: str, cosine: float, sine: float) -> float:
    """Points from the middle of a state's box to its edge, in the direction given."""
    half_width, half_height = 0.33 * FONT * (len(state) + 3), 1.7 * FONT
    return min(half_width / max(abs(cosine), 0.01), half_height / max(abs(sine), 0.01))


def sept_arrows() -> list[Arrow]:
    """Every change between two states of SEPT_PLACES, labelled with the leaves that make it."""
    labels: dict[tuple[str, str], list[str]] = {}
    for results, leaves in ((SEPT_RESULT, HOST_LEAVES), (GUEST_SEPT_RESULT, GUEST_LEAVES)):
        for number, changes in results.items():
            for before, after in changes.items():
                edge = (SEPT_STATE_BY_BITS[before].name, SEPT_STATE_BY_BITS[after].name)
                if edge[0] != edge[1] and set(edge) <= SEPT_PLACES.keys():
                    labels.setdefault(edge, []).append(short_name(leaves[number].name))
    return [Arrow(start, end, "\n".join(names)) for (start, end), names in labels.items()]


def short_name(leaf: str) -> str:
    """A leaf's name without what all memory leaves share: "PAGE.AUG" for TDH.MEM.PAGE.AUG."""
    return leaf.split(".", 2)[2]


def sept_diagram(counts: Mapping[str, int], ax: Axes, *, current: str | None = None) -> Axes:
    """The states of a Secure EPT entry. counts: of `tables.sept_states`; current: state to mark."""
    return state_diagram(
        counts, ax, places=SEPT_PLACES, arrows=sept_arrows(), looks=SEPT_LOOKS, current=current
    )
