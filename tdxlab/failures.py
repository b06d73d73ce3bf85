"""Failures on purpose: of a SEAMCALL, of a hook, of the allocation of a page, at any call or step.

    busy = Failure("TDH.MEM.PAGE.AUG", n=3, answer=TDX_OPERAND_BUSY)
    with machine.failing(busy) as made:
        td.touch(0x1000, "64 KiB")
    made[0].answered                    # calls that failed

What a failure is about (its target) is the name of a leaf, the name of one of a TD's hooks, or
ALLOC_PAGE. While the `with` lasts a failure stands in the way of what it is about; behind it
everything is as before. Of several with one target the last one is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from errno import EBUSY, EINVAL, EIO, errorcode
from typing import Any, NamedTuple

from tdxlab.abi.leaves import HOST_LEAVES
from tdxlab.abi.status import describe
from tdxlab.arch import PAGE_SHIFT
from tdxlab.journal import Field, Fields, Journal, Journalled
from tdxlab.kvm.external import Hook
from tdxlab.kvm.host import KvmHost
from tdxlab.kvm.injection import FailNth, Nth
from tdxlab.kvm.pages import NO_PAGE, HostPages
from tdxlab.kvm.tdx import Tdx
from tdxlab.steps import Operation

ALLOC_PAGE = "alloc_page"

#: Name of a hook -> what it can return when it fails. Source: Linux 6.16, arch/x86/kvm/vmx/tdx.c.
HOOKS: dict[str, tuple[int, ...]] = {
    "link_external_spt": (-EBUSY, -EIO),
    "set_external_spte": (-EBUSY, -EIO),
    "remove_external_spte": (-EIO, -EINVAL),
    "free_external_spt": (-EIO, -EINVAL),
}
_LEAVES = {leaf.name: number for number, leaf in HOST_LEAVES.items()}


class Failure(NamedTuple):
    """Calls that shall fail.

    target: name of a leaf, of a hook, or ALLOC_PAGE. n: the first call of it that fails, from 1.
    answer: what the failed call returns: a status (u64) of a leaf, -errno of a hook; an allocation
    has no answer. times: calls in a row that fail, None for all from there on. step: calls are
    counted only after so many steps.
    """

    target: str
    n: int = 1
    answer: int = 0
    times: int | None = 1
    step: int = 0

    def __str__(self) -> str:
        many = {1: "", None: " and all after it"}.get(self.times, f", {self.times} in a row")
        since = f" after step {self.step}" if self.step else ""
        return f"{self.target} number {self.n}{many}{since}: {self.answer_name}"

    @property
    def answer_name(self) -> str:
        """The answer as people write it."""
        if self.target == ALLOC_PAGE:
            return "no page"
        if self.target in HOOKS:
            return f"-{errorcode.get(-self.answer, str(-self.answer))}"
        return describe(self.answer)


class Pace(Journalled):
    """Counts the steps of the operations that it watches. steps: so far; journalled."""

    steps = Field(0)

    def __init__(self, journal: Journal) -> None:
        self.fields = Fields(journal, self)

    def watch(self, operation: Operation) -> Operation:
        """The operation itself; each of its steps counts."""
        results: list[Any] = []

        def whole() -> Operation:
            results.append((yield from operation))

        for step in whole():
            self.steps += 1
            yield step
        return results[0]


@contextmanager
def in_place_of(owner: object, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """While the `with` lasts, `functions` (name -> function) take the place of those of `owner`."""
    saved = {name: vars(owner).get(name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, before in saved.items():
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class FailPage(Nth):
    """Host memory of which some pages, small or large, cannot be had. functions: what takes the
    place of its own.

    Differs: in Linux the small allocations of a kernel rarely fail; reclaim is not modelled.
    """

    def __init__(self, pages: HostPages, journal: Journal, failure: Failure) -> None:
        self.choose(failure.n, failure.times)
        self.fields = Fields(journal, self)
        small, large = pages.alloc_page, pages.alloc_huge_page
        self.functions: dict[str, Callable[..., Any]] = {
            "alloc_page": lambda use: NO_PAGE if self.strikes() else small(use),
            "alloc_huge_page": lambda size, use: NO_PAGE if self.strikes() else large(size, use),
        }


class FailHook(Nth):
    """A TD of which one hook fails without calling the module. functions: what takes its place.

    It leaves behind what the hook leaves when it fails: but for -EBUSY, and for a table that cannot
    be freed, the VM is dead; a page that was not removed is lost.
    Refuses an answer that the hook does not give: ValueError.
    """

    def __init__(self, tdx: Tdx, failure: Failure) -> None:
        if failure.answer not in HOOKS[failure.target]:
            allowed = " or ".join(f"-{errorcode[-answer]}" for answer in HOOKS[failure.target])
            raise ValueError(f"{failure.target} does not fail with {failure.answer}; {allowed} can")
        self.choose(failure.n, failure.times)
        self.fields = Fields(tdx.host.journal, self)
        self.tdx, self.failure = tdx, failure
        self._behind = getattr(tdx, failure.target)
        self.functions: dict[str, Callable[..., Any]] = {failure.target: self._hook}

    def _hook(self, gfn: int, level: int, frame: int) -> Hook:
        """frame: pfn of a page, or HPA of a table."""
        if not self.strikes():
            ret: int = yield from self._behind(gfn, level, frame)
            return ret
        yield (self.failure.target, gfn, level)
        name, answer = self.failure.target, self.failure.answer
        why = f"{name} failed on purpose ({self.failure.answer_name})"
        if answer != -EBUSY and (name, answer) != ("free_external_spt", -EIO):
            self.tdx.vm.bug(why)
        if name == "remove_external_spte":
            self.tdx.host.pages.leak(frame << PAGE_SHIFT, why)
        return answer


@contextmanager
def injected(
    host: KvmHost,
    failures: Sequence[Failure],
    *,
    tdx: Tdx | None = None,
    pace: Pace | None = None,
) -> Iterator[list[Nth]]:
    """Let calls fail while the `with` lasts; yields, for each failure, what counts its calls.

    tdx: the TD whose hooks shall fail. pace: counts the steps for failures that have a `step`.
    Refuses a target that is none, a hook without a TD, a step without a pace, numbers out of range:
    ValueError.
    """
    with ExitStack() as stack:
        made = []
        for failure in failures:
            nth = _make(stack, host, failure, tdx)
            if failure.step:
                nth.is_armed = _armed_by(pace, failure.step)
            made.append(nth)
        yield made


def _make(stack: ExitStack, host: KvmHost, failure: Failure, tdx: Tdx | None) -> Nth:
    """Let a failure stand in the way until the stack is closed."""
    if failure.target == ALLOC_PAGE:
        page = FailPage(host.pages, host.journal, failure)
        stack.enter_context(in_place_of(host.pages, page.functions))
        return page
    if failure.target in HOOKS:
        if tdx is None:
            raise ValueError(f"{failure.target} is a hook of a TD; say of which one")
        hook = FailHook(tdx, failure)
        stack.enter_context(in_place_of(tdx, hook.functions))
        return hook
    leaf = leaf_number(failure.target)
    call = FailNth(host, leaf, n=failure.n, status=failure.answer, count=failure.times)
    return stack.enter_context(call)


def _armed_by(pace: Pace | None, step: int) -> Callable[[], bool]:
    if pace is None:
        raise ValueError(f"a failure after step {step} needs somebody who counts steps: a Pace")
    return lambda: pace.steps >= step


def leaf_number(name: str) -> int:
    """Number of a leaf by its name. Refuses one that the module does not have: ValueError."""
    if name not in _LEAVES:
        raise ValueError(
            f"there is no leaf {name!r}; leaves are written like 'TDH.MEM.TRACK', "
            f"hooks are {', '.join(HOOKS)}, and allocations {ALLOC_PAGE}"
        )
    return _LEAVES[name]
