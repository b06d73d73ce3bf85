"""Corners of the module: write-backs that overlap, 1 GiB pages, nested VMs' page counts, refused
entries, fatal TDs, and a module that is shut down or halted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.outcome import VMFAILINVALID
from tdxlab.abi.registers import Registers
from tdxlab.bare import BareMachine
from tdxlab.hardware import TdmrPlan, default_platform
from tdxlab.host import Host
from tdxlab.seam import measure
from tdxlab.seam.td import Tdcs, Tdr, Tdvps
from tests.corners import BUSY, GPA, RCX, lock_of, runnable
from tests.leaves import leafbench
from tests.leaves.leafbench import SIZE_1G, SIZE_2M, SIZE_4K, SOURCE, Bench, BuiltTd

SEPT_TREE, TD_EPOCH = 146, 169


@pytest.fixture(scope="module")
def booted() -> Bench:
    return Bench()


@pytest.fixture
def bench(booted: Bench) -> Bench:
    booted.reset()
    return booted


# -- caches


def flush_a_keyid(bench: Bench) -> BuiltTd:
    td = BuiltTd(bench)
    td.end(teardown=False)
    return td


def test_cache_wb_resumed_does_not_cover_a_keyid_that_came_later(bench: Bench) -> None:
    first = flush_a_keyid(bench)
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=2)
    bench.conditions.interrupt_pending = True
    assert bench.call(abi.TDH_PHYMEM_CACHE_WB, lp=0)[0] == s.TDX_INTERRUPTED_RESUMABLE
    bench.conditions.interrupt_pending = False
    second = flush_a_keyid(bench)
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=1, rcx=1)
    bench.must(abi.TDH_MNG_KEY_FREEID, rcx=first.tdr)
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=3)
    status, _ = bench.call(abi.TDH_MNG_KEY_FREEID, rcx=second.tdr)
    assert status == s.TDX_WBCACHE_NOT_COMPLETE
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=0)
    bench.must(abi.TDH_MNG_KEY_FREEID, rcx=second.tdr)


def test_cache_wb_is_interrupted_for_one_package_alone_and_a_start_begins_again(
    bench: Bench,
) -> None:
    flush_a_keyid(bench)
    bench.conditions.interrupt_pending = True
    assert bench.call(abi.TDH_PHYMEM_CACHE_WB, lp=0)[0] == s.TDX_INTERRUPTED_RESUMABLE
    assert bench.call(abi.TDH_PHYMEM_CACHE_WB, lp=2, rcx=1)[0] == s.TDX_WBCACHE_RESUME_ERROR
    assert bench.call(abi.TDH_PHYMEM_CACHE_WB, lp=0)[0] == s.TDX_INTERRUPTED_RESUMABLE
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=0, rcx=1)
    assert bench.call(abi.TDH_PHYMEM_CACHE_WB, lp=0, rcx=1)[0] == s.TDX_WBCACHE_RESUME_ERROR


def test_cache_wb_may_be_repeated_on_a_package(bench: Bench) -> None:
    flush_a_keyid(bench)
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=0)
    bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=1)


# -- 1 GiB pages


@pytest.fixture(scope="module")
def wide() -> Bench:
    """A bench whose second TDMR is one whole free GiB."""
    bench = Bench()
    platform = replace(
        default_platform(tdmr_gib=2),
        tdmrs=(
            TdmrPlan(leafbench.TDMR, SIZE_1G),
            TdmrPlan(leafbench.TDMR + SIZE_1G, SIZE_1G),
        ),
    )
    bench.machine = BareMachine(platform)
    Host(bench.machine).boot()
    bench._mark = bench.machine.mark()
    bench.reset()
    return bench


def test_a_1g_page_is_merged_blocked_split_and_removed(wide: Bench) -> None:
    td, base, table = wide.td(), leafbench.SECOND, 0
    td.map_tables(GPA, 1)
    table = td.tables[GPA, 2]
    for number in range(512):
        offset = number * SIZE_2M
        wide.must(abi.TDH_MEM_PAGE_AUG, rcx=GPA + offset | 1, rdx=td.tdr, r8=base + offset)
    children = td.chldcnt
    merged = wide.must(abi.TDH_MEM_PAGE_PROMOTE, rcx=GPA | 2, rdx=td.tdr)
    assert (merged.rcx, merged.rdx) == (table, 0)
    assert td.septe(GPA, 2) == leafbench.RAW["PENDING"] | base
    assert td.chldcnt == children - 1
    found = wide.must(abi.TDH_PHYMEM_PAGE_RDMD, rcx=base + 7 * SIZE_2M)
    assert (found.rcx, found.rdx, found.r8) == (leafbench.REG, td.tdr, 2)
    shown = wide.must(abi.TDH_MEM_SEPT_RD, rcx=GPA | 2, rdx=td.tdr)
    assert (shown.rcx, shown.rdx) == (0x8000_0000_0000_00F0 | base, 0x202)
    status, shown = wide.call(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA | 1, rdx=td.tdr)
    assert (status, shown.rdx) == (s.TDX_EPT_WALK_FAILED + RCX, 0x202)

    td.start()
    td.block(GPA, 2)
    assert wide.pamt(base, 2).bepoch == 1
    status, _ = wide.call(abi.TDH_MEM_PAGE_DEMOTE, rcx=GPA | 2, rdx=td.tdr, r8=table)
    assert status == s.TDX_TLB_TRACKING_NOT_DONE + RCX
    td.track()
    wide.must(abi.TDH_MEM_PAGE_DEMOTE, rcx=GPA | 2, rdx=td.tdr, r8=table)
    assert wide.pamt(base, 2).page_type == leafbench.NDA
    assert td.septe(GPA + 9 * SIZE_2M, 1) == leafbench.RAW["PENDING"] | base + 9 * SIZE_2M
    assert wide.pamt(base + 9 * SIZE_2M, 1)[2:5] == (leafbench.REG, td.tdr, 0)

    td.block(GPA, 2)
    td.track()
    wide.must(abi.TDH_MEM_PAGE_PROMOTE, rcx=GPA | 2, rdx=td.tdr)
    td.block(GPA, 2)
    td.track()
    children = td.chldcnt
    removed = wide.must(abi.TDH_MEM_PAGE_REMOVE, rcx=GPA | 2, rdx=td.tdr)
    assert removed.rcx == base
    assert td.chldcnt == children - 512 * 512
    assert wide.pamt(base, 2).page_type == leafbench.NDA


def test_a_merged_page_can_be_measured(bench: Bench) -> None:
    td = bench.td()
    td.map_tables(GPA)
    base = leafbench.BIG_PAGES
    for number in range(512):
        offset = number * SIZE_4K
        bench.must(abi.TDH_MEM_PAGE_ADD, rcx=GPA + offset, rdx=td.tdr, r8=base + offset, r9=SOURCE)
    bench.must(abi.TDH_MEM_PAGE_PROMOTE, rcx=GPA | 1, rdx=td.tdr)
    assert td.septe(GPA, 1) == leafbench.RAW["MAPPED"] | base
    mrtds = bench.machine.module.measurements
    before = mrtds[td.cx[0]].copy()
    bench.must(abi.TDH_MR_EXTEND, rcx=GPA + 0x1F_FF00, rdx=td.tdr)
    content = bench.machine.memory.page(base + 511 * SIZE_4K)[-256:]
    before.update(measure.measured_block(measure.EXTEND_NAME, GPA + 0x1F_FF00) + content)
    assert mrtds[td.cx[0]].digest() == before.digest()


# -- nested VMs' pages


@pytest.mark.parametrize("vms", [1, 2, 3])
def test_a_vcpu_needs_three_more_pages_for_each_nested_vm(bench: Bench, vms: int) -> None:
    td = bench.td(num_l2_vms=vms)
    tdvpr = td.create_vcpu(pages=5 + 3 * vms - 1)
    assert bench.call(abi.TDH_VP_INIT, rcx=tdvpr)[0] == s.TDX_TDCX_NUM_INCORRECT
    assert bench.call(abi.TDH_VP_FLUSH, rcx=tdvpr)[0] == s.TDX_TDCX_NUM_INCORRECT
    bench.must(abi.TDH_VP_ADDCX, rcx=bench.page(), rdx=tdvpr)
    assert bench.call(abi.TDH_VP_FLUSH, rcx=tdvpr)[0] == s.TDX_VCPU_NOT_ASSOCIATED
    bench.must(abi.TDH_VP_INIT, rcx=tdvpr)


def test_tdh_mem_sept_rd_answers_a_debug_tds_host_who_asks_for_nested_vms(bench: Bench) -> None:
    td = bench.td(attributes=1)
    td.add_page(GPA)
    plain = bench.must(abi.TDH_MEM_SEPT_RD, rcx=GPA, rdx=td.tdr, r8=5)
    asked = bench.must(abi.TDH_MEM_SEPT_RD, rcx=GPA, rdx=td.tdr | 1, r8=5)
    assert (plain.r8, asked.r8) == (5, 0)
    assert (asked.rcx, asked.rdx) == (plain.rcx, plain.rdx)


# -- entering


@pytest.mark.parametrize("bit", [52, 53])
def test_a_refused_flag_of_tdh_vp_enter_leaves_the_vcpu_associated(bench: Bench, bit: int) -> None:
    td = runnable(bench)
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    assert td.associated == 0
    status, values = bench.call(abi.TDH_VP_ENTER, lp=3, rcx=td.vcpus[0] | 1 << bit, r8=7)
    assert (status, values.rcx, values.r8) == (
        s.TDX_OPERAND_INVALID + RCX,
        *(td.vcpus[0] | 1 << bit, 7),
    )
    assert (td.associated, td.inside) == (1, (0, 0))
    assert bench.call(abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)[0] == s.TDX_FLUSHVP_NOT_DONE
    assert bench.call(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])[0] == s.TDX_VCPU_NOT_ASSOCIATED
    bench.must(abi.TDH_VP_FLUSH, lp=3, rcx=td.vcpus[0])


def test_the_epoch_lock_refuses_an_entry_and_keeps_the_stray_reader(bench: Bench) -> None:
    td = runnable(bench)
    lock = td.tdcs_word(Tdcs.EPOCH_LOCK)
    bench.words.put(lock, 1)
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == BUSY + TD_EPOCH
    assert (td.read(lock), td.inside) == (3, (0, 0))
    assert (lock_of(bench, td.tdr), lock_of(bench, td.vcpus[0])) == (0, 0)
    assert td.vcpu_state() == 2


def test_a_host_that_keeps_a_guest_faulting_gets_the_same_exit_without_an_entry(
    bench: Bench,
) -> None:
    td = runnable(bench)
    td.map_tables(GPA)
    for _ in range(7):
        td.enter()
        outcome = bench.machine.vm_exit(0, 48, Registers(), qualification=0x182, gpa=GPA + 8)
        assert (outcome.exited, outcome.status & 0xFFFF) == (True, 48)
    status, values = bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0], rdx=1, r9=1, rbx=1, rbp=1, r15=1)
    assert status == 48
    assert values == Registers(rcx=2, r8=GPA, rbp=1)
    assert (td.inside, td.associated, td.vcpu_state()) == ((0, 0), 1, 2)
    assert (lock_of(bench, td.tdr), td.read(td.tdcs_word(Tdcs.SEPT_LOCK))) == (0, 0)
    bench.words.put(td.tdcs_word(Tdcs.SEPT_LOCK), 2)
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == BUSY + SEPT_TREE
    bench.words.put(td.tdcs_word(Tdcs.SEPT_LOCK), 0)
    td.aug(GPA)
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == 48


def test_a_fatal_td_lets_its_vcpu_out_and_nobody_in(bench: Bench) -> None:
    td = runnable(bench)
    td.enter()
    bench.words.put(td.tdr_word(Tdr.FATAL), 1)
    outcome = bench.machine.interrupt(0)
    assert outcome.status == s.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE | 1
    assert td.inside == (0, 1)
    assert (lock_of(bench, td.tdr), lock_of(bench, td.vcpus[0])) == (0, 0)
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == s.TDX_TD_FATAL
    assert bench.call(abi.TDH_MEM_TRACK, rcx=td.tdr)[0] == s.TDX_TD_FATAL
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    bench.must(abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)
    assert bench.call(abi.TDH_MEM_TRACK, rcx=td.tdr)[0] == s.TDX_TD_FATAL


def test_a_vcpu_of_two_is_associated_with_the_lp_that_read_it(bench: Bench) -> None:
    td = runnable(bench)
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    status, _ = bench.call(abi.TDH_VP_RD, lp=1, rcx=td.vcpus[0], rdx=0)
    assert status == s.TDX_METADATA_FIELD_NOT_READABLE
    assert td.read(td.vcpu_word(Tdvps.ASSOC_LPID)) == 1
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == s.TDX_VCPU_ASSOCIATED


# -- the module's own end


def test_after_its_shutdown_the_module_answers_one_leaf(bench: Bench) -> None:
    td = runnable(bench)
    assert bench.call(abi.TDH_SYS_SHUTDOWN, rcx=1)[0] == s.TDX_OPERAND_INVALID + RCX
    bench.must(abi.TDH_SYS_SHUTDOWN)
    bench.must(abi.TDH_SYS_LP_SHUTDOWN)
    for leaf in (abi.TDH_SYS_INIT, abi.TDH_SYS_RD, abi.TDH_MEM_TRACK, 42, 200):
        status, values = bench.call(leaf, rcx=td.tdr, rdx=3)
        assert (status, values) == (s.TDX_SYS_SHUTDOWN, Registers(rcx=td.tdr, rdx=3))
    assert bench.call(abi.TDH_SYS_LP_SHUTDOWN, version=1)[0] == s.TDX_OPERAND_INVALID


def test_a_rewind_brings_a_halted_module_back(bench: Bench) -> None:
    td = runnable(bench)
    mark = bench.machine.mark()
    td.enter()
    outcome = bench.machine.vm_exit(0, 49, Registers(), gpa=GPA)
    assert (outcome.exited, outcome.status) == (True, VMFAILINVALID)
    assert bench.machine.module.halted
    assert bench.call(abi.TDH_MEM_TRACK, rcx=td.tdr)[0] == VMFAILINVALID
    bench.machine.rewind(mark)
    assert bench.machine.module.halted is None
    td.track()


# -- a host that writes where it must not


@pytest.mark.parametrize("page", ["TDR", "TDCS", "TDVPR", "S-EPT root", "S-EPT table"])
@pytest.mark.parametrize("by", ["TDH.SYS.INFO", "a store", "MOVDIR64B of the whole page"])
def test_the_module_halts_on_a_control_page_that_the_host_writes_to(
    bench: Bench, page: str, by: str
) -> None:
    td = runnable(bench)
    td.aug(GPA)
    hpa = {
        "TDR": td.tdr,
        "TDCS": td.cx[0],
        "TDVPR": td.vcpus[0],
        "S-EPT root": td.cx[3],
        "S-EPT table": td.tables[GPA, 1],
    }[page]
    if by == "TDH.SYS.INFO":
        bench.call(abi.TDH_SYS_INFO, rcx=hpa, rdx=1024, r8=SOURCE, r9=32)
    elif by == "a store":
        bench.machine.store(hpa + SIZE_4K - 1, b"\1")
    else:
        bench.machine.clear(hpa)
    assert bench.call(abi.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=td.tdr)[0] == VMFAILINVALID
    assert f"{hpa:#x}" in str(bench.machine.module.halted)


def test_a_guest_of_a_halted_module_leaves_its_lp_to_the_host(bench: Bench) -> None:
    td = runnable(bench)
    td.enter()
    bench.machine.store(td.cx[0], b"\1")
    assert bench.machine.interrupt(0).status == VMFAILINVALID
    assert bench.call(abi.TDH_SYS_RD, rdx=0)[0] == VMFAILINVALID


def test_a_page_that_the_host_cleared_after_its_td_is_as_good_as_new(bench: Bench) -> None:
    td = bench.td()
    td.end()
    for hpa in (*td.cx, td.tdr):
        bench.must(abi.TDH_PHYMEM_PAGE_RECLAIM, rcx=hpa)
        bench.machine.clear(hpa)
    bench.must(abi.TDH_MNG_CREATE, rcx=td.cx[0], rdx=td.keyid)
    bench.must(abi.TDH_MNG_KEY_CONFIG, rcx=td.cx[0])
