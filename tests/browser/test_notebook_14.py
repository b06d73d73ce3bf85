"""Notebook 14 in a browser: the panel obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.kvm.shadow_params import AMD, RFC
from tdxlab.study.pae_lab import PAE
from tdxlab.study.panel_pae import PaePanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "14-before-tdp.ipynb"


@pytest.fixture
def story() -> PaePanel:
    """The panel in this process, with a new VM of its first choices."""
    panel = PaePanel(maxphyaddr=48)
    panel.build.click()
    return panel


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, with the same VM."""
    page = PanelPage(notebook.page)
    choose(page, design="special root", vendor="Intel", guest="2 levels")
    page.click("tdxlab-build", then="special root, Intel, guest with 2 levels: the guest has not")
    return page


def choose(shown: PanelPage, **labels: str) -> None:
    for name, label in labels.items():
        shown.root.locator(f".tdxlab-{name} select").select_option(label=label)


def test_use_and_next_store_show_what_python_counts(shown: PanelPage, story: PaePanel) -> None:
    assert shown.agrees_with(story)
    story.use.click()
    shown.click("tdxlab-use", then=f"Step {len(story.tape)} of {len(story.tape)}")
    assert shown.agrees_with(story)
    story.reset.click()
    shown.click("tdxlab-reset", then="Step 0 of")
    for _ in range(3):
        story.store.click()
        shown.click("tdxlab-store", then=f"Step {story.tape.position} of")
        assert shown.agrees_with(story)
    SHOTS.mkdir(parents=True, exist_ok=True)
    shown.page.set_viewport_size({"width": 1280, "height": 800})
    shown.root.scroll_into_view_if_needed()
    shown.root.screenshot(path=SHOTS / "notebook-14.png")


def test_choices_and_keys_reach_every_design(shown: PanelPage, story: PaePanel) -> None:
    choose(shown, design=RFC, vendor=AMD, guest=PAE)
    story.design.value, story.vendor.value, story.guest.value = RFC, AMD, PAE
    story.build.click()
    shown.press("tdxlab-build", "Enter", then="RFC, AMD, guest with PAE")
    assert shown.agrees_with(story)
    story.use.click()
    shown.press("tdxlab-use", "Enter", then=f"Step {len(story.tape)} of")
    assert shown.agrees_with(story)
    story.spoil.click()
    shown.click("tdxlab-spoil", then="1 of them illegal")
    assert shown.agrees_with(story)
