"""Measures beside CKA. None dominates (Klabunde et al., ReSi, 2025): show two families, and each with its null.

Every function takes x (n, p) and y (n, q), rows paired, and returns a float; ``compare(x, y, measure=…)`` adds the null
band. Where the data have no such similarity it is NaN, with a RuntimeWarning that says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cka import paired_matrices
from .hsic import center, centered_gram, check_estimator, double, warn_reasons


def procrustes(x: Tensor, y: Tensor) -> float:
    """Orthogonal Procrustes similarity in [0, 1]: ‖XᵀY‖_* of centered features of unit Frobenius norm;
    1 = equal up to a rotation.

    ‖X − YQ‖²_F at the best orthogonal Q is 2 − 2 × this (Williams et al., 2021; Ding et al., 2021). With few rows and
    wide features a rotation fits anything: independent Gaussians at n = 30, d = 768 score .99. Read it beside its null.

    Raises:
        ValueError: row counts differ, or a side is constant.
    """
    factors = []
    for name, z in zip("xy", _paired(x, y), strict=True):
        z = center(z)
        norm = torch.linalg.matrix_norm(z)
        if norm == 0:
            raise ValueError(f"{name} is constant over its {len(z)} rows: it has no shape to align")
        factors.append(z / norm)
    x, y = factors
    # ‖XᵀY‖_* on the smaller side: with Xᵀ = QR the orthogonal Q changes no singular value
    if max(x.shape[1], y.shape[1]) > len(x):
        x, y = (torch.linalg.qr(z.T, mode="r").R.T for z in (x, y))  # (n, min(n, p))
    return float(torch.linalg.svdvals(x.T @ y).sum())


def mutual_knn(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Mutual k-nearest-neighbor alignment in [0, 1]: the share of a row's k nearest rows (cosine) on which both agree.

    Independent data give k / (n − 1) on average. NaN where all rows of a side point one way. Source: Huh et al., The
    Platonic Representation Hypothesis (2024).

    Raises:
        ValueError: row counts differ, or k is not in 1 … n − 1.
    """
    x, y = _unit_rows(x, y, k)
    if reasons := _reasons("mutual_knn", _one_way, x, y):
        warn_reasons(reasons)
        return math.nan
    both = _neighbors(x @ x.T, k) & _neighbors(y @ y.T, k)
    return int(both.sum()) / (k * len(x))


def cknna(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Centered kernel nearest-neighbor alignment: debiased CKA over pairs that are neighbors in both representations.

    Σ α_ij K°_ij L°_ij over its norm, α_ij = 1 where j is among the k nearest of i in x and in y, K° the U-centered
    cosine Gram matrix; k = n − 1 is debiased CKA of the unit rows. Source: Huh et al. (2024), eq. 10 with the debiased
    centring. Their code masks before it centers and adds 1e-6 to the denominator, so its numbers differ. 0 where
    nothing is shared, NaN where all rows of a side point one way.

    Raises:
        ValueError: row counts differ, fewer than 4 rows, or k is not in 1 … n − 1.
    """
    x, y = _unit_rows(x, y, k)
    check_estimator("debiased", len(x))
    if reasons := _reasons("cknna", _one_way, x, y):
        warn_reasons(reasons)
        return math.nan
    gram_x, gram_y = x @ x.T, y @ y.T
    near_x, near_y = _neighbors(gram_x, k), _neighbors(gram_y, k)
    a, b = centered_gram(gram_x, "debiased"), centered_gram(gram_y, "debiased")
    own = (a * a * near_x).sum() * (b * b * near_y).sum()
    return float((a * b * (near_x & near_y)).sum() / own.sqrt())


def svcca(x: Tensor, y: Tensor, variance: float = 0.99) -> float:
    """Mean canonical correlation of the leading principal components that keep ``variance`` of each side (Raghu et al.,
    2017).

    NaN where a side is constant.

    Raises:
        ValueError: row counts differ, variance not in (0, 1], or fewer rows than features + 2:
            every correlation would be 1.
    """
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance}: it is the share to keep, in (0, 1]")
    x, y = _more_rows_than_features(x, y, "svcca")
    if reasons := _reasons("svcca", _constant, x, y):
        warn_reasons(reasons)
        return math.nan
    bases = []
    for z in (x, y):
        u, s, _ = torch.linalg.svd(z, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        bases.append(u[:, : int((share < variance - 1e-12).sum()) + 1])
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).clamp_max(1).mean())


def pwcca(x: Tensor, y: Tensor) -> float:
    """Canonical correlations, each weighted by how much of x its direction carries (Morcos et al., 2018).
    Not symmetric.

    NaN where a side is constant.

    Raises:
        ValueError: row counts differ, or fewer rows than features + 2: every correlation would be 1.
    """
    x, y = _more_rows_than_features(x, y, "pwcca")
    if reasons := _reasons("pwcca", _constant, x, y):
        warn_reasons(reasons)
        return math.nan
    bases = [_basis(z) for z in (x, y)]
    u, correlations, _ = torch.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    weights = (x.T @ (bases[0] @ u)).abs().sum(0)
    return float((weights * correlations.clamp_max(1)).sum() / weights.sum())


def rsa(x: Tensor, y: Tensor) -> float:
    """Representational similarity analysis: Spearman of the two dissimilarity matrices, 1 − Pearson between rows.

    Source: Kriegeskorte et al. (2008). Needs 3 rows; a constant row has no correlation with any other. NaN where all
    pairs of rows of a side are equally dissimilar. Dissimilarities that differ by less than 1e-12 are ties,
    not an order.

    Raises:
        ValueError: row counts differ, fewer than 3 rows, or a constant row.
    """
    from scipy.stats import spearmanr

    x, y = _paired(x, y)
    if len(x) < 3:
        raise ValueError(f"rsa compares pairs of rows and needs at least 3 rows, found {len(x)}")
    i, j = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    dissimilarities = []
    for name, z in (("x", x), ("y", y)):
        z = center(z.T).T  # each row minus its own mean, exactly 0 where it is constant
        norms = z.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise ValueError(
                f"row {int((norms == 0).flatten().nonzero()[0])} of {name} is constant: it correlates with nothing"
            )
        z = z / norms
        dissimilarities.append((1 - z @ z.T)[i, j].round(decimals=12))
    if reasons := _reasons("rsa", _no_ranks, *dissimilarities):
        warn_reasons(reasons)
        return math.nan
    return float(spearmanr(*(pairs.cpu().numpy() for pairs in dissimilarities)).statistic)


@dataclass(frozen=True)
class RogueDimensions:
    """The features that carry most of a layer's variance, largest first.

    Attributes:
        dimensions: feature numbers of the top k.
        shares: the share of the total variance each carries.
        width: how many features there are.
    """

    dimensions: tuple[int, ...]
    shares: tuple[float, ...]
    width: int

    @property
    def share(self) -> float:
        """Variance share of the top k together."""
        return sum(self.shares)

    @property
    def expected(self) -> float:
        """What k features would carry were all alike: k / d."""
        return len(self.dimensions) / self.width

    def __str__(self) -> str:
        each = ", ".join(f"{d} ({share:.1%})" for d, share in zip(self.dimensions, self.shares, strict=True))
        return (
            f"The top {len(self.dimensions)} of {self.width} dimensions carry {self.share:.1%} of the variance "
            f"(alike they would carry {self.expected:.1%}): {each}"
        )

    def _repr_markdown_(self) -> str:
        rows = [f"| {d} | {share:.1%} |" for d, share in zip(self.dimensions, self.shares, strict=True)]
        return "\n".join(["| dimension | share of variance |", "|---|---|", *rows, "", str(self).split(":")[0] + "."])


def rogue_dimensions(x: Tensor, k: int = 3, mask: Tensor | None = None) -> RogueDimensions:
    """Which few features carry most of the variance (Timkey & van Schijndel, 2021): linear CKA sees little else.

    One shared dimension at 50× makes independent features look identical; ``cka(…, standardized=True)`` undoes it.

    Args:
        x: (n, d) or (B, T, d).
        k: how many to report.
        mask: bool (n,) or (B, T), True where a row or token counts.

    Raises:
        ValueError: k not in 1 … d, a mask of another shape, no valid token, NaN or infinity in one,
            or a constant layer.
    """
    x = double(x)
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, x {tuple(x.shape)}: expected {tuple(x.shape[:-1])}"
            )
        x = x[mask.to(x.device).bool()]
    elif x.dim() == 3:
        x = x.flatten(0, 1)
    if x.dim() != 2 or not len(x):
        raise ValueError(f"no rows to measure: x has shape {tuple(x.shape)} after masking, expected (n, d)")
    if wrong := int((~x.isfinite()).any(1).sum()):
        raise ValueError(f"x holds NaN or infinity in {wrong} of its {len(x)} rows: mask them, or mend the model")
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k is {k}, x has {x.shape[1]} features: choose 1 … {x.shape[1]}")
    variances = center(x).square().mean(0)
    if variances.sum() == 0:
        raise ValueError(f"x is constant over its {len(x)} rows: it has no variance to share out")
    top = (variances / variances.sum()).topk(k)
    return RogueDimensions(tuple(top.indices.tolist()), tuple(top.values.tolist()), x.shape[1])


def _paired(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Paired rows in float64, on one device."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.device != y.device:
        raise ValueError(f"x is on {x.device}, y on {y.device}: move one to the other's device")
    return paired_matrices(x, y)


def _reasons(measure: str, why: Callable[[Tensor, str], str], x: Tensor, y: Tensor) -> list[str]:
    """Why the measure is NaN: what ``why`` finds wrong with each side, "" where nothing."""
    return [f"{measure} is NaN: {found}" for z, name in ((x, "x"), (y, "y")) if (found := why(z, name))]


def _constant(z: Tensor, name: str) -> str:
    return "" if z.any() else f"{name} is constant over its {len(z)} rows: no direction of it varies"  # z is centered


def _one_way(z: Tensor, name: str) -> str:
    apart = center(z).abs().max() > 1e-12  # of unit rows; what is less is rounding
    return "" if apart else f"all {len(z)} rows of {name} point one way: which are nearest is a tie"


def _no_ranks(pairs: Tensor, name: str) -> str:
    if pairs.max() > pairs.min():
        return ""
    return f"all {len(pairs)} pairs of rows of {name} are equally dissimilar: there is no order to compare"


def _unit_rows(x: Tensor, y: Tensor, k: int) -> list[Tensor]:
    x, y = _paired(x, y)
    if not 1 <= k < len(x):
        raise ValueError(f"k is {k} neighbors among {len(x)} rows: choose 1 … {len(x) - 1}")
    return [torch.nn.functional.normalize(z, dim=1) for z in (x, y)]


def _neighbors(gram: Tensor, k: int) -> Tensor:
    """bool (n, n): j among the k most similar rows of i, never i itself."""
    near = gram.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    return torch.zeros_like(gram, dtype=torch.bool).scatter_(1, near, True)


def _more_rows_than_features(x: Tensor, y: Tensor, name: str) -> list[Tensor]:
    x, y = _paired(x, y)
    n, widest = len(x), max(x.shape[1], y.shape[1])
    if n < widest + 2:  # centered rows span n − 1 dimensions, and as many features span them all
        raise ValueError(
            f"{name} needs more rows than features, found n = {n}, p = {x.shape[1]}, q = {y.shape[1]}: with so few, "
            f"every canonical correlation is 1; give at least {widest + 2} rows, or use cka"
        )
    return [center(z) for z in (x, y)]


def _basis(z: Tensor) -> Tensor:
    """Orthonormal columns spanning z's, without directions that rounding alone made."""
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    return u[:, s > s[0] * len(z) * torch.finfo(z.dtype).eps]
