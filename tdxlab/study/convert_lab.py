"""A TD whose guest converts memory on a tape: MapGPA, the VMM's ioctl, and the first access.

    lab = ConvertLab(gpaw=48)
    lab.convert(4, 2, to="shared")          # pages 4 and 5, one MapGPA
    lab.access(4, 2)                        # the guest reads them
    lab.rows()[4]                           # what stands where for page 4

Pages are counted from `FIRST_GPA`; at the beginning the guest has written "private ..." into each.
Differs: Linux accepts memory at the end of its conversion; this guest does it at the first access,
so that one can look at what lies in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from tdxlab import views
from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE, SIZE_2M
from tdxlab.guest import MapGpa, Program, Read, Write
from tdxlab.kvm.spte import FROZEN_SPTE, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.tdp_iter import for_each_tdp_pte
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.machine import Machine
from tdxlab.seam.sept import Septe
from tdxlab.step_tape import StepTape
from tdxlab.steps import Operation
from tdxlab.study.undone import undone
from tdxlab.vmm_run import RunResult

FIRST_GPA = SIZE_2M
PAGES = 16
SHARED, PRIVATE = "shared", "private"

#: Bytes at the beginning of each page that tell what it holds.
PRIVATE_DATA, SHARED_DATA = b"private", b"shared"
_MARK_SIZE = 16

# -- what a page holds for somebody who reads it

PRIVATE_CONTENT, SHARED_CONTENT, ZEROS = "private data", "shared data", "zeros"

#: Counts of SEAMCALLs that a conversion, or the access after it, can make.
LEAVES = (
    "TDH.MEM.RANGE.BLOCK",
    "TDH.MEM.TRACK",
    "TDH.MEM.PAGE.REMOVE",
    "TDH.PHYMEM.PAGE.WBINVD",
    "TDH.MEM.SEPT.ADD",
    "TDH.MEM.PAGE.AUG",
)


class PageRow(NamedTuple):
    """Where one page stands. attribute: of its gfn. mirror, direct: KVM's leaf entries: "mapped",
    "frozen" or "-". external: state of the Secure EPT entry. guest_memfd: the file has a page for
    it. guest_uses: the kind that the guest's page tables name. guest_reads: what the guest's next
    access would find; vmm_reads: what the VMM finds in its own mapping.
    """

    page: int
    attribute: str
    mirror: str
    external: str
    direct: str
    guest_memfd: str
    guest_uses: str
    guest_reads: str
    vmm_reads: str


class ConvertLab:
    """A TD of two vCPUs, finalized, with `PAGES` private pages in use.

    gpaw: 48 or 52. tape: what happens from here on, step by step.
    """

    def __init__(self, *, gpaw: int = 48) -> None:
        self.machine = Machine(gpaw=gpaw, memory="1 GiB", lps=2, packages=1)
        self.td = self.machine.create_td(vcpus=2, memory=2 * SIZE_2M)
        for page in range(PAGES):
            self.td.write(self.gpa(page), PRIVATE_DATA + b" %d" % page)
        self.tape = StepTape(self.machine)
        self._before = dict(self.machine.seamcalls)
        self._counts_before = self._counts()

    # -- what the guest does

    def gpa(self, page: int) -> int:
        """GPA of a page, without the shared bit."""
        return FIRST_GPA + page * PAGE_SIZE

    def convert(
        self, first: int, pages: int, *, to: str, batch: int = 0, punch: bool = False
    ) -> list[RunResult]:
        """The guest converts pages. batch: pages for each MapGPA, 0 for all of them. punch: the VMM
        throws the copy away that is not used any more.

        Refuses pages that are not there: ValueError.
        """
        self._require_pages(first, pages)
        last = first + pages
        pieces = [(page, min(batch or pages, last - page)) for page in range(first, last)]
        done = []
        for page, count in pieces[:: batch or pages]:
            name = f"MapGPA {_span(page, count)} to {to}"
            asked = self.gpa(page) | (self.td.guest.shared_mask if to == SHARED else 0)
            program = [MapGpa(asked, count * PAGE_SIZE)]
            done.append(self._play(name, program, accepts=False, punch=punch))
        return done

    def access(self, first: int, pages: int = 1, *, write: bool = False) -> RunResult:
        """The guest uses pages, each as the kind that its page tables name."""
        self._require_pages(first, pages)
        name = f"{'write' if write else 'read'} {_span(first, pages)}"
        gpas = [self.td.guest.alias(self.gpa(page)) for page in range(first, first + pages)]
        return self._play(name, _accesses(gpas, self.td.guest.shared_mask, write=write))

    def access_unasked(
        self, first: int, pages: int = 1, *, to: str, punch: bool = False
    ) -> RunResult:
        """The guest changes its page tables and reads, without having asked for a conversion."""
        self._require_pages(first, pages)
        bit = self.td.guest.shared_mask if to == SHARED else 0
        gpas = [self.gpa(page) | bit for page in range(first, first + pages)]
        program = _accesses(gpas, bit, write=False)
        noted = (gpas[0], pages * PAGE_SIZE)
        return self._play(f"read {_span(first, pages)} as {to}", program, punch=punch, noted=noted)

    def _play(
        self,
        name: str,
        program: Program,
        *,
        accepts: bool = True,
        punch: bool = False,
        noted: tuple[int, int] | None = None,
    ) -> RunResult:
        """Perform a guest's program on vCPU 0."""
        start = partial(self._running, program, accepts, punch, noted)
        done: RunResult = self.tape.perform(name, start)
        return done

    def _running(
        self, program: Program, accepts: bool, punch: bool, noted: tuple[int, int] | None
    ) -> Operation:
        td = self.td
        td.guest.accepts, td.discards = accepts, punch
        if noted is not None:
            td.guest.note_conversion(*noted)
        try:
            return (yield from td.run_steps(program))
        finally:
            td.guest.accepts, td.discards = True, False

    def _require_pages(self, first: int, pages: int) -> None:
        if first < 0 or pages < 1 or first + pages > PAGES:
            raise ValueError(
                f"pages {first}..{first + pages - 1} are not all there; choose from 0..{PAGES - 1}"
            )

    # -- counting

    def seamcalls(self) -> dict[str, int]:
        """Name of each of `LEAVES` -> calls since the lab began."""
        now = self.machine.seamcalls
        return {leaf: now.get(leaf, 0) - self._before.get(leaf, 0) for leaf in LEAVES}

    def counts(self) -> dict[str, int]:
        """What else was counted since the lab began: kicks, IPIs, remote flushes, INVEPTs."""
        return {name: n - self._counts_before[name] for name, n in self._counts().items()}

    def _counts(self) -> dict[str, int]:
        host = self.machine.host.counts
        return {
            "kicks": host["kick"],
            "IPIs": host["ipi"],
            "remote flushes": self.td.vm.stats["remote_tlb_flush"],
            "INVEPT": host["invept"],
        }

    # -- looking

    def rows(self) -> list[PageRow]:
        """Where every page stands, as the lab bench sees it."""
        first = FIRST_GPA >> PAGE_SHIFT
        mirror = leaves(self.td.vm, first, first + PAGES, mirror=True)
        direct = leaves(self.td.vm, first, first + PAGES, mirror=False)
        external = self._external()
        return [self._row(page, mirror, direct, external) for page in range(PAGES)]

    def lost(self) -> int:
        """Pages whose private data is gone: no entry of the Secure EPT holds it any more. A blocked
        page is out of reach, but not yet lost.
        """
        external = self._external()
        entries = [external.get(self.gpa(page)) for page in range(PAGES)]
        return sum(entry is None or self._data(entry) != PRIVATE_CONTENT for entry in entries)

    def _row(
        self, page: int, mirror: dict[int, int], direct: dict[int, int], external: dict[int, Septe]
    ) -> PageRow:
        gpa, td = self.gpa(page), self.td
        gfn = gpa >> PAGE_SHIFT
        entry = external.get(gpa)
        (backing,) = td.backings
        folio = td.guest_memory.folio(backing.gmem, gpa - backing.gpa >> PAGE_SHIFT)
        uses_shared = gfn in td.guest.shared
        vmm = self._vmm_reads(gpa)
        return PageRow(
            page,
            PRIVATE if td.vm.attributes.is_private(gfn) else SHARED,
            entry_state(mirror.get(gfn, 0)),
            "FREE" if entry is None else entry.state,
            entry_state(direct.get(gfn, 0)),
            "-" if folio is None else "page",
            SHARED if uses_shared else PRIVATE,
            vmm if uses_shared else self._private_reads(entry),
            vmm,
        )

    def _external(self) -> dict[int, Septe]:
        """GPA -> leaf entry of the Secure EPT."""
        assert self.td.tdr is not None
        rows = views.sept_rows(self.machine, self.td.tdr)
        return {row.gpa: Septe(row.raw) for row in rows if row.sept_level == 0}

    def _private_reads(self, entry: Septe | None) -> str:
        """What a private access finds. Where it cannot be done at once, the page is a new one by
        the time it can, and accepting that clears it.
        """
        return ZEROS if entry is None or entry.state != "MAPPED" else self._data(entry)

    def _data(self, entry: Septe) -> str:
        """What is in the page of a leaf entry, by the TD's key."""
        if entry.state not in ("MAPPED", "BLOCKED") or self.td.keyid is None:
            return ZEROS
        return content(self.machine.memory.read(entry.hpa, _MARK_SIZE, self.td.keyid))

    def _vmm_reads(self, gpa: int) -> str:
        with undone(self.machine):
            return content(self.td.read_shared(gpa, _MARK_SIZE))


def _accesses(gpas: Sequence[int], shared_bit: int, *, write: bool) -> list[Any]:
    """Reads, or writes of what tells shared data from private."""
    if not write:
        return [Read(gpa, _MARK_SIZE) for gpa in gpas]
    return [Write(gpa, SHARED_DATA if gpa & shared_bit else PRIVATE_DATA) for gpa in gpas]


def _span(first: int, pages: int) -> str:
    return f"page {first}" if pages == 1 else f"pages {first}..{first + pages - 1}"


def content(data: bytes) -> str:
    """What the first bytes of a page say: one of the three contents."""
    if data.startswith(PRIVATE_DATA):
        return PRIVATE_CONTENT
    return SHARED_CONTENT if data.startswith(SHARED_DATA) else ZEROS


def entry_state(spte: int) -> str:
    """What KVM's leaf entry is, in a word."""
    if spte == FROZEN_SPTE:
        return "frozen"
    return "mapped" if spte & SPTE_MMU_PRESENT_MASK else "-"


def leaves(vm: Vm, start: int, end: int, *, mirror: bool) -> dict[int, int]:
    """gfn -> SPTE of the 4 KiB entries of the mirror roots, or of the direct ones, that are not
    empty.
    """
    found = {}
    for root in vm.tdp_mmu_roots:
        sp: MmuPage = vm.sps[root]
        if sp.is_mirror == mirror:
            for it in for_each_tdp_pte(vm, sp, start, end):
                if it.level == 1 and entry_state(it.old_spte) != "-":
                    found[it.gfn] = it.old_spte
    return found
