"""Figures that set teacher beside student: heatmaps in a row, one point a head, attributions by token."""

import numpy as np
import pytest

from fakit import figures as draw

A = np.array([[0.9, 0.2], [0.05, 0.6]])


def test_panels_share_one_scale_and_hatch_their_own_null():
    figure = draw.similarity_panels({"left": A, "right": A / 2}, nulls={"right": 0.11}, map_pairs=[(1, 1)])
    maps = [trace for trace in figure.plotly.data if trace.type == "heatmap"]
    assert [(m.zmin, m.zmax) for m in maps] == [(0, 1), (0, 1)]
    assert [m.showscale for m in maps] == [True, False]
    np.testing.assert_allclose(maps[1].z, A / 2)
    strokes = [trace for trace in figure.plotly.data if trace.type == "scatter"]
    assert [(s.xaxis, s.yaxis) for s in strokes] == [("x2", "y2")]  # only the right one has a null
    assert "left: median 0.40, mapped pairs 0.60" in figure.summary
    assert "right: median 0.20, mapped pairs 0.30, 2 of 4 cells inside the null" in figure.summary
    assert len(figure.plotly.layout.shapes) == 4  # two frames a panel
    assert figure.caption.startswith("Hatched")


@pytest.mark.parametrize(
    ("values", "nulls", "message"),
    [
        ({"one": A}, None, "two or three matrices"),
        ({"one": A, "two": A[:1]}, None, r"two or three matrices of one shape.*\(1, 2\)"),
        ({"one": A, "two": A}, {"three": 0.1}, "nulls for .'three'."),
    ],
)
def test_panels_refuse_what_does_not_fit(values, nulls, message):
    with pytest.raises(ValueError, match=message):
        draw.similarity_panels(values, nulls)


def test_head_profiles_gather_layers_by_model():
    figure = draw.head_profiles({"T2": ([0.2, 0.4], [0.5, 0.7]), "T4": ([0.6], [0.9]), "S1": ([1.0], [0.0])})
    teacher, student = figure.plotly.data
    assert (teacher.name, student.name) == ("teacher", "student")
    assert teacher.marker.symbol != student.marker.symbol
    assert list(teacher.x) == [0.2, 0.4, 0.6] and list(teacher.customdata) == ["T2, head 0", "T2, head 1", "T4, head 0"]
    assert "teacher's 3 heads 0.40 and 0.70" in figure.summary
    with pytest.raises(ValueError, match=r"T2 has x of shape \(2,\) and y of shape \(1,\)"):
        draw.head_profiles({"T2": ([0.2, 0.4], [0.5])})


def test_attributions_are_shares_of_each_models_total():
    figure = draw.token_attributions([2.0, -6.0, 0.0], [0.1, 0.1, 0.2], ["a", "b", "a"])
    teacher, student = figure.plotly.data
    np.testing.assert_allclose(teacher.y, [0.25, -0.75, 0.0])
    np.testing.assert_allclose(student.y, [0.25, 0.25, 0.5])
    assert list(teacher.x) == [0, 1, 2]  # equal words stay apart
    assert "for the teacher b weighs most (-0.75)" in figure.summary.lower()
    with pytest.raises(ValueError, match="all 0"):
        draw.token_attributions([0.0, 0.0], None, ["a", "b"])
    with pytest.raises(ValueError, match=r"shape \(1,\); 2 tokens"):
        draw.token_attributions([1.0], None, ["a", "b"])
