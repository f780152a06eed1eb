"""CKA of all layer pairs in one pass over the data, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from .hsic import above_rounding, check_estimator, double, hsic_matrix, paired_rows, ratio, valid_rows, warn_reasons


class _Moments:
    """Σ over rows of a pair's products: C = Σ w x yᵀ (p, q), Σ w gʸ x (p,), Σ w gˣ y (q,), Σ w gˣ gʸ, with g a number a row."""

    def __init__(self, p: int, q: int, device: torch.device) -> None:
        self.c, self.px, self.py, self.gg = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((p, q), (p,), (q,), ())
        )

    def add(self, x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, weight: Tensor | None) -> None:
        wx, wgx = (x, gx) if weight is None else (x * weight[:, None], gx * weight)
        if x.dtype == torch.float64:
            self.c.addmm_(wx.T, y)  # in place: a copy of C an update would cost more than a small batch's product
        else:
            self.c += wx.T @ y
        self.px += wx.T @ gy
        self.py += y.T @ wgx
        self.gg += wgx @ gy


class StreamingCKA:
    """Exact CKA of every student layer with every teacher layer, one pass, any split into batches.

    The result equals :func:`fakit.similarity.cka` on all rows at once, however the rows came in and wherever their mean
    lies: a fixed pilot mean (the first batch's) is taken off, and the sums stay in float64. Memory is Σ p·q over the
    layer pairs (91 pairs of width 768: 0.4 GB; 28 of 384: 33 MB), whatever the number of rows.

    Args:
        clusters: what a row is when layers are (B, T, d). False: every valid token, as if they were independent (they
            are not: tokens of one sequence are alike, which inflates the value). True: HSIC₁ of one token a sequence,
            averaged over *all* ways to draw one valid token from each, the same token in both models; exact, no random
            numbers. A sequence must come whole, in one update. Debiased only.
        dtype: of the products inside an update. torch.float32 halves the time of float64 and costs about 1e-6.

    Attributes:
        n: rows (or sequences) so far.

    Example:
        >>> x = torch.randn(64, 8)
        >>> stream = StreamingCKA()
        >>> for rows in x.split(20):
        ...     _ = stream.update([rows, rows.relu()], [rows])
        >>> stream.matrix().shape
        torch.Size([2, 1])

    Source: HSIC₁ of Song et al. (2012) written in sums; Kornblith et al. (2019) for CKA.
    """

    def __init__(self, clusters: bool = False, dtype: torch.dtype = torch.float64) -> None:
        self.clusters, self.dtype = clusters, dtype
        self.n = 0
        self._split = 0  # student layers come first in every list
        self._pilot: list[Tensor] = []
        self._sum: list[Tensor] = []  # Σ μ_i (d,), one a layer
        self._squares: list[Tensor] = []  # Σ ‖μ_i‖²
        self._tokens: dict[tuple[int, int], _Moments] = {}
        self._means: dict[tuple[int, int], _Moments] = {}  # the same moments of sequence means
        self._within: dict[tuple[int, int], Tensor] = {}  # Σ_i ‖C_i‖²

    def update(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], mask: Tensor | None = None
    ) -> StreamingCKA:
        """Add a batch: lists of (B, T, d) with mask (B, T), or of (n, d). Returns self.

        Raises:
            ValueError: rows differ, no valid token, NaN or infinity in a valid row, or layers unlike those of the first batch.
        """
        xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
        if self.clusters and mask is None:  # (n, d): sequences of one token
            xs, ys = [x[:, None] for x in xs], [y[:, None] for y in ys]
            mask = torch.ones(xs[0].shape[:2], dtype=torch.bool, device=xs[0].device)
        layers = xs + ys
        widths = [x.shape[-1] for x in layers]
        rows = [double(x) for x in valid_rows(layers, mask)]  # (N, d)
        if not self._pilot:
            self._start(rows, len(xs))
        known = [pilot.shape[0] for pilot in self._pilot]
        if widths != known or len(xs) != self._split:
            raise ValueError(
                f"this batch has layers of widths {widths[: len(xs)]} (student) and {widths[len(xs) :]} (teacher), the "
                f"first one had {known[: self._split]} and {known[self._split :]}: one StreamingCKA serves one pair of models"
            )
        rows = [(x - pilot).to(self.dtype) for x, pilot in zip(rows, self._pilot, strict=True)]
        if self.clusters:
            self._add_clusters(rows, mask)
        else:
            self._add_rows(rows)
        return self

    def matrix(self, estimator: str = "debiased") -> Tensor:
        """CKA (student layers, teacher layers), float64. NaN, with a warning that says why, where a self-HSIC is ≤ 0.

        Raises:
            ValueError: fewer rows than the estimator needs, or ``"biased"`` of clusters.
        """
        check_estimator(estimator, self.n, "sequences" if self.clusters else "rows")
        if self.clusters and estimator == "biased":
            raise ValueError(
                "StreamingCKA(clusters=True) has the debiased estimator only: for the biased one use clusters=False here, "
                "or compare_layers(…, estimator='biased')"
            )
        students, teachers = range(self._split), range(self._split, len(self._pilot))
        hsic = self._debiased if estimator == "debiased" else self._biased
        cross = torch.stack([torch.stack([hsic(s, t) for t in teachers]) for s in students])
        own = [
            above_rounding(hsic(i, i), self._tokens[i, i].c.square().sum() / self.n**2) for i in (*students, *teachers)
        ]
        values, reasons = ratio(cross, torch.stack(own[: self._split]), torch.stack(own[self._split :]))
        warn_reasons(reasons)
        return values

    def _start(self, rows: list[Tensor], split: int) -> None:
        self._split = split
        # first row + mean of what is left: exactly the constant where a feature is constant
        self._pilot = [x[0] + (x - x[:1]).mean(0) for x in rows]
        self._sum = [torch.zeros_like(pilot) for pilot in self._pilot]
        self._squares = [pilot.new_zeros(()) for pilot in self._pilot]
        pairs = [*product(range(split), range(split, len(rows))), *((i, i) for i in range(len(rows)))]

        def moments() -> dict[tuple[int, int], _Moments]:
            return {(i, j): _Moments(len(self._pilot[i]), len(self._pilot[j]), rows[0].device) for i, j in pairs}

        self._tokens = moments()
        self._means = moments() if self.clusters else self._tokens
        self._within = {pair: self._pilot[0].new_zeros(()) for pair in pairs} if self.clusters else {}

    def _add_rows(self, rows: list[Tensor]) -> None:
        """Every row is its own cluster: its mean is itself, so that token and mean moments are one."""
        self._add_means(rows, [x.square().sum(1) for x in rows])

    def _add_means(self, means: list[Tensor], squares: list[Tensor]) -> None:
        self.n += means[0].shape[0]
        for layer, (mean, square) in enumerate(zip(means, squares, strict=True)):
            self._sum[layer] += mean.sum(0, dtype=torch.float64)
            self._squares[layer] += square.sum(dtype=torch.float64)
        for (i, j), moments in self._means.items():
            moments.add(means[i], means[j], squares[i], squares[j], None)

    def _add_clusters(self, rows: list[Tensor], mask: Tensor) -> None:
        mask = mask[mask.any(1)].to(rows[0].device)  # a sequence without a valid token is no sequence
        lengths = mask.sum(1)  # (B,)
        share = 1 / lengths.to(self.dtype)  # each token's weight: a mean over its sequence
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths)  # (N,)
        weight = share[owner]
        means = [x.new_zeros(len(lengths), x.shape[1]).index_add_(0, owner, x * weight[:, None]) for x in rows]
        self._add_means(means, [mean.square().sum(1) for mean in means])
        along = [(x * mean[owner]).sum(1) for x, mean in zip(rows, means, strict=True)]  # x_it · μ_i
        grams = []
        for x in rows:  # padding is 0 here, so it adds nothing below
            padded = x.new_zeros(*mask.shape, x.shape[1])
            padded[mask] = x
            grams.append((padded @ padded.mT * share[:, None, None]).flatten())  # (B·T·T,)
        for (i, j), moments in self._tokens.items():
            moments.add(rows[i], rows[j], along[i], along[j], weight)
            self._within[i, j] += (grams[i] @ grams[j]).double()  # ‖C_i‖² = mean over tokens t, u of K_tu L_tu

    def _debiased(self, i: int, j: int) -> Tensor:
        """HSIC₁ as a U-statistic over distinct sequences a, b, c, d: mean K_ab L_ab − 2 mean K_ab L_ac + mean K_ab L_cd.

        With C = Σ_a C_a, C_a the mean of x yᵀ over the tokens of sequence a, and M = Σ_a μ_a νᵀ_a:
        Σ K_ab L_ab = ‖C‖² − Σ‖C_a‖²;  Σ K_ab L_ac = sᵀC t − s·p − t·q + 2 Σ μ_aᵀC_aν_a − ⟨C, M⟩;  Σ K_ab L_cd by
        inclusion and exclusion from the same two sums of the means.
        """
        n, sx, sy = self.n, self._sum[i], self._sum[j]
        tokens, means = self._tokens[i, j], self._means[i, j]

        def pairs_and_triples(moments: _Moments, within: Tensor) -> tuple[Tensor, Tensor]:
            pairs = moments.c.square().sum() - within
            triples = sx @ moments.c @ sy - sx @ moments.px - sy @ moments.py + 2 * moments.gg
            return pairs, triples - (moments.c * means.c).sum()

        pairs, triples = pairs_and_triples(tokens, self._within[i, j] if self.clusters else tokens.gg)
        mean_pairs, mean_triples = pairs_and_triples(means, means.gg)
        quadruples = (sx @ sx - self._squares[i]) * (sy @ sy - self._squares[j]) - 4 * mean_triples - 2 * mean_pairs
        return (pairs - 2 * triples / (n - 2) + quadruples / ((n - 2) * (n - 3))) / (n * (n - 1))

    def _biased(self, i: int, j: int) -> Tensor:
        c = self._tokens[i, j].c - torch.outer(self._sum[i], self._sum[j]) / self.n
        return c.square().sum() / (self.n - 1) ** 2


class MinibatchCKA:
    """Minibatch CKA (Nguyen et al., 2021): HSIC₁ of each batch, summed over batches, the ratio last.

    Unbiased in each HSIC like the exact stream, noisier for the same data, and small: it keeps one number a layer pair. Rows
    are paired only with rows of their own batch, so shuffle. With one batch it equals the exact value.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], mask: Tensor | None = None
    ) -> MinibatchCKA:
        """Add a batch of at least 4 rows: lists of (B, T, d) with mask (B, T), or of (n, d). Returns self."""
        xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
        xs, ys = valid_rows(xs, mask), valid_rows(ys, mask)
        check_estimator("debiased", xs[0].shape[0], "rows a batch")
        new = hsic_matrix(xs, ys, "debiased")
        if self._sums is not None and self._sums[0].shape != new[0].shape:
            raise ValueError(f"this batch has {tuple(new[0].shape)} layers, the first one {tuple(self._sums[0].shape)}")
        self._sums = new if self._sums is None else tuple(a + b for a, b in zip(self._sums, new, strict=True))
        self.batches += 1
        return self

    def matrix(self) -> Tensor:
        """CKA (student layers, teacher layers), float64; NaN with a warning where a summed self-HSIC is ≤ 0."""
        if self._sums is None:
            raise ValueError("no batch yet: call update(student_layers, teacher_layers) first")
        values, reasons = ratio(*self._sums)
        warn_reasons(reasons)
        return values
