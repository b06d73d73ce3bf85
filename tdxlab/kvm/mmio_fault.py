"""Accesses to emulated MMIO: gfns without a memslot.

The first access installs an MMIO SPTE, so that the next ones exit at once as an EPT
misconfiguration, and tells what it is without a walk through the memslots. Both the SPTE and the
vCPU's one-entry cache hold the generation of the memslots; when a slot comes or goes, they no
longer count.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c and arch/x86/kvm/x86.h.
"""

from __future__ import annotations

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.page_fault import RET_PF_EMULATE, RET_PF_INVALID, RET_PF_RETRY
from tdxlab.kvm.slots import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from tdxlab.kvm.spte import (
    MMIO_GEN_MASK,
    get_mmio_spte_generation,
    get_mmio_spte_gfn,
    is_mmio_spte,
)
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_get_walk
from tdxlab.kvm.vm import Vcpu


def handle_mmio_page_fault(vcpu: Vcpu, gpa: int) -> int:
    """An EPT misconfiguration: is it emulated MMIO?

    Returns RET_PF_EMULATE if it is, RET_PF_INVALID if the MMIO SPTE is out of date, RET_PF_RETRY if
    there is none any more.
    Source: mmu.c, handle_mmio_page_fault. Differs: the reserved bits of the SPTEs on the way are
    not checked.
    """
    if mmio_info_in_cache(vcpu, gpa):
        return RET_PF_EMULATE
    spte = get_mmio_spte(vcpu, gpa)
    if not is_mmio_spte(vcpu.vm, spte):
        return RET_PF_RETRY
    if not check_mmio_spte(vcpu, spte):
        return RET_PF_INVALID
    vcpu_cache_mmio_info(vcpu, get_mmio_spte_gfn(vcpu.vm, spte))
    return RET_PF_EMULATE


def get_mmio_spte(vcpu: Vcpu, gpa: int) -> int:
    """The last SPTE on the way to `gpa` in the direct tree; 0 if there is no way, as for a GPA with
    the shared bit. Source: mmu.c, get_mmio_spte.
    """
    walk = kvm_tdp_mmu_get_walk(vcpu, gpa, vcpu.vm.sps[vcpu.root_hpa])
    return walk[min(walk)] if walk else 0


def check_mmio_spte(vcpu: Vcpu, spte: int) -> bool:
    """True if the memslots are still those of the MMIO SPTE. Source: mmu.c, check_mmio_spte."""
    generation = vcpu.vm.slots.generation
    if generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return False
    return generation & MMIO_GEN_MASK == get_mmio_spte_generation(spte)


def vcpu_cache_mmio_info(vcpu: Vcpu, gfn: int) -> None:
    """Remember that `gfn` is MMIO, until the memslots change. Source: x86.h."""
    generation = vcpu.vm.slots.generation
    if not generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        vcpu.mmio_gfn = gfn
        vcpu.mmio_gen = generation


def mmio_info_in_cache(vcpu: Vcpu, gpa: int) -> bool:
    """True if the vCPU's last MMIO access was to this page. Gfn 0 is never remembered.

    Source: mmu.c, mmio_info_in_cache; x86.h, vcpu_match_mmio_gpa.
    """
    gfn = vcpu.mmio_gfn
    return bool(gfn) and vcpu.mmio_gen == vcpu.vm.slots.generation and gfn == gpa >> PAGE_SHIFT
