"""What a guest's accesses lead to, for each kind of memory, and how its kernel copes."""

from collections.abc import Generator
from typing import Any

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import TDX_PAGE_ALREADY_ACCEPTED, TDX_PAGE_SIZE_MISMATCH
from tdxlab.arch import PAGE_SIZE, SIZE_2M
from tdxlab.guest import Accept, Access, Fetch, Hlt, MapGpa, MapGpaAnswer, Read, Write
from tdxlab.kvm.exits import Failed, HypercallExit, MemoryFaultExit, MmioExit, SystemEventExit
from tdxlab.kvm.mapgpa import (
    TDVMCALL_STATUS_ALIGN_ERROR,
    TDVMCALL_STATUS_INVALID_OPERAND,
    TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED,
)
from tdxlab.machine import Machine
from tdxlab.vmm_run import DONE, ERROR, MEMORY_FAULT, PANIC
from tdxlab.vmm_td import Td

MEMORY = 4 << 20
EIO = 5
PRIVATE_FLAG = 8


def make(gpaw: int = 48, **options: Any) -> Td:
    machine = Machine(gpaw=gpaw, memory="1 GiB")
    return machine.create_td(vcpus=2, memory=MEMORY, **options)


def entered(td: Td) -> int:
    return td.host.machine.seamcalls.get("TDH.VP.ENTER", 0)


@pytest.fixture(params=[48, 52])
def td(request: pytest.FixtureRequest) -> Td:
    return make(request.param)


def shared(td: Td, gpa: int) -> int:
    return gpa | 1 << td.gpaw - 1


# -- programs


def test_a_program_is_sent_what_came_of_each_access(td: Td) -> None:
    seen = []

    def program() -> Generator[Access, Any, None]:
        seen.append((yield Write(0x1FFE, b"word")))
        seen.append((yield Read(0x1FFE, 4)))
        seen.append((yield Accept(0x1000)))

    result = td.run(program())
    assert result.ok
    assert seen == list(result.answers)
    assert seen == [None, b"word", TDX_PAGE_ALREADY_ACCEPTED]


def test_a_list_of_accesses_is_a_program_too(td: Td) -> None:
    result = td.run([Write(8, b"x"), Fetch(8), Hlt(), Read(8, 1)])
    assert result == (DONE, (None, None, None, b"x"), (), 0, "")
    assert result.value == b"x"


def test_a_program_that_yields_nonsense_is_refused(td: Td) -> None:
    with pytest.raises(ValueError, match="is no access of a guest"):
        td.run(["read"])  # type: ignore[list-item]
    assert td.touch(0).ok


# -- private memory


def test_a_new_private_page_is_accepted_before_use_with_one_exit(td: Td) -> None:
    td.touch(0)
    before = entered(td)
    assert td.read(PAGE_SIZE, 8).value == bytes(8)
    assert entered(td) == before + 2
    assert td.host.machine.trace.tdcalls()[abi.TDG_MEM_PAGE_ACCEPT] == 4


def test_an_unaccepted_page_kills_the_td_while_its_exceptions_are_disabled() -> None:
    td = make(accepts=False)
    result = td.touch(0)
    assert (result.reason, result.error) == (ERROR, -EIO)
    assert "before accepting" in result.detail
    assert result.exits == (Failed(-EIO),)
    assert td.vm.vm_dead


def test_an_unaccepted_page_is_an_exception_that_makes_the_guest_panic() -> None:
    td = make(accepts=False, sept_ve_disable=False)
    result = td.touch(0x3000)
    assert result.reason == PANIC
    assert "0x3000" in result.detail
    assert isinstance(result.exits[0], SystemEventExit)
    assert not td.vm.vm_dead


def test_the_guest_may_accept_for_itself() -> None:
    td = make(accepts=False)
    result = td.run([Accept(0x3000), Write(0x3000, b"mine"), Read(0x3000, 4)])
    assert result.answers == (0, None, b"mine")


def test_a_2m_accept_finds_4k_pages_from_this_kvm(td: Td) -> None:
    assert td.run([Accept(0, 1)]).value == TDX_PAGE_SIZE_MISMATCH + 1


# -- shared memory and devices


def test_shared_memory_is_the_vmms_memory(td: Td) -> None:
    td.convert(0, SIZE_2M, to="shared")
    td.write_shared(0x1234, b"from the host")
    assert td.run([Read(shared(td, 0x1234), 13)]).value == b"from the host"
    td.write(0x1FFE, b"from the guest")
    assert td.read_shared(0x1FFE, 2) + td.read_shared(0x2000, 12) == b"from the guest"


def test_read_shared_follows_the_pages_wherever_they_lie(td: Td) -> None:
    td.convert(0, SIZE_2M, to="shared")
    td.write(0x5000, b"later")  # pages are allocated on first use: this one before the next
    td.write(0x4FFE, b"so")
    assert td.read_shared(0x4FFE, 7) == b"solater"
    td.write_shared(0x4FFC, b"host's")
    assert td.read(0x4FFC, 9).answers == (b"host'ster",)
    with pytest.raises(ValueError, match="more than one page"):
        td.user_memory.read(td.backings[0].hva + 0x4FFE, 7)


def test_a_shared_gpa_without_a_slot_is_a_device(td: Td) -> None:
    gpa = 0xFEC0_0000
    result = td.run([Read(shared(td, gpa), 4), Write(shared(td, gpa), b"\x12\x34")])
    assert result.answers == (b"\xff\xff\xff\xff", None)
    assert result.exits == (MmioExit(gpa, 4, None), MmioExit(gpa, 2, 0x3412))


def test_the_first_access_to_a_device_costs_one_exit_more(td: Td) -> None:
    gpa = shared(td, 0xFEC0_0000)
    td.touch(0)
    counts = []
    for _ in range(2):
        before = entered(td)
        td.run([Read(gpa, 1)])
        counts.append(entered(td) - before)
    assert counts == [3, 2]


def test_running_code_from_shared_memory_ends_the_vm(td: Td) -> None:
    td.convert(0, SIZE_2M, to="shared")
    result = td.fetch(0x1000)
    assert (result.reason, result.error) == (ERROR, -EIO)
    assert "instruction fetch" in result.detail


# -- memory that is not there


def test_a_private_gpa_without_memory_is_a_memory_fault_that_no_conversion_helps(td: Td) -> None:
    result = td.touch(MEMORY)
    fault = MemoryFaultExit(MEMORY, PAGE_SIZE, PRIVATE_FLAG)
    assert result.reason == MEMORY_FAULT
    assert result.exits == (fault, fault)
    assert "private already" in result.detail


# -- conversions


def test_the_guest_asks_for_conversions_in_chunks_of_2_mib(td: Td) -> None:
    td.touch(0, MEMORY)
    result = td.run([MapGpa(shared(td, 0x1000), SIZE_2M + 0x1000)])
    assert result.value == MapGpaAnswer(0, shared(td, 0x1000) + SIZE_2M + 0x1000)
    assert [exit_.args for exit_ in result.exits if isinstance(exit_, HypercallExit)] == [
        (0x1000, 512, 0),
        (0x1000 + SIZE_2M, 1, 0),
    ]


def test_private_data_is_lost_by_a_conversion_and_shared_data_survives(td: Td) -> None:
    td.write(0x1000, b"secret")
    td.convert(0, SIZE_2M, to="shared")
    assert td.read(0x1000, 6).value == bytes(6)
    td.write(0x1000, b"public")
    td.convert(0, SIZE_2M, to="private")
    assert td.read(0x1000, 6).value == bytes(6)
    assert td.read_shared(0x1000, 6) == b"public"
    td.convert(0, SIZE_2M, to="shared")
    assert td.read(0x1000, 6).value == b"public"


def test_a_vmm_that_discards_leaves_nothing_of_either_copy() -> None:
    td = make(discards=True)
    td.write(0x1000, b"secret")
    td.convert(0, SIZE_2M, to="shared")
    assert td.guest_memory.pages(0) == {}
    td.write(0x1000, b"public")
    td.convert(0, SIZE_2M, to="private")
    assert td.read_shared(0x1000, 6) == bytes(6)


def test_a_conversion_back_costs_an_aug_for_each_page_and_no_table(td: Td) -> None:
    machine = td.host.machine
    td.touch(0, MEMORY)
    td.convert(0, SIZE_2M, to="shared")
    before = dict(machine.seamcalls)
    td.convert(0, SIZE_2M, to="private")
    assert machine.seamcalls["TDH.MEM.PAGE.AUG"] - before["TDH.MEM.PAGE.AUG"] == 512
    assert machine.seamcalls["TDH.MEM.SEPT.ADD"] == before["TDH.MEM.SEPT.ADD"]


def test_using_the_other_alias_converts_one_page(td: Td) -> None:
    td.write(0x1000, b"secret")
    gpa = shared(td, 0x1000)
    result = td.run([Write(gpa, b"open"), Read(gpa, 4)])
    assert result.answers == (None, b"open")
    assert result.exits == (MemoryFaultExit(0x1000, PAGE_SIZE, 0),)
    assert not td.vm.attributes.is_private(1)
    assert td.vm.attributes.is_private(2)
    result = td.run([Read(0x1000, 4)])
    assert result.value == bytes(4)
    assert result.exits == (MemoryFaultExit(0x1000, PAGE_SIZE, PRIVATE_FLAG),)


def test_a_vmm_that_converts_nothing_stops_at_the_memory_fault(td: Td) -> None:
    td.converts = False
    gpa = shared(td, 0x1000)
    result = td.run([Write(gpa, b"open")])
    assert result.reason == MEMORY_FAULT
    assert "converts nothing" in result.detail
    answer = td.run([MapGpa(gpa, PAGE_SIZE)]).value
    assert answer == MapGpaAnswer(TDVMCALL_STATUS_INVALID_OPERAND, gpa)


@pytest.mark.parametrize(
    ("gpa", "size", "status"),
    [
        (0x1001, PAGE_SIZE, TDVMCALL_STATUS_ALIGN_ERROR),
        (0x1000, 100, TDVMCALL_STATUS_ALIGN_ERROR),
        (0x1000, 0, TDVMCALL_STATUS_INVALID_OPERAND),
        ((1 << 47) - PAGE_SIZE, 2 * PAGE_SIZE, TDVMCALL_STATUS_INVALID_OPERAND),
    ],
)
def test_map_gpa_tells_the_guest_of_its_mistakes(gpa: int, size: int, status: int) -> None:
    assert make().run([MapGpa(gpa, size)]).value == MapGpaAnswer(status, gpa)


def test_map_gpa_is_unsupported_while_user_space_takes_no_such_exits(td: Td) -> None:
    td.tdx.exits_on_map_gpa = False
    answer = td.run([MapGpa(shared(td, 0), PAGE_SIZE)]).value
    assert answer == MapGpaAnswer(TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED, shared(td, 0))


def test_a_page_that_the_vmm_punches_out_kills_a_guest_that_trusted_it(td: Td) -> None:
    td.write(0x1000, b"secret")
    td.punch_hole(0x1000, PAGE_SIZE)
    result = td.read(0x1000, 6)
    assert (result.reason, result.error) == (ERROR, -EIO)


def test_two_vcpus_of_a_td_see_the_same_memory(td: Td) -> None:
    td.write(0x1000, b"one", vcpu=0)
    assert td.read(0x1000, 3, vcpu=1).value == b"one"
