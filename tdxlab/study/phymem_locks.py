"""Which locks TDH.PHYMEM.PAGE.RECLAIM takes, found by holding each of them in turn; and which calls
are made again when an answer is not final, found by giving that answer.

    Table(lock_rows(LockScene(gpaw=48)))
    Table(retry_rows(gpaw=48))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi import status as s
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import operand_name, status_name
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine
from tdxlab.seam.locks import try_exclusive_hp, try_shared_hp
from tdxlab.study.teardown_lab import KEYID_LAST, Failure, TeardownLab

RECLAIM = "TDH.PHYMEM.PAGE.RECLAIM"
#: The locks that are tried: the three PAMT entries of the page, and the 4K entry of its TDR.
LOCKS = ("1G", "2M", "4K", "TDR")
KINDS = ("TDR", "TDCS page", "TDVPR", "S-EPT page", "private 4K", "private 2M", "private 1G")
READER, OWNER = "reader", "owner"
_HOLDS: dict[str, Callable[..., bool]] = {READER: try_shared_hp, OWNER: try_exclusive_hp}

#: Where the private pages of each size lie in the guest.
_GPA = {0: 0x4000_0000, 1: 0x4020_0000, 2: 0x8000_0000}


class LockScene:
    """A TD in TD_TEARDOWN with a page of every kind. pages: kind -> HPA."""

    def __init__(self, *, gpaw: int = 48) -> None:
        self.machine = booted_machine(tdmr_gib=2)
        host = Host(self.machine)
        self.td = td = HostTd(host, gpaw=gpaw, max_vcpus=1)
        td.add_vcpu()
        td.finalize()
        private = [td.aug(_GPA[0]), td.aug(_GPA[1], 1), self._add_1g(host)]
        host.must(0, abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
        host.must(0, abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)
        for package in self.machine.cpu.packages:
            host.must(host.lp_of(package), abi.TDH_PHYMEM_CACHE_WB)
        host.must(0, abi.TDH_MNG_KEY_FREEID, rcx=td.tdr)
        control = [td.tdr, td.tdr + PAGE_SIZE, td.vcpus[0], min(td.tables.values())]
        self.pages = dict(zip(KINDS, [*control, *private], strict=True))

    def _add_1g(self, host: Host) -> int:
        """A page of 1 GiB, merged from 512 of 2 MiB; they fill the second GiB of the TDMR."""
        td, base, gpa = self.td, self.machine.platform.tdmrs[0].base + SIZE_1G, _GPA[2]
        td.map_tables(gpa, 1)
        for offset in range(0, SIZE_1G, SIZE_2M):
            host.must(0, abi.TDH_MEM_PAGE_AUG, rcx=gpa + offset | 1, rdx=td.tdr, r8=base + offset)
        host.must(0, abi.TDH_MEM_RANGE_BLOCK, rcx=gpa | 2, rdx=td.tdr)
        host.must(0, abi.TDH_MEM_TRACK, rcx=td.tdr)
        host.must(0, abi.TDH_MEM_PAGE_PROMOTE, rcx=gpa | 2, rdx=td.tdr)
        return base

    def entry(self, kind: str, lock: str) -> int:
        """Index of the PAMT entry with that lock, for the page of a kind."""
        hpa = self.td.tdr if lock == "TDR" else self.pages[kind]
        size = 0 if lock == "TDR" else ("4K", "2M", "1G").index(lock)
        return self.machine.module.pamt.entry(hpa, size)

    def reclaim(self, kind: str, lock: str = "", hold: str = "") -> str:
        """What RECLAIM of that page answers while somebody holds a lock ("" for nobody), as READER
        or OWNER; such as "TDX_OPERAND_BUSY RCX". Nothing of it stays.
        """
        mark = self.machine.mark()
        try:
            if lock:
                _HOLDS[hold](self.machine.module.pamt.words, self.entry(kind, lock))
            registers = Registers(rcx=self.pages[kind])
            status = self.machine.seamcall(0, abi.TDH_PHYMEM_PAGE_RECLAIM, registers)
        finally:
            self.machine.rewind(mark)
            self.machine.journal.release(mark)
        return f"{status_name(status)} {operand_name(status) or ''}".strip()

    def needs(self, kind: str, lock: str) -> str:
        """How RECLAIM takes a lock: "exclusive" if a reader is in its way, "shared" if only an
        owner is, "-" if nobody is.
        """
        for hold, needed in ((READER, "exclusive"), (OWNER, "shared")):
            if self.reclaim(kind, lock, hold).startswith("TDX_OPERAND_BUSY"):
                return needed
        return "-"


class LockRow(NamedTuple):
    """How RECLAIM takes the locks for one kind of page: of its 1G, 2M, 4K entries, and of the 4K
    entry of its TDR. alone: what it answers if nobody holds any of them.
    """

    page: str
    entry_1g: str
    entry_2m: str
    entry_4k: str
    tdr_4k: str
    alone: str


def lock_rows(scene: LockScene) -> list[LockRow]:
    """Each kind of page, each lock held in turn, once by a reader and once by an owner."""
    return [
        LockRow._make([kind, *(scene.needs(kind, lock) for lock in LOCKS), scene.reclaim(kind)])
        for kind in KINDS
    ]


# -- retries


class RetryRow(NamedTuple):
    """An answer that is not final, given `in_a_row` times. again: calls of the leaf more than in a
    teardown without it. leaked: pages. by: who calls again.
    """

    leaf: str
    answer: str
    in_a_row: int
    again: int
    leaked: int
    by: str


_WRAPPER, _CALLER, _NONE = "the wrapper (sc_retry)", "KVM, after a kick", "nobody"
_RETRIES: tuple[tuple[str, int, int, str], ...] = (
    (RECLAIM, s.TDX_RND_NO_ENTROPY, 9, _WRAPPER),
    (RECLAIM, s.TDX_RND_NO_ENTROPY, 10, _WRAPPER),
    (RECLAIM, s.TDX_OPERAND_BUSY, 1, _NONE),
    ("TDH.PHYMEM.PAGE.WBINVD", s.TDX_OPERAND_BUSY, 1, _NONE),
    ("TDH.MEM.RANGE.BLOCK", s.TDX_OPERAND_BUSY, 1, _CALLER),
    ("TDH.MEM.RANGE.BLOCK", s.TDX_OPERAND_BUSY, 2, _CALLER),
)


def retry_rows(*, gpaw: int = 48) -> list[RetryRow]:
    """Answers that might be other ones a moment later, given to the first call of a leaf in KVM's
    teardown.

    The last row is CACHE.WB, interrupted on each of two packages.
    """
    lab = TeardownLab(gpaw=gpaw, pages=2, vcpus=1, packages=2)
    rows = []
    for leaf, status, times, by in _RETRIES:
        usual = _calls(lab, leaf, None)
        again = _calls(lab, leaf, Failure(leaf, 1, status, times)) - usual
        leaked = sum(lab.leaked().values())
        rows.append(RetryRow(leaf, status_name(status), times, again, leaked, by))
    return [*rows, _interrupted(lab)]


def _calls(lab: TeardownLab, leaf: str, failure: Failure | None) -> int:
    lab.destroy(KEYID_LAST, failure)
    return lab.tally.calls_of(leaf)


def _interrupted(lab: TeardownLab) -> RetryRow:
    leaf, conditions = "TDH.PHYMEM.CACHE.WB", lab.machine.cpu.conditions
    usual = _calls(lab, leaf, None)
    conditions.interrupt_pending = True
    try:
        again = _calls(lab, leaf, None) - usual
    finally:
        conditions.interrupt_pending = False
    leaked = sum(lab.leaked().values())
    name = status_name(s.TDX_INTERRUPTED_RESUMABLE)
    return RetryRow(leaf, name, 1, again, leaked, "KVM, on each package")
