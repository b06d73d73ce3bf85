"""Notebook 13: the VM-type panel, the exercises, the cells that run again; that damage shows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tdxlab.kvm import memory_region
from tdxlab.kvm.rmp import SnpGmem
from tdxlab.study import (
    debates_gfns,
    debates_protocols,
    debates_zaps,
    exercises,
    panel_vmtype,
    vmtype_ways,
)
from tdxlab.study.exercises_13 import EXERCISES
from tdxlab.study.panel_vmtype import TypePanel
from tdxlab.study.vmtype_lab import NAMES
from tests.exercise_checks import (
    accepted_wrongs,
    bad_advice,
    faults_of_check,
)
from tests.notebook_cells import turns_red

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "13-one-mmu-many-vm-types.ipynb"
NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "13.1": [(True,) * 3, (True, False, False, True), (False, True, False, False), "yes"],
    "13.2": ["mirror", "direct", "memory fault", "both", 7],
    "13.3": [(0, 0), (4, 4, 4), (2, 2, 2), 3],
    "13.4": [set(), {"has_private_mem", "has_mirrored_tdp"}, {"x"}, ["has_private_mem"], 4],
    "13.5": [0x12345, 0x12345000, 0, "0x12345"],
    "13.6": [(512, 512, 512), (2048, 512, 512), (2048, 1544, 0), 2048],
    "13.7": [(0, 3), (2, 2), (3, 1), 3],
    "13.8": [("created", 1), ("TD refused", 2), ("lost", 0), ("created", 4), "created"],
}


@pytest.fixture
def panel() -> TypePanel:
    return TypePanel(gpaw=48)


# -- the panel


@pytest.mark.parametrize(("gpaw", "name"), [(48, "SNP"), (52, "TDX")])
def test_state_is_a_function_of_the_position(gpaw: int, name: str) -> None:
    panel = TypePanel(gpaw=gpaw)
    panel.vm_type.value = name
    panel.build.click()
    for deed in ("use a private page", "punch hole"):
        panel.deed.value = deed
        panel.do.click()
    seen = []
    for place in range(len(panel.tape) + 1):
        panel.tape.seek(place)
        seen.append(panel.text())
    for place in random.Random(1).choices(range(len(seen)), k=4):
        panel.tape.seek(place)
        assert panel.text() == seen[place]
    panel.reset.click()
    assert panel.text() == seen[0]
    panel.back.click()
    assert "beginning" in panel.error


def panel_faults() -> list[str]:
    """What is wrong with the panel: buttons have to do what the menus say, choosing nothing."""
    panel, faults = TypePanel(gpaw=52), []
    before = panel.text()
    panel.vm_type.value, panel.created.value, panel.deed.value = "TDX", True, "punch hole"
    panel.no_quirk.value = True
    if panel.text() != before:
        faults.append("choosing acts")
    panel.build.click()
    lab = panel.lab
    if (lab.name, lab.launched, lab.gate.guest.gpaw) != ("TDX", False, 52):
        faults.append("builds something else")
    if panel.lab.quirk:
        faults.append("leaves the quirk on")
    panel.deed.value = "pre-fault at creation"
    panel.do.click()
    if panel.lab.history() != [("pre-fault at creation", "-EOPNOTSUPP")]:
        faults.append("does something else")
    return faults


def test_panel_obeys_its_controls() -> None:
    assert panel_faults() == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("_build", lambda self: None, "builds something else"),
        ("_do", lambda self: self.lab.do("a read-only slot"), "does something else"),
    ],
)
def test_a_control_that_does_nothing_is_noticed(
    name: str, damage: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TypePanel, name, damage)
    assert expected in panel_faults()


def test_every_type_shows_its_own_pages(panel: TypePanel) -> None:
    shown = {}
    for name in NAMES:
        panel.vm_type.value = name
        panel.build.click()
        numbers = panel.numbers()
        shown[name] = (numbers["direct"], numbers["mirror"], numbers["RMP entries"])
    expected = dict.fromkeys(NAMES, (8, 0, 0)) | {"SNP": (8, 0, 4), "TDX": (4, 4, 0)}
    assert shown == expected


def test_panel_says_what_a_vm_cannot_meet(panel: TypePanel) -> None:
    panel.deed.value = "pre-fault at creation"
    panel.do.click()
    assert "this VM is past that" in panel.error
    panel.vm_type.value, panel.deed.value = "SEV", "becomes shared"
    panel.build.click()
    panel.do.click()
    assert "type SEV has no guest_memfd" in panel.error
    assert panel.numbers()["direct"] == 8


def test_summary_tells_the_deed_and_its_answer(panel: TypePanel) -> None:
    panel.deed.value = "a read-only slot"
    panel.do.click()
    assert panel.summary().startswith("SNP: a read-only slot: -EINVAL. 8 pages in the direct root")
    panel.deed.value = "use a private page"
    panel.do.click()
    panel.back.click()
    assert "use a private page: not ended yet" in panel.summary()


def test_views_have_words_for_those_who_do_not_see_them(panel: TypePanel) -> None:
    (svg,) = [view for view in panel.views().values() if "<svg" in view]
    assert 'role="img"' in svg
    assert "aria-label=" in svg
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == panel.text()
    assert bundle["image/png"].startswith("iVBOR")


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_refuses_wrong_ones(number: str, gpaw: int) -> None:
    assert faults_of_check(number, WRONG[number], gpaw=gpaw) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_answer_gets_advice_that_is_not_the_answer(number: str) -> None:
    wrong = [each for each in WRONG[number] if each != "both"]
    assert bad_advice(number, wrong) == []


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(accepted_wrongs(number, WRONG[number], seed=0) for number in NUMBERS)


# -- the notebook's cells


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDXLAB_GPAW", raising=False)


def test_damage_turns_its_cell_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damages that do not hide each other: one in the kernel's half, one in each part shown."""
    damages: list[tuple[Any, str, Any, str]] = [
        (SnpGmem, "invalidate", lambda *_: None, "rmp-run"),
        (memory_region, "are_flags_valid", lambda *_: True, "matrix-run"),
        (panel_vmtype, "pages_svg", lambda lab: "<svg></svg>", "panel"),
        (TypePanel, "_build", lambda self: None, "panel-drive"),
        (vmtype_ways, "wrong_answers", lambda *_: (), "ways-run"),
        (debates_gfns, "mark_page_dirty_in_slot", lambda *_: None, "gfn-run"),
        (debates_zaps, "status_in", lambda _: "nothing", "atomic-run"),
        (debates_protocols, "VCPUS", (1, 2), "protocol-plot"),
    ]
    for where, name, damage, _ in damages:
        monkeypatch.setattr(where, name, damage)
    assert turns_red(PATH, *(expected for *_, expected in damages))
