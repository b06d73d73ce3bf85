"""Notebook 04: the fault stepper, the exercises, the cells when they run again, and damage."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxlab.study import exercises, exercises_04, mirror_tables, mirror_views, svg
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_04 import EXERCISES
from tdxlab.study.mirror_views import EXTERNAL_HEADING, MIRROR_HEADING
from tdxlab.study.panel_mirror import MirrorPanel
from tests.exercise_checks import accepted_wrongs, faults_of_check
from tests.notebook_cells import turns_red
from tests.panel_checks import missing_from_output, story_faults

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "04-the-mirror.ipynb"
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "04.1": [(9, 1), (0, 7), (-1, 1), 3, "two"],
    "04.2": [(1, 1), (99, 5), 4, (2,)],
    "04.3": [0, 1 << 20, 2055 * 4096, 1027 * 4096, "much"],
    "04.4": [(9, 1, 1), (0, 9, 1), (0, 1, 9), (2, 9, 9), 5],
    "04.5": [(9, 9, 2), (2, 1, 2), (2, 1, 9), (1, 1), 0],
    "04.6": [(24, 0, 2), (8, 5, 2), (1, 1, 1), (8,), "all"],
    "04.7": [4, 16, 1, "none"],
}


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


@pytest.fixture
def panel() -> MirrorPanel:
    return MirrorPanel(gpaw=48)


def numbers(panel: MirrorPanel, *names: str) -> tuple[int, ...]:
    found = panel.numbers()
    return tuple(found[name] for name in names)


# -- the panel


@pytest.mark.parametrize(("gpaw", "length"), [(48, 62), (52, 66)])
def test_the_story_can_be_walked_and_scrubbed(gpaw: int, length: int) -> None:
    panel = MirrorPanel(gpaw=gpaw)
    assert (panel.tape.position, len(panel.tape)) == (0, length)
    assert story_faults(panel, seed=4, places=8) == []


def test_fault_goes_through_its_stages_in_order(panel: MirrorPanel) -> None:
    panel.retell.click()
    panel.scrub.value = 30
    panel.gfn.value = "0x1ff"
    panel.fault.click()
    assert (panel.tape.position, panel.error) == (30, "")
    seen = []
    while panel.tape.position < len(panel.tape):
        panel.stage.click()
        seen.append(panel.lab.tape.stage.name)
    assert seen == [
        *("enter", "guest", "walk", "freeze", "hook", "SEAMCALL", "publish", "enter", "done")
    ]
    assert panel.is_mapped


def test_frozen_entry_has_its_own_look_and_letter_on_the_way(panel: MirrorPanel) -> None:
    panel.scrub.value = 22
    mirror = panel.views()[MIRROR_HEADING]
    assert "4K entry 0: FROZEN" in mirror
    assert "entry 0: FROZEN</title>" in mirror
    assert ">F</text>" in mirror
    assert "4K FREE" in panel.views()[EXTERNAL_HEADING]
    assert panel.numbers()["frozen"] == 1
    assert "The 4K entry of gfn 0x0 is FROZEN" in panel.summary()


def test_entry_is_locked_inside_the_module_and_pending_behind(panel: MirrorPanel) -> None:
    panel.scrub.value = 23
    assert "FREE, locked" in panel.views()[EXTERNAL_HEADING]
    panel.step.click()
    assert "PENDING" in panel.views()[EXTERNAL_HEADING]
    assert numbers(panel, "mirror leaves", "S-EPT leaves") == (0, 1)
    panel.step.click()
    assert numbers(panel, "mirror leaves", "S-EPT leaves") == (1, 1)


def test_trace_line_has_the_registers_of_each_seamcall(panel: MirrorPanel) -> None:
    panel.scrub.value = 10
    before = panel.text().splitlines()[2]
    assert before.startswith("LP 0  before the call TDH.MEM.SEPT.ADD")
    assert re.search(r"RAX=0x3 RCX=0x3 RDX=0x\w+ R8=0x\w+$", before)
    panel.scrub.value = 12
    assert re.search(
        r"SEAMCALL TDH.MEM.SEPT.ADD  RAX=0x3 RCX=0x3 .*->  SUCCESS", panel.text().splitlines()[2]
    )


def test_zap_button_blocks_tracks_removes_and_writes_back(panel: MirrorPanel) -> None:
    panel.scrub.value = 48
    panel.gfn.value = "0x1"
    panel.zap.click()
    panel.scrub.value = len(panel.tape)
    names = ("RANGE.BLOCK", "TRACK", "PAGE.REMOVE", "PAGE.WBINVD", "mirror leaves", "S-EPT leaves")
    assert numbers(panel, *names) == (1, 1, 1, 1, 1, 1)
    assert panel.state == "empty"


def test_zap_of_an_unused_page_calls_nothing(panel: MirrorPanel) -> None:
    panel.scrub.value = 30
    before = panel.numbers()
    panel.gfn.value = "0x200"
    panel.zap.click()
    panel.scrub.value = len(panel.tape)
    assert panel.numbers() == before


def test_fault_in_the_middle_of_an_operation_comes_behind_it(panel: MirrorPanel) -> None:
    panel.scrub.value = 10
    panel.gfn.value = "0x200"
    panel.fault.click()
    assert (panel.tape.position, panel.error) == (30, "")
    panel.scrub.value = len(panel.tape)
    assert numbers(panel, "SEPT.ADD", "PAGE.AUG") == (4, 2)


def test_menu_slider_and_text_choose_the_same_page(panel: MirrorPanel) -> None:
    panel.piece.value, panel.page.value = "another 1 GiB", 7
    assert (panel.chosen, panel.gfn.value) == (0x40007, "0x40007")
    panel.gfn.value = "0x8000003"
    assert (panel.piece.value, panel.page.value) == ("another 512 GiB", 3)


def test_choosing_changes_views_only(panel: MirrorPanel) -> None:
    panel.scrub.value = 25
    digest = panel.machine.digest()
    views = set()
    for gfn in ("0x0", "0x5", "0x201", "0x40000"):
        panel.gfn.value = gfn
        views.add(panel.views()[MIRROR_HEADING])
    assert (panel.machine.digest(), panel.tape.position, len(views)) == (digest, 25, 4)


@pytest.mark.parametrize(
    ("typed", "said"), [("0x50000", "has no memory; choose one of"), ("page", "is no gfn")]
)
def test_a_gfn_that_is_none_is_a_sentence_in_the_panel(
    panel: MirrorPanel, typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.gfn.value = typed
    assert said in panel.error
    assert panel.chosen == 0
    panel.step.click()
    assert panel.error == ""
    assert capsys.readouterr() == ("", "")


def test_next_stage_at_the_end_is_a_sentence(panel: MirrorPanel) -> None:
    panel.scrub.value = 62
    panel.stage.click()
    assert "this is the end of the tape" in panel.error


def test_drawing_leaves_the_machine_where_it_was(panel: MirrorPanel) -> None:
    for place in range(0, 62, 7):
        panel.scrub.value = place
        digest = panel.machine.digest()
        panel.draw()
        assert (panel.machine.digest(), panel.tape.position) == (digest, place)


def test_views_have_labels_that_say_what_they_show(panel: MirrorPanel) -> None:
    panel.scrub.value = 22
    labels = re.findall(r'role="img" aria-label="([^"]*)"', "".join(panel.views().values()))
    assert len(labels) == 4
    assert labels[0].startswith("walk in the mirror: PML4 table, 1G table, 2M table, 4K FROZEN")
    assert "1 FROZEN, the rest free" in labels[1]


def test_bundle_has_the_widget_a_picture_and_the_text(panel: MirrorPanel) -> None:
    assert missing_from_output(panel) == []


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    for seed in range(2):
        made = variant(number, seed=seed)
        for wrong in WRONG[number]:
            if wrong == made.answer:
                continue
            verdict = exercises.check(number, wrong, seed=seed)
            assert verdict.state == "wrong"
            assert len(verdict.text) > 40
            assert str(made.answer) not in verdict.text.removeprefix(number)


# -- the cells


# -- damage is noticed


def _ignores_the_choice(self: MirrorPanel) -> None:
    self.lab.fault(0)


def _from_the_wrong_end(cells: dict[int, svg.Look], *, title: str) -> str:
    return svg.entry_map({511 - index: look for index, look in cells.items()}, title=title)


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (MirrorPanel, "_fault", _ignores_the_choice, "panel-drive"),
        (mirror_views, "entry_map", _from_the_wrong_end, "panel"),
        (mirror_tables, "table_count", lambda gfns, levels: len(gfns), "formula-run"),
        (exercises_04, "contiguous_table_count", lambda *_: 1, "exercise-3-solution"),
    ],
    ids=["ignores its page", "map from the wrong end", "wrong formula", "wrong answer"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Callable[..., Any], expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, expected)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
