"""How many SEAMCALLs, kicks and flushes each operation costs; expected from the set of pages alone.

Symbols as in Linux's cost model: S the gfns, N their number, T(S) the Secure EPT tables they need.
"""

import random
from typing import Any

import pytest
from td_scene import SLOT_PAGES, TdScene, boot, tables

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import TDX_OPERAND_BUSY
from tdxlab.kvm.fault import kvm_vcpu_pre_fault_memory
from tdxlab.kvm.memory_region import kvm_set_memory_region
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.zap import kvm_mmu_zap_all_fast
from tdxlab.steps import run

LPS, PACKAGES = 4, 2
N_DCS, N_DCX = 6, 5
SHARED = {48: 1 << 47, 52: 1 << 51}
#: Bases of the slots: below 4 GiB, in another 512 GiB, and at GPAW 52 in another 256 TiB.
SLOTS = {48: (0, 1 << 30), 52: (0, 1 << 30, 1 << 37)}

Counts = dict[str, int]
GPAWS = pytest.mark.parametrize("gpaw", [48, 52])
LAYOUTS = pytest.mark.parametrize(("gpaw", "seed"), [(g, s) for g in (48, 52) for s in range(4)])


def layout(gpaw: int, seed: int, most: int = 60) -> list[int]:
    """Random gfns in all slots: clusters and lone pages."""
    choose = random.Random(seed * 100 + gpaw)
    gfns: set[int] = set()
    while len(gfns) < most:
        base = choose.choice(SLOTS[gpaw]) + choose.randrange(SLOT_PAGES - 16)
        gfns.update(range(base, base + choose.choice((1, 1, 4, 16))))
    return sorted(gfns)


def scene(gpaw: int, vcpus: int = 1, *, runs: bool = True) -> TdScene:
    td = TdScene(boot(lps=LPS, packages=PACKAGES), gpaw=gpaw, vcpus=vcpus, slots=SLOTS[gpaw])
    if runs:
        td.finalize()
        td.fault_in([])
    return td


def private_part(pages: int, *, runs: bool = True) -> Counts:
    """What removing so many mapped private pages costs."""
    leaves = ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE", "TDH.PHYMEM.PAGE.WBINVD"]
    return dict.fromkeys([*leaves, *(["TDH.MEM.TRACK"] if runs else [])], pages)


def flushes(td: TdScene) -> int:
    return sum(event[0].startswith("kvm_flush_remote_tlbs") for event in td.events)


# -- private faults


@LAYOUTS
def test_faults_cost_one_aug_each_and_one_sept_add_per_table(gpaw: int, seed: int) -> None:
    td, gfns = scene(gpaw), layout(gpaw, seed)
    random.Random(seed).shuffle(gfns)
    before, flushed = td.count(), td.host.counts["clflush"]
    td.fault_in(gfns)
    assert td.since(before) == {
        "TDH.VP.ENTER": len(gfns) + 1,
        "TDH.MEM.PAGE.AUG": len(gfns),
        "TDH.MEM.SEPT.ADD": tables(gfns, gpaw),
    }
    assert td.host.counts["clflush"] == flushed + len(gfns) + tables(gfns, gpaw)


@GPAWS
def test_a_fault_adds_the_tables_that_are_missing(gpaw: int) -> None:
    td = scene(gpaw)
    path = [0, 1 << 18, 1 << 9, 1] if gpaw == 48 else [0, 1 << 30, 1 << 18, 1 << 9, 1]
    added = []
    for gfn in path:
        before = td.count()
        td.fault_in([gfn])
        added.append(td.since(before).get("TDH.MEM.SEPT.ADD", 0))
    assert added == ([3, 2, 1, 0] if gpaw == 48 else [4, 3, 2, 1, 0])


@GPAWS
def test_a_page_that_somebody_else_mapped_meanwhile_costs_no_call(gpaw: int) -> None:
    td = scene(gpaw, vcpus=2)
    td.fault_in([], vcpu=1)
    before = td.count()

    def raced(lp: int) -> Any:
        outcome = td.accept(lp, 7)
        run(td.host.on_cpu(1, kvm_vcpu_pre_fault_memory(td.vcpus[1], 7 << 12, 4096)))
        return outcome

    td.run([raced, 7])
    calls = td.since(before)
    assert calls["TDH.MEM.PAGE.AUG"] == 1
    assert calls["TDH.VP.ENTER"] == 2
    assert td.vcpus[0].stats["pf_spurious"] == 1


@pytest.mark.parametrize("busy", [1, 3])
@pytest.mark.parametrize("leaf", [abi.TDH_MEM_SEPT_ADD, abi.TDH_MEM_PAGE_AUG])
def test_each_busy_answer_costs_one_more_call_and_no_entry(leaf: int, busy: int) -> None:
    td = scene(48)
    td.machine.calls.clear()
    td.machine.answer(leaf, *[TDX_OPERAND_BUSY | 0x92] * busy)
    td.fault_in([9])
    names = td.machine.names()
    extra = {abi.TDH_MEM_SEPT_ADD: (busy, 0), abi.TDH_MEM_PAGE_AUG: (0, busy)}[leaf]
    assert names.count("TDH.MEM.SEPT.ADD") == 3 + extra[0]
    assert names.count("TDH.MEM.PAGE.AUG") == 1 + extra[1]
    assert names.count("TDH.VP.ENTER") == 2


@GPAWS
def test_pre_fault_costs_no_entry(gpaw: int) -> None:
    td = scene(gpaw)
    before = td.count()
    assert run(kvm_vcpu_pre_fault_memory(td.vcpus[0], 0x10_0000, 40 << 12)) == 40 << 12
    gfns = range(0x100, 0x100 + 40)
    assert td.since(before) == {
        "TDH.MEM.PAGE.AUG": 40,
        "TDH.MEM.SEPT.ADD": tables(gfns, gpaw),
    }


@GPAWS
def test_tables_of_contiguous_memory(gpaw: int) -> None:
    one_more = gpaw == 52
    sizes = {1 << 9: 3, 1 << 18: 514, 1 << 20: 2053, 1 << 22: 8209}
    for pages, expected in sizes.items():
        assert tables(range(0, pages, 512), gpaw) == expected + one_more


# -- building


@pytest.mark.parametrize("vcpus", [1, 3])
@GPAWS
def test_creating_a_td_costs(gpaw: int, vcpus: int) -> None:
    host = boot(lps=LPS, packages=PACKAGES)
    before = dict(host.hardware.trace.seamcalls())  # type: ignore[attr-defined]
    td = TdScene(host, gpaw=gpaw, vcpus=vcpus)
    after = td.machine.trace.seamcalls()
    calls = {leaf: number - before.get(leaf, 0) for leaf, number in after.items()}
    assert {leaf: number for leaf, number in calls.items() if number} == {
        abi.TDH_MNG_CREATE: 1,
        abi.TDH_MNG_KEY_CONFIG: PACKAGES,
        abi.TDH_MNG_ADDCX: N_DCS,
        abi.TDH_MNG_INIT: 1,
        abi.TDH_MNG_RD: 2,
        abi.TDH_VP_CREATE: vcpus,
        abi.TDH_VP_ADDCX: N_DCX * vcpus,
        abi.TDH_VP_INIT: vcpus,
        abi.TDH_VP_WR: 3 * vcpus,
    }


@pytest.mark.parametrize("measured", [0, 1])
@GPAWS
def test_init_mem_region_costs(gpaw: int, measured: int) -> None:
    td = scene(gpaw, runs=False)
    td.add(0)
    before, flushed = td.count(), td.host.counts["clflush"]
    assert td.add(0x1F0, 40, flags=measured) == 0
    new = tables([0, *range(0x1F0, 0x218)], gpaw) - tables([0], gpaw)
    expected = {"TDH.MEM.PAGE.ADD": 40, "TDH.MEM.SEPT.ADD": new}
    assert td.since(before) == expected | ({"TDH.MR.EXTEND": 16 * 40} if measured else {})
    assert td.host.counts["clflush"] == flushed + 40 + new


@GPAWS
def test_finalize_costs_one_call_and_loading_a_root_one(gpaw: int) -> None:
    td = scene(gpaw, runs=False)
    before = td.count()
    td.finalize()
    td.fault_in([])
    assert td.since(before) == {"TDH.MR.FINALIZE": 1, "TDH.VP.WR": 1, "TDH.VP.ENTER": 1}


# -- zaps


@LAYOUTS
def test_conversion_to_shared_costs_four_calls_and_a_kick_per_page(gpaw: int, seed: int) -> None:
    td, gfns = scene(gpaw), layout(gpaw, seed)
    td.fault_in(gfns)
    before, kicks = td.count(), td.host.counts["kick"]
    cleared = td.machine.trace.hardware()["movdir64b"]
    td.events.clear()
    start, end = min(gfns), min(gfns) + SLOT_PAGES // 2
    hit = [gfn for gfn in gfns if start <= gfn < end]
    assert run(kvm_vm_set_mem_attributes(td.vm, start, end, False)) == 0
    assert td.since(before) == private_part(len(hit))
    assert td.host.counts["kick"] == kicks + len(hit)
    assert td.machine.trace.hardware()["movdir64b"] == cleared + 64 * len(hit)
    assert flushes(td) == 1


@LAYOUTS
def test_conversion_there_and_back_costs_augs_and_no_table(gpaw: int, seed: int) -> None:
    td, gfns = scene(gpaw), layout(gpaw, seed)
    first = [gfn for gfn in gfns if gfn < SLOT_PAGES]
    td.fault_in(gfns)
    run(kvm_vm_set_mem_attributes(td.vm, 0, SLOT_PAGES, False))
    before = td.count()
    td.events.clear()
    run(kvm_vm_set_mem_attributes(td.vm, 0, SLOT_PAGES, True))
    assert td.since(before) == {}
    td.fault_in(first)
    assert td.since(before) == {
        "TDH.MEM.PAGE.AUG": len(first),
        "TDH.VP.ENTER": len(first) + 1,
    }


@GPAWS
def test_conversion_of_two_mib_costs_512_times_a_page(gpaw: int) -> None:
    td = scene(gpaw)
    td.fault_in(range(0x200, 0x400))
    before, kicks = td.count(), td.host.counts["kick"]
    td.events.clear()
    run(kvm_vm_set_mem_attributes(td.vm, 0x200, 0x400, False))
    assert td.since(before) == private_part(512)
    assert td.host.counts["kick"] == kicks + 512
    assert flushes(td) == 1


@GPAWS
def test_conversion_to_what_it_is_costs_nothing(gpaw: int) -> None:
    td = scene(gpaw)
    td.fault_in([1, 2])
    before, counts = td.count(), td.host.counts
    td.events.clear()
    run(kvm_vm_set_mem_attributes(td.vm, 0, 16, True))
    assert (td.since(before), td.host.counts) == ({}, counts)
    assert flushes(td) == 0


@GPAWS
def test_conversion_of_pages_that_are_not_mapped_costs_no_seamcall(gpaw: int) -> None:
    td = scene(gpaw)
    td.fault_in([100])
    before = td.count()
    run(kvm_vm_set_mem_attributes(td.vm, 0, 16, False))
    assert td.since(before) == {}


@LAYOUTS
def test_deleting_a_slot_costs_four_calls_per_private_page(gpaw: int, seed: int) -> None:
    td, gfns = scene(gpaw), layout(gpaw, seed)
    td.fault_in(gfns)
    before = td.count()
    td.events.clear()
    assert run(kvm_set_memory_region(td.vm, 0, 0, 0, 0, 0)) == 0
    hit = [gfn for gfn in gfns if gfn < SLOT_PAGES]
    assert td.since(before) == (private_part(len(hit)) if hit else {})
    assert flushes(td) == 1


@LAYOUTS
def test_punching_a_hole_costs_four_calls_per_mapped_page(gpaw: int, seed: int) -> None:
    td, gfns = scene(gpaw), layout(gpaw, seed)
    td.fault_in(gfns)
    before = td.count()
    td.events.clear()
    run(td.gmem.punch_hole(td.files[0], 0, SLOT_PAGES))
    hit = [gfn for gfn in gfns if gfn < SLOT_PAGES]
    assert td.since(before) == (private_part(len(hit)) if hit else {})
    assert flushes(td) == bool(hit)


@GPAWS
def test_before_finalize_a_page_costs_three_calls_and_no_kick(gpaw: int) -> None:
    td = scene(gpaw, runs=False)
    td.add(0, 20)
    before, kicks = td.count(), td.host.counts["kick"]
    run(kvm_vm_set_mem_attributes(td.vm, 0, 20, False))
    assert td.since(before) == private_part(20, runs=False)
    assert td.host.counts["kick"] == kicks


def test_worst_case_of_one_page_costs_seven_calls_and_four_kicks() -> None:
    td = scene(48)
    td.fault_in([3])
    for leaf in (abi.TDH_MEM_RANGE_BLOCK, abi.TDH_MEM_TRACK, abi.TDH_MEM_PAGE_REMOVE):
        td.machine.answer(leaf, TDX_OPERAND_BUSY | 0x80)
    td.machine.calls.clear()
    kicks = td.host.counts["kick"]
    run(kvm_vm_set_mem_attributes(td.vm, 3, 4, False))
    assert len(td.machine.calls) == 7
    assert td.host.counts["kick"] == kicks + 4
    assert not td.vm.vm_dead


def test_zap_all_fast_costs_one_root_load_per_vcpu_and_nothing_private() -> None:
    td = scene(48, vcpus=2)
    td.fault_in([1, 2])
    td.fault_in([], vcpu=1)
    before = td.count()
    run(kvm_mmu_zap_all_fast(td.vm))
    td.fault_in([])
    td.fault_in([], vcpu=1)
    assert td.since(before) == {"TDH.VP.WR": 2, "TDH.VP.ENTER": 2}


@pytest.mark.parametrize("pages", [1, 511, 512, 513, 1025])
def test_map_gpa_costs_one_exit_per_2_mib(pages: int) -> None:
    td = scene(48)
    td.tdx.exits_on_map_gpa = True
    before, exits = td.count(), 0
    result = td.run([td.vmcall(r11=0x10001, r12=0, r13=pages << 12)])
    while result.__class__.__name__ == "HypercallExit":
        exits += 1
        result = td.run([])
    assert exits == -(-pages // 512)
    assert td.since(before) == {"TDH.VP.ENTER": 2}


# -- the end


@pytest.mark.parametrize("vcpus", [1, 3])
@LAYOUTS
def test_teardown_costs(gpaw: int, seed: int, vcpus: int) -> None:
    td, gfns = scene(gpaw, vcpus=vcpus), layout(gpaw, seed)
    td.fault_in(gfns)
    before = td.count()
    n, t = len(gfns), tables(gfns, gpaw)
    td.close_files()
    assert td.since(before) == private_part(n)
    td.files.clear()
    td.destroy()
    calls = td.since(before)
    assert calls == {
        **private_part(n),
        "TDH.PHYMEM.PAGE.WBINVD": n + 1,
        "TDH.VP.FLUSH": vcpus,
        "TDH.MNG.VPFLUSHDONE": 1,
        "TDH.PHYMEM.CACHE.WB": PACKAGES,
        "TDH.MNG.KEY.FREEID": 1,
        "TDH.PHYMEM.PAGE.RECLAIM": t + vcpus * (N_DCX + 1) + N_DCS + 1,
    }
    assert sum(calls.values()) == 4 * n + t + vcpus * (N_DCX + 2) + N_DCS + PACKAGES + 4


def test_teardown_of_a_td_that_never_ran_costs_three_calls_per_page() -> None:
    td = scene(48, runs=False)
    td.add(0, 30)
    before = td.count()
    td.close_files()
    assert td.since(before) == private_part(30, runs=False)
