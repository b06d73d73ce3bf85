"""Bringing the module up: order, counts, and what follows a failure."""

from errno import EACCES, EINVAL, EIO, ENODEV, EOPNOTSUPP
from typing import Any

import pytest
from td_scene import Meddled, boot

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import VMFAILINVALID
from tdxlab.abi.status import TDX_SYS_BUSY
from tdxlab.arch import SIZE_1G
from tdxlab.kvm.host import (
    TDX_MODULE_ERROR,
    TDX_MODULE_INITIALIZED,
    TDX_MODULE_UNINITIALIZED,
    KvmHost,
    tdx_memory,
)
from tdxlab.kvm.tdmr import pamt_sizes
from tdxlab.kvm.tdx_module import (
    TDX_TD_ATTR_SEPT_VE_DISABLE,
    tdx_bringup,
    tdx_cpu_enable,
    tdx_enable,
    tdx_get_supported_attrs,
    tdx_get_supported_xfam,
)
from tdxlab.steps import run


def host_with(leaf: int, *statuses: int | None) -> KvmHost:
    machine = Meddled()
    machine.answer(leaf, *statuses)
    return KvmHost(machine)


@pytest.mark.parametrize(("lps", "packages", "gib"), [(1, 1, 1), (4, 2, 1), (8, 4, 2)])
def test_tdx_bringup_calls_what_the_cost_model_says(lps: int, packages: int, gib: int) -> None:
    host = boot(lps=lps, packages=packages, tdmr_gib=gib)
    machine: Any = host.hardware
    calls = machine.trace.seamcalls()
    assert host.module_status == TDX_MODULE_INITIALIZED
    assert calls.pop(abi.TDH_SYS_TDMR_INIT) == 256 * (gib + 1)
    assert calls == {
        abi.TDH_SYS_INIT: 1,
        abi.TDH_SYS_LP_INIT: lps,
        abi.TDH_SYS_RD: 15 + 3 * len(host.sysinfo.cpuid_config),
        abi.TDH_SYS_CONFIG: 1,
        abi.TDH_SYS_KEY_CONFIG: packages,
    }


def test_tdx_bringup_runs_each_call_where_linux_does() -> None:
    machine = Meddled(lps=4, packages=2)
    run(tdx_bringup(KvmHost(machine)))
    by_leaf: dict[int, list[int]] = {}
    for lp, leaf, _ in machine.calls:
        by_leaf.setdefault(leaf, []).append(lp)
    assert by_leaf[abi.TDH_SYS_LP_INIT] == [0, 1, 2, 3]
    assert by_leaf[abi.TDH_SYS_KEY_CONFIG] == [0, 2]


def test_tdx_bringup_keeps_its_pamts_out_of_the_page_allocator() -> None:
    host = boot()
    [before] = tdx_memory(host.hardware.platform)
    [region] = host.pages.regions
    assert before.size - region.size == sum(pamt_sizes(2 * SIZE_1G, (16, 16, 16)))
    assert host.pages.in_use == {}
    assert host.pages.free == region.size // 4096


@pytest.mark.parametrize(
    ("status", "err"),
    [
        (VMFAILINVALID, -ENODEV),
        (0x8000_FF00_0000_000D, -EOPNOTSUPP),
        (0x8000_FF00_0000_0006, -EACCES),
        (TDX_SYS_BUSY, -EIO),
    ],
)
def test_tdx_cpu_enable_fails_with_the_errno_of_the_status(status: int, err: int) -> None:
    host = host_with(abi.TDH_SYS_INIT, status)
    assert run(tdx_cpu_enable(host)) == err
    assert host.cpus_initialised == frozenset()


def test_tdx_cpu_enable_initialises_an_lp_once() -> None:
    host = KvmHost(Meddled())
    machine: Any = host.hardware
    assert run(host.on_cpu(1, tdx_cpu_enable(host))) == 0
    assert run(host.on_cpu(1, tdx_cpu_enable(host))) == 0
    assert run(host.on_cpu(2, tdx_cpu_enable(host))) == 0
    assert machine.names() == ["TDH.SYS.INIT", "TDH.SYS.LP.INIT", "TDH.SYS.LP.INIT"]


@pytest.mark.parametrize(
    "leaf",
    [abi.TDH_SYS_RD, abi.TDH_SYS_CONFIG, abi.TDH_SYS_KEY_CONFIG, abi.TDH_SYS_TDMR_INIT],
)
def test_tdx_enable_fails_for_ever_after_a_failed_call(leaf: int) -> None:
    host = host_with(leaf, TDX_SYS_BUSY)
    assert run(tdx_bringup(host)) == -EIO
    assert host.module_status == TDX_MODULE_ERROR
    assert run(tdx_enable(host)) == -EINVAL
    assert host.pages.in_use == {}


def test_tdx_enable_does_nothing_the_second_time() -> None:
    host = boot()
    machine: Any = host.hardware
    before = machine.trace.seamcalls()
    assert run(tdx_enable(host)) == 0
    assert machine.trace.seamcalls() == before


def test_tdx_bringup_goes_on_after_a_lack_of_entropy() -> None:
    host = host_with(abi.TDH_SYS_KEY_CONFIG, 0x8000_0203_0000_0000)
    assert run(tdx_bringup(host)) == 0


def test_sysinfo_says_what_the_module_says() -> None:
    info = boot().sysinfo
    assert (info.tdr_base_size, info.tdcs_base_size, info.tdvps_base_size) == (4096, 24576, 24576)
    assert info.tdmr == (64, 16, (16, 16, 16))
    assert info.cpuid_config[0][0] == 0xFFFF_FFFF_0000_0001


def test_supported_attrs_are_what_kvm_and_module_know() -> None:
    info = boot().sysinfo
    assert tdx_get_supported_attrs(info) == TDX_TD_ATTR_SEPT_VE_DISABLE
    assert tdx_get_supported_attrs(info._replace(attributes_fixed1=1)) == 0


def test_supported_xfam_is_what_cpu_and_module_know() -> None:
    host = boot()
    assert tdx_get_supported_xfam(host) == 0x69BE7 & 0x6DBE7
    host.sysinfo = host.sysinfo._replace(xfam_fixed1=1 << 62)
    assert tdx_get_supported_xfam(host) == 0


def test_bringup_is_taken_back_by_a_rewind() -> None:
    machine = Meddled()
    host = KvmHost(machine)
    mark = host.journal.mark()
    digest = host.journal.digest()
    assert run(tdx_bringup(host)) == 0
    host.journal.rewind(mark)
    assert host.module_status == TDX_MODULE_UNINITIALIZED
    assert host.journal.digest() == digest
    assert run(tdx_bringup(host)) == 0
    assert host.pages.total * 4096 > SIZE_1G
