"""Centered kernel alignment (Kornblith et al., 2019) of two sets of features, and of all pairs of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hsic import (
    centered_gram,
    check_estimator,
    double,
    gram_scale,
    hsic_matrix,
    median_distance,
    paired_rows,
    ratio,
    rbf_gram,
    standardize,
    valid_rows,
    warn_reasons,
)
from .streaming import StreamingCKA


def cka(
    x: Tensor,
    y: Tensor,
    estimator: str = "debiased",
    clusters: Tensor | Sequence[int] | None = None,
    *,
    kernel: str = "linear",
    bandwidth: float = 1.0,
    standardized: bool = False,
    draws: int = 32,
    seed: int = 0,
) -> float:
    """CKA of paired features: HSIC(X, Y) / √(HSIC(X, X) · HSIC(Y, Y)).

    Args:
        x: (n, p) features, any floating dtype; computed in float64.
        y: (n, q) features of the same examples, row for row.
        estimator: ``"debiased"`` (0 on average for independent data; may be negative) or ``"biased"`` (tends to 1 as
            features outnumber rows: never compare it across n).
        clusters: (n,) integers, the sequence each row is a token of. Tokens of one sequence are not independent, so
            each draw takes one row of each cluster, HSIC is averaged over draws, the ratio comes last. Debiased linear
            CKA averages over *all* draws, exactly; otherwise over ``draws`` of them.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: of the RBF kernel, in median distances; the larger, the closer to linear.
        standardized: z-score every feature first, so that no rogue dimension decides alone.
        draws: how many draws where the average over all of them has no closed form.
        seed: of the draws.

    Returns:
        A float. NaN, with a RuntimeWarning naming the reason, where a self-HSIC is ≤ 0.

    Raises:
        ValueError: row counts differ, fewer rows (or clusters) than the estimator needs, NaN or infinity,
            unknown names.

    Example:
        >>> x = torch.randn(100, 8)
        >>> round(cka(x, 3 * x + 1), 6)
        1.0
    """
    x, y = paired_matrices(x, y)
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"kernel {kernel!r} is unknown: choose 'linear' or 'rbf'")
    if standardized:
        x, y = standardize(x), standardize(y)
    labels = torch.arange(x.shape[0]) if clusters is None else cluster_labels(clusters, x.shape[0])
    labels = labels.to(x.device)
    check_estimator(estimator, len(labels.unique()), "rows" if clusters is None else "clusters")
    if clusters is not None and kernel == "linear" and estimator == "debiased":
        return float(_exact_clusters(x, y, labels))
    rows_drawn = labels[None] if clusters is None else draw_rows(labels, draws, seed)  # (draws, clusters)
    if kernel == "linear":
        sums = [hsic_matrix([x[rows]], [y[rows]], estimator) for rows in rows_drawn]
    else:
        sigmas = bandwidth * median_distance(x, "x"), bandwidth * median_distance(y, "y")
        sums = [_rbf_hsic(x[rows], y[rows], estimator, sigmas) for rows in rows_drawn]
    sums = [sum(parts) for parts in zip(*sums, strict=True)]
    value, reasons = ratio(*sums, names=("x", "y"))
    warn_reasons(reasons)
    return float(value)


def cka_matrix(
    student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    mask: Tensor | None = None,
    estimator: str = "debiased",
    *,
    standardized: bool = False,
    route: str | None = None,
) -> Tensor:
    """CKA of every student layer with every teacher layer, from features in memory: one pass for all pairs.

    Args:
        student_layers: tensors (n, d), or (B, T, d) whose valid tokens are the rows; one a layer.
        teacher_layers: the same for the teacher.
        mask: bool (B, T), True where a token counts.
        estimator: ``"debiased"`` or ``"biased"``.
        standardized: z-score every feature first.
        route: ``"gram"`` (n × n matrices, in blocks) or ``"features"`` (p × q matrices); None takes the cheaper.

    Returns:
        (student layers, teacher layers), float64.
    """
    xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
    xs, ys = valid_rows(xs, mask), valid_rows(ys, mask)
    check_estimator(estimator, xs[0].shape[0])
    if standardized:
        xs, ys = [standardize(x) for x in xs], [standardize(y) for y in ys]
    values, reasons = ratio(*hsic_matrix(xs, ys, estimator, route))
    warn_reasons(reasons)
    return values


def hsic(x: Tensor, y: Tensor, estimator: str = "debiased") -> float:
    """HSIC of (n, p) and (n, q) with linear kernels. Debiased,
    its mean is the squared norm of the covariance matrix.
    """
    x, y = paired_matrices(x, y)
    check_estimator(estimator, x.shape[0])
    return float(hsic_matrix([x], [y], estimator)[0])


def draw_rows(labels: Tensor, draws: int, seed: int) -> Tensor:
    """Row numbers (draws, clusters): each draw takes one row of each cluster 0 … c − 1 of ``labels`` (n,).

    A cluster's rows come in a random order and are taken in turn, so none is taken twice before all were taken once.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: at least one draw is needed")
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = shuffle[labels[shuffle].argsort(stable=True)]  # rows by cluster, random within
    sizes = labels.bincount()
    turn = torch.arange(draws, device=labels.device)[:, None] % sizes
    return order[sizes.cumsum(0) - sizes + turn]


def paired_matrices(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(n, p) and (n, q) in float64; ValueError where they are no finite matrices of paired rows."""
    x, y = double(x), double(y)
    for name, z in (("x", x), ("y", y)):
        if z.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(z.shape)}: expected (n, features); tokens (B, T, d) go to compare_layers"
            )
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"row i of x is compared with row i of y, but x has {x.shape[0]} rows and y has {y.shape[0]}")
    for name, z in (("x", x), ("y", y)):
        if not z.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: leave those rows out, or mend the model")
    return x, y


def cluster_labels(clusters: Tensor | Sequence[int], n: int) -> Tensor:
    """One label a row as whole numbers from 0, (n,); ValueError for another number of labels."""
    clusters = torch.as_tensor(clusters)
    if clusters.shape != (n,):
        raise ValueError(
            f"clusters has shape {tuple(clusters.shape)}, the features have {n} rows: give one label a row"
        )
    return clusters.unique(return_inverse=True)[1]


def _exact_clusters(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    sizes = labels.bincount()
    order = labels.argsort(stable=True)
    mask = torch.arange(int(sizes.max()), device=labels.device) < sizes[:, None]  # (clusters, longest)
    padded = []
    for z in (x, y):
        layer = z.new_zeros(*mask.shape, z.shape[1])
        layer[mask] = z[order]
        padded.append(layer)
    return StreamingCKA(clusters=True).update([padded[0]], [padded[1]], mask).matrix()


def _rbf_hsic(x: Tensor, y: Tensor, estimator: str, sigmas: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    k, m = (centered_gram(rbf_gram(z, sigma), estimator) for z, sigma in zip((x, y), sigmas, strict=True))
    scale = gram_scale(x.shape[0], estimator)
    return (k * m).sum().view(1, 1) / scale, (k * k).sum().view(1) / scale, (m * m).sum().view(1) / scale
