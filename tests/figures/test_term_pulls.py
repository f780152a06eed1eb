"""The laboratory's figure: its four panels hold the numbers given, and what does not fit is named."""

import numpy as np
import pytest

from fakit.figures import term_pulls

LOSSES = {"features": 0.5, "task": 1.5}
NORMS = {
    "all": {"features": 3.0, "task": 4.0},
    "S1": {"features": 3.0, "task": 2.0},
    "head": {"features": 0.0, "task": 3.5},
}
COSINES = [[1.0, -0.25], [-0.25, 1.0]]


def test_each_panel_holds_its_numbers():
    loss, pull, *lines, heat = term_pulls(LOSSES, NORMS, COSINES).plotly.data
    assert dict(zip(loss.y, loss.x, strict=True)) == LOSSES
    assert dict(zip(loss.y, loss.text, strict=True)) == {"features": "0.5 (25 %)", "task": "1.5 (75 %)"}
    assert dict(zip(pull.y, pull.x, strict=True)) == NORMS["all"]
    assert {line.name: list(line.y) for line in lines} == {"features": [3.0, 0.0], "task": [2.0, 3.5]}
    assert list(lines[0].x) == ["S1", "head"]
    assert np.asarray(heat.z).tolist() == COSINES and (heat.zmin, heat.zmax) == (-1, 1)


def test_the_sentence_names_share_pull_and_conflict():
    assert term_pulls(LOSSES, NORMS, COSINES).summary == (
        "Total loss 2, 75 % of it task; task pulls hardest (gradient norm 4); in the whole student features and task "
        "conflict (cosine -0.25)."
    )


def test_agreement_is_no_conflict_and_a_missing_cosine_is_hatched():
    agreed = term_pulls(LOSSES, NORMS, [[1, 0.5], [0.5, 1]], where="S1")
    assert "in S1 features and task agree least (cosine 0.50)" in agreed.summary
    lone = term_pulls(LOSSES, NORMS, [[np.nan, np.nan], [np.nan, 1]], where="head")
    assert "no two terms have a gradient in head" in lone.summary
    heat = next(trace for trace in lone.plotly.data if trace.type == "heatmap")
    assert heat.text[0][1] == "–"
    assert len(lone.plotly.data) == len(agreed.plotly.data) + 1


def test_equal_pulls_are_called_alike():
    equal = {"all": {"features": 4.0, "task": 4.0}, "S1": {"features": 4.0, "task": 4.0}}
    assert "all pull alike (gradient norm 4)" in term_pulls(LOSSES, equal, COSINES).summary


def test_all_terms_off_is_a_picture_too():
    off = term_pulls({"task": 0.0}, {"all": {"task": 0.0}, "S1": {"task": 0.0}}, [[1.0]])
    assert off.plotly.data[0].text == ("off",) and off.summary.startswith("Total loss 0;")


def test_axes_reach_the_limits_and_never_less_than_the_data():
    def ends(figure):
        layout = figure.plotly.layout
        return layout.xaxis.range[1], layout.xaxis2.range[1], layout.yaxis3.range[1]

    plain, below, above = (
        term_pulls(LOSSES, NORMS, COSINES, limits=limits) for limits in ((0, 0, 0), (1, 1, 1), (3, 8, 7))
    )
    assert ends(plain) == ends(below)
    assert ends(above) == pytest.approx([2 * end for end in ends(plain)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, NORMS, COSINES), "nothing to draw"),
        ((LOSSES, {"S1": NORMS["S1"]}, COSINES), "needs norms of 'all'"),
        ((LOSSES, {"all": {"task": 1.0}}, COSINES), "for each of features, task"),
        ((LOSSES, NORMS, np.eye(3)), r"2 terms need a \(2, 2\) matrix; found \(3, 3\)"),
        (({"features": np.nan, "task": 1.0}, NORMS, COSINES), "features's loss is not finite"),
        ((LOSSES, {"all": {"features": 1.0, "task": np.inf}}, COSINES), "task's gradient norm is not finite"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        term_pulls(*arguments)
