"""JupyterLab as `tdxlab lab` starts it: notebooks run, widgets answer, nothing pops up."""

from collections.abc import Callable

from tests.browser.lab_page import LabPage

CLICKS = "() => document.querySelector('.jp-OutputArea .widget-label')?.textContent === '2 clicks'"


def test_a_widget_answers_clicks_and_no_request_leaves_the_machine(
    lab_page: Callable[[str], LabPage], plain_notebook: str
) -> None:
    opened = lab_page(plain_notebook)
    opened.run_all()
    button = opened.page.locator(".jp-OutputArea .widget-button")
    button.click()
    button.click()
    opened.page.wait_for_function(CLICKS)
    assert opened.page.locator(".Toastify__toast").count() == 0
    assert len(opened.requests) > 20
    assert opened.foreign_requests() == []


def test_a_request_to_another_machine_is_noticed(
    lab_page: Callable[[str], LabPage], plain_notebook: str
) -> None:
    opened = lab_page(plain_notebook)
    opened.page.route("http://elsewhere.example/**", lambda route: route.abort())
    opened.page.evaluate("() => fetch('http://elsewhere.example/x').catch(() => null)")
    assert opened.foreign_requests() == ["http://elsewhere.example/x"]
    opened.requests.clear()
