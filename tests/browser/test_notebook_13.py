"""Notebook 13 in a browser: the panel obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.study.panel_vmtype import TypePanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "13-one-mmu-many-vm-types.ipynb"


@pytest.fixture
def story() -> TypePanel:
    """The panel in this process."""
    return TypePanel(gpaw=48)


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, with a new SNP VM."""
    page = PanelPage(notebook.page)
    choose(page, vm_type="SNP", deed="use a private page")
    page.click("tdxlab-build", then="SNP: nothing done yet")
    return page


def choose(shown: PanelPage, **labels: str) -> None:
    for name, label in labels.items():
        shown.root.locator(f".tdxlab-{name} select").select_option(label=label)


def test_deeds_show_what_python_counts(shown: PanelPage, story: TypePanel) -> None:
    assert shown.agrees_with(story)
    for deed in ("use a private page", "punch hole"):
        story.deed.value = deed
        story.do.click()
        choose(shown, deed=deed)
        shown.click("tdxlab-do", then=f"SNP: {deed}: ok")
        assert shown.agrees_with(story)
    story.reset.click()
    shown.click("tdxlab-reset", then="Step 0 of")
    assert shown.agrees_with(story)
    story.step.click()
    shown.click("tdxlab-step", then="Step 1 of")
    assert shown.agrees_with(story)
    SHOTS.mkdir(parents=True, exist_ok=True)
    shown.page.set_viewport_size({"width": 1280, "height": 800})
    shown.root.scroll_into_view_if_needed()
    shown.root.screenshot(path=SHOTS / "notebook-13.png")


def test_keys_reach_every_type_and_mistakes_are_said(shown: PanelPage, story: TypePanel) -> None:
    choose(shown, vm_type="TDX", deed="slot deleted")
    story.vm_type.value, story.deed.value = "TDX", "slot deleted"
    story.build.click()
    shown.press("tdxlab-build", "Enter", then="TDX: nothing done yet")
    assert shown.agrees_with(story)
    story.do.click()
    shown.press("tdxlab-do", "Enter", then="TDX: slot deleted: ok")
    assert shown.agrees_with(story)
    choose(shown, deed="pre-fault at creation")
    shown.part("tdxlab-do").click()
    shown.wait_for_error("this VM is past that")
