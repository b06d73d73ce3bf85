"""Bringing the TDX module up: once in the life of a host, when KVM is loaded.

    run(tdx_bringup(host))      # 0, or -errno and no TDs on this host

Source: Linux 6.16, arch/x86/virt/vmx/tdx/tdx.c (tdx_cpu_enable, tdx_enable, init_tdx_module),
arch/x86/virt/vmx/tdx/tdx_global_metadata.c, arch/x86/kvm/vmx/tdx.c (tdx_bringup).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from errno import EACCES, EINVAL, EIO, ENODEV, ENOMEM, EOPNOTSUPP
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import VMFAILINVALID
from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SIZE
from tdxlab.kvm.host import (
    TDX_MODULE_ERROR,
    TDX_MODULE_INITIALIZED,
    TDX_MODULE_UNINITIALIZED,
    KvmHost,
    tdx_memory,
)
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.seamcall_args import TDX_SW_ERROR
from tdxlab.kvm.seamcalls import Status, sc_retry
from tdxlab.kvm.tdmr import Tdmr, TdmrLimits, construct_tdmrs
from tdxlab.steps import Step

#: The module may change RBP unless a TD asks it not to. Source: virt/vmx/tdx/tdx.h.
TDX_FEATURES0_NO_RBP_MOD = 1 << 18

#: ATTRIBUTES that KVM supports: no #VE for pages that are not accepted. Source: vmx/tdx.c.
TDX_TD_ATTR_SEPT_VE_DISABLE = 1 << 28
KVM_SUPPORTED_TD_ATTRS = TDX_TD_ATTR_SEPT_VE_DISABLE

_GP, _UD = TDX_SW_ERROR | 13, TDX_SW_ERROR | 6

#: Field ids. Source: tdx_global_metadata.c.
_TDX_FEATURES0 = 0x0A00_0003_0000_0008
_TDMR_FIELDS = (
    0x9100_0001_0000_0008,
    0x9100_0001_0000_0009,
    0x9100_0001_0000_0010,
    0x9100_0001_0000_0011,
    0x9100_0001_0000_0012,
)
_TD_CTRL_FIELDS = (0x9800_0001_0000_0000, 0x9800_0001_0000_0100, 0x9800_0001_0000_0200)
_TD_CONF_FIELDS = (
    0x1900_0003_0000_0000,
    0x1900_0003_0000_0001,
    0x1900_0003_0000_0002,
    0x1900_0003_0000_0003,
    0x9900_0001_0000_0004,
)
_MAX_VCPUS_PER_TD = 0x9900_0001_0000_0008
_CPUID_CONFIG_LEAVES = 0x9900_0003_0000_0400
_CPUID_CONFIG_VALUES = 0x9900_0003_0000_0500


class TdxSysInfo(NamedTuple):
    """struct tdx_sys_info: what the module says of itself.

    tdr_base_size, tdcs_base_size, tdvps_base_size: bytes of a TD's and a vCPU's control structures.
    attributes_*, xfam_*: bits that a TD may set (fixed0) and must set (fixed1). cpuid_config: leaf
    id and two value words of each configurable CPUID leaf.
    """

    tdx_features0: int
    tdmr: TdmrLimits
    tdr_base_size: int
    tdcs_base_size: int
    tdvps_base_size: int
    attributes_fixed0: int
    attributes_fixed1: int
    xfam_fixed0: int
    xfam_fixed1: int
    max_vcpus_per_td: int
    cpuid_config: tuple[tuple[int, int, int], ...]


def seamcall_prerr(
    host: KvmHost, name: str, leaf: int, registers: Registers
) -> Generator[Step, None, int]:
    """A SEAMCALL of the bring-up: 0, or -errno for its status.

    -ENODEV: no module is loaded. -EOPNOTSUPP, -EACCES: no TDX, or VMX is off. -EIO: all else.
    """
    status = yield from sc_retry(host, leaf, registers, (name,))
    known = {0: 0, VMFAILINVALID: -ENODEV, _GP: -EOPNOTSUPP, _UD: -EACCES}
    return known.get(status, -EIO)


def tdx_bringup(host: KvmHost) -> Status:
    """Initialise every LP and then the module. Returns 0 or -errno.

    Source: vmx/tdx.c, __tdx_bringup. Differs: what Linux asks of the CPU (EPT, APICv, MOVDIR64B,
    ...) is there. Linux refuses a module that cannot enumerate a TD's topology (features0 bit 20);
    the modelled module is older and cannot.
    """
    for lp in host.hardware.cpu.lps:
        err = yield from host.on_cpu(lp, tdx_cpu_enable(host))
        if err:
            return int(err)
    err = yield from tdx_enable(host)
    if err:
        return err
    info: TdxSysInfo = host.sysinfo
    if not tdx_get_supported_attrs(info) or not tdx_get_supported_xfam(host):
        return -EINVAL
    return -EINVAL if info.max_vcpus_per_td < host.hardware.cpu.count else 0


def tdx_cpu_enable(host: KvmHost) -> Status:
    """SYS.INIT once for all, and SYS.LP.INIT on the current LP. Returns 0 or -errno.

    Source: tdx.c, tdx_cpu_enable and try_init_module_global.
    """
    lp = host.current_lp
    if lp in host.cpus_initialised:
        return 0
    if not host.cpus_initialised:
        err = yield from seamcall_prerr(host, "TDH.SYS.INIT", abi.TDH_SYS_INIT, Registers())
        if err:
            return err
    err = yield from seamcall_prerr(host, "TDH.SYS.LP.INIT", abi.TDH_SYS_LP_INIT, Registers())
    if not err:
        host.cpus_initialised |= {lp}
    return err


def tdx_enable(host: KvmHost) -> Status:
    """Initialise the module, once; a failure is for ever. Returns 0 or -errno.

    -ENODEV: fewer than two private KeyIDs. -EINVAL: it failed before.
    """
    if not host.guest_keyids:
        return -ENODEV
    if host.module_status == TDX_MODULE_UNINITIALIZED:
        err = yield from init_tdx_module(host)
        host.module_status = TDX_MODULE_ERROR if err else TDX_MODULE_INITIALIZED
        return err
    return 0 if host.module_status == TDX_MODULE_INITIALIZED else -EINVAL


def init_tdx_module(host: KvmHost) -> Status:
    """Read the module's metadata, give it TDMRs, its key on every package, and initialise the
    TDMRs. Returns 0 or -errno.

    Differs: after a failure the PAMTs stay out of use; Linux clears and frees them. WBINVD on all
    LPs before the key is configured does nothing here, caches are not modelled.
    """
    info = yield from get_tdx_sys_info(host)
    if isinstance(info, int):
        return info
    host.sysinfo = info
    if not info.tdx_features0 & TDX_FEATURES0_NO_RBP_MOD:
        return -EINVAL
    tdmrs = construct_tdmrs(
        tdx_memory(host.hardware.platform), info.tdmr, host.pages.alloc_contig_pages
    )
    if isinstance(tdmrs, int):
        return tdmrs
    err = yield from config_tdx_module(host, tdmrs)
    for lp in host.package_lps():
        if not err:
            err = yield from host.smp_call(lp, _config_global_keyid(host))
    for tdmr in tdmrs:
        if not err:
            err = yield from init_tdmr(host, tdmr)
    return int(err)


def _read_sys_metadata_field(host: KvmHost, field: int) -> Generator[Step, None, tuple[int, int]]:
    """(0 or -errno, value). Source: tdx.c, read_sys_metadata_field."""
    registers = Registers(rdx=field)
    err = yield from seamcall_prerr(host, "TDH.SYS.RD", abi.TDH_SYS_RD, registers)
    return err, registers.r8


def _read_fields(
    host: KvmHost, fields: Sequence[int]
) -> Generator[Step, None, tuple[int, list[int]]]:
    """(0 or the first -errno, values); stops where one fails."""
    values: list[int] = []
    for field in fields:
        err, value = yield from _read_sys_metadata_field(host, field)
        if err:
            return err, values
        values.append(value)
    return 0, values


def get_tdx_sys_info(host: KvmHost) -> Generator[Step, None, TdxSysInfo | int]:
    """Everything that the kernel wants to know of the module, or -errno.

    Source: tdx_global_metadata.c, get_tdx_sys_info.
    Differs: the modelled module does not have MAX_VCPUS_PER_TD, and reading it fails; that is taken
    for no limit, and Linux would give up.
    """
    fields = (_TDX_FEATURES0, *_TDMR_FIELDS, *_TD_CTRL_FIELDS, *_TD_CONF_FIELDS)
    err, values = yield from _read_fields(host, fields)
    if err:
        return err
    no_limit, max_vcpus = yield from _read_sys_metadata_field(host, _MAX_VCPUS_PER_TD)
    count = values[-1]
    leaves = range(_CPUID_CONFIG_LEAVES, _CPUID_CONFIG_LEAVES + count)
    words = range(_CPUID_CONFIG_VALUES, _CPUID_CONFIG_VALUES + 2 * count)
    err, cpuid = yield from _read_fields(host, (*leaves, *words))
    if err:
        return err
    return _make_sys_info(values, 0xFFFF if no_limit else max_vcpus, cpuid)


def _make_sys_info(values: Sequence[int], max_vcpus: int, cpuid: Sequence[int]) -> TdxSysInfo:
    """values: in the order in which `get_tdx_sys_info` reads them. cpuid: leaves, then words."""
    features0, max_tdmrs, max_reserved, *entry_sizes = values[:6]
    pamt_4k, pamt_2m, pamt_1g = entry_sizes
    tdr, tdcs, tdvps, attributes0, attributes1, xfam0, xfam1, count = values[6:]
    words = cpuid[count:]
    return TdxSysInfo(
        tdx_features0=features0,
        tdmr=TdmrLimits(max_tdmrs, max_reserved, (pamt_4k, pamt_2m, pamt_1g)),
        tdr_base_size=tdr,
        tdcs_base_size=tdcs,
        tdvps_base_size=tdvps,
        attributes_fixed0=attributes0,
        attributes_fixed1=attributes1,
        xfam_fixed0=xfam0,
        xfam_fixed1=xfam1,
        max_vcpus_per_td=max_vcpus,
        cpuid_config=tuple(zip(cpuid[:count], words[::2], words[1::2], strict=True)),
    )


def config_tdx_module(host: KvmHost, tdmrs: Sequence[Tdmr]) -> Status:
    """SYS.CONFIG: the module learns its TDMRs and its KeyID. Returns 0 or -errno.

    Differs: each TDMR_INFO and the array of pointers get a page of their own.
    """
    pages = [host.pages.alloc_page("TDMR_INFO") for _ in range(len(tdmrs) + 1)]
    try:
        if NO_PAGE in pages:
            return -ENOMEM
        pointers, *infos = pages
        array = b"".join(info.to_bytes(8, "little") for info in infos)
        host.hardware.store(pointers, array.ljust(PAGE_SIZE, b"\0"))
        for info, tdmr in zip(infos, tdmrs, strict=True):
            host.hardware.store(info, tdmr.info.ljust(PAGE_SIZE, b"\0"))
        registers = Registers(rcx=pointers, rdx=len(tdmrs), r8=host.global_keyid)
        return (yield from seamcall_prerr(host, "TDH.SYS.CONFIG", abi.TDH_SYS_CONFIG, registers))
    finally:
        for page in pages:
            if page != NO_PAGE:
                host.pages.free_page(page)


def _config_global_keyid(host: KvmHost) -> Status:
    return seamcall_prerr(host, "TDH.SYS.KEY.CONFIG", abi.TDH_SYS_KEY_CONFIG, Registers())


def init_tdmr(host: KvmHost, tdmr: Tdmr) -> Status:
    """SYS.TDMR.INIT until the module has initialised all of the TDMR. Returns 0 or -errno."""
    done = tdmr.base
    while done < tdmr.end:
        registers = Registers(rcx=tdmr.base)
        err = yield from seamcall_prerr(host, "TDH.SYS.TDMR.INIT", abi.TDH_SYS_TDMR_INIT, registers)
        if err:
            return err
        done = registers.rdx
    return 0


def tdx_get_supported_attrs(info: TdxSysInfo) -> int:
    """ATTRIBUTES that a TD of KVM may have; 0 if the module demands others.

    Source: vmx/tdx.c, tdx_get_supported_attrs.
    """
    if info.attributes_fixed1 & ~KVM_SUPPORTED_TD_ATTRS:
        return 0
    return KVM_SUPPORTED_TD_ATTRS & info.attributes_fixed0


def tdx_get_supported_xfam(host: KvmHost) -> int:
    """XFAM bits that a TD may have: what CPU and module both know; 0 if the module demands others.

    Source: vmx/tdx.c, tdx_get_supported_xfam.
    """
    info: TdxSysInfo = host.sysinfo
    native = host.hardware.platform.native_xfam
    return 0 if info.xfam_fixed1 & ~native else native & info.xfam_fixed0
