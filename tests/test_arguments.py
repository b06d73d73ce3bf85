"""Arguments of the wrong kind are refused by their names, before anything is done.

What is given here is of the wrong kind on purpose: hence `type: ignore`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tdxlab.arguments import checked, explained


class Whole:
    """A whole number of another library."""

    def __index__(self) -> int:
        return 7


class Asked:
    """Things to call."""

    @checked
    def __init__(self, number: int = 0) -> None:
        self.number = number

    @checked
    def of_all_kinds(
        self,
        gpa: int,
        size: int | str = 1,
        *more: int,
        write: bool = False,
        data: bytes = b"",
        owner: Asked | None = None,
        tell: Callable[[int], None] | None = None,
        anything: Any = None,
    ) -> tuple[object, ...]:
        """What came through."""
        return gpa, size, more, write, data, owner, tell, anything


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("0x1000",), {}, "of_all_kinds: gpa is '0x1000'; give an int"),
    ((None,), {}, "of_all_kinds: gpa is None; give an int"),
    ((int,), {}, "of_all_kinds: gpa is <class 'int'>; give an int"),
    ((True,), {}, "of_all_kinds: gpa is True; give an int"),
    ((), {"gpa": 1.5}, "of_all_kinds: gpa is 1.5; give an int"),
    ((0, [1]), {}, "of_all_kinds: size is [1]; give an int or a str"),
    ((0, 1, 2, "3"), {}, "of_all_kinds: more is '3'; give an int"),
    ((0,), {"write": 1}, "of_all_kinds: write is 1; give True or False"),
    ((0,), {"data": "x"}, "of_all_kinds: data is 'x'; give bytes"),
    ((0,), {"owner": 3}, "of_all_kinds: owner is 3; give an Asked or None"),
    ((0,), {"tell": 3}, "of_all_kinds: tell is 3; give a function or None"),
]


@pytest.mark.parametrize(("positional", "named", "words"), REFUSED)
def test_checked_refuses_what_the_annotation_does_not_name(
    positional: tuple[Any, ...], named: dict[str, Any], words: str
) -> None:
    asked = Asked()
    # The whole text is compared below, not matched.
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        asked.of_all_kinds(*positional, **named)
    assert str(caught.value) == words


def test_checked_names_the_class_where_an_object_is_made() -> None:
    with pytest.raises(ValueError, match="Asked: number is '3'; give an int"):
        Asked("3")  # type: ignore[arg-type]


def test_checked_lets_through_what_the_annotation_names() -> None:
    owner, anything = Asked(), object()
    came = owner.of_all_kinds(
        0, "4 KiB", 1, 2, write=True, data=b"x", owner=owner, tell=print, anything=anything
    )
    assert came == (0, "4 KiB", (1, 2), True, b"x", owner, print, anything)
    assert owner.of_all_kinds(0) == (0, 1, (), False, b"", None, None, None)


def test_checked_makes_ints_and_bytes_of_what_is_as_good() -> None:
    gpa, *_, data, _, _, _ = Asked().of_all_kinds(Whole(), data=bytearray(b"x"))  # type: ignore[arg-type]
    assert (type(gpa), gpa) == (int, 7)
    assert (type(data), data) == (bytes, b"x")


def test_checked_shortens_a_value_that_is_long() -> None:
    with pytest.raises(ValueError, match=r"gpa is 'x+\.\.\.x+'; give an int") as caught:
        Asked().of_all_kinds("x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 100


def test_explained_looks_at_the_arguments_only_when_the_function_stumbles() -> None:
    @explained
    def double(number: int) -> int:
        return number * 2 if number != 3 else len(number)  # type: ignore[arg-type]

    assert double(2) == 4
    assert double("ab") == "abab"  # type: ignore[comparison-overlap,arg-type]
    with pytest.raises(ValueError, match="double: number is None; give an int"):
        double(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no len"):
        double(3)


def test_checked_keeps_name_and_docstring() -> None:
    assert Asked.of_all_kinds.__name__ == "of_all_kinds"
    assert Asked.of_all_kinds.__doc__ == "What came through."
