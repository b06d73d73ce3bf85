"""What may still lie in the caches: as much of it as the rules about write-backs need.

A line that was written under a private KeyID may stay in a cache for any time, and come to memory
at any time. So a page must not take another KeyID before the lines of its old one were written
back: they would overwrite what is there then. Two things write lines back: PAGE.WBINVD those of one
page under one KeyID, and CACHE.WB on all packages, which KEY.FREEID waits for, those of a KeyID
that nobody uses any more.

Differs: a page that was ever written under a private KeyID counts as dirty until one of the two has
happened, whatever the real cache would have evicted. Nothing is overwritten in the model: it is
noted that it could be. Only whole pages are looked at; a store to a part of a page is not, and
neither is a page that its TD writes again after it was written back.
"""

from __future__ import annotations

from tdxlab.journal import Journal, Table


class Caches:
    """pages: pfn -> tag under which the page was last written, of pages that were written back
    since. keys: tag -> True, of those all of whose lines were written back for good. overtaken:
    pfn -> tag under which there may be dirty lines, of pages that took another one too early.
    """

    __slots__ = ("keys", "overtaken", "pages")

    def __init__(self, journal: Journal) -> None:
        self.pages = Table(journal)
        self.keys = Table(journal)
        self.overtaken = Table(journal)

    def change_key(self, pfn: int, tag: int) -> None:
        """The page, which was written under the private `tag`, is written under another one."""
        if self.pages.get(pfn) == tag:
            self.pages.drop(pfn)
        elif tag not in self.keys:
            self.overtaken.put(pfn, tag)
