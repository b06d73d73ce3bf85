"""One schedule of a few operations, chosen move by move: by hand, by turns, by lot, or from a list.

    with Player(race.actors, machine.journal, race.check) as player:
        player.movable                       # ["vCPU 0", "vCPU 1"]
        player.move("vCPU 0")                # up to its next yield
        player.back()                        # ... and not
        print(player.table())

    played = run(race.actors, machine.journal, ROUND_ROBIN, check=race.check)
    played.end                               # "ended", or what is wrong

A player leaves the machine as it found it; `run` leaves it where the schedule led.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

from tdxlab.crew import Actor, Crew, Fault, Situation
from tdxlab.frames import Fingerprints
from tdxlab.journal import Journal
from tdxlab.states import States

#: (who, what it did) of each move.
Schedule = tuple[tuple[str, str], ...]
#: Looks at the machine; the argument is True if all actors have ended.
Check = Callable[[bool], Fault | None]

#: Every actor moves once in turn, but for those that cannot.
ROUND_ROBIN = "round-robin"
#: Moves after which a run gives up.
RUN_BUDGET = 10_000

# -- how a run can end

ENDED = "ended"
DEADLOCK = "deadlock"
LIVELOCK = "livelock"
VIOLATION = "violation"
UNFINISHED = "unfinished"
OUT_OF_BUDGET = "out of budget"


def nothing_to_check(_ended: bool) -> Fault | None:
    """A check that finds every machine right."""
    return None


def schedule_table(schedule: Sequence[tuple[str, str]]) -> str:
    """A schedule as a table: one column for each actor, one line for each move."""
    names = list(dict.fromkeys(who for who, _ in schedule))
    widths = [max(len(w) for n, w in [*schedule, (name, name)] if n == name) for name in names]
    rows = [names, ["-" * width for width in widths]]
    rows += [[label if name == who else "" for name in names] for who, label in schedule]
    pad = len(str(len(schedule)))
    lines = []
    for number, row in enumerate(rows, -1):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        count = str(number) if number > 0 else ""
        lines.append("  ".join([count.rjust(pad), *cells]).rstrip())
    return "\n".join(lines)


class Player:
    """Actors in the hands of somebody who says who moves next.

    actors: with names of their own. journal: the machine's; it is held at a mark until `close`,
    which takes all moves back. check: asked after each move. ignored, locks: as for `States`.
    fault: what is wrong, None if nothing; nobody can move then.
    """

    def __init__(
        self,
        actors: Sequence[Actor],
        journal: Journal,
        check: Check = nothing_to_check,
        *,
        ignored: Iterable[object] = (),
        locks: Iterable[object] = (),
    ) -> None:
        self._actors, self._check = tuple(actors), check
        self._numbers = {actor.name: number for number, actor in enumerate(actors)}
        self._states, self._prints = States(journal, ignored, locks), Fingerprints()
        self._begin()

    def _begin(self) -> None:
        self._crew = Crew(self._actors, self._states, self._prints)
        self._situation: Situation = self._crew.beginning()
        self._schedule: list[tuple[str, str]] = []
        self._moves: list[int] = []
        #: actors that have tried in this situation, and wait
        self._in_vain: frozenset[int] = frozenset()
        self.fault: Fault | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all operations up and take all their moves back."""
        self._crew.close()
        self._states.close()

    # -- looking

    @property
    def schedule(self) -> Schedule:
        """(who, what it did) of each move so far."""
        return tuple(self._schedule)

    @property
    def next_steps(self) -> dict[str, str]:
        """Name -> what the actor will do next, or waits for; "" of one that has ended."""
        standings = self._situation.standings
        return {
            actor.name: "" if standing.ended else label
            for actor, label, standing in zip(
                self._actors, self._crew.labels, standings, strict=True
            )
        }

    @property
    def movable(self) -> list[str]:
        """Names of the actors that may be able to move: one that waits may yet find that it can."""
        if self.fault is not None:
            return []
        candidates = self._situation.candidates
        return [self._actors[n].name for n in candidates if n not in self._in_vain]

    @property
    def ended(self) -> bool:
        """Every actor has ended."""
        return self._situation.ended

    @property
    def end(self) -> str:
        """How far it has come: ENDED, VIOLATION, DEADLOCK, or UNFINISHED."""
        if self.fault is not None:
            return VIOLATION
        if self.ended:
            return ENDED
        return UNFINISHED if self.movable else DEADLOCK

    @property
    def state(self) -> tuple[object, ...]:
        """A value that is equal in equal states: of the machine, and of where everybody stands."""
        state = self._states.state(self._situation.differences)
        return (state, self._situation.standings)

    def table(self) -> str:
        """The schedule so far, one column for each actor, and below it what is wrong."""
        lines = [schedule_table(self._schedule)]
        if self.fault is not None:
            lines.append(f"{self.fault.name}: {self.fault.explanation}")
        return "\n".join(lines)

    # -- moving

    def move(self, who: str) -> str | None:
        """Let an actor go on to its next yield; returns what it did, None if it still waits.

        Refuses a name that nobody has, and an actor that cannot move: ValueError.
        """
        number = self._number(who)
        if self.fault is not None:
            raise ValueError(f"{self.fault.name} is broken; go back before anybody moves on")
        if number not in self._situation.candidates:
            ended = self._situation.standings[number].ended
            why = "has ended" if ended else "starts over when another has changed something"
            others = ", ".join(self.movable) or "nobody"
            raise ValueError(f"{who} {why}; able to move: {others}")
        moved = self._crew.move(number, self._situation)
        if moved is None:
            self._in_vain |= {number}
            return None
        self._moves.append(number)
        self._schedule.append((who, moved.label))
        self._situation, self._in_vain = moved.situation, frozenset()
        self.fault = moved.fault or self._check(self.ended)
        return moved.label

    def back(self, moves: int = 1) -> None:
        """Take back the last moves, as many as there are at most. Refuses less than 1: ValueError.

        Operations cannot go back: they start over and repeat the moves before.
        """
        if moves < 1:
            raise ValueError(f"{moves} moves back; choose at least 1")
        names = [who for who, _ in self._schedule[: max(len(self._schedule) - moves, 0)]]
        self.restart()
        for who in names:
            self.move(who)

    def restart(self) -> None:
        """Take everything back."""
        self._crew.close()
        self._states.journal.rewind(self._states.base)
        self._begin()

    def follow(self, schedule: Iterable[tuple[str, str]]) -> None:
        """Make the moves of a schedule, such as a violation's.

        Refuses a name that nobody has, and a move that does not happen as it says: ValueError.
        """
        for place, (who, label) in enumerate(schedule, len(self._schedule) + 1):
            did = self.move(who)
            if did != label:
                now = "waits" if did is None else f"does {did!r}"
                raise ValueError(f"move {place}: {who} {now}, not {label!r}")

    def keep(self) -> None:
        """Let the machine stand where the moves have led; who has not ended is given up."""
        self._crew.close()
        self._states.release()

    def _number(self, who: str) -> int:
        if who not in self._numbers:
            raise ValueError(f"there is no actor {who!r}; choose of {', '.join(self._numbers)}")
        return self._numbers[who]


class Played(NamedTuple):
    """How a run went. end: ENDED; VIOLATION: `fault` says of what; DEADLOCK: all wait; LIVELOCK:
    they go round in a circle; UNFINISHED: the list of moves was at its end; OUT_OF_BUDGET.
    """

    end: str
    schedule: Schedule
    fault: Fault | None

    def table(self) -> str:
        """The schedule, one column for each actor, and how it ended."""
        why = self.end if self.fault is None else f"{self.fault.name}: {self.fault.explanation}"
        return f"{schedule_table(self.schedule)}\n{why}"


#: ROUND_ROBIN, the seed of a lot, or the names of those who move, in order.
Order = str | int | Sequence[str]


def run(
    actors: Sequence[Actor],
    journal: Journal,
    order: Order = ROUND_ROBIN,
    *,
    check: Check = nothing_to_check,
    budget: int = RUN_BUDGET,
) -> Played:
    """Let actors move in one order until all have ended, or it goes on no more. The machine stays
    where that led.

    order: ROUND_ROBIN; a number from 0: a lot drawn with that seed; or names, one for each move: in
    a list, one that waits just waits. budget: moves and looks in vain after which it gives up.
    Refuses another word, a negative seed, a budget below 1, and a name that nobody has: ValueError.
    """
    if isinstance(order, str) and order != ROUND_ROBIN:
        raise ValueError(f"{order!r} is no order; choose {ROUND_ROBIN!r}, a seed, or a list")
    if isinstance(order, int) and order < 0:
        raise ValueError(f"the seed {order}; choose a number from 0")
    if budget < 1:
        raise ValueError(f"a budget of {budget} moves; choose at least 1")
    player = Player(actors, journal, check)
    try:
        end = _drive(player, order, [actor.name for actor in actors], budget)
    finally:
        player.keep()
    return Played(end, player.schedule, player.fault)


def _drive(player: Player, order: Order, names: Sequence[str], budget: int) -> str:
    """Make moves until there is an end; returns which."""
    if isinstance(order, int):
        return _by_lot(player, random.Random(order), budget)
    if isinstance(order, str):
        return _by_turns(player, names, budget)
    for who in order[:budget]:
        if player.end != UNFINISHED:
            break
        player.move(who)
    return OUT_OF_BUDGET if player.end == UNFINISHED and len(order) > budget else player.end


def _by_lot(player: Player, lot: random.Random, budget: int) -> str:
    for _ in range(budget):
        if player.end != UNFINISHED:
            return player.end
        player.move(lot.choice(player.movable))
    return OUT_OF_BUDGET if player.end == UNFINISHED else player.end


def _by_turns(player: Player, names: Sequence[str], budget: int) -> str:
    """All in turn. The same state at the beginning of two rounds: they will go round for ever."""
    seen = set()
    while budget > 0:
        if player.state in seen and player.end == UNFINISHED:
            return LIVELOCK
        seen.add(player.state)
        for who in names:
            if player.end != UNFINISHED:
                return player.end
            if who in player.movable:
                player.move(who)
                budget -= 1
    return OUT_OF_BUDGET
