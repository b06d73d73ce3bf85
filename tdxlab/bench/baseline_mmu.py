"""The yardstick's host: KVM's mirror EPT over `Baseline`, in the plainest Python that is right.

A mirror table is a list of 512 entries, in a dict keyed by its page frame; a memslot is a tuple,
and the private ranges are a sorted list. A fault makes the kernel's checks in the kernel's order,
freezes the entry while the SEAMCALL runs, and publishes it; a zap clears the entry, then blocks,
tracks, kicks, removes and writes back. There is no journal, no step generator, no event and no
statistics but the number of leaves.

Source: Linux 6.16, arch/x86/kvm/mmu/mmu.c, tdp_mmu.c, arch/x86/kvm/vmx/tdx.c.
Differs: private memory only; one VM, whose vCPUs are all out of the guest; tables are never freed.
"""

from bisect import bisect_right
from collections.abc import Iterator

from tdxlab.bench.baseline import Baseline

EMPTY, FROZEN = 1 << 63, 1 << 63 | 0x5A0
PRESENT, HUGE, HPA_MASK = 1 << 11, 1 << 7, 0x000FFFFFFFFFF000
LINK, LEAF = 0x8000000000000907, 0x8600000000000B37
EFAULT, EAGAIN, EIO = -14, -11, -5
RETRY, FIXED, SPURIOUS = 1, 5, 6
BUSY_CLASS = 0x80000200
SEPT_ADD, AUG, BLOCK, WBINVD, REMOVE, TRACK = 3, 6, 7, 41, 29, 38


class BaselineMmu:
    """One TD's private memory on a host. tdr, hkid: the TD, runnable. pages: byte addresses of free
    pages. base, npages: the one memslot, in frames, all of it private. levels: of the S-EPT.
    """

    def __init__(
        self,
        module: Baseline,
        tdr: int,
        hkid: int,
        pages: Iterator[int],
        base: int,
        npages: int,
        levels: int = 4,
    ) -> None:
        self.module, self.tdr, self.hkid, self.pages = module, tdr, hkid, pages
        self.levels = levels
        backing: dict[int, int] = {}
        self.slots = [(base, npages, backing)]
        self.private = [base, base + npages]
        self.tables: dict[int, list[int]] = {0: [EMPTY] * 512}
        self.readers = 0
        self.writer = False
        self.seq = self.in_progress = 0
        self.invalid = (0, 0)
        self.leaves = 0
        self.dead = False
        self.vcpus = [False]
        self.references: dict[int, int] = {}

    # -- a fault

    def fault(self, gpa: int) -> int:
        """A write to the private `gpa`: RET_PF_* or -errno."""
        if self.dead:
            return EIO
        while True:
            result = self._try_fault(gpa >> 12)
            if result != RETRY or self.dead:
                return result

    def _try_fault(self, gfn: int) -> int:
        seq = self.seq
        if not bisect_right(self.private, gfn) & 1:
            return EFAULT
        slot = self._slot(gfn)
        if slot is None:
            return EFAULT
        if self.in_progress and self.invalid[0] <= gfn < self.invalid[1]:
            return RETRY
        base, _, backing = slot
        hpa = backing.get(gfn - base)
        if hpa is None:
            hpa = backing[gfn - base] = next(self.pages)
        if self.writer:
            return RETRY
        self.readers += 1
        if seq != self.seq:
            self.readers -= 1
            return RETRY
        result = self._map(gfn, hpa)
        self.readers -= 1
        return result

    def _slot(self, gfn: int) -> tuple[int, int, dict[int, int]] | None:
        for slot in self.slots:
            if slot[0] <= gfn < slot[0] + slot[1]:
                return slot
        return None

    def _map(self, gfn: int, hpa: int) -> int:
        table = self.tables[0]
        level = self.levels
        while True:
            index = gfn >> 9 * (level - 1) & 511
            entry = table[index]
            if entry == FROZEN:
                return RETRY
            if level == 1:
                return self._map_leaf(table, index, entry, gfn, hpa)
            if not entry & PRESENT:
                if self._link(table, index, entry, gfn, level):
                    return RETRY
                entry = table[index]
            table = self.tables[(entry & HPA_MASK) >> 12]
            level -= 1

    def _map_leaf(self, table: list[int], index: int, entry: int, gfn: int, hpa: int) -> int:
        if entry & PRESENT:
            return SPURIOUS
        if table[index] != entry:
            return RETRY
        table[index] = FROZEN
        self.references[hpa] = self.references.get(hpa, 0) + 1
        status = self.module.seamcall(0, AUG, [gfn << 12, self.tdr, hpa, 0, 0, 0])
        if status:
            table[index] = entry
            self.references[hpa] -= 1
            self.dead = status >> 32 != BUSY_CLASS
            return RETRY
        table[index] = LEAF | hpa
        self.leaves += 1
        return FIXED

    def _link(self, table: list[int], index: int, entry: int, gfn: int, level: int) -> int:
        mirror, external = next(self.pages), next(self.pages)
        self.tables[mirror >> 12] = [EMPTY] * 512
        table[index] = FROZEN
        gpa = gfn >> 9 * (level - 1) << 9 * (level - 1) + 12
        status = self.module.seamcall(0, SEPT_ADD, [gpa | level - 1, self.tdr, external, 0, 0, 0])
        table[index] = entry if status else LINK | mirror
        self.dead = bool(status) and status >> 32 != BUSY_CLASS
        return status

    # -- a zap

    def zap(self, start: int, end: int) -> int:
        """Take the pages of gfns start to end - 1 away; returns how many were mapped."""
        self.in_progress += 1
        self.invalid = (start, end)
        self.writer = True
        zapped = 0
        gfn = start
        while gfn < end:
            table = self._leaf_table(gfn)
            for index in range(gfn & 511, min(512, (gfn & 511) + end - gfn)):
                if table is not None and table[index] & PRESENT:
                    zapped += 1
                    self._remove(table, index, (gfn & ~511) + index)
            gfn = (gfn & ~511) + 512
        self.writer = False
        self.seq += 1
        self.in_progress -= 1
        return zapped

    def _leaf_table(self, gfn: int) -> list[int] | None:
        table = self.tables[0]
        for level in range(self.levels, 1, -1):
            entry = table[gfn >> 9 * (level - 1) & 511]
            if not entry & PRESENT:
                return None
            table = self.tables[(entry & HPA_MASK) >> 12]
        return table

    def _remove(self, table: list[int], index: int, gfn: int) -> None:
        hpa = table[index] & HPA_MASK
        table[index] = EMPTY
        self.leaves -= 1
        gpa, call = gfn << 12, self.module.seamcall
        if self._patiently(BLOCK, [gpa, self.tdr, 0, 0, 0, 0]):
            self.dead = True
        if self._patiently(TRACK, [self.tdr, 0, 0, 0, 0, 0]):
            self.dead = True
        self._kick()
        if self._patiently(REMOVE, [gpa, self.tdr, 0, 0, 0, 0]):
            self.dead = True
        keyed = hpa | self.hkid << self.module.hkid_shift
        if call(0, WBINVD, [keyed, 0, 0, 0, 0, 0]):
            self.dead = True
        self.references[hpa] -= 1

    def _patiently(self, leaf: int, regs: list[int]) -> int:
        status = self.module.seamcall(0, leaf, list(regs))
        if status >> 32 == BUSY_CLASS:
            self._kick()
            status = self.module.seamcall(0, leaf, list(regs))
        return status

    def _kick(self) -> None:
        for number, inside in enumerate(self.vcpus):
            if inside:
                self.vcpus[number] = False
