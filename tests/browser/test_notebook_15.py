"""Notebook 15 in a browser: the sandbox obeys mouse and keys, and shows what Python counts."""

from __future__ import annotations

import pytest

from tdxlab.policies import KernelPolicy
from tdxlab.study.panel_policy import PolicyPanel
from tests.browser.lab_page import LabPage
from tests.browser.panel_page import SHOTS, PanelPage

NOTEBOOK = "15-your-own-policy.ipynb"


class Mine(KernelPolicy):
    """The reader's policy of the notebook, which is the kernel's."""

    name = "Mine"


@pytest.fixture
def twin() -> PolicyPanel:
    """The panel in this process, with an empty board."""
    panel = PolicyPanel(gpaw=48, mine=Mine)
    panel.clear.click()
    return panel


@pytest.fixture
def shown(notebook: LabPage) -> PanelPage:
    """The notebook's panel, with an empty board, at the beginning of its tape."""
    page = PanelPage(notebook.page)
    page.click("tdxlab-reset", then="Step 0 of ")
    page.part("tdxlab-clear").click()
    page.page.wait_for_function(
        "() => document.querySelector('[data-number=\"runs\"]').textContent === '0'"
    )
    return page


def test_a_run_by_mouse_and_keys_shows_what_python_counts(
    shown: PanelPage, twin: PolicyPanel
) -> None:
    shown.root.locator(".tdxlab-policy select").select_option(label="zap: batches of 8")
    shown.root.locator(".tdxlab-workload select").select_option(label="boot")
    twin.policy.value, twin.workload.value = "batches of 8", "boot"
    twin.run.click()
    shown.press("tdxlab-run", "Enter", then="batches of 8 in boot is done")
    assert shown.agrees_with(twin)
    shown.click("tdxlab-reset", then="Step 0 of ")
    twin.reset.click()
    for button in ("event", "event", "step"):
        getattr(twin, button).click()
        shown.click(f"tdxlab-{button}", then=f"Step {twin.tape.position} of ")
        assert shown.agrees_with(twin)
    shown.type_position(40, then="Step 40 of ")
    twin.scrub.value = 40
    assert shown.agrees_with(twin)
    assert shown.numbers()["runs"] == 1


def test_a_conversion_policy_shows_its_memory_and_its_counts(
    shown: PanelPage, twin: PolicyPanel
) -> None:
    shown.root.locator(".tdxlab-policy select").select_option(label="conversion: keeps both")
    shown.root.locator(".tdxlab-workload select").select_option(label="boot")
    shown.click("tdxlab-run", then="keeps both in boot is done")
    twin.policy.value = "keeps both"
    twin.run.click()
    assert shown.agrees_with(twin)
    assert shown.numbers()["twice"] == twin.board["keeps both", "boot"].most_double
    shown.page.set_viewport_size({"width": 1920, "height": 1080})
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / "15-1920x1080.png")


def test_a_wrong_policy_reads_its_rule_and_the_panel_fits(
    shown: PanelPage, twin: PolicyPanel
) -> None:
    shown.page.set_viewport_size({"width": 1280, "height": 800})
    shown.root.locator(".tdxlab-policy select").select_option(label="zap: ForgetsOne")
    shown.root.locator(".tdxlab-workload select").select_option(label="boot")
    shown.click("tdxlab-run", then="unmapped: 1 of 16 pages are still in the TD")
    twin.policy.value = "ForgetsOne"
    twin.run.click()
    assert shown.agrees_with(twin)
    shown.root.scroll_into_view_if_needed()
    SHOTS.mkdir(exist_ok=True)
    shown.page.screenshot(path=SHOTS / "15-1280x800.png")
    shown.root.screenshot(path=SHOTS / "15-panel-1280.png")
    area = "element => { const area = element.closest('.jp-OutputArea-output');"
    assert shown.root.evaluate(f"{area} return area.scrollWidth <= area.clientWidth; }}")
