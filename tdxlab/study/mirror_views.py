"""Drawings of the two trees side by side: the walk to one gfn, and the lowest table on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.seam.sept import Septe
from tdxlab.study.mirror_lab import FROZEN, MAPPED, NO_TABLE, TABLE, MirrorLab, WalkRow
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SEPT_LOOKS,
    SKY,
    VERMILLION,
    WHITE,
    YELLOW,
    Look,
)
from tdxlab.study.show import Drawing
from tdxlab.study.svg import CELL, count_text, drawing, entry_map, map_place, text, tile

MIRROR_HEADING = "Mirror EPT: KVM's copy, plain memory"
EXTERNAL_HEADING = "External: the Secure EPT, the module's"

#: What a mirror entry is -> its look. FROZEN is found nowhere else.
MIRROR_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look(TABLE, BLUE, WHITE, "T", ""),
        Look(FROZEN, PURPLE, BLACK, "F", "xx"),
        Look(MAPPED, GREEN, BLACK, "M", ""),
    )
}

#: End of a leaf's name -> its look in bars.
CALL_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look("VP.ENTER", GREY, BLACK, "E", "--"),
        Look("SEPT.ADD", BLUE, WHITE, "S", ""),
        Look("PAGE.AUG", GREEN, BLACK, "A", "//"),
        Look("RANGE.BLOCK", VERMILLION, BLACK, "B", "xx"),
        Look("TRACK", YELLOW, BLACK, "T", ".."),
        Look("PAGE.REMOVE", PURPLE, BLACK, "R", "++"),
        Look("PAGE.WBINVD", SKY, BLACK, "W", "\\\\"),
    )
}

_WIDTH, _ROW, _TOP = 420, 21, 6
_COLUMN = 404


class Rung(NamedTuple):
    """One level of a walk in one tree. hpa: of the table, 0 if there is none. locked: the module
    holds the entry's lock.
    """

    level: str
    entry: int
    state: str
    raw: int
    hpa: int
    locked: bool = False


def mirror_rungs(rows: Sequence[WalkRow]) -> list[Rung]:
    """The mirror's side of a walk."""
    return [Rung(row.level, row.entry, row.mirror, row.spte, row.mirror_hpa) for row in rows]


def external_rungs(rows: Sequence[WalkRow]) -> list[Rung]:
    """The Secure EPT's side of a walk."""
    return [
        Rung(
            row.level,
            row.entry,
            row.external,
            row.septe,
            row.external_hpa,
            bool(row.septe & Septe.lock.mask),
        )
        for row in rows
    ]


def ladder(rungs: Sequence[Rung], looks: dict[str, Look], name: str) -> str:
    """A walk from the root down: for each level its table, index, letter, state and raw entry."""
    body = []
    for number, rung in enumerate(rungs):
        y = _TOP + number * _ROW
        body.append(text(2, y + 14, rung.level, size=11))
        if not rung.hpa:
            body.append(text(42, y + 14, "no table yet", size=10, colour="#555"))
            continue
        body.append(text(42, y + 14, f"{rung.hpa:#x} [{rung.entry}]", size=10))
        if rung.state in looks and rung.state != "FREE":
            hint = f"{rung.level} entry {rung.entry}: {rung.state}"
            body.append(tile(160, y + 1, looks[rung.state], size=17, hint=hint))
        locked = ", locked" if rung.locked else ""
        body.append(text(183, y + 14, rung.state + locked, size=11))
        body.append(text(_WIDTH - 2, y + 14, f"{rung.raw:#018x}", size=10, at="end"))
    said = ", ".join(f"{rung.level} {rung.state}" for rung in rungs)
    return drawing(_WIDTH, _TOP + len(rungs) * _ROW + 2, f"walk in the {name}: {said}", body)


def table_map(rung: Rung, cells: dict[int, Look], name: str) -> str:
    """The 512 entries of the lowest table on a walk; the walk's own entry is framed."""
    title = f"{name}: {rung.level} table, the walk's entry is {rung.entry}"
    x, y = map_place(rung.entry)
    frame = (
        f'<rect class="tdxlab-chosen" x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
        'fill="none" stroke="#000" stroke-width="3"/>'
    )
    return entry_map(cells, title=title).replace("</svg>", f"{frame}</svg>")


def _column(*drawings: str) -> str:
    """Drawings one below the other, so narrow that two columns fit beside each other."""
    return "".join(f'<div style="width:{_COLUMN}px">{one}</div>' for one in drawings)


def _lowest(rungs: Sequence[Rung]) -> Rung:
    return [rung for rung in rungs if rung.hpa][-1]


def mirror_view(lab: MirrorLab, gfn: int) -> str:
    """The walk to `gfn` in the mirror, and the lowest table on it."""
    rungs = mirror_rungs(lab.walk(gfn))
    low = _lowest(rungs)
    cells = {i: MIRROR_LOOKS[state] for i, state in lab.mirror_table(low.hpa).items()}
    return _column(ladder(rungs, MIRROR_LOOKS, "mirror"), table_map(low, cells, "mirror"))


def external_view(lab: MirrorLab, gfn: int) -> str:
    """The walk to `gfn` in the Secure EPT, and the lowest table on it."""
    rungs = external_rungs(lab.walk(gfn))
    low = _lowest(rungs)
    cells = {i: SEPT_LOOKS[state] for i, state in lab.external_table(low.hpa).items()}
    return _column(ladder(rungs, SEPT_LOOKS, "Secure EPT"), table_map(low, cells, "Secure EPT"))


def trees(lab: MirrorLab, gfn: int) -> dict[str, str]:
    """Heading -> SVG of both trees."""
    return {MIRROR_HEADING: mirror_view(lab, gfn), EXTERNAL_HEADING: external_view(lab, gfn)}


def frozen_drawing(lab: MirrorLab, gfn: int) -> Drawing:
    """The mirror's walk to `gfn`, for the end of a cell."""
    rungs = mirror_rungs(lab.walk(gfn))
    looks = [MIRROR_LOOKS[rung.state] for rung in rungs if rung.state in MIRROR_LOOKS]
    said = " ".join(f"{rung.level}:{rung.state}" for rung in rungs if rung.state != NO_TABLE)
    return Drawing(ladder(rungs, MIRROR_LOOKS, "mirror"), f"{said} ({count_text(looks, 'entry')})")
