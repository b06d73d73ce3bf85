"""Notebook 01 in a browser: the splitter answers mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_gpa import GpaSplitter
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "01-guest-addresses.ipynb"


@pytest.fixture
def story() -> GpaSplitter:
    """The panel in this process, at the beginning of its story."""
    return GpaSplitter(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, its story told anew."""
    page = PanelPage(notebook.page)
    page.click("tdxlab-retell", then="Step 0 of 11")
    return page


def type_into_gpa(shown: PanelPage, typed: str) -> None:
    field = shown.part("tdxlab-gpa").locator("input")
    shown.write(field, typed)
    shown.strike(field, "Enter")


def type_gpa(shown: PanelPage, typed: str, then: str) -> None:
    type_into_gpa(shown, typed)
    shown.wait_for(then)


def test_splitter_follows_typing_sliding_buttons_and_steps(
    shown: PanelPage, story: GpaSplitter
) -> None:
    assert shown.agrees_with(story)
    type_gpa(shown, "0x7ffff0000123", then="GPA 0x7ffff0000123 is private")
    story.gpa.value = "0x7ffff0000123"
    assert shown.agrees_with(story)
    shown.press("tdxlab-index", "ArrowRight", then="root entry 256")
    story.index.value = 256
    assert shown.agrees_with(story)
    image = shown.image()
    shown.click("tdxlab-other-half", then="root entry 0")
    story.other_half.click()
    assert shown.agrees_with(story)
    shown.wait_for_another_image(than=image)

    shown.root.locator(".tdxlab-level select").select_option(label="4K")
    story.level.value = 1
    story.index.value = 511
    shown.press("tdxlab-index", "End", then=f"GPA {story.chosen.gpa:#x} is private")
    assert shown.agrees_with(story)
    type_gpa(shown, hex(story.chosen.alias), then="is shared")
    story.other_half.click()
    shown.press("tdxlab-touch", "Enter", then="Last touch, 0x")
    story.touch.click()
    assert shown.agrees_with(story)

    shown.click("tdxlab-retell", then="Step 0 of 11")
    story.retell.click()
    for step in range(1, 4):
        shown.click("tdxlab-step", then=f"Step {step} of 11")
        story.step.click()
        assert shown.agrees_with(story)
    shown.type_position(9, then="Step 9 of 11")
    story.scrub.value = 9
    assert shown.agrees_with(story)


def test_an_address_of_nobody_is_an_error_in_the_panel(shown: PanelPage) -> None:
    type_into_gpa(shown, "0x1000000000000")
    shown.wait_for_error("is not an address of this guest")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    shown.type_position(3, then="Step 3 of 11")
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"01-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
