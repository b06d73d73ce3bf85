"""Notebook 05 in a browser: the schedule player obeys mouse and keys, as Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_race import RacePanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "05-races.ipynb"
OUTLINE = "() => getComputedStyle(document.activeElement).outlineWidth"


@pytest.fixture
def here() -> RacePanel:
    """The panel in this process, at the beginning of its story."""
    return RacePanel()


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, at the beginning of its story."""
    page = PanelPage(notebook.page)
    page.click("tdxlab-retell", then="Step 0 of 16")
    return page


def test_moves_keys_and_a_violation_show_what_python_counts(
    shown: PanelPage, here: RacePanel
) -> None:
    assert shown.agrees_with(here)
    shown.press("tdxlab-scrub", "End", then="Step 16 of 16")
    here.scrub.value = 16
    assert shown.agrees_with(here)
    shown.type_position(7, then="Step 7 of 16")
    here.scrub.value = 7
    assert shown.agrees_with(here)
    shown.click("tdxlab-mover-0", then="Step 8 of 8")
    here.movers[0].click()
    assert shown.agrees_with(here)
    shown.press("tdxlab-run-on", "Enter", then="All have ended")
    here.run_on.click()
    assert shown.agrees_with(here)
    shown.press("tdxlab-back", " ", then="Next, ")
    here.back.click()
    assert shown.agrees_with(here)
    assert shown.page.evaluate(OUTLINE) == "2px"
    find_a_violation(shown, here)
    assert_fits(shown)


def test_the_panel_stands_where_the_cells_left_it_and_plays_no_empty_tape(
    notebook: LabPage,
) -> None:
    shown = PanelPage(notebook.page)
    shown.click("tdxlab-back", then="Step 10 of 11")
    shown.click("tdxlab-set-up", then="Step 0 of 0")
    play = shown.part("tdxlab-play")
    play.click()
    shown.page.wait_for_function(
        "play => !play.classList.contains('mod-active')", arg=play.element_handle()
    )
    shown.click("tdxlab-mover-0", then="Step 1 of 1")


def find_a_violation(shown: PanelPage, here: RacePanel) -> None:
    """Set the race up with a break, and step into what goes wrong."""
    shown.root.locator(".tdxlab-rule select").select_option(label="no-freeze")
    here.rule.value = "no-freeze"
    shown.click("tdxlab-set-up", then="with the break no-freeze")
    here.set_up.click()
    shown.press("tdxlab-violation", "Enter", then="Step 10 of 11")
    shown.click("tdxlab-step", then="Broken, vm_bugged")
    here.violation.click()
    here.step.click()
    assert shown.agrees_with(here)
    shown.part("tdxlab-mover-1").click()
    shown.wait_for_error("vm_bugged is broken; go back")


def assert_fits(shown: PanelPage) -> None:
    """Nothing of the panel has to be scrolled to sideways."""
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / "05-1280x800.png")
