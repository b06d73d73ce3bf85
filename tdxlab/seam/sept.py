"""The Secure EPT: what an entry looks like, how the module walks it, and what it tells the host
about it.

An entry holds the module's real 64-bit encoding. A free entry is not zero but 0x80E0000000000000.
The KeyID is never stored.

Source: TDX module 1.5.01, x86_defs.h (ia32e_sept_t), sept_manager.c (secure_ept_walk,
set_arch_septe_details_in_vmm_regs).
Differs: entries of L2 VMs and the encodings that only migration produces are known to the tables
but never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tdxlab.arch import EPT_RWX, HPA_MASK, WORDS_PER_PAGE, EptEntry
from tdxlab.bits import Bits, filled
from tdxlab.memory import Memory
from tdxlab.seam.rules import (
    FREE_BITS,
    MAPPED_BITS,
    NL_BLOCKED_BITS,
    NL_MAPPED_BITS,
    PENDING_BITS,
    SEPT_STATE_BY_BITS,
    SEPT_STATE_MASK,
)


class Septe(EptEntry):
    """A Secure EPT entry."""

    leaf = Bits(7)
    exported_dirty = Bits(9)
    lock = Bits(11)
    host_priority = Bits(52)
    exported = Bits(53)
    write_blocked = Bits(54)
    blocked = Bits(55)
    pending = Bits(56)

    @property
    def state(self) -> str:
        """Name of the entry's state, such as "PENDING"."""
        return SEPT_STATE_BY_BITS[self & SEPT_STATE_MASK].name


#: Accept counter of a 2 MiB leaf that is being accepted; it overlays address bits that are zero
#: there.
ACCEPT_COUNTER = Bits(20, 12)

LOCKED = Septe.lock.mask
HOST_PRIORITY = Septe.host_priority.mask
LEAF = Septe.leaf.mask
SUPPRESS_VE = Septe.suppress_ve.mask
_WRITE_BACK = 6 << Septe.memory_type.low

FREE_ENTRY = SUPPRESS_VE | FREE_BITS
FREE_PAGE = FREE_ENTRY.to_bytes(8, "little") * WORDS_PER_PAGE

#: An entry that links a table, without the table's address.
_LINK = SUPPRESS_VE | NL_MAPPED_BITS | EPT_RWX

#: A PENDING leaf without its address.
PENDING_LEAF = SUPPRESS_VE | PENDING_BITS | _WRITE_BACK

#: By sept_level: how far a GPA is shifted to find its index, and the bits of a leaf's HPA.
_SHIFT = tuple(12 + 9 * sept_level for sept_level in range(8))
_LEAF_HPA = tuple(HPA_MASK & -1 << shift for shift in _SHIFT)

#: Between 0 and LEAF under this mask: the walk goes on below.
_LEAF_OR_RWX = LEAF | EPT_RWX

#: What the host may see of a leaf, and of anything else, in RCX.
_LEAF_REPORT = 0x800F_FFFF_FFFF_F0FF
_NON_LEAF_REPORT = 0x87

_NON_LEAF = frozenset((NL_MAPPED_BITS, NL_BLOCKED_BITS))


class Place(NamedTuple):
    """Where a walk ended: `word`, the entry's index in `Memory.words`, its sept_level, and what it
    held.
    """

    word: int
    sept_level: int
    septe: int


#: `Place` of a tuple, without a look at its names.
_new_place = tuple.__new__


def make_leaf(state_bits: int, hpa: int) -> int:
    """A leaf in the state whose bits are given; only MAPPED lets the guest in."""
    permissions = EPT_RWX if state_bits == MAPPED_BITS else 0
    return SUPPRESS_VE | state_bits | _WRITE_BACK | permissions | hpa


def make_non_leaf(hpa: int) -> int:
    """An entry that links the S-EPT page at `hpa`."""
    return _LINK | hpa


def remake(place: Place, state_bits: int) -> int:
    """The entry at `place`, unlocked, in another state and with the permissions of that state."""
    if state_bits in _NON_LEAF:
        permissions = EPT_RWX if state_bits == NL_MAPPED_BITS else 0
        return SUPPRESS_VE | state_bits | permissions | (place.septe & HPA_MASK)
    return make_leaf(state_bits, leaf_hpa(place))


def leaf_hpa(place: Place) -> int:
    """HPA of the page that a leaf maps; an accept counter in the low address bits is left out."""
    _, sept_level, septe = place
    return septe & _LEAF_HPA[sept_level]


def is_pending(septe: int) -> bool:
    """True if the guest may accept the page."""
    return SEPT_STATE_BY_BITS[septe & SEPT_STATE_MASK].acceptable


def report(septe: int, sept_level: int) -> tuple[int, int]:
    """(RCX, RDX) by which the module shows an entry to the host: what may be seen of it, level and
    state.
    """
    state_bits = septe & SEPT_STATE_MASK
    state = SEPT_STATE_BY_BITS[state_bits]
    if state_bits == FREE_BITS:
        seen = SUPPRESS_VE
    elif septe & LEAF:
        seen = septe & _LEAF_REPORT
    else:
        seen = septe & _NON_LEAF_REPORT
    return seen, sept_level | state.public << 8


def walk(memory: Memory, eptp: int, gpa: int, sept_level: int) -> Place:
    """Walk from the root to the entry for `gpa` at `sept_level`.

    eptp: root HPA with the walk length (levels - 1) in bits 5:3. Returns the entry reached, above
    `sept_level` when the walk
    had to stop: at an entry without permissions (free, blocked, pending) or at a leaf.
    Source: TDX module 1.5.01, sept_manager.c, secure_ept_walk.
    """
    view = memory.words.view
    frames = memory.frames
    level = eptp >> 3 & 7
    word = frames[eptp & HPA_MASK] + (gpa >> _SHIFT[level] & 511)
    septe = view[word]
    while level != sept_level:
        table = frames.get(septe ^ _LINK)  # what _LINK leaves of a link that nobody holds: its HPA
        if table is None:
            if not 0 < septe & _LEAF_OR_RWX < LEAF:
                break
            table = frames[septe & HPA_MASK]
        level -= 1
        word = table + (gpa >> _SHIFT[level] & 511)
        septe = view[word]
    return _new_place(Place, (word, level, septe))  # Place(...), called less deeply


def entries(memory: Memory, eptp: int) -> Iterator[tuple[int, int, int, int]]:
    """(sept_level, gpa, raw entry, HPA of the entry) of every entry that is not free; parents
    first, below blocked ones too.

    eptp: as for `walk`.
    """
    yield from _entries_below(memory, eptp & HPA_MASK, eptp >> 3 & 7, 0)


def _entries_below(
    memory: Memory, table: int, level: int, base: int
) -> Iterator[tuple[int, int, int, int]]:
    start = memory.frames.get(table)
    if start is None:
        return
    words = memory.words.view[start : start + WORDS_PER_PAGE].tolist()
    for number, septe in filled(words, (0, FREE_ENTRY)):
        gpa = base | number << (12 + 9 * level)
        yield level, gpa, septe, table + 8 * number
        if level and septe & SEPT_STATE_MASK in _NON_LEAF:
            yield from _entries_below(memory, septe & HPA_MASK, level - 1, gpa)


def is_empty(memory: Memory, table: int) -> bool:
    """True if all 512 entries of the S-EPT page at HPA `table` are exactly free."""
    return memory.words.read(memory.frame(table), WORDS_PER_PAGE) == FREE_PAGE
