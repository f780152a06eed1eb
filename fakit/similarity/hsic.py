"""HSIC, the quantity CKA is a ratio of: estimators, the cheaper of two routes, and the checks every caller shares.

``X`` is ``(n, p)``, ``Y`` is ``(n, q)``, rows are paired, ``K = X Xᵀ``, ``L = Y Yᵀ``. Everything is computed in float64
on centered features: both estimators are unchanged by a shift, and centring first is what keeps them exact under one.

* ``"biased"``: HSIC₀ = ‖XcᵀYc‖²_F / (n − 1)² (Gretton et al., 2005). Its CKA of *independent* data tends to 1 as d/n
  grows.
* ``"debiased"``: HSIC₁ of Song et al. (2012), unbiased: E[HSIC₁] = ‖Cov(x, y)‖²_F,
  so that independent data give 0 on average.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

ESTIMATORS = {"debiased": 4, "biased": 2}
"""Estimator → the smallest number of rows it is defined for."""

_BLOCK_ELEMENTS = 2**24  # float64 elements of Gram matrix alive at once: 128 MiB


def check_estimator(estimator: str, n: int, rows: str = "rows") -> None:
    """Raise ValueError for an unknown estimator, or for fewer rows than it needs."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is unknown: choose 'debiased' or 'biased'")
    if n < ESTIMATORS[estimator]:
        raise ValueError(
            f"the {estimator} estimator needs at least {ESTIMATORS[estimator]} {rows}, found {n}: give it more data"
        )


def double(x: Tensor) -> Tensor:
    """Detached float64 copy; on the CPU where the device has no float64 (MPS)."""
    x = torch.as_tensor(x).detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def center(x: Tensor) -> Tensor:
    """Float64 features minus their mean ``(n, p)``. Taking the first row off beforehand makes a constant feature
    exactly 0.
    """
    x = double(x)
    x = x - x[:1]
    return x.sub_(x.mean(0))  # in place: a fresh matrix costs as much in page faults as the difference does


def standardize(x: Tensor) -> Tensor:
    """z-scored features ``(n, p)``: each with mean 0 and variance 1; a constant feature becomes 0."""
    x = center(x)
    deviation = x.std(0)
    return torch.where(deviation > 0, x / torch.where(deviation > 0, deviation, 1.0), 0.0)


def paired_rows(
    student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], mask: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Check two lists of layers of the same examples.

    Args:
        student_layers: tensors (B, T, d) or (n, d), one a layer; widths may differ.
        teacher_layers: the same, with the same B and T (or n).
        mask: bool (B, T), True where a token counts; only with (B, T, d).

    Returns:
        Both lists as tensors, and the mask as bool (B, T) (None for (n, d) layers).

    Raises:
        ValueError: no layers; leading sizes differ (names both); a mask of another shape;
            NaN or infinity in a valid row.
    """
    named = [(f"student layer {i}", torch.as_tensor(x)) for i, x in enumerate(student_layers)]
    named += [(f"teacher layer {i}", torch.as_tensor(y)) for i, y in enumerate(teacher_layers)]
    if not len(student_layers) or not len(teacher_layers):
        raise ValueError(
            f"layers of both models are compared, found {len(student_layers)} of the student and "
            f"{len(teacher_layers)} of the teacher: give at least one of each"
        )
    first_name, first = named[0]
    for name, x in named:
        if x.dim() not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (n, d) or (B, T, d)")
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"row i is compared with row i, but {first_name} has {tuple(first.shape[:-1])} rows and "
                f"{name} has {tuple(x.shape[:-1])}: run both models on the same examples, in the same order"
            )
    if first.dim() == 2 and mask is not None:
        raise ValueError(f"a mask needs (B, T, d) layers, found {tuple(first.shape)}: drop the rows, or the mask")
    if first.dim() == 3:
        mask = torch.ones(first.shape[:2], dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
        mask = mask.to(first.device)
        if mask.shape != first.shape[:2]:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, the layers {tuple(first.shape)}: expected (B, T)"
            )
    for name, x in named:
        finite = _finite_rows(x)
        if not (finite if mask is None else finite | ~mask.to(x.device)).all():
            raise ValueError(f"{name} holds NaN or infinity in a row that counts: mask the row, or mend the model")
    return [x for _, x in named[: len(student_layers)]], [y for _, y in named[len(student_layers) :]], mask


def _finite_rows(x: Tensor) -> Tensor:
    """bool (…): no NaN or infinity among the last dimension's features. A sum tells it in a tenth of the time,
    unless it overflows.
    """
    if not x.is_floating_point():
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    finite = x.detach().sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()
    return finite if finite.all() else x.isfinite().all(-1)


def valid_rows(layers: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Layers (B, T, d) → their valid tokens as rows (n, d); (n, d) stays. ValueError where no token is valid."""
    if mask is None:
        return layers
    if not mask.any():
        raise ValueError(f"the mask {tuple(mask.shape)} leaves no valid token: True must mark the tokens that count")
    if mask.all():
        return [x.flatten(0, 1) for x in layers]
    rows = mask.flatten().nonzero()[:, 0]
    return [x.flatten(0, 1).index_select(0, rows.to(x.device)) for x in layers]


def centered_gram(gram: Tensor, estimator: str) -> Tensor:
    """Gram matrices (…, n, n), centered such that HSIC is a plain inner product: see :func:`gram_scale`.

    biased: H K H. debiased: U-centring with a zero diagonal (Székely & Rizzo, 2014),
    K°_ij = K̃_ij − m_i − m_j, m_i = r_i/(n−2) − T/(2(n−1)(n−2)), r = K̃1, T = 1ᵀK̃1.
    """
    n = gram.shape[-1]
    if estimator == "biased":
        rows = gram.mean(-1, keepdim=True)
        return gram - rows - rows.mT + rows.mean(-2, keepdim=True)
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    gram = gram * off_diagonal
    rows = gram.sum(-1, keepdim=True)
    m = rows / (n - 2) - rows.sum(-2, keepdim=True) / (2 * (n - 1) * (n - 2))
    return (gram - m - m.mT) * off_diagonal


def gram_scale(n: int, estimator: str) -> float:
    """The divisor that turns Σ K°∘L° into HSIC: n(n − 3) debiased, (n − 1)² biased."""
    return n * (n - 3) if estimator == "debiased" else (n - 1) ** 2


def median_distance(x: Tensor, name: str) -> float:
    """Median distance between two rows of (n, p), the unit RBF bandwidths are given in; ValueError where it is 0."""
    squares = _squared_distances(center(x))
    i, j = torch.triu_indices(*squares.shape, offset=1, device=x.device)
    median = float(squares[i, j].median().sqrt())
    if median == 0:
        raise ValueError(f"most rows of {name} coincide, so that an RBF kernel has no bandwidth: use kernel='linear'")
    return median


def rbf_gram(x: Tensor, sigma: float) -> Tensor:
    """RBF kernel (n, n) minus 1, exp(−‖x_i − x_j‖² / 2σ²) − 1.

    Centring removes the constant; leaving it out here is what keeps digits when the bandwidth is large and K ≈ 1.
    """
    return torch.expm1(-_squared_distances(center(x)) / (2 * sigma**2)).fill_diagonal_(0)


def _squared_distances(x: Tensor) -> Tensor:
    squares = x.square().sum(-1)
    return (squares[:, None] + squares - 2 * x @ x.T).clamp_min(0)


def above_rounding(hsic: Tensor, terms: Tensor, rounding: float = 1e-13) -> Tensor:
    """``hsic`` with 0 where it is nothing but the rounding error (relative, of float64)
    of the ``terms`` it is a difference of.

    Debiased self-HSIC is a sum of squares, and exactly 0 when all rows (or all but one) are equal: dividing by the
    rounding error that is computed instead would give an arbitrary similarity.
    """
    return torch.where(hsic > rounding * terms, hsic, 0.0)


def cheaper_route(n: int, student_widths: Sequence[int], teacher_widths: Sequence[int]) -> str:
    """``"gram"`` or ``"features"``: the one with fewer multiplications over all layer pairs and self-similarities.

    Gram: half of n²·(Σp + Σq) for the matrices (they are symmetric) and of n² a pair. Features: n·p·q a pair.
    """
    s, t = len(student_widths), len(teacher_widths)
    gram = n * n / 2 * (sum(student_widths) + sum(teacher_widths) + s * t + s + t)
    features = n * (sum(student_widths) * sum(teacher_widths) + sum(w * w for w in [*student_widths, *teacher_widths]))
    return "gram" if gram < features else "features"


def cross_norms(xs: list[Tensor], ys: list[Tensor], route: str) -> tuple[Tensor, Tensor, Tensor]:
    """‖XᵀY‖²_F of every pair (S, T), and ‖XᵀX‖²_F (S,), ‖YᵀY‖²_F (T,), of centered features (n, p), (n, q)."""
    if route == "features":
        widths = [y.shape[1] for y in ys]
        all_ys = torch.cat(ys, dim=1)  # (n, Σq): one product a student layer
        cross = torch.stack([torch.stack([c.square().sum() for c in (x.T @ all_ys).split(widths, dim=1)]) for x in xs])
        own = [torch.stack([(x.T @ x).square().sum() for x in layers]) for layers in (xs, ys)]
        return cross, own[0], own[1]
    # ‖XᵀY‖² = Σ_ij K_ij L_ij. Row blocks of the upper triangle: no (n, n) matrix of any layer is ever whole.
    n, layers = xs[0].shape[0], xs + ys
    total = xs[0].new_zeros(len(xs) + len(ys), len(xs) + len(ys))
    step = max(32, min(n, _BLOCK_ELEMENTS // (len(layers) * n), math.ceil(n / 8)))
    # one for all blocks: to map memory anew takes longer than to fill it
    room = xs[0].new_empty(len(layers) * min(step, n) * n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        block = room[: len(layers) * (stop - start) * (n - start)].view(len(layers), stop - start, n - start)
        for gram, x in zip(block, layers, strict=True):
            torch.mm(x[start:stop], x[start:].T, out=gram)
        block[:, :, : stop - start] *= math.sqrt(0.5)  # the diagonal block counts once, the rest twice
        block = block.flatten(1)
        total += 2 * (block @ block.T)
    own = total.diagonal()
    return total[: len(xs), len(xs) :], own[: len(xs)], own[len(xs) :]


def hsic_matrix(
    xs: list[Tensor], ys: list[Tensor], estimator: str, route: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of all pairs (S, T) and of each layer with itself (S,), (T,), from features (n, p), (n, q).

    In feature space the debiased estimator is
    n(n−3)·HSIC₁ = ‖XcᵀYc‖² − n/(n−2)·Σ a_i b_i + Σa·Σb/((n−1)(n−2)), a_i = ‖x_i − x̄‖², b_i = ‖y_i − ȳ‖².
    """
    n = xs[0].shape[0]
    xs, ys = [center(x) for x in xs], [center(y) for y in ys]
    route = route or cheaper_route(n, [x.shape[1] for x in xs], [y.shape[1] for y in ys])
    cross, self_x, self_y = cross_norms(xs, ys, route)
    if estimator == "debiased":
        a, b = (torch.stack([x.square().sum(1) for x in layers]) for layers in (xs, ys))  # (S, n), (T, n)

        def debias(norm: Tensor, products: Tensor, totals: Tensor) -> Tensor:
            return norm - n / (n - 2) * products + totals / ((n - 1) * (n - 2))

        cross = debias(cross, a @ b.T, a.sum(1)[:, None] * b.sum(1))
        self_x = above_rounding(debias(self_x, a.square().sum(1), a.sum(1) ** 2), self_x)
        self_y = above_rounding(debias(self_y, b.square().sum(1), b.sum(1) ** 2), self_y)
    scale = gram_scale(n, estimator)
    return cross / scale, self_x / scale, self_y / scale


def ratio(cross: Tensor, self_x: Tensor, self_y: Tensor, names: tuple[str, str] = ("student layer", "teacher layer")):
    """CKA = HSIC(X,Y) / √(HSIC(X,X)·HSIC(Y,Y)) of all pairs (S, T), and why some are NaN (tuple of sentences).

    A self-HSIC ≤ 0 (all rows equal, or all but one under the debiased estimator) has no similarity: the pair is NaN and
    the reason is warned about. Clamping it or adding an epsilon would invent a value instead.
    """
    reasons = []
    for name, values in zip(names, (self_x, self_y), strict=True):
        for i, value in enumerate(values.tolist()):
            if not value > 0:
                label = f"{name} {i}" if name.endswith("layer") else name
                reasons.append(
                    f"CKA is NaN: HSIC of {label} with itself is {value:.3g}, not above 0: its rows do not differ "
                    "beyond rounding"
                )
    valid = (self_x > 0)[:, None] & (self_y > 0)
    product = torch.where(valid, self_x[:, None] * self_y, 1.0)
    return torch.where(valid, cross / product.sqrt(), torch.nan), tuple(reasons)


def warn_reasons(reasons: Sequence[str]) -> None:
    """Say why values are NaN, as RuntimeWarnings at the line that called the public function."""
    for reason in reasons:
        warnings.warn(reason, RuntimeWarning, stacklevel=3)
