"""Notebook 06 in a browser: the panel answers mouse and keyboard, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_shared import SharedPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "06-shared-memory.ipynb"


@pytest.fixture
def here() -> SharedPanel:
    """The panel in this process, at the beginning of its story."""
    return SharedPanel(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage, here: SharedPanel) -> PanelPage:
    """The notebook's panel; its controls stand as the notebook's last cell left them."""
    page = PanelPage(notebook.page)
    here.page.value = 600
    page.click("tdxlab-retell", then="Step 0 of 14")
    return page


def choose(shown: PanelPage, css_class: str, label: str, then: str) -> None:
    shown.root.locator(f".{css_class} select").select_option(label=label)
    shown.wait_for(then)


def test_steps_scrub_play_and_keys_show_what_python_counts(
    shown: PanelPage, here: SharedPanel
) -> None:
    assert shown.agrees_with(here)
    for step in range(1, 4):
        shown.click("tdxlab-step", then=f"Step {step} of 14")
        here.step.click()
        assert shown.agrees_with(here)
    shown.click("tdxlab-back", then="Step 2 of 14")
    shown.press("tdxlab-step", "Enter", then="Step 3 of 14")
    shown.press("tdxlab-scrub", "ArrowRight", then="Step 4 of 14")
    shown.type_position(6, then="Step 6 of 14")
    here.scrub.value = 6
    assert here.numbers()["pages_4k"] == 513
    assert shown.agrees_with(here)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.wait_beyond(7)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.press("tdxlab-scrub", "End", then="Step 14 of 14")
    here.scrub.value = 14
    assert shown.agrees_with(here)
    shown.click("tdxlab-reset", then="Step 0 of 14")
    here.reset.click()
    assert shown.agrees_with(here)


def test_logging_by_mouse_and_keyboard(shown: PanelPage, here: SharedPanel) -> None:
    choose(shown, "tdxlab-split", "at the first write", then="Step 0")
    here.split.value = False
    image = shown.image()
    shown.click("tdxlab-write", then="write page 600")
    here.write.click()
    assert shown.agrees_with(here)
    shown.wait_for_another_image(than=image)
    shown.press("tdxlab-start-log", "Enter", then="split when written")
    here.log.click()
    assert shown.agrees_with(here)
    shown.press("tdxlab-write", " ", then="pages_4k +512")
    here.write.click()
    assert shown.agrees_with(here)
    assert shown.root.locator("svg[aria-label*='1 dirty']").count() == 1
    shown.click("tdxlab-get-log", then="dirty: 600")
    here.get_log.click()
    assert shown.agrees_with(here)
    shown.click("tdxlab-stop-log", then="pages_2m +1")
    here.stop.click()
    shown.click("tdxlab-age", then="young, old from now on")
    here.age.click()
    shown.click("tdxlab-device", then="to the VMM as MMIO")
    here.device.click()
    assert shown.agrees_with(here)
    choose(shown, "tdxlab-memory", "4K", then="the 4K memory is not mapped")
    here.memory.value = "4K"
    assert shown.agrees_with(here)


def test_what_cannot_be_done_is_said_in_the_panel(shown: PanelPage) -> None:
    shown.part("tdxlab-get-log").click()
    shown.wait_for_error("not being logged")
    shown.part("tdxlab-fetch").click()
    shown.wait_for_error("does not run code in shared memory")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    shown.type_position(10, then="Step 10 of 14")
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.root.screenshot(path=SHOTS / f"06-panel-{width}x{height}.png")
    shown.page.screenshot(path=SHOTS / f"06-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
