"""Pages kept ready for a fault, so that nothing is allocated while mmu_lock is held.

Source: Linux 6.16, virt/kvm/kvm_main.c (struct kvm_mmu_memory_cache); arch/x86/kvm/mmu/mmu.c
(mmu_topup_memory_caches). Differs: headers and rmap descriptors are no pages here, so their caches
do not exist.
"""

from __future__ import annotations

from errno import ENOMEM

from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.vm import Vcpu, Vm

#: Pages that one fault can need: a table for every level. Source: PT64_ROOT_MAX_LEVEL.
MIN_OBJECTS = 5
#: Pages that a cache is filled up to. Source: KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE.
CAPACITY = 40

#: What `PageSource.alloc_page` is told.
TABLE_PAGE = "page table"
EXTERNAL_PAGE = "external page table"


def mmu_topup_memory_caches(vcpu: Vcpu) -> int:
    """Make sure that the next fault finds its pages. Returns 0, or -ENOMEM.

    A cache that holds enough is left alone; another one is filled to the brim. The one of external
    pages exists in VMs with a mirror only, and comes first. What was allocated before a failure
    stays. Source: mmu.c, mmu_topup_memory_caches.
    """
    vm = vcpu.vm
    if vm.has_mirrored_tdp and len(vcpu.external_spt_cache) < MIN_OBJECTS:
        vcpu.external_spt_cache = _fill(vm, vcpu.external_spt_cache, EXTERNAL_PAGE)
        if len(vcpu.external_spt_cache) < MIN_OBJECTS:
            return -ENOMEM
    if len(vcpu.page_cache) < MIN_OBJECTS:
        vcpu.page_cache = _fill(vm, vcpu.page_cache, TABLE_PAGE)
        if len(vcpu.page_cache) < MIN_OBJECTS:
            return -ENOMEM
    return 0


def take_table_page(vcpu: Vcpu) -> int:
    """HPA of a page for a table. Source: kvm_mmu_memory_cache_alloc."""
    pages = vcpu.page_cache
    if not pages:
        return _allocate_late(vcpu.vm, TABLE_PAGE)
    vcpu.page_cache = pages[:-1]
    return pages[-1]


def take_external_page(vcpu: Vcpu) -> int:
    """HPA of a page that is to stand for a table in the external EPT.

    Source: mmu_internal.h, kvm_mmu_alloc_external_spt.
    """
    pages = vcpu.external_spt_cache
    if not pages:
        return _allocate_late(vcpu.vm, EXTERNAL_PAGE)
    vcpu.external_spt_cache = pages[:-1]
    return pages[-1]


def mmu_free_memory_caches(vcpu: Vcpu) -> None:
    """Give everything back: the vCPU is destroyed. Source: mmu.c, mmu_free_memory_caches."""
    for hpa in vcpu.page_cache + vcpu.external_spt_cache:
        vcpu.vm.pages.free_page(hpa)
    vcpu.page_cache = vcpu.external_spt_cache = ()


def _fill(vm: Vm, pages: tuple[int, ...], use: str) -> tuple[int, ...]:
    """`pages` and new ones behind them, CAPACITY in all or as many as there are."""
    filled = list(pages)
    while len(filled) < CAPACITY:
        hpa = vm.pages.alloc_page(use)
        if hpa == NO_PAGE:
            break
        filled.append(hpa)
    return tuple(filled)


def _allocate_late(vm: Vm, use: str) -> int:
    """A page although the cache is empty: whoever needs it forgot to top up."""
    vm.warn(f"the cache of pages for a {use} is empty")
    hpa = vm.pages.alloc_page(use)
    if hpa == NO_PAGE:
        raise RuntimeError(f"host BUG: no page for a {use}; top up the vCPU's caches first")
    return hpa
