"""Drawings of a teardown: the host's page ledger, the module's view of it, KeyIDs, bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes

from tdxlab.study import plots
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PAGE_TYPE_LOOKS,
    SKY,
    VERMILLION,
    WHITE,
    Look,
)
from tdxlab.study.show import Drawing
from tdxlab.study.svg import drawing, text, tile
from tdxlab.study.teardown_lab import (
    FREE,
    IN_USE,
    KEYID_FIRST,
    KEYID_LAST,
    LEAKED,
    ROLES,
    KeyLine,
    PageRow,
    TeardownLab,
)
from tdxlab.study.teardown_tables import CostRow, OrderRow, TimeRow

_TILE, _STEP, _LEFT, _TOP, _COLUMNS = 13, 14, 74, 6, 24

#: What the host has of a page -> its look.
HOST_LOOKS = {
    IN_USE: Look(IN_USE, SKY, BLACK, "U", ""),
    FREE: Look(FREE, WHITE, BLACK, "F", ""),
    LEAKED: Look(LEAKED, VERMILLION, BLACK, "L", "xx"),
}

#: Order -> its look in plots.
ORDER_LOOKS = {
    KEYID_LAST: Look(KEYID_LAST, ORANGE, BLACK, "4", "//"),
    KEYID_FIRST: Look(KEYID_FIRST, GREEN, BLACK, "1", ""),
}
_EXPECTED = Look("expected", GREY, BLACK, "E", "--")
_COUNTED = Look("counted", BLUE, WHITE, "C", "")
_MODELLED = "modelled, illustrative"


def _grid(rows: Sequence[PageRow], look_of: Callable[[PageRow], Look], said: str) -> str:
    """One line of tiles for each role, in the order of the ledger."""
    body, y = [], _TOP
    for role in ROLES:
        pages = [row for row in rows if row.role == role]
        if not pages:
            continue
        body.append(text(2, y + 11, f"{role} {len(pages)}", size=10))
        for place, row in enumerate(pages):
            look = look_of(row)
            hint = f"{role} {row.hpa:#x}: {look.name}{f', {row.cause}' if row.cause else ''}"
            body.append(tile(_LEFT + place * _STEP, y, look, size=_TILE, hint=hint))
        y += _STEP + 3
    body.append(_legend([look_of(row) for row in rows], y + 14))
    return drawing(_LEFT + _COLUMNS * _STEP + 4, y + 22, said, body)


def _legend(looks: Sequence[Look], y: int) -> str:
    parts, x = [], 2
    for look in sorted(set(looks)):
        parts += [tile(x, y - 11, look, size=12), text(x + 15, y - 1, look.name, size=10)]
        x += 24 + 7 * len(look.name)
    return "".join(parts)


def _count(names: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def host_svg(rows: Sequence[PageRow]) -> str:
    """The host's ledger: each page in use, free or leaked."""
    said = f"Page ledger of the host: {_count([row.host for row in rows])}"
    return _grid(rows, lambda row: HOST_LOOKS[row.host], said)


def module_svg(rows: Sequence[PageRow]) -> str:
    """The same pages in the PAMT."""
    said = f"The same pages in the PAMT: {_count([row.module for row in rows])}"
    return _grid(rows, lambda row: PAGE_TYPE_LOOKS[row.module], said)


def ledger_drawing(lab: TeardownLab) -> Drawing:
    """The ledger of a lab, for the end of a cell."""
    rows = lab.ledger()
    lines = []
    for role in ROLES:
        letters = [HOST_LOOKS[row.host].letter for row in rows if row.role == role]
        lines += [f"{role:10} {''.join(letters)}"] * bool(letters)
    return Drawing(host_svg(rows), "\n".join([*lines, "U in use, F free, L leaked"]))


def key_table(keys: Sequence[KeyLine]) -> str:
    """The KeyIDs as an HTML table."""
    return _table(
        ("KeyID", "the host gave it to", "in the module", "packages to write back"),
        [(f"{key.keyid:#x}", key.host, key.module, str(key.to_write_back)) for key in keys],
    )


def cause_table(rows: Sequence[PageRow]) -> str:
    """Why pages leaked: each cause once, with how many pages of which roles."""
    leaked = [row for row in rows if row.host == LEAKED]
    if not leaked:
        return '<p style="line-height:1.4">nothing is leaked</p>'
    found = [
        (cause, _count([row.role for row in leaked if row.cause == cause]))
        for cause in dict.fromkeys(row.cause for row in leaked)
    ]
    return _table(("cause", "pages"), found)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" style="text-align:left">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    style = "font-size:12px;line-height:1.3;max-width:400px;overflow-wrap:break-word"
    return f'<table style="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


# -- bars and curves


def plot_costs(rows: Sequence[CostRow], ax: Axes) -> Axes:
    """SEAMCALLs counted so far beside those expected, for each phase. rows: of `cost_rows`."""
    names, values, looks = [], [], []
    for row in rows[:-1]:
        for look, value in ((_EXPECTED, row.expected), (_COUNTED, row.counted)):
            names.append(f"{row.phase} = {row.formula}" if look is _EXPECTED else look.name)
            values.append(value)
            looks.append(look)
    return plots.bars(ax, names, values, looks, unit="SEAMCALLs", title="expected, counted")


def plot_orders(rows: Sequence[OrderRow], ax: Axes) -> Axes:
    """SEAMCALLs of a whole teardown against private memory. rows: of `order_rows`."""
    ax.clear()
    memory = [row.memory_gib for row in rows]
    for look, calls in (
        (ORDER_LOOKS[KEYID_LAST], [row.keyid_last / 1e6 for row in rows]),
        (ORDER_LOOKS[KEYID_FIRST], [row.keyid_first / 1e6 for row in rows]),
    ):
        ax.plot(memory, calls, color=look.colour, marker=f"${look.letter}$", label=look.name)
    ax.set_title("SEAMCALLs of a teardown, by formula", fontsize=plots.FONT + 1, loc="left")
    ax.set_xlabel("private memory, GiB", fontsize=plots.FONT)
    ax.set_ylabel("SEAMCALLs, millions", fontsize=plots.FONT)
    ax.tick_params(labelsize=plots.FONT)
    ax.legend(fontsize=plots.FONT, frameon=False)
    return ax


def plot_times(rows: Sequence[TimeRow], ax: Axes) -> Axes:
    """Published seconds beside modelled ones. rows: of `time_rows`."""
    names, values, looks = [], [], []
    for row in rows:
        who = f"{row.vcpus} vCPUs, {row.memory_gb} GB, {row.order}"
        look = ORDER_LOOKS[row.order]
        for name, value, colour in (
            (who, row.published_s, look.colour),
            (_MODELLED, row.modelled_s, GREY),
        ):
            names.append(name)
            values.append(value)
            looks.append(
                Look(name, colour, BLACK, look.letter, look.hatch if name == who else "--")
            )
    return plots.bars(ax, names, values, looks, unit="seconds", title="published, and modelled")


def time_picture(rows: Sequence[Any]) -> Any:
    """`plot_times` for the end of a cell."""
    return plots.picture(plot_times, rows, height=3.6)
