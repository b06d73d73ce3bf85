"""One schedule at a time: who may move, what a move did, how a run ends."""

from collections.abc import Callable, Iterator

import pytest

from tdxlab.crew import Actor, Fault
from tdxlab.journal import Field, Fields, Journal, Journalled, Words
from tdxlab.player import Player, run
from tdxlab.races import build
from tdxlab.steps import WAIT, Operation


class Desk(Journalled):
    """A journal, words, and a flag to wait for."""

    flag = Field(False)

    def __init__(self) -> None:
        self.journal = Journal()
        self.fields = Fields(self.journal, self)
        self.words = Words(self.journal, 64)

    def add(self) -> Operation:
        yield ("read",)
        value = self.words.view[0]
        yield ("write", value)
        self.words.put(0, value + 1)

    def wait(self) -> Operation:
        while not self.flag:
            yield (WAIT, "flag")

    def set(self) -> Operation:
        yield ("set",)
        self.flag = True

    def polite(self, mine: int, other: int) -> Operation:
        while True:
            yield ("raise hand", mine)
            self.words.put(mine, 1)
            yield ("look", other)
            if not self.words.view[other]:
                return
            self.words.put(mine, 0)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def actors(**starts: Callable[[], Operation]) -> list[Actor]:
    return [Actor(name, start) for name, start in starts.items()]


@pytest.fixture
def adding(desk: Desk) -> Iterator[Player]:
    with Player(actors(A=desk.add, B=desk.add), desk.journal) as player:
        yield player


def test_move_goes_to_the_next_yield_and_says_what_was_done(desk: Desk, adding: Player) -> None:
    assert adding.next_steps == {"A": "start", "B": "start"}
    assert [adding.move("A"), adding.move("A")] == ["start", "read"]
    assert adding.next_steps == {"A": "write 0x0", "B": "start"}
    assert desk.words.view[0] == 0
    assert adding.move("A") == "write 0x0 -> no result"
    assert desk.words.view[0] == 1
    assert (adding.movable, adding.next_steps["A"]) == (["B"], "")
    assert adding.schedule == (("A", "start"), ("A", "read"), ("A", "write 0x0 -> no result"))


def test_move_refuses_who_has_ended_and_who_is_not_there(adding: Player) -> None:
    for _ in range(3):
        adding.move("A")
    with pytest.raises(ValueError, match="A has ended; able to move: B"):
        adding.move("A")
    with pytest.raises(ValueError, match="no actor 'C'; choose of A, B"):
        adding.move("C")


def test_back_repeats_the_moves_before(desk: Desk, adding: Player) -> None:
    for who in "ABABAB":
        adding.move(who)
    assert desk.words.view[0] == 1
    adding.back()
    assert (adding.next_steps, desk.words.view[0]) == ({"A": "", "B": "write 0x0"}, 1)
    adding.back(2)
    assert adding.schedule == (("A", "start"), ("B", "start"), ("A", "read"))
    assert desk.words.view[0] == 0
    adding.back(9)
    assert adding.schedule == ()
    with pytest.raises(ValueError, match="0 moves back"):
        adding.back(0)


def test_close_takes_everything_back(desk: Desk) -> None:
    before = desk.journal.digest()
    with Player(actors(A=desk.add), desk.journal) as player:
        for _ in range(3):
            player.move("A")
        assert player.end == "ended"
    assert desk.journal.digest() == before
    assert not desk.journal.recording


def test_state_is_equal_in_equal_states_only(adding: Player) -> None:
    states = [adding.state]
    for who in "AB":
        adding.move(who)
        states.append(adding.state)
    adding.back(2)
    assert adding.state == states[0]
    for who in "BA":
        adding.move(who)
    assert adding.state == states[2] != states[1]


def test_move_of_one_that_waits_is_none_until_another_has_moved(desk: Desk) -> None:
    with Player(actors(A=desk.wait, B=desk.set), desk.journal) as player:
        assert player.move("A") == "start"
        assert player.next_steps["A"] == "wait flag"
        assert player.move("A") is None
        assert player.movable == ["B"]
        player.move("B")
        assert player.movable == ["A", "B"]
        player.move("B")
        assert player.move("A") == "wait flag -> no result"
        assert player.ended


def test_check_stops_the_player_at_the_move_that_broke_a_rule(desk: Desk) -> None:
    lost = lambda ended: Fault("lost", "an update") if ended and desk.words.view[0] < 2 else None  # noqa: E731
    with Player(actors(A=desk.add, B=desk.add), desk.journal, lost) as player:
        for who in "ABABAB":
            assert player.fault is None
            player.move(who)
        assert (player.end, player.movable) == ("violation", [])
        assert player.table().endswith("\nlost: an update")
        with pytest.raises(ValueError, match="lost is broken; go back"):
            player.move("A")
        player.back()
        assert player.movable == ["B"]


def test_follow_refuses_a_move_that_does_not_happen(adding: Player) -> None:
    adding.follow([("A", "start"), ("B", "start")])
    with pytest.raises(ValueError, match="move 3: A does 'read', not 'write'"):
        adding.follow([("A", "write")])


@pytest.mark.parametrize(
    ("order", "total"), [("round-robin", 1), ([*"AAABBB"], 2), ([*"ABABAB"], 1)]
)
def test_run_leaves_the_machine_where_the_order_leads(
    desk: Desk, order: str | list[str], total: int
) -> None:
    played = run(actors(A=desk.add, B=desk.add), desk.journal, order)
    assert (played.end, len(played.schedule)) == ("ended", 6)
    assert desk.words.view[0] == total
    assert not desk.journal.recording


def test_run_by_lot_is_the_same_for_the_same_seed(desk: Desk) -> None:
    def once(seed: int) -> tuple[tuple[str, str], ...]:
        mark = desk.journal.mark()
        played = run(actors(A=desk.add, B=desk.add), desk.journal, seed)
        desk.journal.rewind(mark)
        desk.journal.release(mark)
        return played.schedule

    assert once(3) == once(3)
    assert len({once(seed) for seed in range(5)}) > 2


def test_run_reports_a_livelock_instead_of_hanging(desk: Desk) -> None:
    free = actors(A=lambda: desk.polite(1, 40), B=lambda: desk.polite(40, 1))
    assert run(free, desk.journal).end == "livelock"


def test_run_reports_a_deadlock_and_a_spent_budget(desk: Desk) -> None:
    waiting = actors(A=desk.wait)
    assert run(waiting, desk.journal).end == "deadlock"
    assert run(waiting, desk.journal, 1).end == "deadlock"
    assert run(actors(A=desk.add), desk.journal, 1, budget=2).end == "out of budget"
    assert run(actors(A=desk.add), desk.journal, budget=2).end == "out of budget"
    assert run(actors(A=desk.add), desk.journal, ["A"]).end == "unfinished"


@pytest.mark.parametrize(
    ("order", "budget", "word"),
    [("by-lot", 1, "choose 'round-robin'"), (-1, 1, "seed -1"), (1, 0, "budget of 0")],
)
def test_run_refuses_an_order_that_is_none(
    desk: Desk, order: str | int, budget: int, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        run(actors(A=desk.add), desk.journal, order, budget=budget)


def test_race_run_brings_a_scenario_to_its_end_in_any_order() -> None:
    for order in ("round-robin", 1, 2):
        race = build("fault-zap", 1)
        assert race.run(order).end == "ended"
        assert race.check(True) is None


def test_race_player_shows_a_scenario_move_by_move() -> None:
    with build("same-page", 2).player() as player:
        for who in ("vCPU 0", "vCPU 1"):
            player.move(who)
        assert all(step.startswith("faultin_pfn") for step in player.next_steps.values())
