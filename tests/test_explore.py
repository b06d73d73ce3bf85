"""All schedules of small operations, whose number and outcomes can be told without exploring."""

from collections.abc import Callable
from math import factorial

import pytest

from tdxlab.crew import Actor, Fault
from tdxlab.explore import explore, replayed
from tdxlab.journal import Field, Fields, Journal, Journalled, Words
from tdxlab.kvm.locks import WRITE, MmuLock, Mutex
from tdxlab.states import CHUNK, Part
from tdxlab.steps import WAIT, Operation


class Bench(Journalled):
    """A journal, a row of words, a counter that does not count, and locks."""

    total = Field(0)

    def __init__(self) -> None:
        self.journal = Journal()
        self.fields = Fields(self.journal, self)
        self.words = Words(self.journal, 1024)
        self.statistics = Words(self.journal, 1)
        self.first, self.second = (Mutex(self.journal, name) for name in ("first", "second"))

    def steps(self, word: int, count: int) -> Operation:
        """Write to one word, `count` times."""
        for number in range(count):
            yield ("write", number)
            self.words.put(word, number + 1)

    def add(self, word: int) -> Operation:
        """Read, let others run, write."""
        yield ("read",)
        value = self.words.view[word]
        yield ("write", value)
        self.words.put(word, value + 1)

    def both(self, one: Mutex, other: Mutex) -> Operation:
        yield from one.lock()
        yield from other.lock()
        other.unlock()
        one.unlock()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def lost_update(bench: Bench) -> tuple[list[Actor], Callable[[bool], Fault | None]]:
    actors = [Actor(name, lambda: bench.add(0)) for name in ("A", "B")]

    def check(ended: bool) -> Fault | None:
        return Fault("lost", "an update") if ended and bench.words.view[0] != 2 else None

    return actors, check


@pytest.mark.parametrize(("actors", "steps"), [(1, 4), (2, 3), (3, 2)])
def test_explore_counts_all_schedules_of_operations_that_share_nothing(
    bench: Bench, actors: int, steps: int
) -> None:
    def start(number: int) -> Callable[[], Operation]:
        return lambda: bench.steps(number * 100, steps)

    crew = [Actor(f"A{number}", start(number)) for number in range(actors)]
    found = explore(crew, bench.journal)
    moves = steps + 1
    assert found.schedules == factorial(actors * moves) // factorial(moves) ** actors
    assert found.states == (moves + 1) ** actors
    assert found.transitions == actors * moves * (moves + 1) ** (actors - 1)
    assert (found.violations, found.complete) == ((), True)


def test_explore_leaves_the_machine_as_it_was(bench: Bench) -> None:
    bench.words.put(0, 7)
    before = bench.journal.digest()
    actors, check = lost_update(bench)
    explore(actors, bench.journal, check)
    assert bench.journal.digest() == before
    assert not bench.journal.recording


@pytest.mark.parametrize("hashing", [True, False])
def test_explore_finds_a_lost_update_with_the_shortest_schedule(
    bench: Bench, hashing: bool
) -> None:
    actors, check = lost_update(bench)
    (violation,) = explore(actors, bench.journal, check, hashing=hashing).violations
    assert (violation.invariant, violation.explanation) == ("lost", "an update")
    assert len(violation.schedule) == 6
    assert sorted(who for who, _ in violation.schedule) == ["A"] * 3 + ["B"] * 3
    table = violation.table().splitlines()
    assert (
        table[0].split() == [violation.schedule[0][0], violation.schedule[-1][0]] or "A" in table[0]
    )
    assert [line.split()[0] for line in table[2:8]] == list("123456")
    assert table[-1] == "lost: an update"


def test_explore_without_hashing_sees_each_schedule_once(bench: Bench) -> None:
    actors, check = lost_update(bench)
    merged = explore(actors, bench.journal, check)
    tree = explore(actors, bench.journal, check, hashing=False)
    assert tree.schedules == merged.schedules == 20
    assert tree.states == tree.transitions + 1
    assert merged.states < tree.states


def test_replayed_stands_where_the_rule_is_broken_and_goes_back(bench: Bench) -> None:
    actors, check = lost_update(bench)
    (violation,) = explore(actors, bench.journal, check).violations
    with replayed(actors, bench.journal, violation.schedule) as fault:
        assert fault is None
        assert bench.words.view[0] == 1
        assert check(True) is not None
    assert bench.words.view[0] == 0


@pytest.mark.parametrize("schedule", [[("A", "read")], [("C", "start")]])
def test_replayed_refuses_moves_that_do_not_happen(
    bench: Bench, schedule: list[tuple[str, str]]
) -> None:
    actors, _ = lost_update(bench)
    refused = pytest.raises(ValueError, match=r"move 1: A does 'start'|no actor 'C'")
    with refused, replayed(actors, bench.journal, schedule):
        pass


def test_explore_finds_the_deadlock_of_two_locks_taken_crosswise(bench: Bench) -> None:
    actors = [
        Actor("A", lambda: bench.both(bench.first, bench.second)),
        Actor("B", lambda: bench.both(bench.second, bench.first)),
    ]
    (violation,) = explore(actors, bench.journal).violations
    assert violation.invariant == "deadlock"
    assert violation.explanation == "for ever: A (wait second), B (wait first)"
    assert violation.states == 1
    straight = [actors[0], Actor("B", actors[0].start)]
    assert explore(straight, bench.journal).violations == ()


def test_explore_lets_an_operation_wait_without_counting_the_waiting(bench: Bench) -> None:
    lock = MmuLock(bench.journal)

    def hold() -> Operation:
        yield from lock.lock(WRITE)
        yield ("held",)
        lock.unlock(WRITE)

    found = explore([Actor(name, hold) for name in "AB"], bench.journal, locks=[lock])
    assert found.violations == ()
    # One has the lock first; the other comes to it before, while, or after that, and then waits.
    assert found.schedules is not None
    assert (
        found.schedules
        == explore(
            [Actor(name, hold) for name in "AB"], bench.journal, locks=[lock], hashing=False
        ).schedules
    )


def test_explore_reports_a_livelock_instead_of_going_on_for_ever(bench: Bench) -> None:
    def polite(mine: int, other: int) -> Operation:
        while True:
            yield ("raise hand", mine)
            bench.words.put(mine, 1)
            yield ("look", other)
            if not bench.words.view[other]:
                return
            bench.words.put(mine, 0)

    free = [Actor("A", lambda: polite(0, 100)), Actor("B", lambda: polite(100, 0))]
    found = explore(free, bench.journal)
    assert found.schedules is None
    assert found.complete
    assert "livelock" in [violation.invariant for violation in found.violations]


def test_explore_starts_an_operation_over_only_after_another_has_changed_something(
    bench: Bench,
) -> None:
    def again() -> Operation:
        yield ("look",)
        return "again" if not bench.words.view[0] else "done"

    retrying = Actor("A", again, again=lambda result: result == "again")
    (violation,) = explore([retrying], bench.journal).violations
    assert violation.invariant == "deadlock"
    found = explore([retrying, Actor("B", lambda: bench.steps(0, 1))], bench.journal)
    assert found.violations == ()
    # A looks once, after the change (3 ways to begin before), or before it (3 ways), then again.
    assert found.schedules == 3 + 3


def test_explore_reports_an_exception_and_an_unexpected_result(bench: Bench) -> None:
    def fail() -> Operation:
        yield ("fail",)
        raise KeyError("gone")

    actors = [Actor("A", fail), Actor("B", lambda: bench.steps(0, 1), lambda r: r == 5)]
    found = {v.invariant: v for v in explore(actors, bench.journal).violations}
    assert found["KeyError"].schedule == (("A", "start"), ("A", "fail raises KeyError"))
    assert found["result"].schedule[-1] == ("B", "write 0x0 -> no result")
    with replayed(actors, bench.journal, found["result"].schedule) as fault:
        assert fault == Fault("result", "B ended with no result")


def test_explore_does_not_tell_states_apart_by_what_is_ignored(bench: Bench) -> None:
    def count() -> Operation:
        for _ in range(3):
            yield ("count",)
            bench.statistics.put(0, bench.statistics.view[0] * 3 + 1)

    def twice() -> Operation:
        yield ("double",)
        bench.statistics.put(0, bench.statistics.view[0] * 2 + 1)

    actors = [Actor("A", count), Actor("B", twice)]
    assert explore(actors, bench.journal, ignored=[bench.statistics]).states == 5 * 3
    assert explore(actors, bench.journal).states > 5 * 3


def test_explore_gives_up_when_its_budget_is_spent(bench: Bench) -> None:
    actors = [Actor(str(n), lambda n=n: bench.steps(n * 100, 9)) for n in range(3)]  # type: ignore[misc]
    found = explore(actors, bench.journal, budget=100)
    assert (found.complete, found.schedules) == (False, None)
    assert found.moves >= 100


def test_explore_tells_its_progress(bench: Bench) -> None:
    told: list[tuple[int, int]] = []
    actors = [Actor(str(n), lambda n=n: bench.steps(n * 100, 9)) for n in range(3)]  # type: ignore[misc]
    explore(actors, bench.journal, progress=lambda states, moves: told.append((states, moves)))
    assert told == sorted(told)
    assert told[-1][0] >= 1024


def test_explore_refuses_an_operation_that_keeps_what_no_journal_takes_back(bench: Bench) -> None:
    seen: list[int] = []

    def forgetful() -> Operation:
        seen.append(1)
        yield ("step", len(seen))

    actors = [Actor("A", forgetful), Actor("B", lambda: bench.steps(0, 2))]
    with pytest.raises(RuntimeError, match="the same moves led to another state"):
        explore(actors, bench.journal)
    assert not bench.journal.recording


def test_explore_does_not_count_a_look_in_vain_as_a_move(bench: Bench) -> None:
    def waiting() -> Operation:
        while not bench.total:
            yield (WAIT, "total")

    def setting() -> Operation:
        yield ("set",)
        bench.total = 1

    actors = [Actor("A", waiting), Actor("B", setting)]
    found = explore(actors, bench.journal)
    # A waits before B's first move, or between its two, or comes after both.
    assert (found.violations, found.schedules) == ((), 3)


def test_explore_looks_a_move_up_where_only_what_others_have_for_their_own_differs(
    bench: Bench,
) -> None:
    def start(word: int) -> Callable[[], Operation]:
        return lambda: bench.steps(word, 6)

    def part(word: int) -> Part:
        return Part(bench.words, word, CHUNK // 8)

    words = [0, 256, 512]
    seeing = [Actor(str(word), start(word)) for word in words]
    own = [actor._replace(own=(part(word),)) for actor, word in zip(seeing, words, strict=True)]
    found, wanted = (explore(actors, bench.journal) for actors in (own, seeing))
    assert found[:5] == wanted[:5]
    assert found.moves * 4 < wanted.moves


def test_explore_notices_that_an_actor_looks_at_what_another_has_for_its_own(bench: Bench) -> None:
    def look_aside() -> Operation:
        for _ in range(4):
            yield ("look",)
            bench.words.put(512, bench.words.view[0])

    mine = Actor("A", lambda: bench.steps(0, 20), own=(Part(bench.words, 0, CHUNK // 8),))
    other = Actor("B", look_aside, own=(Part(bench.words, 1023),))
    with pytest.raises(RuntimeError, match="B did something else where only what others have"):
        explore([mine, other], bench.journal)


def test_explore_lets_an_actor_change_what_another_has_for_its_own(bench: Bench) -> None:
    def ask() -> Operation:
        yield ("ask",)
        bench.words.put(0, bench.words.view[0] | 128)

    mine = Actor("A", lambda: bench.steps(0, 3), own=(Part(bench.words, 0, CHUNK // 8),))
    other = Actor("B", ask, own=(Part(bench.words, 512, CHUNK // 8),))
    plain = [actor._replace(own=()) for actor in (mine, other)]

    def check(ended: bool) -> Fault | None:
        return Fault("asked", "last") if ended and bench.words.view[0] == 3 | 128 else None

    found, wanted = (explore(actors, bench.journal, check) for actors in ([mine, other], plain))
    assert [violation.invariant for violation in found.violations] == ["asked"]
    assert found[:5] == wanted[:5]
