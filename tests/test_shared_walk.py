"""The guest's shared memory: the EPT that the host gives for it, and what an access leads to."""

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.arch import EPT_ACCESSED, EPT_DIRTY, EPT_READ, EPT_SUPPRESS_VE, EPT_WRITE
from tdxlab.cpu import EptMisconfiguration, Translation
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.memory import MachineCheck
from tdxlab.scenarios import booted_machine

SHARED_EPT_POINTER = 0x0024_0003_0000_203C
PRIVATE = 0x4000_0000
ROOT, PAGE, RWX, LEAF = 0x800_0000, 0x900_0000, 7, 1 << 7


class Scene:
    """A TD that runs on LP 0, with one private page, and shared tables for one shared page."""

    def __init__(self, gpaw: int) -> None:
        self.machine = booted_machine()
        self.td = HostTd(Host(self.machine), gpaw=gpaw)
        self.td.add_vcpu()
        self.private_hpa = self.td.add_page(PRIVATE, b"secret")
        self.td.finalize()
        self.gpa = 1 << gpaw - 1 | PRIVATE
        self.leaf_word = self.map(PAGE | RWX)

    def map(self, leaf: int) -> int:
        """Link tables for the shared GPA down to the entry `leaf`; returns its word."""
        memory, table = self.machine.memory, ROOT
        for level in range(self.td.top_level, -1, -1):
            word = memory.frame(table) + (self.gpa >> 12 + 9 * level & 511)
            table += 0x1000
            memory.words.put(word, table | RWX if level else leaf)
        return word

    def enter(self) -> None:
        self.td.host.must(
            0,
            abi.TDH_VP_WR,
            rcx=self.td.vcpus[0],
            rdx=SHARED_EPT_POINTER,
            r8=ROOT,
            r9=(1 << 52) - 4096,
        )
        self.td.enter(0, lp=0)


@pytest.fixture(params=[48, 52])
def scene(request: pytest.FixtureRequest) -> Scene:
    return Scene(request.param)


def test_touch_walks_the_hosts_tables_for_a_shared_gpa(scene: Scene) -> None:
    scene.enter()
    assert scene.machine.touch(0, scene.gpa + 5) == Translation(PAGE + 5, 0, RWX)
    private = scene.machine.touch(0, PRIVATE + 5)
    assert private == Translation(scene.private_hpa + 5, 0, RWX)


def test_touch_exits_from_a_shared_gpa_while_the_host_has_given_no_tables(scene: Scene) -> None:
    scene.td.enter(0, lp=0)
    outcome = scene.machine.touch(0, scene.gpa)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=EPT_READ, r8=scene.gpa))


def test_touch_exits_where_the_entry_suppresses_the_exception(scene: Scene) -> None:
    scene.map(EPT_SUPPRESS_VE | EPT_READ)
    scene.enter()
    outcome = scene.machine.touch(0, scene.gpa + 8, write=True)
    expected = Registers(rcx=EPT_READ | EPT_WRITE | EPT_READ << 3, r8=scene.gpa)
    assert outcome == GuestOutcome(True, 48, expected)


def test_touch_tells_the_guest_where_the_entry_allows_it(scene: Scene) -> None:
    scene.map(0)
    scene.enter()
    outcome = scene.machine.touch(0, scene.gpa + 8, write=True)
    assert isinstance(outcome, GuestOutcome)
    assert not outcome.exited
    assert scene.machine.take_exception(0) == 20
    assert scene.machine.take_exception(0) == 0
    info = scene.machine.tdcall(0, abi.TDG_VP_VEINFO_GET, Registers()).registers
    assert (info.rcx, info.rdx & 7, info.r9) == (48, EPT_READ | EPT_WRITE, scene.gpa + 8)


def test_touch_exits_while_the_last_exceptions_information_is_unread(scene: Scene) -> None:
    scene.map(0)
    scene.enter()
    scene.machine.touch(0, scene.gpa)
    outcome = scene.machine.touch(0, scene.gpa)
    assert outcome == GuestOutcome(True, 48, Registers(rcx=EPT_READ, r8=scene.gpa))


def test_touch_exits_with_a_misconfiguration_for_a_writable_unreadable_entry(scene: Scene) -> None:
    scene.map(EPT_WRITE)
    scene.enter()
    assert scene.machine.touch(0, scene.gpa) == GuestOutcome(True, 49, Registers(r8=scene.gpa))


def test_shared_translations_go_with_the_tds_own_when_the_tlb_is_flushed(scene: Scene) -> None:
    scene.enter()
    scene.machine.touch(0, scene.gpa)
    assert len(scene.machine.cpu.tlbs[0]) == 1
    scene.machine.memory.words.put(scene.leaf_word, 0)
    assert isinstance(scene.machine.touch(0, scene.gpa), Translation)
    scene.machine.cpu.invept_global(0)
    assert not scene.machine.cpu.tlbs[0]
    assert isinstance(scene.machine.touch(0, scene.gpa), GuestOutcome)


def test_guest_data_has_the_tds_key_in_private_and_none_in_shared_memory(scene: Scene) -> None:
    scene.enter()
    machine = scene.machine
    assert machine.read_guest(0, PRIVATE, 6) == b"secret"
    machine.write_guest(0, PRIVATE + 1, b"ile")
    machine.write_guest(0, scene.gpa, b"hello")
    assert machine.read_guest(0, PRIVATE, 6) == b"sileet"
    assert machine.memory.keyid_of(scene.private_hpa) == scene.td.keyid
    assert machine.memory.read(PAGE, 5) == b"hello"
    assert machine.memory.keyid_of(PAGE) == 0
    assert machine.memory.read(scene.private_hpa, 6) != b"sileet"


def test_read_guest_ends_the_td_at_a_poisoned_line(scene: Scene) -> None:
    scene.enter()
    scene.machine.store(scene.private_hpa, b"x")
    with pytest.raises(MachineCheck):
        scene.machine.memory.read(scene.private_hpa, 1, scene.td.keyid)
    outcome = scene.machine.read_guest(0, PRIVATE, 1)
    assert isinstance(outcome, GuestOutcome)
    assert outcome.status >> 32 == 0x6000_0005


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 4097), (4095, 2)])
def test_read_guest_refuses_what_is_not_within_a_page(scene: Scene, offset: int, size: int) -> None:
    scene.enter()
    with pytest.raises(ValueError, match="not within one page; allowed are"):
        scene.machine.read_guest(0, PRIVATE + offset, size)


def walk(scene: Scene, access: int) -> object:
    level, gpa = scene.td.top_level, scene.gpa
    return scene.machine.cpu.access(1, ROOT, level, gpa, access, ad_bits=True)


def test_access_sets_accessed_and_dirty_bits_where_the_ept_has_them(scene: Scene) -> None:
    words = scene.machine.memory.words
    walk(scene, EPT_READ)
    assert words.view[scene.leaf_word] & (EPT_ACCESSED | EPT_DIRTY) == EPT_ACCESSED
    walk(scene, EPT_WRITE)
    assert words.view[scene.leaf_word] & (EPT_ACCESSED | EPT_DIRTY) == EPT_ACCESSED | EPT_DIRTY


def test_access_answers_a_misconfiguration_as_such(scene: Scene) -> None:
    scene.map(EPT_WRITE)
    assert walk(scene, EPT_READ) == EptMisconfiguration(scene.gpa)
