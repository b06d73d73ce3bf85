"""Free pages of the host: handed out, returned, leaked."""

import pytest

from tdxlab.arch import PAGE_SIZE
from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.kvm.pages import NO_PAGE, HostPages

REGIONS = (Region(0x10000, 0x2000), Region(0x40000, 0x1000))


@pytest.fixture
def pages() -> HostPages:
    """Three pages in two regions."""
    return HostPages(Journal(), REGIONS)


def test_alloc_page_goes_up_through_the_regions_and_ends(pages: HostPages) -> None:
    assert [pages.alloc_page("x") for _ in range(5)] == [
        0x10000,
        0x11000,
        0x40000,
        NO_PAGE,
        NO_PAGE,
    ]


def test_alloc_page_gives_the_page_returned_last_first(pages: HostPages) -> None:
    first, second = pages.alloc_page("x"), pages.alloc_page("x")
    pages.free_page(second)
    pages.free_page(first)
    assert [pages.alloc_page("x") for _ in range(3)] == [first, second, 0x40000]


def test_pages_are_counted_and_their_use_is_known(pages: HostPages) -> None:
    hpa = pages.alloc_page("page table")
    assert pages.in_use == {hpa: "page table"}
    assert (pages.total, pages.free) == (3, 2)
    pages.free_page(hpa)
    assert (pages.in_use, pages.free) == ({}, 3)


def test_alloc_page_notes_nothing_when_there_is_none(pages: HostPages) -> None:
    for _ in range(4):
        pages.alloc_page("x")
    assert NO_PAGE not in pages.in_use
    assert pages.free == 0


def test_leak_takes_a_page_out_for_ever(pages: HostPages) -> None:
    hpa = pages.alloc_page("x")
    pages.leak(hpa, "reclaim failed")
    assert pages.leaked == {hpa: "reclaim failed"}
    assert (pages.in_use, pages.total, pages.free) == ({}, 3, 2)
    assert hpa not in [pages.alloc_page("x") for _ in range(3)]


@pytest.mark.parametrize("times", [0, 2])
def test_free_page_refuses_a_page_that_is_not_out(pages: HostPages, times: int) -> None:
    hpa = pages.alloc_page("x") if times else 0x10000
    if times:
        pages.free_page(hpa)
    with pytest.raises(ValueError, match="page 0x10000 is not in use"):
        pages.free_page(hpa)


def test_pages_are_taken_back_by_the_journal() -> None:
    journal = Journal()
    pages = HostPages(journal, REGIONS)
    kept = pages.alloc_page("x")
    mark, digest = journal.mark(), journal.digest()
    pages.free_page(kept)
    pages.leak(pages.alloc_page("x"), "why")
    pages.alloc_page("x")
    pages.alloc_page("x")
    journal.rewind(mark)
    assert journal.digest() == digest
    assert pages.alloc_page("x") == 0x11000


def test_alloc_page_gives_the_same_pages_again_after_a_rewind() -> None:
    journal = Journal()
    pages = HostPages(journal, [Region(0x10000, 8 * PAGE_SIZE)])
    out = [pages.alloc_page("guest_memfd") for _ in range(4)]
    for hpa in (out[2], out[0], out[3]):
        pages.free_page(hpa)
    mark = journal.mark()
    first = [pages.alloc_page("page table") for _ in range(5)]
    journal.rewind(mark)
    assert [pages.alloc_page("page table") for _ in range(5)] == first
    assert first == [out[3], out[0], out[2], 0x14000, 0x15000]
