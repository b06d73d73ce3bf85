"""Stories to watch: a few calls each, on a small machine.

A story is played onto a tape, so that it can be seen step by step, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Iterator

from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.status import status_name
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.tape import Action, Tape

#: Where the guest's first page lies, and the one that it is given while it runs.
CODE_GPA = 0x4000_0000
HEAP_GPA = 0x4000_1000


def booted_machine(*, tdmr_gib: int = 1, lps: int = 4, packages: int = 2) -> BareMachine:
    """A machine whose module is ready and whose TDMRs are initialised; nothing is on tape yet."""
    machine = BareMachine(default_platform(tdmr_gib=tdmr_gib, lps=lps, packages=packages))
    Host(machine).boot()
    return machine


def life_of_a_td(*, gpaw: int = 48, machine: BareMachine | None = None) -> Tape:
    """A TD comes to life and dies: created, one vCPU, one measured page; it runs, touches memory,
    accepts a page, loses it, ends.

    gpaw: 48 or 52. machine: a booted one, fresh if None. Returns the tape at its end.
    """
    tape = Tape(machine or booted_machine())
    host = Host(tape.machine, tape)
    td = HostTd(host, gpaw=gpaw, max_vcpus=1)
    td.add_vcpu(lp=0)
    td.add_page(CODE_GPA, b"the guest's first instructions")
    td.measure(CODE_GPA)
    td.finalize()
    td.enter(0, lp=0)
    tape.phase = "touch"
    tape.touch(0, CODE_GPA)
    tape.touch(0, HEAP_GPA, write=True)
    td.aug(HEAP_GPA, lp=1)
    td.enter(0, lp=0)
    td.accept(0, HEAP_GPA)
    tape.phase = "touch"
    tape.touch(0, HEAP_GPA, write=True)
    td.zap(HEAP_GPA, lp=1)
    td.tear_down()
    return tape


def lines(actions: list[Action]) -> Iterator[str]:
    """Actions as the lines of a table; equal neighbours share a line."""
    yield f"{'step':>4}  {'phase':<16} {'LP':>2}  {'call':<26} {'answer':<24} operands"
    first = 0
    while first < len(actions):
        behind = first + 1
        while behind < len(actions) and _alike(actions[first], actions[behind]):
            behind += 1
        yield _line(first + 1, actions[first], behind - first)
        first = behind


def _alike(left: Action, right: Action) -> bool:
    return (left.name, left.phase, left.status, left.lp) == (
        right.name,
        right.phase,
        right.status,
        right.lp,
    )


def _line(number: int, action: Action, count: int) -> str:
    name = action.name if count == 1 else f"{action.name} x {count}"
    operands = " ".join(f"{k}={v:#x}" for k, v in action.inputs.items() if k != "rax")
    left = f"{number:>4}  {action.phase:<16} {action.lp:>2}  {name:<26}"
    return f"{left} {answer(action):<24} {operands}".rstrip()


def answer(action: Action) -> str:
    """What came of an action, in a word or two."""
    if action.status is None:
        return ""
    if action.status == IN_GUEST:
        return "in the guest"
    if action.kind == "touch" and not action.exited:
        return "translated" if "hpa" in action.outputs else "#VE"
    if action.exited:
        return f"TD exit {action.status & 0xFFFF_FFFF}"
    return status_name(action.status).removeprefix("TDX_")
