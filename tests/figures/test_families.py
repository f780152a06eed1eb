"""Each figure says what its data says: values, marks and sentences; and answers wrong shapes with both sides."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from fakit import figures as draw
from fakit.figures.results import pareto_front
from fakit.figures.similarity_steps import pair_role
from fakit.figures.theme import STUDENT, TEACHER

ROWS = [
    {"task": "glosses", "arm": "outputs", "mean": 1.0, "low": -0.5, "high": 2.5, "seeds": [0.2, 1.0, 1.8]},
    {"task": "glosses", "arm": "all", "mean": 2.0, "low": 0.5, "high": 3.5, "seeds": [1.1, 2.0, 2.9]},
    {"task": "scans", "arm": "all", "mean": -1.0, "low": -1.5, "high": -0.5, "seeds": [-1.2, -1.0, -0.8]},
]


def strokes(figure):
    return [trace for trace in figure.plotly.data if trace.type == "scatter" and trace.mode == "lines"]


# ---- similarity ----------------------------------------------------------------------------------------------------


def test_heatmap_hatches_the_null_and_frames_the_map():
    values = np.array([[0.05, 0.9], [0.3, np.nan]])
    figure = draw.similarity_heatmap(
        values, null=[[0.1, 0.1], [0.4, 0.1]], low=values - 0.01, high=values + 0.01, map_pairs=[(0, 1)]
    )
    heat = figure.plotly.data[0]
    assert (heat.zmin, heat.zmax) == (0, 1)
    x = np.array([v for v in strokes(figure)[0].x if v is not None])
    assert x.max() <= 0.5  # column 0 alone
    assert "2 of 4 cells lie inside the null" in figure.summary
    assert (
        "Highest CKA 0.90 for S0 and T1" in figure.summary and "interval of the highest 0.89 to 0.91" in figure.summary
    )
    frames = figure.plotly.layout.shapes
    assert {(round(s.x0 + s.x1) / 2, round(s.y0 + s.y1) / 2) for s in frames} == {(1, 0)}
    assert "inside the null (bound 0.400)" in heat.hovertext[1][0] and "undefined" in heat.hovertext[1][1]
    assert "Hatched" in figure.caption and "Framed" in figure.caption


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"student_labels": ["S0"]}, "2 layers in the matrix, 1 labels"),
        ({"null": np.zeros((3, 3))}, r"null has shape \(3, 3\), values has \(2, 2\)"),
        ({"map_pairs": [(2, 0)]}, r"map pair \(2, 0\) is outside the 2 × 2"),
    ],
)
def test_heatmap_refuses_what_does_not_fit(more, message):
    with pytest.raises(ValueError, match=message):
        draw.similarity_heatmap(np.eye(2), **more)


def test_bias_curve_draws_means_and_the_central_band():
    seeds = np.array([[0.9, 0.4], [0.8, 0.2]])
    figure = draw.bias_curve([16, 1024], seeds, np.zeros((2, 2)))
    line = next(trace for trace in figure.plotly.data if trace.name == "biased")
    np.testing.assert_allclose(line.y, [0.85, 0.3])
    edge = figure.plotly.data[0]
    np.testing.assert_allclose(edge.y[[0, 3]], np.quantile(seeds[:, 0], [0.975, 0.025]))
    assert "biased 0.85 at n = 16 and 0.30 at n = 1024" in figure.summary and "2 seeds" in figure.caption
    with pytest.raises(ValueError, match="biased has 2 values, n has 3"):
        draw.bias_curve([1, 2, 3], seeds, seeds)


def test_a_pair_looks_the_same_in_every_figure_and_its_layers_have_its_color():
    pairs = {"S1 and T2": [0.9, 0.8], "S3 and T6": [0.5, 0.4]}
    shares = {"S1": [0, 0.1], "T2": [0, 0.1], "S3": [0, 0.2], "T6": [0, 0.3], "T9": [0, 0.1]}
    watch, scrub = draw.similarity_over_steps([0, 1], pairs), draw.rogue_scrub(pairs, shares, 1)
    looks = [{t.name: (t.line.color, t.line.dash, t.marker.symbol) for t in f.plotly.data} for f in (watch, scrub)]
    assert all(looks[0][pair] == looks[1][pair] for pair in pairs)
    color = {name: look[0] for name, look in looks[1].items()}
    assert color["S1"] == color["T2"] == color["S1 and T2"] != color["S3 and T6"] == color["T6"]
    assert {TEACHER.color, STUDENT.color}.isdisjoint(color[name] for name in (*pairs, "S1", "T2", "S3", "T6"))
    assert color["T9"] == TEACHER.color  # of no pair: its model's
    names = {note.text: note.y for note in scrub.plotly.layout.annotations if note.text in shares}
    heights = sorted(names.values())
    assert len(names) == 5 and min(b - a for a, b in pairwise(heights)) > 1  # names at equal ends stand apart
    assert len({(r.color, r.dash, r.symbol) for r in map(pair_role, range(6))}) == 6


def test_rogue_dimensions_stack_the_ten_largest():
    shares = np.r_[0.5, np.full(100, 0.005)]
    figure = draw.rogue_dimensions({"T6": shares, "T5": np.full(100, 0.01)})
    heights = [trace.y[0] for trace in figure.plotly.data]
    np.testing.assert_allclose(heights, [50, 1, 3.5])
    assert figure.plotly.layout.yaxis.range == pytest.approx((0, 1.1 * 54.5))  # what is drawn fills the axis
    assert "what is missing to 100 %" in figure.caption
    assert "one dimension of 101 carries 50.0 %" in figure.summary
    with pytest.raises(ValueError, match=r"sum to 0\.900"):
        draw.rogue_dimensions({"T6": [0.9]})
    with pytest.raises(ValueError, match="sum to nan"):
        draw.rogue_dimensions({"T6": [0.5, np.nan]})


# ---- attention -----------------------------------------------------------------------------------------------------


def test_attention_shares_limits_and_hatches_masked_cells():
    teacher, student = np.array([[1.0, 0.0], [0.6, 0.4]]), np.array([[1.0, 0.0], [0.2, 0.8]])
    figure = draw.attention_pair(teacher, student, ["a", "b"], np.tril(np.ones((2, 2), bool)))
    first, second, third = (trace for trace in figure.plotly.data if trace.type == "heatmap")
    assert (first.zmin, first.zmax) == (second.zmin, second.zmax) == (0, 1)
    assert third.zmin == -third.zmax == pytest.approx(-0.4)
    assert np.isnan(first.z[0, 1]) and third.z[1, 1] == pytest.approx(0.4)
    assert len(strokes(figure)) == 3
    assert "total variation of 0.20" in figure.summary
    assert first.colorscale != second.colorscale


def test_attention_names_every_token_where_there_is_room_and_line_breaks_always():
    def names(tokens):
        layout = draw.attention_pair(np.eye(len(tokens)), np.eye(len(tokens)), tokens).plotly.layout
        return [list(axis.ticktext) for axis in (layout.yaxis, layout.xaxis, layout.xaxis3)]

    words = ["cultivate"[: 3 + i % 8] + str(i) for i in range(16)]
    assert names(words) == [words] * 3
    line = [*"abcdefghi" * 5, "\n", *"jklmnopqr" * 5]  # 91: thinned, and the break is at an odd place
    for shown in names(line):
        assert len(shown) < 60 and shown.count("⏎") == 1


def test_attention_padding_masks_rows_and_columns():
    maps = np.full((3, 3), 1 / 3)
    figure = draw.attention_pair(maps, maps, ["a", "b", "[PAD]"], [True, True, False])
    z = figure.plotly.data[0].z
    assert np.isnan(z[2]).all() and np.isnan(z[:, 2]).all() and np.isfinite(z[:2, :2]).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ((np.eye(2), np.eye(3), ["a", "b"]), r"2 tokens need maps \(2, 2\); found teacher \(2, 2\), student \(3, 3\)"),
        ((np.zeros((4, 2, 2)), np.eye(2), ["a", "b"]), r"found shape \(4, 2, 2\)"),
        ((np.eye(2), np.eye(2), ["a", "b"], [True]), "mask has shape"),
        ((np.eye(2), np.eye(2), ["a", "b"], [False, False]), "nothing to draw"),
    ],
)
def test_attention_refuses_what_does_not_fit(ask, message):
    with pytest.raises(ValueError, match=message):
        draw.attention_pair(*ask)


def test_heads_and_rollout():
    figure = draw.head_matching([[0.1, 0.7], [0.6, 0.3]], [(0, 0), (1, 1)])
    assert "matched heads 0.20 on average" in figure.summary and len(figure.plotly.layout.shapes) == 4
    figure = draw.head_matching([[0.3, 0.1], [0.6, 0.2]], [(0, 0), (1, 1)])
    dots = figure.plotly.data[1]
    assert [(round(y), round(x)) for x, y in zip(dots.x, dots.y, strict=True)] == [(0, 1), (1, 1)]
    assert "1 of 2 student heads are nearest to the teacher head of their own number" in figure.summary
    assert "own number" not in draw.head_matching([[0.3, 0.1]]).summary  # 1 head against 2: numbers say nothing
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]; found 0\.000 to 2\.000"):
        draw.head_matching([[0, 2]])
    rolled = draw.rollout([0.7, 0.3], [0.2, 0.8], ["x", "y"])
    assert rolled.summary == "The teacher looks most at x (0.70), the student looks most at y (0.80), of 2 tokens."
    with pytest.raises(ValueError, match=r"2 tokens need \(2,\)"):
        draw.rollout([1.0], None, ["x", "y"])


# ---- maps and story ------------------------------------------------------------------------------------------------


def test_layer_map_links_the_pairs():
    figure = draw.layer_map([(1, 2), (2, 4)], 2, 4, np.linspace(0, 1, 15).reshape(3, 5))
    links = strokes(figure)
    assert [(link.x[0], link.x[1]) for link in links] == [(2, 2), (4, 4)]
    assert links[0].line.width < links[1].line.width
    assert "S1←T2 (0.50), S2←T4 (1.00)" in figure.summary and "without a pupil: T1, T3" in figure.summary
    assert "No layer is mapped" in draw.layer_map([], 2, 4).summary
    partly = np.full((3, 5), np.nan)
    partly[1, 2] = -0.04
    figure = draw.layer_map([(1, 2), (2, 4)], 2, 4, partly)
    assert "S1←T2 (-0.04), S2←T4;" in figure.summary and "nan" not in figure.svg()
    assert figure.plotly.data[1].text.endswith("similarity not measured")
    with pytest.raises(
        ValueError, match=r"pair \(S3, T2\) does not exist: the student has layers S0…S2, the teacher T0…T4"
    ):
        draw.layer_map([(3, 2)], 2, 4)
    with pytest.raises(ValueError, match=r"need \(3, 5\)"):
        draw.layer_map([(1, 2)], 2, 4, np.eye(3))


def test_story_draws_the_terms_it_is_given():
    figure = draw.distillation_story([(1, 3)], 1, 3, {"outputs": "logits"})
    texts = " ".join(note.text for note in figure.plotly.layout.annotations)
    assert "loss = γ · outputs" in texts and "features" not in texts
    with pytest.raises(ValueError, match="found ranking"):
        draw.distillation_story(terms={"ranking": "order"})


def test_softened_checks_that_distributions_sum_to_one():
    figure = draw.softened({1: ([0.9, 0.1], [0.6, 0.4]), 4: ([0.7, 0.3], None)}, ["yes", "no"])
    assert len(figure.plotly.data) == 3
    assert (
        figure.summary
        == "At temperature 1 the teacher gives ‘yes’ 0.90 and the student 0.60; at temperature 4 the teacher gives ‘yes’ 0.70."
    )
    with pytest.raises(ValueError, match=r"student's distribution at temperature 2 has 2 values that sum to 0\.900"):
        draw.softened({2: ([0.5, 0.5], [0.5, 0.4])}, ["a", "b"])


# ---- training ------------------------------------------------------------------------------------------------------


def test_loss_curves_take_dataframes_and_dicts_and_skip_gaps():
    rows = [
        {"step": 0, "task": 1.0, "features": 3.0, "epoch": 0.0},
        {"step": 10, "task": 0.5},
        {"step": 20, "task": 0.2, "features": 1.0},
    ]
    for history in (rows, pd.DataFrame(rows)):
        figure = draw.loss_curves(history, events=[{"step": 10, "name": "features", "old": 1.0, "new": 0.3}])
        lines = {trace.name: list(trace.x) for trace in figure.plotly.data}
        assert lines == {"task": [0, 10, 20], "features": [0, 20]}
        assert figure.summary == "From step 0 to step 20: task 1 → 0.2, features 3 → 1."
        assert any(note.text == "features 1 → 0.3" for note in figure.plotly.layout.annotations)
    for start in (0, 1):  # three rows are three steps, however they are counted
        dense = [{**row, "step": start + i} for i, row in enumerate(rows)]
        assert draw.loss_curves(dense).summary.startswith("Over 3 steps: ")
    with pytest.raises(ValueError, match="no row has the terms outputs; the history has task, features"):
        draw.loss_curves(rows, terms=["outputs"])
    with pytest.raises(ValueError, match="missing step"):
        draw.loss_curves([{"loss": 1.0}])
    with pytest.raises(ValueError, match="empty table"):
        draw.loss_curves([])


def test_gradients_and_their_conflict():
    figure = draw.gradient_bars({"features": 3.0, "task": 1.0})
    assert list(figure.plotly.data[0].x) == [1.0, 3.0] and "75 %" in figure.summary
    with pytest.raises(ValueError, match="task = -1"):
        draw.gradient_bars({"task": -1.0})
    figure = draw.gradient_conflict([[1, -0.4], [-0.4, 1]], ["features", "task"])
    assert (figure.plotly.data[0].zmin, figure.plotly.data[0].zmax) == (
        -1,
        1,
    ) and "conflict most (cosine -0.40)" in figure.summary
    assert "No conflict" in draw.gradient_conflict([[1, 0.4], [0.4, 1]], ["a", "b"]).summary


# ---- results -------------------------------------------------------------------------------------------------------


def test_paired_differences_show_interval_seeds_and_zero():
    for table in (ROWS, pd.DataFrame(ROWS)):
        figure = draw.paired_differences(table)
        points = [trace for trace in figure.plotly.data if trace.error_x.array is not None]
        assert [trace.x[0] for trace in points] == [1.0, 2.0, -1.0]
        np.testing.assert_allclose(
            [(t.error_x.arrayminus[0], t.error_x.array[0]) for t in points], [(1.5, 1.5), (1.5, 1.5), (0.5, 0.5)]
        )
        seeds = [list(trace.x) for trace in figure.plotly.data if trace.error_x.array is None]
        assert seeds == [row["seeds"] for row in ROWS]
        zero = figure.plotly.layout.shapes
        assert len(zero) == 2 and all(line.x0 == line.x1 == 0 for line in zero)
        low, high = figure.plotly.layout.xaxis2.range
        assert low < -1.5 and high > 0
        assert figure.summary.startswith(
            "1 of 3 differences from none lie above 0 with their whole 95 % interval, 1 below: all on glosses +2 ("
        )
        assert "(3 an arm)" in figure.caption
    with pytest.raises(ValueError, match="missing low"):
        draw.paired_differences([{"task": "a", "arm": "b", "mean": 1, "high": 2}])


def test_scores_keep_their_references_in_view():
    figure = draw.scores_by_arm(ROWS, {"glosses": {"teacher": 9.0}}, {"glosses": "accuracy (%)"})
    assert figure.plotly.layout.xaxis.range[1] > 9 and figure.plotly.layout.xaxis.title.text == "accuracy (%)"
    assert figure.plotly.layout.shapes[0].x0 == 9 and "glosses teacher 9" in figure.summary


def test_scores_speak_of_single_seeds_only_where_they_are_drawn():
    without = [{name: value for name, value in row.items() if name != "seeds"} for row in ROWS]
    assert draw.scores_by_arm(ROWS).caption.endswith("small points: single seeds.")
    assert draw.scores_by_arm(without).caption == "Bars: 95 % intervals."


def test_retention_is_in_per_cent_from_zero():
    figure = draw.retention([{"task": "t", "arm": "all", "mean": 0.95, "low": 0.9, "high": 1.1}])
    assert figure.plotly.data[0].y[0] == pytest.approx(95) and "95.0 %" in figure.summary
    low, high = figure.plotly.layout.yaxis.range
    assert low == 0 and high > 110


def test_pareto_front_is_what_no_other_beats():
    assert pareto_front([1, 2, 3, 2], [5, 4, 9, 6]) == [0, 3, 2]
    assert pareto_front([1, 1], [2, 3]) == [1]
    table = [
        {"name": "small", "cost": 1, "quality": 5},
        {"name": "beaten", "cost": 2, "quality": 4},
        {"name": "teacher", "cost": 10, "quality": 9},
    ]
    figure = draw.pareto(table)
    assert "2 of 3" in figure.summary and "beaten (" not in figure.summary
    assert list(figure.plotly.data[0].x) == [1, 10]
    with pytest.raises(ValueError, match="pass log=False"):
        draw.pareto([{"name": "free", "cost": 0, "quality": 1}])
    assert draw.pareto([{"name": "free", "cost": 0, "quality": 1}], log=False).plotly.layout.xaxis.type is None


def test_a_pareto_figure_names_its_points_in_the_legend_and_tells_them_apart():
    arms = ["none", "outputs", "features", "attention", "all", "none, equal compute"]
    table = [{"name": name, "cost": 2 + 0.3 * i, "quality": i} for i, name in enumerate(arms)]
    figure = draw.pareto(table, "TFLOPs").plotly
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert [trace.name for trace in points] == arms and all(trace.showlegend for trace in points)
    assert len({trace.marker.symbol for trace in points}) == len(arms)
    assert figure.layout.xaxis.title.text == "TFLOPs (log)" and {"2", "3"} < set(figure.layout.xaxis.ticktext)
    near = draw.pareto([{"name": n, "cost": c, "quality": 1} for n, c in (("a", 10), ("b", 10.4))])
    assert len(near.plotly.layout.xaxis.tickvals) >= 3


def test_weight_sensitivity_orders_the_weights():
    rows = [
        {"term": "features", "weight": w, "mean": m, "low": m - 1, "high": m + 1}
        for w, m in ((1, 85), (0, 80), (10, 83))
    ]
    figure = draw.weight_sensitivity(rows)
    assert list(figure.plotly.layout.xaxis.ticktext) == ["0", "1", "10"]
    assert "features best at weight 1 (85), range 5" in figure.summary


# ---- fidelity ------------------------------------------------------------------------------------------------------


def test_reliability_sums_up_the_calibration_error():
    rows = [
        {"confidence": 0.6, "accuracy": 0.5, "count": 1},
        {"confidence": 0.9, "accuracy": 0.9, "count": 3},
        {"confidence": 0.2, "accuracy": 0, "count": 0},
    ]
    figure = draw.reliability({"teacher": rows})
    assert "teacher 0.025" in figure.summary
    np.testing.assert_allclose(figure.plotly.data[2].y, [25, 75])


def test_memory_bars_add_up_and_say_what_fits():
    parts = {"full": {"teacher": 28e9, "student": 4e9}, "8bit": {"teacher": 7e9, "student": 4e9}}
    figure = draw.memory_bars(parts, limit=16e9)
    assert sum(trace.x[list(trace.y).index("8bit")] for trace in figure.plotly.data) == pytest.approx(11)
    assert "within 16 GB: 8bit." in figure.summary
    totals = [note for note in figure.plotly.layout.annotations if note.text in ("32 GB", "11 GB")]
    assert len(totals) == 2 and {(note.x, note.xref) for note in totals} == {(1, "x domain")}  # no line runs through
    assert re.search(r"3\.5 MB", draw.memory_bars({"tiny": {"a": 3.5e6}}).summary)
    with pytest.raises(ValueError, match="full/teacher below 0"):
        draw.memory_bars({"full": {"teacher": -1}})


def test_empty_input_is_named():
    for call in (draw.rogue_dimensions, draw.gradient_bars, draw.reliability, draw.memory_bars):
        with pytest.raises(ValueError, match=f"{call.__name__}: nothing to draw"):
            call({})
