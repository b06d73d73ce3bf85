"""Notebook 11: its panel, its exercises, its outputs; and that breaking any of them is noticed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tdxlab import measure as measure_command
from tdxlab.seam import measure
from tdxlab.study import exercises, exercises_11, firmware_image, panel_measure
from tdxlab.study import measurement_views as drawn
from tdxlab.study.exercises import check, exercise, variant
from tdxlab.study.firmware_image import small_firmware, swapped
from tdxlab.study.launch_changes import CHANGES
from tdxlab.study.measured_launch import Built, Recipe, build_on
from tdxlab.study.measurement_log import SMALL_IMAGE, Record, log_of, mrtd
from tdxlab.study.panel_measure import MeasurePanel
from tdxlab.tape import Tape
from tdxlab.tdvf import Firmware, Section, parse
from tests.notebook_cells import changed_among, code_cells, saved, shown_by, turns_red

BOOK = Path(__file__).resolve().parent.parent / "notebooks" / "11-measured-launch.ipynb"
NUMBERS = [f"11.{n}" for n in range(1, 10)]


# -- the panel


def launch(panel: MeasurePanel, change: str, page: int, number: int, prediction: str) -> None:
    panel.choose(change, page=page, number=number, expect=prediction)
    panel.launch.click()
    assert panel.error == ""


def panel_faults() -> list[str]:
    """What is wrong with the panel: it has to obey its controls and to draw what it did."""
    panel, faults = MeasurePanel(gpaw=48), []
    first = panel.built.mrtd()
    launch(panel, "flip a byte", 0, 300, "changes")
    if panel.recipe.image[0].content[300] != SMALL_IMAGE[0].content[300] ^ 0xFF:
        faults.append("the byte did not flip")
    if panel.built.mrtd() == first or "MRTD changes, as predicted" not in panel.summary():
        faults.append("MRTD did not move")
    launch(panel, "leave the page out", 3, 0, "stays")
    if panel.numbers()["pages"] != 3 or "other than predicted" not in panel.summary():
        faults.append("the page is still there")
    panel.scrub.value = panel.position_of("TDH.MR.EXTEND")
    if panel.numbers()["records"] != 2 or panel.done != 2:
        faults.append("the position is wrong")
    letters = re.findall(
        r'text-anchor="middle">([AEae-])</text></g>', panel.views()["Image and log"]
    )
    if letters[:17] != ["A", "E"] + ["e"] * 15:
        faults.append("the map is wrong")
    return faults


def test_panel_obeys_its_controls_and_draws_what_it_did() -> None:
    assert panel_faults() == []


def test_a_panel_that_ignores_its_input_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore(tape: Tape, _: Recipe) -> Built:
        return build_on(tape, Recipe())

    monkeypatch.setattr(panel_measure, "build_on", ignore)
    assert {"the byte did not flip", "MRTD did not move"} <= set(panel_faults())


def test_a_map_filled_from_the_wrong_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_end(record: Record) -> drawn.Cell:
        return drawn.Cell(record.page, 0 if record.chunk is None else 16 - record.chunk)

    monkeypatch.setattr(drawn, "cell_of", wrong_end)
    assert panel_faults() == ["the map is wrong"]


@pytest.mark.parametrize("gpaw", [48, 52])
def test_panel_agrees_with_hashlib_at_every_position(gpaw: int) -> None:
    panel = MeasurePanel(gpaw=gpaw)
    for position in range(len(panel.tape) + 1):
        panel.tape.seek(position)
        module, from_log, field = panel.digests()
        assert module == from_log
        assert panel.numbers()["agree"] == 1
        assert (int(field or "0", 16) == 0) == (panel.tape.position < len(panel.tape))
    assert panel.digests()[2] == panel.built.mrtd() == mrtd(panel.built.log)


def test_a_module_that_hashes_something_else_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EXTEND_NAME", b"MR.EXTENDED")
    panel = MeasurePanel(gpaw=48)
    assert panel.numbers()["agree"] == 0
    assert "DISAGREE" in panel.summary()


def test_panel_state_is_a_function_of_the_position() -> None:
    panel = MeasurePanel(gpaw=48)
    seen = {}
    for position in chain(range(0, 65, 8), range(64, -1, -8), (5, 60, 24)):
        panel.scrub.value = position
        assert seen.setdefault(position, panel.text()) == panel.text()
    panel.back.click()
    assert panel.tape.position == 23


def test_panel_launches_only_after_a_prediction() -> None:
    panel = MeasurePanel(gpaw=48)
    before = panel.text()
    panel.launch.click()
    assert "first say what becomes of MRTD" in panel.error
    panel.reset.click()
    panel.scrub.value = len(panel.tape)
    assert panel.text() == before
    launch(panel, "one more vCPU", 0, 0, "stays")
    assert panel.predict.value is None


def test_panel_shows_a_change_that_cannot_be_made_and_stays_as_it_was() -> None:
    panel = MeasurePanel(gpaw=48)
    panel.choose("move the page up", number=1, expect="changes")
    panel.launch.click()
    assert "0xffe21000 is taken" in panel.error
    assert panel.recipe == panel.original_recipe


@pytest.mark.parametrize("change", [change.name for change in CHANGES])
def test_every_change_launches_and_the_original_comes_back(change: str) -> None:
    panel = MeasurePanel(gpaw=52)
    before = panel.text()
    launch(panel, change, 2, 1, "changes")
    assert panel.numbers()["agree"] == 1
    assert f"Last change: {change}" in panel.summary()
    panel.original.click()
    assert panel.text() == before


def test_panel_can_lose_every_page() -> None:
    panel = MeasurePanel(gpaw=48)
    for _ in range(4):
        launch(panel, "leave the page out", 0, 0, "changes")
    assert panel.built.mrtd() == hashlib.sha384(b"").hexdigest()
    panel.predict.value = "changes"
    panel.launch.click()
    assert "0 pages" in panel.error


def test_sliders_choose_and_do_nothing_else() -> None:
    panel = MeasurePanel(gpaw=48)
    before = panel.text()
    for change in CHANGES:
        panel.change.value = change.name
        assert panel.number.min <= panel.number.value <= panel.number.max
        assert panel.number.disabled == (not change.number)
        assert change.name in panel.choice.value
    assert panel.text() == before


# -- the exercises


def wrong_answers(number: str, right: Any) -> list[Any]:
    """Answers of the right sort that are wrong."""
    if number == "11.5":
        return [0x1000, 0x4000_0200 if "0x40000200" not in str(right) else 0x4000_0000, "here"]
    if isinstance(right, int):
        return [right + 1, 0]
    if isinstance(right, set):
        return [set("abcde") ^ right, set(), {"z"}]
    return [right[::-1], "00"]


def check_faults() -> list[str]:
    """Exercises whose check accepts a wrong answer, refuses a right one, or gives no hint."""
    faults = []
    for number in NUMBERS:
        for seed in range(3):
            right = variant(number, seed=seed).answer
            given = int(right.split()[0], 16) if number == "11.5" else right
            if not check(number, given, seed=seed):
                faults.append(f"{number} refuses a right answer")
            for wrong in wrong_answers(number, right):
                verdict = check(number, wrong, seed=seed)
                if verdict or len(verdict.text) < 40:
                    faults.append(f"{number} accepts {wrong!r} or gives no hint")
                if number != "11.5" and not isinstance(right, set) and str(right) in verdict.text:
                    faults.append(f"{number} gives the answer away")
    return faults


def test_checks_accept_right_answers_and_advise_on_wrong_ones() -> None:
    assert check_faults() == []


@pytest.mark.parametrize("verdict", [True, False])
def test_a_check_that_says_the_same_to_everything_is_noticed(
    verdict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: verdict)
    assert check_faults() != []


@pytest.mark.parametrize("number", NUMBERS)
def test_exercises_have_variants_and_know_their_answers(number: str) -> None:
    asked = {str(exercise(number, seed=seed)) for seed in range(6)}
    assert len(asked) > 2
    assert "Answer: " in str(exercise(number, seed=3, gpaw=52, show_answer=True))
    assert check(number).state == "unanswered"


def test_hints_recognise_usual_mistakes() -> None:
    page = SMALL_IMAGE[0]._replace(chunks=(2, 5))
    log = log_of((page,))
    advice = dict(exercises_11._wrong_mrtds(log, page))
    assert len(advice) == 7
    assert mrtd(log) not in advice
    made = variant("11.7")
    assert "offset in TDINFO" in made.hint(made.answer - 512)
    for number, seed in (("11.8", 0), ("11.9", 0)):
        made = variant(number, seed=seed)
        original = measure_command.launch(parse(small_firmware()))
        assert "as it is" in made.hint(original) or "order of the metadata" in made.hint(original)
    assert "hash of the file" in variant("11.8").hint(hashlib.sha384(small_firmware()).hexdigest())
    other = measure_command.launch(parse(swapped(small_firmware(), 1, 3)))
    assert "another file" in variant("11.9").hint(other)
    whole = variant("11.1")
    assert "page content" in whole.hint(15 * 4096)
    assert "too many, 3 missing" in variant("11.3").hint({"a"})


# -- the notebook's cells, run in this process


FIRMWARE_CELLS = (
    *("parameters", "imports", "firmware-sections", "firmware-run", "firmware-trials"),
    *("solution-8", "solution-9"),
)


@pytest.fixture(autouse=True)
def at_gpaw_48(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


def _hash_no_gpa(name: bytes, _gpa: int) -> bytes:
    return name.ljust(128, b"\0")


@pytest.mark.parametrize(
    ("owner", "name", "broken", "cell"),
    [
        (measure, "measured_block", _hash_no_gpa, "hashlib-run"),
        (panel_measure, "build_on", lambda tape, _: build_on(tape, Recipe()), "panel-flip"),
        (drawn, "cell_of", lambda r: drawn.Cell(r.page, 16 - (r.chunk or 0)), "panel"),
        (exercises, "is_right", lambda *_: False, "solution-4"),
    ],
)
def test_a_broken_part_turns_cells_red(
    owner: object,
    name: str,
    broken: Callable[..., Any],
    cell: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert turns_red(BOOK, cell)


def _no_pages(_firmware: Firmware, _section: Section) -> Iterator[tuple[int, bytes]]:
    return iter(())


@pytest.mark.parametrize(
    ("owner", "name", "broken", "cells"),
    [
        (firmware_image, "flipped", lambda image, _: image, ["firmware-trials", "solution-8"]),
        (firmware_image, "in_order", lambda made, _: made, ["firmware-trials", "solution-9"]),
        (Firmware, "pages", _no_pages, ["firmware-run", "firmware-trials", "solution-8"]),
        (measure_command, "launch", lambda *_: "0" * 96, ["firmware-run", "solution-8"]),
        (firmware_image, "swapped", lambda image, *_: image, ["firmware-trials"]),
    ],
)
def test_a_broken_part_turns_the_cells_about_the_firmware_file_red(
    owner: object,
    name: str,
    broken: Callable[..., Any],
    cells: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert changed_among(BOOK, FIRMWARE_CELLS) == []
    monkeypatch.setattr(owner, name, broken)
    assert set(cells) <= set(changed_among(BOOK, FIRMWARE_CELLS))


def test_gpaw_can_be_changed_and_the_cells_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    cells = code_cells(BOOK)
    for cell in cells:
        shown_by(cell.source, names)
    monkeypatch.setenv("TDXLAB_GPAW", "52")
    outputs = {cell.id: shown_by(cell.source, names) for cell in cells}
    assert names["GPAW"] == 52
    assert "TDH.MEM.SEPT.ADD        6" in outputs["feeds-run"]
    assert all(outputs[f"solution-{n[3:]}"].startswith(f"{n}: right") for n in NUMBERS)
    assert outputs["orders-run"] == saved(BOOK)["orders-run"]


def test_instructor_notes_give_the_right_answers() -> None:
    notes = (BOOK.parent / "instructor" / "11.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (11\.\d) \| ([^|]+) \|", notes, flags=re.M))
    assert list(rows) == NUMBERS
    for number in ("11.1", "11.2", "11.3", "11.7"):
        answer = variant(number).answer
        shown = sorted(answer) if isinstance(answer, set) else [f"{answer:,}"]
        assert rows[number].strip("{}").split(", ") == shown
    for number in ("11.4", "11.6", "11.8", "11.9"):
        start, end = rows[number].split("...")
        assert variant(number).answer.startswith(start)
        assert variant(number).answer.endswith(end)
