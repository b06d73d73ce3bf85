"""Roots: the tops of a VM's TDP page tables, and who holds them.

All roots of a VM stand in one list, the newest first. vCPUs with equal roles share a root. A new
one has two references: its vCPU's, and one of the MMU's own. A root dies in three steps:
invalidated (no fault uses it any more, its vCPUs leave it when they next look), zapped (the MMU's
own reference goes), and freed with its last reference. Whoever walks over roots holds a reference
to the present one, so that it may let go of mmu_lock meanwhile.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c and tdp_mmu.h; mmu.c, for loading and unloading.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm import caches
from tdxlab.kvm.locks import READ
from tdxlab.kvm.page_fault import PageFault
from tdxlab.kvm.role import INVALID, IS_MIRROR
from tdxlab.kvm.tdp_iter import gfn_root_bits as gfn_root_bits
from tdxlab.kvm.tdp_set import HostBug, kvm_mmu_page_as_id
from tdxlab.kvm.vm import INVALID_PAGE, MmuPage, Vcpu, Vm
from tdxlab.steps import Step

# -- which roots an operation means: bits. VALID: both kinds, but none that is invalid

KVM_INVALID_ROOTS = 1
KVM_DIRECT_ROOTS = 2
KVM_MIRROR_ROOTS = 4
KVM_VALID_ROOTS = KVM_DIRECT_ROOTS | KVM_MIRROR_ROOTS
KVM_ALL_ROOTS = KVM_VALID_ROOTS | KVM_INVALID_ROOTS

# -- which kind of memory a range of gfns means. Source: kvm_host.h, enum kvm_gfn_range_filter

KVM_FILTER_SHARED = 1
KVM_FILTER_PRIVATE = 2

#: Asks a vCPU to leave its root if that was invalidated.
FREE_OBSOLETE_ROOTS = "MMU_FREE_OBSOLETE_ROOTS"


def kvm_gfn_range_filter_to_root_types(vm: Vm, attr_filter: int) -> int:
    """The KVM_*_ROOTS that KVM_FILTER_* bits mean. One root maps both kinds of memory in a VM
    without a mirror. Source: tdp_mmu.h, kvm_gfn_range_filter_to_root_types.
    """
    if not vm.has_mirrored_tdp:
        return KVM_DIRECT_ROOTS
    types = KVM_MIRROR_ROOTS if attr_filter & KVM_FILTER_PRIVATE else 0
    types |= KVM_DIRECT_ROOTS if attr_filter & KVM_FILTER_SHARED else 0
    if not types:
        vm.warn("kvm_gfn_range_filter_to_root_types: neither private nor shared memory is meant")
    return types


def is_invalid_root(vm: Vm, root: MmuPage) -> bool:
    """True if the root is invalid by now, whatever it was when the caller got hold of it."""
    return bool(vm.sps[root.spt].role & INVALID)


def tdp_mmu_root_match(vm: Vm, root: MmuPage, types: int) -> bool:
    """True if `root` is of one of `types`. Source: tdp_mmu.c, tdp_mmu_root_match."""
    if not types & KVM_VALID_ROOTS:
        vm.warn(f"tdp_mmu_root_match: types {types} are neither direct nor mirror roots")
        return False
    if root.role & INVALID and not types & KVM_INVALID_ROOTS:
        return False
    return bool(types & (KVM_MIRROR_ROOTS if root.role & IS_MIRROR else KVM_DIRECT_ROOTS))


# -- references


def kvm_tdp_mmu_get_root(vm: Vm, root_hpa: int) -> bool:
    """Take a reference; False if the last one was gone already. Source: tdp_mmu.h."""
    count = vm.root_count.get(root_hpa, 0)
    if count:
        vm.root_count.put(root_hpa, count + 1)
    return bool(count)


def kvm_tdp_mmu_put_root(vm: Vm, root_hpa: int) -> None:
    """Drop a reference. With the last one the root leaves the list and waits for RCU; that it is
    valid then is a bug. Source: tdp_mmu.c, kvm_tdp_mmu_put_root.
    """
    count = vm.root_count[root_hpa] - 1
    if count:
        vm.root_count.put(root_hpa, count)
        return
    root: MmuPage = vm.sps[root_hpa]
    if not root.role & INVALID:
        vm.bug("kvm_tdp_mmu_put_root: the last reference to a valid root is gone")
    vm.root_count.drop(root_hpa)
    vm.tdp_mmu_roots = tuple(hpa for hpa in vm.tdp_mmu_roots if hpa != root_hpa)
    vm.call_rcu(root)


# -- going over roots


def _next_root(vm: Vm, prev: int | None, types: int) -> MmuPage | None:
    """The first root behind `prev` that is of `types` and not dying, with a reference taken; the
    reference to `prev` is dropped. Source: tdp_mmu.c, tdp_mmu_next_root.
    """
    hpas = vm.tdp_mmu_roots
    found = None
    for hpa in hpas[0 if prev is None else hpas.index(prev) + 1 :]:
        root: MmuPage = vm.sps[hpa]
        if tdp_mmu_root_match(vm, root, types) and kvm_tdp_mmu_get_root(vm, hpa):
            found = root
            break
    if prev is not None:
        kvm_tdp_mmu_put_root(vm, prev)
    return found


def for_each_tdp_mmu_root_yield_safe(
    vm: Vm, types: int, as_id: int | None = None
) -> Iterator[MmuPage]:
    """Give each root of `types`, holding a reference to it meanwhile: mmu_lock may be let go of.

    as_id: of this address space only. A loop that is left early drops its reference too.
    """
    root = _next_root(vm, None, types)
    while root is not None:
        if as_id is None or kvm_mmu_page_as_id(root) == as_id:
            try:
                yield root
            except GeneratorExit:
                kvm_tdp_mmu_put_root(vm, root.spt)
                raise
        root = _next_root(vm, root.spt, types)


def for_each_tdp_mmu_root(vm: Vm, types: int, as_id: int | None = None) -> Iterator[MmuPage]:
    """Give each root of `types` that stands in the list now, without references."""
    for hpa in vm.tdp_mmu_roots:
        root: MmuPage = vm.sps[hpa]
        right_space = as_id is None or kvm_mmu_page_as_id(root) == as_id
        if right_space and tdp_mmu_root_match(vm, root, types):
            yield root


# -- birth and death


def kvm_tdp_mmu_alloc_root(vcpu: Vcpu, mirror: bool) -> Generator[Step, None, None]:
    """Give the vCPU its mirror or its direct root: one that is there and has the same role, or a
    new one. The page comes out of the vCPU's cache.

    Source: tdp_mmu.c, kvm_tdp_mmu_alloc_root.
    """
    vm = vcpu.vm
    role = vcpu.root_role | (IS_MIRROR if mirror else 0)
    yield from vm.mmu_lock.lock(READ)
    root_hpa = _get_root_with_role(vm, role)
    if root_hpa == INVALID_PAGE:
        yield ("spin_lock(tdp_mmu_pages_lock)", vcpu.vcpu_id, role)
        root_hpa = _get_root_with_role(vm, role)
    if root_hpa == INVALID_PAGE:
        root = MmuPage(caches.take_table_page(vcpu), role, 0)
        root_hpa = root.spt
        vm.init_table(root)
        vm.root_count.put(root_hpa, 2)
        vm.tdp_mmu_roots = (root_hpa, *vm.tdp_mmu_roots)
    vm.mmu_lock.unlock(READ)
    if mirror:
        vcpu.mirror_root_hpa = root_hpa
    else:
        vcpu.root_hpa = root_hpa


def _get_root_with_role(vm: Vm, role: int) -> int:
    """Take a reference to the root of exactly this role, which is never an invalid one."""
    for hpa in vm.tdp_mmu_roots:
        if vm.sps[hpa].role == role and kvm_tdp_mmu_get_root(vm, hpa):
            return hpa
    return INVALID_PAGE


def kvm_tdp_mmu_invalidate_roots(vm: Vm, types: int) -> None:
    """Make all valid roots of `types` invalid and schedule them for zapping. The MMU's own
    references now are the zapper's. mmu_lock held for write, unless the VM has no users any more.

    Source: tdp_mmu.c, kvm_tdp_mmu_invalidate_roots.
    """
    if types & KVM_INVALID_ROOTS:
        vm.warn("kvm_tdp_mmu_invalidate_roots: invalid roots are invalid already")
        types &= ~KVM_INVALID_ROOTS
    for root in for_each_tdp_mmu_root(vm, types):
        invalid = root._replace(role=root.role | INVALID, scheduled_to_zap=True)
        vm.sps.put(root.spt, invalid)


# -- a vCPU's roots


def kvm_is_addr_direct(vm: Vm, gpa: int) -> bool:
    """True if the direct root maps `gpa`, shared bit included; in a VM without a shared bit it maps
    everything. Source: mmu.h, kvm_is_addr_direct.
    """
    direct_bits = vm.gfn_direct_bits
    return not direct_bits or bool(gpa >> PAGE_SHIFT & direct_bits)


def tdp_mmu_get_root_for_fault(vcpu: Vcpu, fault: PageFault) -> MmuPage:
    """The root that `fault.addr` is to be mapped in: its shared bit chooses, not `is_private`.

    Raises HostBug for a vCPU without that root: nobody looks whether it has one. It can come to
    that where kvm_mmu_reload failed and its caller did not care.
    Source: tdp_mmu.h, tdp_mmu_get_root_for_fault.
    """
    vm = vcpu.vm
    direct_bits = vm.gfn_direct_bits
    is_mirror = direct_bits and not fault.addr >> PAGE_SHIFT & direct_bits
    root_hpa = vcpu.mirror_root_hpa if is_mirror else vcpu.root_hpa
    try:
        root: MmuPage = vm.sps[root_hpa]
    except KeyError:
        if root_hpa != INVALID_PAGE:
            raise
        raise HostBug(f"{vcpu!r} has no root in which {fault.addr:#x} could be mapped") from None
    return root


def kvm_mmu_reload(vcpu: Vcpu) -> Generator[Step, None, int]:
    """Before the guest is entered: leave a root that was invalidated, load one if there is none.

    Returns 0 or -ENOMEM. Only the direct root is looked at. Source: mmu.h, kvm_mmu_reload.
    """
    if vcpu.requests and vcpu.check_request(FREE_OBSOLETE_ROOTS):
        kvm_mmu_free_obsolete_roots(vcpu)
    if vcpu.root_hpa != INVALID_PAGE:
        return 0
    return (yield from kvm_mmu_load(vcpu))


def kvm_mmu_load(vcpu: Vcpu) -> Generator[Step, None, int]:
    """Give the vCPU its roots: a mirror root if the VM has them and the vCPU has none, then a
    direct root, which the CPU is told and for which it flushes its TLB. Returns 0 or -ENOMEM.

    Source: mmu.c, kvm_mmu_load, mmu_alloc_direct_roots and kvm_mmu_load_pgd.
    """
    vm = vcpu.vm
    error: int = caches.mmu_topup_memory_caches(vcpu)
    if error:
        return error
    if vm.has_mirrored_tdp and vcpu.mirror_root_hpa == INVALID_PAGE:
        yield from kvm_tdp_mmu_alloc_root(vcpu, mirror=True)
    yield from kvm_tdp_mmu_alloc_root(vcpu, mirror=False)
    root_hpa, level = vcpu.root_hpa, vm.config.root_level
    vm.emit("load_mmu_pgd", vcpu.vcpu_id, root_hpa, level)
    yield from vm.vendor.load_mmu_pgd(vcpu, root_hpa, level)
    vm.emit("flush_tlb_current", vcpu.vcpu_id)
    yield from vm.vendor.flush_tlb_current(vcpu)
    return 0


def kvm_mmu_unload(vcpu: Vcpu) -> None:
    """Give up the direct root; the mirror root stays with the vCPU until it is destroyed.

    Source: mmu.c, kvm_mmu_unload and kvm_mmu_free_roots.
    Differs: no wait for mmu_lock, which Linux takes for read: a reference is dropped atomically.
    """
    root_hpa = vcpu.root_hpa
    if root_hpa != INVALID_PAGE:
        vcpu.root_hpa = INVALID_PAGE
        kvm_tdp_mmu_put_root(vcpu.vm, root_hpa)


def kvm_mmu_free_obsolete_roots(vcpu: Vcpu) -> None:
    """Give up the direct root if it was invalidated. Source: mmu.c, kvm_mmu_free_obsolete_roots."""
    if is_obsolete_root(vcpu.vm, vcpu.root_hpa):
        kvm_mmu_unload(vcpu)


def is_obsolete_root(vm: Vm, root_hpa: int) -> bool:
    """True for a root that was invalidated, False without a root. Source: mmu.c."""
    return root_hpa != INVALID_PAGE and bool(vm.sps[root_hpa].role & INVALID)


def kvm_mmu_reset_context(vcpu: Vcpu) -> None:
    """Something changed on which the root's role depends: give the direct root up. Nothing is
    zapped. Source: mmu.c, kvm_mmu_reset_context. Differs: the role here depends on the VM only.
    """
    kvm_mmu_unload(vcpu)


def kvm_mmu_destroy(vcpu: Vcpu) -> None:
    """The vCPU goes away: give up both roots and the pages kept ready for faults.

    Source: mmu.c, kvm_mmu_destroy. Differs: as `kvm_mmu_unload`.
    """
    kvm_mmu_unload(vcpu)
    root_hpa = vcpu.mirror_root_hpa
    if root_hpa != INVALID_PAGE:
        vcpu.mirror_root_hpa = INVALID_PAGE
        kvm_tdp_mmu_put_root(vcpu.vm, root_hpa)
    caches.mmu_free_memory_caches(vcpu)
