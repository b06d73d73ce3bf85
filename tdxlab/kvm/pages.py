"""Where KVM's pages come from: page-table pages, guest_memfd pages, pages for the module.

`PageSource` is what KVM sees; `HostPages` hands out the pages of real (modelled) RAM.

Source: Linux 6.16, mm/page_alloc.c, as far as KVM sees it: alloc_page and __free_page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.bits import MASK64, filled
from tdxlab.hardware import Region
from tdxlab.journal import Field, Fields, Journal, Journalled, Row, Table, Words

#: What `alloc_page` returns when there is no page, which is -ENOMEM for its caller.
NO_PAGE = -1

#: Words of `HostPages.counts`.
PAGES_OUT, _NEXT = 0, 1


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


class HostPages(Journalled):
    """The free pages of some regions of RAM. Never touched ones are handed out in ascending order,
    the one that was returned last first.

    leaked: HPA -> why it will never come back. huge: HPA -> (bytes, use) of every large page that
    is out. last_returned: the page that was returned last, or NO_PAGE. returned_before: by pfn, of
    returned pages: HPA of the one returned before it.
    """

    _region = Field(0)
    last_returned = Field(NO_PAGE)
    regions: Field[tuple[Region, ...]] = Field(())

    def __init__(self, journal: Journal, regions: Sequence[Region]) -> None:
        self.fields = Fields(journal, self)
        self.leaked = Table(journal)
        self.huge = Table(journal)
        self.regions = tuple(regions)
        self._total = sum(region.size for region in regions) // PAGE_SIZE
        pfns = max(region.end for region in regions) // PAGE_SIZE
        #: by pfn: number of its use, 0 while it is not out
        self.uses = Words(journal, pfns, typecode="H", sparse=True)
        self.returned_before = Words(journal, pfns, sparse=True)
        #: pages that are out; bytes of the present region that were handed out
        self.counts = Row(journal, 2)
        #: names of uses by number; only ever grows, so that a number means the same after a rewind
        self._names = [""]
        self._numbers: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Pages in all."""
        return self._total

    @property
    def free(self) -> int:
        """Pages that can still be had."""
        contiguous = self.total - sum(region.size for region in self.regions) // PAGE_SIZE
        return self.total - contiguous - self.counts.view[PAGES_OUT] - len(self.leaked)

    @property
    def in_use(self) -> dict[int, str]:
        """HPA -> use of every 4 KiB page that is out. It is put together at each call."""
        found = {}
        for offset, chunk in self.uses.touched():
            for place, number in filled(memoryview(chunk).cast("H").tolist(), (0,)):
                found[(offset // 2 + place) * PAGE_SIZE] = self._names[number]
        return found

    def use_of(self, hpa: int) -> str:
        """What the page at `hpa` is out for, "" if it is not, or is none of these pages."""
        pfn, use = hpa >> PAGE_SHIFT, self.uses.view
        return self._names[use[pfn]] if pfn < len(use) else ""

    def returned(self) -> Iterator[int]:
        """HPA of each page that is free again, the one that was returned last first."""
        hpa = self.last_returned
        while hpa != NO_PAGE:
            yield hpa
            before = self.returned_before.view[hpa >> PAGE_SHIFT]
            hpa = NO_PAGE if before == MASK64 else before

    @property
    def untouched(self) -> int:
        """Pages that were never handed out."""
        regions = self.regions[self._region :]
        return (sum(region.size for region in regions) - self.counts.view[_NEXT]) // PAGE_SIZE

    def alloc_page(self, use: str) -> int:
        """HPA of a free 4 KiB page, or NO_PAGE."""
        hpa, counts = self.last_returned, self.counts
        if hpa != NO_PAGE:
            before = self.returned_before.view[hpa >> PAGE_SHIFT]
            self.last_returned = NO_PAGE if before == MASK64 else before
        else:
            regions = self.regions
            while self._region < len(regions):
                region, used = regions[self._region], counts.view[_NEXT]
                if used < region.size:
                    break
                self._region += 1
                counts.cells[_NEXT] = 0
            else:
                return NO_PAGE
            counts.cells[_NEXT] = used + PAGE_SIZE
            hpa = region.base + used
        self.uses.cells[hpa >> PAGE_SHIFT] = self._numbers.get(use) or self._new_use(use)
        counts.cells[PAGES_OUT] = counts.view[PAGES_OUT] + 1
        return hpa

    def _new_use(self, use: str) -> int:
        """The number of a use that was not met yet."""
        number = self._numbers[use] = len(self._names)
        self._names.append(use)
        return number

    def free_page(self, hpa: int) -> None:
        """The page is free again. Refuses one that is not out: ValueError."""
        self._end_use(hpa)
        self.returned_before.cells[hpa >> PAGE_SHIFT] = self.last_returned & MASK64
        self.last_returned = hpa

    def _end_use(self, hpa: int) -> None:
        if not self.use_of(hpa):
            raise ValueError(f"page {hpa:#x} is not in use; it cannot be freed")
        self.uses.cells[hpa >> PAGE_SHIFT] = 0
        self.counts.cells[PAGES_OUT] = self.counts.view[PAGES_OUT] - 1

    def alloc_contig_pages(self, size: int, near: Region) -> int:
        """HPA of `size` contiguous bytes for good, from the end of a region that touches `near`, or
        NO_PAGE. Source: mm/page_alloc.c, alloc_contig_pages. Differs: only never touched pages
        behind all others are taken.
        """
        for number, region in reversed(list(enumerate(self.regions))):
            used = self.counts.view[_NEXT] if number == self._region else 0
            room = region.size - used if number >= self._region else 0
            if size <= room and region.overlaps(near.base, near.size):
                shorter = Region(region.base, region.size - size)
                self.regions = (*self.regions[:number], shorter, *self.regions[number + 1 :])
                return shorter.end
        return NO_PAGE

    def alloc_huge_page(self, size: int, use: str) -> int:
        """HPA of a free, aligned page of `size` bytes (2 MiB, 1 GiB), or NO_PAGE.

        Source: mm/hugetlb.c. Differs: only never touched memory can become a large page.
        """
        for number, region in reversed(list(enumerate(self.regions))):
            used = self.counts.view[_NEXT] if number == self._region else 0
            hpa = region.end - size & -size
            if number >= self._region and hpa >= region.base + used:
                pieces = [Region(region.base, hpa - region.base)]
                if hpa + size < region.end:
                    pieces.append(Region(hpa + size, region.end - hpa - size))
                self.regions = (*self.regions[:number], *pieces, *self.regions[number + 1 :])
                self.huge.put(hpa, (size, use))
                return hpa
        return NO_PAGE

    def free_huge_page(self, hpa: int) -> None:
        """The large page at `hpa` is free again. Refuses what is not out: ValueError."""
        if hpa not in self.huge:
            raise ValueError(f"{hpa:#x} is no large page that is in use; it cannot be freed")
        size, _ = self.huge[hpa]
        self.huge.drop(hpa)
        self.regions = (*self.regions, Region(hpa, size))

    def leak(self, hpa: int, why: str) -> None:
        """The page is out and will never come back. why: the failure that leaked it.

        Refuses one that is not out: ValueError.
        """
        self._end_use(hpa)
        self.leaked.put(hpa, why)
