"""The VMM's handle on a VM: memory, holes, devices, and threads side by side."""

import errno
from collections.abc import Iterator

import pytest

from tdxlab import steps
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.guest import Access, Hlt, MapGpa, Read, Write
from tdxlab.invariants import check
from tdxlab.kvm.exits import FailEntry, InternalError, MemoryFaultExit
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM
from tdxlab.machine import Machine
from tdxlab.vmm import Gate
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_ioctls import HVA_BASE
from tdxlab.vmm_run import ERROR, UNHANDLED
from tdxlab.vmm_td import Td

MEMORY = 4 << 20
SHARED = 1 << 47


@pytest.fixture
def td() -> Td:
    return Machine(memory="1 GiB").create_td(vcpus=3, memory=MEMORY)


def machine_of(gate: Gate) -> Machine:
    machine = gate.host.machine
    assert isinstance(machine, Machine)
    return machine


# -- memory


def test_add_memory_gives_a_second_slot_with_its_own_guest_memfd(td: Td) -> None:
    backing = td.add_memory(SIZE_1G, SIZE_2M)
    assert (backing.slot, backing.gmem, backing.hva) == (1, 1, HVA_BASE + SIZE_1G)
    assert td.write(SIZE_1G + 5, b"far").ok
    assert td.read(SIZE_1G + 5, 3).value == b"far"
    assert list(td.guest_memory.pages(1)) == [0]


def test_add_memory_that_overlaps_leaves_nothing(td: Td) -> None:
    digest = machine_of(td).digest()
    with pytest.raises(IoctlError, match="EEXIST"):
        td.add_memory(MEMORY - PAGE_SIZE, SIZE_2M)
    assert machine_of(td).digest() == digest


def test_punch_hole_removes_and_frees_private_pages(td: Td) -> None:
    machine = machine_of(td)
    td.touch(0, SIZE_2M)
    free, before = machine.host.pages.free, machine.seamcalls["TDH.VP.ENTER"]
    td.punch_hole(0x1000, "8 KiB")
    assert machine.host.pages.free == free + 2
    assert machine.seamcalls["TDH.MEM.PAGE.REMOVE"] == 2
    assert machine.seamcalls["TDH.VP.ENTER"] == before
    assert machine.tables(td)["external"]["4K"].entries == 510
    td.guest.note_conversion(0x1000, 2 * PAGE_SIZE)
    assert td.read(0x1000, 8).value == bytes(8)


def test_deleting_a_slot_unmaps_both_kinds_of_its_memory(td: Td) -> None:
    machine = machine_of(td)
    td.touch(0, SIZE_2M)
    td.convert(0, "1 MiB", to="shared")
    td.touch(0, "1 MiB")
    td.set_user_memory_region(0, 0, 0)
    tables = machine.tables(td)
    assert [tables[tree]["4K"].entries for tree in ("mirror", "external", "direct")] == [0, 0, 0]
    assert machine.seamcalls["TDH.MEM.PAGE.REMOVE"] == 512


def test_memory_that_the_host_unmaps_is_gone_for_the_guest_and_comes_back_empty(td: Td) -> None:
    td.convert(0, SIZE_2M, to="shared")
    td.write(0x1000, b"swapped?")
    hva = td.backings[0].hva
    steps.run(td.host.on_cpu(3, td.user_memory.munmap(hva, SIZE_2M)))
    result = td.read(0x1000, 8)
    assert (result.reason, result.error) == (ERROR, -errno.EFAULT)
    td.user_memory.mmap(hva, SIZE_2M)
    assert td.read(0x1000, 8).value == bytes(8)


def test_memory_that_the_host_migrates_is_the_same_for_the_guest(td: Td) -> None:
    td.convert(0, SIZE_2M, to="shared")
    td.write(0x1000, b"stays")
    hva = td.backings[0].hva + 0x1000
    old = td.user_memory.fault_in(hva, write=False)
    assert steps.run(td.host.on_cpu(3, td.user_memory.migrate(hva)))
    assert td.user_memory.fault_in(hva, write=False) != old
    assert td.read(0x1000, 5).value == b"stays"


# -- devices and other exits


class Clock:
    """A device that counts its reads and keeps its writes."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []
        self.reads = 0

    def __call__(self, gpa: int, size: int, data: int | None) -> int:
        if data is not None:
            self.written.append((gpa, size, data))
            return 0
        self.reads += 1
        return self.reads


@pytest.mark.parametrize("kind", ["td", "plain"])
def test_a_device_of_the_vmm_answers_the_guest(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(memory="1 GiB")
    gate: Gate = machine.create_td(memory=MEMORY)
    gpa = 0xFEC0_0000 | SHARED
    if kind == "plain":
        gate, gpa = machine.create_vm(memory=MEMORY), 0xFEC0_0000
    clock = Clock()
    monkeypatch.setattr(gate, "device", clock)
    result = gate.run([Read(gpa, 4), Write(gpa + 8, b"\x12\x34"), Read(gpa, 8)])
    assert result.answers == ((1).to_bytes(4, "little"), None, (2).to_bytes(8, "little"))
    assert clock.written == [(0xFEC0_0008, 2, 0x3412)]


def test_a_poisoned_page_ends_the_td_and_not_the_machine(td: Td) -> None:
    td.write(0x1000, b"x")
    folio = td.guest_memory.folio(0, 1)
    assert folio is not None
    machine_of(td).store(folio.pfn << 12, b"attack")
    result = td.read(0x1000, 1)
    assert result.reason == UNHANDLED
    assert isinstance(result.exits[0], InternalError | FailEntry)
    other = machine_of(td).create_td(memory=MEMORY)
    assert other.touch(0).ok


# -- threads


def storm(gpa: int, rounds: int) -> Iterator[Access]:
    """A guest that converts a page there and back and uses it in between."""
    for number in range(rounds):
        yield Write(gpa, bytes([number]))
        yield MapGpa(gpa | SHARED, PAGE_SIZE)
        yield Write(gpa | SHARED, bytes([number]))
        yield MapGpa(gpa, PAGE_SIZE)


@pytest.mark.parametrize("seed", range(6))
def test_vcpus_that_convert_and_touch_side_by_side_all_finish(td: Td, seed: int) -> None:
    machine = machine_of(td)
    operations = [
        td.run_steps(storm(0x1000, 3), vcpu=0),
        td.run_steps(storm(0x2000, 3), vcpu=1),
        td.run_steps([Write(page, b"x") for page in range(0x3000, 0x9000, PAGE_SIZE)], vcpu=2),
    ]
    schedule = steps.seeded(operations, seed)
    assert [schedule.results[number].reason for number in range(3)] == ["done"] * 3
    assert machine.tables(td)["mirror"]["4K"] == machine.tables(td)["external"]["4K"]
    check(machine, "alive")


@pytest.mark.parametrize("seed", range(6))
def test_a_hole_punched_beside_a_running_guest_leaves_no_stale_translation(
    td: Td, seed: int
) -> None:
    machine = machine_of(td)
    td.touch(0, 0x8000)
    lp = 3
    schedule = steps.seeded(
        [
            td.run_steps([Read(page, 1) for page in range(0, 0x8000, PAGE_SIZE)] * 3, vcpu=0),
            td.host.on_cpu(lp, td.punch_hole_steps(0x2000, 2 * PAGE_SIZE)),
        ],
        seed,
    )
    assert schedule.results[1] == 0
    assert machine.seamcalls["TDH.MEM.PAGE.REMOVE"] == 2
    assert schedule.results[0].reason in ("done", ERROR)
    check(machine, "alive")


@pytest.mark.parametrize("vm_type", [KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM])
@pytest.mark.parametrize("seed", range(4))
def test_a_vm_whose_memory_is_unmapped_beside_it_faults_it_back(vm_type: int, seed: int) -> None:
    machine = Machine(memory="1 GiB")
    vm = machine.create_vm(vm_type=vm_type, vcpus=2, memory=MEMORY)
    private = vm.vm.features.has_private_mem
    pages = [Write(page, b"x") for page in range(0, 0x8000, PAGE_SIZE)]
    vm.run(pages)
    zap = (
        vm.set_memory_attributes_steps(0, SIZE_2M, private=False)
        if private
        else vm.set_user_memory_region_steps(0, 0, 0, hva=HVA_BASE)
    )
    schedule = steps.seeded(
        [
            vm.run_steps(pages * 2, vcpu=0),
            vm.run_steps(pages * 2, vcpu=1),
            vm.host.on_cpu(3, zap),
        ],
        seed,
    )
    assert schedule.results[2] == 0
    for number in (0, 1):
        result = schedule.results[number]
        assert result.ok or not private
    check(machine, "alive")


def test_a_guest_that_idles_is_woken_by_its_timer(td: Td) -> None:
    result = td.run([Hlt(), Write(0, b"x"), Hlt(), Read(0, 1)])
    assert result.answers == (None, None, None, b"x")


def test_a_guest_that_idles_without_a_timer_waits_for_the_vmm(td: Td) -> None:
    schedule = steps.Schedule([td.run_steps([Hlt(timer=False), Read(0, 1)])])
    for _ in range(60):
        schedule.advance(0)
    assert schedule.labels[0] == (steps.WAIT, "an event", 0)
    td.interrupt(0)
    while schedule.ready:
        schedule.advance(0)
    assert schedule.results[0].answers == (None, bytes(1))


def test_running_a_vcpu_twice_at_once_is_refused(td: Td) -> None:
    first = td.run_steps([Read(0, 1)], vcpu=0)
    next(first)
    with pytest.raises(ValueError, match="runs a program already"):
        td.run([Read(0, 1)], vcpu=0)
    first.close()
    assert td.touch(0).ok


def test_a_vcpu_that_changes_its_lp_is_flushed_from_the_old_one(td: Td) -> None:
    machine = machine_of(td)
    td.run([Write(0, b"x")], vcpu=0, lp=0)
    assert "TDH.VP.FLUSH" not in machine.seamcalls
    assert td.run([Read(0, 1)], vcpu=0, lp=2).value == b"x"
    assert machine.seamcalls["TDH.VP.FLUSH"] == 1


def test_convert_tells_how_far_it_is(td: Td) -> None:
    td.touch(0, SIZE_2M)
    told: list[tuple[int, int]] = []
    for to in ("shared", "private"):
        td.convert(0, SIZE_2M, to=to, progress=lambda *what: told.append(what))
    assert [done for done, _ in told] == [*range(1, 513), *range(1, 513)]
    assert {total for _, total in told} == {512}


def test_reading_and_writing_across_pages_of_two_kinds(td: Td) -> None:
    td.convert(0x1000, PAGE_SIZE, to="shared")
    assert td.write(0xFFC, b"private-and-shared").ok
    assert td.read(0xFFC, 18).value == b"private-and-shared"
    assert td.read_shared(0x1000, 14) == b"ate-and-shared"


def test_a_result_tells_its_exits(td: Td) -> None:
    result = td.run([Read(SHARED | 0x1000, 1)])
    assert result.exits == (MemoryFaultExit(0x1000, PAGE_SIZE, 0),)
    assert result.ok
    assert td.run([]).value is None
