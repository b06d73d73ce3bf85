"""`check` and `exercise`: right, wrong with advice, unanswered, and variants without end."""

from __future__ import annotations

from typing import Any

import pytest

from tdxlab.study import check, exercise, exercises, gpaw
from tdxlab.study.exercises import Exercise, Variant, is_right, table, variant

NOTEBOOK = "00"
NUMBERS = list(table(NOTEBOOK))


def wrong_answers(right: Any) -> list[Any]:
    """Answers of the right kind that are not right."""
    if isinstance(right, int):
        return [right + 1, right - 1, 0]
    if isinstance(right, str):
        return [right + "X", "TDH.MEM.PAGE.AUG"]
    if isinstance(right, frozenset):
        return [right | {"mirror"}, frozenset()]
    return [tuple(reversed(right))[1:], right[:-1]]


@pytest.mark.parametrize("width", [48, 52])
@pytest.mark.parametrize("number", NUMBERS)
def test_check_accepts_the_right_answer_and_advises_on_wrong_ones(number: str, width: int) -> None:
    made = variant(number, gpaw=width)
    assert check(number, made.answer, gpaw=width).state == "right"
    for wrong in wrong_answers(made.answer):
        verdict = check(number, wrong, gpaw=width)
        assert verdict.state == "wrong"
        assert not verdict
        assert len(verdict.text) > len(f"{number}: not yet. ") + 20
        if not isinstance(made.answer, int) or made.answer > 20:
            assert f" {made.answer}" not in verdict.text


def test_a_check_that_accepts_everything_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda made, answer: True)
    with pytest.raises(AssertionError, match="right"):
        test_check_accepts_the_right_answer_and_advises_on_wrong_ones("00.1", 48)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("nothing", [None, ...])
def test_no_answer_is_no_error(number: str, nothing: Any) -> None:
    assert check(number, nothing).state == "unanswered"


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("odd", [3.5, object(), {}, b"x"])
def test_an_answer_of_another_kind_is_told_so(number: str, odd: Any) -> None:
    verdict = check(number, odd)
    assert verdict.state == "wrong"
    assert "that is what is asked for" in verdict.text


@pytest.mark.parametrize("number", ["00.2", "00.3", "00.6"])
def test_seeds_give_variants_that_can_be_checked(number: str) -> None:
    questions = {exercise(number, seed=seed).text.partition(").")[2] for seed in range(12)}
    assert len(questions) > 6
    for seed in (1, 2):
        assert exercise(number, seed=seed).text == exercise(number, seed=seed).text
        right = variant(number, seed=seed).answer
        assert check(number, right, seed=seed)
        told = repr(exercise(number, seed=seed, show_answer=True))
        assert told.endswith(f"Answer: {right}")
        assert "Answer" not in repr(exercise(number, seed=seed))


def test_unknown_exercises_are_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match=r'no exercise "00\.99"; choose from 00\.1, 00\.2'):
        check("00.99", 1)
    with pytest.raises(ValueError, match="has no exercises"):
        check("77.1", 1)
    with pytest.raises(ValueError, match="choose 48 or 52"):
        check("00.1", 1, gpaw=50)


@pytest.mark.parametrize(
    ("right", "given", "verdict"),
    [
        (5, 5, True),
        (1, True, False),
        (True, 1, False),
        ("MAPPED", " mapped ", True),
        (("A", "B"), ["a", "b"], True),
        (("A", "B"), ["b", "a"], False),
        (frozenset({"A", "B"}), {"b", "a"}, True),
    ],
)
def test_is_right_compares_kindly_but_not_blindly(right: Any, given: Any, verdict: bool) -> None:
    assert is_right(Variant("?", right, str), given) is verdict


@pytest.mark.parametrize(
    ("right", "given", "words"),
    [
        (("A", "B"), {"A", "B"}, "is not a tuple or a list"),
        (frozenset({"A"}), ["A"], "is not a set"),
        (("A", "B"), [["A"], "B"], "has lists in it"),
        (5, "5", "is not a whole number"),
    ],
)
def test_check_says_of_what_sort_an_answer_has_to_be(
    right: Any, given: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(answer: Any) -> str:
        raise AssertionError(f"asked for advice about {answer!r}")

    made = Exercise("00.1", lambda gpaw, seed: Variant("?", right, never))
    monkeypatch.setattr(exercises, "find", lambda number: made)
    exercises.made.cache_clear()
    assert words in check("00.1", given).text


def test_a_variant_may_judge_for_itself() -> None:
    made = Exercise("00.1", lambda gpaw, seed: Variant("?", 4, str, lambda n: n % 2 == 0)).make(
        48, 0
    )
    assert is_right(made, 8)
    assert not is_right(made, 7)


def test_gpaw_prefers_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)
    assert gpaw(48) == 48
    monkeypatch.setenv("TDXLAB_GPAW", "52")
    assert gpaw(48) == 52
    for bad in ("50", "wide"):
        monkeypatch.setenv("TDXLAB_GPAW", bad)
        with pytest.raises(ValueError, match=f"GPAW {bad} in the environment.*choose 48 or 52"):
            gpaw(48)
    monkeypatch.delenv("TDXLAB_GPAW")
    with pytest.raises(ValueError, match="GPAW 47 in the parameters cell"):
        gpaw(47)
