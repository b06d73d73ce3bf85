"""A step tape that stops where something has happened: a SEAMCALL, a guest event, a KVM store.

    tape = LifeTape(machine)
    tape.perform("touch", lambda: td.run_steps([Write(gpa)]))
    tape.last                   # the call or event behind the latest stop, with its registers
    tape.events                 # SEAMCALLs, TDCALLs and exits up to the present position

All other steps of an operation are passed over, so that a life of hundreds of steps can be walked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.status import is_error
from tdxlab.arch import SEPT_LEVEL_NAMES
from tdxlab.bare import BareMachine
from tdxlab.step_tape import Performance, StepTape
from tdxlab.steps import WAIT, Operation
from tdxlab.study.tables import LeafCount, PhaseCount
from tdxlab.tape import Action
from tdxlab.trace import Event

SEAMCALL, TDCALL, EXIT, STORE = "SEAMCALL", "TDCALL", "VM exit", "KVM store"
_LEAVES = {SEAMCALL: HOST_LEAVES, TDCALL: GUEST_LEAVES}

#: Label of the step that stands before an entry is frozen, which KVM tells nobody.
_FREEZE = "cmpxchg FROZEN_SPTE"

_END = "returns to user space"


class LifeTape(StepTape):
    """A `StepTape` on a machine that logs its events. A position is a stop.

    told: what somebody who listens to KVM has heard since the last stop; the tape empties it.
    """

    def __init__(self, machine: BareMachine) -> None:
        machine.trace.logging = True
        super().__init__(machine)
        self.told: list[str] = []
        self._before = len(machine.trace.events)
        #: events made up to each position
        self._made = [0]
        #: KVM has stored an entry at this position
        self._stored = [False]

    @property
    def events(self) -> list[Event]:
        """Those up to the present position."""
        return self.machine.trace.events[self._before :]

    def perform(self, name: str, start: Callable[[], Operation], *, lp: int = 0) -> Any:
        """As `StepTape.perform`."""
        return super().perform(name, lambda: self._stops(start()), lp=lp)

    def _stops(self, operation: Operation) -> Operation:
        """The operation, without the steps since which nothing has happened."""
        self.told.clear()
        seen, frozen = len(self.events), ""
        try:
            while True:
                try:
                    step = next(operation)
                except StopIteration as end:
                    return end.value
                if len(self.events) > seen or self.told or frozen:
                    done = self.events[seen:]
                    yield (_name(done[-1]) if done else "; ".join(self.told) or frozen,)
                elif step[0] == WAIT:
                    yield step
                frozen = becomes(step[2], step[1], "FROZEN") if step[0] == _FREEZE else ""
                seen = len(self.events)
                self.told.clear()
        finally:
            operation.close()

    def _note(self, operation: Performance, words: str) -> None:
        place = len(self._actions) + 1
        del self._made[place:], self._stored[place:]
        if words.startswith("returns"):
            words = "; ".join(self.told) or _END
        super()._note(operation, words)
        self._made.append(len(self.events))
        self._stored.append(bool(self.told) or words.endswith("FROZEN"))

    # -- what came of it

    @property
    def last(self) -> Action | None:
        """What led to the present position: a call or guest event with its registers, a store by
        KVM, or the end of an operation.
        """
        action = super().last
        if action is None:
            return None
        done = self.actions_at(self.position)
        return (
            done[-1]
            if done
            else Action("KVM", action.lp, action.name, action.phase, {}, _not_alone)
        )

    @property
    def has_stored(self) -> bool:
        """KVM has stored an entry of a tree on the way to the present position."""
        return self._stored[self.position]

    def actions_at(self, position: int) -> list[Action]:
        """The calls and guest events behind a position that does not lie ahead, or the store."""
        phase = self._actions[position - 1].phase
        done = self.events[self._made[position - 1] : self._made[position]]
        if not done and self._stored[position]:
            name = self._actions[position - 1].name
            return [Action(STORE, 0, name, phase, {}, _not_alone)]
        return [_finished(event, phase) for event in done]

    def leaf_counts(self) -> list[LeafCount]:
        """SEAMCALLs of each leaf up to the present position, in the order of their first use."""
        done = [event for event in self.events if event.kind == SEAMCALL]
        calls = Counter(event.number for event in done)
        refused = Counter(event.number for event in done if _is_refused(event))
        leaves = [(HOST_LEAVES[number], number) for number in calls]
        return [
            LeafCount(leaf.name, leaf.group, calls[number], refused[number])
            for leaf, number in leaves
        ]

    def phase_counts(self) -> list[PhaseCount]:
        """SEAMCALLs of each phase, in the order of the tape; later phases have a row with 0."""
        calls = Counter(dict.fromkeys((action.phase for action in self._actions), 0))
        events, here = self.events, self.position
        for action, (first, end) in zip(self._actions[:here], pairwise(self._made), strict=False):
            calls[action.phase] += sum(event.kind == SEAMCALL for event in events[first:end])
        return [PhaseCount(phase, made) for phase, made in calls.items()]


def _is_refused(event: Event) -> bool:
    return event.status != IN_GUEST and is_error(event.status)


def becomes(level: int, gfn: int, state: str) -> str:
    """A store in words. level: KVM's."""
    return f"{SEPT_LEVEL_NAMES[level - 1]} entry of gfn {gfn:#x} becomes {state}"


def _name(event: Event) -> str:
    leaf = _LEAVES.get(event.kind, {}).get(event.number)
    return leaf.name if leaf else "leaves the guest"


def _finished(event: Event, phase: str) -> Action:
    """An event as an action, for a trace line and a table of registers."""
    inputs = {}
    if event.kind in _LEAVES:
        given = event.inputs.items()
        inputs = {"rax": event.number} | {name: n for name, n in given if n or name == "rcx"}
    exited = event.kind != SEAMCALL and 0 < event.status < 1 << 32
    outputs = {} if exited or event.status < 0 else event.outputs
    return Action(
        event.kind, event.lp, _name(event), phase, inputs, _not_alone, event.status, outputs, exited
    )


def _not_alone() -> None:
    raise AssertionError("an event is played by its operation, not alone")
