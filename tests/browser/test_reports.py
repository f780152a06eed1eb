"""A report opened from the disk, without any network: every figure shows, nothing is asked for, nothing fails."""

from __future__ import annotations

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.browser.pages import assert_figures_visible, open_report, watched

HEADER = "# 00 · Alignment\n\n**Question:** how far are student and teacher apart?\n\n$$L = \\sum_l w_l L_l$$"
HEATMAP = """
from fakit.figures import similarity_heatmap
similarity_heatmap([[1.0, 0.4, 0.2], [0.5, 0.9, 0.6]])
"""
BARS = """
from fakit.figures import gradient_bars
gradient_bars({"features": 2.0, "attention": 1.0, "task": 0.5})
"""
BITMAP = """
%matplotlib inline
import matplotlib.pyplot as plt
plt.plot([3, 1, 2])
plt.show()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The folder that `fakit run` wrote from one small notebook: three figures, two of them interactive."""
    folder = tmp_path_factory.mktemp("sequence")
    cells = [new_markdown_cell(HEADER), new_code_cell('PROFILE = "full"', metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=cells + [new_code_cell(source) for source in (HEATMAP, BARS, BITMAP)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "00_alignment.ipynb")
    command = [sys.executable, "-m", "fakit", "run", "--notebooks", folder, "--out", folder / "reports", "--jobs", "1"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "reports"


def test_every_figure_of_a_page_shows_from_the_disk(watch, reports):
    found = open_report(watch, reports / "00_alignment.html")
    assert [figure["kind"] for figure in found] == ["plotly", "plotly", "static"]
    watch.assert_clean()


def test_the_index_shows_a_picture_and_leads_to_the_page(watch, reports):
    (thumbnail,) = open_report(watch, reports / "index.html")
    assert thumbnail["kind"] == "static"
    watch.page.get_by_role("link", name="Alignment").click()
    watch.page.get_by_role("heading", name="Alignment").wait_for()
    watch.assert_clean()


def test_figures_show_without_scripts_too(browser, reports):
    with watched(browser, java_script_enabled=False) as watch:
        watch.page.goto((reports / "00_alignment.html").as_uri())
        assert [figure["kind"] for figure in assert_figures_visible(watch.page)] == ["static"] * 3
        watch.assert_clean()


def test_a_page_in_the_dark_theme_shows_the_same(browser, reports):
    with watched(browser, color_scheme="dark") as watch:
        assert len(open_report(watch, reports / "00_alignment.html")) == 3
        watch.assert_clean()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<script>console.error('lost')</script>", "console error: lost"),
        ("<script>undefined.x</script>", "page error: .*undefined"),
        ("<img src='https://example.org/a.png'>", "asked the network for .*example.org/a.png"),
        ("<script>fetch('https://example.org/b').catch(() => 0)</script>", "asked the network for .*example.org/b"),
        ("<link rel=stylesheet href='http://example.org/c.css'>", "asked the network for .*example.org/c.css"),
    ],
)
def test_what_a_report_must_not_do_is_seen(watch, tmp_path, body, message):
    (tmp_path / "page.html").write_text(f"<!doctype html><body><p>text</p>{body}</body>")
    watch.page.goto((tmp_path / "page.html").as_uri())
    watch.page.wait_for_timeout(200)
    with pytest.raises(AssertionError, match=message):
        watch.assert_clean()


@pytest.mark.parametrize(
    "svg",
    ["<svg width=400 height=0><path d='M0 0L9 9'/></svg>", "<svg width=400 height=300></svg>"],
    ids=["no height", "nothing drawn"],
)
def test_a_figure_that_does_not_show_is_seen(watch, tmp_path, svg):
    page = f"<!doctype html><body data-figures=ready><figure class=fakit-figure><div class=static>{svg}</div></figure>"
    (tmp_path / "page.html").write_text(page)
    with pytest.raises(AssertionError, match="figure 0"):
        open_report(watch, tmp_path / "page.html")


def test_a_figure_that_is_missing_is_seen(watch, tmp_path):
    (tmp_path / "page.html").write_text(
        "<!doctype html><body data-figures=ready><figure class=fakit-figure><p>no picture</p></figure>"
    )
    with pytest.raises(AssertionError, match="0 figures on the page, expected at least 1"):
        open_report(watch, tmp_path / "page.html")
