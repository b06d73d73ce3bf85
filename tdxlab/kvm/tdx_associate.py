"""On which LP a TD's vCPU is: association and flush.

A vCPU is associated with an LP while that may hold what the module or the CPU cached of it. Before
another LP may use it, TDH.VP.FLUSH has to run on the old one.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_vcpu_load, tdx_flush_vp, tdx_disassociate_vp).
"""

from __future__ import annotations

from tdxlab.abi.status import TDX_VCPU_NOT_ASSOCIATED
from tdxlab.kvm.host import Doing
from tdxlab.kvm.seamcalls import Status, tdh_vp_flush
from tdxlab.kvm.tdx import TdxVcpu


def tdx_vcpu_load(vcpu: TdxVcpu) -> Doing:
    """The vCPU's thread now runs on the current LP.

    Nothing to do on the same LP, or once the TD has no KeyID. Source: tdx.c, tdx_vcpu_load;
    x86.c, kvm_arch_vcpu_load.
    """
    host = vcpu.tdx.host
    if vcpu.cpu == host.current_lp:
        return
    if vcpu.tdx.is_hkid_assigned:
        yield from tdx_flush_vp_on_cpu(vcpu)
        here = host.associated.get(host.current_lp, ())
        host.associated.put(host.current_lp, (*here, name_of(vcpu)))
    vcpu.cpu = host.current_lp


def name_of(vcpu: TdxVcpu) -> tuple[int, int]:
    """How the list of an LP's vCPUs names this one: HPA of the TDR, and number."""
    return vcpu.tdx.td.tdr, vcpu.vcpu_id


def tdx_flush_vp_on_cpu(vcpu: TdxVcpu) -> Doing:
    """Flush the vCPU on the LP where it was loaded last; a failure ends the VM. Source: tdx.c."""
    if vcpu.cpu == -1:
        return
    status = yield from vcpu.tdx.host.smp_call(vcpu.cpu, tdx_flush_vp(vcpu))
    vcpu.tdx.bug_on("TDH_VP_FLUSH", status)


def tdx_flush_vp(vcpu: TdxVcpu) -> Status:
    """In the interrupt handler of the vCPU's LP: VP.FLUSH if the module knows the vCPU, and off the
    LP's list. Returns the status of a failure, else 0. Source: tdx.c.
    """
    status = 0
    if vcpu.is_initialised:
        status = yield from tdh_vp_flush(vcpu.tdx.host, vcpu.vp)
    tdx_disassociate_vp(vcpu)
    return 0 if status == TDX_VCPU_NOT_ASSOCIATED else status


def tdx_disassociate_vp(vcpu: TdxVcpu) -> None:
    """Off the list of its LP. Source: tdx.c."""
    associated = vcpu.tdx.host.associated
    rest = tuple(name for name in associated.get(vcpu.cpu, ()) if name != name_of(vcpu))
    associated.put(vcpu.cpu, rest)
    vcpu.cpu = -1
