"""The fault stepper of notebook 04: one private fault or zap, step by step, in both trees.

panel = MirrorPanel(gpaw=48)
panel.piece.value, panel.page.value = "another 1 GiB", 7
panel.fault.click()                      # the guest uses the page
panel.stage.click()                      # on to the next stage: walk, freeze, hook, SEAMCALL, ...

The controls choose a page; only buttons do something. State k is the state after k steps of the
tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.arch import ENTRIES_PER_TABLE
from tdxlab.study.mirror_lab import MAPPED, MirrorLab
from tdxlab.study.mirror_views import CALL_LOOKS, trees
from tdxlab.study.panels import Panel
from tdxlab.study.plots import bars, calls_over_time, side_by_side


class MirrorPanel(Panel):
    """A TD whose pages fault and are zapped.

    gpaw: 48 or 52. story: False for an empty tape. piece: menu of the pieces of memory; page:
    slider over the 512 pages of a piece; gfn: text that takes any gfn. fault, zap, stage, retell:
    buttons.
    """

    title = "The mirror: a fault stepper"
    figure_height = 2.2

    def __init__(self, *, gpaw: int = 48, story: bool = True) -> None:
        self.lab = MirrorLab(gpaw=gpaw)
        if story:
            tell(self.lab)
            self.lab.tape.seek(0)
        self._choosing = False
        super().__init__(self.lab.tape)

    # -- choosing

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The page, then the buttons."""
        pieces = {piece.name: piece.gfn for piece in self.lab.pieces}
        self.piece = ipywidgets.Dropdown(
            description="memory", options=list(pieces), layout={"width": "240px"}
        )
        self.page = ipywidgets.IntSlider(
            description="page", min=0, max=ENTRIES_PER_TABLE - 1, layout={"width": "300px"}
        )
        self.gfn = ipywidgets.Text(
            description="gfn", value="0x0", continuous_update=False, layout={"width": "210px"}
        )
        self._first = pieces
        for name in ("piece", "page"):
            getattr(self, name).observe(self._picked, names="value")
        self.gfn.observe(self._typed, names="value")
        for name in ("piece", "page", "gfn"):
            getattr(self, name).add_class(f"tdxlab-{name}")
        row = {"width": "100%", "flex_flow": "row wrap"}
        choice = ipywidgets.HBox([self.piece, self.page, self.gfn], layout=row)
        return [choice, *self._buttons()]

    def _buttons(self) -> list[ipywidgets.Button]:
        make = self.button
        self.fault = make(
            "Fault", "tdxlab-fault", self._fault, icon="bolt", tooltip="the guest uses the page"
        )
        self.zap = make(
            "Zap", "tdxlab-zap", self._zap, icon="trash", tooltip="the host takes the page back"
        )
        self.stage = make(
            "Next stage",
            "tdxlab-stage",
            self._next_stage,
            icon="forward",
            tooltip="on to the next of walk, freeze, hook, SEAMCALL, publish",
        )
        self.retell = make(
            "Tell the story again", "tdxlab-retell", self._retell, icon="book", tooltip="start anew"
        )
        return [self.fault, self.zap, self.stage, self.retell]

    @property
    def chosen(self) -> int:
        """The chosen gfn."""
        first: int = self._first[self.piece.value]
        return first + int(self.page.value)

    def _picked(self, _: dict[str, Any]) -> None:
        if not self._choosing:
            self._choose(self.chosen)
            self.act(lambda: None)

    def _typed(self, change: dict[str, Any]) -> None:
        if not self._choosing:
            self.act(lambda: self._choose(self._read(change["new"])))

    def _read(self, typed: str) -> int:
        """The gfn that was typed. Refuses what is none, or has no memory: ValueError."""
        try:
            gfn = int(typed, 0)
        except ValueError:
            raise ValueError(f"{typed!r} is no gfn; type a number such as 0x201") from None
        self.lab.require(gfn)
        return gfn

    def _choose(self, gfn: int) -> None:
        """Let all three controls show one gfn."""
        name, first = max(
            (pair for pair in self._first.items() if pair[1] <= gfn), key=lambda pair: pair[1]
        )
        self._choosing = True
        self.piece.value, self.page.value, self.gfn.value = name, gfn - first, f"{gfn:#x}"
        self._choosing = False

    # -- acting

    def _fault(self) -> None:
        """Record a fault where the tape stands, or behind the operation in whose middle it does,
        and stand before its first step.
        """
        self._stand_between()
        start = self.tape.position
        self.lab.fault(self.chosen)
        self.tape.seek(start)

    def _zap(self) -> None:
        self._stand_between()
        start = self.tape.position
        self.lab.zap(self.chosen)
        self.tape.seek(start)

    def _stand_between(self) -> None:
        """Finish an operation in whose middle the tape stands."""
        current = self.lab.tape.current
        while self.lab.tape.current is not None and self.lab.tape.current is current:
            self.tape.seek(self.tape.position + 1)

    def _next_stage(self) -> None:
        if self.tape.position == len(self.tape):
            raise ValueError("this is the end of the tape: go back, or press Fault or Zap")
        self.tape.seek(self.lab.tape.next_stage())

    def _retell(self) -> None:
        self.tape.seek(0)
        tell(self.lab)
        self.tape.seek(0)

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The walk to the chosen gfn in both trees."""
        return trees(self.lab, self.chosen)

    def summary(self) -> str:
        """As part of what, what comes next, and which entry is frozen."""
        stage, ahead = self.lab.tape.stage, self._ahead()
        frozen = "; ".join(
            f"The {level} entry of gfn {gfn:#x} is FROZEN" for level, gfn in self.lab.frozen()
        )
        return f"{ahead}{stage.name}: {stage.meaning}. {frozen or 'No entry is frozen'}."

    def _ahead(self) -> str:
        last = self.tape.last
        return "" if last is None else f"{last.phase}, "

    def numbers(self) -> dict[str, int]:
        """Tables and leaves of both trees, frozen entries, and the SEAMCALLs since the story's
        beginning.
        """
        trees = self.machine.tables(self.lab.td)
        mirror, external = trees["mirror"], trees["external"]
        leaf = "4K"
        return {
            "mirror tables": sum(level.tables for level in mirror.values()),
            "S-EPT tables": sum(level.tables for level in external.values()),
            "mirror leaves": mirror[leaf].entries if leaf in mirror else 0,
            "S-EPT leaves": external[leaf].entries if leaf in external else 0,
            "frozen": len(self.lab.frozen()),
            **{name: self.lab.count(name) for name in CALL_LOOKS},
        }

    def figure(self, figure: Figure) -> None:
        """SEAMCALLs of each leaf, and over the steps."""
        left, right = side_by_side(figure, 2, left=0.14, between=0.3)
        figure.subplots_adjust(bottom=0.22, top=0.87)
        names = [f"{look.letter} {name}" for name, look in CALL_LOOKS.items()]
        calls = [self.lab.count(name) for name in CALL_LOOKS]
        bars(left, names, calls, list(CALL_LOOKS.values()), unit="SEAMCALLs", title="per leaf")
        calls_over_time(self.lab.tape.time_points(), right)
        right.set_xlabel("steps", fontsize=8)

    @property
    def state(self) -> str:
        """What the mirror says of the chosen gfn's own entry: "mapped", "FROZEN", ..."""
        return self.lab.walk(self.chosen)[-1].mirror

    @property
    def is_mapped(self) -> bool:
        """The mirror maps the chosen gfn."""
        return self.state == MAPPED


def tell(lab: MirrorLab) -> None:
    """The story: a page for which every table is missing, its neighbour, and the first goes."""
    lab.fault(0)
    lab.fault(1)
    lab.zap(0)
