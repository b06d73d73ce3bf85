"""Replays recorded traces of the real code against the model, and says where they differ.

Traces of the TDX module hold a platform, a list of steps and the state at their end. A step is a
SEAMCALL, a guest event, or bookkeeping (snapshots, host writes, knobs). A SEAMCALL or guest event
counts as compared only if its status, all its recorded registers, the lock word, the TD's state and
the guest's result were, and the dumps that follow it; what cannot be compared is skipped and
counted with its reason.

Traces of KVM's MMU hold a VM, a list of operations and the page tables at their end. Of each
operation everything is compared: see `mmu_conformance.run`.

    tdxlab replay data/conformance
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tdxlab.arguments import one_line
from tdxlab.comparison import Difference
from tdxlab.conformance import TraceRun
from tdxlab.mmu_conformance.run import MmuTraceRun
from tdxlab.recorded import TraceError

#: Mismatches that are shown in full.
SHOWN = 10

Progress = Callable[[int, int], None]

#: Fewer are replayed sooner than another process starts.
_FILES_PER_JOB = 20

#: Keys that tell the kinds of traces apart -> what replays them.
_KINDS: dict[tuple[str, ...], type[TraceRun] | type[MmuTraceRun]] = {
    ("platform", "steps"): TraceRun,
    ("module_init", "vm", "steps"): MmuTraceRun,
}


@dataclass
class Mismatch:
    """One step that answered differently: where, what was called, and each value that differs
    (name, recorded, ours).
    """

    trace: str
    step: int
    call: str
    differences: list[tuple[str, str, str]]

    def lines(self) -> Iterator[str]:
        """The mismatch for people."""
        yield f"{self.trace}, step {self.step}: {self.call}"
        for name, recorded, ours in self.differences:
            yield f"    {name}: the real code gave {recorded}, the model {ours}"


class Outcome(NamedTuple):
    """What the replay of one trace found. skipped: reason -> steps. mismatches: number of the step
    -> (what was called, differences).
    """

    name: str
    compared: int
    skipped: Counter[str]
    mismatches: dict[int, tuple[str, list[Difference]]]


@dataclass
class Report:
    """Totals over all traces. steps = compared + skipped; mismatched steps are among the compared
    ones.
    """

    traces: int = 0
    steps: int = 0
    compared: int = 0
    skipped_by_reason: Counter[str] = field(default_factory=Counter)
    mismatched: int = 0
    first_mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Steps that were not compared."""
        return sum(self.skipped_by_reason.values())

    def add(self, run: Outcome) -> None:
        """Count one finished trace in."""
        self.traces += 1
        self.steps += run.compared + sum(run.skipped.values())
        self.compared += run.compared
        self.skipped_by_reason.update(run.skipped)
        self.mismatched += len(run.mismatches)
        for step, (call, differences) in sorted(run.mismatches.items()):
            if len(self.first_mismatches) < SHOWN:
                self.first_mismatches.append(Mismatch(run.name, step, call, differences))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "traces": self.traces,
            "steps": self.steps,
            "compared": self.compared,
            "skipped": self.skipped,
            "mismatched": self.mismatched,
            "skipped_by_reason": dict(self.skipped_by_reason),
            "first_mismatches": [vars(mismatch) for mismatch in self.first_mismatches],
        }

    def table(self) -> Iterator[str]:
        """The report for people."""
        yield f"{'traces':<12}{self.traces:>9,}"
        yield f"{'steps':<12}{self.steps:>9,}"
        yield f"{'compared':<12}{self.compared:>9,}"
        yield f"{'skipped':<12}{self.skipped:>9,}"
        for reason, count in sorted(self.skipped_by_reason.items()):
            yield f"    {count:>7,}  {reason}"
        yield f"{'mismatched':<12}{self.mismatched:>9,}"
        for mismatch in self.first_mismatches:
            yield from mismatch.lines()
        if self.mismatched > len(self.first_mismatches):
            yield f"... and {self.mismatched - len(self.first_mismatches):,} more"


def find_traces(paths: Sequence[str]) -> list[Path]:
    """The trace files that `paths` name: files as they are, folders with every *.json and *.json.gz
    below them, sorted.

    Refuses a path that does not exist and a folder without traces: TraceError.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*.json*") if p.name.endswith((".json", ".json.gz"))
            )
            if not inside:
                raise TraceError(f"{path}: no traces (*.json, *.json.gz) in this folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise TraceError(f"{path}: no such file or folder")
    return found


def load(path: Path) -> dict[str, Any]:
    """The trace in `path`. Refuses what is not one: TraceError."""
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        trace = json.loads(text)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise TraceError(f"{path}: damaged or truncated gzip") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a trace: not text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise TraceError(f"{path}: not JSON (line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: not a trace: {error}") from None
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    if not isinstance(trace, dict) or _kind(trace) is None:
        raise TraceError(
            f"{path}: not a trace: neither of the TDX module ('platform', 'steps') "
            "nor of KVM's MMU ('module_init', 'vm', 'steps')"
        )
    return trace


def _kind(trace: dict[str, Any]) -> type[TraceRun] | type[MmuTraceRun] | None:
    """What replays this kind of trace; None if it is no trace."""
    return next((run for keys, run in _KINDS.items() if all(key in trace for key in keys)), None)


def replay(paths: Sequence[str], progress: Progress | None = None, jobs: int = 1) -> Report:
    """Replay every trace that `paths` name. progress: called with (traces done, traces in all).
    jobs: processes that share the work; the report is the same for any number.

    Refuses files that are not traces, and steps that it does not understand: TraceError with file
    and place.
    """
    report = Report()
    files = find_traces(paths)
    if progress:
        progress(0, len(files))
    with _mapping(jobs) as outcomes_of:
        for outcome in outcomes_of(replay_file, files):
            report.add(outcome)
            if progress:
                progress(report.traces, len(files))
    return report


@contextmanager
def _mapping(jobs: int) -> Iterator[Callable[..., Iterable[Outcome]]]:
    """A `map` that runs in `jobs` processes; in this one if there is but one."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield pool.map


def replay_file(path: Path) -> Outcome:
    """Replay the trace in `path`. Refuses what `replay` refuses."""
    try:
        trace = load(path)
        kind = _kind(trace)
        assert kind is not None
        run = kind(path.name.removesuffix(".gz").removesuffix(".json"))
        run.replay(trace)
    except TraceError as error:
        raise TraceError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return Outcome(run.name, run.compared, run.skipped, run.mismatches)


def _jobs(paths: Sequence[str]) -> int:
    """Processes that are worth their start for so many traces."""
    return max(1, min(os.cpu_count() or 1, len(find_traces(paths)) // _FILES_PER_JOB))


def command(
    paths: Sequence[str],
    as_json: bool,
    out: TextIO,
    err: TextIO,
    progress: Progress | None = None,
) -> int:
    """`tdxlab replay`: print the report to `out`; returns 0 if nothing mismatched, 1 if something
    did, 2 for bad input.
    """
    try:
        report = replay(paths, progress, _jobs(paths))
    except TraceError as error:
        print(one_line(f"tdxlab replay: {error}"), file=err)
        return 2
    if as_json:
        print(json.dumps(report.as_dict()), file=out)
    else:
        print("\n".join(report.table()), file=out)
    return 1 if report.mismatched else 0
