"""Free pages in two zones: below 4 GiB, where a 32-bit CR3 reaches, and everywhere else.

Source: Linux 6.16, include/linux/gfp_types.h (GFP_DMA32), mm/page_alloc.c (zone fallback).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm.pages import NO_PAGE, HostPages

SIZE_4G = 1 << 32


class ZonedPages:
    """The free pages of a host. dma32, normal: the two zones.

    A caller that does not care gets a page of the normal zone, and one below 4 GiB when there is
    none left. Refuses regions of `dma32` that reach beyond 4 GiB, and regions that overlap:
    ValueError. Differs: no watermarks keep a reserve of low pages for those who need them.
    """

    def __init__(self, journal: Journal, dma32: Sequence[Region], normal: Sequence[Region]) -> None:
        for region in dma32:
            if region.end > SIZE_4G:
                raise ValueError(
                    f"{region.base:#x}..{region.end - 1:#x} reaches beyond 4 GiB; the DMA32 zone "
                    "ends there"
                )
        ordered = sorted([*dma32, *normal])
        for one, other in pairwise(ordered):
            if one.end > other.base:
                raise ValueError(f"two regions of free pages overlap at {other.base:#x}")
        self.dma32 = HostPages(journal, dma32)
        self.normal = HostPages(journal, normal)
        self._low = tuple(dma32)

    @property
    def free(self) -> int:
        """Pages that can still be had in both zones."""
        return self.dma32.free + self.normal.free

    @property
    def in_use(self) -> dict[int, str]:
        """HPA -> use of every page that is out."""
        return {**self.dma32.in_use, **self.normal.in_use}

    def alloc_page(self, use: str, *, below_4g: bool = False) -> int:
        """HPA of a free page, or NO_PAGE. use: what for. below_4g: as __GFP_DMA32."""
        hpa = NO_PAGE if below_4g else self.normal.alloc_page(use)
        return self.dma32.alloc_page(use) if hpa == NO_PAGE else hpa

    def free_page(self, hpa: int) -> None:
        """The page is free again. Refuses one that is not out: ValueError."""
        is_low = any(region.base <= hpa < region.end for region in self._low)
        (self.dma32 if is_low else self.normal).free_page(hpa)
