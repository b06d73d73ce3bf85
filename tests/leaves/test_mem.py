"""TDH.MEM.SEPT.ADD, PAGE.ADD, PAGE.AUG, PAGE.REMOVE, SEPT.REMOVE, SEPT.RD: what they do."""

import hashlib

import pytest
from leafbench import (
    EPT,
    NDA,
    RAW,
    REG,
    SIZE_2M,
    SIZE_4K,
    SOURCE,
    Bench,
    details,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.seam import sept
from tdxlab.seam.td import Tdcs

GPA = 0x4000_0000
NULL = (1 << 64) - 1
INCORRECT = s.TDX_EPT_ENTRY_STATE_INCORRECT + 1


@pytest.mark.parametrize("taken", [1 << 11, 1 << 52, 1 << 11 | 1 << 52])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_walk_goes_through_a_link_whose_lock_is_held_or_wanted(
    bench: Bench, level: int, taken: int
) -> None:
    td = bench.td()
    td.map_tables(GPA)
    index, _ = td.locate(GPA, level)
    bench.words.put(index, td.read(index) | taken)
    memory, eptp = bench.machine.memory, td.read(td.tdcs_word(Tdcs.EPTP))
    assert sept.walk(memory, eptp, GPA, 0) == (td.locate(GPA)[0], 0, RAW["FREE"])


@pytest.mark.parametrize("gpaw", [48, 52])
def test_tdh_mem_sept_add_links_a_table_of_free_entries_at_every_level(
    bench: Bench, gpaw: int
) -> None:
    td = bench.td(gpaw=gpaw)
    for level in range(td.top, 0, -1):
        hpa, children = bench.page(), td.chldcnt
        values = bench.must(
            abi.TDH_MEM_SEPT_ADD, rcx=GPA & -(1 << 12 + 9 * level) | level, rdx=td.tdr, r8=hpa, r9=9
        )
        assert (values.rcx, values.rdx, values.r8, values.r9) == (0, 0, hpa, 9)
        assert td.septe(GPA, level) == 0x8000_0000_0000_0007 | hpa
        assert bench.machine.memory.page(hpa) == (0x80E0_0000_0000_0000).to_bytes(8, "little") * 512
        assert bench.machine.memory.keyid_of(hpa) == td.keyid
        assert bench.pamt(hpa)[2:] == (EPT, td.tdr, 0, 0)
        assert td.chldcnt == children + 1


def test_tdh_mem_sept_add_ignores_bit_63_of_the_new_page(bench: Bench) -> None:
    td, hpa = bench.td(), bench.page()
    bench.must(abi.TDH_MEM_SEPT_ADD, rcx=3, rdx=td.tdr, r8=1 << 63 | hpa)
    assert td.septe(0, 3) == RAW["NL_MAPPED"] | hpa


def test_tdh_mem_sept_add_accepts_an_existing_table_if_allowed(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    before = bench.digest()
    bench.must(abi.TDH_MEM_SEPT_ADD, rcx=GPA | 1, rdx=td.tdr | 1, r8=bench.page())
    assert bench.digest() == before
    status, _ = bench.call(abi.TDH_MEM_SEPT_ADD, rcx=GPA | 1, rdx=td.tdr, r8=bench.page())
    assert status == INCORRECT


@pytest.mark.parametrize(
    ("is_there", "r8_after"), [(False, NULL), (True, None)], ids=["consumed", "unused"]
)
def test_tdh_mem_sept_add_v1_says_what_became_of_the_page(
    bench: Bench, is_there: bool, r8_after: int | None
) -> None:
    td = bench.td()
    td.map_tables(GPA, 0 if is_there else 1)
    hpa = bench.page()
    registers = {"rcx": GPA | 1, "rdx": td.tdr | 1, "r8": hpa, "r9": NULL, "r10": NULL, "r11": NULL}
    status, values = bench.call(abi.TDH_MEM_SEPT_ADD, version=1, **registers)
    assert status == 0
    assert values.r8 == (1 << 63 | hpa if r8_after is None else r8_after)
    assert bench.pamt(hpa).page_type == (NDA if is_there else EPT)


@pytest.mark.parametrize(("is_there", "status"), [(True, 0), (False, INCORRECT)])
def test_tdh_mem_sept_add_v1_without_a_page_needs_an_existing_table(
    bench: Bench, is_there: bool, status: int
) -> None:
    td = bench.td()
    td.map_tables(GPA, 0 if is_there else 1)
    registers = {"rcx": GPA | 1, "rdx": td.tdr, "r8": NULL, "r9": NULL, "r10": NULL, "r11": NULL}
    assert bench.call(abi.TDH_MEM_SEPT_ADD, version=1, **registers)[0] == status


def test_tdh_mem_page_add_copies_maps_and_measures(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    hpa, children = bench.page(), td.chldcnt
    content = bytes(i * 7 & 0xFF for i in range(SIZE_4K))
    bench.machine.store(SOURCE, content)
    values = bench.must(abi.TDH_MEM_PAGE_ADD, rcx=GPA, rdx=td.tdr, r8=hpa, r9=SOURCE)
    assert (values.rcx, values.rdx, values.r8, values.r9) == (0, 0, hpa, SOURCE)
    assert td.septe(GPA) == 0x8000_0000_0000_00F7 | hpa
    assert bench.machine.memory.read(hpa, SIZE_4K, td.keyid) == content
    assert bench.machine.memory.keyid_of(hpa + 64) == td.keyid
    assert bench.machine.memory.is_td_owned(hpa + SIZE_4K - 1)
    assert bench.pamt(hpa)[2:] == (REG, td.tdr, 0, 0)
    assert td.chldcnt == children + 1
    block = b"MEM.PAGE.ADD\0\0\0\0" + GPA.to_bytes(8, "little") + bytes(104)
    td.start()
    mrtd = bench.words.read(td.tdcs_word(Tdcs.MRTD), 6)
    assert mrtd == hashlib.sha384(block).digest()


def test_tdh_mem_page_add_reads_its_source_under_the_shared_keyid_it_names(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    bench.machine.memory.write(SOURCE, b"x" * SIZE_4K, keyid=5)
    hpa = bench.page()
    bench.must(abi.TDH_MEM_PAGE_ADD, rcx=GPA, rdx=td.tdr, r8=hpa, r9=SOURCE | 5 << 46)
    assert bench.machine.memory.page(hpa) == b"x" * SIZE_4K


def test_tdh_mem_page_add_neither_tests_nor_takes_the_locks_of_the_sept(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    tree = td.tdcs_word(Tdcs.SEPT_LOCK)
    bench.words.put(tree, 1)
    bench.must(abi.TDH_MEM_PAGE_ADD, rcx=GPA, rdx=td.tdr, r8=bench.page(), r9=SOURCE)
    assert bench.words.view[tree] == 1


@pytest.mark.parametrize("gpaw", [48, 52])
@pytest.mark.parametrize(("level", "pages"), [(0, 1), (1, 512)], ids=["4K", "2M"])
@pytest.mark.parametrize("runs", [False, True], ids=["building", "running"])
def test_tdh_mem_page_aug_maps_a_pending_page(
    bench: Bench, gpaw: int, level: int, pages: int, runs: bool
) -> None:
    td = bench.td(gpaw=gpaw)
    td.map_tables(GPA, level)
    if runs:
        td.start()
    hpa, children = bench.big(), td.chldcnt
    values = bench.must(abi.TDH_MEM_PAGE_AUG, rcx=GPA | level, rdx=td.tdr, r8=hpa)
    assert (values.rcx, values.rdx, values.r8) == (0, 0, hpa)
    assert td.septe(GPA, level) == 0x8100_0000_0000_00F0 | hpa
    assert bench.pamt(hpa, level)[2:] == (REG, td.tdr, 0, 0)
    assert td.chldcnt == children + pages
    if level:
        assert bench.pamt(hpa).page_type == bench.pamt(hpa + 511 * SIZE_4K).page_type == NDA


@pytest.mark.parametrize("runs", [False, True], ids=["building", "running"])
@pytest.mark.parametrize(("level", "pages"), [(0, 1), (1, 512)], ids=["4K", "2M"])
def test_tdh_mem_page_remove_frees_the_page_and_leaves_its_content(
    bench: Bench, level: int, pages: int, runs: bool
) -> None:
    td = bench.td()
    hpa, children = td.aug(GPA, level), td.chldcnt
    bench.machine.memory.write(hpa, b"secret", td.keyid)
    if runs:
        td.start()
        td.block(GPA, level)
        td.track()
    children = td.chldcnt
    values = bench.must(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA | level, rdx=td.tdr)
    assert (values.rcx, values.rdx) == (hpa, 0)
    assert td.septe(GPA, level) == 0x80E0_0000_0000_0000
    assert td.chldcnt == children - pages
    found = bench.pamt(hpa, level)
    assert (found.page_type, found.owner, found.lock) == (NDA, td.tdr, 0)
    assert bench.machine.memory.page(hpa)[:6] == b"secret"


def test_tdh_mem_page_remove_leaves_the_epoch_of_the_block_in_the_pamt(bench: Bench) -> None:
    td = bench.td()
    hpa = td.aug(GPA)
    td.start()
    td.track()
    td.block(GPA)
    td.track()
    bench.must(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    assert bench.pamt(hpa).bepoch == 2


@pytest.mark.parametrize("version", [0, 1])
def test_tdh_mem_sept_remove_unlinks_an_empty_table(bench: Bench, version: int) -> None:
    td = bench.td()
    td.map_tables(GPA)
    hpa, children = td.tables[GPA, 1], td.chldcnt
    operands = {"rcx": GPA | 1, "rdx": td.tdr, "r9": 9}
    status, values = bench.call(abi.TDH_MEM_SEPT_REMOVE, version=version, **operands)
    assert (status, values.rcx, values.rdx) == (0, hpa, 0)
    assert (values.r9, values.r11) == ((NULL, NULL) if version else (9, 0))
    assert td.septe(GPA, 1) == RAW["FREE"]
    assert bench.pamt(hpa).page_type == NDA
    assert td.chldcnt == children - 1


@pytest.mark.parametrize("state", ["MAPPED", "PENDING", "BLOCKED", "PENDING_BLOCKED"])
@pytest.mark.parametrize("level", [0, 1], ids=["4K", "2M"])
def test_tdh_mem_sept_rd_shows_a_leaf_without_its_hidden_bits(
    bench: Bench, state: str, level: int
) -> None:
    td = bench.td()
    td.map_tables(GPA, level)
    raw = RAW[state] | 0x1_5000_0000
    bench.words.put(td.locate(GPA, level)[0], raw | 1 << 52)
    values = bench.must(abi.TDH_MEM_SEPT_RD, rcx=GPA | level, rdx=td.tdr)
    assert {"rcx": values.rcx, "rdx": values.rdx} == details(raw, level)


@pytest.mark.parametrize(
    ("level", "rcx", "rdx"),
    [(0, 1 << 63, 0x0000), (1, 7, 0x8401), (2, 7, 0x8402), (3, 7, 0x8403)],
    ids=["free", "table at 2M", "table at 1G", "table at the root"],
)
def test_tdh_mem_sept_rd_shows_free_entries_and_tables(
    bench: Bench, level: int, rcx: int, rdx: int
) -> None:
    td = bench.td()
    td.map_tables(GPA)
    gpa = GPA & -(1 << 12 + 9 * level)
    values = bench.must(abi.TDH_MEM_SEPT_RD, rcx=gpa | level, rdx=td.tdr)
    assert (values.rcx, values.rdx) == (rcx, rdx)


def test_tdh_mem_sept_rd_lets_the_host_ask_a_debug_td_for_nested_vms(bench: Bench) -> None:
    td = bench.td(attributes=1)
    assert bench.must(abi.TDH_MEM_SEPT_RD, rcx=3, rdx=td.tdr | 1).rcx == 1 << 63


def test_a_2m_page_in_the_way_stops_the_walk_to_a_4k_entry(bench: Bench) -> None:
    td = bench.td()
    hpa = td.aug(GPA, 1)
    status, values = bench.call(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA + SIZE_4K, rdx=td.tdr)
    assert status == s.TDX_EPT_WALK_FAILED + 1
    assert (values.rcx, values.rdx) == (0x8000_0000_0000_00F0 | hpa, 0x0201)


def test_nothing_below_a_blocked_table_can_be_reached(bench: Bench) -> None:
    td = bench.td()
    td.aug(GPA)
    td.block(GPA, 1)
    status, values = bench.call(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    assert (status, values.rcx, values.rdx) == (s.TDX_EPT_WALK_FAILED + 1, 0, 0x8101)


@pytest.mark.parametrize(("gpaw", "limit"), [(48, 1 << 47), (52, 1 << 51)])
def test_a_private_gpa_ends_below_the_shared_bit(bench: Bench, gpaw: int, limit: int) -> None:
    td = bench.td(gpaw=gpaw)
    td.aug(limit - SIZE_2M, 1)
    status, _ = bench.call(abi.TDH_MEM_PAGE_AUG, rcx=limit | 1, rdx=td.tdr, r8=bench.big())
    assert status == s.TDX_OPERAND_INVALID + 1


def test_a_td_of_gpaw_48_may_have_five_levels(bench: Bench) -> None:
    """TDH.MNG.INIT takes 5 levels with GPAW 0; the SHARED bit stays 47."""
    td = bench.td(gpaw=52, config_flags=0)
    td.aug(GPA)
    assert td.top == 4
    status, _ = bench.call(abi.TDH_MEM_SEPT_RD, rcx=1 << 47, rdx=td.tdr)
    assert status == s.TDX_OPERAND_INVALID + 1
