"""The browser of the browser tests: an installed Chromium or Chrome, else Playwright's own, else the system's package.

`python -m tests.browser.find` (part of `make test`) prints its path, and installs one only where none is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

# Flags with which a page asks nothing of the network by itself, and runs as root and without a GPU.
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
APPLICATIONS = [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
]

Runs = Callable[[Sequence[str]], bool]


class NoBrowser(RuntimeError):
    """No Chromium could be found or installed; the message holds the command to type."""


def runs(command: Sequence[str]) -> bool:
    """True if the command ends with exit code 0. What it prints goes to stderr: stdout is for the path alone."""
    try:
        return subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL, timeout=900).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def is_chromium(path: str) -> bool:
    """True if the file answers `--version` as Chromium or Chrome does; Ubuntu's placeholder for its snap does not."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "Chrom" in answer.stdout


def playwright_path() -> str:
    """Where Playwright keeps (or would keep) its own Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def find(
    which: Callable[[str], str | None] = shutil.which,
    works: Callable[[str], bool] = is_chromium,
    own: Callable[[], str] = playwright_path,
) -> str | None:
    """The first browser that works: $FAKIT_BROWSER (then no other), an installed one, Playwright's own; else None.

    Raises:
        NoBrowser: $FAKIT_BROWSER is set and is no Chromium.
    """
    if chosen := os.environ.get("FAKIT_BROWSER"):
        if works(chosen):
            return chosen
        raise NoBrowser(f"FAKIT_BROWSER={chosen} does not answer `--version` as Chromium or Chrome. Unset it?")
    installed = [path for name in NAMES if (path := which(name))] + APPLICATIONS
    return next((path for path in installed if works(path)), None) or next(filter(works, [own()]), None)


def installers(
    which: Callable[[str], str | None] = shutil.which, root: bool | None = None, run: Runs = runs
) -> list[list[list[str]]]:
    """The ways to install one on this machine, best first; each a list of commands that must all succeed.

    apt is among them only where it needs no password: as root, or where `sudo -n true` succeeds.
    """
    ways = [[[sys.executable, "-m", "playwright", "install", "chromium"]]]
    root = os.geteuid() == 0 if root is None else root
    if which("apt-get") and (root or (which("sudo") and run(["sudo", "-n", "true"]))):
        sudo = [] if root else ["sudo", "-n"]
        ways.append([[*sudo, "apt-get", "update"], [*sudo, "apt-get", "install", "-y", "chromium"]])
    return ways


def ensure(
    look: Callable[[], str | None] = find, ways: Callable[[], list[list[list[str]]]] = installers, run: Runs = runs
) -> str:
    """The path of a browser that works, installed first if there is none.

    Raises:
        NoBrowser: none is there and none could be installed; says what to type.
    """
    if path := look():
        return path
    for commands in ways():
        if all(run(command) for command in commands) and (path := look()):
            return path
    raise NoBrowser(
        "The browser tests need Chromium or Chrome: none is here, and none could be installed without asking.\n"
        "Install one, then repeat the command:\n"
        "    sudo apt-get install -y chromium                            (Debian)\n"
        "    .venv/bin/python -m playwright install --with-deps chromium (elsewhere, with network)\n"
        "or name one: FAKIT_BROWSER=/path/to/chrome make test"
    )


if __name__ == "__main__":
    try:
        print(ensure())
    except NoBrowser as error:
        sys.exit(str(error))
