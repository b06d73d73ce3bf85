"""Notebook 07 in a browser: the conversion panel answers mouse and keyboard, as Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_convert import ConvertPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "07-converting-memory.ipynb"


@pytest.fixture
def here() -> ConvertPanel:
    """The panel in this process, at the beginning of its story."""
    return ConvertPanel(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage, here: ConvertPanel) -> PanelPage:
    """The notebook's panel; the sliders stand as the notebook's last cell left them."""
    page = PanelPage(notebook.page)
    here.first.value, here.pages.value, here.punch.value = 8, 4, True
    page.click("tdxlab-retell", then="Step 0 of 109")
    return page


def test_steps_scrub_and_keys_show_what_python_counts(shown: PanelPage, here: ConvertPanel) -> None:
    assert shown.agrees_with(here)
    shown.click("tdxlab-step", then="Step 1 of 109")
    here.step.click()
    assert shown.agrees_with(here)
    shown.press("tdxlab-change", "Enter", then="Step 9 of 109")
    here.change.click()
    assert shown.agrees_with(here)
    shown.press("tdxlab-back", " ", then="Step 8 of 109")
    shown.type_position(16, then="Step 16 of 109")
    here.scrub.value = 16
    assert here.numbers()["private data lost"] == 1
    assert shown.agrees_with(here)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.wait_beyond(17)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.press("tdxlab-scrub", "End", then="Step 109 of 109")
    here.scrub.value = 109
    assert shown.agrees_with(here)


def test_a_conversion_and_an_access_by_mouse_and_keyboard(
    shown: PanelPage, here: ConvertPanel
) -> None:
    shown.click("tdxlab-convert", then="done: MapGPA pages 8..11 to shared")
    here.convert.click()
    assert shown.agrees_with(here)
    assert here.numbers()["guest_memfd pages"] == 12
    shown.press("tdxlab-write", "Enter", then="done: write pages 8..11")
    here.write.click()
    assert shown.agrees_with(here)
    shown.root.locator(".tdxlab-to select").select_option(label="private")
    here.to.value = "private"
    shown.click("tdxlab-unasked", then="done: read pages 8..11 as private")
    here.unasked.click()
    assert shown.agrees_with(here)
    assert here.numbers()["PAGE.AUG"] == 4


def test_the_end_of_the_tape_is_an_error_in_the_panel(shown: PanelPage) -> None:
    shown.press("tdxlab-scrub", "End", then="Step 109 of 109")
    shown.part("tdxlab-change").click()
    shown.wait_for_error("this is the end of the tape")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    for position in (35, 42, 91):  # two long trace lines, then a page that is PENDING
        shown.type_position(position, then=f"Step {position} of 109")
        assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"07-{width}x{height}.png")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
