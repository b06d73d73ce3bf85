"""How a mirror entry is installed, and nothing else: freeze, hook, publish, on a few small values.

    protocol = PROTOCOLS["same-page"](2)
    move(protocol.ways[0], Rule.ALL, protocol.beginning(), Standing(START))

A state is what all vCPUs see, and where each of them stands. One move takes one vCPU from one step
to the next; steps have the labels of the machine's own operations. What is left has the same
schedules and the same verdicts as the machine has in the scenarios of `tdxlab.races`.

Source: Linux 6.16, arch/x86/kvm/mmu/tdp_mmu.c: kvm_tdp_mmu_map, set_external_spte_present.
Differs: mmu_lock is only ever held for read, so it is not there; a mirror entry is empty, frozen or
present, a Secure EPT entry is locked or not, and there or not. Which page backs what, references
and statistics are left out: what changes them alone makes nobody start over. Who was told that an
operand is busy waits until no SEAMCALL is inside the module, as on the machine that is explored.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

# -- what all see

EMPTY, FROZEN, PRESENT = "empty", "FROZEN", "present"
#: A Secure EPT entry. LOCKED: a SEAMCALL is at it; WANTED: and another one was refused meanwhile.
FREE, LOCKED, WANTED, MAPPED = "free", "locked", "wanted", "mapped"


class Shared(NamedTuple):
    """mirror, external: value of each entry. found: entries whose page was looked up. busy: calls
    of TDH.MEM.PAGE.AUG that will meet a lock of somebody else's. broken: what is wrong; nobody
    moves on from there.
    """

    mirror: tuple[str, ...]
    external: tuple[str, ...]
    found: frozenset[int] = frozenset()
    busy: int = 0
    broken: str = ""

    def with_mirror(self, entry: int, value: str) -> Shared:
        """The same with another mirror entry."""
        return self._replace(mirror=_put(self.mirror, entry, value))

    def with_external(self, entry: int, value: str) -> Shared:
        """The same with another Secure EPT entry."""
        return self._replace(external=_put(self.external, entry, value))


def _put(values: tuple[str, ...], place: int, value: str) -> tuple[str, ...]:
    return (*values[:place], value, *values[place + 1 :])


# -- where a vCPU stands

START, LOOK_UP, WALK = "start", "faultin_pfn", "read_lock(mmu_lock)"
FREEZE, READ, STORE = "cmpxchg FROZEN_SPTE", "read SPTE", "cmpxchg SPTE"
AUG, ADD, INSIDE = "TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD", " inside"
#: It was told that an operand is busy, and goes on when no SEAMCALL is inside the module any more.
WAITS = "wait SEAMCALL"
PUBLISH, RESTORE = "publish SPTE", "restore SPTE"
FIXED, SPURIOUS = "RET_PF_FIXED", "RET_PF_SPURIOUS"
#: What must not be: KVM declares the VM buggy; it warns; nobody can move though not all have ended.
VM_BUGGED, WARNED, DEADLOCK = "vm_bugged", "Warned", "deadlock"


class Standing(NamedTuple):
    """at: the step that comes next, or the result. depth: how far down its way. began: what it saw
    when its fault began; disturbed: whether others have changed something since. blocked: it has to
    start over, and nothing has changed.
    """

    at: str
    depth: int = 0
    began: Shared | None = None
    disturbed: bool = False
    blocked: bool = False

    @property
    def ended(self) -> bool:
        """The fault is over."""
        return self.at in (FIXED, SPURIOUS)


class Rule(Enum):
    """What is kept of the protocol: all, or all but one rule. Names as in `tdxlab.breaks`."""

    ALL = ""
    NO_FREEZE = "no-freeze"
    EARLY_PUBLISH = "early-publish"
    NO_RESTORE = "no-restore"
    OVERWRITE_FROZEN = "overwrite-frozen"


#: The first step at an empty entry.
_FIRST = {Rule.NO_FREEZE: READ, Rule.EARLY_PUBLISH: STORE}
#: What that step leaves in the mirror entry while the hook runs.
_MEANWHILE = {Rule.NO_FREEZE: EMPTY, Rule.EARLY_PUBLISH: PRESENT}


#: What a move leads to: what all see, and where the vCPU stands.
Moved = tuple[Shared, "Standing"]


class Protocol(NamedTuple):
    """vCPUs that fault. ways: for each, the entries on its way, tables first, the leaf last."""

    ways: tuple[tuple[int, ...], ...]
    busy: int = 0

    def beginning(self) -> Shared:
        """Nothing is mapped."""
        entries = 1 + max(max(way) for way in self.ways)
        return Shared((EMPTY,) * entries, (FREE,) * entries, busy=self.busy)


# -- one move


def can_move(shared: Shared, here: Standing) -> bool:
    """Whether a vCPU can move: nothing is wrong, it has not ended, and need not wait."""
    if shared.broken or here.ended or here.blocked:
        return False
    return here.at != WAITS or not {LOCKED, WANTED} & set(shared.external)


def move(way: tuple[int, ...], rule: Rule, shared: Shared, here: Standing) -> Moved:
    """The next move of a vCPU that can move."""
    if here.at == START:
        return shared, Standing(LOOK_UP, began=shared)
    if here.at == LOOK_UP:
        return shared._replace(found=shared.found | {way[-1]}), here._replace(at=WALK)
    if here.at == WALK:
        return _walk(way, rule, shared, here)
    if here.at in (FREEZE, READ, STORE):
        return _take(way, rule, shared, here)
    if here.at in (AUG, ADD):
        return _call(way, rule, shared, here)
    if here.at in (AUG + INSIDE, ADD + INSIDE):
        done = shared.with_external(way[here.depth], MAPPED)
        if rule is Rule.EARLY_PUBLISH:
            return _go_down(way, rule, done, here)
        return done, here._replace(at=PUBLISH)
    if here.at == PUBLISH:
        return _go_down(way, rule, shared.with_mirror(way[here.depth], PRESENT), here)
    if here.at == WAITS:
        return _refused(rule, shared, here)
    assert here.at == RESTORE
    return _start_over(shared.with_mirror(way[here.depth], EMPTY), here)


def _walk(way: tuple[int, ...], rule: Rule, shared: Shared, here: Standing) -> Moved:
    """Read entries from `here` on down, as far as they are present."""
    for depth in range(here.depth, len(way)):
        value = shared.mirror[way[depth]]
        if value == FROZEN and rule is Rule.OVERWRITE_FROZEN:
            return shared._replace(broken=WARNED), here
        if value == FROZEN:
            return _start_over(shared, here)
        if value == EMPTY:
            return shared, here._replace(at=_FIRST.get(rule, FREEZE), depth=depth)
    return shared, Standing(SPURIOUS)


def _take(way: tuple[int, ...], rule: Rule, shared: Shared, here: Standing) -> Moved:
    """Take the entry, if it still is as it was read."""
    entry = way[here.depth]
    if shared.mirror[entry] != EMPTY:
        return _start_over(shared, here)
    hook = AUG if here.depth == len(way) - 1 else ADD
    taken = shared.with_mirror(entry, _MEANWHILE.get(rule, FROZEN))
    return taken, here._replace(at=hook)


def _call(way: tuple[int, ...], rule: Rule, shared: Shared, here: Standing) -> Moved:
    """The module takes the entry's lock, or refuses: it is locked, or not as it should be."""
    entry, state = way[here.depth], shared.external[way[here.depth]]
    if here.at == AUG and shared.busy:
        return _refused(rule, shared._replace(busy=shared.busy - 1), here)
    if any(shared.external[table] != MAPPED for table in way[: here.depth]):
        return shared._replace(broken=VM_BUGGED), here
    if state in (LOCKED, WANTED):
        return shared.with_external(entry, WANTED), here._replace(at=WAITS)
    if state == MAPPED:
        return shared._replace(broken=VM_BUGGED), here
    return shared.with_external(entry, LOCKED), here._replace(at=here.at + INSIDE)


def _refused(rule: Rule, shared: Shared, here: Standing) -> Moved:
    """The hook returned -EBUSY."""
    if rule in (Rule.NO_FREEZE, Rule.NO_RESTORE):
        return _start_over(shared, here)
    return shared, here._replace(at=RESTORE)


def _go_down(way: tuple[int, ...], rule: Rule, shared: Shared, here: Standing) -> Moved:
    """The entry is installed; go on below it."""
    if here.depth == len(way) - 1:
        return shared, Standing(FIXED)
    return _walk(way, rule, shared, here._replace(depth=here.depth + 1))


def _start_over(shared: Shared, here: Standing) -> Moved:
    """RET_PF_RETRY: at once, if anything is different from when the fault began."""
    return shared, Standing(START, blocked=not here.disturbed and shared == here.began)


def disturb(standing: Standing) -> Standing:
    """A vCPU after another one has changed something."""
    if standing.ended:
        return standing
    return standing._replace(blocked=False, disturbed=standing.began is not None)


# -- what can be explored

#: Name, as in `tdxlab.races.SCENARIOS` -> the protocol for a number of vCPUs.
PROTOCOLS: dict[str, Callable[[int], Protocol]] = {
    "same-page": lambda vcpus: Protocol(((0,),) * vcpus),
    "fresh-region": lambda vcpus: Protocol(tuple((0, 1 + n) for n in range(vcpus))),
    "far-apart": lambda vcpus: Protocol(tuple((n,) for n in range(vcpus))),
    "hook-failure": lambda vcpus: Protocol(((0,),) * vcpus, busy=1),
}
