"""Rewinds and tapes over random walks: the same place is the same machine, bit for bit."""

import random
from functools import cache

import pytest

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import VMFAILINVALID
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_SUCCESS
from tdxlab.bare import BareMachine
from tdxlab.journal import Mark
from tdxlab.seam.exits import EXIT_EXCEPTION
from tdxlab.seam.rules import PT_EPT, PT_TDCX, PT_TDR, PT_TDVPR
from tdxlab.tape import Tape
from tests.scene import Scene, crowded_scene
from tests.walker import NothingToDo, Walker
from tests.walker_calls import MAKERS, draw
from tests.walker_guests import DEEDS

LEAVES = sorted(MAKERS)


@cache
def shared_scene() -> Scene:
    return crowded_scene()


def step(scene: Scene, choose: random.Random) -> None:
    """One thing that a host or a guest does, or a byte that the host stores."""
    walker = Walker(scene, choose.choice)
    guests = scene.guest_lps()
    if guests and choose.random() < 0.3:
        try:
            choose.choice(DEEDS)(walker, choose.choice(guests))
        except NothingToDo:
            return
    elif choose.random() < 0.1:
        scene.machine.store(0x3000_0000 + 8 * choose.randrange(64), choose.randbytes(8))
    else:
        made = draw(walker, choose.choice(LEAVES))
        if made is not None:
            scene.machine.seamcall(*made)


@pytest.mark.parametrize("seed", range(8))
def test_rewind_restores_the_digest_of_a_random_walk(seed: int) -> None:
    scene, choose = shared_scene(), random.Random(seed)
    start = scene.machine.mark()
    before = scene.machine.digest()
    digests = set()
    for _ in range(60):
        step(scene, choose)
        digests.add(scene.machine.digest())
    assert len(digests) > 20
    scene.machine.rewind(start)
    assert scene.machine.digest() == before
    scene.machine.journal.release(start)


@pytest.mark.parametrize("seed", range(8))
def test_rewind_to_nested_marks_of_a_random_walk_in_any_order(seed: int) -> None:
    scene, choose = shared_scene(), random.Random(seed)
    machine = scene.machine
    marks: list[tuple[Mark, str]] = [(machine.mark(), machine.digest())]
    for _ in range(40):
        for _ in range(choose.randrange(8)):
            step(scene, choose)
        if choose.random() < 0.4:
            place = choose.randrange(len(marks))
            machine.rewind(marks[place][0])
            assert machine.digest() == marks[place][1]
            del marks[place + 1 :]
        else:
            marks.append((machine.mark(), machine.digest()))
    for mark, digest in reversed(marks):
        machine.rewind(mark)
        assert machine.digest() == digest
    machine.journal.release(marks[0][0])
    assert not machine.journal.recording
    assert len(machine.journal) == 0


@pytest.mark.parametrize("seed", range(8))
def test_seek_on_a_tape_leads_to_the_same_machine_from_both_sides(seed: int) -> None:
    scene, choose = shared_scene(), random.Random(seed)
    machine = scene.machine
    start = machine.mark()
    tape = Tape(machine)
    digests = [machine.digest()]
    while len(tape) < 50:
        record_one(scene, tape, choose)
        if len(tape) == len(digests):
            digests.append(machine.digest())
    for _ in range(40):
        position = choose.randrange(len(tape) + 1)
        tape.seek(position)
        assert tape.position == position
        assert machine.digest() == digests[position]
    tape.seek(0)
    assert machine.digest() == digests[0]
    machine.rewind(start)
    machine.journal.release(start)


def record_one(scene: Scene, tape: Tape, choose: random.Random) -> None:
    """One more action on the tape, if the dice find one."""
    walker = Walker(scene, choose.choice)
    guests = scene.guest_lps()
    if guests and choose.random() < 0.3:
        lp = choose.choice(guests)
        deed = choose.choice((tape.touch, tape.tdcall, tape.interrupt))
        if deed == tape.touch:
            tape.touch(lp, choose.choice((0, 0x1000, 0x2000)), write=True)
        elif deed == tape.tdcall:
            tape.tdcall(lp, choose.randrange(8), Registers(rcx=choose.choice((0, 0x2000))))
        else:
            tape.interrupt(lp)
        return
    made = draw(walker, choose.choice(LEAVES))
    if made is not None:
        tape.seamcall(*made)


def halt(machine: BareMachine) -> None:
    """The guest of a TD that is no debug TD has an exception exit: the module stops."""
    lp = next(lp for lp in machine.cpu.lps if machine.cpu.vcpu_inside(lp))
    machine.vm_exit(lp, EXIT_EXCEPTION, Registers(), interruption=0x8000_030D)


def test_rewind_brings_a_halted_module_back_to_life() -> None:
    scene = crowded_scene()
    made = draw(Walker(scene, lambda options: options[0]), 0)
    assert made is not None
    scene.machine.seamcall(*made)
    mark = scene.machine.mark()
    before = scene.machine.digest()
    halt(scene.machine)
    assert scene.machine.module.halted
    assert scene.machine.digest() != before
    scene.machine.rewind(mark)
    assert scene.machine.module.halted is None
    assert scene.machine.digest() == before


@pytest.mark.parametrize("structure", ["tdr", "tdcx", "tdvpr", "table"])
def test_store_into_a_control_page_halts_the_module(structure: str) -> None:
    scene = crowded_scene()
    page_type = {"tdr": PT_TDR, "tdcx": PT_TDCX, "tdvpr": PT_TDVPR, "table": PT_EPT}[structure]
    hpa = scene.pages(page_type)[0]
    mark = scene.machine.mark()
    scene.machine.store(hpa + 8, b"\xff")
    assert f"{hpa:#x} (PT_" in str(scene.machine.module.halted)
    made = draw(Walker(scene, lambda options: options[0]), abi.TDH_PHYMEM_PAGE_RDMD)
    assert made is not None
    assert scene.machine.seamcall(*made) == VMFAILINVALID
    scene.machine.rewind(mark)
    assert scene.machine.seamcall(*made) == TDX_SUCCESS


def test_store_into_a_free_page_halts_nothing() -> None:
    scene = crowded_scene()
    scene.machine.store(scene.free_pages()[0], b"\xff")
    scene.machine.clear(scene.free_pages()[0])
    assert scene.machine.module.halted is None
