"""Faults on shadow page tables, and the guest's stores to its own tables.

A fault walks the guest's tables, links a shadow page for each of them, and maps the 4 KiB page at
the end. What the guest's tables refuse is the guest's own fault.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (kvm_mmu_page_fault, kvm_mmu_track_write),
mmu/paging_tmpl.h (page_fault, fetch).
Differs: nothing is mapped before it is used. A large page of the guest is always mapped in 4 KiB
pages. What no memslot holds is device memory and left to user space, without an entry of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from errno import ENOMEM

from tdxlab.arch import PAGE_OFFSET_MASK, PAGE_SHIFT
from tdxlab.kvm.locks import WRITE
from tdxlab.kvm.pae_guest import GuestFault, GuestWalk, get_pdptr, guest_root_gfn, walk_guest
from tdxlab.kvm.pae_pdpte import PT_WRITABLE_MASK, written_sptes
from tdxlab.kvm.page_fault import (
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_WRITE_PROTECTED,
)
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import Role
from tdxlab.kvm.shadow_pages import (
    child_role,
    commit_zap_page,
    drop_parent_pte,
    drop_spte,
    link_shadow_page,
    page_zap_pte,
    prepare_zap_page,
    set_leaf,
    shadowing,
    try_to_unsync_pages,
)
from tdxlab.kvm.shadow_roots import design_of, topup_caches
from tdxlab.kvm.shadow_sync import get_shadow_page, make_spte, sync_spte
from tdxlab.kvm.shadow_vm import (
    FREE_OBSOLETE_ROOTS,
    ShadowPage,
    ShadowVcpu,
    ShadowVm,
)
from tdxlab.steps import Step

Faulting = Generator[Step, None, int | GuestFault]


def kvm_mmu_page_fault(vcpu: ShadowVcpu, va: int, error_code: int) -> Faulting:
    """Handle a fault at `va` (a GPA where the CPU has no guest tables to walk, or KVM walks L1's).

    error_code: PFERR_WRITE_MASK and PFERR_USER_MASK say what the access was. Returns RET_PF_*,
    -ENOMEM, or the fault that the guest must be given.
    """
    vm = vcpu.vm
    vm.count("pf_taken")
    if (yield from topup_caches(vcpu)):
        return -ENOMEM
    write, user = bool(error_code & PFERR_WRITE_MASK), bool(error_code & PFERR_USER_MASK)
    yield ("walk_addr", va)
    walk = walk_guest(vcpu, va, write=write, user=user)
    if isinstance(walk, GuestFault):
        vm.count("pf_guest")
        return walk
    if vm.gfn_to_hpa(walk.gfn) == NO_PAGE:
        return RET_PF_EMULATE
    yield from vm.mmu_lock.lock(WRITE)
    try:
        if design_of(vm).is_stale(vcpu) or _gptes_changed(vm, walk):
            return RET_PF_RETRY
        result = yield from fetch(vcpu, va, walk, write=write)
    finally:
        vm.mmu_lock.unlock(WRITE)
    vm.count("pf_fixed", int(result == RET_PF_FIXED))
    return result


def _gptes_changed(vm: ShadowVm, walk: GuestWalk) -> bool:
    """The guest has changed its tables meanwhile. Source: paging_tmpl.h, gpte_changed."""
    return any(vm.read_guest(step.gpa, step.size) != step.value for step in walk.steps)


def fetch(vcpu: ShadowVcpu, va: int, walk: GuestWalk, *, write: bool) -> Generator[Step, None, int]:
    """Link tables down to level 1, and map the page. Returns RET_PF_FIXED, RET_PF_RETRY, or
    RET_PF_WRITE_PROTECTED if KVM has to make the store itself.

    Source: paging_tmpl.h, fetch; mmu.c, direct_map and mmu_set_spte.
    """
    vm = vcpu.vm
    level, sptep = design_of(vm).first_entry(vcpu, va)
    if not level:
        return RET_PF_RETRY
    while level > 1:
        child = _child(vcpu, va, walk, level, sptep)
        if child is None:
            gfn, role = _child_key(vcpu, va, walk, level, sptep)
            child = get_shadow_page(vcpu, gfn, role)
            if level == 3:
                yield ("store PDPTE", va >> 30 & 3, child.spt)
                vm.count("slots_stored")
            link_shadow_page(vm, sptep, vm.sps[child.spt])
        level -= 1
        sptep = child.spt + 8 * (va >> PAGE_SHIFT + 9 * (level - 1) & 511)
    old = vm.read(sptep)
    if vm.is_present(old) and vm.leaves[sptep][0] != walk.gfn:
        drop_spte(vm, sptep)
        vm.flush_remote_tlbs()
    spte = make_spte(vm, walk.gfn, walk.access)
    yield ("set SPTE", sptep, spte)
    set_leaf(vm, sptep, spte, walk.gfn, walk.access)
    return RET_PF_WRITE_PROTECTED if write and not spte & PT_WRITABLE_MASK else RET_PF_FIXED


def _child(vcpu: ShadowVcpu, va: int, walk: GuestWalk, level: int, sptep: int) -> ShadowPage | None:
    """The table that the entry at `sptep` links, if it can stay. One that shadows no table stands
    for a large page, and has that page's permissions. Source: paging_tmpl.h, validate_direct_spte.
    """
    vm = vcpu.vm
    entry = vm.read(sptep)
    if not vm.is_present(entry):
        return None
    child = vm.child(entry)
    if level > walk.level or Role(child.role).access == walk.access:
        return child
    drop_parent_pte(vm, child, sptep)
    vm.flush_remote_tlbs()
    return None


def _child_key(
    vcpu: ShadowVcpu, va: int, walk: GuestWalk, level: int, sptep: int
) -> tuple[int, int]:
    """gfn and role of the table that the entry at `sptep`, at `level`, has to link."""
    vm = vcpu.vm
    parent, index = vm.sps[sptep & ~PAGE_OFFSET_MASK], (sptep & PAGE_OFFSET_MASK) // 8
    direct = level <= walk.level
    access, gfn = walk.access, walk.gfn & -(1 << 9 * (level - 1))
    if not direct:
        gfn = _table_gfn(vcpu, walk, level, index)
        access = walk.step(level - 1).access
    forget = "clear role" in vm.params.forget
    return gfn, child_role(parent, index, direct=direct, access=access, forget=forget)


def _table_gfn(vcpu: ShadowVcpu, walk: GuestWalk, level: int, index: int) -> int:
    """gfn of the guest's table below an entry of a shadow page."""
    if level == 2:
        return walk.step(1).table_gfn
    return get_pdptr(vcpu, index) >> 12 if vcpu.guest_level == 3 else guest_root_gfn(vcpu)


# -- the guest's stores to its tables


def kvm_mmu_track_write(vm: ShadowVm, gpa: int, size: int) -> None:
    """A store that KVM made for the guest: what shadows the bytes goes. With mmu_lock held.

    Source: mmu.c, kvm_mmu_track_write and get_written_sptes. A store that is not a whole, aligned
    entry takes the whole page along (detect_write_misaligned).
    """
    vm.count("write_tracked")
    invalid: list[ShadowPage] = []
    flush = False
    for sp in shadowing(vm, gpa >> PAGE_SHIFT):
        if _is_misaligned(sp, gpa, size):
            prepare_zap_page(vm, vm.sps[sp.spt], invalid)
            continue
        for index in _written(sp, gpa & PAGE_OFFSET_MASK):
            sptep = sp.spt + 8 * index
            flush = page_zap_pte(vm, sptep, vm.read(sptep)) or flush
    if flush and not invalid:
        vm.flush_remote_tlbs()
    commit_zap_page(vm, invalid)


def _is_misaligned(sp: ShadowPage, gpa: int, size: int) -> bool:
    """Source: mmu.c, detect_write_misaligned."""
    whole = 4 if Role(sp.role).has_4_byte_gpte else 8
    return size < 4 or (gpa % whole + size) > whole


def _written(sp: ShadowPage, offset: int) -> tuple[int, ...]:
    role = Role(sp.role)
    if role.has_4_byte_gpte:
        return written_sptes(offset, level=sp.level, quadrant=role.quadrant)
    return (offset // 8,)


def guest_store(vcpu: ShadowVcpu, gpa: int, value: int, size: int) -> Generator[Step, None, str]:
    """The guest stores to guest memory, be it one of its tables: "direct" if it did so itself,
    "emulated" if KVM did it and saw to the shadow pages.

    Refuses a GPA without memory: ValueError.
    Differs: who stores names the GPA; the guest's own mapping of the page is not walked. `store` of
    shadow_run.py walks it.
    """
    vm, gfn = vcpu.vm, gpa >> PAGE_SHIFT
    yield from vm.mmu_lock.lock(WRITE)
    try:
        is_free = try_to_unsync_pages(vm, gfn)
        vm.write_guest(gpa, value, size)
        if not is_free:
            vm.exit_guest(vcpu)
            kvm_mmu_track_write(vm, gpa, size)
    finally:
        vm.mmu_lock.unlock(WRITE)
    return "direct" if is_free else "emulated"


def kvm_mmu_invalidate_addr(vcpu: ShadowVcpu, va: int) -> Generator[Step, None, None]:
    """The guest's INVLPG: the one entry for `va` is brought into line. Source: mmu.c."""
    vm = vcpu.vm
    yield from vm.mmu_lock.lock(WRITE)
    try:
        sptep = shadow_leaf(vcpu, va)
        sp = vm.sp_of_entry(sptep)
        if sp is not None and sp.unsync and sptep in vm.leaves and sync_spte(vcpu, sp, sptep):
            vm.flush_remote_tlbs()
    finally:
        vm.mmu_lock.unlock(WRITE)


def shadow_leaf(vcpu: ShadowVcpu, va: int) -> int:
    """HPA of the level-1 entry for `va` in the vCPU's shadow tables, 0 if they do not reach it."""
    vm = vcpu.vm
    if vcpu.root.hpa in (-1, vm.zero_page):
        return 0
    level, sptep = design_of(vm).first_entry(vcpu, va)
    while level > 1:
        entry = vm.read(sptep)
        if not vm.is_present(entry):
            return 0
        level -= 1
        sptep = vm.address(entry) + 8 * (va >> PAGE_SHIFT + 9 * (level - 1) & 511)
    return sptep


# -- the host takes things away


def kvm_unmap_gfn(vm: ShadowVm, gfn: int) -> Generator[Step, None, int]:
    """Take away every mapping of a gfn; returns how many there were. Source: mmu.c,
    kvm_unmap_gfn_range.
    """
    yield from vm.mmu_lock.lock(WRITE)
    sptes = vm.rmap.get(gfn, ())
    for sptep in sptes:
        drop_spte(vm, sptep)
    if sptes:
        vm.flush_remote_tlbs()
    vm.mmu_lock.unlock(WRITE)
    return len(sptes)


def zap_page(vm: ShadowVm, spt: int) -> Generator[Step, None, None]:
    """Zap one shadow page. Source: mmu.c, kvm_mmu_prepare_zap_page and kvm_mmu_commit_zap_page."""
    invalid: list[ShadowPage] = []
    yield from vm.mmu_lock.lock(WRITE)
    prepare_zap_page(vm, vm.sps[spt], invalid)
    yield ("kvm_mmu_commit_zap_page", len(invalid))
    commit_zap_page(vm, invalid)
    vm.mmu_lock.unlock(WRITE)


def kvm_mmu_zap_all_fast(vm: ShadowVm) -> Generator[Step, None, None]:
    """Everything becomes obsolete at once, and is zapped then; roots go when their vCPUs let go.

    Source: mmu.c, kvm_mmu_zap_all_fast and kvm_zap_obsolete_pages. Differs: it zaps all pages in
    one go, and does not let go of mmu_lock after every few.
    """
    invalid: list[ShadowPage] = []
    yield from vm.mmu_lock.lock(WRITE)
    vm.mmu_valid_gen += 1
    vm.make_all_cpus_request(FREE_OBSOLETE_ROOTS)
    yield ("kvm_zap_obsolete_pages", vm.mmu_valid_gen)
    for spt in list(vm.sps):
        if not vm.sps[spt].is_invalid:
            prepare_zap_page(vm, vm.sps[spt], invalid)
    commit_zap_page(vm, invalid)
    vm.mmu_lock.unlock(WRITE)
