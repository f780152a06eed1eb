"""Estimator switch and rogue scrubber in JupyterLab: pressed by keyboard and mouse,
they change what Python holds and the page shows.
"""

from __future__ import annotations

from tests.browser.pages import assert_figures_visible

LAYERS = """
import ipywidgets, torch
from fakit.similarity import compare_estimators, scrub_rogue
from fakit.widgets import estimator_switch, rogue_scrubber

noise = torch.Generator().manual_seed(0)
shared = torch.randn(20, 5, 4, generator=noise)
students = [shared @ torch.randn(4, 8, generator=noise) + torch.randn(20, 5, 8, generator=noise) for _ in range(2)]
teachers = [shared @ torch.randn(4, 9, generator=noise) + torch.randn(20, 5, 9, generator=noise) for _ in range(3)]
students[1][..., 2], teachers[2][..., 4] = 40 * shared[..., 0], 40 * shared[..., 0]
mask = torch.ones(20, 5, dtype=torch.bool)
switch = estimator_switch(compare_estimators(students, teachers, mask, permutations=20, bootstrap=20), [(1, 2)])
echo = ipywidgets.HTML()
switch.buttons.observe(lambda change: setattr(echo, "value", f"Python holds {switch.result.estimator}, pooled {switch.result.pooled}"), "value")
display(echo)
switch
"""
SCRUBBER = """
scrubber, said = rogue_scrubber(scrub_rogue(students, teachers, mask, [(1, 2)], largest=4)), ipywidgets.HTML()
scrubber.observe_count = 0
def tell(change):
    scrubber.observe_count += 1
    said.value = f"Python took {scrubber.slider.value} by {scrubber.buttons.value}, CKA {scrubber.values['S1 and T2']:.3f}, calls {scrubber.observe_count}"
scrubber.slider.observe(tell, "value")
scrubber.buttons.observe(tell, "value")
display(said)
scrubber
"""


def test_estimators_and_rogue_dimensions_by_keyboard_and_mouse(lab):
    lab.write("similarity.ipynb", LAYERS, SCRUBBER)
    with lab.open("similarity.ipynb") as opened:
        opened.run_all()
        page = opened.page
        page.get_by_text("debiased, n = 20: mean CKA of the mapped pairs").wait_for()

        page.get_by_role("button", name="biased, tokens pooled", exact=True).click()
        page.get_by_text("Python holds biased, pooled True").wait_for()
        page.get_by_text("biased, tokens pooled, n = 80: mean CKA of the mapped pairs").wait_for()
        page.get_by_text("CKA: biased, tokens pooled").wait_for()  # drawn by plotly, inside the widget

        page.get_by_role("button", name="debiased, RBF kernel", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("Python holds debiased, pooled False").wait_for()
        page.get_by_text("CKA: debiased, RBF kernel").wait_for()

        handle = page.locator(".noUi-handle").first
        handle.focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("Python took 1 by drop, CKA", exact=False).wait_for()
        page.get_by_text("1 of each layer: in", exact=False).wait_for()
        box, track = handle.bounding_box(), page.locator(".noUi-base").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        for share in (0.4, 0.6, 0.8, 0.99):
            page.mouse.move(track["x"] + share * track["width"], track["y"] + track["height"] / 2)
        page.mouse.up()
        page.get_by_text("Python took 4 by drop").wait_for()
        page.get_by_text("calls 2").wait_for()  # a drag is one callback
        page.get_by_role("button", name="z-score", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("Python took 4 by z-score").wait_for()

        opened.use_theme("dark")
        assert len(assert_figures_visible(page, at_least=2)) == 2
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        pictures = [out["data"] for cell in saved["cells"] for out in cell["outputs"] if "image/svg+xml" in out["data"]]
        assert len(pictures) == 2
        opened.assert_clean()
