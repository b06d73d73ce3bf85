"""The walker of one TDP page table: every entry of a gfn range, parents before their children.

The walk stands at one entry at a time and may be interrupted there: a walker that lets go of
mmu_lock marks its iterator as yielded, and the walk then starts again from the root, at the gfn
that it wanted to visit next. Non-present entries are visited too.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_iter.c and tdp_iter.h; tdp_mmu.c for the yielding.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from tdxlab.arch import ENTRIES_PER_TABLE, HPA_MASK, LEVEL_BITS
from tdxlab.kvm.role import IS_MIRROR, LEVEL_MASK, Role
from tdxlab.kvm.spte import PT_PAGE_SIZE_MASK, SPTE_MMU_PRESENT_MASK
from tdxlab.kvm.vm import MmuPage, Vm
from tdxlab.steps import Step

#: Levels that a root can have. Source: PT64_ROOT_MAX_LEVEL.
MAX_ROOT_LEVEL = 5

_LAST = ENTRIES_PER_TABLE - 1
#: By level: how far a gfn is shifted to find its index, and the bits of it that an entry has.
_SHIFT = (0, *(LEVEL_BITS * level for level in range(MAX_ROOT_LEVEL)))
_FIRST = tuple(-1 << shift for shift in _SHIFT)
_SMM = Role.smm.mask
_LINK_BITS = SPTE_MMU_PRESENT_MASK | PT_PAGE_SIZE_MASK


class TdpIter:
    """struct tdp_iter: where a walk of one root stands.

    gfn: first frame of the entry, without gfn_bits; level: of the entry. gfn_bits: bits that are
    set in every gfn when it is looked up in this root. min_level: the lowest level to visit; one
    above the root's holds nobody back.
    word: index of the entry in `vm.memory.words`; old_spte: its value when it was last read.
    next_last_level_gfn: gfn that the walk is heading for; yielded_gfn: what that was when the walk
    last started. yielded: set by who let go of the lock at this entry; the walk starts again.
    valid: False when the walk has left the table, or could not begin. is_mirror: it is a mirror's.
    """

    __slots__ = (
        "as_id",
        "gfn",
        "gfn_bits",
        "is_mirror",
        "level",
        "min_level",
        "next_last_level_gfn",
        "old_spte",
        "root",
        "valid",
        "vm",
        "word",
        "yielded",
        "yielded_gfn",
    )

    def __init__(self, vm: Vm, root: MmuPage, min_level: int, gfn: int, gfn_bits: int) -> None:
        """Ready to walk `root` from `gfn` on; invalid, with a warning, if that cannot be.

        Source: tdp_iter.c, tdp_iter_start.
        """
        role = root.role
        self.vm = vm
        self.root = root
        self.level = level = role & LEVEL_MASK
        self.min_level = min_level
        self.gfn = self.next_last_level_gfn = self.yielded_gfn = gfn
        self.gfn_bits = gfn_bits
        self.as_id = 1 if role & _SMM else 0
        self.is_mirror = role & IS_MIRROR != 0
        self.word = -1
        self.old_spte = 0
        self.yielded = False
        self.valid = True
        if not 1 <= level <= MAX_ROOT_LEVEL or (gfn_bits and gfn >= gfn_bits):
            vm.warn(f"tdp_iter_start: gfn {gfn:#x} or its root's level cannot be walked")
            self.valid = False

    def __repr__(self) -> str:
        return f"gfn {self.gfn:#x} at level {self.level}: {self.old_spte:#x}"

    def descend(self, goal: int) -> None:
        """Go straight down, from the root or from the entry where this stands, to the entry for the
        same gfn at level `goal`, or to the first one above that links no table.

        What a walk of one gfn comes to: tdp_iter.c, tdp_iter_start and try_step_down.
        """
        memory, gfn = self.vm.memory, self.next_last_level_gfn
        view, frames = memory.words.view, memory.frames
        place, word, level = gfn | self.gfn_bits, self.word, self.level
        if word < 0:
            word = frames[self.root.spt] + (place >> _SHIFT[level] & _LAST)
        spte = view[word]
        while level != goal and spte & _LINK_BITS == SPTE_MMU_PRESENT_MASK:
            level -= 1
            word = frames[spte & HPA_MASK] + (place >> _SHIFT[level] & _LAST)
            spte = view[word]
        self.gfn, self.level = gfn & _FIRST[level], level
        self.word, self.old_spte = word, spte

    def walk(self, end: int) -> Iterator[TdpIter]:
        """Go on to each entry in turn and give this iterator, while its gfn is below `end`.

        Source: tdp_iter.c, tdp_iter_next and what it tries: down, then sideways, then up.
        """
        memory = self.vm.memory
        view, frames = memory.words.view, memory.frames
        gfn_bits, root_level = self.gfn_bits, self.root.role & LEVEL_MASK
        lowest = self.min_level if self.min_level <= root_level else 1
        goal = self.next_last_level_gfn
        table = [0] * (root_level + 1)  # word index of the table at each level
        table[root_level] = base = frames[self.root.spt]
        restart = self.valid
        while restart:
            restart = self.yielded = False
            self.yielded_gfn = goal
            level, shift, base = root_level, LEVEL_BITS * (root_level - 1), table[root_level]
            gfn = goal >> shift << shift
            word = base + ((gfn | gfn_bits) >> shift & _LAST)
            while True:
                self.gfn, self.level, self.word = gfn, level, word
                self.old_spte = view[word]
                if gfn >= end:
                    return
                yield self
                if self.yielded:
                    restart = True
                    break
                spte = view[word]
                if level != lowest and spte & _LINK_BITS == SPTE_MMU_PRESENT_MASK:
                    level -= 1
                    shift -= LEVEL_BITS
                    table[level] = base = frames[spte & HPA_MASK]
                    gfn = goal >> shift << shift
                    word = base + ((gfn | gfn_bits) >> shift & _LAST)
                    continue
                while word & _LAST == _LAST:
                    if level == root_level:
                        self.valid = False
                        return
                    level += 1
                    shift += LEVEL_BITS
                    gfn = gfn >> shift << shift
                    word = table[level] + ((gfn | gfn_bits) >> shift & _LAST)
                    self.gfn, self.level, self.word = gfn, level, word
                word += 1
                gfn += 1 << shift
                self.next_last_level_gfn = goal = gfn


def gfn_root_bits(vm: Vm, root: MmuPage) -> int:
    """Bits set in every gfn that is looked up in `root`: the direct bits of a direct root of a TD.

    Source: mmu_internal.h, kvm_gfn_root_bits.
    """
    return 0 if root.role & IS_MIRROR else vm.gfn_direct_bits


def tdp_mmu_max_gfn_exclusive(vm: Vm) -> int:
    """The first gfn that no walk reaches. Source: tdp_mmu.c, tdp_mmu_max_gfn_exclusive."""
    return vm.params.max_gfn + 1


def for_each_tdp_pte_min_level(
    vm: Vm, root: MmuPage, min_level: int, start: int, end: int
) -> Iterator[TdpIter]:
    """Visit the entries of `root` at `min_level` and above that cover gfns from start to end - 1.

    The same TdpIter is given at every position. Source: tdp_iter.h.
    """
    return TdpIter(vm, root, min_level, start, gfn_root_bits(vm, root)).walk(end)


def for_each_tdp_pte(vm: Vm, root: MmuPage, start: int, end: int) -> Iterator[TdpIter]:
    """Visit the entries of `root`, at all levels, that cover gfns from start to end - 1."""
    return TdpIter(vm, root, 1, start, gfn_root_bits(vm, root)).walk(end)


def for_each_tdp_pte_min_level_all(vm: Vm, root: MmuPage, min_level: int) -> Iterator[TdpIter]:
    """Visit all of `root` at `min_level` and above. Nothing is added to the gfns: in a direct root
    of a TD those of the upper half carry the shared bit. Source: tdp_iter.h.
    """
    return TdpIter(vm, root, min_level, 0, 0).walk(tdp_mmu_max_gfn_exclusive(vm))


def is_lock_wanted(vm: Vm) -> bool:
    """Somebody may want the walker to give up mmu_lock. That changes only while others run, so it
    need not be asked at every entry.
    """
    return vm.need_resched is not None or vm.mmu_lock.is_contended


def tdp_mmu_iter_need_resched(vm: Vm, it: TdpIter) -> bool:
    """True if others want mmu_lock and the walk has moved since it started.

    Source: tdp_mmu.c, tdp_mmu_iter_need_resched.
    """
    need_resched = vm.need_resched
    if (need_resched is None or not need_resched()) and not vm.mmu_lock.is_contended:
        return False
    return it.next_last_level_gfn != it.yielded_gfn


def tdp_mmu_iter_cond_resched(
    vm: Vm, it: TdpIter, flush: bool, mode: str
) -> Generator[Step, None, bool]:
    """Let others have mmu_lock if they want it, unless the walk has not moved since it started.

    flush: TLBs are still to be flushed, which happens before the lock goes. mode: in which the lock
    is held, locks.READ or WRITE. Returns True if the lock was given up: then go on to the next
    position at once, without a look at `it`, and with nothing left to flush.
    Source: tdp_mmu.c, tdp_mmu_iter_cond_resched.
    """
    if it.yielded:
        vm.warn("tdp_mmu_iter_cond_resched: the iterator has yielded already")
    if not tdp_mmu_iter_need_resched(vm, it):
        return False
    yield from tdp_mmu_iter_resched(vm, it, flush, mode)
    return True


def tdp_mmu_iter_resched(
    vm: Vm, it: TdpIter, flush: bool, mode: str
) -> Generator[Step, None, None]:
    """The second half of `tdp_mmu_iter_cond_resched`: mmu_lock is wanted, so let others have it."""
    if flush:
        vm.flush_remote_tlbs()
    yield from cond_resched_rwlock(vm, mode)
    if it.gfn > it.next_last_level_gfn:
        vm.warn(f"tdp_mmu_iter_cond_resched: gfn {it.gfn:#x} is beyond the goal")
    it.yielded = True


def cond_resched_rwlock(vm: Vm, mode: str) -> Generator[Step, None, None]:
    """Let go of mmu_lock and take it again. mode: locks.READ or WRITE.

    Source: include/linux/sched.h, cond_resched_rwlock_read and _write.
    """
    vm.emit("yield", mode)
    vm.mmu_lock.unlock(mode)
    yield from vm.mmu_lock.lock(mode)
