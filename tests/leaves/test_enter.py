"""TDH.VP.ENTER: the way in, what stays locked, the TLB, the zero-step filter."""

import pytest
from leafbench import SIZE_4K, Bench, BuiltTd
from leaffaults import (
    RCX,
    Fault,
    Refusals,
    check_alone,
    check_pairs,
    each,
    page_faults,
    state_faults,
)
from spoils import (
    Case,
    Held,
    bits,
    hold,
    tdcs_lock,
    vcpu_field,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.cpu import Translation
from tdxlab.seam.td import Tdcs, Tdvps

GPA = 0x4000_0000
IN_GUEST = -1


def enter(bench: Bench) -> Case:
    td = bench.td()
    td.start()
    return Case(bench, td, abi.TDH_VP_ENTER, rcx=td.vcpus[0], rdx=2, r11=11)


def on_another_lp(case: Case) -> None:
    case.lp = 1


def tdr_held(case: Case) -> Held:
    pamt = case.bench.machine.module.pamt
    return hold(pamt.words, pamt.entry(case.td.tdr, 0), 1, 7)


INVALID_RCX = s.TDX_OPERAND_INVALID + RCX
EPOCH_BUSY = s.TDX_OPERAND_BUSY + 169
ENTER = [
    Fault("RCX bit 0", bits("rcx", 1), INVALID_RCX),
    Fault("RCX bit 63", bits("rcx", 1 << 63), INVALID_RCX),
    *page_faults("rcx", RCX, exclusive=False, wrong="free", beyond=1 << 54),
    Fault("its TDR held", tdr_held, s.TDX_OPERAND_BUSY + 128),
    *state_faults(0, 1),
    Fault("5 vCPU pages", vcpu_field(Tdvps.NUM_PAGES, 5), s.TDX_TDCX_NUM_INCORRECT),
    *(
        Fault(f"vCPU state {v:#x}", vcpu_field(Tdvps.STATE, v), s.TDX_VCPU_STATE_INCORRECT)
        for v in (0, 4, 8, 0x10)
    ),
    Fault("on another LP", on_another_lp, s.TDX_VCPU_ASSOCIATED),
    Fault("hint after a fault-like exit", bits("rcx", 1 << 52), INVALID_RCX),
    Fault("resume a parent that is no nested VM's", bits("rcx", 1 << 53), INVALID_RCX),
    Fault("epoch held", tdcs_lock(Tdcs.EPOCH_LOCK, 1, 3), EPOCH_BUSY),
]
TABLES = [Refusals(abi.TDH_VP_ENTER, enter, ENTER)]


@each(TABLES)
def test_tdh_vp_enter_refuses(bench: Bench, table: Refusals, number: int) -> None:
    check_alone(bench, table, number)


@each(TABLES)
def test_tdh_vp_enter_refuses_the_earlier_of_two_faults(
    bench: Bench, table: Refusals, number: int
) -> None:
    check_pairs(bench, table, number)


@pytest.mark.parametrize(
    "fault", [f for f in ENTER if "hint" in f.name or "epoch" in f.name], ids=lambda f: f.name
)
def test_tdh_vp_enter_refused_late_leaves_the_vcpu_associated(bench: Bench, fault: Fault) -> None:
    case = enter(bench)
    td = case.td
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    assert td.associated == 0
    case.lp = 3
    fault.spoil(case)
    assert case.call()[0] == fault.status
    assert (td.associated, td.read(td.vcpu_word(Tdvps.ASSOC_LPID))) == (1, 3)
    assert (td.vcpu_state(), td.inside) == (2, (0, 0))


def test_tdh_vp_enter_runs_the_vcpu_and_keeps_two_pages_locked(bench: Bench) -> None:
    case = enter(bench)
    td = case.td
    status, _ = case.call()
    assert status == IN_GUEST
    cpu = bench.machine.cpu
    assert (cpu.vcpu_inside(0), cpu.tdr_inside(0)) == (td.vcpus[0], td.tdr)
    assert (td.vcpu_state(), td.inside) == (4, (0, 1))
    assert bench.pamt(td.tdr).lock == bench.pamt(td.vcpus[0]).lock == 4
    assert bench.pamt(td.vcpus[0], 1).lock == bench.pamt(td.vcpus[0], 2).lock == 4
    assert td.read(td.tdcs_word(Tdcs.OP_STATE_LOCK)) == 0
    bench.machine.interrupt(0)
    assert cpu.vcpu_inside(0) == 0
    assert (td.vcpu_state(), td.inside, td.associated) == (2, (0, 0), 1)
    locks = [bench.pamt(td.tdr).lock, *(bench.pamt(td.vcpus[0], n).lock for n in (0, 1, 2))]
    assert locks == [0, 0, 0, 0]


def test_tdh_vp_enter_of_a_running_vcpu_finds_it_active(bench: Bench) -> None:
    case = enter(bench)
    case.call()
    case.lp = 1
    assert case.call()[0] == s.TDX_VCPU_STATE_INCORRECT


#: (leaf, operands, the operand that is busy) for users of the TDR or TDVPR that want it alone.
EXCLUSIVE_USERS = [
    (abi.TDH_MNG_KEY_CONFIG, {"rcx": "tdr"}, 1),
    (abi.TDH_MNG_ADDCX, {"rcx": "free", "rdx": "tdr"}, 2),
    (abi.TDH_MNG_INIT, {"rcx": "tdr"}, 1),
    (abi.TDH_MEM_PAGE_ADD, {"rcx": "zero", "rdx": "tdr", "r8": "free"}, 2),
    (abi.TDH_MR_EXTEND, {"rcx": "zero", "rdx": "tdr"}, 2),
    (abi.TDH_MR_FINALIZE, {"rcx": "tdr"}, 1),
    (abi.TDH_MNG_VPFLUSHDONE, {"rcx": "tdr"}, 1),
    (abi.TDH_MNG_KEY_FREEID, {"rcx": "tdr"}, 1),
    (abi.TDH_PHYMEM_PAGE_RECLAIM, {"rcx": "tdr"}, 1),
    (abi.TDH_VP_ADDCX, {"rcx": "free", "rdx": "vcpu"}, 2),
    (abi.TDH_VP_INIT, {"rcx": "vcpu"}, 1),
    (abi.TDH_VP_FLUSH, {"rcx": "vcpu"}, 1),
]


@pytest.mark.parametrize(
    ("leaf", "registers", "operand"),
    EXCLUSIVE_USERS,
    ids=[abi.HOST_LEAVES[row[0]].name for row in EXCLUSIVE_USERS],
)
def test_a_vcpu_inside_makes_exclusive_users_of_its_pages_busy(
    bench: Bench, leaf: int, registers: dict[str, str], operand: int
) -> None:
    case = enter(bench)
    case.call()
    pages = {"tdr": case.td.tdr, "vcpu": case.td.vcpus[0], "free": bench.spare(), "zero": 0}
    values = {name: pages[page] for name, page in registers.items()}
    assert bench.call(leaf, lp=1, **values)[0] == s.TDX_OPERAND_BUSY + operand


def test_a_vcpu_inside_leaves_shared_users_of_the_td_alone(bench: Bench) -> None:
    case = enter(bench)
    td = case.td
    td.map_tables(GPA)
    case.call()
    free = bench.spare()
    bench.must(abi.TDH_MEM_PAGE_AUG, lp=1, rcx=GPA, rdx=td.tdr, r8=free)
    bench.must(abi.TDH_MEM_RANGE_BLOCK, lp=1, rcx=GPA, rdx=td.tdr)
    bench.must(abi.TDH_MEM_TRACK, lp=1, rcx=td.tdr)


def running(bench: Bench, vcpus: int = 1) -> BuiltTd:
    """A TD with a page at GPA, vCPU n on LP n."""
    td = bench.td()
    td.add_page(GPA)
    for lp in range(vcpus):
        td.add_vcpu(lp)
    td.finalize()
    return td


def test_tdh_vp_enter_in_a_newer_epoch_flushes_the_tlb(bench: Bench) -> None:
    td = running(bench)
    td.enter()
    bench.machine.touch(0, GPA)
    bench.machine.interrupt(0)
    td.enter()
    assert bench.machine.cpu.tlbs[0], "the same epoch: nothing to flush"
    bench.machine.interrupt(0)
    td.track()
    td.enter()
    assert not bench.machine.cpu.tlbs[0]
    assert td.inside == (1, 0)


def test_a_translation_outlives_the_block_until_the_vcpu_enters_a_newer_epoch(
    bench: Bench,
) -> None:
    td = running(bench)
    td.enter()
    bench.machine.touch(0, GPA)
    bench.must(abi.TDH_MEM_RANGE_BLOCK, lp=1, rcx=GPA, rdx=td.tdr)
    assert isinstance(bench.machine.touch(0, GPA), Translation)
    td.track(lp=1)
    status, _ = bench.call(abi.TDH_MEM_PAGE_REMOVE, lp=1, rcx=GPA, rdx=td.tdr)
    assert status == s.TDX_TLB_TRACKING_NOT_DONE + 1
    bench.machine.interrupt(0)
    td.enter()
    bench.must(abi.TDH_MEM_PAGE_REMOVE, lp=1, rcx=GPA, rdx=td.tdr)
    outcome = bench.machine.touch(0, GPA)
    assert isinstance(outcome, GuestOutcome)
    assert outcome.exited


def test_tdh_vp_enter_after_another_vcpu_of_the_lp_flushes_the_tlb(bench: Bench) -> None:
    td = running(bench, 1)
    other = bench.td()
    other.start()
    td.enter()
    bench.machine.touch(0, GPA)
    bench.machine.interrupt(0)
    other.enter()
    bench.machine.interrupt(0)
    td.enter()
    assert not bench.machine.cpu.tlbs[0]


def fault(bench: Bench, gpa: int) -> int:
    """The guest on LP 0 touches a page that is not there; RAX of its exit."""
    outcome = bench.machine.touch(0, gpa)
    assert isinstance(outcome, GuestOutcome)
    return outcome.status


def fault_at(bench: Bench, gpa: int, times: int, td: BuiltTd) -> None:
    """The guest faults at one instruction again and again, the host enters it each time."""
    for _ in range(times):
        assert fault(bench, gpa) == 48
        status, _ = bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])
        assert status == IN_GUEST


def test_tdh_vp_enter_answers_for_a_guest_that_faulted_seven_times(bench: Bench) -> None:
    td = running(bench)
    td.enter()
    gpa = GPA + SIZE_4K
    fault_at(bench, gpa + 0x123, 6, td)
    assert fault(bench, gpa + 0x123) == 48
    before, registers = td.inside, {"rdx": 2, "r8": 8, "rbx": 3, "rbp": 5}
    status, values = bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0], **registers)
    assert status == 48
    assert values == Registers(rcx=2, r8=gpa, rbp=5)
    assert (td.inside, td.vcpu_state(), td.associated) == (before, 2, 1)
    assert td.read(td.tdcs_word(Tdcs.SEPT_LOCK)) == 0
    td.aug(gpa)
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == 48, "pending is not enough"


def test_tdh_vp_enter_with_the_filter_armed_takes_the_tree_exclusively(bench: Bench) -> None:
    td = running(bench)
    td.enter()
    fault_at(bench, GPA + SIZE_4K, 6, td)
    bench.machine.touch(0, GPA + SIZE_4K)
    bench.words.put(td.tdcs_word(Tdcs.SEPT_LOCK), 2)
    status, _ = bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])
    assert status == s.TDX_OPERAND_BUSY + 146
    assert td.inside == (0, 0)


def test_the_filter_forgets_when_the_guest_has_moved_on(bench: Bench) -> None:
    td = running(bench)
    td.enter()
    fault_at(bench, GPA + SIZE_4K, 6, td)
    bench.machine.touch(0, GPA + SIZE_4K, rip=0x1000)
    td.enter()
    assert td.read(td.vcpu_word(Tdvps.EPF_COUNTER)) == 1
