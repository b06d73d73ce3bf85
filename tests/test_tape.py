"""Recording calls, going back and forth among them, and recording anew from the middle."""

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.bare import BareMachine
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine, life_of_a_td
from tdxlab.tape import Tape

GPA = 0x4000_0000


@pytest.fixture
def tape() -> Tape:
    """A running TD: its last actions are an entry, an access that exits, and a store of the
    host.
    """
    tape = Tape(booted_machine())
    td = HostTd(Host(tape.machine, tape), max_vcpus=1)
    td.add_vcpu(lp=0)
    td.add_page(GPA, b"code")
    td.finalize()
    td.enter(0, lp=0)
    tape.touch(0, GPA)
    tape.touch(0, GPA + 0x1000)
    tape.store(0x3000, b"host")
    return tape


@pytest.mark.parametrize("gpaw", [48, 52])
def test_seek_gives_the_same_digest_at_every_position_both_ways(gpaw: int) -> None:
    tape = life_of_a_td(gpaw=gpaw)
    digests = []
    for position in range(len(tape), -1, -1):
        tape.seek(position)
        digests.append(tape.machine.digest())
    assert len(set(digests)) == len(digests), "every action changes something"
    for position, digest in enumerate(reversed(digests)):
        tape.seek(position)
        assert tape.machine.digest() == digest
    tape.seek(len(tape) // 2)
    assert tape.machine.digest() == digests[len(tape) - len(tape) // 2]


def test_seek_to_the_start_undoes_everything() -> None:
    machine = booted_machine()
    before = machine.digest()
    tape = life_of_a_td(machine=machine)
    tape.seek(0)
    assert (machine.digest(), tape.position, tape.last) == (before, 0, None)


@pytest.mark.parametrize("position", [-1, 1 << 20])
def test_seek_refuses_a_position_off_the_tape(tape: Tape, position: int) -> None:
    before = tape.machine.digest()
    with pytest.raises(ValueError, match=rf"position {position}; this tape has 0\.\.{len(tape)}"):
        tape.seek(position)
    assert tape.machine.digest() == before


def test_a_new_action_forgets_what_was_ahead(tape: Tape) -> None:
    length = len(tape)
    tape.seek(length - 3)
    outcome = tape.interrupt(0)
    assert outcome.exited
    assert len(tape) == tape.position == length - 2
    assert tape.last is not None
    assert (tape.last.name, tape.last.exited) == ("interrupt", True)


def test_actions_note_what_was_given_and_what_came_back(tape: Tape) -> None:
    store, fault, read, enter = tape.actions[-1:-5:-1]
    assert (store.kind, store.inputs) == ("store", {"hpa": 0x3000, "bytes": 4})
    assert (fault.kind, fault.status, fault.exited) == ("touch", 48, True)
    assert fault.outputs["r8"] == GPA + 0x1000
    assert (read.kind, read.status, read.exited) == ("touch", 0, False)
    assert (enter.kind, enter.name, enter.lp, enter.phase) == (
        "SEAMCALL",
        "TDH.VP.ENTER",
        0,
        "run",
    )


def test_a_seamcall_gives_the_caller_its_registers(tape: Tape) -> None:
    registers = Registers(rcx=tape.machine.platform.tdmrs[0].base)
    assert tape.seamcall(1, abi.TDH_PHYMEM_PAGE_RDMD, registers) == 0
    assert registers.rcx == 4
    assert tape.actions[-1].outputs["rcx"] == 4


def test_a_mistake_of_the_caller_is_not_recorded(tape: Tape) -> None:
    length, digest = len(tape), tape.machine.digest()
    with pytest.raises(ValueError, match="LP 9 does not exist"):
        tape.seamcall(9, abi.TDH_SYS_INFO, Registers())
    with pytest.raises(ValueError, match="not in this machine's memory"):
        tape.store(1 << 45, b"x")
    assert (len(tape), tape.machine.digest()) == (length, digest)


def test_clear_and_tdcall_play_again(tape: Tape) -> None:
    tape.clear(0x3000)
    tape.seamcall(0, abi.TDH_VP_ENTER, Registers(rcx=tape.machine.platform.tdmrs[0].base + 0x7000))
    assert tape.machine.cpu.vcpu_inside(0)
    outcome = tape.tdcall(0, abi.TDG_VP_INFO, Registers())
    assert outcome.registers.rcx == 48
    end = tape.machine.digest()
    tape.seek(0)
    tape.seek(len(tape))
    assert tape.machine.digest() == end
    assert tape.machine.memory.read(0x3000, 4) == bytes(4)


def test_a_tape_of_an_untouched_machine_is_empty() -> None:
    tape = Tape(BareMachine())
    assert (len(tape), tape.position, tape.actions) == (0, 0, [])
