"""The four hooks of a TD: a change of the mirror EPT becomes SEAMCALLs on the Secure EPT.

    link_external_spt       TDH.MEM.SEPT.ADD
    set_external_spte       TDH.MEM.PAGE.AUG; before the TD is finalized it only counts the page
    remove_external_spte    RANGE.BLOCK, MEM.TRACK and a kick, PAGE.REMOVE, PAGE.WBINVD
    free_external_spt       PHYMEM.PAGE.RECLAIM

Installing runs beside other vCPUs, so a locked operand is no surprise: it is -EBUSY, and the fault
comes again. Removing runs with mmu_lock held for write, and what then still holds an operand can
only be a vCPU inside the guest or on its way in. So a BUSY there is answered once by keeping all
vCPUs out and calling again; a second BUSY is a bug.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c, function names as there.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EBUSY, EINVAL, EIO
from typing import TYPE_CHECKING, TypeVar

from tdxlab.abi.status import OPERAND_ID_RCX, TDX_EPT_ENTRY_STATE_INCORRECT
from tdxlab.arch import EPT_RWX, PAGE_SHIFT
from tdxlab.kvm.external import Hook
from tdxlab.kvm.host import Doing, KvmHost
from tdxlab.kvm.seamcall_args import Answer, failure, pg_level_to_tdx_sept_level, tdx_operand_busy
from tdxlab.kvm.seamcalls import (
    tdh_mem_page_aug,
    tdh_mem_page_remove,
    tdh_mem_range_block,
    tdh_mem_sept_add,
    tdh_mem_track,
    tdh_phymem_page_reclaim,
    tdh_phymem_page_wbinvd_hkid,
)
from tdxlab.kvm.vm import gfn_to_gpa
from tdxlab.steps import Step

if TYPE_CHECKING:
    from tdxlab.kvm.tdx import Tdx

T = TypeVar("T", int, Answer)

_PREMAPPED_ONLY = TDX_EPT_ENTRY_STATE_INCORRECT | OPERAND_ID_RCX


def tdx_sept_link_private_spt(tdx: Tdx, gfn: int, level: int, external_spt: int) -> Hook:
    """Link an empty Secure EPT table. gfn, level: of the entry above it.

    Returns 0, -EBUSY, or -EIO with the VM dead.
    """
    sept_level = pg_level_to_tdx_sept_level(level)
    err, entry, level_state = yield from tdh_mem_sept_add(
        tdx.host, tdx.td, gfn_to_gpa(gfn), sept_level, external_spt
    )
    if tdx_operand_busy(err):
        return -EBUSY
    return -EIO if tdx.bug_on("TDH_MEM_SEPT_ADD", err, entry, level_state) else 0


def tdx_sept_set_private_spte(tdx: Tdx, gfn: int, level: int, pfn: int) -> Hook:
    """Map a page. gfn, level: of the leaf; only 4 KiB is possible.

    The page gets a reference for as long as it is mapped. Returns 0; -EINVAL with the VM dead;
    -EBUSY; -EIO with the VM dead.
    """
    if level != 1:
        tdx.vm.bug(f"a private page at level {level}: only 4 KiB pages are possible")
        return -EINVAL
    tdx.vm.guest_memory.get_page(pfn)
    if not tdx.is_runnable:
        return _tdx_mem_page_record_premap_cnt(tdx)
    err, entry, level_state = yield from tdh_mem_page_aug(
        tdx.host, tdx.td, gfn << PAGE_SHIFT, level - 1, pfn << PAGE_SHIFT
    )
    if not err:
        return 0
    tdx.vm.guest_memory.put_page(pfn)
    if tdx_operand_busy(err):
        return -EBUSY
    tdx.bug_on("TDH_MEM_PAGE_AUG", err, entry, level_state)
    return -EIO


def _tdx_mem_page_record_premap_cnt(tdx: Tdx) -> int:
    """The page is in the mirror; KVM_TDX_INIT_MEM_REGION will add it to the Secure EPT."""
    if tdx.vm.pre_fault_allowed:
        tdx.vm.bug("a page premapped although the TD is finalized")
        return -EINVAL
    tdx.nr_premapped += 1
    return 0


def tdx_sept_remove_private_spte(tdx: Tdx, gfn: int, level: int, pfn: int) -> Hook:
    """Unmap a page, so that it can be used for anything afterwards. mmu_lock is held for write.

    Returns 0; -EINVAL or -EIO with the VM dead. Where it fails the page keeps its reference for
    ever: it is lost.
    """
    if tdx.is_hkid_assigned:
        ret = yield from tdx_sept_zap_private_spte(tdx, gfn, level, pfn)
        if ret > 0:
            yield from tdx_track(tdx)
            ret = yield from tdx_sept_drop_private_spte(tdx, gfn, level, pfn)
    else:
        tdx.vm.bug("a private page is removed without a KeyID")
        ret = -EINVAL
    if ret:
        leak_page(tdx, pfn)
    return ret


def leak_page(tdx: Tdx, pfn: int) -> None:
    """The module still has the page: nobody may use it again."""
    hpa = pfn << PAGE_SHIFT
    if tdx.host.pages.use_of(hpa):
        tdx.host.pages.leak(hpa, tdx.vm.vm_bugged)


def tdx_sept_zap_private_spte(tdx: Tdx, gfn: int, level: int, pfn: int) -> Hook:
    """Block the entry. Returns 1; 0 if it turns out that the page was only premapped; -errno."""
    if level != 1:
        tdx.vm.warn(f"a private page at level {level} is zapped: only 4 KiB pages are possible")
    host, td, gpa, sept_level = tdx.host, tdx.td, gfn << PAGE_SHIFT, level - 1
    err, entry, level_state = yield from tdh_mem_range_block(host, td, gpa, sept_level)
    if not err:
        return 1
    if tdx_operand_busy(err):
        again = tdh_mem_range_block(host, td, gpa, sept_level)
        err, entry, level_state = yield from retry_without_vcpus(tdx, again)
    if err and _is_sept_zap_err_due_to_premap(tdx, err, entry):
        if not tdx.nr_premapped:
            tdx.vm.bug("a page is zapped that was neither added nor premapped")
            return -EIO
        tdx.nr_premapped -= 1
        tdx.vm.guest_memory.put_page(pfn)
        return 0
    if err:
        tdx.bug_on("TDH_MEM_RANGE_BLOCK", err, entry, level_state)
        return -EIO
    return 1


def _is_sept_zap_err_due_to_premap(tdx: Tdx, err: int, entry: int) -> bool:
    """The TD is being built, and the module has no page there: the mirror was ahead of it.

    Source: tdx.c, tdx_is_sept_zap_err_due_to_premap.
    """
    return not tdx.is_runnable and err == _PREMAPPED_ONLY and not entry & EPT_RWX


def tdx_track(tdx: Tdx) -> Doing:
    """Start a new TLB epoch and take every vCPU out of the old one. Nothing to do before the TD can
    run. mmu_lock is held for write.
    """
    if not tdx.is_runnable:
        return
    status = yield from tdh_mem_track(tdx.host, tdx.td)
    if status and tdx_operand_busy(status):
        status = yield from retry_without_vcpus(tdx, tdh_mem_track(tdx.host, tdx.td))
    if status:
        tdx.bug_on("TDH_MEM_TRACK", status)
    yield from tdx.host.kick_all(tdx.vm, "OUTSIDE_GUEST_MODE")


def tdx_sept_drop_private_spte(tdx: Tdx, gfn: int, level: int, pfn: int) -> Hook:
    """Take the page out of the TD, write its lines back, clear it, drop its reference.

    Returns 0; -EINVAL or -EIO with the VM dead.
    """
    if level != 1:
        tdx.vm.bug(f"a private page at level {level} is removed: only 4 KiB pages are possible")
        return -EINVAL
    host, td, gpa, sept_level = tdx.host, tdx.td, gfn << PAGE_SHIFT, level - 1
    err, entry, level_state = yield from tdh_mem_page_remove(host, td, gpa, sept_level)
    if err and tdx_operand_busy(err):
        again = tdh_mem_page_remove(host, td, gpa, sept_level)
        err, entry, level_state = yield from retry_without_vcpus(tdx, again)
    if err:
        tdx.bug_on("TDH_MEM_PAGE_REMOVE", err, entry, level_state)
        return -EIO
    hpa = pfn << PAGE_SHIFT
    status = yield from tdh_phymem_page_wbinvd_hkid(host, tdx.hkid, hpa)
    if status:
        tdx.bug_on("TDH_PHYMEM_PAGE_WBINVD", status)
        return -EIO
    tdx_clear_page(host, hpa)
    tdx.vm.guest_memory.put_page(pfn)
    return 0


def tdx_sept_free_private_spt(tdx: Tdx, gfn: int, level: int, external_spt: int) -> Hook:
    """Take back the page of a table. Only possible once the TD has no KeyID any more.

    Returns 0; -EINVAL with the VM dead; -EIO.
    """
    if tdx.is_hkid_assigned:
        tdx.vm.bug("a Secure EPT table is freed while the TD has its KeyID")
        return -EINVAL
    return (yield from tdx_reclaim_page(tdx, external_spt))


def tdx_reclaim_page(tdx: Tdx, hpa: int) -> Hook:
    """Take a page back from the module and clear it. Returns 0, or -EIO: then it is lost.

    Source: tdx.c, tdx_reclaim_page and __tdx_reclaim_page.
    """
    answer = yield from tdh_phymem_page_reclaim(tdx.host, hpa)
    if answer.status:
        tdx.vm.warn(failure("TDH_PHYMEM_PAGE_RECLAIM", *answer))
        return -EIO
    tdx_clear_page(tdx.host, hpa)
    return 0


def tdx_clear_page(host: KvmHost, hpa: int) -> None:
    """64 MOVDIR64B of zeros and a fence: whole lines, so that no old KeyID's integrity matters.

    Source: tdx.c, tdx_clear_page.
    """
    host.hardware.clear(hpa)


def retry_without_vcpus(tdx: Tdx, call: Generator[Step, None, T]) -> Generator[Step, None, T]:
    """An operand was busy: keep all vCPUs out, and make the same call once more.

    Source: tdx.c, tdx_no_vcpus_enter_start and tdx_no_vcpus_enter_stop, and their callers.
    """
    tdx.wait_for_sept_zap = True
    yield from tdx.host.kick_all(tdx.vm, "OUTSIDE_GUEST_MODE")
    answer = yield from call
    tdx.wait_for_sept_zap = False
    return answer
