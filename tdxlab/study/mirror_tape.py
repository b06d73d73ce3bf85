"""A step tape that knows which step made which SEAMCALL, and what each step stands before.

    tape = MirrorTape(machine)
    tape.perform("fault", lambda: td.run_steps([Write(gpa)]))
    tape.last                   # the SEAMCALL that the latest step finished, with its registers
    tape.stage                  # "freeze", "SEAMCALL", "publish", ...

A step stands just before what its label names. A SEAMCALL has two of them: one before KVM makes the
call, and one inside the module, which has taken its locks then and is about to act.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES
from tdxlab.bare import BareMachine
from tdxlab.step_tape import StepTape
from tdxlab.steps import Operation
from tdxlab.study.tables import LeafCount, PhaseCount, TimePoint
from tdxlab.tape import Action
from tdxlab.trace import Event

SEAMCALL = "SEAMCALL"
_ERROR = 1 << 63
_LEAVES = {SEAMCALL: HOST_LEAVES, "TDCALL": GUEST_LEAVES}


class Stage(NamedTuple):
    """What a step stands before. label: the beginning of the step's label. inside: it is the second
    step of a SEAMCALL. name: one word. meaning: what comes next.
    """

    label: str
    inside: bool
    name: str
    meaning: str


#: Every stage of a private fault and of a zap.
STAGES = (
    Stage("vcpu_enter_guest", False, "enter", "KVM_RUN sees to the vCPU's requests"),
    Stage("smp_store_release(mode)", False, "enter", "the vCPU goes into guest mode"),
    Stage("kvm_vcpu_exit_request", False, "enter", "a last look at requests before the entry"),
    Stage("TDH.VP.ENTER", False, "enter", "KVM lets the vCPU enter with TDH.VP.ENTER"),
    Stage("TDH.VP.ENTER", True, "enter", "the module enters the guest"),
    Stage("guest", False, "guest", "the guest accepts the page, if it has not yet, and writes"),
    Stage("faultin_pfn", False, "walk", "find the page behind the gfn in the guest_memfd"),
    Stage("read_lock(mmu_lock)", False, "walk", "take mmu_lock for read and walk the mirror"),
    Stage("cmpxchg FROZEN_SPTE", False, "freeze", "the walk met an empty mirror entry: freeze it"),
    Stage("TDH.MEM.SEPT.ADD", False, "hook", "link_external_spt flushes the new table, then calls"),
    Stage("TDH.MEM.SEPT.ADD", True, SEAMCALL, "the module adds the table to the Secure EPT"),
    Stage("TDH.MEM.PAGE.AUG", False, "hook", "set_external_spte flushes the page, then calls"),
    Stage("TDH.MEM.PAGE.AUG", True, SEAMCALL, "the module adds the page to the Secure EPT"),
    Stage("publish SPTE", False, "publish", "store the new value in the mirror: no longer frozen"),
    Stage("restore SPTE", False, "restore", "the call failed: store the old value again"),
    Stage("cond_resched", False, "retry", "handle the same fault again, without the guest"),
    Stage("filemap_invalidate_lock", False, "lock", "the host punches a hole into the guest_memfd"),
    Stage("write_lock(mmu_lock)", False, "lock", "take mmu_lock for write: no fault runs beside"),
    Stage("TDH.MEM.RANGE.BLOCK", False, "clear", "the mirror is empty already; KVM calls BLOCK"),
    Stage("TDH.MEM.RANGE.BLOCK", True, "block", "the module blocks the Secure EPT entry"),
    Stage("TDH.MEM.TRACK", False, "track", "KVM calls TRACK"),
    Stage("TDH.MEM.TRACK", True, "track", "the module begins a new TLB epoch"),
    Stage("kvm_make_all_cpus_request", False, "kick", "kick every vCPU out of the guest"),
    Stage("TDH.MEM.PAGE.REMOVE", False, "remove", "KVM calls REMOVE"),
    Stage("TDH.MEM.PAGE.REMOVE", True, "remove", "the module takes the page out of the TD"),
    Stage("TDH.PHYMEM.PAGE.WBINVD", False, "write back", "KVM calls WBINVD for the page's lines"),
    Stage("TDH.PHYMEM.PAGE.WBINVD", True, "write back", "the module writes the page's lines back"),
    Stage("truncate_inode_pages_range", False, "free", "the page leaves the guest_memfd"),
    Stage("returns", False, "done", "done"),
)
START = Stage("", False, "start", "nothing has happened yet")


class MirrorTape(StepTape):
    """A `StepTape` on a machine that logs its events.

    events: those of all operations on the tape, those ahead of the present position too.
    """

    def __init__(self, machine: BareMachine) -> None:
        machine.trace.logging = True
        super().__init__(machine)
        self._before = len(machine.trace.events)
        #: events made in the first k steps, for each position k
        self._made = [0]
        self.events: list[Event] = []

    def perform(self, name: str, start: Callable[[], Operation], *, lp: int = 0) -> Any:
        """As `StepTape.perform`."""
        result = super().perform(name, start, lp=lp)
        first, end = self._operations[-1].first, len(self)
        self.events = self._logged()
        del self._made[first + 1 :]
        for position in range(first + 1, end + 1):
            self.seek(position)
            self._made.append(len(self._logged()))
        return result

    def _logged(self) -> list[Event]:
        return self.machine.trace.events[self._before :]

    def events_of(self, position: int) -> list[Event]:
        """What the step that leads to `position` finished; positions count from 1."""
        return self.events[self._made[position - 1] : self._made[position]]

    # -- the present position

    @property
    def last(self) -> Action | None:
        """As `StepTape.last`; where a call or a guest event was finished, that, with registers. A
        step that stands before a SEAMCALL, or inside it, has the registers that go into it.
        """
        action = super().last
        if action is None:
            return None
        done = self.events_of(self.position)
        if done:
            return _finished(done[-1], action)
        kind = "before the call" if self.stage.name == "hook" else "step"
        kind = "inside the module" if self.is_inside else kind
        coming = self.events[self._made[self.position] :][:1] if action.name[:4] == "TDH." else []
        inputs = _inputs(coming[0]) if coming else {}
        return Action(kind, action.lp, short_label(action.name), action.phase, inputs, action.play)

    @property
    def is_inside(self) -> bool:
        """The tape stands inside the module, in the middle of a SEAMCALL."""
        return self._is_second(self.position)

    def _is_second(self, position: int) -> bool:
        labels = [action.name.partition(" ")[0] for action in self._actions[:position][-2:]]
        return len(labels) == 2 and labels[0] == labels[1] and labels[0].startswith("TDH.")

    @property
    def stage(self) -> Stage:
        """What the tape stands before."""
        return self.stage_at(self.position)

    def stage_at(self, position: int) -> Stage:
        """What the tape stands before at a position."""
        if position == 0:
            return START
        label, inside = self._actions[position - 1].name, self._is_second(position)
        for stage in STAGES:
            if label.startswith(stage.label) and stage.inside == inside:
                return stage
        return Stage(label, False, "other", short_label(label))

    def next_stage(self) -> int:
        """The next position at which another stage begins; the end if there is none."""
        here = self.stage.name
        for position in range(self.position + 1, len(self)):
            if self.stage_at(position).name != here:
                return position
        return len(self)

    # -- counts up to the present position

    def seamcalls(self, position: int | None = None) -> Counter[str]:
        """Name of each leaf -> calls in the first `position` steps; None for the present one."""
        end = self._made[self.position if position is None else position]
        done = (event for event in self.events[:end] if event.kind == SEAMCALL)
        return Counter(HOST_LEAVES[event.number].name for event in done)

    def leaf_counts(self) -> list[LeafCount]:
        """SEAMCALLs of each leaf of the tape, in the order of their first use."""
        made, refused = self.seamcalls(), Counter[str]()
        for event in self.events[: self._made[self.position]]:
            if event.kind == SEAMCALL and event.status >= _ERROR:
                refused[HOST_LEAVES[event.number].name] += 1
        numbers = dict.fromkeys(event.number for event in self.events if event.kind == SEAMCALL)
        leaves = [HOST_LEAVES[number] for number in numbers]
        return [
            LeafCount(leaf.name, leaf.group, made[leaf.name], refused[leaf.name]) for leaf in leaves
        ]

    def phase_counts(self) -> list[PhaseCount]:
        """SEAMCALLs of each operation up to the present position, in the order of the tape."""
        made: Counter[str] = Counter({action.phase: 0 for action in self._actions})
        for position in range(1, self.position + 1):
            done = self.events_of(position)
            made[self._actions[position - 1].phase] += sum(one.kind == SEAMCALL for one in done)
        return [PhaseCount(phase, calls) for phase, calls in made.items()]

    def time_points(self) -> list[TimePoint]:
        """SEAMCALLs made so far, after each step up to the present position."""
        points = [TimePoint(0, "", 0)]
        for position in range(1, self.position + 1):
            calls = sum(event.kind == SEAMCALL for event in self.events_of(position))
            phase = self._actions[position - 1].phase
            points.append(TimePoint(position, phase, points[-1].calls + calls))
        return points


class StepRow(NamedTuple):
    """One step of a tape. step: its position. at: the label of what comes next."""

    step: int
    stage: str
    at: str
    meaning: str


def step_rows(tape: MirrorTape, operation: str) -> list[StepRow]:
    """The steps of an operation of the tape."""
    return [
        StepRow(position, stage.name, short_label(action.name), stage.meaning)
        for position, action in enumerate(tape.actions, start=1)
        for stage in [tape.stage_at(position)]
        if action.phase == operation
    ]


def short_label(label: str) -> str:
    """A step's label without what takes too much room: objects, and what an operation returned."""
    if label.startswith("returns"):
        return "returns"
    words = label.split()
    found = next((place for place, word in enumerate(words) if "=" in word), len(words))
    if label.startswith("guest"):
        return label
    return " ".join(words[:found])


def _inputs(event: Event) -> dict[str, int]:
    """RAX, RCX, and the other registers that are not zero."""
    given = event.inputs.items()
    return {"rax": event.number} | {name: n for name, n in given if n or name == "rcx"}


def _finished(event: Event, action: Action) -> Action:
    """An event as an action, for a trace line."""
    leaf = _LEAVES.get(event.kind, {}).get(event.number)
    name = leaf.name if leaf else "interrupt"
    inputs = _inputs(event) if leaf else {}
    exited = event.kind != SEAMCALL and 0 < event.status < 1 << 32
    return Action(
        event.kind,
        event.lp,
        name,
        action.phase,
        inputs,
        action.play,
        event.status,
        {} if exited or event.status < 0 else event.outputs,
        exited,
    )
