"""Notebook 11 in a browser: change an image, predict, launch; the page shows Python's hashes."""

from __future__ import annotations

import pytest
from playwright.sync_api import TimeoutError as KeyLost

from tdxlab.study.launch_changes import CHANGES
from tdxlab.study.panel_measure import MeasurePanel
from tests.browser.lab_page import IDLE, LabPage
from tests.browser.panel_page import SAYS, SHOTS, PanelPage

NOTEBOOK = "11-measured-launch.ipynb"
#: A slider that is redrawn while keys come may lose one: choose again after so many milliseconds.
KEYS_ARRIVE = 8_000
TRIES = 8
DIGESTS = (
    "module, hashed so far",
    "hashlib, same records",
    "MRTD field",
    "MRTD before the change",
)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    return PanelPage(notebook.page)


@pytest.fixture
def panel() -> MeasurePanel:
    """The panel in this process, driven as the reader drives the one on the page."""
    return MeasurePanel(gpaw=48)


SAME = """([numbers, digests]) => {
    const panel = document.querySelector(".tdxlab-panel");
    const shows = kind => ([name, value]) =>
        panel.querySelector(`[data-${kind}="${name}"]`)?.textContent === `${value}`;
    return Object.entries(numbers).every(shows("number"))
        && Object.entries(digests).every(shows("digest"));
}"""


def assert_same(shown: PanelPage, panel: MeasurePanel) -> None:
    """The page comes to show the panel's sentence, numbers and hashes."""
    values = [value or "not started" for value in (*panel.digests(), panel.mrtd_before)]
    shown.wait_for(panel.summary())
    expected = [panel.numbers(), dict(zip(DIGESTS, values, strict=True))]
    shown.page.wait_for_function(SAME, arg=expected)
    assert shown.agrees_with(panel)


def slide(shown: PanelPage, css_class: str, place: int) -> None:
    """Put a slider that chooses on the option at `place`, with the keyboard."""
    for key in ["Home"] + ["ArrowRight"] * place:
        shown.strike(shown.handle(css_class), key)


def is_chosen(shown: PanelPage, said: str) -> bool:
    """True once the panel says what was chosen; False if a key was lost on the way."""
    choice = [".tdxlab-panel .tdxlab-choice", said]
    try:
        shown.page.wait_for_function(SAYS, arg=choice, timeout=KEYS_ARRIVE)
    except KeyLost:
        return False
    return True


def choose(shown: PanelPage, change: str, page: int | None, prediction: str) -> None:
    """Choose a change, a page and a prediction, and wait until the panel has understood."""
    said = f"Chosen: {change}" if page is None else f"Chosen: {change} (page {page} "
    for _ in range(TRIES):
        slide(shown, "tdxlab-change", [one.name for one in CHANGES].index(change))
        if page is not None:
            slide(shown, "tdxlab-page", page)
        if is_chosen(shown, said):
            break
    else:
        pytest.fail(f"the panel never said {said!r}")
    shown.strike(shown.part("tdxlab-predict").locator("button", has_text=prediction), "Enter")


def test_the_page_walks_through_the_build_as_python_does(
    shown: PanelPage, panel: MeasurePanel
) -> None:
    shown.click("tdxlab-original", then="Step 64 of 64")
    assert_same(shown, panel)

    shown.click("tdxlab-reset", then="Step 0 of 64")
    panel.reset.click()
    assert_same(shown, panel)
    shown.part("tdxlab-back").click()
    shown.wait_for_error("this is the beginning")

    for step in range(1, 4):
        shown.click("tdxlab-step", then=f"Step {step} of 64")
    shown.click("tdxlab-back", then="Step 2 of 64")
    shown.press("tdxlab-step", "Enter", then="Step 3 of 64")
    shown.press("tdxlab-scrub", "ArrowRight", then="Step 4 of 64")
    panel.scrub.value = 4
    assert_same(shown, panel)

    picture = shown.image()
    for position in (20, 33, 64, 16):
        shown.type_position(position, then=f"Step {position} of 64")
        panel.scrub.value = position
        assert_same(shown, panel)
    shown.wait_for_another_image(picture)
    shown.page.wait_for_function(SAYS, arg=[".tdxlab-record", "record 1 of 36: MEM.PAGE.ADD"])

    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.wait_beyond(17)
    shown.press("tdxlab-play", "Enter", then="Step ")
    shown.press("tdxlab-scrub", "End", then="Step 64 of 64")
    panel.scrub.value = 64
    assert_same(shown, panel)


def test_launches_on_the_page_give_the_mrtds_of_python(
    shown: PanelPage, panel: MeasurePanel
) -> None:
    shown.click("tdxlab-original", then="Choose a change")
    shown.part("tdxlab-launch").click()
    shown.wait_for_error("first say what becomes of MRTD")
    for change, page, prediction in (
        ("flip a byte", 1, "changes"),
        ("flip a byte", 2, "changes"),
        ("swap with the next page", 2, "changes"),
        ("all adds of a section first", None, "stays"),
        ("set SEPT_VE_DISABLE", None, "stays"),
        ("leave the page out", 3, "stays"),
    ):
        choose(shown, change, page, prediction)
        panel.change.value, panel.predict.value = change, prediction
        panel.page.value = panel.page.value if page is None else page
        panel.launch.click()
        shown.click("tdxlab-launch", then=f"Last change: {change}")
        shown.wait_for(panel.summary())
        assert_same(shown, panel)
    assert panel.numbers()["pages"] == 3

    shown.click("tdxlab-original", then="Choose a change")
    panel.original.click()
    assert_same(shown, panel)


def test_a_launch_needs_no_mouse(shown: PanelPage, panel: MeasurePanel) -> None:
    shown.press("tdxlab-original", "Enter", then="Choose a change")
    choose(shown, "measure the first chunks only", 1, "changes")
    slide(shown, "tdxlab-number", 3)
    shown.page.wait_for_function(SAYS, arg=[".tdxlab-choice", "chunks 3"])
    shown.press("tdxlab-launch", " ", then="Last change: measure the first chunks only")
    panel.choose("measure the first chunks only", page=1, number=3, expect="changes")
    panel.launch.click()
    assert_same(shown, panel)
    assert panel.numbers()["EXTEND"] == 16 + 3


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_panel_fits_the_notebook_without_sideways_scrolling(
    shown: PanelPage, width: int, height: int
) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    shown.click("tdxlab-original", then="Choose a change")
    choose(shown, "flip a byte", 0, "changes")
    shown.click("tdxlab-launch", then="Last change")
    shown.type_position(22, then="Step 22 of")
    shown.page.wait_for_selector(IDLE)
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / f"11-{width}x{height}.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
    box = shown.root.bounding_box()
    assert box is not None
    assert 600 < box["width"] <= 900
