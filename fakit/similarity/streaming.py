"""CKA of all layer pairs in one pass over the data, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .hsic import above_rounding, check_estimator, hsic_matrix, paired_rows, ratio, valid_rows, warn_reasons

_BLOCK = (
    2048  # rows a product: its matrices stay below 32 MiB, above which every allocation is mapped (and cleared) anew
)


class StreamingCKA:
    """Exact CKA of every student layer with every teacher layer, one pass, any split into batches.

    The result equals :func:`fakit.similarity.cka` on all rows at once, however the rows came in and wherever their mean
    lies: a fixed pilot mean (the first batch's) is taken off, and the sums stay in float64. Memory is Σp·Σq + Σp² + Σq²
    over the layers (13 × 7 of width 768: 0.5 GB; 7 × 4 of 384: 46 MB) and a few thousand rows, whatever the number of rows.

    Args:
        clusters: what a row is when layers are (B, T, d). False: every valid token, as if they were independent (they
            are not: tokens of one sequence are alike, which inflates the value). True: HSIC₁ of one token a sequence,
            averaged over *all* ways to draw one valid token from each, the same token in both models; exact, no random
            numbers. A sequence must come whole, in one update. Debiased only.
        dtype: of the products over some thousand rows, which are then summed in float64. None: the features' own, at
            least float32. float64 features are exact to 1e-10, float32 features cost about 1e-6 (dtype=torch.float64: not).

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
        self.clusters, self.dtype = clusters, dtype
        self.n = 0
        self._split = 0  # student layers come first in every list
        self._pilot: list[Tensor] = []
        self._tokens: _Moments | None = None
        self._means: _Moments | None = None  # the same moments of sequence means
        self._within: Tensor | None = None  # (layers, layers): Σ_i ‖C_i‖² of a pair

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
        layers = [_at_least_float32(x) for x in xs + ys]
        widths, known = [x.shape[-1] for x in layers], [pilot.shape[0] for pilot in self._pilot]
        if known and (widths != known or len(xs) != self._split):
            raise ValueError(
                f"this batch has layers of widths {widths[: len(xs)]} (student) and {widths[len(xs) :]} (teacher), the "
                f"first one had {known[: self._split]} and {known[self._split :]}: one StreamingCKA serves one pair of models"
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
                "StreamingCKA(clusters=True) has the debiased estimator only: for the biased one use clusters=False here, "
                "or compare_layers(…, estimator='biased')"
            )
        for moments in (self._tokens, self._means):
            moments.flush()
        students, teachers = range(self._split), range(self._split, len(self._pilot))
        hsic = self._debiased if estimator == "debiased" else self._biased
        cross = torch.stack([torch.stack([hsic(s, t) for t in teachers]) for s in students])
        rounding = 1e-13 if self._tokens.dtype == torch.float64 else 1e-6
        own = [
            above_rounding(hsic(i, i), self._tokens.outer(i, i).square().sum() / self.n**2, rounding)
            for i in (*students, *teachers)
        ]
        values, reasons = ratio(cross, torch.stack(own[: self._split]), torch.stack(own[self._split :]))
        warn_reasons(reasons)
        return values

    def _start(self, rows: list[Tensor], split: int) -> None:
        self._split = split
        # first row + mean of what is left: exactly the constant where a feature is constant
        self._pilot = [x[0] + (x - x[:1]).mean(0) for x in rows]
        dtype = self.dtype or (torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32)
        widths, device = [x.shape[1] for x in rows], rows[0].device
        self._tokens = _Moments(widths, split, dtype, device)
        self._means = _Moments(widths, split, dtype, device) if self.clusters else self._tokens
        self._within = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)

    def _shifted(self, rows: list[Tensor], split: int) -> list[Tensor]:
        """Rows without the pilot, which goes before precision does, in the dtype of the products."""
        if not self._pilot:
            self._start(rows, split)
        dtype = self._tokens.dtype
        wide = (x.to(torch.promote_types(x.dtype, dtype)) for x in rows)
        return [(x - pilot).to(dtype) for x, pilot in zip(wide, self._pilot, strict=True)]

    def _add_rows(self, layers: list[Tensor], mask: Tensor | None, split: int) -> None:
        """Each row is its own mean: token and mean moments are one. Rows come as many at a time as complete a block."""
        layers = [x.flatten(0, -2) for x in layers]  # (B·T, d)
        index = torch.arange(len(layers[0])) if mask is None else mask.flatten().nonzero()[:, 0]
        if not len(index):
            raise ValueError(
                f"the mask {tuple(mask.shape)} leaves no valid token: True must mark the tokens that count"
            )
        self.n += len(index)
        whole, start = len(index) == len(layers[0]), 0
        while start < len(index):
            stop = start + (self._tokens.room if self._tokens else _BLOCK)
            at = index[start:stop]
            block = [x[start:stop] if whole else x.index_select(0, at.to(x.device)) for x in layers]
            block = self._shifted(block, split)
            self._tokens.add(block, _squares(block))
            start = stop

    def _add_clusters(self, rows: list[Tensor], mask: Tensor, split: int) -> None:
        rows = self._shifted(rows, split)
        mask = mask[mask.any(1)].to(rows[0].device)  # a sequence without a valid token is no sequence
        lengths = mask.sum(1)  # (B,)
        self.n += len(lengths)
        share = 1 / lengths.to(rows[0].dtype)  # each token's weight: a mean over its sequence
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths)  # (N,)
        weight = share[owner]
        means = [x.new_zeros(len(lengths), x.shape[1]).index_add_(0, owner, x * weight[:, None]) for x in rows]
        self._means.add(means, _squares(means))
        along = [(x * mean[owner]).sum(1) for x, mean in zip(rows, means, strict=True)]  # x_it · μ_i
        self._tokens.add(rows, along, weight)
        grams = []
        for x in rows:  # padding is 0 here, so it adds nothing below
            padded = x.new_zeros(*mask.shape, x.shape[1])
            padded[mask] = x
            grams.append((padded @ padded.mT * share[:, None, None]).flatten())  # (B·T·T,)
        stacked = torch.stack(grams)
        self._within += (stacked @ stacked.T).double()  # ‖C_i‖² = mean over tokens t, u of K_tu L_tu

    def _debiased(self, i: int, j: int) -> Tensor:
        """HSIC₁ as a U-statistic over distinct sequences a, b, c, d: mean K_ab L_ab − 2 mean K_ab L_ac + mean K_ab L_cd.

        With C = Σ_a C_a, C_a the mean of x yᵀ over the tokens of sequence a, and M = Σ_a μ_a νᵀ_a:
        Σ K_ab L_ab = ‖C‖² − Σ‖C_a‖²;  Σ K_ab L_ac = sᵀC t − s·p − t·q + 2 Σ μ_aᵀC_aν_a − ⟨C, M⟩;  Σ K_ab L_cd by
        inclusion and exclusion from the same two sums of the means.
        """
        n, tokens, means = self.n, self._tokens, self._means
        sx, sy, centre = means.total(i), means.total(j), means.outer(i, j)

        def pairs_and_triples(moments: _Moments, within: Tensor) -> tuple[Tensor, Tensor]:
            c = moments.outer(i, j)
            triples = sx @ c @ sy - sx @ moments.along(i, j) - sy @ moments.along(j, i) + 2 * moments.numbers[i, j]
            return c.square().sum() - within, triples - (c * centre).sum()

        pairs, triples = pairs_and_triples(tokens, self._within[i, j] if self.clusters else tokens.numbers[i, j])
        mean_pairs, mean_triples = pairs_and_triples(means, means.numbers[i, j])
        quadruples = (sx @ sx - means.numbers[i, -1]) * (sy @ sy - means.numbers[j, -1])
        quadruples = quadruples - 4 * mean_triples - 2 * mean_pairs
        return (pairs - 2 * triples / (n - 2) + quadruples / ((n - 2) * (n - 3))) / (n * (n - 1))

    def _biased(self, i: int, j: int) -> Tensor:
        c = self._tokens.outer(i, j) - torch.outer(self._tokens.total(i), self._tokens.total(j)) / self.n
        return c.square().sum() / (self.n - 1) ** 2


class _Moments:
    """Sums over rows, in float64, of products within every pair of layers that has a CKA: student with teacher, each with itself.

    A row brings x (d,) and a number g of each layer, and a weight w. Rows wait until they fill a block, since one large
    product takes less time than many small ones.

    Attributes:
        numbers: (layers + 1, layers + 1), Σ w g_i g_j; the last row and column are those of g = 1.
    """

    def __init__(self, widths: list[int], split: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._split, self._widths = dtype, split, widths
        zeros = {"dtype": torch.float64, "device": device}
        self._cross = torch.zeros(sum(widths[split:]), sum(widths[:split]), **zeros)  # Σ w y xᵀ of all pairs
        self._own = [torch.zeros(width, width, **zeros) for width in widths]  # Σ w x xᵀ
        self._along = torch.zeros(sum(widths), len(widths) + 1, **zeros)  # Σ w g x; last column Σ w x
        self.numbers = torch.zeros(len(widths) + 1, len(widths) + 1, **zeros)
        self._waiting: list[list[Tensor]] = []
        self._flat = torch.empty(sum(widths), _BLOCK, dtype=dtype, device=device)  # a block of all layers, kept

    @property
    def room(self) -> int:
        """How many rows complete the block."""
        return _BLOCK - sum(len(waiting[0]) for waiting in self._waiting)

    def add(self, rows: list[Tensor], numbers: list[Tensor], weight: Tensor | None = None) -> None:
        """Add x (N, d) and g (N,) of each layer, and w (N,), 1 unless given."""
        root = (
            torch.ones_like(numbers[0]) if weight is None else weight.sqrt()
        )  # of w: products of two rows bring it back
        if weight is not None:
            rows, numbers = [x * root[:, None] for x in rows], [g * root for g in numbers]
        parts = [*rows, torch.stack([*numbers, root], dim=1)]  # the last: (N, layers + 1)
        start = 0
        while start < len(root):
            stop = start + self.room
            self._waiting.append([part[start:stop] for part in parts])
            start = stop
            if not self.room:
                self.flush()

    def flush(self) -> None:
        """Bring in the rows that wait."""
        if not self._waiting:
            return
        *rows, numbers = zip(*self._waiting, strict=True)
        numbers = _joined(numbers)  # (n, layers + 1)
        flat = self._flat if len(numbers) == _BLOCK else self._flat.new_empty(len(self._flat), len(numbers))
        layers = flat.split(self._widths)  # (d, n) each
        for layer, x in zip(layers, rows, strict=True):
            layer.copy_(_joined(x).T)
        self._waiting = []
        students = sum(self._widths[: self._split])
        g, theirs = _operand(numbers.T.contiguous()), _operand(flat[students:])
        # a student layer at a time: what the product returns stays small enough not to be mapped anew
        columns, along = self._cross.split(self._widths[: self._split], 1), self._along.split(self._widths)
        for pairs, own_along, layer in zip(columns, along, layers, strict=False):
            ours = _operand(layer)
            pairs += _outer(theirs, ours)
            own_along += _outer(ours, g)
        self._along[students:] += _outer(theirs, g)
        self.numbers += numbers.double().T @ numbers.double()
        for own, layer in zip(self._own, layers, strict=True):
            _add_symmetric(own, layer)

    def outer(self, i: int, j: int) -> Tensor:
        """Σ w x yᵀ of layers i and j, (p, q): i a student's and j a teacher's, or i = j."""
        if i == j:
            return self._own[i]
        teacher = self._cross.split(self._widths[self._split :])[j - self._split]
        return teacher.split(self._widths[: self._split], 1)[i].T

    def along(self, i: int, j: int) -> Tensor:
        """Σ w g_j x_i, (p,)"""
        return self._along.split(self._widths)[i][:, j]

    def total(self, i: int) -> Tensor:
        """Σ w x_i, (p,)"""
        return self.along(i, -1)


def _at_least_float32(x: Tensor) -> Tensor:
    x = x.detach()
    x = x.cpu() if x.device.type == "mps" else x  # which has no float64 to sum in
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _squares(rows: list[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(x, dim=1).square() for x in rows]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _operand(x: Tensor) -> Tensor:
    """x (d, n) as :func:`_outer` wants it. On a CPU for oneDNN: its float32 products use AVX-512 on every make of processor."""
    fast = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return x.to_mkldnn() if fast else x


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ of operands (p, n) and (q, n): (p, q)"""
    product = F.linear(x, y)
    return product.to_dense() if product.is_mkldnn else product


def _add_symmetric(total: Tensor, x: Tensor) -> None:
    """total += x xᵀ, (p, p) from (p, n), without computing what lies below the diagonal blocks."""
    parts = x.tensor_split(3) if len(x) >= 192 else (x,)
    operands, ends = [_operand(part) for part in parts], [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    for i in range(len(parts)):
        for j in range(i, len(parts)):
            product = _outer(operands[i], operands[j])
            rows, columns = slice(*ends[i : i + 2]), slice(*ends[j : j + 2])
            total[rows, columns] += product
            if i != j:
                total[columns, rows] += product.T


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
