"""Notebook 08 in a browser: the panel obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_epoch import STORY, EpochPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "08-tlb-tracking.ipynb"


@pytest.fixture
def story() -> EpochPanel:
    """The panel in this process, with nothing on its tape."""
    return EpochPanel(gpaw=48, story=False)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel at the beginning of its tape."""
    page = PanelPage(notebook.page)
    page.click("tdxlab-reset", then="Step 0 of ")
    return page


def move(shown: PanelPage, story: EpochPanel, name: str, *, key: bool = False) -> None:
    """Make a move on the page and in this process; they have to agree."""
    story.moves[name].click()
    css_class, then = f"tdxlab-move-{name.lower()}", f"Step {story.tape.position} of "
    if key:
        shown.press(css_class, "Enter", then)
    else:
        shown.click(css_class, then)
    assert shown.agrees_with(story)


def test_moves_by_mouse_and_keys_show_what_python_counts(
    shown: PanelPage, story: EpochPanel
) -> None:
    image = shown.image()
    for name in ("enter", "read", "BLOCK", "TRACK", "REMOVE"):
        move(shown, story, name)
    shown.wait_for("TLB_TRACKING_NOT_DONE")
    shown.wait_for_another_image(than=image)
    shown.root.locator(".tdxlab-vcpu select").select_option(label="vCPU 2")
    story.vcpu.value = 2
    move(shown, story, "enter", key=True)
    move(shown, story, "TRACK", key=True)
    shown.wait_for("PREVIOUS_TLB_EPOCH_BUSY")
    shown.press("tdxlab-back", "Enter", then=f"Step {story.tape.position - 1} of ")
    story.back.click()
    assert shown.agrees_with(story)
    shown.type_position(3, then="Step 3 of ")
    story.scrub.value = 3
    assert shown.agrees_with(story)
    assert shown.numbers()["BEPOCH"] == 1


def test_what_cannot_be_asked_is_an_error_in_the_panel(shown: PanelPage) -> None:
    shown.part("tdxlab-move-read").click()
    shown.wait_for_error("runs the host")


@pytest.mark.parametrize(("width", "height"), [(1280, 800)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, story: EpochPanel, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    for line in STORY[:9]:
        name, _, vcpu = line.partition(" ")
        if vcpu:
            shown.root.locator(".tdxlab-vcpu select").select_option(label=f"vCPU {vcpu}")
            story.vcpu.value = int(vcpu)
        move(shown, story, name)
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"08-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
    shown.root.screenshot(path=SHOTS / f"08-panel-{width}.png")
