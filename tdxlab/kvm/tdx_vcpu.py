"""A TD's vCPUs: created, given their pages, measured memory built by them, the TD finalized.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_vcpu_create, tdx_vcpu_init, tdx_td_vcpu_init).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from errno import EEXIST, EINVAL, EIO, ENOMEM

from tdxlab.kvm.host import Doing
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.seamcall_args import (
    MASK_16,
    MASK_64,
    PIN_BASED_POSTED_INTR,
    PIN_BASED_VM_EXEC_CONTROL,
    POSTED_INTR_DESC_ADDR,
    POSTED_INTR_NV,
    TdxVp,
)
from tdxlab.kvm.seamcalls import Status, tdh_vp_addcx, tdh_vp_create, tdh_vp_init, tdh_vp_wr
from tdxlab.kvm.tdx import (
    TD_STATE_INITIALIZED,
    VCPU_TD_STATE_INITIALIZED,
    Tdx,
    TdxVcpu,
)
from tdxlab.kvm.tdx_associate import tdx_vcpu_load
from tdxlab.steps import Step

#: Vector by which a posted interrupt reaches a vCPU in the guest. Source: asm/irq_vectors.h.
POSTED_INTR_VECTOR = 0xF2

_VCPU_IDS = 1024


def tdx_vcpu_create(tdx: Tdx, vcpu_id: int) -> TdxVcpu | int:
    """KVM_CREATE_VCPU: no SEAMCALL. vcpu_id: 0 to 1023.

    Returns the vCPU, or in order: -EINVAL: no such number, or the TD has as many vCPUs as the host
    has LPs; -EIO: the TD is not initialised, or is finalized already; -EEXIST: it exists.
    Source: kvm_main.c, kvm_vm_ioctl_create_vcpu; tdx.c, tdx_vcpu_create.
    """
    if not 0 <= vcpu_id < _VCPU_IDS or len(tdx.vm.vcpus) >= tdx.max_vcpus:
        return -EINVAL
    if tdx.state != TD_STATE_INITIALIZED:
        return -EIO
    if any(vcpu.vcpu_id == vcpu_id for vcpu in tdx.vm.vcpus):
        return -EEXIST
    vcpu = TdxVcpu(tdx, vcpu_id)
    tdx.vm.vcpus = (*tdx.vm.vcpus, vcpu)
    return vcpu


def is_build_time(tdx: Tdx) -> bool:
    """The ioctls of a vCPU that build a TD are allowed: it has its KeyID and is not finalized.

    Source: tdx.c, tdx_vcpu_ioctl.
    """
    return tdx.is_hkid_assigned and not tdx.is_runnable


def tdx_vcpu_init(vcpu: TdxVcpu, initial_rcx: int) -> Status:
    """KVM_TDX_INIT_VCPU, on the current LP. initial_rcx: what the guest finds in RCX and R8.

    Returns 0; -EINVAL: it was done, or the TD is finalized; -ENOMEM; -EIO with the VM dead.
    Differs: a failing VP.WR ends the VM, and the ioctl still succeeds: as in Linux.
    """
    if not is_build_time(vcpu.tdx):
        return -EINVAL
    yield from tdx_vcpu_load(vcpu)
    if vcpu.is_initialised:
        return -EINVAL
    ret = yield from tdx_td_vcpu_init(vcpu, initial_rcx)
    if ret:
        return ret
    vcpu.pi_desc = vcpu.tdx.alloc_page("posted-interrupt descriptor")
    if vcpu.pi_desc == NO_PAGE:
        return -ENOMEM
    yield from td_vmcs_write(vcpu, POSTED_INTR_NV, POSTED_INTR_VECTOR, MASK_16)
    yield from td_vmcs_write(vcpu, POSTED_INTR_DESC_ADDR, vcpu.pi_desc, MASK_64)
    bit = PIN_BASED_POSTED_INTR
    yield from td_vmcs_write(vcpu, PIN_BASED_VM_EXEC_CONTROL, bit, bit)
    vcpu.tdx_state = VCPU_TD_STATE_INITIALIZED
    return 0


def td_vmcs_write(vcpu: TdxVcpu, field: int, value: int, mask: int) -> Doing:
    """VP.WR of a field; a failure ends the VM. Source: vmx/tdx.h, tdvps_vmcs accessors."""
    status = yield from tdh_vp_wr(vcpu.tdx.host, vcpu.vp, field, value, mask)
    vcpu.tdx.bug_on("TDH_VP_WR", status)


def tdx_td_vcpu_init(vcpu: TdxVcpu, initial_rcx: int) -> Status:
    """Give the module a TDVPR and the TDCX pages, and let it initialise the vCPU.

    Returns 0; -ENOMEM; -EIO with the VM dead. Pages that the module got stay with the vCPU.
    """
    tdx, host = vcpu.tdx, vcpu.tdx.host
    count = tdx.td.tdcx_pages
    pages = [tdx.alloc_page("TDVPR"), *(tdx.alloc_page("TDCX") for _ in range(count))]
    if NO_PAGE in pages:
        _free_pages(tdx, pages)
        return -ENOMEM
    vcpu.vp = TdxVp(pages[0])
    status = yield from tdh_vp_create(host, tdx.td, vcpu.vp)
    if tdx.bug_on("TDH_VP_CREATE", status):
        vcpu.vp = TdxVp()
        _free_pages(tdx, pages)
        return -EIO
    ret = yield from _add_pages(vcpu, pages[1:])
    if ret:
        return ret
    status = yield from tdh_vp_init(host, vcpu.vp, initial_rcx, vcpu.vcpu_id)
    return -EIO if tdx.bug_on("TDH_VP_INIT", status) else 0


def _add_pages(vcpu: TdxVcpu, pages: Sequence[int]) -> Generator[Step, None, int]:
    for number, page in enumerate(pages):
        status = yield from tdh_vp_addcx(vcpu.tdx.host, vcpu.vp, page)
        if vcpu.tdx.bug_on("TDH_VP_ADDCX", status):
            _free_pages(vcpu.tdx, pages[number:])
            return -EIO
        vcpu.vp = vcpu.vp._replace(tdcx=(*vcpu.vp.tdcx, page))
    return 0


def _free_pages(tdx: Tdx, pages: Sequence[int]) -> None:
    for page in pages:
        if page != NO_PAGE:
            tdx.host.pages.free_page(page)
