"""Notebook 09 in a browser: the panel obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_slot import SlotPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "09-deleting-a-memslot.ipynb"

#: The panel needs no sideways scrolling.
FITS = """() => {
    const area = document.querySelector('.tdxlab-panel').closest('.jp-OutputArea-output');
    return area.scrollWidth <= area.clientWidth;
}"""

#: Every option of a dropdown can be read: none is narrower than it would like to be.
OPTIONS_FIT = """() => [...document.querySelectorAll('.tdxlab-panel select')].every(select => {
    const free = select.cloneNode(true);
    free.style.cssText = 'width: auto; position: absolute';
    select.parentNode.append(free);
    const needs = free.offsetWidth;
    free.remove();
    return needs <= select.offsetWidth;
})"""


@pytest.fixture
def twin() -> SlotPanel:
    """The panel in this process, with nothing on its tape."""
    return SlotPanel(gpaw=48, story=False)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel at the beginning of its tape."""
    notebook.page.set_viewport_size({"width": 1280, "height": 800})
    page = PanelPage(notebook.page)
    page.click("tdxlab-reset", then="Step 0 of ")
    choose(page, "policy", "Linux 6.16")
    choose(page, "told", "told")
    return page


def choose(shown: PanelPage, name: str, label: str) -> None:
    shown.root.locator(f".tdxlab-{name} select").select_option(label=label)


def press(shown: PanelPage, twin: SlotPanel, name: str, *, key: bool = False) -> None:
    """Press a button on the page and in this process; they have to agree."""
    getattr(twin, name).click()
    css_class, then = f"tdxlab-{name.replace('_', '-')}", f"Step {twin.tape.position} of "
    if key:
        shown.press(css_class, "Enter", then)
    else:
        shown.click(css_class, then)
    assert shown.agrees_with(twin)


def test_deeds_by_mouse_and_keys_show_what_python_counts(shown: PanelPage, twin: SlotPanel) -> None:
    image = shown.image()
    choose(shown, "used", "1 MiB")
    twin.used.value = 256
    press(shown, twin, "use_slot")
    shown.wait_for_another_image(than=image)
    choose(shown, "policy", "B: block")
    twin.policy.value = "B"
    press(shown, twin, "delete", key=True)
    assert shown.numbers()["slot blocked"] == 256
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.root.screenshot(path=SHOTS / "09-panel-1280.png")
    shown.page.wait_for_function(FITS)
    assert shown.page.evaluate(OPTIONS_FIT)
    choose(shown, "told", "not told")
    twin.told.value = False
    press(shown, twin, "create")
    press(shown, twin, "read", key=True)
    shown.wait_for("its own data")
    shown.type_position(1, then="Step 1 of ")
    twin.scrub.value = 1
    assert shown.agrees_with(twin)


def test_a_slot_that_is_there_cannot_be_created(shown: PanelPage) -> None:
    shown.part("tdxlab-create").click()
    shown.wait_for_error("delete it first")
