"""CPUID configuration: which bits of the virtual CPUID a host may choose when it makes a TD.

TD_PARAMS carries twelve entries of EAX, EBX, ECX, EDX in the order of `CPUID_CONFIGURABLE`; a bit
that is 0 in the mask must be 0 in the entry. TDH.SYS.INFO and TDH.SYS.RD print this same table.

Source: TDX module 1.5.01, tdh_mng_init.c, tdh_sys_info.c; tdx_api_defs.h for the field code.
Differs: of the module's masks only this much is known: bits 2:0 of EDX (cache topology) of leaf 4
are configurable, bit 0 of leaf 1 EAX is not. Every other bit is refused here, although the real
module lets the host choose many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdxlab.bits import Bits, Word

#: What stands for the sub-leaf of a leaf that has none.
NO_SUB_LEAF = 0xFFFF_FFFF

_EXTENDED_LEAVES = 0x8000_0000
_CACHE_TOPOLOGY = 0b111


class LeafAndSubLeaf(Word):
    """How the module names a CPUID leaf in one 64-bit word."""

    leaf = Bits(31, 0)
    sub_leaf = Bits(63, 32)


class RegisterPair(Word):
    """Two CPUID registers in one 64-bit word: EAX and EBX, or ECX and EDX."""

    first = Bits(31, 0)
    second = Bits(63, 32)


class CpuidCode(Word):
    """The field code of a CPUID value: leaf and sub-leaf squeezed into 17 bits.

    Differs: whether the module sets the bits of `sub_leaf` where there is none is not known; here
    they are zero.
    """

    element = Bits(0)
    sub_leaf = Bits(7, 1)
    no_sub_leaf = Bits(8)
    leaf = Bits(15, 9)
    extended = Bits(16)


class CpuidEntry(NamedTuple):
    """One leaf and sub-leaf, with the mask of configurable bits of each register."""

    leaf: int
    sub_leaf: int = NO_SUB_LEAF
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    @property
    def masks(self) -> tuple[int, int, int, int]:
        """The configurable bits of EAX, EBX, ECX, EDX."""
        return self.eax, self.ebx, self.ecx, self.edx

    @property
    def name(self) -> int:
        """Leaf in bits 31:0, sub-leaf in bits 63:32."""
        return LeafAndSubLeaf(0).with_(leaf=self.leaf, sub_leaf=self.sub_leaf)

    @property
    def field_code(self) -> int:
        """Code of the first of the two metadata elements of this leaf."""
        code = CpuidCode(0).with_(
            leaf=self.leaf & ~_EXTENDED_LEAVES, extended=bool(self.leaf & _EXTENDED_LEAVES)
        )
        if self.sub_leaf == NO_SUB_LEAF:
            return code.with_(no_sub_leaf=1)
        return code.with_(sub_leaf=self.sub_leaf)

    @property
    def pairs(self) -> tuple[int, int]:
        """The masks as two words: EAX and EBX, ECX and EDX."""
        return (
            RegisterPair(0).with_(first=self.eax, second=self.ebx),
            RegisterPair(0).with_(first=self.ecx, second=self.edx),
        )


CPUID_CONFIGURABLE: tuple[CpuidEntry, ...] = (
    CpuidEntry(0x1),
    CpuidEntry(0x4, 0, edx=_CACHE_TOPOLOGY),
    CpuidEntry(0x4, 1, edx=_CACHE_TOPOLOGY),
    CpuidEntry(0x4, 2, edx=_CACHE_TOPOLOGY),
    CpuidEntry(0x4, 3, edx=_CACHE_TOPOLOGY),
    CpuidEntry(0x7, 0),
    CpuidEntry(0x7, 1),
    CpuidEntry(0xA),
    CpuidEntry(0x1C),
    CpuidEntry(0x8000_0008),
    CpuidEntry(0x7, 2),
    CpuidEntry(0x23, 0),
)


def check_config(words: Sequence[tuple[int, int, int, int]]) -> int | None:
    """The first entry that sets a bit which is not configurable, None if all are legal.

    words: EAX, EBX, ECX, EDX (u32 each) of the twelve entries, in the table's order.
    Returns leaf | sub-leaf << 32, which TDH.MNG.INIT puts into RCX.
    """
    for entry, values in zip(CPUID_CONFIGURABLE, words, strict=True):
        if any(value & ~mask for value, mask in zip(values, entry.masks, strict=True)):
            return entry.name
    return None
