"""The tables of notebook 06: what shared memory costs, entry by entry and experiment by experiment.

Every figure is counted by running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE
from tdxlab.kvm.spte import (
    FROZEN_SPTE,
    SHADOW_NONPRESENT_VALUE,
    Spte,
    get_mmio_spte_generation,
    is_last_spte,
    is_mmio_spte,
    is_shadow_present_pte,
)
from tdxlab.study.shared_lab import (
    DEVICE_GPA,
    REGIONS,
    Deed,
    Outcome,
    SharedLab,
    level_name,
)

#: Fields of a leaf that say who may do what, with a letter or two, lowest bit first.
SPTE_BITS: dict[str, tuple[str, str]] = {
    "read": ("R", "the guest may read"),
    "write": ("W", "the guest may write"),
    "execute": ("X", "the guest may execute"),
    "page_size": ("PS", "a leaf above the 4K level"),
    "accessed": ("A", "used since somebody last looked"),
    "dirty": ("D", "written since somebody last looked"),
    "mmu_present": ("MP", "KVM's own mark of an entry in use"),
    "host_writable": ("HW", "the host's mapping is writable"),
    "mmu_writable": ("MW", "W may come back without asking anybody"),
    "suppress_ve": ("SV", "an access that fails exits, it is no #VE"),
}


class BitRow(NamedTuple):
    """One bit of an SPTE. set: 0 or 1."""

    bit: int
    letter: str
    set: int
    meaning: str


def bit_rows(raw: int) -> list[BitRow]:
    """The bits of an SPTE that this notebook is about."""
    fields = {name: getattr(Spte, name) for name in SPTE_BITS}
    return [
        BitRow(fields[name].low, letter, raw >> fields[name].low & 1, meaning)
        for name, (letter, meaning) in SPTE_BITS.items()
    ]


def letters(raw: int) -> str:
    """The letters of the bits that are set: "R W X A D MP HW MW SV"."""
    return " ".join(row.letter for row in bit_rows(raw) if row.set) or "none"


class WalkRow(NamedTuple):
    """One entry on the way to a page. entry: its number in its table. raw: the SPTE."""

    level: str
    entry: int
    raw: int
    kind: str
    bits: str


def walk_rows(lab: SharedLab, gpa: int) -> list[WalkRow]:
    """The way to a GPA (without shared bit) in the direct EPT, from the root."""
    return [
        WalkRow(
            level_name(entry.level),
            entry.place,
            entry.raw,
            kind_of(lab, entry.raw, entry.level),
            letters(entry.raw) if is_shadow_present_pte(entry.raw) else "-",
        )
        for entry in lab.walk(gpa)
    ]


def kind_of(lab: SharedLab, raw: int, level: int) -> str:
    """What an SPTE is: "empty", "frozen", "MMIO", "table", "leaf"."""
    if raw == SHADOW_NONPRESENT_VALUE:
        return "empty"
    if raw == FROZEN_SPTE:
        return "frozen"
    if is_shadow_present_pte(raw):
        return "leaf" if is_last_spte(raw, level) else "table"
    return "MMIO" if is_mmio_spte(lab.gate.vm, raw) else "empty"


# -- private against shared


class CallRow(NamedTuple):
    """SEAMCALLs of one leaf for the same number of first uses."""

    leaf: str
    private: int
    shared: int


def call_rows(lab: SharedLab, pages: int) -> list[CallRow]:
    """SEAMCALLs until the guest of a fresh lab's TD has written `pages` private pages, and as many
    shared ones in 4 KiB host pages. Nothing stays of either.
    """
    private = _calls(lab, lambda: lab.gate.touch(0, pages * PAGE_SIZE))
    shared = _calls(lab, lambda: lab.touch("4K", 0, pages, write=True))
    names = sorted({*private, *shared}, key=lambda name: (-private.get(name, 0), name))
    return [CallRow(name, private.get(name, 0), shared.get(name, 0)) for name in names]


def _calls(lab: SharedLab, deed: Callable[[], object]) -> dict[str, int]:
    """Leaf -> SEAMCALLs of a deed, which is then taken back."""
    mark, place = lab.machine.mark(), lab.tape.position
    before = dict(lab.machine.seamcalls)
    deed()
    made = {
        name: n - before.get(name, 0)
        for name, n in lab.machine.seamcalls.items()
        if n != before.get(name, 0)
    }
    if lab.tape.position > place:
        lab.tape.seek(place)
    else:
        lab.machine.rewind(mark)
    return made


# -- large pages


class SizeRow(NamedTuple):
    """The guest has written every page of a range once. memory: size of the host's pages. tables:
    below the root, those of other memory not among them.
    """

    memory: str
    pages_written: int
    faults: int
    leaves: int
    tables: int
    table_bytes: int


def size_rows(lab: SharedLab, pages: int) -> list[SizeRow]:
    """Write `pages` pages of each memory of a fresh lab; the deeds are taken back."""
    rows = []
    place = lab.tape.position
    for size in REGIONS:
        gained = lab.touch(size, 0, pages, write=True).gained
        leaves = sum(gained.get(name, 0) for name in ("pages_4k", "pages_2m", "pages_1g"))
        tables = gained.get("tables", 0)
        rows.append(SizeRow(size, pages, gained["faults"], leaves, tables, tables * PAGE_SIZE))
        lab.tape.seek(place)
    return rows


# -- dirty logging


class LogRow(NamedTuple):
    """One way to split. at_start: SPTE changes before the guest goes on. slow, fast: faults of the
    writes that follow. tables: added by the end.
    """

    memory: str
    split: str
    at_start: int
    writes: int
    slow: int
    fast: int
    tables: int


def log_rows(
    lab: SharedLab, *, sizes: Iterable[str] = ("4K", "2M"), writes: int = 8
) -> list[LogRow]:
    """Log 4 MiB that the guest has written, then write every 128th page; nothing stays of it."""
    place = lab.tape.position
    rows = []
    for size in sizes:
        for eager in (True, False):
            lab.touch(size, 0, 1024, write=True)
            start = lab.log(size, eager=eager).gained
            then = lab.touch(size, 0, writes, write=True, step=128).gained
            faults, fast = then.get("faults", 0), then.get("fast", 0)
            tables = start.get("tables", 0) + then.get("tables", 0)
            how = "at the start" if eager else "at the first write"
            rows.append(
                LogRow(size, how, start.get("SPTE changes", 0), writes, faults - fast, fast, tables)
            )
            lab.tape.seek(place)
    return rows


# -- leaf sizes over time


class LeafPoint(NamedTuple):
    """Leaves of each size after a number of deeds. deed: the last of them."""

    position: int
    deed: str
    pages_4k: int
    pages_2m: int
    pages_1g: int
    tables: int


def leaf_points(lab: SharedLab) -> list[LeafPoint]:
    """Leaves and tables after each deed up to the present position; the first row is 0."""
    points = [LeafPoint(0, "", 0, 0, 0, 0)]
    for position, deed in enumerate(lab.tape.deeds, start=1):
        after = deed.outcome.after
        points.append(
            LeafPoint(
                position,
                deed.what,
                after["pages_4k"],
                after["pages_2m"],
                after["pages_1g"],
                after["tables"],
            )
        )
    return points


class DeedRow(NamedTuple):
    """One deed on the tape. by: who did it."""

    step: int
    by: str
    deed: str
    came_of_it: str


def deed_rows(deeds: Iterable[Deed]) -> list[DeedRow]:
    """What was done, in order."""
    return [
        DeedRow(step, deed.kind, deed.what, deed.outcome.said)
        for step, deed in enumerate(deeds, start=1)
    ]


# -- MMIO


class MmioRow(NamedTuple):
    """One deed around a device page. raw: the SPTE afterwards. generation: in that SPTE, "-" if it
    is no MMIO entry; slots: that of the memslots.
    """

    vm: str
    deed: str
    faults: int
    raw: int
    kind: str
    generation: str
    slots: int


def mmio_rows(labs: Iterable[SharedLab]) -> list[MmioRow]:
    """On each lab: read a device page twice, add RAM elsewhere, read, add RAM there, read. Nothing
    stays of it.
    """
    rows = []
    for lab in labs:
        place = lab.tape.position
        read, add = lab.device, lab.add_slot
        deeds = (read, read, partial(add, 9), read, partial(add, 0), read)
        rows += [_mmio_row(lab, deed()) for deed in deeds]
        lab.tape.seek(place)
    return rows


def _mmio_row(lab: SharedLab, outcome: Outcome) -> MmioRow:
    last = lab.walk(DEVICE_GPA)[-1]
    kind = kind_of(lab, last.raw, last.level)
    generation = str(get_mmio_spte_generation(last.raw)) if kind == "MMIO" else "-"
    vm = lab.gate.vm
    return MmioRow(
        lab.kind,
        lab.tape.deeds[-1].what,
        outcome.gained.get("faults", 0),
        last.raw,
        kind,
        generation,
        vm.slots.generation,
    )


# -- ageing


class AgeRow(NamedTuple):
    """One deed around an old page. young: what the host would be told now. bits: of its SPTE."""

    vm: str
    deed: str
    young: bool
    faults: int
    bits: str


def age_rows(labs: Iterable[SharedLab], *, page: int = 0) -> list[AgeRow]:
    """On each lab: read a page, age it, read it again, flush the TLB, read it once more. The deeds
    are taken back.
    """
    rows = []
    for lab in labs:
        place = lab.tape.position
        name = lab.kind if lab.gate.vm.params.ad_bits else f"{lab.kind}, no A/D bits"
        read, age = partial(lab.touch, "4K", page), partial(lab.age, "4K", page, 1)
        for deed in (read, age, read, lab.flush, read):
            gained = deed().gained
            entry = lab.entry("4K", page)
            assert entry is not None
            did = lab.tape.deeds[-1].what
            young = lab.is_young("4K", page)
            rows.append(AgeRow(name, did, young, gained.get("faults", 0), letters(entry.raw)))
        lab.tape.seek(place)
    return rows
