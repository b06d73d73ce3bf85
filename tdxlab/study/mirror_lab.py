"""A TD whose private pages fault and are zapped on a tape, with both trees in view.

    lab = MirrorLab(gpaw=48)
    lab.fault(0x200)                    # the guest uses the page; KVM maps it
    lab.zap(0x200)                      # the host takes it back
    lab.walk(0x200)                     # entry by entry, mirror and Secure EPT side by side

The TD has two vCPUs and pieces of memory that lie far apart, so that a first fault can need a new
table at every level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from tdxlab.arch import (
    ENTRIES_PER_TABLE,
    PAGE_SHIFT,
    PAGE_SIZE,
    SEPT_LEVEL_NAMES,
    SIZE_1G,
    SIZE_2M,
    table_index,
)
from tdxlab.guest import Write
from tdxlab.kvm.spte import FROZEN_SPTE, SPTE_MMU_PRESENT_MASK, is_last_spte
from tdxlab.kvm.vm import MmuPage
from tdxlab.machine import Machine
from tdxlab.seam.sept import Septe
from tdxlab.seam.td import SEPT_ROOT_PAGE
from tdxlab.steps import Operation
from tdxlab.study.mirror_tape import MirrorTape
from tdxlab.vmm_run import RunResult

# -- what a mirror entry can be

EMPTY, FROZEN, TABLE, MAPPED = "empty", "FROZEN", "table", "mapped"
NO_TABLE = "no table"

_SIZE_512G, _SIZE_256T = 512 * SIZE_1G, 1 << 48


class Piece(NamedTuple):
    """A piece of the TD's memory. name: what is new about it. gpa: where it begins; 2 MiB long."""

    name: str
    gpa: int

    @property
    def gfn(self) -> int:
        """Its first frame."""
        return self.gpa >> PAGE_SHIFT


#: The TD's memory; the last piece only at GPAW 52.
PIECES = (
    Piece("first 2 MiB", 0),
    Piece("another 2 MiB", SIZE_2M),
    Piece("another 1 GiB", SIZE_1G),
    Piece("another 512 GiB", _SIZE_512G),
    Piece("another 256 TiB", _SIZE_256T),
)


class WalkRow(NamedTuple):
    """One level of the walk to a gfn, in both trees. mirror, external: states; hpa columns: pages
    of the tables that hold the entries, 0 where there is none yet; spte, septe: raw entries.
    """

    level: str
    entry: int
    mirror: str
    spte: int
    mirror_hpa: int
    external: str
    septe: int
    external_hpa: int


class MirrorLab:
    """A finalized TD with two vCPUs, ready to fault.

    gpaw: 48 or 52. memory: bytes from GPA 0 on; None for the pieces of `PIECES`. tape: what happens
    from here on, step by step.
    """

    def __init__(self, *, gpaw: int = 48, memory: int | None = None) -> None:
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
        self.td = self.machine.create_td(vcpus=2, memory=memory or 2 * SIZE_2M)
        if memory is None:
            for piece in PIECES[2 : 4 if gpaw == 48 else 5]:
                self.td.add_memory(piece.gpa, SIZE_2M)
        for vcpu in self.td.vm.vcpus:
            self.td.run([], vcpu=vcpu)
        self.levels = 4 if gpaw == 48 else 5
        self.tape = MirrorTape(self.machine)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of memory that this TD has."""
        return [piece for piece in PIECES if self.td.backing_of(piece.gpa, SIZE_2M) is not None]

    # -- faults and zaps

    def fault(self, gfn: int, *, name: str = "") -> RunResult:
        """vCPU 0 writes to the page, and accepts it before if it has to. name: for the tape."""
        return self.fault_all([gfn], name=name or f"fault {gfn:#x}")

    def fault_all(self, gfns: Sequence[int], *, name: str) -> RunResult:
        """vCPU 0 writes to all these pages, one after the other."""
        for gfn in gfns:
            self.require(gfn)
        done: RunResult = self.tape.perform(name, partial(self.fault_steps, gfns))
        return done

    def fault_steps(self, gfns: Sequence[int], *, vcpu: int = 0) -> Operation:
        """As `fault_all`, as a thread for schedules."""
        return self.td.run_steps([Write(gfn << PAGE_SHIFT) for gfn in gfns], vcpu=vcpu)

    def zap(self, gfn: int, *, name: str = "") -> int:
        """The guest gives the page up, and the host punches it out of the guest_memfd. Returns 0.

        A page that is not mapped can be zapped too: the mirror says so, and nothing is called.
        """
        return self.zap_all([gfn], name=name or f"zap {gfn:#x}")

    def zap_all(self, gfns: Sequence[int], *, name: str) -> int:
        """As `zap`, for several pages in a row."""
        for gfn in gfns:
            self.require(gfn)
        ret: int = self.tape.perform(name, partial(self._zap_steps, gfns))
        return ret

    def _zap_steps(self, gfns: Sequence[int]) -> Operation:
        for gfn in gfns:
            if gfn in self.td.guest.accepted:
                self.td.guest.accepted.drop(gfn)
            ret = yield from self.td.punch_hole_steps(gfn << PAGE_SHIFT, PAGE_SIZE)
            if ret:
                return ret
        return 0

    def require(self, gfn: int) -> None:
        """Refuse, with a ValueError, a gfn that has no memory."""
        if gfn < 0 or self.td.backing_of(gfn << PAGE_SHIFT, PAGE_SIZE) is None:
            have = ", ".join(
                f"{b.gpa >> PAGE_SHIFT:#x}..{(b.end >> PAGE_SHIFT) - 1:#x}"
                for b in self.td.backings
            )
            raise ValueError(f"gfn {gfn:#x} has no memory; choose one of {have}")

    # -- counting

    def count(self, leaf: str) -> int:
        """SEAMCALLs of a leaf on the tape up to the present position, by the end of its name."""
        return sum(n for name, n in self.tape.seamcalls().items() if name.endswith(leaf))

    # -- looking

    @property
    def mirror_root(self) -> MmuPage | None:
        """The root table of the mirror, None before a vCPU has run."""
        vm = self.td.vm
        roots: list[MmuPage] = [vm.sps[root] for root in vm.tdp_mmu_roots]
        return next((sp for sp in roots if sp.is_mirror), None)

    def walk(self, gfn: int) -> list[WalkRow]:
        """The walk to a gfn, from the root down, in both trees."""
        mirror = list(self._mirror_walk(gfn))
        external = list(self._external_walk(gfn))
        rows = []
        for level in range(self.levels, 0, -1):
            place = self.levels - level
            spt, spte = mirror[place] if place < len(mirror) else (0, 0)
            page, septe = external[place] if place < len(external) else (0, 0)
            rows.append(
                WalkRow(
                    SEPT_LEVEL_NAMES[level - 1],
                    table_index(gfn << PAGE_SHIFT, level - 1),
                    spte_state(spte, level) if spt else NO_TABLE,
                    spte,
                    spt,
                    Septe(septe).state if page else NO_TABLE,
                    septe,
                    page,
                )
            )
        return rows

    def _mirror_walk(self, gfn: int) -> Iterator[tuple[int, int]]:
        """(HPA of the table, SPTE) of each level that is there, the root first."""
        vm, sp = self.td.vm, self.mirror_root
        while sp is not None:
            index = table_index(gfn << PAGE_SHIFT, sp.level - 1)
            spte = vm.memory.words.view[vm.table_base(sp.spt) + index]
            yield sp.spt, spte
            is_table = spte_state(spte, sp.level) == TABLE
            sp = vm.sp_of(spte) if is_table else None

    def _external_walk(self, gfn: int) -> Iterator[tuple[int, int]]:
        """(HPA of the S-EPT page, entry) of each level that is there, the root first."""
        memory, page = self.machine.memory, self._external_root()
        for level in range(self.levels - 1, -1, -1):
            index = table_index(gfn << PAGE_SHIFT, level)
            entry = Septe(memory.words.view[memory.frame(page) + index])
            yield page, int(entry)
            if entry.state not in ("NL_MAPPED", "NL_BLOCKED"):
                return
            page = entry.hpa

    def _external_root(self) -> int:
        """HPA of the root: one of the TD's control pages."""
        return self.td.tdx.td.tdcs[SEPT_ROOT_PAGE]

    def mirror_table(self, spt: int) -> dict[int, str]:
        """Index -> state of each entry of a mirror table that is not empty. spt: its HPA."""
        vm = self.td.vm
        level, base = vm.sps[spt].level, vm.table_base(spt)
        sptes = vm.memory.words.view[base : base + ENTRIES_PER_TABLE]
        states = {index: spte_state(spte, level) for index, spte in enumerate(sptes)}
        return {index: state for index, state in states.items() if state != EMPTY}

    def external_table(self, page: int) -> dict[int, str]:
        """Index -> state of each entry of an S-EPT page that is not FREE. page: its HPA."""
        memory = self.machine.memory
        base = memory.frame(page)
        septes = memory.words.view[base : base + ENTRIES_PER_TABLE]
        states = {index: Septe(septe).state for index, septe in enumerate(septes)}
        return {index: state for index, state in states.items() if state != "FREE"}

    def frozen(self) -> list[tuple[str, int]]:
        """(level, gfn) of each mirror entry that is frozen."""
        found = []
        vm = self.td.vm
        for sp in vm.sps.values():
            if sp.is_mirror:
                states = self.mirror_table(sp.spt)
                size = 1 << 9 * (sp.level - 1)
                name = SEPT_LEVEL_NAMES[sp.level - 1]
                found += [(name, sp.gfn + i * size) for i, s in states.items() if s == FROZEN]
        return sorted(found)


def spte_state(spte: int, level: int) -> str:
    """What a mirror entry is, in a word."""
    if spte == FROZEN_SPTE:
        return FROZEN
    if not spte & SPTE_MMU_PRESENT_MASK:
        return EMPTY
    return MAPPED if is_last_spte(spte, level) else TABLE
