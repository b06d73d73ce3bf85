"""Drawings of a TD's life: the three trees side by side, and bars of their tables and entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.accounts import DIRECT, EXTERNAL, MIRROR, TREES
from tdxlab.arch import SEPT_LEVEL_NAMES
from tdxlab.study.life_lab import Entry, LifeLab, TreeTable
from tdxlab.study.mirror_views import MIRROR_LOOKS
from tdxlab.study.palette import BLACK, GREEN, ORANGE, SEPT_LOOKS, SKY, Look
from tdxlab.study.plots import Series, stacked_bars
from tdxlab.study.show import Drawing
from tdxlab.study.svg import count_text, drawing, text, tile

#: Tree -> heading of its view.
HEADINGS = {
    MIRROR: "Mirror EPT: private, KVM's copy",
    EXTERNAL: "External: private, the Secure EPT",
    DIRECT: "Direct EPT: shared memory",
}

#: Tree -> its look in bars.
TREE_LOOKS: dict[str, Look] = {
    MIRROR: Look(MIRROR, GREEN, BLACK, "M", ""),
    EXTERNAL: Look(EXTERNAL, SKY, BLACK, "X", "\\\\"),
    DIRECT: Look(DIRECT, ORANGE, BLACK, "D", "//"),
}

_WIDTH, _ROW, _GAP, _TOP, _LEAST = 272, 18, 8, 20, 140


class Box(NamedTuple):
    """A table in a drawing: its top left corner and its width."""

    table: TreeTable
    x: int
    y: int
    width: int


def tree_svg(tables: Sequence[TreeTable], *, levels: int, tree: str) -> str:
    """One tree: a column for each level, a box for each table, a line for each entry in use, with
    its number and the letter of its state. tables: of `LifeLab.trees`.
    """
    looks = SEPT_LOOKS if tree == EXTERNAL else MIRROR_LOOKS
    columns = [_boxes(tables, level, levels) for level in range(levels - 1, -1, -1)]
    boxes = [box for column in columns for box in column]
    bottom = max([box.y + _height(box.table) for box in boxes], default=0)
    used = [looks[entry.state] for table in tables for entry in table.entries]
    body = [
        text(_x(level, levels), 13, name, size=10, colour="#555") for level, name in _names(levels)
    ]
    body += [_links(parents, children) for parents, children in pairwise(columns)]
    body += [_box_svg(box, looks) for box in boxes]
    body += [] if boxes else [text(1, 48, "no tables", size=11, colour="#555")]
    height = max(bottom + 30, _LEAST)
    body.append(_legend(used, height - 6))
    said = f"{tree}: {len(tables)} tables, {count_text(used, 'entry')}"
    return drawing(_WIDTH, height, said, body)


def _names(levels: int) -> list[tuple[int, str]]:
    return list(enumerate(SEPT_LEVEL_NAMES[:levels]))


def _x(level: int, levels: int) -> int:
    return 1 + (levels - 1 - level) * (_WIDTH // levels)


def _height(table: TreeTable) -> int:
    return _ROW * max(len(table.entries), 1)


def _boxes(tables: Sequence[TreeTable], level: int, levels: int) -> list[Box]:
    boxes, y = [], _TOP
    for table in tables:
        if table.level == level:
            boxes.append(Box(table, _x(level, levels), y, _WIDTH // levels - _GAP))
            y += _height(table) + _GAP
    return boxes


def _box_svg(box: Box, looks: Mapping[str, Look]) -> str:
    frame = (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{_height(box.table)}" '
        'fill="#fff" stroke="#888888"/>'
    )
    if not box.table.entries:
        return frame + text(box.x + 4, box.y + 13, "empty", size=10, colour="#555")
    rows = enumerate(box.table.entries)
    return frame + "".join(_entry(box.x, box.y + _ROW * i, entry, looks) for i, entry in rows)


def _entry(x: int, y: int, entry: Entry, looks: Mapping[str, Look]) -> str:
    hint = f"entry {entry.number}: {entry.state}, raw {entry.raw:#018x}"
    number = text(x + 22, y + 13, str(entry.number), size=10, at="end")
    return number + tile(x + 27, y + 2, looks[entry.state], size=14, hint=hint)


def _links(parents: Sequence[Box], children: Sequence[Box]) -> str:
    """A line from each entry to the table that it links."""
    lines = []
    for box in parents:
        for place, entry in enumerate(box.table.entries):
            x, y = box.x + box.width, box.y + _ROW * place + _ROW // 2
            lines += [
                f"M{x} {y}L{child.x} {child.y + _ROW // 2}"
                for child in children
                if child.table.hpa == entry.hpa
            ]
    return f'<path d="{"".join(lines)}" stroke="#888888" fill="none"/>' if lines else ""


def _legend(looks: Sequence[Look], y: int) -> str:
    parts, x = [], 1
    for look in dict.fromkeys(looks):
        parts += [tile(x, y - 11, look, size=12), text(x + 15, y - 1, look.name, size=10)]
        x += 24 + 7 * len(look.name)
    return "".join(parts)


def tree_drawing(lab: LifeLab, tree: str) -> Drawing:
    """One tree for the end of a cell, with its entries in words."""
    tables = lab.trees()[tree]
    lines = [
        f"{SEPT_LEVEL_NAMES[table.level]}: "
        + (", ".join(f"[{entry.number}] {entry.state}" for entry in table.entries) or "empty")
        for table in tables
    ]
    words = "\n".join(lines) or "no tables"
    return Drawing(tree_svg(tables, levels=lab.levels, tree=tree), words)


class TreeCount(NamedTuple):
    """One level of one tree. tables: pages; entries: in use in all of them."""

    tree: str
    level: str
    tables: int
    entries: int


def tree_counts(lab: LifeLab) -> list[TreeCount]:
    """Every tree and level, the root's level first; zeros where there is nothing."""
    trees = lab.trees()
    return [
        TreeCount(tree, name, len(mine), sum(len(table.entries) for table in mine))
        for tree in TREES
        for level, name in reversed(_names(lab.levels))
        for mine in [[table for table in trees[tree] if table.level == level]]
    ]


def tables_bars(rows: Sequence[TreeCount], ax: Axes) -> Axes:
    """Tables of each level, the trees stacked. rows: of `tree_counts`."""
    return _stack(rows, ax, 2, unit="tables", title="Tables of each level")


def entries_bars(rows: Sequence[TreeCount], ax: Axes) -> Axes:
    """Entries in use at each level, the trees stacked. rows: of `tree_counts`."""
    return _stack(rows, ax, 3, unit="entries", title="Entries in use")


def _stack(rows: Sequence[TreeCount], ax: Axes, column: int, *, unit: str, title: str) -> Axes:
    levels = list(dict.fromkeys(row.level for row in rows))
    count = {(row.tree, row.level): int(row[column]) for row in rows}
    series = [Series(TREE_LOOKS[tree], [count[tree, level] for level in levels]) for tree in TREES]
    return stacked_bars(ax, levels, series, unit=unit, title=title)
