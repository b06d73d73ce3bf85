"""Tests of how large a page one fault maps."""

import pytest

from tdxlab.kvm.hugepage import disallowed_hugepage_adjust, kvm_mmu_hugepage_adjust
from tdxlab.kvm.page_fault import (
    KVM_PFN_ERR_FAULT,
    KVM_PFN_NOSLOT,
    PFERR_FETCH_MASK,
    RET_PF_FIXED,
    RET_PF_SPURIOUS,
)
from tdxlab.kvm.params import (
    MmuParams,
)
from tdxlab.kvm.slots import (
    KVM_MEM_LOG_DIRTY_PAGES,
)
from tdxlab.kvm.spte import is_executable_pte, spte_to_pfn
from tests.kvm.fault_scene import (
    GFN,
    READ_CODE,
    SHARED_PFN,
    a_fault,
    fault_in,
    plain_scene,
)


@pytest.mark.parametrize("host_level", [1, 2, 3])
def test_kvm_mmu_hugepage_adjust_follows_the_host_up_to_what_the_slot_holds(
    host_level: int,
) -> None:
    scene = plain_scene()
    scene.user_memory.level = host_level
    assert fault_in(scene, GFN << 12) == (RET_PF_FIXED, min(host_level, 2))


def test_kvm_mmu_hugepage_adjust_stays_at_4k_when_writes_are_logged() -> None:
    assert fault_in(plain_scene(KVM_MEM_LOG_DIRTY_PAGES), GFN << 12) == (RET_PF_FIXED, 1)


@pytest.mark.parametrize("pfn", [KVM_PFN_NOSLOT, KVM_PFN_ERR_FAULT])
def test_kvm_mmu_hugepage_adjust_leaves_alone_what_has_no_page(pfn: int) -> None:
    scene = plain_scene()
    fault = a_fault(scene, GFN)
    fault.pfn = pfn
    kvm_mmu_hugepage_adjust(scene.vcpu, fault)
    assert (fault.pfn, fault.req_level, fault.goal_level) == (pfn, 1, 1)


def test_kvm_mmu_hugepage_adjust_keeps_fetches_off_large_pages_but_says_what_they_cost() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    fault = a_fault(scene, GFN, READ_CODE | PFERR_FETCH_MASK)
    fault.nx_huge_page_workaround_enabled = True
    fault.pfn = SHARED_PFN + GFN
    kvm_mmu_hugepage_adjust(scene.vcpu, fault)
    assert fault.huge_page_disallowed
    assert (fault.pfn, fault.req_level, fault.goal_level) == (SHARED_PFN + GFN, 2, 1)


def test_disallowed_hugepage_adjust_keeps_a_read_out_of_a_table_made_for_fetches() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    assert fault_in(scene, GFN << 12, READ_CODE | PFERR_FETCH_MASK) == (RET_PF_FIXED, 1)
    assert scene.vm.stats["nx_lpage_splits"] == 1
    assert fault_in(scene, GFN + 1 << 12) == (RET_PF_FIXED, 1)
    level, spte = scene.spte(GFN + 1 << 12)
    assert (level, spte_to_pfn(spte), is_executable_pte(spte)) == (1, SHARED_PFN + GFN + 1, True)


def test_disallowed_hugepage_adjust_changes_nothing_above_the_goal() -> None:
    scene = plain_scene()
    fault = a_fault(scene, GFN)
    fault.goal_level, fault.pfn = 2, SHARED_PFN
    disallowed_hugepage_adjust(scene.vm, fault, 1 << 63, 3)
    disallowed_hugepage_adjust(scene.vm, fault, 1 << 63, 2)
    assert (fault.goal_level, fault.pfn) == (2, SHARED_PFN)


def test_disallowed_hugepage_adjust_looks_below_no_4k_leaf() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    fetch = READ_CODE | PFERR_FETCH_MASK
    assert fault_in(scene, GFN << 12, fetch) == (RET_PF_FIXED, 1)
    assert fault_in(scene, GFN << 12, fetch) == (RET_PF_SPURIOUS, 1)


def test_disallowed_hugepage_adjust_passes_a_table_above_the_goal() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    fault_in(scene, GFN << 12, READ_CODE | PFERR_FETCH_MASK)
    (table,) = scene.vm.possible_nx_huge_pages
    fault = a_fault(scene, GFN)
    disallowed_hugepage_adjust(scene.vm, fault, 0x907 | 1 << 63 | table, 2)
    assert fault.goal_level == 1


def test_disallowed_hugepage_adjust_lets_a_large_page_replace_any_other_table() -> None:
    scene = plain_scene(params=MmuParams(nx_huge_pages=True))
    scene.user_memory.level = 1
    assert fault_in(scene, GFN << 12) == (RET_PF_FIXED, 1)
    scene.user_memory.level = 2
    assert fault_in(scene, GFN + 1 << 12) == (RET_PF_FIXED, 2)
