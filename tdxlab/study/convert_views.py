"""Drawings of a conversion: one strip of 16 pages for each table, and one for what a page holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tdxlab.study.convert_lab import PRIVATE_CONTENT, SHARED_CONTENT, ZEROS, PageRow
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HALF_LOOKS,
    ORANGE,
    PURPLE,
    SEPT_LOOKS,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Look,
)
from tdxlab.study.svg import count_text, drawing, text, tile

_TILE = 23
_LEFT = 2
_TOP = 16
_HEIGHT = 62

#: What a page holds for its reader -> its look.
CONTENT_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look(PRIVATE_CONTENT, GREEN, BLACK, "P", ""),
        Look(SHARED_CONTENT, ORANGE, BLACK, "S", "//"),
        Look(ZEROS, GREY, BLACK, "0", "--"),
    )
}

#: KVM's leaf entries in the mirror and in the direct EPT -> their looks.
_MIRROR_LOOKS = {
    "mapped": Look("mapped", GREEN, BLACK, "M", ""),
    "frozen": Look("frozen", PURPLE, BLACK, "F", "xx"),
}
_DIRECT_LOOKS = {"mapped": Look("mapped", ORANGE, BLACK, "M", "//")}

#: SEAMCALL of a conversion, by the last part of its name -> its look in bars.
CALL_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look("RANGE.BLOCK", VERMILLION, BLACK, "B", "xx"),
        Look("TRACK", YELLOW, BLACK, "T", ".."),
        Look("PAGE.REMOVE", GREY, BLACK, "R", "--"),
        Look("PAGE.WBINVD", SKY, BLACK, "W", "\\\\"),
        Look("SEPT.ADD", BLUE, WHITE, "S", ""),
        Look("PAGE.AUG", GREEN, BLACK, "A", "//"),
    )
}


def short_name(leaf: str) -> str:
    """The name of a leaf as bars show it: "TDH.MEM.PAGE.AUG" -> "PAGE.AUG"."""
    return leaf.removeprefix("TDH.").removeprefix("MEM.").removeprefix("PHYMEM.")


class Strip(NamedTuple):
    """One row of tiles. look: of a page; None leaves it empty."""

    heading: str
    rest: str
    look: Callable[[PageRow], Look | None]


def _external(row: PageRow) -> Look | None:
    return SEPT_LOOKS[row.external] if row.external != "FREE" else None


#: What is shown of the pages, two strips in a row.
STRIPS = (
    Strip("Attributes", "", lambda row: HALF_LOOKS[row.attribute]),
    Strip("Direct EPT (shared)", "empty", lambda row: _DIRECT_LOOKS.get(row.direct)),
    Strip("Mirror EPT (KVM's copy)", "empty", lambda row: _MIRROR_LOOKS.get(row.mirror)),
    Strip("External: the Secure EPT", "FREE", _external),
    Strip("What the guest would read", "", lambda row: CONTENT_LOOKS[row.guest_reads]),
    Strip("What the VMM reads", "", lambda row: CONTENT_LOOKS[row.vmm_reads]),
)


def strip_svg(strip: Strip, rows: Sequence[PageRow], chosen: range) -> str:
    """One strip; `chosen` pages are underlined."""
    looks = [strip.look(row) for row in rows]
    body = []
    for row, look in zip(rows, looks, strict=True):
        x = _LEFT + row.page * _TILE
        body.append(text(x + _TILE // 2, 11, str(row.page), size=9, at="middle", colour="#555"))
        if look is None:
            body.append(
                f'<rect x="{x}" y="{_TOP}" width="{_TILE}" height="{_TILE}" fill="#fff" '
                f'stroke="#ddd"/>'
            )
        else:
            body.append(tile(x, _TOP, look, size=_TILE, hint=f"page {row.page}: {look.name}"))
    body.append(_underline(chosen))
    body.append(_legend([look for look in looks if look is not None]))
    said = f"{strip.heading}: {_count(looks, strip.rest)}"
    return drawing(_LEFT * 2 + _TILE * len(rows), _HEIGHT, said, body)


def _underline(chosen: range) -> str:
    if not chosen:
        return ""
    x, width = _LEFT + chosen.start * _TILE, len(chosen) * _TILE
    return (
        f'<rect class="tdxlab-chosen" x="{x}" y="{_TOP + _TILE + 1}" width="{width}" height="3" '
        'fill="#000"/>'
    )


def _legend(looks: Sequence[Look]) -> str:
    parts, x, y = [], _LEFT, _TOP + _TILE + 18
    for look in dict.fromkeys(looks):
        parts.append(tile(x, y - 10, look, size=12))
        parts.append(text(x + 16, y, look.name, size=10))
        x += 26 + 7 * len(look.name)
    return "".join(parts)


def _count(looks: Sequence[Look | None], rest: str) -> str:
    """How many pages of each look, in words."""
    said = count_text([look for look in looks if look is not None], "page")
    return said.replace("the rest free", f"the rest {rest}").removesuffix(", the rest ")


def strips(rows: Sequence[PageRow], chosen: range) -> dict[str, str]:
    """Heading -> SVG of every strip."""
    return {strip.heading: strip_svg(strip, rows, chosen) for strip in STRIPS}
