"""The life-cycle panel of notebook 00, its tape, its trees, and the exercises."""

from __future__ import annotations

import random
from typing import Any

import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from tdxlab.accounts import DIRECT, EXTERNAL, MIRROR, TREES
from tdxlab.kvm.spte import FROZEN_SPTE
from tdxlab.study import check, exercises, plots
from tdxlab.study.exercises import variant
from tdxlab.study.exercises_00 import EXERCISES
from tdxlab.study.life_lab import GUEST_PAGES, ByWhom, LifeLab, who_changed
from tdxlab.study.life_tape import STORE
from tdxlab.study.life_views import (
    TREE_LOOKS,
    entries_bars,
    tables_bars,
    tree_counts,
    tree_drawing,
    tree_svg,
)
from tdxlab.study.panel_life import LifePanel, who_can_read_the_tables, who_may_touch

NUMBERS = [exercise.number for exercise in EXERCISES]
WRONG: dict[str, list[Any]] = {
    "00.1": [1, 12, 38, "40"],
    "00.2": [0, 1, 16, 5000],
    "00.3": [4, 1, 1024, "16"],
    "00.4": ["TDH.MEM.PAGE.AUG", "accept", "TDG.VP.VMCALL"],
    "00.5": [("FREE", "MAPPED", "FREE"), ("PENDING",), (), ("FREE", "PENDING", "MAPPED")],
    "00.6": [1, 3, 19, 999],
    "00.7": [{"mirror"}, {"external"}, set(), {"mirror", "direct"}, {"shared"}],
}


@pytest.fixture
def life() -> LifePanel:
    return LifePanel(gpaw=48)


@pytest.fixture
def lived(life: LifePanel) -> LifePanel:
    """The story of the notebook, before its end."""
    life.build.click()
    life.page.value = 1
    life.touch.click()
    life.page.value = 2
    for button in (life.touch, life.share, life.touch_shared):
        button.click()
        assert life.error == ""
    return life


def leaves(lab: LifeLab, tree: str) -> dict[int, str]:
    found = [table for table in lab.trees()[tree] if table.level == 0]
    return {entry.number: entry.state for table in found for entry in table.entries}


# -- the commands


@pytest.mark.parametrize(("gpaw", "calls"), [(48, 44), (52, 45)])
def test_build_makes_a_td_of_the_width(gpaw: int, calls: int) -> None:
    life = LifePanel(gpaw=gpaw)
    life.build.click()
    numbers = life.numbers()
    assert numbers["SEAMCALLs"] == calls == sum(life.machine.seamcalls.values()) - _boot(gpaw)
    levels = {48: 4, 52: 5}[gpaw]
    assert (numbers["mirror tables"], numbers["S-EPT tables"]) == (levels, levels)
    assert life.td is not None
    assert life.td.tdx.is_runnable


def _boot(gpaw: int) -> int:
    return sum(LifeLab(gpaw=gpaw).machine.seamcalls.values())


def test_touch_share_and_touch_shared_move_a_page_between_the_trees(lived: LifePanel) -> None:
    assert leaves(lived.lab, MIRROR) == {0: "mapped", 1: "mapped"}
    assert leaves(lived.lab, EXTERNAL) == {0: "MAPPED", 1: "MAPPED"}
    assert leaves(lived.lab, DIRECT) == {2: "mapped"}
    assert [deed.what for deed in lived.deeds_of("share")] == [
        "TDH.VP.ENTER",
        "TDG.VP.VMCALL",
        "4K entry of gfn 0x40002 becomes empty",
        "TDH.MEM.RANGE.BLOCK",
        "TDH.MEM.TRACK",
        "TDH.MEM.PAGE.REMOVE",
        "TDH.PHYMEM.PAGE.WBINVD",
        "TDH.VP.ENTER",
        "leaves the guest",
    ]


def test_touching_shared_memory_calls_the_module_for_entries_alone(lived: LifePanel) -> None:
    deeds = lived.deeds_of("touch-shared")
    assert {deed.what for deed in deeds if deed.kind == "SEAMCALL"} == {"TDH.VP.ENTER"}
    assert [deed.kind for deed in deeds].count(STORE) == 4
    assert lived.deeds_of("tear-down") == []


def test_the_counts_are_those_of_the_machine(lived: LifePanel) -> None:
    assert lived.td is not None
    levels = lived.machine.tables(lived.td)
    for tree, name in ((MIRROR, "mirror"), (EXTERNAL, "S-EPT"), (DIRECT, "direct")):
        tables = sum(level.tables for level in levels[tree].values())
        assert lived.numbers()[f"{name} tables"] == tables
        assert lived.numbers()[f"{name} leaves"] == levels[tree]["4K"].entries


def test_tear_down_leaves_nothing(lived: LifePanel) -> None:
    lived.tear_down.click()
    numbers = lived.numbers()
    assert lived.td is None
    assert {numbers[name] for name in numbers if name.endswith(("tables", "leaves"))} == {0}
    assert numbers["pages owned"] == 0
    assert lived.summary() == f"no TD exists; {numbers['SEAMCALLs']} SEAMCALLs so far."
    assert who_may_touch(lived) == []
    lived.build.click()
    assert lived.error == ""
    assert lived.numbers()["mirror leaves"] == 1


def test_what_makes_no_sense_is_refused_and_changes_nothing(life: LifePanel) -> None:
    for button in (life.touch, life.share, life.touch_shared, life.tear_down):
        button.click()
        assert "there is no TD; press Build" in life.error
    life.build.click()
    life.page.value = 3
    life.share.click()
    before = life.machine.digest(), life.tape.position
    for button, complaint in (
        (life.build, "already"),
        (life.touch, "page 3 is shared now"),
        (life.share, "page 3 is shared now"),
    ):
        button.click()
        assert complaint in life.error
    life.page.value = 4
    life.touch_shared.click()
    assert "page 4 is private" in life.error
    assert (life.machine.digest(), life.tape.position) == before
    with pytest.raises(ValueError, match=f"choose from 0..{GUEST_PAGES - 1}"):
        life.lab.touch(GUEST_PAGES)


def test_a_command_in_the_middle_goes_on_from_the_last_whole_command(lived: LifePanel) -> None:
    position = lived.tape.position
    lived.scrub.value = position - 3
    lived.page.value = 5
    lived.touch.click()
    assert lived.error == ""
    assert leaves(lived.lab, EXTERNAL) == dict.fromkeys((0, 1, 5), "MAPPED")
    assert leaves(lived.lab, DIRECT) == {}
    lived.reset.click()
    lived.build.click()
    assert leaves(lived.lab, MIRROR) == {0: "mapped"}


def test_a_refusal_in_the_middle_leaves_the_tape_where_it_was(lived: LifePanel) -> None:
    lived.scrub.value = 57
    before, length = lived.machine.digest(), len(lived.tape)
    lived.build.click()
    assert "already" in lived.error
    assert (lived.machine.digest(), lived.tape.position, len(lived.tape)) == (before, 57, length)


# -- the tape


@pytest.mark.parametrize("gpaw", [48, 52])
def test_state_is_a_function_of_the_position_alone(gpaw: int) -> None:
    life = LifePanel(gpaw=gpaw)
    for name in ("build", "touch", "share", "touch-shared", "tear-down"):
        life.command(name)
    seen: dict[int, tuple[str, str]] = {}
    places = random.Random(5).choices(range(len(life.tape) + 1), k=40)
    for place in [*places, *reversed(places)]:
        life.tape.seek(place)
        now = (life.machine.digest(), life.text())
        assert seen.setdefault(place, now) == now
    assert len(set(seen.values())) == len(seen) > 20


def test_a_frozen_entry_is_seen_before_the_module_has_the_page(lived: LifePanel) -> None:
    places = [i for i, a in enumerate(lived.tape.actions, start=1) if "FROZEN" in a.name]
    lived.scrub.value = places[-1]
    frozen = [
        entry
        for table in lived.lab.trees()[MIRROR]
        for entry in table.entries
        if entry.raw == FROZEN_SPTE
    ]
    assert [(entry.number, entry.state, entry.hpa) for entry in frozen] == [(2, "FROZEN", 0)]
    assert 2 not in leaves(lived.lab, EXTERNAL)
    assert lived.tape.last is not None
    assert lived.tape.last.kind == STORE
    lived.step.click()
    assert leaves(lived.lab, EXTERNAL)[2] == "PENDING"


def test_phases_and_leaves_count_every_seamcall(lived: LifePanel) -> None:
    made = lived.numbers()["SEAMCALLs"]
    assert sum(row.calls for row in lived.tape.phase_counts()) == made
    listed = [a for i in range(1, len(lived.tape) + 1) for a in lived.tape.actions_at(i)]
    assert sum(action.kind == "SEAMCALL" for action in listed) == made
    lived.reset.click()
    assert {row.calls for row in lived.tape.phase_counts()} == {0}


@pytest.mark.parametrize("gpaw", [48, 52])
def test_kvm_stores_into_its_own_trees_and_calls_for_the_external_one(gpaw: int) -> None:
    lab = LifeLab(gpaw=gpaw)
    lab.build()
    lab.touch(1)
    lab.share(2)
    lab.touch_shared(2)
    lab.tear_down()
    lab.tape.seek(30)
    before = lab.machine.digest()
    rows = {row.tree: row for row in who_changed(lab)}
    assert (lab.tape.position, lab.machine.digest()) == (30, before)
    for tree in (MIRROR, DIRECT):
        assert rows[tree] == ByWhom(tree, rows[tree].kvm_store, 0, 0)
        assert rows[tree].kvm_store > 0
    assert rows[EXTERNAL].kvm_store == 0
    assert rows[EXTERNAL].tdcall == 1


# -- who may touch


def test_who_may_touch_shows_text_to_the_guest_and_noise_to_the_host(lived: LifePanel) -> None:
    before = lived.machine.digest()
    code, heap, shared = who_may_touch(lived)
    assert (code.guest_reads, heap.guest_reads) == ("the guest's firs", "private, page 1.")
    assert {code.host_reads, heap.host_reads}.isdisjoint({code.guest_reads, heap.guest_reads})
    assert shared.kind == "shared"
    assert shared.guest_reads == shared.host_reads == "shared, page 2.."
    assert lived.machine.digest() == before
    first = [action.name for action in lived.tape.actions].index("TDH.MEM.PAGE.AUG") + 1
    lived.scrub.value = first
    assert [row.guest_reads for row in who_may_touch(lived)] == ["the guest's firs", "(no access)"]


def test_the_host_reads_its_own_trees_and_not_the_external_one(lived: LifePanel) -> None:
    rows = who_can_read_the_tables(lived)
    assert {row.tree for row in rows} == set(TREES)
    for row in rows:
        assert (row.entry == row.host_reads) == (row.tree != EXTERNAL)


# -- drawings


@pytest.mark.parametrize("gpaw", [48, 52])
def test_a_tree_has_a_box_for_each_table_and_a_letter_for_each_entry(gpaw: int) -> None:
    lab = LifeLab(gpaw=gpaw)
    lab.build()
    for tree in (MIRROR, EXTERNAL):
        tables = lab.trees()[tree]
        svg = tree_svg(tables, levels=lab.levels, tree=tree)
        assert svg.count('stroke="#888888"/>') == len(tables) == lab.levels
        assert svg.count("<title>") == sum(len(table.entries) for table in tables)
        assert svg.count('fill="none"/>') == lab.levels - 1
        assert f'role="img" aria-label="{tree}: {lab.levels} tables, ' in svg
    assert "empty" in tree_svg(lab.trees()[DIRECT], levels=lab.levels, tree=DIRECT)
    assert "no tables" in tree_svg([], levels=4, tree=DIRECT)
    assert repr(tree_drawing(lab, EXTERNAL)).endswith("4K: [0] MAPPED")


def test_bars_show_tables_and_entries_of_the_three_trees(lived: LifePanel) -> None:
    rows = tree_counts(lived.lab)
    left, right = plots.side_by_side(Figure(), 2)
    for ax, column in ((tables_bars(rows, left), 2), (entries_bars(rows, right), 3)):
        for tree, container in zip(TREES, ax.containers, strict=True):
            assert isinstance(container, BarContainer)
            widths = [patch.get_width() for patch in container.patches]
            assert widths == [row[column] for row in rows if row.tree == tree]
            assert (container.patches[0].get_hatch() or "") == TREE_LOOKS[tree].hatch
    assert left.get_xlabel() == "tables: M mirror, X external, D direct"


# -- the exercises


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("gpaw", [48, 52])
def test_check_accepts_the_right_answer_and_advises_on_wrong_ones(number: str, gpaw: int) -> None:
    for seed in (0, 1):
        right = variant(number, gpaw=gpaw, seed=seed).answer
        assert check(number, right, gpaw=gpaw, seed=seed)
        for wrong in [wrong for wrong in WRONG[number] if wrong != right]:
            verdict = check(number, wrong, gpaw=gpaw, seed=seed)
            assert verdict.state == "wrong"
            assert len(verdict.text) > 40
    assert check(number, ...).state == "unanswered"


def test_a_check_that_accepts_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "is_right", lambda *_: True)
    assert all(check(number, WRONG[number][0]) for number in NUMBERS)


@pytest.mark.parametrize(
    ("number", "answer", "advice"),
    [
        ("00.1", 12, "Add up all four phases"),
        ("00.2", 16, "the TDR is a page too"),
        ("00.3", 4, "RCX moves by 0x100"),
        ("00.4", "TDH.MEM.PAGE.AUG", "called by the host"),
        ("00.6", 19, "KVM removes them one by one"),
        ("00.6", 3, "removed, not reclaimed"),
        ("00.7", {"mirror"}, "copy of the external tree"),
    ],
)
def test_usual_mistakes_get_their_own_advice(number: str, answer: Any, advice: str) -> None:
    assert advice in check(number, answer).text
