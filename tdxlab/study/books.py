"""The module's books as plain lines, and what a call changed in them.

The module keeps book of every page (PAMT), every KeyID (KOT), every TD and vCPU (their control
pages) and every private mapping (Secure EPT). Two copies of the books, compared line by line, say
what a call did.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab import views
from tdxlab.bare import BareMachine
from tdxlab.seam.rules import (
    OP_STATE_NAMES,
    TD_KEYS_CONFIGURED,
    TD_LIFECYCLE_NAMES,
    VCPU_STATE_NAMES,
)
from tdxlab.seam.td import NO_LP, Tdvps

PAMT, KEYID, TD, VCPU, SEPT = "PAMT", "KeyID", "TD", "vCPU", "S-EPT"

_LIFE_CYCLE = "life cycle"

#: What a line says that is not in the book.
_ABSENT = {PAMT: "PT_NDA", KEYID: "FREE", SEPT: "FREE"}

#: Fields of `views.td_info` that are counts -> what they count.
_TD_COUNTS = {
    "num_tdcx": "control pages",
    "chldcnt": "pages owned",
    "num_vcpus": "vCPUs",
    "num_assoc_vcpus": "associated vCPUs",
    "td_epoch": "epoch",
}


class Line(NamedTuple):
    """Where something is written: in which book, of which TD (HPA of its TDR; 0 in a book of all
    TDs), of what.
    """

    book: str
    tdr: int
    what: str


class Change(NamedTuple):
    """One line that a call changed."""

    line: Line
    before: str
    after: str


class Vcpu(NamedTuple):
    """A vCPU as its TDVPR page describes it. lp: that it is associated with, None if with none."""

    tdvpr: int
    tdr: int
    state: int
    pages: int
    lp: int | None


Books = dict[Line, str]


def pages(machine: BareMachine, page_type: str) -> list[views.PamtRow]:
    """The 4 KiB pages of a type ("PT_TDR" ...), ascending."""
    return [row for row in views.pamt_rows(machine) if row[0] == "4K" and row[2] == page_type]


def vcpu(machine: BareMachine, tdvpr: views.PamtRow) -> Vcpu:
    """The vCPU whose TDVPR page a row of the PAMT describes."""
    view = machine.memory.words.view
    page = machine.memory.frame(tdvpr.hpa)
    lp = view[page + Tdvps.ASSOC_LPID]
    state, count = view[page + Tdvps.STATE], view[page + Tdvps.NUM_PAGES]
    return Vcpu(tdvpr.hpa, tdvpr.owner, state, count, None if lp == NO_LP else lp)


def read_books(machine: BareMachine) -> Books:
    """All lines of all books. Free pages, free KeyIDs and free S-EPT entries have none."""
    books: Books = {}
    for key in views.key_rows(machine):
        pending = [p for p in machine.cpu.packages if key.pending_packages >> p & 1]
        waits = f", in the caches of package{_listed(pending)}" if pending else ""
        books[Line(KEYID, 0, str(key.keyid))] = key.state + waits
    for row in views.pamt_rows(machine):
        books[Line(PAMT, 0, _page_name(row))] = _page_text(row)
        if row.page_type == "PT_TDR":
            books |= _td_lines(machine, row.hpa)
        if row.page_type == "PT_TDVPR":
            books[Line(VCPU, row.owner, f"{row.hpa:#x}")] = _vcpu_text(vcpu(machine, row))
    return books


def compare(before: Books, after: Books) -> list[Change]:
    """The lines that differ, those of pages first.

    Left out: S-EPT entries of a TD whose key is gone, because nobody can read them any more, and
    all but the life cycle of a TD that is gone itself.
    """
    lines = {*before, *after}
    found = (Change(line, _text(before, line), _text(after, line)) for line in lines)
    told = (c for c in found if c.before != c.after and _is_told(c.line, after))
    order = (PAMT, KEYID, TD, VCPU, SEPT)
    return sorted(told, key=lambda c: (order.index(c.line.book), c.line.tdr, c.line.what))


def _is_told(line: Line, after: Books) -> bool:
    life = after.get(line._replace(book=TD, what=_LIFE_CYCLE))
    if line.book == SEPT:
        return life == TD_LIFECYCLE_NAMES[TD_KEYS_CONFIGURED]
    return line.book != TD or line.what == _LIFE_CYCLE or life is not None


def _text(books: Books, line: Line) -> str:
    absent = "0" if line.what in _TD_COUNTS.values() else _ABSENT.get(line.book, "-")
    return books.get(line, absent)


def _td_lines(machine: BareMachine, tdr: int) -> Books:
    info = views.td_info(machine, tdr)
    lines = {Line(TD, tdr, _LIFE_CYCLE): TD_LIFECYCLE_NAMES[info["lifecycle_state"]]}
    if "op_state" in info:
        lines[Line(TD, tdr, "op state")] = OP_STATE_NAMES[info["op_state"]]
    keyed = [p for p in machine.cpu.packages if info["pkg_config_bitmap"] >> p & 1]
    if keyed:
        lines[Line(TD, tdr, "key")] = f"on package{_listed(keyed)}"
    for field, what in _TD_COUNTS.items():
        if info.get(field):
            lines[Line(TD, tdr, what)] = str(info[field])
    if info["fatal"]:
        lines[Line(TD, tdr, "fatal")] = "yes"
    if info["lifecycle_state"] == TD_KEYS_CONFIGURED:
        for row in views.sept_rows(machine, tdr):
            what = f"level {row.sept_level}, GPA {row.gpa:#x}"
            lines[Line(SEPT, tdr, what)] = row.state
    return lines


def _vcpu_text(of: Vcpu) -> str:
    where = "on no LP" if of.lp is None else f"on LP {of.lp}"
    count = "1 page" if of.pages == 1 else f"{of.pages} pages"
    return f"{VCPU_STATE_NAMES[of.state]}, {count}, {where}"


def _page_name(row: views.PamtRow) -> str:
    return f"{row.hpa:#x}" if row.size == "4K" else f"{row.hpa:#x} ({row.size} entry)"


def _page_text(row: views.PamtRow) -> str:
    is_owned = row.owner and row.page_type != "PT_NDA"
    parts = [f"{row.page_type} of TD {row.owner:#x}" if is_owned else row.page_type]
    if row.bepoch:
        parts.append(f"blocked in epoch {row.bepoch}")
    if row.lock & 1:
        parts.append("locked")
    if row.lock >> 2:
        parts.append(f"shared by {row.lock >> 2}")
    if row.lock & 2:
        parts.append("host waits")
    return ", ".join(parts)


def _listed(numbers: list[int]) -> str:
    """Numbers as they go on after "package": " 1" or "s 0, 1"."""
    plural = "s" if len(numbers) > 1 else ""
    return f"{plural} {', '.join(map(str, numbers))}"
