"""The guest besides its memory: TDCALLs, injected events, exits, and the way back in."""

import hashlib

import pytest
from leafbench import RAW, SIZE_4K, Bench, BuiltTd

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.seam.td import Tdcs, Tdr, Tdvps

GPA = 0x4000_0000
INVALID = s.TDX_OPERAND_INVALID
VALID_EVENT = 1 << 31
DEBUG, NO_RBP_MOD = 1, 4


def guest(bench: Bench, **params: int) -> BuiltTd:
    """A TD with a measured page at GPA and a vCPU that runs on LP 0."""
    td = bench.td(**params)
    td.add_page(GPA, bytes(range(256)) * 16)
    td.start()
    td.enter()
    return td


def event(td: BuiltTd) -> int:
    return td.read(td.vcpu_word(Tdvps.PENDING_EVENT))


# -- which TDCALL


@pytest.mark.parametrize("rax", [13, 0xFFFF, 1 << 16 | 1, 1 << 24, 1 << 63 | 1])
def test_tdcall_refuses_a_leaf_that_does_not_exist(bench: Bench, rax: int) -> None:
    guest(bench)
    given = Registers(rcx=1, rdx=2, r11=11)
    outcome = bench.machine.tdcall(0, rax, given.copy())
    assert outcome == GuestOutcome(False, INVALID, given)


# -- TDG.VP.INFO, VEINFO.GET, CPUIDVE.SET


@pytest.mark.parametrize("gpaw", [48, 52])
def test_tdg_vp_info_tells_the_guest_about_itself(bench: Bench, gpaw: int) -> None:
    td = bench.td(gpaw=gpaw, attributes=1 << 28, max_vcpus=4)
    for lp in (2, 1, 0):
        td.add_vcpu(lp)
    td.finalize()
    td.enter(1, lp=1)
    outcome = td.tdcall(abi.TDG_VP_INFO, lp=1, r11=5, r12=12)
    shown = Registers(rcx=gpaw, rdx=1 << 28, r8=4 << 32 | 3, r9=1, r10=1, r12=12)
    assert outcome == GuestOutcome(False, 0, shown)


def test_tdg_vp_veinfo_get_has_nothing_to_tell_at_first(bench: Bench) -> None:
    td = guest(bench)
    outcome = td.tdcall(abi.TDG_VP_VEINFO_GET, rcx=1, rdx=2, r8=3, r9=4, r10=5, r11=6)
    assert outcome == GuestOutcome(False, 0xC000_0704_0000_0000, Registers(r11=6))


@pytest.mark.parametrize("reason", [10, 12, 13, 18, 30, 31, 32, 36, 39, 54, 56, 65])
def test_an_instruction_that_the_module_does_not_run_becomes_a_ve(
    bench: Bench, reason: int
) -> None:
    td = guest(bench)
    given = Registers(rcx=7, rbx=3)
    outcome = bench.machine.vm_exit(0, reason, given.copy(), rax=99)
    assert outcome == GuestOutcome(False, 99, given)
    assert event(td) == VALID_EVENT | 20
    info = td.tdcall(abi.TDG_VP_VEINFO_GET)
    assert (info.status, info.registers) == (0, Registers(rcx=reason))
    assert td.tdcall(abi.TDG_VP_VEINFO_GET).status == s.TDX_NO_VALID_VE_INFO


def test_a_second_ve_before_the_first_was_read_is_a_double_fault(bench: Bench) -> None:
    td = guest(bench)
    bench.machine.vm_exit(0, 12, Registers())
    bench.machine.vm_exit(0, 30, Registers())
    assert event(td) == VALID_EVENT | 8
    assert td.tdcall(abi.TDG_VP_VEINFO_GET).registers.rcx == 12


@pytest.mark.parametrize("reason", [11, 17, *range(19, 28), 50, 53, 59, 60, 70, 73, 76])
def test_a_forbidden_instruction_is_an_invalid_opcode(bench: Bench, reason: int) -> None:
    td = guest(bench)
    assert not bench.machine.vm_exit(0, reason, Registers()).exited
    assert event(td) == VALID_EVENT | 6


@pytest.mark.parametrize(
    ("rcx", "status"), [(0, 0), (3, 0), (4, INVALID + 1), (1 << 63, INVALID + 1)]
)
def test_tdg_vp_cpuidve_set_takes_two_bits(bench: Bench, rcx: int, status: int) -> None:
    td = guest(bench)
    assert td.tdcall(abi.TDG_VP_CPUIDVE_SET, rcx=rcx).status == status


# -- TDG.VP.VMCALL


@pytest.mark.parametrize("mask", [0xFFFC, 0xFFD4, 0xFFC1, 0xFFC2, 0x1_0000_FC00], ids=hex)
def test_tdg_vp_vmcall_refuses_registers_that_cannot_be_passed(bench: Bench, mask: int) -> None:
    td = guest(bench)
    outcome = td.tdcall(abi.TDG_VP_VMCALL, rcx=mask)
    assert (outcome.exited, outcome.status) == (False, INVALID + 1)


@pytest.mark.parametrize(("flags", "exits"), [(0, True), (NO_RBP_MOD, False)])
def test_tdg_vp_vmcall_passes_rbp_unless_the_td_forbids_it(
    bench: Bench, flags: int, exits: bool
) -> None:
    td = guest(bench, config_flags=flags)
    assert td.tdcall(abi.TDG_VP_VMCALL, rcx=0xFFEC).exited is exits


def test_tdg_vp_vmcall_shows_the_selected_registers_and_takes_the_answer(bench: Bench) -> None:
    td = guest(bench)
    filled = {name: 0x100 + n for n, name in enumerate(("rdx", "rbx", "r8", "r10", "r15", "rsi"))}
    mask = 1 << 2 | 1 << 10 | 1 << 15
    outcome = td.tdcall(abi.TDG_VP_VMCALL, rcx=mask, **filled)
    host = Registers(rcx=mask, rdx=0x100, r10=0x103, r15=0x104)
    assert outcome == GuestOutcome(True, 77, host)
    assert td.vcpu_state() == 2
    td.enter(rdx=0xA, r8=0xB, r10=0xC, r15=0xD)
    rax, registers = bench.machine.guest_registers(0)
    assert rax == 0
    assert (registers.rcx, registers.rdx, registers.r10, registers.r15) == (mask, 0xA, 0xC, 0xD)
    assert (registers.r8, registers.rbx, registers.rsi) == (0x102, 0x101, 0x105)


# -- exits


def test_an_interrupt_exits_with_nothing_of_the_guest_and_resumes_all_of_it(bench: Bench) -> None:
    td = guest(bench)
    secret = Registers(**{name: 0xAA00 + n for n, name in enumerate(Registers.__slots__)})
    outcome = bench.machine.vm_exit(0, 1, secret.copy(), rax=0x55)
    assert outcome == GuestOutcome(True, 1, Registers(r9=0x8000_0020))
    td.enter()
    assert bench.machine.guest_registers(0) == (0x55, secret)


def test_a_triple_fault_disables_the_vcpu_for_ever_but_not_the_td(bench: Bench) -> None:
    td = guest(bench)
    outcome = bench.machine.vm_exit(0, 2, Registers(rcx=5))
    assert outcome == GuestOutcome(True, 0x4000_0001_0000_0002, Registers())
    assert (td.vcpu_state(), td.inside, td.associated) == (8, (0, 0), 1)
    assert td.read(td.tdr_word(Tdr.FATAL)) == 0
    assert bench.call(abi.TDH_VP_ENTER, rcx=td.vcpus[0])[0] == s.TDX_VCPU_STATE_INCORRECT
    bench.must(abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    bench.must(abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)


def test_an_nmi_exits_with_its_information(bench: Bench) -> None:
    guest(bench)
    outcome = bench.machine.vm_exit(0, 0, Registers(), interruption=0x8000_0202)
    assert outcome == GuestOutcome(True, 0, Registers(r9=0x8000_0202))


def test_a_machine_check_kills_the_td_and_leaves_the_vcpu_counted(bench: Bench) -> None:
    td = guest(bench)
    outcome = bench.machine.vm_exit(0, 0, Registers(), interruption=0x8000_0312)
    assert outcome == GuestOutcome(True, 0x6000_0005_0000_0000, Registers())
    assert (td.read(td.tdr_word(Tdr.FATAL)), td.inside) == (1, (0, 1))
    assert bench.pamt(td.tdr).lock == bench.pamt(td.vcpus[0]).lock == 0
    for leaf in (abi.TDH_VP_ENTER, abi.TDH_MEM_TRACK):
        page = td.vcpus[0] if leaf == abi.TDH_VP_ENTER else td.tdr
        assert bench.call(leaf, rcx=page)[0] == s.TDX_TD_FATAL


def test_an_exit_that_the_module_does_not_know_kills_a_production_td(bench: Bench) -> None:
    td = guest(bench)
    outcome = bench.machine.vm_exit(0, 33, Registers())
    assert (outcome.exited, outcome.status) == (True, 0x6000_0002_0000_0021)
    assert (td.read(td.tdr_word(Tdr.FATAL)), td.vcpu_state(), td.inside) == (1, 4, (0, 0))


def test_an_exit_that_the_module_does_not_know_is_shown_to_the_host_of_a_debug_td(
    bench: Bench,
) -> None:
    td = guest(bench, attributes=DEBUG)
    assert bench.machine.vm_exit(0, 33, Registers()).status == 33
    assert td.read(td.tdr_word(Tdr.FATAL)) == 0


def test_any_exit_of_a_vcpu_of_a_dead_td_says_so(bench: Bench) -> None:
    td = guest(bench)
    bench.words.put(td.tdr_word(Tdr.FATAL), 1)
    outcome = td.tdcall(abi.TDG_VP_INFO)
    assert (outcome.exited, outcome.status) == (True, 0x6000_0005_0000_004D)


def test_a_private_misconfiguration_halts_the_module(bench: Bench) -> None:
    td = guest(bench)
    bench.machine.vm_exit(0, 49, Registers(), gpa=GPA)
    assert bench.machine.module.halted
    assert bench.call(abi.TDH_MEM_TRACK, lp=1, rcx=td.tdr)[0] == 0x8000_FF00_FFFF_0000


# -- TDG.MR.RTMR.EXTEND, TDG.MR.REPORT


def rtmrs(td: BuiltTd) -> list[bytes]:
    return [td.bench.words.read(td.tdcs_word(Tdcs.RTMR) + 6 * n, 6) for n in range(4)]


def test_tdg_mr_rtmr_extend_hashes_the_old_value_and_48_bytes(bench: Bench) -> None:
    td = guest(bench)
    expected = [bytes(48)] * 4
    for index, offset in ((2, 0), (2, 64), (0, 64)):
        value = bytes(range(offset, offset + 48))
        expected[index] = hashlib.sha384(expected[index] + value).digest()
        assert td.tdcall(abi.TDG_MR_RTMR_EXTEND, rcx=GPA + offset, rdx=index).status == 0
    assert rtmrs(td) == expected


@pytest.mark.parametrize(
    ("rcx", "rdx", "lock", "status"),
    [
        (GPA + 8, 4, 1, INVALID + 1),
        (GPA | 1 << 47, 4, 1, INVALID + 1),
        (GPA, 4, 1, INVALID + 2),
        (GPA, 3, 1, s.TDX_OPERAND_BUSY + 168),
        (GPA, 3, 2, s.TDX_OPERAND_BUSY + 168),
        (GPA, 3, 4, s.TDX_OPERAND_BUSY + 168),
    ],
    ids=["not aligned", "shared", "no such RTMR", "held", "wanted by the host", "read"],
)
def test_tdg_mr_rtmr_extend_refuses_in_order(
    bench: Bench, rcx: int, rdx: int, lock: int, status: int
) -> None:
    td = guest(bench)
    index = td.tdcs_word(Tdcs.RTMR_LOCK)
    bench.words.put(index, lock)
    outcome = td.tdcall(abi.TDG_MR_RTMR_EXTEND, rcx=rcx, rdx=rdx)
    assert (outcome.exited, outcome.status) == (False, status)
    assert bench.words.view[index] == lock
    assert rtmrs(td) == [bytes(48)] * 4


def test_tdg_mr_rtmr_extend_looks_at_the_page_before_the_index(bench: Bench) -> None:
    td = guest(bench)
    outcome = td.tdcall(abi.TDG_MR_RTMR_EXTEND, rcx=GPA + SIZE_4K, rdx=9)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=1, r8=GPA + SIZE_4K))


def test_tdg_mr_report_binds_data_to_the_tds_identity(bench: Bench) -> None:
    td = guest(bench, attributes=1 << 28)
    td.tdcall(abi.TDG_MR_RTMR_EXTEND, rcx=GPA, rdx=1)
    hpa = td.septe(GPA) & 0xF_FFFF_FFFF_F000
    assert td.tdcall(abi.TDG_MR_REPORT, rcx=GPA + 0x400, rdx=GPA + 0x40).status == 0
    report = bench.machine.memory.read(hpa + 0x400, 1024, td.keyid)
    info = report[512:]
    assert report[0] == 0x81
    assert report[80:128] == hashlib.sha384(info).digest()
    assert report[128:192] == bytes(range(0x40, 0x80))
    assert info[:16] == (1 << 28).to_bytes(8, "little") + (3).to_bytes(8, "little")
    assert info[16:64] == bench.words.read(td.tdcs_word(Tdcs.MRTD), 6)
    assert [info[208 + 48 * n : 256 + 48 * n] for n in range(4)] == rtmrs(td)
    assert info[400:] == bytes(112)


@pytest.mark.parametrize(
    ("rcx", "rdx", "r8", "lock", "status"),
    [
        (GPA + 0x200, GPA + 1, 1, 1, INVALID + 1),
        (1 << 50, GPA + 1, 1, 1, INVALID + 2),
        (1 << 50, 1 << 50, 1, 1, INVALID + 2),
        (1 << 50, GPA, 1, 1, INVALID + 8),
        (1 << 50, GPA, 0, 1, s.TDX_OPERAND_BUSY + 168),
        (1 << 50, GPA, 0, 0, INVALID + 1),
    ],
    ids=["RCX not aligned", "RDX not aligned", "RDX no GPA", "sub-type", "held", "RCX no GPA"],
)
def test_tdg_mr_report_refuses_in_order_and_a_bad_report_page_last(
    bench: Bench, rcx: int, rdx: int, r8: int, lock: int, status: int
) -> None:
    td = guest(bench)
    index = td.tdcs_word(Tdcs.RTMR_LOCK)
    bench.words.put(index, lock)
    outcome = td.tdcall(abi.TDG_MR_REPORT, rcx=rcx, rdx=rdx, r8=r8)
    assert (outcome.exited, outcome.status) == (False, status)
    assert bench.words.view[index] == lock


def test_tdg_mr_report_interrupted_runs_again(bench: Bench) -> None:
    td = guest(bench)
    bench.conditions.interrupt_pending = True
    outcome = td.tdcall(abi.TDG_MR_REPORT, rcx=GPA + 0x400, rdx=GPA)
    assert (outcome.exited, outcome.status) == (False, abi.TDG_MR_REPORT)
    bench.conditions.interrupt_pending = False
    assert td.tdcall(abi.TDG_MR_REPORT, rcx=GPA + 0x400, rdx=GPA).status == 0


def test_tdg_mr_report_of_a_page_that_waits_for_acceptance_is_a_ve(bench: Bench) -> None:
    td = guest(bench)
    raw = RAW["PENDING"] | td.septe(GPA) & 0xF_FFFF_FFFF_F000
    bench.words.put(td.locate(GPA)[0], raw)
    outcome = td.tdcall(abi.TDG_MR_REPORT, rcx=GPA + 0x400, rdx=GPA)
    assert (outcome.exited, event(td)) == (False, VALID_EVENT | 20)
    info = td.tdcall(abi.TDG_VP_VEINFO_GET).registers
    assert (info.rcx, info.r9) == (48, GPA)
