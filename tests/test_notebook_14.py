"""Notebook 14: the PAE-root stepper, the exercises; damage to them and to the cells shows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tdxlab.kvm import pae_pdpte, pae_special, shadow_roots
from tdxlab.kvm.shadow_params import AMD, RFC
from tdxlab.study import exercises, pae_tables, panel_pae
from tdxlab.study.exercises_14 import EXERCISES
from tdxlab.study.pae_lab import PAE
from tdxlab.study.panel_pae import PaePanel
from tests.exercise_checks import (
    accepted_wrongs,
    bad_advice,
    faults_of_check,
)
from tests.notebook_cells import turns_red
from tests.panel_checks import maps_with_words, missing_from_output

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "14-before-tdp.ipynb"
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "14.1": [(0, 0, 0, 0), (3,), "x", 7],
    "14.2": [{1, 2, 3, 4, 5}, set(), {9}, [1, 2, 4], 7],
    "14.3": [("ok",) * 4, ("fine",) * 3, "fine"],
    "14.4": [(3, 0, 1), (0, 1, 2), (1,), 5],
    "14.5": [7, 17, "x"],
    "14.6": [0, 17, "x"],
    "14.7": [(4, 4), (9, 1), (1,), 3],
}


@pytest.fixture
def panel() -> PaePanel:
    return PaePanel(maxphyaddr=48)


# -- the panel


@pytest.mark.parametrize("width", [48, 52])
def test_state_is_a_function_of_the_position(width: int) -> None:
    panel = PaePanel(maxphyaddr=width)
    panel.use.click()
    panel.process.value = 1
    panel.use.click()
    seen = []
    for place in range(len(panel.tape) + 1):
        panel.tape.seek(place)
        seen.append(panel.text())
    for place in random.Random(1).choices(range(len(seen)), k=8):
        panel.tape.seek(place)
        assert panel.text() == seen[place]
    panel.reset.click()
    assert panel.text() == seen[0]
    panel.back.click()
    assert "beginning" in panel.error


def test_next_store_finds_every_store_and_says_when_there_is_none(panel: PaePanel) -> None:
    for filled in range(4):
        panel.store.click()
        assert panel.numbers()["present"] == filled
        assert "about to store into a slot" in panel.summary()
    panel.store.click()
    assert "nothing is stored" in panel.error


def panel_faults() -> list[str]:
    """What is wrong with the panel: buttons have to do what the controls say, choosing nothing."""
    panel, faults = PaePanel(maxphyaddr=48), []
    before = panel.text()
    panel.design.value, panel.vendor.value, panel.guest.value = RFC, AMD, PAE
    panel.encrypted.value, panel.process.value, panel.gib.value = True, 4, 0
    if panel.text() != before:
        faults.append("choosing acts")
    panel.build.click()
    params = panel.lab.params
    if (params.design, params.vendor, panel.lab.guest, params.c_bit) != (RFC, AMD, PAE, 47):
        faults.append("builds something else")
    panel.use.click()
    if panel.lab.vm.vcpus[0].cr3 != panel.lab.cr3(4) or panel.lab.vm.counts["pf_fixed"] != 1:
        faults.append("uses something else")
    pages = len(panel.lab.vm.sps)
    panel.zap.click()
    if len(panel.lab.vm.sps) != pages - 1:
        faults.append("does not zap")
    panel.zap_all.click()
    if panel.lab.vm.mmu_valid_gen != 1:
        faults.append("does not zap everything")
    panel.use.click()
    panel.what.value = "all ones"
    panel.spoil.click()
    if panel.numbers()["illegal"] != 1:
        faults.append("does not spoil")
    return faults


def test_panel_obeys_its_controls() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("_build", lambda self: None, "builds something else"),
        ("_use", lambda self: self.lab.use(0, 3), "uses something else"),
        ("_zap", lambda self: None, "does not zap"),
        ("_spoil", lambda self: None, "does not spoil"),
        ("_zap_all", lambda self: None, "does not zap everything"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PaePanel, name, damage)
    assert expected in panel_faults()


def test_panel_says_what_cannot_be_built(panel: PaePanel) -> None:
    panel.encrypted.value = True
    panel.build.click()
    assert "a C-bit is AMD's" in panel.error


def test_panel_ends_a_use_with_what_came_of_it(panel: PaePanel) -> None:
    panel.gib.value = 1
    panel.use.click()
    assert "the guest's #PF" in panel.summary()
    panel.what.value = "all ones"
    panel.spoil.click()
    panel.use.click()
    assert "VM entry fails" in panel.summary()
    assert "1 of them illegal" in panel.summary()


def test_nothing_goes_on_after_a_crash_but_back(panel: PaePanel) -> None:
    panel.lab.tape.seek(len(panel.tape))
    panel.what.value = "not present, else all ones"
    panel.spoil.click()
    panel.use.click()
    assert "the host crashes" in panel.summary()
    panel.use.click()
    assert "go back, or build a new VM" in panel.error
    panel.back.click()
    panel.back.click()
    assert panel.error == ""


def test_views_have_words_for_those_who_do_not_see_them(panel: PaePanel) -> None:
    assert maps_with_words(panel) == [True, True]
    assert missing_from_output(panel) == []


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    assert bad_advice(number, WRONG[number]) == []


# -- damage is noticed


@pytest.mark.parametrize(
    ("where", "name", "damage", "expected"),
    [
        (pae_tables, "enter_guest", lambda *_: "fine", "when-run"),
        (pae_special, "make_root_pdpte", pae_pdpte.make_pdpte_spte, "special-run"),
        (shadow_roots, "is_root_usable", lambda *_: False, "cost-run"),
        (panel_pae, "tree_svg", lambda lab: "<svg></svg>", "panel"),
    ],
    ids=["no check", "bit 11", "no kept root", "no map"],
)
def test_damage_turns_a_cell_red(
    where: Any, name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)
    monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, expected)


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)
