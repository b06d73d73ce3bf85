"""Every SEAMCALL of a TD's life fails once: what becomes of the TD, and which pages are lost.

    found = play_all(gpaw=48, seed=1, runs=100)
    for row in rows(found):                     # leaf x ways of failing -> outcome, leaks
        ...

The systematic part lets each SEAMCALL of one life fail, in four ways each: BUSY once, twice, for
ever, and with a status for which KVM has no answer. Random lives have random failures of SEAMCALLs,
hooks and allocations.

After each life the books must balance: every page is free, or leaked with a cause, and what is
leaked is what the module still has or could not write back; nothing is locked; all invariants hold.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import (
    OPERAND_ID_RCX,
    TDX_INTERRUPTED_RESUMABLE,
    TDX_OPERAND_BUSY,
    TDX_OPERAND_INVALID,
    TDX_PAGE_METADATA_INCORRECT,
    TDX_RND_NO_ENTROPY,
)
from tdxlab.failures import ALLOC_PAGE, HOOKS, Failure, in_place_of
from tdxlab.invariants import InvariantBroken, check
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.injection import LEAF_MASK, Between, Nth
from tdxlab.kvm.pages import HostPages
from tdxlab.kvm.seamcall_args import failure
from tdxlab.kvm.tdp_set import HostBug
from tdxlab.lives import CRASHED, DESTROY, GONE, USABLE, WHOLE_LIFE, Deed, Life, random_life
from tdxlab.machine import Machine
from tdxlab.seam.rules import PT_NDA, PT_TDR
from tdxlab.steps import Deadlock, Operation
from tdxlab.verdicts import BUG, KVM_BUG_ON, NOTHING, TO_USER, WARN_ON, Row, Run, Verdict, rows

BUSY = TDX_OPERAND_BUSY + OPERAND_ID_RCX
FATAL = TDX_PAGE_METADATA_INCORRECT + OPERAND_ID_RCX
CACHE_WB = "TDH.PHYMEM.CACHE.WB"

#: Name of a way to fail -> (status, calls in a row).
WAYS: dict[str, tuple[int, int | None]] = {
    "BUSY once": (BUSY, 1),
    "BUSY twice": (BUSY, 2),
    "BUSY for ever": (BUSY, None),
    "fatal": (FATAL, 1),
}
#: ... of CACHE.WB alone: an interrupt waits whenever it goes on.
INTERRUPTED = "interrupted for ever"

#: Statuses that random failures draw from.
_STATUSES = (BUSY, BUSY, FATAL, TDX_RND_NO_ENTROPY, TDX_OPERAND_INVALID + OPERAND_ID_RCX)

#: Random lives of a campaign if nobody says how many.
RUNS = 100

Progress = Callable[[int, int], None]


class Witness:
    """Sees what happens to a TD: what KVM says of it, and which pages are leaked.

    made: what counts the failures. deed: what the TD was at when the first one struck. outcome:
    what had become of it when it was last looked at. bugs, warnings, crash: texts. leaks: what a
    page was for -> pages.
    """

    def __init__(self, life: Life, pages: HostPages) -> None:
        self.life = life
        self.made: list[Nth] = []
        self.deed = ""
        self.outcome = GONE
        self.bugs: list[str] = []
        self.warnings: list[str] = []
        self.crash = ""
        self.leaks: Counter[str] = Counter()
        self._pages, self._leak = pages, pages.leak
        life.td.vm.listener = self._listen

    def _listen(self, event: tuple[Any, ...]) -> None:
        if event[0] == "bug":
            self.bugs.append(event[1])
        elif event[0] == "warn":
            self.warnings.append(event[1])

    def leak(self, hpa: int, why: str) -> None:
        """Takes the place of the host's `leak`."""
        role = self._pages.use_of(hpa).removesuffix(f" of {self.life.td.vm.name}")
        self.leaks[_ROLES.get(role, role)] += 1
        self._leak(hpa, why)

    @property
    def struck(self) -> int:
        """Calls that failed on purpose so far."""
        return sum(nth.answered for nth in self.made)

    def look(self) -> None:
        """A deed is over."""
        if not self.deed and self.struck:
            self.deed = self.life.deed
        if self.life.deed != DESTROY:
            self.outcome = self.life.state()
        elif self.deed == DESTROY:
            self.outcome = GONE

    def verdict(self, run: Run, deeds: Sequence[Deed], keyid_lost: bool, broken: str) -> Verdict:
        """What there is to say at the end."""
        return Verdict(
            run,
            tuple(deed.name for deed in deeds),
            self.struck,
            self.deed or self.life.deed,
            CRASHED if self.crash else self.outcome,
            self.said(),
            tuple(sorted(self.leaks.items())),
            keyid_lost,
            self.life.looped,
            broken,
        )

    def said(self) -> str:
        """The loudest word that the kernel spoke."""
        if self.crash:
            return BUG
        if self.bugs:
            return KVM_BUG_ON
        if self.warnings:
            return WARN_ON
        return TO_USER if self.life.refused else NOTHING


#: KVM's second RECLAIM of a TDR whose WBINVD had failed.
_RECLAIMED_TWICE = failure("TDH_PHYMEM_PAGE_RECLAIM", FATAL)

#: Names of uses of pages that people know by another name.
_ROLES = {"guest_memfd": "private page", "external page table": "S-EPT page"}


class Campaign:
    """A machine on which life after life is lived, each from the same beginning.

    gpaw: 48 or 52.
    """

    def __init__(self, gpaw: int = 48) -> None:
        self.gpaw = gpaw
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=3, packages=2)
        self._pages = self.machine.host.pages
        self._in_use = self._pages.in_use
        self._hkids = dict(self.machine.host.hkids)
        self._census: dict[str, int] = {}

    def play(self, run: Run, deeds: Sequence[Deed] = WHOLE_LIFE) -> Verdict:
        """Live one life, take the TD apart, balance the books; the machine is then as before."""
        mark = self.machine.mark()
        try:
            return self._play(run, deeds)
        finally:
            self.machine.rewind(mark)
            self.machine.journal.forget(mark)

    def _play(self, run: Run, deeds: Sequence[Deed]) -> Verdict:
        life = Life(self.machine, run.gpaw)
        witness = Witness(life, self._pages)
        broken = ""
        with (
            in_place_of(self._pages, {"leak": witness.leak}),
            self.machine.failing(*run.failures, td=life.td, pace=life.td.pace) as witness.made,
        ):
            try:
                self._live(life, witness, deeds)
            except HostBug as bug:
                witness.crash = str(bug)
            except (InvariantBroken, Deadlock) as error:
                broken = f"{error} ({life.deed})"
        if not broken and not witness.crash:
            broken = self.imbalance()
        keyid_lost = len(self.machine.host.hkids) > len(self._hkids)
        return witness.verdict(run, deeds, keyid_lost, broken)

    def _live(self, life: Life, witness: Witness, deeds: Sequence[Deed]) -> None:
        for deed in deeds:
            life.attempt(deed)
            witness.look()
        check(self.machine, "alive")
        life.end()
        witness.look()

    def imbalance(self) -> str:
        """What is wrong with the books after the TD is gone, "" if nothing is.

        Source: the principle that a page whose reclaim or flush failed is never given back: it
        leaks, and with a child of it the TDR.
        """
        try:
            check(self.machine, "alive")
        except InvariantBroken as error:
            return str(error)
        if self._pages.in_use != self._in_use:
            return "pages are out that nobody has any more"
        return next(self._wrong_leaks(), "")

    def _wrong_leaks(self) -> Iterator[str]:
        """Leaked pages that the module does not have, and the other way round. A TDR that could not
        be written back is no page of the module any more when KVM tries to reclaim it again.
        """
        leaked = self._pages.leaked
        rows = {r.hpa: r for r in self.machine.module.pamt.in_use() if r.page_type != PT_NDA}
        for hpa, row in rows.items():
            if hpa not in leaked:
                yield f"the module has the page {hpa:#x}, and it is not leaked"
            elif row.page_type != PT_TDR and row.owner not in leaked:
                yield f"the page {hpa:#x} is leaked, and the TDR that owns it is not"
        for hpa, why in leaked.items():
            if hpa not in rows and "WBINVD" not in why and why != _RECLAIMED_TWICE:
                yield f"the page {hpa:#x} is leaked ({why}), and the module does not have it"

    # -- the systematic part

    def census(self) -> dict[str, int]:
        """Leaf -> calls in a whole life in which nothing fails, in the order of the first calls."""
        if not self._census:
            self._census = self._count()
        return self._census

    def _count(self) -> dict[str, int]:
        counting = _Counting(self.machine.host)
        mark = self.machine.mark()
        with counting:
            found = self._play(Run(self.gpaw, ()), WHOLE_LIFE)
        calls = dict(counting.calls)
        self.machine.rewind(mark)
        self.machine.journal.forget(mark)
        if found.broken or found.outcome != USABLE or found.leaks:
            raise RuntimeError(f"a life in which nothing fails goes wrong: {found}")
        return calls

    def systematic(self, leaves: Collection[str] = ()) -> Iterator[Run]:
        """Each call of a whole life x each way to fail. leaves: only these; all if empty.

        Refuses a leaf that KVM does not call in it: ValueError.
        """
        census = self.census()
        for leaf in leaves:
            if leaf not in census:
                names = ", ".join(census)
                raise ValueError(f"KVM does not call {leaf!r} for a TD; choose one of {names}")
        for leaf in leaves or census:
            for way, (status, times) in ways_of(leaf).items():
                for n in range(1, census[leaf] + 1):
                    yield Run(self.gpaw, (Failure(leaf, n, status, times),), way)

    # -- random lives

    def random_life(self, seed: int, number: int) -> tuple[Run, tuple[Deed, ...]]:
        """Life `number` of a seed, and what fails in it: the same numbers, the same life."""
        choose = random.Random(f"{seed}:{number}")
        leaves = sorted(self.census())
        failures = tuple(_random_failure(choose, leaves) for _ in range(choose.randint(1, 3)))
        return Run(self.gpaw, failures, seed=seed, number=number), random_life(choose)


class _Counting(Between):
    """Counts the calls of each leaf."""

    def __init__(self, host: KvmHost) -> None:
        super().__init__(host)
        self.calls: Counter[str] = Counter()

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the hardware behind."""
        self.calls[HOST_LEAVES[rax & LEAF_MASK].name] += 1
        return self.behind.seamcall_steps(lp, rax, registers)


def ways_of(leaf: str) -> dict[str, tuple[int, int | None]]:
    """Name of a way in which this leaf is let fail -> (status, calls in a row)."""
    if leaf != CACHE_WB:
        return WAYS
    return WAYS | {INTERRUPTED: (TDX_INTERRUPTED_RESUMABLE, None)}


def _random_failure(choose: random.Random, leaves: Sequence[str]) -> Failure:
    kind = choose.random()
    answer = 0
    if kind < 0.6:
        target, answer = choose.choice(leaves), choose.choice(_STATUSES)
    elif kind < 0.75:
        target = choose.choice(tuple(HOOKS))
        answer = choose.choice(HOOKS[target])
    else:
        target = ALLOC_PAGE
    n = choose.randint(1, 100 if target == ALLOC_PAGE else 8)
    times = choose.choice((1, 1, 1, 2, None))
    step = choose.randint(1, 400) if choose.random() < 0.3 else 0
    return Failure(target, n, answer, times, step)


# -- all of it


def play_all(
    gpaw: int = 48,
    *,
    seed: int = 0,
    runs: int | None = None,
    leaves: Collection[str] = (),
    only: int | None = None,
    progress: Progress | None = None,
) -> list[Verdict]:
    """The systematic part, then random lives.

    runs: random lives; None for RUNS, or for none where `leaves` are given. leaves: of the
    systematic part; all if empty. only: this random life of the seed and nothing else.
    progress: told (lives, in all).
    Refuses a GPAW that is none, a leaf that is not called, numbers below 0: ValueError.
    """
    if runs is None:
        runs = 0 if leaves else RUNS
    numbers = range(runs) if only is None else range(only, only + 1)
    if runs < 0 or numbers.start < 0:
        raise ValueError(f"random life {min(runs, numbers.start)}; choose 0 or more")
    campaign = Campaign(gpaw)
    planned: list[tuple[Run, tuple[Deed, ...]]] = []
    if only is None:
        planned = [(run, WHOLE_LIFE) for run in campaign.systematic(leaves)]
    planned += [campaign.random_life(seed, number) for number in numbers]
    found = []
    for run, deeds in planned:
        found.append(campaign.play(run, deeds))
        if progress is not None:
            progress(len(found), len(planned))
    return found


def table(gpaw: int = 48, leaves: Collection[str] = ()) -> list[Row]:
    """The systematic part of a campaign as rows. leaves: only these; all if empty."""
    return rows(play_all(gpaw, runs=0, leaves=leaves))
