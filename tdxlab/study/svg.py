"""Page-table and PAMT maps as SVG strings: fast enough to be redrawn at every click.

Every drawing has role="img" and an aria-label that says in words what it shows. Coordinates are
whole numbers, so equal states give equal strings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, PAGE_SHIFT, SEPT_LEVEL_NAMES, SIZE_2M, table_index
from tdxlab.study.palette import PAGE_TYPE_LOOKS, SEPT_LOOKS, Look
from tdxlab.views import PamtRow, SeptRow

MAP_COLUMNS = 32
CELL = 12
_MARGIN = 34
_FONT = 'font-family="DejaVu Sans,Verdana,sans-serif"'
_LINE = "#888888"


def drawing(width: int, height: int, label: str, body: Iterable[str]) -> str:
    """An SVG element of width x height pixels on white, shrunk where there is less room.

    label: what it shows, in words.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" {_FONT} '
        f'style="max-width:100%;height:auto;background:#fff">{"".join(body)}</svg>'
    )


def text(
    x: int, y: int, content: str, *, size: int = 11, colour: str = "#000", at: str = "start"
) -> str:
    """A line of text whose baseline is at (x, y). at: "start", "middle" or "end" of it is at x."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{at}">'
        f"{escape(content)}</text>"
    )


def tile(x: int, y: int, look: Look, *, size: int = CELL, hint: str = "") -> str:
    """A square in the state's colour with its letter; `hint` pops up under the mouse."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    font = size - 4 if len(look.letter) < 2 else size - 6
    return (
        f'<g>{title}<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{look.colour}" '
        f'stroke="#444"/><text x="{x + size // 2}" y="{y + size - 3}" font-size="{font}" '
        f'fill="{look.ink}" text-anchor="middle">{look.letter}</text></g>'
    )


# -- a map of 512 entries


def entry_map(cells: Mapping[int, Look], *, title: str, unit: str = "entry") -> str:
    """A map of 512 entries, 32 in a row, entry 0 at the top left, 15:31 at its right end.

    cells: index (0..511) -> look; an index that is missing is free and drawn empty.
    unit: what one entry is. Refuses an index outside 0..511: ValueError.
    """
    outside = [index for index in cells if not 0 <= index < ENTRIES_PER_TABLE]
    if outside:
        raise ValueError(
            f"index {outside[0]} is not in this map; it has 0..{ENTRIES_PER_TABLE - 1}"
        )
    rows = ENTRIES_PER_TABLE // MAP_COLUMNS
    width, height = _MARGIN + MAP_COLUMNS * CELL + 2, 20 + rows * CELL + 20
    looks = list(dict.fromkeys(cells[index] for index in sorted(cells)))
    body = [
        text(_MARGIN, 13, title, size=12),
        grid(rows),
        *(_row_number(row) for row in range(0, rows, 4)),
        *(_map_tile(index, look, unit) for index, look in sorted(cells.items())),
        _legend(looks, height - 6),
    ]
    return drawing(width, height, f"{title}: {count_text(cells.values(), unit)}", body)


def _map_tile(index: int, look: Look, unit: str) -> str:
    x, y = map_place(index)
    return tile(x, y, look, hint=f"{unit} {index}: {look.name}")


def map_place(index: int) -> tuple[int, int]:
    """Top left corner (x, y) of an entry of `entry_map`, in pixels."""
    return _MARGIN + index % MAP_COLUMNS * CELL, 20 + index // MAP_COLUMNS * CELL


def grid(rows: int) -> str:
    """All lines of a map of that many rows, as one path."""
    left, top = map_place(0)
    across, down = MAP_COLUMNS * CELL, rows * CELL
    lines = [f"M{left} {top + row * CELL}h{across}" for row in range(rows + 1)]
    lines += [f"M{left + column * CELL} {top}v{down}" for column in range(MAP_COLUMNS + 1)]
    return f'<path d="{"".join(lines)}" stroke="#dddddd" fill="none"/>'


def _row_number(row: int) -> str:
    _, y = map_place(row * MAP_COLUMNS)
    return text(_MARGIN - 5, y + CELL - 3, str(row * MAP_COLUMNS), size=10, colour="#555", at="end")


def _legend(looks: Sequence[Look], y: int) -> str:
    """Letters and names of the states in a row."""
    parts, x = [], _MARGIN
    for look in looks:
        parts.append(tile(x, y - 10, look, size=12))
        parts.append(text(x + 16, y, look.name, size=10))
        x += 26 + 7 * len(look.name)
    return "".join(parts)


def count_text(looks: Iterable[Look], unit: str) -> str:
    """How many of each state there are, in words: "3 MAPPED, 1 PENDING, the rest free"."""
    counts = Counter(look.name for look in looks)
    if not counts:
        return f"no {unit} in use"
    return ", ".join(f"{number} {name}" for name, number in counts.items()) + ", the rest free"


# -- the two maps of a machine


def pamt_map(rows: Iterable[PamtRow], base: int) -> str:
    """The 512 pages of 4 KiB from HPA `base` on, each with the letter of its type in the PAMT.

    rows: of `views.pamt_rows`; base: HPA, 2 MiB aligned. A page that is part of a 2 MiB or 1 GiB
    page has that page's type.
    """
    cells: dict[int, Look] = {}
    for row in rows:
        look = PAGE_TYPE_LOOKS.get(row.page_type)
        first = (row.hpa - base) >> PAGE_SHIFT
        pages = {"4K": 1, "2M": 1 << 9, "1G": 1 << 18}[row.size]
        if look is not None and look.letter != ".":
            cells |= dict.fromkeys(range(max(first, 0), min(first + pages, 512)), look)
    return entry_map(cells, title=f"PAMT, 512 pages from HPA {base:#x}", unit="page")


def sept_table_map(rows: Iterable[SeptRow], table_hpa: int) -> str:
    """The 512 entries of one S-EPT page, each with the letter of its state.

    rows: of `views.sept_rows`; table_hpa: HPA of the S-EPT page.
    """
    cells = {
        (row.entry_hpa - table_hpa) // 8: SEPT_LOOKS[row.state]
        for row in rows
        if table_hpa <= row.entry_hpa < table_hpa + (1 << PAGE_SHIFT)
    }
    return entry_map(cells, title=f"S-EPT page at HPA {table_hpa:#x}")


def pamt_base(tdr: int) -> int:
    """The start of the 2 MiB range that a page lies in: what `pamt_map` can show around it."""
    return tdr & -SIZE_2M


# -- the tree of one Secure EPT


class _Box(NamedTuple):
    """One S-EPT page of the tree: its used entries, its top left corner and its width."""

    rows: list[SeptRow]
    x: int
    y: int
    width: int


TREE_WIDTH, _ROW_HEIGHT, _GAP = 404, 18, 8


def sept_tree(rows: Sequence[SeptRow], *, levels: int, title: str, most: int = 12) -> str:
    """The Secure EPT of one TD as a tree: a column for each level, a box for each S-EPT page.

    rows: of `views.sept_rows`, parents first. levels: 4 or 5. Boxes show the entries that are not
    free, as index, letter and state; of more than `most` at one level the rest is counted.
    """
    columns = [_boxes(rows, level, levels, most) for level in range(levels - 1, -1, -1)]
    bottom = max(
        (box.y + _ROW_HEIGHT * len(box.rows) for column in columns for box in column), default=60
    )
    hidden = len(rows) - sum(len(box.rows) for column in columns for box in column)
    width, height = TREE_WIDTH, bottom + 34
    body = [text(1, 13, title, size=12)]
    body += [_level_name(level, levels) for level in range(levels)]
    body += [_links(parents, children) for parents, children in pairwise(columns)]
    body += [_box_svg(box) for column in columns for box in column]
    if hidden:
        body.append(text(1, height - 4, f"and {hidden} more entries", size=10))
    looks = (SEPT_LOOKS[row.state] for row in rows)
    return drawing(width, height, f"{title}: {count_text(looks, 'entry')}", body)


def _column_x(level: int, levels: int) -> int:
    return 1 + (levels - 1 - level) * (TREE_WIDTH // levels)


def _level_name(level: int, levels: int) -> str:
    return text(_column_x(level, levels), 30, SEPT_LEVEL_NAMES[level], size=10, colour="#555")


def _boxes(rows: Sequence[SeptRow], level: int, levels: int, most: int) -> list[_Box]:
    """The first `most` entries of a level, in boxes of one S-EPT page each, one under another."""
    pages: dict[int, list[SeptRow]] = {}
    for row in [row for row in rows if row.sept_level == level][:most]:
        pages.setdefault(row.entry_hpa >> PAGE_SHIFT, []).append(row)
    boxes, y = [], 36
    for page in pages.values():
        boxes.append(_Box(page, _column_x(level, levels), y, TREE_WIDTH // levels - _GAP))
        y += _ROW_HEIGHT * len(page) + _GAP
    return boxes


def _box_svg(box: _Box) -> str:
    """A box: for each entry its index, its letter and the end of its state's name."""
    height = _ROW_HEIGHT * len(box.rows)
    frame = (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{height}" fill="#fff" '
        f'stroke="{_LINE}"/>'
    )
    return frame + "".join(
        _entry(box.x, box.y + _ROW_HEIGHT * i, row) for i, row in enumerate(box.rows)
    )


def _entry(x: int, y: int, row: SeptRow) -> str:
    look = SEPT_LOOKS[row.state]
    hint = f"GPA {row.gpa:#x}, {SEPT_LEVEL_NAMES[row.sept_level]}: {row.state}, raw {row.raw:#018x}"
    name = {"NL_MAPPED": "table", "NL_BLOCKED": "blocked"}.get(row.state, row.state.lower())
    return (
        text(x + 22, y + 13, str(table_index(row.gpa, row.sept_level)), size=10, at="end")
        + tile(x + 26, y + 2, look, size=14, hint=hint)
        + text(x + 44, y + 13, name[:9], size=9)
    )


def _links(parents: Sequence[_Box], children: Sequence[_Box]) -> str:
    """A line from the middle of each parent entry to the box it links."""
    return "".join(_link(parent, children) for parent in parents)


def _link(parent: _Box, children: Sequence[_Box]) -> str:
    lines = []
    for place, row in enumerate(parent.rows):
        for child in children:
            if _is_child(row, child.rows[0]):
                x, y = parent.x + parent.width, parent.y + _ROW_HEIGHT * place + _ROW_HEIGHT // 2
                lines.append(f"M{x} {y}L{child.x} {child.y + _ROW_HEIGHT // 2}")
    return f'<path d="{"".join(lines)}" stroke="{_LINE}" fill="none"/>' if lines else ""


def _is_child(parent: SeptRow, child: SeptRow) -> bool:
    """True if `child`'s entry lies in the S-EPT page that `parent` links."""
    return parent.raw & 0xF_FFFF_FFFF_F000 == child.entry_hpa & -(1 << PAGE_SHIFT)
