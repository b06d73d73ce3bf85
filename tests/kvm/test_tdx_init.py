"""KVM_TDX_INIT_VM and the vCPUs: what is refused, what is undone."""

from errno import EAGAIN, EBUSY, EEXIST, EINVAL, EIO, ENOMEM, ENOSPC
from typing import Any

import pytest
from td_scene import TdScene, boot

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import (
    OPERAND_ID_XFAM,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_RND_NO_ENTROPY,
)
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.params import KVM_X86_TDX_VM, VmConfig
from tdxlab.kvm.tdx import (
    TD_STATE_INITIALIZED,
    TD_STATE_UNINITIALIZED,
    Tdx,
    TdxVcpu,
    tdx_vm_init,
)
from tdxlab.kvm.tdx_init import InitVm, tdx_td_init
from tdxlab.kvm.tdx_teardown import kvm_destroy_vm
from tdxlab.kvm.tdx_vcpu import tdx_vcpu_create, tdx_vcpu_init
from tdxlab.kvm.vm import Vm
from tdxlab.steps import run

HARD = TDX_PAGE_METADATA_INCORRECT


def make(host: KvmHost, gpaw: int = 48, name: str = "TD") -> Tdx:
    config = VmConfig(vm_type=KVM_X86_TDX_VM, root_level=4 if gpaw == 48 else 5)
    vm = Vm(host.journal, host.memory, host.params, config, pages=host.pages, name=name)
    return tdx_vm_init(host, vm)


@pytest.fixture
def host() -> KvmHost:
    return boot()


@pytest.mark.parametrize(("gpaw", "direct_bits"), [(48, 1 << 35), (52, 1 << 39)])
def test_tdx_td_init_creates_a_td(host: KvmHost, gpaw: int, direct_bits: int) -> None:
    tdx = make(host, gpaw)
    assert run(tdx_td_init(tdx, InitVm(gpaw=gpaw))) == 0
    assert (tdx.state, tdx.hkid, tdx.vm.gfn_direct_bits) == (TD_STATE_INITIALIZED, 33, direct_bits)
    assert (len(tdx.td.tdcs), tdx.td.tdcx_pages) == (6, 5)
    assert tdx.tsc_multiplier == 1 << 48
    assert host.nr_configured_hkids == 1


def test_tdx_td_init_calls_in_order_on_every_package(host: KvmHost) -> None:
    machine: Any = host.hardware
    machine.calls.clear()
    run(tdx_td_init(make(host), InitVm()))
    names = ["TDH.MNG.CREATE", *["TDH.MNG.KEY.CONFIG"] * 2, *["TDH.MNG.ADDCX"] * 6]
    assert machine.names() == [*names, "TDH.MNG.INIT", "TDH.MNG.RD", "TDH.MNG.RD"]
    assert [lp for lp, leaf, _ in machine.calls if leaf == abi.TDH_MNG_KEY_CONFIG] == [0, 2]


def test_tdx_td_init_measures_what_user_space_names(host: KvmHost) -> None:
    tdx = make(host)
    init = InitVm(mrconfigid=b"config", mrowner=b"owner", mrownerconfig=b"x" * 48)
    assert run(tdx_td_init(tdx, init)) == 0
    machine: Any = host.hardware
    page = machine.memory.page(tdx.td.tdcs[0])
    assert b"config" in page
    assert b"owner" in page
    assert b"x" * 48 in page


@pytest.mark.parametrize(
    "init",
    [
        InitVm(attributes=1),
        InitVm(xfam=3 | 1 << 62),
        InitVm(gpaw=52),
        InitVm(gpaw=50),
        InitVm(mrowner=b"x" * 49),
    ],
)
def test_tdx_td_init_refuses_what_kvm_does_not_support(host: KvmHost, init: InitVm) -> None:
    machine: Any = host.hardware
    machine.calls.clear()
    tdx = make(host)
    assert run(tdx_td_init(tdx, init)) == -EINVAL
    assert machine.calls == []
    assert host.pages.in_use == {}
    assert tdx.state == TD_STATE_UNINITIALIZED


def test_tdx_td_init_refuses_a_second_time(host: KvmHost) -> None:
    tdx = make(host)
    assert run(tdx_td_init(tdx, InitVm())) == 0
    assert run(tdx_td_init(tdx, InitVm())) == -EINVAL


def test_tdx_td_init_refuses_with_a_vcpu(host: KvmHost) -> None:
    tdx = make(host)
    tdx.vm.vcpus = (TdxVcpu(tdx, 0),)
    assert run(tdx_td_init(tdx, InitVm())) == -EBUSY


def test_tdx_td_init_refuses_without_a_keyid(host: KvmHost) -> None:
    for keyid in host.guest_keyids:
        host.hkids.put(keyid, "somebody")
    assert run(tdx_td_init(make(host), InitVm())) == -ENOSPC
    assert host.pages.in_use == {}


def test_tdx_td_init_refuses_without_memory(host: KvmHost) -> None:
    host.pages.regions = ()
    assert run(tdx_td_init(make(host), InitVm())) == -ENOMEM
    assert host.hkids == {}


@pytest.mark.parametrize(
    ("leaf", "statuses", "err", "bugged"),
    [
        (abi.TDH_MNG_CREATE, [TDX_RND_NO_ENTROPY] * 10, -EAGAIN, False),
        (abi.TDH_MNG_CREATE, [HARD], -EIO, False),
        (abi.TDH_MNG_KEY_CONFIG, [HARD], -EIO, True),
        (abi.TDH_MNG_KEY_CONFIG, [None, HARD], -EIO, True),
        (abi.TDH_MNG_ADDCX, [TDX_RND_NO_ENTROPY] * 10, -EAGAIN, False),
        (abi.TDH_MNG_ADDCX, [None, None, HARD], -EIO, False),
        (abi.TDH_MNG_INIT, [TDX_OPERAND_INVALID | OPERAND_ID_XFAM], -EINVAL, False),
        (abi.TDH_MNG_INIT, [HARD], -EIO, False),
    ],
)
def test_tdx_td_init_undoes_everything_after_a_failure(
    host: KvmHost, leaf: int, statuses: list[int | None], err: int, bugged: bool
) -> None:
    machine: Any = host.hardware
    machine.answer(leaf, *statuses)
    tdx = make(host)
    assert run(tdx_td_init(tdx, InitVm())) == err
    assert host.pages.in_use == {}
    assert host.pages.leaked == {}
    assert host.hkids == {}
    assert host.nr_configured_hkids == 0
    assert tdx.state == TD_STATE_UNINITIALIZED
    assert bool(tdx.vm.vm_bugged) is bugged
    assert run(tdx_td_init(make(host, name="next"), InitVm())) == 0


def test_tdx_td_init_gives_each_td_its_own_keyid(host: KvmHost) -> None:
    tds = [make(host, name=f"TD {number}") for number in range(3)]
    for tdx in tds:
        assert run(tdx_td_init(tdx, InitVm())) == 0
    assert [tdx.hkid for tdx in tds] == [33, 34, 35]
    run(kvm_destroy_vm(tds[1]))
    again = make(host, name="again")
    run(tdx_td_init(again, InitVm()))
    assert again.hkid == 34


# -- vCPUs


def test_tdx_vcpu_create_makes_no_seamcall() -> None:
    td = TdScene(vcpus=0)
    before = td.count()
    assert isinstance(tdx_vcpu_create(td.tdx, 0), TdxVcpu)
    assert td.since(before) == {}


def test_tdx_vcpu_create_refuses_in_order() -> None:
    td = TdScene(vcpus=1)
    assert tdx_vcpu_create(td.tdx, 1024) == -EINVAL
    assert tdx_vcpu_create(td.tdx, 0) == -EEXIST
    td.finalize()
    assert tdx_vcpu_create(td.tdx, 1) == -EIO


def test_tdx_vcpu_create_refuses_more_vcpus_than_the_host_has_lps() -> None:
    td = TdScene(vcpus=4)
    assert td.machine.cpu.count == 4
    assert tdx_vcpu_create(td.tdx, 4) == -EINVAL
    assert len(td.vm.vcpus) == 4


def test_tdx_vcpu_create_refuses_before_the_td_exists(host: KvmHost) -> None:
    assert tdx_vcpu_create(make(host), 0) == -EIO


def test_tdx_vcpu_init_calls_in_order() -> None:
    td = TdScene(vcpus=1)
    names = td.machine.names()
    start = names.index("TDH.VP.CREATE")
    assert names[start:] == [
        "TDH.VP.CREATE",
        *["TDH.VP.ADDCX"] * 5,
        "TDH.VP.INIT",
        *["TDH.VP.WR"] * 3,
    ]
    assert td.vm.vm_bugged == ""


def test_tdx_vcpu_init_refuses_a_second_time_and_a_finalized_td() -> None:
    td = TdScene(vcpus=1)
    assert run(tdx_vcpu_init(td.vcpus[0], 0)) == -EINVAL
    other = tdx_vcpu_create(td.tdx, 1)
    assert isinstance(other, TdxVcpu)
    td.finalize()
    assert run(tdx_vcpu_init(other, 0)) == -EINVAL


@pytest.mark.parametrize(
    ("leaf", "statuses", "kept"),
    [
        (abi.TDH_VP_CREATE, [HARD], 0),
        (abi.TDH_VP_ADDCX, [None, HARD], 2),
        (abi.TDH_VP_INIT, [TDX_OPERAND_BUSY], 6),
    ],
)
def test_tdx_vcpu_init_keeps_only_pages_that_the_module_has(
    leaf: int, statuses: list[int | None], kept: int
) -> None:
    td = TdScene(vcpus=0)
    vcpu = tdx_vcpu_create(td.tdx, 0)
    assert isinstance(vcpu, TdxVcpu)
    before = len(td.host.pages.in_use)
    td.machine.answer(leaf, *statuses)
    assert run(tdx_vcpu_init(vcpu, 0)) == -EIO
    assert td.vm.vm_dead
    assert not vcpu.is_initialised
    assert len(td.host.pages.in_use) == before + kept
    td.destroy()
    assert td.host.pages.in_use == {}


def test_tdx_vcpu_init_refuses_without_memory() -> None:
    td = TdScene(vcpus=0)
    vcpu = tdx_vcpu_create(td.tdx, 0)
    assert isinstance(vcpu, TdxVcpu)
    td.host.pages.regions = ()
    assert run(tdx_vcpu_init(vcpu, 0)) == -ENOMEM
    assert not td.vm.vm_dead


def test_tdx_vcpu_init_goes_on_after_a_failed_write_with_the_vm_dead() -> None:
    td = TdScene(vcpus=0)
    vcpu = tdx_vcpu_create(td.tdx, 0)
    assert isinstance(vcpu, TdxVcpu)
    td.machine.answer(abi.TDH_VP_WR, HARD)
    assert run(tdx_vcpu_init(vcpu, 0)) == 0
    assert "TDH_VP_WR" in td.vm.vm_bugged
