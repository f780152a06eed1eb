"""What paired seeds allow one to claim: means and differences with intervals, the share of a gap that was closed.

Two arms that share a seed share the student's first weights, the labeled texts and their order, so the difference of
one seed is free of what these do to both. All intervals are over seeds, at 95 % unless asked otherwise, and name n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd
from scipy import stats

LOWER_IS_BETTER = frozenset({"cer", "wer", "perplexity", "bits_per_byte", "loss", "nll", "ece", "brier", "kl", "mse"})


# What of a configuration may differ between seeds of one arm: no number follows from it, or it is the seed.
ASIDE = frozenset(
    f"config.{key}"
    for key in ("seed", "out", "name", "device", "training.log_every", "training.eval_every", "training.save_every")
)


def differing_settings(runs: pd.DataFrame) -> list[str]:
    """The columns of settings and versions in which runs differ that are taken for seeds of one arm.

    "random" of a map study draws another map for every seed: that is the arm.
    """
    settings = [column for column in runs if column.startswith("config.") and column not in ASIDE]
    if set(runs["arm"]) == {"random"}:
        settings = [column for column in settings if column != "config.layer_map"]
    made = [column for column in runs if column.startswith("versions.") or column == "precision"]
    return [c for c in settings if runs[c].map(repr).nunique() > 1] + [
        c for c in made if runs[c].dropna().nunique() > 1
    ]


@dataclass(frozen=True)
class Interval:
    """An estimate over n seeds (or what `of` says) with its interval;
    `low` and `high` are nan where n = 1 gives none.
    """

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95
    p: float | None = None  # two-sided, of "the true mean is 0"
    of: str = "seeds"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def sign(self) -> int:
        """1 or −1 where the whole interval lies above or below 0; 0 where it includes 0, or there is none."""
        return int(self.low > 0) - int(self.high < 0)

    def format(self, scale: float = 1.0, digits: int = 3, sign: bool = False) -> str:
        """ "+3.2 [1.0, 5.4]", each number times `scale`; what rounds to 0 is 0, never -0."""
        plus = "+" if sign else ""
        mean, low, high = (format(value * scale, f"{plus}z.{digits}f") for value in (self.mean, self.low, self.high))
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.format()} (n = {self.n} seed: no interval)"
        return f"{self.format()} ({self.level:.0%} interval, n = {self.n} {self.of})"


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of one value a seed with its Student t interval: mean ± t(n − 1) · s / √n.

    Raises:
        ValueError: without a value, or when one is not finite (an unfinished or diverged run is no number to average).
    """
    x = _finite("values", values)
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1, level)
    error = float(stats.sem(x))
    if error == 0:  # no spread: t would be 0 / 0
        return Interval(mean, mean, mean, n, level, 1.0 if mean == 0 else 0.0)
    low, high = stats.t.interval(level, n - 1, mean, error)
    return Interval(mean, float(low), float(high), n, level, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def paired_difference(values: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of values[i] − baseline[i] over seeds i, with its t interval and the paired t test's p.

    Raises:
        ValueError: when the two have different lengths, i.e. are not paired.
    """
    a, b = _paired(values, baseline)
    return mean_interval(a - b, level)


def paired_bootstrap(
    values: Sequence[float], baseline: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The same difference with a percentile bootstrap interval: pairs are drawn again with replacement.

    For many pairs (predictions of two students on the same test rows). Over three to five seeds it is too narrow: there
    the t interval of `paired_difference` is the honest one.

    Raises:
        ValueError: when the two have different lengths, i.e. are not paired, or are fewer than two pairs.
    """
    a, b = _paired(values, baseline)
    if len(a) < 2:
        raise ValueError("a bootstrap interval needs at least two pairs, found 1: there is nothing to draw from.")
    difference = a - b
    drawn = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // len(difference)),  # at most 32 MB of indices at once
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    means = drawn.bootstrap_distribution
    # twice the smaller tail, the observed difference counted as one of the draws (so never 0)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (resamples + 1))
    return Interval(float(difference.mean()), float(low), float(high), len(difference), level, p)


def paired_means(values: Sequence[Sequence[float]], level: float = 0.95) -> list[Interval]:
    """The mean of each arm over paired seeds, with the interval that matters when arms are compared:
    free of what a seed does to all.

    Loftus & Masson (1994): seeds are taken off as the blocks of a two-way table, one residual variance serves all arms,
    so the half width is t(ν) · s / √seeds with ν = (arms − 1)(seeds − 1). Two arms differ beyond chance, one comparison
    only, where they are apart by more than √2 half widths.

    Args:
        values: (arms, seeds).

    Raises:
        ValueError: fewer than two arms or two seeds, or a value that is not finite.
    """
    x = _table("values", values)
    arms, seeds = x.shape
    if arms < 2 or seeds < 2:
        raise ValueError(
            f"paired_means needs two arms and two seeds at least, found {arms} × {seeds}; see mean_interval."
        )
    residuals = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    freedom = (arms - 1) * (seeds - 1)
    error = math.sqrt(float((residuals**2).sum()) / freedom / seeds)
    around = stats.t(freedom, scale=error).interval(level) if error else (0.0, 0.0)
    return [Interval(float(m), float(m + around[0]), float(m + around[1]), seeds, level) for m in x.mean(1)]


def spearman_interval(
    scores: Sequence[float],
    qualities: Sequence[float] | Sequence[Sequence[float]],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Spearman's ρ between a score and a quality over items (layer maps), with its percentile bootstrap interval.

    Each resample draws items again with replacement and, where qualities come by seed, seeds too: the same for all
    items, since they are paired. A drawn item brings its score along. Items that share parts (maps that share pairs)
    are less than independent, so read the interval as the least uncertainty there is.

    Args:
        scores: (items,), one a map.
        qualities: (items,), or (items, seeds): averaged over seeds.

    Returns:
        mean = ρ of all items and seeds; n = items; p: two-sided, by permuting the scores.

    Raises:
        ValueError: fewer than 4 items, numbers of items that differ, values not finite,
            or a side that is constant (it has no ranks).
    """
    x = _finite("scores", scores)
    y = _table("qualities", [[q] if np.ndim(q) == 0 else q for q in qualities])
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(
            f"one score and one quality an item, at least 4 items: found {len(x)} scores, {len(y)} qualities."
        )
    for name, side in (("scores", x), ("qualities", y.mean(1))):
        if np.ptp(side) == 0:
            raise ValueError(f"{name} are all {side[0]:g}: a constant has no ranks to correlate.")
    rng = np.random.default_rng(seed)
    items, seeds = y.shape
    rho = float(_spearman(x[None], y.mean(1)[None])[0])
    at = rng.integers(0, items, (resamples, items))
    drawn = np.stack(
        [(rng.integers(0, seeds, (resamples, seeds)) == s).mean(1) for s in range(seeds)], 1
    )  # shares of seeds
    qualities_drawn = np.take_along_axis(drawn @ y.T, at, axis=1)  # (resamples, items)
    found = _spearman(x[at], qualities_drawn)
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])  # nan: a resample of one item alone
    permuted = _spearman(rng.permuted(np.tile(x, (resamples, 1)), axis=1), np.tile(y.mean(1), (resamples, 1)))
    p = (int((np.abs(permuted) >= abs(rho) - 1e-12).sum()) + 1) / (resamples + 1)
    return Interval(rho, float(low), float(high), items, level, p, of="items")


@dataclass(frozen=True)
class GapClosed:
    """(distilled − baseline) / (teacher − baseline), or why there is none."""

    value: Interval | None
    gap: Interval
    reason: str = ""

    @property
    def available(self) -> bool:
        return self.value is not None

    def __str__(self) -> str:
        return self.value.format(100, 0) + " %" if self.value else f"not available: {self.reason}"


def gap_closed(
    distilled: Sequence[float], baseline: Sequence[float], teacher: Sequence[float] | float, level: float = 0.95
) -> GapClosed:
    """The share of the teacher's lead over the baseline that distillation closed, for scores and for error rates alike.

    The interval is Fieller's for a ratio of paired means: all shares r for which the mean of (distilled − baseline) −
    r · (teacher − baseline) is within its t interval of 0. It is bounded exactly when the gap's own interval excludes
    0; otherwise the share is not available.

    Args:
        distilled, baseline: one score a seed, paired.
        teacher: one score a seed, or one for all.
    """
    d, b = _paired(distilled, baseline)
    t = np.full_like(b, teacher) if isinstance(teacher, int | float) else _paired(teacher, baseline)[0]
    gain, lead = d - b, t - b
    gap = mean_interval(lead, level)
    n = len(gain)
    if n == 1:
        return GapClosed(None, gap, "one seed gives the gap no interval")
    if not gap.excludes_zero:
        return GapClosed(None, gap, f"the gap's own interval includes 0: {gap.format()}")
    s = np.cov(gain, lead, ddof=1) / n * float(stats.t.ppf((1 + level) / 2, n - 1)) ** 2
    a, half_b, c = gap.mean**2 - s[1, 1], gain.mean() * gap.mean - s[0, 1], gain.mean() ** 2 - s[0, 0]
    root = math.sqrt(max(0.0, half_b**2 - a * c))
    low, high = (half_b - root) / a, (half_b + root) / a
    return GapClosed(Interval(float(gain.mean() / gap.mean), float(low), float(high), n, level), gap)


def retention(
    student: Sequence[float], teacher: Sequence[float] | float, higher_is_better: bool = True, level: float = 0.95
) -> Interval:
    """Student's share of the teacher's score, 1 when it keeps all; of an error rate the inverse share.

    Raises:
        ValueError: where the ratio has no meaning, i.e. a denominator is not above 0.
    """
    s = _finite("student", student)
    t = np.full_like(s, teacher) if isinstance(teacher, int | float) else _paired(teacher, student)[0]
    above, below = (s, t) if higher_is_better else (t, s)
    if (below <= 0).any():
        raise ValueError(
            f"retention divides by the {'teacher' if higher_is_better else 'student'}'s score, found {below.min():g}; "
            "it needs scores above 0. Use paired_difference instead."
        )
    return mean_interval(above / below, level)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: adjusted p values in the order given; nan stays nan and counts as no test."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full_like(p, np.nan)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def paired_table(runs: pd.DataFrame, metric: str, baseline_arm: str, level: float = 0.95) -> pd.DataFrame:
    """Every task × arm: its mean, and its paired difference to the task's baseline arm over the seeds both have.

    Args:
        runs: `RunStore.runs()`, with columns task, arm, seed and `metric`, e.g. "score" or "test.accuracy".
        metric: the column compared.
        baseline_arm: the arm taken off, e.g. "none".

    Returns:
        One row a task and arm, columns: task, arm, n, seeds, scores (one a seed), mean, low, high; difference,
        difference_low, difference_high; gain, gain_low, gain_high, gains (one a pair), the same with a positive sign
        for "better" (by the column `higher_is_better` for "score", else by the metric's name); p (paired t test) and
        p_holm over all comparisons of the task; pairs = seeds in common; unpaired = seeds that one of the two lacks.

    Raises:
        ValueError: naming what is missing: a column, the baseline arm; a run recorded twice for one task, arm, seed; or
            settings or versions in which the seeds of an arm differ.
    """
    runs = _to_pair(runs, metric)
    rows = []
    for task, of_task in runs.groupby("task", sort=False):
        arms = {arm: group.set_index("seed")[metric].astype(float) for arm, group in of_task.groupby("arm", sort=False)}
        if baseline_arm not in arms:
            raise ValueError(f"arm {baseline_arm!r} is not among the runs of {task}, which have {', '.join(arms)}.")
        sign = 1 if _higher_is_better(of_task, metric) else -1
        of_task_rows = [
            {"task": task, "arm": arm, **_compare(scores, arms[baseline_arm], arm == baseline_arm, sign, level)}
            for arm, scores in arms.items()
        ]
        for row, p in zip(of_task_rows, holm([row["p"] for row in of_task_rows]), strict=True):
            rows.append(row | {"p_holm": p})
    return pd.DataFrame(rows)


def main_effects(
    runs: pd.DataFrame, metric: str, cells: Mapping[str, Mapping[str, str]], level: float = 0.95
) -> pd.DataFrame:
    """What each factor of a crossed study is worth: one level against the first, averaged over the other factors.

    Of each seed there is one number an effect, a mean over its own runs, so that seeds stay paired; intervals are over
    seeds that have all arms. Of two factors with two levels each there is also the interaction: by how much the second
    level of one is worth more beside the second level of the other than beside the first.

    Args:
        runs: as for `paired_table`.
        metric: the column compared.
        cells: arm → {factor: its level}; every combination of levels once. Levels count in the order they come in.

    Returns:
        One row a task and effect: task, factor, level, against; gain, gain_low, gain_high, positive for "better"; p,
        p_holm over the effects of the task; n seeds. Of an interaction `factor` is "a × b", `level` "its second
        with its second", `against` "each".

    Raises:
        ValueError: as `paired_table`; cells that are not crossed; runs that lack an arm, or no seed that has all.
    """
    factors, rows = _levels(cells), []
    for task, of_task in _to_pair(runs, metric).groupby("task", sort=False):
        if lacking := [arm for arm in cells if arm not in set(of_task["arm"])]:
            raise ValueError(
                f"arm {lacking[0]!r} is not among the runs of {task}: {', '.join(of_task['arm'].unique())}."
            )
        scores = of_task.pivot(index="seed", columns="arm", values=metric)[list(cells)].dropna().astype(float)
        if scores.empty:
            raise ValueError(f"{task}: no seed has all of {', '.join(cells)}, so effects cannot be paired.")
        sign = 1 if _higher_is_better(of_task, metric) else -1

        def mean_of(asked: Mapping[str, str], scores=scores) -> pd.Series:
            chosen = [arm for arm, of in cells.items() if all(of[name] == value for name, value in asked.items())]
            return scores[chosen].mean(axis=1)

        found = [
            (name, value, levels[0], mean_of({name: value}) - mean_of({name: levels[0]}))
            for name, levels in factors.items()
            for value in levels[1:]
        ]
        for (one, its), (two, others) in combinations(factors.items(), 2):
            if len(its) == len(others) == 2:
                beside = [mean_of({one: its[1], two: x}) - mean_of({one: its[0], two: x}) for x in others]
                found.append((f"{one} × {two}", f"{its[1]} with {others[1]}", "each", beside[1] - beside[0]))
        of_task_rows = []
        for factor, value, against, gains in found:
            gain = mean_interval((sign * gains).to_numpy(), level)
            of_task_rows.append(
                {"task": task, "factor": factor, "level": value, "against": against, "n": gain.n, "p": gain.p}
                | {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
            )
        adjusted = holm([math.nan if row["p"] is None else row["p"] for row in of_task_rows])
        rows += [row | {"p_holm": p} for row, p in zip(of_task_rows, adjusted, strict=True)]
    return pd.DataFrame(rows)


def _to_pair(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs that have a score, if each arm of a task is one thing and each of its seeds there once."""
    for column in ("task", "arm", "seed", metric):
        if column not in runs:
            raise ValueError(
                f"{column!r} is not a column of these runs, which have {', '.join(map(str, runs.columns))}."
            )
    runs = runs.dropna(subset=[metric])
    twice = runs[runs.duplicated(["task", "arm", "seed"], keep=False)]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"{first['task']}, arm {first['arm']}, seed {first['seed']} is there more than once, so seeds do not pair; "
            "choose the runs of one configuration first."
        )
    for (task, arm), group in runs.groupby(["task", "arm"], sort=False):
        if differing := differing_settings(group):
            values = "; ".join(f"{key}: {', '.join(sorted({str(v) for v in group[key]}))}" for key in differing)
            raise ValueError(
                f"{task}, arm {arm}: the runs of its seeds differ in more than the seed ({values}), so they are not "
                "seeds of one arm; choose the runs of one configuration first, or compare with study_table, which "
                "keeps them apart."
            )
    return runs


def crossed(arms: Sequence[str]) -> dict[str, dict[str, str]] | None:
    """The cells of a study whose arms are every combination of levels, as `vary: {kind: grid}` names them, other arms
    aside; else None.

    >>> crossed(["none", "a, x", "a, y", "b, x", "b, y"])["b, x"]
    {'1': 'b', '2': 'x'}
    """
    parts = {arm: arm.split(", ") for arm in arms if ", " in arm and not arm.endswith(", equal compute")}
    widths = {len(of) for of in parts.values()}
    if len(widths) != 1:
        return None
    cells = {arm: {str(n): part for n, part in enumerate(of, start=1)} for arm, of in parts.items()}
    try:
        return cells if all(len(levels) > 1 for levels in _levels(cells).values()) else None
    except ValueError:
        return None


def _levels(cells: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Factor → its levels, in the order they come in."""
    names = list(next(iter(cells.values()), {}))
    levels = {name: list(dict.fromkeys(of.get(name, "") for of in cells.values())) for name in names}
    wanted = set(product(*levels.values()))
    found = [tuple(of.get(name, "") for name in names) for of in cells.values()]
    if not names or len(found) != len(wanted) or set(found) != wanted:
        raise ValueError(
            f"cells: found {len(cells)} arms and {' × '.join(str(len(of)) for of in levels.values()) or 'no'} levels; "
            "effects want every combination of levels once."
        )
    return levels


def _compare(scores: pd.Series, baseline: pd.Series, is_baseline: bool, sign: int, level: float) -> dict:
    own = mean_interval(scores.to_numpy(), level)
    scores = scores.sort_index()
    row = {"n": own.n, "seeds": scores.index.tolist(), "scores": scores.tolist()}
    row |= {"mean": own.mean, "low": own.low, "high": own.high}
    common = [] if is_baseline else [seed for seed in scores.index if seed in baseline.index]
    nothing = Interval(math.nan, math.nan, math.nan, 0, level)
    pair = paired_difference(scores[common], baseline[common], level) if common else nothing
    return row | {
        "difference": pair.mean,
        "difference_low": pair.low,
        "difference_high": pair.high,
        "gain": sign * pair.mean,
        "gain_low": pair.low if sign > 0 else -pair.high,
        "gain_high": pair.high if sign > 0 else -pair.low,
        "gains": (sign * (scores[common] - baseline[common])).tolist(),
        "p": math.nan if pair.p is None else pair.p,
        "pairs": len(common),
        "unpaired": [] if is_baseline else sorted(set(scores.index) ^ set(baseline.index)),
    }


def _higher_is_better(runs: pd.DataFrame, metric: str) -> bool:
    if metric == "score" and "higher_is_better" in runs:
        return bool(runs["higher_is_better"].iloc[0])
    return metric.rpartition(".")[2] not in LOWER_IS_BETTER


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name}: expected one number a seed, found shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: not all are finite: {x.tolist()}. Leave out diverged runs by name and say so.")
    return x


def _paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite("values", values), _finite("baseline", baseline)
    if len(a) != len(b):
        raise ValueError(f"paired values need one baseline each: found {len(a)} values and {len(b)} baselines.")
    return a, b


def _table(name: str, values: Sequence[Sequence[float]]) -> np.ndarray:
    rows = [np.asarray(row, dtype=float) for row in values]
    if not rows or any(row.ndim != 1 or row.shape != rows[0].shape or not len(row) for row in rows):
        raise ValueError(
            f"{name}: every row needs one number a seed, found shapes {sorted({row.shape for row in rows})}."
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: not all are finite. Leave out diverged runs by name and say so.")
    return np.array(rows)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row, (rows, items) each → (rows,); nan where a row is constant."""
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (stats.rankdata(x, axis=1), stats.rankdata(y, axis=1)))
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), norms, out=np.full(len(a), np.nan), where=norms > 0)
