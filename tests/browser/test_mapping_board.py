"""The mapping board in JupyterLab: by mouse, by keyboard, light and dark;
each change is confirmed by what Python then holds.
"""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

BOARD = """
import numpy as np
from fakit import LayerMap
from fakit.widgets import mapping_board

similarity = np.linspace(0, 1, 28).reshape(4, 7)
board = mapping_board(3, 6, similarity, widths=(384, 384), heads=(12, 12), batch=8, tokens=64)
board
"""
SIGNED = """
signed = np.full((4, 7), -0.25)  # debiased CKA falls below 0
signed[2, 4], signed[3, 6] = np.nan, 0.8
mapping_board(3, 6, signed)
"""
# what Python holds, written by Python
ECHO = """
import ipywidgets
echo = ipywidgets.HTML("Python waits")
said = lambda change: setattr(echo, "value", f"Python holds {board.layer_map.pairs} as {board.layer_map.name}")
board.observe(said, "pairs")
echo
"""
WEIGHTED = """
weighted = mapping_board(3, 6, start=LayerMap([(1, 2), (3, 6)], weights=[0, 1]))
weighted
"""
DEEP = """
mapping_board(12, 48, start="last")
"""
FOCUS_RING = "element => getComputedStyle(element).outlineStyle + ' ' + getComputedStyle(element).outlineWidth"
COLORS = """element => {  // of its text, and of what lies behind it
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
}"""


class Board:
    """One board on the page, and what a person does with it."""

    def __init__(self, opened, number=0):
        self.page = opened.page
        self.root = opened.page.locator(".fakit-mapping-board").nth(number)

    def node(self, name):
        return self.root.locator(f'.node[data-side="{name[0]}"][data-layer="{name[1:]}"]')

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def button(self, name):
        return self.root.get_by_role("button", name=name, exact=True)

    def holds(self, pairs, name):
        """Wait until Python says that its map is this one."""
        self.page.get_by_text(f"Python holds {pairs} as {name}").wait_for()

    def reset(self):
        self.button("none").click()
        self.holds([], "none")


@pytest.fixture(scope="module")
def opened(lab):
    lab.write("board.ipynb", BOARD, ECHO, WEIGHTED, DEEP, SIGNED)
    with lab.open("board.ipynb") as opened:
        opened.run_all()
        opened.page.locator(".fakit-mapping-board").nth(3).wait_for()
        yield opened


@pytest.fixture
def board(opened):
    board = Board(opened)
    board.reset()
    yield board
    opened.assert_clean()


def test_two_clicks_connect_and_two_more_disconnect(board):
    board.node("S1").click()
    board.root.get_by_text("S1 is picked: choose its teacher layer.").wait_for()
    board.node("T2").click()
    board.holds([(1, 2)], "custom")
    board.node("T6").click()  # the teacher first works as well
    board.node("S3").click()
    board.holds([(1, 2), (3, 6)], "custom")
    assert board.node("S3").get_attribute("aria-label").startswith("student layer 3, connected with T6")
    board.node("S1").click()
    board.node("T2").click()
    board.holds([(3, 6)], "custom")


def test_a_click_on_a_link_takes_it_away_and_undo_brings_it_back(board):
    board.button("uniform").click()
    board.holds([(1, 2), (2, 4), (3, 6)], "uniform")
    ends = [board.node(name).bounding_box() for name in ("S2", "T4")]
    board.page.mouse.click(
        (ends[0]["x"] + ends[1]["x"] + 96) / 2, ends[0]["y"] + 9
    )  # between them: S2 and T4 lie at one height
    board.holds([(1, 2), (3, 6)], "custom")
    board.root.get_by_text("without a teacher: S2").wait_for()
    board.button("undo").click()
    board.holds([(1, 2), (2, 4), (3, 6)], "uniform")


def test_a_drag_connects_and_one_into_the_void_does_not(board):
    mouse = board.page.mouse

    def drag(start, end):
        for point, act in ((start, mouse.down), (end, mouse.up)):
            box = point if isinstance(point, dict) else board.node(point).bounding_box()
            mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
            act()

    drag("S2", "T5")
    board.holds([(2, 5)], "custom")
    first = board.node("S1").bounding_box()
    drag("S1", first | {"x": first["x"] + 150})
    drag("T1", "T3")  # within one column
    drag("T1", "S1")
    board.holds([(1, 1), (2, 5)], "custom")
    assert board.root.locator(".thread").get_attribute("d") is None
    assert board.root.locator('.node[aria-pressed="true"]').count() == 0


def state_of_cell(page) -> set[str]:
    """The classes of the active cell, but for its toolbar's place, which JupyterLab finds when it has time."""
    return set(page.locator(".jp-Notebook .jp-mod-active").get_attribute("class").split()) - {"jp-toolbar-overlap"}


def test_everything_goes_by_keyboard(board):
    cells = board.page.locator(".jp-Notebook .jp-Cell")
    before, active = cells.count(), state_of_cell(board.page)
    board.button("undo").focus()
    board.reset()
    board.node("S1").focus()
    board.press("ArrowDown")
    assert board.node("S2").evaluate("element => element === document.activeElement")
    board.press("ArrowUp", "Enter")
    board.root.get_by_text("S1 is picked").wait_for()
    board.press("ArrowRight")  # the nearest layer of the other column: T2
    assert board.node("T2").evaluate("element => element === document.activeElement")
    assert board.node("T2").evaluate(FOCUS_RING) == "solid 3px"
    board.press("ArrowDown", "Space")
    board.holds([(1, 3)], "custom")
    board.press("End", "Enter", "ArrowLeft", "Enter")
    board.holds([(1, 3), (3, 6)], "custom")
    board.press("Enter")
    board.root.get_by_text("S3 is picked").wait_for()
    board.press("Escape")
    assert board.root.locator('.node[aria-pressed="true"]').count() == 0
    board.press("Delete")
    board.holds([(1, 3)], "custom")
    board.press("Control+z")
    board.holds([(1, 3), (3, 6)], "custom")
    board.press("a", "x")  # would insert a cell above, and cut this one
    # one stop for Tab among the layers, and none of these keys was taken for a command of JupyterLab
    assert board.root.locator('.node[tabindex="0"]').count() == 1
    assert cells.count() == before
    assert state_of_cell(board.page) == active


def test_presets_by_keyboard_and_all_to_a_picked_layer(board):
    board.button("skip").focus()
    board.press("Enter")
    board.holds([(1, 2), (2, 4)], "skip")
    board.press("Tab", "Space")
    board.holds([(1, 6), (2, 4), (3, 2)], "reverse")
    board.root.get_by_text("not in the order of depth").wait_for()
    assert board.button("reverse").get_attribute("aria-pressed") == "true"
    board.node("T4").click()
    board.button("all to one").click()
    board.holds([(1, 4), (2, 4), (3, 4)], "all_to_one")
    board.button("similarity (monotone)").click()
    board.page.get_by_text(re.compile(r"Python holds .* as similarity \(monotone\)")).wait_for()


def test_similarity_notes_and_cost_follow(board):
    board.button("first").click()
    board.root.get_by_text("3 of 6 blocks must run for this map").wait_for()
    board.root.get_by_text("T6, which the teacher answers from, teaches nobody").wait_for()
    pairs = board.root.locator(".pairs li").all_inner_texts()
    assert [" ".join(pair.split()) for pair in pairs] == ["S1 ← T1 0.30", "S2 ← T2 0.59", "S3 ← T3 0.89"]
    board.node("S3").click()  # beside the teacher: how alike each of its layers is to S3
    alike = board.root.locator(".teacher .alike").all_inner_texts()
    assert alike == ["0.78", "0.81", "0.85", "0.89", "0.93", "0.96", "1.00"]
    strokes = [
        board.root.locator(f'[data-pair="{i}-{i}"] .line').evaluate("e => getComputedStyle(e).stroke") for i in (1, 3)
    ]
    assert len(set(strokes)) == 2 and all(stroke.startswith("color") for stroke in strokes)
    board.node("S3").click()


def test_a_refusal_is_shown_and_nothing_changes(opened):
    weighted = Board(opened, 1)
    weighted.node("S3").focus()
    weighted.press("Delete")
    weighted.root.get_by_text("Refused: pair weights must be finite and ≥ 0 with a sum above 0").wait_for()
    assert weighted.root.locator(".link").count() == 2
    weighted.node("S2").click()
    weighted.node("T4").click()
    weighted.root.locator('[data-pair="2-4"]').wait_for(state="attached")
    assert weighted.root.locator(".refusal").is_hidden()
    opened.assert_clean()


def test_a_deep_teacher_is_legible(opened):
    deep = Board(opened, 2)
    boxes = [deep.node(f"T{i}").bounding_box() for i in range(49)]
    assert all(b["y"] - a["y"] >= 17.9 and a["height"] <= 18.1 for a, b in pairwise(boxes))
    sizes = deep.root.evaluate(
        "root => [...root.querySelectorAll('*')].filter(e => e.innerText).map(e => "
        "parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    assert deep.root.locator(".link").count() == 12


def test_a_negative_similarity_is_shown_and_one_that_was_not_measured_is_named(opened):
    signed = Board(opened, 3)
    pairs = [" ".join(pair.split()) for pair in signed.root.locator(".pairs li").all_inner_texts()]
    assert pairs == ["S1 ← T2 -0.25", "S2 ← T4 not measured", "S3 ← T6 0.80"]
    widths = [
        signed.root.locator(f'[data-pair="{pair}"] .line').get_attribute("stroke-width")
        for pair in ("1-2", "2-4", "3-6")
    ]
    assert [float(width) for width in widths] == [3, 3, 7]
    assert "similarity to S1 -0.25" in signed.node("T3").get_attribute("aria-label")
    opened.assert_clean()


def test_it_reads_in_the_dark_theme(board, opened):
    def contrast(locator):
        def luminance(rgb):
            channels = [int(x) / 255 for x in re.findall(r"\d+", rgb)[:3]]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
            return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

        low, high = sorted(luminance(color) for color in locator.evaluate(COLORS))
        return (high + 0.05) / (low + 0.05)

    try:
        for theme in ("light", "dark"):
            opened.use_theme(theme)
            opened.page.wait_for_timeout(300)  # colors fade
            for part in (".status", ".node .name", ".notes li", ".cost li"):
                assert contrast(board.root.locator(part).first) > 4.5, (theme, part)
            for part in (".student .heading", ".teacher .heading"):
                assert contrast(board.root.locator(part)) > 3, (theme, part)
    finally:
        opened.use_theme("light")


def test_the_saved_notebook_carries_a_picture_and_no_widget_metadata(opened):
    saved = opened.save()
    assert "widgets" not in saved["metadata"]
    data = [output["data"] for cell in saved["cells"] for output in cell["outputs"]]
    assert sum("image/svg+xml" in bundle for bundle in data) == 4
    assert any("Mapping board of 3 student and 6 teacher layers." in "".join(bundle["text/plain"]) for bundle in data)
    opened.assert_clean()
