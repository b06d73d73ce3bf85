"""The undo log: marks, rewinds, digests."""

import random

import pytest

from tdxlab.journal import Field, Fields, Index, Journal, Journalled, Mark, Row, Table, Words
from tdxlab.snapshots import Snapshots


class Stores:
    """One journal with a store of each kind."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.words = Words(self.journal, 1024)
        self.small = Words(self.journal, 8, typecode="H")
        self.sparse = Words(self.journal, 1 << 20, sparse=True)
        self.table = Table(self.journal)

    def change(self, choose: random.Random) -> None:
        """One random change."""
        match choose.randrange(5):
            case 0:
                self.words.put(choose.randrange(1024), choose.getrandbits(64))
            case 1:
                self.small.put(choose.randrange(8), choose.getrandbits(16))
            case 2:
                start = choose.randrange(1 << 19)
                self.sparse.fill(start, choose.randbytes(8 * choose.randrange(1, 600)))
            case 3:
                self.table.put(choose.randrange(9), choose.random())
            case _ if self.table:
                self.table.drop(choose.choice(list(self.table)))


@pytest.fixture
def stores() -> Stores:
    return Stores()


@pytest.mark.parametrize("seed", range(5))
def test_rewind_restores_the_digest_at_nested_marks(stores: Stores, seed: int) -> None:
    choose = random.Random(seed)
    marks: list[tuple[Mark, str]] = []
    for _ in range(200):
        action = choose.random()
        if action < 0.1:
            marks.append((stores.journal.mark(), stores.journal.digest()))
        elif action < 0.15 and marks:
            del marks[choose.randrange(len(marks)) + 1 :]
            mark, digest = marks[-1]
            stores.journal.rewind(mark)
            assert stores.journal.digest() == digest
        else:
            stores.change(choose)
    for mark, digest in reversed(marks):
        stores.journal.rewind(mark)
        assert stores.journal.digest() == digest


def test_a_mark_can_be_used_again(stores: Stores) -> None:
    mark = stores.journal.mark()
    for value in (1, 2):
        stores.words.put(0, value)
        stores.journal.rewind(mark)
        assert stores.words.view[0] == 0


def test_rewind_kills_later_marks_and_no_earlier_one(stores: Stores) -> None:
    first, second, third = (stores.journal.mark() for _ in range(3))
    stores.journal.rewind(second)
    with pytest.raises(ValueError, match=r"journal\.mark\(\)"):
        stores.journal.rewind(third)
    stores.journal.rewind(first)


@pytest.mark.parametrize("seed", range(8))
def test_snapshots_are_restored_in_any_order(stores: Stores, seed: int) -> None:
    choose = random.Random(seed)
    snapshots = Snapshots(stores.journal)
    digests: dict[int, str] = {}
    for _ in range(150):
        for _ in range(choose.randrange(4)):
            stores.change(choose)
        name = choose.randrange(4)
        if choose.random() < 0.4:
            snapshots.keep(name)
            digests[name] = stores.journal.digest()
        elif name in digests:
            snapshots.restore(name)
            assert stores.journal.digest() == digests[name]


def test_snapshots_refuse_a_name_that_was_never_kept(stores: Stores) -> None:
    with pytest.raises(KeyError):
        Snapshots(stores.journal).restore("never")


def test_release_keeps_the_changes_and_the_other_marks(stores: Stores) -> None:
    outer = stores.journal.mark()
    stores.table.put("a", 1)
    inner = stores.journal.mark()
    stores.table.put("b", 2)
    stores.journal.release(inner)
    assert dict(stores.table) == {"a": 1, "b": 2}
    stores.journal.rewind(outer)
    assert dict(stores.table) == {}


def test_nothing_is_recorded_without_a_mark(stores: Stores) -> None:
    stores.words.put(1, 1)
    assert (len(stores.journal), stores.journal.recording) == (0, False)
    mark = stores.journal.mark()
    stores.words.put(1, 2)
    assert (len(stores.journal), stores.journal.recording) == (1, True)
    stores.journal.release(mark)
    assert (len(stores.journal), stores.journal.recording) == (0, False)


def test_release_and_rewind_refuse_a_mark_that_is_gone(stores: Stores) -> None:
    mark = stores.journal.mark()
    stores.journal.release(mark)
    for use in (stores.journal.release, stores.journal.rewind):
        with pytest.raises(ValueError, match="not held any more"):
            use(mark)
    stores.journal.forget(mark)


def test_a_store_made_while_recording_is_recorded(stores: Stores) -> None:
    mark = stores.journal.mark()
    late = Words(stores.journal, 4)
    late.put(0, 7)
    stores.journal.rewind(mark)
    assert late.view[0] == 0


def test_digest_sees_every_store_and_place(stores: Stores) -> None:
    digests = {stores.journal.digest()}
    for store, index in ((stores.words, 0), (stores.words, 1), (stores.small, 0)):
        store.put(index, 1)
        digests.add(stores.journal.digest())
    stores.sparse.put((1 << 20) - 1, 1)
    digests.add(stores.journal.digest())
    for value in (1, 2):
        stores.table.put("key", value)
        digests.add(stores.journal.digest())
    assert len(digests) == 7


def test_digest_can_leave_a_store_out(stores: Stores) -> None:
    before = stores.journal.digest(without=stores.words)
    stores.words.put(0, 1)
    assert stores.journal.digest(without=stores.words) == before
    stores.small.put(0, 1)
    assert stores.journal.digest(without=stores.words) != before


def test_digest_does_not_depend_on_the_order_in_which_keys_came() -> None:
    one, other = Stores(), Stores()
    for stores, keys in ((one, (1, 2)), (other, (2, 1))):
        for key in keys:
            stores.table.put(key, key)
    assert one.journal.digest() == other.journal.digest()


def test_words_read_and_fill_little_endian(stores: Stores) -> None:
    stores.words.fill(3, bytes(range(16)))
    assert stores.words.view[3] == 0x0706_0504_0302_0100
    assert stores.words.read(3, 2) == bytes(range(16))


def test_sparse_words_refuse_more_than_the_address_space() -> None:
    with pytest.raises(ValueError, match="with less memory"):
        Words(Journal(), 1 << 58, sparse=True)


def test_rewind_forgets_stores_that_came_after_the_mark(stores: Stores) -> None:
    before = stores.journal.digest()
    mark = stores.journal.mark()
    late = Table(stores.journal)
    late.put("key", 1)
    assert stores.journal.digest() != before
    stores.journal.rewind(mark)
    assert late == {}
    assert stores.journal.digest() == before


def test_restoring_a_later_snapshot_brings_its_stores_back(stores: Stores) -> None:
    snapshots = Snapshots(stores.journal)
    snapshots.keep("early")
    late = Table(stores.journal)
    late.put("key", 1)
    snapshots.keep("late")
    digest = stores.journal.digest()
    snapshots.restore("early")
    snapshots.restore("late")
    assert stores.journal.digest() == digest
    late.put("key", 2)
    snapshots.restore("late")
    assert late == {"key": 1}


class Counter(Journalled):
    """Two attributes that a journal can take back."""

    count = Field(3)
    names: Field[tuple[str, ...]] = Field(())

    def __init__(self, journal: Journal) -> None:
        self.fields = Fields(journal, self)


def test_field_reads_as_its_default_until_it_is_set() -> None:
    counter = Counter(Journal())
    assert (counter.count, counter.names) == (3, ())
    assert counter.fields.as_dict() == {"count": 3, "names": ()}
    counter.count += 1
    assert counter.count == 4
    assert counter.fields.as_dict() == {"count": 4, "names": ()}


def test_field_without_fields_is_refused() -> None:
    class Hasty(Journalled):
        count = Field(0)

        def __init__(self) -> None:
            self.count = 1

    with pytest.raises(AttributeError, match="count is a Field; set self"):
        Hasty()


def test_attribute_that_is_no_field_is_not_recorded() -> None:
    journal = Journal()
    counter = Counter(journal)
    mark, digest = journal.mark(), journal.digest()
    counter.note = "free"  # type: ignore[attr-defined]
    assert journal.digest() == digest
    journal.rewind(mark)
    assert counter.note == "free"  # type: ignore[attr-defined]


def test_defaults_of_two_owners_are_apart() -> None:
    journal = Journal()
    first, second = Counter(journal), Counter(journal)
    first.count, first.names = 7, ("a",)
    assert (second.count, second.names) == (3, ())


def test_field_is_taken_back_to_its_value_or_its_default() -> None:
    journal = Journal()
    counter = Counter(journal)
    counter.count = 5
    mark, digest = journal.mark(), journal.digest()
    counter.count, counter.names = 6, ("a",)
    assert journal.digest() != digest
    journal.rewind(mark)
    assert (counter.count, counter.names) == (5, ())
    assert journal.digest() == digest


def test_field_that_is_set_to_its_default_is_no_change_of_state() -> None:
    journal = Journal()
    counter = Counter(journal)
    digest = journal.digest()
    counter.count = 3
    assert journal.digest() == digest
    counter.count = 4
    assert journal.digest() != digest


def test_defaults_of_a_class_are_its_own_and_those_it_inherits() -> None:
    class Louder(Counter):
        count = Field(5)
        volume = Field(9)

    assert Louder.defaults == {"count": 5, "names": (), "volume": 9}
    assert Counter.defaults == {"count": 3, "names": ()}
    assert Louder(Journal()).count == 5


def test_row_is_taken_back_by_a_rewind_and_counts_for_the_digest():
    journal = Journal()
    row = Row(journal, 3)
    before = journal.digest()
    row.put(0, 7)
    assert journal.digest() != before
    mark = journal.mark()
    row.put(0, 8)
    row.cells[2] = 9
    assert row.view == [8, 0, 9]
    assert len(journal) == 2
    journal.rewind(mark)
    assert row.view == [7, 0, 0]
    journal.release(mark)
    row.put(1, 1)
    assert (row.view, len(journal)) == ([7, 1, 0], 0)


def test_index_is_taken_back_by_a_rewind_and_has_a_tables_digest() -> None:
    journal, other = Journal(), Journal()
    index, table = Index(journal), Table(other)
    index.put(1, 10)
    table.put(1, 10)
    mark = journal.mark()
    index.put(1, 11)
    index.put(2, 20)
    assert (index.view, len(journal)) == ({1: 11, 2: 20}, 2)
    assert journal.digest() != other.digest()
    journal.rewind(mark)
    assert index.view == {1: 10}
    assert journal.digest() == other.digest()
    journal.release(mark)
    index.put(3, 30)
    assert (index.view, len(journal)) == ({1: 10, 3: 30}, 0)


def test_digest_of_words_does_not_depend_on_how_far_their_extent_has_grown():
    journal = Journal()
    words = Words(journal, 4096, typecode="H", sparse=True)
    words.put(3, 7)
    words.extent = 4
    before = journal.digest()
    words.extent = 1000
    assert journal.digest() == before
