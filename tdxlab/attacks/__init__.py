"""A host that tries: each attack is a function of a `Stage`, and says what stopped it.

    report = attack("read-private", gpaw=48)
    report.stopped_by, report.evidence
    for move in report.moves: print(move.actor, move.name, move.answer)

An attack that nothing stops says so: a host can always refuse to run a TD, and a probe on the
memory bus can put back what the memory has held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tdxlab.attacks import guest, kernel, life, memory, pages
from tdxlab.attacks.stage import Move, Stage
from tdxlab.attacks.verdict import DENIAL, NOTHING, Verdict
from tdxlab.memory import Cipher


class Attack(NamedTuple):
    """An attack by its name. run: makes the moves on a stage and judges them; its docstring says
    what is tried. stage: the kind of stage that it needs.
    """

    name: str
    run: Callable[[Any], Verdict]
    stage: type[Stage]

    @property
    def what(self) -> str:
        """What is tried, in a sentence."""
        return " ".join((self.run.__doc__ or "").split())


_FUNCTIONS = (
    memory.read_private,
    memory.write_private,
    memory.replay_in_software,
    memory.overwrite_secure_ept,
    memory.compare_ciphertext,
    memory.forge_on_the_bus,
    memory.splice_on_the_bus,
    memory.replay_on_the_bus,
    pages.map_at_two_gpas,
    pages.map_in_two_tds,
    pages.reuse_page_in_use,
    pages.replace_page,
    pages.use_shared_gpa,
    pages.copy_through_the_module,
    pages.fake_keyid,
    pages.look_with_debug_calls,
    life.add_after_launch,
    life.remove_without_block,
    life.stale_tlb,
    life.reclaim_early,
    life.skip_vcpu_flush,
    life.skip_cache_flush,
    life.write_back_late,
    life.read_leftovers,
    kernel.corrupt_mirror,
    guest.swap_for_zeros,
    guest.lie_about_conversion,
    guest.lie_about_sharing,
    guest.watch_faults,
    guest.step_through_faults,
    guest.never_run,
)


def _attack(run: Callable[[Any], Verdict]) -> Attack:
    stage = kernel.KernelStage if run.__module__ == kernel.__name__ else Stage
    return Attack(run.__name__.replace("_", "-"), run, stage)


#: Name -> attack, in the order of the lesson.
ATTACKS = {found.name: found for found in map(_attack, _FUNCTIONS)}

#: What a stage can lack, for the attacks that it stops -> the arguments of that `Stage`.
LACKS: dict[str, dict[str, bool]] = {
    "nothing": {},
    "MACs": {"has_mac": False},
    "encryption and integrity": {"encrypted": False},
    "a careful guest": {"careful": False},
}


@dataclass(frozen=True)
class Report:
    """What came of an attack. stopped_by: a mechanism, "" if nothing stopped it. gained: what the
    host has from it all the same. evidence: what shows it. lacks: what the stage was without.
    moves: what was done, and what came of it.
    """

    name: str
    what: str
    gpaw: int
    lacks: str
    stopped_by: str
    gained: str
    evidence: str
    moves: tuple[Move, ...]


def find(name: str) -> Attack:
    """The attack of that name. Refuses an unknown one: ValueError."""
    if name not in ATTACKS:
        raise ValueError(f"there is no attack {name!r}; choose one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def make_stage(
    name: str, *, gpaw: int = 48, lacks: str = "nothing", cipher: Cipher | None = None
) -> Stage:
    """A stage for an attack; parameters as for `attack`."""
    found = find(name)
    if lacks not in LACKS:
        raise ValueError(f"a stage cannot lack {lacks!r}; choose one of {', '.join(LACKS)}")
    return found.stage(gpaw=gpaw, cipher=cipher, **LACKS[lacks])


def attack(
    name: str, *, gpaw: int = 48, lacks: str = "nothing", cipher: Cipher | None = None
) -> Report:
    """Try one attack on a stage of its own.

    name: of ATTACKS. gpaw: 48 or 52. lacks: of LACKS. cipher: for what the host reads; None for the
    core's. Refuses values that are none of these: ValueError.
    """
    stage = make_stage(name, gpaw=gpaw, lacks=lacks, cipher=cipher)
    return perform(find(name), stage, lacks)


def perform(found: Attack, stage: Stage, lacks: str = "nothing") -> Report:
    """Try an attack on a stage where nothing has been tried yet. A victim that could not go on
    afterwards is a gain of the host's, whatever the verdict says.
    """
    verdict = found.run(stage)
    gained = verdict.gained
    if gained == NOTHING and not stage.goes_on():
        gained = DENIAL
    moves = tuple(stage.moves)
    stopped_by, _, evidence = verdict
    return Report(found.name, found.what, stage.gpaw, lacks, stopped_by, gained, evidence, moves)
