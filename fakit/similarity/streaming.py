"""CKA of all layer pairs in one pass over the data, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hsic import check_estimator, hsic_matrix, paired_rows, ratio, valid_rows, warn_reasons
from .moments import Moments


class StreamingCKA:
    """Exact CKA of every student layer with every teacher layer, one pass, any split into batches.

    The result equals :func:`fakit.similarity.cka` on all rows at once, however the rows came in and wherever their mean
    lies: a fixed pilot (the median of the first rows) is taken off, and the sums stay in float64. Memory is Σp·Σq + Σp²
    + Σq² over the layers (13 × 7 of width 768: 0.5 GB; 7 × 4 of 384: 46 MB) and some thousand rows,
    whatever the number of rows.

    Args:
        clusters: what a row is when layers are (B, T, d). False: every valid token, as if they were independent (they
            are not: tokens of one sequence are alike, which inflates the value). True: HSIC₁ of one token a sequence,
            averaged over *all* ways to draw one valid token from each, the same token in both models; exact, no random
            numbers. A sequence must come whole, in one update. Debiased only.
        dtype: of the products over some thousand rows, which are then summed in float64. None: the features' own, at
            least float32. float64 is exact to 1e-10, float32 to about 1e-6: rows far from the others, whose rounding
            would drown them, are multiplied in float64 all the same.

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

    def __init__(self, clusters: bool = False, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"StreamingCKA(dtype={dtype}): products in torch.float32 or torch.float64; less has no digits left"
            )
        self.clusters, self.dtype = clusters, dtype
        self.n = 0
        self._split = 0  # student layers come first in every list
        self._widths: list[int] = []
        self._pilot: list[Tensor] = []  # of clusters; rows lose theirs in the moments
        self._tokens: Moments | None = None
        self._means: Moments | None = None  # the same moments of sequence means
        self._within: Tensor | None = None  # (layers, layers): Σ_i ‖C_i‖² of a pair

    def update(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], mask: Tensor | None = None
    ) -> StreamingCKA:
        """Add a batch: lists of (B, T, d) with mask (B, T), or of (n, d). Returns self.

        Raises:
            ValueError: rows differ, no valid token, NaN or infinity in a valid row,
                or layers unlike those of the first batch.
        """
        xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
        if self.clusters and mask is None:  # (n, d): sequences of one token
            xs, ys = [x[:, None] for x in xs], [y[:, None] for y in ys]
            mask = torch.ones(xs[0].shape[:2], dtype=torch.bool, device=xs[0].device)
        layers = [_at_least_float32(x) for x in xs + ys]
        widths, known = [x.shape[-1] for x in layers], self._widths
        if known and (widths != known or len(xs) != self._split):
            raise ValueError(
                f"this batch has layers of widths {widths[: len(xs)]} (student) and {widths[len(xs) :]} (teacher), the "
                f"first one had {known[: self._split]} and {known[self._split :]}: one StreamingCKA serves one pair of "
                "models"
            )
        if self.clusters:
            self._add_clusters(valid_rows(layers, mask), mask, len(xs))
        else:
            self._add_rows(layers, mask, len(xs))
        return self

    def matrix(self, estimator: str = "debiased") -> Tensor:
        """CKA (student layers, teacher layers), float64. NaN, with a warning that says why, where a self-HSIC is ≤ 0.

        Raises:
            ValueError: fewer rows than the estimator needs, or ``"biased"`` of clusters.
        """
        check_estimator(estimator, self.n, "sequences" if self.clusters else "rows")
        if self.clusters and estimator == "biased":
            raise ValueError(
                "StreamingCKA(clusters=True) has the debiased estimator only: for the biased one use clusters=False "
                "here, or compare_layers(…, estimator='biased')"
            )
        for moments in (self._tokens, self._means):
            moments.flush()
        students, teachers = range(self._split), range(self._split, len(self._widths))
        hsic = self._debiased if estimator == "debiased" else self._biased
        cross = torch.stack([torch.stack([hsic(s, t) for t in teachers]) for s in students])
        own = []  # 0 where it is nothing but the rounding error of the terms it is a difference of
        for i in (*students, *teachers):
            value = hsic(i, i)
            own.append(torch.where(value > self._tokens.rounding(i) / self.n**2, value, 0.0))
        values, reasons = ratio(cross, torch.stack(own[: self._split]), torch.stack(own[self._split :]))
        warn_reasons(reasons)
        return values

    def _start(self, layers: list[Tensor], split: int) -> None:
        self._split, self._widths = split, [x.shape[-1] for x in layers]
        double = torch.float64
        features = double if any(x.dtype == double for x in layers) else torch.float32
        products, device = self.dtype or features, layers[0].device
        if not self.clusters:
            self._tokens = self._means = Moments(self._widths, split, features, products, device)
        # what a sequence brings by itself goes out of the sums again: that much of it is float64, whatever the products
        else:
            self._tokens = Moments(self._widths, split, double, products, device, centered=True)
            self._means = Moments(self._widths, split, double, double, device, centered=True)
        self._within = torch.zeros(len(layers), len(layers), dtype=torch.float64, device=device)

    def _add_rows(self, layers: list[Tensor], mask: Tensor | None, split: int) -> None:
        """Each row is its own mean: token and mean moments are one. Rows come as many at a time as complete a block."""
        layers = [x.flatten(0, -2) for x in layers]  # (B·T, d)
        index = torch.arange(len(layers[0])) if mask is None else mask.flatten().nonzero()[:, 0]
        if not len(index):
            raise ValueError(
                "the layers of this batch have no row: leave empty batches out"
                if mask is None
                else f"the mask {tuple(mask.shape)} leaves no valid token: True must mark the tokens that count"
            )
        if not self._widths:
            self._start(layers, split)
        self.n += len(index)
        whole, start = len(index) == len(layers[0]), 0
        while start < len(index):
            stop = start + self._tokens.room
            at = index[start:stop]
            self._tokens.add([x[start:stop] if whole else x.index_select(0, at.to(x.device)) for x in layers])
            start = stop

    def _add_clusters(self, rows: list[Tensor], mask: Tensor, split: int) -> None:
        if not self._widths:
            self._start(rows, split)
            self._pilot = [x.double().median(dim=0).values for x in rows]
        rows = [x.double() - pilot for x, pilot in zip(rows, self._pilot, strict=True)]
        mask = mask[mask.any(1)].to(rows[0].device)  # a sequence without a valid token is no sequence
        lengths = mask.sum(1)  # (B,)
        self.n += len(lengths)
        share = 1 / lengths.double()  # each token's weight: a mean over its sequence
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths)  # (N,)
        weight = share[owner]
        means = [x.new_zeros(len(lengths), x.shape[1]).index_add_(0, owner, x * weight[:, None]) for x in rows]
        self._means.add(means, [mean.square().sum(1) for mean in means])
        along = [(x * mean[owner]).sum(1) for x, mean in zip(rows, means, strict=True)]  # x_it · μ_i
        self._tokens.add(rows, along, weight)
        grams = []
        for x in rows:  # padding is 0 here, so it adds nothing below
            padded = x.new_zeros(*mask.shape, x.shape[1])
            padded[mask] = x
            grams.append((padded @ padded.mT * share[:, None, None]).flatten())  # (B·T·T,)
        stacked = torch.stack(grams)
        self._within += stacked @ stacked.T  # ‖C_i‖² = mean over tokens t, u of K_tu L_tu

    def _debiased(self, i: int, j: int) -> Tensor:
        """HSIC₁ as a U-statistic over distinct sequences a, b, c, d:
        mean K_ab L_ab − 2 mean K_ab L_ac + mean K_ab L_cd.

        With C = Σ_a C_a, C_a the mean of x yᵀ over the tokens of sequence a, and M = Σ_a μ_a νᵀ_a:
        Σ K_ab L_ab = ‖C‖² − Σ‖C_a‖²;  Σ K_ab L_ac = sᵀC t − s·p − t·q + 2 Σ μ_aᵀC_aν_a − ⟨C, M⟩;  Σ K_ab L_cd by
        inclusion and exclusion from the same two sums of the means.
        """
        n, tokens, means = self.n, self._tokens, self._means
        sx, sy, center = means.total(i), means.total(j), means.outer(i, j)

        def pairs_and_triples(moments: Moments, within: Tensor) -> tuple[Tensor, Tensor]:
            c = moments.outer(i, j)
            triples = sx @ c @ sy - sx @ moments.along(i, j) - sy @ moments.along(j, i) + 2 * moments.numbers[i, j]
            return c.square().sum() - within, triples - (c * center).sum()

        pairs, triples = pairs_and_triples(tokens, self._within[i, j] if self.clusters else tokens.numbers[i, j])
        mean_pairs, mean_triples = pairs_and_triples(means, means.numbers[i, j])
        quadruples = (sx @ sx - means.numbers[i, -1]) * (sy @ sy - means.numbers[j, -1])
        quadruples = quadruples - 4 * mean_triples - 2 * mean_pairs
        return (pairs - 2 * triples / (n - 2) + quadruples / ((n - 2) * (n - 3))) / (n * (n - 1))

    def _biased(self, i: int, j: int) -> Tensor:
        c = self._tokens.outer(i, j) - torch.outer(self._tokens.total(i), self._tokens.total(j)) / self.n
        return c.square().sum() / (self.n - 1) ** 2


def _at_least_float32(x: Tensor) -> Tensor:
    x = x.detach()
    x = x.cpu() if x.device.type == "mps" else x  # which has no float64 to sum in
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class MinibatchCKA:
    """Minibatch CKA (Nguyen et al., 2021): HSIC₁ of each batch, summed over batches, the ratio last.

    Unbiased in each HSIC like the exact stream, noisier for the same data, and small: it keeps one number a layer pair.
    Rows are paired only with rows of their own batch, so shuffle. With one batch it equals the exact value.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._widths: tuple[list[int], list[int]] | None = None
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], mask: Tensor | None = None
    ) -> MinibatchCKA:
        """Add a batch of at least 4 rows: lists of (B, T, d) with mask (B, T), or of (n, d). Returns self."""
        xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
        xs, ys = valid_rows(xs, mask), valid_rows(ys, mask)
        check_estimator("debiased", xs[0].shape[0], "rows a batch")
        widths = [x.shape[-1] for x in xs], [y.shape[-1] for y in ys]
        if self._widths not in (None, widths):
            raise ValueError(
                f"this batch has layers of widths {widths[0]} (student) and {widths[1]} (teacher), the first one had "
                f"{self._widths[0]} and {self._widths[1]}: one MinibatchCKA serves one pair of models"
            )
        self._widths, new = widths, hsic_matrix(xs, ys, "debiased")
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
