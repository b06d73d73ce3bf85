"""Run a policy against a workload, count what it does, and compare.

    run(Mine(), "steady")                        # Result: counts, and the rule that it broke
    leaderboard([KernelPolicy(), Mine()])        # over all workloads
    leaderboard([AsQemu(), MyConversions()])     # conversion policies have columns of their own

Nothing is timed. What is counted are borders that are crossed: SEAMCALLs and IPIs; for conversion
policies system calls and entries into the guest, too. While a policy makes a call, each running
vCPU makes none to three steps for each step of KVM's, by lot; the same `seed` draws the same. After
every event that takes pages away the invariants of the machine are checked.

A policy that keeps the rules in all runs may have been lucky: these are some schedules, not all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import product
from typing import overload

from tdxlab import workloads
from tdxlab.conversion import ConversionPolicy
from tdxlab.invariants import InvariantBroken
from tdxlab.policy import ZapPolicy
from tdxlab.policy_bench import Bench, ConversionBench, Watching, ZapBench
from tdxlab.policy_results import (
    AnyResult,
    AnyStanding,
    ConversionResult,
    Result,
    require_one_kind,
    standings,
)
from tdxlab.stopping import Stopped, Violation
from tdxlab.workloads import Workload

AnyPolicy = ZapPolicy | ConversionPolicy
#: A policy, or its class.
Given = AnyPolicy | type[ZapPolicy] | type[ConversionPolicy]


@overload
def run(
    policy: ZapPolicy | type[ZapPolicy],
    workload: Workload | str,
    *,
    gpaw: int = 48,
    seed: int = 1,
    watch: Watching | None = None,
) -> Result: ...


@overload
def run(
    policy: ConversionPolicy | type[ConversionPolicy],
    workload: Workload | str,
    *,
    gpaw: int = 48,
    seed: int = 1,
    watch: Watching | None = None,
) -> ConversionResult: ...


@overload
def run(
    policy: Given,
    workload: Workload | str,
    *,
    gpaw: int = 48,
    seed: int = 1,
    watch: Watching | None = None,
) -> AnyResult: ...


def run(
    policy: Given,
    workload: Workload | str,
    *,
    gpaw: int = 48,
    seed: int = 1,
    watch: Watching | None = None,
) -> AnyResult:
    """Let `policy` do all zaps of a workload, or answer all conversions, on a machine of its own.

    policy: an object, of which a copy is used, or its class. workload: or its name. seed: of the
    vCPUs' pace; 0: one step for each of KVM's. watch: told of each call of the policy when it is
    done, of each request to convert before that, and of each event that begins, as an Op in
    lower-case letters.
    Refuses what is no policy, an unknown workload, another GPAW: ValueError.
    """
    policy, workload = own(policy), loaded(workload)
    bench: Bench
    if isinstance(policy, ZapPolicy):
        bench = ZapBench(policy, workload, gpaw, seed, watch)
    else:
        bench = ConversionBench(policy, workload, gpaw, seed, watch)
    violation = None
    try:
        for event in workload.events:
            bench.play(event)
    except Stopped as stop:
        violation = stop.violation
    except InvariantBroken as broken:
        rule = f"invariant {broken.number}"
        violation = Violation(rule, f"{broken.name}: {broken.explanation}")
    finally:
        bench.close()
    return bench.result(violation)


def kernels_own(workload: Workload | str, *, gpaw: int = 48, seed: int = 1) -> dict[str, int]:
    """Leaf -> calls that KVM's own code makes in a workload, without any policy: those of the zaps,
    and at the TD's end the write-back of its TDR. Arguments as for `run`.
    """
    workload = loaded(workload)
    bench = Bench(workload, gpaw, seed)
    for event in workload.events:
        bench.play(event)
    bench.close()
    return bench.calls()


def leaderboard(
    policies: Sequence[Given],
    names: Sequence[str] | None = None,
    *,
    gpaw: int = 48,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> list[AnyStanding]:
    """Run all policies in all workloads; who keeps the rules comes first, by cost. names: of
    workloads, None for all. progress: told (runs done, in all).

    Refuses as `run`, no list or an empty one, and both kinds together: ValueError.
    """
    if not isinstance(policies, Sequence) or not policies:
        raise ValueError(f"a leaderboard is of a list of policies, one at least; not {policies!r}")
    require_one_kind(isinstance(own(policy), ZapPolicy) for policy in policies)
    names = workloads.names() if names is None else list(names)
    results: list[list[AnyResult]] = [[] for _ in policies]
    for number, (policy, name) in enumerate(product(policies, names)):
        results[number // len(names)].append(run(policy, name, gpaw=gpaw, seed=seed))
        if progress is not None:
            progress(number + 1, len(policies) * len(names))
    return standings(results)


def loaded(workload: Workload | str) -> Workload:
    """A workload, or the one of that name. Refuses what is none: ValueError."""
    if isinstance(workload, str):
        return workloads.load(workload)
    workloads.require(workload)
    return workload


def own(policy: Given) -> AnyPolicy:
    """A policy that nobody else uses. Refuses what is none, or cannot be made or copied:
    ValueError.
    """
    try:
        if isinstance(policy, type) and issubclass(policy, AnyPolicy):
            return policy()
        if isinstance(policy, AnyPolicy):
            return copy.deepcopy(policy)
    except Exception as mistake:  # a reader's own __init__ may raise anything
        what = f"{type(mistake).__name__}: {mistake}"
        raise ValueError(f"{policy!r} cannot be made anew for a run: {what}") from None
    raise ValueError(
        f"{policy!r} is no policy; derive a class from ZapPolicy or from ConversionPolicy"
    )
