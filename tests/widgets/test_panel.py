"""What every widget shows: a live view, and beside it the same figure for a page without a kernel."""

import json
from xml.etree import ElementTree

import pytest

from fakit.figures import layer_map
from fakit.figures.figure import PLOTLY
from fakit.widgets import Panel, temperature_explorer
from fakit.widgets.panel import WIDGET


@pytest.fixture
def explorer():
    return temperature_explorer([2.0, 0.5, -1.0], ["positive", "neutral", "negative"])


def test_the_bundle_carries_view_picture_and_sentence(explorer):
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "image/svg+xml", "text/plain"}
    assert bundle[WIDGET]["model_id"] == explorer.model_id
    assert bundle["text/plain"] == explorer.figure.summary
    assert bundle["image/svg+xml"] == explorer.figure.svg()
    assert ElementTree.fromstring(bundle["image/svg+xml"]).tag.endswith("svg")


def test_the_bundle_follows_the_controls(explorer):
    before = explorer._repr_mimebundle_()
    explorer.slider.value = 8.0
    after = explorer._repr_mimebundle_()
    assert "temperature 8 " in after["text/plain"] and "temperature 8 " not in before["text/plain"]
    assert after["image/svg+xml"] != before["image/svg+xml"]


def test_the_live_picture_is_the_figure(explorer):
    (output,) = explorer._picture.outputs
    drawn = {key: value for key, value in output["data"][PLOTLY].items() if key in ("data", "layout")}
    assert drawn == json.loads(explorer.figure.plotly.to_json())
    assert output["data"]["text/plain"] == explorer.figure.summary


def test_the_sentence_is_announced_and_escaped():
    explorer = temperature_explorer([1.0, 0.0], ["<b>", "&"])
    value = explorer._sentence.value
    assert 'aria-live="polite"' in value and "‘&lt;b&gt;’" in value and "<b>" not in value


def test_every_control_is_labeled_and_waits_for_the_end_of_a_drag(explorer):
    sliders = [child for child in explorer.children if hasattr(child, "continuous_update")]
    assert sliders and all(not slider.continuous_update for slider in sliders)
    assert all(slider.description for slider in sliders)


def test_the_page_keeps_the_height_of_the_picture(explorer):
    assert explorer._picture.layout.min_height == f"{explorer.figure.plotly.layout.height + 12}px"


def test_a_panel_that_draws_nothing_says_so():
    class Empty(Panel):
        pass

    with pytest.raises(NotImplementedError, match="Empty draws nothing"):
        Empty([])


def test_a_panel_of_ones_own():
    class Fixed(Panel):
        def draw(self):
            return layer_map([(1, 2)], 1, 2), "one pair"

    panel = Fixed([])
    assert panel.sentence == "one pair"
    assert panel.figure.summary in panel._repr_mimebundle_()["text/plain"]
