"""Every public figure, drawn: three representations, nothing cut, nothing small, the same bytes twice."""

import json
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import plotly.graph_objects as go
import pytest

from fakit import figures
from fakit.figures.static import axes as static
from fakit.figures.theme import WIDE
from tests.figures.gallery import examples

SVG = "{http://www.w3.org/2000/svg}"
EXAMPLES = examples()
each = pytest.mark.parametrize("figure", EXAMPLES.values(), ids=EXAMPLES.keys())


def test_the_gallery_shows_every_public_function():
    drawn = {trace for trace in figures.__all__ if trace[0].islower()}
    with open(__file__.replace("test_every_figure", "gallery"), encoding="utf-8") as file:
        source = file.read()
    assert not [name for name in drawn if f"draw.{name}(" not in source]


@each
def test_three_representations(figure):
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
    spec = json.loads(json.dumps(bundle["application/vnd.plotly.v1+json"], allow_nan=False))
    assert (
        go.Figure({"data": spec["data"], "layout": spec["layout"]}).layout.title.text == figure.plotly.layout.title.text
    )
    sentence = bundle["text/plain"]
    assert sentence == repr(figure) and re.search(r"\d", sentence) and sentence.endswith(".") and "nan" not in sentence


@each
def test_svg_is_accessible_text_in_plain_xml(figure):
    svg = figure.svg()
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and float(root.get("width")) == figure.plotly.layout.width
    assert root.find(f"{SVG}desc").text == figure.summary
    title = figure.plotly.layout.title.text
    assert root.find(f"{SVG}title").text == title
    words = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert title in words
    if figure.caption:
        assert " ".join(words).count(figure.caption.split()[0]) >= 1
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"https?://[^\"' )]+", svg)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "$" not in "".join(words)


@each
def test_no_figure_is_wider_than_an_output_beside_the_file_browser(figure):
    assert figure.plotly.layout.width <= WIDE


@each
def test_nothing_is_smaller_than_12_px(figure):
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?(?:\d+ )?([\d.]+)px", figure.svg())]
    assert (
        sizes and min(sizes) * 96 / 72 >= 12 - 1e-6
    )  # the SVG's own unit is a point: its viewBox is 0.75 of its width
    text = json.dumps(figure.plotly.to_plotly_json()["layout"], default=str)
    assert all(float(size) >= 12 for size in re.findall(r'"font": \{[^}]*"size": ([\d.]+)', text))


@each
def test_nothing_leaves_the_canvas(figure):
    with matplotlib.rc_context(static._RC):
        canvas = static._draw(figure.plotly)
        left, bottom, right, top = (edge * 96 for edge in canvas.get_tightbbox(canvas.canvas.get_renderer()).extents)
    layout = figure.plotly.layout
    assert left >= -1 and bottom >= -1 and right <= layout.width + 1 and top <= layout.height + 1


@each
def test_the_same_figure_gives_the_same_svg(figure):
    assert figure.svg() == figure.svg()
    assert "<dc:date>" not in figure.svg()


def test_two_figures_share_no_id():
    ids = [set(re.findall(r'\bid="([^"]+)"', figure.svg())) for figure in EXAMPLES.values()]
    assert sum(map(len, ids)) == len(set().union(*ids))


def test_no_pyplot_state_is_touched():
    import sys

    before = dict(matplotlib.rcParams)
    EXAMPLES["map"].svg()
    assert dict(matplotlib.rcParams) == before
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        assert pyplot.get_fignums() == []
