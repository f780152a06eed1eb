"""The explorer in JupyterLab: a slider by keyboard and by mouse and a button call the function once each, and redraw."""

from __future__ import annotations

from tests.browser.pages import assert_figures_visible

CELL = """
import ipywidgets
from fakit.figures import loss_bars
from fakit.widgets import explorer

said, calls = ipywidgets.HTML(), []


def drawn(term="task", weight=1.0):
    calls.append((term, weight))
    said.value = f"call {len(calls)}: {term} {weight:g}"
    return loss_bars({term: 2.0}, {term: weight}, title=f"weight {weight:g}")


display(said)
explorer(drawn, {"weight": "weight α"}, term=["task", "features"], weight=(0.0, 4.0, 0.5))
"""


def test_arguments_by_keyboard_and_mouse(lab):
    lab.write("explorer.ipynb", CELL)
    with lab.open("explorer.ipynb") as opened:
        opened.run_all()
        page = opened.page
        page.get_by_text("call 1: task 1").wait_for()
        page.get_by_text("weight α", exact=True).wait_for()

        handle = page.locator(".noUi-handle").first
        handle.focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("call 2: task 1.5").wait_for()
        # drawn by plotly, inside the widget; for a moment the old drawing and the new one stand there both
        page.get_by_text("weight 1.5", exact=True).first.wait_for()

        box, track = handle.bounding_box(), page.locator(".noUi-base").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        for share in (0.5, 0.7, 0.9, 0.999):
            page.mouse.move(track["x"] + share * track["width"], track["y"] + track["height"] / 2)
        page.mouse.up()
        page.get_by_text("call 3: task 4").wait_for()  # a drag is one call

        page.get_by_role("button", name="features", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("call 4: features 4").wait_for()
        page.get_by_text("Total loss 8: features 4 × 2 = 8.").wait_for()  # the sentence below the figure

        opened.use_theme("dark")
        assert len(assert_figures_visible(page)) == 1
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        opened.assert_clean()
