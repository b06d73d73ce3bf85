"""One JupyterLab server and one Chromium for all browser tests.

Without a Chromium these tests are skipped; TDXLAB_REQUIRE_BROWSER=1 makes its absence a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
from playwright.sync_api import Browser, sync_playwright

from tdxlab import lab
from tdxlab.doctor import find_chromium
from tests.browser.lab_page import LabPage
from tests.lab_process import private_jupyter, running_lab

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
VIEWPORT = {"width": 1280, "height": 800}
PLAIN = "plain.ipynb"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser."""
    found = find_chromium()
    if found is not None:
        return found
    message = "no Chromium found: apt-get install chromium"
    if os.environ.get("TDXLAB_REQUIRE_BROWSER", "0") not in ("", "0"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def lab_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a `tdxlab lab` on a copy of the notebooks, and on one plain notebook more."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    nbformat.write(_plain_notebook(), folder / "work" / PLAIN)
    command = [sys.executable, "-m", "tdxlab", "lab", "--no-browser", "--dir", "work"]
    # Below the ports that the operating system gives to clients, which come and go.
    command += ["--port", str(lab.free_port(20_000 + os.getpid() % 12_000))]
    with running_lab(command, os.environ | private_jupyter(folder), folder) as running:
        yield running.url


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def lab_page(browser: Browser, lab_url: str) -> Iterator[Callable[[str], LabPage]]:
    """Opens notebooks: `lab_page("00-a-tds-life.ipynb")` gives a page whose kernel is ready.

    After the test, no request may have left the machine and no JavaScript error may be pending.
    """
    opened: list[LabPage] = []
    with _opener(browser, lab_url) as open_notebook:

        def open_and_note(name: str) -> LabPage:
            opened.append(open_notebook(name))
            return opened[-1]

        yield open_and_note
    for page in opened:
        page.check()


@pytest.fixture(scope="module")
def _own_notebook(
    request: pytest.FixtureRequest, browser: Browser, lab_url: str
) -> Iterator[LabPage]:
    """The notebook that the test module calls NOTEBOOK, open for all tests of the module."""
    with _opener(browser, lab_url) as open_notebook:
        yield open_notebook(request.module.NOTEBOOK)


@pytest.fixture
def notebook(_own_notebook: LabPage) -> Iterator[LabPage]:
    """The notebook that the test module calls NOTEBOOK, every cell just run.

    All tests of a module have the same page and kernel, yet none sees what another one did: the
    cells make their panels anew. After each test the page is checked as `lab_page` does.
    """
    _own_notebook.page.set_viewport_size(VIEWPORT)
    if _own_notebook.has_run:
        _own_notebook.run_all_again()
    else:
        _own_notebook.run_all()
    yield _own_notebook
    _own_notebook.check()


@contextmanager
def _opener(browser: Browser, lab_url: str) -> Iterator[Callable[[str], LabPage]]:
    """Opens notebooks in a browser context that ends with the block."""
    place = urlsplit(lab_url)
    (token,) = parse_qs(place.query)["token"]
    context = browser.new_context(viewport=VIEWPORT)

    def open_notebook(name: str) -> LabPage:
        opened = LabPage(context.new_page())
        opened.open(f"http://{place.netloc}", token, name)
        return opened

    try:
        yield open_notebook
    finally:
        context.close()


@pytest.fixture(scope="session")
def plain_notebook() -> str:
    """The name of a notebook in the working folder that needs nothing of tdxlab."""
    return PLAIN


def _plain_notebook() -> nbformat.NotebookNode:
    """A button that counts its clicks."""
    source = (
        "import ipywidgets\n"
        "count = ipywidgets.Label('0 clicks')\n"
        "button = ipywidgets.Button(description='click')\n"
        "button.on_click(lambda _: setattr(count, 'value', f'{int(count.value[0]) + 1} clicks'))\n"
        "ipywidgets.VBox([button, count])"
    )
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, id="button")], metadata={"kernelspec": kernel}
    )
