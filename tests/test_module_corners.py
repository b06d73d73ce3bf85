"""Corners of the module: one page in two roles, pages inside bigger pages, locks of others on the
way, pages that outlive their TD.
"""

from __future__ import annotations

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tests.corners import BUSY, GPA, R8, RCX, READER, WANTED, hold, lock_of, runnable
from tests.leaves import leafbench
from tests.leaves.leafbench import SIZE_2M, SIZE_4K, SOURCE, Bench, BuiltTd

TDR_OPERAND = 128


@pytest.fixture(scope="module")
def booted() -> Bench:
    return Bench()


@pytest.fixture
def bench(booted: Bench) -> Bench:
    booted.reset()
    return booted


# -- one page in two roles


def test_a_tdr_cannot_become_its_own_tdcs_page(bench: Bench) -> None:
    td = BuiltTd(bench)
    td.configure_keys()
    status, _ = bench.call(abi.TDH_MNG_ADDCX, rcx=td.tdr, rdx=td.tdr)
    assert status == BUSY + RCX
    assert lock_of(bench, td.tdr) == WANTED
    td.add_tdcx(1)
    assert lock_of(bench, td.tdr) == 0


def test_a_tdr_cannot_become_a_page_of_its_own_sept(bench: Bench) -> None:
    td = bench.td()
    status, values = bench.call(abi.TDH_MEM_SEPT_ADD, rcx=3, rdx=td.tdr, r8=td.tdr)
    assert (status, values.rcx, values.rdx) == (BUSY + R8, 0, 0)
    assert lock_of(bench, td.tdr) == WANTED
    assert td.septe(0, 3) == leafbench.RAW["FREE"]


@pytest.mark.parametrize("role", ["tdvpr", "tdr"])
def test_a_vcpu_page_cannot_be_its_own_root_or_its_td(bench: Bench, role: str) -> None:
    td = bench.td()
    tdvpr = td.create_vcpu(pages=0)
    page = tdvpr if role == "tdvpr" else td.tdr
    status, _ = bench.call(abi.TDH_VP_ADDCX, rcx=page, rdx=tdvpr)
    assert status == BUSY + RCX
    assert lock_of(bench, page) == WANTED


def test_tdh_mem_page_add_copies_a_page_onto_itself(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    page = bench.page()
    bench.must(abi.TDH_MEM_PAGE_ADD, rcx=GPA, rdx=td.tdr, r8=page, r9=page)
    assert bench.pamt(page).page_type == leafbench.REG


def test_a_2m_page_cannot_hold_the_tdr_that_gets_it(bench: Bench) -> None:
    td = runnable(bench)
    td.map_tables(GPA, 1)
    region = td.tdr & -SIZE_2M
    before = lock_of(bench, region, 2)
    status, _ = bench.call(abi.TDH_MEM_PAGE_AUG, rcx=GPA | 1, rdx=td.tdr, r8=region)
    assert status == BUSY + R8
    assert lock_of(bench, region, 1) == WANTED
    assert lock_of(bench, region, 2) == before


def test_a_2m_page_cannot_hold_a_vcpu_that_runs_and_leaves_its_wish(bench: Bench) -> None:
    td, other = runnable(bench), runnable(bench)
    other.map_tables(GPA, 1)
    td.enter()
    region = td.vcpus[0] & -SIZE_2M
    status, _ = bench.call(abi.TDH_MEM_PAGE_AUG, lp=1, rcx=GPA | 1, rdx=other.tdr, r8=region)
    assert status == BUSY + R8
    assert lock_of(bench, region, 1) == READER | WANTED
    bench.machine.interrupt(0)
    assert lock_of(bench, region, 1) == WANTED


@pytest.mark.parametrize("offset", [0, 1])
def test_tdh_mem_page_relocate_onto_itself_is_refused_first(bench: Bench, offset: int) -> None:
    td = bench.td()
    page = td.add_page(GPA)
    hold(bench, page, 1)
    status, values = bench.call(abi.TDH_MEM_PAGE_RELOCATE, rcx=GPA, rdx=td.tdr, r8=page + offset)
    assert status == (BUSY + RCX if offset else s.TDX_OPERAND_INVALID + R8)
    assert (values.rcx, values.rdx) == (0, 0)


# -- pages inside bigger pages, and locks above them


def page_users(td: BuiltTd, page: int) -> dict[str, tuple[int, dict[str, int], int]]:
    """leaf -> (number, registers that hand it `page` as a new page, operand id of the page)."""
    return {
        "TDH.MNG.CREATE": (abi.TDH_MNG_CREATE, {"rcx": page, "rdx": 60}, RCX),
        "TDH.VP.CREATE": (abi.TDH_VP_CREATE, {"rcx": page, "rdx": td.tdr}, RCX),
        "TDH.MEM.SEPT.ADD": (
            abi.TDH_MEM_SEPT_ADD,
            {"rcx": 0x80_0000_0003, "rdx": td.tdr, "r8": page},
            R8,
        ),
        "TDH.MEM.PAGE.ADD": (
            abi.TDH_MEM_PAGE_ADD,
            {"rcx": GPA, "rdx": td.tdr, "r8": page, "r9": SOURCE},
            R8,
        ),
        "TDH.MEM.PAGE.AUG": (abi.TDH_MEM_PAGE_AUG, {"rcx": GPA, "rdx": td.tdr, "r8": page}, R8),
        "TDH.PHYMEM.PAGE.WBINVD": (abi.TDH_PHYMEM_PAGE_WBINVD, {"rcx": page}, RCX),
    }


@pytest.mark.parametrize(
    "leaf",
    [
        *("TDH.MNG.CREATE", "TDH.VP.CREATE", "TDH.MEM.SEPT.ADD", "TDH.MEM.PAGE.ADD"),
        *("TDH.MEM.PAGE.AUG", "TDH.PHYMEM.PAGE.WBINVD"),
    ],
)
@pytest.mark.parametrize(
    ("lock", "after", "is_busy"),
    [(0, 0, False), (WANTED, 0, False), (1, 1 | WANTED | READER, True), (READER, 6, True)],
    ids=["free", "wanted", "exclusive", "shared"],
)
def test_a_new_page_inside_a_2m_page_is_refused(
    bench: Bench, leaf: str, lock: int, after: int, is_busy: bool
) -> None:
    td = bench.td()
    td.map_tables(GPA)
    big = td.aug(0x8000_0000, 1)
    number, registers, operand = page_users(td, big + 5 * SIZE_4K)[leaf]
    hold(bench, big, lock, 1)
    status, _ = bench.call(number, **registers)
    if leaf == "TDH.PHYMEM.PAGE.WBINVD" and lock == READER:
        # It reads only, so it needs no lock for itself alone.
        is_busy, after = False, READER
    assert status == (BUSY if is_busy else s.TDX_PAGE_METADATA_INCORRECT) + operand
    assert lock_of(bench, big, 1) == after
    assert lock_of(bench, big, 2) == 0


def test_tdh_phymem_page_rdmd_and_reclaim_find_the_page_that_covers_the_address(
    bench: Bench,
) -> None:
    td = bench.td()
    big = td.aug(GPA, 1)
    found = bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=big + SIZE_4K)
    assert (found.rcx, found.rdx, found.r8, found.r9) == (leafbench.REG, td.tdr, 1, 0)
    td.end()
    status, found = bench.call(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=big + SIZE_4K)
    assert (status, found.rcx, found.rdx, found.r8) == (
        s.TDX_OPERAND_INVALID + RCX,
        *(leafbench.REG, td.tdr, 1),
    )
    children = td.chldcnt
    bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=big)
    assert td.chldcnt == children - 512
    assert lock_of(bench, big, 1) == 0


# -- S-EPT entries whose lock somebody else holds


@pytest.mark.parametrize("lock", [leafbench.ENTRY_LOCKED, leafbench.ENTRY_WANTED])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_locked_entry_above_the_target_is_no_obstacle(
    bench: Bench, level: int, lock: int
) -> None:
    td = runnable(bench)
    td.aug(GPA)
    index, _ = td.locate(GPA, level)
    bench.words.put(index, td.read(index) | lock)
    before = td.read(index)
    td.block(GPA)
    td.track()
    bench.must(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    assert td.read(index) == before


@pytest.mark.parametrize(
    ("leaf", "status"),
    [
        (abi.TDH_MEM_PAGE_AUG, s.TDX_OPERAND_BUSY),
        (abi.TDH_MEM_SEPT_RD, s.TDX_OPERAND_BUSY),
        (abi.TDH_MEM_RANGE_BLOCK, s.TDX_OPERAND_BUSY),
        (abi.TDH_MEM_PAGE_REMOVE, s.TDX_OPERAND_BUSY),
        (abi.TDH_MEM_PAGE_ADD, s.TDX_EPT_ENTRY_STATE_INCORRECT),
    ],
)
def test_a_lock_word_without_a_state_reads_as_a_link_to_no_table(
    bench: Bench, leaf: int, status: int
) -> None:
    td = bench.td()
    td.map_tables(GPA)
    index, _ = td.locate(GPA)
    bench.words.put(index, 0x8000_0000_0000_0800)
    answer, values = bench.call(leaf, rcx=GPA, rdx=td.tdr, r8=bench.page(), r9=SOURCE)
    assert (answer, values.rcx, values.rdx) == (status + RCX, 0, 0x8400)
    wished = leaf != abi.TDH_MEM_PAGE_ADD
    assert td.read(index) == 0x8000_0000_0000_0800 | (wished and leafbench.ENTRY_WANTED)


def test_tdh_mem_page_promote_stops_at_the_first_locked_child(bench: Bench) -> None:
    td = bench.td()
    big = td.aug(GPA, 1)
    bench.must(abi.TDH_MEM_PAGE_DEMOTE, rcx=GPA | 1, rdx=td.tdr, r8=bench.page())
    first, _ = td.locate(GPA)
    bench.words.put(first + 7, td.read(first + 7) | leafbench.ENTRY_LOCKED)
    before = [td.read(first + n) for n in range(512)]
    status, values = bench.call(abi.TDH_MEM_PAGE_PROMOTE, rcx=GPA | 1, rdx=td.tdr)
    assert (status, values.rcx, values.rdx) == (BUSY + RCX, 7, 0x8401)
    before[7] |= leafbench.ENTRY_WANTED
    assert [td.read(first + n) for n in range(512)] == before
    assert bench.pamt(big, 1).page_type == leafbench.NDA


# -- what outlives a TD


def test_reclaim_takes_pages_in_any_order_and_the_tdr_last(bench: Bench) -> None:
    td = bench.td()
    page, table = td.add_page(GPA), td.tables[GPA, 1]
    tdvpr = td.create_vcpu()
    td.end()
    status, values = bench.call(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.tdr)
    assert (status, values.rcx, values.rdx) == (s.TDX_TD_ASSOCIATED_PAGES_EXIST, 4, 0)
    for hpa in (td.cx[0], table, tdvpr, page):
        bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
    rest = [e.hpa for e in bench.machine.module.pamt.in_use() if e.owner == td.tdr]
    assert td.chldcnt == len(rest)
    for hpa in rest:
        bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
    bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.tdr)


@pytest.mark.parametrize("teardown", [False, True], ids=["BLOCKED", "TEARDOWN"])
@pytest.mark.parametrize(
    "leaf",
    [
        *(abi.TDH_VP_ENTER, abi.TDH_VP_INIT, abi.TDH_VP_FLUSH, abi.TDH_VP_RD, abi.TDH_VP_WR),
        abi.TDH_VP_ADDCX,
    ],
)
def test_a_vcpu_of_a_td_without_key_is_out_of_reach(
    bench: Bench, leaf: int, teardown: bool
) -> None:
    td = bench.td()
    tdvpr = td.create_vcpu()
    td.end(teardown)
    if teardown:
        bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.cx[0])
    operands = {"rcx": tdvpr}
    if leaf == abi.TDH_VP_ADDCX:
        operands = {"rcx": bench.page(), "rdx": tdvpr}
    assert bench.call(leaf, **operands)[0] == s.TDX_TD_KEYS_NOT_CONFIGURED
    hold(bench, td.tdr, 1)
    assert bench.call(leaf, **operands)[0] == BUSY + TDR_OPERAND
    assert lock_of(bench, td.tdr) == 1 | WANTED | READER


def test_a_reclaimed_tdvpr_leaves_its_pages_to_be_reclaimed(bench: Bench) -> None:
    td = bench.td()
    tdvpr = td.create_vcpu(pages=1)
    td.end()
    bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=tdvpr)
    status, _ = bench.call(abi.TDH_VP_FLUSH, rcx=tdvpr)
    assert status == s.TDX_PAGE_METADATA_INCORRECT + RCX
    found = bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=tdvpr + SIZE_4K)
    assert (found.rcx, found.rdx) == (leafbench.TDCX, td.tdr)


def test_a_reused_page_keeps_its_epoch_as_a_control_page_and_loses_it_as_memory(
    bench: Bench,
) -> None:
    td = runnable(bench)
    page = td.aug(GPA)
    td.track()
    td.block(GPA)
    td.track()
    bench.must(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    free = bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=page)
    assert (free.rcx, free.rdx, free.r9) == (leafbench.NDA, td.tdr, 0)
    other = bench.td()
    bench.must(abi.TDH_VP_CREATE, rcx=page, rdx=other.tdr)
    assert (bench.pamt(page).owner, bench.pamt(page).bepoch) == (other.tdr, 2)
    other.end()
    bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=page)
    bench.must(abi.TDH_MEM_PAGE_AUG, rcx=GPA, rdx=td.tdr, r8=page)
    assert (bench.pamt(page).owner, bench.pamt(page).bepoch) == (td.tdr, 0)


def test_the_keyid_of_a_td_that_ended_serves_the_next_one(bench: Bench) -> None:
    td = bench.td()
    td.end()
    page = bench.page()
    bench.must(abi.TDH_MNG_CREATE, rcx=page, rdx=td.keyid)
    assert bench.call(abi.TDH_MNG_CREATE, rcx=bench.page(), rdx=td.keyid)[0] == (
        s.TDX_HKID_NOT_FREE
    )
