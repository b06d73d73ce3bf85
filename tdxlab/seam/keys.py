"""KeyIDs: the KOT (KeyID ownership table) and the caches that must be written back before a KeyID
is used again.

    FREE --TDH.MNG.CREATE--> ASSIGNED --TDH.MNG.VPFLUSHDONE--> FLUSHED --TDH.MNG.KEY.FREEID--> FREE
    the module's own KeyID is RESERVED from TDH.SYS.CONFIG on

Each FLUSHED KeyID has a bitmap of the packages whose caches still hold its lines;
TDH.PHYMEM.CACHE.WB clears a package's bit.

Source: TDX module 1.5.01, tdx_global_data.h (kot_entry_t, wbt_entry_t), tdh_phymem_cache_wb.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from tdxlab.bits import filled
from tdxlab.journal import Journal, Table, Words
from tdxlab.seam.rules import HKID_FLUSHED, HKID_FREE

MAX_KEYIDS = 2048


class Keys:
    """The KOT of one machine, and for each package the state of its cache write-back (WBT)."""

    #: Words of one WBT entry: the mutex, and the next sub-block to write back (0: none is
    #: interrupted).
    MUTEX, SAVED_POINT, _WBT_WORDS = 0, 1, 2

    def __init__(self, journal: Journal, packages: int) -> None:
        self.states = Words(journal, MAX_KEYIDS)
        self.pending_packages = Words(journal, MAX_KEYIDS)
        self.lock = Words(journal, 1)
        self.wbt = Words(journal, packages * self._WBT_WORDS)
        #: package -> KeyIDs that were FLUSHED when its write-back started
        self.snapshots = Table(journal)

    def wbt_word(self, package: int, word: int) -> int:
        """Index in `wbt` of MUTEX or SAVED_POINT of a package."""
        return package * self._WBT_WORDS + word

    def flushed(self) -> tuple[int, ...]:
        """KeyIDs in state FLUSHED, ascending."""
        return tuple(hkid for hkid, state, _ in self.in_use() if state == HKID_FLUSHED)

    def in_use(self) -> Iterator[tuple[int, int, int]]:
        """(KeyID, state, packages still to be written back as a bitmap) of each KeyID that is not
        FREE.
        """
        for hkid, state in filled(self.states.view.tolist(), (HKID_FREE,)):
            yield hkid, state, self.pending_packages.view[hkid]

    def written_back(self, package: int) -> None:
        """Package `package` holds no line any more of the KeyIDs in its snapshot."""
        for hkid in self.snapshots.get(package, ()):
            left = self.pending_packages.view[hkid] & ~(1 << package)
            self.pending_packages.put(hkid, left)
