"""What the experiments of `debates` share: other functions in Linux's places, counts, words."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from tdxlab.kvm.fault import kvm_mmu_page_fault
from tdxlab.kvm.page_fault import (
    PFERR_PRIVATE_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_RETRY,
)
from tdxlab.kvm.vm import Vm
from tdxlab.machine import Machine
from tdxlab.steps import WAIT, Operation, Step
from tdxlab.vmm_td import Td

#: Error code of a write to shared memory, and to private memory.
SHARED_WRITE = PFERR_WRITE_MASK | PFERR_USER_MASK
PRIVATE_WRITE = SHARED_WRITE | PFERR_PRIVATE_ACCESS

#: (owner, name, what takes its place).
Substitute = tuple[Any, str, Any]


@contextmanager
def substituted(substitutes: Iterable[Substitute]) -> Iterator[None]:
    """While it lasts, `name` of each owner is something else, in the whole process."""
    with ExitStack() as stack:
        for owner, name, substitute in substitutes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, substitute)
        yield


@contextmanager
def heard(vm: Vm) -> Iterator[list[tuple[Any, ...]]]:
    """The events that a VM tells while it lasts, in a list."""
    events: list[tuple[Any, ...]] = []
    before, vm.listener = vm.listener, events.append
    try:
        yield events
    finally:
        vm.listener = before


def calls(machine: Machine, *, but: str = "TDH.VP.ENTER") -> int:
    """SEAMCALLs so far, those of the leaf `but` not among them."""
    return sum(machine.seamcalls.values()) - machine.seamcalls.get(but, 0)


def many(count: int, noun: str) -> str:
    """ "1 page", "2 pages", "no pages"."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def status_in(bug: str) -> str:
    """The name of the module's status in the text of a KVM_BUG_ON; the text itself without one."""
    found = re.search(r"\bTDX_[A-Z_0-9]+", bug)
    return found[0] if found else bug


class Faulting:
    """A vCPU of a TD that faults on private memory until it is mapped, and what that takes: steps,
    those of them that wait, and faults that had to be repeated.
    """

    def __init__(self, td: Td, gpa: int, vcpu: int = 0) -> None:
        self.td, self.gpa, self.vcpu = td, gpa, vcpu
        self.steps = self.waits = self.retries = 0

    def operation(self) -> Generator[Step, None, int]:
        """The thread; returns what the last fault did."""
        while True:
            once = kvm_mmu_page_fault(self.td.vcpu(self.vcpu), self.gpa, PRIVATE_WRITE)
            ret = yield from self._counted(once)
            if ret != RET_PF_RETRY:
                return ret
            self.retries += 1
            self.steps += 1
            yield ("fault again", self.gpa)

    def _counted(self, operation: Operation) -> Generator[Step, None, int]:
        while True:
            try:
                step = next(operation)
            except StopIteration as end:
                return int(end.value)
            self.steps += 1
            self.waits += step[0] == WAIT
            yield step


def go_on(operation: Iterator[Any], steps: int = 1) -> bool:
    """Let a thread make some steps; False if it has ended."""
    return sum(1 for _ in islice(operation, steps)) == steps
