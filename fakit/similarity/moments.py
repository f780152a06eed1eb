"""Sums over rows from which HSIC follows: products of layers, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fakit.losses.fused.gemm import times_transposed

BLOCK = 2048
"""Rows a product: its matrices stay below 32 MiB, above which every allocation is mapped (and cleared) anew."""

_PILOT_ROWS = 256  # as many as a median is taken of
_FEW = 256  # rows that cost nothing to be exact about
# A row brings ‖x‖⁴ to self-HSIC's sums, which then goes out of them again: what is left of an extreme one is the
# rounding error. One of 32 times the usual ‖x‖² adds less of it than the √2048 = 45 of the block's other rows together.
_EXTREME = 32.0
_EPSILON = {torch.float32: 1e-6, torch.float64: 1e-13}  # of a sum of products, relative


class Moments:
    """Sums over rows, in float64, of products within every pair of layers that has a CKA: student with teacher,
    each with itself.

    A row brings x (d,) and a number g of each layer, and a weight w. Rows wait until they fill a block, since one large
    product takes less time than many small ones. Products in float32 leave out rows that lie far from the others,
    which are multiplied in float64.

    Args:
        widths: of the layers, the student's first.
        split: how many layers are the student's.
        features: dtype rows come in.
        products: dtype they are multiplied in, float32 or float64.
        centered: rows have lost their pilot already; else the first block's median goes off all of them.

    Attributes:
        numbers: (layers + 1, layers + 1), Σ w g_i g_j; the last row and column are those of g = 1.
    """

    def __init__(
        self,
        widths: Sequence[int],
        split: int,
        features: torch.dtype,
        products: torch.dtype,
        device: torch.device,
        centered: bool = False,
    ) -> None:
        self.dtype, self._split, self._widths, self._centered = products, split, list(widths), centered
        layers, zeros = len(widths), {"dtype": torch.float64, "device": device}
        self._cross = [torch.zeros(sum(widths[split:]), width, **zeros) for width in widths[:split]]  # Σ w y xᵀ
        self._own = [torch.zeros(width, width, **zeros) for width in widths]  # Σ w x xᵀ, right from the diagonal on
        self._along = torch.zeros(sum(widths), layers + 1, **zeros)  # Σ w g x; last column Σ w x
        self.numbers = torch.zeros(layers + 1, layers + 1, **zeros)
        self._rounded = torch.zeros(layers, **zeros)  # Σ w ‖x‖² of the rows that were multiplied in float32
        # the block: rows as columns, since that is what the products want
        self._flat = torch.empty(sum(widths), BLOCK, dtype=torch.promote_types(features, products), device=device)
        self._numbers = torch.empty(BLOCK, layers + 1, **zeros)
        self._filled, self._pilot = 0, None

    @property
    def room(self) -> int:
        """How many rows complete the block."""
        return BLOCK - self._filled

    def add(
        self, rows: Sequence[Tensor], numbers: Sequence[Tensor] | None = None, weight: Tensor | None = None
    ) -> None:
        """Add x (N, d) of each layer.

        Args:
            numbers: g (N,) of each layer; None for g = ‖x‖² (after the pilot has gone).
            weight: w (N,); None for 1. Only with numbers.
        """
        if numbers is not None:
            root = numbers[0].new_ones(len(numbers[0])) if weight is None else weight.sqrt()  # two rows bring back w
            rows = rows if weight is None else [x * root[:, None] for x in rows]
            numbers = torch.stack([*(g * root for g in numbers), root], dim=1)
        start, total = 0, len(rows[0])
        while start < total:
            stop = min(total, start + self.room)
            at = slice(self._filled, self._filled + stop - start)
            for i, (layer, x) in enumerate(zip(self._flat.split(self._widths), rows, strict=True)):
                x = x[start:stop] if self._pilot is None else x[start:stop] - self._pilot[i]
                layer[:, at] = x.T
                if not self._centered:
                    self._numbers[at, i] = torch.linalg.vector_norm(x, dim=1).square().double()
            self._numbers[at, -1] = 1.0
            if numbers is not None:
                self._numbers[at] = numbers[start:stop].double()
            start, self._filled = stop, at.stop
            if not self.room:
                self.flush()

    def flush(self) -> None:
        """Bring in the rows that wait."""
        n, self._filled = self._filled, 0
        if not n:
            return
        flat = self._flat if n == BLOCK else self._flat[:, :n].contiguous()
        layers = flat.split(self._widths)  # (d, n) each
        numbers = self._numbers[:n]
        if not self._centered and self._pilot is None:
            self._pilot = [_pilot(layer) for layer in layers]
            for layer, pilot in zip(layers, self._pilot, strict=True):
                layer -= pilot[:, None]
            numbers[:, :-1] = _squares(layers).T
        if self.dtype == torch.float64 or n <= _FEW:
            self._multiply(flat.double(), numbers)
            return
        squares = _squares(layers) if self._centered else numbers[:, :-1].T  # (layers, n)
        extreme = (squares > _EXTREME * squares.median(dim=1, keepdim=True).values).any(0).nonzero()[:, 0]
        if len(extreme):
            exact = flat[:, extreme].double()
            exact_numbers = numbers[extreme]
            if not self._centered:  # their squares, too
                exact_numbers[:, :-1] = _squares(exact.split(self._widths)).T
            self._multiply(exact, exact_numbers)
            flat[:, extreme] = 0.0
            numbers, squares = numbers.index_fill(0, extreme, 0.0), squares.index_fill(1, extreme, 0.0)
        self._rounded += squares.sum(1)
        self._multiply(flat.to(self.dtype), numbers)

    def _multiply(self, flat: Tensor, numbers: Tensor) -> None:
        """Add the products of rows (Σd, n) and of their numbers (n, layers + 1), in the dtype of the rows."""
        layers, students = flat.split(self._widths), sum(self._widths[: self._split])
        # a student layer at a time: what the product returns stays small enough not to be mapped anew
        for pairs, layer in zip(self._cross, layers, strict=False):
            _accumulate(pairs, times_transposed(flat[students:], layer))
        self._along += times_transposed(flat, numbers.T.to(flat.dtype).contiguous())
        self.numbers += numbers.T @ numbers
        for own, layer in zip(self._own, layers, strict=True):
            _add_upper(own, layer)

    def outer(self, i: int, j: int) -> Tensor:
        """Σ w x yᵀ of layers i and j, (p, q): i a student's and j a teacher's, or i = j."""
        if i == j:
            return self._own[i].triu() + self._own[i].triu(1).T
        return self._cross[i].split(self._widths[self._split :])[j - self._split].T

    def along(self, i: int, j: int) -> Tensor:
        """Σ w g_j x_i, (p,)"""
        return self._along.split(self._widths)[i][:, j]

    def total(self, i: int) -> Tensor:
        """Σ w x_i, (p,)"""
        return self.along(i, -1)

    def rounding(self, i: int) -> Tensor:
        """The size of what ‖Σ w x xᵀ‖² of layer i may be wrong by, ()."""
        size = torch.linalg.matrix_norm(self.outer(i, i))
        return _EPSILON[torch.float64] * size.square() + _EPSILON[torch.float32] * self._rounded[i] * size


def _pilot(layer: Tensor) -> Tensor:
    """The median of features (d, n), (d,): what an extreme row does not move,
    and exactly the constant where a feature is constant.
    """
    return layer[:, :: -(-layer.shape[1] // _PILOT_ROWS)].median(dim=1).values


def _squares(layers: Sequence[Tensor]) -> Tensor:
    """‖x‖² of layers (d, n): (layers, n)"""
    return torch.stack([(x * x).sum(0) for x in layers])


def _accumulate(total: Tensor, product: Tensor) -> None:
    """total += product, some rows at a time: the float64 copy that torch makes of them then stays in the processor's
    cache.
    """
    for part, new in zip(total.split(256), product.split(256), strict=True):
        part += new


def _add_upper(total: Tensor, x: Tensor) -> None:
    """total += x xᵀ, (p, p) from (p, n), in bands of rows that begin at the diagonal:
    half of what is below it is not computed.
    """
    start = 0
    for band in x.tensor_split(6) if len(x) >= 192 else (x,):
        total[start : start + len(band), start:] += times_transposed(band, x[start:])
        start += len(band)
