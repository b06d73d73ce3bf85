"""The state diagram of a Secure EPT entry, as SVG: where it stands and where it can go.

Arrows are not drawn by hand: they are the results in the module's matrices. Only their places are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from tdxlab.arch import SEPT_LEVEL_NAMES
from tdxlab.study.palette import BLACK, SEPT_LOOKS, VERMILLION
from tdxlab.study.sept_moves import (
    LATER,
    LEGAL,
    MIGRATION_ONLY,
    MOVE_BY_NAME,
    REACHED,
    Edge,
    edges,
)
from tdxlab.study.svg import drawing, text, tile

WIDTH, HEIGHT = 490, 380
_BOX_WIDTH, _BOX_HEIGHT = 122, 36
_QUIET = "#9a9a9a"

#: State -> centre of its box, in pixels.
PLACES: dict[str, tuple[int, int]] = {
    "PENDING": (64, 42),
    "MAPPED": (64, 152),
    "NL_MAPPED": (64, 262),
    "FREE": (245, 152),
    "PENDING_BLOCKED": (426, 42),
    "BLOCKED": (426, 152),
    "NL_BLOCKED": (426, 262),
}

#: Moves whose arrows are drawn from the state of the chosen entry only: they would cross others.
_ON_DEMAND = ("PAGE.PROMOTE", "PAGE.DEMOTE", "PAGE.RELOCATE")

#: (before, after) -> how far the arrow bends to the right of its direction, in pixels, and where
#: along it (percent) its label stands.
_BENDS: dict[tuple[str, str], tuple[int, int]] = {
    ("MAPPED", "BLOCKED"): (-62, 50),
    ("BLOCKED", "MAPPED"): (-62, 50),
    ("PENDING", "PENDING_BLOCKED"): (-14, 50),
    ("PENDING_BLOCKED", "PENDING"): (-14, 50),
    ("NL_MAPPED", "NL_BLOCKED"): (-14, 50),
    ("NL_BLOCKED", "NL_MAPPED"): (-14, 50),
    ("BLOCKED", "NL_MAPPED"): (-34, 74),
    ("NL_BLOCKED", "MAPPED"): (-34, 74),
    ("NL_BLOCKED", "PENDING"): (66, 66),
    ("PENDING_BLOCKED", "NL_MAPPED"): (-66, 74),
    ("NL_MAPPED", "PENDING"): (98, 50),
    ("PENDING", "NL_MAPPED"): (-98, 50),
}
_USUAL_BEND = (-9, 50)


class View(NamedTuple):
    """What the diagram is drawn for: the chosen entry.

    state: of the entry, any other text for an entry without a table. level, top: its sept_level and
    the root's. is_building: before TDH.MR.FINALIZE. verdicts: move -> LEGAL, LATER or ILLEGAL.
    last: (before, after) of the last move.
    """

    state: str
    level: int
    top: int
    is_building: bool
    verdicts: Mapping[str, str]
    last: tuple[str, str] | None = None


class Labelled(NamedTuple):
    """All that leads from one state to another. kind: "last" if that was the last change, "open" if
    the chosen entry can go this way now, "later" if only after BLOCK and TRACK, else "quiet".
    """

    before: str
    after: str
    moves: tuple[str, ...]
    kind: str


def arrows_for(view: View) -> list[Labelled]:
    """The arrows to draw. Left out are moves that the TD's phase or the entry's level forbids, and
    those of _ON_DEMAND that start elsewhere.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for edge in edges():
        if _is_drawn(edge, view):
            grouped.setdefault((edge.before, edge.after), []).append(edge.move)
    return [
        Labelled(before, after, tuple(moves), _kind(before, after, moves, view))
        for (before, after), moves in grouped.items()
    ]


def _is_drawn(edge: Edge, view: View) -> bool:
    if edge.needs_build and not view.is_building:
        return False
    if edge.move == "PAGE.ACCEPT" and view.is_building:
        return False
    if not MOVE_BY_NAME[edge.move].takes_level(view.level, view.top):
        return False
    return edge.before == view.state or edge.move not in _ON_DEMAND


def _kind(before: str, after: str, moves: Sequence[str], view: View) -> str:
    if view.last == (before, after):
        return "last"
    if before != view.state:
        return "quiet"
    verdicts = [view.verdicts[move] for move in moves]
    return "open" if LEGAL in verdicts else "later" if LATER in verdicts else "quiet"


def diagram(counts: Mapping[str, int], view: View) -> str:
    """The diagram. counts: state -> entries of the TD in it."""
    arrows = arrows_for(view)
    phase = "before TDH.MR.FINALIZE" if view.is_building else "after TDH.MR.FINALIZE"
    heading = f"ways of a {SEPT_LEVEL_NAMES[view.level]} entry {phase}"
    body = [
        _MARKERS,
        *(_arrow(arrow) for arrow in sorted(arrows, key=lambda arrow: arrow.kind != "quiet")),
        *(_box(name, counts.get(name, 0), name == view.state) for name in REACHED),
        text(WIDTH // 2, 12, heading, size=10, colour="#555", at="middle"),
        *_greyed(),
    ]
    return drawing(WIDTH, HEIGHT, summary(counts, view), body)


def summary(counts: Mapping[str, int], view: View) -> str:
    """The diagram in a sentence or two."""
    used = ", ".join(f"{counts[name]} {name}" for name in REACHED if counts.get(name))
    ways = [
        f"{' or '.join(arrow.moves)} to {arrow.after}{' after tracking' * (arrow.kind == 'later')}"
        for arrow in arrows_for(view)
        if arrow.before == view.state and arrow.kind != "quiet"
    ]
    ahead = "; ".join(ways) or "none"
    return f"Entries of this TD: {used}. The chosen entry is {view.state}. Ways on: {ahead}."


_ARROW_COLOURS = {"quiet": _QUIET, "open": BLACK, "later": BLACK, "last": VERMILLION}

_MARKERS = (
    "<defs>"
    + "".join(
        f'<marker id="sept-{name}" viewBox="0 0 8 8" refX="7" refY="4" '
        f'markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for name, colour in _ARROW_COLOURS.items()
    )
    + "</defs>"
)


def _box(state: str, count: int, is_current: bool) -> str:
    """A state's box: letter, name, number of entries; a thick frame for the chosen entry's."""
    x, y = PLACES[state]
    look = SEPT_LOOKS[state]
    left, top = x - _BOX_WIDTH // 2, y - _BOX_HEIGHT // 2
    width = 4 if is_current else 1
    mark = ' class="tdxlab-current"' if is_current else ""
    return (
        f'<g{mark} data-state="{state}"><rect x="{left}" y="{top}" width="{_BOX_WIDTH}" '
        f'height="{_BOX_HEIGHT}" rx="6" fill="{look.colour}" stroke="#000" stroke-width="{width}"/>'
        + text(
            x,
            y - 3,
            f"{look.letter}  {state}",
            size=9 + (len(state) < 13),
            colour=look.ink,
            at="middle",
        )
        + text(x, y + 13, str(count), size=12, colour=look.ink, at="middle")
        + "</g>"
    )


class _Curve(NamedTuple):
    """A quadratic curve between two boxes."""

    start: tuple[int, int]
    control: tuple[int, int]
    end: tuple[int, int]

    def at(self, percent: int) -> tuple[int, int]:
        t = percent / 100
        parts = zip(self.start, self.control, self.end, strict=True)
        x, y = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t * t * c for a, b, c in parts)
        return round(x), round(y)


def _curve(before: str, after: str, bend: int) -> _Curve:
    (x0, y0), (x1, y1) = PLACES[before], PLACES[after]
    length = max(round(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5), 1)
    right = (-(y1 - y0) / length, (x1 - x0) / length)
    control = (
        round((x0 + x1) / 2 + 2 * bend * right[0]),
        round((y0 + y1) / 2 + 2 * bend * right[1]),
    )
    shift = (round(bend * right[0] / 2), round(bend * right[1] / 2))
    shift = (max(-14, min(14, shift[0])), max(-12, min(12, shift[1])))
    start = _border((x0 + shift[0], y0 + shift[1]), (x0, y0), control)
    return _Curve(start, control, _border((x1 + shift[0], y1 + shift[1]), (x1, y1), control))


def _border(
    inside: tuple[int, int], centre: tuple[int, int], towards: tuple[int, int]
) -> tuple[int, int]:
    """Where the line from `inside` a box around `centre` to `towards` leaves the box."""
    dx, dy = towards[0] - inside[0], towards[1] - inside[1]
    edge_x = centre[0] + (_BOX_WIDTH // 2 + 2) * (1 if dx > 0 else -1)
    edge_y = centre[1] + (_BOX_HEIGHT // 2 + 2) * (1 if dy > 0 else -1)
    along = min(
        ((edge_x - inside[0]) / dx if dx else 9.0), ((edge_y - inside[1]) / dy if dy else 9.0)
    )
    return round(inside[0] + along * dx), round(inside[1] + along * dy)


def _arrow(arrow: Labelled) -> str:
    bend, percent = _BENDS.get((arrow.before, arrow.after), _USUAL_BEND)
    curve = _curve(arrow.before, arrow.after, bend)
    kind = arrow.kind
    colour = _ARROW_COLOURS[kind]
    dashes = ' stroke-dasharray="5 4"' if kind == "later" else ""
    x, y = curve.at(percent)
    path = "M{} {}Q{} {} {} {}".format(*curve.start, *curve.control, *curve.end)
    width = 1 if kind == "quiet" else 2
    label = " / ".join(move.replace("RANGE.", "").replace("PAGE.", "") for move in arrow.moves)
    names = escape(" ".join(arrow.moves))
    return (
        f'<g data-arrow="{arrow.before}-{arrow.after}" data-moves="{names}" class="tdxlab-{kind}">'
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes} '
        f'marker-end="url(#sept-{kind})"/>' + _label(x, y, label, kind) + "</g>"
    )


def _label(x: int, y: int, label: str, kind: str) -> str:
    """The arrow's moves, on white so that lines behind do not cross the letters."""
    width = 6 * len(label) + 4
    colour = {"last": "#a04000", "quiet": "#707070"}.get(kind, BLACK)
    return (
        f'<rect x="{x - width // 2}" y="{y - 7}" width="{width}" height="13" fill="#fff" '
        f'fill-opacity="0.9"/>' + text(x, y + 3, label, size=9, colour=colour, at="middle")
    )


def _greyed() -> Iterator[str]:
    """The states that only migration makes: grey, three in a row."""
    yield text(4, 308, "made by migration only, not modelled:", size=10, colour="#666")
    for number, state in enumerate(MIGRATION_ONLY):
        x, y = 4 + number % 3 * 163, 315 + number // 3 * 21
        look = SEPT_LOOKS[state]._replace(colour="#eeeeee", ink="#666666")
        yield tile(x, y, look, size=16, hint=state)
        yield text(x + 20, y + 12, _short(state), size=9, colour="#666")


def _short(state: str) -> str:
    """A long name on a small place: PENDING_EXPORTED_ becomes P_E_."""
    return state.replace("PENDING_", "P_").replace("EXPORTED_", "E_") if len(state) > 24 else state
