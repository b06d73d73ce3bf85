"""A guest physical address taken apart: the shared bit, the gfn, the root, an index for each level.

`split(gpa, gpaw)` is what the CPU and KVM make of one GPA; the tables below say the same of whole
halves, levels and kinds of VM. Levels are KVM's here: 1 holds 4 KiB entries.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu_internal.h, kvm_mmu_do_page_fault (addr, gfn); mmu.h,
kvm_is_addr_direct (root); mmu/tdp_iter.c (index); vmx/common.h, __vmx_handle_ept_violation
(PFERR_PRIVATE_ACCESS); x86.c, kvm_arch_prepare_memory_region (slots).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tdxlab.abi.structs import CONFIG_FLAGS_GPAW_52, EPTP_4_LEVELS, EPTP_5_LEVELS
from tdxlab.arch import (
    ENTRIES_PER_TABLE,
    GPAW_CHOICES,
    LEVEL_BITS,
    PAGE_OFFSET_MASK,
    PAGE_SHIFT,
    SEPT_LEVEL_NAMES,
    level_shift,
    level_size,
    sept_levels,
    shared_bit,
    table_index,
)
from tdxlab.kvm.params import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    KVM_X86_TDX_VM,
    VM_FEATURES,
    VM_TYPE_NAMES,
    MmuParams,
    gfn_shared_bit,
)
from tdxlab.kvm.role import IS_MIRROR, tdp_root_role
from tdxlab.seam.params import are_eptp_controls_legal

PRIVATE, SHARED = "private", "shared"
SECURE_EPT, SHARED_EPT = "Secure EPT", "shared EPT"
MIRROR, DIRECT = "mirror", "direct"

#: A gfn to talk about, and a byte in its page.
EXAMPLE_GFN = 0x12345
EXAMPLE_GPA = EXAMPLE_GFN << PAGE_SHIFT | 0x678

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class Split:
    """One GPA of a TD. gpa: byte address, shared bit included. gpaw: 48 or 52."""

    gpa: int
    gpaw: int

    @property
    def shared_mask(self) -> int:
        """The shared bit, as a bit of a GPA."""
        return 1 << shared_bit(self.gpaw)

    @property
    def is_shared(self) -> bool:
        """True if the shared bit is set."""
        return bool(self.gpa & self.shared_mask)

    @property
    def half(self) -> str:
        """The half of the GPA space it lies in, PRIVATE or SHARED."""
        return SHARED if self.is_shared else PRIVATE

    @property
    def table(self) -> str:
        """The table that the CPU walks for it."""
        return SHARED_EPT if self.is_shared else SECURE_EPT

    @property
    def offset(self) -> int:
        """Byte in its 4 KiB page, which the host is not told."""
        return self.gpa & PAGE_OFFSET_MASK

    @property
    def addr(self) -> int:
        """`fault->addr`: the GPA as the host gets it, page aligned, shared bit included."""
        return self.gpa & ~PAGE_OFFSET_MASK

    @property
    def gfn(self) -> int:
        """`fault->gfn`: the frame number, shared bit removed."""
        return self.gpa >> PAGE_SHIFT & ~gfn_shared_bit(self.gpaw)

    @property
    def raw_gfn(self) -> int:
        """The frame number with the shared bit: what is looked up in the root."""
        return self.gpa >> PAGE_SHIFT

    @property
    def root(self) -> str:
        """The root that KVM walks for it, MIRROR or DIRECT."""
        return DIRECT if self.is_shared else MIRROR

    @property
    def role(self) -> int:
        """Role of that root, on a CPU with accessed and dirty bits."""
        return tdp_root_role(self.levels, ad_bits=True) | (0 if self.is_shared else IS_MIRROR)

    @property
    def levels(self) -> int:
        """Levels of both tables."""
        return sept_levels(self.gpaw)

    @property
    def alias(self) -> int:
        """The same gfn's address in the other half."""
        return self.gpa ^ self.shared_mask

    def index(self, level: int) -> int:
        """Index (0..511) in the table that holds entries of a level. level: 1..levels."""
        return table_index(self.gpa, level - 1)

    def with_index(self, level: int, index: int) -> Split:
        """The GPA that differs in one index. Refuses an index beyond `last_index`: ValueError."""
        last = last_index(self.gpaw, level)
        if not 0 <= index <= last:
            raise ValueError(f"index {index} at level {level}; GPAW {self.gpaw} allows 0..{last}")
        shift = level_shift(level - 1)
        return Split(self.gpa + ((index - self.index(level)) << shift), self.gpaw)


def split(gpa: int, gpaw: int) -> Split:
    """Take a GPA apart. gpa: byte address; gpaw: 48 or 52.

    Refuses a GPA that the guest cannot form, and any other width: ValueError.
    """
    shared_bit(gpaw)
    if not 0 <= gpa < 1 << gpaw:
        raise ValueError(
            f"{gpa:#x} is not an address of this guest; allowed are 0..{(1 << gpaw) - 1:#x} "
            f"(GPAW {gpaw})"
        )
    return Split(gpa, gpaw)


def last_index(gpaw: int, level: int) -> int:
    """The greatest index that a GPA has at a level: 511, less in a root that is not full."""
    return min(ENTRIES_PER_TABLE - 1, ((1 << gpaw) - 1) >> level_shift(level - 1))


def level_name(level: int) -> str:
    """What an entry of a KVM level covers or is called: "4K" for 1, ... "PML5" for 5."""
    return SEPT_LEVEL_NAMES[level - 1]


def bit_range(gpaw: int, level: int) -> tuple[int, int]:
    """(highest, lowest) bit of a GPA that the index at a level is made of."""
    low = level_shift(level - 1)
    return min(low + LEVEL_BITS, gpaw) - 1, low


def size_text(size: int) -> str:
    """A power of two in bytes, in the unit that keeps it small: "512 GiB"."""
    power = size.bit_length() - 1
    unit = min(power // 10, len(_UNITS))
    return f"{size >> 10 * unit} {_UNITS[unit - 1]}"


def eptp_controls(levels: int) -> int:
    """EPTP_CONTROLS of TD_PARAMS for that many levels, 4 or 5."""
    return EPTP_4_LEVELS if levels == 4 else EPTP_5_LEVELS


def config_flags(gpaw: int) -> int:
    """CONFIG_FLAGS of TD_PARAMS for that width, 48 or 52."""
    return CONFIG_FLAGS_GPAW_52 if gpaw == 52 else 0


# -- tables


class SplitRow(NamedTuple):
    """One GPA taken apart; the names are those of `Split`."""

    gpa: int
    half: str
    cpu_walks: str
    fault_addr: str
    fault_gfn: str
    kvm_root: str
    looked_up: str


def split_rows(gpas: Iterable[int], gpaw: int) -> list[SplitRow]:
    """Some GPAs of a guest."""
    parts = [split(gpa, gpaw) for gpa in gpas]
    return [
        SplitRow(p.gpa, p.half, p.table, f"{p.addr:#x}", f"{p.gfn:#x}", p.root, f"{p.raw_gfn:#x}")
        for p in parts
    ]


class HalfRow(NamedTuple):
    """One half of the GPA space at one width."""

    gpaw: int
    half: str
    first_gpa: str
    last_gpa: str
    size: str
    table: str


def half_rows() -> list[HalfRow]:
    """Both halves at both widths."""
    rows = []
    for gpaw in GPAW_CHOICES:
        size = 1 << shared_bit(gpaw)
        for first in (0, size):
            at = Split(first, gpaw)
            last = f"{first + size - 1:#x}"
            rows.append(HalfRow(gpaw, at.half, f"{first:#x}", last, size_text(size), at.table))
    return rows


class LevelRow(NamedTuple):
    """One level of the tables. gpa_bits: those of its index; private, shared: the indices that
    lead into each half.
    """

    level: int
    name: str
    gpa_bits: str
    covers: str
    private: str
    shared: str


def level_rows(gpaw: int) -> list[LevelRow]:
    """The levels of a TD's tables, the root's first."""
    rows = []
    for level in range(sept_levels(gpaw), 0, -1):
        high, low = bit_range(gpaw, level)
        last = last_index(gpaw, level)
        private = shared = f"0..{last}"
        if high == shared_bit(gpaw):
            half = (last + 1) // 2
            private, shared = f"0..{half - 1}", f"{half}..{last}"
        size = size_text(level_size(level - 1))
        rows.append(LevelRow(level, level_name(level), f"{high}:{low}", size, private, shared))
    return rows


class WalkRow(NamedTuple):
    """Indices of one gfn at one level, in both halves."""

    level: int
    name: str
    private_index: int
    shared_index: int


def walk_rows(gfn: int, gpaw: int) -> list[WalkRow]:
    """The two ways to one gfn, the root's entry first. Refuses a gfn with a shared bit or beyond
    it: ValueError.
    """
    if not 0 <= gfn < gfn_shared_bit(gpaw):
        last = gfn_shared_bit(gpaw) - 1
        raise ValueError(f"gfn {gfn:#x}; KVM's gfns of this TD are 0..{last:#x}")
    private = split(gfn << PAGE_SHIFT, gpaw)
    shared = split(private.alias, gpaw)
    return [
        WalkRow(level, level_name(level), private.index(level), shared.index(level))
        for level in range(private.levels, 0, -1)
    ]


class VmRow(NamedTuple):
    """What one number is in one VM. private: what makes an access private there."""

    vm: str
    gfn_direct_bits: str
    fault_addr: str
    fault_gfn: str
    root: str
    private: str


def vm_rows(gpa: int) -> list[VmRow]:
    """The same page-aligned GPA in VMs of every type, TDs of both widths."""
    page = gpa & ~PAGE_OFFSET_MASK
    plain = (KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM)
    return [_plain_row(vm_type, page) for vm_type in plain] + [
        _td_row(gpaw, page) for gpaw in GPAW_CHOICES
    ]


def _plain_row(vm_type: int, page: int) -> VmRow:
    """A VM without direct bits: every address is looked up in the direct root."""
    private = "by attribute" if VM_FEATURES[vm_type].has_private_mem else "never"
    name, gfn = VM_TYPE_NAMES[vm_type], f"{page >> PAGE_SHIFT:#x}"
    return VmRow(name, "0x0", f"{page:#x}", gfn, DIRECT, private)


def _td_row(gpaw: int, page: int) -> VmRow:
    name, bits = f"{VM_TYPE_NAMES[KVM_X86_TDX_VM]}, GPAW {gpaw}", f"{gfn_shared_bit(gpaw):#x}"
    if page >> gpaw:
        return VmRow(name, bits, "-", "-", "-", "#PF in the guest")
    at = split(page, gpaw)
    private = "no: shared bit set" if at.is_shared else "yes: shared bit clear"
    return VmRow(name, bits, f"{at.addr:#x}", f"{at.gfn:#x}", at.root, private)


class ReachRow(NamedTuple):
    """What a host's MAXPHYADDR means for a TD. shared_gfn: where the shared half begins in the
    direct root. whole_walk: whether a walk over the whole root gets there. last_slot_gfn: the
    greatest gfn that a memslot can have.
    """

    maxphyaddr: int
    max_gfn: str
    shared_gfn: str
    whole_walk: str
    last_slot_gfn: str


def reach_row(maxphyaddr: int, gpaw: int) -> ReachRow:
    """One host. maxphyaddr: 36..52."""
    max_gfn, shared = MmuParams(maxphyaddr=maxphyaddr).max_gfn, gfn_shared_bit(gpaw)
    reached = "reaches it" if max_gfn >= shared else "stops below"
    last = last_slot_gfn(maxphyaddr, gpaw)
    return ReachRow(maxphyaddr, f"{max_gfn:#x}", f"{shared:#x}", reached, f"{last:#x}")


def reach_rows(gpaw: int, widths: tuple[int, ...] = (46, 47, 48, 50, 51, 52)) -> list[ReachRow]:
    """Those of some hosts on which the module lets such a TD exist."""
    eptp, flags = eptp_controls(sept_levels(gpaw)), config_flags(gpaw)
    hosts = (width for width in widths if are_eptp_controls_legal(eptp, flags, width))
    return [reach_row(maxphyaddr, gpaw) for maxphyaddr in hosts]


def last_slot_gfn(maxphyaddr: int, gpaw: int) -> int:
    """The greatest gfn that a memslot of a TD may contain on such a host."""
    return min(MmuParams(maxphyaddr=maxphyaddr).max_gfn, gfn_shared_bit(gpaw) - 1)
