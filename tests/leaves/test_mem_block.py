"""TDH.MEM.RANGE.BLOCK, RANGE.UNBLOCK, TRACK."""

import pytest
from leafbench import RAW, Bench, BuiltTd
from leaffaults import (
    RCX,
    RDX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    entry_details,
    entry_faults,
    gpa_faults,
    page_faults,
    state_faults,
    wrong_states,
)
from spoils import (
    Case,
    entry_state,
    tdcs_field,
    tdcs_lock,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.seam.td import Tdcs

MEM = ("rcx", "rdx")
GPA = 0x4000_0000
RDX_IS_TDR = page_faults("rdx", RDX, exclusive=False, wrong="free")


def range_block(bench: Bench) -> Case:
    td = bench.td()
    td.aug(GPA)
    td.start()
    return Case(bench, td, abi.TDH_MEM_RANGE_BLOCK, MEM, rcx=GPA, rdx=td.tdr, r8=8)


ALREADY = s.TDX_GPA_RANGE_ALREADY_BLOCKED + RCX
RANGE_BLOCK = [
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(0, 3),
    *entry_faults(exclusive=True),
    Fault("page blocked already", entry_state("BLOCKED"), ALREADY, entry_details),
    Fault("pending page blocked already", entry_state("PENDING_BLOCKED"), ALREADY, entry_details),
    Fault("table blocked already", entry_state("NL_BLOCKED"), ALREADY, entry_details),
    *wrong_states("FREE"),
]


def range_unblock(bench: Bench) -> Case:
    td = bench.td()
    td.aug(GPA)
    td.start()
    td.block(GPA)
    td.track()
    return Case(bench, td, abi.TDH_MEM_RANGE_UNBLOCK, MEM, rcx=GPA, rdx=td.tdr, r8=8)


NOT_DONE = s.TDX_TLB_TRACKING_NOT_DONE + 146
RANGE_UNBLOCK = [
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(0, 3),
    *entry_faults(exclusive=True),
    *wrong_states("FREE", "MAPPED", "PENDING", "NL_MAPPED"),
    Fault("not tracked", tdcs_field(Tdcs.TD_EPOCH, 1), NOT_DONE),
    Fault("vCPU of that epoch inside", tdcs_field(Tdcs.REFCOUNT + 1, 1), NOT_DONE),
]


def track(bench: Bench) -> Case:
    td = bench.td()
    td.start()
    return Case(bench, td, abi.TDH_MEM_TRACK, rcx=td.tdr, rdx=2)


EPOCH_BUSY = s.TDX_OPERAND_BUSY + 169
TRACK = [
    *page_faults("rcx", RCX, exclusive=False, wrong="free"),
    *state_faults(0),
    Fault("epoch held", tdcs_lock(Tdcs.EPOCH_LOCK, 1, 1), EPOCH_BUSY),
    Fault("epoch read", tdcs_lock(Tdcs.EPOCH_LOCK, 2, 2), EPOCH_BUSY),
    Fault(
        "vCPU of the last epoch inside",
        tdcs_field(Tdcs.REFCOUNT, 1),
        s.TDX_PREVIOUS_TLB_EPOCH_BUSY,
    ),
]

TABLES = [
    Refusals(abi.TDH_MEM_RANGE_BLOCK, range_block, RANGE_BLOCK),
    Refusals(abi.TDH_MEM_RANGE_UNBLOCK, range_unblock, RANGE_UNBLOCK),
    Refusals(abi.TDH_MEM_TRACK, track, TRACK),
]


@each(TABLES)
def test_tlb_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_tlb_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


BLOCKED_FORM = {"MAPPED": "BLOCKED", "PENDING": "PENDING_BLOCKED", "NL_MAPPED": "NL_BLOCKED"}


def _mapped(td: BuiltTd, state: str) -> tuple[int, int]:
    """(level, HPA) of an entry at GPA in a state: a page, a page to accept, or a table."""
    if state == "NL_MAPPED":
        td.map_tables(GPA)
        return 1, td.tables[GPA, 1]
    return 0, td.add_page(GPA) if state == "MAPPED" else td.aug(GPA)


@pytest.mark.parametrize("state", BLOCKED_FORM)
@pytest.mark.parametrize("runs", [False, True], ids=["building", "running"])
def test_tdh_mem_range_block_closes_the_entry_and_stamps_the_page(
    bench: Bench, state: str, runs: bool
) -> None:
    td = bench.td()
    level, hpa = _mapped(td, state)
    if runs:
        td.start()
    td.track()
    values = bench.must(abi.TDH_MEM_RANGE_BLOCK, rcx=GPA | level, rdx=td.tdr)
    assert (values.rcx, values.rdx) == (0, 0)
    assert td.septe(GPA, level) == RAW[BLOCKED_FORM[state]] | hpa
    assert bench.pamt(hpa).bepoch == td.epoch == 2


def test_tdh_mem_range_block_stamps_a_2m_page_at_its_size_and_forgets_the_accept_counter(
    bench: Bench,
) -> None:
    td = bench.td()
    hpa = td.aug(GPA, 1)
    index, _ = td.locate(GPA, 1)
    bench.words.put(index, td.septe(GPA, 1) | 7 << 12)
    td.block(GPA, 1)
    assert td.septe(GPA, 1) == RAW["PENDING_BLOCKED"] | hpa
    assert (bench.pamt(hpa, 1).bepoch, bench.pamt(hpa).bepoch) == (1, 0)


@pytest.mark.parametrize("state", BLOCKED_FORM)
@pytest.mark.parametrize("runs", [False, True], ids=["building", "running"])
def test_tdh_mem_range_unblock_opens_the_entry_and_keeps_the_stamp(
    bench: Bench, state: str, runs: bool
) -> None:
    td = bench.td()
    level, hpa = _mapped(td, state)
    td.block(GPA, level)
    if runs:
        td.start()
        td.track()
    values = bench.must(abi.TDH_MEM_RANGE_UNBLOCK, rcx=GPA | level, rdx=td.tdr)
    assert (values.rcx, values.rdx) == (0, 0)
    assert td.septe(GPA, level) == RAW[state] | hpa
    assert bench.pamt(hpa).bepoch == 1


@pytest.mark.parametrize("runs", [False, True], ids=["building", "running"])
def test_tdh_mem_track_begins_the_next_epoch(bench: Bench, runs: bool) -> None:
    td = bench.td()
    if runs:
        td.start()
    assert bench.must(abi.TDH_MEM_TRACK, rcx=td.tdr).rcx == td.tdr
    assert td.epoch == 2


def test_tdh_mem_track_is_refused_while_a_vcpu_of_the_epoch_before_is_inside(bench: Bench) -> None:
    td = bench.td()
    td.start()
    td.enter()
    assert td.inside == (0, 1)
    td.track(lp=1)
    status, _ = bench.call(abi.TDH_MEM_TRACK, lp=1, rcx=td.tdr)
    assert status == s.TDX_PREVIOUS_TLB_EPOCH_BUSY
    bench.machine.interrupt(0)
    td.track()
    assert td.epoch == 3


@pytest.mark.parametrize(
    ("bepoch", "epoch", "even", "odd", "is_tracked"),
    [
        (5, 5, 0, 0, False),
        (4, 5, 0, 0, True),
        (4, 5, 1, 0, False),
        (4, 5, 0, 1, True),
        (3, 5, 1, 1, True),
        (6, 5, 0, 0, False),
        (1 << 63 | 1, 5, 0, 0, False),
    ],
    ids=[
        "blocked now",
        "one epoch ago, nobody inside",
        "one epoch ago, a vCPU of that time inside",
        "one epoch ago, a newer vCPU inside",
        "two epochs ago",
        "in the future",
        "a migration epoch",
    ],
)
def test_a_page_is_tracked_once_nobody_of_its_time_is_inside(
    bench: Bench, bepoch: int, epoch: int, even: int, odd: int, is_tracked: bool
) -> None:
    td = bench.td()
    hpa = td.aug(GPA)
    td.start()
    td.block(GPA)
    pamt = bench.machine.module.pamt
    pamt.set_bepoch(pamt.entry(hpa, 0), bepoch)
    for word, value in ((Tdcs.TD_EPOCH, epoch), (Tdcs.REFCOUNT, even), (Tdcs.REFCOUNT + 1, odd)):
        bench.words.put(td.tdcs_word(word), value)
    status, values = bench.call(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    assert (status, values.rcx) == (
        (0, hpa) if is_tracked else (s.TDX_TLB_TRACKING_NOT_DONE + 1, 0)
    )
