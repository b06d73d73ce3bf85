"""CPU facts: page sizes, levels, guest physical address widths, EPT entry bits.

Two numberings of levels live side by side and never mix: `level` is KVM's (4 KiB = 1), `sept_level`
is the TDX module's (4 KiB = 0). An address is a byte address (`gpa`, `hpa`); a frame number counts
4 KiB pages (`gfn`, `pfn`).

Source: Intel SDM volume 3, chapter on extended page tables; TDX module 1.5.01, x86_defs.h and
helpers.c.
"""

from __future__ import annotations

from tdxlab.bits import Bits, Word

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
WORDS_PER_PAGE = PAGE_SIZE // 8
ENTRIES_PER_TABLE = 512
LEVEL_BITS = 9

SIZE_2M = 1 << 21
SIZE_1G = 1 << 30

LINE_SHIFT = 6
LINES_PER_PAGE = PAGE_SIZE >> LINE_SHIFT

#: The module takes 52 as the physical address width in its checks, whatever CPUID says.
MAX_PA_BITS = 52
PA_LIMIT = 1 << MAX_PA_BITS
HPA_MASK = PA_LIMIT - PAGE_SIZE
PAGE_OFFSET_MASK = PAGE_SIZE - 1


class EptEntry(Word):
    """The fields that the CPU's walker knows in a leaf entry of any EPT."""

    read = Bits(0)
    write = Bits(1)
    execute = Bits(2)
    memory_type = Bits(5, 3)
    ignore_pat = Bits(6)
    hpa = Bits(51, 12, in_place=True)
    suppress_ve = Bits(63)


EPT_READ = 1 << 0
EPT_WRITE = 1 << 1
EPT_EXECUTE = 1 << 2
EPT_RWX = EPT_READ | EPT_WRITE | EPT_EXECUTE
EPT_LEAF = 1 << 7
EPT_ACCESSED = 1 << 8
EPT_DIRTY = 1 << 9
EPT_SUPPRESS_VE = 1 << 63

GPAW_CHOICES = (48, 52)

SEPT_LEVEL_NAMES = ("4K", "2M", "1G", "PML4", "PML5")


def shared_bit(gpaw: int) -> int:
    """The bit of a GPA that says shared: 47 or 51. gpaw: guest physical address width, 48 or 52.

    Refuses any other width with a ValueError.
    """
    if gpaw not in GPAW_CHOICES:
        raise ValueError(f"GPAW {gpaw} is not a TDX guest address width; choose 48 or 52")
    return gpaw - 1


def sept_levels(gpaw: int) -> int:
    """Levels of the Secure EPT that a TD of this GPAW is given here: 4 at 48, 5 at 52.

    A TD with GPAW 48 may also have 5 levels; the module allows it, hosts do not ask for it.
    """
    return 4 if shared_bit(gpaw) == 47 else 5


def level_shift(sept_level: int) -> int:
    """Bits of the address below the index at `sept_level`: 12, 21, 30, 39, 48."""
    return PAGE_SHIFT + LEVEL_BITS * sept_level


def level_size(sept_level: int) -> int:
    """Bytes that one entry at `sept_level` covers."""
    return 1 << level_shift(sept_level)


def table_index(gpa: int, sept_level: int) -> int:
    """Index (0..511) of `gpa` in its table at `sept_level`."""
    return (gpa >> level_shift(sept_level)) & (ENTRIES_PER_TABLE - 1)
