"""TDH.MEM.SEPT.ADD, PAGE.ADD, PAGE.AUG, PAGE.REMOVE, SEPT.REMOVE, SEPT.RD: what they refuse."""

from leafbench import BIG_PAGES, REG, SIZE_4K, SOURCE, TDCX, Bench
from leaffaults import (
    R8,
    R9,
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
    mapped_page_faults,
    no_such_version,
    page_faults,
    reserved_bits,
    state_faults,
    tracking_faults,
    wrong_states,
)
from spoils import (
    Case,
    bits,
    far,
    pamt_lock,
    register,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s

MEM = ("rcx", "rdx")
GPA = 0x4000_0000
NULL = (1 << 64) - 1
LEAF_STATES = ("MAPPED", "BLOCKED", "PENDING", "PENDING_BLOCKED")
RDX_IS_TDR = page_faults("rdx", RDX, exclusive=False, wrong="free")
R8_IS_FREE = page_faults("r8", R8, exclusive=True)


def sept_add(bench: Bench) -> Case:
    td = bench.td()
    td.map_tables(GPA, 1)
    leaf = abi.TDH_MEM_SEPT_ADD
    return Case(bench, td, leaf, MEM, rcx=GPA | 1, rdx=td.tdr, r8=bench.spare(), r9=9, r11=11)


SEPT_ADD = [
    no_such_version(2),
    *reserved_bits("rdx", RDX, 1, 63),
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(1, 3),
    *entry_faults(),
    *wrong_states(*LEAF_STATES, "NL_BLOCKED"),
    Fault("no new page", register("r8", NULL), s.TDX_OPERAND_INVALID + R8),
    *wrong_states("NL_MAPPED"),
    *R8_IS_FREE,
]


def page_add(bench: Bench) -> Case:
    td = bench.td()
    td.map_tables(GPA)
    operands = {"rcx": GPA, "rdx": td.tdr, "r8": bench.spare(), "r9": SOURCE, "r10": 10}
    return Case(bench, td, abi.TDH_MEM_PAGE_ADD, MEM, **operands)


def source_in_seamrr(case: Case) -> None:
    case.registers["r9"] = case.bench.machine.platform.seamrr.base


BAD_SOURCE = s.TDX_OPERAND_INVALID + R9
PAGE_ADD = [
    *page_faults("rdx", RDX, exclusive=True, wrong="free"),
    *state_faults(0, 2, locked=False),
    *gpa_faults(0, 0),
    Fault("no table there", far, s.TDX_EPT_WALK_FAILED + RCX, entry_details),
    *wrong_states(*LEAF_STATES, "NL_MAPPED", "NL_BLOCKED"),
    Fault("source not aligned", bits("r9", 0x800), BAD_SOURCE),
    Fault("source beyond 52 bits", bits("r9", 1 << 52), BAD_SOURCE),
    Fault("source in the module's range", source_in_seamrr, BAD_SOURCE),
    Fault("source with a private KeyID", bits("r9", 32 << 46), BAD_SOURCE),
    *R8_IS_FREE,
]


def page_aug(bench: Bench) -> Case:
    td = bench.td()
    td.map_tables(GPA)
    td.start()
    return Case(bench, td, abi.TDH_MEM_PAGE_AUG, MEM, rcx=GPA, rdx=td.tdr, r8=bench.spare(), r9=9)


PAGE_AUG = [
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(0, 1),
    *entry_faults(),
    *wrong_states(*LEAF_STATES, "NL_MAPPED", "NL_BLOCKED"),
    *R8_IS_FREE,
]


def page_aug_2m(bench: Bench) -> Case:
    td = bench.td()
    td.map_tables(GPA, 1)
    return Case(bench, td, abi.TDH_MEM_PAGE_AUG, MEM, rcx=GPA | 1, rdx=td.tdr, r8=bench.big())


def big_page_used(case: Case) -> None:
    case.bench.give(BIG_PAGES, REG, case.td.tdr, size=1)


def last_part_used(case: Case) -> None:
    case.bench.give(BIG_PAGES + 511 * SIZE_4K, TDCX, case.td.tdr)


PAGE_AUG_2M = [
    Fault("2M page not aligned", bits("r8", SIZE_4K), s.TDX_OPERAND_INVALID + R8),
    Fault("2M page with a KeyID", bits("r8", 33 << 46), s.TDX_OPERAND_INVALID + R8),
    Fault("2M page in no TDMR", register("r8", 0), s.TDX_OPERAND_ADDR_RANGE_ERROR + R8),
    Fault("2M page, 1G entry held", pamt_lock("r8", 2, 1, 7), s.TDX_OPERAND_BUSY + R8),
    Fault("2M page held", pamt_lock("r8", 1, 1, 7), s.TDX_OPERAND_BUSY + R8),
    Fault("2M page read", pamt_lock("r8", 1, 4, 6), s.TDX_OPERAND_BUSY + R8),
    Fault("2M page in use", big_page_used, s.TDX_PAGE_METADATA_INCORRECT + R8),
    Fault("2M page with a part in use", last_part_used, s.TDX_PAGE_METADATA_INCORRECT + R8),
]


def page_remove(bench: Bench) -> Case:
    td = bench.td()
    hpa = td.aug(GPA)
    td.start()
    td.block(GPA)
    td.track()
    case = Case(bench, td, abi.TDH_MEM_PAGE_REMOVE, MEM, rcx=GPA, rdx=td.tdr, r8=8)
    case.hpa = hpa
    return case


PAGE_REMOVE = [
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(0, 2),
    *entry_faults(),
    *wrong_states("FREE", "NL_MAPPED", "NL_BLOCKED"),
    *mapped_page_faults(),
    *tracking_faults("MAPPED", "PENDING"),
]


def sept_remove(bench: Bench) -> Case:
    td = bench.td()
    td.map_tables(GPA)
    td.start()
    td.block(GPA, 1)
    td.track()
    case = Case(bench, td, abi.TDH_MEM_SEPT_REMOVE, MEM, rcx=GPA | 1, rdx=td.tdr, r9=9)
    case.hpa = td.tables[GPA, 1]
    return case


def last_entry_used(case: Case) -> None:
    """511 entries are free, the last one is not."""
    entry = case.bench.machine.memory.frame(case.hpa) + 511
    case.bench.words.put(entry, 0x80C0_0000_0000_0000)


SEPT_REMOVE = [
    no_such_version(2, r9=NULL, r10=NULL, r11=NULL),
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(1, 3),
    *entry_faults(exclusive=True),
    *wrong_states("FREE", *LEAF_STATES),
    *mapped_page_faults(),
    *tracking_faults("NL_MAPPED"),
    Fault("table not empty", last_entry_used, s.TDX_EPT_PAGE_NOT_FREE + RCX, entry_details),
]


def sept_rd(bench: Bench) -> Case:
    td = bench.td()
    td.add_page(GPA)
    return Case(bench, td, abi.TDH_MEM_SEPT_RD, MEM, rcx=GPA, rdx=td.tdr, r8=8)


SEPT_RD = [
    *RDX_IS_TDR,
    *state_faults(0),
    Fault("nested VMs of a production TD", bits("rdx", 1), s.TDX_OPERAND_INVALID + RDX),
    *gpa_faults(0, 3),
    *entry_faults(),
]

TABLES = [
    Refusals(abi.TDH_MEM_SEPT_ADD, sept_add, SEPT_ADD),
    Refusals(abi.TDH_MEM_PAGE_ADD, page_add, PAGE_ADD),
    Refusals(abi.TDH_MEM_PAGE_AUG, page_aug, PAGE_AUG),
    Refusals(abi.TDH_MEM_PAGE_AUG, page_aug_2m, PAGE_AUG_2M),
    Refusals(abi.TDH_MEM_PAGE_REMOVE, page_remove, PAGE_REMOVE),
    Refusals(abi.TDH_MEM_SEPT_REMOVE, sept_remove, SEPT_REMOVE),
    Refusals(abi.TDH_MEM_SEPT_RD, sept_rd, SEPT_RD),
]


@each(TABLES)
def test_mem_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_mem_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)
