"""The module's two kinds of 16-bit lock word, with the residue that a failed attempt leaves.

Host-priority lock (PAMT entries, op-state, RTMR):   0 exclusive   1 host priority   15:2 readers
Plain lock (global, KOT, S-EPT tree, TD epoch):      0 exclusive                     15:1 readers

A lock is the low 16 bits of a word in some `Words`; the other bits of the word stay as they are.
All functions take the host's side unless their name says guest. The `try_` functions return False
when somebody else holds the lock.

Source: TDX module 1.5.01, tdx_locks.h (acquire_sharex_lock_hp_shared and its relatives).
"""

from __future__ import annotations

from tdxlab.bits import MASK64
from tdxlab.journal import Words

EXCLUSIVE = 1
HOST_PRIORITY = 2
LOCK_MASK = 0xFFFF

HP_READER = 4
CONTENDED = EXCLUSIVE | HOST_PRIORITY
#: What the owner leaves of a word: no count, no owner, but a wish of the host's.
_NOT_OWNED = MASK64 & ~(LOCK_MASK & ~HOST_PRIORITY)
#: A parent in a PAMT: contended, or of another page type than PT_NDA (bits 23:16).
PARENT_IN_THE_WAY = CONTENDED | 0xFF << 16
_PLAIN_READER = 2

#: Indices of the PAMT entries of one page: 1G, 2M, 4K.
Path = tuple[int, int, int]


def try_shared_hp(words: Words, index: int) -> bool:
    """Become a reader. Refused while somebody holds it exclusively: the stray count stays until the
    owner lets go.
    """
    word = words.view[index]
    if word & EXCLUSIVE:
        words.cells[index] = (word + HP_READER) | HOST_PRIORITY
        return False
    words.cells[index] = (word & ~HOST_PRIORITY) + HP_READER
    return True


def try_exclusive_hp(words: Words, index: int) -> bool:
    """Become the owner. Refused while anybody holds it: the host leaves its wish in the
    host-priority bit.
    """
    word = words.view[index]
    if word & LOCK_MASK & ~HOST_PRIORITY:
        words.cells[index] = word | HOST_PRIORITY
        return False
    words.cells[index] = (word & ~HOST_PRIORITY) | EXCLUSIVE
    return True


def try_promote_hp(words: Words, index: int) -> bool:
    """From the only reader to the owner. Refused while there are others: still a reader, and the
    host leaves its wish in the host-priority bit.
    """
    word = words.view[index]
    if word & LOCK_MASK & ~HOST_PRIORITY != HP_READER:
        words.cells[index] = word | HOST_PRIORITY
        return False
    words.cells[index] = (word & ~LOCK_MASK) | EXCLUSIVE
    return True


def release_path_shared_hp(words: Words, path: Path) -> None:
    """Let go of the three PAMT entries of one page, all of them shared."""
    view, cells = words.view, words.cells
    entry_1g, entry_2m, entry = path
    cells[entry_1g] = view[entry_1g] - HP_READER
    cells[entry_2m] = view[entry_2m] - HP_READER
    cells[entry] = view[entry] - HP_READER


def release_path_exclusive_hp(words: Words, path: Path) -> None:
    """Let go of the three PAMT entries of one page, the last of them exclusive."""
    view, cells = words.view, words.cells
    entry_1g, entry_2m, entry = path
    cells[entry_1g] = view[entry_1g] - HP_READER
    cells[entry_2m] = view[entry_2m] - HP_READER
    cells[entry] = view[entry] & _NOT_OWNED


def release_shared_hp(words: Words, index: int) -> None:
    """Stop being a reader."""
    words.cells[index] = words.view[index] - HP_READER


def release_exclusive_hp(words: Words, index: int) -> None:
    """Stop being the owner; only the host-priority bit survives, stray counts do not."""
    words.cells[index] = words.view[index] & _NOT_OWNED


def guest_try_shared_hp(words: Words, index: int) -> bool:
    """The guest's try to become a reader: it also gives way to a waiting host, and leaves no wish
    behind.
    """
    word = words.view[index]
    if word & (EXCLUSIVE | HOST_PRIORITY):
        return False
    words.cells[index] = word + HP_READER
    return True


def guest_try_exclusive_hp(words: Words, index: int) -> bool:
    """The guest's try to become the owner: only an untouched lock will do."""
    word = words.view[index]
    if word & LOCK_MASK:
        return False
    words.cells[index] = word | EXCLUSIVE
    return True


def try_shared(words: Words, index: int) -> bool:
    """Become a reader of a plain lock. Refused while it is held exclusively: the stray count
    stays.
    """
    word = words.view[index]
    words.cells[index] = word + _PLAIN_READER
    return not word & EXCLUSIVE


def try_exclusive(words: Words, index: int) -> bool:
    """Become the owner of a plain lock. Refused, with nothing left behind, while anybody holds
    it.
    """
    word = words.view[index]
    if word & LOCK_MASK:
        return False
    words.cells[index] = word | EXCLUSIVE
    return True


def release_shared(words: Words, index: int) -> None:
    """Stop being a reader of a plain lock."""
    words.cells[index] = words.view[index] - _PLAIN_READER


def release_exclusive(words: Words, index: int) -> None:
    """Stop being the owner of a plain lock."""
    words.cells[index] = words.view[index] & ~LOCK_MASK
