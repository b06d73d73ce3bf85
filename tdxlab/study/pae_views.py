"""Drawings of PAE roots: the bits of an entry, what hangs on the slots, bars."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from matplotlib.axes import Axes

from tdxlab.arch import PAGE_OFFSET_MASK
from tdxlab.kvm.pae_pdpte import Pdpte, pdptr_rsvd_bits, reserved_bits_set
from tdxlab.kvm.shadow_params import DESIGNS, SPECIAL
from tdxlab.study import plots
from tdxlab.study.pae_lab import PaeLab, quadrant_of
from tdxlab.study.pae_tables import MemoryRow, SwitchRow
from tdxlab.study.palette import (
    BLACK,
    BLUE,
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
from tdxlab.study.show import Drawing, Table
from tdxlab.study.svg import drawing, text, tile

_CELL, _ROW = 12, 32

PRESENT = Look("present", GREEN, WHITE, "P", "")
ADDRESS = Look("address", SKY, BLACK, "1", "")
IGNORED = Look("ignored, set", YELLOW, BLACK, "i", "..")
CACHING = Look("PWT, PCD", ORANGE, BLACK, "c", "//")
C_BIT = Look("C-bit", PURPLE, BLACK, "C", "//")
ILLEGAL = Look("reserved, set", VERMILLION, BLACK, "x", "xx")
UNHEEDED = Look("reserved, set, and P = 0", GREY, BLACK, "u", "--")
CLEAR = Look("clear", WHITE, BLACK, "", "")
RESERVED = Look("reserved, clear", WHITE, BLACK, "r", "")

#: Design -> its look in plots.
DESIGN_LOOKS = dict(
    zip(
        DESIGNS,
        (
            Look(DESIGNS[0], ORANGE, BLACK, "S", "//"),
            Look(DESIGNS[1], BLUE, WHITE, "R", ""),
            Look(DESIGNS[2], GREEN, BLACK, "V", ".."),
        ),
        strict=True,
    )
)


def bit_look(pdpte: int, bit: int, maxphyaddr: int, c_bit: int | None = None) -> Look:
    """How one bit of an entry is drawn."""
    mask = 1 << bit
    if pdptr_rsvd_bits(maxphyaddr) & mask:
        if not pdpte & mask:
            return RESERVED
        return ILLEGAL if pdpte & 1 else UNHEEDED
    if not pdpte & mask:
        return CLEAR
    if bit == c_bit:
        return C_BIT
    kinds = ((Pdpte.present, PRESENT), (Pdpte.ignored, IGNORED), (Pdpte.address, ADDRESS))
    return next((look for field, look in kinds if field.mask & mask), CACHING)


def bits_svg(
    pdptes: Sequence[int], maxphyaddr: int, c_bit: int | None = None, names: Sequence[str] = ()
) -> str:
    """Entries bit by bit, 63 to 32 above 31 to 0, each with its value. names: of the entries."""
    body, seen, y = [], dict[Look, None](), 4
    for place, pdpte in enumerate(pdptes):
        name = names[place] if names else f"slot {place}"
        bad = reserved_bits_set(pdpte, maxphyaddr)
        verdict = "refused" if bad else "fine" if pdpte & 1 else "fine, not present"
        body.append(text(2, y + 11, f"{name}  {pdpte:#018x}  {verdict}", size=11))
        for bit in range(63, -1, -1):
            look = bit_look(pdpte, bit, maxphyaddr, c_bit)
            seen[look] = None
            x, down = (63 - bit) % _ROW * _CELL + 2, (63 - bit) // _ROW * _CELL
            body.append(tile(x, y + 16 + down, look, hint=f"bit {bit}: {look.name}"))
        y += 46
    body.append(_legend([look for look in seen if look not in (CLEAR, RESERVED)], y))
    verdicts = ["refused" if reserved_bits_set(pdpte, maxphyaddr) else "fine" for pdpte in pdptes]
    labels = names or [f"slot {place}" for place in range(len(pdptes))]
    said = ", ".join(f"{label} {verdict}" for label, verdict in zip(labels, verdicts, strict=True))
    return drawing(_ROW * _CELL + 4, y + 32, f"Bits of PDPTEs: {said}", body)


def _legend(looks: Sequence[Look], y: int) -> str:
    parts, x = [], 2
    for look in looks:
        width = 26 + 7 * len(look.name)
        if x + width > _ROW * _CELL:
            x, y = 2, y + 15
        parts += [tile(x, y, look), text(x + 16, y + 10, look.name, size=10)]
        x += width
    return "".join(parts)


def pdpte_drawing(pdpte: int, maxphyaddr: int) -> Drawing:
    """One entry, for the end of a cell."""
    bad = reserved_bits_set(pdpte, maxphyaddr)
    verdict = f"refused, reserved bits {bad:#x}" if bad else "fine"
    words = f"{pdpte:#018x}: {Pdpte(pdpte).describe()}: {verdict}"
    return Drawing(bits_svg([pdpte], maxphyaddr, names=["PDPTE"]), words)


# -- what hangs on the slots


_MOST = 10
_LEFT, _TOP, _COLUMN, _STEP, _WIDE = 150, 22, 132, 34, 122


def tree_svg(lab: PaeLab) -> str:
    """vCPU 0's root, the page directories and tables, and what links what."""
    columns = [[row.hpa for row in lab.pages() if row.level == level] for level in (2, 1)]
    places = {
        hpa: (_LEFT + _COLUMN * column, _TOP + _STEP * row)
        for column, pages in enumerate(columns)
        for row, hpa in enumerate(pages[:_MOST])
    }
    heads = ((2, "root"), (_LEFT, "level 2"), (_LEFT + _COLUMN, "level 1"))
    hidden = sum(max(len(pages) - _MOST, 0) for pages in columns)
    height = 30 + _STEP * max(4, *(min(len(pages), _MOST) for pages in columns))
    lines = _slot_lines(lab, places) + _page_lines(lab, places)
    body = [
        f'<path d="{"".join(lines)}" stroke="#666" fill="none"/>' if lines else "",
        *(text(x, 13, name, size=11) for x, name in heads),
        *_slot_boxes(lab),
        *_page_boxes(lab, places),
        text(2, height - 4, f"and {hidden} more pages" if hidden else "", size=10),
    ]
    present = sum(row.present for row in lab.slots())
    said = f"Root: {present} of 4 slots present; {len(columns[0])} page directories, "
    return drawing(408, height, said + f"{len(columns[1])} tables", body)


def _slot_boxes(lab: PaeLab) -> list[str]:
    boxes = []
    for row in lab.slots():
        child = lab.vm.address(row.raw)
        state = "illegal" if row.bad else f"{child:#x}" if child in lab.vm.sps else "links nothing"
        fill = ILLEGAL.colour if row.bad else WHITE
        boxes.append(_box(2, _TOP + _STEP * row.slot, f"slot {row.slot}", state, fill=fill))
    return boxes


def _page_boxes(lab: PaeLab, places: dict[int, tuple[int, int]]) -> list[str]:
    boxes = []
    for hpa, (x, y) in places.items():
        sp = lab.vm.sps[hpa]
        words = [f"gfn {sp.gfn:#x}" + (f" q{quadrant_of(sp)}" if sp.has_gptes else "")]
        words += [f"held {sp.root_count}"] * bool(sp.root_count) + ["invalid"] * sp.is_invalid
        fill = GREY if sp.is_invalid else WHITE
        boxes.append(_box(x, y, f"{hpa:#x}", ", ".join(words), fill=fill))
    return boxes


def _slot_lines(lab: PaeLab, places: dict[int, tuple[int, int]]) -> list[str]:
    """From each slot to the page directory in it."""
    ends = {row.slot: lab.vm.address(row.raw) for row in lab.slots() if row.present}
    return [
        _line((112, _TOP + _STEP * slot + 14), places[hpa])
        for slot, hpa in ends.items()
        if hpa in places
    ]


def _page_lines(lab: PaeLab, places: dict[int, tuple[int, int]]) -> list[str]:
    """From each page directory to the tables that it links."""
    links = [(parent & ~PAGE_OFFSET_MASK, hpa) for hpa in places for parent in _parents(lab, hpa)]
    return [
        _line((places[start][0] + _WIDE, places[start][1] + 14), places[hpa])
        for start, hpa in links
        if start in places
    ]


def _parents(lab: PaeLab, hpa: int) -> tuple[int, ...]:
    parents: tuple[int, ...] = lab.vm.sps[hpa].parents
    return parents


def _box(x: int, y: int, first: str, second: str, *, fill: str) -> str:
    width = 110 if x < _LEFT else _WIDE
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="29" fill="{fill}" stroke="#888"/>'
        + text(x + 4, y + 12, first, size=10)
        + text(x + 4, y + 24, second, size=9)
    )


def _line(start: tuple[int, int], end: tuple[int, int]) -> str:
    return f"M{start[0]} {start[1]}L{end[0]} {end[1] + 14}"


def cpu_html(lab: PaeLab) -> str:
    """What vCPU 0's CPU holds of the root."""
    registers = lab.registers()
    if registers:
        cells = "".join(f"<li><code>{value:#x}</code></li>" for value in registers)
        return f'<ol start="0" style="line-height:1.3;font-size:12px">{cells}</ol>'
    vcpu = lab.vm.vcpus[0]
    where = "in the guest" if vcpu.in_guest else "out of the guest"
    how = (
        "PDPTEs are read from memory, one by one, when a walk needs them"
        if vcpu.in_guest
        else "nothing is loaded"
    )
    return f'<p style="line-height:1.4">{escape(where)}: {escape(how)}</p>'


def pages_html(lab: PaeLab) -> str:
    """The shadow pages as a table."""
    rows = lab.pages()
    if not rows:
        return '<p style="line-height:1.4">none yet</p>'
    return str(Table(rows)._repr_html_()).replace("<table>", '<table style="font-size:11px">')


# -- bars


def plot_counts(numbers: dict[str, int], design: str, ax: Axes) -> Axes:
    """Counts of one VM. numbers: name -> count."""
    looks = [DESIGN_LOOKS[design]] * len(numbers)
    names, counts = list(numbers), list(numbers.values())
    return plots.bars(ax, names, counts, looks, unit="count", title=f"counts: {design}")


def plot_switches(rows: Sequence[SwitchRow], ax: Axes) -> Axes:
    """Roots built in one round over the processes. rows: of `switch_rows`."""
    names, values, looks = [], [], []
    for row in rows:
        for design, value in zip(DESIGNS, (row.special, row.rfc, row.reviewed), strict=True):
            names.append(f"{row.processes} processes" if design == SPECIAL else design)
            values.append(value)
            looks.append(DESIGN_LOOKS[design])
    return plots.bars(ax, names, values, looks, unit="roots built", title="one round, warmed up")


def plot_memory(rows: Sequence[MemoryRow], ax: Axes) -> Axes:
    """Pages below 4 GiB. rows: of `memory_rows`."""
    names = [f"{row.vcpus} vCPUs, {row.processes} CR3: {row.design}" for row in rows]
    looks = [DESIGN_LOOKS[row.design] for row in rows]
    pages = [row.low_pages for row in rows]
    return plots.bars(ax, names, pages, looks, unit="4 KiB pages", title="pages below 4 GiB")
