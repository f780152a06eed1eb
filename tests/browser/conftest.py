"""Fixtures of the browser tests: `browser`, `watch` (one watched page), `lab` (JupyterLab on a copy of notebooks/)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.browser import find
from tests.browser.pages import Lab, running_lab, watched

ROOT = Path(__file__).parents[2]


# Module scope, not session: while Playwright runs, no other test of this process could use asyncio.
@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = find.ensure()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=find.ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def watch(browser):
    """A page of its own for one test, with its network blocked and its errors recorded."""
    with watched(browser) as page:
        yield page


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    """JupyterLab over a copy of notebooks/, one for all files of tests: its URL, its folder and its settings."""
    scratch = tmp_path_factory.mktemp("lab")
    folder = scratch / "notebooks"
    if (ROOT / "notebooks").is_dir():
        shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints"))
    else:
        folder.mkdir()
    with running_lab(folder, scratch / "jupyter") as (url, settings):
        yield url, folder, settings


@pytest.fixture(scope="module")
def lab(browser, jupyter):
    """JupyterLab without kernels, in its light theme; a test may add notebooks of its own to `lab.folder`."""
    url, folder, settings = jupyter
    running = Lab(url, folder, settings, browser)
    yield running
    running.shut_down()
