"""Page-directory-pointer-table entries (PDPTEs): four words that look like page-table entries and
are checked unlike any of them.

     63      M M-1        12 11  9 8    5 4   3   2  1 0
    +---------+-------------+-----+------+---+---+----+-+
    | reserved| address     | ign.| rsvd |PCD|PWT|rsvd|P|
    +---------+-------------+-----+------+---+---+----+-+

M is MAXPHYADDR. Of an entry with P = 0 nothing else counts. No permissions, no A and D bits, no NX:
what stands above a page directory lets everything through.

Source: Linux 6.16, arch/x86/kvm/x86.c (pdptr_rsvd_bits, load_pdptrs), kvm_cache_regs.h.
"""

from __future__ import annotations

from collections.abc import Sequence

from tdxlab.arch import ENTRIES_PER_TABLE, HPA_MASK, PAGE_SHIFT
from tdxlab.bits import MASK64, Bits, Word
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK

PT_PRESENT_MASK = 1 << 0
PT_WRITABLE_MASK = 1 << 1
PT_USER_MASK = 1 << 2
PT_ACCESSED_MASK = 1 << 5
PT_DIRTY_MASK = 1 << 6
PT_PAGE_SIZE_MASK = 1 << 7

#: "No root" in a slot of a PAE root: not all ones, as elsewhere, for that has P and reserved bits
#: set. Source: mmu_internal.h, INVALID_PAE_ROOT.
INVALID_PAE_ROOT = 0

PDPTES = 4
#: Bits of CR3 that give the place of the table: 32-byte aligned, below 4 GiB.
CR3_PDPT_MASK = 0xFFFF_FFE0

MAXPHYADDR_CHOICES = range(36, 53)


class Pdpte(Word):
    """The fields of one entry."""

    present = Bits(0)
    reserved_low = Bits(2, 1)
    write_through = Bits(3)
    cache_disable = Bits(4)
    reserved_middle = Bits(8, 5)
    ignored = Bits(11, 9)
    address = Bits(51, 12, in_place=True)


# KVM marks what it has linked with a bit of its own. In a PDPTE only bits 11:9 can carry one.
assert SPTE_MMU_PRESENT_MASK & ~Pdpte.ignored.mask == 0


def require_maxphyaddr(maxphyaddr: int) -> None:
    """Refuse, with a ValueError, a width that no CPU with 64-bit mode reports."""
    if maxphyaddr not in MAXPHYADDR_CHOICES:
        raise ValueError(f"MAXPHYADDR {maxphyaddr}; choose {MAXPHYADDR_CHOICES.start} to 52 bits")


def pdptr_rsvd_bits(maxphyaddr: int) -> int:
    """The bits that must be 0 in a present entry. maxphyaddr: 36 to 52, anything else: ValueError.

    Source: x86.c, pdptr_rsvd_bits. Example: 0xffff_c000_0000_01e6 for 46.
    """
    require_maxphyaddr(maxphyaddr)
    above = MASK64 >> maxphyaddr << maxphyaddr
    return above | Pdpte.reserved_low.mask | Pdpte.reserved_middle.mask


def reserved_bits_set(pdpte: int, maxphyaddr: int) -> int:
    """The bits that make an entry illegal; 0 for a legal one, and so for any with P = 0."""
    return pdpte & pdptr_rsvd_bits(maxphyaddr) if pdpte & PT_PRESENT_MASK else 0


def is_legal_table(pdptes: Sequence[int], maxphyaddr: int) -> bool:
    """True if a CPU takes the four entries."""
    return not any(reserved_bits_set(pdpte, maxphyaddr) for pdpte in pdptes)


def pdpte_index(va: int) -> int:
    """Which of the four entries covers a virtual address; each covers 1 GiB."""
    return va >> 30 & PDPTES - 1


def make_root_pdpte(directory: int, me_value: int) -> int:
    """The slot of a special root. directory: HPA of a page directory; me_value: encryption bit.

    Source: mmu.c, mmu_alloc_shadow_roots (pm_mask) and mmu_alloc_direct_roots.
    """
    return directory | PT_PRESENT_MASK | me_value


def make_pdpte_spte(directory: int, me_value: int) -> int:
    """A PDPTE that KVM can track like any SPTE: with the MMU-present bit, and no others.

    Source: the RFC of December 2021; not in Linux 6.16.
    """
    return make_root_pdpte(directory, me_value) | SPTE_MMU_PRESENT_MASK


def make_nonleaf_spte(table: int, me_value: int) -> int:
    """What links a table to an ordinary page table, with all permissions: no legal PDPTE.

    Source: mmu/spte.c, make_nonleaf_spte, for a shadow MMU without EPT.
    """
    permissions = PT_WRITABLE_MASK | PT_USER_MASK | PT_ACCESSED_MASK
    return make_pdpte_spte(table, me_value) | permissions


def spte_address(spte: int, me_value: int) -> int:
    """The HPA in an entry, without encryption bit. Source: spte.h, root_to_sp strips them too."""
    return spte & HPA_MASK & ~me_value


# -- when the guest's four entries are read anew. Source: kvm_cache_regs.h

X86_CR0_WP = 1 << 16
X86_CR0_NW = 1 << 29
X86_CR0_CD = 1 << 30
X86_CR0_PG = 1 << 31
X86_CR4_PSE = 1 << 4
X86_CR4_PAE = 1 << 5
X86_CR4_PGE = 1 << 7
X86_CR4_LA57 = 1 << 12
X86_CR4_SMEP = 1 << 20
X86_CR4_SMAP = 1 << 21
X86_CR4_PKE = 1 << 22

#: Changing one of these reloads the guest's PDPTEs while it uses PAE paging.
X86_CR0_PDPTR_BITS = X86_CR0_CD | X86_CR0_NW | X86_CR0_PG
X86_CR4_PDPTR_BITS = X86_CR4_PAE | X86_CR4_PGE | X86_CR4_PSE | X86_CR4_SMEP

#: Changing one of these makes all roots those of another MMU. PGE is none of them: it only flushes
#: the TLB. Source: mmu.h.
KVM_MMU_CR4_ROLE_BITS = (
    X86_CR4_PSE | X86_CR4_PAE | X86_CR4_LA57 | X86_CR4_SMEP | X86_CR4_SMAP | X86_CR4_PKE
)


# -- quadrants: four-byte entries of the guest shadowed by eight-byte ones


def written_sptes(offset: int, *, level: int, quadrant: int) -> tuple[int, ...]:
    """Indexes of the SPTEs that a store to a guest table of four-byte entries touches, in the
    shadow page of `quadrant`; empty if that page shadows another part.

    offset: byte in the guest's page; level: 1 or 2. Source: mmu.c, get_written_sptes.
    """
    place = offset << 1
    count = 1
    if level == 2:
        place = (place & ~7) << 1
        count = 2
    if place >> PAGE_SHIFT != quadrant:
        return ()
    first = place // 8 % ENTRIES_PER_TABLE
    return tuple(range(first, first + count))
