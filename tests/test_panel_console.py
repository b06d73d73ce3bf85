"""The console's panel: what its controls do, what it shows, and that its tests notice damage."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from tdxlab import views
from tdxlab.seam.rules import PAGE_TYPES
from tdxlab.study import svg
from tdxlab.study.console import BUILD, MODELLED, STAGES, Desk, usual
from tdxlab.study.panel_console import ConsolePanel
from tdxlab.study.things import BY_HAND

BASE = 0x1_0000_0000


class QuickPanel(ConsolePanel):
    """A panel that saves the time of its figure."""

    figure_height = 0


@pytest.fixture
def panel() -> ConsolePanel:
    return QuickPanel(48)


def follow(panel: ConsolePanel, goal: str, calls: int = 100) -> None:
    """Press the guide's button and Call, until it has nothing to say or `calls` are made."""
    button = panel.suggest_build if goal == "build" else panel.suggest_tear_down
    for _ in range(calls):
        button.click()
        if panel.error:
            return
        panel.call.click()


def compared(panel: ConsolePanel) -> list[str]:
    """What the panel says, without the length of the tape."""
    return re.sub(r"Step \d+ of \d+", "Step", panel.text()).splitlines()


# -- the panel


def test_call_makes_the_call_that_was_chosen(panel: ConsolePanel) -> None:
    panel.fill("TDH.MNG.CREATE", rcx="free page", rdx="free KeyID")
    panel.call.click()
    assert panel.error == ""
    action = panel.tape.last
    assert action is not None
    assert action.inputs == {"rax": 9, "rcx": BASE, "rdx": 33}
    assert panel.numbers() == {
        "SEAMCALLs": 1,
        "refused": 0,
        "pages held": 1,
        "KeyIDs in use": 2,
        "S-EPT entries": 0,
        "lines changed": 3,
    }


@pytest.mark.parametrize("lp", [0, 3])
def test_call_uses_the_lp_and_the_value_typed_by_hand(panel: ConsolePanel, lp: int) -> None:
    panel.leaf.value = "TDH.MNG.CREATE"
    panel.lp.value = lp
    panel.rows["rcx"].text.value = "0x100005000"
    assert panel.rows["rcx"].things.value == BY_HAND
    panel.call.click()
    action = panel.tape.last
    assert action is not None
    assert (action.lp, action.inputs["rcx"]) == (lp, 0x1_0000_5000)


def test_choosing_changes_nothing_but_the_controls(panel: ConsolePanel) -> None:
    before = panel.machine.digest()
    panel.leaf.value = "TDH.SYS.SHUTDOWN"
    panel.lp.value = 2
    panel.rows["rcx"].things.value = "free KeyID"
    panel.suggest_build.click()
    assert (len(panel.tape), panel.machine.digest()) == (0, before)
    assert panel.leaf.value == "TDH.MNG.CREATE"


def test_a_leaf_can_be_typed(panel: ConsolePanel) -> None:
    panel.name.value = "mem.page.add"
    assert (panel.leaf.value, panel.name.value) == ("TDH.MEM.PAGE.ADD", "TDH.MEM.PAGE.ADD")
    panel.name.value = "TDH.PIGEON"
    assert "no modelled leaf is called 'TDH.PIGEON'" in panel.error
    assert panel.leaf.value == "TDH.MEM.PAGE.ADD"


def test_registers_that_a_leaf_does_not_read_are_hidden(panel: ConsolePanel) -> None:
    for name, leaf in MODELLED.items():
        panel.leaf.value = name
        shown = {row.register for row in panel.rows.values() if not row.widget.layout.display}
        assert shown == set(leaf.inputs) & set(panel.rows)


def test_every_input_of_every_leaf_has_a_row(panel: ConsolePanel) -> None:
    assert {register for leaf in MODELLED.values() for register in leaf.inputs} <= set(panel.rows)


def test_a_chosen_thing_follows_the_machine(panel: ConsolePanel) -> None:
    panel.fill("TDH.MNG.CREATE", rcx="free page")
    panel.call.click()
    assert panel.rows["rcx"].things.value == "free page"
    assert panel.rows["rcx"].value == BASE + 0x1000
    panel.back.click()
    assert panel.rows["rcx"].value == BASE


def test_a_thing_that_goes_away_leaves_its_number(panel: ConsolePanel) -> None:
    follow(panel, "build", 1)
    panel.fill("TDH.MNG.KEY.CONFIG", rcx="TDR")
    panel.reset.click()
    assert (panel.rows["rcx"].things.value, panel.rows["rcx"].value) == (BY_HAND, BASE)


@pytest.mark.parametrize("gpaw", [48, 52])
def test_guide_and_call_alone_build_and_take_apart(gpaw: int) -> None:
    panel = QuickPanel(gpaw)
    follow(panel, "build")
    assert "nothing more to build" in panel.error
    held = panel.numbers()["pages held"]
    assert held == {48: 17, 52: 18}[gpaw]
    panel.suggest_tear_down.click()
    assert "press Interrupt LP" in panel.error
    panel.interrupt.click()
    follow(panel, "tear down")
    assert panel.error == "there is no TD to tear down"
    assert panel.numbers()["pages held"] == 0
    assert panel.numbers()["refused"] == 0


def test_what_is_shown_is_a_function_of_the_position(panel: ConsolePanel) -> None:
    seen = [compared(panel)]
    for _ in range(12):
        follow(panel, "build", 1)
        seen.append(compared(panel))
    for place in random.Random(2).choices(range(13), k=20):
        panel.scrub.value = place
        assert compared(panel) == seen[place]
    panel.reset.click()
    assert compared(panel) == seen[0]
    for place in range(1, 13):
        panel.step.click()
        assert compared(panel) == seen[place]
    panel.back.click()
    assert compared(panel) == seen[11]


def test_a_new_call_forgets_what_lay_ahead(panel: ConsolePanel) -> None:
    follow(panel, "build", 5)
    panel.scrub.value = 2
    panel.fill("TDH.MNG.ADDCX")
    panel.call.click()
    assert (panel.tape.position, len(panel.tape)) == (3, 3)
    assert panel.numbers()["refused"] == 1


def test_mistakes_are_sentences_in_the_panel(
    panel: ConsolePanel, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.rows["rcx"].text.value = "pigeon"
    panel.call.click()
    assert "nothing here is called 'pigeon'" in panel.error
    panel.interrupt.click()
    assert "LP 0 runs the host" in panel.error
    follow(panel, "build")
    panel.fill("TDH.MEM.TRACK")
    panel.call.click()
    assert "LP 0 runs a guest" in panel.error
    assert "error: LP 0 runs a guest" in panel.text()
    assert capsys.readouterr() == ("", "")


def test_fill_refuses_what_is_not_there(panel: ConsolePanel) -> None:
    with pytest.raises(ValueError, match="LP 9"):
        panel.fill("TDH.MNG.CREATE", lp=9)
    with pytest.raises(ValueError, match="does not read r9"):
        panel.fill("TDH.MNG.CREATE", r9=1)


def test_views_say_what_came_back_and_what_changed(panel: ConsolePanel) -> None:
    follow(panel, "build", 1)
    shown = panel.views()
    assert "TDX_SUCCESS" in shown["What came back"]
    assert "PT_TDR" in shown["What changed"]
    assert "TD_HKID_ASSIGNED" in shown["KeyIDs, TDs, vCPUs, S-EPT"]
    panel.fill("TDH.MNG.CREATE", rdx="shared KeyID")
    panel.call.click()
    shown = panel.views()
    assert "blames <b>RDX</b>" in shown["What came back"]
    assert "0xc000010000000002" in shown["What came back"]
    assert "nothing" in shown["What changed"]


def test_map_is_filled_from_the_right_end(panel: ConsolePanel) -> None:
    follow(panel, "build", 4)
    letters = drawn_letters(panel.views()["Pages"])
    assert letters == {0: "D", 1: "C"}


def drawn_letters(drawing: str) -> dict[int, str]:
    """Index -> letter of each tile of a page map, by where it stands."""
    places = {svg.map_place(index): index for index in range(512)}
    tile = re.compile(r'<rect x="(\d+)" y="(\d+)"[^>]*/><text[^>]*>([^<]+)</text>')
    found = {(int(x), int(y)): letter for x, y, letter in tile.findall(drawing)}
    return {places[place]: letter for place, letter in found.items() if place in places}


def test_map_agrees_with_the_pamt_in_every_stage() -> None:
    desk = Desk(52)
    letters = {kind.name: kind.letter for kind in PAGE_TYPES}
    for step in desk.steps(*STAGES):
        desk.do(step)
        rows = [row for row in views.pamt_rows(desk.machine) if row.page_type != "PT_NDA"]
        drawn = drawn_letters(svg.pamt_map(rows, BASE))
        assert drawn == {(row.hpa - BASE) >> 12: letters[row.page_type] for row in rows}


def test_figure_bars_are_the_numbers() -> None:
    panel = ConsolePanel(48, stages=BUILD)
    panel.png()
    assert panel._canvas is not None
    left, right = panel._canvas.figure.axes
    assert total(left.patches) == panel.numbers()["pages held"]
    assert total(right.patches) == panel.numbers()["SEAMCALLs"]


def total(patches: Any) -> float:
    return sum(patch.get_width() for patch in patches if isinstance(patch, Rectangle))


def test_bundle_has_a_widget_a_picture_and_numbers() -> None:
    bundle = ConsolePanel(48)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"].startswith("iVBOR")
    assert "pages held: 0" in bundle["text/plain"]


@pytest.mark.parametrize("name", MODELLED)
def test_usual_things_exist_in_a_running_td(name: str) -> None:
    desk = Desk(48)
    desk.run(*BUILD)
    assert set(usual(name).values()) <= set(desk.held)


# -- tests notice damage

PanelTest = Callable[[ConsolePanel], None]


@pytest.mark.parametrize(
    "test",
    [
        test_call_makes_the_call_that_was_chosen,
        test_a_new_call_forgets_what_lay_ahead,
        test_map_is_filled_from_the_right_end,
    ],
)
def test_panel_tests_notice_a_call_that_ignores_its_input(
    test: PanelTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(panel: ConsolePanel) -> None:
        panel.desk.call("TDH.MNG.KEY.CONFIG", rcx=0)

    monkeypatch.setattr(ConsolePanel, "_call", deaf)
    with pytest.raises(AssertionError):
        test(QuickPanel(48))


def test_map_test_notices_a_map_filled_from_the_wrong_end(monkeypatch: pytest.MonkeyPatch) -> None:
    right = svg.entry_map
    monkeypatch.setattr(
        svg,
        "entry_map",
        lambda cells, **more: right({511 - index: look for index, look in cells.items()}, **more),
    )
    with pytest.raises(AssertionError):
        test_map_is_filled_from_the_right_end(QuickPanel(48))
