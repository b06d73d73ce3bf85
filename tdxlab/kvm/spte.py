"""Shadow page-table entries: KVM's 64-bit layout of an EPT entry, and how each kind is made.

     63  62   59 58 57 56 54 53 52 51       12 11 10  9  8  7  6 5   3 2 1 0
    +---+-------+--+--+-----+-----+-----------+--+--+--+--+--+--+-----+-+-+-+
    |sVE|       |MW|HW|saved| A/D | address   |MP|  | D| A|PS|IP| type|X|W|R|
    +---+-------+--+--+-----+-----+-----------+--+--+--+--+--+--+-----+-+-+-+

    R W X      read, write, execute            MP  MMU-present: the only test of "present"
    type, IP   memory type, ignore PAT         HW  the host lets the page be written
    PS         a leaf above level 1            MW  the MMU lets the page be written
    A, D       accessed, dirty                 A/D how A and D are kept (SPTE_TDP_AD_*)
    saved      R and X of an access-tracked entry (A/D disabled)
    sVE        suppress #VE: an unmapped access exits to the host

A word that is not MMU-present is empty, FROZEN, or an MMIO entry. An entry of a mirror EPT has the
same layout, and only KVM reads it.

Source: Linux 6.16, arch/x86/kvm/mmu/spte.h and spte.c, arch/x86/include/asm/vmx.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdxlab.arch import (
    EPT_EXECUTE,
    EPT_LEAF,
    EPT_READ,
    EPT_RWX,
    EPT_SUPPRESS_VE,
    EPT_WRITE,
    HPA_MASK,
    LEVEL_BITS,
    PAGE_OFFSET_MASK,
    PAGE_SHIFT,
    EptEntry,
)
from tdxlab.bits import MASK64, Bits, Word
from tdxlab.kvm.params import MmuParams
from tdxlab.kvm.role import (
    ACC_ALL,
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    AD_DISABLED,
    GUEST_MODE,
)

if TYPE_CHECKING:
    from tdxlab.kvm.vm import Vm


class Spte(EptEntry):
    """A present SPTE's fields."""

    page_size = Bits(7)
    accessed = Bits(8)
    dirty = Bits(9)
    mmu_present = Bits(11)
    ad_type = Bits(53, 52)
    saved_read = Bits(54)
    saved_execute = Bits(56)
    host_writable = Bits(57)
    mmu_writable = Bits(58)


class MmioSpte(Word):
    """An MMIO entry: the GPA in place, the memslot generation around it."""

    value = Bits(2, 0)
    generation_low = Bits(10, 3)
    gpa = Bits(51, 12, in_place=True)
    generation_high = Bits(62, 52)


#: An empty entry: an access exits as an EPT violation.
SHADOW_NONPRESENT_VALUE = EPT_SUPPRESS_VE
#: Somebody is changing this entry; whoever meets it retries.
FROZEN_SPTE = SHADOW_NONPRESENT_VALUE | 0x5A0

SPTE_MMU_PRESENT_MASK = Spte.mmu_present.mask
PT_WRITABLE_MASK = EPT_WRITE
PT_PAGE_SIZE_MASK = EPT_LEAF
ACCESSED_MASK = Spte.accessed.mask
DIRTY_MASK = Spte.dirty.mask
HOST_WRITABLE_MASK = Spte.host_writable.mask
MMU_WRITABLE_MASK = Spte.mmu_writable.mask

#: How A and D are kept: by the CPU; not at all (access tracking instead); D by write protection.
SPTE_TDP_AD_MASK = Spte.ad_type.mask
SPTE_TDP_AD_ENABLED = 0 << Spte.ad_type.low
SPTE_TDP_AD_DISABLED = 1 << Spte.ad_type.low
SPTE_TDP_AD_WRPROT_ONLY = 2 << Spte.ad_type.low

#: R and X of an access-tracked entry wait here for the next access.
SAVED_BITS_MASK = EPT_READ | EPT_EXECUTE
SAVED_BITS_SHIFT = Spte.saved_read.low

#: Generations that an MMIO SPTE can hold.
MMIO_GEN_BITS = 19
MMIO_GEN_MASK = (1 << MMIO_GEN_BITS) - 1
_GEN_LOW_BITS = MmioSpte.generation_low.high - MmioSpte.generation_low.low + 1
_GEN_LOW_MASK = (1 << _GEN_LOW_BITS) - 1

#: W and X without R: the access exits as an EPT misconfiguration, which KVM takes for MMIO.
MMIO_MISCONFIG_VALUE = EPT_WRITE | EPT_EXECUTE

#: What a leaf has more than another one if the guest may write.
_WRITABLE = PT_WRITABLE_MASK | MMU_WRITABLE_MASK | HOST_WRITABLE_MASK | DIRTY_MASK

MEMORY_TYPE_UC = 0
MEMORY_TYPE_WB = 6 << Spte.memory_type.low
IGNORE_PAT_MASK = Spte.ignore_pat.mask

_L1TF_BITS = 5


class Masks:
    """The shadow_* masks of one host: which bits its EPT gives which meaning.

    Source: spte.c, kvm_mmu_set_ept_masks, kvm_mmu_reset_all_pte_masks.
    """

    def __init__(self, params: MmuParams) -> None:
        self.address = HPA_MASK
        self.present = EPT_SUPPRESS_VE | (0 if params.execute_only else EPT_READ)
        #: by ACC_* bits: what every leaf has, and what lets the guest read and fetch
        self.leaf = tuple(self._leaf(access) for access in range(ACC_ALL + 1))
        self.mmio_value = MMIO_MISCONFIG_VALUE if params.mmio_caching else 0
        self.mmio_mask = EPT_SUPPRESS_VE | EPT_RWX
        self.mmio_caching = params.mmio_caching
        #: address bits that an MMIO entry holds inverted in meaning, shifted up, against L1TF
        self.nonpresent_or_rsvd = 0
        low_bits = params.maxphyaddr
        if params.l1tf and params.maxphyaddr < 52 - _L1TF_BITS:
            low_bits = params.maxphyaddr - _L1TF_BITS
            self.nonpresent_or_rsvd = (1 << params.maxphyaddr) - (1 << low_bits)
        self.lower_gfn = (1 << low_bits) - (1 << PAGE_SHIFT)

    def _leaf(self, access: int) -> int:
        execute = EPT_EXECUTE if access & ACC_EXEC_MASK else 0
        read = EPT_READ if access & ACC_USER_MASK else 0
        return self.present | SPTE_MMU_PRESENT_MASK | execute | read


# -- predicates, on raw words


def is_shadow_present_pte(spte: int) -> bool:
    """True if MMU-present: a leaf or a link, and nothing else."""
    return bool(spte & SPTE_MMU_PRESENT_MASK)


def is_large_pte(spte: int) -> bool:
    """The page-size bit, which means something in present entries only (FROZEN has it set)."""
    return bool(spte & PT_PAGE_SIZE_MASK)


def is_last_spte(spte: int, level: int) -> bool:
    """True if a present entry at `level` maps a page rather than links a table."""
    return level == 1 or bool(spte & PT_PAGE_SIZE_MASK)


def is_present_leaf(spte: int, level: int) -> bool:
    """True if present and a leaf."""
    return bool(spte & SPTE_MMU_PRESENT_MASK) and (level == 1 or bool(spte & PT_PAGE_SIZE_MASK))


def is_frozen_spte(spte: int) -> bool:
    """True while somebody changes the entry."""
    return spte == FROZEN_SPTE


def is_mmio_spte(vm: Vm, spte: int) -> bool:
    """True for an MMIO entry of this VM. Source: spte.h, is_mmio_spte."""
    return (spte & vm.masks.mmio_mask) == vm.shadow_mmio_value and vm.masks.mmio_caching


def is_writable_pte(spte: int) -> bool:
    """The CPU may write."""
    return bool(spte & PT_WRITABLE_MASK)


def is_executable_pte(spte: int) -> bool:
    """The CPU may fetch."""
    return bool(spte & EPT_EXECUTE)


def is_mmu_writable_spte(spte: int) -> bool:
    """The MMU lets it be made writable without asking anybody."""
    return bool(spte & MMU_WRITABLE_MASK)


def is_host_writable_spte(spte: int) -> bool:
    """The host's own mapping of the page is writable."""
    return bool(spte & HOST_WRITABLE_MASK)


def spte_ad_enabled(spte: int) -> bool:
    """The CPU keeps A and D of this entry."""
    return spte & SPTE_TDP_AD_MASK != SPTE_TDP_AD_DISABLED


def spte_ad_need_write_protect(spte: int) -> bool:
    """Dirty pages are found by write protection, not by the D bit."""
    return spte & SPTE_TDP_AD_MASK != SPTE_TDP_AD_ENABLED


def is_access_track_spte(spte: int) -> bool:
    """Its permissions were taken away to see the next access."""
    return not spte_ad_enabled(spte) and spte & EPT_RWX == 0


def is_accessed_spte(spte: int) -> bool:
    """Accessed since somebody last looked. Without A/D bits KVM keeps the bit itself."""
    return bool(spte & ACCESSED_MASK)


def is_access_allowed(spte: int, *, write: bool, execute: bool) -> bool:
    """True if `spte` permits the access of a fault: fetch, else write, else read."""
    if execute:
        return is_executable_pte(spte)
    if write:
        return is_writable_pte(spte)
    return bool(spte & EPT_READ)


def is_ept_ve_possible(spte: int) -> bool:
    """An access through this entry would be a #VE in the guest."""
    return not spte & EPT_SUPPRESS_VE and spte & EPT_RWX != MMIO_MISCONFIG_VALUE


def spte_needs_atomic_update(spte: int) -> bool:
    """Something that holds no lock may change a leaf: fast page faults, access tracking, the CPU.

    Such an entry is replaced with xchg even under the write lock. Source: spte.c.
    """
    if not spte & PT_WRITABLE_MASK and spte & MMU_WRITABLE_MASK:
        return True
    if not spte_ad_enabled(spte):
        return True
    return is_writable_pte(spte) and not spte & DIRTY_MASK


def leaf_spte_change_needs_tlb_flush(old_spte: int, new_spte: int) -> bool:
    """True if write permission went away for good. Source: spte.h."""
    return is_mmu_writable_spte(old_spte) and not is_mmu_writable_spte(new_spte)


def check_spte_writable_invariants(spte: int) -> str:
    """What is wrong with the write bits of a leaf: a writable entry is MMU-writable, an
    MMU-writable one host-writable. Empty if nothing is. Source: spte.h.
    """
    if spte & MMU_WRITABLE_MASK:
        return "" if spte & HOST_WRITABLE_MASK else "MMU-writable, but not host-writable"
    return "writable, but not MMU-writable" if is_writable_pte(spte) else ""


def spte_to_pfn(spte: int) -> int:
    """The frame number that a present entry holds."""
    return (spte & HPA_MASK) >> PAGE_SHIFT


# -- making leaves and links


def make_spte(
    vm: Vm,
    role: int,
    access: int,
    pfn: int,
    prefetch: bool = False,
    host_writable: bool = True,
) -> int:
    """A leaf SPTE for the page `pfn` in a table of `role`.

    access: ACC_* bits that the slot and the fault allow. prefetch: nobody accessed the page yet.
    Source: spte.c, make_spte; vmx.c, vmx_get_mt_mask (its memory type). Differs: dirty logging of
    the gfn is the caller's; nothing here shadows guest tables, so no gfn is write-protected for
    that (the result "wrprot" is never true).
    """
    if vm.is_mmio_pfn is not None and vm.is_mmio_pfn(pfn):
        spte = MEMORY_TYPE_UC
    else:
        spte = MEMORY_TYPE_WB | (IGNORE_PAT_MASK if vm.config.ignore_guest_pat else 0)
    if not prefetch:
        spte |= ACCESSED_MASK
    if role & 0xF > 1:
        spte |= PT_PAGE_SIZE_MASK
        if vm.params.nx_huge_pages:
            access &= ~ACC_EXEC_MASK
    spte |= vm.masks.leaf[access] | pfn << PAGE_SHIFT
    if role & AD_DISABLED:
        spte |= SPTE_TDP_AD_DISABLED
    elif role & GUEST_MODE and vm.config.dirty_log_size:
        spte |= SPTE_TDP_AD_WRPROT_ONLY
    if host_writable:
        spte |= _WRITABLE if access & ACC_WRITE_MASK else HOST_WRITABLE_MASK
    return mark_spte_for_access_track(spte) if prefetch else spte


def make_nonleaf_spte(vm: Vm, child_spt: int, *, ad_disabled: bool) -> int:
    """A link to the table at HPA `child_spt`, with all permissions. Source: spte.c."""
    spte = SPTE_MMU_PRESENT_MASK | child_spt | vm.masks.present | EPT_RWX
    return spte | (SPTE_TDP_AD_DISABLED if ad_disabled else ACCESSED_MASK)


def mark_spte_for_access_track(spte: int) -> int:
    """A leaf whose next access will be noticed: A clear, or without A/D bits no permissions."""
    if spte_ad_enabled(spte):
        return spte & ~ACCESSED_MASK
    if is_access_track_spte(spte):
        return spte
    saved = (spte & SAVED_BITS_MASK) << SAVED_BITS_SHIFT
    return (spte | saved) & ~(EPT_RWX | ACCESSED_MASK)


def restore_acc_track_spte(spte: int) -> int:
    """An access-tracked leaf with its R and X back. Source: spte.h."""
    saved = spte >> SAVED_BITS_SHIFT & SAVED_BITS_MASK
    return spte & ~(EPT_RWX | SAVED_BITS_MASK << SAVED_BITS_SHIFT) | saved


def make_small_spte(vm: Vm, huge_spte: int, role: int, index: int) -> int:
    """Child number `index` (0..511) of a large leaf that is split.

    role: of the new table. Source: spte.c, make_small_spte.
    """
    if not is_shadow_present_pte(huge_spte) or not is_large_pte(huge_spte):
        vm.bug("make_small_spte: the source is no present large SPTE")
        return SHADOW_NONPRESENT_VALUE
    level = role & 0xF
    spte = huge_spte | index << (PAGE_SHIFT + LEVEL_BITS * (level - 1))
    if level == 1:
        spte &= ~PT_PAGE_SIZE_MASK
        if role >> 8 & ACC_EXEC_MASK and vm.params.nx_huge_pages:
            spte = modify_spte_protections(spte, EPT_EXECUTE, 0)
    return spte


def make_huge_spte(vm: Vm, small_spte: int, level: int) -> int:
    """The large leaf at `level` around the small leaf `small_spte`. Source: spte.c."""
    if not is_shadow_present_pte(small_spte) or level == 1:
        vm.bug("make_huge_spte: the source is no present SPTE, or the level is 4K")
        return SHADOW_NONPRESENT_VALUE
    size = 1 << (PAGE_SHIFT + LEVEL_BITS * (level - 1))
    spte = (small_spte | PT_PAGE_SIZE_MASK) & (~(size - 1) & MASK64 | PAGE_OFFSET_MASK)
    return modify_spte_protections(spte, 0, EPT_EXECUTE) if vm.params.nx_huge_pages else spte


def modify_spte_protections(spte: int, set_bits: int, clear_bits: int) -> int:
    """A leaf with other R, W, X bits; of an access-tracked one those that it will get back change.

    Source: spte.c, modify_spte_protections.
    """
    is_access_track = is_access_track_spte(spte)
    if is_access_track:
        spte = restore_acc_track_spte(spte)
    spte = (spte | set_bits) & ~clear_bits
    return mark_spte_for_access_track(spte) if is_access_track else spte


# -- MMIO entries


def make_mmio_spte(vm: Vm, gfn: int, generation: int) -> int:
    """An MMIO entry for `gfn`. generation: of the memslots. Source: spte.c, make_mmio_spte."""
    gpa = gfn << PAGE_SHIFT
    inverted = vm.masks.nonpresent_or_rsvd
    spte = generation_mmio_spte_mask(generation) | vm.shadow_mmio_value | gpa | inverted
    return spte | (gpa & inverted) << _L1TF_BITS


def generation_mmio_spte_mask(generation: int) -> int:
    """A memslot generation as bits of an MMIO entry; bits above the 19th are lost."""
    generation &= MMIO_GEN_MASK
    low = generation & _GEN_LOW_MASK
    high = generation >> _GEN_LOW_BITS
    return low << MmioSpte.generation_low.low | high << MmioSpte.generation_high.low


def get_mmio_spte_generation(spte: int) -> int:
    """The generation in an MMIO entry."""
    word = MmioSpte(spte)
    return word.generation_high << _GEN_LOW_BITS | word.generation_low


def get_mmio_spte_gfn(vm: Vm, spte: int) -> int:
    """The gfn in an MMIO entry. Source: mmu.c, get_mmio_spte_gfn."""
    gpa = spte & vm.masks.lower_gfn | spte >> _L1TF_BITS & vm.masks.nonpresent_or_rsvd
    return gpa >> PAGE_SHIFT
