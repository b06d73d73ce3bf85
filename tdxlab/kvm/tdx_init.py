"""Creating a TD: KVM_TDX_INIT_VM.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_td_init, __tdx_td_init, setup_tdparams).
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EAGAIN, EBUSY, EINVAL, EIO, ENOMEM, ENOSPC
from typing import NamedTuple

from tdxlab.abi.status import TDX_RND_NO_ENTROPY
from tdxlab.abi.structs import (
    CONFIG_FLAGS_GPAW_52,
    EPTP_4_LEVELS,
    EPTP_5_LEVELS,
    TSC_FREQUENCY_1_GHZ,
    XFAM_MINIMUM,
    make_td_params,
)
from tdxlab.arch import GPAW_CHOICES, PAGE_SIZE
from tdxlab.kvm.host import NO_HKID
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.params import gfn_shared_bit
from tdxlab.kvm.seamcall_args import (
    TD_TDCS_EXEC_TSC_MULTIPLIER,
    TD_TDCS_EXEC_TSC_OFFSET,
    TdxTd,
    failure,
    tdx_operand_invalid,
)
from tdxlab.kvm.seamcalls import (
    Status,
    tdh_mng_addcx,
    tdh_mng_create,
    tdh_mng_init,
    tdh_mng_key_config,
    tdh_mng_rd,
)
from tdxlab.kvm.tdx import TD_STATE_INITIALIZED, TD_STATE_UNINITIALIZED, Tdx
from tdxlab.kvm.tdx_module import TdxSysInfo, tdx_get_supported_attrs, tdx_get_supported_xfam
from tdxlab.kvm.tdx_teardown import (
    leak_control_pages,
    tdx_hkid_free,
    tdx_mmu_release_hkid,
    tdx_reclaim_td_control_pages,
)

_CONFIG_FLAGS_NO_RBP_MOD = 1 << 2
_MR_OFFSET = 80
_MR_SIZE = 48


class InitVm(NamedTuple):
    """struct kvm_tdx_init_vm: what user space asks for.

    gpaw: guest physical address width, 48 or 52; Linux has it in CPUID 0x80000008. attributes,
    xfam: TD attributes and extended state. max_vcpus: of the VM. tsc_frequency: in 25 MHz.
    mrconfigid, mrowner, mrownerconfig: 48 bytes each, shorter ones are padded with zeros.
    Differs: the CPUID that the TD is to see is not configured.
    """

    gpaw: int = 48
    attributes: int = 0
    xfam: int = XFAM_MINIMUM
    max_vcpus: int = 4
    tsc_frequency: int = TSC_FREQUENCY_1_GHZ
    mrconfigid: bytes = b""
    mrowner: bytes = b""
    mrownerconfig: bytes = b""


def tdx_td_init(tdx: Tdx, init_vm: InitVm) -> Status:
    """KVM_TDX_INIT_VM: create the TD in the module. Called under kvm->lock.

    Returns 0; -EINVAL: the TD exists, or a value is not allowed; -EBUSY: a vCPU exists; -ENOSPC: no
    KeyID is left; -ENOMEM; -EAGAIN: no entropy; -EIO. After a failure the VM is as before.
    Differs: Linux also hands user space the status with which TDH.MNG.INIT refused.
    """
    if tdx.state != TD_STATE_UNINITIALIZED:
        return -EINVAL
    td_params = setup_tdparams(tdx, init_vm)
    if isinstance(td_params, int):
        return td_params
    params_page = tdx.alloc_page("TD_PARAMS")
    if params_page == NO_PAGE:
        return -ENOMEM
    tdx.host.hardware.store(params_page, td_params.ljust(PAGE_SIZE, b"\0"))
    ret = yield from __tdx_td_init(tdx, params_page)
    tdx.host.pages.free_page(params_page)
    if ret:
        return ret
    tdx.tsc_offset = yield from td_tdcs_exec_read64(tdx, TD_TDCS_EXEC_TSC_OFFSET)
    tdx.tsc_multiplier = yield from td_tdcs_exec_read64(tdx, TD_TDCS_EXEC_TSC_MULTIPLIER)
    tdx.attributes, tdx.xfam = init_vm.attributes, init_vm.xfam
    tdx.vm.gfn_direct_bits = gfn_shared_bit(init_vm.gpaw)
    tdx.state = TD_STATE_INITIALIZED
    return 0


def td_tdcs_exec_read64(tdx: Tdx, field: int) -> Status:
    """A field of the TD; 0 if it cannot be read, and nobody hears of it. Source: tdx.c."""
    status, value = yield from tdh_mng_rd(tdx.host, tdx.td, field)
    return 0 if status else value


def setup_tdparams(tdx: Tdx, init_vm: InitVm) -> bytes | int:
    """The 1024 bytes of TD_PARAMS, or -errno.

    -EBUSY: a vCPU exists. -EINVAL: attributes, XFAM, or a width that KVM does not support.
    Source: tdx.c, setup_tdparams. Differs: the VM's number of EPT levels is chosen before, and must
    fit the width; in Linux the vCPU's CPUID decides both.
    """
    info: TdxSysInfo = tdx.host.sysinfo
    if tdx.vm.vcpus:
        return -EBUSY
    if init_vm.attributes & ~tdx_get_supported_attrs(info):
        return -EINVAL
    if init_vm.xfam & ~tdx_get_supported_xfam(tdx.host):
        return -EINVAL
    levels = 5 if init_vm.gpaw == 52 else 4
    if init_vm.gpaw not in GPAW_CHOICES or levels != tdx.vm.config.root_level:
        return -EINVAL
    raw = make_td_params(
        max_vcpus=init_vm.max_vcpus,
        eptp_controls=EPTP_5_LEVELS if levels == 5 else EPTP_4_LEVELS,
        attributes=init_vm.attributes | info.attributes_fixed1,
        xfam=init_vm.xfam | info.xfam_fixed1,
        config_flags=_CONFIG_FLAGS_NO_RBP_MOD | (CONFIG_FLAGS_GPAW_52 if levels == 5 else 0),
        tsc_frequency=init_vm.tsc_frequency,
    )
    registers = (init_vm.mrconfigid, init_vm.mrowner, init_vm.mrownerconfig)
    if any(len(register) > _MR_SIZE for register in registers):
        return -EINVAL
    measured = b"".join(register.ljust(_MR_SIZE, b"\0") for register in registers)
    return raw[:_MR_OFFSET] + measured + raw[_MR_OFFSET + len(measured) :]


def __tdx_td_init(tdx: Tdx, td_params: int) -> Status:
    """Create the TD with TD_PARAMS at HPA `td_params`. Returns 0 or -errno, then all is undone.

    What the module does not give back stays with the VM, which tries again when it is destroyed;
    if another TD is created before, a TDR is lost.
    Differs: no misc cgroup is charged for the KeyID.
    """
    host = tdx.host
    hkid = host.tdx_guest_keyid_alloc(tdx.vm.name)
    if hkid == NO_HKID:
        return -ENOSPC
    tdx.hkid = hkid
    host.nr_configured_hkids += 1
    info: TdxSysInfo = host.sysinfo
    tdcs_count = info.tdcs_base_size // PAGE_SIZE
    pages = [tdx.alloc_page("TDR"), *(tdx.alloc_page("TDCS") for _ in range(tdcs_count))]
    ret = -ENOMEM if NO_PAGE in pages else (yield from _create(tdx, pages[0]))
    if ret:
        _free_pages(tdx, pages)
        tdx.td = TdxTd()
        tdx_hkid_free(tdx)
        return int(ret)
    ret = yield from _build(tdx, pages[1:], td_params)
    if ret:
        yield from tdx_mmu_release_hkid(tdx)
        yield from tdx_reclaim_td_control_pages(tdx)
    return ret


def _create(tdx: Tdx, tdr: int) -> Status:
    """MNG.CREATE, under the mutex: the leaf wants the module's KeyID table for itself."""
    info: TdxSysInfo = tdx.host.sysinfo
    if tdx.td.tdr:
        leak_control_pages(tdx, "KVM_TDX_INIT_VM was called again")
    tdx.td = TdxTd(tdr, (), info.tdvps_base_size // PAGE_SIZE - 1)
    yield from tdx.host.tdx_lock.lock()
    status = yield from tdh_mng_create(tdx.host, tdx.td, tdx.hkid)
    tdx.host.tdx_lock.unlock()
    if status == TDX_RND_NO_ENTROPY:
        return -EAGAIN
    if status:
        tdx.vm.warn(failure("TDH_MNG_CREATE", status))
        return -EIO
    return 0


def _build(tdx: Tdx, tdcs_pages: Sequence[int], td_params: int) -> Status:
    """Keys, TDCS pages, MNG.INIT. TDCS pages that the module did not get are freed on failure."""
    ret = yield from _config_keys(tdx)
    if ret:
        _free_pages(tdx, tdcs_pages)
        return ret
    for number, page in enumerate(tdcs_pages):
        status = yield from tdh_mng_addcx(tdx.host, tdx.td, page)
        if status:
            _free_pages(tdx, tdcs_pages[number:])
            if status == TDX_RND_NO_ENTROPY:
                return -EAGAIN
            tdx.vm.warn(failure("TDH_MNG_ADDCX", status))
            return -EIO
        tdx.td = tdx.td._replace(tdcs=(*tdx.td.tdcs, page))
    status, rcx = yield from tdh_mng_init(tdx.host, tdx.td, td_params)
    if tdx_operand_invalid(status):
        return -EINVAL
    if status:
        tdx.vm.warn(failure("TDH_MNG_INIT", status, rcx))
        return -EIO
    return 0


def _config_keys(tdx: Tdx) -> Status:
    """MNG.KEY.CONFIG on the first LP of each package; a failure ends the VM."""
    for lp in tdx.host.package_lps():
        status = yield from tdx.host.smp_call(lp, tdh_mng_key_config(tdx.host, tdx.td))
        if tdx.bug_on("TDH_MNG_KEY_CONFIG", status):
            return -EIO
    return 0


def _free_pages(tdx: Tdx, pages: Sequence[int]) -> None:
    for page in pages:
        if page != NO_PAGE:
            tdx.host.pages.free_page(page)
