"""Faults that need no mmu_lock: a leaf is there and only a bit is missing.

Two things take permissions away without unmapping: dirty logging takes W, access tracking (on CPUs
without A/D bits) takes R, W and X. One cmpxchg on the SPTE gives them back.

Private memory of a TD never comes this way: only the direct tree is looked at, and KVM reports a
private access as a write to nothing present.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c, fast_page_fault.
"""

from __future__ import annotations

from collections.abc import Generator

from tdxlab.kvm.dirty_log import mark_page_dirty_in_slot
from tdxlab.kvm.page_fault import (
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_SPURIOUS,
    PageFault,
)
from tdxlab.kvm.spte import (
    ACCESSED_MASK,
    FROZEN_SPTE,
    PT_WRITABLE_MASK,
    is_access_allowed,
    is_access_track_spte,
    is_mmu_writable_spte,
    is_present_leaf,
    is_writable_pte,
    restore_acc_track_spte,
)
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_fast_pf_get_last_sptep
from tdxlab.kvm.vm import Vcpu, Vm
from tdxlab.steps import Step

#: Lost races after which the slow path is taken.
_MAX_RETRIES = 4


def page_fault_can_be_fast(vm: Vm, fault: PageFault) -> bool:
    """True if a missing permission can be the cause: a write to something present, or on a CPU
    without A/D bits anything that may have been access-tracked.

    Never an MMIO access, nor one whose privacy is not that of the gfn.
    Source: page_fault_can_be_fast.
    """
    error_code = fault.error_code
    if error_code & PFERR_PRESENT_MASK:
        missing_permission = error_code & PFERR_WRITE_MASK
    else:
        missing_permission = not vm.params.ad_bits
    if not missing_permission or error_code & PFERR_RSVD_MASK:
        return False
    private = vm.features.has_private_mem
    return not private or fault.is_private == vm.attributes.is_private(fault.gfn)


def fast_page_fault(vcpu: Vcpu, fault: PageFault) -> Generator[Step, None, int]:
    """Try to give the leaf its permissions back.

    Returns RET_PF_FIXED; RET_PF_SPURIOUS if the access is allowed by now; RET_PF_INVALID for the
    slow path. Yields before each cmpxchg.
    Source: fast_page_fault.
    """
    if not page_fault_can_be_fast(vcpu.vm, fault):
        return RET_PF_INVALID
    for _ in range(_MAX_RETRIES + 1):
        place = kvm_tdp_mmu_fast_pf_get_last_sptep(vcpu, fault.gfn)
        if place is None:
            vcpu.vm.warn("fast_page_fault: the walk ended before its first entry")
            return RET_PF_INVALID
        word, spte, level = place
        ret, new_spte = _plan(vcpu.vm, fault, spte, level)
        if ret != RET_PF_FIXED:
            break
        yield ("cmpxchg fast_page_fault", fault.gfn, level, spte, new_spte)
        if fast_pf_fix_direct_spte(vcpu.vm, fault, word, spte, new_spte):
            break
        ret = RET_PF_INVALID
    now = vcpu.vm.memory.words.view[word]
    vcpu.vm.emit("fast_page_fault", level, fault.gfn, ret, spte, now)
    if ret != RET_PF_INVALID:
        vcpu.count("pf_fast")
    return ret


def _plan(vm: Vm, fault: PageFault, spte: int, level: int) -> tuple[int, int]:
    """(RET_PF_FIXED, the SPTE to write), or (what to return without writing, `spte`).

    A large page of a slot whose writes are logged is not made writable: it has to be split.
    """
    if spte == FROZEN_SPTE or not is_present_leaf(spte, level):
        return RET_PF_INVALID, spte
    if is_access_allowed(spte, write=fault.write, execute=fault.execute):
        return RET_PF_SPURIOUS, spte
    new_spte = spte
    if not vm.params.ad_bits and is_access_track_spte(spte):
        new_spte = restore_acc_track_spte(spte) | ACCESSED_MASK
    if fault.write and is_mmu_writable_spte(spte):
        new_spte |= PT_WRITABLE_MASK
        if level > 1 and fault.slot is not None and fault.slot.is_dirty_tracked:
            return RET_PF_INVALID, spte
    allowed = is_access_allowed(new_spte, write=fault.write, execute=fault.execute)
    if new_spte == spte or not allowed:
        return RET_PF_INVALID, spte
    return RET_PF_FIXED, new_spte


def fast_pf_fix_direct_spte(
    vm: Vm, fault: PageFault, word: int, old_spte: int, new_spte: int
) -> bool:
    """The cmpxchg; False if it lost. A page that becomes writable is dirty.

    word: index of the SPTE in `memory.words`. Source: fast_pf_fix_direct_spte.
    """
    words = vm.memory.words
    if words.view[word] != old_spte:
        return False
    words.put(word, new_spte)
    if is_writable_pte(new_spte) and not is_writable_pte(old_spte):
        mark_page_dirty_in_slot(vm, fault.slot, fault.gfn)
    return True
