"""The attack panel of notebook 12: choose what a hostile host tries, and watch what stops it.

    panel = AttackPanel(gpaw=48)
    panel.attack.value = "stale-tlb"
    panel.run.click()                    # tries it on a new stage, and stands before its first move
    panel.step.click()
    panel.finish.click()                 # on to the verdict

The menus choose; only buttons do something. State k is the state after k moves of the attack that
was tried last.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab.attacks import ATTACKS, LACKS
from tdxlab.study.attack_lab import AttackLab
from tdxlab.study.attack_tables import NOT_STOPPED, POISONED, count_alike, held_page, owners
from tdxlab.study.attack_views import line_svg, move_list, owner_svg, place_list, plot_pages
from tdxlab.study.panels import Panel
from tdxlab.study.plots import side_by_side


class AttackPanel(Panel):
    """One attack after the other, move by move.

    gpaw: 48 or 52. attack, lacks: menus: what is tried, and what machine or guest are without. run,
    finish: buttons.
    """

    title = "A hostile host"
    figure_height = 2.9

    def __init__(self, *, gpaw: int = 48) -> None:
        self.lab = AttackLab(gpaw=gpaw)
        #: what the figure shows, and its PNG
        self._drawn = b"", b""
        super().__init__(self.lab.stage.tape)

    # -- choosing and acting

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """The menus, then the buttons."""
        self.attack = _menu("attack", list(ATTACKS), "300px")
        self.lacks = _menu("without", list(LACKS), "290px")
        self.run = self.button(
            "Try it", "tdxlab-run", self._run, icon="bolt", tooltip="on a machine of its own"
        )
        self.finish = self.button(
            "To the verdict", "tdxlab-finish", self._finish, icon="gavel", tooltip="all moves"
        )
        return [self.attack, self.lacks, self.run, self.finish]

    def _run(self) -> None:
        self.lab.record(self.attack.value, self.lacks.value)
        self.tape = self.lab.stage.tape

    def _finish(self) -> None:
        if self.lab.is_over:
            raise ValueError("all moves are made: go back, or try another attack")
        self.tape.seek(len(self.tape))

    # -- what the base class asks for

    def views(self) -> dict[str, str]:
        """The moves; the secret's line; the page's lines, with what module and CPU have of it."""
        stage = self.lab.stage
        return {
            "What is tried": move_list(self.lab.report.moves, self.tape.position),
            "The line with the secret": line_svg(stage),
            "Whose the page's lines are, and what is known of it": (
                owner_svg(stage) + place_list(stage)
            ),
        }

    def summary(self) -> str:
        """What is tried, and at the end what came of it."""
        report = self.lab.report
        lacks = f", without {report.lacks}" if report.lacks != "nothing" else ""
        if not self.tape.position:
            return f"{report.name}{lacks}. {report.what}"
        if not self.lab.is_over:
            move = self.lab.stage.moves[-1]
            return f"{report.name}{lacks}. The {move.actor}: {move.name}, {move.answer}."
        stopper = f"Stopped by: {report.stopped_by}" if report.stopped_by else "Nothing stops it"
        return f"{report.name}{lacks}. {stopper}; {report.evidence}. The host has: {report.gained}."

    def numbers(self) -> dict[str, int]:
        """Moves so far and in all, refusals, bytes of the page that the memory holds as they were
        written, poisoned lines, and the end.
        """
        stage = self.lab.stage
        return {
            "moves": self.tape.position,
            "of": len(self.tape),
            "refused": self.lab.refused(),
            "bytes as written": count_alike(stage),
            "lines poisoned": owners(stage).count(POISONED),
            "victim dead": int(stage.is_dead),
            NOT_STOPPED: int(self.lab.is_over and not self.lab.report.stopped_by),
        }

    def png(self) -> bytes:
        """As `Panel.png`; drawn anew only if the memory holds something else than before."""
        stage = self.lab.stage
        held = held_page(stage.machine.memory, stage.data_hpa)
        if held != self._drawn[0]:
            self._drawn = held, super().png()
        return self._drawn[1]

    def figure(self, figure: Figure) -> None:
        """The data page as the victim wrote it, and as the memory holds it."""
        axes = side_by_side(figure, 2, between=0.2)
        figure.subplots_adjust(bottom=0.17, top=0.9)
        plot_pages(self.lab.stage, axes)


def _menu(name: str, options: Sequence[str], width: str) -> ipywidgets.Dropdown:
    made = ipywidgets.Dropdown(description=name, options=options, layout={"width": width})
    made.add_class(f"tdxlab-{name}")
    return made
