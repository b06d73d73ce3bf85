"""Sizes that people type."""

import pytest

from tdxlab.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("0x4000", 0x4000),
        ("1B", 1),
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        (" 4 gib ", 4 << 30),
        ("1TIB", 1 << 40),
        ("007 KiB", 7 << 10),
    ],
)
def test_parse_size_understands_numbers_and_units(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "64 MB", "64 M", "1.5 GiB", "-1", "1 2", "4 GiB x"])
def test_parse_size_refuses_other_text_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="B, KiB, MiB, GiB, TiB, PiB, such as '64 MiB'") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("size", [1.5, True, None])
def test_parse_size_refuses_what_is_no_int(size: object) -> None:
    with pytest.raises(ValueError, match="is no size: give an int of bytes"):
        parse_size(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -4096, "0 GiB"])
def test_parse_size_refuses_nothing_and_less(size: int | str) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        parse_size(size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (4095, "4095 B"),
        (4096, "4 KiB"),
        (64 << 20, "64 MiB"),
        ((1 << 30) + 4096, "1048580 KiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_format_size_takes_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text
    if size:
        assert parse_size(text) == size
