"""One raw Secure EPT entry, bit by bit, beside what TDH.MEM.SEPT.RD shows of it."""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.bits import Bits
from tdxlab.seam import sept
from tdxlab.seam.rules import SEPT_STATE_MASK
from tdxlab.seam.sept import Septe
from tdxlab.study.palette import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION
from tdxlab.study.sept_lab import Seen
from tdxlab.study.svg import drawing, text

#: Field of an entry -> the name in the module's code, and what it says.
#: Source: TDX module 1.5.01, x86_defs.h, ia32e_sept_t.
MEANINGS: dict[str, tuple[str, str]] = {
    "read": ("R", "guest may read"),
    "write": ("W", "guest may write"),
    "execute": ("X", "guest may execute"),
    "memory_type": ("MT", "memory type, 6: WB"),
    "ignore_pat": ("IPAT", "state: ignore PAT"),
    "leaf": ("PS", "state: a leaf"),
    "exported_dirty": ("D", "state: dirty"),
    "lock": ("TDEL", "entry is locked"),
    "hpa": ("HPA", "of page or table"),
    "host_priority": ("TDHP", "host waits for lock"),
    "exported": ("TDEX", "state: exported"),
    "write_blocked": ("TDBW", "state: write-blocked"),
    "blocked": ("TDB", "state: blocked"),
    "pending": ("TDP", "state: pending"),
    "suppress_ve": ("SVE", "suppress #VE"),
}

_PERMISSIONS, _STATE, _LOCKS = (
    ("read", "write", "execute"),
    SEPT_STATE_MASK,
    ("lock", "host_priority"),
)
_CELL, _ROW_BITS = 10, 32


class FieldRow(NamedTuple):
    """One field of an entry. bits: such as "51:12". raw: its value in memory; shown: in RCX of
    TDH.MEM.SEPT.RD, in hex, "-" where no RCX is at hand.
    """

    bits: str
    name: str
    raw: int
    shown: str
    meaning: str


def field_rows(raw: int, shown: int | None = None) -> list[FieldRow]:
    """Every field of `raw`, lowest bit first, and of the RCX that shows it."""
    return [
        FieldRow(
            _range(field),
            MEANINGS[field.name][0],
            field.extract(raw),
            "-" if shown is None else f"{field.extract(shown):#x}",
            MEANINGS[field.name][1],
        )
        for field in Septe.fields()
    ]


def _is_hidden(row: FieldRow) -> bool:
    return row.shown not in ("-", f"{row.raw:#x}")


def _range(field: Bits) -> str:
    return f"{field.high}" if field.high == field.low else f"{field.high}:{field.low}"


def hidden_fields(raw: int, seen: Seen) -> list[str]:
    """Names of the fields that the host is shown otherwise than they stand in memory."""
    return [row.name for row in field_rows(raw, seen.rcx) if _is_hidden(row)]


def state_bits_text(raw: int) -> str:
    """The seven state bits with their names: "TDP 1 TDB 0 TDBW 0 TDEX 0 D 0 PS 1 IPAT 1"."""
    fields = [field for field in reversed(Septe.fields()) if field.mask & SEPT_STATE_MASK]
    return " ".join(f"{MEANINGS[field.name][0]} {field.extract(raw)}" for field in fields)


def bit_strip(raw: int) -> str:
    """The 64 bits in two rows, 63 at the top left; ones are filled in the colour of their field."""
    ones = ", ".join(row.name for row in field_rows(raw) if row.raw)
    body = [_bit(raw, number) for number in range(64)]
    for number in (63, 48, 32, 31, 16, 0):
        x, y = _bit_place(number)
        body.append(
            text(x + 5, y - 3 if number >= _ROW_BITS else y + 23, str(number), size=8, at="middle")
        )
    label = f"Raw entry {raw:#018x}, {Septe(raw).state}; fields that are not zero: {ones}"
    return drawing(_ROW_BITS * _CELL + 12, 60, label, body)


def _bit_place(number: int) -> tuple[int, int]:
    return 2 + (31 - number % _ROW_BITS) * _CELL, 14 if number >= _ROW_BITS else 34


def _bit(raw: int, number: int) -> str:
    x, y = _bit_place(number)
    is_one = raw >> number & 1
    fill = _colour(number) if is_one else "#fff"
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="14" fill="{fill}" stroke="#777" '
        f'stroke-width="0.6"><title>bit {number}: {is_one}</title></rect>'
    )


def _colour(number: int) -> str:
    """Colour of a bit: permissions, state, locks, address, anything else."""
    mask = 1 << number
    if mask & _STATE:
        return VERMILLION
    for names, colour in ((_PERMISSIONS, GREEN), (_LOCKS, ORANGE), (("hpa",), SKY)):
        if any(mask & getattr(Septe, name).mask for name in names):
            return colour
    return BLUE if mask == sept.SUPPRESS_VE else GREY


def entry_table(raw: int, seen: Seen | None) -> str:
    """The fields as an HTML table: bits, name, in memory, as the host sees it."""
    shown = None if seen is None else seen.rcx
    rows = "".join(_html_row(row) for row in field_rows(raw, shown))
    style = "border-collapse:collapse;font:10px/1.3 monospace;width:100%"
    return (
        f'<table style="{style}"><thead><tr><th>bits</th><th>field</th><th>memory</th>'
        f"<th>SEPT.RD</th><th>means</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _html_row(row: FieldRow) -> str:
    colour = ' style="background:#fbe3d5"' if _is_hidden(row) else ""
    weight = ' style="font-weight:bold"' if row.raw else ""
    cell = '<td style="padding:0 3px;text-align:left;white-space:nowrap">'
    return (
        f"<tr{colour}>{cell}{row.bits}</td>{cell}{row.name}</td>{cell}<span{weight}>{row.raw:x}"
        f"</span></td>{cell}{row.shown.removeprefix('0x')}</td>{cell}{row.meaning}</td></tr>"
    )
