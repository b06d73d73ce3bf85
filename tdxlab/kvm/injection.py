"""Between KVM and the machine: look at SEAMCALLs, or let some of them fail on purpose.

    with FailNth(host, leaf, n=3, status=busy) as injection:
        steps.run(operation)
    injection.answered              # calls that got the status

It stands between KVM and the machine while the `with` lasts: what KVM calls goes through it, what
others call does not. Several may stand one in front of the other; the last one put in is asked
first.

Source: none; Linux has fault injection for its own functions (lib/fault-inject.c), not for these.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.journal import Field, Fields, Journalled
from tdxlab.kvm.host import Hardware, KvmHost
from tdxlab.steps import Operation

#: A SEAMCALL's RAX has the leaf in its low half word, and the leaf's version above it.
LEAF_MASK = 0xFFFF


class Between(Journalled):
    """Hardware that passes everything on to the one behind it. Subclasses change something.

    host: whose calls go through it. behind: what it stands in front of.
    """

    def __init__(self, host: KvmHost) -> None:
        self.host = host
        self.journal = host.journal
        self.fields = Fields(host.journal, self)
        self._put_in_front_of(host.hardware)

    def _put_in_front_of(self, hardware: Hardware) -> None:
        self.behind = hardware
        self.memory, self.cpu = hardware.memory, hardware.cpu
        self.platform = hardware.platform

    def __enter__(self) -> Self:
        self._put_in_front_of(self.host.hardware)
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
        """As the hardware behind."""
        return self.behind.seamcall_steps(lp, rax, registers)

    def store(self, hpa: int, data: bytes) -> None:
        """As the hardware behind."""
        self.behind.store(hpa, data)

    def clear(self, hpa: int) -> None:
        """As the hardware behind."""
        self.behind.clear(hpa)

    def kick(self, lp: int) -> GuestOutcome:
        """As the hardware behind."""
        return self.behind.kick(lp)


class Nth(Journalled):
    """Counts calls of one kind, and says which of them shall fail.

    n: the first call that fails, from 1, counted since this was made. count: how many calls in a
    row fail; None for all from the n-th on. calls: so far, the failed ones among them.
    is_armed: asked at each call; where it says no, the call is neither counted nor failed.
    The counter is journalled: a rewind takes it back.
    """

    calls = Field(0)
    n = 1
    count: int | None = 1
    is_armed: Callable[[], bool] | None = None

    def choose(self, n: int, count: int | None) -> None:
        """Say which calls fail. Refuses n or count below 1: ValueError."""
        if n < 1:
            raise ValueError(f"call {n}; calls of a leaf are counted from 1")
        if count is not None and count < 1:
            raise ValueError(f"{count} calls; choose 1 or more, or None for all from call {n} on")
        self.n, self.count = n, count

    @property
    def answered(self) -> int:
        """Calls that failed on purpose."""
        failed = max(0, self.calls - self.n + 1)
        return failed if self.count is None else min(failed, self.count)

    def strikes(self) -> bool:
        """Count one call; True if it is one that shall fail."""
        if self.is_armed is not None and not self.is_armed():
            return False
        before = self.answered
        self.calls += 1
        return self.answered > before


class FailNth(Nth, Between):
    """Hardware whose module refuses some calls of one leaf.

    leaf: number. n, count: which calls, as for `Nth`. status: u64 in RAX; 0 makes KVM believe that
    a call was done that was not.
    Refuses n or count below 1, and a status that is no u64: ValueError.
    Differs: a refused call leaves all registers as they are, where the module writes some.
    """

    def __init__(
        self, host: KvmHost, leaf: int, *, n: int = 1, status: int, count: int | None = 1
    ) -> None:
        self.choose(n, count)
        if not 0 <= status < 1 << 64:
            raise ValueError(f"status {status:#x} does not fit RAX; choose 0 to {(1 << 64) - 1:#x}")
        super().__init__(host)
        self.leaf, self.status = leaf, status

    def seamcall_steps(self, lp: int, rax: int, registers: Registers) -> Operation:
        """As the hardware behind, unless the call is one that shall fail."""
        if rax & LEAF_MASK == self.leaf and self.strikes():
            return self.status
        return (yield from self.behind.seamcall_steps(lp, rax, registers))
