"""Pictures of a measurement log: a map of the image, one record byte by byte, the bytes over time.

All are pure functions of an image, its log and how many records are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.study.measured_launch import MEASURED_LEAVES
from tdxlab.study.measurement_log import (
    BLOCK_SIZE,
    CHUNKS,
    EXTEND,
    PAGE_ADD,
    Image,
    Record,
)
from tdxlab.study.palette import BLACK, BLUE, CURSOR, GREEN, GREY, PURPLE, WHITE, Look
from tdxlab.study.plots import FONT, Series, stacked_bars
from tdxlab.study.show import Drawing
from tdxlab.study.svg import drawing, text
from tdxlab.tape import Action

ADDED = Look("GPA hashed", GREEN, BLACK, "A", "")
EXTENDED = Look("content hashed", PURPLE, BLACK, "E", "//")
ADD_TO_COME = Look("GPA to come", WHITE, "#555555", "a", "")
EXTEND_TO_COME = Look("content to come", WHITE, "#555555", "e", "")
NEVER = Look("never hashed", GREY, BLACK, "-", "--")
LOOKS = (ADDED, EXTENDED, ADD_TO_COME, EXTEND_TO_COME, NEVER)

_CELL, _ROW, _LEFT, _TOP = 16, 22, 122, 34
_ADD_COLUMN, _FIRST_CHUNK = 0, 1


class Cell(NamedTuple):
    """One cell of the map. page: place in the image; column: 0 for the page's GPA, 1..16 for its
    chunks 0..15.
    """

    page: int
    column: int


def cell_of(record: Record) -> Cell:
    """The cell that a record fills."""
    column = _ADD_COLUMN if record.chunk is None else _FIRST_CHUNK + record.chunk
    return Cell(record.page, column)


def cells(image: Image, log: Sequence[Record], done: int) -> dict[Cell, Look]:
    """Every cell of the map after the first `done` records of `log`."""
    looks = {
        Cell(place, column): NEVER for place in range(len(image)) for column in range(CHUNKS + 1)
    }
    for number, record in enumerate(log):
        if number < done:
            looks[cell_of(record)] = ADDED if record.call == PAGE_ADD else EXTENDED
        elif looks[cell_of(record)] is NEVER:
            looks[cell_of(record)] = ADD_TO_COME if record.call == PAGE_ADD else EXTEND_TO_COME
    return looks


def different_cells(image: Image, original: Image) -> set[Cell]:
    """The cells in which `image` differs from `original`, page by page: GPA or content."""
    found = set()
    for place, page in enumerate(image):
        if place >= len(original) or page.gpa != original[place].gpa:
            found.add(Cell(place, _ADD_COLUMN))
        for number in range(CHUNKS):
            if place >= len(original) or page.chunk(number) != original[place].chunk(number):
                found.add(Cell(place, _FIRST_CHUNK + number))
    return found


def image_map(
    image: Image, log: Sequence[Record], done: int, different: set[Cell] | frozenset[Cell]
) -> str:
    """An SVG with a row for each page: its GPA's cell, then its 16 chunks of 256 bytes.

    done: records that are hashed already; the last of them has a thick frame. different: cells
    marked with a corner.
    """
    looks = cells(image, log, done)
    width, height = _LEFT + (CHUNKS + 1) * _CELL + 8, _TOP + max(len(image), 1) * _ROW + 44
    body = [_header()]
    body += [_row_label(place, page.section, page.gpa) for place, page in enumerate(image)]
    body += [_cell(cell, look) for cell, look in looks.items()]
    if done:
        body.append(_frame(cell_of(log[done - 1])))
    body += [_corner(cell) for cell in sorted(different)]
    body.append(_legend(height - 26))
    return drawing(width, height, map_text(image, log, done, different), body)


def map_text(
    image: Image, log: Sequence[Record], done: int, different: set[Cell] | frozenset[Cell]
) -> str:
    """What the map shows, in words."""
    looks = list(cells(image, log, done).values())
    counts = ", ".join(f"{looks.count(look)} {look.name}" for look in LOOKS if look in looks)
    marked = f"; {len(different)} cells differ from the original" if different else ""
    return f"Image of {len(image)} pages, 17 cells each: {counts or 'none'}{marked}"


def image_drawing(image: Image, log: Sequence[Record]) -> Drawing:
    """The map of an image after its whole log, for the end of a notebook cell."""
    args = (image, log, len(log), frozenset[Cell]())
    return Drawing(image_map(*args), map_text(*args))


def _place(cell: Cell) -> tuple[int, int]:
    gap = 6 if cell.column else 0
    return _LEFT + cell.column * _CELL + gap, _TOP + cell.page * _ROW


def _header() -> str:
    first, last = Cell(0, _FIRST_CHUNK), Cell(0, CHUNKS)
    y = _TOP - 6
    return (
        text(1, 13, "image: what is hashed of each page", size=12)
        + text(_LEFT + _CELL // 2, y, "GPA", size=10, at="middle")
        + text(_place(first)[0], y, "chunk 0", size=10)
        + text(_place(last)[0] + _CELL, y, "15", size=10, at="end")
    )


def _row_label(place: int, section: str, gpa: int) -> str:
    y = _TOP + place * _ROW + 13
    return text(1, y, f"{place}  {section}", size=11) + text(
        _LEFT - 6, y, f"{gpa:#x}", size=10, at="end"
    )


def _cell(cell: Cell, look: Look) -> str:
    x, y = _place(cell)
    what = "GPA" if cell.column == _ADD_COLUMN else f"chunk {cell.column - _FIRST_CHUNK}"
    hint = escape(f"page {cell.page}, {what}: {look.name}")
    return (
        f'<g><title>{hint}</title><rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" '
        f'fill="{look.colour}" stroke="#444"/><text x="{x + _CELL // 2}" y="{y + 13}" '
        f'font-size="11" fill="{look.ink}" text-anchor="middle">{look.letter}</text></g>'
    )


def _corner(cell: Cell) -> str:
    x, y = _place(cell)
    return f'<path class="different" d="M{x + _CELL} {y}h-8l8 8z" fill="{CURSOR}"/>'


def _frame(cell: Cell) -> str:
    x, y = _place(cell)
    return (
        f'<rect class="current" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="none" '
        f'stroke="{CURSOR}" stroke-width="3"/>'
    )


def _legend(y: int) -> str:
    parts = []
    for number, look in enumerate((ADDED, EXTENDED, NEVER)):
        x = 1 + 132 * number
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{look.colour}" '
            f'stroke="#444"/>' + text(x + 3, y, look.letter, size=9)
        )
        parts.append(text(x + 17, y, look.name, size=10))
    notes = "a, e: to come; thick frame: last record; corner: differs from the original"
    parts.append(text(1, y + 17, notes, size=10))
    return "".join(parts)


# -- one record, byte by byte


def hex_lines(record: Record) -> list[str]:
    """A record as a hex dump, 16 bytes a line, each with the name of its field.

    Runs of equal lines of zeros are one line with "*".
    """
    lines: list[str] = []
    data = record.data
    for offset in range(0, len(data), 16):
        piece = data[offset : offset + 16]
        if offset >= 32 and not any(piece) and offset < BLOCK_SIZE:
            if lines[-1] != "*":
                lines.append("*")
            continue
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        words = " ".join(piece[start : start + 4].hex() for start in range(0, 16, 4))
        lines.append(f"{offset:03x}  {words}  {shown} {_field(offset)}")
    return lines


def _field(offset: int) -> str:
    if offset == 0:
        return "name"
    if offset == 16:
        return "GPA"
    return "zero" if offset < BLOCK_SIZE else "data"


def record_html(number: int, total: int, record: Record | None, what: str) -> str:
    """The hex dump of the record that a call added, with a heading; `what` if it added none.

    number: of the record, counted from 1; total: records of the whole log.
    """
    if record is None:
        head, body = f"{number} of {total} records so far", what
    else:
        head = f"record {number} of {total}: {record.call}, {len(record.data)} bytes"
        body = "\n".join(hex_lines(record))
    return (
        '<pre class="tdxlab-record" style="font-size:11px;line-height:1.25;margin:6px 0 0;'
        f'min-height:320px">{escape(head)}\n\n{escape(body)}</pre>'
    )


# -- bytes of a log


class PageBytes(NamedTuple):
    """How many bytes of the measurement stem from one page."""

    page: str
    add_bytes: int
    extend_bytes: int


def bytes_by_page(image: Image, log: Sequence[Record], done: int | None = None) -> list[PageBytes]:
    """Bytes hashed for each page of `image` by the first `done` records (all if None)."""
    made = log[:done]
    return [
        PageBytes(
            f"{place} {page.section} {page.gpa:#x}",
            sum(len(r.data) for r in made if r.page == place and r.call == PAGE_ADD),
            sum(len(r.data) for r in made if r.page == place and r.call == EXTEND),
        )
        for place, page in enumerate(image)
    ]


def page_bytes_bars(rows: Sequence[PageBytes], ax: Axes) -> Axes:
    """Bars of `bytes_by_page`: bytes hashed for each page, by call."""
    series = [
        Series(ADDED._replace(name="MEM.PAGE.ADD"), [row.add_bytes for row in rows]),
        Series(EXTENDED._replace(name="MR.EXTEND"), [row.extend_bytes for row in rows]),
    ]
    names = [row.page for row in rows]
    return stacked_bars(ax, names, series, unit="bytes hashed", title="MRTD, by page")


class BytesPoint(NamedTuple):
    """Bytes hashed by the first `calls` SEAMCALLs of a build."""

    calls: int
    hashed: int


def bytes_over_calls(actions: Sequence[Action], log: Sequence[Record]) -> list[BytesPoint]:
    """Bytes hashed after each SEAMCALL among `actions`; the first row is 0."""
    points, waiting = [BytesPoint(0, 0)], iter(log)
    for action in actions:
        if action.kind == "SEAMCALL":
            size = len(next(waiting).data) if action.name in MEASURED_LEAVES else 0
            points.append(BytesPoint(points[-1].calls + 1, points[-1].hashed + size))
    return points


def bytes_curve(rows: Sequence[BytesPoint], ax: Axes, *, calls: int, hashed: int) -> Axes:
    """A step curve of `bytes_over_calls`. calls, hashed: how far the axes reach."""
    if ax.get_gid() != "bytes":
        ax.clear()
        ax.set_gid("bytes")
        ax.plot([], [], drawstyle="steps-post", color=BLUE, linewidth=1.5)
        ax.plot([], [], marker="o", color=CURSOR, markersize=5)
        ax.set_title("MRTD, call by call", fontsize=FONT + 1, loc="left")
        ax.set_xlabel("SEAMCALLs", fontsize=FONT)
        ax.set_ylabel("bytes hashed so far", fontsize=FONT)
        ax.tick_params(labelsize=FONT, length=2)
        ax.spines[["top", "right"]].set_visible(False)
    curve, cursor = ax.lines
    curve.set_data([row.calls for row in rows], [row.hashed for row in rows])
    cursor.set_data([rows[-1].calls], [rows[-1].hashed])
    ax.set_xlim(0, max(calls, 1) * 1.02)
    ax.set_ylim(0, max(hashed, 1) * 1.05)
    return ax
