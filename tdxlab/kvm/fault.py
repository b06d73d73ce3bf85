"""The way of a page fault: from the error code of an exit to the TDP MMU, and back as RET_PF_*.

    kvm_mmu_page_fault          sorts out MMIO, keeps statistics
      kvm_mmu_do_page_fault       strips the shared bit, finds the memslot
        kvm_tdp_mmu_page_fault
          fast_page_fault           no lock, no allocation
          mmu_topup_memory_caches
          kvm_mmu_faultin_pfn       whose page is it, and is it to be had?
          kvm_tdp_mmu_map           mmu_lock held for read

No lock is held while the pfn is looked up, so what is found may be out of date when it is to be
mapped. The sequence number taken first tells: any invalidation meanwhile, also one that a change of
attributes makes, means a retry.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c and mmu_internal.h.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import EFAULT, EINTR, EINVAL, EIO, ENOENT, EOPNOTSUPP

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from tdxlab.kvm.caches import mmu_topup_memory_caches
from tdxlab.kvm.fast_fault import fast_page_fault, page_fault_can_be_fast
from tdxlab.kvm.locks import LOCKING, READ
from tdxlab.kvm.mmio_fault import handle_mmio_page_fault, vcpu_cache_mmio_info
from tdxlab.kvm.notifier import mmu_invalidate_retry_gfn, mmu_invalidate_retry_gfn_unsafe
from tdxlab.kvm.page_fault import (
    KVM_PFN_NOSLOT,
    PFERR_GUEST_FINAL_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_RSVD_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    PageFault,
)
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM
from tdxlab.kvm.role import INVALID
from tdxlab.kvm.roots import kvm_mmu_reload
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, KVM_MEMSLOT_INVALID, Slot
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_map
from tdxlab.kvm.vm import (
    INVALID_PAGE,
    VCPU_STATS,
    MemoryFault,
    Vcpu,
    Vm,
    pages_per_level,
)
from tdxlab.steps import Step

Doing = Generator[Step, None, int]

#: Flag of KVM_EXIT_MEMORY_FAULT. Source: include/uapi/linux/kvm.h.
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3

_STATS = {
    RET_PF_FIXED: "pf_fixed",
    RET_PF_EMULATE: "pf_emulate",
    RET_PF_SPURIOUS: "pf_spurious",
}
#: Words of the statistics that nearly every fault adds to.
_TAKEN, _FIXED = VCPU_STATS.index("pf_taken"), VCPU_STATS.index("pf_fixed")


# -- from the exit to the handler


def kvm_mmu_page_fault(vcpu: Vcpu, gpa: int, error_code: int) -> Doing:
    """Handle the exit of a guest access to `gpa` (shared bit included).

    error_code: PFERR_*; PFERR_RSVD_MASK for an EPT misconfiguration. Returns RET_PF_* or -errno;
    with -EFAULT from a private access or from one to memory of the other kind,
    `vcpu.memory_fault` tells user space more.
    Source: kvm_mmu_page_fault. Differs: RET_PF_EMULATE is returned; no instruction is emulated.
    """
    vm = vcpu.vm
    if vcpu.root_hpa == INVALID_PAGE:
        vm.warn("kvm_mmu_page_fault: no root is loaded")
        return RET_PF_RETRY
    if error_code & PFERR_RSVD_MASK:
        if error_code & PFERR_PRIVATE_ACCESS:
            vm.warn("kvm_mmu_page_fault: an EPT misconfiguration of private memory")
            return -EFAULT
        ret = handle_mmio_page_fault(vcpu, gpa)
        if ret == RET_PF_EMULATE:
            return ret
        if ret != RET_PF_INVALID:
            return _count_outcome(vcpu, ret)
    elif vm.config.vm_type == KVM_X86_SW_PROTECTED_VM and vm.attributes.is_private(
        gpa >> PAGE_SHIFT
    ):
        error_code |= PFERR_PRIVATE_ACCESS
    stats = vcpu.stat_words
    stats.cells[_TAKEN] = stats.view[_TAKEN] + 1
    fault = _make_fault(vm, gpa, error_code, False)
    ret = yield from kvm_tdp_mmu_page_fault(vcpu, fault)
    if ret == RET_PF_FIXED:
        stats.cells[_FIXED] = stats.view[_FIXED] + 1
        return ret
    if ret == RET_PF_EMULATE:
        ret = _emulate(vcpu, fault)
    if ret == RET_PF_INVALID:
        vm.bug("kvm_mmu_page_fault: a fault was neither handled nor refused")
        return -EIO
    return _count_outcome(vcpu, ret)


def _count_outcome(vcpu: Vcpu, ret: int) -> int:
    name = _STATS.get(ret)
    if name is not None:
        vcpu.count(name)
    return ret


def kvm_mmu_do_page_fault(
    vcpu: Vcpu, gpa: int, error_code: int, prefetch: bool = False
) -> Generator[Step, None, tuple[int, int]]:
    """Handle one fault once. Returns (RET_PF_* or -errno, level that was mapped or aimed at).

    prefetch: nobody accessed the page yet. Source: mmu_internal.h, kvm_mmu_do_page_fault.
    """
    fault = _make_fault(vcpu.vm, gpa, error_code, prefetch)
    ret = yield from kvm_tdp_mmu_page_fault(vcpu, fault)
    if ret == RET_PF_EMULATE:
        ret = _emulate(vcpu, fault)
    return ret, fault.goal_level


def _make_fault(vm: Vm, gpa: int, error_code: int, prefetch: bool) -> PageFault:
    """The fault, its gfn without the shared bit, and the memslot that holds the gfn."""
    gfn = gpa >> PAGE_SHIFT
    gfn -= gfn & vm.gfn_direct_bits
    fault = PageFault(gpa, error_code, prefetch, gfn, vm.slots.find(gfn))
    if vm.params.nx_huge_pages:
        fault.nx_huge_page_workaround_enabled = True
    return fault


def _emulate(vcpu: Vcpu, fault: PageFault) -> int:
    """RET_PF_EMULATE, but nobody can emulate an access to private memory: -EFAULT."""
    if not fault.is_private:
        return RET_PF_EMULATE
    kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
    return -EFAULT


def kvm_tdp_mmu_page_fault(vcpu: Vcpu, fault: PageFault) -> Doing:
    """Look the page up and map it. Returns RET_PF_*, -ENOMEM, or what `kvm_mmu_faultin_pfn` does.
    Yields before the lookup, which may sleep.

    Source: kvm_tdp_mmu_page_fault. Differs: no gfn is write-tracked, since nothing shadows guest
    page tables (RET_PF_WRITE_PROTECTED).
    """
    vm = vcpu.vm
    is_present = fault.error_code & PFERR_PRESENT_MASK
    if (is_present or not vm.params.ad_bits) and page_fault_can_be_fast(vm, fault):
        ret = yield from fast_page_fault(vcpu, fault)
        if ret != RET_PF_INVALID:
            return ret
    error = mmu_topup_memory_caches(vcpu)
    if error:
        return error
    ret = kvm_mmu_faultin_pfn(vcpu, fault)
    if ret == RET_PF_CONTINUE and fault.slot is not None:
        yield ("faultin_pfn", fault.addr, fault.error_code, fault.mmu_seq, fault.slot)
        ret = __kvm_mmu_faultin_pfn(vcpu, fault, fault.slot)
    if ret != RET_PF_CONTINUE:
        return ret
    lock = vm.mmu_lock
    yield LOCKING[READ]
    if not lock.try_lock(READ):
        yield from lock.wait(READ)
    try:
        if is_page_fault_stale(vcpu, fault):
            return RET_PF_RETRY
        return (yield from kvm_tdp_mmu_map(vcpu, fault))
    finally:
        lock.unlock(READ)


def is_page_fault_stale(vcpu: Vcpu, fault: PageFault) -> bool:
    """True if the vCPU's direct root is obsolete, or the pfn may have been invalidated; mmu_lock
    held. A fault in the mirror goes by the direct root too. Source: is_page_fault_stale.
    """
    vm = vcpu.vm
    root = vm.sps.get(vcpu.root_hpa)
    if root is not None and root.role & INVALID:
        return True
    if not vm.mmu_invalidate_in_progress and vm.mmu_invalidate_seq == fault.mmu_seq:
        return False
    return fault.slot is not None and mmu_invalidate_retry_gfn(vm, fault.mmu_seq, fault.gfn)


# -- which page


def kvm_mmu_faultin_pfn(vcpu: Vcpu, fault: PageFault) -> int:
    """May the page behind the gfn be looked up? Notes `fault.mmu_seq`.

    Returns RET_PF_CONTINUE, or what ends the fault, in this order: -EFAULT (and the VM is dead) if
    the gfn still has its shared bit; -EFAULT with a memory-fault exit if the access is private and
    the gfn is not, or the reverse; what `kvm_handle_noslot_fault` says of a gfn without slot, for
    which nothing is to be looked up; RET_PF_RETRY if the slot is being deleted or the gfn
    invalidated.
    Source: kvm_mmu_faultin_pfn, the first half. Differs: there is no slot for the APIC-access page.
    """
    vm, gfn, slot = vcpu.vm, fault.gfn, fault.slot
    if gfn & vm.gfn_direct_bits:
        vm.bug("kvm_mmu_faultin_pfn: the gfn has the shared bit")
        return -EFAULT
    fault.mmu_seq = seq = vm.mmu_invalidate_seq
    if fault.is_private != vm.attributes.is_private(gfn):
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    if slot is None:
        return kvm_handle_noslot_fault(vcpu, fault)
    if slot.flags & KVM_MEMSLOT_INVALID or (
        vm.mmu_invalidate_in_progress and mmu_invalidate_retry_gfn_unsafe(vm, seq, gfn)
    ):
        return RET_PF_RETRY
    return RET_PF_CONTINUE


def __kvm_mmu_faultin_pfn(vcpu: Vcpu, fault: PageFault, slot: Slot) -> int:
    """Find the page behind the gfn: `fault.pfn`, `map_writable`, `max_level`.

    Returns RET_PF_CONTINUE; what the lookup says; RET_PF_RETRY if it was invalidated meanwhile.
    Source: kvm_mmu_faultin_pfn, the second half, and __kvm_mmu_faultin_pfn. Differs: a lookup holds
    no reference to the page, since a page that goes away makes the fault stale.
    """
    vm, seq = vcpu.vm, fault.mmu_seq
    faultin = kvm_mmu_faultin_pfn_private if fault.is_private else kvm_mmu_faultin_pfn_shared
    ret = faultin(vcpu, fault, slot)
    if not vm.mmu_invalidate_in_progress and vm.mmu_invalidate_seq == seq:
        return ret
    if ret == RET_PF_CONTINUE and mmu_invalidate_retry_gfn_unsafe(vm, seq, fault.gfn):
        return RET_PF_RETRY
    return ret


def kvm_handle_noslot_fault(vcpu: Vcpu, fault: PageFault) -> int:
    """No memory is there. Private: -EFAULT with a memory-fault exit. Else it is MMIO:
    RET_PF_EMULATE if no MMIO SPTE can say so, else RET_PF_CONTINUE to make one.

    Source: kvm_handle_noslot_fault.
    """
    vm = vcpu.vm
    if fault.is_private:
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    vcpu_cache_mmio_info(vcpu, fault.gfn)
    fault.slot = None
    fault.pfn = KVM_PFN_NOSLOT
    fault.map_writable = False
    if not vm.params.mmio_caching or fault.gfn > vm.params.max_gfn:
        return RET_PF_EMULATE
    return RET_PF_CONTINUE


def kvm_mmu_faultin_pfn_private(vcpu: Vcpu, fault: PageFault, slot: Slot) -> int:
    """The page of the slot's guest_memfd.

    Returns RET_PF_CONTINUE; with a memory-fault exit -EFAULT if the slot has none, or the errno of
    the file. Source: kvm_mmu_faultin_pfn_private, kvm_max_private_mapping_level. Differs: all
    guest_memfd pages are 4 KiB, as in Linux 6.16, so the vendor is not asked for its level.
    """
    vm, flags = vcpu.vm, slot.flags
    if not flags & KVM_MEM_GUEST_MEMFD:
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    pfn = vm.guest_memory.get_pfn(slot.gmem, slot.gmem_pgoff + fault.gfn - slot.base_gfn)
    if pfn < 0:
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return pfn
    fault.pfn = pfn
    fault.map_writable = not flags & KVM_MEM_READONLY
    fault.max_level = 1
    return RET_PF_CONTINUE


def kvm_mmu_faultin_pfn_shared(vcpu: Vcpu, fault: PageFault, slot: Slot) -> int:
    """The page that user space has at the gfn's address.

    Returns RET_PF_CONTINUE; RET_PF_EMULATE for a write to a read-only slot; -EFAULT where user
    space has nothing mapped.
    Source: mmu.c, __kvm_mmu_faultin_pfn, kvm_handle_error_pfn; kvm_main.c, kvm_follow_pfn. Differs:
    a lookup never waits for I/O, so there is no asynchronous fault and no signal in it.
    """
    readonly = bool(slot.flags & KVM_MEM_READONLY)
    if readonly and fault.write:
        return RET_PF_EMULATE
    page = vcpu.vm.user_memory.fault_in(slot.gfn_to_hva(fault.gfn), write=fault.write)
    if page is None:
        return -EFAULT
    fault.pfn = page.pfn
    fault.map_writable = page.writable and not readonly
    return RET_PF_CONTINUE


def kvm_mmu_prepare_memory_fault_exit(vcpu: Vcpu, fault: PageFault) -> None:
    """KVM_EXIT_MEMORY_FAULT for the 4 KiB page of the fault, without the shared bit.

    Source: mmu.c; kvm_host.h, kvm_prepare_memory_fault_exit.
    """
    flags = KVM_MEMORY_EXIT_FLAG_PRIVATE if fault.is_private else 0
    vcpu.memory_fault = MemoryFault(fault.gfn << PAGE_SHIFT, PAGE_SIZE, flags)


# -- mapping ahead of any access


def kvm_tdp_map_page(
    vcpu: Vcpu, gpa: int, error_code: int
) -> Generator[Step, None, tuple[int, int]]:
    """Map the page at `gpa` (shared bit included) without an access; again as long as it retries.

    Returns (0 or -errno, level). -EINTR: a signal is pending; -EIO: the VM is dead; -ENOENT: no
    memory is there; else what the fault returned. Source: kvm_tdp_map_page.
    """
    while True:
        if vcpu.signal_pending:
            return -EINTR, 1
        if vcpu.check_request("VM_DEAD"):
            return -EIO, 1
        yield ("cond_resched", gpa, error_code)
        ret, level = yield from kvm_mmu_do_page_fault(vcpu, gpa, error_code, prefetch=True)
        if ret != RET_PF_RETRY:
            break
    if ret < 0:
        return ret, level
    if ret in (RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED):
        return 0, level
    if ret == RET_PF_EMULATE:
        return -ENOENT, level
    vcpu.vm.warn("kvm_tdp_map_page: could not fix page fault during prefault")
    return -EIO, level


def kvm_arch_vcpu_pre_fault_memory(vcpu: Vcpu, gpa: int, size: int) -> Doing:
    """Map what is at `gpa`: one page, of whatever level. gpa: without the shared bit.

    Returns how many of `size` bytes that covers, or -errno: -EOPNOTSUPP while the VM does not allow
    it; -EINVAL if gpa has the shared bit; what loading the MMU, or `kvm_tdp_map_page`, returns.
    Source: kvm_arch_vcpu_pre_fault_memory.
    """
    vm = vcpu.vm
    if not vm.pre_fault_allowed:
        return -EOPNOTSUPP
    if gpa >> PAGE_SHIFT & vm.gfn_direct_bits:
        return -EINVAL
    error = yield from kvm_mmu_reload(vcpu)
    if error:
        return int(error)
    error_code, direct_bits = PFERR_GUEST_FINAL_MASK, 0
    if vm.features.has_private_mem and vm.attributes.is_private(gpa >> PAGE_SHIFT):
        error_code |= PFERR_PRIVATE_ACCESS
    else:
        direct_bits = vm.gfn_direct_bits << PAGE_SHIFT
    error, level = yield from kvm_tdp_map_page(vcpu, gpa | direct_bits, error_code)
    if error < 0:
        return error
    page_size = pages_per_level(level) << PAGE_SHIFT
    return min(size, (gpa & -page_size) + page_size - gpa)


def kvm_vcpu_pre_fault_memory(vcpu: Vcpu, gpa: int, size: int) -> Doing:
    """KVM_PRE_FAULT_MEMORY: map everything from `gpa` on. size: bytes.

    Returns the number of bytes done, or -errno if that is none: -EINVAL if gpa or size is not page
    aligned, or the range is empty or wraps around; -EINTR: a signal is pending; else the errno of
    the first page that failed. It reads the memslots all the while, and whoever deletes a slot
    waits for readers: prefaulting a slot that is being deleted retries for ever, as in Linux 6.16.
    Source: kvm_main.c, kvm_vcpu_pre_fault_memory. Differs: user space is told the bytes done
    instead of finding gpa and size advanced.
    """
    if (gpa | size) & PAGE_OFFSET_MASK or size <= 0 or gpa + size >= 1 << 64:
        return -EINVAL
    done, ret, srcu = 0, 0, vcpu.vm.srcu
    index = srcu.read_lock()
    try:
        while done < size and ret >= 0:
            ret = -EINTR
            if not vcpu.signal_pending:
                ret = yield from kvm_arch_vcpu_pre_fault_memory(vcpu, gpa + done, size - done)
            done += max(ret, 0)
    finally:
        srcu.read_unlock(index)
    return done or ret
