"""The page cache of guest_memfd: words of pages, in chunks of 512."""

import pytest

from tdxlab.journal import Journal
from tdxlab.kvm.folios import IN_USE, POISONED, PREPARED, Folio, Folios, as_folio

PAGE = 0x1_2345_6000


def make(limit: int = 4) -> tuple[Journal, Folios]:
    journal = Journal()
    return journal, Folios(journal, limit)


def test_get_gives_what_was_put_and_nothing_of_other_files_or_pages() -> None:
    _, folios = make()
    folios.put(1, 513, PAGE | IN_USE)
    assert folios.get(1, 513) == PAGE | IN_USE
    assert [folios.get(1, 512), folios.get(1, 1), folios.get(0, 513)] == [0, 0, 0]
    folios.put(1, 513, 0)
    assert folios.get(1, 513) == 0


def test_as_folio_reads_frame_and_flags() -> None:
    assert as_folio(PAGE | IN_USE) == Folio(PAGE >> 12)
    assert as_folio(PAGE | IN_USE | PREPARED | POISONED) == Folio(PAGE >> 12, True, True)


@pytest.mark.parametrize("end", [2000, 1 << 52])
def test_pages_are_those_of_the_range_ascending(end: int) -> None:
    _, folios = make()
    for index in (1999, 3, 511, 512, 700, 2):
        folios.put(7, index, index + 1 << 12 | IN_USE)
    folios.put(8, 600, IN_USE)
    assert [index for index, _ in folios.pages(7, 3, end)] == [3, 511, 512, 700, 1999]
    assert [index for index, _ in folios.pages(7, 4, 512)] == [511]
    assert sorted(word >> 12 for word in folios.all()) == [0, 3, 4, 512, 513, 701, 2000]


def test_put_refuses_more_chunks_than_there_is_room_for() -> None:
    _, folios = make(2)
    folios.put(0, 0, IN_USE)
    folios.put(0, 512, IN_USE)
    with pytest.raises(MemoryError, match="2 ranges"):
        folios.put(1, 0, IN_USE)


def test_put_is_taken_back_by_a_rewind() -> None:
    journal, folios = make()
    folios.put(0, 5, PAGE | IN_USE)
    before, mark = journal.digest(), journal.mark()
    folios.put(0, 5, 0)
    folios.put(3, 9, IN_USE)
    journal.rewind(mark)
    assert journal.digest() == before
    assert list(folios.pages(0, 0, 512)) == [(5, PAGE | IN_USE)]
    assert list(folios.pages(3, 0, 512)) == []
