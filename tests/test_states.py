"""States as what differs from a base."""

import pytest

from tdxlab.journal import Field, Fields, Journal, Journalled, Row, Table, Words
from tdxlab.kvm.locks import READ, MmuLock
from tdxlab.states import CHUNK, Differences, Part, Places, States
from tdxlab.steps import run


class Bench(Journalled):
    count = Field(0)

    def __init__(self) -> None:
        self.journal = Journal()
        self.fields = Fields(self.journal, self)
        self.words = Words(self.journal, 1024)
        self.row = Row(self.journal, 2)
        self.table = Table(self.journal)
        self.lock = MmuLock(self.journal)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def look(states: States) -> Differences:
    return states.update({}, states.base)[0]


def test_update_sees_words_pages_rows_tables_and_fields(bench: Bench) -> None:
    states = States(bench.journal)
    seen = {states.state(look(states))}
    bench.words.put(5, 1)
    seen.add(states.state(look(states)))
    bench.words.fill(512, bytes([7]) * 4096)
    seen.add(states.state(look(states)))
    bench.row.put(1, 4)
    seen.add(states.state(look(states)))
    bench.table.put("key", 1)
    seen.add(states.state(look(states)))
    bench.count = 3
    seen.add(states.state(look(states)))
    assert len(seen) == 6
    bench.row.put(1, 0)
    bench.count = 0
    bench.table.drop("key")
    bench.words.fill(0, bytes(8192))
    assert look(states) == {}


def test_update_forgets_what_is_again_as_at_the_base(bench: Bench) -> None:
    bench.words.put(5, 9)
    bench.table.put("old", 1)
    bench.count = 4
    states = States(bench.journal)
    bench.words.fill(0, bytes(4096))
    bench.words.put(600, 1)
    bench.table.drop("old")
    bench.table.put("new", 1)
    bench.count = 5
    assert look(states)
    bench.words.put(5, 9)
    bench.words.put(600, 0)
    bench.table.put("old", 1)
    bench.table.drop("new")
    bench.count = 4
    assert look(states) == {}


def test_update_in_pieces_is_update_at_once(bench: Bench) -> None:
    states = States(bench.journal)
    pieces: Differences = {}
    for number in range(6):
        mark = bench.journal.mark()
        bench.words.put(number % 4 * 100, number)
        bench.table.put(number % 3, number)
        pieces, lasting = states.update(pieces, mark)
        bench.journal.release(mark)
        assert lasting == (number > 0 or bench.table != {})
    assert pieces == look(states)


def test_lasting_does_not_count_locks_and_nothing_counts_what_is_ignored(bench: Bench) -> None:
    states = States(bench.journal, ignored=[bench.words], locks=[bench.lock])
    run(bench.lock.lock(READ))
    bench.words.put(1, 1)
    differences, lasting = states.update({}, states.base)
    assert not lasting
    assert len(differences) == 1
    assert states.lasting(differences) == states.lasting({})
    assert states.state(differences) != states.state({})


def test_close_goes_back_to_the_base(bench: Bench) -> None:
    before = bench.journal.digest()
    states = States(bench.journal)
    bench.words.put(1, 1)
    states.close()
    assert bench.journal.digest() == before
    assert not bench.journal.recording


def test_go_to_brings_the_machine_back_to_a_state_that_it_was_in(bench: Bench) -> None:
    bench.table.put("old", 1)
    states = States(bench.journal)
    bench.words.fill(8, bytes([7]) * 4096)
    bench.row.put(1, 4)
    bench.count = 3
    bench.table.drop("old")
    bench.table.put("new", 2)
    there, digest = look(states), bench.journal.digest()
    bench.journal.rewind(states.base)
    bench.count = 9
    elsewhere = look(states)
    states.go_to(there.values())
    assert bench.journal.digest() == digest
    assert look(states) == there == states.differences(there.values())
    states.go_to(elsewhere.values())
    assert (bench.count, dict(bench.table)) == (9, {"old": 1})
    states.close()


def test_places_are_whole_stores_and_those_that_a_part_fills(bench: Bench) -> None:
    words, last = CHUNK // 8, 3
    parts = [Part(bench.words, 1, last * words), Part(bench.row, 1), Part(bench.table, "mine")]
    states = States(bench.journal, ignored=[*parts, Part(bench, "count"), bench.lock])
    for word in range(words, last * words):
        bench.words.put(word, 1)
    bench.row.put(1, 1)
    bench.table.put("mine", 1)
    bench.count = 1
    run(bench.lock.lock(READ))
    assert look(states) == {}
    bench.words.put(1, 1)
    bench.words.put(last * words, 1)
    bench.row.put(0, 1)
    bench.table.put("yours", 1)
    assert len(look(states)) == 4
    assert not any(place in Places(parts) for place in look(states))
    states.close()
