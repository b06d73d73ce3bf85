"""A call that would succeed, and how to spoil it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from leafbench import (
    ENTRY_LOCKED,
    ENTRY_WANTED,
    KEYID_SHIFT,
    RAW,
    RESERVED,
    SIZE_2M,
    Bench,
    BuiltTd,
)

from tdxlab.abi.registers import Registers
from tdxlab.abi.status import describe
from tdxlab.journal import Words

#: A GPA whose walk ends at the root table: nothing is mapped near it.
FAR = 0x80_0000_0000


class Case:
    """One call that would succeed. clears: registers that the leaf zeroes before its checks. hpa: a
    page that the call is about and no register names.
    """

    def __init__(
        self,
        bench: Bench,
        td: BuiltTd | None,
        leaf: int,
        clears: Iterable[str] = (),
        *,
        lp: int = 0,
        version: int = 0,
        **registers: int,
    ) -> None:
        self.bench, self.leaf, self._td = bench, leaf, td
        self.clears, self.lp, self.version = tuple(clears), lp, version
        self.registers = dict(registers)
        self.hpa = 0

    @property
    def td(self) -> BuiltTd:
        """The TD that the call is about."""
        assert self._td is not None
        return self._td

    def call(self) -> tuple[int, Registers]:
        return self.bench.call(self.leaf, lp=self.lp, version=self.version, **self.registers)

    def succeed(self) -> Registers:
        status, values = self.call()
        assert status == 0, describe(status)
        return values

    def get(self, register: str) -> int:
        return self.registers.get(register, 0)


class Held(NamedTuple):
    """A lock word that somebody else holds: how it was, and how a failed attempt must leave it."""

    words: Words
    word: int
    before: int
    after: int


Spoil = Callable[[Case], Held | None]


def register(name: str, value: int) -> Spoil:
    """Another value in a register."""

    def spoil(case: Case) -> None:
        case.registers[name] = value

    return spoil


def bits(name: str, value: int) -> Spoil:
    """More bits in a register."""

    def spoil(case: Case) -> None:
        case.registers[name] = case.get(name) | value

    return spoil


def level(value: int) -> Spoil:
    """Another level in RCX."""

    def spoil(case: Case) -> None:
        case.registers["rcx"] = case.get("rcx") & ~7 | value

    return spoil


def version(value: int) -> Spoil:
    def spoil(case: Case) -> None:
        case.version = value

    return spoil


def tdr_field(word: int, value: int) -> Spoil:
    def spoil(case: Case) -> None:
        case.bench.words.put(case.td.tdr_word(word), value)

    return spoil


def tdcs_field(word: int, value: int) -> Spoil:
    def spoil(case: Case) -> None:
        case.bench.words.put(case.td.tdcs_word(word), value)

    return spoil


def vcpu_field(word: int, value: int) -> Spoil:
    def spoil(case: Case) -> None:
        case.bench.words.put(case.td.vcpu_word(word), value)

    return spoil


def condition(name: str, value: Any) -> Spoil:
    def spoil(case: Case) -> None:
        setattr(case.bench.conditions, name, value)

    return spoil


def hold(words: Words, index: int, value: int, after: int) -> Held:
    """Somebody else holds the lock in the low 16 bits of a word."""
    rest = words.view[index] & ~0xFFFF
    words.put(index, rest | value)
    return Held(words, index, rest | value, rest | after)


def pamt_lock(name: str, size: int, value: int, after: int) -> Spoil:
    """The PAMT entry of `size` over the page that a register names is held."""

    def spoil(case: Case) -> Held:
        pamt = case.bench.machine.module.pamt
        hpa = case.get(name) & ((1 << KEYID_SHIFT) - 1)
        open_hpa = hpa if hpa >> 30 in pamt.blocks else RESERVED
        return hold(pamt.words, pamt.entry(open_hpa, size), value, after)

    return spoil


def page_lock(size: int, value: int, after: int) -> Spoil:
    """The PAMT entry of `size` over the case's own page is held."""

    def spoil(case: Case) -> Held:
        pamt = case.bench.machine.module.pamt
        return hold(pamt.words, pamt.entry(case.hpa, size), value, after)

    return spoil


def tdcs_lock(word: int, value: int, after: int) -> Spoil:
    def spoil(case: Case) -> Held:
        return hold(case.bench.words, case.td.tdcs_word(word), value, after)

    return spoil


def entry_lock(case: Case) -> Held:
    """The S-EPT entry is locked; a host that fails leaves its wish in bit 52."""
    words = case.bench.words
    gpa, at = case.get("rcx") & 0xF_FFFF_FFFF_F000, case.get("rcx") & 7
    index, _ = case.td.locate(gpa, at)
    locked = words.view[index] | ENTRY_LOCKED
    words.put(index, locked)
    return Held(words, index, locked, locked | ENTRY_WANTED)


def entry_state(name: str) -> Spoil:
    """The S-EPT entry is in another state, its address as it was."""

    def spoil(case: Case) -> None:
        gpa, at = case.get("rcx") & 0xF_FFFF_FFFF_F000, case.get("rcx") & 7
        index, _ = case.td.locate(gpa, at)
        hpa = 0 if name == "FREE" else case.bench.words.view[index] & 0xF_FFFF_FFFF_F000
        case.bench.words.put(index, RAW[name] | hpa)

    return spoil


def misaligned(lowest: int, highest: int) -> Spoil:
    def spoil(case: Case) -> None:
        at = max(lowest, 1) if highest else 0
        case.registers["rcx"] = (case.get("rcx") & -SIZE_2M) | 0x1000 | at

    return spoil


def far(case: Case) -> None:
    case.registers["rcx"] = FAR | case.get("rcx") & 7
