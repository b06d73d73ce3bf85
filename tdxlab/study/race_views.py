"""Drawings of a race: a lane for each operation, and the entries at which they meet."""

from __future__ import annotations

from collections.abc import Sequence

from tdxlab.study import protocol
from tdxlab.study.palette import (
    BLACK,
    BLUE,
    CURSOR,
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
from tdxlab.study.race_lab import DONE, ActorRow, EntryRow, RaceLab, first_words, moves_of
from tdxlab.study.svg import drawing, text, tile

_TILE = 22
_LEFT = 92
#: Moves that a lane shows at once.
COLUMNS = 32
_LANE = 46
_TOP = 18
LANES, MEETING = "Who moved, move by move", "Where they meet"

#: Beginning of a step -> its look; the first that fits. Names say what a move with it does.
STEP_LOOKS: dict[str, Look] = {
    "start": Look("begin", WHITE, BLACK, "B", ""),
    "faultin_pfn": Look("look up", GREY, BLACK, "L", ""),
    "read_lock(mmu_lock)": Look("walk", SKY, BLACK, "W", ""),
    "cmpxchg FROZEN_SPTE": Look("freeze", PURPLE, BLACK, "F", "xx"),
    "read SPTE": Look("read again", PURPLE, BLACK, "r", "xx"),
    "cmpxchg SPTE": Look("publish early", GREEN, BLACK, "p", ""),
    "publish SPTE": Look("publish", GREEN, BLACK, "P", ""),
    "restore SPTE": Look("restore", ORANGE, BLACK, "R", "//"),
    protocol.WAITS: Look("told busy", VERMILLION, BLACK, "b", "xx"),
}
_CALL = Look("call", BLUE, WHITE, "C", "")
_INSIDE = Look("module", YELLOW, BLACK, "M", "..")
_OTHER = Look("other", WHITE, BLACK, "·", "")

#: Value of a contested entry -> its look.
ENTRY_LOOKS: dict[str, Look] = {
    protocol.EMPTY: Look("empty", WHITE, BLACK, ".", ""),
    protocol.FROZEN: Look("FROZEN", PURPLE, BLACK, "F", "xx"),
    protocol.PRESENT: Look("present", GREEN, BLACK, "P", ""),
    protocol.FREE: Look("free", WHITE, BLACK, ".", ""),
    protocol.LOCKED: Look("locked by a SEAMCALL", YELLOW, BLACK, "L", ".."),
    protocol.WANTED: Look("locked, and another was refused", ORANGE, BLACK, "W", "//"),
    protocol.MAPPED: Look("mapped", GREEN, BLACK, "M", ""),
}


def step_look(step: str) -> Look:
    """How a move that does `step` is drawn."""
    if step.startswith("TDH."):
        return _INSIDE if step.endswith(protocol.INSIDE) else _CALL
    return STEP_LOOKS.get(step, _OTHER)


def pictures(lab: RaceLab) -> dict[str, str]:
    """Heading -> SVG of every view."""
    moves = moves_of(lab.tape)
    drawn = lanes(moves, lab.tape.position, lab.actors(), first_words(lab.verdict))
    return {LANES: drawn, MEETING: meeting(lab.entries())}


def lanes(
    moves: Sequence[tuple[str, str, str]], position: int, actors: Sequence[ActorRow], verdict: str
) -> str:
    """A lane for each operation: one tile for each of its moves, those ahead of `position` faint.

    moves: of `race_lab.moves_of`. A move with ↺ made its vCPU start over, one with X broke a rule.
    """
    first = max(0, min(position - COLUMNS // 2, len(moves) - COLUMNS))
    shown = range(first, min(first + COLUMNS, len(moves)))
    rows = {row.who: number for number, row in enumerate(actors)}
    width, bottom = _LEFT + COLUMNS * _TILE + 4, _TOP + _LANE * len(actors)
    body = [_lane(row, number) for number, row in enumerate(actors)]
    for number in shown:
        who, step, result = moves[number]
        is_wrong = bool(verdict) and number == position - 1
        body.append(_move(number - first, rows[who], step, result, number < position, is_wrong))
    body += [_number(number - first, number + 1) for number in shown if not number % 4]
    x = _LEFT + (position - first) * _TILE
    body.append(f'<path d="M{x} {_TOP - 2}V{bottom - 4}" stroke="{CURSOR}" stroke-width="2"/>')
    body.append(_legend([step_look(step) for _, step, _ in moves], bottom + 10))
    said = "; ".join(f"{row.who} has made {row.moves} moves" for row in actors)
    return drawing(width, bottom + 18, f"{said}; {verdict or 'nothing is wrong'}", body)


def _lane(row: ActorRow, number: int) -> str:
    y = _TOP + number * _LANE
    line = f'<path d="M{_LEFT} {y + _TILE // 2}h{COLUMNS * _TILE}" stroke="#ddd"/>'
    has_ended = row.comes_next == DONE or row.comes_next.startswith("RET_")
    words = f"{'ended' if has_ended else 'comes next'}: {row.comes_next}"
    times = "once" if row.retries == 1 else f"{row.retries} times"
    retries = f", started over {times}" if row.retries else ""
    return (
        line
        + text(2, y + 15, row.who, size=12)
        + text(_LEFT, y + _TILE + 14, words + retries, size=11, colour="#333")
    )


def _move(column: int, lane: int, step: str, result: str, is_done: bool, is_wrong: bool) -> str:
    x, y = _LEFT + column * _TILE, _TOP + lane * _LANE
    look = step_look(step)
    hint = f"{step} -> {result}" if result else step
    drawn = tile(x, y, look, size=_TILE, hint=hint)
    if not is_done:
        return f'<g opacity="0.3">{drawn}</g>'
    if is_wrong:
        return drawn + _mark(x, y, "X", VERMILLION)
    return drawn + _mark(x, y, "↺", WHITE) if result == "RET_PF_RETRY" else drawn


def _mark(x: int, y: int, letter: str, colour: str) -> str:
    """A small sign at the corner of a tile."""
    return (
        f'<rect x="{x + 11}" y="{y - 5}" width="12" height="12" rx="6" fill="{colour}" '
        f'stroke="#000"/>' + text(x + 17, y + 4, letter, size=9, at="middle")
    )


def _number(column: int, move: int) -> str:
    x = _LEFT + column * _TILE + _TILE // 2
    return text(x, 9, str(move), size=9, at="middle", colour="#555")


def _legend(looks: Sequence[Look], y: int) -> str:
    """Letters and names in a row."""
    parts, x = [], _LEFT
    for look in dict.fromkeys(looks):
        parts.append(tile(x, y - 8, look, size=12))
        parts.append(text(x + 15, y + 2, look.name, size=10))
        x += 24 + 7 * len(look.name)
    return "".join(parts)


def meeting(rows: Sequence[EntryRow]) -> str:
    """Each contested entry, in the mirror and in the Secure EPT."""
    body = [text(240, 13, "mirror (KVM's)", size=11), text(440, 13, "Secure EPT (the module's)")]
    for number, row in enumerate(rows):
        y = 20 + number * 28
        body.append(text(2, y + 16, row.entry, size=12))
        for x, value in ((240, row.mirror), (440, row.external)):
            look = ENTRY_LOOKS[value]
            body.append(tile(x, y, look, size=_TILE, hint=look.name))
            body.append(text(x + 28, y + 16, look.name, size=11))
    said = "; ".join(f"{row.entry}: mirror {row.mirror}, S-EPT {row.external}" for row in rows)
    return drawing(_LEFT + COLUMNS * _TILE + 4, 24 + 28 * len(rows), said, body)
