"""StepTape: operations recorded step by step, to stand in the middle of one and go back."""

import pytest

from tdxlab.scenarios import booted_machine
from tdxlab.step_tape import StepTape
from tdxlab.steps import WAIT, Deadlock, Operation

HPA = 0x1000_0000


def counting(tape: StepTape, moves: int, *, fails: bool = False) -> Operation:
    """Add one to a byte of host memory at each step; whoever stops in the middle cleans up."""
    machine = tape.machine
    try:
        for move in range(moves):
            value = machine.memory.read(HPA, 1)[0]
            yield ("add", move, HPA)
            machine.store(HPA, bytes([value + 1]))
        if fails:
            raise RuntimeError("no")
    finally:
        machine.store(HPA + 64, b"x")
    return moves


def value(tape: StepTape) -> int:
    return tape.machine.memory.read(HPA, 1)[0]


def make_tape() -> StepTape:
    tape = StepTape(booted_machine())
    tape.perform("three", lambda: counting(tape, 3), lp=1)
    tape.perform("two", lambda: counting(tape, 2))
    return tape


def test_perform_records_each_step_and_returns_the_result() -> None:
    tape = make_tape()
    assert (tape.result, len(tape), tape.position, value(tape)) == (2, 7, 7, 5)
    assert [a.name for a in tape.actions[:4]] == [
        "add 0x0 0x10000000",
        "add 0x1 0x10000000",
        "add 0x2 0x10000000",
        "returns 3",
    ]
    assert [(a.phase, a.lp) for a in tape.actions[3:5]] == [("three", 1), ("two", 0)]


@pytest.mark.parametrize("position", range(8))
def test_seek_gives_one_state_for_each_position_from_anywhere(position: int) -> None:
    expected = [0, 0, 1, 2, 3, 3, 4, 5][position]
    tape = make_tape()
    digests = set()
    for start in range(8):
        tape.seek(start)
        tape.seek(position)
        assert (tape.position, value(tape)) == (position, expected)
        digests.add(tape.machine.digest())
    assert len(digests) == 1


def test_current_names_the_operation_that_is_half_done() -> None:
    tape = make_tape()
    names = []
    for position in range(8):
        tape.seek(position)
        names.append(tape.current.name if tape.current else "")
    assert names == ["", "three", "three", "three", "", "two", "two", ""]


def test_perform_forgets_what_lies_ahead_and_what_is_half_done() -> None:
    tape = make_tape()
    tape.seek(5)
    tape.perform("one", lambda: counting(tape, 1))
    assert (len(tape), value(tape), tape.actions[-1].phase) == (6, 4, "one")
    tape.seek(0)
    tape.perform("one", lambda: counting(tape, 1))
    assert (len(tape), value(tape)) == (2, 1)


def test_perform_leaves_nothing_behind_when_the_operation_raises() -> None:
    tape = make_tape()
    before = tape.machine.digest()
    with pytest.raises(RuntimeError, match="no"):
        tape.perform("bad", lambda: counting(tape, 2, fails=True))
    assert (len(tape), tape.position, tape.machine.digest()) == (7, 7, before)
    tape.seek(2)
    assert value(tape) == 1


def waiting() -> Operation:
    """An operation that waits for somebody who never comes."""
    while True:
        yield (WAIT, "a lock")


def test_perform_refuses_an_operation_that_waits_for_another() -> None:
    tape = make_tape()
    with pytest.raises(Deadlock, match="a lock"):
        tape.perform("stuck", waiting)
    assert len(tape) == 7


@pytest.mark.parametrize("position", [-1, 8])
def test_seek_refuses_a_position_that_is_not_on_the_tape(position: int) -> None:
    tape = make_tape()
    with pytest.raises(ValueError, match=r"this tape has 0\.\.7"):
        tape.seek(position)
