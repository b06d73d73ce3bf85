"""The general registers that a SEAMCALL or a TDCALL reads and writes.

RAX is not among them: it carries the leaf number in and the completion status out, and the model
passes both as plain ints. RSP is not there either: no leaf takes it, and TDG.VP.VMCALL refuses it.

Source: Linux 6.16, arch/x86/include/asm/shared/tdx.h, struct tdx_module_args; TDX module 1.5.01,
tdg_vp_vmcall.c.
Differs: Linux's structure has no RBP; TDG.VP.VMCALL can pass it to the host, so it is here.
"""

from __future__ import annotations

from operator import attrgetter

from tdxlab.bits import MASK64

__all__ = ["MASK64", "NULL_PA", "REGISTER_NAMES", "Registers"]

#: "No page": what the module takes and returns where an address operand is absent.
NULL_PA = MASK64

REGISTER_NAMES = (
    "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rbx", "rbp", "rsi", "rdi",
)  # fmt: skip

_values = attrgetter(*REGISTER_NAMES)
_in_encoding_order = attrgetter(
    *("rcx", "rdx", "rbx", "rbp", "rsi", "rdi"), *(f"r{number}" for number in range(8, 16))
)


class Registers:
    """One set of register values, for input and output alike; every value an int, 0..2**64 - 1.

    Values are stored as given: whoever computes one masks it with MASK64.
    """

    __slots__ = REGISTER_NAMES

    def __init__(
        self,
        rcx: int = 0,
        rdx: int = 0,
        r8: int = 0,
        r9: int = 0,
        r10: int = 0,
        r11: int = 0,
        r12: int = 0,
        r13: int = 0,
        r14: int = 0,
        r15: int = 0,
        rbx: int = 0,
        rbp: int = 0,
        rsi: int = 0,
        rdi: int = 0,
    ) -> None:
        self.rcx = rcx
        self.rdx = rdx
        self.r8 = r8
        self.r9 = r9
        self.r10 = r10
        self.r11 = r11
        self.r12 = r12
        self.r13 = r13
        self.r14 = r14
        self.r15 = r15
        self.rbx = rbx
        self.rbp = rbp
        self.rsi = rsi
        self.rdi = rdi

    def as_dict(self) -> dict[str, int]:
        """Every register by name, zeros included, in the order of REGISTER_NAMES."""
        return dict(zip(REGISTER_NAMES, _values(self), strict=True))

    def gprs(self, rax: int) -> list[int]:
        """The 16 general registers in the order of the CPU's encoding: RAX, RCX, RDX, RBX, RSP (0),
        RBP, RSI, RDI, R8 to R15.
        """
        rcx, rdx, rbx, rbp, rsi, rdi, *numbered = _in_encoding_order(self)
        return [rax, rcx, rdx, rbx, 0, rbp, rsi, rdi, *numbered]

    def nonzero(self) -> tuple[tuple[str, int], ...]:
        """(name, value) of every register that is not zero."""
        return tuple(pair for pair in zip(REGISTER_NAMES, _values(self), strict=True) if pair[1])

    def assign(self, other: Registers) -> None:
        """Take over every value of `other`."""
        for name in REGISTER_NAMES:
            setattr(self, name, getattr(other, name))

    def copy(self) -> Registers:
        """A new set with the same values."""
        return Registers(*_values(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Registers):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:#x}" for name, value in self.as_dict().items() if value)
        return f"Registers({shown})"
