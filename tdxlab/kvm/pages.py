"""Where KVM's pages come from: page-table pages, guest_memfd pages, pages for the module.

`PageSource` is what KVM sees; `HostPages` hands out the pages of real (modelled) RAM.

Source: Linux 6.16, mm/page_alloc.c, as far as KVM sees it: alloc_page and __free_page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tdxlab.arch import PAGE_SIZE
from tdxlab.hardware import Region
from tdxlab.journal import Field, Journal, Table

#: What `alloc_page` returns when there is no page, which is -ENOMEM for its caller.
NO_PAGE = -1


class PageSource(Protocol):
    """Who gives KVM pages of host memory."""

    def alloc_page(self, use: str) -> int:
        """HPA of a free 4 KiB page, or NO_PAGE. use: what it is for, for people and for tests."""
        ...

    def free_page(self, hpa: int) -> None:
        """The page is free again."""
        ...

    def leak(self, hpa: int, why: str) -> None:
        """The page will never come back. why: the failure that leaked it."""
        ...


class HostPages:
    """The free pages of some regions of RAM. Never touched ones are handed out in ascending order,
    returned ones first.

    in_use: HPA -> use of every page that is out. leaked: HPA -> why it will never come back.
    """

    _next = Field(0)
    _region = Field(0)

    def __init__(self, journal: Journal, regions: Sequence[Region]) -> None:
        self.fields = Table(journal)
        self.in_use = Table(journal)
        self.leaked = Table(journal)
        self._regions = tuple(regions)
        self._returned = Table(journal)

    @property
    def total(self) -> int:
        """Pages in all."""
        return sum(region.size for region in self._regions) // PAGE_SIZE

    @property
    def free(self) -> int:
        """Pages that can still be had."""
        return self.total - len(self.in_use) - len(self.leaked)

    def alloc_page(self, use: str) -> int:
        """HPA of a free 4 KiB page, or NO_PAGE."""
        hpa = self._take()
        if hpa != NO_PAGE:
            self.in_use.put(hpa, use)
        return hpa

    def free_page(self, hpa: int) -> None:
        """The page is free again. Refuses one that is not out: ValueError."""
        if hpa not in self.in_use:
            raise ValueError(f"page {hpa:#x} is not in use; it cannot be freed")
        self.in_use.drop(hpa)
        self._returned.put(hpa, None)

    def leak(self, hpa: int, why: str) -> None:
        """The page is out and will never come back. why: the failure that leaked it."""
        self.in_use.drop(hpa)
        self.leaked.put(hpa, why)

    def _take(self) -> int:
        if self._returned:
            hpa = next(reversed(self._returned))
            self._returned.drop(hpa)
            return int(hpa)
        while self._region < len(self._regions):
            region = self._regions[self._region]
            hpa = region.base + self._next
            if hpa < region.end:
                self._next += PAGE_SIZE
                return hpa
            self._region += 1
            self._next = 0
        return NO_PAGE
