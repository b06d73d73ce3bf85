"""A scenario in which operations meet, on a tape: whoever looks says who moves next.

    lab = RaceLab("same-page", vcpus=2, rule="no-freeze")
    lab.tape.move("vCPU 0")
    lab.play([0, 0, 0, 1, 1])           # by their numbers
    lab.find_violation()                # a shortest schedule that goes wrong, on the tape
    lab.entries()                       # what they meet at: mirror and Secure EPT

Where `protocol` has the scenario, it knows the shortest schedule; else the machine is explored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tdxlab import views
from tdxlab.arch import HPA_MASK, PAGE_SHIFT, SEPT_LEVEL_NAMES
from tdxlab.breaks import BREAKS, broken
from tdxlab.kvm.spte import FROZEN_SPTE, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_get_walk
from tdxlab.races import THREAD_LP, Race, build
from tdxlab.seam import sept
from tdxlab.seam.td import Tdcs, Tdr
from tdxlab.study import protocol
from tdxlab.study.protocol import PROTOCOLS, Rule
from tdxlab.study.protocol_search import shortest
from tdxlab.tape import Action, Tape

#: Moves that `find_violation` may make on the machine.
BUDGET = 8_000
#: Moves after which `run_on` gives up.
MOST_MOVES = 400

#: What a thread that has ended comes to.
DONE = "done"


class Contested(NamedTuple):
    """An entry at which operations meet. level: KVM's."""

    gfn: int
    level: int

    @property
    def name(self) -> str:
        """The entry for people."""
        return f"{SEPT_LEVEL_NAMES[self.level - 1]} entry of gfn {self.gfn:#x}"


_PAGE = (Contested(0x5, 1),)
#: Scenario -> where its operations meet, in the order of the protocol's entries.
ENTRIES: dict[str, tuple[Contested, ...]] = {
    "same-page": _PAGE,
    "fresh-region": (Contested(0x400, 2), *(Contested(0x400 + n, 1) for n in range(3))),
    "far-apart": tuple(Contested(0x5 + n * 0x200, 1) for n in range(3)),
    "hook-failure": _PAGE,
    "fault-zap": _PAGE,
    "zap-enter": _PAGE,
}
#: Rules that can be turned off there, and one for none.
RULES = ("", *(name for name, rule in BREAKS.items() if rule.scenario in ENTRIES))


class EntryRow(NamedTuple):
    """One contested entry. mirror, external: values as in `protocol`."""

    entry: str
    mirror: str
    external: str


class ActorRow(NamedTuple):
    """Where one operation stands. comes_next: the step, or its result. retries: how often it had to
    start over.
    """

    who: str
    comes_next: str
    moves: int
    retries: int


class RaceTape(Tape):
    """The moves of a race, one after the other. `actions[k]`: phase is who moved, name what it did.

    rule: the one that is turned off while anybody moves, "" for none.
    """

    def __init__(self, race: Race, rule: str) -> None:
        super().__init__(race.machine)
        self.player = race.player()
        self._rule = rule
        self._numbers = {actor.name: number for number, actor in enumerate(race.actors)}

    @property
    def position(self) -> int:
        """How many moves have been made in the machine's present state."""
        return len(self.player.schedule)

    def move(self, who: str) -> str:
        """Let somebody make a move; returns what it did. What was recorded ahead is forgotten.

        Refuses one that cannot move, or waits: ValueError.
        """
        with self.rule_off():
            did = self.player.move(who)
        if did is None:
            waits = self.player.next_steps[who]
            raise ValueError(f"{who} stands at {waits!r}: let another one move first")
        del self._actions[self.position - 1 :]
        number = self._numbers[who]
        lp = number if who.startswith("vCPU") else THREAD_LP
        self._actions.append(Action("move", lp, did, who, {}, _played_by_its_player))
        return did

    def seek(self, position: int) -> None:
        """As `Tape.seek`."""
        if not 0 <= position <= len(self._actions):
            raise ValueError(f"position {position}; this tape has 0..{len(self._actions)}")
        with self.rule_off():
            if position < self.position:
                self.player.back(self.position - position)
            for action in self._actions[self.position : position]:
                self.player.move(action.phase)

    @contextmanager
    def rule_off(self) -> Iterator[None]:
        """While it lasts, the tape's rule is turned off."""
        if not self._rule:
            yield
            return
        with broken(self._rule):
            yield


def _played_by_its_player() -> None:
    raise AssertionError("a move is made by the tape's player, not alone")


def make_race(scenario: str, vcpus: int) -> Race:
    """The scenario; where `protocol` has it, others may move while a SEAMCALL is inside the
    module. Refuses what `races.build` refuses: ValueError.
    """
    return build(scenario, vcpus, inside_seamcalls=scenario in PROTOCOLS)


class RaceLab:
    """One scenario at its beginning. rule: one of RULES to turn off.

    Refuses a scenario without contested entries and a rule that does not exist: ValueError; and
    what `races.build` refuses.
    """

    def __init__(self, scenario: str = "same-page", *, vcpus: int = 2, rule: str = "") -> None:
        if scenario not in ENTRIES:
            raise ValueError(f"no scenario {scenario!r} here; choose one of {', '.join(ENTRIES)}")
        if rule not in RULES:
            raise ValueError(f"no rule {rule!r} here; choose one of {', '.join(RULES[1:])}")
        self.scenario, self.vcpus, self.rule = scenario, vcpus, rule
        self.race = make_race(scenario, vcpus)
        self.tape = RaceTape(self.race, rule)
        self.names = [actor.name for actor in self.race.actors]
        self._seamcalls_before = sum(self.race.machine.seamcalls.values())

    # -- moving

    def play(self, numbers: Sequence[int]) -> None:
        """Moves in the order of these numbers of actors. Refuses a number that nobody has, and what
        `RaceTape.move` refuses: ValueError.
        """
        for number in numbers:
            if number not in range(len(self.names)):
                raise ValueError(f"nobody has the number {number}; choose 0..{len(self.names) - 1}")
            self.tape.move(self.names[number])

    def run_on(self) -> None:
        """All in turn, until everybody has ended or nobody can move."""
        for _ in range(MOST_MOVES):
            movable = self.tape.player.movable
            if not movable:
                return
            last = self.tape.last
            after = self.names.index(last.phase) + 1 if last else 0
            turns = self.names[after:] + self.names[:after]
            try:
                self.tape.move(next(name for name in turns if name in movable))
            except ValueError:
                continue

    def shortest(self) -> list[str]:
        """Who moves, in a shortest schedule that goes wrong; [] if none does.

        Refuses an exploration that comes to no end within BUDGET: ValueError.
        """
        if self.scenario in PROTOCOLS and self.rule in {rule.value for rule in Rule}:
            schedule = shortest(PROTOCOLS[self.scenario](self.vcpus), Rule(self.rule))
            return [self.names[vcpu] for vcpu, _ in schedule]
        self.tape.seek(0)
        with self.tape.rule_off():
            found = make_race(self.scenario, self.vcpus).explore(budget=BUDGET)
        if found.violations:
            return [who for who, _ in found.violations[0].schedule]
        if not found.complete:
            raise ValueError(f"nothing found in {BUDGET} moves; choose fewer vCPUs")
        return []

    def find_violation(self) -> None:
        """Put a shortest schedule that goes wrong on the tape, and stand before its last move.

        Refuses where no schedule goes wrong: ValueError.
        """
        schedule = self.shortest()
        if not schedule:
            kept = f"with the break {self.rule}" if self.rule else "with all rules kept"
            raise ValueError(f"no schedule of {self.scenario} goes wrong {kept}")
        self.tape.seek(0)
        for who in schedule:
            self.tape.move(who)
        self.tape.seek(len(schedule) - 1)

    # -- looking

    @property
    def verdict(self) -> str:
        """What is wrong in the present state, "" if nothing."""
        player = self.tape.player
        if player.fault is not None:
            return f"{player.fault.name}: {player.fault.explanation}"
        return "deadlock: nobody can move" if player.end == "deadlock" else ""

    def seamcalls(self) -> int:
        """SEAMCALLs since the beginning, those that were refused too."""
        return sum(self.race.machine.seamcalls.values()) - self._seamcalls_before

    def entries(self) -> list[EntryRow]:
        """The contested entries in the present state."""
        wanted = ENTRIES[self.scenario]
        if self.scenario in PROTOCOLS:
            wanted = wanted[: len(PROTOCOLS[self.scenario](self.vcpus).beginning().mirror)]
        return [
            EntryRow(entry.name, self._mirror(entry), self._external(entry)) for entry in wanted
        ]

    def _mirror(self, entry: Contested) -> str:
        vm = self.race.vms[0]
        vcpu = vm.vcpus[0]
        walk = kvm_tdp_mmu_get_walk(vcpu, entry.gfn << PAGE_SHIFT, vm.sps[vcpu.mirror_root_hpa])
        spte = walk.get(entry.level, 0)
        if spte == FROZEN_SPTE:
            return protocol.FROZEN
        return protocol.PRESENT if spte & SPTE_MMU_PRESENT_MASK else protocol.EMPTY

    def _external(self, entry: Contested) -> str:
        memory = self.race.machine.memory
        sept_level = entry.level - 1
        place = sept.walk(memory, self._eptp(), entry.gfn << PAGE_SHIFT, sept_level)
        if place.sept_level != sept_level:
            return protocol.FREE
        if place.septe & sept.LOCKED:
            return protocol.WANTED if place.septe & sept.HOST_PRIORITY else protocol.LOCKED
        is_free = place.septe & ~sept.HOST_PRIORITY in (0, sept.FREE_ENTRY)
        return protocol.FREE if is_free else protocol.MAPPED

    def _eptp(self) -> int:
        """The EPTP of the TD, which stands in the first page of its TDCS."""
        memory = self.race.machine.memory
        tdr = memory.frame(views.tds(self.race.machine)[0])
        tdcs = memory.words.view[tdr + Tdr.TDCX_PA] & memory.pa_mask & HPA_MASK
        return memory.words.view[memory.frame(tdcs) + Tdcs.EPTP]

    def actors(self) -> list[ActorRow]:
        """Where everybody stands in the present state."""
        moves = self.tape.actions[: self.tape.position]
        rows = []
        for who, label in self.tape.player.next_steps.items():
            mine = [action.name for action in moves if action.phase == who]
            retries = sum(result_of(name) == "RET_PF_RETRY" for name in mine)
            comes = step_of(label, mine) if label else _ended_with(result_of(mine[-1]))
            rows.append(ActorRow(who, comes, len(mine), retries))
        return rows


def _ended_with(result: str) -> str:
    """A result for people: that of a thread, 0, says nothing that "done" does not."""
    return result if result.startswith("RET_PF_") else DONE


def result_of(label: str) -> str:
    """The result in the label of an operation's last move, "" in that of another move."""
    return label.partition(" -> ")[2]


def step_of(label: str, before: Sequence[str] = ()) -> str:
    """A step without its values, as `protocol` names it. before: labels of the moves that the same
    actor has made before: a SEAMCALL has two steps, the second one inside the module.
    """
    words = label.partition(" -> ")[0].partition(" raises ")[0].split()
    end = next((place for place, word in enumerate(words) if word[:2] == "0x"), len(words))
    step = " ".join(words[:end])
    is_inside = step.startswith("TDH.") and before and step_of(before[-1]) == step
    return step + protocol.INSIDE if is_inside and not result_of(before[-1]) else step


def moves_of(tape: Tape) -> list[tuple[str, str, str]]:
    """(who, step, result) of each move on a tape, those ahead included."""
    done: dict[str, list[str]] = {}
    rows = []
    for action in tape.actions:
        before = done.setdefault(action.phase, [])
        rows.append((action.phase, step_of(action.name, before), result_of(action.name)))
        before.append(action.name)
    return rows


def first_words(verdict: str) -> str:
    """A verdict without addresses: the rule, and of a SEAMCALL its name and status; "" of none."""
    if not verdict:
        return ""
    name, _, why = verdict.partition(": ")
    if "SEAMCALL" in why:
        leaf, _, rest = why.partition("SEAMCALL ")[2].partition(" failed")
        return f"{name}: {leaf} {rest.partition('(')[2].partition(' ')[0]}"
    return f"{name}: {why.partition(': the ')[0]}"
