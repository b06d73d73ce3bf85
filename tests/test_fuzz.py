"""100,000 SEAMCALLs that nobody in his senses makes: never an exception, and every refusal is met.

Half are calls that would have succeeded, with one mutation; half are 64-bit garbage. `-s` shows
which refusals were reached, and those that cannot be, with the reason.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.outcome import VMFAILINVALID
from tdxlab.abi.status import STATUS_NAMES, TDX_SUCCESS
from tdxlab.invariants import check
from tdxlab.seam.module import LEAVES
from tdxlab.seam.rules import SYS_SHUTDOWN
from tdxlab.seam.system import Sys
from tests.fuzzer import Fuzzer
from tests.refusals import IMPOSSIBLE, REFUSALS, name_of
from tests.scene import crowded_scene
from tests.sweeps import Sweeper
from tests.youth import Upbringing, youth

CALLS = 100_000
#: Steps that host and guests make before each round, mutated and garbage calls of a round.
STEPS, MUTATED, GARBAGE = 80, 200, 500
CALLS_BETWEEN_CHECKS = 100


class Report(NamedTuple):
    """What came of all calls. refusals: leaf -> refusals met. halts: why a module halted."""

    mutated: int
    garbage: int
    refusals: dict[int, set[str]]
    halts: set[str]


def _sweep(fuzzer: Sweeper) -> None:
    """All mutations in order, then the corner cases."""
    fuzzer.sweep()
    check(fuzzer.machine, "quiet")
    fuzzer.corner_cases()
    check(fuzzer.machine, "quiet")


def _is_over(fuzzer: Fuzzer) -> bool:
    """Nothing works any more: the module has halted or was shut down."""
    module = fuzzer.machine.module
    return bool(module.halted) or module.system.view[Sys.STATE] == SYS_SHUTDOWN


def _round(fuzzer: Fuzzer, halts: set[str]) -> None:
    """A walk to some state, then mutations and garbage while life goes on."""
    start = fuzzer.machine.mark()
    for _ in range(fuzzer.random.randrange(STEPS)):
        fuzzer.live()
    kinds = [fuzzer.mutated] * MUTATED + [fuzzer.garbage] * GARBAGE + [fuzzer.live] * MUTATED
    kinds += [fuzzer.guest_garbage] * MUTATED
    fuzzer.random.shuffle(kinds)
    for number, kind in enumerate(kinds):
        if _is_over(fuzzer):
            break
        kind()
        if number % CALLS_BETWEEN_CHECKS == 0:
            check(fuzzer.machine, "quiet")
    check(fuzzer.machine, "quiet")
    if fuzzer.machine.module.halted:
        halts.add(fuzzer.machine.module.halted)
    fuzzer.machine.rewind(start)
    fuzzer.machine.journal.release(start)


def _refusals(*fuzzers: Fuzzer) -> dict[int, set[str]]:
    met: dict[int, set[str]] = defaultdict(set)
    for fuzzer in fuzzers:
        for leaf, status in fuzzer.statuses:
            is_exit = status < 0 or status >> 32 == TDX_SUCCESS
            if leaf in LEAVES and not is_exit and status != VMFAILINVALID:
                met[leaf].add(name_of(status))
    return met


@pytest.fixture(scope="module")
def report() -> Report:
    fuzzer, young = Sweeper(crowded_scene(), 1), Upbringing(youth(), 2)
    halts: set[str] = set()
    young.grow_up()
    check(young.machine, "quiet")
    _sweep(fuzzer)
    while fuzzer.garbage_calls < CALLS // 2 or fuzzer.calls + young.calls < CALLS:
        _round(fuzzer, halts)
    mutated = fuzzer.calls + young.calls - fuzzer.garbage_calls
    result = Report(mutated, fuzzer.garbage_calls, _refusals(fuzzer, young), halts)
    print("\n" + "\n".join(_lines(result)))
    return result


def _lines(report: Report) -> Iterator[str]:
    allowed = {(leaf, refusal) for leaf, refusals in REFUSALS.items() for refusal in refusals}
    met = {(leaf, refusal) for leaf, refusals in report.refusals.items() for refusal in refusals}
    yield f"{report.mutated} mutated calls and {report.garbage} of garbage"
    yield f"{len(met & allowed)} of {len(allowed)} refusals met; not met:"
    for leaf, refusal in sorted(allowed - met):
        reason = IMPOSSIBLE.get((leaf, refusal), "NO REASON KNOWN")
        yield f"  {HOST_LEAVES[leaf].name:22} {refusal:40} {reason}"
    for leaf, refusal in sorted(met - allowed):
        yield f"  {HOST_LEAVES[leaf].name:22} {refusal:40} NOT IN THE TABLE"
    yield from (f"  halted: {reason}" for reason in sorted(report.halts))


def test_seamcall_survives_mutations_and_garbage(report: Report) -> None:
    assert report.mutated + report.garbage >= CALLS
    assert report.garbage >= CALLS // 2
    assert report.mutated >= CALLS // 3


def test_seamcall_refuses_with_known_refusals_only(report: Report) -> None:
    unknown = {
        (HOST_LEAVES[leaf].name, refusal)
        for leaf, refusals in report.refusals.items()
        for refusal in refusals - REFUSALS[leaf]
    }
    assert not unknown


def test_seamcall_reaches_every_refusal_that_is_possible(report: Report) -> None:
    unreached = {
        (leaf, refusal)
        for leaf, refusals in REFUSALS.items()
        for refusal in refusals - report.refusals[leaf]
    }
    assert unreached == set(IMPOSSIBLE)


def test_refusals_are_there_for_every_leaf_and_use_known_names() -> None:
    assert set(REFUSALS) == set(LEAVES)
    names = {name.removeprefix("TDX_") for name in STATUS_NAMES.values()}
    for refusals in REFUSALS.values():
        assert {refusal.split()[0] for refusal in refusals} <= names
    for leaf, refusal in IMPOSSIBLE:
        assert refusal in REFUSALS[leaf]
