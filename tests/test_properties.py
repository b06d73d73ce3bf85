"""A host and its guests at random: whatever they do, the invariants hold after every step.

One machine is booted; each run rewinds it. The PAMT is read as a whole when a run begins and ends,
and in between where the journal says that something has changed. Most calls are drawn so that they
should succeed, the rest are damaged. `-s`, or a failure, shows how the statuses were distributed.
"""

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tdxlab.abi import leaves as abi
from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.outcome import IN_GUEST
from tdxlab.abi.registers import REGISTER_NAMES
from tdxlab.abi.status import describe, is_error
from tdxlab.cpu import PCONFIG_BUSY, PCONFIG_OK
from tdxlab.invariants import Scope, Watch, check
from tdxlab.steps import Schedule
from tests.scene import Scene, crowded_scene, empty_scene
from tests.walker import NothingToDo, Walker
from tests.walker_calls import MAKERS, draw
from tests.walker_guests import DEEDS, RARE_DEEDS, touch

#: Runs of random lives, and steps of each; where they come from.
RUNS, STEPS, SEED = 200, 50, 2
SEEDS = st.integers(0, 1 << 16)
ANY_LEAF = st.sampled_from(sorted(MAKERS))
LEAST_SHARE_OF_SUCCESS = 0.30

_BUILD = (
    abi.TDH_MNG_CREATE,
    abi.TDH_MNG_KEY_CONFIG,
    abi.TDH_MNG_ADDCX,
    abi.TDH_MNG_INIT,
    abi.TDH_VP_CREATE,
    abi.TDH_VP_ADDCX,
    abi.TDH_VP_INIT,
    abi.TDH_MEM_PAGE_ADD,
    abi.TDH_MR_EXTEND,
    abi.TDH_MR_FINALIZE,
)
_RUN = (abi.TDH_VP_ENTER, abi.TDH_VP_ENTER, abi.TDH_VP_FLUSH)
_MEMORY = (
    abi.TDH_MEM_SEPT_ADD,
    abi.TDH_MEM_PAGE_AUG,
    abi.TDH_MEM_PAGE_REMOVE,
    abi.TDH_MEM_SEPT_REMOVE,
    abi.TDH_MEM_PAGE_RELOCATE,
    abi.TDH_MEM_PAGE_PROMOTE,
    abi.TDH_MEM_PAGE_DEMOTE,
)
_TRACKING = (
    abi.TDH_MEM_RANGE_BLOCK,
    abi.TDH_MEM_RANGE_BLOCK,
    abi.TDH_MEM_RANGE_UNBLOCK,
    abi.TDH_MEM_TRACK,
    abi.TDH_MEM_TRACK,
)
_END = (
    abi.TDH_MNG_VPFLUSHDONE,
    abi.TDH_PHYMEM_CACHE_WB,
    abi.TDH_PHYMEM_CACHE_WB,
    abi.TDH_MNG_KEY_FREEID,
    abi.TDH_MNG_KEY_FREEID,
    abi.TDH_MNG_KEY_RECLAIMID,
    abi.TDH_PHYMEM_PAGE_RECLAIM,
    abi.TDH_PHYMEM_PAGE_RECLAIM,
    abi.TDH_PHYMEM_PAGE_WBINVD,
)
_OTHERS = tuple(leaf for leaf in MAKERS if leaf not in _BUILD + _RUN + _MEMORY + _TRACKING + _END)

#: status of each SEAMCALL of all runs, by leaf
STATUSES: Counter[tuple[int, int]] = Counter()
#: runs of all their steps, by the scene that they began in
FULL_RUNS: Counter[str] = Counter()
#: how often the invariants were tested, by scope
MOMENTS: Counter[str] = Counter()


@cache
def scene_of(kind: str) -> Scene:
    """The booted machines that all runs share."""
    return crowded_scene() if kind == "crowded" else empty_scene()


class Life(RuleBasedStateMachine):
    """One run: a walk through a scene, which is rewound afterwards."""

    steps = 0

    @initialize(kind=st.sampled_from(("crowded", "crowded", "empty")))
    def begin(self, kind: str) -> None:
        self.scene = scene_of(kind)
        self.machine = self.scene.machine
        self.before = self.machine.mark()
        self.watch = Watch(self.machine)
        self.kind = kind
        self.steps = 0

    def teardown(self) -> None:
        if self.steps >= STEPS:
            FULL_RUNS[self.kind] += 1
        if self.steps:
            self.watch.close()
            self.machine.rewind(self.before)
            self.machine.journal.forget(self.before)

    def walker(self, seed: int) -> Walker:
        return Walker(self.scene, random.Random(seed).choice)

    def go(self, seed: int, leaves: tuple[int, ...]) -> None:
        """One call of one of the leaves: one that should succeed, if there is one."""
        walker = self.walker(seed)
        first = leaves.index(walker.choose(leaves))
        for leaf in leaves[first:] + leaves[:first]:
            made = draw(walker, leaf)
            if made is not None:
                self.make(*made)
                return

    def make(self, lp: int, rax: int, registers: object) -> None:
        status = self.machine.seamcall(lp, rax, registers)
        STATUSES[rax & 0xFFFF, status] += 1

    def make_unless_it_halts(self, lp: int, rax: int, registers: object) -> None:
        """A host may name one of the module's own pages as its buffer; what the module then writes
        there under a shared KeyID halts it. Such a call is taken back.
        """
        mark = self.machine.mark()
        self.make(lp, rax, registers)
        if self.machine.module.halted:
            assert "the host overwrote the module's page" in self.machine.module.halted
            self.machine.rewind(mark)
        self.machine.journal.release(mark)

    @invariant()
    def the_machine_is_sound(self) -> None:
        self.steps += 1
        self.expect_sound("quiet")
        if self.steps == STEPS:
            check(self.machine, "quiet")

    def expect_sound(self, scope: Scope) -> None:
        MOMENTS[scope] += 1
        assert self.machine.module.halted is None
        self.watch.move_on()
        self.watch.check(scope)

    @rule(seed=SEEDS)
    def build(self, seed: int) -> None:
        self.go(seed, _BUILD)

    @rule(seed=SEEDS)
    def run_vcpus(self, seed: int) -> None:
        self.go(seed, _RUN)

    @rule(seed=SEEDS)
    def change_memory(self, seed: int) -> None:
        self.go(seed, _MEMORY)

    @rule(seed=SEEDS)
    def track(self, seed: int) -> None:
        self.go(seed, _TRACKING)

    @rule(seed=SEEDS)
    def end(self, seed: int) -> None:
        self.go(seed, _END)

    @rule(seed=SEEDS)
    def look(self, seed: int) -> None:
        self.go(seed, _OTHERS)

    @rule(seed=SEEDS, leaf=ANY_LEAF, register=st.integers(0, 3), bit=st.integers(0, 63))
    def flip_a_bit(self, seed: int, leaf: int, register: int, bit: int) -> None:
        made = draw(self.walker(seed), leaf)
        if made is not None:
            name = REGISTER_NAMES[register]
            setattr(made.registers, name, getattr(made.registers, name) ^ 1 << bit)
            self.make(*made)

    @rule(seed=SEEDS, leaf=ANY_LEAF)
    def call_with_exchanged_operand(self, seed: int, leaf: int) -> None:
        walker = self.walker(seed)
        made, other = draw(walker, leaf), draw(walker, walker.choose(sorted(MAKERS)))
        if made is not None and other is not None:
            name = walker.choose(REGISTER_NAMES[:4])
            setattr(made.registers, name, getattr(other.registers, name))
            self.make_unless_it_halts(*made)

    @rule(seed=SEEDS, leaf=ANY_LEAF)
    def call_in_bad_weather(self, seed: int, leaf: int) -> None:
        """An interrupt waits, there is no entropy, PCONFIG is busy."""
        conditions = self.machine.module.conditions
        made = draw(self.walker(seed), leaf)
        if made is not None:
            conditions.interrupt_pending = conditions.entropy_fails = True
            conditions.pconfig_result = PCONFIG_BUSY
            try:
                self.make(*made)
            finally:
                conditions.interrupt_pending = conditions.entropy_fails = False
                conditions.pconfig_result = PCONFIG_OK

    @rule(seed=SEEDS, leaf=ANY_LEAF, other_leaf=ANY_LEAF)
    def call_while_another_waits(self, seed: int, leaf: int, other_leaf: int) -> None:
        """One SEAMCALL holds its locks between checks and effects; another LP makes one too."""
        made = draw(self.walker(seed), leaf)
        if made is None:
            return
        waiting = Schedule([self.machine.seamcall_steps(*made)])
        if waiting.advance(0):
            self.expect_sound("always")
            other = draw(self.walker(seed), other_leaf)
            if other is not None and other.lp != made.lp:
                self.make(*other)
                self.expect_sound("always")
            while waiting.advance(0):
                pass
        STATUSES[leaf, waiting.results[0]] += 1

    def guests(self) -> list[int]:
        return self.scene.guest_lps()

    @precondition(lambda self: self.guests())
    @rule(seed=SEEDS)
    def let_a_guest_act(self, seed: int) -> None:
        walker = self.walker(seed)
        lp = walker.choose(self.guests())
        try:
            walker.choose(DEEDS)(walker, lp)
        except NothingToDo:
            return

    @precondition(lambda self: self.guests())
    @rule(seed=SEEDS, luck=st.integers(0, 9))
    def let_a_guest_die(self, seed: int, luck: int) -> None:
        if luck == 0:
            walker = self.walker(seed)
            walker.choose(RARE_DEEDS)(walker, walker.choose(self.guests()))

    @precondition(lambda self: self.guests())
    @rule(seed=SEEDS)
    def host_disturbs_a_running_td(self, seed: int) -> None:
        """Memory leaves while the vCPU is inside, then the guest looks."""
        self.go(seed, _TRACKING + _MEMORY)
        walker = self.walker(seed)
        touch(walker, walker.choose(self.guests()))


def share_of_success() -> float:
    """Share of the SEAMCALLs that were not refused."""
    good = sum(count for (_, status), count in STATUSES.items() if _succeeded(status))
    return good / STATUSES.total()


def _succeeded(status: int) -> bool:
    return status == IN_GUEST or not is_error(status)


def histogram() -> Iterator[str]:
    """The statuses of all runs, the most frequent first."""
    yield f"{FULL_RUNS.total()} runs of {STEPS} steps: {dict(FULL_RUNS)}; checks: {dict(MOMENTS)}"
    yield f"{STATUSES.total()} SEAMCALLs, {share_of_success():.0%} succeeded"
    by_status: Counter[str] = Counter()
    for (_, status), count in STATUSES.items():
        by_status["the guest runs" if status == IN_GUEST else describe(status)] += count
    for text, count in by_status.most_common():
        yield f"{count:6}  {text}"


def test_invariants_hold_after_every_step_of_random_lives() -> None:
    for counter in (STATUSES, FULL_RUNS, MOMENTS):
        counter.clear()
    run_state_machine_as_test(
        seed(SEED)(Life),
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
        # Runs that hypothesis varies would otherwise end early.
        _min_steps=STEPS,
    )
    print("\n".join(histogram()))
    assert FULL_RUNS.total() >= RUNS
    assert share_of_success() >= LEAST_SHARE_OF_SUCCESS
    successful = {leaf for (leaf, status) in STATUSES if _succeeded(status)}
    never = {HOST_LEAVES[leaf].name for leaf in MAKERS if leaf not in successful}
    assert never == _CANNOT_SUCCEED_ANY_MORE


#: Leaves that a booted module refuses.
_CANNOT_SUCCEED_ANY_MORE = {
    HOST_LEAVES[leaf].name
    for leaf in (
        abi.TDH_SYS_INIT,
        abi.TDH_SYS_LP_INIT,
        abi.TDH_SYS_CONFIG,
        abi.TDH_SYS_KEY_CONFIG,
        abi.TDH_SYS_UPDATE,
    )
}
