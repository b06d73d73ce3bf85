"""One SEAMCALL in flight: its registers, the locks it holds, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_SUCCESS
from tdxlab.journal import Words

if TYPE_CHECKING:
    from tdxlab.seam.module import Module

#: How to let go of a lock, where it is, and which (an index, or several).
Release = Callable[[Words, Any], None]
Lock = tuple[Release, Words, Any]


class Refused(Exception):
    """A check failed: the leaf ends with `status`. rcx, rdx: extended information, None to leave
    the registers alone.

    Raised on refusals only; a call that succeeds pays nothing for it.
    """

    def __init__(self, status: int, rcx: int | None = None, rdx: int | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.rcx = rcx
        self.rdx = rdx


class ModuleFatal(Exception):
    """The real module would halt here. The machine's module is dead from now on; `reason` says
    why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the TDX module halted: {reason}")
        self.reason = reason


class Call:
    """What every check and leaf is given.

    module: the machine's TDX module. lp: the calling logical processor. leaf, version: from RAX.
    registers: in and out. status: RAX when the leaf has ended; a leaf whose success has a shade
    sets it. locks: held, in the order taken; the module releases them when the leaf ends.
    """

    __slots__ = ("leaf", "locks", "lp", "module", "registers", "status", "version")

    def __init__(
        self, module: Module, lp: int, leaf: int, version: int, registers: Registers
    ) -> None:
        self.module = module
        self.lp = lp
        self.leaf = leaf
        self.version = version
        self.registers = registers
        self.locks: list[Lock] = []
        self.status = TDX_SUCCESS

    def refuse(self, refusal: Refused) -> None:
        """The leaf ends with a refusal: its status, and its extended information if it has some."""
        self.status = refusal.status
        if refusal.rcx is not None:
            self.registers.rcx = refusal.rcx
        if refusal.rdx is not None:
            self.registers.rdx = refusal.rdx

    def release_all(self) -> None:
        """Let go of every lock, the last one first. The call is over then."""
        for release, words, which in reversed(self.locks):
            release(words, which)

    def keep(self, kept: list[Lock]) -> None:
        """Leave these locks held when the leaf ends."""
        for lock in kept:
            self.locks.remove(lock)
