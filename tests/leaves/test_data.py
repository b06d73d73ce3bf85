"""TDH.MEM.RD, TDH.MEM.WR, TDH.MR.EXTEND, TDH.MR.FINALIZE."""

import hashlib

import pytest
from leafbench import RAW, SIZE_4K, Bench
from leaffaults import (
    RCX,
    RDX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    entry_details,
    page_faults,
    state_faults,
)
from spoils import (
    Case,
    bits,
    entry_lock,
    entry_state,
    far,
    tdcs_field,
    tdcs_lock,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.seam.td import Tdcs

GPA = 0x4000_0000
NOT_PRESENT = s.TDX_EPT_ENTRY_NOT_PRESENT + RCX


def absent(*states: str) -> list[Fault]:
    """No leaf that the guest could read maps the GPA."""
    return [
        Fault("no table there", far, NOT_PRESENT, entry_details),
        *(Fault(f"entry {n}", entry_state(n), NOT_PRESENT, entry_details) for n in states),
    ]


def not_private(*numbers: int) -> list[Fault]:
    """GPAs with bits that no private GPA has."""
    invalid = s.TDX_OPERAND_INVALID + RCX
    return [Fault(f"GPA bit {n}", bits("rcx", 1 << n), invalid) for n in numbers]


def debug_access(leaf: int) -> "Refusals":
    def make(bench: Bench) -> Case:
        td = bench.td(attributes=1)
        td.add_page(GPA)
        td.start()
        return Case(bench, td, leaf, ("rcx", "rdx", "r8"), rcx=GPA, rdx=td.tdr, r8=8, r9=9)

    return Refusals(leaf, make, DEBUG_ACCESS)


DEBUG_ACCESS = [
    *page_faults("rdx", RDX, exclusive=False, wrong="free"),
    *state_faults(0),
    Fault("production TD", tdcs_field(Tdcs.ATTRIBUTES, 0), s.TDX_TD_NON_DEBUG),
    Fault("GPA bit 0", bits("rcx", 1), s.TDX_OPERAND_INVALID + RCX),
    Fault("GPA bit 2", bits("rcx", 4), s.TDX_OPERAND_INVALID + RCX),
    Fault("tree held", tdcs_lock(Tdcs.SEPT_LOCK, 1, 3), s.TDX_OPERAND_BUSY + 146),
    *not_private(47, 48, 52, 63),
    *absent("FREE", "PENDING", "BLOCKED", "PENDING_BLOCKED"),
    Fault("entry locked", entry_lock, s.TDX_OPERAND_BUSY + RCX, entry_details),
]


def mr_extend(bench: Bench) -> Case:
    td = bench.td()
    td.add_page(GPA)
    leaf = abi.TDH_MR_EXTEND
    return Case(bench, td, leaf, ("rcx", "rdx"), rcx=GPA, rdx=td.tdr, r8=8)


MR_EXTEND = [
    *page_faults("rdx", RDX, exclusive=True, wrong="free"),
    *state_faults(0, 2, locked=False),
    Fault("GPA bit 7", bits("rcx", 0x80), s.TDX_OPERAND_INVALID + RCX),
    *not_private(47, 48, 63),
    *absent("FREE", "PENDING", "BLOCKED", "PENDING_BLOCKED"),
]


def mr_finalize(bench: Bench) -> Case:
    td = bench.td()
    td.add_vcpu()
    return Case(bench, td, abi.TDH_MR_FINALIZE, rcx=td.tdr, rdx=2)


MR_FINALIZE = [
    *page_faults("rcx", RCX, exclusive=True, wrong="free"),
    *state_faults(0, 2, locked=False),
    Fault("no vCPU", tdcs_field(Tdcs.NUM_VCPUS, 0), s.TDX_NO_VCPUS),
]

TABLES = [
    debug_access(abi.TDH_MEM_RD),
    debug_access(abi.TDH_MEM_WR),
    Refusals(abi.TDH_MR_EXTEND, mr_extend, MR_EXTEND),
    Refusals(abi.TDH_MR_FINALIZE, mr_finalize, MR_FINALIZE),
]


@each(TABLES)
def test_data_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_data_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


@pytest.mark.parametrize("level", [0, 1], ids=["4K", "2M"])
def test_tdh_mem_rd_and_wr_see_the_guests_bytes(bench: Bench, level: int) -> None:
    td = bench.td(attributes=1)
    hpa = td.aug(GPA, level)
    bench.words.put(td.locate(GPA, level)[0], RAW["MAPPED"] | hpa)
    offset = 0x1F_F008 if level else 0x18
    bench.machine.memory.write(hpa + offset, b"12345678", td.keyid)
    values = bench.must(abi.TDH_MEM_RD, rcx=GPA + offset, rdx=td.tdr, r8=8)
    assert (values.rcx, values.rdx) == (0, 0)
    assert values.r8 == int.from_bytes(b"12345678", "little")
    values = bench.must(abi.TDH_MEM_WR, rcx=GPA + offset, rdx=td.tdr, r8=0x6162)
    assert values.r8 == int.from_bytes(b"12345678", "little")
    assert bench.machine.memory.read(hpa + offset, 8, td.keyid) == b"ba\0\0\0\0\0\0"
    assert td.septe(GPA, level) == RAW["MAPPED"] | hpa


def test_tdh_mr_extend_neither_tests_nor_takes_the_locks_of_the_sept(bench: Bench) -> None:
    case = mr_extend(bench)
    lock = entry_lock(case)
    case.succeed()
    assert lock.words.view[lock.word] == lock.before


def mrtd(bench: Bench, calls: str) -> tuple[bytes, bytes]:
    """MRTD of a TD built by `calls`: A adds a page, E extends the chunk at 0x300 of the last one.

    Returns what the module computed, and SHA-384 over the updates as documented.
    """
    td, expected, gpa = bench.td(), hashlib.sha384(), GPA - SIZE_4K
    content = bytes(range(256)) * 16
    td.map_tables(GPA)
    for call in calls:
        if call == "A":
            gpa += SIZE_4K
            td.add_page(gpa, content)
            expected.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa.to_bytes(8, "little"))
            expected.update(bytes(104))
        else:
            bench.must(abi.TDH_MR_EXTEND, rcx=gpa + 0x300, rdx=td.tdr)
            expected.update(b"MR.EXTEND".ljust(16, b"\0") + (gpa + 0x300).to_bytes(8, "little"))
            expected.update(bytes(104) + content[0x300:0x400])
    assert bench.words.read(td.tdcs_word(Tdcs.MRTD), 6) == bytes(48)
    td.start()
    return bench.words.read(td.tdcs_word(Tdcs.MRTD), 6), expected.digest()


@pytest.mark.parametrize("calls", ["", "A", "AE", "AEE", "AAE", "AEA", "AEAEAE"])
def test_tdh_mr_finalize_closes_mrtd_over_all_updates_in_call_order(
    bench: Bench, calls: str
) -> None:
    found, expected = mrtd(bench, calls)
    assert found == expected


def test_mrtd_depends_on_the_order_of_calls(bench: Bench) -> None:
    assert mrtd(bench, "AAE")[0] != mrtd(bench, "AEA")[0]


def test_tdh_mr_finalize_makes_the_td_runnable(bench: Bench) -> None:
    case = mr_finalize(bench)
    values = case.succeed()
    assert (values.rcx, values.rdx) == (case.td.tdr, 2)
    assert case.td.op_state == 2
