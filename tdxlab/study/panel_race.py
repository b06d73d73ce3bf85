"""The schedule player of notebook 05: two or three vCPUs, move by move, and counter-examples.

panel = RacePanel()
panel.movers[0].click()                  # vCPU 0 makes a move
panel.rule.value = "no-freeze"
panel.set_up.click()                     # the same race with a rule broken
panel.violation.click()                  # a shortest schedule that goes wrong, but the last move

The menus choose; only buttons do something. State k is the state after k moves of the tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import ipywidgets

from tdxlab.breaks import BREAKS
from tdxlab.races import SCENARIOS
from tdxlab.study.panels import Panel
from tdxlab.study.race_lab import ENTRIES, RULES, RaceLab, first_words
from tdxlab.study.race_views import pictures

#: No break, as the menu has it.
ALL_KEPT = "none: all rules are kept"
#: vCPUs that the menu offers; a thread may come to them.
_MOST_VCPUS, _MOST_ACTORS = 3, 4


class RacePanel(Panel):
    """Operations that meet, in the hands of whoever presses the buttons.

    story: False for an empty tape. scenario, vcpus, rule: menus; set_up: button that builds what
    they say. movers: one button for each operation. violation, run_on, retell: buttons.
    """

    title = "Races: a schedule player"
    figure_height = 0

    def __init__(self, *, story: bool = True) -> None:
        self.lab = RaceLab()
        if story:
            tell(self.lab)
            self.lab.tape.seek(0)
        super().__init__(self.lab.tape)

    # -- choosing

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """What meets, then the buttons."""
        self.scenario = ipywidgets.Dropdown(
            description="scenario", options=list(ENTRIES), layout={"width": "230px"}
        )
        self.vcpus = ipywidgets.Dropdown(
            description="vCPUs",
            options=list(range(1, _MOST_VCPUS + 1)),
            value=2,
            layout={"width": "150px"},
        )
        options = [(ALL_KEPT, ""), *((name, name) for name in RULES[1:])]
        self.rule = ipywidgets.Dropdown(
            description="break", options=options, layout={"width": "300px"}
        )
        for name in ("scenario", "vcpus", "rule"):
            widget = getattr(self, name)
            widget.add_class(f"tdxlab-{name}")
            widget.observe(lambda _: self.act(lambda: None), names="value")
        self.set_up = self.button(
            "Set up", "tdxlab-set-up", self._set_up, icon="refresh", tooltip="build what is chosen"
        )
        choice = [self.scenario, self.vcpus, self.rule, self.set_up]
        row = ipywidgets.HBox(choice, layout={"width": "100%", "flex_flow": "row wrap"})
        return [row, *self._buttons()]

    def _buttons(self) -> list[ipywidgets.Button]:
        make = self.button
        self.movers = [
            make("", f"tdxlab-mover-{n}", partial(self._move, n), icon="play")
            for n in range(_MOST_ACTORS)
        ]
        self.violation = make(
            "Find a violation",
            "tdxlab-violation",
            self._find_violation,
            icon="search",
            tooltip="a shortest schedule that goes wrong, but for its last move",
        )
        self.run_on = make(
            "Run on",
            "tdxlab-run-on",
            self._run_on,
            icon="fast-forward",
            tooltip="all in turn, to the end",
        )
        self.retell = make(
            "Tell the story again", "tdxlab-retell", self._retell, icon="book", tooltip="start anew"
        )
        return [*self.movers, self.violation, self.run_on, self.retell]

    def _set_up(self) -> None:
        most = min(SCENARIOS[self.scenario.value].most, _MOST_VCPUS)
        if self.vcpus.value > most:
            raise ValueError(
                f"{self.scenario.value} is made for {most} vCPUs at most; choose fewer"
            )
        self._take(RaceLab(self.scenario.value, vcpus=self.vcpus.value, rule=self.rule.value))

    def _retell(self) -> None:
        self.scenario.value, self.vcpus.value, self.rule.value = "same-page", 2, ""
        lab = RaceLab()
        tell(lab)
        lab.tape.seek(0)
        self._take(lab)

    def _take(self, lab: RaceLab) -> None:
        self.lab.tape.player.close()
        self.lab, self.tape = lab, lab.tape

    def _find_violation(self) -> None:
        self.lab.find_violation()

    def _run_on(self) -> None:
        self.lab.run_on()

    def _move(self, number: int) -> None:
        if number >= len(self.lab.names):
            raise ValueError(f"there are {len(self.lab.names)} operations; press another button")
        self.lab.play([number])

    # -- what the base class asks for

    def draw(self) -> None:
        """As `Panel.draw`; and say on the buttons who moves."""
        movable = self.lab.tape.player.movable
        for number, button in enumerate(self.movers):
            is_there = number < len(self.lab.names)
            name = self.lab.names[number] if is_there else ""
            button.description = name
            button.tooltip = f"{name} makes a move" if name in movable else f"{name} cannot move"
            button.layout.display = "" if is_there else "none"
        super().draw()

    def views(self) -> dict[str, str]:
        """The lanes, and the entries where they meet."""
        return pictures(self.lab)

    def summary(self) -> str:
        """What is wrong, or who can move and what would come; and what the menus would set up."""
        plural = "s" if self.lab.vcpus > 1 else ""
        what = f"{self.lab.scenario} with {self.lab.vcpus} vCPU{plural}"
        if self.lab.rule:
            what += f", with the break {self.lab.rule}: {BREAKS[self.lab.rule].what}"
        return f"{what}. {self._now()}."

    def _now(self) -> str:
        if self.lab.verdict:
            return f"Broken, {first_words(self.lab.verdict)}"
        movable = self.lab.tape.player.movable
        rows = [row for row in self.lab.actors() if row.who in movable]
        if not rows:
            return "All have ended, and no rule is broken"
        return "Next, " + "; ".join(f"{row.who}: {row.comes_next}" for row in rows)

    def numbers(self) -> dict[str, int]:
        """Moves, retries, and the states of the contested entries."""
        actors, entries = self.lab.actors(), self.lab.entries()
        calls = self.lab.seamcalls()
        return {
            **{f"{row.who} moves": row.moves for row in actors},
            "retries": sum(row.retries for row in actors),
            "frozen": sum(row.mirror == "FROZEN" for row in entries),
            "mirror present": sum(row.mirror == "present" for row in entries),
            "S-EPT mapped": sum(row.external == "mapped" for row in entries),
            "SEAMCALLs": calls,
            "broken": int(bool(self.lab.verdict)),
        }


def tell(lab: RaceLab) -> None:
    """The story: vCPU 0 has frozen the entry and is in the module; vCPU 1 comes, and has to start
    over, twice.
    """
    lab.play([0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1])
