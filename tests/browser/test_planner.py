"""The memory planner in JupyterLab: by the keyboard alone, each step confirmed by Python; dark theme;
nothing asked of the network.
"""

from __future__ import annotations

from tests.browser.pages import assert_figures_visible

PLANNER = """
from fakit.widgets import memory_planner

planner = memory_planner("gpt2", layers=2, batch=2, seq=32, memory="T4")
planner
"""
# what Python holds, written by Python on the page
ECHO = """
import ipywidgets

echo = ipywidgets.HTML()


def tell(change):
    if planner.plan is not None:
        setup = planner.plan.setup
        echo.value = f"Python: batch {setup.batch}, {setup.quantize}, {planner.plan.limit_name}, {planner.plan.step.depths['teacher']} blocks"


planner._picture.observe(tell, "outputs")
echo
"""


def test_the_keyboard_plans_and_python_knows(lab):
    lab.write("planner.ipynb", PLANNER, ECHO)
    with lab.open("planner.ipynb") as opened:
        opened.run_all()
        page = opened.page
        page.get_by_text("of 16 GB (T4)").first.wait_for()

        slider = page.locator(".widget-slider", has_text="batch (rows)").locator(".noUi-handle")
        slider.focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("Python: batch 4, None, T4, 12 blocks").wait_for()

        page.get_by_role("button", name="8-bit", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("Python: batch 4, 8bit, T4, 12 blocks").wait_for()

        page.get_by_role("button", name="L4 · 24 GB").focus()
        page.keyboard.press("Enter")
        page.get_by_text("Python: batch 4, 8bit, L4, 12 blocks").wait_for()
        page.get_by_text("of 24 GB (L4)").first.wait_for()

        page.get_by_role("button", name="all-MiniLM-L6-v2").focus()
        page.keyboard.press("Space")
        page.get_by_text("Python: batch 4, 8bit, L4, 6 blocks").wait_for()

        opened.use_theme("dark")
        assert len(assert_figures_visible(page, at_least=1)) == 1
        color = page.locator(".widget-label", has_text="batch (rows)").evaluate("e => getComputedStyle(e).color")
        red, green, blue = (int(part) for part in color.strip("rgba()").split(",")[:3])
        assert min(red, green, blue) > 150  # light letters on the dark page

        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        opened.assert_clean()
