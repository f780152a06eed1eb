"""Rules on how a run went: its loss over the steps, and what each term was of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from fakit.experiments.doctor.recorded import Arm, Recorded, ends, over, seeds_of
from fakit.experiments.doctor.rule import Lacking, Rule, Seen

LEADS, NOTHING = 0.95, 0.001
FALLS, RISES = 0.15, 0.1
FEWEST = 10  # logged steps; of evaluations half as many
LAST, END = 4, 5  # shares of the steps are taken over the last quarter, the end of a curve is its last fifth


# -- what each term is of the loss ------------------------------------------------------------------------------------


def _weighted(arm: Arm, history: pd.DataFrame) -> pd.DataFrame | str:
    """Weighted terms (steps, terms) of a run, 0 where a term is off in a step; or what is missing for that."""
    rows = history[history["loss"].notna()] if "loss" in history else history[:0]
    names = [name for name in arm.weights if name in rows and rows[name].notna().any()]
    if rows.empty or not names:
        return "logged steps"
    columns = {}
    for name in names:
        if f"weighted/{name}" in rows and rows[f"weighted/{name}"].notna().any():
            columns[name] = rows[f"weighted/{name}"]
        elif f"weight/{name}" in rows and rows[f"weight/{name}"].notna().any():
            columns[name] = rows[name] * rows[f"weight/{name}"]
        else:
            weight = _constant(arm, name)
            if weight is None or arm.config.get("balancing"):
                return "the weights of each step"
            columns[name] = rows[name] * weight
    found = pd.DataFrame(columns).fillna(0.0)
    apart = (found.sum(axis=1) - rows["loss"]).abs().mean()
    return found if apart <= 0.05 * rows["loss"].abs().mean() else "all that the loss is the sum of"


def _constant(arm: Arm, name: str) -> float | None:
    config = arm.config
    term = (config.get("terms") or {}).get(name) or config.get(name) or {}
    found = ends(config.get("task_weight") if name == "task" else term.get("weight", 1.0))
    return found[0] if found and found[0] == found[1] else None


def _shares(recorded: Recorded) -> Iterator[tuple[Arm, list[pd.DataFrame] | Lacking]]:
    """Of each arm of several terms: of each run, the terms' shares of the sum of their sizes, (steps, terms)."""
    for arm in recorded.arms:
        if len(arm.weights) < 2:
            continue
        found = [_weighted(arm, history) for history in arm.histories]
        if lacking := [one for one in found if isinstance(one, str)]:
            yield arm, Lacking(lacking[0], len(lacking))
            continue
        sizes = [one.abs() for one in found if not isinstance(one, str)]
        yield arm, [one.div(one.sum(axis=1), axis=0) for one in sizes]


def _leads(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm, shares in _shares(recorded):
        if isinstance(shares, Lacking):
            yield shares
            continue
        last = [one.tail(max(1, len(one) // LAST)).mean() for one in shares]
        typical = pd.concat(last, axis=1).median(axis=1)
        typical = typical[typical > 0]  # others were turned off by then, as in stages
        if len(typical) < 2:
            continue
        name = typical.idxmax()
        if typical[name] >= LEADS:
            rest = ", ".join(f"{other} {share:.1%}" for other, share in typical.drop(name).items())
            numbers = f"{name} is {typical[name]:.1%} of the loss over the last quarter of the steps ({rest})"
            yield Seen(arm.task, (arm.name,), f"{numbers}, {over(arm)}")


def _nothing(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm, shares in _shares(recorded):
        if isinstance(shares, Lacking):
            yield shares
            continue
        top = pd.concat([one.max() for one in shares], axis=1).max(axis=1)
        for name, weight in arm.weights.items():
            share = top.get(name, 0.0)
            if share < NOTHING and not (name not in top and arm.maps_nothing(name)):
                numbers = f"{name} is never more than {share:.2g} of the loss, at a weight of {weight:g}"
                yield Seen(arm.task, (arm.name,), f"{numbers}, in {seeds_of(arm)}")


# -- the loss over the steps ------------------------------------------------------------------------------------------


def _curve(history: pd.DataFrame) -> tuple[str, np.ndarray] | None:
    """The validation loss where it was evaluated often enough, else the training loss; None of too few steps."""
    for column, name, fewest in (("eval_loss", "validation loss", FEWEST // 2), ("loss", "training loss", FEWEST)):
        if column in history and len(values := history[column].dropna().to_numpy(float)) >= fewest:
            return name, values
    return None


def _curves(recorded: Recorded) -> Iterator[tuple[Arm, list[tuple[str, np.ndarray]] | Lacking]]:
    for arm in recorded.arms:
        if "training" not in arm.config:
            continue
        found = [_curve(history) for history in arm.histories]
        known = [one for one in found if one is not None]
        if arm.changes:
            yield arm, Lacking("one loss from start to end (weights, losses or texts change over training)", len(found))
        elif len(known) < len(found):
            yield arm, Lacking(f"{FEWEST} logged losses or {FEWEST // 2} evaluations", len(found) - len(known))
        else:
            yield arm, known


def _windows(values: np.ndarray) -> np.ndarray:
    """Running means over a fifth of the curve."""
    size = max(2, len(values) // END)
    return np.convolve(values, np.ones(size) / size, mode="valid")


def _top(values: np.ndarray) -> float:
    """Where a curve falls from: its first value, or a later height, as that of a student that training first harms."""
    return max(float(values[0]), float(_windows(values).max()))


def _falls(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm, curves in _curves(recorded):
        if isinstance(curves, Lacking):
            yield curves
            continue
        parts = []
        for _, values in curves:
            size, means = max(2, len(values) // END), _windows(values)
            before, end, top = means[-1 - size], means[-1], _top(values)
            parts.append((before - end) / (top - end) if top > end else 0.0)
        if min(parts) > 0 and (part := float(np.median(parts))) >= FALLS:
            first, last = np.mean([(_top(values), _windows(values)[-1]) for _, values in curves], axis=0)
            numbers = f"the {curves[0][0]} fell from {first:.3g} to {last:.3g}, by {part:.0%} of that in the last fifth"
            yield Seen(arm.task, (arm.name,), f"{numbers} of {_steps(arm)}, {over(arm)}")


def _rises(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm, curves in _curves(recorded):
        if isinstance(curves, Lacking):
            continue  # said by the rule before
        risen = []
        for _, values in curves:
            means = _windows(values)
            lowest, end = means.min(), means[-1]
            way = max(abs(lowest), values[0] - lowest)
            risen.append((end - lowest) / way if way > 0 else 0.0)
        if min(risen) >= RISES:
            lows, ends = (np.mean([at(_windows(values)) for _, values in curves]) for at in (np.min, lambda x: x[-1]))
            part = float(np.median(risen))
            numbers = f"the {curves[0][0]} rose from its lowest, {lows:.3g}, to {ends:.3g} at the end of {_steps(arm)}"
            yield Seen(arm.task, (arm.name,), f"{numbers} ({part:.0%} of its fall), {over(arm)}")


def _steps(arm: Arm) -> str:
    return f"{arm.records[0]['steps']:,} steps" if arm.records[0].get("steps") else "the run"


def _diverged(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        seeds = [r["seed"] for r, score in zip(arm.records, arm.scores, strict=True) if not np.isfinite(score)]
        where = [_first_lost(history) for history in arm.histories]
        steps = [f"step {step} of seed {r['seed']}" for r, step in zip(arm.records, where, strict=True) if step]
        seen = [f"no score in {len(seeds)} of {seeds_of(arm)}"] if seeds else []
        seen += [f"the loss is no number from {', '.join(steps)}"] if steps else []
        if seen:
            yield Seen(arm.task, (arm.name,), "; ".join(seen))


def _first_lost(history: pd.DataFrame) -> int | None:
    """The first logged step whose loss is null: JSON has no NaN."""
    if "loss" not in history or "learning_rate" not in history:
        return None
    lost = history.index[history["loss"].isna() & history["learning_rate"].notna()]  # an evaluation has no rate
    return int(lost[0]) if len(lost) else None


RULES = (
    Rule(
        "diverged",
        "error",
        "a run has no score, or a logged loss that is no number",
        "NaN is no result, and no mean counts it",
        "The student's weights are NaN or infinite from some step on.",
        "A lower `training.learning_rate`, a longer `warmup`, `training_args: {max_grad_norm: 1.0}`, `bf16: false`.",
        _diverged,
    ),
    Rule(
        "loss still falls",
        "warning",
        f"from the fourth fifth of the steps to the last, the mean loss fell by {FALLS:.0%} or more of all that it "
        "fell from its highest, and it fell in every seed",
        "a straight line would fall by 20 % and more; a run that is long enough has made its way before",
        "The run may be too short: then arms are compared by how fast they learn, not by how far.",
        "More `training.steps`; then compare again, also at equal compute.",
        _falls,
    ),
    Rule(
        "loss rises",
        "warning",
        f"at the end the loss (mean of a fifth of the steps) lies above its lowest by {RISES:.0%} of the way that it "
        "fell, and of its lowest, in every seed",
        "less is the noise of batches; where evaluations are logged, the validation loss is looked at",
        "A validation loss that rises: the student learns its training texts by heart. A training loss that rises: the "
        "steps are too large.",
        "Fewer steps or more unlabeled text; or a lower `training.learning_rate`.",
        _rises,
    ),
    Rule(
        "a term leads",
        "warning",
        f"one of several terms is at least {LEADS:.0%} of the weighted sum over the last quarter of the steps",
        "the others together are then less than a twentieth",
        "The other terms hardly count. A share of the loss is no share of the gradient, so it may be as meant "
        "(MobileBERT's hidden states are large).",
        "Compare the gradients (notebook 04); lower its `weight`, standardize it (`standardize: dimension`), or set "
        "`balancing: gradient_norm`.",
        _leads,
    ),
    Rule(
        "a term at zero",
        "warning",
        f"a term with a weight above 0 is never more than {NOTHING:g} of the weighted sum",
        "below a thousandth a term hardly moves the student, whatever its gradient",
        "The term compares what is equal already, or its weight is too small to matter.",
        "Raise its `weight`, or leave the term out and save its cost.",
        _nothing,
    ),
)
