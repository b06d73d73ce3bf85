"""The benchmark's yardstick answers recorded traces of the real module, status for status."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.baseline import IN_GUEST, TYPE, Baseline

TRACES = Path(__file__).parent.parent / "data" / "conformance" / "tdx_module"
REGISTERS = ("rcx", "rdx", "r8", "r9", "r10", "r11")
PLATFORM: dict[str, Any] = {
    "hkid_start_bit": 46,
    "private_hkid_min": 32,
    "private_hkid_max": 63,
    "tdx_global_hkid": 32,
    "tdmrs": [{"base": 1 << 32, "size": 2 << 30, "reserved": []}],
    "seamrr": {"base": 12 << 30, "size": 32 << 20},
    "packages": 2,
    "lp_to_package": [0, 0, 1, 1],
}
GUEST_START = 1 << 30


def read_trace(name: str) -> dict[str, Any]:
    with gzip.open(TRACES / f"{name}.json.gz", "rt") as file:
        trace: dict[str, Any] = json.load(file)
    return trace


def answer(baseline: Baseline, step: dict[str, Any]) -> int:
    """What the baseline says to one recorded step: the status, or the reason of a TD exit."""
    if "guest_event" in step:
        guest = {name: int(text, 16) for name, text in step["guest_in"].items()}
        return baseline.vm_exit(
            step["lp"], step["exit_reason"], guest.get("rax", 0), guest.get("rcx", 0)
        )
    params = step.get("mem_in", {}).get("TD_PARAMS")
    if params is not None:
        fields = {name: int(text, 16) for name, text in params.items()}
        baseline.td_params[int(step["in"]["rdx"], 16)] = fields
    regs = [int(step["in"].get(name, "0"), 16) for name in REGISTERS]
    return baseline.seamcall(step["lp"], step["leaf_num"] | step["version"] << 16, regs)


def expected(step: dict[str, Any]) -> int:
    return IN_GUEST if step["status"] == "IN_GUEST" else int(step["status"], 16)


@pytest.mark.parametrize(
    ("name", "steps"), [("s1_life_gpaw48", 185), ("s8_walk_0020", 98), ("s9_page_reuse", 96)]
)
def test_baseline_statuses_equal_recorded(name: str, steps: int) -> None:
    trace = read_trace(name)
    baseline = Baseline()
    baseline.boot(trace["platform"])
    compared = 0
    for number, step in enumerate(trace["steps"]):
        if "pseudo" not in step:
            got = answer(baseline, step)
            assert got == expected(step), (number, step["lp"], step.get("leaf"), hex(got))
            compared += 1
    assert compared == steps


def test_baseline_pamt_equals_recorded_after_a_life() -> None:
    trace = read_trace("s8_walk_0020")
    baseline = Baseline()
    baseline.boot(trace["platform"])
    for step in trace["steps"]:
        if step.get("pseudo") == "STATE_DUMP":
            break
        answer(baseline, step)
    recorded = {int(page["pa"], 16): page for page in step["pamt_not_free"]}
    assert recorded
    for hpa, page in recorded.items():
        _, owner, bepoch = baseline.pamt(hpa, 0)[1:]
        assert (owner, bepoch) == (int(page["owner"], 16), int(page["bepoch"], 16))


@pytest.mark.parametrize(("eptp", "config"), [(0x1E, 0), (0x26, 0), (0x26, 1)])
def test_build_td_maps_zaps_and_reclaims_every_page(eptp: int, config: int) -> None:
    baseline = Baseline()
    baseline.boot(PLATFORM)
    pages = iter(range(1 << 32, (1 << 32) + (64 << 20), 4096))
    memory = range(GUEST_START, GUEST_START + (4 << 20))
    tdr = baseline.build_td(pages, 33, 0x10000, memory, eptp=eptp, config=config)
    private = {gpa: next(pages) for gpa in memory[::4096]}
    for gpa, hpa in private.items():
        assert baseline.seamcall(0, 6, [gpa, tdr, hpa, 0, 0, 0]) == 0
    zapped = list(private.items())[: len(private) // 2]
    for gpa, hpa in zapped:
        for leaf, rcx in ((7, gpa), (38, tdr), (29, gpa), (41, hpa)):
            assert baseline.seamcall(0, leaf, [rcx, 0 if leaf == 38 else tdr, 0, 0, 0, 0]) == 0
    for leaf, lp, rcx in ((18, 0, None), (19, 0, tdr), (40, 0, 0), (40, 2, 0), (20, 0, tdr)):
        tdvpr = next(iter(baseline.vcpus))
        regs = [tdvpr if rcx is None else rcx, 0, 0, 0, 0, 0]
        assert baseline.seamcall(lp, leaf, regs) == 0
    owned = [hpa for hpa in range(1 << 32, next(pages), 4096) if baseline.pamt(hpa, 0)[TYPE]]
    assert len(owned) == baseline.tds[tdr].children + 1
    for hpa in reversed(owned):
        assert baseline.seamcall(0, 28, [hpa, 0, 0, 0, 0, 0]) == 0
    assert not baseline.tds and not baseline.sept and not baseline.vcpus


def test_every_lock_is_free_after_every_leaf() -> None:
    trace = read_trace("s1_life_gpaw48")
    baseline = Baseline()
    baseline.boot(trace["platform"])
    for step in trace["steps"]:
        answer(baseline, step)
        assert not baseline.held
        assert baseline.held_sept is None
        if not baseline.guests:
            blocks = baseline.blocks.values()
            assert not any(giant[0] or any(entry[0] for entry in large) for giant, large, _ in blocks)


@pytest.mark.parametrize(
    ("rax", "status"),
    [
        (1 << 24 | 6, 0xC000010000000000),
        (1 << 16 | 6, 0xC000010000000000),
        (42, 0xC000010000000000),
        (9999, 0xC000010000000000),
    ],
)
def test_seamcall_refuses_unknown_leaf(rax: int, status: int) -> None:
    baseline = Baseline()
    baseline.boot(PLATFORM)
    registers = [1, 2, 3, 4, 5, 6]
    assert baseline.seamcall(0, rax, registers) == status
    assert registers == [1, 2, 3, 4, 5, 6]


def test_seamcall_refuses_everything_before_boot() -> None:
    assert Baseline().seamcall(0, 9, [0] * 6) == 0xC000050500000000


def test_vm_exit_refuses_lp_without_guest() -> None:
    with pytest.raises(ValueError, match="no vCPU is inside LP 3"):
        Baseline().vm_exit(3, 1)
