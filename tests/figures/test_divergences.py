"""Figures of divergences: what is drawn is what was given, sentences say its numbers, odd input is refused."""

import numpy as np
import pytest

from fakit import figures as draw

P, Q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]


def of(figure, kind):
    return [trace for trace in figure.plotly.data if trace.type == kind]


def test_a_panel_for_every_fit_with_the_same_teacher_and_axis():
    fits = {name: Q for name in ("one", "two", "three", "four")}
    figure = draw.fitted_students(P, fits | {"two": P})
    bars, lines = of(figure, "bar"), of(figure, "scatter")
    assert [list(bar.y) for bar in bars] == [P] * 4 and [list(line.y) for line in lines] == [Q, P, Q, Q]
    assert len({(bar.xaxis, bar.yaxis) for bar in bars}) == 4
    axes = [figure.plotly.layout[key] for key in ("yaxis", "yaxis2", "yaxis3", "yaxis4")]
    assert len({axis.range for axis in axes}) == 1 and axes[0].range[1] > 0.6
    assert axes[0].domain == axes[2].domain and axes[3].domain[1] < axes[0].domain[0]
    assert "one 0.60 (most likely class 2), two 1.00 (most likely class 0)" in figure.summary


def test_the_bottom_row_is_named_where_nothing_stands_below():
    layout = draw.fitted_students(P, {name: Q for name in "abcd"}).plotly.layout
    named = [layout[key].title.text for key in ("xaxis", "xaxis2", "xaxis3", "xaxis4")]
    assert named == ["", "class", "class", "class"]


@pytest.mark.parametrize(
    ("teacher", "fits", "message"),
    [
        (P, {}, "nothing to draw"),
        (P, {"jsd": [0.5, 0.5]}, r"jsd has shape \(2,\) and sum 1.000; 3 classes"),
        ([0.5, 0.2, 0.2], {"jsd": Q}, "the teacher has .* sum 0.900"),
        (P, {"jsd": [1.2, -0.4, 0.2]}, "jsd has"),
        (P, {"jsd": [float("nan"), 0.5, 0.5]}, "jsd has"),
    ],
)
def test_fits_are_distributions(teacher, fits, message):
    with pytest.raises(ValueError, match=message):
        draw.fitted_students(teacher, fits)


def test_pulls_are_shares_of_their_row():
    pulls = {"a": [1.0, -2.0, 1.0], "none": [0.0, 0.0, 0.0]}
    figure = draw.class_pulls(P, Q, pulls, {"first two": (0, 1)}, limit=0.2)
    (heat,) = of(figure, "heatmap")
    np.testing.assert_allclose(heat.z, [[0.25, -0.5, 0.25], [0, 0, 0]])
    assert (heat.zmin, heat.zmax) == (-0.2, 0.2) and list(heat.colorbar.ticktext) == ["up 20 %", "0", "down 20 %"]
    assert list(figure.plotly.layout.yaxis2.ticktext) == ["a", "none"]
    spans = {(shape.x0, shape.x1, shape.xref) for shape in figure.plotly.layout.shapes}
    assert spans == {(-0.5, 1.5, None), (-0.5, 1.5, "x2")}
    assert figure.summary == "Pull on 3 classes: a 75 % on first two; none 0 % on first two."
    assert draw.class_pulls(P, Q, {"a": [1.0, -2.0, 1.0]}).summary.endswith("a most on class 1.")


@pytest.mark.parametrize("row", [[1.0, 2.0], [1.0, float("nan"), 0.0]])
def test_pulls_fit_the_classes(row):
    with pytest.raises(ValueError, match="3 classes need finite rows"):
        draw.class_pulls(P, Q, {"a": row})


def test_two_panels_over_temperature():
    figure = draw.by_temperature([1, 4], {"kl": [0.5, 0.9]}, {"kl": [2.0, 1.0]}, "mse")
    left, right = figure.plotly.data
    assert (list(left.y), list(right.y), left.showlegend, right.showlegend) == ([0.5, 0.9], [2, 1], True, False)
    assert {figure.plotly.layout[key].type for key in ("xaxis", "xaxis2", "yaxis2")} == {"log"}
    assert figure.summary == "Cosine with the gradient of mse from τ = 1 to 4: kl 0.50 → 0.90 (norm × 0.5)."


@pytest.mark.parametrize(
    ("cosines", "norms", "message"),
    [
        ({"kl": [1.0, 1.0]}, {"tvd": [1.0, 1.0]}, "cosines of kl, but norms of tvd"),
        ({"kl": [1.0]}, {"kl": [1.0, 1.0]}, "kl has 1 values at 2 temperatures"),
    ],
)
def test_temperatures_and_losses_fit(cosines, norms, message):
    with pytest.raises(ValueError, match=message):
        draw.by_temperature([1, 2], cosines, norms)


def test_a_moved_logit_is_marked_on_every_curve():
    ranks = {"C": [1, 2, 3], "A": [3, 3, 2], "B": [2, 1, 1]}
    figure = draw.moved_logit([0, 1, 2], ranks, {"loss": [0.0, 0.5, 1.5]}, 1.1)
    points = [(trace.x[0], trace.y[0]) for trace in figure.plotly.data if trace.mode == "markers"]
    assert points == [(1, 2), (1, 3), (1, 1), (1, 0.5)]
    assert {(shape.x0, shape.xref) for shape in figure.plotly.layout.shapes} == {(1.1, "x"), (1.1, "x2")}
    assert figure.summary == "With C at 1.1, the ranks are C 2.00, A 3.00, B 1.00; loss 0.50."


@pytest.mark.parametrize(
    ("ranks", "at", "message"),
    [({"C": [1, 2]}, 1, "C has 2 values at 3 places"), ({"C": [1, 2, 3]}, 2.5, "stands at 2.5, outside of 0 to 2")],
)
def test_a_moved_logit_fits_its_places(ranks, at, message):
    with pytest.raises(ValueError, match=message):
        draw.moved_logit([0, 1, 2], ranks, {"loss": [0, 0, 0]}, at)
