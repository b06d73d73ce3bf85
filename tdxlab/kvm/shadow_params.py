"""What a VM with shadow paging is made with: its host's CPU and memory, and how its roots are made.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c (kvm_configure_mmu); arch/x86/include/asm/kvm_host.h
(union kvm_mmu_page_role).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE
from tdxlab.bits import Bits
from tdxlab.hardware import Region
from tdxlab.kvm.pae_pdpte import require_maxphyaddr
from tdxlab.kvm.role import Role

# -- what the root of a PAE shadow MMU is made of

SPECIAL = "special root"
RFC = "RFC"
REVIEWED = "RFC as reviewed"
DESIGNS = (SPECIAL, RFC, REVIEWED)

INTEL, AMD = "Intel", "AMD"
VENDORS = (INTEL, AMD)

#: Who translates with the tables that KVM makes.
SHADOW, NPT, NESTED = "shadow paging", "NPT of a 32-bit host", "nested NPT"
USES = (SHADOW, NPT, NESTED)


class ShadowRole(Role):
    """A page role with the two bits of the RFC.

    Differs: they take two of the four bits that Linux 6.16 has free, not those that the RFC took.
    """

    level_promoted = Bits(20)
    pae_root = Bits(21)


#: Steps that an experiment can leave out.
FORGETTABLE = ("decrypt", "clear role")

#: The lowest C-bit that leaves room for the addresses of `MemoryMap`.
MIN_C_BIT = 34


@dataclass(frozen=True)
class ShadowParams:
    """What a host and a VM are made with.

    maxphyaddr: 36 to 52, for the host's CPU and the guest's alike. c_bit: number of the address bit
    that means encrypted (SME), None without; below maxphyaddr. vendor: INTEL or AMD. design: of
    DESIGNS. use: of USES: who walks the tables. tdp_level: levels of the host's NPT when nested, 4
    or 5. kicks: a remote flush makes vCPUs leave the guest. pdptes_in_key: a PAE guest's root with
    a header is found by its PDPTEs too, not by gfn and role alone. forget: FORGETTABLE steps that
    KVM leaves out.
    Refuses a combination that does not exist: ValueError.
    """

    maxphyaddr: int = 46
    c_bit: int | None = None
    vendor: str = INTEL
    design: str = SPECIAL
    use: str = SHADOW
    tdp_level: int = 4
    kicks: bool = True
    pdptes_in_key: bool = True
    forget: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        require_maxphyaddr(self.maxphyaddr)
        for name, value, choices in (
            ("vendor", self.vendor, VENDORS),
            ("design", self.design, DESIGNS),
            ("use", self.use, USES),
            ("tdp_level", self.tdp_level, (4, 5)),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r}; choose from {', '.join(map(str, choices))}")
        unknown = self.forget - set(FORGETTABLE)
        if unknown:
            raise ValueError(f"KVM has no step {min(unknown)!r}; choose from {FORGETTABLE}")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.c_bit is not None and not MIN_C_BIT <= self.c_bit < self.maxphyaddr:
            raise ValueError(
                f"C-bit {self.c_bit}; it is an address bit: choose {MIN_C_BIT} to "
                f"{self.maxphyaddr - 1}, or None"
            )
        if self.vendor == INTEL and (self.use != SHADOW or self.c_bit is not None):
            raise ValueError("NPT and the C-bit are AMD's; choose vendor=AMD, or neither of them")
        if self.use == NPT and self.c_bit is not None:
            raise ValueError("a 32-bit host has no SME; choose c_bit=None")
        if self.use == NESTED and self.design != SPECIAL:
            raise ValueError(
                "the RFC adds no PAE root to NPT of 4 or 5 levels; choose design=SPECIAL"
            )

    @property
    def me_value(self) -> int:
        """shadow_me_value: what KVM sets in an entry to have memory encrypted."""
        return 0 if self.c_bit is None else 1 << self.c_bit

    @property
    def tdp_enabled(self) -> bool:
        """The CPU walks two kinds of tables, and KVM makes those of the second."""
        return self.use != SHADOW


class MemoryMap(NamedTuple):
    """Where things lie in the host's memory.

    kernel: of the kernel image: its first page is the zero page. dma32, normal: KVM's free pages.
    guest: the guest's memory; gfn 0 lies at its beginning.
    """

    kernel: Region = Region(0x10_0000, PAGE_SIZE)
    dma32: tuple[Region, ...] = (Region(0x7F3A_5000, 64 * PAGE_SIZE),)
    normal: tuple[Region, ...] = (Region(0x1_4000_1000, 1024 * PAGE_SIZE),)
    guest: Region = Region(0x1_0000_0000, 1024 * PAGE_SIZE)
