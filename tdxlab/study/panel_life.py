"""The life-cycle panel: build a TD, let its guest touch memory, take a page away, tear it down.

    life = LifePanel(gpaw=48)
    life.build.click()
    life.page.value = 1
    life.touch.click()

Each button is a command that makes a run of SEAMCALLs and guest events on the panel's tape. What
the host keeps in mind (free pages, which tables it has added) is not on the tape; a command given
after a step back therefore lives the story again from the start, up to the last whole command
before the present position, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import ipywidgets
from matplotlib.figure import Figure

from tdxlab import views
from tdxlab.arch import PAGE_SIZE, sept_levels
from tdxlab.cpu import Translation
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import CODE_GPA, booted_machine
from tdxlab.seam.rules import SEPT_STATE_BY_NAME
from tdxlab.seam.sept import Septe
from tdxlab.study import plots, svg, tables
from tdxlab.study.panels import Panel, operand_rows
from tdxlab.study.show import Drawing
from tdxlab.tape import Action, Tape

#: Pages that the guest can touch: number 0 is measured at launch, the others it gets when it asks.
GUEST_PAGES = 8
GREETING = b"the guest's first instructions"


class _Command(NamedTuple):
    """One click: its name, the guest page it concerns, and where on the tape it ended."""

    name: str
    page: int
    end: int


class LifePanel(Panel):
    """A TD of one vCPU on a booted machine.

    gpaw: 48 or 52. build, touch, remove, tear_down: the buttons. page: slider that chooses the
    guest page (0..7) for touch and remove.
    td: the TD as its host sees it, None before it is built and after it is torn down.
    """

    title = "A TD's life"
    figure_height = 2.4

    def __init__(self, *, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.levels = sept_levels(gpaw)
        self.td: HostTd | None = None
        self._commands: list[_Command] = []
        super().__init__(Tape(booted_machine()))

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """Build, touch, remove, tear down, and the page."""
        self.build = self._command_button("Build", "build")
        self.touch = self._command_button("Touch", "touch")
        self.remove = self._command_button("Remove", "remove")
        self.tear_down = self._command_button("Tear down", "tear-down")
        self.page = ipywidgets.IntSlider(
            description="guest page",
            tooltip="the page that Touch and Remove act on",
            max=GUEST_PAGES - 1,
            layout={"flex": "1 1 200px"},
        )
        self.page.add_class("tdxlab-page")
        return [self.build, self.touch, self.remove, self.tear_down, self.page]

    def _command_button(self, description: str, name: str) -> ipywidgets.Button:
        return self.button(description, f"tdxlab-{name}", lambda: self.command(name))

    # -- commands

    def command(self, name: str) -> None:
        """Do "build", "touch", "remove" or "tear-down", from the present position on.

        Refuses a second TD, and a command for which there is no TD or no page: ValueError.
        """
        self._go_to_whole_command()
        if name == "build" and self.td is not None:
            raise ValueError("the TD is there already; tear it down first, or reset")
        if name != "build" and self.td is None:
            raise ValueError("there is no TD; press Build first")
        self._run(name, self.page.value)

    def _go_to_whole_command(self) -> None:
        """Drop what lies ahead, live the story again, and stand at the end of its last command."""
        kept = [command for command in self._commands if command.end <= self.tape.position]
        if len(kept) == len(self._commands) and self.tape.position == len(self.tape):
            return
        self.tape.seek(0)
        self.td, self._commands = None, []
        for command in kept:
            self._run(command.name, command.page)

    def _run(self, name: str, page: int) -> None:
        """Do a command and note where it ended; one that was refused at once leaves no trace."""
        start = self.tape.position
        try:
            _COMMANDS[name](self, CODE_GPA + page * PAGE_SIZE)
        finally:
            if self.tape.position > start:
                self._commands.append(_Command(name, page, self.tape.position))

    def _build(self, _: int) -> None:
        td = HostTd(Host(self.machine, self.tape), gpaw=self.gpaw, max_vcpus=1)
        self.td = td
        td.add_vcpu(lp=0)
        td.add_page(CODE_GPA, GREETING)
        td.measure(CODE_GPA)
        td.finalize()

    def _touch(self, gpa: int) -> None:
        """The guest writes; if it exits, the host maps a page, the guest accepts it and writes."""
        td = self._td()
        self._enter(td)
        self.tape.phase = "touch"
        if isinstance(self.tape.touch(0, gpa, write=True), Translation):
            return
        td.aug(gpa, lp=1)
        self._enter(td)
        td.accept(0, gpa)
        self.tape.phase = "touch"
        self.tape.touch(0, gpa, write=True)

    def _enter(self, td: HostTd) -> None:
        if not self.machine.cpu.vcpu_inside(0):
            td.enter(0, lp=0)

    def _remove(self, gpa: int) -> None:
        self._td().zap(gpa, lp=1)

    def _tear_down(self, _: int) -> None:
        self._td().tear_down()
        self.td = None

    def _td(self) -> HostTd:
        assert self.td is not None
        return self.td

    # -- what the panel shows

    def views(self) -> dict[str, str]:
        """The Secure EPT above the registers of the last call, and beside them the PAMT."""
        registers = register_table(self.tape.last)
        return {
            "What the guest can reach": f"{self.tree().svg}{registers}",
            "Who owns which page": svg.pamt_map(views.pamt_rows(self.machine), self._base()),
        }

    def tree(self) -> Drawing:
        """The Secure EPT as a tree, with its entries in words."""
        tdrs = views.tds(self.machine)
        rows = [row for tdr in tdrs for row in views.sept_rows(self.machine, tdr)]
        title = f"Secure EPT, {self.levels} levels"
        words = tables.sept_occupancy(self.machine)
        lines = [f"{row.level}: {row.entries} {row.state}" for row in words] or ["no entry in use"]
        return Drawing(svg.sept_tree(rows, levels=self.levels, title=title), "\n".join(lines))

    def _base(self) -> int:
        return svg.pamt_base(self.machine.platform.tdmrs[0].base)

    def summary(self) -> str:
        """What the TD is, what it owns, what it took."""
        calls = self.numbers()["SEAMCALLs"]
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
        """SEAMCALLs, TDCALLs, guest pages and their states, pages owned, pages cleared."""
        calls = tables.seamcalls_per_leaf(self.tape)
        states = tables.sept_states(self.machine)
        done = [action.kind for action in tables.played(self.tape)]
        return {
            "SEAMCALLs": sum(row.calls for row in calls),
            "refused": sum(row.refused for row in calls),
            "TDCALLs": done.count("TDCALL"),
            "S-EPT tables": states.get("NL_MAPPED", 0),
            "pages mapped": states.get("MAPPED", 0),
            "pages pending": states.get("PENDING", 0),
            "pages owned": sum(row.pages for row in tables.pamt_pages(self.machine)),
            "pages cleared": done.count("clear"),
        }

    def figure(self, figure: Figure) -> None:
        """S-EPT occupancy, PAMT types, SEAMCALLs per phase."""
        left, middle, right = plots.side_by_side(figure, 3)
        plots.occupancy(tables.sept_occupancy(self.machine), left)
        plots.pamt_types(tables.pamt_pages(self.machine), middle)
        plots.calls_per_phase(tables.seamcalls_per_phase(self.tape), right)

    def actions_of(self, name: str) -> list[Action]:
        """The actions of the last command `name`; [] if it was not given."""
        start, found = 0, range(0)
        for command in self._commands:
            if command.name == name:
                found = range(start, command.end)
            start = command.end
        return self.tape.actions[found.start : found.stop]


_COMMANDS: dict[str, Callable[[LifePanel, int], None]] = {
    "build": LifePanel._build,
    "touch": LifePanel._touch,
    "remove": LifePanel._remove,
    "tear-down": LifePanel._tear_down,
}


def register_table(action: Action | None) -> str:
    """The inputs of a call as an HTML table: register, value, what it means."""
    rows = operand_rows(action) if action is not None else []
    if not rows:
        return '<p style="line-height:1.4">no registers: this is no call of the module</p>'
    cells = "".join(
        f'<tr><td>{name}</td><td><code>{value:#x}</code></td><td style="text-align:left">'
        f"{escape(meaning)}</td></tr>"
        for name, value, meaning in rows
    )
    style = f"font-size:12px;line-height:1.3;max-width:{svg.TREE_WIDTH}px"
    heading = "<div><strong>The registers of this call</strong></div>"
    return f'{heading}<table style="{style}">{cells}</table>'


class Reader(NamedTuple):
    """What two readers see of one guest page: the guest under its KeyID, the host under KeyID 0."""

    page: int
    sept_state: str
    pamt_type: str
    guest_reads: str
    host_reads: str


def who_may_touch(panel: LifePanel) -> list[Reader]:
    """The first 16 bytes of each page in the Secure EPT as guest and host read them.

    Changes nothing. Bytes that are no letters are shown as dots; a page that its S-EPT entry keeps
    from the guest as "(no access)". No rows while the TD has no working KeyID.
    """
    memory = panel.machine.memory
    types = {row.hpa: row.page_type for row in views.pamt_rows(panel.machine)}
    found = []
    for td in tables.tds(panel.machine):
        for row in views.sept_rows(panel.machine, td.tdr):
            if row.sept_level or td.lifecycle != "TD_KEYS_CONFIGURED":
                continue
            hpa = Septe(row.raw).hpa
            can_read = SEPT_STATE_BY_NAME[row.state].guest_accessible
            guest = _letters(memory.read(hpa, 16, td.keyid)) if can_read else "(no access)"
            host = _letters(memory.read(hpa, 16))
            page = (row.gpa - CODE_GPA) // PAGE_SIZE
            found.append(Reader(page, row.state, types[hpa], guest, host))
    return found


def _letters(data: bytes) -> str:
    """Bytes as ASCII letters, a dot for each that is none."""
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
