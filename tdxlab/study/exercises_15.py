"""The exercises of notebook 15: your own policy; answers are counted, or calculated."""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tdxlab.conversion import CONVERSION_RULES, ConversionPolicy, ConvertingVmm, Request
from tdxlab.conversions import WRONG_CONVERSIONS, Pieces, PreFaults, PunchesLate
from tdxlab.policies import WRONG_POLICIES, AllAtOnce, Batches, Patient
from tdxlab.policy import RULES, SUCCESS, Op, ZapHost, ZapPolicy
from tdxlab.policy_results import AnyResult, Result
from tdxlab.policy_run import AnyPolicy, own, run
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.policy_tables import formula, one_zap, wrong_row
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


#: Each is understood without its base class.
_ASKED: tuple[AnyPolicy, ...] = (
    *WRONG_POLICIES,
    *(policy for policy in WRONG_CONVERSIONS if not isinstance(policy, PunchesLate)),
)


#: Workloads that are no files: name -> how to make it.
_SMALL = {"one zap": "`tables.one_zap(8, 2)`", "there and back": "`tables.there_and_back()`"}


def _rule(gpaw: int, seed: int) -> Variant:
    policy = _ASKED[seed % len(_ASKED)]
    row = wrong_row(policy, gpaw)
    zaps = isinstance(policy, ZapPolicy)

    def hint(given: Any) -> str:
        if str(given).strip() not in (*RULES, *CONVERSION_RULES, INVARIANT):
            tables = "rule_rows" if zaps else "conversion_rule_rows"
            return f"That is no rule's name. `tables.{tables}()` has them, with what they ask."
        if zaps:
            return (
                "Go through it with two pages and a vCPU inside. What has each page been through "
                "when `zap` ends, and what did the module answer to each call on the way?"
            )
        return (
            "Go through it with two pages that become shared, and one that becomes private again. "
            "What kind is each page of the guest then, and who has taken what from it?"
        )

    method = type(policy).zap if isinstance(policy, ZapPolicy) else type(policy).convert
    lines = textwrap.dedent(inspect.getsource(method)).splitlines()
    code = "\n".join(line for line in lines if '"""' not in line)
    where = _SMALL.get(row.workload, repr(row.workload))
    question = (
        f"Which rule does this policy break first in the workload {where}?\n\n{code}\n\n"
        "Give the rule's name."
    )
    return Variant(question, row.rule, hint)


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


# -- 15.6 and 15.7: write one


class Goal(NamedTuple):
    """What a policy has to come up to. solution: one that does. reached: of its result."""

    words: str
    workload: str
    solution: AnyPolicy
    reached: Callable[[Any], bool]


class PiecesMapped(PreFaults):
    """Eight pages at a time, mapped before they are used."""

    name = "pieces of 8, pre-faulted"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """The pieces first."""
        Pieces(8).convert(vmm, request)
        vmm.pre_fault(request.gfn, request.pages)


CONVERSION_GOALS = (
    Goal(
        "with a cost of 380 at most and no page twice in memory",
        "steady",
        PreFaults(),
        lambda r: r.cost <= 380 and not r.most_double,
    ),
    Goal(
        "with 24 system calls at most and never more than 10 pages twice in memory",
        "steady",
        PunchesLate(),
        lambda r: r.calls <= 24 and r.most_double <= 10,
    ),
    Goal(
        "with a cost of 340 at most and never more than 8 pages at once",
        "boot",
        PiecesMapped(),
        lambda r: r.cost <= 340 and r.most_at_once <= 8,
    ),
    Goal(
        "with a cost of 550 at most and one page at a time",
        "boot",
        Pieces(1),
        lambda r: r.cost <= 550 and r.most_at_once <= 1,
    ),
)

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


def _conversions(gpaw: int, seed: int) -> Variant:
    return _own("conversion", CONVERSION_GOALS[seed % len(CONVERSION_GOALS)], gpaw)


def _zaps(gpaw: int, seed: int) -> Variant:
    return _own("zap", GOALS[seed % len(GOALS)], gpaw)


def _own(kind: str, goal: Goal, gpaw: int) -> Variant:
    def accepts(given: Any) -> bool:
        return not _objection(goal, given, gpaw)

    def hint(given: Any) -> str:
        return _objection(goal, given, gpaw)

    question = (
        f"Write a {kind} policy that keeps the rules in {goal.workload!r} {goal.words}. Give the "
        "class, or an object of it."
    )
    return Variant(question, goal.solution, hint, accepts)


def _objection(goal: Goal, given: Any, gpaw: int) -> str:
    """What is wrong with a policy; empty if nothing is."""
    base = ZapPolicy if isinstance(goal.solution, ZapPolicy) else ConversionPolicy
    try:
        if not isinstance(own(given), base):
            return f"That is a policy of the other kind; derive a class from {base.__name__}."
        result = run(given, goal.workload, gpaw=gpaw)
    except ValueError as mistake:
        return f"That cannot be run: {mistake}."
    if result.violation is not None:
        return f"It was stopped in {goal.workload!r}. {result.violation}."
    if not goal.reached(result):
        return f"It keeps the rules, at {_came_to(result)}; {goal.words} is asked for."
    return ""


def _came_to(result: AnyResult) -> str:
    """A result in words."""
    if isinstance(result, Result):
        return (
            f"a cost of {result.cost} with {result.ipis} IPIs and at most {result.most_blocked} "
            "pages blocked at a time"
        )
    return (
        f"a cost of {result.cost} with {result.calls} system calls, at most {result.most_at_once} "
        f"pages at once and {result.most_double} twice in memory"
    )


EXERCISES = (
    Exercise("15.1", _kernel),
    Exercise("15.2", _floor),
    Exercise("15.3", _rule),
    Exercise("15.4", _batch),
    Exercise("15.5", _status),
    Exercise("15.6", _conversions),
    Exercise("15.7", _zaps),
)
