"""Refusals as data: the faults of a leaf, in the module's order.

`check` spoils a case with one or more faults and holds the answer, every register and the machine
against what the first of them must lead to.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from leafbench import (
    KEYID_SHIFT,
    LONE_OFFSET,
    OUTSIDE,
    REG,
    RESERVED_OFFSET,
    SECOND,
    SHARED_48,
    TDCX,
    TDMR,
    Bench,
    details,
)
from spoils import (
    Case,
    Spoil,
    bits,
    entry_lock,
    entry_state,
    far,
    level,
    misaligned,
    page_lock,
    pamt_lock,
    register,
    tdcs_field,
    tdcs_lock,
    tdr_field,
    version,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import describe
from tdxlab.seam.td import Tdcs, Tdr

RCX, RDX, R8, R9 = 1, 2, 8, 9

Shown = Callable[[Case], dict[str, int]]


def nothing(case: Case) -> dict[str, int]:
    """No register besides the cleared ones changes."""
    return {}


def entry_details(case: Case) -> dict[str, int]:
    """RCX and RDX show the entry at which the walk ends."""
    gpa, level = case.get("rcx") & 0xF_FFFF_FFFF_F000, case.get("rcx") & 7
    index, reached = case.td.locate(gpa, level)
    return details(case.td.read(index), reached)


class Fault(NamedTuple):
    """What is wrong with a call, and what the module says to it.

    keeps: False if the refusal is known to leave something behind. apart: end of the name of later
    faults that this one cannot meet.
    """

    name: str
    spoil: Spoil
    status: int
    shown: Shown = nothing
    keeps: bool = True
    apart: str = "-"


def check(case: Case, *faults: Fault) -> None:
    """Spoil `case` with all `faults`; the first one must win. Alone it must also change nothing."""
    first = faults[0]
    held = None
    for fault in reversed(faults):
        held = fault.spoil(case)
    shown = first.shown(case)
    expected = Registers(**(case.registers | dict.fromkeys(case.clears, 0) | shown))
    looks = len(faults) == 1 and first.keeps
    before = case.bench.digest() if looks else ""
    status, registers = case.call()
    assert status == first.status, f"{describe(status)}, not {describe(first.status)}"
    assert registers == expected
    if held is not None:
        assert held.words.view[held.word] == held.after
        held.words.put(held.word, held.before)
    if looks:
        assert case.bench.digest() == before


class Refusals(NamedTuple):
    """One leaf: how to make a case of it that succeeds, and its faults in order."""

    leaf: int
    make: Callable[[Bench], Case]
    faults: list[Fault]


def each(tables: list[Refusals]) -> pytest.MarkDecorator:
    """Parametrize with every fault of every table: (table, number)."""
    rows = [(t, n) for t in tables for n in range(len(t.faults))]
    ids = [f"{abi.HOST_LEAVES[t.leaf].name}-{t.faults[n].name}" for t, n in rows]
    assert len(set(ids)) == len(ids), "two faults of one leaf have the same name"
    return pytest.mark.parametrize(("table", "number"), rows, ids=ids)


def check_alone(bench: Bench, table: Refusals, number: int) -> None:
    """The fault alone leads to its refusal."""
    check(table.make(bench), table.faults[number])


def check_pairs(bench: Bench, table: Refusals, number: int) -> None:
    """The fault wins over every later one."""
    case = table.make(bench)
    bench = case.bench
    registers, lp, version = dict(case.registers), case.lp, case.version
    mark = bench.machine.mark()
    first = table.faults[number]
    for later in table.faults[number + 1 :]:
        if later.name.endswith(first.apart):
            continue
        check(case, first, later)
        bench.machine.rewind(mark)
        case.registers, case.lp, case.version = dict(registers), lp, version
        bench.conditions.interrupt_pending = bench.conditions.entropy_fails = False
        bench.conditions.pconfig_result = 0


# -- the sequences that leaves share


def page_faults(
    name: str, operand: int, *, exclusive: bool, wrong: str = "used", beyond: int = 1 << 52
) -> list[Fault]:
    """An operand that must be a 4 KiB page of one type. wrong: "used" if the page must be free (it
    lies in the second GiB), "free" if it must be in use (in the first).
    """
    block = SECOND if wrong == "used" else TDMR

    def in_a_big_page(case: Case) -> None:
        case.bench.give(block + LONE_OFFSET, REG, case.td.tdr, size=1)
        case.registers[name] = block + LONE_OFFSET + 0x5000

    def another_type(case: Case) -> None:
        page = case.bench.spare() if wrong == "used" else case.bench.page()
        case.registers[name] = page
        if wrong == "used":
            case.bench.give(page, TDCX, case.td.tdr)

    invalid = s.TDX_OPERAND_INVALID + operand
    busy = s.TDX_OPERAND_BUSY + operand
    incorrect = s.TDX_PAGE_METADATA_INCORRECT + operand
    faults = [
        Fault(f"{name} not aligned", bits(name, 0x800), invalid),
        Fault(f"{name} with a KeyID", bits(name, 33 << KEYID_SHIFT), invalid),
        Fault(f"{name} beyond 52 bits", bits(name, beyond), invalid),
        Fault(
            f"{name} in no TDMR",
            register(name, OUTSIDE),
            s.TDX_OPERAND_ADDR_RANGE_ERROR + operand,
        ),
        Fault(f"{name} 1G entry held", pamt_lock(name, 2, 1, 7), busy),
        Fault(f"{name} 2M entry held", pamt_lock(name, 1, 1, 7), busy),
    ]
    held = pamt_lock(name, 0, 1, 3 if exclusive else 7)
    faults.append(Fault(f"{name} 4K entry held", held, busy, apart="in a 2M page"))
    if exclusive:
        read = pamt_lock(name, 0, 4, 6)
        faults.append(Fault(f"{name} 4K entry read", read, busy, apart="in a 2M page"))
    return [
        *faults,
        Fault(f"{name} in a 2M page", in_a_big_page, incorrect),
        Fault(f"{name} reserved", register(name, block + RESERVED_OFFSET), incorrect),
        Fault(f"{name} of another type", another_type, incorrect),
    ]


def state_faults(*op_states: int, locked: bool = True) -> list[Fault]:
    """A TD on which the leaf may not work; op_states: those that it refuses."""
    faults = [
        Fault("TD fatal", tdr_field(Tdr.FATAL, 1), s.TDX_TD_FATAL),
        Fault("TD without keys", tdr_field(Tdr.LIFECYCLE, 0), s.TDX_TD_KEYS_NOT_CONFIGURED),
        Fault("TD blocked", tdr_field(Tdr.LIFECYCLE, 2), s.TDX_TD_KEYS_NOT_CONFIGURED),
        Fault("TD in teardown", tdr_field(Tdr.LIFECYCLE, 3), s.TDX_TD_KEYS_NOT_CONFIGURED),
        Fault("5 TDCS pages", tdr_field(Tdr.NUM_TDCX, 5), s.TDX_TDCS_NOT_ALLOCATED),
    ]
    if locked:
        busy = s.TDX_OPERAND_BUSY + 172
        faults.append(Fault("op-state held", tdcs_lock(Tdcs.OP_STATE_LOCK, 1, 7), busy))
    return faults + [
        Fault(f"op-state {value}", tdcs_field(Tdcs.OP_STATE, value), s.TDX_OP_STATE_INCORRECT)
        for value in op_states
    ]


def gpa_faults(lowest: int, highest: int) -> list[Fault]:
    """A GPA operand: reserved bits, level, alignment, then a GPA that is not private."""
    invalid = s.TDX_OPERAND_INVALID + RCX
    faults = [
        Fault("RCX bit 3", bits("rcx", 8), invalid),
        Fault("RCX bit 11", bits("rcx", 0x800), invalid),
        Fault("RCX bit 52", bits("rcx", 1 << 52), invalid),
        Fault("level too high", level(highest + 1), invalid),
    ]
    if lowest:
        faults.append(Fault("level too low", level(lowest - 1), invalid))
    if highest:
        faults.append(Fault("GPA not aligned to its level", misaligned(lowest, highest), invalid))
    return [
        *faults,
        Fault("GPA shared", bits("rcx", SHARED_48), invalid),
        Fault("GPA wider than 48 bits", bits("rcx", 1 << 48), invalid),
    ]


def entry_faults(*, exclusive: bool = False) -> list[Fault]:
    """The S-EPT tree's lock, the walk, the entry's lock."""
    busy_tree = s.TDX_OPERAND_BUSY + 146
    faults = [Fault("tree held", tdcs_lock(Tdcs.SEPT_LOCK, 1, 1 if exclusive else 3), busy_tree)]
    if exclusive:
        faults.append(Fault("tree read", tdcs_lock(Tdcs.SEPT_LOCK, 2, 2), busy_tree))
    failed = s.TDX_EPT_WALK_FAILED + RCX
    faults.append(Fault("no table there", far, failed, entry_details))
    busy = s.TDX_OPERAND_BUSY + RCX
    return [*faults, Fault("entry locked", entry_lock, busy, entry_details)]


def wrong_states(*names: str, status: int = s.TDX_EPT_ENTRY_STATE_INCORRECT) -> list[Fault]:
    """The entry is in a state that the leaf refuses, with details."""
    return [Fault(f"entry {n}", entry_state(n), status + RCX, entry_details) for n in names]


def mapped_page_faults() -> list[Fault]:
    """The case's own page, which the leaf finds by itself and takes exclusively, is held."""
    busy = s.TDX_OPERAND_BUSY + RCX
    return [
        Fault("page held", page_lock(0, 1, 3), busy),
        Fault("page read", page_lock(0, 4, 6), busy),
    ]


def tracking_faults(*unblocked: str) -> list[Fault]:
    """The TD runs, and the entry is not blocked, or was blocked in the present epoch."""
    not_blocked = s.TDX_GPA_RANGE_NOT_BLOCKED + RCX
    faults = [Fault(f"entry {n}", entry_state(n), not_blocked, entry_details) for n in unblocked]
    not_done = s.TDX_TLB_TRACKING_NOT_DONE + RCX
    return [*faults, Fault("not tracked", tdcs_field(Tdcs.TD_EPOCH, 1), not_done)]


def reserved_bits(name: str, operand: int, *numbers: int) -> list[Fault]:
    """Bits of a register that must be 0."""
    invalid = s.TDX_OPERAND_INVALID + operand
    return [Fault(f"{name} bit {n}", bits(name, 1 << n), invalid) for n in numbers]


def no_such_version(value: int, **shown: int) -> Fault:
    """A version that does not exist, refused by the leaf itself."""
    return Fault(f"version {value}", version(value), s.TDX_OPERAND_INVALID, lambda case: shown)
