"""Named bit fields."""

import pytest

from tdxlab.bits import Bits, Word, filled


class Entry(Word):
    present = Bits(0)
    kind = Bits(11, 8)
    hpa = Bits(51, 12, in_place=True)
    top = Bits(63)


RAW = 1 << 63 | 0x1234_5000 | 0x700 | 1


def test_a_field_reads_its_bits() -> None:
    entry = Entry(RAW)
    assert (entry.present, entry.kind, entry.hpa, entry.top) == (1, 7, 0x1234_5000, 1)


@pytest.mark.parametrize(
    ("name", "mask"),
    [("present", 1), ("kind", 0xF00), ("hpa", 0xF_FFFF_FFFF_F000), ("top", 1 << 63)],
)
def test_a_field_of_the_class_gives_its_mask(name: str, mask: int) -> None:
    assert getattr(Entry, name).mask == mask


def test_with_replaces_fields_and_nothing_else() -> None:
    changed = Entry(RAW).with_(kind=0, hpa=0x7000, present=0)
    assert isinstance(changed, Entry)
    assert changed == 1 << 63 | 0x7000


@pytest.mark.parametrize(
    ("name", "value"),
    [("present", 2), ("kind", 16), ("hpa", 0x1234), ("hpa", 1 << 52), ("kind", -1)],
)
def test_with_refuses_a_value_that_does_not_fit(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*does not fit bits"):
        Entry(RAW).with_(**{name: value})


@pytest.mark.parametrize(("high", "low"), [(64, 0), (3, 4), (5, -1)])
def test_bits_refuses_a_range_outside_a_word(high: int, low: int) -> None:
    with pytest.raises(ValueError, match="need 0 <= low <= high <= 63"):
        Bits(high, low)


def test_describe_lists_what_is_not_zero_from_the_lowest_bit_on() -> None:
    assert Entry(RAW).describe() == "present=0x1 kind=0x7 hpa=0x12345000 top=0x1"
    assert Entry(0).describe() == "all fields zero"


def test_a_subclass_has_the_fields_of_its_parent_too() -> None:
    class Longer(Entry):
        extra = Bits(5)

    assert [field.name for field in Longer.fields()] == ["present", "extra", "kind", "hpa", "top"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], []),
        ([0, 9, 0], []),
        ([5, 0, 9, 5], [(0, 5), (3, 5)]),
        ([0] * 511 + [1], [(511, 1)]),
        ([1, 2, 3], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_filled_finds_the_words_that_are_not_empty(
    words: list[int], found: list[tuple[int, int]]
) -> None:
    assert list(filled(words, (0, 9))) == found
