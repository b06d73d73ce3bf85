"""A notebook open in JupyterLab, in a real browser, as a test sees it."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from playwright.sync_api import Page, Request

MILLISECONDS = 120_000
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
RESTART_AND_RUN_ALL = ".jp-ToolbarButtonComponent[data-command='notebook:restart-run-all']"
RUN_MENU = ".lm-MenuBar-item:has-text('Run')"
RUN_ALL = ".lm-Menu-item[data-command='runmenu:run-all']"
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
    errors: JavaScript errors that nobody caught. has_run: every cell has run to its end.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.has_run = False
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
        self._run(RESTART_AND_RUN_ALL, ".jp-Dialog .jp-mod-accept")

    def run_all_again(self) -> None:
        """Run every cell in the kernel as it is, which has its modules already, and wait."""
        self._run(RUN_MENU, RUN_ALL)

    def _run(self, *clicks: str) -> None:
        self.has_run = False
        self.page.evaluate(FORGET_COUNTS)
        for place in clicks:
            self.page.click(place)
        self.page.wait_for_function(ALL_COUNTED)
        self.page.wait_for_selector(IDLE)
        self.has_run = True

    def check(self) -> None:
        """Fail if since the last check a request left the machine or a JavaScript error came up."""
        foreign, errors = self.foreign_requests(), self.errors.copy()
        self.requests.clear()
        self.errors.clear()
        assert foreign == []
        assert errors == []

    def foreign_requests(self) -> list[str]:
        """The requests that left the machine."""
        local = ("127.0.0.1", None)
        return [url for url in self.requests if urlsplit(url).hostname not in local]

    def _note_request(self, request: Request) -> None:
        self.requests.append(request.url)
