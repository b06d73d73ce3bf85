"""The policy sandbox: choose a policy and a workload, run it, and go through its calls.

    panel = PolicyPanel(gpaw=48, mine=Mine)
    panel.policy.value = "Mine"; panel.workload.value = "steady"
    panel.run.click()
    panel.scrub.value = 40

A run is recorded when it is made, and then stepped through: what is shown is the state after the
first calls of it. The menus choose, and only buttons do something.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure

from tdxlab import workloads
from tdxlab.conversion import PAGES_OPS, TWICE
from tdxlab.conversions import CONVERSION_POLICIES, WRONG_CONVERSIONS
from tdxlab.policies import POLICIES, WRONG_POLICIES
from tdxlab.policy import ZapPolicy
from tdxlab.policy_results import AnyResult, ConversionResult
from tdxlab.policy_run import AnyPolicy, Given, own
from tdxlab.study import plots
from tdxlab.study.panels import Panel
from tdxlab.study.policy_lab import BLOCKED, Frame, PolicyTape, record
from tdxlab.study.policy_tables import plot_costs
from tdxlab.study.policy_views import board_html, external_svg, memory_svg, mirror_svg


class PolicyPanel(Panel):
    """Policies against workloads. gpaw: 48 or 52. mine: policies of the reader's, or their classes:
    one, or several in a list.

    policy, workload: menus. run: record what they say, and stand at its end. event: go to where the
    next event begins. clear: empty the leaderboard. board: results, one for each pair.
    """

    title = "Policy sandbox"
    figure_height = 2.4

    def __init__(self, *, gpaw: int = 48, mine: Given | Sequence[Given] | None = None) -> None:
        self._gpaw = gpaw
        self._drawn: tuple[tuple[AnyResult, ...], bytes] = ((), b"")
        given = mine if isinstance(mine, Sequence) else () if mine is None else (mine,)
        zaps, conversions = POLICIES + WRONG_POLICIES, CONVERSION_POLICIES + WRONG_CONVERSIONS
        self._policies: dict[str, AnyPolicy] = {}
        for policy in (*map(own, given), *zaps, *conversions):
            self._policies.setdefault(policy.title, policy)
        first = record(POLICIES[0], "boot", gpaw=gpaw)
        self.board: dict[tuple[str, str], AnyResult] = {}
        self._enter(first.result)
        self.tape: PolicyTape = PolicyTape(first)
        super().__init__(self.tape)

    # -- what the base class asks for

    def controls(self) -> Sequence[ipywidgets.Widget]:
        """What is to run, and what can be done."""
        self.policy = ipywidgets.Dropdown(
            description="policy",
            options=[(_label(policy), title) for title, policy in self._policies.items()],
            value=POLICIES[0].title,
            layout={"width": "300px"},
        )
        self.workload = ipywidgets.Dropdown(
            description="workload", options=workloads.names(), layout={"width": "220px"}
        )
        self.policy.add_class("tdxlab-policy")
        self.workload.add_class("tdxlab-workload")
        make = self.button
        self.run = make(
            "Run", "tdxlab-run", self._run, icon="bolt", tooltip="record what is chosen"
        )
        self.event = make(
            "Next event",
            "tdxlab-event",
            lambda: self.tape.seek(self.tape.next_event()),
            icon="forward",
            tooltip="to where the workload's next event begins",
        )
        self.clear = make(
            "Clear board", "tdxlab-clear", self.board.clear, icon="trash", tooltip="forget all runs"
        )
        return [self.policy, self.workload, self.run, self.event, self.clear]

    def views(self) -> dict[str, str]:
        """Both trees, for conversions the memory behind them, and the leaderboard."""
        pages = self.tape.pages()
        found = {"What KVM keeps": mirror_svg(pages), "What the module keeps": external_svg(pages)}
        if isinstance(self.tape.recording.result, ConversionResult):
            found["What the host has"] = memory_svg(pages)
        return found | {"Leaderboard of this panel": board_html(list(self.board.values()))}

    def summary(self) -> str:
        """Whose run this is, what came last, and how it ended."""
        result, frame = self.tape.recording.result, self.tape.frame
        who = f"{result.policy} in {result.workload}"
        if frame is None:
            return f"{who}: before the first event."
        if self.tape.position < len(self.tape):
            return f"{who}, event {frame.event}: {_said(frame)}."
        if result.violation is not None:
            return f"{who} was stopped. {result.violation}."
        counts = f"{result.seamcalls} SEAMCALLs, {result.ipis} IPIs"
        if isinstance(result, ConversionResult):
            counts = f"{result.calls} system calls, {result.entries} entries, {counts}"
        return f"{who} is done: {counts}, all rules kept."

    def numbers(self) -> dict[str, int]:
        """Sums up to here, and what the pages and vCPUs are now."""
        frame = self.tape.frame
        blocked = sum(page.mirror == BLOCKED for page in self.tape.pages().values())
        return {
            "event": frame.event if frame else 0,
            "SEAMCALLs": frame.seamcalls if frame else 0,
            "IPIs": frame.ipis if frame else 0,
            "retries": frame.retries if frame else 0,
            "pages out": frame.out if frame else 0,
            "blocked": blocked,
            "system calls": frame.calls if frame else 0,
            "entries": frame.entries if frame else 0,
            "twice": sum(page.memory == TWICE for page in self.tape.pages().values()),
            "vCPUs inside": frame.inside if frame else 0,
            "runs": len(self.board),
        }

    def png(self) -> bytes:
        """The figure, which is drawn anew only when the board has changed."""
        drawn = self._compared()
        if drawn != self._drawn[0]:
            self._drawn = drawn, super().png()
        return self._drawn[1]

    def figure(self, figure: Figure) -> None:
        """What the runs on the board cost, those of the kind of the run that is shown."""
        (ax,) = plots.side_by_side(figure, 1, left=0.2)
        plot_costs(self._compared(), ax)

    def _compared(self) -> tuple[AnyResult, ...]:
        kind = type(self.tape.recording.result)
        return tuple(result for result in self.board.values() if isinstance(result, kind))

    # -- what the buttons do

    def _run(self) -> None:
        policy, workload = self._policies[self.policy.value], self.workload.value

        def progress(done: int, events: int) -> None:
            self.say(f"{policy.title} runs in {workload}: {done} of {events} events done.")

        recording = record(policy, workload, gpaw=self._gpaw, progress=progress)
        self._enter(recording.result)
        self.tape = PolicyTape(recording)
        self.tape.seek(len(self.tape))

    def _enter(self, result: AnyResult) -> None:
        self.board[result.policy, result.workload] = result


def _label(policy: AnyPolicy) -> str:
    """How the menu names a policy."""
    kind = "zap" if isinstance(policy, ZapPolicy) else "conversion"
    return f"{kind}: {policy.title}"


def _said(frame: Frame) -> str:
    """What a frame is about, in words."""
    name, gfn, level, answer = frame.op
    if not frame.is_event:
        where = f" of gfn {gfn:#x}" if gfn >= 0 else ""
        if name in PAGES_OPS:
            where = f" of {level} page{'s' * (level != 1)} from gfn {gfn:#x}"
        return f"{name}{where}, {answer}"
    running = f"{answer} vCPU{'s' * (answer != '1')} running beside" if answer != "0" else "alone"
    return f"{name} of {level} pages from gfn {gfn:#x} begins, {running}"
