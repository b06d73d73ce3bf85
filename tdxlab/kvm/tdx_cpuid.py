"""What KVM tells user space of the CPU that a TD can have and has: KVM_TDX_CAPABILITIES,
KVM_TDX_GET_CPUID.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_get_capabilities, tdx_vcpu_get_cpuid,
tdx_vcpu_get_cpuid_leaf, tdx_read_cpuid).
"""

from __future__ import annotations

from collections.abc import Generator
from errno import E2BIG, EINVAL, EIO
from typing import NamedTuple

from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.seamcalls import tdh_mng_rd
from tdxlab.kvm.tdx import Tdx, TdxVcpu
from tdxlab.kvm.tdx_module import TdxSysInfo, tdx_get_supported_attrs, tdx_get_supported_xfam
from tdxlab.kvm.tdx_vcpu import is_build_time
from tdxlab.steps import Step

#: Field id of the first CPUID value of a TD. Source: vmx/tdx.c, TD_MD_FIELD_ID_CPUID_VALUES.
TD_MD_FIELD_ID_CPUID_VALUES = 0x9410_0003_0000_0000

#: "This leaf has no sub-leaves", in the field id.
#: Differs: Linux sets the bits of the sub-leaf, 7:1, as well; the modelled module has them 0.
_NO_SUBLEAF = 1 << 8
_MAX_SUBLEAF = 0x7F
_LAST_LEAF = 0x1F
_FIRST_EXTENDED, _LAST_EXTENDED = 0x8000_0000, 0x8000_0008
_GUEST_PHYS_BITS = 0x8000_0008

Entries = list["CpuidEntry"]


class CpuidEntry(NamedTuple):
    """struct kvm_cpuid_entry2. sub_leaf: None for a leaf without any (`index` in Linux)."""

    function: int
    sub_leaf: int | None
    eax: int
    ebx: int
    ecx: int
    edx: int


class Capabilities(NamedTuple):
    """struct kvm_tdx_capabilities. user_tdvmcallinfo_1_r11: which requests user space may serve.
    cpuid_config: leaf id and value words of each CPUID leaf that can be configured.
    """

    supported_attrs: int
    supported_xfam: int
    user_tdvmcallinfo_1_r11: int
    cpuid_config: tuple[tuple[int, int, int], ...]


def tdx_get_capabilities(host: KvmHost, nent: int, flags: int = 0) -> Capabilities | int:
    """KVM_TDX_CAPABILITIES: no SEAMCALL. nent: CPUID entries that the caller has room for.

    Returns -EINVAL for flags, -E2BIG for too little room.
    Differs: the CPUID values are the module's; Linux takes TSX and WAITPKG out and adds the width
    of guest addresses.
    """
    info: TdxSysInfo = host.sysinfo
    if flags:
        return -EINVAL
    if nent < len(info.cpuid_config):
        return -E2BIG
    return Capabilities(
        tdx_get_supported_attrs(info), tdx_get_supported_xfam(host), 1 << 1, info.cpuid_config
    )


def tdx_vcpu_get_cpuid(vcpu: TdxVcpu) -> Generator[Step, None, Entries | int]:
    """KVM_TDX_GET_CPUID: every CPUID leaf that the module shows for the TD.

    Two MNG.RD for each value, one for each that is not there. Returns -EINVAL for a TD that is
    finalized or not created.
    """
    if not is_build_time(vcpu.tdx):
        return -EINVAL
    entries: Entries = []
    for leaf in (*range(_LAST_LEAF + 1), *range(_FIRST_EXTENDED, _LAST_EXTENDED + 1)):
        entries += yield from tdx_vcpu_get_cpuid_leaf(vcpu.tdx, leaf)
    return entries


def tdx_vcpu_get_cpuid_leaf(tdx: Tdx, leaf: int) -> Generator[Step, None, Entries]:
    """One leaf: without a sub-leaf, or else sub-leaves from 0 on until one is not there."""
    found = yield from tdx_read_cpuid(tdx, leaf, None)
    if not isinstance(found, int):
        return [found]
    entries: Entries = []
    while not isinstance(found := (yield from tdx_read_cpuid(tdx, leaf, len(entries))), int):
        entries.append(found)
    return entries


def tdx_read_cpuid(
    tdx: Tdx, leaf: int, sub_leaf: int | None
) -> Generator[Step, None, CpuidEntry | int]:
    """One CPUID value of the TD; -EINVAL for a leaf that no field id has, -EIO if it is not there.

    The width of guest addresses is KVM's own knowledge: older modules do not show it.
    """
    if leaf & ~0x8000_007F or (sub_leaf or 0) > _MAX_SUBLEAF:
        return -EINVAL
    field = TD_MD_FIELD_ID_CPUID_VALUES | leaf >> 31 << 16 | (leaf & 0x7F) << 9
    field |= _NO_SUBLEAF if sub_leaf is None else sub_leaf << 1
    status, low = yield from tdh_mng_rd(tdx.host, tdx.td, field)
    if status:
        return -EIO
    status, high = yield from tdh_mng_rd(tdx.host, tdx.td, field + 1)
    if status:
        return -EIO
    half = (1 << 32) - 1
    eax = low & half
    if leaf == _GUEST_PHYS_BITS:
        width = tdx.vm.gfn_direct_bits.bit_length() + 12
        eax = eax & ~(0xFF << 16) | width << 16
    return CpuidEntry(leaf, sub_leaf, eax, low >> 32, high & half, high >> 32)
