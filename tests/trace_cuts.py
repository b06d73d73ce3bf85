"""Recorded traces, cut short behind the step that a test is about."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

Trace = dict[str, Any]
Pick = Callable[[dict[str, Any]], bool]


@cache
def _read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def load(path: Path, until: Pick | None = None) -> tuple[Trace, dict[str, Any]]:
    """A recorded trace, and the step that the trace is cut behind: the first that `until` picks.
    One that was cut says nothing of the final state.
    """
    trace = json.loads(_read(path))
    if until is None:
        return trace, trace["steps"][-1]
    end = next(i for i, step in enumerate(trace["steps"]) if until(step))
    del trace["steps"][end + 1 :]
    trace.pop("final_state", None)
    return trace, trace["steps"][end]
