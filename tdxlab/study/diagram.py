"""State diagrams with counts: which states there are, what leads from one to another.

`state_diagram` draws any; `sept_diagram` draws the states of a Secure EPT entry, with the arrows
taken from the module's own tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES
from tdxlab.seam.rules import GUEST_SEPT_RESULT, SEPT_RESULT, SEPT_STATE_BY_BITS
from tdxlab.study.palette import BLACK, SEPT_LOOKS, Look
from tdxlab.study.plots import FONT

#: Where the states that an unmigrated TD reaches stand in the diagram.
SEPT_PLACES: dict[str, tuple[float, float]] = {
    "FREE": (0.10, 0.5),
    "PENDING": (0.45, 0.85),
    "PENDING_BLOCKED": (0.85, 0.85),
    "MAPPED": (0.45, 0.5),
    "BLOCKED": (0.85, 0.5),
    "NL_MAPPED": (0.45, 0.12),
    "NL_BLOCKED": (0.85, 0.12),
}


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
        _draw_arrow(ax, places[arrow.start], places[arrow.end], arrow.label)
    for state, (x, y) in places.items():
        look = looks[state]
        box = {"boxstyle": "round,pad=0.4", "facecolor": look.colour, "edgecolor": BLACK}
        ax.text(
            x, y, state, ha="center", va="center", fontsize=FONT, color=look.ink, bbox=box, zorder=3
        )


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], label: str) -> None:
    """A bent arrow with its label beside its middle; opposite arrows bend to opposite sides."""
    (x0, y0), (x1, y1) = start, end
    ax.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "connectionstyle": "arc3,rad=0.18",
            "color": "#555555",
            "shrinkA": 22,
            "shrinkB": 22,
        },
    )
    middle = ((x0 + x1) / 2 + 0.09 * (y1 - y0), (y0 + y1) / 2 - 0.09 * (x1 - x0))
    ax.annotate(label, xy=middle, ha="center", va="center", fontsize=FONT - 1)


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
