"""Packages, logical processors, their TLBs, IPIs and the hardware walk of an EPT.

A logical processor (LP) runs either the host or one vCPU. The TLB keeps what the walker found until
somebody flushes it: an entry outlives a change of the tables, which is why removing a private page
needs TLB tracking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tdxlab.arch import (
    EPT_ACCESSED,
    EPT_DIRTY,
    EPT_LEAF,
    EPT_READ,
    EPT_RWX,
    EPT_SUPPRESS_VE,
    EPT_WRITE,
    PAGE_SHIFT,
    level_size,
    table_index,
)
from tdxlab.journal import Journal, Row, Table
from tdxlab.memory import Memory
from tdxlab.trace import Trace

MAX_LPS = 256
MAX_PACKAGES = 8


#: What PCONFIG can answer when it is asked to program a key.
PCONFIG_OK, PCONFIG_NO_ENTROPY, PCONFIG_BUSY = 0, 2, 5


@dataclass
class Conditions:
    """Circumstances of the hardware that a test or a lesson sets by hand; no step back undoes them.

    interrupt_pending: an interrupt waits for the LP that is in the module. entropy_fails: RDRAND
    and RDSEED give nothing.
    pconfig_result: one of PCONFIG_OK, PCONFIG_NO_ENTROPY, PCONFIG_BUSY.
    """

    interrupt_pending: bool = False
    entropy_fails: bool = False
    pconfig_result: int = PCONFIG_OK


class Translation(NamedTuple):
    """What the hardware knows of one guest page: `hpa` of the byte, the leaf's EPT level and its R,
    W, X bits.
    """

    hpa: int
    sept_level: int
    permissions: int


class EptViolation(NamedTuple):
    """An access that the EPT does not allow. `qualification` as in the VMCS: bits 2:0 the access,
    5:3 what the entry allows. suppress_ve: bit 63 of the entry, without which the CPU may tell the
    guest with a #VE instead of leaving it.
    """

    gpa: int
    qualification: int
    suppress_ve: bool = False


class EptMisconfiguration(NamedTuple):
    """A walk met an entry with permissions that no entry can have."""

    gpa: int


#: How a walk can end.
Walked = Translation | EptViolation | EptMisconfiguration


class Cpu:
    """All logical processors of one machine.

    package_of: package number of each LP, in LP order. count: number of LPs.
    Refuses more than 256 LPs, more than 8 packages, or none at all: ValueError.
    """

    def __init__(
        self, journal: Journal, trace: Trace, memory: Memory, package_of: Sequence[int]
    ) -> None:
        if not 1 <= len(package_of) <= MAX_LPS:
            raise ValueError(f"{len(package_of)} LPs; a machine has 1 to {MAX_LPS}")
        if (
            sorted(set(package_of)) != list(range(max(package_of) + 1))
            or max(package_of) >= MAX_PACKAGES
        ):
            raise ValueError(
                f"packages {sorted(set(package_of))}; "
                f"number them 0, 1, ... and use at most {MAX_PACKAGES}"
            )
        self.package_of = tuple(package_of)
        self.count = len(self.package_of)
        self.conditions = Conditions()
        self._trace = trace
        self._memory = memory
        #: by LP: HPA of the TDVPR of the vCPU inside, and of its TDR; 0 while the host runs
        self.inside = Row(journal, self.count)
        self.tdrs_inside = Row(journal, self.count)
        #: one TLB for each LP: (EPT root, gfn) -> Translation
        self.tlbs = tuple(Table(journal) for _ in package_of)

    @property
    def lps(self) -> range:
        """Numbers of all LPs."""
        return range(self.count)

    @property
    def packages(self) -> range:
        """Numbers of all packages."""
        return range(max(self.package_of) + 1)

    def require_lp(self, lp: int) -> None:
        """Refuse, with a ValueError, an LP that this machine does not have."""
        if not (isinstance(lp, int) and 0 <= lp < self.count):
            raise ValueError(f"LP {lp} does not exist; this machine has LPs 0..{self.count - 1}")

    def vcpu_inside(self, lp: int) -> int:
        """HPA of the TDVPR of the vCPU that runs on `lp`, 0 while the host runs there."""
        return self.inside.view[lp]

    def tdr_inside(self, lp: int) -> int:
        """HPA of the TDR of the TD that runs on `lp`, 0 while the host runs there."""
        return self.tdrs_inside.view[lp]

    def enter(self, lp: int, tdvpr: int, tdr: int) -> None:
        """The LP leaves the host and runs the vCPU `tdvpr` of the TD `tdr`."""
        self.inside.put(lp, tdvpr)
        self.tdrs_inside.put(lp, tdr)
        self._trace.count("td_entry")

    def leave(self, lp: int) -> None:
        """The LP is the host's again."""
        self.inside.put(lp, 0)
        self.tdrs_inside.put(lp, 0)
        self._trace.count("td_exit")

    def send_ipi(self, lp: int) -> None:
        """Count one inter-processor interrupt to `lp`."""
        self.require_lp(lp)
        self._trace.count("ipi")

    def invept(self, lp: int, root: int) -> None:
        """Drop what `lp` has cached of the EPT at `root` (HPA of the root table)."""
        tlb = self.tlbs[lp]
        for key in [key for key in tlb if key[0] == root]:
            tlb.drop(key)
        self._trace.count("tlb_flush")

    def invept_global(self, lp: int) -> None:
        """Drop everything that `lp` has cached, of whatever EPT."""
        tlb = self.tlbs[lp]
        for key in list(tlb):
            tlb.drop(key)
        self._trace.count("tlb_flush")

    def access(
        self,
        lp: int,
        root: int,
        top_level: int,
        gpa: int,
        access: int,
        *,
        tag: int | None = None,
        ad_bits: bool = False,
    ) -> Walked:
        """One guest access as the hardware does it: TLB, else walk and fill the TLB.

        root: HPA of the root table; top_level: its sept_level (3 or 4); access: EPT_READ,
        EPT_WRITE, EPT_EXECUTE bits. tag: the root by which the TLB knows the guest, `root` if None:
        a TD's shared memory has a root of its own and the TD's tag. ad_bits: the walk sets accessed
        and dirty bits.
        Returns the translation of `gpa`, or what stands in its way, of which nothing is cached.
        """
        key = (root if tag is None else tag, gpa >> PAGE_SHIFT)
        found = self.tlbs[lp].get(key)
        if found is not None and access & ~found.permissions == 0:
            self._trace.count("tlb_hit")
            return Translation(found.hpa | gpa & 0xFFF, found.sept_level, found.permissions)
        self._trace.count("tlb_walk")
        result = self.walk(root, top_level, gpa, access, ad_bits=ad_bits)
        if isinstance(result, Translation):
            cached = result.permissions
            if ad_bits and not access & EPT_WRITE:
                # the first write has to walk, to set the dirty bit
                cached &= ~EPT_WRITE
            self.tlbs[lp].put(key, Translation(result.hpa & ~0xFFF, result.sept_level, cached))
        return result

    def walk(
        self, root: int, top_level: int, gpa: int, access: int, *, ad_bits: bool = False
    ) -> Walked:
        """Walk the EPT at `root` for `gpa`; touches no TLB. Arguments and results as `access`.

        Differs: of the ways to misconfigure an entry only one is looked for: writable but not
        readable, which is how KVM marks MMIO.
        """
        memory = self._memory
        allowed = EPT_RWX
        table = root
        path = []
        for level in range(top_level, -1, -1):
            word = memory.frame(table) + table_index(gpa, level)
            entry = memory.words.view[word]
            if entry & (EPT_READ | EPT_WRITE) == EPT_WRITE:
                return EptMisconfiguration(gpa)
            allowed &= entry & EPT_RWX
            if access & ~allowed:
                return EptViolation(gpa, access | allowed << 3, bool(entry & EPT_SUPPRESS_VE))
            path.append(word)
            target = entry & memory.pa_mask & ~0xFFF
            if entry & EPT_LEAF or not level:
                if ad_bits:
                    self._set_accessed_dirty(path, access)
                offset = gpa & (level_size(level) - 1)
                return Translation((target & ~(level_size(level) - 1)) | offset, level, allowed)
            table = target
        raise AssertionError("the loop ends at a leaf or a violation: level 0 has no tables below")

    def _set_accessed_dirty(self, path: list[int], access: int) -> None:
        """The walk used the entries at these words: A in all, D in the leaf of a write."""
        words = self._memory.words
        for word in path:
            if not words.view[word] & EPT_ACCESSED:
                words.put(word, words.view[word] | EPT_ACCESSED)
        if access & EPT_WRITE and not words.view[path[-1]] & EPT_DIRTY:
            words.put(path[-1], words.view[path[-1]] | EPT_DIRTY)
