"""KVM_RUN: entries, exits, faults with local retry, MapGPA, and what else a guest can ask."""

from errno import EINVAL, EIO
from typing import Any

import pytest
from td_scene import TdScene, boot

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_SEPT_TREE,
    TDX_NON_RECOVERABLE_TD,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_VCPU_NOT_ASSOCIATED,
)
from tdxlab.arch import SIZE_2M
from tdxlab.kvm.exits import (
    Failed,
    FailEntry,
    HypercallExit,
    InternalError,
    Interrupted,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
    TdxExit,
)
from tdxlab.kvm.mapgpa import (
    TDVMCALL_STATUS_ALIGN_ERROR,
    TDVMCALL_STATUS_INVALID_OPERAND,
    TDVMCALL_STATUS_RETRY,
    TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED,
)
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.tdx_associate import tdx_vcpu_load
from tdxlab.kvm.tdx_exits import handle_tdvmcall, tdx_handle_ept_violation
from tdxlab.steps import Deadlock, run

SHARED = 1 << 47
MAP_GPA = 0x10001


@pytest.fixture
def td() -> TdScene:
    scene = TdScene(vcpus=2)
    scene.finalize()
    scene.tdx.exits_on_map_gpa = True
    return scene


def answers(td: TdScene, vcpu: int = 0) -> tuple[int, int]:
    """R10 and R11 as the guest will get them."""
    return td.vcpus[vcpu].arg("r10"), td.vcpus[vcpu].arg("r11")


# -- before the guest


def test_run_refuses_a_td_that_is_not_finalized() -> None:
    assert TdScene().run([]) == Failed(-EINVAL)


def test_run_refuses_a_dead_vm(td: TdScene) -> None:
    td.vm.kill()
    assert td.run([]) == Failed(-EIO)


def test_run_dies_of_a_bug_that_comes_while_it_runs(td: TdScene) -> None:
    def bug(lp: int) -> Any:
        td.vm.bug("test")
        return td.machine.interrupt(lp)

    assert td.run([bug]) == Failed(-EIO)


def test_run_comes_back_for_a_signal(td: TdScene) -> None:
    assert td.run([]) == Interrupted()


def test_run_loads_the_roots_and_tells_the_module_where_the_shared_one_is(td: TdScene) -> None:
    before = td.count()
    td.run([])
    assert td.since(before) == {"TDH.VP.WR": 1, "TDH.VP.ENTER": 1}
    assert td.machine.calls[-2][2]["r8"] == td.vcpus[0].root_hpa


def test_run_flushes_the_vcpu_from_the_lp_that_it_left(td: TdScene) -> None:
    td.run([], lp=0)
    td.vcpus[0].signal_pending = False
    before = td.count()
    assert td.run([], lp=3) == Interrupted()
    assert td.since(before) == {"TDH.VP.FLUSH": 1, "TDH.VP.ENTER": 1}
    assert [lp for lp, leaf, _ in td.machine.calls if leaf == abi.TDH_VP_FLUSH] == [0]
    assert td.vcpus[0].cpu == 3
    assert td.host.associated[3] == ((td.tdx.td.tdr, 0),)


def test_vcpu_load_forgives_a_vcpu_that_is_not_associated(td: TdScene) -> None:
    td.machine.answer(abi.TDH_VP_FLUSH, TDX_VCPU_NOT_ASSOCIATED)
    run(td.host.on_cpu(3, tdx_vcpu_load(td.vcpus[0])))
    assert not td.vm.vm_dead


def test_vcpu_load_kills_the_vm_if_the_flush_fails(td: TdScene) -> None:
    td.machine.answer(abi.TDH_VP_FLUSH, TDX_PAGE_METADATA_INCORRECT)
    run(td.host.on_cpu(3, tdx_vcpu_load(td.vcpus[0])))
    assert "TDH_VP_FLUSH" in td.vm.vm_bugged
    assert td.vcpus[0].cpu == 3


def test_run_enters_again_when_the_module_is_busy(td: TdScene) -> None:
    td.machine.answer(abi.TDH_VP_ENTER, TDX_OPERAND_BUSY | OPERAND_ID_SEPT_TREE)
    before = td.count()
    assert td.run([5]) == Interrupted()
    calls = td.machine.names()
    assert calls.count("TDH.VP.ENTER") == 3
    assert td.since(before)["TDH.MEM.PAGE.AUG"] == 1


def test_run_flushes_the_tlb_before_it_enters_if_somebody_asked(td: TdScene) -> None:
    td.run([])
    td.vcpus[0].signal_pending = False
    flushes = td.host.counts["invept"]
    td.vm.flush_remote_tlbs()
    td.run([])
    assert td.host.counts["invept"] == flushes + 1


def test_run_stays_outside_while_an_entry_is_zapped(td: TdScene) -> None:
    td.tdx.wait_for_sept_zap = True
    with pytest.raises(Deadlock, match="wait_for_sept_zap"):
        td.run([5])
    assert "TDH.VP.ENTER" not in td.machine.names()


def test_run_leaves_an_nmi_with_the_module(td: TdScene) -> None:
    td.run([])
    td.vcpus[0].signal_pending = False
    td.vcpus[0].pending_events = frozenset({"NMI"})
    before = td.count()
    td.run([])
    assert td.since(before) == {"TDH.VP.WR": 1, "TDH.VP.ENTER": 1}
    assert not td.vm.vm_dead


# -- memory


def test_run_augments_a_page_that_the_guest_accepts(td: TdScene) -> None:
    before = td.count()
    assert td.run([0x20]) == Interrupted()
    assert td.since(before) == {
        "TDH.VP.WR": 1,
        "TDH.VP.ENTER": 2,
        "TDH.MEM.SEPT.ADD": 3,
        "TDH.MEM.PAGE.AUG": 1,
    }


def test_run_retries_a_busy_fault_without_entering(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MEM_PAGE_AUG, *[TDX_OPERAND_BUSY | 0x92] * 3)
    assert td.run([0x20]) == Interrupted()
    names = td.machine.names()
    assert names.count("TDH.MEM.PAGE.AUG") == 4
    assert names.count("TDH.VP.ENTER") == 2
    assert names.count("TDH.MEM.SEPT.ADD") == 3


def test_run_stops_retrying_for_a_signal(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MEM_PAGE_AUG, *[TDX_OPERAND_BUSY | 0x92] * 3)

    def signalled(lp: int) -> Any:
        td.vcpus[0].signal_pending = True
        return td.accept(lp, 0x20)

    assert td.run([signalled]) == Interrupted()
    assert td.machine.names().count("TDH.MEM.PAGE.AUG") == 1


def test_run_dies_of_a_hard_error_in_a_fault(td: TdScene) -> None:
    td.machine.answer(abi.TDH_MEM_PAGE_AUG, TDX_PAGE_METADATA_INCORRECT)
    assert td.run([0x20]) == Failed(-EIO)
    assert "TDH_MEM_PAGE_AUG" in td.vm.vm_bugged


def test_run_asks_user_space_about_private_access_to_shared_memory(td: TdScene) -> None:
    run(kvm_vm_set_mem_attributes(td.vm, 0x20, 0x21, False))
    assert td.run([0x20]) == MemoryFaultExit(0x20000, 0x1000, 8)


def test_run_asks_user_space_about_shared_access_to_private_memory(td: TdScene) -> None:
    touch = [lambda lp: td.machine.touch(lp, SHARED | 0x20000)]
    assert td.run(touch) == MemoryFaultExit(0x20000, 0x1000, 0)


def test_run_kills_a_td_that_touches_what_it_did_not_accept() -> None:
    """With SEPT_VE_DISABLE a touch of a pending page leaves the guest, and no host can help."""
    td = TdScene()
    td.finalize()
    vcpu = td.vcpus[0]
    vcpu.args = (("rcx", 2), ("rdx", 6), ("r8", 0x20000))
    assert run(tdx_handle_ept_violation(vcpu)) == -EIO
    assert td.vm.vm_dead
    assert td.vm.vm_bugged == ""


def test_run_kills_a_td_that_fetches_from_shared_memory(td: TdScene) -> None:
    td.vcpus[0].args = (("rcx", 4), ("r8", SHARED | 0x20000))
    assert run(tdx_handle_ept_violation(td.vcpus[0])) == -EIO
    assert td.vm.vm_bugged


# -- MapGPA


def map_gpa(td: TdScene, gpa: int, size: int) -> Any:
    return td.run([td.vmcall(r11=MAP_GPA, r12=gpa, r13=size)])


def test_map_gpa_goes_to_user_space_in_pieces_of_2_mib(td: TdScene) -> None:
    start = SHARED | 0x1000
    exits = [map_gpa(td, start, 2 * SIZE_2M + 0x3000)]
    for _ in range(2):
        exits.append(td.run([]))
    assert exits == [
        HypercallExit(12, (0x1000, 512, 0), 1),
        HypercallExit(12, (0x1000 + SIZE_2M, 512, 0), 1),
        HypercallExit(12, (0x1000 + 2 * SIZE_2M, 3, 0), 1),
    ]
    assert td.run([]) == Interrupted()


def test_map_gpa_says_encrypted_for_private(td: TdScene) -> None:
    assert map_gpa(td, 0, 0x1000) == HypercallExit(12, (0, 1, 0x10), 1)


def test_map_gpa_tells_the_guest_of_an_error(td: TdScene) -> None:
    map_gpa(td, 0, 2 * SIZE_2M)
    td.run([])
    td.vcpus[0].hypercall_ret = -1
    seen = []

    def look(lp: int) -> Any:
        seen.append(td.machine.guest_registers(lp)[1].r11)
        return td.machine.interrupt(lp)

    td.run([look])
    assert seen == [SIZE_2M]


def test_map_gpa_leaves_the_rest_to_the_guest_for_an_event(td: TdScene) -> None:
    map_gpa(td, 0, 2 * SIZE_2M)
    td.vcpus[0].pending_events = frozenset({"interrupt"})
    seen = []

    def look(lp: int) -> Any:
        registers = td.machine.guest_registers(lp)[1]
        seen.append((registers.r10, registers.r11))
        return td.machine.interrupt(lp)

    td.run([look])
    assert seen == [(TDVMCALL_STATUS_RETRY, SIZE_2M)]


@pytest.mark.parametrize(
    ("gpa", "size", "status"),
    [
        (0, 0, TDVMCALL_STATUS_INVALID_OPERAND),
        ((1 << 64) - 0x1000, 0x2000, TDVMCALL_STATUS_INVALID_OPERAND),
        (1 << 48, 0x1000, TDVMCALL_STATUS_INVALID_OPERAND),
        (SHARED - 0x1000, 0x2000, TDVMCALL_STATUS_INVALID_OPERAND),
        (0x800, 0x1000, TDVMCALL_STATUS_ALIGN_ERROR),
        (0, 0x1800, TDVMCALL_STATUS_ALIGN_ERROR),
    ],
)
def test_map_gpa_refuses_a_bad_range(td: TdScene, gpa: int, size: int, status: int) -> None:
    seen = []

    def look(lp: int) -> Any:
        registers = td.machine.guest_registers(lp)[1]
        seen.append((registers.r10, registers.r11))
        return td.machine.interrupt(lp)

    td.run([td.vmcall(r11=MAP_GPA, r12=gpa, r13=size), look])
    assert seen == [(status, gpa)]


def test_map_gpa_is_not_supported_unless_user_space_takes_it(td: TdScene) -> None:
    td.tdx.exits_on_map_gpa = False
    td.play([])
    vcpu = td.vcpus[0]
    vcpu.args = (("r11", MAP_GPA), ("r13", 0x1000))
    assert handle_tdvmcall(vcpu) == 1
    assert answers(td)[0] == TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED


# -- other requests and exits


def test_vmcall_for_mmio_write_goes_to_user_space(td: TdScene) -> None:
    ask = td.vmcall(r11=48, r12=4, r13=1, r14=SHARED | 0x5004, r15=0x1_1234_5678)
    assert td.run([ask]) == MmioExit(0x5004, 4, 0x1234_5678)


def test_vmcall_for_mmio_read_gets_the_answer_of_user_space(td: TdScene) -> None:
    assert td.run([td.vmcall(r11=48, r12=8, r14=SHARED | 0x5000)]) == MmioExit(0x5000, 8, None)
    td.vcpus[0].mmio_data = 0x77
    seen = []

    def look(lp: int) -> Any:
        seen.append(td.machine.guest_registers(lp)[1].r11)
        return td.machine.interrupt(lp)

    td.run([look])
    assert seen == [0x77]


@pytest.mark.parametrize("registers", [{"r12": 3}, {"r12": 4, "r13": 2}, {"r12": 4, "r14": 0x5000}])
def test_vmcall_for_mmio_refuses_what_is_no_access_to_shared_memory(
    td: TdScene, registers: dict[str, int]
) -> None:
    ask = td.vmcall(r11=48, **{"r14": SHARED | 0x5000, **registers})
    assert td.run([ask]) == Interrupted()
    assert td.machine.names().count("TDH.VP.ENTER") == 2


def test_vmcall_for_a_port_goes_to_user_space(td: TdScene) -> None:
    assert td.run([td.vmcall(r11=30, r12=1, r13=1, r14=0x3F8, r15=65)]) == IoExit(0x3F8, 1, 65)


def test_vmcall_for_a_quote_goes_to_user_space(td: TdScene) -> None:
    gpa = SHARED | 0x9000
    assert td.run([td.vmcall(r11=0x10002, r12=gpa, r13=0x1000)]) == TdxExit(0x10002, (gpa, 0x1000))


def test_vmcall_reports_a_fatal_error(td: TdScene) -> None:
    result = td.run([td.vmcall(r11=0x10003, r12=0xBAD)])
    assert isinstance(result, SystemEventExit)
    assert 0xBAD in result.data


def test_vmcall_for_hlt_asks_the_module_for_interrupts_and_sleeps(td: TdScene) -> None:
    before = td.count()
    with pytest.raises(Deadlock, match="an event"):
        td.run([td.vmcall(r11=12)])
    assert td.since(before)["TDH.VP.RD"] == 1
    assert td.vcpus[0].halted
    td.vcpus[0].pending_events = frozenset({"interrupt"})
    assert td.run([]) == Interrupted()


@pytest.mark.parametrize("leaf", [5, 10, 31, 0x10004, 0x10009])
def test_vmcall_that_kvm_does_not_serve_goes_back_to_the_guest(td: TdScene, leaf: int) -> None:
    assert td.run([td.vmcall(r11=leaf)]) == Interrupted()


def test_triple_fault_shuts_the_td_down(td: TdScene) -> None:
    assert td.run([lambda lp: td.machine.vm_exit(lp, 2, Registers())]) == ShutdownExit()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (TDX_PAGE_METADATA_INCORRECT, InternalError((TDX_PAGE_METADATA_INCORRECT, 0))),
        (TDX_NON_RECOVERABLE_TD | 1, InternalError((TDX_NON_RECOVERABLE_TD | 1, 0))),
        (1 << 31 | 33, FailEntry(1 << 31 | 33, 0)),
        (49, Failed(-EIO)),
    ],
)
def test_unexpected_statuses_go_to_user_space(td: TdScene, status: int, expected: Any) -> None:
    td.machine.answer(abi.TDH_VP_ENTER, status)
    assert td.run([]) == expected


def test_a_dead_module_kills_the_vm(td: TdScene) -> None:
    td.machine.module.halted = "test"
    td.vcpus[0].root_hpa = 0x1000
    assert td.run([]) == InternalError((0x8000_FF00_FFFF_0000, 0))
    assert td.vm.vm_bugged.startswith("the SEAMCALL instruction failed")


def test_two_vcpus_run_on_their_own_lps_and_share_nothing_but_memory() -> None:
    td = TdScene(boot(lps=4), vcpus=2)
    td.finalize()
    td.fault_in([1, 2, 3], vcpu=0)
    before = td.count()
    td.fault_in([3, 4], vcpu=1)
    calls = td.since(before)
    assert calls["TDH.MEM.PAGE.AUG"] == 1
    assert "TDH.MEM.SEPT.ADD" not in calls
