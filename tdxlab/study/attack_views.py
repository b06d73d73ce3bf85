"""Drawings of an attack: its moves, the secret's line byte by byte, the page line by line."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from matplotlib.axes import Axes

from tdxlab.attacks.stage import DATA, SECRET, Move, Stage
from tdxlab.memory import LINE_SIZE, MachineCheck
from tdxlab.study import plots
from tdxlab.study.attack_tables import (
    FORGED,
    HOSTS,
    LINES,
    OTHERS,
    POISONED,
    VICTIM,
    StopperRow,
    held_page,
    move_rows,
    owners,
    peek,
    place_rows,
)
from tdxlab.study.palette import (
    BLACK,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Look,
)
from tdxlab.study.show import Drawing, Picture
from tdxlab.study.svg import count_text, drawing, text, tile

_CELL, _ROW, _LEFT, _COLUMNS = 23, 18, 4, 16
_TILE = 22

#: Whose a line is -> its look.
OWNER_LOOKS = {
    VICTIM: Look(VICTIM, GREEN, BLACK, "V", ""),
    HOSTS: Look(HOSTS, ORANGE, BLACK, "H", "//"),
    OTHERS: Look(OTHERS, SKY, BLACK, "O", "\\\\"),
    FORGED: Look(FORGED, PURPLE, BLACK, "F", "xx"),
    POISONED: Look(POISONED, VERMILLION, BLACK, "P", "xx"),
}

#: What the host has from an attack -> its look in bars.
GAIN_LOOKS = {
    "nothing": Look("nothing", GREEN, BLACK, "N", ""),
    "denial of service": Look("denial of service", GREY, BLACK, "D", "--"),
    "traffic analysis": Look("traffic analysis", YELLOW, BLACK, "T", ".."),
    "replay": Look("replay", VERMILLION, BLACK, "R", "xx"),
}


class _Grid(NamedTuple):
    """64 bytes to draw. name: whose view it is; seen: the bytes, or the fault."""

    name: str
    seen: bytes | MachineCheck


def line_svg(stage: Stage) -> str:
    """The secret's line as the victim reads it and as the memory holds it, 16 bytes in a row. Bytes
    that are those of the secret are green and underlined.
    """
    memory = stage.machine.memory
    grids = [
        _Grid("as the victim would read it", peek(stage, stage.data_hpa, stage.keyid)),
        _Grid("as the host and the bus see it", memory.ciphertext(stage.data_hpa)),
    ]
    body, said, y = [], [], 0
    for grid in grids:
        body += [text(_LEFT, y + 13, grid.name, size=11), *_bytes_svg(grid.seen, y + 20)]
        said.append(f"{grid.name}: {_alike_text(grid.seen)}")
        y += 24 + LINE_SIZE // _COLUMNS * _ROW + 6
    return drawing(_LEFT * 2 + _COLUMNS * _CELL, y, "; ".join(said), body)


def _alike_text(seen: bytes | MachineCheck) -> str:
    if isinstance(seen, MachineCheck):
        return "a machine check"
    alike = sum(a == b for a, b in zip(seen, SECRET, strict=True))
    return f"{alike} of {LINE_SIZE} bytes are those of the secret"


def _bytes_svg(seen: bytes | MachineCheck, top: int) -> list[str]:
    if isinstance(seen, MachineCheck):
        return [text(_LEFT, top + 14, "machine check: no byte of it", colour=VERMILLION)]
    parts = []
    for place, (byte, wanted) in enumerate(zip(seen, SECRET, strict=True)):
        x, y = _LEFT + place % _COLUMNS * _CELL, top + place // _COLUMNS * _ROW
        look = GREEN if byte == wanted else WHITE
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_ROW}" fill="{look}" stroke="#ccc"/>'
        )
        line = f'<path d="M{x + 4} {y + 15}h15" stroke="#000"/>' if byte == wanted else ""
        parts.append(text(x + _CELL // 2, y + 13, f"{byte:02x}", size=10, at="middle") + line)
    return parts


def owner_svg(stage: Stage) -> str:
    """The 64 lines of the data page, 16 in a row, each with the letter of whose it is."""
    found = owners(stage)
    body = []
    for place, owner in enumerate(found):
        x, y = _LEFT + place % _COLUMNS * _TILE, 4 + place // _COLUMNS * _TILE
        body.append(tile(x, y, OWNER_LOOKS[owner], size=_TILE, hint=f"line {place}: {owner}"))
    bottom = 4 + LINES // _COLUMNS * _TILE
    body.append(_legend([OWNER_LOOKS[name] for name in dict.fromkeys(found)], bottom + 18))
    said = f"Lines of the data page: {count_text([OWNER_LOOKS[name] for name in found], 'line')}"
    said = said.removesuffix(", the rest free")
    return drawing(_LEFT * 2 + _COLUMNS * _TILE, bottom + 26, said, body)


def _legend(looks: Sequence[Look], y: int) -> str:
    parts, x = [], _LEFT
    for look in looks:
        parts += [tile(x, y - 11, look, size=12), text(x + 16, y - 1, look.name, size=10)]
        x += 26 + 7 * len(look.name)
    return "".join(parts)


def move_list(moves: Sequence[Move], position: int) -> str:
    """The moves as an ordered list: those that were made with their answers, the latest in bold,
    those to come without.
    """
    items = []
    for row in move_rows(moves):
        said = f"<em>{escape(row.who)}</em> <code>{escape(row.what)}</code>"
        if row.move <= position:
            said += f" &rarr; {escape(row.answer)}"
        latest = row.move == position
        weight = "font-weight:bold;border-left:4px solid #0072b2" if latest else "color:#555"
        style = weight if row.move >= position else ""
        current = ' aria-current="step"' if latest else ""
        items.append(f'<li{current} style="{style};padding-left:4px">{said}</li>')
    style = "font-size:12px;line-height:1.35;margin:4px 0 0 24px;padding:0;overflow-wrap:anywhere"
    return f'<ol style="{style}">{"".join(items)}</ol>'


def place_list(stage: Stage) -> str:
    """What module and CPU have of the page, in a line each."""
    items = [f"<li>{escape(row.what)}: {escape(row.value)}</li>" for row in place_rows(stage)]
    style = "font-size:12px;line-height:1.35;margin:4px 0 0 16px;padding:0"
    return f'<ul style="{style}">{"".join(items)}</ul>'


def line_drawing(stage: Stage) -> Drawing:
    """`line_svg` for the end of a cell."""
    victim, memory = peek(stage, stage.data_hpa, stage.keyid), stage.machine.memory
    held = memory.ciphertext(stage.data_hpa)
    lines = [f"the victim reads {_alike_text(victim)}", f"the memory holds {_alike_text(held)}"]
    return Drawing(line_svg(stage), "\n".join([*lines, held.hex()]))


def owner_drawing(stage: Stage) -> Drawing:
    """`owner_svg` for the end of a cell."""
    letters = "".join(OWNER_LOOKS[name].letter for name in owners(stage))
    rows = [letters[place : place + _COLUMNS] for place in range(0, LINES, _COLUMNS)]
    names = ", ".join(f"{look.letter} {name}" for name, look in OWNER_LOOKS.items())
    return Drawing(owner_svg(stage), "\n".join([*rows, names]))


# -- the page as a picture, and bars


def plot_page(page: bytes, ax: Axes, title: str) -> Axes:
    """A page as a picture: a row for each line, a dot for each byte, 0 black and 255 white."""
    dots = [list(page[place : place + LINE_SIZE]) for place in range(0, len(page), LINE_SIZE)]
    if not ax.images:
        ax.imshow(dots, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        ax.set_xlabel("byte of the line", fontsize=plots.FONT)
        ax.set_ylabel("line of the page", fontsize=plots.FONT)
        ax.tick_params(labelsize=plots.FONT)
    ax.images[0].set_data(dots)
    ax.set_title(title, fontsize=plots.FONT + 1, loc="left")
    return ax


def plot_pages(stage: Stage, axes: Sequence[Axes]) -> Sequence[Axes]:
    """The data page as the victim wrote it, and beside it as the memory holds it now."""
    plot_page(DATA, axes[0], "what the victim has written")
    held = held_page(stage.machine.memory, stage.data_hpa)
    plot_page(held, axes[1], "what the memory holds")
    return axes


def page_picture(stage: Stage) -> Picture:
    """`plot_pages` for the end of a cell."""
    canvas = plots.Canvas(3.2)
    plot_pages(stage, plots.side_by_side(canvas.figure, 2, between=0.2))
    held = held_page(stage.machine.memory, stage.data_hpa)
    lines = [f"{name}: {page_text(page)}" for name, page in (("written", DATA), ("held", held))]
    return Picture(canvas.png(), "\n".join(lines))


def page_text(page: bytes) -> str:
    """How much order there is in a page."""
    lines = {page[place : place + LINE_SIZE] for place in range(0, len(page), LINE_SIZE)}
    return f"{len(set(page))} different bytes, {len(lines)} different lines of {LINES}"


def plot_stoppers(rows: Sequence[StopperRow], ax: Axes) -> Axes:
    """How many attacks each mechanism stops, and what the host has from them all the same. rows: of
    `stopper_rows`.
    """
    series = [
        plots.Series(look, [getattr(row, name.replace(" ", "_")) for row in rows])
        for name, look in GAIN_LOOKS.items()
    ]
    title = "what stops an attack, and what the host has from it all the same"
    names = [row.stopped_by for row in rows]
    return plots.stacked_bars(ax, names, series, unit="attacks", title=title)
