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
from typing import Any, Literal, NamedTuple

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


# -- the two kinds of bars that all bar plots are made of


class Series(NamedTuple):
    """One colour of a stack of bars: a value for each category."""

    look: Look
    values: Sequence[int]


def bars(
    ax: Axes,
    categories: Sequence[str],
    values: Sequence[int],
    looks: Sequence[Look],
    *,
    unit: str,
    title: str,
) -> Axes:
    """Horizontal bars, one for each category in its own look; values stand at their ends.

    unit: label of the axis. Categories read from top to bottom.
    """
    key = repr((title, list(categories)))
    if ax.get_gid() != key:
        _start(ax, categories, title=title, unit=unit, key=key)
        ax.barh(
            range(len(categories)),
            values,
            color=[look.colour for look in looks],
            hatch=[look.hatch for look in looks],
            edgecolor=BLACK,
            linewidth=0.5,
        )
    _set_widths(ax, [values])
    return ax


def stacked_bars(
    ax: Axes, categories: Sequence[str], series: Sequence[Series], *, unit: str, title: str
) -> Axes:
    """Horizontal bars, each stacked from all `series`, whose letters stand in them; as `bars`."""
    names = [f"{one.look.letter} {one.look.name}" for one in series]
    key = repr((title, list(categories), names))
    if ax.get_gid() != key:
        _start(ax, categories, title=title, unit=": ".join([unit, *names[:1]]), key=key)
        ax.set_xlabel(", ".join([ax.get_xlabel(), *names[1:]]))
        for look, values in series:
            ax.barh(
                range(len(categories)),
                values,
                color=look.colour,
                hatch=look.hatch,
                edgecolor=BLACK,
                linewidth=0.5,
            )
            _add_texts(ax, len(categories), colour=look.ink, at="center")
    _set_widths(ax, [one.values for one in series], [one.look.letter for one in series])
    return ax


def _start(ax: Axes, categories: Sequence[str], *, title: str, unit: str, key: str) -> None:
    """Empty axes with a row for each category."""
    ax.clear()
    ax.set_gid(key)
    _add_texts(ax, len(categories), colour=BLACK, at="left")
    ax.set_yticks(range(len(categories)), categories)
    ax.set_ylim(len(categories) - 0.4, -0.6)
    _label(ax, title=title, x=unit)


def _add_texts(ax: Axes, rows: int, *, colour: str, at: Literal["left", "center"]) -> None:
    for row in range(rows):
        ax.text(0, row, "", va="center", ha=at, fontsize=FONT, color=colour)


def _set_widths(ax: Axes, stacks: Sequence[Sequence[int]], letters: Sequence[str] = ()) -> None:
    """Give the bars that are there their places and widths, and the texts their places and words.

    The axes' texts are the totals of the rows, then the letters of each bar if there are any.
    """
    rows = len(ax.get_yticks())
    ends = [0] * rows
    for number, (container, values) in enumerate(zip(ax.containers, stacks, strict=True)):
        assert isinstance(container, BarContainer)
        for row, (patch, value) in enumerate(zip(container.patches, values, strict=True)):
            patch.set_x(ends[row])
            patch.set_width(value)
            if letters:
                label = ax.texts[rows * (number + 1) + row]
                label.set_x(ends[row] + value / 2)
                label.set_text(letters[number] if value else "")
            ends[row] += value
    for label, end in zip(ax.texts[:rows], ends, strict=True):
        label.set_x(end)
        label.set_text(f" {end}")
    ax.set_xlim(0, max([*ends, 1]) * _ROOM_FOR_NUMBERS)


def _label(ax: Axes, *, title: str, x: str, y: str = "") -> None:
    ax.set_title(title, fontsize=FONT + 1, loc="left")
    ax.set_xlabel(x, fontsize=FONT)
    ax.set_ylabel(y, fontsize=FONT)
    ax.tick_params(labelsize=FONT, length=2, left=bool(y))
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
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
    return stacked_bars(ax, names, series, unit="entries", title="Secure EPT, entries in use")


def _levels(rows: Sequence[SeptCount]) -> list[str]:
    """Level names top first; the fifth only if some tree has it."""
    depth = 5 if any(row.level == SEPT_LEVEL_NAMES[4] for row in rows) else 4
    return list(reversed(SEPT_LEVEL_NAMES[:depth]))


def pamt_types(rows: Sequence[PamtCount], ax: Axes) -> Axes:
    """4 KiB pages of each PAMT type. rows: of `tables.pamt_pages`."""
    looks = [PAGE_TYPE_LOOKS[row.page_type] for row in rows]
    names = [f"{look.letter} {look.name}" for look in looks]
    pages = [row.pages for row in rows]
    return bars(ax, names, pages, looks, unit="4 KiB pages", title="PAMT, pages in use")


def calls_per_leaf(rows: Sequence[LeafCount], ax: Axes) -> Axes:
    """SEAMCALLs of each leaf, coloured by the leaf's group. rows: of `tables.seamcalls...`."""
    looks = [GROUP_LOOKS.get(row.group, GROUP_LOOKS["other"]) for row in rows]
    names = [row.leaf for row in rows]
    calls = [row.calls for row in rows]
    return bars(ax, names, calls, looks, unit="SEAMCALLs", title="SEAMCALLs per leaf")


def calls_per_phase(rows: Sequence[PhaseCount], ax: Axes) -> Axes:
    """SEAMCALLs of each phase. rows: of `tables.seamcalls_per_phase`."""
    names = [row.phase for row in rows]
    calls = [row.calls for row in rows]
    looks = [PLAIN] * len(rows)
    return bars(ax, names, calls, looks, unit="SEAMCALLs", title="SEAMCALLs per phase")


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
