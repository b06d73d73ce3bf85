"""Notebook 02 in a browser: the console called, filled, stepped and scrubbed; the page shows
Python's numbers.
"""

from __future__ import annotations

import pytest

from tdxlab.study.panel_console import ConsolePanel
from tests.browser.lab_page import IDLE, LabPage
from tests.browser.panel_page import SAYS, SHOTS, PanelPage

NOTEBOOK = "02-inside-the-tdx-module.ipynb"


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    notebook.page.locator(".tdxlab-panel").scroll_into_view_if_needed()
    return PanelPage(notebook.page)


@pytest.fixture
def panel() -> ConsolePanel:
    """The console in this process, driven as the notebook's cells drive the one on the page."""
    panel = ConsolePanel(48)
    for _ in range(8):
        panel.suggest_build.click()
        panel.call.click()
    panel.fill("TDH.MNG.INIT", rdx="TD_PARAMS", rcx="free page")
    panel.call.click()
    return panel


def select(shown: PanelPage, css_class: str, option: str) -> None:
    shown.part(css_class).locator("select").select_option(label=option)


def value_in(shown: PanelPage, register: str, value: int) -> None:
    """Wait until a register's field holds `value`."""
    shown.page.wait_for_function(
        "([css, text]) => document.querySelector(css).value === text",
        arg=[f".tdxlab-panel .tdxlab-{register} input", f"{value:#x}"],
    )


def assert_same(shown: PanelPage, panel: ConsolePanel) -> None:
    """The page comes to show what the panel in this process shows."""
    shown.wait_for(panel.summary())
    assert shown.agrees_with(panel)
    assert shown.part("tdxlab-view").count() == len(panel.views())
    reply = panel.desk.last_reply()
    assert reply is not None
    assert reply.status in shown.part("tdxlab-status").inner_text()


def test_the_page_shows_what_the_cells_did(shown: PanelPage, panel: ConsolePanel) -> None:
    assert_same(shown, panel)


def test_calls_by_name_by_hand_and_by_the_guide(shown: PanelPage, panel: ConsolePanel) -> None:
    shown.part("tdxlab-suggest-build").click()
    panel.suggest_build.click()
    value_in(shown, "rcx", panel.rows["rcx"].value)
    shown.click("tdxlab-call", then="Step 10 of 10")
    panel.call.click()
    assert_same(shown, panel)

    select(shown, "tdxlab-leaf", "TDH.MNG.CREATE")
    shown.part("tdxlab-lp").locator("input").fill("3")
    select(shown, "tdxlab-rdx-thing", "module's KeyID")
    value_in(shown, "rdx", 32)
    shown.part("tdxlab-rcx").locator("input").fill("0x100005123")
    shown.click("tdxlab-call", then="Step 11 of 11")
    panel.fill("TDH.MNG.CREATE", lp=3, rcx=0x1_0000_5123, rdx=32)
    panel.call.click()
    assert_same(shown, panel)
    assert "TDX_OPERAND_INVALID" in shown.sentence()
    assert "TDH.MNG.CREATE" in shown.part("tdxlab-trace").inner_text()


def test_back_step_scrub_reset_and_play(shown: PanelPage, panel: ConsolePanel) -> None:
    shown.click("tdxlab-back", then="Step 8 of 9")
    panel.back.click()
    assert_same(shown, panel)
    shown.click("tdxlab-step", then="Step 9 of 9")
    panel.step.click()
    assert_same(shown, panel)
    before = shown.image()
    shown.type_position(3, then="Step 3 of 9")
    panel.scrub.value = 3
    assert_same(shown, panel)
    shown.wait_for_another_image(before)
    shown.click("tdxlab-reset", then="Step 0 of 9")
    shown.handle("tdxlab-play").click()
    shown.wait_beyond(1)
    shown.wait_for("Step 9 of 9")


def test_the_keyboard_alone_is_enough(shown: PanelPage, panel: ConsolePanel) -> None:
    shown.press("tdxlab-back", "Enter", then="Step 8 of 9")
    shown.press("tdxlab-scrub", "Home", then="Step 0 of 9")
    shown.press("tdxlab-scrub", "ArrowRight", then="Step 1 of 9")
    shown.press("tdxlab-step", "Space", then="Step 2 of 9")
    leaf = shown.part("tdxlab-leaf-name").locator("input")
    shown.write(leaf, "mng.vpflushdone")
    shown.strike(leaf, "Enter")
    shown.page.wait_for_function(SAYS, arg=[".tdxlab-panel .tdxlab-about", "TDH.MNG.VPFLUSHDONE"])
    value_in(shown, "rcx", 0x1_0000_0000)
    shown.write(shown.part("tdxlab-rcx").locator("input"), "0x100000000")
    shown.press("tdxlab-call", "Enter", then="Step 3 of 3")
    panel.scrub.value = 2
    panel.fill("TDH.MNG.VPFLUSHDONE", rcx=0x1_0000_0000)
    panel.call.click()
    assert shown.sentence() == f"Step 3 of 3: {panel.summary()}"
    assert_same(shown, panel)


def test_a_mistake_is_told_on_the_page_and_an_interrupt_ends_a_run(shown: PanelPage) -> None:
    shown.part("tdxlab-interrupt").click()
    shown.wait_for_error("LP 0 runs the host")
    shown.part("tdxlab-rcx").locator("input").fill("pigeon")
    shown.part("tdxlab-call").click()
    shown.wait_for_error("nothing here is called 'pigeon'")
    for step in range(10, 25):
        shown.part("tdxlab-suggest-build").click()
        shown.click("tdxlab-call", then=f"Step {step} of {step}")
    assert "in the guest" in shown.sentence()
    shown.part("tdxlab-suggest-tear-down").click()
    shown.wait_for_error("press Interrupt LP")
    shown.click("tdxlab-interrupt", then="left")
    assert shown.numbers()["pages held"] == 17


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_the_console_fits_the_notebook(shown: PanelPage, width: int, height: int) -> None:
    shown.page.set_viewport_size({"width": width, "height": height})
    shown.page.wait_for_selector(IDLE)
    shown.root.scroll_into_view_if_needed()
    room = shown.page.locator(".jp-WindowedPanel-outer, .jp-Notebook").first
    widths = shown.root.evaluate("panel => [panel.scrollWidth, panel.clientWidth]")
    assert widths[0] <= widths[1] + 1
    box, outer = shown.root.bounding_box(), room.bounding_box()
    assert box is not None
    assert outer is not None
    assert box["x"] + box["width"] <= outer["x"] + outer["width"]
    SHOTS.mkdir(exist_ok=True)
    shown.root.evaluate("panel => panel.scrollIntoView({block: 'start'})")
    shown.page.screenshot(path=SHOTS / f"02-{width}.png")
    shown.root.screenshot(path=SHOTS / f"02-panel-{width}.png")
