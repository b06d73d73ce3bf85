"""Shadow pages: found by gfn and role, linked to their parents, zapped and freed.

All of it happens with mmu_lock held for write.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c.
Differs: the hash has one bucket for each gfn. No limit for the number of pages, no active list, no
count of writes that would take a table for ordinary data after a while.
"""

from __future__ import annotations

from errno import ENOMEM

from tdxlab.arch import PAGE_OFFSET_MASK
from tdxlab.journal import Table
from tdxlab.kvm.caches import CAPACITY, MIN_OBJECTS
from tdxlab.kvm.pae_pdpte import PT_WRITABLE_MASK, make_nonleaf_spte, make_pdpte_spte
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import INVALID
from tdxlab.kvm.shadow_params import ShadowRole
from tdxlab.kvm.shadow_vm import FREE_OBSOLETE_ROOTS, ShadowPage, ShadowVcpu, ShadowVm
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_set import HostBug

TABLE_PAGE, PAE_ROOT_PAGE = "shadow page", "PAE root"

_PAE_ROOT = ShadowRole.pae_root.mask


# -- pages kept ready


def topup_page_cache(vcpu: ShadowVcpu) -> int:
    """Fill the cache of pages if it runs low. Returns 0, or -ENOMEM; what was had stays in it.

    Source: mmu.c, mmu_topup_memory_caches.
    """
    if len(vcpu.page_cache) >= MIN_OBJECTS:
        return 0
    pages = list(vcpu.page_cache)
    while len(pages) < CAPACITY:
        hpa = vcpu.vm.pages.alloc_page(TABLE_PAGE)
        if hpa == NO_PAGE:
            break
        pages.append(hpa)
    vcpu.page_cache = tuple(pages)
    return 0 if len(pages) >= MIN_OBJECTS else -ENOMEM


def take_page(vcpu: ShadowVcpu) -> int:
    """HPA of a page that was kept ready, the oldest first.

    Differs: Linux takes the newest; addresses read more easily in the order of the allocator.
    """
    hpa, *rest = vcpu.page_cache
    vcpu.page_cache = tuple(rest)
    return hpa


def _take_low_page(vcpu: ShadowVcpu) -> int:
    """HPA of a page below 4 GiB for a page that is called a PAE root, and is none: one for which
    nothing was kept ready.
    """
    hpa, vcpu.pae_root_cache = vcpu.pae_root_cache, NO_PAGE
    if hpa == NO_PAGE:
        hpa = vcpu.vm.pages.alloc_page(TABLE_PAGE, below_4g=True)
    if hpa == NO_PAGE:
        raise HostBug("no page below 4 GiB, with mmu_lock held")
    return hpa


def free_page_cache(vcpu: ShadowVcpu) -> None:
    """Give everything back. Source: mmu.c, mmu_free_memory_caches."""
    for hpa in vcpu.page_cache:
        vcpu.vm.pages.free_page(hpa)
    vcpu.page_cache = ()


# -- the hash


def is_obsolete_sp(vm: ShadowVm, sp: ShadowPage) -> bool:
    """It was zapped, or is older than the last zapping of everything. Source: mmu.c."""
    return sp.is_invalid or sp.valid_gen != vm.mmu_valid_gen


def pages_of(vm: ShadowVm, gfn: int) -> list[ShadowPage]:
    """The tables of a gfn that can still be used. Source: mmu.c, for_each_valid_sp."""
    found = (vm.sps[spt] for spt in vm.mmu_page_hash.get(gfn, ()))
    return [sp for sp in found if not is_obsolete_sp(vm, sp)]


def shadowing(vm: ShadowVm, gfn: int) -> list[ShadowPage]:
    """The tables that shadow the guest's table at `gfn`.

    Source: mmu.c, for_each_gfn_valid_sp_with_gptes.
    """
    return [sp for sp in pages_of(vm, gfn) if sp.has_gptes]


def find_page(vm: ShadowVm, gfn: int, role: int, pdptes: tuple[int, ...] = ()) -> ShadowPage | None:
    """The page of that key, or None. Source: mmu.c, kvm_mmu_find_shadow_page."""
    vm.count("sp_lookups")
    for sp in pages_of(vm, gfn):
        if sp.role == role and sp.pdptes == pdptes:
            vm.count("sp_hits")
            return sp
    return None


def init_page(
    vm: ShadowVm, spt: int, gfn: int, role: int, pdptes: tuple[int, ...] = ()
) -> ShadowPage:
    """Know the table at `spt`, with nothing in it, as a page of that key.

    Source: mmu.c, kvm_mmu_alloc_shadow_page.
    """
    sp = ShadowPage(spt, gfn, role, pdptes, valid_gen=vm.mmu_valid_gen)
    vm.sps.put(spt, sp)
    vm.mmu_page_hash.put(gfn, (*vm.mmu_page_hash.get(gfn, ()), spt))
    vm.count("sp_created")
    return sp


def new_page(vcpu: ShadowVcpu, gfn: int, role: int) -> ShadowPage:
    """A new, empty table; the guest's table at `gfn` can be written by nobody unnoticed."""
    vm = vcpu.vm
    spt = _take_low_page(vcpu) if role & _PAE_ROOT else take_page(vcpu)
    vm.fill_table(spt, SHADOW_NONPRESENT_VALUE)
    sp = init_page(vm, spt, gfn, role)
    if sp.has_gptes and write_protect_gfn(vm, gfn):
        vm.flush_remote_tlbs()
    return sp


# -- links


def present_entries(vm: ShadowVm, sp: ShadowPage) -> list[tuple[int, int]]:
    """(HPA, value) of each entry that links or maps something."""
    table = vm.read_table(sp.spt)
    return [(sp.spt + 8 * i, spte) for i, spte in enumerate(table) if spte & SPTE_MMU_PRESENT_MASK]


def empty_value(vm: ShadowVm, parent: ShadowPage) -> int:
    """What an entry of `parent` holds that links nothing: in a PAE root the design's empty PDPTE.

    Differs: in a PAE root as reviewed it is 0, as it was for all entries then. Linux 6.16 would
    store SHADOW_NONPRESENT_VALUE, which has bit 63 alone: a legal PDPTE too, since P is 0.
    """
    return vm.default_pdpte if parent.role & _PAE_ROOT else SHADOW_NONPRESENT_VALUE


def link_shadow_page(vm: ShadowVm, sptep: int, child: ShadowPage) -> int:
    """Let the entry at `sptep`, which links nothing, link `child`. Returns the new entry.

    Source: mmu.c, __link_shadow_page; the RFC makes a PDPTE if the parent is a PAE root.
    """
    parent = vm.sps[sptep & ~PAGE_OFFSET_MASK]
    make = make_pdpte_spte if parent.role & _PAE_ROOT else make_nonleaf_spte
    entry = make(child.spt, vm.params.me_value)
    vm.write(sptep, entry)
    vm.update_sp(child, parents=(*child.parents, sptep))
    return entry


def drop_parent_pte(vm: ShadowVm, child: ShadowPage, sptep: int) -> ShadowPage:
    """Unlink `child` from one parent entry; returns its new header. Source: mmu.c."""
    parents = list(child.parents)
    parents.remove(sptep)
    vm.write(sptep, empty_value(vm, vm.sps[sptep & ~PAGE_OFFSET_MASK]))
    return vm.update_sp(child, parents=tuple(parents))


def set_leaf(vm: ShadowVm, sptep: int, spte: int, gfn: int, access: int) -> None:
    """Store a leaf, and note which gfn it maps with which access: rmap and shadowed translation."""
    if sptep in vm.leaves:
        forget_leaf(vm, sptep)
    vm.write(sptep, spte)
    vm.leaves.put(sptep, (gfn, access))
    vm.rmap.put(gfn, (*vm.rmap.get(gfn, ()), sptep))


def drop_spte(vm: ShadowVm, sptep: int) -> None:
    """Take a leaf away. Source: mmu.c."""
    vm.write(sptep, SHADOW_NONPRESENT_VALUE)
    forget_leaf(vm, sptep)


def forget_leaf(vm: ShadowVm, sptep: int) -> None:
    """Take a leaf out of the books."""
    gfn, _ = vm.leaves[sptep]
    vm.leaves.drop(sptep)
    _without(vm.rmap, gfn, sptep)


def _without(table: Table, key: int, item: int) -> None:
    """Take `item` out of the tuple that a Table has at `key`; an empty one goes."""
    left = list(table[key])
    left.remove(item)
    if left:
        table.put(key, tuple(left))
    else:
        table.drop(key)


def page_zap_pte(vm: ShadowVm, sptep: int, spte: int) -> bool:
    """Take a present entry away, whatever it is; True if it was present.

    Source: mmu.c, mmu_page_zap_pte. A child without parents stays in the hash.
    """
    if not vm.is_present(spte):
        return False
    if sptep in vm.leaves:
        drop_spte(vm, sptep)
    else:
        drop_parent_pte(vm, vm.child(spte), sptep)
    return True


# -- write protection


def write_protect_gfn(vm: ShadowVm, gfn: int) -> bool:
    """Let no leaf write to the page at `gfn`; True if one could.

    Source: mmu.c, kvm_vcpu_write_protect_gfn.
    """
    is_changed = False
    for sptep in vm.rmap.get(gfn, ()):
        spte = vm.read(sptep)
        if spte & PT_WRITABLE_MASK:
            vm.write(sptep, spte & ~PT_WRITABLE_MASK)
            is_changed = True
    return is_changed


def try_to_unsync_pages(vm: ShadowVm, gfn: int, *, synchronizing: bool = False) -> bool:
    """Let the guest write to a page that may be a table of its own. True: it may, and tables of
    level 1 that shadow it are out of sync from now on. False: KVM must see each write.

    synchronizing: nothing that is in sync may leave it now.
    Source: mmu.c, mmu_try_to_unsync_pages.
    """
    in_sync = [sp for sp in shadowing(vm, gfn) if not sp.unsync]
    if any(sp.level > 1 for sp in in_sync) or (synchronizing and in_sync):
        return False
    for sp in in_sync:
        vm.update_sp(sp, unsync=True)
    return True


# -- the end of a page


def prepare_zap_page(vm: ShadowVm, sp: ShadowPage, invalid: list[ShadowPage]) -> None:
    """Cut a page off from parents and children. It joins `invalid`, or, while it is somebody's
    root, is marked invalid, and every vCPU has to look whether its root is obsolete.

    Source: mmu.c, __kvm_mmu_prepare_zap_page.
    """
    vm.count("sp_zapped")
    _zap_unsync_children(vm, sp, invalid)
    for sptep, spte in present_entries(vm, sp):
        page_zap_pte(vm, sptep, spte)
    sp = vm.sps[sp.spt]
    for sptep in sp.parents:
        sp = drop_parent_pte(vm, sp, sptep)
    was_obsolete = is_obsolete_sp(vm, sp)
    sp = vm.update_sp(sp, role=sp.role | INVALID, unsync=False)
    if not sp.root_count:
        invalid.append(sp)
    elif not was_obsolete:
        vm.make_all_cpus_request(FREE_OBSOLETE_ROOTS)


def _zap_unsync_children(vm: ShadowVm, sp: ShadowPage, invalid: list[ShadowPage]) -> None:
    """Source: mmu.c, mmu_zap_unsync_children."""
    for child in unsync_below(vm, sp):
        if not vm.sps[child.spt].is_invalid:
            prepare_zap_page(vm, vm.sps[child.spt], invalid)


def unsync_below(vm: ShadowVm, sp: ShadowPage) -> list[ShadowPage]:
    """The pages below `sp` that are out of sync. Source: mmu.c, mmu_unsync_walk.

    Differs: it looks at all children; Linux keeps a bitmap of those that lead to one.
    """
    if sp.level == 1:
        return []
    found: list[ShadowPage] = []
    for _, spte in present_entries(vm, sp):
        child = vm.child(spte)
        found += [child] if child.unsync else unsync_below(vm, child)
    return found


def commit_zap_page(vm: ShadowVm, invalid: list[ShadowPage]) -> None:
    """Flush, and free the pages. Source: mmu.c, kvm_mmu_commit_zap_page."""
    if not invalid:
        return
    vm.flush_remote_tlbs()
    for sp in invalid:
        free_shadow_page(vm, sp)


def free_shadow_page(vm: ShadowVm, sp: ShadowPage) -> None:
    """Forget a page that nothing links any more. Source: mmu.c, kvm_mmu_free_shadow_page."""
    vm.sps.drop(sp.spt)
    _without(vm.mmu_page_hash, sp.gfn, sp.spt)
    if sp.role & _PAE_ROOT:
        free_pae_root_page(vm, sp.spt)
    else:
        vm.pages.free_page(sp.spt)


def alloc_pae_root_page(vm: ShadowVm) -> int:
    """HPA of a page below 4 GiB for a PAE root, decrypted if TDP is off; NO_PAGE without one."""
    hpa = vm.pages.alloc_page(PAE_ROOT_PAGE, below_4g=True)
    if hpa != NO_PAGE:
        vm.count("roots_allocated")
        if not vm.params.tdp_enabled and "decrypt" not in vm.params.forget:
            vm.set_memory_decrypted(hpa)
    return hpa


def free_pae_root_page(vm: ShadowVm, hpa: int) -> None:
    """Give back a page that was made ready for a PAE root: encrypted again if TDP is off.

    Source: the review of the RFC asks for one function for both places that free such pages; mmu.c,
    free_mmu_pages, does the same for a special root.
    """
    if not vm.params.tdp_enabled and "decrypt" not in vm.params.forget:
        vm.set_memory_encrypted(hpa)
    vm.pages.free_page(hpa)


# -- root counts


def hold_root(vm: ShadowVm, sp: ShadowPage) -> ShadowPage:
    """One more vCPU has it as a root."""
    return vm.update_sp(sp, root_count=sp.root_count + 1)


def drop_root(vm: ShadowVm, sp: ShadowPage, invalid: list[ShadowPage]) -> None:
    """One vCPU less; the last one of a page that is invalid already zaps it.

    Source: mmu.c, mmu_free_root_page.
    """
    sp = vm.update_sp(sp, root_count=sp.root_count - 1)
    if not sp.root_count and sp.is_invalid:
        prepare_zap_page(vm, sp, invalid)


def child_role(parent: ShadowPage, index: int, *, direct: bool, access: int, forget: bool) -> int:
    """The role of a table that entry `index` of `parent` shall link.

    direct: it shadows no table. access: ACC_* of the levels above it. forget: leave out what the
    RFC takes care of, that children of a PAE root are none themselves.
    Source: mmu.c, kvm_mmu_child_role; the RFC clears pae_root below level 3. The quadrant of a page
    directory is the number of its PDPTE.
    """
    role = ShadowRole(parent.role)
    level = parent.level - 1
    is_small = bool(role.has_4_byte_gpte) and not direct
    changes = {
        "level": level,
        "access": access,
        "direct": int(direct),
        "has_4_byte_gpte": int(is_small),
        "quadrant": (index if level == 2 else index & 1) if is_small else 0,
        "level_promoted": 0,
    }
    if not forget:
        changes["pae_root"] = 0
    return int(role.with_(**changes))
