"""The SEAMCALL console: a desk with a machine on it, calls by name, and answers in words.

    desk = Desk(gpaw=48)
    desk.call("TDH.MNG.CREATE", rcx="free page", rdx="free KeyID")    # says what came back
    desk_before("vCPU", gpaw=48)          # ... or begin where the guide has done the earlier stages

Registers take numbers or the names of things (`tdxlab.study.things`). What the module refuses is
an answer, no exception; what no host could do at all is a ValueError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from tdxlab.abi.leaves import HOST_LEAVES, Leaf
from tdxlab.abi.registers import REGISTER_NAMES, Registers
from tdxlab.abi.structs import CONFIG_FLAGS_GPAW_52, EPTP_4_LEVELS, EPTP_5_LEVELS, make_td_params
from tdxlab.arch import PAGE_SIZE, sept_levels
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.host import SOURCE_PAGE_BUFFER, TD_PARAMS_BUFFER, Host
from tdxlab.study.answers import Answer, Reply
from tdxlab.study.books import Books, compare, read_books
from tdxlab.study.guide import (
    BUILD,
    INTERRUPT,
    TEAR_DOWN,
    Next,
    next_to_build,
    next_to_tear_down,
)
from tdxlab.study.things import BAD_PARAMS_BUFFER, BY_HAND, resolve, things, usual_thing
from tdxlab.tape import Tape

STAGES = (*BUILD, *TEAR_DOWN)

MODELLED = {leaf.name: leaf for leaf in HOST_LEAVES.values() if leaf.modelled}

CODE = b"the guest's first instructions"


def find_leaf(name: str) -> Leaf:
    """The modelled SEAMCALL leaf of a name, in capitals or not, with or without "TDH.".

    Refuses others: ValueError with the nearest ones.
    """
    wanted = name.strip().upper()
    for known in (wanted, f"TDH.{wanted}"):
        if known in MODELLED:
            return MODELLED[known]
    near = difflib.get_close_matches(wanted, MODELLED, n=3, cutoff=0.4)
    raise ValueError(f"no modelled leaf is called {name!r}; near it: {', '.join(near) or 'none'}")


def usual(leaf: str) -> dict[str, str]:
    """Register -> the thing that usually goes there, for each register of a leaf that has one."""
    found = find_leaf(leaf)
    named = {register: usual_thing(found, register) for register in found.inputs}
    return {register: thing for register, thing in named.items() if thing != BY_HAND}


class Desk:
    """A host's desk: a booted machine, its tape, and parameters for one TD in host memory.

    gpaw: 48 or 52, written into TD_PARAMS. packages: 1..8, with two LPs each.
    """

    def __init__(self, gpaw: int, packages: int = 2) -> None:
        self.gpaw = gpaw
        self.machine = BareMachine(default_platform(lps=2 * packages, packages=packages))
        Host(self.machine).boot()
        write_buffers(self.machine, gpaw)
        self.tape = Tape(self.machine)
        self.tape.phase = BY_HAND

    @property
    def held(self) -> dict[str, int]:
        """Name -> value of everything that can go into a register now."""
        return things(self.machine, self.gpaw)

    def call(
        self,
        leaf: str,
        operands: Mapping[str, int | str] | None = None,
        *,
        lp: int = 0,
        version: int = 0,
        **registers: int | str,
    ) -> Reply:
        """SEAMCALL `leaf` on `lp`. operands, registers: numbers or names of things.

        Refuses an unknown leaf, register or thing, and an LP that runs a guest: ValueError.
        """
        before = read_books(self.machine)
        self._seamcall(leaf, {**(operands or {}), **registers}, lp, version)
        return self._reply(before)

    def _seamcall(
        self, leaf: str, operands: Mapping[str, int | str], lp: int, version: int = 0
    ) -> None:
        unknown = set(operands) - set(REGISTER_NAMES)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: a leaf takes rcx, rdx, r8 ... r15")
        rax = find_leaf(leaf).number | version << 16
        held = self.held
        values = {name: resolve(value, held) for name, value in operands.items()}
        self.tape.seamcall(lp, rax, Registers(**values))

    def interrupt(self, *, lp: int = 0) -> Reply:
        """An interrupt makes the guest leave `lp`. Refuses an LP without a guest: ValueError."""
        before = read_books(self.machine)
        self.tape.interrupt(lp)
        return self._reply(before)

    def _reply(self, before: Books) -> Reply:
        action = self.tape.last
        assert action is not None
        return Reply(action, Answer(action), compare(before, read_books(self.machine)))

    def last_reply(self) -> Reply | None:
        """What the last action led to, None at the beginning; leaves the machine as it is."""
        position = self.tape.position
        if position == 0:
            return None
        self.tape.seek(position - 1)
        before = read_books(self.machine)
        self.tape.seek(position)
        return self._reply(before)

    def do(self, step: Next) -> Reply:
        """Make the call that the guide gave."""
        before = read_books(self.machine)
        self._make(step)
        return self._reply(before)

    def _make(self, step: Next) -> None:
        self.tape.phase = step.stage
        try:
            if step.leaf == INTERRUPT:
                self.tape.interrupt(step.lp)
            else:
                self._seamcall(step.leaf, step.registers, step.lp)
        finally:
            self.tape.phase = BY_HAND

    def next(self, goal: str = "build") -> Next | None:
        """The guide's next call. goal: "build" or "tear down"."""
        if goal == "build":
            return next_to_build(self.machine, self.gpaw)
        return next_to_tear_down(self.machine)

    def steps(self, *stages: str) -> Iterator[Next]:
        """The guide's calls of these stages (see STAGES); each is to be made before the next."""
        for stage in stages:
            goal = "build" if stage in BUILD else "tear down"
            while (step := self.next(goal)) is not None and step.stage == stage:
                yield step

    def run(self, *stages: str) -> list[Reply]:
        """Let the guide make the calls of these stages, as far as they are next."""
        return [self.do(step) for step in self.steps(*stages)]

    def skip(self, *stages: str) -> None:
        """As `run`, without looking at the answers."""
        for step in self.steps(*stages):
            self._make(step)


def desk_before(stage: str, gpaw: int, packages: int = 2) -> Desk:
    """A desk where the guide has done every stage before `stage` (one of STAGES).

    Refuses another stage: ValueError.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage is called {stage!r}; there are {', '.join(STAGES)}")
    desk = Desk(gpaw, packages)
    desk.skip(*STAGES[: STAGES.index(stage)])
    return desk


def write_buffers(machine: BareMachine, gpaw: int) -> None:
    """Lay out, in host memory, TD_PARAMS for one vCPU at this GPAW, others that ask for the wrong
    number of levels, and a source page.
    """
    is_wide = sept_levels(gpaw) == 5
    flags = CONFIG_FLAGS_GPAW_52 if is_wide else 0
    controls = EPTP_5_LEVELS if is_wide else EPTP_4_LEVELS
    good = make_td_params(max_vcpus=1, eptp_controls=controls, config_flags=flags)
    bad = make_td_params(
        max_vcpus=1, eptp_controls=EPTP_4_LEVELS, config_flags=CONFIG_FLAGS_GPAW_52
    )
    machine.store(TD_PARAMS_BUFFER, good)
    machine.store(BAD_PARAMS_BUFFER, bad)
    machine.store(SOURCE_PAGE_BUFFER, CODE.ljust(PAGE_SIZE, b"\0"))
