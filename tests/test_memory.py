"""RAM under KeyIDs: who reads what, integrity, poison."""

import pytest

from tdxlab.hardware import Region
from tdxlab.journal import Journal
from tdxlab.memory import MachineCheck, Memory, Scramble
from tdxlab.trace import Trace

HPA = 0x4000
DATA = bytes(range(64))
SHARED, OTHER_SHARED, PRIVATE, OTHER_PRIVATE = 0, 5, 33, 34


def make(*, encrypted: bool = True) -> tuple[Memory, Trace]:
    journal = Journal()
    trace = Trace(journal)
    return Memory(journal, trace, [Region(0, 1 << 20)], encrypted=encrypted), trace


@pytest.fixture
def memory() -> Memory:
    return make()[0]


def test_ram_nobody_wrote_reads_as_zeros(memory: Memory) -> None:
    assert memory.read(HPA, 100) == bytes(100)
    assert memory.page(HPA) == bytes(4096)
    assert memory.keyid_of(HPA) == 0


@pytest.mark.parametrize("keyid", [SHARED, OTHER_SHARED, PRIVATE])
def test_a_reader_with_the_writers_keyid_gets_the_data(memory: Memory, keyid: int) -> None:
    memory.write(HPA, DATA, keyid)
    assert memory.read(HPA, 64, keyid) == DATA
    assert memory.keyid_of(HPA) == keyid
    assert memory.is_td_owned(HPA) is (keyid == PRIVATE)


@pytest.mark.parametrize("writer", [PRIVATE, OTHER_SHARED])
def test_a_shared_reader_with_another_keyid_gets_something_like_ciphertext(
    memory: Memory, writer: int
) -> None:
    memory.write(HPA, DATA, writer)
    seen = memory.read(HPA, 64, SHARED)
    assert seen != DATA
    assert seen == memory.read(HPA, 64, SHARED) == Scramble().encipher(HPA, writer, DATA)
    assert not memory.is_poisoned(HPA)
    assert memory.read(HPA, 64, writer) == DATA


@pytest.mark.parametrize("writer", [SHARED, OTHER_SHARED, OTHER_PRIVATE])
def test_a_private_reader_with_another_keyid_is_a_machine_check_and_poisons(
    memory: Memory, writer: int
) -> None:
    memory.write(HPA, DATA, writer)
    with pytest.raises(MachineCheck, match="poisoned") as caught:
        memory.read(HPA + 8, 8, PRIVATE)
    assert caught.value.hpa == HPA
    assert memory.is_poisoned(HPA)
    for reader in (SHARED, writer, PRIVATE):
        with pytest.raises(MachineCheck):
            memory.read(HPA, 1, reader)


def test_poison_stays_in_its_line(memory: Memory) -> None:
    memory.write(HPA, DATA * 3, PRIVATE)
    with pytest.raises(MachineCheck):
        memory.read(HPA + 64, 1, OTHER_PRIVATE)
    assert memory.read(HPA, 64, PRIVATE) == memory.read(HPA + 128, 64, PRIVATE) == DATA


def poisoned(memory: Memory) -> None:
    memory.write(HPA, DATA, PRIVATE)
    with pytest.raises(MachineCheck):
        memory.read(HPA, 1, OTHER_PRIVATE)


def test_movdir64b_gives_the_line_a_new_key_and_ends_poison() -> None:
    memory, trace = make()
    poisoned(memory)
    memory.movdir64b(HPA, DATA[::-1], SHARED)
    assert memory.read(HPA, 64) == DATA[::-1]
    assert (memory.keyid_of(HPA), memory.is_td_owned(HPA)) == (SHARED, False)
    assert trace.hardware()["movdir64b"] == 1


@pytest.mark.parametrize(("hpa", "size"), [(HPA + 8, 64), (HPA, 63), (HPA, 65)])
def test_movdir64b_refuses_anything_but_a_whole_line(memory: Memory, hpa: int, size: int) -> None:
    with pytest.raises(ValueError, match="64 bytes at a 64-byte boundary"):
        memory.movdir64b(hpa, bytes(size))


def test_clear_page_is_64_stores_and_ends_poison() -> None:
    memory, trace = make()
    poisoned(memory)
    memory.clear_page(HPA, OTHER_PRIVATE)
    assert memory.read(HPA, 4096, OTHER_PRIVATE) == bytes(4096)
    assert trace.hardware()["movdir64b"] == 64


def test_a_store_to_a_part_of_a_private_line_poisons_it(memory: Memory) -> None:
    memory.write(HPA, DATA, PRIVATE)
    memory.write(HPA + 8, b"host", SHARED)
    assert memory.is_poisoned(HPA)
    assert memory.keyid_of(HPA) == PRIVATE
    with pytest.raises(MachineCheck):
        memory.read(HPA, 1, PRIVATE)


def test_a_store_to_a_part_of_a_poisoned_line_does_not_heal_it(memory: Memory) -> None:
    poisoned(memory)
    memory.write(HPA, b"part", PRIVATE)
    assert memory.is_poisoned(HPA)


def test_a_store_to_a_part_of_ones_own_line_keeps_the_rest(memory: Memory) -> None:
    memory.write(HPA, DATA * 2, PRIVATE)
    memory.write(HPA + 60, b"abcdefgh", PRIVATE)
    assert memory.read(HPA + 56, 16, PRIVATE) == DATA[56:60] + b"abcdefgh" + DATA[4:8]


def test_a_store_to_a_part_of_a_line_of_another_shared_keyid_garbles_the_rest(
    memory: Memory,
) -> None:
    memory.write(HPA, DATA, OTHER_SHARED)
    memory.write(HPA, b"mine", SHARED)
    assert memory.read(HPA, 4, SHARED) == b"mine"
    assert memory.read(HPA + 4, 60, SHARED) == Scramble().encipher(HPA, OTHER_SHARED, DATA)[4:]


def test_a_write_across_lines_and_pages_is_read_back(memory: Memory) -> None:
    data = bytes(i * 5 & 0xFF for i in range(9000))
    memory.write(HPA + 4000, data, PRIVATE)
    assert memory.read(HPA + 4000, 9000, PRIVATE) == data
    assert memory.read(HPA + 3900, 10, SHARED) == bytes(10)


def test_a_page_written_whole_forgets_the_keys_of_its_lines(memory: Memory) -> None:
    memory.write(HPA + 64, DATA, PRIVATE)
    memory.write_page(HPA, b"x" * 4096, OTHER_PRIVATE)
    assert memory.read(HPA, 4096, OTHER_PRIVATE) == b"x" * 4096


def test_memory_without_encryption_reads_the_same_under_every_keyid() -> None:
    memory, _ = make(encrypted=False)
    memory.write(HPA, DATA, PRIVATE)
    memory.write(HPA, b"host", SHARED)
    for reader in (SHARED, PRIVATE, OTHER_PRIVATE):
        assert memory.read(HPA, 64, reader) == b"host" + DATA[4:]


def test_addresses_without_ram_read_zeros_and_swallow_writes(memory: Memory) -> None:
    memory.write(1 << 30, DATA)
    assert memory.read(1 << 30, 64) == bytes(64)


@pytest.mark.parametrize("keyid", [0, 1, 33, 63])
def test_split_and_join_take_the_keyid_off_and_on(memory: Memory, keyid: int) -> None:
    pa = memory.join(HPA, keyid)
    assert pa == HPA | keyid << 46
    assert memory.split(pa) == (HPA, keyid)


@pytest.mark.parametrize(("hpa", "size"), [(-1, 1), (1 << 20, 1), ((1 << 20) - 1, 2), (1 << 52, 8)])
def test_require_ram_names_the_address_and_the_ram(memory: Memory, hpa: int, size: int) -> None:
    with pytest.raises(
        ValueError, match=r"not in this machine's memory; its RAM is 0x0\.\.0xfffff"
    ):
        memory.require_ram(hpa, size)


# -- keys, and integrity without MACs


def test_new_key_keeps_what_was_written_and_hides_it_from_the_new_one(memory: Memory) -> None:
    memory.write(HPA, DATA, PRIVATE)
    held = memory.read(HPA, 64, SHARED)
    memory.new_key(PRIVATE)
    assert (memory.keyid_of(HPA), memory.is_td_owned(HPA)) == (PRIVATE, True)
    assert memory.read(HPA, 64, SHARED) == held
    with pytest.raises(MachineCheck):
        memory.read(HPA, 64, PRIVATE)
    memory.write(HPA, DATA, PRIVATE)
    assert memory.read(HPA, 64, PRIVATE) == DATA
    assert memory.read(HPA, 64, SHARED) not in (held, DATA)


def test_new_key_never_leaves_its_keyid_however_often_it_is_called(memory: Memory) -> None:
    for _ in range(300):
        memory.new_key(PRIVATE)
        memory.write(HPA, DATA, PRIVATE)
        assert (memory.keyid_of(HPA), memory.is_td_owned(HPA)) == (PRIVATE, True)


def test_without_macs_another_private_key_reads_garbage_and_nobody_notices(memory: Memory) -> None:
    memory.has_mac = False
    memory.write(HPA, DATA, OTHER_PRIVATE)
    seen = memory.read(HPA, 64, PRIVATE)
    assert seen not in (DATA, memory.read(HPA, 64, SHARED))
    assert not memory.is_poisoned(HPA)


def test_without_macs_the_owner_bit_still_stops_what_the_host_wrote(memory: Memory) -> None:
    memory.has_mac = False
    memory.write(HPA, DATA, SHARED)
    with pytest.raises(MachineCheck):
        memory.read(HPA, 64, PRIVATE)
    assert memory.is_poisoned(HPA)


def test_a_new_key_is_taken_back_by_a_rewind() -> None:
    journal = Journal()
    memory = Memory(journal, Trace(journal), [Region(0, 1 << 20)])
    memory.write(HPA, DATA, PRIVATE)
    mark = journal.mark()
    memory.new_key(PRIVATE)
    journal.rewind(mark)
    assert memory.read(HPA, 64, PRIVATE) == DATA
