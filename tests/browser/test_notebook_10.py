"""Notebook 10 in a browser: the panel obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_teardown import TeardownPanel
from tdxlab.study.teardown_lab import KEYID_FIRST
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "10-teardown.ipynb"


@pytest.fixture
def story() -> TeardownPanel:
    """The panel in this process, at the beginning of a teardown in which nothing fails."""
    return TeardownPanel(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, with the same teardown."""
    page = PanelPage(notebook.page)
    choose(page, "leaf", "nothing fails")
    choose(page, "order", "KeyID last")
    page.click("tdxlab-run", then="KeyID last: the TD is whole")
    return page


def choose(shown: PanelPage, name: str, label: str) -> None:
    shown.root.locator(f".tdxlab-{name} select").select_option(label=label)


def test_steps_phases_and_keys_show_what_python_counts(
    shown: PanelPage, story: TeardownPanel
) -> None:
    assert shown.agrees_with(story)
    total = len(story.tape)
    for step in range(1, 4):
        shown.click("tdxlab-step", then=f"Step {step} of {total}")
        story.step.click()
        assert shown.agrees_with(story)
    image = shown.image()
    for _ in range(5):
        story.phase.click()
        shown.click("tdxlab-phase", then=f"Step {story.tape.position} of {total}")
        assert shown.agrees_with(story)
    shown.wait_for_another_image(than=image)
    shown.press("tdxlab-back", "Enter", then=f"Step {story.tape.position - 1} of {total}")
    story.back.click()
    assert shown.agrees_with(story)
    shown.type_position(total, then="the VM is gone")
    story.scrub.value = total
    assert shown.agrees_with(story)


def test_a_failure_is_chosen_and_its_leaks_are_shown(
    shown: PanelPage, story: TeardownPanel
) -> None:
    choose(shown, "leaf", "TDH.MNG.KEY.FREEID")
    choose(shown, "order", "KeyID first")
    story.leaf.value, story.order.value = "TDH.MNG.KEY.FREEID", KEYID_FIRST
    shown.press("tdxlab-run", "Enter", then="KeyID first: the TD is whole")
    story.run.click()
    assert shown.agrees_with(story)
    story.leak.click()
    shown.click("tdxlab-leak", then=f"{story.numbers()['leaked']} leaked")
    assert shown.agrees_with(story)
    shown.press("tdxlab-scrub", "End", then="lost to the host")
    story.scrub.value = len(story.tape)
    assert shown.agrees_with(story)
    assert shown.numbers()["leaked"] == 28


def test_no_leak_is_an_error_in_the_panel(shown: PanelPage) -> None:
    shown.part("tdxlab-leak").click()
    shown.wait_for_error("no page leaks from here on")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    shown.type_position(70, then="Step 70 of 125")
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"10-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
    shown.root.screenshot(path=SHOTS / f"10-panel-{width}.png")
