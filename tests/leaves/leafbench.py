"""A booted machine and a TD in any state, built call by call: what the tests of all leaves share.

Numbers in here are the module's documented ones, written out again on purpose: a wrong constant in
the model must not make its own test pass.
"""

from dataclasses import replace
from typing import Any

from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.abi.registers import Registers
from tdxlab.abi.status import describe
from tdxlab.abi.structs import make_td_params
from tdxlab.bare import BareMachine
from tdxlab.hardware import Platform, Region, TdmrPlan, default_platform
from tdxlab.host import Host
from tdxlab.journal import Words
from tdxlab.seam.pamt import PamtEntry
from tdxlab.seam.td import Td, Tdcs, Tdr, Tdvps

TDMR = 0x1_0000_0000
#: The second GiB of the TDMR: pages there share no PAMT entry with those of the TDs in the first.
SECOND = TDMR + 0x4000_0000
#: In each GiB, from its start on: where 2 MiB pages are taken from, one that is never taken, and a
#: page that is reserved.
BIG_OFFSET, LONE_OFFSET, RESERVED_OFFSET = 0x1000_0000, 0x2000_0000, 0x3000_0000
BIG_PAGES, RESERVED = SECOND + BIG_OFFSET, SECOND + RESERVED_OFFSET
#: RAM that no TDMR covers.
OUTSIDE = 0x1000_0000
PARAMS = 0x2001_0000
SOURCE = 0x2002_0000
SIZE_4K, SIZE_2M, SIZE_1G = 1 << 12, 1 << 21, 1 << 30
KEYID_SHIFT = 46
SHARED_48 = 1 << 47

PLATFORM = replace(
    default_platform(tdmr_gib=2),
    tdmrs=(
        TdmrPlan(
            TDMR,
            2 * SIZE_1G,
            (
                Region(RESERVED_OFFSET, 2 * SIZE_4K),
                Region(SIZE_1G + RESERVED_OFFSET, 2 * SIZE_4K),
            ),
        ),
    ),
)

#: S-EPT entries without their address, as they lie in memory.
RAW = {
    "FREE": 0x80E0_0000_0000_0000,
    "NL_MAPPED": 0x8000_0000_0000_0007,
    "NL_BLOCKED": 0x8080_0000_0000_0000,
    "MAPPED": 0x8000_0000_0000_00F7,
    "BLOCKED": 0x8080_0000_0000_00F0,
    "PENDING": 0x8100_0000_0000_00F0,
    "PENDING_BLOCKED": 0x8180_0000_0000_00F0,
}
#: The state byte that the host is shown, and the bits of an entry that spell the state.
SHOWN_STATE = {
    "FREE": 0x00,
    "BLOCKED": 0x01,
    "PENDING": 0x02,
    "PENDING_BLOCKED": 0x03,
    "MAPPED": 0x04,
    "NL_BLOCKED": 0x81,
    "NL_MAPPED": 0x84,
}
STATE_BITS = 0x01E0_0000_0000_02C0
ENTRY_LOCKED, ENTRY_WANTED = 1 << 11, 1 << 52

NDA, RSVD, REG, TDR, TDCX, TDVPR, EPT = 0, 1, 3, 4, 5, 6, 8


def state_of(raw: int) -> str:
    """Name of the state that an S-EPT entry spells."""
    return next(name for name, bits in RAW.items() if not (raw ^ bits) & STATE_BITS)


def details(raw: int, sept_level: int) -> dict[str, int]:
    """RCX and RDX by which the host is shown an entry."""
    name = state_of(raw)
    rcx = raw & 0x800F_FFFF_FFFF_F0FF if raw & 0x80 else raw & 0x87
    if name == "FREE":
        rcx = 1 << 63
    return {"rcx": rcx, "rdx": sept_level | SHOWN_STATE[name] << 8}


class Bench:
    """One machine, booted if not told otherwise: 4 LPs in 2 packages, one TDMR of 2 GiB. `reset`
    makes it new.
    """

    def __init__(self, platform: Platform = PLATFORM, *, boot: bool = True) -> None:
        self.machine = BareMachine(platform)
        if boot:
            Host(self.machine).boot()
        self._mark = self.machine.mark()
        self.reset()

    def reset(self) -> None:
        self.machine.rewind(self._mark)
        self.conditions = self.machine.cpu.conditions
        self.conditions.interrupt_pending = self.conditions.entropy_fails = False
        self.conditions.pconfig_result = 0
        self.machine.module.halted = None
        self._pages, self._spares, self._big_pages = TDMR, SECOND, BIG_PAGES
        self._keyids = 33

    def page(self) -> int:
        """A free 4 KiB page in the first GiB."""
        self._pages += SIZE_4K
        return self._pages - SIZE_4K

    def spare(self) -> int:
        """A free 4 KiB page in the second GiB."""
        self._spares += SIZE_4K
        return self._spares - SIZE_4K

    def big(self) -> int:
        """A free 2 MiB page in the second GiB."""
        self._big_pages += SIZE_2M
        return self._big_pages - SIZE_2M

    def keyid(self) -> int:
        self._keyids += 1
        return self._keyids - 1

    def call(
        self, leaf: int, *, lp: int = 0, version: int = 0, **registers: int
    ) -> tuple[int, Registers]:
        values = Registers(**registers)
        return self.machine.seamcall(lp, leaf | version << 16, values), values

    def must(self, leaf: int, *, lp: int = 0, **registers: int) -> Registers:
        status, values = self.call(leaf, lp=lp, **registers)
        assert status == 0, f"{abi.HOST_LEAVES[leaf].name}: {describe(status)}"
        return values

    def td(self, **params: Any) -> "BuiltTd":
        """A TD that TDH.MNG.INIT has just made INITIALIZED."""
        td = BuiltTd(self)
        td.configure_keys()
        td.add_tdcx(6 + params.get("num_l2_vms", 0))
        td.init(**params)
        return td

    @property
    def words(self) -> Words:
        return self.machine.memory.words

    def pamt(self, hpa: int, size: int = 0) -> PamtEntry:
        return self.machine.module.pamt.describe(hpa, size)

    def give(self, hpa: int, page_type: int, owner: int, size: int = 0) -> None:
        """Make a page another kind of page by hand."""
        pamt = self.machine.module.pamt
        pamt.give(pamt.entry(hpa, size), page_type, owner)

    def digest(self) -> str:
        return self.machine.digest(counters=False)


class BuiltTd:
    """A TD that has been created, and the pages it got. `cx`: TDCS pages; `vcpus`: TDVPRs."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.tdr, self.keyid = bench.page(), bench.keyid()
        self.cx: list[int] = []
        self.vcpus: list[int] = []
        self.tables: dict[tuple[int, int], int] = {}
        self.top = 3
        bench.must(abi.TDH_MNG_CREATE, rcx=self.tdr, rdx=self.keyid)

    # -- building

    def configure_keys(self) -> None:
        for lp in (0, 2):
            self.bench.must(abi.TDH_MNG_KEY_CONFIG, lp=lp, rcx=self.tdr)

    def add_tdcx(self, count: int) -> None:
        for _ in range(count):
            self.cx.append(self.bench.page())
            self.bench.must(abi.TDH_MNG_ADDCX, rcx=self.cx[-1], rdx=self.tdr)

    def init(self, *, gpaw: int = 48, max_vcpus: int = 4, **params: Any) -> None:
        self.top = 3 if gpaw == 48 else 4
        params.setdefault("config_flags", 0 if gpaw == 48 else 1)
        eptp = 6 | self.top << 3
        raw = make_td_params(max_vcpus=max_vcpus, eptp_controls=eptp, **params)
        self.bench.machine.store(PARAMS, raw)
        self.bench.must(abi.TDH_MNG_INIT, rcx=self.tdr, rdx=PARAMS)

    def create_vcpu(self, pages: int = 5) -> int:
        """A vCPU with `pages` pages behind its TDVPR, not initialised."""
        tdvpr = self.bench.page()
        self.bench.must(abi.TDH_VP_CREATE, rcx=tdvpr, rdx=self.tdr)
        for _ in range(pages):
            self.bench.must(abi.TDH_VP_ADDCX, rcx=self.bench.page(), rdx=tdvpr)
        return tdvpr

    def add_vcpu(self, lp: int = 0) -> int:
        tdvpr = self.create_vcpu()
        self.bench.must(abi.TDH_VP_INIT, lp=lp, rcx=tdvpr)
        self.vcpus.append(tdvpr)
        return tdvpr

    def map_tables(self, gpa: int, down_to: int = 0) -> None:
        """Link the S-EPT pages above the entry for `gpa` at level `down_to`."""
        for level in range(self.top, down_to, -1):
            base = gpa & -(1 << (12 + 9 * level))
            if (base, level) not in self.tables:
                hpa = self.tables[base, level] = self.bench.page()
                self.bench.must(abi.TDH_MEM_SEPT_ADD, rcx=base | level, rdx=self.tdr, r8=hpa)

    def add_page(self, gpa: int, content: bytes = b"") -> int:
        self.map_tables(gpa)
        hpa = self.bench.page()
        self.bench.machine.store(SOURCE, content.ljust(SIZE_4K, b"\0"))
        self.bench.must(abi.TDH_MEM_PAGE_ADD, rcx=gpa, rdx=self.tdr, r8=hpa, r9=SOURCE)
        return hpa

    def aug(self, gpa: int, level: int = 0) -> int:
        self.map_tables(gpa, level)
        hpa = self.bench.spare() if level == 0 else self.bench.big()
        self.bench.must(abi.TDH_MEM_PAGE_AUG, rcx=gpa | level, rdx=self.tdr, r8=hpa)
        return hpa

    def finalize(self) -> None:
        self.bench.must(abi.TDH_MR_FINALIZE, rcx=self.tdr)

    def start(self, lp: int = 0) -> None:
        """One vCPU, and finalised."""
        self.add_vcpu(lp)
        self.finalize()

    # -- running

    def enter(self, vcpu: int = 0, lp: int = 0, **registers: int) -> None:
        """TDH.VP.ENTER; the guest must be reached."""
        status, _ = self.bench.call(abi.TDH_VP_ENTER, lp=lp, rcx=self.vcpus[vcpu], **registers)
        assert status == -1, describe(status)

    def tdcall(self, leaf: int, lp: int = 0, **registers: int) -> GuestOutcome:
        return self.bench.machine.tdcall(lp, leaf, Registers(**registers))

    def accept(self, gpa: int, level: int = 0) -> None:
        assert self.tdcall(abi.TDG_MEM_PAGE_ACCEPT, rcx=gpa | level).status == 0

    def block(self, gpa: int, level: int = 0) -> None:
        self.bench.must(abi.TDH_MEM_RANGE_BLOCK, rcx=gpa | level, rdx=self.tdr)

    def track(self, lp: int = 0) -> None:
        self.bench.must(abi.TDH_MEM_TRACK, lp=lp, rcx=self.tdr)

    def end(self, teardown: bool = True) -> None:
        """VPFLUSHDONE, and as far as TEARDOWN; no vCPU may be associated any more."""
        self.bench.must(abi.TDH_MNG_VPFLUSHDONE, rcx=self.tdr)
        if teardown:
            for lp in (0, 2):
                self.bench.must(abi.TDH_PHYMEM_CACHE_WB, lp=lp)
            self.bench.must(abi.TDH_MNG_KEY_FREEID, rcx=self.tdr)

    # -- looking

    def tdr_word(self, word: int) -> int:
        """Index of a word of the TDR (Tdr.*)."""
        return Td(self.bench.machine.memory, self.tdr).page + word

    def tdcs_word(self, word: int) -> int:
        """Index of a word of the TDCS (Tdcs.*)."""
        td = Td(self.bench.machine.memory, self.tdr)
        td.map_tdcs(self.bench.machine.memory)
        return td.tdcs + word

    def vcpu_word(self, word: int, vcpu: int = 0) -> int:
        """Index of a word of a TDVPR (Tdvps.*)."""
        return self.bench.machine.memory.frame(self.vcpus[vcpu]) + word

    def read(self, index: int) -> int:
        return self.bench.words.view[index]

    @property
    def chldcnt(self) -> int:
        return self.read(self.tdr_word(Tdr.CHLDCNT))

    @property
    def lifecycle(self) -> int:
        return self.read(self.tdr_word(Tdr.LIFECYCLE))

    @property
    def op_state(self) -> int:
        return self.read(self.tdcs_word(Tdcs.OP_STATE))

    @property
    def associated(self) -> int:
        return self.read(self.tdcs_word(Tdcs.NUM_ASSOC_VCPUS))

    @property
    def inside(self) -> tuple[int, int]:
        """The two counters of vCPUs inside, even epochs first."""
        first = self.tdcs_word(Tdcs.REFCOUNT)
        return self.read(first), self.read(first + 1)

    @property
    def epoch(self) -> int:
        return self.read(self.tdcs_word(Tdcs.TD_EPOCH))

    def vcpu_state(self, vcpu: int = 0) -> int:
        return self.read(self.vcpu_word(Tdvps.STATE, vcpu))

    def locate(self, gpa: int, level: int = 0) -> tuple[int, int]:
        """Where a walk to (gpa, level) ends: (index of the entry's word, level reached)."""
        memory = self.bench.machine.memory
        table, at = self.cx[3], self.top
        while True:
            index = memory.frame(table) + (gpa >> (12 + 9 * at) & 511)
            raw = memory.words.view[index]
            if at == level or not raw & 7 or raw & 0x80:
                return index, at
            table, at = raw & 0xF_FFFF_FFFF_F000, at - 1

    def septe(self, gpa: int, level: int = 0) -> int:
        """The raw entry at exactly (gpa, level)."""
        index, reached = self.locate(gpa, level)
        assert reached == level
        return self.read(index)
