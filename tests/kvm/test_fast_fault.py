"""Tests of page faults that take no lock."""

import pytest

from tdxlab.kvm.fast_fault import fast_page_fault, page_fault_can_be_fast
from tdxlab.kvm.fault import kvm_mmu_do_page_fault
from tdxlab.kvm.page_fault import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_SPURIOUS,
    PageFault,
)
from tdxlab.kvm.params import KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM, MmuParams
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.kvm.spte import (
    FROZEN_SPTE,
    MMU_WRITABLE_MASK,
    PT_WRITABLE_MASK,
    Spte,
    is_access_track_spte,
    mark_spte_for_access_track,
)
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_fast_pf_get_last_sptep
from tdxlab.steps import run
from tests.kvm.fault_scene import PRIVATE_CODE, READ_CODE, FaultScene

WRITE_PRESENT = READ_CODE | PFERR_WRITE_MASK | PFERR_PRESENT_MASK
GFN = 0x1005


def mapped_scene(level: int = 1, *, params: MmuParams | None = None) -> FaultScene:
    """A VM with gfn GFN mapped at `level`."""
    scene = FaultScene(params=params)
    scene.add_slot(0x1000, 0x400)
    scene.user_memory.level = level
    ret, _ = run(kvm_mmu_do_page_fault(scene.vcpu, GFN << 12, READ_CODE))
    assert ret == RET_PF_FIXED
    scene.events.clear()
    return scene


def change(scene: FaultScene, clear: int = 0, value: int | None = None) -> int:
    """Change the last SPTE on the way to GFN behind everybody's back; returns the new value."""
    place = kvm_tdp_mmu_fast_pf_get_last_sptep(scene.vcpu, GFN)
    assert place is not None
    new = place[1] & ~clear if value is None else value
    scene.vm.memory.words.put(place[0], new)
    return new


def a_fault(scene: FaultScene, error_code: int = WRITE_PRESENT) -> PageFault:
    fault = PageFault(GFN << 12, error_code)
    fault.gfn = GFN
    fault.slot = scene.vm.slots.find(GFN)
    return fault


@pytest.mark.parametrize(
    ("error_code", "ad_bits", "fast"),
    [
        (WRITE_PRESENT, True, True),
        (READ_CODE | PFERR_PRESENT_MASK, True, False),
        (READ_CODE | PFERR_WRITE_MASK, True, False),
        (READ_CODE, False, True),
        (READ_CODE | PFERR_PRESENT_MASK, False, False),
        (WRITE_PRESENT | PFERR_RSVD_MASK, True, False),
    ],
)
def test_page_fault_can_be_fast_follows_the_error_code(
    error_code: int, ad_bits: bool, fast: bool
) -> None:
    scene = FaultScene(params=MmuParams(ad_bits=ad_bits))
    assert page_fault_can_be_fast(scene.vm, a_fault(scene, error_code)) is fast


@pytest.mark.parametrize("private", [False, True])
def test_page_fault_can_be_fast_refuses_an_access_of_the_other_kind(private: bool) -> None:
    scene = FaultScene(KVM_X86_SW_PROTECTED_VM)
    scene.set_private(0, 1 << 20, private)
    assert page_fault_can_be_fast(scene.vm, a_fault(scene)) is not private


def test_page_fault_can_be_fast_refuses_private_accesses_of_a_td() -> None:
    scene = FaultScene(KVM_X86_TDX_VM)
    scene.set_private(0, 1 << 20)
    assert not page_fault_can_be_fast(scene.vm, a_fault(scene, PRIVATE_CODE))


def test_page_fault_can_be_fast_asks_for_the_kind_only_where_memory_can_be_private() -> None:
    scene = FaultScene()
    assert page_fault_can_be_fast(scene.vm, a_fault(scene, WRITE_PRESENT | PFERR_PRIVATE_ACCESS))


def test_fast_page_fault_fixed_restores_the_write_bit() -> None:
    scene = mapped_scene()
    protected = change(scene, clear=PT_WRITABLE_MASK)
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == RET_PF_FIXED
    assert scene.spte(GFN << 12) == (1, protected | PT_WRITABLE_MASK)
    event = ("fast_page_fault", 1, GFN, RET_PF_FIXED, protected, protected | PT_WRITABLE_MASK)
    assert scene.events == [event]
    assert scene.vcpu.stats["pf_fast"] == 1


def test_fast_page_fault_spurious_when_the_access_is_allowed_by_now() -> None:
    scene = mapped_scene()
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == RET_PF_SPURIOUS
    assert scene.said("fast_page_fault")[0][3] == RET_PF_SPURIOUS


def test_fast_page_fault_invalid_when_the_mmu_keeps_it_read_only() -> None:
    scene = mapped_scene()
    protected = change(scene, clear=PT_WRITABLE_MASK | MMU_WRITABLE_MASK)
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == RET_PF_INVALID
    assert scene.spte(GFN << 12) == (1, protected)
    assert scene.vcpu.stats["pf_fast"] == 0


@pytest.mark.parametrize("value", [FROZEN_SPTE, 1 << 63])
def test_fast_page_fault_invalid_when_no_leaf_is_there(value: int) -> None:
    scene = mapped_scene()
    change(scene, value=value)
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == RET_PF_INVALID
    assert scene.events == [("fast_page_fault", 1, GFN, RET_PF_INVALID, value, value)]


@pytest.mark.parametrize(
    ("flags", "ret"), [(0, RET_PF_FIXED), (KVM_MEM_LOG_DIRTY_PAGES, RET_PF_INVALID)]
)
def test_fast_page_fault_leaves_large_pages_of_logged_slots_write_protected(
    flags: int, ret: int
) -> None:
    scene = mapped_scene(level=2)
    slot = scene.vm.slots.find(GFN)
    assert slot is not None
    scene.put_slot(slot, slot._replace(flags=flags))
    change(scene, clear=PT_WRITABLE_MASK)
    assert scene.spte(GFN << 12)[0] == 2
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == ret


def test_fast_page_fault_fixed_gives_an_access_tracked_leaf_its_permissions_back() -> None:
    scene = mapped_scene(params=MmuParams(ad_bits=False))
    whole = scene.spte(GFN << 12)[1]
    tracked = change(scene, value=mark_spte_for_access_track(whole))
    assert is_access_track_spte(tracked)
    assert run(fast_page_fault(scene.vcpu, a_fault(scene, READ_CODE))) == RET_PF_FIXED
    spte = Spte(scene.spte(GFN << 12)[1])
    assert (spte.read, spte.write, spte.execute, spte.accessed) == (1, 0, 1, 1)


def test_fast_page_fault_fixed_gives_write_too_when_a_tracked_leaf_is_written() -> None:
    scene = mapped_scene(params=MmuParams(ad_bits=False))
    whole = scene.spte(GFN << 12)[1]
    change(scene, value=mark_spte_for_access_track(whole))
    fault = a_fault(scene, READ_CODE | PFERR_WRITE_MASK)
    assert run(fast_page_fault(scene.vcpu, fault)) == RET_PF_FIXED
    assert scene.spte(GFN << 12)[1] == whole


def test_fast_page_fault_fixed_restores_write_where_no_access_is_tracked_without_ad_bits() -> None:
    scene = mapped_scene(params=MmuParams(ad_bits=False))
    protected = change(scene, clear=PT_WRITABLE_MASK)
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == RET_PF_FIXED
    assert scene.spte(GFN << 12)[1] == protected | PT_WRITABLE_MASK


def test_fast_page_fault_invalid_when_a_fetch_finds_no_execute_permission() -> None:
    scene = mapped_scene(params=MmuParams(ad_bits=False))
    change(scene, clear=Spte.execute.mask)
    fault = a_fault(scene, READ_CODE | PFERR_FETCH_MASK)
    assert run(fast_page_fault(scene.vcpu, fault)) == RET_PF_INVALID


def test_fast_page_fault_looks_again_after_a_lost_race() -> None:
    scene = mapped_scene()
    change(scene, clear=PT_WRITABLE_MASK)
    fixing = fast_page_fault(scene.vcpu, a_fault(scene))
    assert next(fixing)[0] == "cmpxchg fast_page_fault"
    change(scene, value=1 << 63)
    assert run(fixing) == RET_PF_INVALID
    assert scene.spte(GFN << 12)[1] == 1 << 63


def test_fast_page_fault_gives_up_after_five_lost_races() -> None:
    scene = mapped_scene()
    protected = change(scene, clear=PT_WRITABLE_MASK)
    fixing = fast_page_fault(scene.vcpu, a_fault(scene))
    tries = 0
    for _ in fixing:
        tries += 1
        change(scene, value=protected ^ Spte.accessed.mask * (tries & 1))
    assert tries == 5
    assert scene.said("fast_page_fault")[0][3] == RET_PF_INVALID


def test_fast_page_fault_marks_the_page_dirty_when_the_slot_logs_writes() -> None:
    scene = mapped_scene()
    slot = scene.vm.slots.find(GFN)
    assert slot is not None
    logged = slot._replace(flags=KVM_MEM_LOG_DIRTY_PAGES)
    scene.put_slot(slot, logged)
    change(scene, clear=PT_WRITABLE_MASK)
    assert run(fast_page_fault(scene.vcpu, a_fault(scene))) == RET_PF_FIXED
    assert scene.vm.dirty.bits(logged) == [GFN - logged.base_gfn]


def test_fast_page_fault_marks_nothing_dirty_when_only_reading_is_allowed_again() -> None:
    scene = mapped_scene(params=MmuParams(ad_bits=False))
    slot = scene.vm.slots.find(GFN)
    assert slot is not None
    logged = slot._replace(flags=KVM_MEM_LOG_DIRTY_PAGES)
    scene.put_slot(slot, logged)
    change(scene, value=mark_spte_for_access_track(scene.spte(GFN << 12)[1]))
    assert run(fast_page_fault(scene.vcpu, a_fault(scene, READ_CODE))) == RET_PF_FIXED
    assert scene.vm.dirty.bits(logged) == []
