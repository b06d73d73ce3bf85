"""What mirror and Secure EPT cost in tables and in SEAMCALLs: counted, and by formula.

Table(occupancy_rows({"dense": dense, "sparse": sparse}))
Table(price_rows(lab, gfns))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import TDX_EPT_WALK_FAILED, TDX_SUCCESS, describe
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SEPT_LEVEL_NAMES, level_size
from tdxlab.kvm.spte import SPTE_MMU_PRESENT_MASK, is_last_spte
from tdxlab.kvm.tdp_mmu import kvm_tdp_mmu_get_walk
from tdxlab.seam.rules import SEPT_STATES
from tdxlab.study.mirror_lab import MirrorLab
from tdxlab.study.undone import undone

TREES = ("mirror", "external")

#: State byte of RDX -> the entry maps a page.
_IS_LEAF = {state.public: state.is_leaf for state in SEPT_STATES}
_IS_TABLE = {state.public: state.name == "NL_MAPPED" for state in SEPT_STATES}
_STATUS = 0xFFFF_FFFF_0000_0000

# -- a walk


class WalkTexts(NamedTuple):
    """A `WalkRow` for people: raw entries in hexadecimal, "-" where there is none."""

    level: str
    entry: int
    mirror: str
    spte: str
    external: str
    septe: str


def walk_rows(lab: MirrorLab, gfn: int) -> list[WalkTexts]:
    """The walk to `gfn` in both trees, from the root down."""
    return [
        WalkTexts(
            row.level,
            row.entry,
            row.mirror,
            f"{row.spte:#018x}" if row.mirror_hpa else "-",
            row.external,
            f"{row.septe:#018x}" if row.external_hpa else "-",
        )
        for row in lab.walk(gfn)
    ]


# -- tables


class OccupancyRow(NamedTuple):
    """The tables of one level of one tree. entries: in use, of `capacity`. percent: of those that
    are in use. bytes: memory of the tables.
    """

    layout: str
    tree: str
    level: str
    tables: int
    entries: int
    capacity: int
    percent: float
    bytes: int


def occupancy_rows(labs: Mapping[str, MirrorLab]) -> list[OccupancyRow]:
    """Both trees of each lab, level by level, the root first; labs by the name of their layout."""
    rows = []
    for layout, lab in labs.items():
        trees = lab.machine.tables(lab.td)
        for level in reversed(SEPT_LEVEL_NAMES):
            for tree in TREES:
                if level in trees[tree]:
                    found = trees[tree][level]
                    used = round(100 * found.entries / found.capacity, 2)
                    rows.append(
                        OccupancyRow(
                            layout,
                            tree,
                            level,
                            found.tables,
                            found.entries,
                            found.capacity,
                            used,
                            found.bytes,
                        )
                    )
    return rows


class MemoryRow(NamedTuple):
    """What the tables of one layout take. pages: mapped. mirror, external: tables, roots among
    them. bytes: of both. per_page: bytes of tables for each mapped page.
    """

    layout: str
    pages: int
    mirror: int
    external: int
    bytes: int
    per_page: float


def memory_rows(labs: Mapping[str, MirrorLab]) -> list[MemoryRow]:
    """One row for each layout."""
    rows = []
    for layout, lab in labs.items():
        trees = lab.machine.tables(lab.td)
        mirror, external = (sum(level.tables for level in trees[tree].values()) for tree in TREES)
        pages = trees["mirror"]["4K"].entries
        size = (mirror + external) * PAGE_SIZE
        per_page = round(size / pages, 1)
        rows.append(MemoryRow(layout, pages, mirror, external, size, per_page))
    return rows


DENSE, SPARSE = "dense", "sparse"


def layouts(gpaw: int, pages: int = 128) -> dict[str, MirrorLab]:
    """Two labs with as many pages mapped: one behind the other, and one in every 2 MiB."""
    step = level_size(1)
    gfns = {DENSE: range(pages), SPARSE: range(0, pages << 9, 1 << 9)}
    made = {}
    for layout, chosen in gfns.items():
        made[layout] = MirrorLab(gpaw=gpaw, memory=pages * step)
        for gfn in chosen:
            made[layout].td.touch(gfn << PAGE_SHIFT)
    return made


def table_count(gfns: Sequence[int], levels: int) -> int:
    """Tables that must be added below the root to map these gfns: T(S).

    levels: 4 or 5. For each level k below the root's, as many tables as there are different
    gfn >> 9k; the root is there from the beginning.
    """
    return sum(len({gfn >> 9 * level for gfn in gfns}) for level in range(1, levels))


def contiguous_table_count(pages: int, levels: int) -> int:
    """`table_count` of gfns 0..pages-1, without looking at each."""
    return sum(-(-pages >> 9 * level) for level in range(1, levels)) if pages else 0


class FirstFault(NamedTuple):
    """The first fault in a piece of memory, counted on the model. predicted: SEPT.ADD by T(S)."""

    memory: str
    gfn: str
    sept_add: int
    page_aug: int
    vp_enter: int
    predicted: int


def first_fault_rows(gpaw: int) -> list[FirstFault]:
    """Faults in pieces that are farther and farther away, then one beside the last."""
    lab, rows, done = MirrorLab(gpaw=gpaw), [], list[int]()
    steps = [(piece.name, piece.gfn) for piece in lab.pieces]
    steps.append(("next page", steps[-1][1] + 1))
    for name, gfn in steps:
        before = [lab.count(leaf) for leaf in ("SEPT.ADD", "PAGE.AUG", "VP.ENTER")]
        lab.fault(gfn)
        after = [lab.count(leaf) for leaf in ("SEPT.ADD", "PAGE.AUG", "VP.ENTER")]
        add, aug, enter = (b - a for a, b in zip(before, after, strict=True))
        grown = table_count([*done, gfn], lab.levels) - table_count(done, lab.levels)
        rows.append(FirstFault(name, f"{gfn:#x}", add, aug, enter, grown))
        done.append(gfn)
    return rows


# -- the price of looking


class PriceRow(NamedTuple):
    """What it costs to learn of every gfn whether it is mapped, and at which level. entries_read:
    of the mirror. found: gfns that are mapped.
    """

    way: str
    gfns: int
    seamcalls: int
    entries_read: int
    found: int


#: gfn -> S-EPT level at which it is mapped; gfns that are not are left out.
Answers = dict[int, int]


def ask_mirror(lab: MirrorLab, gfns: Sequence[int]) -> tuple[Answers, int]:
    """KVM's way: walk the mirror. (gfn -> level, 4K is 0; SPTEs read)."""
    vcpu, root = lab.td.vm.vcpus[0], lab.mirror_root
    assert root is not None
    found, read = {}, 0
    for gfn in gfns:
        walk = kvm_tdp_mmu_get_walk(vcpu, gfn << PAGE_SHIFT, root)
        read += len(walk)
        level = min(walk)
        if walk[level] & SPTE_MMU_PRESENT_MASK and is_last_spte(walk[level], level):
            found[gfn] = level - 1
    return found, read


def ask_page_by_page(lab: MirrorLab, gfns: Sequence[int]) -> tuple[Answers, int]:
    """TDH.MEM.SEPT.RD of the 4K entry of each gfn: the module walks."""
    found = {}
    for gfn in gfns:
        _, level, is_leaf, _ = sept_rd(lab, gfn, 0)
        if is_leaf:
            found[gfn] = level
    return found, 0


def ask_top_down(lab: MirrorLab, gfns: Sequence[int]) -> tuple[Answers, int]:
    """TDH.MEM.SEPT.RD of each level from the root down, as KVM's walker would replace each read of
    an SPTE by one.
    """
    found = {}
    for gfn in gfns:
        for level in range(lab.levels - 1, -1, -1):
            _, _, is_leaf, is_table = sept_rd(lab, gfn, level)
            if is_leaf:
                found[gfn] = level
            if not is_table:
                break
    return found, 0


def ask_skipping(lab: MirrorLab, gfns: Sequence[int]) -> tuple[Answers, int]:
    """As `ask_page_by_page`; where the module's walk stops higher up, what lies below is skipped.

    gfns: ascending.
    """
    found: Answers = {}
    known = -1
    for gfn in gfns:
        if gfn <= known:
            continue
        _, level, is_leaf, _ = sept_rd(lab, gfn, 0)
        if is_leaf:
            found[gfn] = level
        known = gfn | (1 << 9 * level) - 1
    return found, 0


def sept_rd(lab: MirrorLab, gfn: int, level: int) -> tuple[int, int, bool, bool]:
    """TDH.MEM.SEPT.RD: (status, level where the walk stopped, it is a leaf, it links a table).

    Refuses, with a ValueError, an answer that tells nothing, such as TDX_OPERAND_BUSY.
    """
    gpa = gfn << PAGE_SHIFT & -level_size(level)
    registers = Registers(rcx=gpa | level, rdx=lab.td.tdr or 0)
    status = lab.machine.seamcall(0, abi.TDH_MEM_SEPT_RD, registers)
    if status & _STATUS not in (TDX_SUCCESS, TDX_EPT_WALK_FAILED & _STATUS):
        raise ValueError(f"TDH.MEM.SEPT.RD says nothing of gfn {gfn:#x}: status {status:#x}")
    state = registers.rdx >> 8 & 0xFF
    return status, registers.rdx & 7, _IS_LEAF[state], _IS_TABLE[state]


WAYS: dict[str, Callable[[MirrorLab, Sequence[int]], tuple[Answers, int]]] = {
    "mirror": ask_mirror,
    "SEPT.RD, skipping": ask_skipping,
    "SEPT.RD, page by page": ask_page_by_page,
    "SEPT.RD, level by level": ask_top_down,
}


def price_rows(lab: MirrorLab, gfns: Sequence[int]) -> list[PriceRow]:
    """What each way costs for the same question."""
    rows = []
    for way, ask in WAYS.items():
        before = sept_rd_count(lab)
        found, read = ask(lab, gfns)
        rows.append(PriceRow(way, len(gfns), sept_rd_count(lab) - before, read, len(found)))
    return rows


def read_now(lab: MirrorLab, gfn: int) -> str:
    """What TDH.MEM.SEPT.RD of the 4K entry of `gfn` answers where the tape stands; nothing changes.

    It is called on LP 1, so that it can meet a call in flight on LP 0.
    """
    with undone(lab.machine):
        registers = Registers(rcx=gfn << PAGE_SHIFT, rdx=lab.td.tdr or 0)
        status = lab.machine.seamcall(1, abi.TDH_MEM_SEPT_RD, registers)
    return describe(status)


def price_curve(lab: MirrorLab, ends: Sequence[int]) -> list[PriceRow]:
    """`price_rows` of gfns 0..end-1 for each end."""
    return [row for end in ends for row in price_rows(lab, range(end))]


def sept_rd_count(lab: MirrorLab) -> int:
    """TDH.MEM.SEPT.RD called so far."""
    return lab.machine.seamcalls.get("TDH.MEM.SEPT.RD", 0)
