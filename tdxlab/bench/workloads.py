"""The measured work, once for the model and once for the baseline: the same calls on the same
addresses.

Each side is a `Bench`: a TD that runs, with its S-EPT tables present and no pages, and functions
that call one leaf for one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Protocol

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.bare import BareMachine
from tdxlab.bench.baseline import Baseline
from tdxlab.hardware import Platform, default_platform
from tdxlab.host import Host
from tdxlab.host_td import HostTd

#: Guest memory that is mapped and unmapped, and the first HPA that it is given.
GUEST_BASE = 4 * SIZE_1G
PAGES = 20_480
#: Pages of one measured slice: a few milliseconds.
SLICE = 128
POOL_OFFSET = 256 << 20

#: Where the baseline finds the parameters of its TD.
TD_PARAMS = 0x1001_0000


class Bench(Protocol):
    """One side of the comparison. `call` issues a SEAMCALL that must succeed."""

    tdr: int
    keyid: int
    pool: int

    def call(self, leaf: int, rcx: int, rdx: int = 0, r8: int = 0) -> None:
        """SEAMCALL on LP 0."""
        ...

    def end(self) -> None:
        """Everything up to the first RECLAIM."""
        ...


class ModelBench:
    """The model's side. machine: a booted one."""

    def __init__(self, pages: int = PAGES) -> None:
        self.machine = BareMachine(default_platform(tdmr_gib=2))
        self.host = Host(self.machine)
        self.host.boot()
        self.td = HostTd(self.host)
        self.td.add_vcpu()
        for gpa in range(GUEST_BASE, GUEST_BASE + pages * PAGE_SIZE, SIZE_2M):
            self.td.map_tables(gpa)
        self.td.finalize()
        self.tdr, self.keyid = self.td.tdr, self.td.keyid
        self.pool = self.machine.platform.tdmrs[0].base + POOL_OFFSET

    def call(self, leaf: int, rcx: int, rdx: int = 0, r8: int = 0) -> None:
        """SEAMCALL on LP 0."""
        status = self.machine.seamcall(0, leaf, Registers(rcx=rcx, rdx=rdx, r8=r8))
        if status:
            raise RuntimeError(f"leaf {leaf} gave {status:#x}")

    def end(self) -> None:
        """Flush, write back, free the KeyID."""
        self.call(abi.TDH_VP_FLUSH, self.td.vcpus[0])
        self.call(abi.TDH_MNG_VPFLUSHDONE, self.tdr)
        for package in self.machine.cpu.packages:
            self.host.must(self.host.lp_of(package), abi.TDH_PHYMEM_CACHE_WB)
        self.call(abi.TDH_MNG_KEY_FREEID, self.tdr)


class BaselineBench:
    """The baseline's side, on the same platform."""

    def __init__(self, pages: int = PAGES) -> None:
        platform = default_platform(tdmr_gib=2)
        self.baseline = Baseline()
        self.baseline.boot(as_trace_platform(platform))
        base = platform.tdmrs[0].base
        free: Iterator[int] = count(base, PAGE_SIZE)
        self.keyid = platform.private_keyids[0] + 1
        stop = GUEST_BASE + -(-pages * PAGE_SIZE // SIZE_2M) * SIZE_2M
        memory = range(GUEST_BASE, stop)
        self.tdr = self.baseline.build_td(free, self.keyid, TD_PARAMS, memory)
        self.pool = base + POOL_OFFSET

    def call(self, leaf: int, rcx: int, rdx: int = 0, r8: int = 0) -> None:
        """SEAMCALL on LP 0."""
        status = self.baseline.seamcall(0, leaf, [rcx, rdx, r8, 0, 0, 0])
        if status:
            raise RuntimeError(f"leaf {leaf} gave {status:#x}")

    def end(self) -> None:
        """Flush, write back, free the KeyID."""
        for tdvpr in self.baseline.vcpus:
            self.call(abi.TDH_VP_FLUSH, tdvpr)
        self.call(abi.TDH_MNG_VPFLUSHDONE, self.tdr)
        for package in range(self.baseline.all_packages.bit_length()):
            lp = self.baseline.package_of.index(package)
            self.baseline.seamcall(lp, abi.TDH_PHYMEM_CACHE_WB, [0] * 6)
        self.call(abi.TDH_MNG_KEY_FREEID, self.tdr)


def as_trace_platform(platform: Platform) -> dict[str, object]:
    """A platform in the form that recorded traces have."""
    return {
        "boot": {"booted": True, "tdmr_init_done": True},
        "maxpa": platform.max_pa_bits,
        "hkid_bits": platform.keyid_bits,
        "hkid_start_bit": 52 - platform.keyid_bits,
        "private_hkid_min": platform.private_keyids[0],
        "private_hkid_max": platform.private_keyids[1],
        "tdx_global_hkid": platform.global_keyid,
        "tdmrs": [{"base": t.base, "size": t.size, "reserved": []} for t in platform.tdmrs],
        "seamrr": {"base": platform.seamrr.base, "size": platform.seamrr.size},
        "lps": len(platform.package_of),
        "packages": platform.packages,
        "lp_to_package": list(platform.package_of),
        "wbinvd_sub_blocks": platform.wbinvd_sub_blocks,
    }


# -- the work: each maps an offset in guest memory to calls


def aug(bench: Bench, offset: int) -> None:
    """Map one page."""
    bench.call(abi.TDH_MEM_PAGE_AUG, GUEST_BASE + offset, bench.tdr, bench.pool + offset)


def zap(bench: Bench, offset: int) -> None:
    """Take one page away: BLOCK, TRACK, REMOVE, WBINVD."""
    gpa = GUEST_BASE + offset
    bench.call(abi.TDH_MEM_RANGE_BLOCK, gpa, bench.tdr)
    bench.call(abi.TDH_MEM_TRACK, bench.tdr)
    bench.call(abi.TDH_MEM_PAGE_REMOVE, gpa, bench.tdr)
    bench.call(abi.TDH_PHYMEM_PAGE_WBINVD, bench.pool + offset | bench.keyid << 46)


def reclaim(bench: Bench, offset: int) -> None:
    """Take one page back from a TD in teardown."""
    bench.call(abi.TDH_PHYMEM_PAGE_RECLAIM, bench.pool + offset)


Work = Callable[[Bench, int], None]


def measure(bench: Bench, work: Work, pages: int = PAGES) -> float:
    """CPU seconds a page for `work` on the first `pages` pages, as `best_slice`."""
    return best_slice(lambda page: work(bench, page * PAGE_SIZE), pages)


def best_slice(work: Callable[[int], None], pages: int, size: int = SLICE) -> float:
    """CPU seconds a page for `work` on pages 0 to `pages` - 1: the best slice of `size` pages.

    A slice is short enough that one of them goes undisturbed on a machine that does other things.
    """
    best = float("inf")
    for first in range(0, pages, size):
        last = min(first + size, pages)
        start = time.process_time()
        for page in range(first, last):
            work(page)
        best = min(best, (time.process_time() - start) / (last - first))
    return best


def full_round(bench: Bench, pages: int = PAGES) -> dict[str, float]:
    """Map, take away, map again, end, reclaim; CPU seconds a page of each kind of work."""
    seconds = {"AUG": measure(bench, aug, pages), "zap": measure(bench, zap, pages)}
    measure(bench, aug, pages)
    bench.end()
    seconds["RECLAIM"] = measure(bench, reclaim, pages)
    return seconds
