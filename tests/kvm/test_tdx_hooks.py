"""The four hooks of a TD: which SEAMCALLs, in which order, and what becomes of each failure."""

from errno import EBUSY, EINVAL, EIO
from typing import Any

import pytest
from td_scene import TdScene

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_EPT_ENTRY_STATE_INCORRECT,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
)
from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm.exits import Interrupted
from tdxlab.kvm.host import NO_HKID, KvmHost
from tdxlab.kvm.pages import NO_PAGE
from tdxlab.kvm.tdx import TD_STATE_RUNNABLE
from tdxlab.kvm.tdx_hooks import tdx_sept_drop_private_spte
from tdxlab.kvm.tdx_run import kvm_vcpu_ioctl_run
from tdxlab.kvm.vm import IN_GUEST_MODE
from tdxlab.steps import run

BUSY = TDX_OPERAND_BUSY | 0x92
HARD = TDX_PAGE_METADATA_INCORRECT
GFN = 0x40


@pytest.fixture
def td() -> TdScene:
    """A TD that can run, with GFN mapped and accepted."""
    scene = TdScene(vcpus=2)
    scene.add(0x10)
    scene.finalize()
    scene.fault_in([GFN])
    scene.machine.calls.clear()
    scene.events.clear()
    return scene


def pfn_of(td: TdScene, gfn: int) -> int:
    folio = td.gmem.folio(td.files[0], gfn)
    assert folio is not None
    return folio.pfn


def new_pfn(td: TdScene) -> int:
    return td.host.pages.alloc_page("test") >> PAGE_SHIFT


def requests(td: TdScene) -> list[str]:
    return [event[1] for event in td.events if event[0] == "kvm_make_all_cpus_request"]


# -- link


def test_link_external_spt_adds_a_table_with_the_level_of_the_entry_above(td: TdScene) -> None:
    page = td.host.pages.alloc_page("test")
    assert run(td.tdx.link_external_spt(1 << 18, 3, page)) == 0
    [(_, leaf, registers)] = td.machine.calls
    assert leaf == abi.TDH_MEM_SEPT_ADD
    assert (registers["rcx"], registers["rdx"]) == (1 << 30 | 2, td.tdx.td.tdr)
    assert registers["r8"] == page


def test_link_external_spt_is_busy_once(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MEM_SEPT_ADD, BUSY)
    assert run(td.tdx.link_external_spt(1 << 18, 3, td.host.pages.alloc_page("t"))) == -EBUSY
    assert td.machine.names() == ["TDH.MEM.SEPT.ADD"]
    assert not td.vm.vm_dead


def test_link_external_spt_kills_the_vm_after_a_hard_error(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MEM_SEPT_ADD, HARD)
    assert run(td.tdx.link_external_spt(1 << 18, 3, td.host.pages.alloc_page("t"))) == -EIO
    assert "TDH_MEM_SEPT_ADD" in td.vm.vm_bugged


# -- set


def test_set_external_spte_augments_with_a_reference_when_runnable(td: TdScene) -> None:
    pfn = new_pfn(td)
    assert run(td.tdx.set_external_spte(GFN + 1, 1, pfn)) == 0
    assert td.machine.names() == ["TDH.MEM.PAGE.AUG"]
    assert td.gmem.page_refs.view[pfn] == 1


@pytest.mark.parametrize(("status", "err", "dead"), [(BUSY, -EBUSY, False), (HARD, -EIO, True)])
def test_set_external_spte_drops_the_reference_after_a_failure(
    td: TdScene, status: int, err: int, dead: bool
) -> None:
    td.machine.answer(abi.TDH_MEM_PAGE_AUG, status)
    pfn = new_pfn(td)
    assert run(td.tdx.set_external_spte(GFN + 1, 1, pfn)) == err
    assert td.gmem.page_refs.view[pfn] == 0
    assert td.vm.vm_dead is dead


def test_set_external_spte_refuses_a_large_page(td: TdScene) -> None:
    assert run(td.tdx.set_external_spte(0x200, 2, 0x100)) == -EINVAL
    assert td.machine.calls == []
    assert td.vm.vm_dead


def test_set_external_spte_only_counts_before_the_td_is_finalized() -> None:
    td = TdScene()
    before = td.count()
    pfn = new_pfn(td)
    assert run(td.tdx.set_external_spte(GFN, 1, pfn)) == 0
    assert td.since(before) == {}
    assert (td.tdx.nr_premapped, td.gmem.page_refs.view[pfn]) == (1, 1)


def test_set_external_spte_kills_the_vm_if_premapping_is_over() -> None:
    td = TdScene()
    td.vm.pre_fault_allowed = True
    assert run(td.tdx.set_external_spte(GFN, 1, 0x100)) == -EINVAL
    assert td.vm.vm_dead


# -- remove


def test_remove_external_spte_blocks_tracks_kicks_removes_writes_back_clears(td: TdScene) -> None:
    pfn = pfn_of(td, GFN)
    cleared = td.machine.trace.hardware()["movdir64b"]
    assert run(td.tdx.remove_external_spte(GFN, 1, pfn)) == 0
    assert td.machine.names() == [
        "TDH.MEM.RANGE.BLOCK",
        "TDH.MEM.TRACK",
        "TDH.MEM.PAGE.REMOVE",
        "TDH.PHYMEM.PAGE.WBINVD",
    ]
    assert requests(td) == ["OUTSIDE_GUEST_MODE"]
    assert td.machine.trace.hardware()["movdir64b"] == cleared + 64
    assert td.gmem.page_refs.view[pfn] == 0
    assert td.machine.calls[-1][2]["rcx"] == td.tdx.hkid << 46 | pfn << PAGE_SHIFT


@pytest.mark.parametrize(
    "leaf", [abi.TDH_MEM_RANGE_BLOCK, abi.TDH_MEM_TRACK, abi.TDH_MEM_PAGE_REMOVE]
)
def test_remove_external_spte_keeps_vcpus_out_and_calls_again_when_busy(
    td: TdScene, leaf: int
) -> None:
    td.machine.answer(leaf, BUSY)
    operation = td.tdx.remove_external_spte(GFN, 1, pfn_of(td, GFN))
    waits = []
    result = None
    try:
        while True:
            next(operation)
            waits.append(td.tdx.wait_for_sept_zap)
    except StopIteration as end:
        result = end.value
    assert result == 0
    assert len(td.machine.calls) == 5
    assert requests(td) == ["OUTSIDE_GUEST_MODE"] * 2
    assert True in waits
    assert td.tdx.wait_for_sept_zap is False


@pytest.mark.parametrize(
    "leaf", [abi.TDH_MEM_RANGE_BLOCK, abi.TDH_MEM_TRACK, abi.TDH_MEM_PAGE_REMOVE]
)
def test_remove_external_spte_kills_the_vm_when_busy_twice(td: TdScene, leaf: int) -> None:
    td.machine.answer(leaf, BUSY, BUSY)
    run(td.tdx.remove_external_spte(GFN, 1, pfn_of(td, GFN)))
    assert td.vm.vm_dead
    assert td.tdx.wait_for_sept_zap is False


@pytest.mark.parametrize(
    ("leaf", "calls"),
    [
        (abi.TDH_MEM_RANGE_BLOCK, 1),
        (abi.TDH_MEM_PAGE_REMOVE, 3),
        (abi.TDH_PHYMEM_PAGE_WBINVD, 4),
    ],
)
def test_remove_external_spte_loses_the_page_after_a_hard_error(
    td: TdScene, leaf: int, calls: int
) -> None:
    td.machine.answer(leaf, HARD)
    pfn = pfn_of(td, GFN)
    assert run(td.tdx.remove_external_spte(GFN, 1, pfn)) == -EIO
    assert len(td.machine.calls) == calls
    assert td.gmem.page_refs.view[pfn] == 1
    assert "SEAMCALL" in td.host.pages.leaked[pfn << PAGE_SHIFT]


def test_remove_external_spte_goes_on_after_a_failed_track(td: TdScene) -> None:
    """A failed track ends the VM, and the page is removed all the same if the module lets it."""
    td.machine.answer(abi.TDH_MEM_TRACK, HARD)
    run(td.tdx.remove_external_spte(GFN, 1, pfn_of(td, GFN)))
    assert "TDH_MEM_TRACK" in td.vm.vm_bugged
    assert td.machine.names()[2] == "TDH.MEM.PAGE.REMOVE"


def test_remove_external_spte_wants_a_keyid(td: TdScene) -> None:
    pfn = pfn_of(td, GFN)
    td.tdx.hkid = NO_HKID
    assert run(td.tdx.remove_external_spte(GFN, 1, pfn)) == -EINVAL
    assert td.machine.calls == []
    assert td.vm.vm_dead


def test_remove_external_spte_takes_back_a_premapped_page() -> None:
    td = TdScene()
    td.add(0x10)
    pfn = new_pfn(td)
    run(td.tdx.set_external_spte(0x11, 1, pfn))
    before = td.count()
    assert run(td.tdx.remove_external_spte(0x11, 1, pfn)) == 0
    assert td.since(before) == {"TDH.MEM.RANGE.BLOCK": 1}
    assert td.tdx.nr_premapped == 0
    assert td.gmem.page_refs.view[pfn] == 0
    assert not td.vm.vm_dead


def test_remove_external_spte_does_not_track_an_added_page_before_the_td_runs() -> None:
    td = TdScene()
    td.add(0x10)
    before = td.count()
    td.events.clear()
    assert run(td.tdx.remove_external_spte(0x10, 1, pfn_of(td, 0x10))) == 0
    assert td.since(before) == {
        "TDH.MEM.RANGE.BLOCK": 1,
        "TDH.MEM.PAGE.REMOVE": 1,
        "TDH.PHYMEM.PAGE.WBINVD": 1,
    }
    assert requests(td) == []


@pytest.mark.parametrize("runnable", [False, True])
def test_remove_external_spte_kills_the_vm_over_an_unexpected_state(runnable: bool) -> None:
    """Without a premapped page, or with the TD running, the state is nobody's but a bug's."""
    td = TdScene()
    td.add(0x10)
    if runnable:
        td.tdx.nr_premapped = 1
        td.tdx.state = TD_STATE_RUNNABLE
    td.machine.answer(abi.TDH_MEM_RANGE_BLOCK, TDX_EPT_ENTRY_STATE_INCORRECT | OPERAND_ID_RCX)
    assert run(td.tdx.remove_external_spte(0x10, 1, pfn_of(td, 0x10))) == -EIO
    assert td.vm.vm_dead


# -- free


def test_free_external_spt_wants_the_keyid_gone(td: TdScene) -> None:
    assert run(td.tdx.free_external_spt(0, 1, 0x1000)) == -EINVAL
    assert td.machine.calls == []
    assert td.vm.vm_dead


def test_free_external_spt_reclaims_and_clears(td: TdScene) -> None:
    td.tdx.hkid = NO_HKID
    td.machine.answer(abi.TDH_PHYMEM_PAGE_RECLAIM, 0)
    page = td.host.pages.alloc_page("test")
    td.machine.store(page, b"left over")
    assert run(td.tdx.free_external_spt(0, 1, page)) == 0
    assert td.machine.memory.read(page, 9) == bytes(9)


def test_free_external_spt_fails_without_clearing_if_the_page_is_not_given_back(
    td: TdScene,
) -> None:
    td.tdx.hkid = NO_HKID
    page = td.host.pages.alloc_page("test")
    td.machine.store(page, b"left over")
    assert run(td.tdx.free_external_spt(0, 1, page)) == -EIO
    assert td.machine.memory.read(page, 9) == b"left over"
    assert not td.vm.vm_dead


# -- kicks


def enter(td: TdScene, vcpu: int) -> Any:
    """A KVM_RUN that has come as far as into the guest."""
    waits = KvmHost.run_guest.__get__(td.host)
    td.host.run_guest = waits  # type: ignore[method-assign]
    thread = td.host.on_cpu(vcpu, kvm_vcpu_ioctl_run(td.vcpus[vcpu]))
    while not td.machine.cpu.vcpu_inside(vcpu):
        next(thread)
    return thread


def test_remove_external_spte_takes_a_guest_out_and_its_thread_sees_the_interrupt(
    td: TdScene,
) -> None:
    thread = enter(td, 1)
    assert td.vcpus[1].mode == IN_GUEST_MODE
    ipis = td.host.counts["ipi"]
    assert run(td.host.on_cpu(0, td.tdx.remove_external_spte(GFN, 1, pfn_of(td, GFN)))) == 0
    assert td.machine.cpu.vcpu_inside(1) == 0
    assert td.host.counts["ipi"] == ipis + 1
    while not td.machine.cpu.vcpu_inside(1):
        next(thread)
    assert td.vcpus[1].exit_reason == 1
    td.vcpus[1].signal_pending = True
    td.host.take_out(1)
    assert run(thread) == Interrupted()


def test_kick_all_interrupts_neither_the_own_lp_nor_who_is_outside(td: TdScene) -> None:
    ipis = td.host.counts["ipi"]
    td.vcpus[0].mode = IN_GUEST_MODE
    run(td.host.on_cpu(td.vcpus[0].cpu, td.tdx.kick_all(td.vm, "OUTSIDE_GUEST_MODE")))
    assert td.host.counts["ipi"] == ipis
    assert td.vcpus[0].requests == frozenset()


def test_alloc_page_says_when_memory_is_used_up() -> None:
    td = TdScene()
    td.host.pages.regions = ()
    while (hpa := td.tdx.alloc_page("test")) != NO_PAGE:
        assert td.host.pages.in_use[hpa] == "test of TD"
    assert td.tdx.alloc_page("test") == NO_PAGE


def test_remove_external_spte_blocks_a_large_page_and_then_says_that_it_is_a_bug(
    td: TdScene,
) -> None:
    before = td.count()
    td.events.clear()
    assert run(td.tdx.remove_external_spte(0x200, 2, 0x1000)) == -EIO
    assert td.since(before) == {"TDH.MEM.RANGE.BLOCK": 1}
    assert "is zapped: only 4 KiB pages are possible" in str(td.events)
    td.vm.vm_bugged = ""
    before = td.count()
    assert run(tdx_sept_drop_private_spte(td.tdx, 0x200, 2, 0x1000)) == -EINVAL
    assert "is removed: only 4 KiB pages are possible" in td.vm.vm_bugged
    assert td.since(before) == {}
