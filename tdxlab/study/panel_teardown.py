"""The teardown panel of notebook 10: choose a TD, an order and a failure; take it apart in steps.

    panel = TeardownPanel(gpaw=48)
    panel.order.value = KEYID_FIRST
    panel.run.click()                    # builds the TD anew and records its teardown
    panel.phase.click()                  # on to the next phase
    panel.leak.click()                   # on to the next step at which a page leaks

The sliders and menus choose; only buttons do something. State k is the state after k steps of the
teardown that was recorded last.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.abi import status as st
from tdxlab.study.panels import Panel
from tdxlab.study.plots import side_by_side
from tdxlab.study.teardown_lab import (
    CACHE_WB,
    FLUSH,
    FLUSHDONE,
    FREE,
    FREEID,
    IN_USE,
    KEYID_LAST,
    LEAKED,
    MAX_PACKAGES,
    MAX_PAGES,
    MAX_VCPUS,
    ORDERS,
    RELEASE,
    TABLE_PAGES,
    TDCS_PAGES,
    TDR_PAGE,
    VCPU_PAGES,
    Failure,
    TeardownLab,
)
from tdxlab.study.teardown_tables import cost_rows
from tdxlab.study.teardown_views import cause_table, host_svg, key_table, module_svg, plot_costs

NO_FAILURE = "nothing fails"
_LEAVES = (
    "TDH.MEM.RANGE.BLOCK",
    "TDH.MEM.TRACK",
    "TDH.MEM.PAGE.REMOVE",
    "TDH.PHYMEM.PAGE.WBINVD",
    "TDH.VP.FLUSH",
    "TDH.MNG.VPFLUSHDONE",
    "TDH.PHYMEM.CACHE.WB",
    "TDH.MNG.KEY.FREEID",
    "TDH.PHYMEM.PAGE.RECLAIM",
)
#: What the panel can let a call answer -> the status.
STATUSES = {
    "OPERAND_BUSY": st.TDX_OPERAND_BUSY,
    "PAGE_METADATA_INCORRECT": st.TDX_PAGE_METADATA_INCORRECT,
    "FLUSHVP_NOT_DONE": st.TDX_FLUSHVP_NOT_DONE,
    "RND_NO_ENTROPY": st.TDX_RND_NO_ENTROPY,
    "SUCCESS, but not done": st.TDX_SUCCESS,
}
TIMES: dict[str, int | None] = {"once": 1, "twice": 2, "ten times": 10, "from there on": None}

#: Phase -> what happens in it.
MEANINGS = {
    RELEASE: "the guest_memfd goes: each private page is taken from the TD",
    FLUSH: "each vCPU's state leaves the LP that it ran on",
    FLUSHDONE: "the module checks that no vCPU is left and closes private memory",
    CACHE_WB: "each package writes back its caches, so that no line under the KeyID is left",
    FREEID: "the KeyID goes back; from here on pages can be reclaimed",
    VCPU_PAGES: "the pages of the vCPUs are reclaimed, cleared and freed",
    TABLE_PAGES: "the Secure EPT's tables are reclaimed, small ones first, and freed behind RCU",
    TDCS_PAGES: "the TDCS pages are reclaimed",
    TDR_PAGE: "the TDR is reclaimed, which needs that no other page is left, and written back",
}


class TeardownPanel(Panel):
    """The teardown of a TD that the controls describe.

    gpaw: 48 or 52. pages, vcpus, packages, n: sliders; spread: a box; order, leaf, status, times:
    menus. run, phase, leak: buttons.
    """

    title = "Teardown"
    figure_height = 3.4

    def __init__(self, *, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.lab = TeardownLab(gpaw=gpaw)
        self._play_from_the_beginning(KEYID_LAST, None)
        super().__init__(self.lab.tape)

    # -- choosing and acting

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The TD, the order, the failure; then the buttons."""
        self.pages = _slider("pages", 6, MAX_PAGES)
        self.vcpus = _slider("vCPUs", 2, MAX_VCPUS)
        self.packages = _slider("packages", 2, MAX_PACKAGES)
        self.spread = ipywidgets.Checkbox(
            description="2 MiB apart", indent=False, layout={"width": "120px"}
        )
        self.order = _menu("order", ORDERS)
        self.leaf = _menu("fails", (NO_FAILURE, *_LEAVES), "300px")
        self.n = _slider("number", 1, MAX_PAGES)
        self.status = _menu("with", tuple(STATUSES), "270px")
        self.times = _menu("how often", tuple(TIMES))
        chosen = ("pages", "vcpus", "packages", "spread", "order", "leaf", "n", "status", "times")
        for name in chosen:
            getattr(self, name).add_class(f"tdxlab-{name}")
        row = ipywidgets.HBox(
            [getattr(self, name) for name in chosen],
            layout={"width": "100%", "flex_flow": "row wrap"},
        )
        return [row, *self._buttons()]

    def _buttons(self) -> list[ipywidgets.Button]:
        self.run = self.button(
            "Build and tear down", "tdxlab-run", self._run, icon="trash", tooltip="a new TD"
        )
        self.phase = self.button(
            "Next phase", "tdxlab-phase", self._next_phase, icon="forward", tooltip="its first call"
        )
        self.leak = self.button(
            "Next leak", "tdxlab-leak", self._next_leak, icon="tint", tooltip="where a page leaks"
        )
        return [self.run, self.phase, self.leak]

    def failure(self) -> Failure | None:
        """What the menus say shall fail; None for nothing."""
        if self.leaf.value == NO_FAILURE:
            return None
        status, times = STATUSES[self.status.value], TIMES[self.times.value]
        return Failure(self.leaf.value, self.n.value, status, times)

    def _run(self) -> None:
        self.lab = TeardownLab(
            gpaw=self.gpaw,
            pages=self.pages.value,
            vcpus=self.vcpus.value,
            packages=self.packages.value,
            spread=self.spread.value,
        )
        self._play_from_the_beginning(self.order.value, self.failure())
        self.tape = self.lab.tape

    def _play_from_the_beginning(self, order: str, failure: Failure | None) -> None:
        self.lab.destroy(order, failure)
        self.lab.tape.seek(0)

    def _next_phase(self) -> None:
        later = [place for place in self.lab.phases().values() if place > self.tape.position]
        if not later and self.tape.position == len(self.tape):
            raise ValueError("the TD is gone: go back, or build another one")
        self.tape.seek(min(later, default=len(self.tape)))

    def _next_leak(self) -> None:
        here, pages = self.tape.position, len(self.lab.leaked_pages())
        for position in range(here + 1, len(self.tape) + 1):
            self.tape.seek(position)
            if len(self.lab.leaked_pages()) > pages:
                return
        self.tape.seek(here)
        raise ValueError("no page leaks from here on: choose what fails, and build another TD")

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The ledger as both sides have it, the KeyIDs, and why pages leaked."""
        rows = self.lab.ledger()
        return {
            "The host's page ledger": host_svg(rows),
            "The same pages in the module (PAMT)": module_svg(rows),
            "KeyIDs": key_table(self.lab.key_lines()),
            "What leaked, and why": cause_table(rows),
        }

    def summary(self) -> str:
        """Where the teardown stands, and what became of the pages."""
        numbers = self.numbers()
        state = next(key.module for key in self.lab.key_lines() if key.keyid == self.lab.keyid)
        return (
            f"{self._phase()}. Pages: {numbers['in use']} in use, {numbers['free']} free, "
            f"{numbers['leaked']} leaked. The KeyID is {state}"
            f"{', and lost to the host' if numbers['KeyID lost'] else ''}."
            f"{self._nothing_failed()}"
        )

    def _phase(self) -> str:
        """The phase of the last step that was part of a SEAMCALL."""
        position = self.tape.position
        if position == 0:
            return f"{self.lab.order}: the TD is whole"
        if position == len(self.tape):
            return f"{self.lab.order}: the VM is gone"
        names = [self.lab.phase_of_step(action) for action in self.tape.actions[:position]]
        phase = next((name for name in reversed(names) if name), "")
        return f"{self.lab.order}, {phase}: {MEANINGS[phase]}" if phase else "the process ends"

    def _nothing_failed(self) -> str:
        """Says so if the chosen failure never comes."""
        failure, done = self.lab.failure, self.tape.position == len(self.tape)
        if failure is None or not done or self.lab.tally.calls_of(failure.leaf) >= failure.n:
            return ""
        return f" There was no call number {failure.n} of {failure.leaf}, so nothing failed."

    def numbers(self) -> dict[str, int]:
        """SEAMCALLs so far and expected in all, pages by what became of them, and the KeyID."""
        rows, costs = self.lab.ledger(), cost_rows(self.lab)[-1]
        host = [row.host for row in rows]
        return {
            "SEAMCALLs": costs.counted,
            "expected in all": costs.expected,
            "refused": sum(self.lab.tally.refused.values()),
            "in use": host.count(IN_USE),
            "free": host.count(FREE),
            "leaked": host.count(LEAKED),
            "kept by the module": sum(row.module != "PT_NDA" for row in rows),
            "KeyID lost": int(self.lab.keyid_is_lost()),
        }

    def figure(self, figure: Figure) -> None:
        """SEAMCALLs of each phase, expected and counted."""
        (ax,) = side_by_side(figure, 1, left=0.24)
        figure.subplots_adjust(bottom=0.13, top=0.93)
        plot_costs(cost_rows(self.lab), ax)


def _slider(name: str, value: int, most: int) -> ipywidgets.IntSlider:
    layout = {"width": "230px"}
    return ipywidgets.IntSlider(description=name, min=1, max=most, value=value, layout=layout)


def _menu(name: str, options: Sequence[str], width: str = "210px") -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(description=name, options=list(options), layout={"width": width})
