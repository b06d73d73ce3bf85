"""The epoch panel: vCPUs enter and leave, the host blocks, tracks, kicks and removes.

    panel = EpochPanel(gpaw=48)
    panel.moves["BLOCK"].click()
    panel.vcpu.value = 1; panel.moves["enter"].click()

A button makes its move on the real module; what the module refuses is shown with the operand that
it blames. The story is recorded before one starts: step through it, or leave it anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.status import describe
from tdxlab.scenarios import answer
from tdxlab.study import plots
from tdxlab.study.console_views import html_table
from tdxlab.study.epoch_lab import HOST_MOVES, VCPU_MOVES, EpochLab
from tdxlab.study.epoch_views import books_svg, epoch_points, lps_svg, plot_epochs, why
from tdxlab.study.panels import Panel
from tdxlab.tape import Action

#: What a button shows, and what it is for.
_TOOLTIPS = {
    "BLOCK": "TDH.MEM.RANGE.BLOCK: no new translation to the page",
    "TRACK": "TDH.MEM.TRACK: the TD's next epoch begins",
    "kick": "an IPI to every vCPU inside",
    "REMOVE": "TDH.MEM.PAGE.REMOVE: the page leaves the TD",
    "UNBLOCK": "TDH.MEM.RANGE.UNBLOCK: translations are allowed again",
    "enter": "TDH.VP.ENTER of the chosen vCPU",
    "leave": "the chosen vCPU leaves by itself",
    "read": "the chosen vCPU reads the page",
}

#: The story on the tape at the beginning.
STORY = (
    "enter 0",
    "read 0",
    "enter 1",
    "BLOCK",
    "REMOVE",
    "read 0",
    "TRACK",
    "REMOVE",
    "enter 2",
    "TRACK",
    "leave 1",
    "REMOVE",
    "leave 0",
    "REMOVE",
    "enter 0",
    "read 0",
)


class EpochPanel(Panel):
    """A TD with three vCPUs and one page. gpaw: 48 or 52. story: record STORY, and stand before it.

    vcpu: the number that enter, leave and read are about. moves: name -> button.
    """

    title = "TLB tracking"

    def __init__(self, *, gpaw: int = 48, story: bool = True) -> None:
        self.lab = EpochLab(gpaw=gpaw, vcpus=3)
        self.vcpu = ipywidgets.Dropdown(
            options=[(f"vCPU {n}", n) for n in range(self.lab.vcpus)],
            description="who",
            layout={"width": "170px"},
        )
        self.vcpu.add_class("tdxlab-vcpu")
        if story:
            self.lab.play(*STORY)
            self.lab.tape.seek(0)
        super().__init__(self.lab.tape)

    # -- what the base class asks for

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The vCPU with its three moves, and the host's moves."""
        self.moves = {
            name: self.button(
                name, f"tdxlab-move-{name.lower()}", partial(self._move, name), tooltip=tooltip
            )
            for name, tooltip in _TOOLTIPS.items()
        }
        guests = [self.vcpu, *(self.moves[name] for name in VCPU_MOVES)]
        return [ipywidgets.HBox(guests), ipywidgets.HBox([self.moves[n] for n in HOST_MOVES])]

    def views(self) -> dict[str, str]:
        """LPs and books side by side, then the last answer."""
        row = self.lab.row()
        return {
            "Who is inside, and what the TLBs hold": lps_svg(self.lab.vcpu_rows(), row.td_epoch),
            "What the module keeps": books_svg(row),
            "The last answer": self._answer(),
        }

    def summary(self) -> str:
        """Who is inside, what holds for the page, and what came last."""
        row, last = self.lab.row(), self.tape.last
        inside = ", ".join(
            f"vCPU {one.vcpu} since epoch {one.epoch}" for one in self.lab.vcpu_rows() if one.inside
        )
        came = f"{_short(last)}. " if last is not None else ""
        return (
            f"{came}Epoch {row.td_epoch}; inside: {inside or 'nobody'}. "
            f"The page is {row.page}; {why(row)}."
        )

    def numbers(self) -> dict[str, int]:
        """The module's counters, TLBs that hold the page, IPIs and flushes."""
        row, vcpus = self.lab.row(), self.lab.vcpu_rows()
        return {
            "td_epoch": row.td_epoch,
            "even": row.even,
            "odd": row.odd,
            "BEPOCH": row.bepoch,
            "tracked": int(self.lab.is_tracked()),
            "TLBs with the page": sum(vcpu.cached for vcpu in vcpus),
            **self.lab.counts(),
        }

    def figure(self, figure: Figure) -> None:
        """Epochs over time."""
        (ax,) = plots.side_by_side(figure, 1, left=0.07)
        plot_epochs(epoch_points(self.lab), ax)

    # -- what the buttons do

    def _move(self, name: str) -> None:
        self.lab.do(f"{name} {self.vcpu.value}" if name in VCPU_MOVES else name)

    def _answer(self) -> str:
        last = self.tape.last
        if last is None:
            return '<p style="line-height:1.4">nothing has been asked yet</p>'
        rows = [("call", last.name), ("on", f"LP {last.lp}"), ("answer", _said(last))]
        if last.kind == "SEAMCALL" and last.status is not None and last.status != IN_GUEST:
            rows.append(("RAX", f"{last.status:#018x}"))
        return html_table(("", ""), rows)


def _said(action: Action) -> str:
    """What came of an action, in words."""
    if action.kind == "SEAMCALL" and action.status is not None and action.status != IN_GUEST:
        return describe(action.status)
    return answer(action) or "the vCPU is outside"


def _short(action: Action) -> str:
    """An action and its answer in a few words."""
    return f"{action.name} on LP {action.lp}: {answer(action) or 'outside'}"
