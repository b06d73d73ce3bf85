"""Tables of what the console did: a TD's story in rows, pages and KeyIDs call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tdxlab import views
from tdxlab.bare import BareMachine
from tdxlab.study import svg
from tdxlab.study.books import pages, vcpu
from tdxlab.study.console import Desk
from tdxlab.study.palette import BLACK, PAGE_TYPE_LOOKS
from tdxlab.study.show import Drawing, text_table
from tdxlab.study.tables import USED_PAGE_TYPES, pamt_pages
from tdxlab.tape import Tape

_FONT = 8


class StoryRow(NamedTuple):
    """Calls of one leaf in one stage, one after the other. lps: where they were made. answers: the
    names of the statuses. pages: 4 KiB pages that the module holds afterwards.
    """

    stage: str
    leaf: str
    calls: int
    lps: str
    answers: str
    pages: int


class PagesAt(NamedTuple):
    """4 KiB pages of each type in use after `call` actions; `leaf`: the last of them."""

    call: int
    leaf: str
    PT_REG: int
    PT_TDR: int
    PT_TDCX: int
    PT_TDVPR: int
    PT_EPT: int


class KeyAt(NamedTuple):
    """A KeyID after `call` actions. waits_for: packages whose caches must be written back."""

    call: int
    leaf: str
    keyid: int
    state: str
    waits_for: str


def story(desk: Desk, *stages: str) -> list[StoryRow]:
    """Let the guide go through `stages`, and tell what it did."""
    rows: list[StoryRow] = []
    for step in desk.steps(*stages):
        status = desk.do(step).status.removeprefix("TDX_")
        row = StoryRow(step.stage, step.leaf, 1, str(step.lp), status, _held(desk.machine))
        rows.append(_joined(rows.pop(), row) if rows and rows[-1][:2] == row[:2] else row)
    return rows


def _held(machine: BareMachine) -> int:
    return sum(row.pages for row in pamt_pages(machine))


def _joined(one: StoryRow, more: StoryRow) -> StoryRow:
    def both(old: str, new: str) -> str:
        return old if new in old.split(", ") else f"{old}, {new}"

    lps, answers = both(one.lps, more.lps), both(one.answers, more.answers)
    return more._replace(calls=one.calls + 1, lps=lps, answers=answers)


def pages_over_calls(tape: Tape) -> list[PagesAt]:
    """Pages of each type from the first action to the present; leaves the tape where it is."""
    here, rows = tape.position, []
    for position in range(here + 1):
        tape.seek(position)
        counts = {row.page_type: row.pages for row in pamt_pages(tape.machine)}
        rows.append(PagesAt(position, tape.last.name if tape.last else "(boot)", **counts))
    return rows


def keys_over_calls(tape: Tape) -> list[KeyAt]:
    """Every change of the KeyID table from the first action to the present.

    A KeyID that is free at first and not touched has no row.
    """
    here, rows = tape.position, list[KeyAt]()
    known: dict[int, tuple[str, str]] = {}
    for position in range(here + 1):
        tape.seek(position)
        now = _keys(tape.machine)
        for keyid in sorted(known.keys() | now.keys()):
            state, waits_for = now.get(keyid, ("FREE", "-"))
            if known.get(keyid) != (state, waits_for):
                leaf = tape.last.name if tape.last else "(boot)"
                rows.append(KeyAt(position, leaf, keyid, state, waits_for))
                known[keyid] = state, waits_for
    return rows


def _keys(machine: BareMachine) -> dict[int, tuple[str, str]]:
    packages = machine.cpu.packages
    return {
        row.keyid: (
            row.state,
            ", ".join(str(p) for p in packages if row.pending_packages >> p & 1) or "-",
        )
        for row in views.key_rows(machine)
    }


class BillRow(NamedTuple):
    """What a TD's pages are for. pages: 4 KiB pages."""

    what: str
    page_type: str
    pages: int


def page_bill(machine: BareMachine, tdr: int) -> list[BillRow]:
    """What the pages of a TD are for, its TDR included."""
    rows = views.pamt_rows(machine)
    owned = [row.page_type for row in rows if tdr in (row.owner, row.hpa) and row.size == "4K"]
    own = [vcpu(machine, row) for row in pages(machine, "PT_TDVPR") if row.owner == tdr]
    control = views.td_info(machine, tdr)["num_tdcx"]
    return [
        BillRow("TD: its root, the TDR", "PT_TDR", owned.count("PT_TDR")),
        BillRow("TD: its TDCS; the 4th page is the S-EPT root", "PT_TDCX", control),
        BillRow("vCPU: its root, the TDVPR", "PT_TDVPR", len(own)),
        BillRow("vCPU: the rest of its state", "PT_TDCX", sum(one.pages - 1 for one in own)),
        BillRow("S-EPT: tables below the root", "PT_EPT", owned.count("PT_EPT")),
        BillRow("memory of the guest", "PT_REG", owned.count("PT_REG")),
        BillRow("together", "", len(owned)),
    ]


def pamt_drawing(machine: BareMachine) -> Drawing:
    """The PAMT of the first 2 MiB of the TDMR as a map, and its counts as text."""
    counts = [row for row in pamt_pages(machine) if row.pages]
    drawn = svg.pamt_map(views.pamt_rows(machine), machine.platform.tdmrs[0].base)
    return Drawing(drawn, text_table(counts))


def pages_chart(rows: Sequence[PagesAt], ax: Axes) -> Axes:
    """Pages of each type over the calls, stacked. rows: of `pages_over_calls`."""
    ax.clear()
    calls = [row.call for row in rows]
    floor = [0] * len(rows)
    memory, *control = USED_PAGE_TYPES
    for kind in (*control, memory):
        look = PAGE_TYPE_LOOKS[kind]
        top = [low + getattr(row, kind) for low, row in zip(floor, rows, strict=True)]
        ax.fill_between(
            calls,
            floor,
            top,
            step="post",
            facecolor=look.colour,
            hatch=look.hatch,
            edgecolor=BLACK,
            linewidth=0.5,
            label=f"{look.letter} {kind}",
        )
        floor = top
    ax.set_xlabel("calls made", fontsize=_FONT)
    ax.set_ylabel("4 KiB pages", fontsize=_FONT)
    ax.set_title("PAMT: pages that the module holds, by type", fontsize=_FONT + 1, loc="left")
    ax.tick_params(labelsize=_FONT, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    ax.legend(fontsize=_FONT - 1, loc="upper left", frameon=False)
    ax.set_xlim(0, max(calls[-1], 1))
    ax.set_ylim(0, max([*floor, 1]) * 1.1)
    return ax
