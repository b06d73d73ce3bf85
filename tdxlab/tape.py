"""A tape: every call and guest event on a machine, recorded so that one can go back and forth.

    tape = Tape(machine)
    tape.seamcall(0, leaf, registers)      # does it, and records it
    tape.seek(0)                           # as if nothing had happened
    tape.seek(len(tape))                   # ... and again

Going back rewinds the machine's journal; going forward plays the recorded inputs again. The state
after k actions is therefore a function of the starting state and the first k actions, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tdxlab.abi.leaves import GUEST_LEAVES, HOST_LEAVES
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.bare import BareMachine
from tdxlab.cpu import Translation
from tdxlab.journal import Mark


@dataclass
class Action:
    """One recorded action: its inputs, and what came of it when it was played last.

    kind: "SEAMCALL", "TDCALL", "VM exit", "touch", "store" or "clear". name: the leaf's name, or a
    few words. phase: what the action is part of. inputs: register values or arguments. status: RAX,
    None where there is none. outputs: registers afterwards. exited: True if the guest left for the
    host.
    """

    kind: str
    lp: int
    name: str
    phase: str
    inputs: dict[str, int]
    play: Callable[[], Any] = field(repr=False)
    status: int | None = None
    outputs: dict[str, int] = field(default_factory=dict)
    exited: bool = False

    def note(self, result: Any) -> None:
        """Keep what came of it."""
        if isinstance(result, GuestOutcome):
            self.exited, self.status = result.exited, result.status
            self.outputs = result.registers.as_dict()
        elif isinstance(result, Translation):
            self.status, self.outputs = 0, {"hpa": result.hpa}
        elif isinstance(result, tuple):
            self.status, self.outputs = result[0], result[1].as_dict()


class Tape:
    """The actions on one machine since the tape was put in, and where the machine stands among
    them.

    phase: label for the actions to come.
    """

    def __init__(self, machine: BareMachine) -> None:
        self.machine = machine
        self.phase = ""
        self._actions: list[Action] = []
        self._marks: list[Mark] = [machine.mark()]

    def __len__(self) -> int:
        return len(self._actions)

    @property
    def position(self) -> int:
        """How many of the actions have happened in the machine's present state."""
        return len(self._marks) - 1

    @property
    def actions(self) -> list[Action]:
        """All recorded actions, oldest first, those ahead of the present position included."""
        return list(self._actions)

    @property
    def last(self) -> Action | None:
        """The action that led to the present state, None at the beginning."""
        return self._actions[self.position - 1] if self.position else None

    def seek(self, position: int) -> None:
        """Put the machine into the state after the first `position` actions.

        Refuses a position outside 0..len(tape): ValueError.
        """
        if not 0 <= position <= len(self._actions):
            raise ValueError(f"position {position}; this tape has 0..{len(self._actions)}")
        if position < self.position:
            self.machine.rewind(self._marks[position])
            del self._marks[position + 1 :]
        while self.position < position:
            self._play(self._actions[self.position])

    def _play(self, action: Action) -> Any:
        result = action.play()
        action.note(result)
        self._marks.append(self.machine.mark())
        return result

    def _do(self, action: Action) -> Any:
        """Play a new action; what was recorded ahead of the present position is forgotten."""
        result = self._play(action)
        del self._actions[self.position - 1 :]
        self._actions.append(action)
        return result

    # -- the machine's doors, recorded

    def seamcall(self, lp: int, rax: int, registers: Registers) -> int:
        """As `BareMachine.seamcall`."""
        given = registers.copy()

        def play() -> tuple[int, Registers]:
            values = given.copy()
            return self.machine.seamcall(lp, rax, values), values

        leaf = HOST_LEAVES.get(rax & 0xFFFF)
        name = leaf.name if leaf else f"leaf {rax & 0xFFFF}"
        action = Action("SEAMCALL", lp, name, self.phase, _inputs(rax, given), play)
        status, values = self._do(action)
        registers.assign(values)
        result: int = status
        return result

    def tdcall(self, lp: int, rax: int, registers: Registers) -> GuestOutcome:
        """As `BareMachine.tdcall`."""
        given = registers.copy()
        leaf = GUEST_LEAVES.get(rax & 0xFFFF)
        name = leaf.name if leaf else f"leaf {rax & 0xFFFF}"

        def play() -> GuestOutcome:
            return self.machine.tdcall(lp, rax, given.copy())

        action = Action("TDCALL", lp, name, self.phase, _inputs(rax, given), play)
        outcome: GuestOutcome = self._do(action)
        return outcome

    def interrupt(self, lp: int) -> GuestOutcome:
        """As `BareMachine.interrupt`."""
        return self._take_out(lp, lambda: self.machine.interrupt(lp))

    def kick(self, lp: int) -> GuestOutcome:
        """As `BareMachine.kick`."""
        return self._take_out(lp, lambda: self.machine.kick(lp))

    def _take_out(self, lp: int, play: Callable[[], GuestOutcome]) -> GuestOutcome:
        outcome: GuestOutcome = self._do(Action("VM exit", lp, "interrupt", self.phase, {}, play))
        return outcome

    def touch(
        self, lp: int, gpa: int, *, write: bool = False, rip: int | None = None
    ) -> Translation | GuestOutcome:
        """As `BareMachine.touch`."""
        name = "write" if write else "read"

        def play() -> Translation | GuestOutcome:
            return self.machine.touch(lp, gpa, write=write, rip=rip)

        action = Action("touch", lp, name, self.phase, {"gpa": gpa}, play)
        result: Translation | GuestOutcome = self._do(action)
        return result

    def store(self, hpa: int, data: bytes) -> None:
        """As `BareMachine.store`."""
        inputs = {"hpa": hpa, "bytes": len(data)}
        name = "write memory"
        self._do(
            Action("store", 0, name, self.phase, inputs, lambda: self.machine.store(hpa, data))
        )

    def clear(self, hpa: int) -> None:
        """As `BareMachine.clear`."""
        self._do(
            Action(
                "clear",
                0,
                "64 x MOVDIR64B",
                self.phase,
                {"hpa": hpa},
                lambda: self.machine.clear(hpa),
            )
        )


def _inputs(rax: int, registers: Registers) -> dict[str, int]:
    return {"rax": rax} | {name: value for name, value in registers.as_dict().items() if value}
