"""KVM_TDX_INIT_MEM_REGION and KVM_TDX_FINALIZE_VM."""

from errno import EBUSY, EEXIST, EFAULT, EINTR, EINVAL, EIO

import pytest
from td_scene import HVA, PAGE_SIZE, TdScene, tables

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import TDX_OPERAND_BUSY, TDX_PAGE_METADATA_INCORRECT
from tdxlab.arch import PAGE_SHIFT
from tdxlab.kvm import tdx_hooks
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.tdx import TD_STATE_INITIALIZED, TD_STATE_RUNNABLE
from tdxlab.kvm.tdx_build import MemRegion, tdx_vcpu_init_mem_region
from tdxlab.steps import run

BUSY, HARD = TDX_OPERAND_BUSY | 0x80, TDX_PAGE_METADATA_INCORRECT


@pytest.fixture
def td() -> TdScene:
    return TdScene()


def init_region(td: TdScene, region: MemRegion, flags: int = 1) -> tuple[int, MemRegion]:
    result: tuple[int, MemRegion] = run(tdx_vcpu_init_mem_region(td.vcpus[0], region, flags))
    return result


def test_init_mem_region_copies_measures_and_maps(td: TdScene) -> None:
    td.user.write(HVA, b"first instruction")
    before = td.count()
    assert init_region(td, MemRegion(HVA, 0x7000, 2)) == (0, MemRegion(HVA + 0x2000, 0x9000, 0))
    calls = td.since(before)
    assert calls["TDH.MEM.PAGE.ADD"] == 2
    assert calls["TDH.MR.EXTEND"] == 32
    assert calls["TDH.MEM.SEPT.ADD"] == tables([7, 8], 48)
    assert "TDH.MEM.PAGE.AUG" not in calls
    folio = td.gmem.folio(td.files[0], 7)
    assert folio is not None
    assert td.machine.memory.page(folio.pfn << PAGE_SHIFT).startswith(b"first instruction")
    assert td.tdx.nr_premapped == 0


def test_init_mem_region_does_not_measure_unless_asked(td: TdScene) -> None:
    before = td.count()
    assert init_region(td, MemRegion(HVA, 0x7000, 1), flags=0)[0] == 0
    assert "TDH.MR.EXTEND" not in td.since(before)


@pytest.mark.parametrize(
    ("region", "flags"),
    [
        (MemRegion(HVA + 1, 0, 1), 1),
        (MemRegion(HVA, 0x800, 1), 1),
        (MemRegion(HVA, 0, 0), 1),
        (MemRegion(HVA, (1 << 64) - PAGE_SIZE, 2), 1),
        (MemRegion(HVA, 1 << 47, 1), 1),
        (MemRegion(HVA, (1 << 47) - PAGE_SIZE, 2), 1),
        (MemRegion(HVA, 0, 1), 2),
    ],
)
def test_init_mem_region_refuses_a_bad_region(td: TdScene, region: MemRegion, flags: int) -> None:
    before = td.count()
    assert init_region(td, region, flags) == (-EINVAL, region)
    assert td.since(before) == {}


def test_init_mem_region_refuses_a_finalized_td(td: TdScene) -> None:
    td.finalize()
    assert td.add(0) == -EINVAL


def test_init_mem_region_refuses_a_page_that_is_there(td: TdScene) -> None:
    assert td.add(4) == 0
    assert td.add(4) == -EEXIST


def test_init_mem_region_refuses_a_shared_gfn(td: TdScene) -> None:
    run(kvm_vm_set_mem_attributes(td.vm, 4, 5, False))
    assert td.add(4) == -EINVAL


def test_init_mem_region_refuses_a_source_that_is_not_mapped(td: TdScene) -> None:
    assert init_region(td, MemRegion(HVA - (1 << 30), 0, 1))[0] == -EFAULT


def test_init_mem_region_stops_for_a_signal(td: TdScene) -> None:
    td.vcpus[0].signal_pending = True
    region = MemRegion(HVA, 0, 3)
    assert init_region(td, region) == (-EINTR, region)


@pytest.mark.parametrize(("status", "err"), [(BUSY, -EBUSY), (HARD, -EIO)])
def test_init_mem_region_leaves_the_page_premapped_when_the_module_refuses(
    td: TdScene, status: int, err: int
) -> None:
    td.machine.answer(abi.TDH_MEM_PAGE_ADD, None, status)
    ret, left = init_region(td, MemRegion(HVA, 0, 3))
    assert (ret, left.nr_pages, left.gpa) == (err, 2, PAGE_SIZE)
    assert td.tdx.nr_premapped == 1
    assert not td.vm.vm_dead
    assert td.finalize() == -EINVAL
    assert td.add(1) == -EEXIST


def test_init_mem_region_succeeds_again_after_the_page_was_punched_out(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MEM_PAGE_ADD, BUSY)
    assert td.add(1) == -EBUSY
    run(td.gmem.punch_hole(td.files[0], 1, 2))
    assert td.tdx.nr_premapped == 0
    assert td.add(1) == 0
    assert td.finalize() == 0


def test_init_mem_region_fails_if_it_cannot_measure(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MR_EXTEND, None, HARD)
    assert td.add(1) == -EIO


def test_finalize_makes_the_td_runnable_once(td: TdScene) -> None:
    assert td.finalize() == 0
    assert td.tdx.state == TD_STATE_RUNNABLE
    assert td.vm.pre_fault_allowed
    assert td.finalize() == -EINVAL


def test_finalize_can_be_tried_again_when_busy(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MR_FINALIZE, BUSY)
    assert td.finalize() == -EBUSY
    assert (td.tdx.state, td.vm.pre_fault_allowed) == (TD_STATE_INITIALIZED, False)
    assert td.finalize() == 0


def test_finalize_kills_the_vm_after_a_hard_error(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MR_FINALIZE, HARD)
    assert td.finalize() == -EIO
    assert "TDH_MR_FINALIZE" in td.vm.vm_bugged


def test_finalize_refuses_a_td_that_was_never_initialised(td: TdScene) -> None:
    td.destroy()
    assert td.finalize() == -EINVAL


def test_init_mem_region_bug_when_nobody_premapped_the_page(
    td: TdScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdx_hooks, "_tdx_mem_page_record_premap_cnt", lambda tdx: 0)
    td.add(4)
    assert td.vm.vm_bugged == "a page was added that was not premapped"
    assert td.tdx.nr_premapped == 0
