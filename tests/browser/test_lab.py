"""JupyterLab in a real browser: a notebook runs, its figures are drawn, its widgets answer to the keyboard."""

from __future__ import annotations

import nbformat
import pytest

from tests.browser.pages import assert_figures_visible

FIGURE = """
from fakit.figures import gradient_bars
gradient_bars({"features": 2.0, "attention": 1.0, "task": 0.5})
"""
SLIDER = """
import ipywidgets as widgets
slider = widgets.IntSlider(value=3, min=0, max=10, description="layers", continuous_update=False)
readout = widgets.HTML("3 layers")
slider.observe(lambda change: setattr(readout, "value", f"{change.new} layers"), "value")
widgets.VBox([slider, readout])
"""


def test_a_notebook_runs_draws_and_answers_to_the_keyboard(lab):
    with lab.open(lab.write("widgets_and_figures.ipynb", FIGURE, SLIDER)) as notebook:
        notebook.run_all()
        page = notebook.page
        page.wait_for_selector(".js-plotly-plot .main-svg")  # JupyterLab prefers plotly's JSON to the SVG
        assert [figure["kind"] for figure in assert_figures_visible(page)] == ["plotly"]
        buttons = page.locator(".modebar-btn").all()
        assert [button.get_attribute("data-title") for button in buttons] == ["Download plot as a PNG", "Reset axes"]
        readout = page.locator(".widget-html-content")
        assert readout.inner_text() == "3 layers"
        page.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.get_by_text("5 layers").wait_for()
        saved = notebook.save()
        assert "widgets" not in saved["metadata"]
        assert [cell["execution_count"] for cell in saved["cells"]] == [1, 2]
        notebook.assert_clean()


def test_a_cell_that_fails_is_seen(lab):
    with lab.open(lab.write("fails.ipynb", "1 / 0", "print('never')")) as notebook:
        notebook.run_all()
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            notebook.assert_clean()


def test_a_request_that_leaves_the_machine_is_blocked_and_seen(lab):
    code = "from IPython.display import HTML\nHTML('<img src=\"https://example.org/pixel.png\">')"
    with lab.open(lab.write("asks.ipynb", code)) as notebook:
        notebook.run_all()
        notebook.page.locator('img[src="https://example.org/pixel.png"]').wait_for(state="attached")
        with pytest.raises(AssertionError, match=r"example\.org/pixel"):
            notebook.assert_clean()


def test_a_cell_with_folded_source_counts_as_run(lab):
    name = lab.write("folded.ipynb", "x = 1", "x + 1")
    notebook = nbformat.read(lab.folder / name, as_version=4)
    notebook.cells[0].metadata["jupyter"] = {"source_hidden": True}
    nbformat.write(notebook, lab.folder / name)
    with lab.open(name) as opened:
        opened.run_all(timeout=60)
        assert opened.outputs("text/plain") == ["2"]
        opened.assert_clean()
