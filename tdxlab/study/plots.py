"""Bars and curves: functions that take a table and `ax`, and return the axes.

A function called again on the same axes moves the artists that are there (a redraw then costs the
rendering alone) and builds anew only if the categories have changed. The Figure is drawn on an Agg
canvas: no pyplot, no windows, no state outside the figure.

    canvas = Canvas()
    (ax,) = side_by_side(canvas.figure, 1)
    calls_per_leaf(tables.seamcalls_per_leaf(tape), ax)
    canvas.png()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tdxlab.arch import SEPT_LEVEL_NAMES
from tdxlab.study.palette import (
    BLACK,
    CURSOR,
    GROUP_LOOKS,
    PAGE_TYPE_LOOKS,
    PLAIN,
    SEPT_LOOKS,
    Look,
)
from tdxlab.study.show import Picture, text_table
from tdxlab.study.tables import (
    STATE_ORDER,
    LeafCount,
    PamtCount,
    PhaseCount,
    SeptCount,
    TimePoint,
)

DPI = 100
WIDTH_INCHES = 8.8
FONT = 8
_ROOM_FOR_NUMBERS = 1.15


class Canvas:
    """One Figure on an Agg canvas, made once and redrawn as often as one likes.

    height: inches; the width is that of a notebook's output area.
    """

    def __init__(self, height: float = 2.6) -> None:
        self.figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
        FigureCanvasAgg(self.figure)

    def png(self) -> bytes:
        """The figure as a PNG; compressed as little as possible, because it is shown at once."""
        stream = BytesIO()
        self.figure.savefig(
            stream, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 1}
        )
        return stream.getvalue()


def picture(
    plot: Callable[[Any, Axes], Axes], table: Sequence[Any], *, height: float = 2.8
) -> Picture:
    """`plot(table, ax)` on a figure of its own, for the end of a notebook cell.

    Its text is the table, so that a re-run compares the numbers.
    """
    canvas = Canvas(height)
    axes = side_by_side(canvas.figure, 1, left=0.24)
    plot(table, axes[0])
    return Picture(canvas.png(), text_table(table))


def side_by_side(
    figure: Figure, count: int, *, left: float = 0.1, between: float = 0.6
) -> list[Axes]:
    """`count` axes in a row: those that the figure has, else new ones.

    left: room for labels at the left edge, as a part of the figure's width; between: room between
    two axes, as a part of the width of one.
    """
    if not figure.axes:
        figure.subplots(1, count)
        figure.subplots_adjust(left=left, right=0.98, top=0.88, bottom=0.18, wspace=between)
    return list(figure.axes)


# -- stacked bars, which all bar plots are made of


class Series(NamedTuple):
    """One colour of a stack of bars: a value for each category."""

    look: Look
    values: Sequence[int]


def bars(
    ax: Axes,
    categories: Sequence[str],
    series: Sequence[Series],
    *,
    unit: str,
    title: str,
    legend: bool = True,
) -> Axes:
    """Horizontal bars, one for each category, stacked from `series`; totals stand at their ends.

    unit: label of the axis. legend: name the series, if there are several. Categories read from
    top to bottom.
    """
    key = repr((title, list(categories), [one.look.name for one in series]))
    if ax.get_gid() != key:
        _build_bars(ax, categories, series)
        _label(ax, title=title, x=unit)
        if legend and len(series) > 1:
            ax.legend(fontsize=FONT - 1, loc="lower right", frameon=False)
        ax.set_gid(key)
    ends = [0] * len(categories)
    for container, one in zip(ax.containers, series, strict=True):
        assert isinstance(container, BarContainer)
        for place, (patch, value) in enumerate(zip(container.patches, one.values, strict=True)):
            patch.set_x(ends[place])
            patch.set_width(value)
            ends[place] += value
    for label, end in zip(ax.texts, ends, strict=True):
        label.set_x(end)
        label.set_text(f" {end}")
    ax.set_xlim(0, max([*ends, 1]) * _ROOM_FOR_NUMBERS)
    return ax


def _build_bars(ax: Axes, categories: Sequence[str], series: Sequence[Series]) -> None:
    ax.clear()
    places = range(len(categories))
    for look, _ in series:
        ax.barh(
            places,
            [0] * len(categories),
            color=look.colour,
            hatch=look.hatch,
            edgecolor=BLACK,
            linewidth=0.5,
            label=f"{look.letter} {look.name}".strip(),
        )
    for place in places:
        ax.text(0, place, "", va="center", fontsize=FONT)
    ax.set_yticks(places, categories, fontsize=FONT)
    ax.set_ylim(len(categories) - 0.4, -0.6)


def _label(ax: Axes, *, title: str, x: str, y: str = "") -> None:
    ax.set_title(title, fontsize=FONT + 1, loc="left")
    ax.set_xlabel(x, fontsize=FONT)
    ax.set_ylabel(y, fontsize=FONT)
    ax.tick_params(labelsize=FONT, length=2)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.spines[["top", "right"]].set_visible(False)


# -- one function for each table


def occupancy(rows: Sequence[SeptCount], ax: Axes) -> Axes:
    """S-EPT entries per tree and level, stacked by state. rows: of `tables.sept_occupancy`."""
    trees = list(dict.fromkeys(row.tdr for row in rows))
    levels = _levels(rows)
    places = [(tdr, level) for tdr in trees for level in levels] or [(0, level) for level in levels]
    names = [f"{tdr:#x} {level}" if len(trees) > 1 else level for tdr, level in places]
    count = {(row.tdr, row.level, row.state): row.entries for row in rows}
    states = sorted({row.state for row in rows}, key=lambda state: STATE_ORDER[state])
    series = [
        Series(SEPT_LOOKS[state], [count.get((*place, state), 0) for place in places])
        for state in states
    ]
    return bars(ax, names, series, unit="entries", title="Secure EPT, entries in use")


def _levels(rows: Sequence[SeptCount]) -> list[str]:
    """Level names top first; the fifth only if some tree has it."""
    depth = 5 if any(row.level == SEPT_LEVEL_NAMES[4] for row in rows) else 4
    return list(reversed(SEPT_LEVEL_NAMES[:depth]))


def pamt_types(rows: Sequence[PamtCount], ax: Axes) -> Axes:
    """4 KiB pages of each PAMT type. rows: of `tables.pamt_pages`."""
    names = [f"{PAGE_TYPE_LOOKS[row.page_type].letter} {row.page_type}" for row in rows]
    series = [
        Series(
            PAGE_TYPE_LOOKS[row.page_type],
            [row.pages if place == own else 0 for place in range(len(rows))],
        )
        for own, row in enumerate(rows)
    ]
    title = "PAMT, pages in use"
    return bars(ax, names, series, unit="4 KiB pages", title=title, legend=False)


def calls_per_leaf(rows: Sequence[LeafCount], ax: Axes) -> Axes:
    """SEAMCALLs of each leaf, coloured by the leaf's group. rows: of `tables.seamcalls...`."""
    groups = list(dict.fromkeys(row.group for row in rows))
    series = [
        Series(
            GROUP_LOOKS.get(group, GROUP_LOOKS["other"]),
            [row.calls if row.group == group else 0 for row in rows],
        )
        for group in groups
    ]
    names = [row.leaf.removeprefix("TDH.") for row in rows]
    return bars(ax, names, series, unit="SEAMCALLs", title="SEAMCALLs per leaf (TDH.)")


def calls_per_phase(rows: Sequence[PhaseCount], ax: Axes) -> Axes:
    """SEAMCALLs of each phase. rows: of `tables.seamcalls_per_phase`."""
    series = [Series(PLAIN, [row.calls for row in rows])]
    return bars(
        ax, [row.phase for row in rows], series, unit="SEAMCALLs", title="SEAMCALLs per phase"
    )


def calls_over_time(rows: Sequence[TimePoint], ax: Axes) -> Axes:
    """SEAMCALLs made so far over the actions of a tape. rows: of `tables.seamcalls_over_time`."""
    if ax.get_gid() != "over time":
        ax.clear()
        ax.set_gid("over time")
        ax.plot([], [], drawstyle="steps-post", color=PLAIN.colour, linewidth=1.5)
        ax.plot([], [], marker="o", color=CURSOR, markersize=5)
        _label(ax, title="SEAMCALLs over time", x="actions", y="SEAMCALLs so far")
    curve, cursor = ax.lines
    curve.set_data([row.position for row in rows], [row.calls for row in rows])
    cursor.set_data([rows[-1].position], [rows[-1].calls])
    ax.set_xlim(0, max(rows[-1].position, 1) * 1.02)
    ax.set_ylim(0, max(rows[-1].calls, 1) * 1.05)
    return ax
