"""Plots of notebook 05: how many states there are at each distance, and in each scenario."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from tdxlab.study.palette import BLUE, GREEN, PLAIN, VERMILLION
from tdxlab.study.plots import FONT, Canvas, bars, side_by_side
from tdxlab.study.race_tables import DepthRow, ScenarioRow
from tdxlab.study.show import Picture, text_table

#: vCPUs -> colour and marker of their curve.
_CURVES = {1: (GREEN, "o"), 2: (BLUE, "s"), 3: (VERMILLION, "^")}


def states_by_depth(rows: Sequence[DepthRow], ax: Axes) -> Axes:
    """States at each number of moves from the beginning, a curve for each number of vCPUs. rows: of
    `race_tables.depth_rows`.
    """
    ax.clear()
    for vcpus in dict.fromkeys(row.vcpus for row in rows):
        mine = [row for row in rows if row.vcpus == vcpus]
        moves, states = [row.moves for row in mine], [row.states for row in mine]
        colour, marker = _CURVES[vcpus]
        ax.plot(moves, states, color=colour, marker=marker, markersize=3)
        ax.text(moves[-1], states[-1], f" {vcpus}", fontsize=FONT + 1, va="center", color=colour)
    ax.set_yscale("log")
    ax.set_title("same-page: states by distance, for 1, 2, 3 vCPUs", fontsize=FONT + 1, loc="left")
    ax.set_xlabel("moves from the beginning", fontsize=FONT)
    ax.set_ylabel("states", fontsize=FONT)
    ax.tick_params(labelsize=FONT, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def states_per_scenario(rows: Sequence[ScenarioRow], ax: Axes) -> Axes:
    """States of each scenario. rows: of `race_tables.scenario_rows`."""
    names = [f"{row.scenario}, {row.vcpus} vCPUs" for row in rows]
    states = [row.states for row in rows]
    return bars(
        ax, names, states, [PLAIN] * len(rows), unit="states", title="States of each scenario"
    )


def visited_picture(depths: Sequence[DepthRow], scenarios: Sequence[ScenarioRow]) -> Picture:
    """Both side by side; the text has the table of scenarios and the widest layer of each curve."""
    canvas = Canvas(3.0)
    left, right = side_by_side(canvas.figure, 2, left=0.07, between=0.55)
    states_by_depth(depths, left)
    states_per_scenario(scenarios, right)
    widest = [
        max((row for row in depths if row.vcpus == vcpus), key=lambda row: row.states)
        for vcpus in dict.fromkeys(row.vcpus for row in depths)
    ]
    return Picture(canvas.png(), f"{text_table(scenarios)}\n\nwidest:\n{text_table(widest)}")
