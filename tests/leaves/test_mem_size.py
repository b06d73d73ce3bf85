"""TDH.MEM.PAGE.PROMOTE, DEMOTE, RELOCATE."""

import pytest
from leafbench import BIG_PAGES, EPT, NDA, RAW, REG, SIZE_2M, SIZE_4K, SOURCE, Bench, BuiltTd
from leaffaults import (
    R8,
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
    Held,
    condition,
    hold,
    page_lock,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s

MEM = ("rcx", "rdx")
GPA = 0x4000_0000
NULL = (1 << 64) - 1
RDX_IS_TDR = page_faults("rdx", RDX, exclusive=False, wrong="free")


def given(case: Case) -> dict[str, int]:
    """RCX and RDX come back as the host gave them."""
    return {"rcx": case.get("rcx"), "rdx": case.get("rdx")}


INTERRUPTED = Fault(
    "interrupt pending",
    condition("interrupt_pending", True),
    s.TDX_INTERRUPTED_RESTARTABLE,
    given,
)


def small_pages(td: BuiltTd, state: str = "PENDING") -> int:
    """512 pages of 4 KiB that could be one of 2 MiB; returns its HPA."""
    bench, target = td.bench, td.bench.big()
    td.map_tables(GPA)
    leaf = abi.TDH_MEM_PAGE_AUG if state == "PENDING" else abi.TDH_MEM_PAGE_ADD
    for offset in range(0, SIZE_2M, SIZE_4K):
        bench.must(leaf, rcx=GPA + offset, rdx=td.tdr, r8=target + offset, r9=SOURCE)
    return target


def promote(bench: Bench) -> Case:
    td = bench.td()
    small_pages(td)
    td.start()
    td.block(GPA, 1)
    td.track()
    case = Case(bench, td, abi.TDH_MEM_PAGE_PROMOTE, MEM, rcx=GPA | 1, rdx=td.tdr, r9=9)
    case.hpa = td.tables[GPA, 1]
    return case


def child_locked(case: Case) -> Held:
    words, entry = case.bench.words, case.bench.machine.memory.frame(case.hpa)
    locked = words.view[entry] | 1 << 11
    words.put(entry, locked)
    return Held(words, entry, locked, locked | 1 << 52)


def children(*changes: tuple[int, int]) -> Fault:
    """Children that cannot be merged; changes: (number, XOR) of entries."""

    def spoil(case: Case) -> None:
        first = case.bench.machine.memory.frame(case.hpa)
        for number, change in changes:
            case.bench.words.put(first + number, case.bench.words.view[first + number] ^ change)

    name = f"children {', '.join(f'{n} ^ {x:#x}' for n, x in changes[:2])}"
    status = s.TDX_EPT_INVALID_PROMOTE_CONDITIONS + RCX
    return Fault(name, spoil, status, entry_details)


def children_not_aligned(case: Case) -> None:
    """512 pages that follow one another, from an address that no 2 MiB page begins at."""
    first = case.bench.machine.memory.frame(case.hpa)
    for entry in range(first, first + 512):
        case.bench.words.put(entry, case.bench.words.view[entry] + SIZE_4K)


def merged_page_held(case: Case) -> Held:
    pamt = case.bench.machine.module.pamt
    return hold(pamt.words, pamt.entry(BIG_PAGES, 1), 1, 3)


PROMOTE = [
    no_such_version(2, r9=NULL, r10=NULL, r11=NULL),
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(1, 2),
    *entry_faults(),
    *wrong_states("FREE", "MAPPED", "BLOCKED", "PENDING", "PENDING_BLOCKED"),
    *mapped_page_faults(),
    *tracking_faults("NL_MAPPED"),
    Fault("child locked", child_locked, s.TDX_OPERAND_BUSY + RCX, entry_details),
    Fault(
        "children not aligned",
        children_not_aligned,
        s.TDX_EPT_INVALID_PROMOTE_CONDITIONS + RCX,
        entry_details,
    ),
    children((0, SIZE_4K)),
    children((0, 0x0080_0000_0000_00F0 ^ 0xF0)),
    children((511, SIZE_2M)),
    children((300, 1)),
    INTERRUPTED,
    Fault("merged page held", merged_page_held, s.TDX_OPERAND_BUSY + RCX),
]


def demote(bench: Bench) -> Case:
    td = bench.td()
    hpa = td.aug(GPA, 1)
    td.start()
    td.block(GPA, 1)
    td.track()
    operands = {"rcx": GPA | 1, "rdx": td.tdr | 1, "r8": bench.spare(), "r9": 9}
    case = Case(bench, td, abi.TDH_MEM_PAGE_DEMOTE, MEM, **operands)
    case.hpa = hpa
    return case


BUSY_PAGE = s.TDX_OPERAND_BUSY + RCX
DEMOTE = [
    *reserved_bits("rdx", RDX, 1, 63),
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(1, 2),
    *entry_faults(),
    *wrong_states("FREE", "NL_MAPPED", "NL_BLOCKED"),
    *tracking_faults("MAPPED", "PENDING"),
    *page_faults("r8", R8, exclusive=True),
    INTERRUPTED._replace(keeps=False),
    Fault("page held", page_lock(1, 1, 3), BUSY_PAGE, keeps=False),
    Fault("page read", page_lock(1, 4, 6), BUSY_PAGE, keeps=False),
]


def relocate(bench: Bench) -> Case:
    td = bench.td()
    hpa = td.aug(GPA)
    td.start()
    td.block(GPA)
    td.track()
    operands = {"rcx": GPA, "rdx": td.tdr, "r8": bench.spare(), "r9": 9}
    case = Case(bench, td, abi.TDH_MEM_PAGE_RELOCATE, MEM, **operands)
    case.hpa = hpa
    return case


def onto_itself(case: Case) -> None:
    case.registers["r8"] = case.hpa


RELOCATE = [
    *RDX_IS_TDR,
    *state_faults(0),
    *gpa_faults(0, 0),
    *entry_faults(),
    *wrong_states("FREE", "NL_MAPPED", "NL_BLOCKED"),
    Fault("the page it has", onto_itself, s.TDX_OPERAND_INVALID + R8),
    *mapped_page_faults(),
    *tracking_faults("MAPPED", "PENDING"),
    *page_faults("r8", R8, exclusive=True),
]

TABLES = [
    Refusals(abi.TDH_MEM_PAGE_PROMOTE, promote, PROMOTE),
    Refusals(abi.TDH_MEM_PAGE_DEMOTE, demote, DEMOTE),
    Refusals(abi.TDH_MEM_PAGE_RELOCATE, relocate, RELOCATE),
]


@each(TABLES)
def test_size_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_size_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


@pytest.mark.parametrize("state", ["PENDING", "MAPPED"])
@pytest.mark.parametrize("version", [0, 1])
def test_tdh_mem_page_promote_merges_512_pages(bench: Bench, state: str, version: int) -> None:
    td = bench.td()
    target = small_pages(td, state)
    table, owned = td.tables[GPA, 1], td.chldcnt
    status, values = bench.call(
        abi.TDH_MEM_PAGE_PROMOTE, version=version, rcx=GPA | 1, rdx=td.tdr, r9=9
    )
    assert (status, values.rcx, values.rdx) == (0, table, 0)
    assert values.r9 == (NULL if version else 9)
    assert td.septe(GPA, 1) == RAW[state] | target
    assert bench.pamt(target, 1)[2:4] == (REG, td.tdr)
    assert {bench.pamt(target + n * SIZE_4K).page_type for n in range(512)} == {NDA}
    assert bench.pamt(table).page_type == NDA
    assert td.chldcnt == owned - 1


def test_tdh_mem_page_promote_leaves_the_merged_entry_unblocked_and_its_epoch_alone(
    bench: Bench,
) -> None:
    case = promote(bench)
    assert case.succeed().rcx == case.hpa
    assert case.td.septe(GPA, 1) == RAW["PENDING"] | BIG_PAGES
    assert bench.pamt(BIG_PAGES, 1).bepoch == 0


@pytest.mark.parametrize(
    ("state", "child"),
    [
        ("PENDING", "PENDING"),
        ("PENDING_BLOCKED", "PENDING"),
        ("MAPPED", "MAPPED"),
        ("BLOCKED", "MAPPED"),
    ],
)
def test_tdh_mem_page_demote_splits_a_page_into_512(bench: Bench, state: str, child: str) -> None:
    td = bench.td()
    hpa, table = td.aug(GPA, 1), bench.spare()
    bench.words.put(td.locate(GPA, 1)[0], RAW[state] | hpa)
    owned = td.chldcnt
    values = bench.must(abi.TDH_MEM_PAGE_DEMOTE, rcx=GPA | 1, rdx=td.tdr, r8=table)
    assert (values.rcx, values.rdx, values.r8) == (0, 0, table)
    assert td.septe(GPA, 1) == RAW["NL_MAPPED"] | table
    for number in (0, 1, 511):
        part = hpa + number * SIZE_4K
        assert td.septe(GPA + number * SIZE_4K) == RAW[child] | part
        assert bench.pamt(part)[2:] == (REG, td.tdr, 0, 0)
    assert bench.pamt(hpa, 1).page_type == NDA
    assert bench.pamt(table)[2:4] == (EPT, td.tdr)
    assert td.chldcnt == owned + 1
    assert bench.machine.memory.keyid_of(table) == td.keyid


@pytest.mark.parametrize("fault", [INTERRUPTED, DEMOTE[-2]], ids=["interrupt", "page held"])
def test_tdh_mem_page_demote_refused_late_leaves_the_new_page_overwritten_and_free(
    bench: Bench, fault: Fault
) -> None:
    case = demote(bench)
    fault.spoil(case)
    assert case.call()[0] == fault.status
    table = case.get("r8")
    first = RAW["PENDING"] | case.hpa
    assert bench.machine.memory.page(table)[:8] == first.to_bytes(8, "little")
    assert (bench.pamt(table).page_type, bench.pamt(table).lock) == (NDA, 0)
    assert case.td.septe(GPA, 1) == RAW["PENDING_BLOCKED"] | case.hpa


@pytest.mark.parametrize(
    ("state", "after", "is_copied"),
    [
        ("MAPPED", "MAPPED", True),
        ("BLOCKED", "MAPPED", True),
        ("PENDING", "PENDING", False),
        ("PENDING_BLOCKED", "PENDING", False),
    ],
)
def test_tdh_mem_page_relocate_moves_a_page(
    bench: Bench, state: str, after: str, is_copied: bool
) -> None:
    td = bench.td()
    old, new, content = td.aug(GPA), bench.spare(), b"moved" * 819 + b"!"
    bench.machine.memory.write(old, content, td.keyid)
    bench.words.put(td.locate(GPA)[0], RAW[state] | old)
    owned = td.chldcnt
    values = bench.must(abi.TDH_MEM_PAGE_RELOCATE, rcx=GPA, rdx=td.tdr, r8=new)
    assert (values.rcx, values.rdx, values.r8) == (old, 0, new)
    assert td.septe(GPA) == RAW[after] | new
    assert bench.pamt(old).page_type == NDA
    assert bench.pamt(new)[2:] == (REG, td.tdr, 0, 0)
    assert td.chldcnt == owned
    if is_copied:
        assert bench.machine.memory.read(new, SIZE_4K, td.keyid) == content
    else:
        assert bench.machine.memory.page(new) == bytes(SIZE_4K)
