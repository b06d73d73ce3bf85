"""Notebook 03 in a browser: the walker answers mouse and keyboard, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_sept import SeptWalker
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "03-secure-ept.ipynb"


@pytest.fixture
def story() -> SeptWalker:
    """The panel in this process, at the beginning of its story."""
    return SeptWalker(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, its story told anew."""
    page = PanelPage(notebook.page)
    page.click("tdxlab-retell", then="Step 0 of 25")
    return page


def assert_agrees(shown: PanelPage, story: SeptWalker) -> None:
    """The page comes to show the numbers and the sentence of the panel in this process."""
    assert shown.agrees_with(story)


def current_state(shown: PanelPage) -> str | None:
    """The state that the diagram frames."""
    return shown.part("tdxlab-current").first.get_attribute("data-state")


def choose(shown: PanelPage, name: str, then: str) -> None:
    shown.root.locator(".tdxlab-entry select").select_option(label=name)
    shown.wait_for(then)


def test_steps_scrub_play_and_keys_show_what_python_counts(
    shown: PanelPage, story: SeptWalker
) -> None:
    assert_agrees(shown, story)
    for step in range(1, 6):
        shown.click("tdxlab-step", then=f"Step {step} of 25")
        story.step.click()
        assert_agrees(shown, story)
    assert current_state(shown) == story.state == "MAPPED"

    shown.click("tdxlab-back", then="Step 4 of 25")
    shown.press("tdxlab-step", "Enter", then="Step 5 of 25")
    shown.press("tdxlab-back", " ", then="Step 4 of 25")
    shown.press("tdxlab-scrub", "ArrowRight", then="Step 5 of 25")
    assert_agrees(shown, story)

    shown.type_position(9, then="Step 9 of 25")
    story.scrub.value = 9
    assert_agrees(shown, story)
    assert current_state(shown) == story.state == "BLOCKED"

    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.wait_beyond(10)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.press("tdxlab-scrub", "End", then="Step 25 of 25")
    story.scrub.value = 25
    assert_agrees(shown, story)
    shown.click("tdxlab-reset", then="Step 0 of 25")
    story.reset.click()
    assert_agrees(shown, story)


def test_moves_act_on_the_chosen_entry_by_mouse_and_keyboard(
    shown: PanelPage, story: SeptWalker
) -> None:
    shown.type_position(2, then="Step 2 of 25")
    story.scrub.value = 2
    choose(shown, "2M 0x40200000", then="2M entry of GPA 0x40200000 is FREE")
    story.entry.value = "2M 0x40200000"
    assert_agrees(shown, story)
    for number, name in enumerate(("PAGE.AUG", "PAGE.DEMOTE", "RANGE.BLOCK", "PAGE.AUG"), start=3):
        css_class = f"tdxlab-move-{name.lower().replace('.', '-')}"
        if number % 2:
            shown.click(css_class, then=f"Step {number} of {number}")
        else:
            shown.press(css_class, "Enter", then=f"Step {number} of {number}")
        story.moves[name].click()
        assert_agrees(shown, story)
        assert current_state(shown) == story.state
    assert story.state == "NL_BLOCKED"
    assert "TDX_EPT_ENTRY_STATE_INCORRECT" in shown.root.inner_text()


def test_a_guest_that_is_outside_is_an_error_in_the_panel(shown: PanelPage) -> None:
    shown.part("tdxlab-move-page-accept").click()
    shown.wait_for_error("TDH.VP.ENTER comes first")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    shown.type_position(9, then="Step 9 of 25")
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"03-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
