"""Notebook 00 in a browser: the panel answers mouse and keyboard, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_life import LifePanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "00-a-tds-life.ipynb"


@pytest.fixture(scope="module")
def story() -> LifePanel:
    """The panel in this process, driven as the notebook's cells drive theirs."""
    panel = LifePanel(gpaw=48)
    panel.build.click()
    panel.page.value = 1
    panel.touch.click()
    panel.page.value = 2
    for button in (panel.touch, panel.share, panel.touch_shared, panel.tear_down):
        button.click()
    return panel


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    return PanelPage(notebook.page)


def test_buttons_and_keys_lead_to_the_states_that_python_counts(
    shown: PanelPage, story: LifePanel
) -> None:
    end = len(story.tape)
    shown.wait_for(f"Step {end} of {end}")
    assert shown.agrees_with(story)

    shown.click("tdxlab-reset", then=f"Step 0 of {end}")
    story.reset.click()
    assert shown.agrees_with(story)

    for step in (1, 2, 3):
        shown.click("tdxlab-step", then=f"Step {step} of {end}")
        story.step.click()
        assert shown.agrees_with(story)

    shown.click("tdxlab-back", then=f"Step 2 of {end}")
    story.back.click()
    assert shown.agrees_with(story)

    shown.press("tdxlab-step", "Enter", then=f"Step 3 of {end}")
    shown.press("tdxlab-back", " ", then=f"Step 2 of {end}")
    shown.press("tdxlab-scrub", "ArrowRight", then=f"Step 3 of {end}")

    picture = shown.image()
    shown.type_position(45, then=f"Step 45 of {end}")
    story.scrub.value = 45
    assert shown.agrees_with(story)
    shown.wait_for_another_image(picture)

    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.wait_beyond(47)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.type_position(end, then=f"Step {end} of {end}")
    story.scrub.value = end
    assert shown.agrees_with(story)


def test_own_buttons_act_and_mistakes_are_shown(shown: PanelPage) -> None:
    panel = LifePanel(gpaw=48)
    shown.click("tdxlab-reset", then="Step 0 of")
    shown.click("tdxlab-build", then="Step 54 of 54")
    panel.build.click()
    assert shown.agrees_with(panel)
    shown.press("tdxlab-page", "Home", then="Step 54 of 54")
    shown.press("tdxlab-page", "ArrowRight", then="Step 54 of 54")
    shown.press("tdxlab-page", "ArrowRight", then="Step 54 of 54")
    panel.page.value = 2
    for name, end in (("touch", 60), ("share", 68), ("touch-shared", 75)):
        shown.click(f"tdxlab-{name}", then=f"Step {end} of {end}")
        panel.command(name)
        panel.draw()
        assert shown.agrees_with(panel)
    shown.part("tdxlab-build").click()
    shown.wait_for_error("the TD is there already")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    SHOTS.mkdir(exist_ok=True)
    picture = shown.image()
    shown.type_position(71, then="Step 71 of")
    shown.wait_for_another_image(picture)
    shown.page.screenshot(path=SHOTS / f"00-{width}x{height}-top.png")
    shown.part("tdxlab-figure").scroll_into_view_if_needed()
    shown.page.screenshot(path=SHOTS / f"00-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
