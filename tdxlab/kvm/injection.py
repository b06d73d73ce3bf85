"""Failures on purpose: the n-th call of a leaf gets a status of our choice, and is not made.

    with FailNth(host, leaf, n=3, status=busy) as injection:
        steps.run(operation)
    injection.answered              # calls that got the status

It stands between KVM and the machine while the `with` lasts: what KVM calls goes through it, what
others call does not. Several may stand one in front of the other; the last one put in is asked
first.

Source: none; Linux has fault injection for its own functions (lib/fault-inject.c), not for these.
"""

from __future__ import annotations

from types import TracebackType

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.journal import Field, Fields
from tdxlab.kvm.host import Hardware, KvmHost
from tdxlab.steps import Operation

#: A SEAMCALL's RAX has the leaf in its low half word, and the leaf's version above it.
_LEAF_MASK = 0xFFFF


class FailNth:
    """Hardware whose module refuses some calls of one leaf.

    host: whose calls. leaf: number. n: the first call of the leaf that fails, from 1, counted since
    this was made. status: u64 in RAX; 0 makes KVM believe that a call was done that was not.
    count: how many calls in a row fail; None for all from the n-th on.
    calls: of the leaf so far, the failed ones among them.
    Refuses n or count below 1, and a status that is no u64: ValueError. The counter is journalled:
    a rewind takes it back.
    Differs: a refused call leaves all registers as they are, where the module writes some.
    """

    calls = Field(0)

    def __init__(
        self, host: KvmHost, leaf: int, *, n: int = 1, status: int, count: int | None = 1
    ) -> None:
        if n < 1:
            raise ValueError(f"call {n}; calls of a leaf are counted from 1")
        if count is not None and count < 1:
            raise ValueError(f"{count} calls; choose 1 or more, or None for all from call {n} on")
        if not 0 <= status < 1 << 64:
            raise ValueError(f"status {status:#x} does not fit RAX; choose 0 to {(1 << 64) - 1:#x}")
        self.host, self.leaf, self.n, self.status, self.count = host, leaf, n, status, count
        self.journal = host.journal
        self.fields = Fields(host.journal, self)
        self.behind: Hardware = host.hardware

    @property
    def answered(self) -> int:
        """Calls that got the status."""
        failed = max(0, self.calls - self.n + 1)
        return failed if self.count is None else min(failed, self.count)

    def __enter__(self) -> FailNth:
        self.behind = self.host.hardware
        self.memory, self.cpu = self.behind.memory, self.behind.cpu
        self.platform = self.behind.platform
        self.host.hardware = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.host.hardware = self.behind

    # -- Hardware

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the machine's, unless the call is one that shall fail."""
        if rax & _LEAF_MASK == self.leaf:
            self.calls += 1
            last = None if self.count is None else self.n + self.count
            if self.calls >= self.n and (last is None or self.calls < last):
                return self.status
        return (yield from self.behind.seamcall_steps(lp, rax, registers))

    def store(self, hpa: int, data: bytes) -> None:
        """As the machine's."""
        self.behind.store(hpa, data)

    def clear(self, hpa: int) -> None:
        """As the machine's."""
        self.behind.clear(hpa)

    def kick(self, lp: int) -> GuestOutcome:
        """As the machine's."""
        return self.behind.kick(lp)
