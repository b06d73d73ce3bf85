"""The picture of `tdxlab demo`: the SEAMCALLs of each phase, stacked by the group of the leaf."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.demo import Life
from tdxlab.sizes import format_size
from tdxlab.study.palette import GROUP_LOOKS
from tdxlab.study.plots import Canvas, Series, side_by_side, stacked_bars

#: Share of the width below which letters would stand upon each other.
_NARROW = 0.015

_GROUP_OF = {leaf.name: leaf.group for leaf in HOST_LEAVES.values()}


def calls_per_phase(life: Life, ax: Axes) -> Axes:
    """SEAMCALLs of each phase of `life`, stacked by group. A part without room for its letter has
    none.
    """
    groups = [name for name in GROUP_LOOKS if any(_GROUP_OF[leaf] == name for leaf in life.total)]
    series = [
        Series(
            GROUP_LOOKS[group],
            [
                sum(n for leaf, n in phase.seamcalls.items() if _GROUP_OF[leaf] == group)
                for phase in life.phases
            ],
        )
        for group in groups
    ]
    title = f"A TD of {format_size(life.memory)}, GPAW {life.gpaw}"
    names = [phase.name for phase in life.phases]
    stacked_bars(ax, names, series, unit="SEAMCALLs", title=title)
    for bar, letter in zip(ax.patches, ax.texts[len(names) :], strict=True):
        if isinstance(bar, Rectangle) and bar.get_width() < ax.get_xlim()[1] * _NARROW:
            letter.set_text("")
    return ax


def save(life: Life, path: Path) -> None:
    """Draw `life` into the PNG file at `path`. Refuses a path that cannot be written: OSError."""
    canvas = Canvas(3.0)
    (ax,) = side_by_side(canvas.figure, 1)
    calls_per_phase(life, ax)
    path.write_bytes(canvas.png())
