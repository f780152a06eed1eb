"""What quantizing does: both panels from the same rows, zeros off the logarithmic axis,
references beside the errors.
"""

import math

import numpy as np
import pytest

from fakit.figures import quantization_by_layer

EIGHT = [
    {"layer": 0, "relative_error": 0.0, "attention_jsd": None},
    {"layer": 1, "relative_error": 0.02, "attention_jsd": 0.0},
    {"layer": 2, "relative_error": 0.01, "attention_jsd": 3e-4},
]
FOUR = [{**row, "relative_error": 9 * row["relative_error"]} for row in EIGHT]


def test_each_form_is_one_line_in_each_panel():
    figure = quantization_by_layer({"8bit": EIGHT, "4bit": FOUR}, {"student": {2: 0.8}})
    drawn = {(trace.name, trace.xaxis): trace for trace in figure.plotly.data}
    assert set(drawn) == {("8bit", "x"), ("4bit", "x"), ("8bit", "x2"), ("4bit", "x2"), ("student", "x")}
    np.testing.assert_array_equal(drawn["8bit", "x"].y, [np.nan, 0.02, 0.01])
    np.testing.assert_array_equal(drawn["4bit", "x2"].y, [np.nan, np.nan, 3e-4])
    assert (list(drawn["student", "x"].x), list(drawn["student", "x"].y)) == ([2], [0.8])
    assert [trace.name for trace in figure.plotly.data if trace.showlegend] == ["8bit", "4bit", "student"]
    low, high = figure.plotly.layout.yaxis.range
    assert low < math.log10(0.01) and high > math.log10(0.8)
    assert len({trace.line.dash for trace in figure.plotly.data}) == 3


def test_the_sentence_has_the_ends_and_the_caption_the_exact_layers():
    figure = quantization_by_layer({"8bit": EIGHT}, {"student": {2: 0.8}})
    assert figure.summary == (
        "Relative error 8bit 0.01 (T2) to 0.02 (T1); attention JSD 8bit 0.0003 (T2); student: 0.8 at T2."
    )
    assert figure.caption == "Exact, and so not on the axis: hidden states of T0."
    assert quantization_by_layer({"8bit": EIGHT[1:]}).caption == ""


def test_nothing_to_see_is_said():
    exact = [{**row, "relative_error": 0, "attention_jsd": None} for row in EIGHT]
    assert "8bit 0 throughout; attention JSD 8bit not measured." in quantization_by_layer({"8bit": exact}).summary


def test_errors():
    with pytest.raises(ValueError, match="quantization_by_layer: nothing to draw"):
        quantization_by_layer({})
    with pytest.raises(ValueError, match="missing attention_jsd"):
        quantization_by_layer({"8bit": [{"layer": 0, "relative_error": 0.1}]})
    with pytest.raises(ValueError, match=r"same layers; found \{'8bit': \[0, 1, 2\], '4bit': \[1, 2\]\}"):
        quantization_by_layer({"8bit": EIGHT, "4bit": FOUR[1:]})
