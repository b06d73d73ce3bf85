"""Locks as generators: who waits for whom, and what a schedule sees of it."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tdxlab.journal import Journal
from tdxlab.kvm.locks import READ, WRITE, MmuLock, Mutex, NoLock, Srcu
from tdxlab.steps import WAIT, Deadlock, Schedule, Step, round_robin, run, seeded


@pytest.fixture
def lock() -> MmuLock:
    return MmuLock(Journal())


def section(lock: MmuLock, mode: str, inside: list[str]) -> Generator[Step, None, None]:
    """Take the lock, be inside for one step, let go."""
    yield from lock.lock(mode)
    inside.append(f"+{mode}")
    yield ("inside", mode)
    inside.append(f"-{mode}")
    lock.unlock(mode)


def test_lock_yields_before_it_takes_the_lock(lock: MmuLock) -> None:
    locking = lock.lock(WRITE)
    assert next(locking) == ("write_lock(mmu_lock)",)
    assert not lock.held(READ)
    with pytest.raises(StopIteration):
        next(locking)
    assert lock.held(WRITE)


def test_readers_hold_it_together(lock: MmuLock) -> None:
    run(lock.lock(READ))
    run(lock.lock(READ))
    assert lock.readers == 2
    lock.unlock(READ)
    assert lock.held(READ)
    lock.unlock(READ)
    assert not lock.held(READ)


def test_held_exclusively_counts_as_shared_but_not_the_other_way_round(lock: MmuLock) -> None:
    run(lock.lock(READ))
    assert (lock.held(READ), lock.held(WRITE)) == (True, False)
    lock.unlock(READ)
    run(lock.lock(WRITE))
    assert (lock.held(READ), lock.held(WRITE)) == (True, True)


@pytest.mark.parametrize(("first", "second"), [(READ, WRITE), (WRITE, READ), (WRITE, WRITE)])
def test_lock_waits_until_the_holder_lets_go(lock: MmuLock, first: str, second: str) -> None:
    run(lock.lock(first))
    waiting = lock.lock(second)
    next(waiting)
    assert not lock.is_contended
    assert next(waiting) == next(waiting) == (WAIT, "mmu_lock", second)
    assert lock.is_contended
    lock.unlock(first)
    with pytest.raises(StopIteration):
        next(waiting)
    assert lock.held(second)
    assert not lock.is_contended


def test_run_raises_deadlock_and_leaves_no_waiter(lock: MmuLock) -> None:
    run(lock.lock(READ))
    with pytest.raises(Deadlock) as caught:
        run(lock.lock(WRITE))
    assert caught.value.step == (WAIT, "mmu_lock", WRITE)
    assert lock.waiting == 0


def test_a_waiter_that_is_given_up_waits_no_more(lock: MmuLock) -> None:
    run(lock.lock(WRITE))
    schedule = Schedule([lock.lock(READ)])
    schedule.advance(0)
    schedule.advance(0)
    assert lock.waiting == 1
    schedule.close()
    assert lock.waiting == 0


def test_a_rewind_takes_back_who_holds_the_lock_and_who_waits() -> None:
    journal = Journal()
    lock = MmuLock(journal)
    free = journal.digest()
    mark = journal.mark()
    run(lock.lock(WRITE))
    waiter = lock.lock(READ)
    assert [next(waiter), next(waiter)][1] == (WAIT, "mmu_lock", READ)
    assert (lock.written, lock.waiting) == (True, 1)
    journal.rewind(mark)
    assert (lock.written, lock.waiting, journal.digest()) == (False, 0, free)


def test_schedule_shows_what_a_thread_waits_for(lock: MmuLock) -> None:
    schedule = Schedule([section(lock, WRITE, []), section(lock, READ, [])])
    for number in (0, 0, 1, 1):
        schedule.advance(number)
    assert schedule.labels == {0: ("inside", WRITE), 1: (WAIT, "mmu_lock", READ)}


def test_round_robin_lets_readers_in_together_and_the_writer_alone(lock: MmuLock) -> None:
    inside: list[str] = []
    round_robin([section(lock, mode, inside) for mode in (READ, READ, WRITE)])
    assert inside == ["+read", "+read", "-read", "-read", "+write", "-write"]


def test_no_order_of_steps_lets_a_writer_in_beside_anybody(lock: MmuLock) -> None:
    trails = set()
    for seed in range(50):
        inside: list[str] = []
        seeded([section(lock, mode, inside) for mode in (WRITE, READ)], seed)
        trails.add(tuple(inside))
    assert trails == {
        ("+write", "-write", "+read", "-read"),
        ("+read", "-read", "+write", "-write"),
    }
    assert (lock.readers, lock.written, lock.waiting) == (0, False, 0)


def test_lock_state_is_taken_back_by_the_journal() -> None:
    journal = Journal()
    lock = MmuLock(journal)
    mark = journal.mark()
    run(lock.lock(WRITE))
    journal.rewind(mark)
    assert not lock.held(READ)
    run(lock.lock(WRITE))
    assert lock.written


def test_no_lock_makes_nobody_wait_and_satisfies_every_assertion() -> None:
    lock = NoLock(Journal())
    assert list(lock.lock(WRITE)) == [("write_lock(mmu_lock)",)]
    assert list(lock.lock(READ)) == [("read_lock(mmu_lock)",)]
    lock.unlock(WRITE)
    assert lock.held(READ)
    assert lock.held(WRITE)
    assert not lock.is_contended


def test_mutex_lets_one_in_at_a_time() -> None:
    mutex = Mutex(Journal(), "slots_lock")
    run(mutex.lock())
    second = mutex.lock()
    assert next(second) == ("mutex_lock(slots_lock)",)
    assert next(second) == (WAIT, "slots_lock")
    mutex.unlock()
    with pytest.raises(StopIteration):
        next(second)
    assert mutex.held


def test_mutex_that_does_not_wait_lets_everybody_in() -> None:
    mutex = Mutex(Journal(), "slots_lock", waits=False)
    run(mutex.lock())
    run(mutex.lock())
    assert mutex.held


def test_synchronize_waits_for_the_readers_there_are_and_no_later_ones() -> None:
    srcu = Srcu(Journal(), "srcu")
    old = srcu.read_lock()
    waiting = srcu.synchronize()
    assert next(waiting) == ("synchronize_srcu(srcu)",)
    assert next(waiting) == (WAIT, "srcu")
    srcu.read_lock()
    assert next(waiting) == (WAIT, "srcu")
    srcu.read_unlock(old)
    with pytest.raises(StopIteration):
        next(waiting)


def test_synchronize_ends_at_once_without_readers() -> None:
    srcu = Srcu(Journal(), "srcu")
    srcu.read_unlock(srcu.read_lock())
    run(srcu.synchronize())
    run(srcu.synchronize())
