"""The real notebook sequence: every notebook runs through, and its page shows every figure from the disk,
without a network.

The sequence is executed once, as `make run` does it, by the command.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.browser.pages import open_report, watched

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
# of the whole sequence, which a processor without bf16 arithmetic takes a quarter of an hour for beside other tests
pytestmark = pytest.mark.timeout(2700)
REPRESENTATIONS = {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence") / "reports"
    command = [sys.executable, "-m", "fakit", "run", "--profile", "quick", "--jobs", "2", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def executed(reports):
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted((reports / "executed").glob("*.ipynb"))}


def test_every_notebook_ran_through(reports):
    results = json.loads((reports / "results.json").read_text())
    assert [result["name"] for result in results] == [path.stem for path in NOTEBOOKS]
    assert {result["status"] for result in results} == {"ok"}


def test_nothing_is_printed_in_red(executed):
    red = {
        (name, cell.id): output.text
        for name, notebook in executed.items()
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr" and not _progress_bar(output.text)
    }
    assert red == {}


def _progress_bar(text: str) -> bool:
    """tqdm draws in the console's error stream where no widget stands for it."""
    return all(re.search(r"\d+%\||\d+it |^$", line.strip()) for line in re.split(r"[\r\n]+", text))


def test_every_figure_has_its_three_representations(executed):
    for name, notebook in executed.items():
        figures = [
            output.data
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if "application/vnd.plotly.v1+json" in output.get("data", {})
        ]
        assert figures, f"{name} shows no figure"
        for data in figures:
            assert set(data) >= REPRESENTATIONS, f"{name}: a figure has {sorted(data)} only"
            assert re.search(r"\d", data["text/plain"]), f"{name}: no number in {data['text/plain']!r}"


def test_empty_exercises_say_not_done_yet(executed):
    for name, notebook in executed.items():
        shown = [
            json.dumps([o.get("data", {}) for o in cell.outputs]) for cell in notebook.cells if cell.cell_type == "code"
        ]
        exercises = sum("not done yet" in outputs for outputs in shown)
        assert 2 <= exercises <= 5, f"{name} has {exercises} exercises"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_every_figure_of_every_page_shows_from_the_disk(browser, reports, executed, name, scheme):
    drawn = sum(
        "image/svg+xml" in output.get("data", {}) for cell in executed[name].cells for output in cell.get("outputs", [])
    )
    with watched(browser, color_scheme=scheme) as watch:
        assert len(open_report(watch, reports / f"{name}.html")) == drawn
        watch.assert_clean()


def test_the_index_shows_each_notebook(browser, reports):
    with watched(browser) as watch:
        assert len(open_report(watch, reports / "index.html")) == len(NOTEBOOKS)
        watch.assert_clean()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"] and code[1].metadata.tags == ["setup"]
    for parameter in ("PROFILE", "SEED", "MODEL", "DEVICE"):
        assert re.search(rf"^{parameter} = ", code[0].source, re.M), f"{parameter} is missing"
    assert sum("centerpiece" in cell.metadata.get("tags", []) for cell in code) == 1
