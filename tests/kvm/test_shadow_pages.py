"""Shadow pages: kept ready, found, counted, brought into line, zapped and freed."""

from __future__ import annotations

from errno import ENOMEM
from typing import Any

import pytest
from shadow_scene import RWU, Scene, small_map

from tdxlab.kvm.caches import CAPACITY, MIN_OBJECTS
from tdxlab.kvm.pae_pdpte import X86_CR4_PAE
from tdxlab.kvm.pae_rules import complaints
from tdxlab.kvm.role import Role
from tdxlab.kvm.shadow import shadow_leaf, zap_page
from tdxlab.kvm.shadow_pages import (
    child_role,
    find_page,
    free_page_cache,
    shadowing,
    take_page,
    topup_page_cache,
    write_protect_gfn,
)
from tdxlab.kvm.shadow_params import AMD, DESIGNS, NPT, REVIEWED
from tdxlab.kvm.shadow_roots import kvm_mmu_free_roots
from tdxlab.kvm.shadow_run import destroy_vcpu, set_cr3, set_cr4, store
from tdxlab.kvm.shadow_sync import get_shadow_page, sync_children, sync_page
from tdxlab.kvm.shadow_vm import FREE_OBSOLETE_ROOTS, ShadowPage
from tdxlab.kvm.tdp_set import HostBug
from tdxlab.steps import run

ALL = pytest.mark.parametrize("design", DESIGNS)
DIRECTORY, TABLE = 0x2000, 0x3000


def mapped(*, used: bool = True, **params: Any) -> Scene:
    """A guest whose address 0x3000 is mapped, and used."""
    scene = Scene(2, cr3=DIRECTORY, **params)
    scene.put(DIRECTORY, 0, TABLE | RWU)
    scene.put(TABLE, 3, 0x5000 | RWU)
    scene.turn_on()
    if used:
        assert scene.access(0x3000, write=True).kind == "ok"
    return scene


def flushes(scene: Scene) -> int:
    return scene.vm.counts["remote_tlb_flush"]


def page_of(scene: Scene, gpa: int) -> ShadowPage:
    """The first page that shadows a table."""
    return shadowing(scene.vm, gpa >> 12)[0]


# -- pages kept ready


def test_topup_fills_the_cache_only_when_it_runs_low() -> None:
    vcpu = mapped(used=False).vcpu
    assert topup_page_cache(vcpu) == 0
    assert len(vcpu.page_cache) == CAPACITY
    while len(vcpu.page_cache) > MIN_OBJECTS:
        take_page(vcpu)
    assert topup_page_cache(vcpu) == 0
    assert len(vcpu.page_cache) == MIN_OBJECTS
    take_page(vcpu)
    assert topup_page_cache(vcpu) == 0
    assert len(vcpu.page_cache) == CAPACITY


@pytest.mark.parametrize(("pages", "error"), [(MIN_OBJECTS, 0), (MIN_OBJECTS - 1, -ENOMEM)])
def test_topup_is_content_with_the_least_and_keeps_what_it_had(pages: int, error: int) -> None:
    scene = Scene(0, design=REVIEWED, memory_map=small_map(low=0, normal=pages))
    assert topup_page_cache(scene.vcpu) == error
    assert len(scene.vcpu.page_cache) == pages
    free_page_cache(scene.vcpu)
    assert scene.vcpu.page_cache == ()
    assert scene.vm.pages.free == pages


def test_a_child_called_a_pae_root_without_a_low_page_ends_the_host() -> None:
    scene = mapped(
        used=False,
        design=REVIEWED,
        forget=frozenset({"clear role"}),
        memory_map=small_map(low=2),
    )
    with pytest.raises(HostBug, match="no page below 4 GiB"):
        scene.access(0x3000)


# -- found


def test_find_page_counts_what_it_looked_for_and_what_it_found() -> None:
    scene = mapped()
    page, before = page_of(scene, TABLE), scene.vm.counts
    assert find_page(scene.vm, page.gfn, page.role) == page
    assert find_page(scene.vm, page.gfn, page.role ^ Role.quadrant.mask) is None
    assert find_page(scene.vm, page.gfn, page.role, (1, 0, 0, 0)) is None
    assert scene.vm.counts["sp_lookups"] == before["sp_lookups"] + 3
    assert scene.vm.counts["sp_hits"] == before["sp_hits"] + 1


def test_get_shadow_page_counts_what_it_makes() -> None:
    scene = mapped()
    page, made = page_of(scene, TABLE), scene.vm.counts["sp_created"]
    assert get_shadow_page(scene.vcpu, page.gfn, page.role) == page
    assert scene.vm.counts["sp_created"] == made
    new = get_shadow_page(scene.vcpu, 7, page.role)
    assert scene.vm.counts["sp_created"] == made + 1
    assert (new.gfn, new.role, new.parents) == (7, page.role, ())
    assert scene.vm.sps[new.spt] == new


def test_get_shadow_page_flushes_what_it_brought_into_line() -> None:
    scene = mapped()
    page = page_of(scene, TABLE)
    assert scene.guest_put(TABLE, 3, 0x6000 | RWU) == "direct"
    before, synced = flushes(scene), scene.vm.counts["synced"]
    assert get_shadow_page(scene.vcpu, page.gfn, page.role).spt == page.spt
    assert flushes(scene) == before + 1
    assert scene.vm.counts["synced"] == synced + 1


def test_get_shadow_page_flushes_nothing_where_nothing_was_taken_away() -> None:
    scene = mapped()
    page = page_of(scene, TABLE)
    assert scene.guest_put(TABLE, 4, 0x6000 | RWU) == "direct"
    before = flushes(scene)
    get_shadow_page(scene.vcpu, page.gfn, page.role)
    assert flushes(scene) == before


def test_get_shadow_page_frees_what_is_out_of_sync_when_the_table_becomes_a_directory() -> None:
    scene = mapped()
    page = page_of(scene, TABLE)
    assert scene.guest_put(TABLE, 9, 0x7000 | RWU) == "direct"
    before = flushes(scene)
    role = int(Role(page.role).with_(level=2))
    new = get_shadow_page(scene.vcpu, page.gfn, role)
    assert shadowing(scene.vm, TABLE >> 12) == [new]
    assert page.spt not in scene.vm.sps
    assert page.spt not in scene.vm.pages.in_use
    assert flushes(scene) == before + 1


def test_get_shadow_page_makes_a_new_one_where_it_cannot_compare_the_one_it_found() -> None:
    scene = mapped()
    page = page_of(scene, TABLE)
    assert scene.guest_put(TABLE, 3, 0x6000 | RWU) == "direct"
    assert run(set_cr3(scene.vcpu, 0x9000)) == "fine"
    assert run(set_cr4(scene.vcpu, X86_CR4_PAE)) == "fine"
    new = get_shadow_page(scene.vcpu, page.gfn, page.role)
    assert new.spt != page.spt
    assert page.spt not in scene.vm.sps
    assert not any(scene.vm.read_table(new.spt)[index] & 1 for index in range(512))


def test_get_shadow_page_lets_the_other_half_of_a_table_be_out_of_sync() -> None:
    scene = mapped()
    page = page_of(scene, TABLE)
    assert scene.guest_put(TABLE, 9, 0x7000 | RWU) == "direct"
    other = get_shadow_page(scene.vcpu, page.gfn, int(Role(page.role).with_(quadrant=1)))
    assert other.spt != page.spt
    assert scene.vm.sps[page.spt].unsync


def test_new_page_for_a_large_page_protects_no_data() -> None:
    scene = mapped(used=False)
    scene.put(TABLE, 3, RWU)
    assert scene.access(0x3000, write=True).kind == "ok"
    scene.put(DIRECTORY, 1, 0x80 | RWU)
    before = flushes(scene)
    assert scene.access(0x40_5000).kind == "ok"
    assert scene.vm.read(shadow_leaf(scene.vcpu, 0x3000)) & 2
    assert flushes(scene) == before


# -- brought into line


@ALL
def test_leaves_and_tables_are_encrypted_where_memory_is(design: str) -> None:
    scene = mapped(design=design, vendor=AMD, c_bit=45)
    leaf = shadow_leaf(scene.vcpu, 0x3000)
    page = scene.vm.sp_of_entry(leaf)
    assert page is not None
    assert all(scene.vm.read(entry) & 1 << 45 for entry in (leaf, *page.parents))


@pytest.mark.parametrize(("entry", "allows"), [(0x5067, 6), (0x5063, 2), (0x5065, 4), (0x5061, 0)])
def test_a_leaf_allows_what_the_guests_entry_allows(entry: int, allows: int) -> None:
    scene = mapped(used=False)
    scene.put(TABLE, 3, entry)
    assert scene.access(0x3000, user=False).kind == "ok"
    assert scene.vm.read(shadow_leaf(scene.vcpu, 0x3000)) & 6 == allows


def test_sync_children_frees_a_page_that_it_cannot_compare() -> None:
    scene = mapped()
    assert scene.guest_put(TABLE, 3, 0x6000 | RWU) == "direct"
    parent, page = page_of(scene, DIRECTORY), page_of(scene, TABLE)
    assert run(set_cr3(scene.vcpu, 0x9000)) == "fine"
    assert run(set_cr4(scene.vcpu, X86_CR4_PAE)) == "fine"
    before = flushes(scene)
    sync_children(scene.vcpu, parent)
    assert page.spt not in scene.vm.sps
    assert page.spt not in scene.vm.pages.in_use
    assert flushes(scene) == before + 1
    assert complaints(scene.vm) == []


def test_sync_page_zaps_a_page_that_shadows_no_table() -> None:
    scene = mapped(used=False)
    scene.put(DIRECTORY, 1, 0x80 | RWU)
    scene.access(0x40_0000)
    page = scene.vm.sp_of_entry(shadow_leaf(scene.vcpu, 0x40_0000))
    assert page is not None
    assert page.is_direct
    invalid: list[ShadowPage] = []
    assert sync_page(scene.vcpu, page, invalid) is None
    assert [sp.spt for sp in invalid] == [page.spt]


def test_sync_children_flushes_for_the_first_of_two_pages_too() -> None:
    scene = mapped()
    scene.put(DIRECTORY, 1, 0x4000 | RWU)
    scene.put(0x4000, 0, 0x6000 | RWU)
    assert scene.access(0x40_0000).kind == "ok"
    for table, entry in ((TABLE, 0x5065), (0x4000, 0x6027)):
        assert scene.guest_put(table, 3 if table == TABLE else 0, entry) == "direct"
    before = scene.vm.counts
    assert run(set_cr3(scene.vcpu, DIRECTORY)) == "fine"
    scene.access(0x40_0000)
    assert scene.vm.counts["synced"] == before["synced"] + 2
    assert flushes(scene) == before["remote_tlb_flush"] + 1
    assert not any(sp.unsync for sp in scene.vm.sps.values())


def test_sync_children_flushes_when_a_mapping_of_the_table_is_protected() -> None:
    scene = mapped(used=False)
    scene.put(TABLE, 9, TABLE | RWU)
    scene.access(0x3000)
    assert run(store(scene.vcpu, 0x9000 + 4 * 20, 0, 4)).kind == "ok"
    before = flushes(scene)
    assert run(set_cr3(scene.vcpu, DIRECTORY)) == "fine"
    scene.access(0x3000)
    assert not scene.vm.read(shadow_leaf(scene.vcpu, 0x9000)) & 2
    assert flushes(scene) == before + 1


# -- the VM itself


@pytest.mark.parametrize("params", [{}, {"vendor": AMD, "c_bit": 45}])
def test_guest_memory_is_zero_at_the_beginning(params: dict[str, Any]) -> None:
    vm = Scene(2, **params).vm
    assert {vm.read_guest(gpa, 8) for gpa in (0, 0x1000, 0x5FF8)} == {0}
    assert vm.cpu_read(0, vm.zero_page) == 0


def test_write_guest_refuses_a_gpa_without_memory() -> None:
    vm = Scene(2).vm
    last = (vm.npages << 12) - 1
    with pytest.raises(ValueError, match=f"GPA {last + 1:#x} has no memory; .* up to {last:#x}"):
        vm.write_guest(last + 1, 0, 1)
    assert vm.read_guest(last + 1, 1) is None


def test_child_of_an_entry_that_leads_to_no_page_ends_the_host() -> None:
    vm = mapped().vm
    with pytest.raises(HostBug, match="and no page table is there"):
        vm.child(0x1234_5000 | 1)


# -- zapped


@ALL
def test_zap_page_flushes_before_the_page_is_free(design: str) -> None:
    scene = mapped(design=design)
    page, before = page_of(scene, TABLE), scene.vm.counts
    assert scene.vcpu.in_guest
    run(zap_page(scene.vm, page.spt))
    assert page.spt not in scene.vm.sps
    assert scene.vm.counts["sp_zapped"] == before["sp_zapped"] + 1
    assert scene.vm.counts["remote_tlb_flush"] == before["remote_tlb_flush"] + 1
    assert not scene.vcpu.in_guest
    assert complaints(scene.vm) == []


@ALL
def test_zap_page_takes_a_page_out_of_sync_along_once_that_is_linked_twice(design: str) -> None:
    scene = mapped(design=design)
    scene.put(DIRECTORY, 2, TABLE | RWU)
    assert scene.access(2 << 22 | 0x3000).kind == "ok"
    assert scene.guest_put(TABLE, 9, 0x7000 | RWU) == "direct"
    page, directory = page_of(scene, TABLE), page_of(scene, DIRECTORY)
    assert len(page.parents) == 2
    zapped = scene.vm.counts["sp_zapped"]
    run(zap_page(scene.vm, directory.spt))
    assert page.spt not in scene.vm.sps
    assert scene.vm.counts["sp_zapped"] == zapped + 2
    assert complaints(scene.vm) == []


@ALL
def test_zap_page_of_a_root_asks_for_new_roots_once(design: str) -> None:
    scene = mapped(design=design)
    root = next(spt for spt, sp in scene.vm.sps.items() if sp.root_count)
    run(zap_page(scene.vm, root))
    assert FREE_OBSOLETE_ROOTS in scene.vcpu.requests
    scene.vcpu.requests = frozenset()
    run(zap_page(scene.vm, root))
    assert scene.vcpu.requests == frozenset()
    assert scene.vm.sps[root].is_invalid


def test_drop_root_zaps_an_invalid_root_with_its_last_reference() -> None:
    scene = mapped(design=REVIEWED, vcpus=2)
    first, second = scene.vm.vcpus
    assert scene.access(0x3000, vcpu=second).kind == "ok"
    assert first.root == second.root
    run(zap_page(scene.vm, first.root.hpa))
    zapped = scene.vm.counts["sp_zapped"]
    run(kvm_mmu_free_roots(first))
    assert scene.vm.counts["sp_zapped"] == zapped
    root = second.root.hpa
    run(kvm_mmu_free_roots(second))
    assert scene.vm.counts["sp_zapped"] == zapped + 1
    assert root not in scene.vm.sps


def test_write_protect_gfn_says_whether_a_leaf_could_write() -> None:
    vm = mapped().vm
    assert write_protect_gfn(vm, 5)
    assert not write_protect_gfn(vm, 5)
    assert not write_protect_gfn(vm, 6)


@pytest.mark.parametrize(
    ("params", "encrypted"),
    [
        ({"vendor": AMD, "c_bit": 45}, 1),
        ({"vendor": AMD, "c_bit": 45, "forget": frozenset({"decrypt"})}, 0),
        ({"vendor": AMD, "use": NPT}, 0),
    ],
)
def test_destroy_vcpu_encrypts_again_what_was_decrypted(
    params: dict[str, Any], encrypted: int
) -> None:
    scene = Scene(0, **params)
    run(destroy_vcpu(scene.vcpu))
    assert scene.vm.counts["encrypted"] == scene.vm.counts["decrypted"] == encrypted


def test_a_child_of_a_directory_takes_its_quadrant_from_the_entrys_place() -> None:
    scene = mapped()
    parent = page_of(scene, DIRECTORY)
    for index, quadrant in ((0, 0), (1, 1), (6, 0), (7, 1)):
        role = Role(child_role(parent, index, direct=False, access=7, forget=False))
        assert (role.level, role.quadrant, role.has_4_byte_gpte) == (1, quadrant, 1)
    direct = Role(child_role(parent, 1, direct=True, access=3, forget=False))
    assert (direct.quadrant, direct.has_4_byte_gpte, direct.direct, direct.access) == (0, 0, 1, 3)
