"""What the browser tests share: a page that is watched, a JupyterLab that is driven like a person drives it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Page, Route

# Figures: drawn by plotly, or an SVG or a bitmap in an output of JupyterLab or of a report (icons are none).
PLOTLY = ".js-plotly-plot .svg-container"
STATIC = ", ".join(
    [
        '[data-mime-type="image/svg+xml"] > svg',
        'img[src^="data:image"]',
        ".fakit-figure > .static:not([hidden]) > svg",
        ".thumb > svg",
    ]
)
MARKS = """element => element.tagName === 'IMG'
    ? Number(element.complete && element.naturalWidth > 0)
    : element.querySelectorAll('path, text, image').length"""


def is_local(url: str) -> bool:
    """True for what stays on this machine: files, data in the page itself, and loopback addresses."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ws", "wss"):
        return parts.hostname in ("127.0.0.1", "localhost", "::1")
    return parts.scheme in ("file", "data", "blob", "about", "chrome-error")


@dataclass
class Watched:
    """A page, what it asked of the network (blocked), and every error that it reported."""

    page: Page
    external: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def assert_clean(self) -> None:
        assert not self.external, f"the page asked the network for {self.external}"
        assert not self.errors, "the page reported:\n" + "\n".join(self.errors)


@contextlib.contextmanager
def watched(browser: Browser, **options) -> Iterator[Watched]:
    """A new page without network beyond loopback; `options` as of `Browser.new_context`."""
    context = browser.new_context(service_workers="block", viewport={"width": 1280, "height": 900}, **options)
    try:
        page = context.new_page()
        seen = Watched(page)

        def route(route: Route) -> None:
            if is_local(route.request.url):
                route.continue_()
            else:
                seen.external.append(route.request.url)
                route.abort()

        def console(message) -> None:
            if message.type == "error":
                seen.errors.append(f"console error: {message.text} ({message.location.get('url')})")

        context.route("**/*", route)
        page.on("console", console)
        page.on("pageerror", lambda error: seen.errors.append(f"page error: {error}"))
        page.on("websocket", lambda ws: None if is_local(ws.url) else seen.external.append(ws.url))
        yield seen
    finally:
        context.close()


def figures(page: Page) -> list[dict]:
    """Every figure of the page, scrolled to: {"kind": "plotly" | "static", "width": px, "height": px, "marks": n}.

    `marks` counts what is drawn inside (paths, text, bitmaps), so that an empty frame is seen as what it is.
    """
    found = []
    for kind, selector in (("plotly", PLOTLY), ("static", STATIC)):
        for element in page.locator(selector).all():
            if kind == "static" and element.evaluate("element => !!element.closest('.js-plotly-plot')"):
                continue  # plotly's own hidden parts
            element.evaluate("element => element.scrollIntoView()")
            box = element.bounding_box() or {"width": 0, "height": 0}
            marks = element.evaluate(MARKS)
            found.append({"kind": kind, "width": box["width"], "height": box["height"], "marks": marks})
    return found


def assert_figures_visible(page: Page, at_least: int = 1) -> list[dict]:
    """Every figure has a box of some size with something drawn in it, and there are `at_least` so many."""
    found = figures(page)
    assert len(found) >= at_least, f"{len(found)} figures on the page, expected at least {at_least}"
    for number, figure in enumerate(found):
        assert figure["width"] > 100 and figure["height"] > 50 and figure["marks"] > 0, f"figure {number}: {figure}"
    return found


def open_report(watch: Watched, path: Path, seconds: float = 120) -> list[dict]:
    """Open a report's page from the disk, as a double click does, and see each of its figures; returns them."""
    watch.page.goto(path.resolve().as_uri())
    figures_of_page = watch.page.locator("figure.fakit-figure").count()
    if figures_of_page:
        watch.page.wait_for_selector('body[data-figures="ready"]', timeout=seconds * 1000)
    return assert_figures_visible(watch.page, at_least=figures_of_page)


# --- JupyterLab ------------------------------------------------------------------------------------------------------

# Without these a news dialog covers the page, and cells off the screen are not in the DOM.
OVERRIDES = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
FINISHED = """() => {
    const status = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
    const prompt = cell => cell.querySelector('.jp-InputPrompt')?.textContent.trim() ?? '';
    const folded = cell => cell.querySelector('.jp-Cell-inputWrapper .jp-Placeholder');  // has no prompt to number
    const empty = cell => cell.querySelector('.cm-content')?.textContent.trim() === '';
    const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.stderr"]');
    return status === 'idle' && cells.length > 0 && cells.every(cell => prompt(cell) !== '[*]:')
        && (failed || cells.every(cell => empty(cell) || folded(cell) || /[0-9]/.test(prompt(cell))));
}"""


@dataclass
class Notebook:
    """A notebook open in JupyterLab."""

    path: Path
    watch: Watched

    @property
    def page(self) -> Page:
        return self.watch.page

    def wait_idle(self, timeout: float = 120) -> None:
        """Wait until a kernel is connected and idle (seconds)."""
        # The indicator alone says idle before there is a kernel; Run would then ask for one in a dialog.
        self.page.locator("#jp-main-statusbar").get_by_text("(ipykernel) | Idle").wait_for(timeout=timeout * 1000)
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=timeout * 1000)

    def run_all(self, timeout: float = 300) -> None:
        """Run > Run All Cells, and wait until every cell has run or one has failed (seconds)."""
        self.wait_idle()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        # four times a second, not each frame: the kernel needs the CPU
        self.page.wait_for_function(FINISHED, timeout=timeout * 1000, polling=250)

    def use_theme(self, theme: str) -> None:
        """Settings > Theme: "light" or "dark", and wait until the page has its colors."""
        name = f"JupyterLab {theme.capitalize()}"
        if self.page.locator("body").get_attribute("data-jp-theme-name") != name:
            self.page.get_by_role("menuitem", name="Settings", exact=True).click()
            for label in ("Theme", name):  # items of a menu have no role of their own
                self.page.locator(".lm-Menu-itemLabel").get_by_text(label, exact=True).click()
            self.page.wait_for_selector(f'body[data-jp-theme-name="{name}"]', state="attached")

    def outputs(self, mime: str) -> list[str]:
        """The text of every output of a MIME type, as `application/vnd.jupyter.stderr`."""
        return self.page.locator(f'.jp-OutputArea-output[data-mime-type="{mime}"]').all_inner_texts()

    def save(self) -> dict:
        """Save, and return the notebook as it then lies on the disk."""
        before = self.path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + 30
        while True:
            self.page.wait_for_timeout(100)
            if self.path.stat().st_mtime_ns != before:
                try:
                    return json.loads(self.path.read_text())
                except json.JSONDecodeError:  # half of it is written
                    pass
            assert time.monotonic() < deadline, f"{self.path.name} was not saved"

    def assert_clean(self) -> None:
        """No cell failed or wrote to stderr; the page reported no error and asked nothing of the network."""
        wrote = self.outputs("application/vnd.jupyter.stderr")  # JupyterLab shows tracebacks as stderr
        assert not wrote, "a cell failed or wrote to stderr:\n" + "\n".join(wrote)
        self.watch.assert_clean()


@dataclass
class Lab:
    """A running JupyterLab over one folder; `open` a notebook of it in a watched page."""

    url: str
    folder: Path
    settings: Path  # of the user, as against those that the lab starts with
    browser: Browser

    def write(self, name: str, *sources: str) -> str:
        """A notebook of these code cells in the folder; returns its name, for `open`."""
        notebook = new_notebook(cells=[new_code_cell(source.strip()) for source in sources])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.folder / name)
        return name

    def shut_down(self) -> None:
        """End every kernel, and forget settings such as the theme: the next file of tests finds the lab as new."""
        for session in json.load(urllib.request.urlopen(f"{self.url}/api/sessions", timeout=60)):
            asked = urllib.request.Request(f"{self.url}/api/sessions/{session['id']}", method="DELETE")
            urllib.request.urlopen(asked, timeout=60).close()
        shutil.rmtree(self.settings, ignore_errors=True)

    @contextlib.contextmanager
    def open(self, name: str, **options) -> Iterator[Notebook]:
        with watched(self.browser, **options) as watch:
            watch.page.goto(f"{self.url}/lab/tree/{name}?reset")
            notebook = Notebook(self.folder / name, watch)
            notebook.wait_idle()
            yield notebook


@contextlib.contextmanager
def running_lab(folder: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Start JupyterLab on `folder`; settings, workspaces and runtime files are those of `scratch` alone. Its URL, and
    where it keeps what a user sets.
    """
    settings = scratch / "settings"
    settings.mkdir(parents=True)
    (settings / "overrides.json").write_text(json.dumps(OVERRIDES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directories = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {name: str(scratch / name.lower()) for name in directories}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    command += [
        "--IdentityProvider.token=",
        "--ServerApp.disable_check_xsrf=True",
        f"--LabApp.app_settings_dir={settings}",
    ]
    log = scratch / "jupyterlab.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as server:
        try:
            _wait_for(f"{url}/api/status", server, log)
            yield url, scratch / "jupyterlab_settings_dir"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"JupyterLab did not start within {seconds} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)
