"""What a machine is made of, before anything runs: RAM, CMRs, KeyIDs, packages.

One frozen `Platform` describes the hardware that every other file is told about; `default_platform`
is a small one for a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tdxlab.arch import MAX_PA_BITS, PAGE_SIZE, SIZE_1G

#: Extended state components of the CPU that the traces were recorded with, inferred from what they
#: accept and refuse: all that a TD may be given but user interrupts (bit 14).
RECORDED_XFAM = 0x69BE7


class Region(NamedTuple):
    """A range of physical memory: `base` and `size` in bytes."""

    base: int
    size: int

    @property
    def end(self) -> int:
        """First byte address behind the range."""
        return self.base + self.size

    def overlaps(self, base: int, size: int) -> bool:
        """True if the `size` bytes at `base` share a byte with this range."""
        return base < self.end and base + size > self.base


class TdmrPlan(NamedTuple):
    """One trust-domain memory region as the host will configure it.

    base, size: bytes, multiples of 1 GiB. reserved: ranges that the module must not use, as (offset
    from base, size).
    """

    base: int
    size: int
    reserved: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Platform:
    """The hardware of one machine.

    low_memory: RAM for the host alone; parameters and source pages lie there.
    cmrs: convertible memory regions, which may become TDMRs. tdmrs: the host's plan for them.
    pamt_region: HPA from which on the host puts the PAMTs, one behind the other.
    keyid_bits: width of the KeyID field at the top of a 52-bit address. private_keyids: lowest and
    highest private KeyID.
    global_keyid: the private KeyID that the module keeps for itself.
    seamrr: the range that holds the module. package_of: package of each LP.
    native_xfam: extended state components that the CPU has.
    wbinvd_sub_blocks: pieces into which TDH.PHYMEM.CACHE.WB splits its work. native_cpuid_1_eax:
    CPUID(1).EAX, family, model and stepping of every package.
    """

    low_memory: Region
    cmrs: tuple[Region, ...]
    tdmrs: tuple[TdmrPlan, ...]
    pamt_region: int
    seamrr: Region
    keyid_bits: int = 6
    private_keyids: tuple[int, int] = (32, 63)
    global_keyid: int = 32
    max_pa_bits: int = MAX_PA_BITS
    package_of: tuple[int, ...] = (0, 0, 1, 1)
    wbinvd_sub_blocks: int = 2
    native_xfam: int = RECORDED_XFAM
    native_cpuid_1_eax: int = 0

    def __post_init__(self) -> None:
        low, high = self.private_keyids
        if not 0 < low <= high < 1 << self.keyid_bits:
            raise ValueError(
                f"private KeyIDs {low}..{high} do not fit {self.keyid_bits} KeyID bits; "
                f"choose 1..{(1 << self.keyid_bits) - 1}"
            )
        for region in (self.low_memory, *self.cmrs):
            if region.base % PAGE_SIZE or region.size % PAGE_SIZE or region.size <= 0:
                raise ValueError(
                    f"memory at {region.base:#x}, {region.size:#x} bytes: base and size must be "
                    f"multiples of {PAGE_SIZE}, size above 0"
                )

    @property
    def ram(self) -> tuple[Region, ...]:
        """All RAM: low memory, then the CMRs."""
        return (self.low_memory, *self.cmrs)

    @property
    def hpa_mask(self) -> int:
        """The address bits of a physical address, without its KeyID."""
        return (1 << (MAX_PA_BITS - self.keyid_bits)) - 1

    @property
    def packages(self) -> int:
        """Number of packages."""
        return max(self.package_of) + 1


def default_platform(
    *, tdmr_gib: int = 1, lps: int = 4, packages: int = 2, wbinvd_sub_blocks: int = 2
) -> Platform:
    """A machine for a class: low memory of 1 GiB, one TDMR of `tdmr_gib` GiB at 4 GiB, its PAMT
    behind it.

    lps: 1 to 256 logical processors, spread evenly over `packages` (1 to 8).
    Refuses sizes or numbers out of range: ValueError.
    """
    if not 1 <= tdmr_gib <= 1 << 14:
        raise ValueError(f"a TDMR of {tdmr_gib} GiB; choose 1 to {1 << 14}")
    if not 1 <= packages <= min(lps, 8) or lps > 256:
        raise ValueError(f"{lps} LPs in {packages} packages; choose 1..256 LPs and 1..8 packages")
    base = 4 * SIZE_1G
    tdmr_size = tdmr_gib * SIZE_1G
    pamt_size = (tdmr_gib + 1) * 5 * (1 << 20)
    return Platform(
        low_memory=Region(0, SIZE_1G),
        cmrs=(Region(base, tdmr_size + pamt_size),),
        tdmrs=(TdmrPlan(base, tdmr_size),),
        pamt_region=base + tdmr_size,
        seamrr=Region(base + tdmr_size + pamt_size, 1 << 25),
        package_of=tuple(lp * packages // lps for lp in range(lps)),
        wbinvd_sub_blocks=wbinvd_sub_blocks,
    )
