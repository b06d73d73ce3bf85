"""A notebook open in JupyterLab, in a real browser, as a test sees it."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from playwright.sync_api import Page, Request

MILLISECONDS = 120_000
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
RUN_ALL = ".jp-ToolbarButtonComponent[data-command='notebook:restart-run-all']"
#: Before its session starts, a notebook says "idle" too, with "No Kernel" as the kernel's name.
KERNEL_READY = """() => {
    const name = document.querySelector('.jp-KernelName')?.textContent ?? 'No Kernel';
    const light = document.querySelector('.jp-Notebook-ExecutionIndicator');
    return !name.includes('No Kernel') && light?.dataset.status === 'idle';
}"""
#: Saved execution counts must not be taken for those of the run to come.
FORGET_COUNTS = """() => {
    for (const prompt of document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt'))
        prompt.textContent = '';
}"""
ALL_COUNTED = """() => {
    const counts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]
        .map(prompt => prompt.textContent.trim());
    return counts.length > 0 && counts.every(text => /^\\[\\d+\\]:$/.test(text));
}"""


class LabPage:
    """One notebook in one browser tab.

    page: playwright's page, for everything that is not here. requests: every URL it asked for.
    errors: JavaScript errors that nobody caught.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(MILLISECONDS)
        page.on("request", self._note_request)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, server: str, token: str, notebook: str) -> None:
        """Open `notebook` (relative to the working folder) and wait for its kernel."""
        self.page.goto(f"{server}/lab/tree/{quote(notebook)}?reset&token={token}")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function(KERNEL_READY)

    def run_all(self) -> None:
        """Restart the kernel, run every cell, and wait until each has its execution count."""
        self.page.evaluate(FORGET_COUNTS)
        self.page.click(RUN_ALL)
        self.page.click(".jp-Dialog .jp-mod-accept")
        self.page.wait_for_function(ALL_COUNTED)
        self.page.wait_for_selector(IDLE)

    def foreign_requests(self) -> list[str]:
        """The requests that left the machine."""
        local = ("127.0.0.1", None)
        return [url for url in self.requests if urlsplit(url).hostname not in local]

    def _note_request(self, request: Request) -> None:
        self.requests.append(request.url)
