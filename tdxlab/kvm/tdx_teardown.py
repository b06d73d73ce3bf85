"""Taking a TD apart: give its KeyID back, then reclaim every page, and lose what cannot be
reclaimed.

    1  guest_memfd files are released: every private page is removed   (before, with the KeyID)
    2  tdx_mmu_release_hkid: VP.FLUSH, MNG.VPFLUSHDONE, CACHE.WB on each package, KEY.FREEID
    3  MMU notifier: direct mappings go
    4  vCPUs: RECLAIM their TDCX pages and TDVPR
    5  roots are zapped: RECLAIM every Secure EPT page
    6  RECLAIM TDCS pages and the TDR; the TDR is written back under the global KeyID and freed

A page that the module keeps is never freed: it is listed in `host.pages.leaked`.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c; virt/kvm/kvm_main.c, kvm_destroy_vm;
arch/x86/kvm/x86.c, kvm_arch_destroy_vm.
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.abi.status import (
    TDX_FLUSHVP_NOT_DONE,
    TDX_INTERRUPTED_RESUMABLE,
    TDX_NO_HKID_READY_TO_WBCACHE,
)
from tdxlab.kvm.host import NO_HKID, Doing
from tdxlab.kvm.roots import kvm_mmu_destroy, kvm_mmu_unload
from tdxlab.kvm.seamcall_args import TdxTd, TdxVp, failure
from tdxlab.kvm.seamcalls import (
    Status,
    tdh_mng_key_freeid,
    tdh_mng_vpflushdone,
    tdh_phymem_cache_wb,
    tdh_phymem_page_reclaim,
    tdh_phymem_page_wbinvd_tdr,
)
from tdxlab.kvm.tdx import TD_STATE_UNINITIALIZED, VCPU_TD_STATE_UNINITIALIZED, Tdx, TdxVcpu
from tdxlab.kvm.tdx_associate import tdx_flush_vp_on_cpu
from tdxlab.kvm.tdx_hooks import tdx_clear_page, tdx_reclaim_page
from tdxlab.kvm.zap import kvm_flush_shadow_all, kvm_mmu_uninit_tdp_mmu
from tdxlab.steps import Step

#: How often an interrupted CACHE.WB is resumed. Source: vmx/tdx.c, TDX_SEAMCALL_RETRIES.
TDX_SEAMCALL_RETRIES = 10000

#: Why pages of a TD are lost that has kept its KeyID.
KEYID_KEPT = "the TD's KeyID could not be given back"


def kvm_destroy_vm(tdx: Tdx) -> Doing:
    """The last reference to the VM is gone; its guest_memfd files were released before.

    Source: kvm_main.c, kvm_destroy_vm. Differs: only what concerns memory.
    """
    yield from tdx_mmu_release_hkid(tdx)
    yield from kvm_flush_shadow_all(tdx.vm)
    for vcpu in tdx.vcpus:
        kvm_mmu_unload(vcpu)
        yield from tdx_vcpu_free(vcpu)
        kvm_mmu_destroy(vcpu)
    tdx.vm.vcpus = ()
    yield from kvm_mmu_uninit_tdp_mmu(tdx.vm)
    yield from tdx_vm_destroy(tdx)
    tdx.vm.rcu_barrier()


def tdx_mmu_release_hkid(tdx: Tdx) -> Doing:
    """Give the KeyID back: flush the vCPUs, write all caches back. Nothing to do without one.

    Where the module refuses, the KeyID is lost, and with it every page of the TD: without a word if
    a vCPU is still associated, else the VM is dead. Source: tdx.c.
    """
    if not tdx.is_hkid_assigned:
        return
    host = tdx.host
    for vcpu in tdx.vcpus:
        yield from tdx_flush_vp_on_cpu(vcpu)
    yield from host.tdx_lock.lock()
    status = yield from tdh_mng_vpflushdone(host, tdx.td)
    if status != TDX_FLUSHVP_NOT_DONE and not tdx.bug_on("TDH_MNG_VPFLUSHDONE", status):
        for lp in host.package_lps():
            yield from host.smp_call(lp, smp_func_do_phymem_cache_wb(tdx))
        status = yield from tdh_mng_key_freeid(host, tdx.td)
        if not tdx.bug_on("TDH_MNG_KEY_FREEID", status):
            tdx_hkid_free(tdx)
    host.tdx_lock.unlock()


def smp_func_do_phymem_cache_wb(tdx: Tdx) -> Doing:
    """Write back the caches of the current LP's package, again while an interrupt stops it.

    Source: tdx.c. Differs: the packages do it one after the other, in Linux side by side.
    """
    left = TDX_SEAMCALL_RETRIES
    status = yield from tdh_phymem_cache_wb(tdx.host, resume=False)
    while status == TDX_INTERRUPTED_RESUMABLE and left > 1:
        left -= 1
        status = yield from tdh_phymem_cache_wb(tdx.host, resume=True)
    if status not in (0, TDX_NO_HKID_READY_TO_WBCACHE):
        tdx.vm.warn(failure("TDH_PHYMEM_CACHE_WB", status))


def tdx_hkid_free(tdx: Tdx) -> None:
    """The KeyID is no longer the TD's. Source: tdx.c."""
    tdx.host.tdx_guest_keyid_free(tdx.hkid)
    tdx.hkid = NO_HKID
    tdx.host.nr_configured_hkids -= 1


def tdx_vcpu_free(vcpu: TdxVcpu) -> Doing:
    """Reclaim a vCPU's pages. With the KeyID still assigned they are lost.

    Source: tdx.c, tdx_vcpu_free.
    """
    tdx = vcpu.tdx
    for hpa in (*vcpu.vp.tdcx, *([vcpu.vp.tdvpr] if vcpu.vp.tdvpr else [])):
        yield from _reclaim_or_leak(tdx, hpa)
    vcpu.vp = TdxVp()
    vcpu.tdx_state = VCPU_TD_STATE_UNINITIALIZED
    _free_pi_desc(vcpu)


def _free_pi_desc(vcpu: TdxVcpu) -> None:
    if vcpu.pi_desc > 0:
        vcpu.tdx.host.pages.free_page(vcpu.pi_desc)
        vcpu.pi_desc = -1


def tdx_vm_destroy(tdx: Tdx) -> Doing:
    """Reclaim the control pages; nobody will try again with those that are left: they are lost.

    Source: tdx.c, tdx_vm_destroy.
    """
    why = yield from tdx_reclaim_td_control_pages(tdx)
    if why:
        leak_control_pages(tdx, why)
    tdx.state = TD_STATE_UNINITIALIZED


def leak_control_pages(tdx: Tdx, why: str) -> None:
    """KVM forgets the TDCS pages and the TDR that it has. why: the failure that kept them."""
    for hpa in (*tdx.td.tdcs, *([tdx.td.tdr] if tdx.td.tdr else [])):
        tdx.host.pages.leak(hpa, why)
    tdx.td = TdxTd()


def tdx_reclaim_td_control_pages(tdx: Tdx) -> Generator[Step, None, str]:
    """Reclaim the TDCS pages and then the TDR. Returns "", or why KVM still has some: all of them
    where the KeyID is still assigned, or the TDR alone.

    Source: tdx.c, tdx_reclaim_td_control_pages.
    """
    host, tdr = tdx.host, tdx.td.tdr
    if tdx.is_hkid_assigned:
        return KEYID_KEPT
    for hpa in tdx.td.tdcs:
        yield from _reclaim_or_leak(tdx, hpa)
    tdx.td = tdx.td._replace(tdcs=())
    if not tdr:
        return ""
    answer = yield from tdh_phymem_page_reclaim(host, tdr)
    if answer.status:
        tdx.vm.warn(failure("TDH_PHYMEM_PAGE_RECLAIM", *answer))
        return failure("TDH_PHYMEM_PAGE_RECLAIM", answer.status)
    status = yield from tdh_phymem_page_wbinvd_tdr(host, tdx.td)
    if tdx.bug_on("TDH_PHYMEM_PAGE_WBINVD", status):
        return failure("TDH_PHYMEM_PAGE_WBINVD", status)
    tdx_clear_page(host, tdr)
    host.pages.free_page(tdr)
    tdx.td = TdxTd()
    return ""


def _reclaim_or_leak(tdx: Tdx, hpa: int) -> Status:
    """Reclaim a control page and free it; if that fails it is lost.

    Source: tdx.c, tdx_reclaim_control_page. Returns 0 or -EIO.
    """
    pages = tdx.host.pages
    if tdx.is_hkid_assigned:
        pages.leak(hpa, KEYID_KEPT)
        return 0
    ret = yield from tdx_reclaim_page(tdx, hpa)
    if ret:
        pages.leak(hpa, "TDH_PHYMEM_PAGE_RECLAIM failed")
    else:
        pages.free_page(hpa)
    return ret
