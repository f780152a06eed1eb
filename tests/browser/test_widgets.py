"""The kit's widgets in JupyterLab: moved by the keyboard alone,
they change what Python holds and what the page shows.
"""

from __future__ import annotations

from tests.browser.pages import assert_figures_visible

WEIGHTS = """
import torch
from fakit import Features, LayerMap, Objective, Trace
from fakit.widgets import loss_weights

objective = Objective(LayerMap([(1, 1)]), Features("mse", weight=1.0))
student, teacher = (Trace(hidden_states={1: torch.full((1, 2, 4), x)}, mask=torch.ones(1, 2, dtype=bool)) for x in (0.0, 1.0))
panel = loss_weights(objective, student, teacher)
panel
"""
# a callback that leaves a trace on the page: what Python holds, written by Python
ECHO = """
import ipywidgets
echo = ipywidgets.HTML()
panel.sliders["features"].observe(lambda change: setattr(echo, "value", f"objective holds {objective.weights['features']:.2f}"), "value")
echo
"""


def test_a_weight_moved_by_the_keyboard_reaches_the_objective(lab):
    lab.write("moved.ipynb", WEIGHTS, ECHO)
    with lab.open("moved.ipynb") as opened:
        opened.run_all()
        page = opened.page
        page.get_by_text("Total 1; the largest part is features").wait_for()
        handle = page.locator(".noUi-handle").first
        handle.focus()
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        page.get_by_text("objective holds 0.85").wait_for()
        handle.blur()  # what comes before it on the page depends on the active cell: Tab would not lead back
        handle.focus()  # a key was pressed last, so the browser takes this for a visit by the keyboard
        ring = handle.evaluate("handle => getComputedStyle(handle).outline")
        assert "solid 3px" in ring, ring  # seen by whom comes by the keyboard
        page.get_by_text("Total 0.85; the largest part is features").wait_for()
        page.get_by_text("0.85 × 1 = 0.85").wait_for()  # drawn by plotly, inside the widget

        assert len(assert_figures_visible(page, at_least=1)) == 1
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        pictures = [out["data"] for cell in saved["cells"] for out in cell["outputs"] if "image/svg+xml" in out["data"]]
        assert len(pictures) == 1
        opened.assert_clean()
