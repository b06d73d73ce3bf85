"""The SEAMCALL console: choose a leaf, fill its registers, call, and read what came back.

panel = ConsolePanel(gpaw=48)
panel.fill("TDH.MNG.CREATE", rcx="free page", rdx="free KeyID")
panel.call.click()                    # as a click on Call does
panel.suggest_build.click()           # fills in the next call on the way to a running TD
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import ipywidgets
from matplotlib.figure import Figure

from tdxlab import views
from tdxlab.study import plots, svg, tables
from tdxlab.study.books import SEPT, read_books
from tdxlab.study.console import MODELLED, Desk, find_leaf
from tdxlab.study.console_views import answer_view, books_view, changes_view
from tdxlab.study.guide import INTERRUPT
from tdxlab.study.panels import Panel
from tdxlab.study.register_rows import RegisterRow
from tdxlab.study.things import usual_thing

_REGISTERS = ("rcx", "rdx", "r8", "r9", "r10", "r11")


class ConsolePanel(Panel):
    """A desk with controls: every SEAMCALL of the model, on any LP, with any registers.

    gpaw: 48 or 52. packages: 1..8, with two LPs each. stages: what the guide has done already.
    leaf, name: what to call, chosen or typed (JupyterLab takes the arrow keys from a list, so the
    keyboard needs the second). lp, version: where, and which version. rows: register -> its row.
    call, interrupt, suggest_build, suggest_tear_down: buttons; the last two only fill in.
    """

    title = "SEAMCALL console"
    figure_height = 2.7

    def __init__(self, gpaw: int = 48, packages: int = 2, stages: Sequence[str] = ()) -> None:
        self.desk = Desk(gpaw, packages)
        self.desk.skip(*stages)
        self.rows = {register: RegisterRow(register) for register in _REGISTERS}
        super().__init__(self.desk.tape)
        self._take_leaf()

    # -- controls

    def controls(self) -> list[ipywidgets.Widget]:
        """What to call, with what, and the buttons that do it."""
        self.leaf = ipywidgets.Dropdown(
            options=list(MODELLED), value="TDH.MNG.CREATE", layout={"width": "270px"}
        )
        self.leaf.add_class("tdxlab-leaf")
        self.leaf.observe(lambda _: self._take_leaf(), names="value")
        self.name = ipywidgets.Text(continuous_update=False, layout={"width": "210px"})
        self.name.add_class("tdxlab-leaf-name")
        self.name.observe(lambda _: self._take_name(), names="value")
        self.lp = _number("LP", "tdxlab-lp", max(self._lps()))
        self.version = _number("version", "tdxlab-version", 0)
        self.call = self.button("Call", "tdxlab-call", self._call, icon="bolt")
        self.interrupt = self.button(
            "Interrupt LP",
            "tdxlab-interrupt",
            lambda: self.desk.interrupt(lp=self.lp.value),
            tooltip="make the guest on this LP leave",
        )
        self.suggest_build = self.button(
            "Fill in: build",
            "tdxlab-suggest-build",
            lambda: self._suggest("build"),
            tooltip="the next call on the way to a running TD; it is not made",
        )
        self.suggest_tear_down = self.button(
            "Fill in: tear down",
            "tdxlab-suggest-tear-down",
            lambda: self._suggest("tear down"),
            tooltip="the next call on the way back to free pages; it is not made",
        )
        self._about = ipywidgets.HTML()
        self._about.add_class("tdxlab-about")
        first = ipywidgets.HBox([self.leaf, self.name, self.lp, self.version])
        buttons = [self.call, self.interrupt, self.suggest_build, self.suggest_tear_down]
        return [
            ipywidgets.VBox(
                [
                    first,
                    self._about,
                    *(row.widget for row in self.rows.values()),
                    ipywidgets.HBox(buttons),
                ],
                layout={"width": "100%"},
            )
        ]

    def fill(
        self,
        leaf: str,
        operands: Mapping[str, int | str] | None = None,
        *,
        lp: int = 0,
        version: int = 0,
        **registers: int | str,
    ) -> None:
        """Choose a leaf, an LP, and registers: numbers or names of things; others stay usual.

        Refuses an unknown leaf, LP, register or thing: ValueError.
        """
        self.leaf.value = find_leaf(leaf).name
        if lp not in self._lps():
            raise ValueError(f"LP {lp} does not exist; choose 0..{max(self._lps())}")
        self.lp.value, self.version.value = lp, version
        for register, value in {**(operands or {}), **registers}.items():
            if register not in find_leaf(leaf).inputs:
                raise ValueError(f"{leaf} does not read {register}")
            self.rows[register].fill(value)

    def _lps(self) -> list[int]:
        return list(self.desk.machine.cpu.lps)

    def _take_name(self) -> None:
        """Choose the leaf whose name was typed; what is no name is told in the panel."""
        if self.name.value != self.leaf.value:
            self.act(lambda: setattr(self.leaf, "value", find_leaf(self.name.value).name))

    def _take_leaf(self) -> None:
        """Show what the chosen leaf reads, and fill in the usual things."""
        leaf = MODELLED[self.leaf.value]
        self.name.value = leaf.name
        self.version.max = max(leaf.versions)
        for register, row in self.rows.items():
            row.show(leaf.inputs.get(register))
            row.fill(0)
            if register in leaf.inputs:
                row.choose(usual_thing(leaf, register))
        self._about.value = f"<b>{escape(leaf.name)}</b> (leaf {leaf.number}): {leaf.summary}"

    def _call(self) -> None:
        leaf = MODELLED[self.leaf.value]
        given = {name: self.rows[name].value for name in leaf.inputs if name in self.rows}
        self.desk.call(leaf.name, given, lp=self.lp.value, version=self.version.value)

    def _suggest(self, goal: str) -> None:
        """Fill in the guide's next call. Refuses when there is none: ValueError."""
        step = self.desk.next(goal)
        if step is None:
            raise ValueError(_NOTHING_NEXT[goal])
        if step.leaf == INTERRUPT:
            raise ValueError(f"a guest runs on LP {step.lp}: choose that LP, press Interrupt LP")
        self.fill(step.leaf, step.registers, lp=step.lp)

    # -- what it shows

    def draw(self) -> None:
        """Show the last call, the books, and offer the things that there are now."""
        self._reply = self.desk.last_reply()
        self._books = read_books(self.machine)
        held = self.desk.held
        for row in self.rows.values():
            row.offer(held)
        super().draw()

    def views(self) -> dict[str, str]:
        """The answer, what it changed, the PAMT, and the other books."""
        changes = self._reply.changes if self._reply else []
        base = self.machine.platform.tdmrs[0].base
        return {
            "What came back": answer_view(self._reply),
            "What changed": changes_view(changes),
            "Pages": svg.pamt_map(views.pamt_rows(self.machine), base),
            "KeyIDs, TDs, vCPUs, S-EPT": books_view(self._books),
        }

    def summary(self) -> str:
        """What the last call did, in a sentence."""
        if self._reply is None:
            return "no call has been made; the module is ready and holds no page."
        action, answer = self._reply.action, self._reply.answer
        count = len(self._reply.changes)
        changed = "1 line of the books" if count == 1 else f"{count} lines of the books"
        return (
            f"{action.name} on LP {action.lp}: {answer.kind}, {answer.text}; it changed {changed}."
        )

    def numbers(self) -> dict[str, int]:
        """Calls made and refused, pages held, KeyIDs in use, S-EPT entries, lines changed."""
        made = tables.played(self.tape)
        return {
            "SEAMCALLs": sum(map(tables.is_seamcall, made)),
            "refused": sum(map(tables.is_refused, made)),
            "pages held": sum(row.pages for row in tables.pamt_pages(self.machine)),
            "KeyIDs in use": len(list(views.key_rows(self.machine))),
            "S-EPT entries": sum(line.book == SEPT for line in self._books),
            "lines changed": len(self._reply.changes) if self._reply else 0,
        }

    def figure(self, figure: Figure) -> None:
        """Pages of each type, and SEAMCALLs of each leaf."""
        left, right = plots.side_by_side(figure, 2, left=0.1, between=0.7)
        plots.pamt_types(tables.pamt_pages(self.machine), left)
        plots.calls_per_leaf(tables.seamcalls_per_leaf(self.tape), right)


_NOTHING_NEXT = {
    "build": "the TD runs, or is on its way out: there is nothing more to build",
    "tear down": "there is no TD to tear down",
}


def _number(label: str, css_class: str, greatest: int) -> ipywidgets.BoundedIntText:
    made = ipywidgets.BoundedIntText(
        description=label,
        max=greatest,
        layout={"width": "120px"},
        style={"description_width": "56px"},
    )
    made.add_class(css_class)
    return made
