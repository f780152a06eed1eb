"""The run browser in JupyterLab: chosen in the table, in the curves or among the points, by mouse or keyboard,
and Python follows.
"""

from __future__ import annotations

BROWSER = """
from fakit.tasks import data_dir
from fakit.widgets import run_browser
browser = run_browser(data_dir() / "recorded" / "study", task="glosses")
browser
"""
# what Python holds, written by Python, and how often it was told
ECHO = """
import ipywidgets
echo = ipywidgets.HTML()
told = []
def tell(change):
    told.append(change["name"])
    echo.value = f"Python: {len(browser.selected)} chosen, {len(browser.frame())} of {browser.task} by {browser.sort}, {len(told)} told"
browser.observe(tell, ["selected", "task", "arms", "sort", "descending", "cost", "curve"])
echo
"""


def test_table_curves_and_points_are_one_choice(lab):
    lab.write("runs.ipynb", BROWSER, ECHO)
    with lab.open("runs.ipynb") as opened:
        opened.run_all()
        page, root = opened.page, opened.page.locator(".fakit-run-browser")
        root.get_by_text("20 runs of glosses, 0 chosen; best: teacher").wait_for()
        curves, front = root.get_by_role("img", name="curves of the runs"), root.get_by_role("img", name="cost against")
        assert curves.locator(".curve").count() == front.locator(".point").count() == 18  # baselines were not trained
        run = root.locator("tbody tr", has_text="all").first.get_attribute("data-run")

        # by the keyboard in the table: both figures follow, the focus stays where it is
        box = root.locator(f'tr[data-run="{run}"] input')
        box.focus()
        page.keyboard.press("Space")
        page.get_by_text("Python: 1 chosen, 20 of glosses by score, 1 told").wait_for()
        root.get_by_text("1 chosen; best of these: all").wait_for()
        for drawing in (curves, front):
            assert drawing.locator(f'.chosen[data-run="{run}"]').count() == 1
            assert drawing.locator(".faded").count() > 15
        assert box.evaluate("box => box === document.activeElement")
        page.keyboard.press("Tab")  # the next row's box
        page.keyboard.press("Space")
        page.get_by_text("Python: 2 chosen").wait_for()

        # by a click on a point and on a line: the table follows
        point = front.locator(".run:not(.chosen)").last
        other = point.get_attribute("data-run")
        point.click()
        page.get_by_text("Python: 3 chosen").wait_for()
        assert root.locator(f'tr[data-run="{other}"] input').is_checked()
        curves.locator(f'[data-run="{run}"] .reach').dispatch_event("click")
        page.get_by_text("Python: 2 chosen").wait_for()
        assert not box.is_checked()

        # sorted by a header, from the keyboard; a second press turns it around
        header = root.get_by_role("columnheader").get_by_role("button", name="training time")
        header.focus()
        page.keyboard.press("Enter")
        page.get_by_text("by seconds").wait_for()
        assert header.locator("..").get_attribute("aria-sort") == "descending"
        page.keyboard.press("Enter")
        root.locator('[aria-sort="ascending"]').wait_for()
        seconds = [float(text) for text in root.locator("tbody tr td:last-child").all_inner_texts() if text != "–"]
        assert seconds == sorted(seconds) and len(seconds) == 18

        # fewer arms, another cost, another curve, another task
        root.get_by_role("group", name="arms").get_by_role("button", name="teacher").click()
        page.get_by_text("19 of glosses").wait_for()
        root.get_by_role("group", name="cost").get_by_role("button", name="parameters").click()
        front.get_by_text("parameters (millions)").wait_for()
        assert front.locator(".point").count() == 19
        root.get_by_role("group", name="curve").get_by_role("button", name="features").click()
        curves.get_by_text("13 without this record").wait_for()
        root.get_by_role("button", name="clear the choice").click()
        page.get_by_text("Python: 0 chosen").wait_for()
        root.get_by_role("button", name="scans", exact=True).click()
        root.get_by_text("21 runs of scans, 0 chosen; best: teacher").wait_for()

        opened.use_theme("dark")
        texts = root.locator("svg text, td, th, button").all()
        assert min(float(text.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) for text in texts[::7]) >= 12
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        (output,) = [out["data"] for out in saved["cells"][0]["outputs"]]
        assert {"image/svg+xml", "text/plain"} <= set(output) and "20 runs of glosses" in "".join(output["text/plain"])
        opened.assert_clean()
