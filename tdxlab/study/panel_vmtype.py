"""The VM-type panel of notebook 13: choose a type, choose a deed, watch what becomes of the pages.

    panel = TypePanel(gpaw=48)
    panel.vm_type.value = "SNP"
    panel.build.click()                  # a new VM
    panel.deed.value = "punch hole"
    panel.do.click()
    panel.back.click()                   # ... one step back

The menus and the boxes choose; only buttons do something. State k is the state after k steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.study.panels import Panel
from tdxlab.study.plots import side_by_side
from tdxlab.study.vmtype_lab import DEEDS, NAMES, TypeLab
from tdxlab.study.vmtype_views import beliefs_html, history_html, pages_svg, plot_counts


class TypePanel(Panel):
    """A VM of the chosen type. gpaw: of a TD, 48 or 52.

    vm_type, deed: menus; created, no_quirk: boxes. build, do: buttons.
    """

    title = "One MMU, many VM types"
    figure_height = 2.2

    def __init__(self, *, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.lab = TypeLab("SNP", gpaw=gpaw)
        super().__init__(self.lab.tape)

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The type, the moment, the deed, and the buttons."""
        self.vm_type = _menu("VM type", NAMES, "220px", "SNP")
        self.created, self.no_quirk = _box("just created"), _box("quirk off")
        self.deed = _menu("deed", [deed.name for deed in DEEDS], "330px", "use a private page")
        for name in ("vm_type", "created", "no_quirk", "deed"):
            getattr(self, name).add_class(f"tdxlab-{name}")
        row = {"width": "100%", "flex_flow": "row wrap"}
        self.build = self.button(
            "New VM", "tdxlab-build", self._build, icon="cubes", tooltip="of the chosen type"
        )
        self.do = self.button(
            "Do it", "tdxlab-do", self._do, icon="bolt", tooltip="the chosen deed"
        )
        return [
            ipywidgets.HBox([self.vm_type, self.created, self.no_quirk, self.build], layout=row),
            ipywidgets.HBox([self.deed, self.do], layout=row),
        ]

    def _build(self) -> None:
        self.lab = TypeLab(
            self.vm_type.value,
            gpaw=self.gpaw,
            launched=not self.created.value,
            quirk=not self.no_quirk.value,
        )
        self.tape = self.lab.tape

    def _do(self) -> None:
        self.lab.do(self.deed.value)

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The pages, what was done, what code believes of the VM."""
        return {
            "The pages of two memslots": pages_svg(self.lab),
            "Done so far": history_html(self.lab),
            "What the VM is like, asked in three ways": beliefs_html(self.lab),
        }

    def summary(self) -> str:
        """The VM, and what its last step was."""
        numbers, action = self.numbers(), self.tape.last
        moment = "" if self.lab.launched else ", just created"
        moment += "" if self.lab.quirk else ", quirk off"
        where = f"{numbers['direct']} pages in the direct root, {numbers['mirror']} in the mirror"
        if self.lab.owned():
            where += f", {numbers['RMP entries']} assigned in the RMP"
        if action is None:
            return f"{self.lab.name}{moment}: nothing done yet. {where}."
        last = self.lab.history()[-1]
        return f"{self.lab.name}{moment}: {last.deed}: {last.answer}. {where}."

    def numbers(self) -> dict[str, int]:
        """What is there, and counts since the tape began."""
        counts, start = self.lab.counts(), self.lab.start
        direct = sum(root == "direct" for root, _ in counts.leaves)
        return {
            "direct": direct,
            "mirror": len(counts.leaves) - direct,
            "RMP entries": len(self.lab.owned()),
            "RMP updates": counts.rmp - start.rmp,
            "SEAMCALLs": counts.seamcalls - start.seamcalls,
            "flushes": counts.flushes - start.flushes,
        }

    def figure(self, figure: Figure) -> None:
        """The numbers as bars."""
        (ax,) = side_by_side(figure, 1, left=0.16)
        plot_counts(self.numbers(), self.lab.name, ax)


def _box(description: str) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(description=description, indent=False, layout={"width": "120px"})


def _menu(
    name: str, options: Sequence[str], width: str, value: str | None = None
) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(
        description=name, options=list(options), value=value or options[0], layout={"width": width}
    )
