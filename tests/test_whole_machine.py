"""A machine with a kernel: two or three operations of its VMM and of its guests at once, in orders
drawn from seeds; the invariants hold at every step.

One machine is booted; each schedule rewinds it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tdxlab import Machine
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.guest import MapGpa, Read, Write
from tdxlab.invariants import check
from tdxlab.steps import WAIT, Operation, Schedule
from tdxlab.vmm_td import Td
from tests.life_model import PAGES, SECOND, Life

#: The LP on which the VMM's other thread runs; vCPUs have the lower ones.
OTHER_LP = 2


@cache
def booted() -> Machine:
    """The machine that all schedules share."""
    return Machine(memory="1 GiB", lps=3, packages=2)


# ---- several at once -----------------------------------------------------------------------------

#: Seeds of the schedules, and how many moves one may have.
SCHEDULES = 50
PATIENCE = 5000

Making = Callable[[Life, random.Random], Operation]


#: Few pages, so that operations meet. vCPUs that used a page as both kinds at once would convert it
#: to and fro without end.
PRIVATE_GFNS = (1, SECOND)
SHARED_GFNS = (2, 3)


def some_page(choose: random.Random) -> int:
    """A page that somebody else may use too."""
    return choose.choice(PRIVATE_GFNS + SHARED_GFNS)


def using(vcpu: int, *, private: bool = True) -> Making:
    """A vCPU uses pages, and converts some to shared memory for a moment. private: False for shared
    memory alone.
    """

    def make(life: Life, choose: random.Random) -> Operation:
        td = life.td
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


def one_page(choose: random.Random) -> range:
    gfn = some_page(choose)
    return range(gfn, gfn + 1)


def punching(life: Life, choose: random.Random) -> Operation:
    return life.punching(one_page(choose))


def setting_attributes(life: Life, choose: random.Random) -> Operation:
    gpa = some_page(choose) << PAGE_SHIFT
    return life.td.set_memory_attributes_steps(gpa, PAGE_SIZE, private=choose.random() < 0.5)


def unmapping(life: Life, choose: random.Random) -> Operation:
    return life.remapping(range(1, choose.randint(2, 5)))


def migrating(life: Life, choose: random.Random) -> Operation:
    return life.td.user_memory.migrate(life.hva(some_page(choose) % PAGES))


def deleting_a_slot(life: Life, choose: random.Random) -> Operation:
    backing = choose.choice(life.td.backings)
    yield from life.setting_slot(backing, 0)
    yield from life.setting_slot(backing, backing.size)


def prefaulting_some(life: Life, choose: random.Random) -> Operation:
    return life.prefaulting(1, range(1, choose.randint(2, 5)))


def making_a_td(life: Life, choose: random.Random) -> Operation:
    """Another TD is born, lives, and dies meanwhile."""
    other = Td(life.td.host, name="other")
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
    made = [td.host.on_cpu(OTHER_LP, other(life, choose))]
    private = other is not deleting_a_slot
    made.append(using(0, private=private)(life, choose))
    if choose.random() < 0.7:
        if private and choose.random() < 0.5:
            made.append(td.host.on_cpu(1, prefaulting_some(life, choose)))
        else:
            made.append(using(1, private=private)(life, choose))
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
    machine = booted()
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
            td.host.on_cpu(OTHER_LP, life.setting_slot(backing, 0)),
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
