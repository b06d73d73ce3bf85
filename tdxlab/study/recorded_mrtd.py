"""MRTDs of the real module: what its C code answered, against `hashlib` and nothing else.

The trace `s7_mrtd` holds TDs that were built with the real code; for each, its calls, the content
of its pages, and the MRTD that came out. No model of the module takes part here.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tdxlab import resources
from tdxlab.study.measurement_log import CHUNK_SIZE, EXTEND, PAGE_ADD, PAGE_SIZE, Page, Record, mrtd

_CALLS = {"TDH.MEM.PAGE.ADD": PAGE_ADD, "TDH.MR.EXTEND": EXTEND}
_PATTERN = re.compile(r"byte\[j\]=\((\d+)\*7\+j\)&0xff")


class RecordedTd(NamedTuple):
    """One TD of the trace. what: how it was built. log: its records. mrtd: as the real code gave
    it.
    """

    what: str
    gpaw: int
    log: list[Record]
    mrtd: str


class RecordedRow(NamedTuple):
    """A recorded TD in a line. first_digits: of the recorded MRTD. hashlib: "equal" if `hashlib`
    gives the same 96 digits, else "DIFFERENT".
    """

    what: str
    gpaw: int
    records: int
    first_digits: str
    hashlib: str


def trace_file() -> Path:
    """The trace with the recorded MRTDs."""
    return resources.traces() / "tdx_module" / "s7_mrtd.json.gz"


def recorded_tds() -> list[RecordedTd]:
    """Every TD of the trace, in the order of the recording. A GPAW that is not noted was 48."""
    with gzip.open(trace_file(), "rt", encoding="utf-8") as file:
        steps = json.load(file)["steps"]
    logs: dict[str, list[Record]] = {}
    pages: dict[str, list[Page]] = {}
    found = []
    for step in steps:
        if step.get("leaf") in _CALLS:
            tdr = step["in"]["rdx"]
            _append(logs.setdefault(tdr, []), pages.setdefault(tdr, []), step)
        elif step.get("pseudo") == "MRTD":
            log = logs.get(step["tdr"], [])
            found.append(RecordedTd(step["sequence"], step.get("gpaw", 48), log, step["mrtd"]))
    return found


def recorded_rows() -> list[RecordedRow]:
    """One line for each recorded TD, with MRTD recomputed from its log."""
    return [
        RecordedRow(
            td.what,
            td.gpaw,
            len(td.log),
            td.mrtd[:16],
            "equal" if mrtd(td.log) == td.mrtd else "DIFFERENT",
        )
        for td in recorded_tds()
    ]


def _append(log: list[Record], pages: list[Page], step: dict[str, Any]) -> None:
    """The record of one call of the trace; an added page is remembered with its content."""
    gpa = int(step["in"]["rcx"], 16)
    if _CALLS[step["leaf"]] == PAGE_ADD:
        pages.append(Page("recorded", gpa, _content(step["mem_in"]["source_page"]["pattern"])))
        log.append(Record(PAGE_ADD, gpa, len(pages) - 1))
        return
    place = next(place for place, page in enumerate(pages) if page.gpa == gpa & -PAGE_SIZE)
    chunk = gpa % PAGE_SIZE // CHUNK_SIZE
    log.append(Record(EXTEND, gpa, place, chunk, pages[place].chunk(chunk)))


def _content(pattern: str) -> bytes:
    """The 4096 bytes that a pattern of the trace stands for. Refuses an unknown one: ValueError."""
    match = _PATTERN.fullmatch(pattern)
    if match is None:
        raise ValueError(f"the trace holds a page pattern that is not known: {pattern}")
    return bytes((int(match[1]) * 7 + j) & 0xFF for j in range(PAGE_SIZE))
