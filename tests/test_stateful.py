"""A machine with a kernel, its TDs at random: what the VMM, guests, the hardware and a host beside
KVM do, with failures and with schedules. After every step all invariants hold, and the tables map
what a simple model expects, and the guest reads what it wrote.

One machine is booted; each run rewinds it. The PAMT is read as a whole when a run begins and ends,
and in between where the journal says that something has changed. A failure shows the seed, and the
run as a program of calls; `-s` shows the seed, and how often what was done.
"""

from __future__ import annotations

import random
from collections import Counter
from errno import EBUSY, EINVAL, EIO
from functools import cache

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tdxlab import Machine
from tdxlab.abi import leaves as abi
from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_RND_NO_ENTROPY,
    is_error,
)
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.failures import ALLOC_PAGE, Failure
from tdxlab.guest import Read, Write
from tdxlab.invariants import Watch, check
from tdxlab.kvm.slots import KVM_MEM_LOG_DIRTY_PAGES
from tdxlab.steps import WAIT, Operation, Schedule
from tests.life_model import (
    LARGE,
    LARGE_PAGES,
    PAGES,
    PRIVATE,
    SECOND,
    SHARED,
    UNKNOWN,
    Life,
    Model,
)

#: Runs of random lives, and steps of each; where they come from.
RUNS, STEPS, SEED = 500, 50, 1
#: The LP on which the VMM's other thread runs; vCPUs have the lower ones.
OTHER_LP = 2
#: Memories that a TD may grow to.
MOST_MEMORIES = 5
#: Moves that a schedule may have.
PATIENCE = 5000

GFNS = st.sampled_from([*range(PAGES), *range(SECOND, SECOND + PAGES)])
SIZES = st.sampled_from((1, 1, 1, 2, 5, PAGES))
WHICH = st.integers(0, 1)
SEEDS = st.integers(0, 1 << 16)

BUSY = TDX_OPERAND_BUSY + OPERAND_ID_RCX
FATAL = TDX_PAGE_METADATA_INCORRECT + OPERAND_ID_RCX
#: Leaves that answer BUSY when others are at the same operand, and that KVM then calls again.
BUSY_LEAVES = (
    "TDH.MEM.PAGE.AUG",
    "TDH.MEM.RANGE.BLOCK",
    "TDH.MEM.TRACK",
    "TDH.MEM.PAGE.REMOVE",
    "TDH.VP.ENTER",
)
#: Failures that end a TD, where they strike.
FATAL_FAILURES = (
    *(Failure(leaf, answer=FATAL) for leaf in (*BUSY_LEAVES[:4], "TDH.PHYMEM.PAGE.WBINVD")),
    Failure("set_external_spte", answer=-EIO),
    Failure("remove_external_spte", answer=-EINVAL),
)
#: What can go wrong with the tables of new memory; the last two end the TD.
OF_TABLES = (
    *(Failure("TDH.MEM.SEPT.ADD", answer=BUSY, times=times) for times in (1, 2, 3)),
    Failure("link_external_spt", answer=-EBUSY),
    Failure("TDH.MEM.SEPT.ADD", answer=FATAL),
    Failure("link_external_spt", answer=-EIO),
)
#: Failures after which a TD that is taken apart leaves something behind.
LEAKS = (
    Failure("TDH.PHYMEM.PAGE.RECLAIM", answer=BUSY),
    Failure("TDH.MNG.KEY.FREEID", answer=FATAL),
    Failure("free_external_spt", answer=-EIO),
)
#: What a host beside KVM calls with operands of a TD that KVM runs.
RAW_LEAVES = tuple(
    number
    for number, leaf in HOST_LEAVES.items()
    if number != abi.TDH_VP_ENTER and not leaf.name.startswith("TDH.SYS.")
)

#: What happened, by name, in all runs.
DEEDS: Counter[str] = Counter()


@cache
def born() -> Life:
    """The first TD of the machine that all runs share."""
    return Life(Machine(memory="1 GiB", lps=3, packages=2))


class Lives(RuleBasedStateMachine):
    """One run: two TDs at most, on a machine that is rewound afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = born().machine
        self.before = self.machine.mark()
        self.watch = Watch(self.machine)
        self.lives = [born().copy()]
        #: steps made; the invariants are tested before the first one too
        self.steps = -1
        #: length of the journal and the models at the last check: while the journal is as long as
        #: it was, the machine is as it was
        self.checked: tuple[int, list[Model]] = (-1, [])

    def teardown(self) -> None:
        DEEDS["runs"] += 1
        DEEDS["full runs"] += self.steps == STEPS
        DEEDS["steps"] += self.steps
        self.watch.close()
        self.machine.rewind(self.before)
        self.machine.journal.forget(self.before)

    @invariant()
    def the_machine_is_sound(self) -> None:
        self.steps += 1
        if self.steps == STEPS:
            check(self.machine, "always")
        moment = len(self.machine.journal), [life.model() for life in self.lives]
        if moment == self.checked:
            return
        DEEDS["checks"] += 1
        self.checked = moment
        assert self.machine.module.halted is None
        self.watch.move_on()
        self.watch.check("alive")
        for life in self.lives:
            if life.is_alive:
                life.expect_model()

    def living(self, which: int) -> Life:
        """A TD that is alive, the other one if the wanted one is not."""
        alive = [life for life in self.lives if life.is_alive]
        return alive[which % len(alive)]

    def anybody(self) -> bool:
        return any(life.is_alive for life in self.lives)

    def go(self, name: str, operation: Operation) -> object:
        """Run an operation of the VMM on an idle LP, with "always" tested at some steps."""
        DEEDS[name] += 1
        driven = self.machine.host.on_cpu(OTHER_LP, operation)
        number = 0
        while True:
            try:
                step = next(driven)
            except StopIteration as end:
                return end.value
            assert step[0] != WAIT, step
            number += 1
            if number % 97 == 0:
                self.watch.check("always")

    # -- guests

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, value=st.integers(1, 255), vcpu=WHICH)
    def write(self, which: int, gfn: int, size: int, value: int, vcpu: int) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        DEEDS["write"] += 1
        gfns = life.gfns(gfn, size)
        result = life.use(gfns, value, vcpu)
        assert result.ok, result
        life.used(gfns, value)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, vcpu=WHICH)
    def read(self, which: int, gfn: int, size: int, vcpu: int) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        DEEDS["read"] += 1
        gfns = life.gfns(gfn, size)
        result = life.use(gfns, None, vcpu)
        assert result.ok, result
        for number, answer in zip(gfns, result.answers, strict=True):
            assert life.value(number) in (answer[0], UNKNOWN)
        life.used(gfns, None)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, to=st.sampled_from((PRIVATE, SHARED)))
    def convert(self, which: int, gfn: int, size: int, to: str) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        DEEDS[f"convert to {to}"] += 1
        gfns = life.gfns(gfn, size)
        result = life.convert(gfns, to)
        assert result.ok, result
        assert result.value.status == 0
        life.converted(gfns, to)

    # -- the VMM

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES)
    def balloon(self, which: int, gfn: int, size: int) -> None:
        """The guest gives pages up, and the VMM punches them out."""
        life = self.living(which)
        gfns = life.gfns(gfn, size)
        assert self.go("punch", life.punching(gfns)) == 0
        if life.has_slot(gfn):
            life.lose(gfns, PRIVATE)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, vcpu=WHICH)
    def prefault(self, which: int, gfn: int, size: int, vcpu: int) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        gfns = life.gfns(gfn, size)
        done = self.go("prefault", life.prefaulting(vcpu, gfns))
        assert done == len(gfns) * PAGE_SIZE
        life.prefaulted(gfns)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES)
    def unmap(self, which: int, gfn: int, size: int) -> None:
        """The VMM maps other memory at its shared pages: the MMU notifier."""
        life = self.living(which)
        gfns = life.gfns(gfn, size)
        self.go("unmap", life.remapping(gfns))
        life.remapped(gfns)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS)
    def migrate(self, which: int, gfn: int) -> None:
        """The host moves a page of the VMM's."""
        life = self.living(which)
        if self.go("migrate", life.td.user_memory.migrate(life.hva(gfn))):
            life.lose(range(gfn, gfn + 1), SHARED)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS)
    def delete_or_create_slot(self, which: int, gfn: int) -> None:
        life = self.living(which)
        backing = life.backing(gfn)
        if backing.slot in life.gone:
            assert self.go("create slot", life.setting_slot(backing, backing.size)) == 0
            life.gone.remove(backing.slot)
            return
        assert self.go("delete slot", life.setting_slot(backing, 0)) == 0
        life.gone.add(backing.slot)
        gfns = range(backing.gpa >> PAGE_SHIFT, backing.end >> PAGE_SHIFT)
        life.lose(gfns, PRIVATE)
        life.lose(gfns, SHARED)

    @precondition(anybody)
    @rule(which=WHICH, failure=st.sampled_from(OF_TABLES))
    def grow(self, which: int, failure: Failure) -> None:
        """The TD gets another page of memory, in a table of its own."""
        life = self.living(which)
        number = len(life.td.backings)
        if number == MOST_MEMORIES:
            return
        gpa = LARGE + number * LARGE_PAGES << PAGE_SHIFT
        life.td.add_memory(gpa, PAGE_SIZE)
        with self.machine.failing(failure, td=life.td) as (made,):
            result = life.td.run([Write(gpa, b"new"), Read(gpa, 3)])
        assert made.answered == failure.times
        DEEDS[f"{failure.target} gave {failure.answer_name}"] += 1
        assert life.is_alive == result.ok == (failure not in OF_TABLES[-2:])
        assert not result.ok or result.value == b"new"

    # -- a large page, split and watched

    @precondition(anybody)
    @rule(which=WHICH, offset=st.sampled_from((0, 1, 2, LARGE_PAGES - 1)), value=st.integers(0, 3))
    def use_large_page(self, which: int, offset: int, value: int) -> None:
        life = self.living(which)
        gfn = LARGE + offset
        before = life.shared.get(gfn, 0)
        DEEDS["large page"] += 1
        result = life.use_large(gfn, value or None)
        assert result.ok, result
        if not value:
            assert result.value[0] == before

    @precondition(anybody)
    @rule(which=WHICH)
    def look_at_dirty_log(self, which: int) -> None:
        """Start the log (which splits the large page), read it, or end it."""
        life = self.living(which)
        if life.written is None:
            DEEDS["log"] += 1
            life.set_large(KVM_MEM_LOG_DIRTY_PAGES)
        elif life.written:
            DEEDS["dirty pages found"] += 1
            written = set(life.written)
            assert written <= life.dirty()
        else:
            life.set_large(0)

    # -- trouble

    @precondition(anybody)
    @rule(
        which=WHICH,
        leaf=st.sampled_from(BUSY_LEAVES),
        n=st.integers(1, 3),
        gfn=GFNS,
        no_entropy=st.booleans(),
    )
    def be_busy_once(self, which: int, leaf: str, n: int, gfn: int, no_entropy: bool) -> None:
        """The module is busy, or has no entropy, once; KVM calls again."""
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        can_wait = leaf in ("TDH.MEM.TRACK", "TDH.MEM.PAGE.AUG")
        answer = TDX_RND_NO_ENTROPY if no_entropy and can_wait else BUSY
        with self.machine.failing(Failure(leaf, n, answer)) as (made,):
            self.write(which, gfn, 2, n, 0)
            self.balloon(which, gfn, 1)
        DEEDS[f"{leaf} was busy"] += made.answered
        assert life.is_alive

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, n=st.integers(1, 3))
    def have_no_page(self, which: int, gfn: int, n: int) -> None:
        """An allocation fails: the guest's access does, and nothing else."""
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        gfns = range(gfn, gfn + 1)
        with self.machine.failing(Failure(ALLOC_PAGE, n)) as (made,):
            result = life.use(gfns, 7, 0)
        DEEDS["no page"] += made.answered
        assert life.is_alive
        assert result.ok or made.answered
        if result.ok:
            life.used(gfns, 7)

    @precondition(anybody)
    @rule(which=WHICH, failure=st.sampled_from(FATAL_FAILURES), gfn=GFNS, luck=st.integers(0, 1))
    def fail(self, which: int, failure: Failure, gfn: int, luck: int) -> None:
        """Something fails that must not: the TD is dead, and what is lost is known."""
        life = self.living(which)
        if luck or not life.has_slot(gfn):
            return
        gfns = range(gfn, gfn + 1)
        with self.machine.failing(failure, td=life.td) as (made,):
            result = life.use(gfns, 9, 0)
            if result.ok:
                life.used(gfns, 9)
                self.go("punch", life.punching(gfns))
                life.lose(gfns, PRIVATE)
        DEEDS[f"{failure.target} failed"] += made.answered
        enters = failure.target == "TDH.VP.ENTER"
        assert enters or life.is_alive != bool(made.answered), life.td.vm.vm_bugged
        DEEDS["died"] += not life.is_alive

    @precondition(anybody)
    @rule(which=WHICH, leaf=st.sampled_from(RAW_LEAVES), seed=SEEDS)
    def call_beside_kvm(self, which: int, leaf: int, seed: int) -> None:
        """A host that is not KVM calls the module about KVM's TD; then it never happened."""
        life, choose = self.living(which), random.Random(seed)
        tdx, pages = life.td.tdx, self.machine.host.pages
        owned = [tdx.td.tdr, *tdx.td.tdcs, *(vcpu.vp.tdvpr for vcpu in tdx.vcpus)]
        hpa = choose.choice([*owned, *list(pages.in_use)[:: choose.randint(1, 9)]])
        gpa = choose.choice([*life.private, SECOND]) << PAGE_SHIFT
        rcx = choose.choice((gpa, gpa | choose.randrange(4), tdx.td.tdr, hpa))
        given = Registers(rcx=rcx, rdx=choose.choice(owned), r8=hpa, r9=choose.choice(owned))
        mark = self.machine.mark()
        status = self.machine.seamcall(OTHER_LP, leaf, given)
        DEEDS["raw call refused" if is_error(status) else "raw call done"] += 1
        self.watch.check("always")
        self.machine.rewind(mark)
        self.machine.journal.forget(mark)

    # -- schedules

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, near=st.integers(-1, 1), seed=SEEDS)
    def interleave(self, which: int, gfn: int, near: int, seed: int) -> None:
        """A vCPU uses a page while the VMM does something to the same or the next page."""
        life, choose = self.living(which), random.Random(seed)
        first = life.backing(gfn).gpa >> PAGE_SHIFT
        other = range(gfn + near, gfn + near + 1)
        if not life.has_slot(gfn) or other.start not in life.gfns(first, PAGES):
            return
        doing = choose.choice(("punch", "unmap", "migrate", "prefault"))
        makers = {
            "punch": lambda: life.punching(other),
            "unmap": lambda: life.remapping(other),
            "migrate": lambda: life.td.user_memory.migrate(life.hva(other.start)),
            "prefault": lambda: life.prefaulting(1, other),
        }
        write = life.td.run_steps(life.program(range(gfn, gfn + 1), 5), vcpu=0)
        lp = 1 if doing == "prefault" else OTHER_LP
        beside = self.machine.host.on_cpu(lp, makers[doing]())
        self.run_schedule(Schedule([write, beside]), choose)
        DEEDS[f"write while {doing}"] += 1
        assert not life.td.vm.vm_bugged
        life.forget(life.gfns(min(gfn, other.start), 3))
        for number in (gfn, other.start):
            life.shared[number] = UNKNOWN

    def run_schedule(self, schedule: Schedule, choose: random.Random) -> None:
        """Move one operation after the other, in an order drawn from the seed."""
        try:
            while schedule.ready:
                assert len(schedule.history) < PATIENCE, schedule.labels
                schedule.advance(choose.choice(schedule.ready))
                if len(schedule.history) % 29 == 0:
                    self.watch.check("always")
        finally:
            schedule.close()

    # -- births and deaths

    @precondition(lambda self: len(self.lives) < 2)
    @rule()
    def create(self) -> None:
        DEEDS["create"] += 1
        self.lives.append(Life(self.machine))

    @precondition(lambda self: self.lives)
    @rule(which=WHICH, luck=st.integers(0, 2), lost=st.sampled_from((None, *LEAKS)))
    def destroy(self, which: int, luck: int, lost: Failure | None) -> None:
        """... with pages perhaps that the module does not give back."""
        life = self.lives[which % len(self.lives)]
        if luck and life.is_alive:
            return
        leaked = len(self.machine.host.pages.leaked)
        failures = [lost] if lost else []
        with self.machine.failing(*failures, td=life.td) as made:
            self.go("destroy", life.td.destroy_steps())
        self.lives.remove(life)
        for failure, nth in zip(failures, made, strict=True):
            DEEDS[f"{failure.target} failed"] += nth.answered
        assert len(self.machine.host.pages.leaked) >= leaked + sum(nth.answered for nth in made)
        if not self.lives and len(self.machine.host.pages.leaked) == 0:
            assert not self.machine.host.pages.in_use


def test_invariants_hold_after_every_step_of_random_lives() -> None:
    DEEDS.clear()
    print(f"seed {SEED}: {RUNS} runs of {STEPS} steps")
    run_state_machine_as_test(
        seed(SEED)(Lives),
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
    print("\n".join(f"{count:6}  {name}" for name, count in DEEDS.most_common()))
    rules = {"write", "read", "punch", "prefault", "unmap", "migrate", "delete slot", "create slot"}
    rules |= {"create", "destroy", "died", "convert to shared", "convert to private", "no page"}
    rules |= {"large page", "log", "dirty pages found", "raw call refused", "raw call done"}
    rules |= {f"write while {doing}" for doing in ("punch", "unmap", "migrate", "prefault")}
    rules |= {f"{leaf} was busy" for leaf in BUSY_LEAVES}
    rules |= {f"{failure.target} failed" for failure in (*FATAL_FAILURES, *LEAKS)}
    rules |= {f"{failure.target} gave {failure.answer_name}" for failure in OF_TABLES}
    assert rules <= {name for name, count in DEEDS.items() if count}
    assert DEEDS["full runs"] >= RUNS
