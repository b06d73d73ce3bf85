"""A machine with a kernel, its TDs at random: what the VMM, the guests and the hardware do, the
invariants hold after every step, and the tables map what a simple model expects.

The model of a TD: gfn -> "private" or "shared" where it is mapped, and nothing else. One machine is
booted; each run rewinds it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, settings
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
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_OPERAND_BUSY,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_RND_NO_ENTROPY,
)
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.guest import MapGpa, Read, Write
from tdxlab.invariants import check
from tdxlab.invariants.host_picture import VmPicture
from tdxlab.kvm.fault import kvm_vcpu_pre_fault_memory
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD
from tdxlab.kvm.tdx import TdxVcpu
from tdxlab.kvm.tdx_associate import tdx_vcpu_load
from tdxlab.machine import Machine
from tdxlab.steps import WAIT, Operation, Schedule
from tdxlab.vmm_ioctls import Backing
from tdxlab.vmm_td import Td

#: Runs of random lives, and steps of each.
RUNS, STEPS = 50, 24
#: Pages of each of a TD's two memories; the second begins in another table.
PAGES = 24
SECOND = 1 << 21
FIRMWARE = b"\x90" * 100
#: The LP on which the VMM's other thread runs; vCPUs have the lower ones.
OTHER_LP = 2

PRIVATE, SHARED = "private", "shared"

GFNS = st.sampled_from(
    [*range(PAGES), *range(SECOND >> PAGE_SHIFT, (SECOND >> PAGE_SHIFT) + PAGES)]
)
SIZES = st.sampled_from((1, 1, 1, 2, 5, PAGES))
WHICH = st.integers(0, 1)

#: Leaves that answer BUSY when others are at the same operand, and that KVM then calls again.
BUSY_LEAVES = (
    abi.TDH_MEM_PAGE_AUG,
    abi.TDH_MEM_SEPT_ADD,
    abi.TDH_MEM_RANGE_BLOCK,
    abi.TDH_MEM_TRACK,
    abi.TDH_MEM_PAGE_REMOVE,
)
#: Leaves whose failure ends a TD.
FATAL_LEAVES = (*BUSY_LEAVES, abi.TDH_PHYMEM_PAGE_WBINVD)

#: What happened, by name, in all runs.
DEEDS: Counter[str] = Counter()


class Weather:
    """Stands before a machine's module. orders: leaf -> statuses that its next calls get."""

    def __init__(self, machine: Machine) -> None:
        self.orders: dict[int, list[int]] = {}
        self._seamcall = machine.seamcall_steps
        machine.seamcall_steps = self.seamcall_steps  # type: ignore[method-assign]

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the machine's, unless something was ordered."""
        if self.orders.get(rax):
            DEEDS[f"{HOST_LEAVES[rax].name} failed"] += 1
            return self.orders[rax].pop(0)
        return (yield from self._seamcall(lp, rax, registers))


@cache
def machine_in_weather() -> tuple[Machine, Weather]:
    """The booted machine that all runs share."""
    machine = Machine(memory="1 GiB", lps=3, packages=2)
    return machine, Weather(machine)


class Life:
    """A TD, and the model of it. mapped: gfn -> PRIVATE or SHARED. gone: slots that are deleted."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.td: Td = machine.create_td(vcpus=2, memory=PAGES * PAGE_SIZE, launch=False)
        self.td.add_memory(SECOND, PAGES * PAGE_SIZE)
        self.td.add_image(0, FIRMWARE)
        self.td.finalize()
        self.td.guest.accepted.put(0, None)
        self.mapped: dict[int, str] = {0: PRIVATE}
        self.gone: set[int] = set()

    @property
    def is_alive(self) -> bool:
        """False once something ended it: then it can only be destroyed."""
        return not self.td.vm.vm_dead

    def kind(self, gfn: int) -> str:
        """How the guest uses a page."""
        return SHARED if gfn in self.td.guest.shared else PRIVATE

    def backing(self, gfn: int) -> Backing:
        """The memory of a page."""
        return self.td.backings[gfn << PAGE_SHIFT >= SECOND]

    def gfns(self, gfn: int, size: int) -> range:
        """`size` pages from `gfn` on, as far as the memory goes."""
        end = self.backing(gfn).end >> PAGE_SHIFT
        return range(gfn, min(gfn + size, end))

    def has_slot(self, gfn: int) -> bool:
        """False while the slot is deleted."""
        return self.backing(gfn).slot not in self.gone

    def lose(self, gfns: range, kind: str) -> None:
        """The model: nothing maps these as `kind` any more; the guest is told."""
        for gfn in gfns:
            if self.mapped.get(gfn) == kind:
                del self.mapped[gfn]
            if kind == PRIVATE and gfn in self.td.guest.accepted:
                self.td.guest.accepted.drop(gfn)

    def expect_model(self) -> None:
        """The mirror and the direct root map what the model says."""
        picture = VmPicture(self.td.vm)
        direct_bits = self.td.vm.gfn_direct_bits
        found = {
            leaf.gfn & ~direct_bits: PRIVATE if leaf.is_mirror else SHARED
            for leaf in picture.leaves
        }
        assert found == self.mapped


class Lives(RuleBasedStateMachine):
    """One run: two TDs at most, on a machine that is rewound afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.machine, self.weather = machine_in_weather()
        self.before = self.machine.mark()
        self.lives: list[Life] = []
        self.is_stormy = False

    def teardown(self) -> None:
        self.machine.rewind(self.before)
        self.machine.journal.forget(self.before)

    @initialize()
    def begin(self) -> None:
        self.lives.append(Life(self.machine))

    # -- what is expected

    @invariant()
    def the_machine_is_sound(self) -> None:
        DEEDS["checks"] += 1
        assert self.machine.module.halted is None
        assert not any(self.weather.orders.values())
        check(self.machine, "alive")
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
            if number % 37 == 0:
                check(self.machine, "always")

    # -- guests

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, vcpu=WHICH)
    def touch(self, which: int, gfn: int, size: int, vcpu: int) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        DEEDS["touch"] += 1
        gfns = life.gfns(gfn, size)
        result = life.td.touch(gfn << PAGE_SHIFT, len(gfns) * PAGE_SIZE, vcpu=vcpu)
        assert result.ok, result
        life.mapped.update((gfn, life.kind(gfn)) for gfn in gfns)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, to=st.sampled_from((PRIVATE, SHARED)))
    def convert(self, which: int, gfn: int, size: int, to: str) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        DEEDS[f"convert to {to}"] += 1
        gfns = life.gfns(gfn, size)
        result = life.td.convert(gfn << PAGE_SHIFT, len(gfns) * PAGE_SIZE, to=to)
        assert result.ok, result
        assert result.value.status == 0
        life.lose(gfns, PRIVATE if to == SHARED else SHARED)
        if to == PRIVATE:
            life.mapped.update((gfn, PRIVATE) for gfn in gfns)
            for gfn in gfns:
                assert gfn in life.td.guest.accepted

    # -- the VMM

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES)
    def balloon(self, which: int, gfn: int, size: int) -> None:
        """The guest gives pages up, and the VMM punches them out."""
        life = self.living(which)
        gfns = life.gfns(gfn, size)
        self.go("punch", life.td.punch_hole_steps(gfn << PAGE_SHIFT, len(gfns) * PAGE_SIZE))
        if life.has_slot(gfn):
            life.lose(gfns, PRIVATE)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES, vcpu=WHICH)
    def prefault(self, which: int, gfn: int, size: int, vcpu: int) -> None:
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        gfns = life.gfns(gfn, size)
        done = self.go("prefault", prefaulting(life.td, vcpu, gfns))
        assert done == len(gfns) * PAGE_SIZE
        attributes = life.td.vm.attributes
        for number in gfns:
            life.mapped[number] = PRIVATE if attributes.is_private(number) else SHARED

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS, size=SIZES)
    def unmap(self, which: int, gfn: int, size: int) -> None:
        """The VMM maps other memory at its shared pages: the MMU notifier."""
        life = self.living(which)
        gfns = life.gfns(gfn, size)
        self.go("unmap", remapping(life.td, life.backing(gfn), gfns))
        life.lose(gfns, SHARED)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS)
    def migrate(self, which: int, gfn: int) -> None:
        """The host moves a page of the VMM's."""
        life = self.living(which)
        hva = hva_of(life.backing(gfn), gfn)
        if self.go("migrate", life.td.user_memory.migrate(hva)):
            life.lose(range(gfn, gfn + 1), SHARED)

    @precondition(anybody)
    @rule(which=WHICH, gfn=GFNS)
    def delete_or_create_slot(self, which: int, gfn: int) -> None:
        life = self.living(which)
        backing = life.backing(gfn)
        if backing.slot in life.gone:
            assert self.go("create slot", slot_steps(life.td, backing, backing.size)) == 0
            life.gone.remove(backing.slot)
            return
        assert self.go("delete slot", slot_steps(life.td, backing, 0)) == 0
        life.gone.add(backing.slot)
        gfns = range(backing.gpa >> PAGE_SHIFT, backing.end >> PAGE_SHIFT)
        life.lose(gfns, PRIVATE)
        life.lose(gfns, SHARED)

    # -- trouble

    @precondition(anybody)
    @rule(which=WHICH, leaf=st.sampled_from(BUSY_LEAVES), gfn=GFNS, status=st.booleans())
    def be_busy_once(self, which: int, leaf: int, gfn: int, status: bool) -> None:
        """The module is busy, or has no entropy, once; KVM calls again."""
        life = self.living(which)
        if not life.has_slot(gfn):
            return
        no_entropy = status and leaf in (abi.TDH_MEM_TRACK, abi.TDH_MEM_PAGE_AUG)
        answer = TDX_RND_NO_ENTROPY if no_entropy else TDX_OPERAND_BUSY | OPERAND_ID_RCX
        self.weather.orders[leaf] = [answer]
        self.touch(which, gfn, 1, 0)
        self.balloon(which, gfn, 1)
        self.weather.orders.clear()
        assert life.is_alive

    @precondition(anybody)
    @rule(which=WHICH, leaf=st.sampled_from(FATAL_LEAVES), gfn=GFNS, luck=st.integers(0, 3))
    def fail(self, which: int, leaf: int, gfn: int, luck: int) -> None:
        """The module refuses what it must not refuse: the TD is dead, and what is lost is known."""
        life = self.living(which)
        if luck or not life.has_slot(gfn):
            return
        self.weather.orders[leaf] = [TDX_PAGE_METADATA_INCORRECT]
        result = life.td.touch(gfn << PAGE_SHIFT)
        if result.ok:
            life.mapped[gfn] = life.kind(gfn)
            self.go("punch", life.td.punch_hole_steps(gfn << PAGE_SHIFT, PAGE_SIZE))
            life.lose(range(gfn, gfn + 1), PRIVATE)
        failed = not self.weather.orders[leaf]
        self.weather.orders.clear()
        assert life.is_alive != failed, life.td.vm.vm_bugged
        DEEDS["died"] += failed

    # -- births and deaths

    @precondition(lambda self: len(self.lives) < 2)
    @rule()
    def create(self) -> None:
        DEEDS["create"] += 1
        self.lives.append(Life(self.machine))

    @precondition(lambda self: self.lives)
    @rule(which=WHICH, luck=st.integers(0, 2), lost=st.booleans())
    def destroy(self, which: int, luck: int, lost: bool) -> None:
        """... with one page perhaps that the module does not give back."""
        life = self.lives[which % len(self.lives)]
        if luck and life.is_alive:
            return
        leaked = len(self.machine.host.pages.leaked)
        if lost:
            self.weather.orders[abi.TDH_PHYMEM_PAGE_RECLAIM] = [TDX_OPERAND_BUSY]
        self.go("destroy", life.td.destroy_steps())
        self.weather.orders.clear()
        self.lives.remove(life)
        assert len(self.machine.host.pages.leaked) >= leaked + lost
        if not self.lives and len(self.machine.host.pages.leaked) == 0:
            assert not self.machine.host.pages.in_use


def hva_of(backing: Backing, gfn: int) -> int:
    """Where the VMM has a page."""
    return backing.hva + (gfn << PAGE_SHIFT) - backing.gpa


def prefaulting(td: Td, vcpu: int, gfns: range) -> Operation:
    """KVM_PRE_FAULT_MEMORY."""
    found = td.vcpu(vcpu)
    assert isinstance(found, TdxVcpu)
    yield from tdx_vcpu_load(found)
    size = len(gfns) * PAGE_SIZE
    return (yield from kvm_vcpu_pre_fault_memory(found, gfns.start << PAGE_SHIFT, size))


def remapping(td: Td, backing: Backing, gfns: range) -> Operation:
    """munmap and mmap of the VMM's pages."""
    hva, size = hva_of(backing, gfns.start), len(gfns) * PAGE_SIZE
    yield from td.user_memory.munmap(hva, size)
    td.user_memory.mmap(hva, size)


def slot_steps(td: Td, backing: Backing, size: int) -> Operation:
    """KVM_SET_USER_MEMORY_REGION2 of a TD's own slot, or its deletion."""
    return td.set_user_memory_region_steps(
        backing.slot,
        backing.gpa,
        size,
        flags=KVM_MEM_GUEST_MEMFD,
        hva=backing.hva,
        gmem=backing.gmem,
    )


def test_invariants_hold_after_every_step_of_random_lives() -> None:
    DEEDS.clear()
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print("\n".join(f"{count:6}  {name}" for name, count in DEEDS.most_common()))
    wanted = {"touch", "punch", "prefault", "unmap", "migrate", "delete slot", "create slot"}
    wanted |= {"create", "destroy", "died", "convert to shared", "convert to private"}
    assert wanted <= set(DEEDS)
    assert all(DEEDS[f"{HOST_LEAVES[leaf].name} failed"] for leaf in FATAL_LEAVES)


# ---- several at once -----------------------------------------------------------------------------

#: Seeds of the schedules, and how many moves one may have.
SCHEDULES = 50
PATIENCE = 5000

Making = Callable[[Td, random.Random], Operation]


#: Few pages, so that operations meet. vCPUs that used a page as both kinds at once would convert it
#: to and fro without end.
PRIVATE_GFNS = (1, SECOND >> PAGE_SHIFT)
SHARED_GFNS = (2, 3)


def some_page(choose: random.Random) -> int:
    """A page that somebody else may use too."""
    return choose.choice(PRIVATE_GFNS + SHARED_GFNS)


def using(vcpu: int, *, private: bool = True) -> Making:
    """A vCPU uses pages, and converts some to shared memory for a moment. private: False for shared
    memory alone.
    """

    def make(td: Td, choose: random.Random) -> Operation:
        program: list[Write | Read | MapGpa] = []
        bit = td.guest.shared_mask
        for _ in range(choose.randint(2, 4)):
            shared = choose.choice(SHARED_GFNS) << PAGE_SHIFT | bit
            gpa = choose.choice(PRIVATE_GFNS) << PAGE_SHIFT
            deeds: list[Write | Read | MapGpa] = [Read(shared), Write(shared)]
            deeds.append(MapGpa(shared, PAGE_SIZE))
            if private:
                deeds += [Write(gpa), Write(gpa), MapGpa(gpa | bit, PAGE_SIZE)]
            program.append(choose.choice(deeds))
        return td.run_steps(program, vcpu=vcpu)

    return make


def punching(td: Td, choose: random.Random) -> Operation:
    return td.punch_hole_steps(some_page(choose) << PAGE_SHIFT, PAGE_SIZE)


def setting_attributes(td: Td, choose: random.Random) -> Operation:
    gpa = some_page(choose) << PAGE_SHIFT
    return td.set_memory_attributes_steps(gpa, PAGE_SIZE, private=choose.random() < 0.5)


def unmapping(td: Td, choose: random.Random) -> Operation:
    return remapping(td, td.backings[0], range(1, choose.randint(2, 5)))


def migrating(td: Td, choose: random.Random) -> Operation:
    gfn = some_page(choose) % PAGES
    return td.user_memory.migrate(hva_of(td.backings[0], gfn))


def deleting_a_slot(td: Td, choose: random.Random) -> Operation:
    backing = choose.choice(td.backings)
    yield from slot_steps(td, backing, 0)
    yield from slot_steps(td, backing, backing.size)


def prefaulting_some(td: Td, choose: random.Random) -> Operation:
    return prefaulting(td, 1, range(1, choose.randint(2, 5)))


def making_a_td(td: Td, choose: random.Random) -> Operation:
    """Another TD is born, lives, and dies meanwhile."""
    other = Td(td.host, name="other")
    yield ("KVM_CREATE_VM",)
    other.init_vm(max_vcpus=1)
    yield ("KVM_CREATE_VCPU",)
    other.add_memory(0, 4 * PAGE_SIZE)
    yield ("close",)
    yield from other.destroy_steps()


ON_THE_OTHER_LP: tuple[Making, ...] = (
    punching,
    setting_attributes,
    unmapping,
    migrating,
    deleting_a_slot,
    making_a_td,
)


def operations(life: Life, seed: int) -> list[Operation]:
    """Two or three operations, each on an LP of its own. Nobody uses private memory of a slot that
    is being deleted: see `test_a_private_fault_in_a_slot_that_is_being_deleted_never_ends`.
    """
    choose, td = random.Random(seed), life.td
    other = choose.choice(ON_THE_OTHER_LP)
    made = [td.host.on_cpu(OTHER_LP, other(td, choose))]
    private = other is not deleting_a_slot
    made.append(using(0, private=private)(td, choose))
    if choose.random() < 0.7:
        if private and choose.random() < 0.5:
            made.append(td.host.on_cpu(1, prefaulting_some(td, choose)))
        else:
            made.append(using(1, private=private)(td, choose))
    return made


def moves(schedule: Schedule, seed: int) -> Iterator[int]:
    """Move one operation after the other, in an order drawn from `seed`."""
    choose = random.Random(seed)
    while schedule.ready:
        assert len(schedule.history) < PATIENCE, schedule.labels
        number = choose.choice(schedule.ready)
        schedule.advance(number)
        yield number


@pytest.fixture
def life() -> Iterator[Life]:
    """A TD with two vCPUs on the machine that all share."""
    machine, _ = machine_in_weather()
    before = machine.mark()
    yield Life(machine)
    machine.rewind(before)
    machine.journal.forget(before)


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_invariants_hold_at_every_step_of_several_operations(life: Life, seed: int) -> None:
    machine, td = life.machine, life.td
    schedule = Schedule(operations(life, seed))
    try:
        for _ in moves(schedule, seed):
            assert machine.module.halted is None
            check(machine, "always")
    finally:
        schedule.close()
    assert not td.vm.vm_bugged
    check(machine, "alive")


def test_operations_of_the_seeds_are_all_there() -> None:
    first = Counter(random.Random(seed).choice(ON_THE_OTHER_LP) for seed in range(SCHEDULES))
    assert set(first) == set(ON_THE_OTHER_LP)
    assert min(first.values()) >= 3


def test_a_private_fault_in_a_slot_that_is_being_deleted_never_ends(life: Life) -> None:
    """As in Linux 6.16: the fault retries while it reads the memslots, and the deletion waits for
    readers. A signal for the vCPU ends it.
    """
    td, backing = life.td, life.td.backings[0]
    schedule = Schedule(
        [
            td.run_steps([Write(3 << PAGE_SHIFT)]),
            td.host.on_cpu(OTHER_LP, slot_steps(td, backing, 0)),
        ]
    )
    for _ in range(PATIENCE):
        schedule.advance(0)
        if schedule.labels[0][0] == "guest":
            break
    for _ in range(PATIENCE):
        schedule.advance(1)
        if schedule.labels[1] == ("synchronize_srcu(srcu)",):
            break
    for _ in range(PATIENCE // 2):
        schedule.advance(0)
    schedule.advance(1)
    assert schedule.labels[0][0] != WAIT
    assert schedule.labels[1][:2] == (WAIT, "srcu")
    td.vm.vcpus[0].signal_pending = True
    for _ in moves(schedule, 0):
        check(td.host.machine, "always")
    assert schedule.results[1] == 0
