"""Pictures of notebook 06: the direct EPT as maps, one SPTE bit by bit, the dirty log, the bars."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tdxlab.arch import ENTRIES_PER_TABLE
from tdxlab.kvm.spte import ACCESSED_MASK, PT_WRITABLE_MASK, is_shadow_present_pte
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
from tdxlab.study.plots import FONT, Series, bars, stacked_bars
from tdxlab.study.shared_lab import SharedLab, level_name
from tdxlab.study.shared_tables import (
    BitRow,
    CallRow,
    LeafPoint,
    LogRow,
    SizeRow,
    bit_rows,
    kind_of,
)
from tdxlab.study.svg import CELL, drawing, entry_map, map_place, text

#: What an SPTE is -> its look. The second letter says that nobody used it since it was aged.
ENTRY_LOOKS: dict[str, Look] = {
    look.name: look
    for look in (
        Look("table", BLUE, WHITE, "T", ""),
        Look("writable", ORANGE, BLACK, "W", "//"),
        Look("writable, old", YELLOW, BLACK, "Wo", ".."),
        Look("write-protected", SKY, BLACK, "P", "\\\\"),
        Look("write-protected, old", GREY, BLACK, "Po", "--"),
        Look("MMIO", PURPLE, BLACK, "I", "xx"),
        Look("frozen", VERMILLION, BLACK, "F", "xx"),
    )
}
_DIRTY = Look("dirty", VERMILLION, BLACK, "D", "xx")

#: Size of a leaf -> its look in bars and curves.
SIZE_LOOKS: dict[str, Look] = {
    "4K": Look("4K leaves", ORANGE, BLACK, "4K", "//"),
    "2M": Look("2M leaves", SKY, BLACK, "2M", "\\\\"),
    "1G": Look("1G leaves", GREEN, BLACK, "1G", ""),
    "tables": Look("tables", BLUE, WHITE, "T", ""),
}

#: SEAMCALL -> its look.
CALL_LOOKS: dict[str, Look] = {
    "TDH.VP.WR": Look("VP.WR", PURPLE, BLACK, "W", "xx"),
    "TDH.VP.ENTER": Look("VP.ENTER", YELLOW, BLACK, "E", ".."),
    "TDH.MEM.SEPT.ADD": Look("MEM.SEPT.ADD", BLUE, WHITE, "S", ""),
    "TDH.MEM.PAGE.AUG": Look("MEM.PAGE.AUG", GREEN, BLACK, "A", "//"),
}

#: How a fault of a logged write ends -> its look.
FAULT_LOOKS: dict[str, Look] = {
    "slow": Look("slow: a large page is split", VERMILLION, BLACK, "S", "xx"),
    "fast": Look("fast: W comes back", GREEN, BLACK, "F", ""),
}


#: Pixels that a map is wide.
_VIEW_WIDTH = 420


def look_of(lab: SharedLab, raw: int, level: int) -> Look | None:
    """How an SPTE is drawn; None if it is empty."""
    kind = kind_of(lab, raw, level)
    if kind != "leaf":
        return ENTRY_LOOKS.get(kind)
    name = "writable" if raw & PT_WRITABLE_MASK else "write-protected"
    return ENTRY_LOOKS[name if raw & ACCESSED_MASK else f"{name}, old"]


def table_view(lab: SharedLab, gpa: int, level: int) -> str:
    """The table at `level` on the way to a GPA (without shared bit), its entry framed; a sentence
    where there is none.
    """
    name = level_name(level)
    table = lab.table(gpa, level)
    if not table:
        above = lab.walk(gpa)
        what = f"the {level_name(above[-1].level)} entry" if above else "the root"
        return sentence(
            f"No table of {name} entries on the way to this page: the walk ends at {what}."
        )
    looks = {index: look_of(lab, raw, level) for index, raw in enumerate(table)}
    cells = {index: look for index, look in looks.items() if look is not None}
    index = next(entry.place for entry in lab.walk(gpa) if entry.level == level)
    shown = entry_map(cells, title=f"512 {name} entries; the chosen page is under number {index}")
    return shown.replace("</svg>", f"{_frame(index)}</svg>")


def sentence(words: str) -> str:
    """Words in the place of a map, as wide as one."""
    return f'<p style="width:{_VIEW_WIDTH}px;max-width:100%">{words}</p>'


def _frame(index: int) -> str:
    x, y = map_place(index)
    return (
        f'<rect class="tdxlab-chosen" x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
        f'fill="none" stroke="#000" stroke-width="3"/>'
    )


def dirty_view(lab: SharedLab, size: str, page: int) -> str:
    """The dirty bitmap of the 512 pages around `page`; a sentence where there is none."""
    if not lab.is_logging(size):
        return sentence(f"The {size} memory is not logged: it has no bitmap.")
    first = page - page % ENTRIES_PER_TABLE
    dirty = lab.dirty(size)
    cells = {number - first: _DIRTY for number in dirty if 0 <= number - first < ENTRIES_PER_TABLE}
    title = f"dirty bitmap, pages {first}..{first + ENTRIES_PER_TABLE - 1} of the {size} memory"
    shown = entry_map(cells, title=title, unit="page")
    return shown.replace("</svg>", f"{_frame(page - first)}</svg>")


_BIT = 40


def bit_strip(raw: int, *, level: int, kind: str) -> str:
    """One SPTE: its bits as tiles with letters, those that are set filled."""
    rows = bit_rows(raw)
    title = f"{level_name(level)} entry {raw:#018x}, {kind}"
    known = rows if is_shadow_present_pte(raw) else []
    body = [text(1, 13, title, size=12)]
    body += [_bit(number, row) for number, row in enumerate(known)]
    if not known:
        body.append(text(1, 40, _NOT_PRESENT[kind], size=11))
    said = ", ".join(f"{row.letter} {row.set}" for row in known) or _NOT_PRESENT[kind]
    return drawing(_BIT * len(SPTE_ORDER) + 4, 66, f"{title}: {said}", body)


SPTE_ORDER = bit_rows(0)
_NOT_PRESENT = {
    "empty": "only suppress-#VE is set: an access exits as an EPT violation",
    "frozen": "somebody is changing this entry",
    "MMIO": "not MMU-present: a GPA and the memslots' generation",
}


def _bit(number: int, row: BitRow) -> str:
    x = 1 + number * _BIT
    fill, ink = (ORANGE, BLACK) if row.set else (WHITE, "#555555")
    return (
        f"<g><title>bit {row.bit}: {row.meaning}</title>"
        f'<rect x="{x}" y="20" width="{_BIT - 4}" height="26" fill="{fill}" stroke="#444"/></g>'
        + text(x + _BIT // 2 - 2, 37, f"{row.letter} {row.set}", size=11, colour=ink, at="middle")
        + text(x + _BIT // 2 - 2, 58, str(row.bit), size=9, colour="#555555", at="middle")
    )


# -- bars and curves


def call_bars(rows: Sequence[CallRow], ax: Axes) -> Axes:
    """SEAMCALLs for the same number of private and of shared pages, stacked by leaf."""
    calls = {row.leaf: [row.private, row.shared] for row in rows}
    series = [Series(look, calls.get(leaf, [0, 0])) for leaf, look in CALL_LOOKS.items()]
    return stacked_bars(
        ax, ["private", "shared"], series, unit="SEAMCALLs", title="SEAMCALLs for first uses"
    )


def fault_bars(rows: Sequence[SizeRow], ax: Axes) -> Axes:
    """Faults until every page of a range was written, by size of the host's pages."""
    looks = [SIZE_LOOKS[row.memory] for row in rows]
    names = [f"{row.memory} host pages" for row in rows]
    faults = [row.faults for row in rows]
    pages = rows[0].pages_written if rows else 0
    return bars(ax, names, faults, looks, unit="EPT violations", title=f"Faults for {pages} pages")


def log_bars(rows: Sequence[LogRow], ax: Axes) -> Axes:
    """Faults of the first writes after logging began, by what they have to do."""
    names = [f"{row.memory}, split {row.split}" for row in rows]
    series = [
        Series(FAULT_LOOKS["slow"], [row.slow for row in rows]),
        Series(FAULT_LOOKS["fast"], [row.fast for row in rows]),
    ]
    return stacked_bars(ax, names, series, unit="faults", title="Faults of the first writes")


#: Room above the curves, on a logarithmic scale.
_ROOM_FOR_LEGEND = 30


def leaf_curves(points: Sequence[LeafPoint], ax: Axes) -> Axes:
    """Leaves of each size, and tables, over the deeds of a tape; logarithmic above 1."""
    ax.clear()
    where = [point.position for point in points]
    highest = 1
    for (name, look), style in zip(SIZE_LOOKS.items(), ("-", "--", ":", "-."), strict=True):
        field = "tables" if name == "tables" else f"pages_{name.lower()}"
        values = [getattr(point, field) for point in points]
        highest = max(highest, *values)
        ax.plot(where, values, style, drawstyle="steps-post", color=look.colour, linewidth=2)
        ax.lines[-1].set_label(look.name)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(0, highest * _ROOM_FOR_LEGEND)
    ax.set_title("Leaves of the direct EPT", fontsize=FONT + 1, loc="left")
    ax.set_xlabel("deeds", fontsize=FONT)
    ax.set_ylabel("entries (logarithmic above 1)", fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=FONT, loc="upper left", frameon=False, ncols=4)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
