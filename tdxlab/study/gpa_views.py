"""Pictures of one GPA and of the GPA space: its bits, its two walks, the root table, the halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.arch import (
    ENTRIES_PER_TABLE,
    PAGE_SHIFT,
    level_size,
    sept_levels,
    shared_bit,
)
from tdxlab.kvm.params import MmuParams, gfn_shared_bit
from tdxlab.study.gpa_split import (
    PRIVATE,
    SECURE_EPT,
    SHARED,
    SHARED_EPT,
    Split,
    bit_range,
    last_index,
    level_name,
)
from tdxlab.study.palette import BLACK, CURSOR, GREY, HALF_LOOKS, PLAIN, WHITE, Look
from tdxlab.study.plots import FONT, Series, bars, stacked_bars
from tdxlab.study.show import Drawing
from tdxlab.study.svg import CELL, MAP_COLUMNS, drawing, grid, map_place, text, tile

_WIDTH, _MAP_WIDTH = 404, 420
_BITS_TOP, _BIT_HEIGHT = 24, 18
_TINTS = ("#dcecf7", "#fbf3c0", "#dcecf7", "#fbf3c0", "#dcecf7", "#eeeeee")
_TIB = 1 << 40


# -- the bits


def bit_fields(at: Split) -> str:
    """The bits of a GPA as cells, highest first, above the name and the value of each field."""
    fields = [(*bit_range(at.gpaw, level), level) for level in range(at.levels, 0, -1)]
    body = [_bit_cell(at, bit, _tint(fields, bit)) for bit in range(at.gpaw - 1, -1, -1)]
    for high, low, level in fields:
        body += _field_text(at, high, low, level_name(level), str(at.index(level)))
    body += _field_text(at, PAGE_SHIFT - 1, 0, "offset", f"{at.offset:#x}")
    x, width = _bit_x(at, shared_bit(at.gpaw)), _bit_width(at)
    name = f"bit {shared_bit(at.gpaw)} = {int(at.is_shared)}"
    body.append(
        f'<rect x="{x}" y="{_BITS_TOP}" width="{width}" height="{_BIT_HEIGHT}" fill="none" '
        f'stroke="#000" stroke-width="3"/>'
    )
    body.append(text(x, 14, f"{name}: {at.half}", size=12))
    indices = ", ".join(f"{level_name(level)} index {at.index(level)}" for *_, level in fields)
    return drawing(_WIDTH, 94, f"{at.gpa:#x}: {name}, {indices}, offset {at.offset:#x}", body)


def _bit_x(at: Split, bit: int) -> int:
    return 2 + (at.gpaw - 1 - bit) * _bit_width(at)


def _bit_width(at: Split) -> int:
    return (_WIDTH - 4) // at.gpaw


def _tint(fields: Sequence[tuple[int, int, int]], bit: int) -> str:
    """Colour of the field that a bit belongs to; the offset's is the last."""
    inside = (i for i, (high, low, _) in enumerate(fields) if low <= bit <= high)
    return _TINTS[next(inside, len(_TINTS) - 1)]


def _bit_cell(at: Split, bit: int, tint: str) -> str:
    x, width, value = _bit_x(at, bit), _bit_width(at), at.gpa >> bit & 1
    ink, colour = (WHITE, "#333333") if value else (BLACK, tint)
    return (
        f'<rect x="{x}" y="{_BITS_TOP}" width="{width}" height="{_BIT_HEIGHT}" fill="{colour}" '
        f'stroke="#999"><title>bit {bit}: {value}</title></rect>'
        + text(x + width // 2, _BITS_TOP + 13, str(value), size=8, colour=ink, at="middle")
    )


def _field_text(at: Split, high: int, low: int, name: str, value: str) -> list[str]:
    """Name, bits and value of a field, under its middle; a line marks its width."""
    left, right = _bit_x(at, high), _bit_x(at, low) + _bit_width(at)
    middle, y = (left + right) // 2, _BITS_TOP + _BIT_HEIGHT + 5
    return [
        f'<path d="M{left + 1} {y}h{right - left - 2}" stroke="#555" stroke-width="2"/>',
        text(middle, y + 14, name, size=10, at="middle"),
        text(middle, y + 26, f"{high}:{low}", size=9, colour="#555", at="middle"),
        text(middle, y + 42, value, size=13, at="middle"),
    ]


# -- the walk

_BOX_WIDTH, _BOX_HEIGHT, _WALK_TOP = 54, 30, 34


def walk_picture(at: Split) -> str:
    """Both tables of the TD with the entry that each level's index picks; one of them is walked."""
    rows = ((PRIVATE, SECURE_EPT, "mirror"), (SHARED, SHARED_EPT, "direct"))
    body = []
    for number, (half, table, root) in enumerate(rows):
        y = _WALK_TOP + number * 62
        is_walked = half == at.half
        note = "walked" if is_walked else "not looked at"
        ink = BLACK if is_walked else "#777777"
        body.append(text(2, y - 8, f"{table} (KVM's {root} root): {note}", size=11, colour=ink))
        body += _chain(at, y, HALF_LOOKS[half] if is_walked else None)
    steps = ", ".join(f"{level_name(level)} entry {at.index(level)}" for level in _down(at.gpaw))
    return drawing(_WIDTH, 134, f"the {at.table} is walked: {steps}, then the page", body)


def _down(gpaw: int) -> range:
    """The levels, the root's first."""
    return range(sept_levels(gpaw), 0, -1)


def _chain(at: Split, y: int, look: Look | None) -> list[str]:
    """A box for each level and one for the page, with arrows; grey and empty without a look."""
    step = (_WIDTH - 4 - _BOX_WIDTH) // at.levels
    parts = []
    for number, level in enumerate([*_down(at.gpaw), 0]):
        x = 2 + number * step
        name = level_name(level) if level else "page"
        value = f"[{at.index(level)}]" if level else f"+{at.offset:#x}"
        colour, ink = (look.colour, look.ink) if look else ("#f4f4f4", "#777777")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" fill="{colour}" '
            f'stroke="#888" rx="{0 if level else 9}"/>'
        )
        parts.append(text(x + _BOX_WIDTH // 2, y + 12, name, size=10, colour=ink, at="middle"))
        parts.append(
            text(x + _BOX_WIDTH // 2, y + 25, value if look else "-", colour=ink, at="middle")
        )
        if level:
            start, end = x + _BOX_WIDTH, x + step
            parts.append(
                f'<path d="M{start} {y + 15}H{end - 2}m-4 -4l4 4l-4 4" stroke="#888" fill="none"/>'
            )
    return parts


# -- the root table


def root_map(gpaw: int, at: Split | None = None) -> Drawing:
    """The 512 entries that the root table has room for: which half each leads into, and which one
    `at` uses.

    Both roots are drawn as one: the Secure EPT uses the P entries of its root, the direct root of
    KVM the S entries of its own.
    """
    top = sept_levels(gpaw)
    last = last_index(gpaw, top)
    half = (last + 1) // 2
    ranges = {PRIVATE: range(half), SHARED: range(half, last + 1)}
    body = [_shade(entries, HALF_LOOKS[name].colour) for name, entries in ranges.items()]
    body += [_letter(entries, HALF_LOOKS[name]) for name, entries in ranges.items()]
    body.append(grid(ENTRIES_PER_TABLE // MAP_COLUMNS))
    title = f"{level_name(top)} entries of a root"
    if at is not None:
        index = at.index(top)
        x, y = map_place(index)
        body.append(tile(x, y, HALF_LOOKS[at.half], hint=f"entry {index}: {at.half}"))
        body.append(
            f'<rect class="tdxlab-chosen" x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
            f'fill="none" stroke="#000" stroke-width="3"/>'
        )
        title += f"; this GPA uses number {index}"
    body.append(text(map_place(0)[0], 13, title, size=12))
    body += [_row_number(row) for row in range(0, ENTRIES_PER_TABLE // MAP_COLUMNS, 4)]
    body += _root_legend(ranges)
    words = ", ".join(f"{name}: {one.start}..{one.stop - 1}" for name, one in ranges.items())
    spare = ENTRIES_PER_TABLE - last - 1
    words += f", out of reach: {spare}"
    return Drawing(drawing(_MAP_WIDTH, 236, f"{title}; {words}", body), f"{title}; {words}")


def _shade(entries: range, colour: str) -> str:
    """The cells of a range of entries, as one path; whole rows at a time."""
    parts = []
    for row in range(entries.start // MAP_COLUMNS, (entries.stop - 1) // MAP_COLUMNS + 1):
        first = max(entries.start, row * MAP_COLUMNS)
        count = min(entries.stop, (row + 1) * MAP_COLUMNS) - first
        x, y = map_place(first)
        parts.append(f"M{x} {y}h{count * CELL}v{CELL}h-{count * CELL}z")
    return f'<path d="{"".join(parts)}" fill="{colour}" fill-opacity="0.45"/>'


def _letter(entries: range, look: Look) -> str:
    """The letter of a half, in the middle entry of its range."""
    x, y = map_place(entries[len(entries) * 9 // 16])
    return text(x + CELL // 2, y + CELL - 2, look.letter, size=10, at="middle")


def _row_number(row: int) -> str:
    x, y = map_place(row * MAP_COLUMNS)
    return text(x - 5, y + CELL - 3, str(row * MAP_COLUMNS), size=10, colour="#555", at="end")


def _root_legend(ranges: dict[str, range]) -> list[str]:
    parts = []
    for number, (name, entries) in enumerate(ranges.items()):
        x = map_place(0)[0] + number * 150
        parts.append(tile(x, 221, HALF_LOOKS[name]))
        parts.append(text(x + 17, 231, f"{name}: {entries.start}..{entries.stop - 1}", size=10))
    return parts


# -- bars


class Mark(NamedTuple):
    """A GPA to mark in the halves. gpaw: 48 or 52."""

    gpaw: int
    what: str
    gpa: int


def halves(marks: Sequence[Mark], ax: Axes) -> Axes:
    """The GPA space of one width as a bar in two halves, with a line at the first mark and a dotted
    one at the others. All marks have one width.
    """
    gpaw = marks[0].gpaw
    half = (1 << shared_bit(gpaw)) // _TIB
    if ax.get_gid() != f"halves {gpaw}":
        ax.clear()
        ax.set_gid(f"halves {gpaw}")
        _draw_halves(ax, gpaw, half)
    for line, mark in zip(ax.lines, marks, strict=True):
        line.set_xdata([mark.gpa / _TIB] * 2)
    return ax


def _draw_halves(ax: Axes, gpaw: int, half: int) -> None:
    for number, look in enumerate(HALF_LOOKS.values()):
        ax.barh(
            0,
            half,
            left=number * half,
            color=look.colour,
            hatch=look.hatch,
            edgecolor=BLACK,
            linewidth=0.5,
            height=0.6,
        )
        box = {"boxstyle": "square,pad=0.2", "facecolor": "white", "edgecolor": "none"}
        name = f"{look.letter} {look.name}: bit {shared_bit(gpaw)} = {number}"
        place = (number + 0.5) * half
        ax.text(place, 0, name, ha="center", va="center", fontsize=FONT, bbox=box)
    ax.plot([0, 0], [-0.45, 0.45], color=CURSOR, linewidth=3)
    ax.plot([0, 0], [-0.45, 0.45], color=BLACK, linewidth=1.5, linestyle=":")
    ax.set_xlim(-half * 0.01, 2 * half * 1.005)
    ax.set_ylim(-0.5, 0.5)
    ax.set_yticks([])
    ax.set_xticks([number * half // 2 for number in range(5)])
    ax.tick_params(labelsize=FONT, length=2)
    title = f"GPA space at GPAW {gpaw}: chosen GPA (solid line), its alias (dotted)"
    ax.set_title(title, fontsize=FONT + 1, loc="left")
    ax.set_xlabel("TiB", fontsize=FONT)
    ax.spines[["top", "right", "left"]].set_visible(False)


class SpaceRow(NamedTuple):
    """TiB in each half of the GPA space at one width."""

    gpaw: int
    private_tib: int
    shared_tib: int


def space_rows(gpaws: Sequence[int]) -> list[SpaceRow]:
    """The halves at some widths."""
    sizes = [(gpaw, (1 << shared_bit(gpaw)) // _TIB) for gpaw in gpaws]
    return [SpaceRow(gpaw, size, size) for gpaw, size in sizes]


def space(rows: Sequence[SpaceRow], ax: Axes) -> Axes:
    """Both halves at every width, on one scale. rows: of `space_rows`."""
    names = [f"GPAW {row.gpaw}" for row in rows]
    series = [
        Series(HALF_LOOKS[PRIVATE], [row.private_tib for row in rows]),
        Series(HALF_LOOKS[SHARED], [row.shared_tib for row in rows]),
    ]
    return stacked_bars(ax, names, series, unit="TiB", title="The two halves of the GPA space")


class LevelReach(NamedTuple):
    """What one entry of a level covers, as a power of two in bytes."""

    name: str
    power: int


def level_reach(gpaw: int) -> list[LevelReach]:
    """Every level of a TD's tables, the root's first."""
    return [
        LevelReach(level_name(level), level_size(level - 1).bit_length() - 1)
        for level in _down(gpaw)
    ]


def levels(rows: Sequence[LevelReach], ax: Axes) -> Axes:
    """Bits of the address below each level's index. rows: of `level_reach`."""
    names, powers = [row.name for row in rows], [row.power for row in rows]
    looks = [PLAIN] * len(rows)
    return bars(ax, names, powers, looks, unit="one entry covers 2^n bytes", title="Levels")


class GfnReach(NamedTuple):
    """Where some range of gfns ends, as a power of two. kind: "host", "private" or "shared"."""

    what: str
    kind: str
    power: int


_HOST = Look("host", GREY, BLACK, "H", "--")


def gfn_reach(gpaw: int, hosts: Sequence[int]) -> list[GfnReach]:
    """The max_gfn of hosts of some MAXPHYADDR, and the halves of a TD's root."""
    ends = [
        GfnReach(f"host, MAXPHYADDR {width}", "host", MmuParams(maxphyaddr=width).max_gfn + 1)
        for width in hosts
    ]
    bit = gfn_shared_bit(gpaw)
    ends += [
        GfnReach("TD, private half", PRIVATE, bit),
        GfnReach("TD, shared half", SHARED, 2 * bit),
    ]
    return [row._replace(power=row.power.bit_length() - 1) for row in ends]


def reach(rows: Sequence[GfnReach], ax: Axes) -> Axes:
    """How far gfns go on each host and in each half. rows: of `gfn_reach`."""
    looks = [HALF_LOOKS.get(row.kind, _HOST) for row in rows]
    names, powers = [row.what for row in rows], [row.power for row in rows]
    return bars(ax, names, powers, looks, unit="gfns end at 2^n", title="How far gfns go")
