"""One example of every figure, from seeded numbers: what the tests draw, and what a developer looks at.

`python tests/figures/gallery.py DIR` writes each as SVG and one HTML page with the interactive forms.
"""

import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fakit import figures as draw
from fakit.recipes.survey import survey

TOKENS = ["[CLS]", "the", "film", "is", "not", "as", "bad", "as", "they", "say", ",", "really", "[SEP]"]
ARMS = ("none", "outputs", "features", "attention", "all")


def _attention(rng, sharp):
    scores = np.exp(sharp * rng.normal(size=(len(TOKENS), len(TOKENS))))
    return scores / scores.sum(1, keepdims=True)


def _summary(rng, tasks, arms, center, spread):
    rows = []
    for task in tasks:
        for i, name in enumerate(arms):
            seeds = center + 0.4 * spread * i + spread * rng.normal(size=5) * 0.5
            half = 2.776 * seeds.std(ddof=1) / np.sqrt(5)
            mean = seeds.mean()
            rows.append(
                {"task": task, "arm": name, "mean": mean, "low": mean - half, "high": mean + half, "seeds": list(seeds)}
            )
    return rows


def _by_layer(errors, divergences):
    """Rows as `QuantizationFidelity.rows()` gives them."""
    pairs = enumerate(zip(errors, divergences, strict=True))
    return [{"layer": i, "relative_error": error, "attention_jsd": divergence} for i, (error, divergence) in pairs]


def _map_rows(rng):
    """As `fakit.experiments.map_scores` gives them, with intervals."""
    rows = []
    for task, center in (("glosses", 0.71), ("reviews", 0.82)):
        maps = [(f"{a}-{b}-{c}", "increasing") for a in range(1, 5) for b in range(a + 1, 6) for c in range(b + 1, 7)]
        for name, kind in [*maps, ("none", "none"), ("reverse", "reverse"), ("random", "random")]:
            cka = {"none": np.nan, "reverse": 0.31, "random": 0.42}.get(kind, rng.uniform(0.4, 0.9))
            score = center + (0.03 * cka if kind == "increasing" else -0.02) + 0.01 * rng.normal()
            ends = {"low": score - 0.008, "high": score + 0.008, "scores": (score - 0.01, score, score + 0.01)}
            rows.append({"task": task, "map": name, "kind": kind, "cka": cka, "score": score, **ends})
    return rows


def _cell_rows(rng):
    """As `gains_in_cells` gives them: alignment pays where the student starts from nothing; a state space model has no
    attention.
    """
    rows = []
    for cell in product(("copied", "random", "Mamba"), ("250", "1000", "4000"), ("100 steps", "400 steps")):
        for terms in ("none", "outputs + features", "outputs + attention", "all"):
            if cell[0] == "Mamba" and terms in ("outputs + attention", "all"):
                continue
            gain = rng.normal(0, 1.5) + 20 * (cell[0] == "random" and terms != "none")
            half = abs(rng.normal(2, 1))
            ends = {"gain": gain, "gain_low": gain - half, "gain_high": gain + half}
            verdict = "gain" if gain - half > 1 else "loss" if gain + half < -1 else "not sure"
            rows.append({"task": "scans", "cell": cell, "arm": terms, "n": 5, **ends, "verdict": verdict})
    return rows


PRICES = {1: 0.402, 2: 0.173, 3: 0.113, 4: 0.215, 5: 0.203, 6: 1.737}


def _ranks():
    """Rows as `Plan.rows` gives them: the lower blocks of six cut, the upper ones whole."""
    weights = {"attention.self.query": 147_456, "attention.output.dense": 147_456, "output.dense": 589_824}
    return [
        SimpleNamespace(
            layer=i,
            module=f"encoder.layer.{i - 1}.{name}",
            rank=40 if i < 4 else None,
            before=size,
            after=size // 4 if i < 4 else size,
            error=0.7 - 0.02 * i - 0.01 * k if i < 4 else 0.0,
            stable_rank_weights=9.5,
        )
        for i in range(1, 7)
        for k, (name, size) in enumerate(weights.items())
    ]


def _peaks():
    """A teacher of two peaks, and what four losses might make of one bump."""

    def bump(center, width):
        powers = np.exp(-(((np.arange(41) - center) / width) ** 2) / 2)
        return powers / powers.sum()

    fits = {
        "forward_kl": bump(17, 11),
        "reverse_kl": bump(11, 2.5),
        "jsd": bump(18, 11),
        "skew_reverse_kl": bump(12, 3),
    }
    return 0.6 * bump(11, 2.5) + 0.4 * bump(29, 3.5), fits


def _tail(exponent):
    powers = np.arange(1.0, 41.0) ** -exponent
    return powers / powers.sum()


def examples() -> dict[str, draw.Figure]:
    """name → Figure, every public figure function at least once."""
    rng = np.random.default_rng(0)
    cka = np.clip(
        1 - 0.16 * np.abs(np.arange(4)[:, None] * 2 - np.arange(7)) + 0.03 * rng.normal(size=(4, 7)), -0.01, 0.99
    )
    cka[0, 5:] = -0.004
    teacher, student = _attention(rng, 1.6), _attention(rng, 0.8)
    causal = np.tril(np.ones((len(TOKENS), len(TOKENS)), bool))
    logits = {"teacher": np.array([3.2, 1.1, -0.4]), "student": np.array([2.0, 1.3, 0.2])}

    def soft(name, tau):
        powers = np.exp(logits[name] / tau)
        return powers / powers.sum()

    steps = np.arange(0, 300, 3)
    history = [
        {"step": int(s), "task": 0.7 * np.exp(-s / 150), "features": 1.2 * np.exp(-s / 80) + 0.1, "attention": 0.5 * np.exp(-s / 60) + 0.05,
         "outputs": 0.9 * np.exp(-s / 100) + 0.08, "learning_rate": 1e-4} for s in steps
    ]  # fmt: skip
    for row in history:
        row["total"] = row["task"] + row["features"] + row["attention"] + row["outputs"]
    long = 120
    wide = np.tril(np.exp(-np.abs(np.subtract.outer(np.arange(long), np.arange(long))) / 8.0))
    wide /= wide.sum(1, keepdims=True)
    shares = {
        name: rng.dirichlet(np.r_[k, np.ones(100)])
        for name, k in (("T0", 2), ("T3", 60), ("T6", 30), ("S1", 20), ("S3", 8))
    }
    bins = {
        name: [
            {"confidence": c, "accuracy": np.clip(c - gap * c, 0, 1), "count": int(400 * c**3)}
            for c in np.linspace(0.4, 0.97, 8)
        ]
        for name, gap in (("teacher", 0.03), ("student", 0.14))
    }
    n = [16, 32, 64, 128, 256, 512, 1024]
    biased = np.array([768 / (768 + k) for k in n]) + 0.01 * rng.normal(size=(20, 7))
    tasks = ("glosses", "reviews", "scans")
    return {
        "story": draw.distillation_story(),
        "story_12_to_24": draw.distillation_story([(i, 2 * i) for i in range(1, 13)], 12, 24),
        "softened": draw.softened({t: (soft("teacher", t), soft("student", t)) for t in (1, 2, 4, 8)}, ["positive", "neutral", "negative"]),
        "map": draw.layer_map([(1, 2), (2, 4), (3, 6)], 3, 6),
        "map_similarity": draw.layer_map([(1, 6), (2, 4), (3, 2)], 3, 6, cka, title="Layer map ‘reverse’"),
        "map_gallery": draw.layer_map_gallery({"uniform": [(1, 2), (2, 4), (3, 6)], "reverse": [(1, 6), (2, 4), (3, 2)], "none": [], "all to one": [(1, 6), (2, 6), (3, 6)], "last": [(1, 4), (2, 5), (3, 6)]}, 3, 6),
        "map_12_to_24": draw.layer_map([(i, 2 * i) for i in range(1, 13)], 12, 24, np.full((13, 25), 0.62)),
        "map_experiment": draw.map_experiment(
            _map_rows(np.random.default_rng(1)), {"glosses": SimpleNamespace(mean=0.41, low=-0.05, high=0.74, n=20), "reviews": SimpleNamespace(mean=-0.2, low=-0.6, high=0.3, n=20)},
            {"glosses": "test accuracy", "reviews": "test accuracy"},
        ),
        "map_experiment_one": draw.map_experiment(_map_rows(np.random.default_rng(2))[:23]),
        "similarity": draw.similarity_heatmap(cka, null=0.12, low=cka - 0.05, high=cka + 0.05, map_pairs=[(1, 2), (2, 4), (3, 6)]),
        "similarity_25": draw.similarity_heatmap(np.linspace(0, 1, 13 * 25).reshape(13, 25), null=0.2),
        "similarity_pair": draw.similarity_panels({"biased": np.clip(cka + 0.2, 0, 1), "debiased": cka}, {"debiased": 0.12}, map_pairs=[(1, 2), (2, 4), (3, 6)]),
        "similarity_three": draw.similarity_panels({"copied": cka, "random": cka / 4, "distilled": np.sqrt(np.clip(cka, 0, 1))}),
        "similarity_steps": draw.similarity_over_steps([0, 20, 40, 60], {"S1 and T2": [0.97, 0.96, 0.97, 0.98], "S2 and T4": [0.7, 0.8, 0.86, 0.88], "S3 and T6": [0.4, np.nan, 0.7, 0.8]}),
        "bias": draw.bias_curve(n, biased, 0.01 * rng.normal(size=(20, 7))),
        "rogue": draw.rogue_dimensions(shares),
        "rogue_scrub": draw.rogue_scrub(
            {"S1 and T2": [0.97, 0.72, 0.6, 0.58], "S3 and T6": [0.5, 0.52, np.nan, 0.5]},
            {"S1": [0, 0.31, 0.4, 0.42], "T2": [0, 0.3, 0.38, 0.41], "S3": [0, 0.02, 0.03, 0.05], "T6": [0, 0.01, 0.02, 0.03]}, 1,
        ),
        "attention": draw.attention_pair(teacher, student, TOKENS),
        "attention_causal": draw.attention_pair(
            np.tril(teacher) / np.tril(teacher).sum(1, keepdims=True), np.tril(student) / np.tril(student).sum(1, keepdims=True),
            TOKENS, causal, teacher_name="teacher, T6, head 3", student_name="student, S3, head 3",
        ),
        "attention_long": draw.attention_pair(wide, wide[:, ::1] * 0.9, [f"tok{i}" for i in range(long)], np.tril(np.ones((long, long), bool))),
        "heads": draw.head_matching(rng.uniform(0.1, 0.9, size=(12, 12)), [(i, (5 * i) % 12) for i in range(12)]),
        "profiles": draw.head_profiles({"T2": (rng.uniform(size=12), rng.uniform(size=12)), "S1": (rng.uniform(size=12), rng.uniform(size=12))}),
        "attributions": draw.token_attributions(rng.normal(size=len(TOKENS)), rng.normal(size=len(TOKENS)), TOKENS),
        "rollout": draw.rollout(teacher[0], student[0], TOKENS),
        "fitted": draw.fitted_students(*_peaks()),
        "fitted_one": draw.fitted_students(_peaks()[0], {"jsd, beta = 0.50": _peaks()[1]["jsd"]}),
        "class_pulls": draw.class_pulls(
            _tail(1.0), _tail(0.5), {"forward_kl": _tail(0.5) - _tail(1.0), "logit_mse": np.sin(np.arange(40.0)), "rlkd": np.r_[1.0, -1.0, np.zeros(38)]},
            {"head": (0, 2), "tail": (28, 39)},
        ),
        "by_temperature": draw.by_temperature(
            [0.5, 1, 2, 4, 8], {"forward_kl": [0.2, 0.4, 0.8, 0.95, 0.99], "tvd": [-0.1, 0.2, 0.3, 0.6, 0.8]}, {"forward_kl": [0.4, 0.2, 0.16, 0.2, 0.21], "tvd": [0.1, 0.15, 0.2, 0.4, 0.8]},
        ),
        "moved_logit": draw.moved_logit(
            np.linspace(-1, 3, 9), {"B": [1, 1, 1, 1.5, 2, 2.5, 3, 3, 3], "A": [3, 3, 3, 3, 3, 2.5, 2, 2, 2], "C": [2, 2, 2, 1.5, 1, 1, 1, 1, 1]},
            {"rlkd, k = 2": np.linspace(0, 1.5, 9), "MOR@2": [0.5] * 4 + [1.0] * 5}, 1.5,
        ),
        "texts": draw.texts_beside(
            "the house", {"teacher": [(c, c) for c in "the house"], "student": [("t", "t"), ("b", "h"), ("", "e"), (" ", ""), *((c, c) for c in " house")]},
            {"student": "CER 33.3%"},
        ),
        "texts_long": draw.texts_beside("ab " * 40, {"student": [("x", "a"), *((c, c) for c in ("ab " * 40)[1:])]}),
        "passes": draw.draft_passes(list("the house"), list("tbe house"), [0.9, 0.3, 0.8, 1.0, 0.7, 0.9, 0.95, 0.99, 0.6], [2, 3, 3, 1], 2, 0.5),
        "passes_words": draw.draft_passes(["It", " is", " a", " substance", "."], ["It", " is", " a", " place", "."], [0.9, 0.8, 0.9, 0.2, 0.9], [4, 1], 4),
        "losses": draw.loss_curves(history, events=[{"step": 120, "name": "features", "old": 1.0, "new": 0.3}]),
        "loss_bars": draw.loss_bars({"features": 0.41, "outputs": 0.92, "task": 1.3}, {"features": 1.0, "attention": 0.0, "outputs": 0.5, "task": 1.0}),
        "gradients": draw.gradient_bars({"features": 2.31, "attention": 0.42, "outputs": 1.17, "task": 0.66}),
        "conflict": draw.gradient_conflict(
            [[1, 0.4, 0.2, -0.1], [0.4, 1, 0.3, 0.05], [0.2, 0.3, 1, 0.7], [-0.1, 0.05, 0.7, 1]], ["features", "attention", "outputs", "task"]
        ),
        "runs": draw.runs_overview(
            [{"run_id": f"{a}-{i}", "arm": a, "seed": i, "cost": c, "quality": q + i, "steps": list(range(0, 100, 10)), "values": list(np.exp(-np.arange(10) / (3 + i))), "chosen": a == "all"}
             for a, c, q in (("none", 6.3, 70), ("features", 13.5, 71), ("all", 13.6, 77)) for i in range(2)]
            + [{"run_id": "t", "arm": "teacher", "seed": 0, "cost": None, "quality": 83, "steps": [], "values": [], "chosen": False}],
            [(6.3, 70.5), (13.5, 71.5), (13.6, 77.5)], "loss", "training FLOPs (10¹²)", "accuracy (%)",
        ),
        "pulls": draw.term_pulls(
            {"features": 0.22, "attention": 0.0, "outputs": 3.38, "task": 1.19},
            {part: {"features": f, "attention": 0.0, "outputs": o, "task": t}
             for part, f, o, t in (("all", 0.98, 21.6, 11.6), ("S0", 0.91, 16.4, 8.6), ("S1", 0.28, 9.4, 5.2), ("S2", 0, 7.8, 4.2), ("head", 0, 2.0, 1.2))},
            [[1, 0.65, 0.53, np.nan], [0.65, 1, 0.4, -0.34], [0.53, 0.4, 1, 0.88], [np.nan, -0.34, 0.88, 1]],
        ),
        "differences": draw.paired_differences(_summary(rng, tasks, ARMS[1:], -0.4, 2.5), metrics={t: "points gained over ‘none’" for t in tasks}),
        "cells": draw.gain_by_cell(_cell_rows(rng), "outputs", "points of CER"),
        "scores": draw.scores_by_arm(
            _summary(rng, tasks, ARMS, 80, 3),
            {"glosses": {"teacher": 91.2}, "reviews": {"teacher": 90.1}, "scans": {"teacher": 92.0, "leave as is": 78.0}},
            {"glosses": "accuracy (%)", "reviews": "accuracy (%)", "scans": "characters right (%)"},
        ),
        "scores_one": draw.scores_by_arm(_summary(rng, tasks[:1], (*ARMS, "all, equal compute"), 80, 3), {"glosses": {"teacher": 91.2}}, {"glosses": "accuracy (%)"}),
        "retention": draw.retention(_summary(rng, tasks, ARMS, 0.88, 0.03)),
        "pareto": draw.pareto(
            [{"name": "teacher", "cost": 22.7, "quality": 91, "low": 90.2, "high": 91.8}, {"name": "all", "cost": 12.1, "quality": 89, "low": 88, "high": 90},
             {"name": "none", "cost": 12.4, "quality": 82, "low": 80, "high": 84}, {"name": "features, 2 layers", "cost": 6.2, "quality": 85, "low": 83.5, "high": 86.5}]
        ),
        "sensitivity": draw.weight_sensitivity(
            [{"term": t, "weight": w, "mean": m, "low": m - 1, "high": m + 1.2, "seeds": [m - 0.6, m, m + 0.7]}
             for t in ("features", "attention", "outputs") for w, m in ((0, 80), (0.1, 82), (1, 85), (10, 83))]
        ),
        "reliability": draw.reliability(bins),
        "quantization": draw.quantization_by_layer(
            {"8bit": _by_layer([0, 0.023, 0.032, 0.035, 0.037, 0.038, 0.047], [None, 1.7e-5, 3e-4, 2.4e-4, 2.4e-4, 2.7e-4, 3e-4]),
             "4bit": _by_layer([0, 0.089, 0.125, 0.147, 0.163, 0.176, 0.238], [None, 9e-4, 3.3e-3, 3.8e-3, 4.1e-3, 4.9e-3, 5.7e-3])},
            {"student, before training": {3: 0.71, 6: 0.94}},
        ),
        "memory": draw.memory_bars(
            {"full precision": {"teacher": 28e9, "student": 14e9, "gradients": 14e9, "optimizer": 28e9, "activations": 6e9},
             "8-bit teacher": {"teacher": 7.6e9, "student": 14e9, "gradients": 14e9, "optimizer": 28e9, "activations": 6e9},
             "4-bit teacher": {"teacher": 4.1e9, "student": 14e9, "gradients": 14e9, "optimizer": 28e9, "activations": 6e9}}, limit=80e9,
        ),
        "plan": draw.memory_plan(
            {"as asked": {"teacher weights": 9e9, "teacher activations": 1e9, "captured traces": 1.1e9, "student weights": 4e9,
                          "student activations": 11e9, "gradients": 3e9, "optimizer state": 8e9, "losses": 5e9, "overhead": 1.5e9},
             "gradient checkpointing": {"teacher weights": 9e9, "captured traces": 1.1e9, "student weights": 4e9,
                                        "student activations": 3e9, "optimizer state": 8e9, "losses": 5e9, "overhead": 1.5e9}},
            40e9, "A100 40GB", {"RTX 3060": 12e9, "T4": 16e9, "L4": 24e9, "H100": 80e9}, title="Llama-3.1-8B → 8 layers × 2048",
        ),
        "survey": draw.what_is_aligned(survey()),
        "rank_plan": draw.rank_plan(_ranks(), before=22_718_606, after=18_174_350),
        "layer_prices": draw.layer_prices(PRICES),
        "layers_left_out": draw.layer_prices(PRICES, gone=[2, 5], together=0.9),
    }  # fmt: skip


def main(folder: Path) -> None:
    """Write every example to `folder`."""
    from plotly.offline import get_plotlyjs

    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<meta charset=utf-8><script>{get_plotlyjs()}</script>"]
    for name, figure in examples().items():
        figure.save(folder / f"{name}.svg")
        parts.append(figure.plotly.to_html(include_plotlyjs=False, full_html=False))
    (folder / "gallery.html").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
