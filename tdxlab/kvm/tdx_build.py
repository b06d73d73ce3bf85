"""Building a TD's first memory, and closing its measurement.

Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c (tdx_vcpu_init_mem_region, tdx_gmem_post_populate,
tdx_td_finalize).
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EBUSY, EFAULT, EINTR, EINVAL, EIO
from functools import partial
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.bits import MASK64
from tdxlab.kvm.fault import kvm_tdp_map_page
from tdxlab.kvm.gmem import GuestMemfds
from tdxlab.kvm.page_fault import PFERR_GUEST_FINAL_MASK, PFERR_PRIVATE_ACCESS
from tdxlab.kvm.roots import kvm_mmu_reload
from tdxlab.kvm.seamcall_args import failure, tdx_operand_busy
from tdxlab.kvm.seamcalls import Status, tdh_mem_page_add, tdh_mr_extend, tdh_mr_finalize
from tdxlab.kvm.tdx import TD_STATE_RUNNABLE, Tdx, TdxVcpu
from tdxlab.kvm.tdx_associate import tdx_vcpu_load
from tdxlab.kvm.tdx_vcpu import is_build_time
from tdxlab.kvm.vm import Vm, gfn_to_gpa
from tdxlab.steps import Step

#: Flag of KVM_TDX_INIT_MEM_REGION: the content is measured.
KVM_TDX_MEASURE_MEMORY_REGION = 1 << 0

#: Bytes that one TDH.MR.EXTEND measures. Source: asm/tdx.h.
TDX_EXTENDMR_CHUNKSIZE = 256


class MemRegion(NamedTuple):
    """struct kvm_tdx_init_mem_region: what is still to be added.

    source_addr: HVA of the content. gpa: where it goes. nr_pages: of 4 KiB.
    """

    source_addr: int
    gpa: int
    nr_pages: int

    @property
    def end(self) -> int:
        """First GPA behind it."""
        return self.gpa + (self.nr_pages << PAGE_SHIFT)

    @property
    def rest(self) -> MemRegion:
        """The region without its first page."""
        return MemRegion(self.source_addr + PAGE_SIZE, self.gpa + PAGE_SIZE, self.nr_pages - 1)


def tdx_vcpu_init_mem_region(
    vcpu: TdxVcpu, region: MemRegion, flags: int = KVM_TDX_MEASURE_MEMORY_REGION
) -> Generator[Step, None, tuple[int, MemRegion]]:
    """KVM_TDX_INIT_MEM_REGION, on the current LP: copy pages of user space into the TD.

    Returns (0 or -errno, what is left). -EINVAL: the vCPU is not initialised, or the TD finalized,
    or flags, or a region that is empty, not aligned, or not private; -EINTR: a signal; -EBUSY or
    -EIO: the module refused the page, which then stays premapped; else what populating guest_memfd
    or the fault returns: -EEXIST for a page that was there already. Takes slots_lock.
    Whether the MMU's roots could be loaded is not asked, as in Linux 6.16: without memory for them
    the first page raises HostBug.
    """
    tdx = vcpu.tdx
    if not is_build_time(tdx):
        return -EINVAL, region
    yield from tdx_vcpu_load(vcpu)
    if not vcpu.is_initialised:
        return -EINVAL, region
    yield from tdx.vm.slots_lock.lock()
    try:
        if tdx.is_runnable or not _is_valid(tdx.vm, region, flags):
            return -EINVAL, region
        yield from kvm_mmu_reload(vcpu)
        return (yield from _add_pages(vcpu, region, flags))
    finally:
        tdx.vm.slots_lock.unlock()


def _is_valid(vm: Vm, region: MemRegion, flags: int) -> bool:
    return (
        not flags & ~KVM_TDX_MEASURE_MEMORY_REGION
        and not (region.source_addr | region.gpa) % PAGE_SIZE
        and region.nr_pages > 0
        and region.end <= MASK64
        and is_private_gpa(vm, region.gpa)
        and is_private_gpa(vm, region.end - 1)
    )


def is_private_gpa(vm: Vm, gpa: int) -> bool:
    """The SHARED bit is clear. Source: vmx/common.h, vt_is_tdx_private_gpa."""
    return not gpa >> PAGE_SHIFT & vm.gfn_direct_bits


def _add_pages(
    vcpu: TdxVcpu, region: MemRegion, flags: int
) -> Generator[Step, None, tuple[int, MemRegion]]:
    guest_memory = vcpu.vm.guest_memory
    assert isinstance(guest_memory, GuestMemfds)
    while region.nr_pages:
        if vcpu.signal_pending:
            return -EINTR, region
        fill = partial(tdx_gmem_post_populate, vcpu, region.source_addr, flags)
        done = yield from guest_memory.populate(region.gpa >> PAGE_SHIFT, 1, fill)
        if done != 1:
            return (done if done < 0 else -EIO), region
        region = region.rest
    return 0, region


def tdx_gmem_post_populate(
    vcpu: TdxVcpu, source: int, flags: int, gfn: int, pfn: int, number: int
) -> Status:
    """One page: map it in the mirror, add it to the TD with the content at HVA `source`, measure.

    number: of the page in the range that is populated.

    Returns 0 or -errno: -EFAULT without a page at `source`; what `kvm_tdp_map_page` returns;
    -EBUSY; -EIO. Source: tdx.c.
    """
    tdx, gpa = vcpu.tdx, gfn_to_gpa(gfn)
    source_page = vcpu.vm.user_memory.fault_in(source, write=False)
    if source_page is None:
        return -EFAULT
    error_code = PFERR_GUEST_FINAL_MASK | PFERR_PRIVATE_ACCESS
    ret, _ = yield from kvm_tdp_map_page(vcpu, gpa, error_code)
    if ret < 0:
        return ret
    err, entry, level_state = yield from tdh_mem_page_add(
        tdx.host, tdx.td, gpa, pfn << PAGE_SHIFT, source_page.pfn << PAGE_SHIFT
    )
    if err:
        tdx.vm.emit("pr_err", failure("TDH_MEM_PAGE_ADD", err, entry, level_state))
        return -EBUSY if tdx_operand_busy(err) else -EIO
    if tdx.nr_premapped:
        tdx.nr_premapped -= 1
    else:
        tdx.vm.bug("a page was added that was not premapped")
    if flags & KVM_TDX_MEASURE_MEMORY_REGION:
        return (yield from _extend(tdx, gpa))
    return 0


def _extend(tdx: Tdx, gpa: int) -> Status:
    for chunk in range(gpa, gpa + PAGE_SIZE, TDX_EXTENDMR_CHUNKSIZE):
        err, _, _ = yield from tdh_mr_extend(tdx.host, tdx.td, chunk)
        if err:
            return -EIO
    return 0


def tdx_td_finalize(tdx: Tdx) -> Status:
    """KVM_TDX_FINALIZE_VM: close the measurement; from now on the TD can run. Takes slots_lock.

    Returns 0; -EINVAL: no KeyID, done already, or pages are premapped and not added; -EBUSY; -EIO
    with the VM dead.
    """
    yield from tdx.vm.slots_lock.lock()
    try:
        if not is_build_time(tdx) or tdx.nr_premapped:
            return -EINVAL
        status = yield from tdh_mr_finalize(tdx.host, tdx.td)
        if tdx_operand_busy(status):
            return -EBUSY
        if tdx.bug_on("TDH_MR_FINALIZE", status):
            return -EIO
        tdx.state = TD_STATE_RUNNABLE
        yield ("smp_wmb",)
        tdx.vm.pre_fault_allowed = True
    finally:
        tdx.vm.slots_lock.unlock()
    return 0
