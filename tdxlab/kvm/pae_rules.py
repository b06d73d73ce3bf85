"""What must hold of shadow pages and PAE roots at every moment at which nobody is half-way.

complaints(vm)      # [] if everything holds
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tdxlab.arch import PAGE_OFFSET_MASK
from tdxlab.kvm.pae_pdpte import INVALID_PAE_ROOT, PDPTES, reserved_bits_set
from tdxlab.kvm.pae_zones import SIZE_4G
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.role import Role
from tdxlab.kvm.shadow_pages import PAE_ROOT_PAGE, empty_value
from tdxlab.kvm.shadow_params import NESTED, ShadowRole
from tdxlab.kvm.shadow_roots import design_of
from tdxlab.kvm.shadow_vm import ShadowPage, ShadowVcpu, ShadowVm
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE
from tdxlab.kvm.vm import INVALID_PAGE


def complaints(vm: ShadowVm) -> list[str]:
    """Every rule that is broken, in words."""
    found = [*_pages(vm), *_references(vm)]
    for sp in vm.sps.values():
        found += _roles(vm, sp)
    for vcpu in vm.vcpus:
        found += _root(vcpu)
    return found + _encryption(vm)


def roots_held(vcpu: ShadowVcpu) -> list[int]:
    """HPA of each shadow page that the vCPU holds as a root, or through a slot of one."""
    vm = vcpu.vm
    held = [root.hpa for root in vcpu.prev_roots if root.hpa != INVALID_PAGE]
    if vm.root_sp(vcpu) is not None:
        return [*held, vcpu.root.hpa]
    if vcpu.pae_root == NO_PAGE:
        return held
    return held + [vm.address(slot) for slot in design_of(vm).slots(vcpu) if slot]


def _references(vm: ShadowVm) -> Iterator[str]:
    """Root counts are the references that vCPUs hold; parents are the entries that link."""
    held = Counter(hpa for vcpu in vm.vcpus for hpa in roots_held(vcpu))
    links: dict[int, list[int]] = {}
    leaves = set()
    for sp in vm.sps.values():
        for place, spte in enumerate(vm.read_table(sp.spt)):
            sptep = sp.spt + 8 * place
            if not vm.is_present(spte):
                yield from _empty_entry(vm, sp, place, spte)
            elif sp.level == 1:
                leaves.add(sptep)
            else:
                links.setdefault(vm.address(spte), []).append(sptep)
    for spt, sp in vm.sps.items():
        if sp.root_count != held[spt]:
            yield f"page {spt:#x}: root_count {sp.root_count}, held {held[spt]} times"
        if sorted(sp.parents) != sorted(links.get(spt, [])):
            yield f"page {spt:#x}: parents and the entries that link it differ"
    if leaves != set(vm.leaves) or Counter(_mapped(vm)) != Counter(leaves):
        yield "leaves and rmap differ"


def _mapped(vm: ShadowVm) -> list[int]:
    return [sptep for sptes in vm.rmap.values() for sptep in sptes]


def _empty_entry(vm: ShadowVm, sp: ShadowPage, place: int, spte: int) -> Iterator[str]:
    """An entry that links nothing has the empty value of its page's kind."""
    is_root = bool(sp.role & ShadowRole.pae_root.mask)
    expected = empty_value(vm, sp) if not is_root or place < PDPTES else 0
    if spte != expected and not (is_root and sp.level < 3 and spte == SHADOW_NONPRESENT_VALUE):
        yield f"page {sp.spt:#x}: entry {place} links nothing and holds {spte:#x}"


def _roles(vm: ShadowVm, sp: ShadowPage) -> Iterator[str]:
    role = ShadowRole(sp.role)
    if role.direct and role.has_4_byte_gpte:
        yield f"page {sp.spt:#x}: direct, and entries of 4 bytes"
    if role.quadrant and not role.has_4_byte_gpte:
        yield f"page {sp.spt:#x}: a quadrant, and no entries of 4 bytes"
    if not role.pae_root:
        return
    if role.level != 3:
        yield f"page {sp.spt:#x}: called a PAE root, at level {role.level}"
    if sp.spt >= SIZE_4G:
        yield f"page {sp.spt:#x}: a PAE root above 4 GiB"
    if any(map(vm.is_present, vm.read_table(sp.spt)[PDPTES:])):
        yield f"page {sp.spt:#x}: a PAE root with more than four entries"


def _root(vcpu: ShadowVcpu) -> Iterator[str]:
    """A vCPU's root: where it lies, what the CPU reads there, and what is left of a freed one."""
    vm, root = vcpu.vm, vcpu.root.hpa
    if any(kept.hpa not in (INVALID_PAGE, *vm.sps) for kept in vcpu.prev_roots):
        yield f"vCPU {vcpu.vcpu_id}: keeps a root without a header"
    if root == INVALID_PAGE and any(slot != INVALID_PAE_ROOT for slot in _own_slots(vcpu)):
        yield f"vCPU {vcpu.vcpu_id}: no root, and slots that are not empty"
    if root == INVALID_PAGE or vm.params.use == NESTED:
        return
    if root >= SIZE_4G:
        yield f"vCPU {vcpu.vcpu_id}: the root lies above 4 GiB"
    for index in range(PDPTES):
        pdpte = vm.cpu_read(0, root + 8 * index)
        if reserved_bits_set(pdpte, vm.params.maxphyaddr):
            yield f"vCPU {vcpu.vcpu_id}: the CPU refuses slot {index}, {pdpte:#x}"


def _own_slots(vcpu: ShadowVcpu) -> tuple[int, ...]:
    """The slots of a special root, whether it is in use or not."""
    return () if vcpu.pae_root == NO_PAGE else design_of(vcpu.vm).slots(vcpu)


def _pages(vm: ShadowVm) -> Iterator[str]:
    """Every page that is out is known to somebody, and to one only."""
    known = Counter(list(vm.sps))
    if vm.default_pdpte:
        known[vm.address(vm.default_pdpte) & ~PAGE_OFFSET_MASK] += 1
    for vcpu in vm.vcpus:
        known.update(vcpu.page_cache)
        special = (vcpu.pae_root, vcpu.pml4_root, vcpu.pml5_root, vcpu.pae_root_cache)
        known.update(hpa for hpa in special if hpa != NO_PAGE)
    if known != Counter(list(vm.pages.in_use)):
        yield "pages that are out, and pages that are known, differ"


def _encryption(vm: ShadowVm) -> list[str]:
    """Decrypted are the pages made ready for PAE roots of shadow paging, and no others."""
    if not vm.params.me_value:
        return []
    roots = {hpa for hpa, use in vm.pages.in_use.items() if use == PAE_ROOT_PAGE}
    expected = set[int]() if vm.params.tdp_enabled else roots
    return [f"page {hpa:#x}: encrypted or decrypted by mistake" for hpa in expected ^ set(vm.plain)]


def quadrants(vm: ShadowVm) -> list[tuple[int, int, int]]:
    """(gfn, level, quadrant) of every page that shadows entries of 4 bytes, sorted."""
    roles = [(sp.gfn, Role(sp.role)) for sp in vm.sps.values() if sp.has_gptes]
    return sorted((gfn, role.level, role.quadrant) for gfn, role in roles if role.has_4_byte_gpte)
