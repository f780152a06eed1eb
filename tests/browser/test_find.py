"""Which browser the tests take, and how one is had where none is: the choice, without installing anything."""

from __future__ import annotations

import sys

import pytest

from tests.browser import find

OWN = [sys.executable, "-m", "playwright", "install", "chromium"]


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("FAKIT_BROWSER", raising=False)


def look(installed=(), working=None, own="/own/chrome"):
    """`find.find` on a machine with these programs on the PATH, of which `working` answer (all, if None)."""
    paths = {name: f"/usr/bin/{name}" for name in installed}
    works = set(paths.values()) | {own} if working is None else set(working)
    return find.find(which=paths.get, works=works.__contains__, own=lambda: own)


def test_an_installed_browser_is_taken_first_chromium_before_chrome():
    assert look(["google-chrome", "chromium"]) == "/usr/bin/chromium"
    assert look(["google-chrome"]) == "/usr/bin/google-chrome"


def test_a_placeholder_that_does_not_answer_is_passed_over():
    assert look(["chromium-browser", "google-chrome"], ["/usr/bin/google-chrome"]) == "/usr/bin/google-chrome"
    assert look(["chromium-browser"], ["/own/chrome"]) == "/own/chrome"


def test_playwrights_own_is_taken_where_none_is_installed():
    assert look() == "/own/chrome"
    assert look(working=[]) is None


def test_the_named_browser_is_taken_and_a_wrong_name_is_said(monkeypatch):
    monkeypatch.setenv("FAKIT_BROWSER", "/opt/mine")
    assert look(["chromium"], ["/opt/mine", "/usr/bin/chromium"]) == "/opt/mine"
    with pytest.raises(find.NoBrowser, match="FAKIT_BROWSER=/opt/mine"):
        look(["chromium"])


@pytest.mark.parametrize(
    ("programs", "root", "sudo_asks", "expected"),
    [
        (["apt-get"], True, True, [["apt-get", "update"], ["apt-get", "install", "-y", "chromium"]]),
        (["apt-get"], False, False, None),
        (["apt-get", "sudo"], False, True, None),
        (
            ["apt-get", "sudo"],
            False,
            False,
            [["sudo", "-n", "apt-get", "update"], ["sudo", "-n", "apt-get", "install", "-y", "chromium"]],
        ),
        (["sudo"], True, False, None),
    ],
)
def test_apt_is_a_way_only_where_it_asks_for_no_password(programs, root, sudo_asks, expected):
    ways = find.installers(
        which=lambda name: name if name in programs else None,
        root=root,
        run=lambda command: not sudo_asks,
    )
    assert ways == [[OWN]] + ([expected] if expected else [])


def test_nothing_is_installed_where_a_browser_is_found():
    def ways():
        raise AssertionError("asked how to install one")

    assert find.ensure(lambda: "/usr/bin/chromium", ways) == "/usr/bin/chromium"


def test_the_ways_are_tried_in_order_until_one_gives_a_browser():
    ran, there = [], []

    def run(command):
        ran.append(command)
        if command == ["third"]:
            there.append("/usr/bin/chromium")
        return command != ["first"]

    ways = [[["first"], ["never"]], [["second"], ["third"]], [["fourth"]]]
    assert find.ensure(lambda: there[0] if there else None, lambda: ways, run) == "/usr/bin/chromium"
    assert ran == [["first"], ["second"], ["third"]]


def test_where_none_can_be_had_the_message_is_a_command_to_type():
    with pytest.raises(find.NoBrowser, match="sudo apt-get install -y chromium"):
        find.ensure(lambda: None, lambda: [[["install"]]], lambda command: True)


def test_what_answers_is_really_chromium(tmp_path):
    for text, expected in (("Chromium 140.0", True), ("Google Chrome 140.0", True), ("Firefox 140.0", False)):
        program = tmp_path / text.split()[0]
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        assert find.is_chromium(str(program)) is expected
    assert not find.is_chromium(str(tmp_path / "not there"))
    assert find.is_chromium(find.ensure())
