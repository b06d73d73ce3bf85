"""One recorded trace of the MMU, replayed step by step on a VM of its own.

Each step is an operation, or bookkeeping: a snapshot of all page tables, a comment, or what is to
happen in the middle of the next operation. Compared are the result, the hooks called, the flushes,
all other events in order, every SPTE change, the memory-fault exit, the statistics, and whatever
else the trace says of that operation; its warnings are not.
"""

from __future__ import annotations

from collections import Counter
from errno import EBUSY
from typing import Any

from tdxlab.comparison import Difference
from tdxlab.kvm.spte import FROZEN_SPTE, SHADOW_NONPRESENT_VALUE, Masks
from tdxlab.kvm.vm import Vcpu
from tdxlab.mmu_conformance import dump, ops, ops_range, ops_spte, script
from tdxlab.mmu_conformance.decode import Args, config, integer, params, plain
from tdxlab.mmu_conformance.record import Recorder, TableNames, show
from tdxlab.mmu_conformance.rig import Countdown, Rig
from tdxlab.recorded import Step, TraceError

#: What a trace that says nonsense runs into, apart from a missing key.
_NOT_UNDERSTOOD = (TraceError, TypeError, AttributeError, IndexError, ValueError, OverflowError)

#: Keys of a step that are not results of its operation.
_NOT_RESULTS = ("op", "args", "warns")
_STATS = ("pages_4k", "pages_2m", "pages_1g", "pt_pages", "pt_pages_mirror", "nx_lpage_splits")

Rows = tuple[Any, ...]

#: Operations of which a trace shows a memory-fault exit.
_FAULTS = ("fault", "fault_noreload")

#: Results that a nested operation's do not have.
_FOLDED = ("flush", "events")


class MmuTraceRun:
    """One trace on its way: the VM, the counts, and the mismatches found so far.

    compared: steps compared, bookkeeping too. skipped: reason -> steps; nothing is. mismatches:
    number of the step -> (the operation, differences); -1 is the VM before the first step.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.compared = 0
        self.skipped: Counter[str] = Counter()
        self.mismatches: dict[int, tuple[str, list[Difference]]] = {}
        self._names = TableNames()
        self._place = (-1, "the VM")

    def replay(self, trace: Step) -> None:
        """Run all steps and compare the page tables at the end. Refuses a step that it does not
        understand: TraceError with its number.
        """
        place = "vm"
        try:
            self._set_up(trace)
            for index, step in enumerate(trace["steps"]):
                place = f"step {index}"
                self._place = index, _title(step)
                if _is_teardown(step):
                    self._compare_final(trace)
                self._step(step)
                self.compared += 1
            if not any(map(_is_teardown, trace["steps"])):
                self._compare_final(trace)
        except KeyError as error:
            raise TraceError(f"{place}: key {error} is missing") from None
        except _NOT_UNDERSTOOD as error:
            raise TraceError(f"{place}: {error}") from None

    def _set_up(self, trace: Step) -> None:
        raw = trace["vm"]
        self._rig = rig = Rig(params(trace["module_init"]), config(raw), integer(raw["vcpus"]))
        rig.run_nested = self._nested
        td = None
        if raw.get("realhooks"):
            td = script.ScriptedTdx(rig, runnable=bool(raw.get("runnable", 1)))
        else:
            rig.vm.pre_fault_allowed = bool(raw.get("runnable", 1))
        self._ops = {**ops.OPS, **ops_range.OPS, **ops_spte.OPS, **script.operations(td)}
        recorded = {**plain(trace["masks"]), **plain(raw)}
        for name, value in _constants(rig).items():
            self._compare(name, recorded[name], value)

    # -- steps

    def _step(self, step: Step) -> None:
        operation, args = step["op"], Args(step.get("args", {}))
        rig = self._rig
        if operation == "note":
            rig.yield_every(integer(step.get("cfg", {}).get("yield_every", 0)))
        elif operation == "snapshot":
            self._compare_roots("roots", step.get("roots"))
            rig.yield_every(0)
        elif operation == "at_hook":
            nested = Countdown(args.number("n", 1), 1, args.text("cmd"))
            rig.at_hook[args.text("hook")] = nested
        elif operation == "at_yield":
            rig.at_yield = args.text("cmd")
        elif operation == "fail":
            n, count = args.number("n", 1), args.number("count", 1)
            rig.failing[args.text("hook")] = Countdown(n, count, args.number("err", -EBUSY))
            self._compare_step(step, self._results(Recorder(), None, {}))
        else:
            self._operation(operation, args, step)

    def _operation(self, operation: str, args: Args, step: Step) -> None:
        rig = self._rig
        if operation in ("fault", "map_page"):
            rig.yield_every(0)
        rig.record()
        results = self._perform(operation, args)
        rig.yield_every(0)
        self._compare_step(step, results)
        rig.vm.rcu_barrier()

    def _perform(self, operation: str, args: Args) -> dict[str, Any]:
        """Run one operation; everything that came of it."""
        do = self._ops.get(operation)
        if do is None:
            raise TraceError(f"unknown operation {operation!r}")
        rig = self._rig
        out: dict[str, Any] = {}
        vcpu = rig.vcpu(args)
        vcpu.memory_fault = None
        try:
            ret = do(rig, args, out)
        except TraceError:
            raise
        except Exception as error:
            # No answer where the real code had one: a mismatch, and the replay goes on.
            ret = f"no answer ({type(error).__name__}: {error})"
        if operation in _FAULTS:
            out |= _memory_fault(vcpu)
        return self._results(rig.recorder, ret, out)

    def _results(self, recorder: Recorder, ret: Any, out: dict[str, Any]) -> dict[str, Any]:
        return {
            "ret": ret,
            "hooks": tuple(recorder.hooks()),
            "flush": tuple(recorder.flushes()),
            "events": tuple(recorder.events()),
            "spte_changes": tuple(recorder.changes()),
            "stats": self._stats(),
            **out,
        }

    def _stats(self) -> dict[str, int]:
        vm = self._rig.vm
        return {name: vm.stats[name] for name in _STATS} | {
            "rcu_pending": vm.rcu_pending,
            "invalidate_seq": vm.mmu_invalidate_seq,
            "vm_bugged": int(bool(vm.vm_bugged)),
            "gen": vm.slots.generation,
        }

    def _nested(self, command: str) -> dict[str, Any]:
        """Run an operation of another vCPU in the middle of one; what a trace shows of it."""
        operation, *words = command.split()
        if operation == "fault":
            operation = "fault_noreload"
        results = self._perform(operation, Args.parse(words))
        hooks = tuple(self._rig.recorder.unfolded())
        results = {name: value for name, value in results.items() if name not in _FOLDED}
        return results | {"hooks": hooks, "warns": ()}

    # -- comparing

    def _compare_step(self, step: Step, results: dict[str, Any]) -> None:
        """Compare every result that either has; a trace has no statistics of a VM that is gone."""
        if step["op"] == "uninit_vm":
            del results["stats"]
        for name in {**step, **results}:
            if name not in _NOT_RESULTS:
                self._compare(name, plain(step.get(name)), results.get(name))

    def _compare_final(self, trace: Step) -> None:
        self._compare_roots("final", trace["final"])

    def _compare_roots(self, name: str, recorded: Any) -> None:
        self._compare(name, plain(recorded), dump.roots(self._rig.vm))

    def _compare(self, name: str, recorded: Any, ours: Any) -> None:
        """Note what differs: in dicts every key, in lists of rows the first row."""
        if self._names.same(recorded, ours):
            return
        if isinstance(recorded, dict) and isinstance(ours, dict):
            for key in {**recorded, **ours}:
                self._compare(f"{name} {key}", recorded.get(key), ours.get(key))
        elif _is_rows(recorded) and _is_rows(ours):
            self._compare_rows(name, recorded, ours)
        else:
            self._note(name, recorded, ours)

    def _compare_rows(self, name: str, recorded: Rows, ours: Rows) -> None:
        for place in range(max(len(recorded), len(ours))):
            left = recorded[place] if place < len(recorded) else "nothing"
            right = ours[place] if place < len(ours) else "nothing"
            if not self._names.same(left, right):
                self._compare(f"{name}, row {place}", left, right)
                return

    def _note(self, name: str, recorded: Any, ours: Any) -> None:
        index, title = self._place
        differences = self.mismatches.setdefault(index, (title, []))[1]
        differences.append((name, show(recorded), show(ours)))


def _is_rows(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(row, tuple | dict) for row in value)


def _memory_fault(vcpu: Vcpu) -> dict[str, Any]:
    found = vcpu.memory_fault
    return {"memory_fault_exit": found._asdict()} if found else {}


def _constants(rig: Rig) -> dict[str, int]:
    """What the trace says of masks and limits that the model has a word for."""
    vm, masks = rig.vm, Masks(rig.vm.params)
    return {
        "max_gfn": vm.params.max_gfn,
        "shadow_mmio_value": vm.shadow_mmio_value,
        "shadow_mmio_mask": masks.mmio_mask,
        "shadow_present_mask": masks.present,
        "shadow_nonpresent_or_rsvd_mask": masks.nonpresent_or_rsvd,
        "shadow_nonpresent_or_rsvd_lower_gfn_mask": masks.lower_gfn,
        "FROZEN_SPTE": FROZEN_SPTE,
        "SHADOW_NONPRESENT_VALUE": SHADOW_NONPRESENT_VALUE,
    }


def _is_teardown(step: Step) -> bool:
    return step["op"] == "note" and str(step.get("text", "")).startswith("teardown")


def _title(step: Step) -> str:
    """The operation, for people."""
    words = [str(step["op"]), *(f"{key}={value}" for key, value in step.get("args", {}).items())]
    return " ".join(words)
