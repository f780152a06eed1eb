"""Bars of weighted terms: lengths, labels, the axis, and what is refused."""

import pytest

from fakit.figures import loss_bars

TERMS, WEIGHTS = {"features": 0.5, "task": 2.0}, {"features": 0.3, "attention": 0.0, "task": 1.0}


def test_a_bar_is_weight_times_loss():
    bar = loss_bars(TERMS, WEIGHTS).plotly.data[0]
    assert dict(zip(bar.y, bar.x, strict=True)) == pytest.approx({"features": 0.15, "attention": 0.0, "task": 2.0})
    assert dict(zip(bar.y, bar.text, strict=True)) == {
        "features": "0.3 × 0.5 = 0.15",
        "attention": "off (weight 0)",
        "task": "1 × 2 = 2",
    }


def test_the_sentence_has_the_total():
    assert loss_bars(TERMS, WEIGHTS).summary.startswith("Total loss 2.15: features 0.3 × 0.5 = 0.15,")


def test_the_axis_reaches_limit_and_never_less_than_the_bars():
    ends = [loss_bars(TERMS, WEIGHTS, limit=limit).plotly.layout.xaxis.range[1] for limit in (None, 1.0, 4.0)]
    assert ends[0] == ends[1] > 2.0
    assert ends[2] == pytest.approx(2 * ends[0])


def test_all_weights_zero_is_a_picture_too():
    assert loss_bars({}, {"features": 0.0}).plotly.layout.xaxis.range[1] > 0


@pytest.mark.parametrize(
    ("terms", "weights", "message"),
    [
        ({}, {}, "loss_bars"),
        ({"rank": 1.0}, {"task": 1.0}, "no weight for rank"),
        ({}, {"task": 1.0}, "no loss for task"),
        ({"task": float("nan")}, {"task": 1.0}, "task is not finite"),
    ],
)
def test_what_does_not_fit_is_named(terms, weights, message):
    with pytest.raises(ValueError, match=message):
        loss_bars(terms, weights)
