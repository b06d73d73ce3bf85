"""KVM_TDX_CAPABILITIES and KVM_TDX_GET_CPUID."""

from errno import E2BIG, EINVAL, EIO

import pytest
from td_scene import TdScene, boot

from tdxlab.kvm.tdx_cpuid import (
    Capabilities,
    CpuidEntry,
    tdx_get_capabilities,
    tdx_read_cpuid,
    tdx_vcpu_get_cpuid,
)
from tdxlab.steps import run


def test_capabilities_say_what_host_and_module_know() -> None:
    host = boot()
    result = tdx_get_capabilities(host, 12)
    assert isinstance(result, Capabilities)
    assert (result.supported_attrs, result.user_tdvmcallinfo_1_r11) == (1 << 28, 2)
    assert result.supported_xfam & 3 == 3
    assert result.cpuid_config == host.sysinfo.cpuid_config


def test_capabilities_refuse_flags_and_too_little_room() -> None:
    host = boot()
    assert tdx_get_capabilities(host, 12, flags=1) == -EINVAL
    assert tdx_get_capabilities(host, 11) == -E2BIG


@pytest.mark.parametrize("gpaw", [48, 52])
def test_get_cpuid_costs_two_reads_per_value_and_one_per_failure(gpaw: int) -> None:
    td = TdScene(gpaw=gpaw)
    before, refused = td.count(), td.machine.trace.refusals().get(11, 0)
    entries = run(tdx_vcpu_get_cpuid(td.vcpus[0]))
    assert isinstance(entries, list)
    failed = td.machine.trace.refusals()[11] - refused
    assert entries
    assert td.since(before) == {"TDH.MNG.RD": 2 * len(entries) + failed}
    [width] = [entry.eax >> 16 & 0xFF for entry in entries if entry.function == 0x8000_0008]
    assert width == gpaw


def test_get_cpuid_numbers_the_sub_leaves() -> None:
    entries = run(tdx_vcpu_get_cpuid(TdScene().vcpus[0]))
    fours = [entry.sub_leaf for entry in entries if entry.function == 4]
    assert fours == list(range(len(fours)))
    assert len(fours) > 1
    assert [entry.sub_leaf for entry in entries if entry.function == 1] == [None]


def test_get_cpuid_refuses_a_finalized_td() -> None:
    td = TdScene()
    td.finalize()
    assert run(tdx_vcpu_get_cpuid(td.vcpus[0])) == -EINVAL


def test_read_cpuid_refuses_a_leaf_without_a_field_and_one_that_is_not_there() -> None:
    td = TdScene()
    assert run(tdx_read_cpuid(td.tdx, 0x100, None)) == -EINVAL
    assert run(tdx_read_cpuid(td.tdx, 4, 0x80)) == -EINVAL
    assert run(tdx_read_cpuid(td.tdx, 0x1E, 3)) == -EIO
    assert isinstance(run(tdx_read_cpuid(td.tdx, 1, None)), CpuidEntry)
