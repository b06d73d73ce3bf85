"""The end of a TD: the order, the interrupted write-back, and what is lost after which failure."""

from collections import Counter

import pytest
from td_scene import TdScene, boot, tables

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import (
    TDX_FLUSHVP_NOT_DONE,
    TDX_INTERRUPTED_RESUMABLE,
    TDX_NO_HKID_READY_TO_WBCACHE,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
)
from tdxlab.kvm.exits import Interrupted
from tdxlab.kvm.host import NO_HKID
from tdxlab.kvm.tdx import TD_STATE_UNINITIALIZED
from tdxlab.kvm.tdx_run import kvm_vcpu_ioctl_run
from tdxlab.kvm.tdx_teardown import kvm_destroy_vm, tdx_mmu_release_hkid
from tdxlab.steps import run

HARD = TDX_PAGE_METADATA_INCORRECT
GFNS = [0x10, 0x11, 0x400, 0x40000]


def lived(vcpus: int = 2) -> TdScene:
    """A TD that ran and used some memory, its files still open."""
    td = TdScene(vcpus=vcpus)
    td.add(0x10)
    td.finalize()
    td.fault_in(GFNS[1:])
    td.machine.calls.clear()
    td.events.clear()
    return td


def lost(td: TdScene) -> Counter[str]:
    """Uses of the pages that are gone for good; the allocator has forgotten them."""
    return Counter(td.host.pages.leaked.values())


def test_destroy_calls_in_the_real_order() -> None:
    td = lived()
    td.destroy()
    names = list(dict.fromkeys(td.machine.names()))
    assert names == [
        "TDH.MEM.RANGE.BLOCK",
        "TDH.MEM.TRACK",
        "TDH.MEM.PAGE.REMOVE",
        "TDH.PHYMEM.PAGE.WBINVD",
        "TDH.VP.FLUSH",
        "TDH.MNG.VPFLUSHDONE",
        "TDH.PHYMEM.CACHE.WB",
        "TDH.MNG.KEY.FREEID",
        "TDH.PHYMEM.PAGE.RECLAIM",
    ]


def test_destroy_reclaims_vcpus_tables_bottom_up_and_the_tdr_last() -> None:
    td = lived(vcpus=1)
    vp, tdx_td = td.vcpus[0].vp, td.tdx.td
    td.destroy()
    reclaimed = [
        registers["rcx"]
        for _, leaf, registers in td.machine.calls
        if leaf == abi.TDH_PHYMEM_PAGE_RECLAIM
    ]
    assert reclaimed[:6] == [*vp.tdcx, vp.tdvpr]
    assert reclaimed[-7:] == [*tdx_td.tdcs, tdx_td.tdr]
    assert len(reclaimed) == 6 + tables(GFNS, 48) + 7
    assert td.machine.names()[-1] == "TDH.PHYMEM.PAGE.WBINVD"
    assert td.machine.calls[-1][2]["rcx"] == td.host.global_keyid << 46 | tdx_td.tdr


def test_destroy_gives_everything_back() -> None:
    td = lived()
    td.destroy()
    assert set(td.host.pages.in_use.values()) <= {"user memory"}
    assert td.host.pages.leaked == {}
    assert (td.tdx.hkid, td.host.hkids, td.host.nr_configured_hkids) == (NO_HKID, {}, 0)
    assert td.tdx.state == TD_STATE_UNINITIALIZED
    assert td.vm.vm_bugged == ""
    assert td.machine.module.halted is None
    again = TdScene(td.host, name="next")
    again.destroy()


def test_destroy_leaves_no_poison_behind() -> None:
    td = lived()
    td.destroy()
    memory = td.machine.memory
    for hpa in list(memory.frames):
        if memory.is_ram(hpa):
            assert not memory.is_td_owned(hpa)


def test_destroy_of_a_td_that_was_never_initialised_makes_no_call() -> None:
    td = TdScene(vcpus=0, slots=())
    run(kvm_destroy_vm(td.tdx))
    before = td.count()
    run(kvm_destroy_vm(td.tdx))
    assert td.since(before) == {}


def test_release_hkid_resumes_an_interrupted_write_back() -> None:
    td = lived()
    td.machine.cpu.conditions.interrupt_pending = True
    try:
        td.destroy()
    finally:
        td.machine.cpu.conditions.interrupt_pending = False
    resumes = [r["rcx"] for _, leaf, r in td.machine.calls if leaf == abi.TDH_PHYMEM_CACHE_WB]
    assert resumes == [0, 1, 0, 1]
    assert td.host.hkids == {}


def test_release_hkid_gives_up_after_ten_thousand_interruptions() -> None:
    td = lived()
    td.close_files()
    td.machine.answer(abi.TDH_PHYMEM_CACHE_WB, *[TDX_INTERRUPTED_RESUMABLE] * 20_000)
    td.machine.calls.clear()
    run(tdx_mmu_release_hkid(td.tdx))
    assert td.machine.names().count("TDH.PHYMEM.CACHE.WB") == 20_000
    assert [event[0] for event in td.events].count("warn") == 2
    assert "KEY_FREEID" in td.vm.vm_bugged


def test_release_hkid_takes_nothing_to_write_back_for_success() -> None:
    td = lived()
    td.close_files()
    td.machine.answer(abi.TDH_PHYMEM_CACHE_WB, None, TDX_NO_HKID_READY_TO_WBCACHE)
    run(tdx_mmu_release_hkid(td.tdx))
    assert not any(event[0] == "warn" for event in td.events)


def test_release_hkid_flushes_each_vcpu_on_its_lp_and_writes_back_each_package() -> None:
    td = TdScene(boot(lps=4, packages=2), vcpus=3)
    td.machine.calls.clear()
    run(tdx_mmu_release_hkid(td.tdx))
    calls = [(lp, leaf) for lp, leaf, _ in td.machine.calls]
    assert [lp for lp, leaf in calls if leaf == abi.TDH_VP_FLUSH] == [0, 1, 2]
    assert [lp for lp, leaf in calls if leaf == abi.TDH_PHYMEM_CACHE_WB] == [0, 2]


#: (leaf, its answers, the VM has a bug, the KeyID is lost, pages that are lost)
CONTROL = 12 + 7
FAILURES: list[tuple[str, int, list[int | None], bool, bool, int]] = [
    ("vp_flush", abi.TDH_VP_FLUSH, [HARD], True, True, CONTROL + tables(GFNS, 48)),
    ("vpflushdone_not_done", abi.TDH_MNG_VPFLUSHDONE, [TDX_FLUSHVP_NOT_DONE], True, True,
     CONTROL + tables(GFNS, 48)),
    ("vpflushdone", abi.TDH_MNG_VPFLUSHDONE, [HARD], True, True, CONTROL + tables(GFNS, 48)),
    ("cache_wb", abi.TDH_PHYMEM_CACHE_WB, [TDX_OPERAND_BUSY], True, True,
     CONTROL + tables(GFNS, 48)),
    ("freeid", abi.TDH_MNG_KEY_FREEID, [HARD], True, True, CONTROL + tables(GFNS, 48)),
    ("reclaim_tdcx", abi.TDH_PHYMEM_PAGE_RECLAIM, [HARD], False, False, 2),
    ("reclaim_tdvpr", abi.TDH_PHYMEM_PAGE_RECLAIM, [*[None] * 5, HARD], False, False, 2),
    ("reclaim_table", abi.TDH_PHYMEM_PAGE_RECLAIM, [*[None] * 12, HARD], False, False, 2),
    ("reclaim_tdcs", abi.TDH_PHYMEM_PAGE_RECLAIM,
     [*[None] * (12 + tables(GFNS, 48)), HARD], False, False, 2),
    ("reclaim_tdr", abi.TDH_PHYMEM_PAGE_RECLAIM,
     [*[None] * (18 + tables(GFNS, 48)), HARD], False, False, 1),
    ("wbinvd_tdr", abi.TDH_PHYMEM_PAGE_WBINVD, [*[None] * len(GFNS), HARD], True, False, 1),
    ("block", abi.TDH_MEM_RANGE_BLOCK, [HARD], True, False, 2),
    ("block_busy_twice", abi.TDH_MEM_RANGE_BLOCK, [TDX_OPERAND_BUSY] * 2, True, False, 2),
    ("remove", abi.TDH_MEM_PAGE_REMOVE, [HARD], True, False, 2),
    ("wbinvd", abi.TDH_PHYMEM_PAGE_WBINVD, [HARD], True, False, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("leaf", "statuses", "bugged", "keyid_lost", "pages_lost"),
    [row[1:] for row in FAILURES],
    ids=[row[0] for row in FAILURES],
)
def test_destroy_loses_what_the_module_keeps(
    leaf: int, statuses: list[int | None], bugged: bool, keyid_lost: bool, pages_lost: int
) -> None:
    td = lived()
    td.machine.answer(leaf, *statuses)
    td.destroy()
    # a Secure EPT table that is freed with the KeyID assigned is a bug of its own
    assert bool(td.vm.vm_bugged) is bugged
    assert bool(td.host.hkids) is keyid_lost
    assert len(td.host.pages.leaked) == pages_lost, lost(td)
    assert set(td.host.pages.in_use.values()) <= {"user memory"}
    pages = td.host.pages
    assert (
        pages.free + len(pages.in_use) + len(pages.leaked)
        == sum(region.size for region in pages.regions) // 4096
    )


def test_release_hkid_says_nothing_if_a_vcpu_is_still_associated() -> None:
    td = lived()
    td.machine.answer(abi.TDH_MNG_VPFLUSHDONE, TDX_FLUSHVP_NOT_DONE)
    td.close_files()
    td.events.clear()
    run(tdx_mmu_release_hkid(td.tdx))
    assert td.tdx.is_hkid_assigned
    assert td.events == []


def test_destroy_reclaims_nothing_while_the_keyid_is_assigned() -> None:
    td = lived()
    td.machine.answer(abi.TDH_MNG_KEY_FREEID, HARD)
    td.destroy()
    assert "TDH.PHYMEM.PAGE.RECLAIM" not in td.machine.names()


def test_release_hkid_interrupts_whoever_runs_where_a_vcpu_is_flushed() -> None:
    host = boot()
    other = TdScene(host, name="other")
    other.finalize()
    td = TdScene(host, name="TD")
    thread = host.on_cpu(0, kvm_vcpu_ioctl_run(other.vcpus[0]))
    while not td.machine.cpu.vcpu_inside(0):
        next(thread)
    assert td.vcpus[0].cpu == 0
    run(host.on_cpu(3, tdx_mmu_release_hkid(td.tdx)))
    assert td.tdx.hkid == NO_HKID
    assert not td.machine.cpu.vcpu_inside(0)
    other.vcpus[0].signal_pending = True
    assert run(thread) == Interrupted()
    assert other.vcpus[0].exit_reason == 1
