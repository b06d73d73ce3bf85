"""Workloads for policies: what a TD's memory goes through, as a list of events.

    boot       memory is touched, a few buffers become shared, while one vCPU after the other joins
    steady     a few pages at a time become shared and private again, with vCPUs that come and go
    storm      large ranges are converted, with vCPUs that never leave by themselves
    teardown   everything is in use, and the TD ends

The files in `data/workloads` are drawn by seed (`generate`, by way of `tools/make_workloads.py`);
they are shapes to compare policies by, and no measurement of any guest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tdxlab.resources import data

#: Pages that a workload is about, from gfn 0 on: one table's. The vCPUs' own are behind them.
PAGES = 512

#: What an event does.
TOUCH, SHARED, PRIVATE, END = "touch", "shared", "private", "end"
KINDS = (TOUCH, SHARED, PRIVATE, END)
_MOST_VCPUS = 8


class Event(NamedTuple):
    """One event. do: "touch": the guest writes to each page; "shared", "private": it has them
    converted; "end": the TD is destroyed. gfn, pages: which, all of them at the end. running: vCPUs
    beside vCPU 0 that are in the guest meanwhile.
    """

    do: str
    gfn: int = 0
    pages: int = PAGES
    running: int = 0


class Workload(NamedTuple):
    """A workload. about: in words. seed: that it was drawn from. vcpus: 1 to 8.

    reads_between_exits: how often a running vCPU reads its memory before it leaves the guest by
    itself; 0: it never does.
    """

    name: str
    about: str
    seed: int
    vcpus: int
    reads_between_exits: int
    events: tuple[Event, ...]


def names() -> list[str]:
    """The workloads that there are, in the order of a TD's life."""
    return list(_DRAWN)


def load(name: str) -> Workload:
    """A workload of `data/workloads`. Refuses a name that is not there: ValueError."""
    if name not in _DRAWN:
        raise ValueError(f"there is no workload {name!r}; choose one of {', '.join(_DRAWN)}")
    return from_json(json.loads((data() / "workloads" / f"{name}.json").read_text()))


def to_json(workload: Workload) -> dict[str, Any]:
    """As its file has it; `data/README.md` tells the format."""
    events = [event._asdict() for event in workload.events]
    return workload._asdict() | {"events": events}


def from_json(raw: Mapping[str, Any]) -> Workload:
    """A workload as `to_json` writes it, in your own file too.

    Refuses what lacks a field or has another, and what is out of range: ValueError.
    """
    try:
        events = tuple(Event(**event) for event in raw["events"])
        workload = Workload(**{**raw, "events": events})
    except (KeyError, TypeError) as mistake:
        raise ValueError(f"this is no workload ({mistake}); data/README.md has the form") from None
    require(workload)
    return workload


def require(workload: Workload) -> None:
    """Refuse what is no workload, lacks whole numbers where they belong, or is out of range:
    ValueError.
    """
    if not isinstance(workload, Workload):
        raise ValueError(f"{workload!r} is no workload; give one of {', '.join(_DRAWN)}")
    events = workload.events
    numbers = [workload.vcpus, workload.reads_between_exits]
    for event in events:
        numbers += event[1:] if isinstance(event, Event) else ["no Event"]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{workload!r} has other things than whole numbers or Events in it")
    if not 1 <= workload.vcpus <= _MOST_VCPUS:
        raise ValueError(f"{workload.vcpus} vCPUs; choose 1..{_MOST_VCPUS}")
    if workload.reads_between_exits < 0:
        raise ValueError(f"{workload.reads_between_exits} reads between exits; choose 0 or more")
    for event in events:
        _require(event, workload.vcpus)
    if any(event.do == END for event in events[:-1]):
        raise ValueError("something happens after the end of the TD; let the end be the last event")


def _require(event: Event, vcpus: int) -> None:
    """Refuse an event that cannot be: ValueError."""
    if event.do not in KINDS:
        raise ValueError(f"an event cannot be {event.do!r}; choose one of {', '.join(KINDS)}")
    if event.gfn < 0 or event.pages < 1 or event.gfn + event.pages > PAGES:
        raise ValueError(f"{event.pages} pages at gfn {event.gfn}; choose of gfns 0..{PAGES - 1}")
    if not 0 <= event.running < vcpus:
        raise ValueError(f"{event.running} vCPUs run beside vCPU 0; choose 0..{vcpus - 1}")


# -- drawing


def generate(name: str, seed: int | None = None) -> Workload:
    """Draw a workload. seed: None for the one of its file. Refuses an unknown name: ValueError."""
    if name not in _DRAWN:
        raise ValueError(f"there is no workload {name!r}; choose one of {', '.join(_DRAWN)}")
    about, own_seed, vcpus, reads, draw = _DRAWN[name]
    seed = own_seed if seed is None else seed
    events = draw(random.Random(seed))
    return Workload(name, about, seed, vcpus, reads, tuple(events))


def _boot(dice: random.Random) -> list[Event]:
    """One vCPU more runs with each buffer that becomes shared."""
    events = [Event(TOUCH, 0, 160)]
    for running in range(4):
        pages = dice.choice((8, 16, 24, 32))
        events.append(Event(SHARED, 40 * running, pages, running))
    return events


def _steady(dice: random.Random) -> list[Event]:
    """Small ranges, shared and back."""
    events = [Event(TOUCH, 0, 64)]
    for _ in range(8):
        gfn, pages, running = dice.randrange(56), dice.randrange(1, 9), dice.randrange(1, 4)
        events.append(Event(SHARED, gfn, pages, running))
        events.append(Event(PRIVATE, gfn, pages, running))
        events.append(Event(TOUCH, gfn, pages))
    return events


def _storm(dice: random.Random) -> list[Event]:
    """The whole table at once, then pieces of it back and forth."""
    events = [Event(TOUCH), Event(SHARED, running=3)]
    pieces = dice.sample(range(0, PAGES, 64), 2)
    events += [Event(PRIVATE, gfn, 48, 3) for gfn in pieces]
    events += [Event(TOUCH, gfn, 48) for gfn in pieces]
    return events + [Event(SHARED, gfn, 48, dice.randrange(2, 4)) for gfn in pieces]


def _teardown(dice: random.Random) -> list[Event]:
    """Memory in use with holes in it; then the end, with all vCPUs outside."""
    events = [Event(TOUCH, 0, 160)]
    events += [Event(SHARED, gfn, 4) for gfn in sorted(dice.sample(range(0, 160, 4), 3))]
    return [*events, Event(END)]


Drawing = Callable[[random.Random], list[Event]]

#: Name -> about, seed, vCPUs, reads between exits, how it is drawn.
_DRAWN: dict[str, tuple[str, int, int, int, Drawing]] = {
    "boot": ("a guest starts and makes its buffers shared", 1, 4, 8, _boot),
    "steady": ("a few pages at a time, shared and back", 2, 4, 12, _steady),
    "storm": ("large conversions while everybody runs", 3, 4, 0, _storm),
    "teardown": ("the TD ends with its memory in use", 4, 4, 0, _teardown),
}
