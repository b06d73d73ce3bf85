"""A TD's whole life in six phases, and what each costs: `tdxlab demo`.

build     the TD in the module, its control pages, its vCPUs
launch    firmware, measured; the measurement closed
touch     the guest uses every page of its memory once
share     an eighth of it becomes shared memory, which the guest uses
unshare   ... and private again
destroy   everything goes back to the host
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

from tdxlab.accounts import Levels
from tdxlab.arch import PAGE_SIZE, SIZE_1G
from tdxlab.machine import Machine
from tdxlab.sizes import format_size, parse_size
from tdxlab.vmm_td import Td

#: Content of the guest's firmware: four pages.
FIRMWARE = b"".join(bytes([number]) * PAGE_SIZE for number in range(1, 5))
#: The part of memory that is converted.
SHARED_PART = 8

#: Told (what is going on, how much is done, in all).
Progress = Callable[[str, int, int], None]


class Phase(NamedTuple):
    """One phase. seamcalls: name of a leaf -> calls. tables: occupancy at its end."""

    name: str
    seamcalls: dict[str, int]
    tables: dict[str, Levels]


class Life(NamedTuple):
    """A TD's life as the demo played it. memory: bytes."""

    gpaw: int
    memory: int
    phases: list[Phase]

    @property
    def total(self) -> dict[str, int]:
        """Name of a leaf -> calls in all phases."""
        names = dict.fromkeys(name for phase in self.phases for name in phase.seamcalls)
        return {name: sum(phase.seamcalls.get(name, 0) for phase in self.phases) for name in names}


def live(
    *,
    gpaw: int = 48,
    memory: int | str = "64 MiB",
    vcpus: int = 2,
    progress: Progress | None = None,
) -> Life:
    """Play a TD's life on a machine of its own.

    Refuses what `Machine.create_td` refuses: ValueError.
    """
    size = parse_size(memory)
    machine = Machine(gpaw=gpaw, memory=_host_memory(size), lps=max(4, min(vcpus, 256)))
    phases: list[Phase] = []
    before: dict[str, int] = dict(machine.seamcalls)
    for name, td in _phases(machine, size, vcpus, progress or (lambda *_: None)):
        after = dict(machine.seamcalls)
        counts = {leaf: n - before.get(leaf, 0) for leaf, n in after.items()}
        used = {leaf: n for leaf, n in counts.items() if n}
        phases.append(Phase(name, used, machine.tables(td)))
        before = after
    return Life(gpaw, size, phases)


def _host_memory(size: int) -> int:
    """Enough for a guest of that size, twice over: a GiB more, in whole GiB."""
    return (-(-2 * size // SIZE_1G) + 1) * SIZE_1G


def _phases(
    machine: Machine, size: int, vcpus: int, progress: Progress
) -> Iterator[tuple[str, Td]]:
    """Do one phase after the other; yields the name of each when it is over."""
    td = machine.create_td(vcpus=vcpus, memory=size, launch=False)
    yield "build", td
    machine.add_firmware(td, FIRMWARE)
    td.finalize()
    yield "launch", td
    td.touch(0, size, progress=lambda done, total: progress("touch", done, total))
    yield "touch", td
    part = max(size // SHARED_PART & -PAGE_SIZE, PAGE_SIZE)
    td.convert(0, part, to="shared")
    td.touch(0, part, progress=lambda done, total: progress("share", done, total))
    yield "share", td
    td.convert(0, part, to="private")
    yield "unshare", td
    td.destroy(progress=lambda done, total: progress("destroy", done, total))
    yield "destroy", td


# -- showing it


def as_json(life: Life) -> str:
    """The life as one JSON object."""
    phases = [
        {"name": phase.name, "seamcalls": phase.seamcalls, "tables": _plain(phase.tables)}
        for phase in life.phases
    ]
    whole = {"gpaw": life.gpaw, "memory": life.memory, "phases": phases, "total": life.total}
    return json.dumps(whole, indent=1)


def _plain(tables: dict[str, Levels]) -> dict[str, dict[str, dict[str, int]]]:
    return {
        tree: {level: occupancy.as_dict() for level, occupancy in levels.items()}
        for tree, levels in tables.items()
    }


def as_text(life: Life) -> Iterator[str]:
    """The life as lines: SEAMCALLs by phase, then the page tables at the end of each phase."""
    yield f"A TD with {format_size(life.memory)} of memory and GPAW {life.gpaw}"
    yield ""
    yield from _calls(life)
    yield ""
    yield from _tables(life)


def _calls(life: Life) -> Iterator[str]:
    names = [phase.name for phase in life.phases]
    yield _row("SEAMCALLs", [*names, "total"])
    for leaf, total in sorted(life.total.items()):
        counts = [phase.seamcalls.get(leaf, 0) for phase in life.phases]
        yield _row(leaf, [str(count or ".") for count in counts] + [str(total)])
    sums = [sum(phase.seamcalls.values()) for phase in life.phases]
    yield _row("in all", [str(count) for count in [*sums, sum(sums)]])


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:<26}" + "".join(f"{cell:>8}" for cell in cells)


def _tables(life: Life) -> Iterator[str]:
    yield f"{'page tables after':<18}{'tree':<10}{'level':<6}{'tables':>8}{'entries':>9}{'of':>9}"
    for phase in life.phases:
        title = phase.name
        for tree, levels in phase.tables.items():
            for number, (level, found) in enumerate(levels.items()):
                name = "" if number else tree
                figures = f"{found.tables:>8}{found.entries:>9}{found.capacity:>9}"
                yield f"{title:<18}{name:<10}{level:<6}{figures}"
                title = ""
        if not phase.tables:
            yield f"{title:<18}none"


def command(life: Life, is_json: bool, out: TextIO) -> int:
    """Print a life; returns the exit status 0."""
    print(as_json(life) if is_json else "\n".join(as_text(life)), file=out)
    return 0
