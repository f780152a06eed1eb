"""Similarity with its null band and its interval, without keeping the features of all tokens.

Tokens of one sequence resemble each other, so rows are sequences: a draw takes one valid token of each sequence, the
same token in both models; HSIC is averaged over draws and the ratio comes last. Kept are ``draws`` tokens a sequence.

* Null band: whole sequences of one side are permuted. What CKA reaches then, chance reaches.
* Interval: whole sequences are drawn with replacement. A sequence drawn twice is not two sequences: a pair of copies
  would enter as a perfect match and push every interval up. So sequences get weights (how often they were drawn), and
  pairs of one sequence with itself stay out: the weighted U-statistic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from .cka import cka, cluster_labels, draw_rows, paired_matrices
from .hsic import (
    above_rounding,
    center,
    centered_gram,
    check_estimator,
    gram_scale,
    median_distance,
    paired_rows,
    ratio,
    rbf_gram,
    standardize,
    warn_reasons,
)
from .results import Similarity, SimilarityMatrix


class LayerComparison:
    """All layer pairs, batch by batch: keeps a few tokens a sequence, then gives values, null band and interval.

    Args:
        draws: tokens kept of each sequence (all of a shorter one).
        seed: of the tokens drawn, the permutations and the bootstrap.
        pooled: treat the kept tokens as independent rows, as most tools do. Only to show the inflation this brings.
        standardized: z-score every feature over the kept tokens.
    """

    def __init__(self, draws: int = 8, seed: int = 0, pooled: bool = False, standardized: bool = False) -> None:
        if draws < 1:
            raise ValueError(f"draws is {draws}: at least one token of each sequence is needed")
        self.draws, self.seed, self.pooled, self.standardized = draws, seed, pooled, standardized
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[list[Tensor]] = []  # per layer, per batch: (sequences, draws, d)
        self._lengths: list[Tensor] = []
        self._split = 0
        self._tokens = False

    def update(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], mask: Tensor | None = None
    ) -> LayerComparison:
        """Add a batch: lists of (B, T, d) with mask (B, T), or of (n, d) (one row an example). Returns self."""
        xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
        self._tokens = mask is not None
        if mask is None:
            xs, ys = [x[:, None] for x in xs], [y[:, None] for y in ys]
            mask = torch.ones(xs[0].shape[:2], dtype=torch.bool, device=xs[0].device)
        if not mask.any():
            raise ValueError(
                f"the mask {tuple(mask.shape)} leaves no valid token: True must mark the tokens that count"
            )
        layers = xs + ys
        widths, known = [x.shape[-1] for x in layers], [batches[0].shape[-1] for batches in self._kept]
        if known and (widths != known or len(xs) != self._split):
            raise ValueError(
                f"this batch has layers of widths {widths[: len(xs)]} (student) and {widths[len(xs) :]} (teacher), the "
                f"first one had {known[: self._split]} and {known[self._split :]}: one comparison serves one pair of "
                "models"
            )
        self._kept = self._kept or [[] for _ in layers]
        self._split = len(xs)
        used = mask.any(1)
        lengths = mask[used].sum(1, keepdim=True).cpu()  # (B, 1)
        noise = torch.rand(mask.shape, generator=self._generator)[used.cpu()].masked_fill(~mask[used].cpu(), -1)
        order = noise.argsort(dim=1, descending=True)  # valid tokens first, shuffled: none twice before all once
        draws = self.draws if self._tokens else 1
        picked = order.gather(1, torch.arange(draws)[None] % lengths)  # (B, draws)
        for kept, x in zip(self._kept, layers, strict=True):
            at = picked.to(x.device)
            kept.append(x.detach()[used.to(x.device)][torch.arange(len(at), device=x.device)[:, None], at])
        self._lengths.append(lengths[:, 0])
        return self

    def result(
        self,
        estimator: str = "debiased",
        permutations: int = 200,
        bootstrap: int = 200,
        level: float = 0.95,
        student_numbers: Sequence[int] | None = None,
        teacher_numbers: Sequence[int] | None = None,
        kernel: str = "linear",
        bandwidth: float = 1.0,
    ) -> SimilarityMatrix:
        """Values, null band and interval of all pairs. Memory: one n × n matrix a layer.

        Args:
            kernel: ``"linear"`` or ``"rbf"``, whose bandwidth is given in median distances of a layer's kept tokens.

        Raises:
            ValueError: no or too few sequences, an unknown kernel, or layer numbers that do not fit the layers.
        """
        if kernel not in ("linear", "rbf"):
            raise ValueError(f"kernel {kernel!r} is unknown: choose 'linear' or 'rbf'")
        if not self._kept:
            raise ValueError("no batch yet: call update(student_layers, teacher_layers, mask) first")
        lengths = torch.cat(self._lengths)
        layers = [torch.cat(batches) for batches in self._kept]  # (n, draws, d)
        draws = min(layers[0].shape[1], int(lengths.max()))
        warnings = []
        if self.pooled:  # every sequence brings as many distinct tokens, so that sequences can be permuted whole
            enough = lengths >= draws
            layers, bootstrap = [x[enough.to(x.device)] for x in layers], 0
            warnings.append("Pooled tokens are not independent rows: expect inflated values; no interval is given.")
            if short := int((~enough).sum()):
                warnings.append(
                    f"{short} of {len(lengths)} sequences have fewer than {draws} tokens and were left out."
                )
        n = len(layers[0])
        check_estimator(estimator, n, "sequences" if self._tokens else "rows")
        layers = [x[:, :draws] for x in layers]
        if self.standardized:
            layers = [standardize(x.flatten(0, 1)).view_as(x) for x in layers]
        numbers = (
            _numbers(student_numbers, self._split, "student"),
            _numbers(teacher_numbers, len(layers) - self._split, "teacher"),
        )

        generator = torch.Generator().manual_seed(self.seed + 1)
        orders = torch.stack([torch.randperm(n, generator=generator) for _ in range(permutations)] or [torch.arange(n)])
        orders = orders[:permutations]
        sampled = torch.randint(n, (bootstrap, n), generator=generator)
        weights = torch.zeros(bootstrap, n, dtype=torch.float64).scatter_add_(
            1, sampled, torch.ones(bootstrap, n, dtype=torch.float64)
        )
        if self.pooled:  # a permuted sequence takes its tokens along
            orders = (orders[:, :, None] * draws + torch.arange(draws)).flatten(1)
            features = [[x.flatten(0, 1)] for x in layers]
        else:
            features = [list(x.unbind(1)) for x in layers]
        rows = features[0][0].shape[0]

        sigmas = [bandwidth * median_distance(x.flatten(0, 1), "a layer") for x in layers] if kernel == "rbf" else []
        total: list[Tensor] = []
        for draw in range(len(features[0])):
            centered = [center(f[draw]) for f in features]
            if kernel == "rbf":
                grams = torch.stack([rbf_gram(x, sigma) for x, sigma in zip(centered, sigmas, strict=True)])
                if (
                    estimator == "debiased"
                ):  # weights of the bootstrap are no longer equal: what a row alone has goes before
                    grams = centered_gram(grams, estimator)
            else:
                grams = torch.stack([x @ x.T for x in centered])  # (S + T, rows, rows)
            new = [
                *_sums(grams, self._split, orders, estimator),
                *_bootstrap_sums(grams, self._split, weights, estimator),
            ]
            total = [a + b for a, b in zip(total, new, strict=True)] if total else new
        cross, own, permuted, resampled, resampled_own = total

        values, reasons = ratio(cross, own[: self._split], own[self._split :])
        warnings += reasons
        scale = (own[: self._split, None] * own[self._split :]).clamp_min(0).sqrt()
        null = torch.full_like(values, torch.nan)
        if permutations:
            null = torch.where(values.isnan(), torch.nan, (permuted / scale).quantile(level, dim=0))
        low, high = torch.full_like(values, torch.nan), torch.full_like(values, torch.nan)
        if bootstrap:
            left, right = resampled_own[:, : self._split, None], resampled_own[:, None, self._split :]
            valid = (left > 0) & (right > 0)
            ratios = torch.where(valid, resampled / (left * right).abs().sqrt(), torch.nan)
            if (lost := int((~valid).sum())) and not reasons:
                warnings.append(
                    f"{lost} of {valid.numel()} bootstrap values are NaN (self-HSIC ≤ 0): too few sequences."
                )
            low, high = (ratios.nanquantile(q, dim=0) for q in ((1 - level) / 2, (1 + level) / 2))
        return SimilarityMatrix(
            values=values.cpu().numpy(),
            null=null.cpu().numpy(),
            low=low.cpu().numpy(),
            high=high.cpu().numpy(),
            estimator=estimator,
            n=rows,
            clusters=n if self._tokens else None,
            student_numbers=numbers[0],
            teacher_numbers=numbers[1],
            draws=draws,
            permutations=permutations,
            bootstrap=bootstrap,
            level=level,
            pooled=self.pooled,
            kernel=kernel,
            warnings=tuple(warnings),
        )


def compare_layers(
    student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    mask: Tensor | None = None,
    estimator: str = "debiased",
    draws: int = 8,
    permutations: int = 200,
    bootstrap: int = 200,
    seed: int = 0,
    *,
    pooled: bool = False,
    standardized: bool = False,
    level: float = 0.95,
    student_numbers: Sequence[int] | None = None,
    teacher_numbers: Sequence[int] | None = None,
) -> SimilarityMatrix:
    """CKA of every student layer with every teacher layer, with what chance reaches and an interval.

    Args:
        student_layers: tensors (B, T, d) of the same sequences in both models (or (n, d): one row an example), one a
            layer.
        teacher_layers: the same for the teacher; widths may differ.
        mask: bool (B, T), True where a token counts.
        estimator: ``"debiased"`` or ``"biased"``.
        draws: tokens drawn of each sequence; HSIC is the mean over draws of one token a sequence.
        permutations: of whole sequences, for the null band; 0 leaves it out.
        bootstrap: resamples of whole sequences, for the interval; 0 leaves it out.
        seed: of everything random.
        pooled: the drawn tokens as if they were independent rows, to show the inflation; without an interval. Its null
            band moves whole sequences too, and costs draws² times more: take few permutations.
        standardized: z-score every feature first.
        level: of null band and interval.
        student_numbers, teacher_numbers: layer numbers to show; default 0, 1, 2, …

    Returns:
        :class:`SimilarityMatrix`; for batches that do not fit together in memory see :class:`LayerComparison`.
    """
    comparison = LayerComparison(draws, seed, pooled, standardized).update(student_layers, teacher_layers, mask)
    return comparison.result(estimator, permutations, bootstrap, level, student_numbers, teacher_numbers)


def compare(
    x: Tensor,
    y: Tensor,
    measure: Callable[[Tensor, Tensor], float] = cka,
    clusters: Tensor | Sequence[int] | None = None,
    *,
    estimator: str = "debiased",
    permutations: int = 200,
    bootstrap: int = 200,
    draws: int = 8,
    level: float = 0.95,
    seed: int = 0,
) -> Similarity:
    """One similarity of x (n, p) and y (n, q) with its null band and, for CKA, its interval.

    Args:
        measure: :func:`cka` or any function (x, y) → float, such as those of ``fakit.similarity.measures``. A resample
            repeats rows, which are each other's nearest neighbors and exact matches: only CKA, which can leave such
            pairs out, gets an interval.
        clusters: (n,) the sequence each row belongs to; values are means over ``draws`` of one row each.
    """
    x, y = paired_matrices(x, y)
    labels = torch.arange(len(x)) if clusters is None else cluster_labels(clusters, len(x))
    rows = draw_rows(labels, 1 if clusters is None else draws, seed)  # (draws, n)
    n, groups = rows.shape[1], None if clusters is None else rows.shape[1]
    if measure is cka:
        comparison = LayerComparison(len(rows), seed).update([x[rows.T]], [y[rows.T]])  # (n, draws, d)
        found = comparison.result(estimator, permutations, bootstrap, level)[0, 0]
        return Similarity(found.value, estimator, n, groups, found.null, found.interval, level, "CKA", found.warnings)
    generator = torch.Generator().manual_seed(seed + 1)
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(permutations))]
    reasons: list[str] = []
    values = torch.full((len(orders), len(rows)), torch.nan, dtype=torch.float64)
    for k, order in enumerate(orders):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for draw, r in enumerate(rows):
                values[k, draw] = float(measure(x[r], y[r[order]]))
        # why the value is NaN goes on the result; that its permutations are NaN, too, is no news
        reasons += [str(warning.message) for warning in said if k == 0]
    values, reasons = values.mean(1), list(dict.fromkeys(reasons))
    warn_reasons(reasons)
    null = float(values[1:].quantile(level)) if permutations else None
    name = getattr(measure, "__name__", str(measure)).replace("_", " ")
    return Similarity(float(values[0]), name, n, groups, null, None, level, name, tuple(reasons))


def _numbers(numbers: Sequence[int] | None, count: int, side: str) -> list[int]:
    numbers = list(range(count)) if numbers is None else [int(number) for number in numbers]
    if len(numbers) != count:
        raise ValueError(f"{count} {side} layers, but {len(numbers)} {side}_numbers {numbers}: give one number a layer")
    return numbers


def _sums(grams: Tensor, split: int, orders: Tensor, estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of one draw: all pairs (S, T), each layer with itself (S + T,), and with rows permuted (permutations,
    S, T).
    """
    n = grams.shape[-1]
    centered = centered_gram(grams, estimator)
    scale = gram_scale(n, estimator)
    i, j = torch.triu_indices(n, n, device=grams.device)  # symmetric: half of it says all
    twice = torch.where(i == j, 1.0, 2.0).to(grams)
    halves = centered[:, i, j]  # (S + T, n(n+1)/2)
    cross = (halves[:split] * twice) @ halves[split:].T / scale
    own = above_rounding((halves * halves * twice).sum(1) / scale, grams.square().sum((1, 2)) / scale)
    # Permuting either side is the same: move the one with fewer layers.
    moved, fixed = (
        (slice(0, split), slice(split, None)) if split <= len(grams) - split else (slice(split, None), slice(0, split))
    )
    flat, held = centered[moved].flatten(1), (halves[fixed] * twice).T
    permuted = grams.new_zeros(len(orders), split, len(grams) - split)
    for k, order in enumerate(orders.to(grams.device)):
        product_ = flat.index_select(1, order[i] * n + order[j]) @ held / scale
        permuted[k] = product_ if moved.start == 0 else product_.T
    return cross, own, permuted


def _bootstrap_sums(grams: Tensor, split: int, weights: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """HSIC under weights (R, n): all pairs (R, S, T), and each layer with itself (R, S + T).

    Debiased: mean K_ab L_ab − 2 mean K_ab L_ac + mean K_ab L_cd over *distinct* sequences, each weighted by the product
    of its members' weights. Biased: the plug-in value, tr(K H_w L H_w), in which copies do count.
    """
    total, layers = len(weights), len(grams)
    cross = grams.new_zeros(total, split, layers - split)
    own = grams.new_zeros(total, layers)
    if not total:
        return cross, own
    n = grams.shape[-1]
    w = weights.to(grams)  # (R, n), summing to n
    if estimator == "debiased":
        grams = grams * ~torch.eye(n, dtype=torch.bool, device=grams.device)
    sums = grams @ w.T  # (S + T, n, R): Σ_b w_b K_ab
    totals = torch.einsum("lnr,rn->lr", sums, w)  # wᵀKw
    s2, s3, s4 = (w.pow(k).sum(1) for k in (2, 3, 4))
    pairs_weight = n**2 - s2  # Σ of products of distinct weights: Newton's identities with Σ w = n
    triples_weight = n**3 - 3 * n * s2 + 2 * s3
    quads_weight = n**4 - 6 * n**2 * s2 + 8 * n * s3 + 3 * s2**2 - 6 * s4

    def hsic(k: int, m: int) -> Tensor:
        both = grams[k] * grams[m]
        once, squared = both @ w.T, both @ (w**2).T  # (n, R)
        rows = sums[k] * sums[m]  # (n, R): Σ_bc w_b w_c K_ab L_ac
        pairs = (w.T * once).sum(0)
        if estimator == "biased":
            spread = pairs - 2 / n * (w.T * rows).sum(0) + totals[k] * totals[m] / n**2
            return spread / (n - 1) ** 2
        triples = (w.T * (rows - squared)).sum(0)
        doubled = (w.T**2 * (rows - squared)).sum(0)  # one index shared by both pairs
        quads = totals[k] * totals[m] - 4 * doubled - 2 * (w.T**2 * squared).sum(0)
        return pairs / pairs_weight - 2 * triples / triples_weight + quads / quads_weight

    for s, t in product(range(split), range(layers - split)):
        cross[:, s, t] = hsic(s, split + t)
    for layer in range(layers):
        own[:, layer] = hsic(layer, layer)
    return cross, own
