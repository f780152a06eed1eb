"""Gains in the cells of a crossed study: paired in each cell, corrected over all, drawn and told."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from fakit.experiments import RunStore, report
from fakit.experiments.cells import factor_of, gains_in_cells
from fakit.figures import gain_by_cell

SEEDS = range(5)
STARTS, DATA, TERMS = ("copied", "random"), ("250", "1000"), ("outputs", "all", "none")


def scores(lower: bool = False) -> dict[tuple[str, str, str], list[float]]:
    """Alignment is worth 0.2 to a random start, and nothing to a copied one."""
    rng = np.random.default_rng(0)
    made = {}
    for start in STARTS:
        for data in DATA:
            for terms in TERMS:
                worth = 0.2 if (start, terms) == ("random", "all") else 0.0
                drawn = 0.5 + (-worth if lower else worth) + rng.normal(0, 0.01, len(SEEDS))
                made[start, data, terms] = drawn.tolist()
    del made["copied", "250", "none"]  # not run
    return made


def runs_of(made, task: str = "glosses", metric: str = "accuracy") -> list[dict]:
    return [
        {
            "run_id": f"{task}-{'-'.join(cell)}-{seed}",
            "kind": "run",
            "task": task,
            "arm": ", ".join(cell),
            "seed": seed,
            "metric": metric,
            "score": value,
            "higher_is_better": metric != "cer",
            "test": {metric: value},
        }
        for cell, values in made.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]


def test_each_cell_is_paired_by_itself_and_corrected_over_all():
    made = scores()
    found = gains_in_cells(pd.DataFrame(runs_of(made)), "score", "outputs")
    assert len(found) == 7 and set(found["n"]) == {5}
    raw = []
    for _, row in found.iterrows():
        own, beside = made[(*row["cell"], row["arm"])], made[(*row["cell"], "outputs")]
        assert row["gain"] == pytest.approx(np.mean(own) - np.mean(beside))
        assert row["gains"] == pytest.approx(np.subtract(own, beside))
        raw.append(ttest_rel(own, beside).pvalue)
        assert row["p"] == pytest.approx(raw[-1])
    # Benjamini and Hochberg, step by step
    order, adjusted, least = np.argsort(raw), np.empty(len(raw)), 1.0
    for rank in range(len(raw), 0, -1):
        least = min(least, raw[order[rank - 1]] * len(raw) / rank)
        adjusted[order[rank - 1]] = least
    assert found["p_adjusted"].to_numpy() == pytest.approx(adjusted)
    sure = found[found["verdict"] == "gain"]
    assert {(*row["cell"], row["arm"]) for _, row in sure.iterrows()} == {("random", n, "all") for n in DATA}
    assert (found["verdict"] == "loss").sum() == 0


def test_lower_may_be_better_and_one_pair_is_not_sure():
    runs = pd.DataFrame(runs_of(scores(lower=True), "scans", "cer"))
    found = gains_in_cells(runs, "score", "outputs")
    assert set(found[found["verdict"] == "gain"]["arm"]) == {"all"}
    one = gains_in_cells(runs[runs["seed"] == 0], "score", "outputs")
    assert set(one["verdict"]) == {"not sure"} and one["p_adjusted"].isna().all()


def test_the_place_of_a_level_is_one():
    assert factor_of("all", ["a, all, x", "b, none, x"]) == 1
    for arms in (["a, x", "x, b"], ["a, b"], []):
        with pytest.raises(ValueError, match="against: 'x' was to be compared with in every cell"):
            factor_of("x", arms)


def test_the_report_draws_and_tells_them(tmp_path):
    made = scores(lower=True)
    arms = [", ".join(cell) for cell in made]
    store = RunStore.open(tmp_path / "runs", what="when does it pay?", arms=arms, against="outputs")
    for record in runs_of(made, "scans", "cer"):
        store.append_run(record | {"test": {"cer": record["score"]}, "parameters": 1, "config": {}, "steps": 1})
    made_of_it = report(store)
    assert list(made_of_it.figures) == ["gain_by_cell"]
    head, copied = [
        line for line in made_of_it.text.splitlines() if line.startswith(("| scans: gain", "| copied, 250"))
    ][:2]
    assert head == "| scans: gain over outputs, points of cer | all | none |"
    gain = 100 * (np.mean(made["copied", "250", "outputs"]) - np.mean(made["copied", "250", "all"]))
    assert f"{gain:+.1f} [" in copied and copied.endswith("| – |")
    assert "7 comparisons: 2 gains, 0 losses are sure (bold)" in made_of_it.text
    assert made_of_it.text.count("| **+") == 2
    assert (tmp_path / "runs/report/figures/gain_by_cell.svg").is_file()


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_cells_of_one_to_three_factors_are_drawn(factors):
    rows = [
        {"task": "t", "cell": ("a", "b", "c")[:factors], "arm": arm, "n": 5, "gain": 1.0, "gain_low": 0.5}
        | {"gain_high": 1.5, "verdict": verdict}
        for arm, verdict in (("outputs + features", "gain"), ("all", "not sure"))
    ]
    figure = gain_by_cell(rows, "outputs", "points")
    symbols = [trace.marker.symbol for trace in figure.plotly.data]
    assert symbols == [("diamond",), ("triangle-up-open",)]
    assert [trace.name for trace in figure.plotly.data] == ["+ features", "all"]
    assert "features: 1 gains, 0 losses, 0 not sure of 1 cells" in figure.summary
    assert "<svg" in figure.svg()


@pytest.mark.parametrize("cell", [(), ("a", "b", "c", "d")])
def test_other_numbers_of_factors_are_refused(cell):
    row = {"task": "t", "cell": cell, "arm": "all", "n": 5, "gain": 1.0, "gain_low": 0.5, "gain_high": 1.5}
    with pytest.raises(ValueError, match=f"cells of {len(cell)} factors"):
        gain_by_cell([row | {"verdict": "gain"}], "outputs")
