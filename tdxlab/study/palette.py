"""One palette for every picture: a colour and a letter for each state, and a hatch for bars.

The colours are those of Okabe and Ito, which people with any common colour blindness can tell
apart. No picture relies on colour alone: maps write the letter into the cell, bars carry the hatch.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.seam.rules import PAGE_TYPES, SEPT_STATES

WHITE, BLACK, GREY = "#ffffff", "#000000", "#bbbbbb"
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILLION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"


class Look(NamedTuple):
    """How one state is drawn.

    name: of the state. colour: of its area, ink: of the letter on it, both "#rrggbb".
    letter: one or two characters. hatch: matplotlib's pattern for bars, "" for a plain one.
    """

    name: str
    colour: str
    ink: str
    letter: str
    hatch: str


#: S-EPT state -> colour, ink, hatch; the letter is the state's own. What only migration makes is
#: purple, told apart by its letters.
_SEPT_COLOURS: dict[str, tuple[str, str, str]] = {
    "FREE": (WHITE, BLACK, ""),
    "REMOVED": (GREY, BLACK, "--"),
    "NL_MAPPED": (BLUE, WHITE, ""),
    "NL_BLOCKED": (SKY, BLACK, "xx"),
    "MAPPED": (GREEN, BLACK, ""),
    "BLOCKED": (VERMILLION, BLACK, "xx"),
    "PENDING": (YELLOW, BLACK, ".."),
    "PENDING_BLOCKED": (ORANGE, BLACK, "xx"),
}
_MIGRATION = (PURPLE, BLACK, "//")

_PAGE_TYPE_COLOURS: dict[str, tuple[str, str, str]] = {
    "PT_NDA": (WHITE, BLACK, ""),
    "PT_RSVD": (GREY, BLACK, "--"),
    "PT_REG": (GREEN, BLACK, ""),
    "PT_TDR": (VERMILLION, BLACK, "xx"),
    "PT_TDCX": (ORANGE, BLACK, "//"),
    "PT_TDVPR": (YELLOW, BLACK, ".."),
    "PT_EPT": (BLUE, WHITE, ""),
}


def _look(name: str, letter: str, colours: tuple[str, str, str]) -> Look:
    colour, ink, hatch = colours
    return Look(name, colour, ink, letter, hatch)


#: Name of an S-EPT state -> its look.
SEPT_LOOKS: dict[str, Look] = {
    state.name: _look(state.name, state.letter, _SEPT_COLOURS.get(state.name, _MIGRATION))
    for state in SEPT_STATES
}

#: Name of a PAMT page type -> its look.
PAGE_TYPE_LOOKS: dict[str, Look] = {
    kind.name: _look(kind.name, kind.letter, _PAGE_TYPE_COLOURS[kind.name]) for kind in PAGE_TYPES
}

#: Group of a leaf -> its look.
GROUP_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look("system", GREY, BLACK, "S", "--"),
        Look("td", VERMILLION, BLACK, "T", "xx"),
        Look("vcpu", YELLOW, BLACK, "V", ".."),
        Look("memory", GREEN, BLACK, "M", ""),
        Look("measurement", PURPLE, BLACK, "R", "//"),
        Look("physical memory", SKY, BLACK, "P", "\\\\"),
        Look("other", WHITE, BLACK, "O", ""),
    )
}

#: Half of a TD's GPA space -> its look.
HALF_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (Look("private", GREEN, BLACK, "P", ""), Look("shared", ORANGE, BLACK, "S", "//"))
}

#: For what has no state of its own: plain bars, curves, and the mark of the present position.
PLAIN = Look("calls", BLUE, WHITE, "", "")
CURSOR = VERMILLION


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1..21, as WCAG 2 defines it; text needs 4.5."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
