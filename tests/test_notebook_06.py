"""Notebook 06: the panel, the exercises, the cells when they run again; and that damage shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tdxlab.kvm import fast_fault
from tdxlab.study import check, exercises, exercises_06, shared_lab, shared_tables, shared_views
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_06 import EXERCISES
from tdxlab.study.palette import Look
from tdxlab.study.panel_shared import SharedPanel
from tdxlab.study.shared_lab import VM
from tests.exercise_checks import accepted_wrongs, faults_of_check
from tests.notebook_cells import code_cells, shown_by, turns_red
from tests.panel_checks import missing_from_output, story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "06-shared-memory.ipynb"
WRONG: dict[str, list[Any]] = {
    "06.1": ["no fault", "fast", "slow", "maybe", 1],
    "06.2": [0, 100, -1, "6", (6,)],
    "06.3": [(0, 0), (1, 99), (99, 512), (3,), 3],
    "06.4": [set(), {1}, set(range(10)), {99}, "0"],
    "06.5": [0, 1000, "1", (1,)],
    "06.6": [(0, "leaf"), (7, "MMIO"), (1,), 1],
    "06.7": [[True] * 5, [False] * 5, [True], True],
}
NUMBERS = [exercise.number for exercise in EXERCISES]
WIDTHS = pytest.mark.parametrize("gpaw", [48, 52])
STORY = 14


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


@pytest.fixture(scope="module")
def _made() -> SharedPanel:
    return SharedPanel(gpaw=48)


@pytest.fixture
def panel(_made: SharedPanel) -> SharedPanel:
    """One at the beginning of its story, its controls as they are at first."""
    _made.memory.value, _made.page.value, _made.split.value = "2M", 3, True
    _made.retell.click()
    return _made


# -- the panel


@WIDTHS
def test_the_story_can_be_gone_through_and_scrubbed(gpaw: int) -> None:
    panel = SharedPanel(gpaw=gpaw)
    assert (panel.tape.position, len(panel.tape)) == (0, STORY)
    assert story_faults(panel, seed=6, places=12) == []


def test_buttons_act_on_the_chosen_page_and_end_the_story(panel: SharedPanel) -> None:
    panel.memory.value, panel.page.value = "4K", 700
    panel.read.click()
    assert (panel.error, len(panel.tape)) == ("", 1)
    assert panel.summary() == (
        "guest: read page 700 of the 4K memory: faults +1, pages_4k +1, tables +3, "
        "SPTE changes +4. Page 700 of the 4K memory is mapped by a 4K leaf with "
        "R W X A D MP HW MW SV."
    )
    panel.log.click()
    panel.write.click()
    assert panel.lab.dirty("4K") == [700]
    assert panel.numbers()["dirty"] == panel.numbers()["fast"] == 1
    panel.get_log.click()
    assert "dirty: 700" in panel.summary()
    assert panel.numbers()["dirty"] == 0
    panel.stop.click()
    panel.age.click()
    panel.device.click()
    panel.flush.click()
    assert (panel.error, len(panel.tape)) == ("", 8)
    assert panel.numbers()["MMIO SPTEs"] == 1


@pytest.mark.parametrize(("eager", "leaves"), [(True, 512), (False, 0)])
def test_split_menu_decides_when_a_large_page_is_split(
    panel: SharedPanel, eager: bool, leaves: int
) -> None:
    panel.split.value = eager
    panel.read.click()
    panel.log.click()
    assert panel.numbers()["pages_4k"] == leaves
    panel.write.click()
    assert (panel.numbers()["pages_4k"], panel.numbers()["fast"]) == (512, int(eager))


def test_choosing_changes_nothing_but_the_views(panel: SharedPanel) -> None:
    panel.scrub.value = 8
    digest, views = panel.machine.digest(), panel.views()
    panel.memory.value, panel.page.value, panel.split.value = "1G", 1000, False
    assert (panel.machine.digest(), panel.tape.position) == (digest, 8)
    assert panel.views() != views


def test_maps_show_letters_in_their_places(panel: SharedPanel) -> None:
    panel.scrub.value = 10
    small = panel.views()["Direct EPT, 4K entries"]
    hints = re.findall(r"<title>entry (\d+): ([^<]+)</title>", small)
    assert hints[3:6] == [("3", "write-protected"), ("4", "writable"), ("5", "write-protected")]
    assert len(hints) == 512
    assert 'class="tdxlab-chosen"' in small
    assert re.findall(r"<title>(page \d+: dirty)</title>", panel.views()["Dirty log"]) == [
        "page 4: dirty"
    ]
    assert "W 0" in panel.views()["The entry of the chosen page"]
    panel.scrub.value = 12
    assert "writable, old" not in panel.views()["Direct EPT, 1G entries"]
    assert "write-protected, old" in panel.views()["Direct EPT, 2M entries"]
    assert "walk ends at the 2M entry" in panel.views()["Direct EPT, 4K entries"]


def test_every_map_has_a_label_for_who_cannot_see_it(panel: SharedPanel) -> None:
    panel.scrub.value = 10
    for view in panel.views().values():
        assert re.search(r'role="img" aria-label="[^"]{20,}"', view)


def test_what_cannot_be_done_is_a_sentence_in_the_panel(
    panel: SharedPanel, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.get_log.click()
    assert "not being logged" in panel.error
    panel.log.click()
    panel.log.click()
    assert "being logged already" in panel.error
    panel.fetch.click()
    assert "a TD does not run code in shared memory" in panel.error
    assert capsys.readouterr() == ("", "")


def test_a_default_vm_has_the_same_panel() -> None:
    panel = SharedPanel(kind=VM)
    panel.scrub.value = STORY
    assert panel.numbers()["TD entries"] == panel.numbers()["other SEAMCALLs"] == 0
    panel.fetch.click()
    assert panel.error == ""
    panel.flush.click()
    panel.read.click()
    assert panel.lab.is_young("2M", 3)


def test_drawing_leaves_the_machine_where_it_was(panel: SharedPanel) -> None:
    for place in range(0, STORY + 1, 2):
        panel.scrub.value = place
        digest = panel.machine.digest()
        panel.draw()
        assert (panel.machine.digest(), panel.tape.position) == (digest, place)


def test_bundle_has_the_widget_a_picture_and_the_text(panel: SharedPanel) -> None:
    assert missing_from_output(panel) == []


# -- the exercises


def is_same(one: Any, other: Any) -> bool:
    return bool(one == other or (isinstance(one, list) and tuple(one) == other))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    for seed in range(4):
        right = variant(number, seed=seed).answer
        for wrong in WRONG[number]:
            if is_same(wrong, right):
                continue
            verdict = check(number, wrong, seed=seed)
            assert verdict.state == "wrong"
            assert len(verdict.text) > 40
            is_named = isinstance(right, str)
            assert is_named or f" {right} " not in verdict.text.removeprefix(number)


def test_only_the_private_side_depends_on_the_width() -> None:
    for number in NUMBERS:
        answers = [variant(number, gpaw=gpaw).answer for gpaw in (48, 52)]
        assert (answers[0] != answers[1]) == (number == "06.5")


# -- the notebook's cells


def test_gpaw_can_be_changed_in_the_middle() -> None:
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(PATH)):
        shown = shown_by(cell.source, names)
        if number == 8:
            names["GPAW"] = 52
        if cell.id.endswith("-solution"):
            assert "right" in shown


# -- damage is noticed


def _first_page(self: SharedPanel) -> tuple[str, int]:
    """Controls that nobody reads."""
    return "2M", 0


def _always_writable(*_: object) -> Look:
    return shared_views.ENTRY_LOOKS["writable"]


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (SharedPanel, "chosen", property(_first_page), {"panel-drive"}),
        (shared_views, "look_of", _always_writable, {"panel-drive"}),
        (fast_fault, "is_mmu_writable_spte", lambda _: False, {"log-run", "split-run"}),
        (shared_lab, "changes", lambda _: "", {"walk-run", "log-run"}),
        (shared_tables, "letters", lambda _: "R", {"log-look", "age-run"}),
    ],
    ids=["ignores its slider", "map of one letter", "no fast path", "silent", "letters lost"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Any, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, *expected)


def test_a_wrong_model_changes_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    make: Any = exercises_06._next_write
    assert make.__wrapped__(48, 3).answer == "fast"
    monkeypatch.setattr(fast_fault, "page_fault_can_be_fast", lambda *_: False)
    assert make.__wrapped__(48, 3).answer == "slow"


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
