"""Notebook 12 in a browser: the panel obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_attack import AttackPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "12-a-hostile-host.ipynb"


@pytest.fixture
def story() -> AttackPanel:
    """The panel in this process, before the first move of `stale-tlb`."""
    panel = AttackPanel(gpaw=48)
    panel.attack.value = "stale-tlb"
    panel.run.click()
    return panel


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, before the first move of the same attack."""
    page = PanelPage(notebook.page)
    page.part("tdxlab-reset").click()
    choose(page, "attack", "stale-tlb")
    choose(page, "without", "nothing")
    page.click("tdxlab-run", then="stale-tlb. Block the victim's page")
    return page


def choose(shown: PanelPage, name: str, label: str) -> None:
    shown.root.locator(f".tdxlab-{name} select").select_option(label=label)


def test_moves_and_keys_show_what_python_counts(shown: PanelPage, story: AttackPanel) -> None:
    assert shown.agrees_with(story)
    for step in range(1, 3):
        shown.click("tdxlab-step", then=f"Step {step} of 5")
        story.step.click()
        assert shown.agrees_with(story)
    shown.press("tdxlab-finish", "Enter", then="Stopped by: TLB tracking")
    story.finish.click()
    assert shown.agrees_with(story)
    shown.part("tdxlab-finish").click()
    shown.wait_for_error("all moves are made")
    shown.press("tdxlab-back", "Enter", then="Step 4 of 5")
    story.back.click()
    assert shown.agrees_with(story)


def test_an_attack_that_succeeds_is_chosen_and_fits_the_notebook(
    shown: PanelPage, story: AttackPanel
) -> None:
    choose(shown, "attack", "write-private")
    choose(shown, "without", "encryption and integrity")
    story.attack.value, story.lacks.value = "write-private", "encryption and integrity"
    image = shown.image()
    shown.press("tdxlab-run", "Enter", then="write-private, without encryption")
    story.run.click()
    shown.wait_for_another_image(than=image)
    shown.press("tdxlab-scrub", "End", then="Nothing stops it")
    story.scrub.value = len(story.tape)
    assert shown.agrees_with(story)
    assert shown.numbers()["not stopped"] == 1
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / "12-1280x800.png")
    shown.root.screenshot(path=SHOTS / "12-panel.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
