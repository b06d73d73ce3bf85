"""The benchmark's yardstick answers recorded traces of the real module, status for status."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tdxlab.bench import baseline as facts
from tdxlab.bench.baseline import TYPE, Baseline

TRACES = Path(__file__).parent.parent / "data" / "conformance" / "tdx_module"
REGISTERS = ("rcx", "rdx", "r8", "r9", "r10", "r11")
BASE, FREE_PAGE, GPA = 1 << 32, (1 << 32) + (8 << 20), 1 << 30
AUG, BLOCK, TRACK, REMOVE, WBINVD, RECLAIM = 6, 7, 38, 29, 41, 28
PLATFORM: dict[str, Any] = {
    "hkid_start_bit": 46,
    "private_hkid_min": 32,
    "private_hkid_max": 63,
    "tdx_global_hkid": 32,
    "tdmrs": [{"base": BASE, "size": 2 << 30, "reserved": []}],
    "seamrr": {"base": 12 << 30, "size": 32 << 20},
    "packages": 2,
    "wbinvd_sub_blocks": 2,
    "lp_to_package": [0, 0, 1, 1],
}


def read_trace(name: str) -> dict[str, Any]:
    with gzip.open(TRACES / f"{name}.json.gz", "rt") as file:
        trace: dict[str, Any] = json.load(file)
    return trace


def answer(baseline: Baseline, step: dict[str, Any]) -> int:
    """The status that the baseline gives to one recorded SEAMCALL."""
    params = step.get("mem_in", {}).get("TD_PARAMS")
    if params is not None:
        fields = {name: int(text, 16) for name, text in params.items()}
        baseline.td_params[int(step["in"]["rdx"], 16)] = fields
    regs = [int(step["in"].get(name, "0"), 16) for name in REGISTERS]
    return baseline.seamcall(step["lp"], step["leaf_num"] | step["version"] << 16, regs)


@pytest.mark.parametrize(
    ("name", "seamcalls"), [("s9_page_reuse", 96), ("s4_teardown_two_tds", 93), ("s4_limits", 85)]
)
def test_baseline_statuses_equal_recorded(name: str, seamcalls: int) -> None:
    trace = read_trace(name)
    baseline = Baseline()
    baseline.boot(trace["platform"])
    compared = 0
    for number, step in enumerate(trace["steps"]):
        if step.get("pseudo") == "HOST_INTERRUPT_PENDING":
            baseline.interrupt_pending = bool(step["value"])
        elif "pseudo" not in step:
            got = answer(baseline, step)
            assert got == int(step["status"], 16), (number, step["leaf"], hex(got))
            assert not baseline.held
            assert baseline.held_sept is None
            compared += 1
    assert compared == seamcalls


def test_baseline_pamt_equals_recorded_in_mid_life() -> None:
    trace = read_trace("s9_page_reuse")
    baseline = Baseline()
    baseline.boot(trace["platform"])
    for step in trace["steps"]:
        if step.get("pseudo") == "STATE_DUMP":
            break
        answer(baseline, step)
    assert len(step["pamt_not_free"]) > 30
    for page in step["pamt_not_free"]:
        size = ("4K", "2M", "1G").index(page["size"])
        lock, kind, owner, bepoch = baseline.pamt(int(page["pa"], 16), size)
        assert (kind, lock) == (getattr(facts, page["pt"]), 0)
        assert (owner, bepoch) == (int(page["owner"], 16), int(page["bepoch"], 16))


def booted() -> Baseline:
    baseline = Baseline()
    baseline.boot(PLATFORM)
    return baseline


def call(baseline: Baseline, leaf: int, rcx: int, rdx: int = 0, r8: int = 0, lp: int = 0) -> int:
    return baseline.seamcall(lp, leaf, [rcx, rdx, r8, 0, 0, 0])


def test_build_td_refuses_when_a_leaf_does() -> None:
    with pytest.raises(ValueError, match=r"leaf 9 .*: 0xc000010000000002"):
        booted().build_td(iter([BASE]), 99, 0x10000, range(0))


@pytest.mark.parametrize(("eptp", "config"), [(0x1E, 0), (0x26, 0), (0x26, 1)])
def test_build_td_maps_zaps_and_reclaims_every_page(eptp: int, config: int) -> None:
    baseline = booted()
    pages = iter(range(BASE, BASE + (64 << 20), 4096))
    memory = range(1 << 30, (1 << 30) + (4 << 20))
    tdr = baseline.build_td(pages, 33, 0x10000, memory, eptp=eptp, config=config)
    private = {gpa: next(pages) for gpa in memory[::4096]}
    for gpa, hpa in private.items():
        assert call(baseline, AUG, gpa, tdr, hpa) == 0
    for gpa, hpa in list(private.items())[: len(private) // 2]:
        assert call(baseline, BLOCK, gpa, tdr) == 0
        assert call(baseline, TRACK, tdr) == 0
        assert call(baseline, REMOVE, gpa, tdr) == 0
        assert call(baseline, WBINVD, hpa | 33 << 46) == 0
    tear_down(baseline, tdr)
    owned = [hpa for hpa in range(BASE, next(pages), 4096) if baseline.pamt(hpa, 0)[TYPE]]
    assert len(owned) == baseline.tds[tdr].children + 1
    for hpa in reversed(owned):
        assert call(baseline, RECLAIM, hpa) == 0
    assert not baseline.tds
    assert not baseline.sept
    assert not baseline.vcpus


def tear_down(baseline: Baseline, tdr: int) -> None:
    assert call(baseline, 18, next(iter(baseline.vcpus))) == 0
    assert call(baseline, 19, tdr) == 0
    for lp in (0, 2):
        assert call(baseline, 40, 0, lp=lp) == 0
    assert call(baseline, 20, tdr) == 0


@pytest.fixture
def small_td() -> tuple[Baseline, int, int, int]:
    """A running TD with one page: baseline, TDR, GPA and HPA of the page."""
    baseline = booted()
    pages = iter(range(BASE, BASE + (1 << 20), 4096))
    tdr = baseline.build_td(pages, 33, 0x10000, range(GPA, GPA + (2 << 20)))
    hpa = next(pages)
    assert call(baseline, AUG, GPA, tdr, hpa) == 0
    return baseline, tdr, GPA, hpa


def test_page_aug_refusals_in_order(small_td: tuple[Baseline, int, int, int]) -> None:
    baseline, tdr, gpa, hpa = small_td
    bad = 0xFFF
    assert call(baseline, AUG, bad, tdr | 1, bad) == facts.OPERAND_INVALID + 2
    assert call(baseline, AUG, bad, 8 << 30, bad) == facts.OPERAND_ADDR_RANGE_ERROR + 2
    assert call(baseline, AUG, bad, hpa, bad) == facts.PAGE_METADATA_INCORRECT + 2
    assert call(baseline, AUG, bad, tdr, bad) == facts.OPERAND_INVALID + 1
    assert call(baseline, AUG, gpa | 2, tdr, bad) == facts.OPERAND_INVALID + 1
    assert call(baseline, AUG, gpa | 1 << 47, tdr, bad) == facts.OPERAND_INVALID + 1
    assert call(baseline, AUG, gpa + (2 << 20), tdr, bad) == facts.EPT_WALK_FAILED + 1
    assert call(baseline, AUG, gpa, tdr, bad) == facts.EPT_ENTRY_STATE_INCORRECT + 1
    assert call(baseline, AUG, gpa + 4096, tdr, bad) == facts.OPERAND_INVALID + 8
    assert call(baseline, AUG, gpa + 4096, tdr, 8 << 30) == facts.OPERAND_ADDR_RANGE_ERROR + 8
    assert call(baseline, AUG, gpa + 4096, tdr, hpa) == facts.PAGE_METADATA_INCORRECT + 8
    assert call(baseline, AUG, gpa + 4096, tdr, hpa + 4096) == 0


def test_zap_refusals_in_order(small_td: tuple[Baseline, int, int, int]) -> None:
    baseline, tdr, gpa, hpa = small_td
    assert call(baseline, REMOVE, gpa, tdr) == facts.GPA_RANGE_NOT_BLOCKED + 1
    assert call(baseline, BLOCK, gpa, tdr) == 0
    assert call(baseline, BLOCK, gpa, tdr) == facts.GPA_RANGE_ALREADY_BLOCKED + 1
    assert call(baseline, REMOVE, gpa, tdr) == facts.TLB_TRACKING_NOT_DONE + 1
    assert call(baseline, TRACK, tdr) == 0
    assert call(baseline, WBINVD, hpa) == facts.PAGE_METADATA_INCORRECT + 1
    assert call(baseline, REMOVE, gpa, tdr) == 0
    assert call(baseline, REMOVE, gpa, tdr) == facts.EPT_ENTRY_STATE_INCORRECT + 1
    assert call(baseline, WBINVD, hpa) == 0


@pytest.mark.parametrize(
    ("leaf", "lock", "status"),
    [
        (AUG, (BASE, 0), facts.OPERAND_BUSY + 2),
        (AUG, (BASE, 1), facts.OPERAND_BUSY + 2),
        (AUG, (BASE, 2), facts.OPERAND_BUSY + 2),
        (AUG, "op_lock", facts.OPERAND_BUSY + 172),
        (AUG, "tree_lock", facts.OPERAND_BUSY + 146),
        (AUG, (FREE_PAGE, 0), facts.OPERAND_BUSY + 8),
        (TRACK, "epoch_lock", facts.OPERAND_BUSY + 169),
    ],
)
def test_lock_of_somebody_else_is_busy(
    small_td: tuple[Baseline, int, int, int], leaf: int, lock: str | tuple[int, int], status: int
) -> None:
    baseline, tdr, gpa, _ = small_td
    td = baseline.tds[tdr]
    word = getattr(td, lock) if isinstance(lock, str) else baseline.pamt(*lock)
    word[0] = 1
    rcx = tdr if leaf == TRACK else gpa + 4096
    assert call(baseline, leaf, rcx, tdr, FREE_PAGE) == status
    assert word[0] == 3
    word[0] = 0
    assert call(baseline, leaf, rcx, tdr, FREE_PAGE) == 0
    assert word[0] == 0


def test_page_reclaim_refused_before_teardown(small_td: tuple[Baseline, int, int, int]) -> None:
    baseline, tdr, _, hpa = small_td
    assert call(baseline, RECLAIM, hpa) == facts.LIFECYCLE_STATE_INCORRECT
    tear_down(baseline, tdr)
    assert call(baseline, RECLAIM, tdr) == facts.TD_ASSOCIATED_PAGES_EXIST
    assert call(baseline, RECLAIM, hpa) == 0
    assert call(baseline, RECLAIM, hpa) == facts.PAGE_METADATA_INCORRECT + 1


@pytest.mark.parametrize("rax", [1 << 24 | AUG, 1 << 16 | AUG, 42, 9999])
def test_seamcall_refuses_unknown_leaf(rax: int) -> None:
    registers = [1, 2, 3, 4, 5, 6]
    assert booted().seamcall(0, rax, registers) == facts.OPERAND_INVALID
    assert registers == [1, 2, 3, 4, 5, 6]


def test_seamcall_refuses_everything_before_boot() -> None:
    assert Baseline().seamcall(0, 9, [0] * 6) == facts.SYS_NOT_READY


def test_large_page_counts_512_children(small_td: tuple[Baseline, int, int, int]) -> None:
    baseline, tdr, gpa, _ = small_td
    td = baseline.tds[tdr]
    gpa += 2 << 20
    before = td.children
    assert call(baseline, AUG, gpa | 1, tdr, FREE_PAGE) == 0
    assert td.children == before + 512
    assert call(baseline, AUG, gpa | 1, tdr, FREE_PAGE) == facts.EPT_ENTRY_STATE_INCORRECT + 1
    for leaf, rcx in ((BLOCK, gpa | 1), (TRACK, tdr), (REMOVE, gpa | 1)):
        assert call(baseline, leaf, rcx, tdr) == 0
    assert td.children == before
    assert call(baseline, AUG, gpa | 1, tdr, FREE_PAGE) == 0
    tear_down(baseline, tdr)
    assert call(baseline, RECLAIM, FREE_PAGE + 4096) == facts.OPERAND_INVALID + 1
    assert call(baseline, RECLAIM, FREE_PAGE) == 0
    assert td.children == before
