"""The attention viewer in JupyterLab and as a file: moved by the keyboard and by Python, drawn, in the dark,
after a reload.
"""

from __future__ import annotations

import torch

from fakit import LayerMap
from fakit.figures.theme import STUDENT, TEACHER, ramp
from fakit.widgets.attention.viewer import attention_viewer

MAPS = """
import torch
from fakit import LayerMap

TOKENS = ["[CLS]", "the", "film", "was", "fine", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
mask = torch.tensor([[True] * 6 + [False] * 3, [True] * 5 + [False] * 4])

def maps(layers, heads):
    scores = torch.randn(layers, 2, heads, 9, 9, generator=torch.Generator().manual_seed(layers))
    return scores.masked_fill(~mask[:, None, None], -1e9).softmax(-1)

teacher, student = maps(4, 4), maps(2, 4)
"""
VIEWER = """
from fakit.widgets import attention_viewer
viewer = attention_viewer(teacher, student, [TOKENS, TOKENS], layer_map=LayerMap.uniform(2, 4), mask=mask)
viewer.cursor = (1, 2)
viewer
"""
# what Python holds, written by Python, and a button by which Python chooses
ECHO = """
import ipywidgets
echo = ipywidgets.HTML()

def say(change=None):
    echo.value = f"Python holds T{viewer.teacher_layer}.{viewer.teacher_head} S{viewer.student_layer}.{viewer.student_head} {viewer.cursor} {viewer.sentence}"

viewer.observe(say)
def choose(button):
    viewer.linked = False
    viewer.teacher_layer, viewer.student_layer, viewer.teacher_head, viewer.student_head, viewer.cursor = 1, 1, 3, None, (4, 4)

button = ipywidgets.Button(description="Python chooses")
button.on_click(choose)
ipywidgets.VBox([echo, button])
"""
BROKEN = """
broken = teacher.clone()
broken[2, 1, 0, 0, 0] = float("nan")
failing = attention_viewer(broken, tokens=[TOKENS, TOKENS], mask=mask)
failing
"""
# how many pixels of a canvas have (nearly) a color; hatching is gray and partly clear
COUNT = """(canvas, [red, green, blue]) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let i = 0; i < data.length; i += 4) {
        count += data[i + 3] > 60 && [red, green, blue].every((c, k) => Math.abs(c - data[i + k]) < 5);
    }
    return count;
}"""


def rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def pixels(view, name: str, color: str) -> int:
    return view.locator(f".maps canvas.{name}").evaluate(COUNT, rgb(color))


def said(view) -> str:
    return view.locator(".said").inner_text()


def test_the_viewer_in_jupyterlab(lab):
    lab.write("viewer.ipynb", MAPS, VIEWER, ECHO, BROKEN)
    with lab.open("viewer.ipynb") as opened:
        opened.run_all()
        page, view = opened.page, opened.page.locator(".fakit-av").first
        view.get_by_text("the → film: teacher").wait_for()

        # drawn: the darkest cell in the role's color, masked cells hatched in the theme's gray
        for name in ("teacher", "student"):
            assert view.locator(f".maps canvas.{name}").bounding_box()["width"] > 200
        darkest = [pixels(view, name, ramp(role)[-1][1]) for name, role in (("teacher", TEACHER), ("student", STUDENT))]
        assert max(darkest) > 200  # shared limits: the largest value of the two is a whole cell
        assert pixels(view, "difference", "#9A9A9A") > 200 and pixels(view, "teacher", "#9A9A9A") > 200

        # the cursor by keyboard: the page at once, Python after it
        view.locator(".maps").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        view.get_by_text("film → was: teacher").wait_for()
        held = page.locator(".widget-html-content")
        held.get_by_text("Python holds T4.0 S2.").wait_for()
        held.get_by_text("(2, 3) film → was: teacher").wait_for()
        shown, exact = (text.split("teacher ")[1].split(",")[0] for text in (said(view), held.inner_text()))
        assert abs(float(shown) - float(exact)) <= 1 / 255
        page.keyboard.press("End")
        view.get_by_text("masked (padding, or the future): no data").wait_for()
        page.keyboard.press("Home")

        # a head of another layer by keyboard: the student follows by the map and by the best match
        view.locator(".teacher .grid").focus()
        for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
            page.keyboard.press(key)
        view.get_by_text("teacher T2, head 1", exact=True).wait_for()
        held.get_by_text("Python holds T2.1 S1.").wait_for()
        head = held.inner_text().split("S1.")[1][0]
        view.get_by_text(f"student S1, head {head}", exact=True).wait_for()
        view.get_by_text(f"Best match of teacher head 1: student head {head}, Jensen–Shannon distance").wait_for()

        # toggles by keyboard
        view.get_by_role("button", name="Leave sinks out").focus()
        page.keyboard.press("Space")
        view.get_by_text(
            "Sinks are left out ([CLS]): their columns are hatched, and every row is renormalized"
        ).wait_for()
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        view.get_by_text("teacher T2: rollout through layers 1 … 2").wait_for()
        page.keyboard.press("Space")

        # the mouse: hovering says, without a click
        box = view.locator(".maps canvas.student").bounding_box()
        before = said(view)
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["width"] * 0.3)
        page.wait_for_function(
            "([element, before]) => element.textContent !== before",
            arg=[view.locator(".said").element_handle(), before],
        )

        # from Python to the page; the mouse goes first, or what it hovers over may be told after what Python chose
        page.mouse.move(2, 2)
        page.wait_for_timeout(500)
        page.get_by_role("button", name="Python chooses").click()
        view.get_by_text("fine → fine: teacher").wait_for()
        view.get_by_text("teacher T1, head 3", exact=True).wait_for()
        view.get_by_text("student S1, mean over heads", exact=True).wait_for()
        assert view.get_by_role("button", name="Link to best match").get_attribute("aria-pressed") == "false"

        # the dark theme: text turns light, on the page and on the canvas
        light = pixels(view, "teacher", "#FFFFFF")
        opened.use_theme("dark")
        ink = view.evaluate("element => getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number)")
        assert min(ink) > 150
        page.wait_for_timeout(300)
        assert pixels(view, "teacher", "#FFFFFF") > light + 50
        opened.use_theme("light")

        # a sequence that cannot be shown is said in red, and another one is shown again
        failing = page.locator(".fakit-av").nth(1)
        failing.get_by_role("button", name="next").click()
        failing.get_by_role("alert").get_by_text("layer 3 holds nan in head 0 of sequence 1").wait_for()
        failing.get_by_role("button", name="previous").click()
        failing.locator(".failed").wait_for(state="hidden")
        failing.locator(".maps canvas.teacher").wait_for()

        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        assert (
            sum(
                "image/svg+xml" in output["data"]
                for cell in saved["cells"]
                for output in cell["outputs"]
                if "data" in output
            )
            == 2
        )

        # a reload finds what Python holds
        page.reload()
        opened.wait_idle()
        page.locator(".fakit-av").first.get_by_text("fine → fine: teacher").wait_for()
        assert pixels(page.locator(".fakit-av").first, "teacher", "#9A9A9A") > 200
        opened.assert_clean()


def test_the_file_works_from_the_disk_without_network(watch, tmp_path):
    namespace: dict = {}
    exec(MAPS, namespace)
    viewer = attention_viewer(
        namespace["teacher"],
        namespace["student"],
        [namespace["TOKENS"]] * 2,
        layer_map=LayerMap.uniform(2, 4),
        mask=namespace["mask"],
    )
    viewer.cursor = (1, 2)
    path, page = viewer.to_html(tmp_path / "viewer.html"), watch.page
    page.goto(path.as_uri())
    page.wait_for_selector('body[data-viewer="ready"]')
    view = page.locator(".fakit-av")
    view.get_by_text("the → film: teacher").wait_for()
    assert pixels(view, "teacher", "#9A9A9A") > 200

    view.locator(".teacher .grid").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    view.get_by_text("teacher T2, head 1", exact=True).wait_for()
    viewer.teacher_layer, viewer.teacher_head = 2, 1  # the page chose what Python chooses
    view.get_by_text(f"student S1, head {viewer.student_head}", exact=True).wait_for()
    view.get_by_text("Best match of teacher head 1: student head").wait_for()
    view.locator(".student .grid").focus()
    page.keyboard.press("ArrowDown")  # S2 and T2, which the map does not join: their match was not saved
    view.get_by_text("Best matches of heads are saved in this file for mapped layers only.").wait_for()
    page.keyboard.press("ArrowUp")
    view.get_by_text("Best match of teacher head 1: student head").wait_for()
    for name in ("Leave sinks out", "Rollout"):
        view.get_by_role("button", name=name).focus()
        page.keyboard.press("Space")
    view.get_by_text("student S1: rollout through layers 1 … 1").wait_for()
    viewer.without_sinks, viewer.view = True, "rollout"
    shown, exact = (float(text.split("teacher ")[1].split(",")[0]) for text in (said(view), viewer.sentence))
    assert abs(shown - exact) <= 1 / 255
    for key in ("ArrowDown", "Shift+ArrowRight"):
        view.locator(".maps").focus()
        page.keyboard.press(key)
    view.get_by_text("film → [PAD]: masked (padding, or the future): no data.").wait_for()
    watch.assert_clean()


def test_a_file_of_sinks_alone_says_so_and_one_that_is_coarse_says_how_coarse(watch, tmp_path):
    both = torch.tensor([[True] * 2 + [False] * 2])
    maps = torch.full((1, 1, 1, 4, 4), 0.5).masked_fill(~both, 0.0)
    viewer = attention_viewer(maps, tokens=["[CLS]", "[SEP]", "[PAD]", "[PAD]"], mask=both, special=both)
    watch.page.goto(viewer.to_html(tmp_path / "sinks.html").as_uri())
    watch.page.get_by_text("[CLS] → [CLS]: teacher 0.500").wait_for()
    assert "rounded" not in watch.page.locator(".note").inner_text()
    toggle = watch.page.get_by_role("button", name="Leave sinks out")
    toggle.click()
    watch.page.get_by_text("Without its sinks ([CLS] [SEP]) nothing is left of this sequence").wait_for()
    assert watch.page.locator(".maps").is_hidden()
    toggle.click()
    watch.page.get_by_text("[CLS] → [CLS]: teacher 0.500").wait_for()
    assert watch.page.locator(".maps").is_visible()

    noise = torch.rand(1, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    viewer = attention_viewer(noise, tokens=[str(i) for i in range(40)])
    viewer.cursor = (3, 4)
    fine = viewer.to_html(tmp_path / "fine.html").stat().st_size
    path = viewer.to_html(tmp_path / "coarse.html", limit=fine - 8000)
    watch.page.goto(path.as_uri())
    watch.page.get_by_text("Values in this file are rounded to ±0.0").wait_for()
    steps = float(watch.page.locator(".note").inner_text().split("rounded to ±")[1].split(" ")[0].rstrip("."))
    assert (
        abs(float(said(watch.page.locator(".fakit-av")).split("teacher ")[1].rstrip(".")) - float(noise[0, 0, 3, 4]))
        <= steps + 5e-4
    )
    watch.assert_clean()


def test_grouped_heads_are_named_on_the_page(watch, tmp_path):
    from fakit.losses.fused.attention_inputs import AttentionInputs
    from fakit.tracing.trace import Trace

    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    trace = Trace(attention={1: AttentionInputs(query, key, None, None, 0.3, causal=True)})
    viewer = attention_viewer(trace, tokens=list("abcde"))
    viewer.teacher_head = 3
    watch.page.goto(viewer.to_html(tmp_path / "grouped.html").as_uri())
    watch.page.get_by_text("teacher T1, head 3 (key head 1 of 2)").wait_for()
    watch.page.get_by_text("2 heads share one key head (k0 … k1).").wait_for()
    watch.assert_clean()
