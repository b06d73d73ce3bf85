"""One panel on a notebook's page, as a reader drives it: by mouse or by keyboard alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page

from tdxlab.study.panels import Panel

#: Where screenshots go, to be looked at.
SHOTS = Path(os.environ.get("TDXLAB_SHOTS", Path(tempfile.gettempdir()) / "tdxlab-shots"))

SAYS = "([panel, text]) => document.querySelector(panel).textContent.includes(text)"

AGREES = """([numbers, summary]) => {
    const panel = document.querySelector('.tdxlab-panel');
    const shown = [...panel.querySelectorAll('.tdxlab-numbers [data-number]')];
    const says = panel.querySelector('.tdxlab-summary').textContent;
    return says.includes(summary) && shown.length === Object.keys(numbers).length
        && shown.every(one => one.textContent === String(numbers[one.dataset.number]));
}"""
BEYOND = """position => {
    const says = document.querySelector('.tdxlab-panel .tdxlab-summary').textContent;
    return Number(/Step (\\d+) of/.exec(says)?.[1] ?? -1) > position;
}"""
#: A key counts once it has come to the element (`true`: before any other listener has it).
LISTEN = """element => {
    window.keyCame = false;
    element.addEventListener('keydown', () => { window.keyCame = true; }, true);
}"""
KEY_CAME = "() => window.keyCame"
WRITTEN = "element => element.value ?? element.textContent"
#: How often a key is pressed that somebody else took.
TRIES = 5
OTHER_IMAGE = "old => document.querySelector('.tdxlab-panel .tdxlab-figure').src !== old"


class PanelPage:
    """The panel that the page shows. number: which one, if a notebook has several."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.root = page.locator(".tdxlab-panel")
        self.root.wait_for()

    def part(self, css_class: str) -> Locator:
        """The element with a class of the panel's, such as "tdxlab-step"."""
        return self.root.locator(f".{css_class}")

    def sentence(self) -> str:
        """What the live region says."""
        return self.part("tdxlab-summary").locator("[role=status][aria-live=polite]").inner_text()

    def wait_for(self, text: str) -> None:
        """Wait until the sentence contains `text`."""
        self.page.wait_for_function(SAYS, arg=[".tdxlab-panel .tdxlab-summary", text])

    def wait_for_error(self, text: str) -> None:
        """Wait until the panel complains about `text`."""
        self.page.wait_for_function(SAYS, arg=[".tdxlab-panel .tdxlab-error", text])

    def numbers(self) -> dict[str, int]:
        """The numbers that the page shows."""
        found = self.part("tdxlab-numbers").locator("[data-number]").all()
        return {
            str(element.get_attribute("data-number")): int(element.inner_text())
            for element in found
        }

    def click(self, css_class: str, then: str) -> None:
        """Click a button and wait until the sentence contains `then`."""
        self.part(css_class).click()
        self.wait_for(then)

    def press(self, css_class: str, key: str, then: str) -> None:
        """Put the focus on a control, press a key, and wait as `click` does."""
        self.strike(self.handle(css_class), key)
        self.wait_for(then)

    def strike(self, control: Locator, key: str) -> None:
        """Put the focus on a control and press a key until it has come there: for a moment after a
        run JupyterLab puts the focus back on its cell.
        """
        for _ in range(TRIES):
            control.evaluate(LISTEN)
            control.press(key)
            if self.page.evaluate(KEY_CAME):
                return
        pytest.fail(f"{key} never came to {control}")

    def write(self, control: Locator, text: str) -> None:
        """Type a text over what a field says, key by key."""
        for _ in range(TRIES):
            self.strike(control, "Control+A")
            control.press_sequentially(text)
            if control.evaluate(WRITTEN) == text:
                return
        pytest.fail(f"{text!r} was never typed into {control}")

    def handle(self, css_class: str) -> Locator:
        """What takes the focus of a control: a slider's handle, the player's button, a button."""
        part = self.part(css_class)
        inner = part.locator(".noUi-handle, button")
        return inner.first if inner.count() else part

    def type_position(self, position: int, then: str) -> None:
        """Type a position into the readout of the slider."""
        readout = self.part("tdxlab-scrub").locator(".widget-readout")
        self.write(readout, str(position))
        self.strike(readout, "Enter")
        self.wait_for(then)

    def image(self) -> str:
        """Where the browser has the figure from; another address after each redraw."""
        return str(self.part("tdxlab-figure").get_attribute("src"))

    def agrees_with(self, panel: Panel) -> bool:
        """True when the page has come to show the numbers and the sentence of a panel in this
        process; the sentence may change a moment before the numbers do.
        """
        self.page.wait_for_function(AGREES, arg=[panel.numbers(), panel.summary()])
        return self.numbers() == panel.numbers() and panel.summary() in self.sentence()

    def wait_beyond(self, position: int) -> None:
        """Wait until the panel stands at a later position; a busy kernel may skip some."""
        self.page.wait_for_function(BEYOND, arg=position)

    def wait_for_another_image(self, than: str) -> None:
        """Wait until the figure is another one."""
        self.page.wait_for_function(OTHER_IMAGE, arg=than)
