"""TDH.PHYMEM.PAGE.RDMD, PAGE.RECLAIM, PAGE.WBINVD, CACHE.WB."""

import pytest
from leafbench import (
    EPT,
    NDA,
    REG,
    RESERVED,
    RSVD,
    SIZE_4K,
    TDCX,
    TDR,
    TDVPR,
    Bench,
    BuiltTd,
)
from leaffaults import (
    RCX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    page_faults,
)
from spoils import (
    Case,
    Held,
    bits,
    condition,
    hold,
    page_lock,
    register,
    tdr_field,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.registers import Registers
from tdxlab.seam.keys import Keys
from tdxlab.seam.td import Tdr

GPA = 0x4000_0000
OUTPUTS = ("rcx", "rdx", "r8", "r9", "r10", "r11")
EXPECTED_TYPE = ("reserved", "of another type", "in a 2M page")


def any_page(exclusive: bool) -> list[Fault]:
    """RCX may be a page of any type."""
    faults = page_faults("rcx", RCX, exclusive=exclusive)
    return [fault for fault in faults if not fault.name.endswith(EXPECTED_TYPE)]


def rdmd(bench: Bench) -> Case:
    td = BuiltTd(bench)
    filled = dict.fromkeys(OUTPUTS, 7)
    return Case(bench, td, abi.TDH_PHYMEM_PAGE_RDMD, OUTPUTS, **filled | {"rcx": td.tdr})


def dying_td(bench: Bench) -> tuple[BuiltTd, dict[str, int]]:
    """A TD in TEARDOWN, and one page of each kind that it owns."""
    td = bench.td()
    pages = {"4K": td.add_page(GPA), "2M": td.aug(GPA + (1 << 21), 1)}
    td.start()
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    td.end()
    return td, pages | {
        "EPT": td.tables[GPA, 1],
        "TDCX": td.cx[5],
        "TDVPR": td.vcpus[0],
        "TDR": td.tdr,
    }


def reclaim(bench: Bench) -> Case:
    td, pages = dying_td(bench)
    leaf = abi.TDH_PHYMEM_PAGE_RECLAIM
    return Case(bench, td, leaf, OUTPUTS, **dict.fromkeys(OUTPUTS, 7) | {"rcx": pages["TDVPR"]})


def as_found(case: Case) -> dict[str, int]:
    """Type, owner and size are shown although the call is refused."""
    found = case.bench.pamt(case.get("rcx"))
    return {"rcx": found.page_type, "rdx": found.owner, "r8": 0}


def free_page(case: Case) -> None:
    case.registers["rcx"] = case.bench.page()


def tdr_held(case: Case) -> Held:
    case.hpa = case.td.tdr
    held = page_lock(0, 1, 7)(case)
    assert held is not None
    return held


INCORRECT = s.TDX_PAGE_METADATA_INCORRECT + RCX
WRONG_LIFECYCLE = s.TDX_LIFECYCLE_STATE_INCORRECT
RECLAIM = [
    *any_page(exclusive=True),
    Fault("free page", free_page, INCORRECT),
    Fault("reserved page", register("rcx", RESERVED), INCORRECT),
    Fault("its TDR held", tdr_held, s.TDX_OPERAND_BUSY + 128, as_found),
    *(
        Fault(f"life cycle {v}", tdr_field(Tdr.LIFECYCLE, v), WRONG_LIFECYCLE, as_found)
        for v in (0, 1, 2)
    ),
]


def reclaim_tdr(bench: Bench) -> Case:
    case = reclaim(bench)
    case.registers["rcx"] = case.td.tdr
    bench.words.put(case.td.tdr_word(Tdr.CHLDCNT), 0)
    return case


CHILDREN = s.TDX_TD_ASSOCIATED_PAGES_EXIST
RECLAIM_TDR = [
    Fault("TDR, life cycle 2", tdr_field(Tdr.LIFECYCLE, 2), WRONG_LIFECYCLE, as_found),
    Fault("TDR with a child", tdr_field(Tdr.CHLDCNT, 1), CHILDREN, as_found),
]


def page_wbinvd(bench: Bench) -> Case:
    td = BuiltTd(bench)
    return Case(bench, td, abi.TDH_PHYMEM_PAGE_WBINVD, rcx=bench.spare() | 33 << 46, rdx=2)


PAGE_WBINVD = [
    f for f in page_faults("rcx", RCX, exclusive=False, wrong="used") if "KeyID" not in f.name
]


def cache_wb(bench: Bench) -> Case:
    td = BuiltTd(bench)
    td.end(teardown=False)
    return Case(bench, td, abi.TDH_PHYMEM_CACHE_WB, rdx=2)


def mutex_held(case: Case) -> Held:
    keys = case.bench.machine.module.keys
    return hold(keys.wbt, keys.wbt_word(0, Keys.MUTEX), 1, 1)


def kot_held(case: Case) -> Held:
    return hold(case.bench.machine.module.keys.lock, 0, 1, 3)


def nothing_flushed(case: Case) -> None:
    case.bench.machine.module.keys.states.put(case.td.keyid, 1)


CACHE_WB = [
    Fault("RCX 2", register("rcx", 2), s.TDX_OPERAND_INVALID + RCX),
    Fault("RCX bit 63", bits("rcx", 1 << 63), s.TDX_OPERAND_INVALID + RCX),
    Fault("package held", mutex_held, s.TDX_OPERAND_BUSY + 188),
    Fault("KOT held", kot_held, s.TDX_OPERAND_BUSY + 186),
    Fault("nothing interrupted", register("rcx", 1), s.TDX_WBCACHE_RESUME_ERROR),
    Fault("nothing flushed", nothing_flushed, s.TDX_NO_HKID_READY_TO_WBCACHE),
]
TABLES = [
    Refusals(abi.TDH_PHYMEM_PAGE_RDMD, rdmd, any_page(exclusive=False)),
    Refusals(abi.TDH_PHYMEM_PAGE_RECLAIM, reclaim, RECLAIM),
    Refusals(abi.TDH_PHYMEM_PAGE_RECLAIM, reclaim_tdr, RECLAIM_TDR),
    Refusals(abi.TDH_PHYMEM_PAGE_WBINVD, page_wbinvd, PAGE_WBINVD),
    Refusals(abi.TDH_PHYMEM_CACHE_WB, cache_wb, CACHE_WB),
]


@each(TABLES)
def test_phymem_leaf_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_phymem_leaf_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


KINDS = {
    "4K": (REG, 0, 1),
    "2M": (REG, 1, 512),
    "EPT": (EPT, 0, 1),
    "TDCX": (TDCX, 0, 1),
    "TDVPR": (TDVPR, 0, 1),
}


@pytest.mark.parametrize("kind", [*KINDS, "TDR"])
def test_tdh_phymem_page_rdmd_shows_type_owner_and_size(bench: Bench, kind: str) -> None:
    td, pages = dying_td(bench)
    page_type, size, _ = KINDS.get(kind, (TDR, 0, 0))
    values = bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=pages[kind], r10=10, r11=11)
    owner = 0 if kind == "TDR" else td.tdr
    assert values == Registers(rcx=page_type, rdx=owner, r8=size)


def test_tdh_phymem_page_rdmd_shows_the_big_page_for_every_part_of_it(bench: Bench) -> None:
    td, pages = dying_td(bench)
    values = bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=pages["2M"] + 5 * SIZE_4K)
    assert values == Registers(rcx=REG, rdx=td.tdr, r8=1)


@pytest.mark.parametrize("kind", ["4K", "2M", "EPT"])
def test_tdh_phymem_page_rdmd_shows_the_epoch_of_a_block(bench: Bench, kind: str) -> None:
    td = bench.td()
    level = 0 if kind == "4K" else 1
    hpa = td.aug(GPA, 0 if kind == "EPT" else level)
    td.track()
    td.block(GPA, level)
    page = td.tables[GPA, 1] if kind == "EPT" else hpa
    assert bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=page).r9 == 2


def test_tdh_phymem_page_rdmd_of_free_and_reserved_pages(bench: Bench) -> None:
    assert bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=bench.page()) == Registers(rcx=NDA)
    assert bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=RESERVED) == Registers(rcx=RSVD)


def test_tdh_phymem_page_rdmd_shows_the_stale_owner_of_a_freed_page(bench: Bench) -> None:
    td = bench.td()
    hpa = td.aug(GPA)
    bench.must(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
    assert bench.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=hpa) == Registers(rcx=NDA, rdx=td.tdr)


@pytest.mark.parametrize("kind", KINDS)
def test_tdh_phymem_page_reclaim_frees_a_page_and_leaves_its_content(
    bench: Bench, kind: str
) -> None:
    td, pages = dying_td(bench)
    page_type, size, owned = KINDS[kind]
    hpa, children = pages[kind], td.chldcnt
    content = bench.machine.memory.page(hpa)
    values = bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa, r9=9, r10=10, r11=11)
    assert values == Registers(rcx=page_type, rdx=td.tdr, r8=size)
    assert bench.pamt(hpa, size).page_type == NDA
    assert td.chldcnt == children - owned
    assert bench.machine.memory.page(hpa) == content


def test_tdh_phymem_page_reclaim_refuses_a_part_of_a_big_page_and_shows_it(bench: Bench) -> None:
    td, pages = dying_td(bench)
    before = bench.digest()
    status, values = bench.call(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=pages["2M"] + SIZE_4K, r9=9)
    assert status == s.TDX_OPERAND_INVALID + RCX
    assert values == Registers(rcx=REG, rdx=td.tdr, r8=1)
    assert bench.digest() == before


def test_tdh_phymem_page_reclaim_takes_children_in_any_order_and_the_tdr_last(
    bench: Bench,
) -> None:
    td, _ = dying_td(bench)
    owned = [row.hpa for row in bench.machine.module.pamt.in_use() if row.hpa != td.tdr]
    for hpa in reversed(owned):
        assert bench.call(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.tdr)[0] == CHILDREN
        bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
    assert bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=td.tdr) == Registers(rcx=TDR)
    assert list(bench.machine.module.pamt.in_use()) == []


@pytest.mark.parametrize("keyid", [0, 31, 33, 63])
def test_tdh_phymem_page_wbinvd_takes_any_keyid_with_the_page(bench: Bench, keyid: int) -> None:
    before, pa = bench.digest(), bench.page() | keyid << 46
    assert bench.must(abi.TDH_PHYMEM_PAGE_WBINVD, rcx=pa).rcx == pa
    assert bench.digest() == before
    assert bench.machine.trace.hardware()["page_wbinvd"] == 1


def pending(case: Case) -> int:
    """Packages that still have to be written back for the case's TD."""
    return case.bench.machine.module.keys.pending_packages.view[case.td.keyid]


def test_tdh_phymem_cache_wb_writes_back_the_callers_package(bench: Bench) -> None:
    case = cache_wb(bench)
    assert pending(case) == 3
    case.lp = 3
    assert case.succeed().rdx == 2
    assert pending(case) == 1
    case.lp = 0
    case.succeed()
    assert pending(case) == 0
    bench.must(abi.TDH_MNG_KEY_FREEID, rcx=case.td.tdr)


def test_tdh_phymem_cache_wb_interrupted_goes_on_where_it_stopped(bench: Bench) -> None:
    case = cache_wb(bench)
    condition("interrupt_pending", True)(case)
    assert case.call()[0] == s.TDX_INTERRUPTED_RESUMABLE
    assert pending(case) == 3
    case.registers["rcx"] = 1
    case.succeed()
    assert pending(case) == 2
    assert case.call()[0] == s.TDX_WBCACHE_RESUME_ERROR


def test_tdh_phymem_cache_wb_started_again_abandons_the_interrupted_one(bench: Bench) -> None:
    case = cache_wb(bench)
    condition("interrupt_pending", True)(case)
    for _ in range(3):
        assert case.call()[0] == s.TDX_INTERRUPTED_RESUMABLE
    condition("interrupt_pending", False)(case)
    case.succeed()
    assert pending(case) == 2


def test_tdh_phymem_cache_wb_resumed_covers_only_keyids_flushed_at_its_start(
    bench: Bench,
) -> None:
    case = cache_wb(bench)
    condition("interrupt_pending", True)(case)
    case.call()
    late = BuiltTd(bench)
    late.end(teardown=False)
    bench.must(abi.TDH_PHYMEM_CACHE_WB, rcx=1)
    assert bench.machine.module.keys.pending_packages.view[late.keyid] == 3
    status, _ = bench.call(abi.TDH_MNG_KEY_FREEID, rcx=late.tdr)
    assert status == s.TDX_WBCACHE_NOT_COMPLETE
