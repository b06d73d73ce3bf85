"""The GPA splitter of notebook 01: type or slide a GPA, see what CPU and KVM make of it; touch it.

panel = GpaSplitter(gpaw=48)
panel.gpa.value = "0x800012345678"       # type a GPA
panel.level.value = 4; panel.index.value = 255   # ... or change one of its indices
panel.other_half.click()                 # ... or flip its shared bit
panel.touch.click()                      # let the guest of a real TD read it

What is shown follows the choice; only Touch does something to the machine. Moving along the tape
chooses the GPA that the guest touched last.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.arch import GPAW_CHOICES, shared_bit
from tdxlab.kvm.page_fault import PFERR_PRIVATE_ACCESS
from tdxlab.study.gpa_lab import GpaLab, edge_gpas
from tdxlab.study.gpa_split import EXAMPLE_GPA, last_index, level_name, split, vm_rows
from tdxlab.study.gpa_views import Mark, bit_fields, halves, root_map, walk_picture
from tdxlab.study.panels import Panel
from tdxlab.study.plots import side_by_side

_CELL_STYLE = "padding:0 6px 0 0;text-align:left;vertical-align:top"


class GpaSplitter(Panel):
    """A GPA of a TD, taken apart.

    gpaw: 48 or 52. gpa: text field, a number such as 0x12345678. level, index: the level and the
    index to put there. other_half, touch, retell: the buttons. chosen: the GPA that is shown.
    """

    title = "GPA splitter"
    figure_height = 1.2

    def __init__(self, *, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.lab = GpaLab(gpaw=gpaw)
        tell(self.lab)
        self.lab.tape.seek(0)
        self.chosen = split(EXAMPLE_GPA, gpaw)
        self._place = 0
        self._is_syncing = False
        super().__init__(self.lab.tape)

    # -- choosing

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The text field, level and index, and the two buttons."""
        self.gpa = ipywidgets.Text(
            description="GPA", continuous_update=False, layout={"width": "240px"}
        )
        self.level = ipywidgets.Dropdown(
            description="index of",
            options=[(level_name(level), level) for level in range(self.chosen.levels, 0, -1)],
            layout={"width": "170px"},
        )
        self.index = ipywidgets.IntSlider(
            tooltip="the index of the chosen level", layout={"flex": "1 1 220px"}
        )
        for name in ("gpa", "level", "index"):
            getattr(self, name).add_class(f"tdxlab-{name}")
        self.other_half = self.button(
            "Other half",
            "tdxlab-other-half",
            lambda: self.choose(self.chosen.alias),
            icon="exchange",
            tooltip="flip the shared bit",
        )
        self.touch = self.button(
            "Touch",
            "tdxlab-touch",
            lambda: self.lab.touch(self.chosen.gpa),
            icon="hand-pointer-o",
            tooltip="let the guest read the byte at this GPA",
        )
        book = {"icon": "book", "tooltip": "record the first touches anew, forget the others"}
        self.retell = self.button("Tell the story again", "tdxlab-retell", self._retell, **book)
        self.choose(self.chosen.gpa)
        self.gpa.observe(self._typed, names="value")
        self.level.observe(lambda _: self._show_choice(), names="value")
        self.index.observe(self._slid, names="value")
        choice = ipywidgets.HBox([self.gpa, self.level, self.index], layout={"width": "100%"})
        return [choice, self.other_half, self.touch, self.retell]

    def choose(self, gpa: int) -> None:
        """Show a GPA. Refuses one that the guest cannot form: ValueError."""
        self.chosen = split(gpa, self.gpaw)
        self._show_choice()

    def _retell(self) -> None:
        self.tape.seek(0)
        tell(self.lab)
        self.tape.seek(0)

    def _show_choice(self) -> None:
        """Put the controls where the choice is."""
        self._is_syncing = True
        try:
            self.gpa.value = f"{self.chosen.gpa:#x}"
            self.index.max = last_index(self.gpaw, self.level.value)
            self.index.value = self.chosen.index(self.level.value)
        finally:
            self._is_syncing = False

    def _typed(self, change: dict[str, Any]) -> None:
        if not self._is_syncing:
            self.act(lambda: self.choose(number(change["new"])))

    def _slid(self, change: dict[str, Any]) -> None:
        if not self._is_syncing:
            moved = self.chosen.with_index(self.level.value, change["new"])
            self.act(lambda: self.choose(moved.gpa))

    def draw(self) -> None:
        """Show the chosen GPA; after a move along the tape, the one that was touched last."""
        if self._place != self.tape.position:
            self._place = self.tape.position
            last = self.lab.last_gpa
            self.choose(EXAMPLE_GPA if last is None else last)
        super().draw()

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """Its bits, the two walks, what KVM makes of it, and the root table."""
        return {
            "The bits": bit_fields(self.chosen),
            "What the CPU walks": walk_picture(self.chosen),
            "What KVM makes of it": self._kvm(),
            "The root table": root_map(self.gpaw, self.chosen).svg,
        }

    def summary(self) -> str:
        """The chosen GPA, and the last touch."""
        at = self.chosen
        verb = "set" if at.is_shared else "clear"
        return (
            f"GPA {at.gpa:#x} is {at.half}: bit {shared_bit(self.gpaw)} is {verb}. The CPU walks "
            f"the {at.table} from root entry {at.index(at.levels)}, KVM the {at.root} root; "
            f"gfn {at.gfn:#x}. {self._last_touch()}"
        )

    def _last_touch(self) -> str:
        touches = self.lab.touches()
        if not touches:
            return "The guest has touched nothing yet."
        last = touches[-1]
        told = "" if last.host_is_told == "-" else f", the host is told {last.host_is_told}"
        return f"Last touch, {last.gpa}: {last.outcome}{told}."

    def numbers(self) -> dict[str, int]:
        """Shared bit, indices, and what the guest did so far."""
        at, touches = self.chosen, self.lab.touches()
        indices = {
            f"{level_name(level)} index": at.index(level) for level in range(at.levels, 0, -1)
        }
        return {
            "shared": int(at.is_shared),
            **indices,
            "offset": at.offset,
            "touches": len(touches),
            "TD exits": sum(touch.host_is_told != "-" for touch in touches),
        }

    def figure(self, figure: Figure) -> None:
        """Where the GPA and its alias lie in the two halves."""
        (ax,) = side_by_side(figure, 1, left=0.03)
        figure.subplots_adjust(bottom=0.38, top=0.8)
        at = self.chosen
        halves([Mark(at.gpaw, "chosen", at.gpa), Mark(at.gpaw, "alias", at.alias)], ax)

    def _kvm(self) -> str:
        """What KVM's fault on this GPA would hold."""
        at = self.chosen
        rows = {
            "fault->addr": f"{at.addr:#x}",
            "fault->gfn": f"{at.gfn:#x}",
            "PFERR_PRIVATE_ACCESS": "clear" if at.is_shared else f"set ({PFERR_PRIVATE_ACCESS:#x})",
            "root, its role": f"{at.root}, {at.role:#x}",
            "gfn to look up there": f"{at.raw_gfn:#x}",
            "levels": str(at.levels),
            "alias of the gfn": f"{at.alias:#x}",
        }
        return _table(rows | self._elsewhere())

    def _elsewhere(self) -> dict[str, str]:
        """What the same number is at the other width."""
        other = next(gpaw for gpaw in GPAW_CHOICES if gpaw != self.gpaw)
        row = next(row for row in vm_rows(self.chosen.gpa) if row.vm.endswith(str(other)))
        what = row.private if row.root == "-" else f"gfn {row.fault_gfn}, {row.root} root"
        return {f"the same at GPAW {other}": what}


def _table(rows: dict[str, str]) -> str:
    lines = "".join(
        f'<tr><th scope="row" style="{_CELL_STYLE}">{escape(name)}</th>'
        f'<td style="{_CELL_STYLE}"><code>{escape(value)}</code></td></tr>'
        for name, value in rows.items()
    )
    return f'<table style="font-size:12px;line-height:1.5;min-width:396px">{lines}</table>'


def number(typed: str) -> int:
    """The number that somebody typed: hex with 0x, or decimal; "_" may group digits.

    Refuses anything else: ValueError.
    """
    try:
        return int(typed.strip(), 0)
    except ValueError:
        raise ValueError(f"{typed!r} is no number; write a GPA such as {EXAMPLE_GPA:#x}") from None


def tell(lab: GpaLab) -> None:
    """The story: the guest touches its one page, that page's alias, and the edges of both
    halves.
    """
    page = split(EXAMPLE_GPA, lab.gpaw)
    for gpa in (page.gpa, page.alias, *edge_gpas(lab.gpaw).values()):
        lab.touch(gpa)
