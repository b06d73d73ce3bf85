"""A crowded machine, and a look at what exists in it: the ground on which random walks go.

Everything here is looked up in the machine itself when it is asked for, so a rewind of the machine
needs no book-keeping on the side. Only a small universe is looked at: one MiB of pages, a few
2 MiB pages, a dozen guest addresses.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.abi.structs import CONFIG_FLAGS_GPAW_52, EPTP_4_LEVELS, EPTP_5_LEVELS, make_td_params
from tdxlab.arch import HPA_MASK, PAGE_SIZE, SIZE_1G, SIZE_2M, level_size
from tdxlab.bare import BareMachine
from tdxlab.hardware import default_platform
from tdxlab.host import Host
from tdxlab.host_td import VCPU_PAGES, HostTd
from tdxlab.seam import sept
from tdxlab.seam.epochs import is_tracked
from tdxlab.seam.rules import (
    OP_STATE_ACCEPTS,
    PT_NDA,
    PT_TDR,
    PT_TDVPR,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_MASK,
    TD_KEYS_CONFIGURED,
    TLB_TRACKING_OP_STATES,
)
from tdxlab.seam.td import (
    ATTRIBUTES_DEBUG,
    ATTRIBUTES_SEPT_VE_DISABLE,
    MIN_TDCX,
    Tdcs,
    Tdr,
    Tdvps,
)

BASE = 4 * SIZE_1G
POOL_PAGES = 256
POOL = range(BASE, BASE + POOL_PAGES * PAGE_SIZE, PAGE_SIZE)
BIG_POOL = range(BASE + SIZE_2M, BASE + 9 * SIZE_2M, SIZE_2M)

#: A VM exit reason that the module has no handler for.
UNEXPECTED_EXIT = 33

#: Host buffers in low memory: a page to copy from, room for answers, TD_PARAMS of several kinds.
SOURCE, ANSWER, SCRATCH, PARAMS = 0x2000_0000, 0x2001_0000, 0x2002_0000, 0x2003_0000
PARAMS_KINDS = (
    make_td_params(max_vcpus=2, eptp_controls=EPTP_4_LEVELS),
    make_td_params(max_vcpus=3, eptp_controls=EPTP_5_LEVELS, config_flags=CONFIG_FLAGS_GPAW_52),
    make_td_params(max_vcpus=1, eptp_controls=EPTP_4_LEVELS, attributes=ATTRIBUTES_DEBUG),
    make_td_params(max_vcpus=2, eptp_controls=EPTP_5_LEVELS, attributes=ATTRIBUTES_SEPT_VE_DISABLE),
)
SMALL_GPAS = (0, 0x1000, 0x2000, SIZE_2M, SIZE_2M + 0x1000, SIZE_1G, 1 << 39)


class EntryView(NamedTuple):
    """An S-EPT entry that a walk reaches. operand: GPA and level as leaves take them."""

    operand: int
    gpa: int
    place: sept.Place

    @property
    def bits(self) -> int:
        """The state's bits."""
        return self.place.septe & SEPT_STATE_MASK

    @property
    def sept_level(self) -> int:
        return self.place.sept_level


class TdView:
    """The fields of one TD that a caller decides by."""

    def __init__(self, machine: BareMachine, tdr: int) -> None:
        self.machine = machine
        self.tdr = tdr
        view, page = machine.memory.words.view, machine.memory.frame(tdr)
        self.lifecycle = view[page + Tdr.LIFECYCLE]
        self.tdcx = view[page + Tdr.NUM_TDCX]
        self.hkid = view[page + Tdr.HKID]
        self.fatal = view[page + Tdr.FATAL]
        self.children = view[page + Tdr.CHLDCNT]
        self.key_packages = view[page + Tdr.PKG_CONFIG_BITMAP]
        pamt = machine.module.pamt
        self.is_locked = bool(pamt.words.view[pamt.entry(tdr, 0)] & 0xFFFD)
        self.tdcs = 0
        if self.tdcx >= MIN_TDCX and self.lifecycle == TD_KEYS_CONFIGURED:
            self.tdcs = machine.memory.frame(self._tdcx(0))

    def _tdcx(self, index: int) -> int:
        memory = self.machine.memory
        pa = memory.words.view[memory.frame(self.tdr) + Tdr.TDCX_PA + index]
        return pa & memory.pa_mask & HPA_MASK

    def field(self, word: int) -> int:
        """A word of the TDCS (Tdcs.*), which must be there."""
        return self.machine.memory.words.view[self.tdcs + word]

    @property
    def top_level(self) -> int:
        return self.field(Tdcs.EPTP) >> 3 & 7

    @property
    def limit(self) -> int:
        """First GPA that is not private."""
        return 1 << (51 if self.field(Tdcs.GPAW) else 47)

    def gpas(self) -> tuple[int, ...]:
        """The guest addresses of the universe, the last private page among them."""
        return (*SMALL_GPAS, self.limit - PAGE_SIZE)

    def accepts(self, leaf: int, *, exclusive: bool = False) -> bool:
        """True if the op-state allows `leaf`; exclusive: and nobody holds the TDR."""
        if not self.tdcs or self.fatal or (exclusive and self.is_locked):
            return False
        return self.field(Tdcs.OP_STATE) in OP_STATE_ACCEPTS[leaf]

    def entries(self, lowest: int, highest: int, states: frozenset[int]) -> list[EntryView]:
        """Reachable entries of the universe between two levels, in one of the states."""
        return [entry for entry in self._reachable(lowest, highest) if entry.bits in states]

    def _reachable(self, lowest: int, highest: int) -> Iterator[EntryView]:
        memory, eptp = self.machine.memory, self.field(Tdcs.EPTP)
        for sept_level in range(lowest, min(highest, self.top_level) + 1):
            for gpa in sorted({gpa & -level_size(sept_level) for gpa in self.gpas()}):
                place = sept.walk(memory, eptp, gpa, sept_level)
                if place.sept_level == sept_level:
                    yield EntryView(gpa | sept_level, gpa, place)

    def is_free_to_go(self, entry: EntryView) -> bool:
        """True if TLB tracking does not stand in the way of taking away what the entry maps."""
        if self.field(Tdcs.OP_STATE) not in TLB_TRACKING_OP_STATES:
            return True
        state, pamt = SEPT_STATE_BY_BITS[entry.bits], self.machine.module.pamt
        size = entry.sept_level if state.is_leaf else 0
        bepoch = pamt.bepoch(pamt.entry(entry.place.septe & HPA_MASK, size))
        return state.blocked and is_tracked(self.machine.memory.words, self.tdcs, bepoch)


class VcpuView:
    """The fields of one vCPU that a caller decides by."""

    def __init__(self, machine: BareMachine, tdvpr: int) -> None:
        view, page = machine.memory.words.view, machine.memory.frame(tdvpr)
        pamt = machine.module.pamt
        entry = pamt.entry(tdvpr, 0)
        self.tdvpr = tdvpr
        self.td = TdView(machine, pamt.owner(entry))
        self.is_locked = bool(pamt.words.view[entry] & 0xFFFD)
        self.state = view[page + Tdvps.STATE]
        self.pages = view[page + Tdvps.NUM_PAGES]
        self.lp = view[page + Tdvps.ASSOC_LPID]


class Scene:
    """A machine that several TDs live on, and what a host could know of it."""

    def __init__(self, machine: BareMachine) -> None:
        self.machine = machine
        machine.store(SOURCE, bytes(range(256)) * 16)
        for number, params in enumerate(PARAMS_KINDS):
            machine.store(PARAMS + number * PAGE_SIZE, params)

    def pages(self, *page_types: int) -> list[int]:
        """Pages of the pool of some PAMT types."""
        pamt = self.machine.module.pamt
        if BASE >> 30 not in pamt.blocks:
            return []
        first = pamt.entry(BASE, 0)
        words = pamt.words.view[first : first + 2 * POOL_PAGES].tolist()[::2]
        return [
            hpa for hpa, word in zip(POOL, words, strict=True) if word >> 16 & 0xFF in page_types
        ]

    def free_pages(self) -> list[int]:
        """A few free pages, the lowest ones."""
        return self.pages(PT_NDA)[:8]

    def free_big_pages(self) -> list[int]:
        """Free 2 MiB pages of a machine that is ready."""
        pamt = self.machine.module.pamt
        return [
            hpa
            for hpa in BIG_POOL
            if pamt.page_type(pamt.entry(hpa, 1)) == PT_NDA and pamt.is_all_free(hpa)
        ]

    def tds(self) -> list[TdView]:
        """All TDs in the pool."""
        return [TdView(self.machine, tdr) for tdr in self.pages(PT_TDR)]

    def vcpus(self) -> list[VcpuView]:
        """All vCPUs whose TD is there."""
        return [VcpuView(self.machine, tdvpr) for tdvpr in self.pages(PT_TDVPR)]

    def host_lps(self) -> list[int]:
        """LPs that run the host."""
        cpu = self.machine.cpu
        return [lp for lp in cpu.lps if not cpu.vcpu_inside(lp)]

    def guest_lps(self) -> list[int]:
        """LPs that run a guest."""
        cpu = self.machine.cpu
        return [lp for lp in cpu.lps if cpu.vcpu_inside(lp)]

    def guest_td(self, lp: int) -> TdView:
        """The TD inside an LP."""
        return TdView(self.machine, self.machine.cpu.tdr_inside(lp))


def empty_scene() -> Scene:
    """A booted machine of four LPs in two packages, without a TD."""
    machine = BareMachine(default_platform(lps=4, packages=2))
    Host(machine).boot()
    return Scene(machine)


def crowded_scene() -> Scene:
    """The same with eight TDs: two that run, one that died, one that is built, three that begin,
    one that ends.
    """
    scene = empty_scene()
    host = Host(scene.machine)
    _running(host, HostTd(host, gpaw=48, max_vcpus=2), (0, 1))
    _running(host, HostTd(host, gpaw=52, max_vcpus=2, attributes=ATTRIBUTES_DEBUG), (2,))
    _dead(host, HostTd(host))
    _building(host, HostTd(host, gpaw=52, max_vcpus=1))
    _beginning(host)
    _ending(host, HostTd(host, gpaw=48))
    return scene


def _running(host: Host, td: HostTd, lps: tuple[int, ...]) -> None:
    for lp in lps:
        td.add_vcpu(lp=lp)
    td.add_page(0, b"code")
    td.add_page(0x1000, b"data")
    td.aug(SIZE_2M, 1)
    td.finalize()
    td.enter(0, lp=lps[0])
    td.accept(lps[0], SIZE_2M, 1)
    td.aug(0x2000, lp=3)
    td.kick(lps[0])


def _dead(host: Host, td: HostTd) -> None:
    """An exit that nobody expects ends a TD that is no debug TD."""
    td.add_vcpu(lp=3)
    td.add_page(0)
    td.finalize()
    td.enter(0, lp=3)
    host.machine.vm_exit(3, UNEXPECTED_EXIT, Registers())


def _building(host: Host, td: HostTd) -> None:
    """Two vCPUs that have all their pages, one more than it may have, and one that lacks some; a
    2 MiB page that was split.
    """
    for pages in (VCPU_PAGES, VCPU_PAGES, 2):
        tdvpr = host.take_page()
        host.must(0, abi.TDH_VP_CREATE, rcx=tdvpr, rdx=td.tdr)
        for _ in range(pages):
            host.must(0, abi.TDH_VP_ADDCX, rcx=host.take_page(), rdx=tdvpr)
    td.add_page(0, b"code")
    td.aug(SIZE_1G, 1)
    table = host.take_page()
    host.must(0, abi.TDH_MEM_PAGE_DEMOTE, rcx=SIZE_1G | 1, rdx=td.tdr, r8=table)


def _beginning(host: Host) -> None:
    """One TD that has its key on one package, one that lacks a control page, one without
    parameters.
    """
    young = host.take_page()
    host.must(0, abi.TDH_MNG_CREATE, rcx=young, rdx=host.take_keyid())
    host.must(0, abi.TDH_MNG_KEY_CONFIG, rcx=young)
    for control_pages in (MIN_TDCX - 1, MIN_TDCX):
        tdr = host.take_page()
        host.must(0, abi.TDH_MNG_CREATE, rcx=tdr, rdx=host.take_keyid())
        for package in host.machine.cpu.packages:
            host.must(host.lp_of(package), abi.TDH_MNG_KEY_CONFIG, rcx=tdr)
        for _ in range(control_pages):
            host.must(0, abi.TDH_MNG_ADDCX, rcx=host.take_page(), rdx=tdr)


def _ending(host: Host, td: HostTd) -> None:
    """A TD in TEARDOWN, whose pages wait to be reclaimed."""
    td.add_vcpu(lp=0)
    td.add_page(0)
    host.must(0, abi.TDH_VP_FLUSH, rcx=td.vcpus[0])
    host.must(0, abi.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)
    for package in host.machine.cpu.packages:
        host.must(host.lp_of(package), abi.TDH_PHYMEM_CACHE_WB)
    host.must(0, abi.TDH_MNG_KEY_FREEID, rcx=td.tdr)
