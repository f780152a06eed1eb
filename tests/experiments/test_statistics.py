import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fakit.experiments.statistics import (
    Interval,
    crossed,
    gap_closed,
    holm,
    main_effects,
    mean_interval,
    paired_bootstrap,
    paired_difference,
    paired_means,
    paired_table,
    retention,
    spearman_interval,
)


def test_mean_interval_by_hand():
    # mean 2, s = 1, n = 3, t(2) = 4.302653: half width 4.302653 / √3 = 2.484138
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.low == pytest.approx(2 - 2.4841377, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.4841377, abs=1e-6)
    assert (interval.n, interval.level) == (3, 0.95)
    assert str(interval) == "2.000 [-0.484, 4.484] (95% interval, n = 3 seeds)"
    assert Interval(-0.001, -0.03, 0.004, n=3).format(100, 0) == "0 [-3, 0]"  # not -0


def test_one_seed_gives_no_interval():
    interval = mean_interval([0.7])
    assert interval.mean == 0.7 and math.isnan(interval.low) and interval.p is None
    assert not interval.excludes_zero and interval.sign == 0
    assert str(interval) == "0.700 (n = 1 seed: no interval)"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_paired_difference_against_scipy(seed, level):
    rng = np.random.default_rng(seed)
    b = rng.normal(0.7, 0.05, 4 + seed)
    a = b + rng.normal(0.02, 0.03, 4 + seed)
    found = paired_difference(a, b, level)
    reference = stats.ttest_rel(a, b)
    low, high = reference.confidence_interval(level)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, reference.pvalue), rel=1e-9)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))


def test_pairing_removes_what_seeds_share():
    baseline = np.array([0.1, 0.5, 0.9])
    pair = paired_difference(baseline + np.array([0.01, 0.012, 0.011]), baseline)
    assert pair.excludes_zero and pair.sign == 1 and paired_difference(baseline, baseline + 0.01).sign == -1
    assert pair.high - pair.low < 0.006
    assert stats.ttest_ind(baseline + 0.011, baseline).pvalue > 0.9


def test_equal_differences_have_no_spread():
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    above = paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (above.mean, above.low, above.high, above.p) == (1, 1, 1, 0)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="found 2 values and 3 baselines"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"not all are finite: .*nan"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="one number a seed, found shape"):
        mean_interval([])


def test_bootstrap_agrees_with_draws_by_hand_and_with_the_normal_law():
    rng = np.random.default_rng(0)
    b = rng.normal(size=400)
    a = b + rng.normal(0.1, 1.0, size=400)
    found = paired_bootstrap(a, b, resamples=20_000, seed=1)
    drawn = (a - b)[np.random.default_rng(1).integers(0, 400, (20_000, 400))].mean(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=1e-12)
    normal = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(normal.pvalue, abs=0.015)
    assert paired_bootstrap(a, b, resamples=500, seed=3) == paired_bootstrap(a, b, resamples=500, seed=3)
    sure = paired_bootstrap(b + 1, b, resamples=999)
    assert sure.p == pytest.approx(2 / 1000)  # never 0: the data are one of the draws
    assert paired_bootstrap(b, b, resamples=99).p == 1
    with pytest.raises(ValueError, match="at least two pairs, found 1"):
        paired_bootstrap([1.0], [0.5])


def test_gap_closed_by_hand():
    closed = gap_closed([0.80, 0.81, 0.79], [0.70, 0.72, 0.68], 0.90)
    assert closed.available
    assert closed.value.mean == pytest.approx(0.10 / 0.20)
    # Fieller by its definition: at either end the mean of gain − r · gap sits exactly on its t limit
    gain, gap = np.array([0.10, 0.09, 0.11]), np.array([0.20, 0.18, 0.22])
    for end in (closed.value.low, closed.value.high):
        rest = gain - end * gap
        t = abs(rest.mean()) / (rest.std(ddof=1) / math.sqrt(3))
        assert t == pytest.approx(stats.t.ppf(0.975, 2), rel=1e-6) or rest.std() < 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_gap_closed_interval_holds_just_the_shares_the_data_allow(seed):
    rng = np.random.default_rng(seed)
    baseline = rng.normal(0.6, 0.02, 5)
    distilled, teacher = baseline + rng.normal(0.1, 0.02, 5), 0.85 + rng.normal(0, 0.01, 5)
    closed = gap_closed(distilled, baseline, teacher).value
    for share in np.linspace(-0.5, 1.5, 81):
        allowed = stats.ttest_1samp(distilled - baseline - share * (teacher - baseline), 0).pvalue >= 0.05
        assert allowed == (closed.low <= share <= closed.high)


def test_gap_closed_of_an_error_rate_has_the_same_sign():
    score = gap_closed([0.9, 0.91, 0.92], [0.8, 0.82, 0.81], [0.95, 0.96, 0.94])
    error = gap_closed([0.1, 0.09, 0.08], [0.2, 0.18, 0.19], [0.05, 0.04, 0.06])
    assert error.value.mean == pytest.approx(score.value.mean)
    assert (error.value.low, error.value.high) == pytest.approx((score.value.low, score.value.high))


def test_gap_closed_is_not_available_without_a_gap():
    closed = gap_closed([0.8, 0.9, 0.7], [0.75, 0.85, 0.95], 0.86)
    assert not closed.available and closed.value is None
    assert not closed.gap.excludes_zero
    assert "the gap's own interval includes 0" in str(closed)
    assert "one seed" in str(gap_closed([0.8], [0.7], 0.9))


def test_retention_by_hand():
    assert retention([0.8, 0.9], 1.0).mean == pytest.approx(0.85)
    assert retention([0.2, 0.4], [0.1, 0.1], higher_is_better=False).mean == pytest.approx((0.5 + 0.25) / 2)
    with pytest.raises(ValueError, match="divides by the teacher's score, found 0"):
        retention([0.8], 0.0)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, then made monotone
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    found = holm([0.01, math.nan, 0.02])
    assert found[[0, 2]] == pytest.approx([0.02, 0.02]) and math.isnan(found[1])


def _runs():
    scores = {
        ("glosses", "none"): {0: 0.70, 1: 0.72, 2: 0.71},
        ("glosses", "all"): {0: 0.80, 1: 0.81, 2: 0.82, 3: 0.99},
        ("glosses", "outputs"): {0: 0.80, 1: 0.80, 2: 0.81},
        ("scans", "none"): {0: 0.20, 1: 0.21, 2: 0.22},
        ("scans", "all"): {0: 0.10, 1: 0.12, 2: 0.11},
    }
    rows = [
        {"task": task, "arm": arm, "seed": seed, "score": score, "higher_is_better": task != "scans", "cer": score}
        for (task, arm), of_arm in scores.items()
        for seed, score in of_arm.items()
    ]
    return pd.DataFrame(rows)


def test_paired_table_compares_seeds_in_common():
    table = paired_table(_runs(), "score", "none").set_index(["task", "arm"])
    row = table.loc[("glosses", "all")]
    assert (row["n"], row["pairs"], row["seeds"], row["unpaired"]) == (4, 3, [0, 1, 2, 3], [3])
    reference = stats.ttest_rel([0.80, 0.81, 0.82], [0.70, 0.72, 0.71])
    assert row["p"] == pytest.approx(reference.pvalue)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(tuple(reference.confidence_interval()))
    assert row["gain"] == row["difference"] == pytest.approx(0.1)
    assert row["mean"] == pytest.approx(np.mean([0.80, 0.81, 0.82, 0.99]))
    p = [table.loc[("glosses", arm), "p"] for arm in ("all", "outputs")]
    assert [table.loc[("glosses", arm), "p_holm"] for arm in ("all", "outputs")] == pytest.approx(list(holm(p)))
    assert table.loc[("glosses", "none"), ["difference", "p", "p_holm"]].isna().all()


def test_paired_table_turns_error_rates_round():
    for metric in ("score", "cer"):
        row = paired_table(_runs().query("task == 'scans'"), metric, "none").set_index("arm").loc["all"]
        assert row["difference"] == pytest.approx(-0.1)
        assert row["gain"] == pytest.approx(0.1)
        assert row["gain_low"] == -row["difference_high"] and row["gain_high"] == -row["difference_low"]
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]


def test_paired_table_names_what_is_missing():
    runs = _runs()
    with pytest.raises(ValueError, match=r"'f1' is not a column .* task, arm, seed, score"):
        paired_table(runs, "f1", "none")
    with pytest.raises(ValueError, match="arm 'outputs' is not among the runs of scans, which have none, all"):
        paired_table(runs, "score", "outputs")
    with pytest.raises(ValueError, match="glosses, arm none, seed 0 is there more than once"):
        paired_table(pd.concat([runs, runs.head(1)]), "score", "none")


def test_spearman_of_paired_seeds_is_that_of_their_means():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20)
    qualities = scores[:, None] + rng.normal(size=(20, 3))
    found = spearman_interval(scores, qualities, resamples=2000)
    expected = stats.spearmanr(scores, qualities.mean(1))
    assert found.mean == pytest.approx(expected.statistic, abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)
    assert found.low < found.mean < found.high
    assert str(found).endswith("(95% interval, n = 20 items)")


def test_spearman_reads_ranks_alone_and_its_sign():
    scores = np.arange(1.0, 9.0)
    found = spearman_interval(scores, np.exp(scores), resamples=500)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    assert spearman_interval(scores, -(scores**3), resamples=500).mean == -1.0
    assert found.p < 0.01


def test_spearman_interval_covers_the_truth_about_as_often_as_it_says():
    """Gaussian pairs of correlation r have Spearman 6/π · asin(r/2)."""
    truth, hits = 6 / np.pi * np.arcsin(0.25), 0
    for seed in range(200):
        a, b = np.random.default_rng(seed).normal(size=(2, 20))
        found = spearman_interval(a, 0.5 * a + math.sqrt(0.75) * b, resamples=400, seed=seed)
        hits += found.low <= truth <= found.high
    assert 0.85 * 200 <= hits <= 0.99 * 200


def test_seeds_that_disagree_widen_spearmans_interval():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=20)
    noise = rng.normal(size=(20, 1))
    alike = spearman_interval(scores, scores[:, None] + np.hstack([noise] * 3), resamples=2000)
    apart = spearman_interval(
        scores, scores[:, None] + noise + 3 * np.hstack([-noise, noise, 0 * noise]), resamples=2000
    )
    assert apart.mean == pytest.approx(alike.mean)  # the seeds' means are the same
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)


def test_spearman_refuses():
    with pytest.raises(ValueError, match="found 5 scores, 4 qualities"):
        spearman_interval([1, 2, 3, 4, 5], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="scores are all 1: a constant has no ranks"):
        spearman_interval([1, 1, 1, 1], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="one number a seed"):
        spearman_interval([1, 2, 3, 4], [[1, 2], [1, 2], [1, 2], [1]])
    with pytest.raises(ValueError, match="not all are finite"):
        spearman_interval([1, 2, 3, 4], [1, 2, float("nan"), 3])


def test_paired_means_are_free_of_what_a_seed_does_to_all_arms():
    rng = np.random.default_rng(0)
    values = np.array([0.0, 1.0, 2.0])[:, None] + 0.1 * rng.normal(size=(3, 4))
    shifted = values + np.array([0.0, 100.0, -50.0, 7.0])
    for plain, moved in zip(paired_means(values), paired_means(shifted), strict=True):
        assert moved.mean - plain.mean == pytest.approx(57 / 4)
        assert moved.high - moved.low == pytest.approx(plain.high - plain.low)


def test_paired_means_of_two_arms_give_the_paired_t_interval():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(2, 5))
    low, high = paired_difference(*values).low, paired_difference(*values).high
    half = (paired_means(values)[0].high - paired_means(values)[0].low) / 2
    assert (high - low) / 2 == pytest.approx(math.sqrt(2) * half)  # as the docstring says
    with pytest.raises(ValueError, match="found 1 × 5"):
        paired_means(values[:1])


def crossed_runs(score, seeds=(0, 1, 2, 3), metric="accuracy", higher=True):
    """Runs of two students × two losses, whose score is a function of both and of the seed."""
    return pd.DataFrame(
        {"task": "t", "arm": f"{student}, {loss}", "seed": seed, "metric": metric, "higher_is_better": higher}
        | {"score": score(student, loss, seed)}
        for student in ("deep", "flat")
        for loss in ("plain", "skew")
        for seed in seeds
    )


def test_main_effects_by_hand():
    noise = [0.03, -0.01, 0.02, 0.0]
    worth = {"deep": 0.0, "flat": 0.1, "plain": 0.0, "skew": 0.04}

    def score(student, loss, seed):
        both = 0.02 if (student, loss) == ("flat", "skew") else 0.0
        return 0.5 + worth[student] + worth[loss] + both + noise[seed] * (1 + (student == "flat"))

    runs = crossed_runs(score)
    cells = crossed(list(runs["arm"].unique()))
    found = main_effects(runs, "score", cells).set_index("factor")
    by_seed = np.array([0.1 + 0.02 / 2 + x for x in noise])  # of "flat": half of its runs have the interaction
    assert found.loc["1", "gain"] == pytest.approx(by_seed.mean())
    low, high = stats.t.interval(0.95, 3, by_seed.mean(), stats.sem(by_seed))
    assert (found.loc["1", "gain_low"], found.loc["1", "gain_high"]) == pytest.approx((low, high))
    assert found.loc["2", "gain"] == pytest.approx(0.05) and found.loc["2", "p"] < 1e-6
    assert found.loc["1 × 2", "gain"] == pytest.approx(0.02) and (found["n"] == 4).all()
    assert found.loc["1", ["level", "against"]].tolist() == ["flat", "deep"]
    assert found.loc["1 × 2", "level"] == "flat with skew"
    lower = crossed_runs(lambda *of: -score(*of), metric="cer", higher=False)
    assert main_effects(lower, "score", cells)["gain"].tolist() == pytest.approx(found["gain"].tolist())


def test_main_effects_take_whole_seeds_of_whole_grids():
    runs = crossed_runs(lambda student, loss, seed: 0.1 * seed + (loss == "skew"))
    cells = crossed([*runs["arm"].unique(), "none"])
    part = runs[~((runs["seed"] == 3) & (runs["arm"] == "flat, skew"))]
    assert (main_effects(part, "score", cells)["n"] == 3).all()
    with pytest.raises(ValueError, match="'flat, skew' is not among the runs of t"):
        main_effects(runs[runs["arm"] != "flat, skew"], "score", cells)
    with pytest.raises(ValueError, match="found 3 arms and 2 × 2 levels; effects want every combination"):
        main_effects(runs, "score", {arm: of for arm, of in cells.items() if arm != "flat, skew"})
    with pytest.raises(ValueError, match="no seed has all of"):
        main_effects(runs[runs["seed"] == (runs["arm"] == "flat, skew").astype(int)], "score", cells)
    assert crossed(["a, x", "a, y", "b, x"]) is crossed(["none", "all"]) is None
    scored = {arm: {"scores": of["1"], "level": of["2"]} for arm, of in cells.items()}  # names of any kind
    assert main_effects(runs, "score", scored)["gain"].tolist() == main_effects(runs, "score", cells)["gain"].tolist()
    assert crossed(["none, equal compute", "all, equal compute"]) is None
