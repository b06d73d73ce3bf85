"""A machine looked at once: what is in use in it, for all invariants to judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tdxlab.arch import HPA_MASK, shared_bit
from tdxlab.bare import BareMachine
from tdxlab.invariants.host_picture import HostPicture, VmPicture
from tdxlab.machine import Machine
from tdxlab.seam import sept
from tdxlab.seam.pamt import SIZE_NAMES, PamtEntry
from tdxlab.seam.rules import (
    FREE_BITS,
    PAGE_TYPE_NAMES,
    PT_NDA,
    PT_TDR,
    PT_TDVPR,
    REMOVED_BITS,
    SEPT_STATE_MASK,
    TD_TEARDOWN,
)
from tdxlab.seam.td import SEPT_ROOT_PAGE, Tdcs, Tdr, Tdvps


class Link(NamedTuple):
    """An S-EPT entry that maps a page or links a table; hpa: of that page or table."""

    sept_level: int
    gpa: int
    raw: int
    hpa: int

    @property
    def is_leaf(self) -> bool:
        """True if it maps a page."""
        return bool(self.raw & sept.LEAF)

    def __str__(self) -> str:
        return f"the S-EPT entry for GPA {self.gpa:#x} at level {self.sept_level}"


class TdPicture:
    """One TD: where its structures lie, and all of its S-EPT until its pages are reclaimed."""

    def __init__(self, machine: BareMachine, tdr: int) -> None:
        self._view = machine.memory.words.view
        self.tdr = tdr
        self._page = machine.memory.frames[tdr]
        self.lifecycle = self.tdr_field(Tdr.LIFECYCLE)
        self.hkid = self.tdr_field(Tdr.HKID)
        #: frame of the first TDCS page; None before something is in it, and in TEARDOWN
        self.tdcs: int | None = None
        self.root = 0
        self.links: list[Link] = []
        tdcx = self.tdr_field(Tdr.NUM_TDCX)
        if self.lifecycle == TD_TEARDOWN or not tdcx:
            return
        self.tdcs = machine.memory.frames.get(self._tdcx(machine, 0))
        if self.tdcs is None:
            return
        eptp = self.tdcs_field(Tdcs.EPTP)
        if tdcx > SEPT_ROOT_PAGE and eptp:
            self.root = self._tdcx(machine, SEPT_ROOT_PAGE)
            self.links = [_link(row) for row in sept.entries(machine.memory, eptp) if _is_link(row)]

    def _tdcx(self, machine: BareMachine, index: int) -> int:
        return self.tdr_field(Tdr.TDCX_PA + index) & machine.memory.pa_mask & HPA_MASK

    def tdr_field(self, word: int) -> int:
        """A word of the TDR (Tdr.*)."""
        value: int = self._view[self._page + word]
        return value

    def tdcs_field(self, word: int) -> int:
        """A word of the TDCS (Tdcs.*), which must be there."""
        assert self.tdcs is not None
        value: int = self._view[self.tdcs + word]
        return value

    def is_shared(self, gpa: int) -> bool:
        """True for a GPA with the SHARED bit."""
        return bool(gpa >> shared_bit(52 if self.tdcs_field(Tdcs.GPAW) else 48) & 1)

    def __str__(self) -> str:
        return f"the TD at {self.tdr:#x}"


def _is_link(row: tuple[int, int, int, int]) -> bool:
    """False for an entry that maps nothing: free with a lock bit left behind, or removed."""
    return row[2] & SEPT_STATE_MASK not in (FREE_BITS, REMOVED_BITS)


def _link(row: tuple[int, int, int, int]) -> Link:
    sept_level, gpa, raw, _ = row
    if raw & sept.LEAF:
        return Link(sept_level, gpa, raw, sept.leaf_hpa(sept.Place(0, sept_level, raw)))
    return Link(sept_level, gpa, raw, raw & HPA_MASK)


class VcpuPicture(NamedTuple):
    """One vCPU: HPA of its TDVPR, its TD's TDR, and the fields that count it."""

    tdvpr: int
    tdr: int
    state: int
    lp: int
    epoch: int
    pages: int


@dataclass(frozen=True)
class Picture:
    """What is in use in a machine. owned: TDR -> PAMT entries of the pages of that TD. inside:
    LP -> TDVPR, LPs with a guest only. host: what KVM holds, None on a machine without one.
    """

    machine: BareMachine
    rows: list[PamtEntry]
    owned: dict[int, list[PamtEntry]]
    tds: dict[int, TdPicture]
    vcpus: dict[int, VcpuPicture]
    inside: dict[int, int]
    host: HostPicture | None = None

    @classmethod
    def of(cls, machine: BareMachine, rows: list[PamtEntry] | None = None) -> Picture:
        """Look at every PAMT entry, TD and vCPU in use. rows: the PAMT entries in use, if they are
        known.
        """
        if rows is None:
            rows = list(machine.module.pamt.in_use())
        tds = {r.hpa: TdPicture(machine, r.hpa) for r in rows if r.page_type == PT_TDR}
        owned: dict[int, list[PamtEntry]] = {tdr: [] for tdr in tds}
        for row in rows:
            if row.page_type not in (PT_NDA, PT_TDR) and row.owner in owned:
                owned[row.owner].append(row)
        vcpus = {r.hpa: _vcpu(machine, r) for r in rows if r.page_type == PT_TDVPR}
        cpu = machine.cpu
        inside = {lp: cpu.vcpu_inside(lp) for lp in cpu.lps if cpu.vcpu_inside(lp)}
        host = HostPicture(machine.host) if isinstance(machine, Machine) else None
        return cls(machine, rows, owned, tds, vcpus, inside, host)

    @property
    def vms(self) -> list[VmPicture]:
        """KVM's VMs."""
        return [] if self.host is None else self.host.vms

    def vcpus_of(self, td: TdPicture) -> list[VcpuPicture]:
        """The TD's vCPUs, initialised or not."""
        return [vcpu for vcpu in self.vcpus.values() if vcpu.tdr == td.tdr]

    def living(self) -> Iterator[TdPicture]:
        """TDs whose pages are not being reclaimed."""
        return (td for td in self.tds.values() if td.lifecycle != TD_TEARDOWN)

    def with_tdcs(self) -> Iterator[TdPicture]:
        """Living TDs that have control structures."""
        return (td for td in self.living() if td.tdcs is not None)


def _vcpu(machine: BareMachine, row: PamtEntry) -> VcpuPicture:
    page, view = machine.memory.frames[row.hpa], machine.memory.words.view
    fields = (Tdvps.STATE, Tdvps.ASSOC_LPID, Tdvps.VCPU_EPOCH, Tdvps.NUM_PAGES)
    return VcpuPicture(row.hpa, row.owner, *(view[page + word] for word in fields))


def name_of(row: PamtEntry) -> str:
    """A PAMT entry in words."""
    kind = PAGE_TYPE_NAMES.get(row.page_type, f"type {row.page_type}")
    return f"the {SIZE_NAMES[row.size]} page {row.hpa:#x} ({kind})"
