"""A policy's run, recorded: what every page was after each call, for a panel to go back and forth.

    recording = record(KernelPolicy(), "boot")
    recording.result, recording.frames[7].op
    tape = PolicyTape(recording); tape.seek(7); tape.pages()

The run itself is over by then. Position k is what the first k frames have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tdxlab import policy_run, views
from tdxlab.arch import PAGE_SHIFT, SIZE_2M
from tdxlab.conversion import PAGES_OPS, ConversionTally, memory_of
from tdxlab.kvm.blocked import is_blocked_spte
from tdxlab.kvm.spte import is_present_leaf
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import OUTSIDE_GUEST_MODE
from tdxlab.policy import Op, Tally
from tdxlab.policy_results import AnyResult
from tdxlab.policy_run import Given
from tdxlab.seam.rules import SEPT_STATE_BY_BITS, SEPT_STATE_MASK
from tdxlab.tape import Action, Tape
from tdxlab.vmm_td import Td
from tdxlab.workloads import PAGES, Workload

#: What a mirror entry can be.
EMPTY, MAPPED, BLOCKED = "empty", "mapped", "blocked"
#: Name of the last frame's op.
OVER = "over"
#: State of an S-EPT entry that maps nothing, and of a table that is closed.
FREE, CLOSED = "FREE", "NL_BLOCKED"


class Page(NamedTuple):
    """A page in both trees. mirror: EMPTY, MAPPED, BLOCKED. external: state of its S-EPT entry.
    memory: as in `conversion.memory_of`, "" for none; not looked at while a zap goes on.
    """

    mirror: str
    external: str
    memory: str


NOTHING = Page(EMPTY, FREE, "")


class Frame(NamedTuple):
    """One thing that happened. op: a call, or in lower-case letters an event that begins, or OVER.
    event: its number, from 1. changed: gfn -> what the page is now. inside: vCPUs in the guest. The
    rest are sums; calls, entries: of conversion policies.
    """

    op: Op
    event: int
    changed: dict[int, Page]
    inside: int
    seamcalls: int
    ipis: int
    retries: int
    out: int
    calls: int
    entries: int

    @property
    def is_event(self) -> bool:
        """It is no call of the policy's."""
        return self.op.name.islower()


class Recording(NamedTuple):
    """A run. The last frame is the end, or where the policy was stopped."""

    workload: str
    result: AnyResult
    frames: tuple[Frame, ...]


def record(
    policy: Given,
    workload: Workload | str,
    *,
    gpaw: int = 48,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Recording:
    """Run and record. progress: told (events done, in all) whenever an event begins. All else, and
    refusals, as for `policy_run.run`.
    """
    recorder, events = _Recorder(), len(policy_run.loaded(workload).events)

    def see(td: Td, op: Op, tally: Tally | ConversionTally) -> None:
        recorder.see(td, op, tally)
        if progress is not None and recorder.frames[-1].is_event:
            progress(recorder.frames[-1].event - 1, events)

    result = policy_run.run(policy, workload, gpaw=gpaw, seed=seed, watch=see)
    recorder.end()
    return Recording(result.workload, result, tuple(recorder.frames))


class _Recorder:
    """Looks at the machine after each call."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self._pages = dict.fromkeys(range(PAGES), NOTHING)
        #: gfn -> index of its mirror entry in memory's words, and of its S-EPT entry
        self._words: dict[int, tuple[int, int]] = {}
        self._seen: tuple[Td, Tally | ConversionTally] | None = None

    def see(self, td: Td, op: Op, tally: Tally | ConversionTally) -> None:
        """A call is done, or an event begins."""
        self._seen = td, tally
        self._add(op, self._all() if op.name.islower() or op.level > 1 else self._one(op))

    def end(self) -> None:
        """The run is over."""
        if self._seen is not None:
            self._add(Op(OVER, -1, 0, ""), self._all())

    def _add(self, op: Op, now: dict[int, Page]) -> None:
        assert self._seen is not None
        td, tally = self._seen
        begins = op.name.islower() and op.name != OVER
        event = (self.frames[-1].event if self.frames else 0) + begins
        changed = {gfn: page for gfn, page in now.items() if self._pages[gfn] != page}
        self._pages |= changed
        inside = sum(vcpu.mode != OUTSIDE_GUEST_MODE for vcpu in td.vm.vcpus)
        calls = (tally.calls, tally.entries) if isinstance(tally, ConversionTally) else (0, 0)
        sums = (tally.seamcalls, tally.ipis, tally.retries, tally.pages, *calls)
        self.frames.append(Frame(op, event, changed, inside, *sums))

    def _all(self) -> dict[int, Page]:
        """All pages, looked for from the roots."""
        assert self._seen is not None
        td = self._seen[0]
        mirror, external, closed = {}, {}, False
        vm, memory = td.vm, td.host.memory
        roots = [vcpu.mirror_root_hpa for vcpu in vm.vcpus if vcpu.mirror_root_hpa in vm.sps]
        for root in roots[:1]:
            for it in for_each_tdp_pte(vm, vm.sps[root], 0, PAGES):
                if it.level == 1:
                    mirror[it.gfn] = it.word
        for row in views.sept_rows(td.host.machine, td.tdr) if roots and td.tdr else ():
            if row.gpa < SIZE_2M and row.sept_level == 1:
                closed = row.state == CLOSED
            elif row.gpa < SIZE_2M and row.sept_level == 0:
                frame = memory.frames[row.entry_hpa & -1 << PAGE_SHIFT]
                external[row.gpa >> PAGE_SHIFT] = frame + (row.entry_hpa % (1 << PAGE_SHIFT)) // 8
        self._words = {gfn: (mirror[gfn], external[gfn]) for gfn in mirror if gfn in external}
        pages = {gfn: self._look(gfn) for gfn in range(PAGES)}
        kinds = memory_of(td)
        return {
            gfn: Page(
                page.mirror,
                CLOSED if closed and page != NOTHING else page.external,
                kinds.get(gfn, ""),
            )
            for gfn, page in pages.items()
        }

    def _one(self, op: Op) -> dict[int, Page]:
        """What a call about one page can have changed."""
        assert self._seen is not None
        if op.gfn not in self._words:
            return {}
        memory = self._pages[op.gfn].memory
        if op.name in PAGES_OPS:
            memory = memory_of(self._seen[0]).get(op.gfn, "")
        return {op.gfn: self._look(op.gfn)._replace(memory=memory)}

    def _look(self, gfn: int) -> Page:
        assert self._seen is not None
        if gfn not in self._words:
            return NOTHING
        view = self._seen[0].host.memory.words.view
        spte, septe = (view[word] for word in self._words[gfn])
        mirror = MAPPED if is_present_leaf(spte, 1) else BLOCKED if is_blocked_spte(spte) else EMPTY
        state = SEPT_STATE_BY_BITS.get(septe & SEPT_STATE_MASK)
        return Page(mirror, state.name if state else FREE, "")


class PolicyTape(Tape):
    """A recording to go back and forth in. `actions[k]`: frame k."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.phase = ""
        self._place = 0
        self._actions = [_action(frame) for frame in recording.frames]

    @property
    def position(self) -> int:
        """How many frames are shown."""
        return self._place

    def seek(self, position: int) -> None:
        """As `Tape.seek`."""
        if not 0 <= position <= len(self):
            raise ValueError(f"position {position}; this tape has 0..{len(self)}")
        self._place = position

    @property
    def frame(self) -> Frame | None:
        """The last frame shown, None at the beginning."""
        return self.recording.frames[self._place - 1] if self._place else None

    def pages(self) -> dict[int, Page]:
        """gfn -> page, of those that are mapped or blocked anywhere."""
        pages: dict[int, Page] = {}
        for frame in self.recording.frames[: self._place]:
            pages |= frame.changed
        return {gfn: page for gfn, page in sorted(pages.items()) if page != NOTHING}

    def next_event(self) -> int:
        """The position behind the next frame that begins an event. Refuses at the last one:
        ValueError.
        """
        return next(self._events_ahead())

    def _events_ahead(self) -> Iterator[int]:
        for number, frame in enumerate(self.recording.frames[self._place :], self._place + 1):
            if frame.is_event:
                yield number
        raise ValueError("no event comes any more: this is the end of the run")


def _action(frame: Frame) -> Action:
    """A frame as a tape has it."""
    name, gfn, level, answer = frame.op
    inputs = {"gfn": gfn} if gfn >= 0 else {}
    if gfn >= 0 and (frame.is_event or name in PAGES_OPS):
        inputs["pages"] = level
    if frame.is_event:
        return Action("event", 0, name, "", inputs, _never_played)
    return Action("policy", 0, f"{name}: {answer}", "", inputs, _never_played)


def _never_played() -> None:
    raise AssertionError("a recorded run is not played again")
