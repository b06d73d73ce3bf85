"""The SEAMCALL wrappers: registers, cache flushes, retries."""

from collections.abc import Callable
from typing import Any

import pytest
from td_scene import Meddled

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_OPERAND_BUSY, TDX_RND_NO_ENTROPY
from tdxlab.kvm import seamcalls as sc
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.seamcall_args import (
    TdxTd,
    TdxVp,
    failure,
    pg_level_to_tdx_sept_level,
    tdx_operand_busy,
    tdx_operand_invalid,
)
from tdxlab.steps import run

TD = TdxTd(tdr=0x1_0000_1000, tdcs=(0x1_0000_2000,), tdcx_pages=5)
VP = TdxVp(tdvpr=0x1_0000_3000)
PAGE, SOURCE, GPA = 0x1_2345_6000, 0x5000, 0x40_0000

Call = Callable[[KvmHost], Any]

#: (wrapper, leaf, registers in, pages flushed)
WRAPPERS: list[tuple[str, Call, int, dict[str, int], int]] = [
    ("enter", lambda h: sc.tdh_vp_enter(h, VP, Registers(r10=7)), abi.TDH_VP_ENTER,
     {"rcx": VP.tdvpr, "r10": 7}, 0),
    ("mng_addcx", lambda h: sc.tdh_mng_addcx(h, TD, PAGE), abi.TDH_MNG_ADDCX,
     {"rcx": PAGE, "rdx": TD.tdr}, 1),
    ("page_add", lambda h: sc.tdh_mem_page_add(h, TD, GPA, PAGE, SOURCE), abi.TDH_MEM_PAGE_ADD,
     {"rcx": GPA, "rdx": TD.tdr, "r8": PAGE, "r9": SOURCE}, 1),
    ("sept_add", lambda h: sc.tdh_mem_sept_add(h, TD, GPA, 2, PAGE), abi.TDH_MEM_SEPT_ADD,
     {"rcx": GPA | 2, "rdx": TD.tdr, "r8": PAGE}, 1),
    ("vp_addcx", lambda h: sc.tdh_vp_addcx(h, VP, PAGE), abi.TDH_VP_ADDCX,
     {"rcx": PAGE, "rdx": VP.tdvpr}, 1),
    ("page_aug", lambda h: sc.tdh_mem_page_aug(h, TD, GPA, 1, PAGE), abi.TDH_MEM_PAGE_AUG,
     {"rcx": GPA | 1, "rdx": TD.tdr, "r8": PAGE}, 1),
    ("block", lambda h: sc.tdh_mem_range_block(h, TD, GPA, 1), abi.TDH_MEM_RANGE_BLOCK,
     {"rcx": GPA | 1, "rdx": TD.tdr}, 0),
    ("key_config", lambda h: sc.tdh_mng_key_config(h, TD), abi.TDH_MNG_KEY_CONFIG,
     {"rcx": TD.tdr}, 0),
    ("create", lambda h: sc.tdh_mng_create(h, TD, 33), abi.TDH_MNG_CREATE,
     {"rcx": TD.tdr, "rdx": 33}, 1),
    ("vp_create", lambda h: sc.tdh_vp_create(h, TD, VP), abi.TDH_VP_CREATE,
     {"rcx": VP.tdvpr, "rdx": TD.tdr}, 1),
    ("mng_rd", lambda h: sc.tdh_mng_rd(h, TD, 5), abi.TDH_MNG_RD, {"rcx": TD.tdr, "rdx": 5}, 0),
    ("extend", lambda h: sc.tdh_mr_extend(h, TD, GPA + 256), abi.TDH_MR_EXTEND,
     {"rcx": GPA + 256, "rdx": TD.tdr}, 0),
    ("finalize", lambda h: sc.tdh_mr_finalize(h, TD), abi.TDH_MR_FINALIZE, {"rcx": TD.tdr}, 0),
    ("flush", lambda h: sc.tdh_vp_flush(h, VP), abi.TDH_VP_FLUSH, {"rcx": VP.tdvpr}, 0),
    ("vpflushdone", lambda h: sc.tdh_mng_vpflushdone(h, TD), abi.TDH_MNG_VPFLUSHDONE,
     {"rcx": TD.tdr}, 0),
    ("freeid", lambda h: sc.tdh_mng_key_freeid(h, TD), abi.TDH_MNG_KEY_FREEID,
     {"rcx": TD.tdr}, 0),
    ("mng_init", lambda h: sc.tdh_mng_init(h, TD, SOURCE), abi.TDH_MNG_INIT,
     {"rcx": TD.tdr, "rdx": SOURCE}, 0),
    ("vp_init", lambda h: sc.tdh_vp_init(h, VP, 9, 3), abi.TDH_VP_INIT,
     {"rcx": VP.tdvpr, "rdx": 9, "r8": 3}, 0),
    ("vp_rd", lambda h: sc.tdh_vp_rd(h, VP, 5), abi.TDH_VP_RD, {"rcx": VP.tdvpr, "rdx": 5}, 0),
    ("reclaim", lambda h: sc.tdh_phymem_page_reclaim(h, PAGE), abi.TDH_PHYMEM_PAGE_RECLAIM,
     {"rcx": PAGE}, 0),
    ("remove", lambda h: sc.tdh_mem_page_remove(h, TD, GPA, 0), abi.TDH_MEM_PAGE_REMOVE,
     {"rcx": GPA, "rdx": TD.tdr}, 0),
    ("track", lambda h: sc.tdh_mem_track(h, TD), abi.TDH_MEM_TRACK, {"rcx": TD.tdr}, 0),
    ("cache_wb", lambda h: sc.tdh_phymem_cache_wb(h, resume=True), abi.TDH_PHYMEM_CACHE_WB,
     {"rcx": 1}, 0),
    ("wbinvd", lambda h: sc.tdh_phymem_page_wbinvd_hkid(h, 33, PAGE), abi.TDH_PHYMEM_PAGE_WBINVD,
     {"rcx": 0x0008_4001_2345_6000}, 0),
    ("wbinvd_tdr", lambda h: sc.tdh_phymem_page_wbinvd_tdr(h, TD), abi.TDH_PHYMEM_PAGE_WBINVD,
     {"rcx": 32 << 46 | TD.tdr}, 0),
    ("vp_wr", lambda h: sc.tdh_vp_wr(h, VP, 5, 6, 7), abi.TDH_VP_WR,
     {"rcx": VP.tdvpr, "rdx": 5, "r8": 6, "r9": 7}, 0),
]  # fmt: skip


@pytest.fixture
def host() -> KvmHost:
    return KvmHost(Meddled())


@pytest.mark.parametrize(
    ("wrapper", "leaf", "registers", "flushed"),
    [row[1:] for row in WRAPPERS],
    ids=[row[0] for row in WRAPPERS],
)
def test_wrapper_puts_its_operands_into_registers(
    host: KvmHost, wrapper: Call, leaf: int, registers: dict[str, int], flushed: int
) -> None:
    machine: Any = host.hardware
    machine.answer(leaf, TDX_OPERAND_BUSY | 0x80)
    result = run(host.on_cpu(2, wrapper(host)))
    status = result[0] if isinstance(result, tuple) else result
    assert status == TDX_OPERAND_BUSY | 0x80
    [(lp, rax, given)] = machine.calls
    assert (lp, rax) == (2, leaf)
    assert {name: value for name, value in given.items() if value} == registers
    assert host.counts["clflush"] == flushed


@pytest.mark.parametrize(
    ("wrapper", "leaf"), [row[1:3] for row in WRAPPERS[1:]], ids=[row[0] for row in WRAPPERS[1:]]
)
def test_wrapper_calls_ten_times_in_all_without_entropy(
    host: KvmHost, wrapper: Call, leaf: int
) -> None:
    machine: Any = host.hardware
    machine.answer(leaf, *[TDX_RND_NO_ENTROPY] * 20)
    result = run(wrapper(host))
    assert (result[0] if isinstance(result, tuple) else result) == TDX_RND_NO_ENTROPY
    assert len(machine.calls) == sc.RDRAND_RETRY_LOOPS == 10


def test_wrapper_returns_the_first_other_status_after_a_lack_of_entropy(host: KvmHost) -> None:
    machine: Any = host.hardware
    machine.answer(abi.TDH_MEM_TRACK, TDX_RND_NO_ENTROPY, TDX_RND_NO_ENTROPY, 5)
    assert run(sc.tdh_mem_track(host, TD)) == 5
    assert len(machine.calls) == 3


def test_wrapper_does_not_retry_a_lack_of_entropy_with_an_operand(host: KvmHost) -> None:
    machine: Any = host.hardware
    machine.answer(abi.TDH_MEM_TRACK, TDX_RND_NO_ENTROPY | 1, 0)
    assert run(sc.tdh_mem_track(host, TD)) == TDX_RND_NO_ENTROPY | 1


def test_tdh_vp_enter_returns_at_once_without_entropy(host: KvmHost) -> None:
    machine: Any = host.hardware
    machine.answer(abi.TDH_VP_ENTER, TDX_RND_NO_ENTROPY, 0)
    assert run(sc.tdh_vp_enter(host, VP, Registers())) == TDX_RND_NO_ENTROPY


def test_wrapper_yields_once_before_each_call(host: KvmHost) -> None:
    machine: Any = host.hardware
    machine.answer(abi.TDH_MEM_TRACK, 0)
    call = sc.tdh_mem_track(host, TD)
    assert next(call) == ("TDH.MEM.TRACK", TD.tdr)
    assert machine.calls == []
    with pytest.raises(StopIteration):
        next(call)
    assert len(machine.calls) == 1


def test_status_predicates_compare_the_upper_half_only() -> None:
    assert tdx_operand_busy(TDX_OPERAND_BUSY | 0x92)
    assert not tdx_operand_busy(0x8000_0201_0000_0000)
    assert tdx_operand_invalid(0xC000_0100_0000_0040)
    assert not tdx_operand_invalid(TDX_OPERAND_BUSY)


def test_levels_of_the_module_start_at_zero() -> None:
    assert [pg_level_to_tdx_sept_level(level) for level in (1, 2, 5)] == [0, 1, 4]


def test_failure_names_leaf_status_and_words() -> None:
    text = failure("TDH_MEM_TRACK", TDX_OPERAND_BUSY | 0xA9, 1, 2)
    assert "TDH_MEM_TRACK" in text
    assert "TD_EPOCH" in text
    assert "rcx 0x1, rdx 0x2" in text
