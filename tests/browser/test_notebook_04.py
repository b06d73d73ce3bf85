"""Notebook 04 in a browser: the fault stepper shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_mirror import MirrorPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "04-the-mirror.ipynb"


@pytest.fixture
def story() -> MirrorPanel:
    """The panel in this process, at the beginning of its story."""
    return MirrorPanel(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, its story told anew, gfn 0 chosen."""
    page = PanelPage(notebook.page)
    page.click("tdxlab-retell", then="Step 0 of 62")
    return page


def type_gfn(shown: PanelPage, gfn: str) -> None:
    field = shown.part("tdxlab-gfn").locator("input")
    shown.write(field, gfn)
    shown.strike(field, "Enter")


def test_steps_stages_and_keys_show_what_python_counts(
    shown: PanelPage, story: MirrorPanel
) -> None:
    type_gfn(shown, "0x0")
    assert shown.agrees_with(story)
    for _ in range(5):
        story.stage.click()
        shown.click("tdxlab-stage", then=f"Step {story.tape.position} of 62")
        assert shown.agrees_with(story)
    assert story.lab.tape.stage.name == "hook"
    assert "FROZEN" in shown.root.inner_text()

    shown.press("tdxlab-step", "Enter", then="Step 11 of 62")
    story.step.click()
    assert shown.agrees_with(story)
    shown.press("tdxlab-scrub", "End", then="Step 62 of 62")
    story.scrub.value = 62
    assert shown.agrees_with(story)


def test_fault_and_zap_act_on_the_chosen_page(shown: PanelPage, story: MirrorPanel) -> None:
    shown.type_position(30, then="Step 30 of 62")
    type_gfn(shown, "0x40007")
    story.scrub.value, story.gfn.value = 30, "0x40007"
    shown.click("tdxlab-fault", then="Step 30 of 56")
    story.fault.click()
    assert shown.agrees_with(story)
    shown.press("tdxlab-scrub", "End", then="Step 56 of 56")
    story.scrub.value = 56
    assert shown.agrees_with(story)

    shown.press("tdxlab-zap", "Enter", then="Step 56 of 70")
    story.zap.click()
    shown.type_position(70, then="Step 70 of 70")
    story.scrub.value = 70
    assert shown.agrees_with(story)
    assert (story.numbers()["PAGE.REMOVE"], story.numbers()["mirror leaves"]) == (1, 1)


def test_a_gfn_without_memory_is_an_error_in_the_panel(shown: PanelPage) -> None:
    type_gfn(shown, "0x50000")
    shown.wait_for_error("has no memory")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    type_gfn(shown, "0x0")
    shown.type_position(22, then="Step 22 of 62")
    shown.root.locator("[aria-label*='4K FROZEN']").wait_for()
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"04-{width}x{height}.png")
    shown.root.screenshot(path=SHOTS / f"04-panel-{width}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
