"""The life-cycle panel: build a TD, let its guest use private and shared memory, tear it down.

    life = LifePanel(gpaw=48)
    life.build.click()
    life.page.value = 1
    life.touch.click()                   # private: mirror and Secure EPT
    life.share.click()                   # MapGPA: the page leaves both
    life.touch_shared.click()            # shared: the direct EPT

Each button puts one command on the tape. A command given after a step back goes on from the last
whole command before the present position; what lay ahead is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import ipywidgets
from matplotlib.figure import Figure

from tdxlab import views
from tdxlab.accounts import DIRECT, EXTERNAL, MIRROR, TREES
from tdxlab.arch import SEPT_LEVEL_NAMES
from tdxlab.scenarios import answer
from tdxlab.seam.rules import SEPT_STATE_BY_NAME
from tdxlab.study import plots, svg, tables
from tdxlab.study.life_lab import GUEST_PAGES, LifeLab, TreeTable
from tdxlab.study.life_tape import TDCALL, LifeTape
from tdxlab.study.life_views import (
    HEADINGS,
    entries_bars,
    tables_bars,
    tree_counts,
    tree_drawing,
    tree_svg,
)
from tdxlab.study.mirror_lab import MAPPED
from tdxlab.study.panels import Panel, operand_rows
from tdxlab.study.show import Drawing
from tdxlab.tape import Action
from tdxlab.vmm_td import Td

#: Characters of operands that a table of deeds shows.
_OPERANDS = 64


class _Command(NamedTuple):
    """One click: its name, and where on the tape it ended."""

    name: str
    end: int


class LifePanel(Panel):
    """A TD of one vCPU on a machine with Linux.

    gpaw: 48 or 52. build, touch, share, touch_shared, tear_down: the buttons. page: slider that
    chooses the guest page (0..7) for those in the middle.
    """

    title = "A TD's life"
    figure_height = 2.5
    tape: LifeTape

    def __init__(self, *, gpaw: int = 48) -> None:
        self.lab = LifeLab(gpaw=gpaw)
        self._commands: list[_Command] = []
        super().__init__(self.lab.tape)

    @property
    def td(self) -> Td | None:
        """The TD as its VMM sees it, None before it is built and after it is torn down."""
        return self.lab.td

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The five commands, and the page."""
        self.build = self._command_button("Build", "build")
        self.touch = self._command_button("Touch", "touch")
        self.share = self._command_button("Share", "share")
        self.touch_shared = self._command_button("Touch shared", "touch-shared")
        self.tear_down = self._command_button("Tear down", "tear-down")
        self.page = ipywidgets.IntSlider(
            description="guest page",
            tooltip="the page that Touch, Share and Touch shared act on",
            max=GUEST_PAGES - 1,
            layout={"flex": "1 1 200px"},
        )
        self.page.add_class("tdxlab-page")
        buttons = [self.build, self.touch, self.share, self.touch_shared, self.tear_down]
        return [*buttons, self.page]

    def _command_button(self, description: str, name: str) -> ipywidgets.Button:
        return self.button(description, f"tdxlab-{name}", lambda: self.command(name))

    # -- commands

    def command(self, name: str) -> None:
        """Do "build", "touch", "share", "touch-shared" or "tear-down" to the chosen page, behind
        the last whole command.

        Refuses what makes no sense for the TD or for the page: ValueError.
        """
        kept = [command for command in self._commands if command.end <= self.tape.position]
        here = self.tape.position
        self.tape.seek(kept[-1].end if kept else 0)
        try:
            _COMMANDS[name](self.lab, int(self.page.value))
        except ValueError:
            self.tape.seek(min(here, len(self.tape)))
            raise
        self._commands = [*kept, _Command(name, len(self.tape))]

    def deeds_of(self, name: str) -> list[Deed]:
        """What happened in the last command `name`, behind which the tape must stand; [] if it was
        not given.
        """
        start, found = 0, range(0)
        for command in self._commands:
            if command.name == name:
                found = range(start + 1, command.end + 1)
            start = command.end
        actions = [action for position in found for action in self.tape.actions_at(position)]
        return [_deed(number, action) for number, action in enumerate(actions, start=1)]

    # -- what the panel shows

    def views(self) -> dict[str, str]:
        """The three trees, then the registers of the last call beside the PAMT."""
        trees = self.lab.trees()
        drawn = {
            HEADINGS[tree]: tree_svg(trees[tree], levels=self.lab.levels, tree=tree)
            for tree in TREES
        }
        pages = svg.pamt_map(views.pamt_rows(self.machine), self.lab.page_base())
        registers = register_table(self.tape.last)
        return {**drawn, "The registers of this call": registers, "PAMT: who owns each page": pages}

    def tree(self, tree: str) -> Drawing:
        """One tree, "mirror", "external" or "direct", for the end of a cell."""
        return tree_drawing(self.lab, tree)

    def summary(self) -> str:
        """What the TD is, what it owns, what it took."""
        calls = sum(row.calls for row in self.tape.leaf_counts())
        found = tables.tds(self.machine)
        if not found:
            return f"no TD exists; {calls} SEAMCALLs so far."
        td = found[0]
        state = td.lifecycle if td.op_state == "-" else f"{td.lifecycle}, {td.op_state}"
        return (
            f"the TD is {state}, with {td.vcpus} vCPU and {td.pages} pages besides its TDR; "
            f"{calls} SEAMCALLs so far."
        )

    def numbers(self) -> dict[str, int]:
        """SEAMCALLs, TDCALLs, tables and leaves of the three trees, pages that the module owns."""
        calls = self.tape.leaf_counts()
        trees = self.lab.trees()
        return {
            "SEAMCALLs": sum(row.calls for row in calls),
            "refused": sum(row.refused for row in calls),
            "TDCALLs": sum(event.kind == TDCALL for event in self.tape.events),
            "mirror tables": len(trees[MIRROR]),
            "S-EPT tables": len(trees[EXTERNAL]),
            "direct tables": len(trees[DIRECT]),
            "mirror leaves": _leaves(trees[MIRROR]),
            "S-EPT leaves": _leaves(trees[EXTERNAL]),
            "direct leaves": _leaves(trees[DIRECT]),
            "pages owned": sum(row.pages for row in tables.pamt_pages(self.machine)),
        }

    def figure(self, figure: Figure) -> None:
        """Tables and entries of each level, SEAMCALLs of each phase."""
        left, middle, right = plots.side_by_side(figure, 3, left=0.06, between=0.5)
        rows = tree_counts(self.lab)
        tables_bars(rows, left)
        entries_bars(rows, middle)
        plots.calls_per_phase(self.tape.phase_counts(), right)


_COMMANDS: dict[str, Callable[[LifeLab, int], None]] = {
    "build": lambda lab, page: lab.build(),
    "touch": LifeLab.touch,
    "share": LifeLab.share,
    "touch-shared": LifeLab.touch_shared,
    "tear-down": lambda lab, page: lab.tear_down(),
}


def _leaves(found: Sequence[TreeTable]) -> int:
    """Entries in use in the lowest tables."""
    return sum(len(table.entries) for table in found if table.level == 0)


def register_table(action: Action | None) -> str:
    """The inputs of a call as an HTML table: register, value, what it means."""
    rows = operand_rows(action) if action is not None else []
    if not rows:
        nothing = "no registers: this is no call of the module"
        return f'<div style="line-height:1.4;width:{svg.TREE_WIDTH}px">{nothing}</div>'
    cells = "".join(
        f'<tr><td>{name}</td><td><code>{value:#x}</code></td><td style="text-align:left">'
        f"{escape(meaning)}</td></tr>"
        for name, value, meaning in rows
    )
    style = f"font-size:12px;line-height:1.3;width:{svg.TREE_WIDTH}px"
    return f'<table style="{style}">{cells}</table>'


class Deed(NamedTuple):
    """One thing that was done. kind: "KVM store", "SEAMCALL", "TDCALL" or "VM exit"."""

    step: int
    kind: str
    what: str
    answer: str
    operands: str


def _deed(number: int, action: Action) -> Deed:
    given = " ".join(f"{name}={n:#x}" for name, n in action.inputs.items() if name != "rax")
    return Deed(number, action.kind, action.name, answer(action), given[:_OPERANDS])


class Reader(NamedTuple):
    """What two readers see of one guest page: the guest through its tree, the host under KeyID 0.
    kind: private or shared, by the tree that maps it.
    """

    page: int
    kind: str
    state: str
    guest_reads: str
    host_reads: str


def who_may_touch(panel: LifePanel) -> list[Reader]:
    """The first 16 bytes of each page in the two trees that the CPU walks, as guest and host read
    them.

    Changes nothing. Bytes that are no letters are shown as dots; a page that its S-EPT entry keeps
    from the guest as "(no access)". No rows while the TD has no working KeyID.
    """
    td = panel.td
    if td is None or td.keyid is None:
        return []
    read = panel.machine.memory.read
    rows, trees = [], panel.lab.trees()
    for tree, kind, keyid in ((EXTERNAL, "private", td.keyid), (DIRECT, "shared", 0)):
        leaves = [entry for table in trees[tree] if table.level == 0 for entry in table.entries]
        for entry in leaves:
            is_open = entry.state == MAPPED or (
                tree == EXTERNAL and SEPT_STATE_BY_NAME[entry.state].guest_accessible
            )
            guest = _letters(read(entry.hpa, 16, keyid)) if is_open else "(no access)"
            host = _letters(read(entry.hpa, 16))
            rows.append(Reader(entry.number, kind, entry.state, guest, host))
    return rows


def _letters(data: bytes) -> str:
    """Bytes as ASCII letters, a dot for each that is none."""
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)


class TableReader(NamedTuple):
    """One table of a tree. entry: the first one in use, as it is; host_reads: the same word as the
    host reads it in memory, under KeyID 0.
    """

    tree: str
    level: str
    table: str
    number: int
    entry: str
    host_reads: str


def who_can_read_the_tables(panel: LifePanel) -> list[TableReader]:
    """The first entry in use of every table, for the host that owns the memory. Changes nothing."""
    rows = []
    for tree, found in panel.lab.trees().items():
        for table in found:
            if not table.entries:
                continue
            number, _, _, raw = table.entries[0]
            seen = panel.machine.memory.read(table.hpa + 8 * number, 8)
            host = int.from_bytes(seen, "little")
            level = SEPT_LEVEL_NAMES[table.level]
            rows.append(
                TableReader(tree, level, f"{table.hpa:#x}", number, f"{raw:#x}", f"{host:#x}")
            )
    return rows
