"""Plots of notebook 04: occupancy of mirror and Secure EPT, and the price of looking."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from tdxlab.study.mirror_tables import OccupancyRow, PriceRow
from tdxlab.study.mirror_tape import MirrorTape
from tdxlab.study.palette import BLACK, BLUE, GREEN, ORANGE, SKY, VERMILLION, WHITE, Look
from tdxlab.study.plots import (
    FONT,
    Canvas,
    bars,
    calls_over_time,
    calls_per_leaf,
    calls_per_phase,
    side_by_side,
)
from tdxlab.study.show import Picture, text_table

TREE_LOOKS: dict[str, Look] = {
    "mirror": Look("mirror", GREEN, BLACK, "M", ""),
    "external": Look("external", ORANGE, BLACK, "X", "//"),
}

_MARKS = {
    "mirror": (GREEN, "o", "M"),
    "SEPT.RD, skipping": (SKY, "s", "S"),
    "SEPT.RD, page by page": (BLUE, "^", "P"),
    "SEPT.RD, level by level": (VERMILLION, "D", "L"),
}


def tables_per_level(rows: Sequence[OccupancyRow], ax: Axes) -> Axes:
    """Tables of each level, mirror and external one above the other. rows: of `occupancy_rows`."""
    tables = [row.tables for row in rows]
    unit = "tables of 4 KiB: M mirror, X external"
    return bars(ax, _names(rows), tables, _looks(rows), unit=unit, title="Tables of each level")


def filling(rows: Sequence[OccupancyRow], ax: Axes) -> Axes:
    """Entries in use for each 512, mirror and external one above the other."""
    used = [round(row.entries / row.tables) for row in rows]
    unit = "entries in use, of 512"
    bars(ax, _names(rows), used, _looks(rows), unit=unit, title="Use of an average table")
    ax.set_xlim(0, 512)
    return ax


def _names(rows: Sequence[OccupancyRow]) -> list[str]:
    return [f"{row.layout} {row.level} {TREE_LOOKS[row.tree].letter}" for row in rows]


def _looks(rows: Sequence[OccupancyRow]) -> list[Look]:
    return [TREE_LOOKS[row.tree] for row in rows]


def occupancy_picture(rows: Sequence[OccupancyRow]) -> Picture:
    """Tables of each level and how full they are, side by side."""
    canvas = Canvas(3.6)
    left, right = side_by_side(canvas.figure, 2, left=0.11, between=0.32)
    tables_per_level(rows, left)
    filling(rows, right)
    return Picture(canvas.png(), text_table(rows))


def calls_picture(tape: MirrorTape) -> Picture:
    """SEAMCALLs of a tape per leaf, per phase and over its steps."""
    canvas = Canvas(2.9)
    leaf, phase, time = side_by_side(canvas.figure, 3, left=0.2, between=0.75)
    calls_per_leaf(tape.leaf_counts(), leaf)
    calls_per_phase(tape.phase_counts(), phase)
    calls_over_time(tape.time_points(), time)
    time.set_xlabel("steps", fontsize=FONT)
    said = f"{text_table(tape.leaf_counts())}\n\n{text_table(tape.phase_counts())}"
    last = tape.time_points()[-1]
    return Picture(canvas.png(), f"{said}\n\n{last.calls} SEAMCALLs in {last.position} steps")


def price(rows: Sequence[PriceRow], ax: Axes) -> Axes:
    """SEAMCALLs against the number of gfns, a curve for each way. rows: of `price_curve`."""
    ax.clear()
    for way, (colour, marker, letter) in _MARKS.items():
        mine = [row for row in rows if row.way == way]
        gfns, calls = [row.gfns for row in mine], [row.seamcalls for row in mine]
        ax.plot(gfns, calls, color=colour, marker=marker, label=f"{letter} {way}")
        ax.text(gfns[-1], calls[-1], f"  {letter}", fontsize=FONT + 1, va="center")
    ax.set_title("What a look at gfns 0..N-1 costs", fontsize=FONT + 1, loc="left")
    ax.set_xlabel("N, gfns asked for", fontsize=FONT)
    ax.set_ylabel("SEAMCALLs", fontsize=FONT)
    ax.tick_params(labelsize=FONT, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=FONT, frameon=False)
    ax.set_facecolor(WHITE)
    return ax
