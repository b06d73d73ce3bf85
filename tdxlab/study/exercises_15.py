"""The exercises of notebook 15: your own policy; answers are counted, or calculated."""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tdxlab.policies import WRONG_POLICIES, AllAtOnce, Batches, KernelPolicy, Patient
from tdxlab.policy import RULES, SUCCESS, Op, ZapHost, ZapPolicy
from tdxlab.policy_results import Result
from tdxlab.policy_run import run
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.policy_tables import formula, one_zap
from tdxlab.vmm_td import Td

INVARIANT = "invariant 14"


def _is_pair(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) == 2


def _numbers(seed: int) -> tuple[int, int]:
    """Pages of a zap, and vCPUs that are inside all the time."""
    dice = random.Random(seed)
    return (512, 3) if not seed else (dice.randrange(50, 2000), dice.randrange(1, 16))


# -- 15.1: what does the kernel pay?


def _kernel(_gpaw: int, seed: int) -> Variant:
    pages, inside = _numbers(seed)
    right = formula(pages, 1, inside)

    def hint(given: Sequence[Any]) -> str:
        if not _is_pair(given):
            return "Give a pair: SEAMCALLs, IPIs."
        if given[0] != right[0]:
            return "Count the calls that one page takes from BLOCK to WBINVD; TRACK is one of them."
        return "The SEAMCALLs are right. The kernel kicks once for each page: whom does that meet?"

    question = (
        f"The kernel's policy takes {pages} pages out, one by one, while {inside} other vCPUs come "
        "back into the guest after each kick. How many SEAMCALLs and how many IPIs does the policy "
        "make if nothing is busy? Give a pair."
    )
    return Variant(question, right, hint)


# -- 15.2: what must anybody pay?


def _floor(_gpaw: int, seed: int) -> Variant:
    dice = random.Random(seed)
    zaps, pages = (12, 16) if not seed else (dice.randrange(2, 50), dice.randrange(2, 200))
    right = zaps * formula(pages, pages, 0)[0]

    def hint(given: int) -> str:
        if given == zaps * 4 * pages:
            return "That is the kernel's. Which of its four calls can serve many pages at once?"
        if given == 3 * zaps * pages + 1:
            return "One TRACK cannot serve several zaps: pages are blocked after it."
        return "Three calls name one page each. The fourth is about the whole TD, once in a zap."

    question = (
        f"{zaps} zaps, of {pages} pages each, one after the other. With how few SEAMCALLs can any "
        "policy do that?"
    )
    return Variant(question, right, hint)


# -- 15.3: which rule is broken?


def _rule(gpaw: int, seed: int) -> Variant:
    policy = WRONG_POLICIES[seed % len(WRONG_POLICIES)]
    results = (run(policy, workload, gpaw=gpaw) for workload in ("boot", one_zap(8, 2), "teardown"))
    right = next(r.violation.rule for r in results if r.violation is not None)

    def hint(given: Any) -> str:
        names = (*RULES, INVARIANT)
        if str(given).strip() not in names:
            return "That is no rule's name. `tables.rule_rows()` has them all, with what they ask."
        return (
            "Go through it with two pages and a vCPU inside. What has each page been through when "
            "`zap` ends, and what did the module answer to each call on the way?"
        )

    lines = textwrap.dedent(inspect.getsource(type(policy).zap)).splitlines()
    code = "\n".join(line for line in lines if '"""' not in line)
    question = f"Which rule does this policy break?\n\n{code}\n\nGive the rule's name."
    return Variant(question, right, hint)


# -- 15.4: how large a batch?


def _batch(_gpaw: int, seed: int) -> Variant:
    pages, inside = _numbers(seed + 7 if seed else 0)
    percent = random.Random(seed).choice((8, 12, 20, 30))
    kernel, floor = sum(formula(pages, 1, inside)), sum(formula(pages, pages, inside))
    most = floor + (kernel - floor) * percent // 100
    right = next(b for b in range(1, pages + 1) if sum(formula(pages, b, inside)) <= most)

    def hint(given: int) -> str:
        if not isinstance(given, int) or not 1 <= given <= pages:
            return f"Give a whole number of pages, 1 to {pages}."
        cost = sum(formula(pages, given, inside))
        if cost <= most:
            return f"Batches of {given} cost {cost}, which is little enough; a smaller one is, too."
        return f"Batches of {given} cost {cost}, and that is more than {most}."

    question = (
        f"One zap of {pages} pages, {inside} other vCPUs that always come back. Cost is SEAMCALLs "
        f"and IPIs. What is the smallest batch with which the policy costs {most} at most?"
    )
    return Variant(question, right, hint)


# -- 15.5: what is it answered?

#: Calls on a region that goes; "region" is its table, "page" its first mapped page.
_SCRIPTS = (
    ("BLOCK region", "TRACK", "KICK", "REMOVE page"),
    ("BLOCK region", "BLOCK page"),
    ("BLOCK region", "TRACK", "KICK", "UNBLOCK region"),
    ("BLOCK page", "TRACK", "KICK", "WRITEBACK page"),
    ("BLOCK page", "BLOCK page"),
    ("BLOCK region", "UNBLOCK region"),
)


class _Script(ZapPolicy):
    """Makes the calls of a list."""

    def __init__(self, moves: Sequence[str]) -> None:
        self.moves = moves

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """One call after the other."""
        gfn = pages[0]
        region = {"level": 2}
        calls: dict[str, Callable[[], object]] = {
            "BLOCK region": partial(host.block, gfn, **region),
            "UNBLOCK region": partial(host.unblock, gfn, **region),
            "BLOCK page": partial(host.block, gfn),
            "REMOVE page": partial(host.remove, gfn),
            "WRITEBACK page": partial(host.writeback, gfn),
            "TRACK": host.track,
            "KICK": host.kick,
        }
        for move in self.moves:
            calls[move]()


def _answered(moves: Sequence[str], gpaw: int) -> str:
    """What the last of some calls is answered."""
    ops: list[Op] = []

    def see(_td: Td, op: Op, _tally: object) -> None:
        ops.append(op)

    run(_Script(moves), one_zap(mapped=8), gpaw=gpaw, watch=see)
    return ops[-1].answer


def _status(gpaw: int, seed: int) -> Variant:
    moves = _SCRIPTS[seed % len(_SCRIPTS)]
    right = _answered(moves, gpaw)

    def plain(given: Any) -> str:
        return str(given).strip().upper().removeprefix("TDX_")

    def hint(given: Any) -> str:
        if plain(given) == SUCCESS:
            return "It is refused. What does a walk find that ends at a blocked entry, or beyond?"
        return (
            f"{plain(given)} is not it. BLOCK takes an entry's permissions away, at whatever level "
            "it stands: where does a walk end then? Put the calls into a policy, and run it."
        )

    question = (
        f"A zap of a whole region of 2 MiB while nobody runs. A policy calls {', '.join(moves)}; "
        "the page is one that is mapped. What does the module answer the last call? Give the "
        "status's name."
    )
    return Variant(question, right, hint, lambda given: plain(given) == right)


# -- 15.6: what is saved?

_RIVALS: tuple[ZapPolicy, ...] = (AllAtOnce(), Batches(4), Patient(), Batches(16))


def _saved(gpaw: int, seed: int) -> Variant:
    rival = _RIVALS[seed % len(_RIVALS)]
    name = "boot"
    kernel, other = (run(policy, name, gpaw=gpaw) for policy in (KernelPolicy(), rival))
    right = kernel.ipis - other.ipis

    def hint(given: int) -> str:
        if given == kernel.kicks - other.kicks:
            return "Those are kicks. A kick is an IPI to each vCPU that is inside, maybe to none."
        return "Run both policies in the workload and subtract: the field is `ipis`."

    question = (
        f"How many IPIs fewer than the kernel's policy does {rival.title!r} send in {name!r}, with "
        "the seed that `run` takes if none is given?"
    )
    return Variant(question, right, hint)


# -- 15.7: write one


class Goal(NamedTuple):
    """What a policy has to come up to. solution: one that does. reached: of its result."""

    words: str
    workload: str
    solution: ZapPolicy
    reached: Callable[[Result], bool]


GOALS = (
    Goal("with a cost of 180 at most", "boot", AllAtOnce(), lambda r: r.cost <= 180),
    Goal("without a single IPI", "steady", Patient(), lambda r: r.ipis == 0),
    Goal(
        "with a cost of 200 at most and never more than 8 pages blocked",
        "boot",
        Batches(8),
        lambda r: r.cost <= 200 and r.most_blocked <= 8,
    ),
    Goal(
        "with a cost of 150 at most and never more than 4 pages blocked",
        "steady",
        Batches(4),
        lambda r: r.cost <= 150 and r.most_blocked <= 4,
    ),
)


def _own(gpaw: int, seed: int) -> Variant:
    goal = GOALS[seed % len(GOALS)]

    def accepts(given: Any) -> bool:
        return not _objection(goal, given, gpaw)

    def hint(given: Any) -> str:
        return _objection(goal, given, gpaw)

    question = (
        f"Write a policy that keeps the rules in {goal.workload!r} {goal.words}. Give the class, "
        "or an object of it."
    )
    return Variant(question, goal.solution, hint, accepts)


def _objection(goal: Goal, given: Any, gpaw: int) -> str:
    """What is wrong with a policy; empty if nothing is."""
    try:
        result = run(given, goal.workload, gpaw=gpaw)
    except ValueError as mistake:
        return f"That cannot be run: {mistake}."
    if result.violation is not None:
        return f"It was stopped in {goal.workload!r}. {result.violation}."
    if not goal.reached(result):
        return (
            f"It keeps the rules, at a cost of {result.cost} with {result.ipis} IPIs and at most "
            f"{result.most_blocked} pages blocked at a time; {goal.words} is asked for."
        )
    return ""


EXERCISES = (
    Exercise("15.1", _kernel),
    Exercise("15.2", _floor),
    Exercise("15.3", _rule),
    Exercise("15.4", _batch),
    Exercise("15.5", _status),
    Exercise("15.6", _saved),
    Exercise("15.7", _own),
)
