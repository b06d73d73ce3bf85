"""Two zones of free pages."""

from __future__ import annotations

import pytest

from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm.pae_zones import ZonedPages
from tdxlab.kvm.pages import NO_PAGE

LOW, HIGH = Region(0x7000_0000, 0x2000), Region(0x1_4000_0000, 0x2000)


def zones() -> tuple[Journal, ZonedPages]:
    journal = Journal()
    return journal, ZonedPages(journal, [LOW], [HIGH])


def test_alloc_page_keeps_low_pages_for_those_who_need_them() -> None:
    _, pages = zones()
    assert [pages.alloc_page("table") for _ in range(2)] == [0x1_4000_0000, 0x1_4000_1000]
    assert pages.alloc_page("table") == 0x7000_0000
    assert pages.alloc_page("root", below_4g=True) == 0x7000_1000
    assert pages.free == 0


def test_alloc_page_below_4g_never_gives_a_high_page() -> None:
    _, pages = zones()
    low = [pages.alloc_page("root", below_4g=True) for _ in range(3)]
    assert low == [0x7000_0000, 0x7000_1000, NO_PAGE]
    assert pages.normal.free == 2


def test_free_page_returns_a_page_to_its_zone() -> None:
    _, pages = zones()
    low, high = pages.alloc_page("root", below_4g=True), pages.alloc_page("table")
    pages.free_page(low)
    pages.free_page(high)
    assert (pages.dma32.free, pages.normal.free, pages.in_use) == (2, 2, {})
    with pytest.raises(ValueError, match="not in use"):
        pages.free_page(low)


def test_pages_come_back_with_a_rewind() -> None:
    journal, pages = zones()
    before, mark = journal.digest(), journal.mark()
    pages.alloc_page("root", below_4g=True)
    assert journal.digest() != before
    journal.rewind(mark)
    assert journal.digest() == before


@pytest.mark.parametrize(
    ("dma32", "normal", "says"),
    [
        ([Region(0xFFFF_F000, 0x2000)], [HIGH], "beyond 4 GiB"),
        ([LOW], [Region(0x7000_1000, 0x1000)], "overlap at 0x70001000"),
    ],
)
def test_zoned_pages_refuse_wrong_regions(
    dma32: list[Region], normal: list[Region], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        ZonedPages(Journal(), dma32, normal)
