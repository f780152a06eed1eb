"""The figure of the map experiment: what it says is what its rows say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fakit.figures import map_experiment

RHO = SimpleNamespace(mean=0.5, low=-0.1, high=0.9, n=4)


def rows(task="glosses"):
    made = [
        {
            "task": task,
            "map": name,
            "kind": "increasing",
            "cka": cka,
            "score": score,
            "low": score - 0.01,
            "high": score + 0.02,
        }
        for name, cka, score in (("1-2-3", 0.9, 0.70), ("1-2-4", 0.6, 0.75), ("2-4-6", 0.7, 0.72), ("4-5-6", 0.3, 0.65))
    ]
    none = {"task": task, "map": "none", "kind": "none", "cka": np.nan, "score": 0.6, "low": 0.59, "high": 0.61}
    return [
        *made,
        none,
        {**none, "map": "reverse", "kind": "reverse", "cka": 0.2, "score": 0.62, "scores": (0.61, 0.63)},
    ]


def test_the_sentence_names_rho_the_choice_its_rank_and_the_controls():
    figure = map_experiment(rows(), {"glosses": RHO})
    assert figure.summary == (
        "glosses: Spearman ρ 0.50 (95 % interval -0.10 to 0.90) over 4 maps; the map of the largest CKA, 1-2-3, scores "
        "0.7 and comes 3rd of 4, the best, 1-2-4, 0.75; none 0.6, reverse 0.62."
    )
    headings = [note.text for note in figure.plotly.layout.annotations]
    assert "<b>glosses</b>: Spearman ρ +0.50 [-0.10, +0.90]" in headings
    assert "1-2-3" in headings and "1-2-4" in headings
    assert "4 increasing maps" in figure.caption


def test_points_intervals_and_the_line_without_a_map():
    increasing, none, reverse = map_experiment(rows()).plotly.data
    assert list(increasing.x) == [0.9, 0.6, 0.7, 0.3] and list(increasing.y) == [0.70, 0.75, 0.72, 0.65]
    np.testing.assert_allclose(increasing.error_y.array, 0.02)
    np.testing.assert_allclose(increasing.error_y.arrayminus, 0.01)
    assert none.mode == "lines" and list(none.y) == [0.6, 0.6]
    assert "seeds 0.61, 0.63" in reverse.hovertext[0] and "map reverse" in reverse.hovertext[0]
    assert len({trace.marker.symbol for trace in (increasing, reverse)}) == 2  # told apart without color


def test_a_panel_a_task_with_one_legend():
    figure = map_experiment(rows() + rows("reviews"), {"reviews": RHO}, {"glosses": "accuracy"})
    assert {trace.xaxis for trace in figure.plotly.data} == {"x", "x2"}
    assert [trace.name for trace in figure.plotly.data if trace.showlegend] == [
        "increasing map",
        "none (no map)",
        "reverse",
    ]
    titles = json.loads(figure.plotly.to_json())["layout"]
    assert (titles["yaxis"]["title"]["text"], titles["yaxis2"]["title"]["text"]) == ("accuracy", "test score")


def error_rates(task="scans"):
    """The rows as error rates, 1 − score, of which the lowest is best."""
    turned = []
    for row in rows(task):
        ends = {"low": 1 - row["high"], "high": 1 - row["low"]}
        scores = {"scores": tuple(1 - score for score in row["scores"])} if "scores" in row else {}
        turned.append({**row, "score": 1 - row["score"], **ends, **scores, "higher_is_better": False})
    return turned


def test_of_an_error_rate_the_lowest_is_the_best_and_stands_on_top():
    figure = map_experiment(error_rates(), {"scans": RHO}, {"scans": "test CER"})
    assert figure.summary == (
        "scans (lower is better): Spearman ρ 0.50 (95 % interval -0.10 to 0.90) over 4 maps; the map of the largest "
        "CKA, 1-2-3, scores 0.3 and comes 3rd of 4, the best, 1-2-4, 0.25; none 0.4, reverse 0.38."
    )
    assert "positive where similar maps do better" in figure.caption
    axis = figure.plotly.layout.yaxis
    assert axis.range[0] > axis.range[1] and axis.title.text == "test CER (reversed: lower is better)"
    names = {note.text: note for note in figure.plotly.layout.annotations}
    assert "4-5-6" not in names  # the worst
    assert names["1-2-4"].y == pytest.approx(1 - 0.77)  # above its bar, which on this axis ends at `low`
    assert names["1-2-4"].yanchor == "bottom" and names["1-2-3"].yanchor == "top"  # below its own


def test_each_task_has_its_own_direction():
    figure = map_experiment(rows() + error_rates())
    first, second = figure.plotly.layout.yaxis, figure.plotly.layout.yaxis2
    assert first.range[0] < first.range[1] and second.range[0] > second.range[1]
    assert first.title.text == "test score" and "lower is better" not in figure.summary.split("scans")[0]
    with pytest.raises(ValueError, match="higher_is_better of glosses is both True and False"):
        map_experiment([{**row, "higher_is_better": row["map"] != "none"} for row in rows()])


def test_refusals():
    with pytest.raises(ValueError, match="needs columns task, map, kind, cka, score; missing score"):
        map_experiment([{"task": "a", "map": "b", "kind": "none", "cka": 1.0}])
    with pytest.raises(ValueError, match=r"kinds \['other'\] are not known"):
        map_experiment([{**rows()[0], "kind": "other"}])
    with pytest.raises(ValueError, match=r"maps \['1-2-3'\] have no CKA"):
        map_experiment([{**rows()[0], "cka": np.nan}])
    with pytest.raises(ValueError, match=r"correlations of \['scans'\], but the tasks are \['glosses'\]"):
        map_experiment(rows(), {"scans": RHO})
    with pytest.raises(ValueError, match="increasing maps: nothing to draw"):
        map_experiment(rows()[-2:])
