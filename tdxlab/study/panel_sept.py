"""The state-machine walker: one Secure EPT entry, every call on it, and what the module says.

panel = SeptWalker(gpaw=48)
panel.step.click()                       # along the recorded story
panel.entry.value = "2M 0x40000000"      # look at another entry
panel.moves["RANGE.BLOCK"].click()       # ... and leave the story for a way of one's own
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import Any

import ipywidgets

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.status import describe
from tdxlab.arch import SEPT_LEVEL_NAMES, level_size, table_index
from tdxlab.scenarios import answer
from tdxlab.seam.rules import OP_INITIALIZED, OP_STATE_NAMES
from tdxlab.study import diagram
from tdxlab.study.palette import SEPT_LOOKS
from tdxlab.study.panels import Panel
from tdxlab.study.plots import Canvas
from tdxlab.study.sept_diagram import View
from tdxlab.study.sept_diagram import diagram as state_svg
from tdxlab.study.sept_entry import bit_strip, entry_table, state_bits_text
from tdxlab.study.sept_lab import FIRST_GPA, NO_TABLE, NOT_DONE, SeptLab
from tdxlab.study.sept_moves import ILLEGAL, LATER, LEGAL, MOVES, REACHED, Prospect
from tdxlab.study.sept_tables import state_counts
from tdxlab.study.show import Picture, text_table
from tdxlab.study.svg import CELL, entry_map, map_place
from tdxlab.tape import Action

#: Verdict of the matrices -> icon, colour and words of a move's button: never colour alone.
_BUTTONS = {
    LEGAL: ("check", "#b7e4d3", "legal"),
    LATER: ("clock-o", "#f7e3b0", "later"),
    ILLEGAL: ("times", "#eeeeee", "not legal"),
}

_BIG_GPA = FIRST_GPA + level_size(1)


class SeptWalker(Panel):
    """Walks one entry through its states; the tape starts with a recorded story.

    gpaw: 48 or 52. story: False for an empty tape.
    entry: chooses the entry, by level and GPA. moves: name of a move -> its button. retell: records
    the story anew.
    """

    title = "Secure EPT: the state-machine walker"
    figure_height = 0

    def __init__(self, *, gpaw: int = 48, story: bool = True) -> None:
        self.lab = SeptLab(gpaw=gpaw)
        self.places = _places(self.lab.top)
        self.entry = ipywidgets.Dropdown(
            options=list(self.places), description="entry", layout={"width": "250px"}
        )
        self.entry.add_class("tdxlab-entry")
        if story:
            tell(self.lab)
            self.lab.tape.seek(0)
        super().__init__(self.lab.tape)
        self.entry.observe(lambda _: self.act(lambda: None), names="value")

    # -- the chosen entry

    @property
    def place(self) -> tuple[int, int]:
        """(gpa, sept_level) of the chosen entry."""
        return self.places[self.entry.value]

    @property
    def state(self) -> str:
        """State of the chosen entry."""
        return self.lab.state(*self.place)

    def prospects(self) -> dict[str, Prospect]:
        """Move -> what the matrices say of it for the chosen entry."""
        return self.lab.prospects(*self.place)

    # -- what the base class asks for

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The entry, the story, and a button for each move."""
        self.retell = self.button(
            "Tell the story again",
            "tdxlab-retell",
            self._retell,
            icon="book",
            tooltip="forget the calls on the tape and record the story anew",
        )
        self.moves = {
            move.name: self.button(
                move.name, _css_class(move.name), partial(self._make, move.name), tooltip="..."
            )
            for move in MOVES
        }
        for button in self.moves.values():
            button.layout.padding, button.style.text_color = "0 2px", "#212121"
        columns = {"grid_template_columns": "repeat(6, 1fr)", "width": "100%"}
        grid = ipywidgets.GridBox(list(self.moves.values()), layout=columns)
        return [ipywidgets.HBox([self.entry, self.retell]), grid]

    def draw(self) -> None:
        """Show the present state, on the moves' buttons too."""
        super().draw()
        for name, (verdict, reason) in self.prospects().items():
            icon, colour, word = _BUTTONS[verdict]
            button = self.moves[name]
            button.icon, button.style.button_color = icon, colour
            button.tooltip = f"{name}: {word}: {reason}"

    def views(self) -> dict[str, str]:
        """The diagram, the raw entry, its table, and the last answer beside the TD's books."""
        return {
            "State of the chosen entry": self._diagram(),
            f"Its 64 bits: {self.state}": self._entry(),
            "Its table": self._table(),
            "The last answer": self._books(),
        }

    def summary(self) -> str:
        """Where the entry stands, what may move it, and what came last."""
        is_there = self.state != NO_TABLE
        stands = f"is {self.state}" if is_there else "does not exist yet, no table holds it"
        return f"the {self._name()} {stands}{self._came()}{self._reach()}. {self._ahead()}"

    def numbers(self) -> dict[str, int]:
        """Entries in each state that this model reaches, and what the TD counts."""
        states, info = self.lab.states(), self.lab.info
        return {name: states[name] for name in REACHED} | {
            "td_epoch": info["td_epoch"],
            "vCPUs inside": int(self.lab.is_inside),
            "chldcnt": info["chldcnt"],
            "legal moves": sum(found.verdict == LEGAL for found in self.prospects().values()),
        }

    def png(self) -> bytes:
        """The state diagram with counts, for readers without a kernel."""
        return state_picture(self.lab, current=self.state).png

    def _repr_mimebundle_(self, **given: object) -> dict[str, Any]:
        return super()._repr_mimebundle_(**given) | {"image/png": b64encode(self.png()).decode()}

    # -- what the buttons do

    def _make(self, name: str) -> None:
        answer = self.lab.do(name, *self.place)
        if answer.outcome.startswith(NOT_DONE):
            raise ValueError(answer.outcome)

    def _retell(self) -> None:
        self.tape.seek(0)
        tell(self.lab)
        self.tape.seek(0)

    # -- the views

    def _name(self) -> str:
        gpa, level = self.place
        return f"{SEPT_LEVEL_NAMES[level]} entry of GPA {gpa:#x}"

    def _came(self) -> str:
        change = self.last_change()
        if change is None or NO_TABLE in change:
            return ""
        return f", was {change[0]} before the last call"

    def _reach(self) -> str:
        gpa, level = self.place
        stop = self.lab.walk(gpa, level).sept_level
        if stop == level or self.state == NO_TABLE:
            return ""
        return f", out of reach: the walk stops at the {SEPT_LEVEL_NAMES[stop]} entry above"

    def _ahead(self) -> str:
        found = self.prospects()
        legal = [name for name, (verdict, _) in found.items() if verdict == LEGAL]
        later = [name for name, (verdict, _) in found.items() if verdict == LATER]
        text = f"Legal now: {', '.join(legal)}."
        return f"{text} Only after BLOCK and TRACK: {', '.join(later)}." if later else text

    def _diagram(self) -> str:
        verdicts = {name: verdict for name, (verdict, _) in self.prospects().items()}
        _, level = self.place
        is_building = self.lab.op_state == OP_INITIALIZED
        view = View(self.state, level, self.lab.top, is_building, verdicts, self.last_change())
        return state_svg(self.lab.states(), view)

    def last_change(self) -> tuple[str, str] | None:
        """(before, after) of the chosen entry in the last action; None if it did not change."""
        now = self.tape.position
        if now == 0:
            return None
        self.tape.seek(now - 1)
        before = self.state
        self.tape.seek(now)
        return (before, self.state) if before != self.state else None

    def _entry(self) -> str:
        if self.state == NO_TABLE:
            return "<p>There is no such entry yet: TDH.MEM.SEPT.ADD makes its table.</p>"
        raw, seen = self.lab.raw(*self.place), self.lab.read(*self.place)
        shown = "nothing: the walk stops above" if seen is None else str(seen)
        return (
            f'<div style="width:335px;line-height:1.4"><code>{raw:#018x}</code>{bit_strip(raw)}'
            f'<div style="font-size:11px"><code>{state_bits_text(raw)}</code></div>'
            f"{entry_table(raw, seen)}"
            f"<div>SEPT.RD shows <code>{escape(shown)}</code></div></div>"
        )

    def _table(self) -> str:
        gpa, level = self.place
        states = self.lab.table(gpa, level)
        if not states:
            return "<p>The table is not there.</p>"
        cells = {i: SEPT_LOOKS[state] for i, state in enumerate(states) if state != "FREE"}
        index = table_index(gpa, level)
        name = SEPT_LEVEL_NAMES[level]
        shown = entry_map(cells, title=f"512 {name} entries; the chosen one is number {index}")
        return shown.replace("</svg>", f"{_frame(index)}</svg>")

    def _books(self) -> str:
        info = self.lab.info
        rows = {
            "answer": _said(self.tape.last),
            "op-state": OP_STATE_NAMES[self.lab.op_state],
            "TD epoch": str(info["td_epoch"]),
            "vCPUs inside (even, odd epoch)": f"{info['refcount0']}, {info['refcount1']}",
            "BEPOCH of what the entry maps": str(self.lab.bepoch(*self.place)),
            "TDR.chldcnt": str(info["chldcnt"]),
        }
        lines = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
        style = "font-size:12px;line-height:1.3;text-align:left;max-width:380px"
        return f'<table style="{style}">{lines}</table>'


def state_picture(lab: SeptLab, *, current: str | None = None) -> Picture:
    """The state diagram with the counts of a lab's TD. current: a state to mark."""
    canvas = Canvas(3.4)
    axes = canvas.figure.add_axes((0.02, 0.02, 0.96, 0.96))
    diagram.sept_diagram(lab.states(), axes, current=current)
    return Picture(canvas.png(), text_table(state_counts(lab)))


def _said(action: Action | None) -> str:
    """What came of an action, in a sentence."""
    if action is None:
        return "nothing has been asked yet"
    status = action.status
    is_plain = status is None or status == IN_GUEST or action.exited or action.kind == "touch"
    said = answer(action) if status is None or is_plain else describe(status)
    return f"{action.name}: {said}"


def _places(top: int) -> dict[str, tuple[int, int]]:
    """Name -> (gpa, sept_level) of the entries that can be chosen."""
    found = [(FIRST_GPA, 0), (FIRST_GPA + level_size(0), 0), (FIRST_GPA, 1), (_BIG_GPA, 1)]
    found += [(FIRST_GPA & -level_size(level), level) for level in range(2, top + 1)]
    return {f"{SEPT_LEVEL_NAMES[level]} {gpa:#x}": (gpa, level) for gpa, level in found}


def _frame(index: int) -> str:
    """A thick frame around one entry of the map."""
    x, y = map_place(index)
    return (
        f'<rect class="tdxlab-chosen" x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
        f'fill="none" stroke="#000" stroke-width="3"/>'
    )


def _css_class(name: str) -> str:
    return f"tdxlab-move-{name.lower().replace('.', '-')}"


def tell(lab: SeptLab) -> None:
    """The story: a page that is there from the start, taken away; a page given later, accepted; a
    blocked parent.
    """
    lab.build()
    lab.play("PAGE.ADD", "MR.FINALIZE", "VP.ENTER", "read")
    lab.play("PAGE.REMOVE", "RANGE.BLOCK", "read", "PAGE.REMOVE", "TRACK", "PAGE.REMOVE")
    lab.play("kick", "PAGE.REMOVE", "PAGE.AUG", "VP.ENTER", "write", "PAGE.ACCEPT", "write")
    lab.do("RANGE.BLOCK", level=1)
    lab.play("PAGE.REMOVE", "TRACK", "kick")
    lab.do("RANGE.UNBLOCK", level=1)
