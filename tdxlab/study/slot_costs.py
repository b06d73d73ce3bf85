"""What deleting a memslot costs by each policy: formulas, for any size.

    tree = contiguous(pages("64 GiB"), maxphyaddr=46)
    zap_all(tree).walked
    zap_leafs(pages("2 GiB")).walked
    remove_private(pages("2 GiB")).seamcalls

A tree is known by the number of its tables and leaves, so a terabyte costs no more than a page. On
small VMs of any layout the model itself is measured, and agrees.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c (tdp_mmu_zap_root, handle_removed_pt,
tdp_mmu_zap_leafs); mmu.c (kvm_mmu_zap_memslot) for reverse maps; vmx/tdx.c for private pages; TDX
module 1.5.01 for what one BLOCK can cover.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from tdxlab.arch import ENTRIES_PER_TABLE, LEVEL_BITS, PAGE_SHIFT
from tdxlab.sizes import parse_size

#: Stores of one MOVDIR64B that clear a page of 4 KiB.
LINES_PER_PAGE = 64

#: Levels at which a zap of a whole root goes through it, before the root's own level; and in a
#: kernel with PROVE_MMU.
_PASSES, _PASSES_PROVE_MMU = (1, 2, 3), (3,)


class Tree(NamedTuple):
    """What hangs below one root. tables: page tables at level 1, 2, ... up to below the root's.
    leaves: mappings. root_entries: those of the root that a walk of everything visits.
    """

    tables: tuple[int, ...]
    leaves: int
    root_entries: int


class ZapAll(NamedTuple):
    """F on the direct root of a VM. walked: entries visited. rescanned: entries of tables that are
    freed, once more. cleared: SPTEs, leaves and links. freed: tables. faults: at most, when all of
    the VM's memory is used again.
    """

    walked: int
    rescanned: int
    cleared: int
    freed: int
    faults: int


class ZapLeafs(NamedTuple):
    """T in one root. walked: entries visited. cleared: leaves. kept: tables of the slot that stay.
    faults: at most, when the slot comes back and all of it is used.
    """

    walked: int
    cleared: int
    kept: int
    faults: int


class Lookups(NamedTuple):
    """What T looks up in addition where KVM shadows page tables, page by page: heads of the slot's
    reverse maps, at 4K, 2M and 1G; buckets: of the hash of shadow pages, unless it is empty.
    """

    heads: int
    buckets: int


class Private(NamedTuple):
    """T or B on private pages of a TD. blocks, tracks, removes, writebacks: SEAMCALLs; kicks: of
    all vCPUs; lines: MOVDIR64B stores. To come back: unblocks, augs: SEAMCALLs; accepts: pages that
    the guest has to accept again.
    """

    blocks: int
    tracks: int
    removes: int
    writebacks: int
    kicks: int
    lines: int
    unblocks: int
    augs: int
    accepts: int

    @property
    def seamcalls(self) -> int:
        """Of the deletion."""
        return self.blocks + self.tracks + self.removes + self.writebacks


def pages(size: int | str) -> int:
    """4 KiB pages in so many bytes, or in such as "2 GiB"."""
    return parse_size(size) >> PAGE_SHIFT


# -- trees


def root_entries(root_level: int, maxphyaddr: int) -> int:
    """Entries of a root that can have something below them, as the host's addresses are no wider.

    Refuses a root of 5 levels on a host with less than 48 bits: ValueError.
    """
    covered = PAGE_SHIFT + LEVEL_BITS * (root_level - 1)
    if covered > maxphyaddr:
        raise ValueError(
            f"one entry of a root of {root_level} levels covers {covered} bits, the host has "
            f"{maxphyaddr}; choose a root of 4 levels"
        )
    return int(min(ENTRIES_PER_TABLE, 1 << maxphyaddr - covered))


def mapped(
    gfns: Collection[int], *, leaf_level: int = 1, root_level: int = 4, maxphyaddr: int = 52
) -> Tree:
    """The tree that maps the pages at `gfns`. leaf_level: 1 for leaves of 4K, 2 for 2M."""
    leaves = len({gfn >> LEVEL_BITS * (leaf_level - 1) for gfn in gfns})
    tables = tuple(
        len({gfn >> LEVEL_BITS * level for gfn in gfns}) if level >= leaf_level else 0
        for level in range(1, root_level)
    )
    return Tree(tables, leaves, root_entries(root_level, maxphyaddr))


def contiguous(
    npages: int, *, leaf_level: int = 1, root_level: int = 4, maxphyaddr: int = 52
) -> Tree:
    """The tree that maps `npages` pages of 4 KiB from gfn 0 on."""
    tables = tuple(
        covering(npages, level + 1) if level >= leaf_level else 0 for level in range(1, root_level)
    )
    entries = root_entries(root_level, maxphyaddr)
    return Tree(tables, covering(npages, leaf_level), entries)


def covering(npages: int, level: int) -> int:
    """Entries at `level` that cover `npages` pages from an aligned gfn on."""
    return -(-npages // per_entry(level))


def per_entry(level: int) -> int:
    """4 KiB pages that one entry at `level` covers."""
    return 1 << LEVEL_BITS * (level - 1)


# -- F and T


def zap_all(tree: Tree, *, prove_mmu: bool = False) -> ZapAll:
    """F: four passes through the whole tree. With tables T1, T2, T3 and R entries of the root, four
    levels: 512 (T1 + 2 T2 + 3 T3) + 4 R entries. prove_mmu: of a kernel that has only the last two
    passes: 512 T3 + 2 R.
    """
    levels = _PASSES_PROVE_MMU if prove_mmu else _PASSES
    passes = [sum(tree.tables[level - 1 :]) for level in levels] + [0]
    freed = sum(tree.tables)
    return ZapAll(
        walked=ENTRIES_PER_TABLE * sum(passes) + len(passes) * tree.root_entries,
        rescanned=ENTRIES_PER_TABLE * freed,
        cleared=tree.leaves + freed,
        freed=freed,
        faults=tree.leaves,
    )


def zap_leafs(npages: int, *, leaf_level: int = 1, root_level: int = 4) -> ZapLeafs:
    """T on an aligned slot, all of it mapped: the entries at each level that cover it. Tables that
    the slot does not fill are shared with others, and not counted as kept.
    """
    walked = sum(covering(npages, level) for level in range(leaf_level, root_level + 1))
    kept = sum(npages // per_entry(level + 1) for level in range(leaf_level, root_level))
    leaves = covering(npages, leaf_level)
    return ZapLeafs(walked, leaves, kept, leaves)


def shadow_lookups(npages: int) -> Lookups:
    """T on an aligned slot, mapped or not, of a VM that shadows page tables. Only a formula: the
    memslots of the model have no reverse maps.
    """
    return Lookups(sum(covering(npages, level) for level in (1, 2, 3)), npages)


def walked_in(
    start: int, end: int, gfns: Collection[int], *, leaf_level: int = 1, root_level: int = 4
) -> int:
    """Entries that T visits in a root for gfns from start to end - 1, whatever is mapped there.
    gfns: all that the root maps: where it has no table, there is one entry to visit, above.
    """
    walked = _overlap(start, end, 0, root_level)
    for level in range(leaf_level, root_level):
        tables = {gfn >> LEVEL_BITS * level for gfn in gfns}
        walked += sum(_overlap(start, end, table, level) for table in tables)
    return walked


def _overlap(start: int, end: int, table: int, level: int) -> int:
    """Entries of one table, the `table`-th at its level, that cover gfns from start to end - 1."""
    first = max(start, table * per_entry(level + 1))
    last = min(end, (table + 1) * per_entry(level + 1)) - 1
    shift = LEVEL_BITS * (level - 1)
    return (last >> shift) - (first >> shift) + 1 if first <= last else 0


# -- private pages


def remove_private(npages: int, *, batch: int = 1) -> Private:
    """T on mapped private pages: four SEAMCALLs a page. batch: pages with one TLB flush, 1 in Linux
    6.16.
    """
    flushes = -(-npages // batch)
    return Private(
        blocks=npages,
        tracks=flushes,
        removes=npages,
        writebacks=npages,
        kicks=flushes,
        lines=LINES_PER_PAGE * npages,
        unblocks=0,
        augs=npages,
        accepts=npages,
    )


def block_private(npages: int, *, level: int = 1) -> Private:
    """B: one BLOCK for each entry at `level` (1: 4K, 2: 2M, 3: 1G) that covers the slot, and one
    TLB flush for all.
    """
    blocks = covering(npages, level)
    return Private(
        blocks=blocks,
        tracks=1,
        removes=0,
        writebacks=0,
        kicks=1,
        lines=0,
        unblocks=blocks,
        augs=0,
        accepts=0,
    )


# -- who waits: entries visited as the unit, and what a fault is worth as a choice


class Delay(NamedTuple):
    """What a deletion costs vCPUs that use other memory, in entries visited. all_faults: F, its
    faults on the rest of the VM. leafs_lock: T, what is done with mmu_lock held for write.
    """

    all_faults: int
    leafs_lock: int


def delay(slot_pages: int, used: int, price: int, *, leaf_level: int = 1) -> Delay:
    """used: mappings of the rest of the VM that are used again. price: entries visited that one
    fault is worth: nobody has measured that here, it has to be chosen.
    """
    return Delay(price * used, zap_leafs(slot_pages, leaf_level=leaf_level).walked)


def crossover(used: int, price: int, *, leaf_level: int = 1) -> int:
    """Pages of the smallest slot for which T keeps the lock longer than F's faults are worth; a
    multiple of what one leaf maps.
    """
    low, high, unit = 0, price * used + 1, per_entry(leaf_level)
    while high - low > 1:
        middle = (low + high) // 2
        both = delay(middle * unit, used, price, leaf_level=leaf_level)
        low, high = (middle, high) if both.leafs_lock <= both.all_faults else (low, middle)
    return high * unit
