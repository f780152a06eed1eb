"""The teacher's states on an even scale: by statistics gathered once, kept with the objective."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fakit.losses.reduce import at_least_float32, in_full

Standardize = Literal["dimension", "phi_s"]
KINDS = get_args(Standardize)


class Standardization(nn.Module):
    """One teacher layer's affine map, of tokens (…, d), by the mean μ and the covariance of its valid tokens.

        dimension    y = (x - μ) / σ, each dimension by itself; one that never changes is only centered
        phi_s        y = H Uᵀ (x - μ) / √(mean eigenvalue): PHI-S (Ranzinger et al. 2024, arXiv 2410.01680), Uᵀ turns to
                     the covariance's eigenvectors, H (`even_rotation`) spreads them evenly

    After `dimension` every dimension has variance 1, and its relations to others are bent. After `phi_s`, too, but the
    map is a rotation and one scale for all: distances keep their ratios, and errors in y are errors in x.

    Attributes:
        tokens: int64 (), how many the statistics are of; 0 until they are there.
        mean: (d,); weight: (d,) or (d, d). Buffers: they are in the objective's state, and nothing trains them.
    """

    tokens: Tensor
    mean: Tensor
    weight: Tensor

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind, self.width = kind, width
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(width) if kind == "dimension" else torch.zeros(width, width))
        self._known = False  # looked at once, since an accelerator would stop for it in every step

    @property
    def gathered(self) -> bool:
        """Whether the statistics are there."""
        self._known = self._known or int(self.tokens) > 0
        return self._known

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d), float32 or better."""
        x = at_least_float32(x) - self.mean
        if self.kind == "dimension":
            return x * self.weight
        with in_full(x):
            return x @ self.weight.to(x.dtype).T

    @torch.no_grad()
    def set(self, moments: "Moments") -> None:
        """Take over the statistics.

        Raises:
            ValueError: fewer than two tokens, or tokens that are all the same.
        """
        covariance = moments.spread / max(moments.tokens - 1, 1)
        variances = covariance if covariance.dim() == 1 else covariance.diagonal()
        if not float(variances.sum()) > 0:
            raise ValueError(
                f"standardization wants tokens that differ; found {moments.tokens}, all the same. Gather over more of "
                "the data."
            )
        if self.kind == "dimension":
            constant = variances <= 1e-12 * variances.max()
            weight = torch.where(constant, 1.0, variances.masked_fill(constant, 1.0).rsqrt())
        else:
            eigenvalues, vectors = torch.linalg.eigh(covariance)  # of covariance = U diag(λ) Uᵀ
            weight = even_rotation(eigenvalues) @ vectors.T * eigenvalues.mean().rsqrt()
        self.tokens.fill_(moments.tokens)
        self.mean.copy_(moments.mean)
        self.weight.copy_(weight)
        self._known = True


class Moments:
    """Mean and summed products of deviations of rows (n, d), batch by batch (Chan et al. 1979). float64, on the CPU.

    Args:
        width: d.
        whole: products of every two dimensions, spread (d, d); else each one's squares, (d,).
    """

    def __init__(self, width: int, whole: bool):
        self.tokens, self.mean = 0, torch.zeros(width, dtype=torch.float64)
        self.spread = torch.zeros(*((width, width) if whole else (width,)), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows (n, d)."""
        rows = rows.detach().double().cpu()
        if len(rows):
            mean = rows.mean(0)
            self._join(len(rows), mean, self._products(rows - mean))

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> "Moments":
        """Those of all processes. `gather` puts the processes' tensors one after another along the first dimension."""
        counts, means, spreads = (gather(x[None]) for x in (torch.tensor(self.tokens), self.mean, self.spread))
        together = Moments(len(self.mean), self.spread.dim() == 2)
        for tokens, mean, spread in zip(counts.tolist(), means.cpu(), spreads.cpu(), strict=True):
            together._join(tokens, mean, spread)
        return together

    def _products(self, rows: Tensor) -> Tensor:
        return rows.T @ rows if self.spread.dim() == 2 else rows.square().sum(0)

    def _join(self, tokens: int, mean: Tensor, spread: Tensor) -> None:
        if not tokens:
            return
        total, apart = self.tokens + tokens, mean - self.mean
        self.spread = self.spread + spread + self._products(apart[None]) * (self.tokens * tokens / total)
        self.mean = self.mean + apart * (tokens / total)
        self.tokens = total


def even_rotation(eigenvalues: Tensor) -> Tensor:
    """An orthogonal matrix R by which R diag(λ) Rᵀ has the mean of λ all along its diagonal. (d,) -> (d, d)

    PHI-S's: a Hadamard matrix over √d, whose entries are all of one size, so that this holds for any λ. They are built
    of Sylvester's (powers of two) and Paley's (p + 1, p a prime that leaves 3 when divided by 4), which serves 384,
    768, 1024, 4096 … Ours, for widths that neither gives: rotations of two dimensions at a time, each of which brings
    one to the mean (Bendel & Mickey 1978), so that it holds for these λ alone.
    """
    found = hadamard(len(eigenvalues))
    return _by_rotations(eigenvalues) if found is None else found.to(eigenvalues.dtype) / len(eigenvalues) ** 0.5


def hadamard(width: int) -> Tensor | None:
    """A matrix of 1 and -1 with orthogonal rows, float64 (d, d); None where none is built here.

    >>> hadamard(12).shape, hadamard(6)
    (torch.Size([12, 12]), None)
    """
    power = width & -width  # the largest power of two that divides it
    while power:
        rest = width // power
        found = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else _paley(rest - 1)
        if found is not None:
            for _ in range(power.bit_length() - 1):  # Sylvester's
                found = torch.kron(found.new_tensor([[1, 1], [1, -1]]), found)
            return found
        power //= 2
    return None


def _paley(prime: int) -> Tensor | None:
    """Of order p + 1: I + S, S the skew matrix of the quadratic residues."""
    if prime % 4 != 3 or any(prime % n == 0 for n in range(2, int(prime**0.5) + 1)):
        return None
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime).square() % prime] = 1.0
    residues[0] = 0.0
    numbers = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = residues[(numbers[:, None] - numbers) % prime]
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def _by_rotations(eigenvalues: Tensor) -> Tensor:
    matrix, rotation = eigenvalues.diag(), torch.eye(len(eigenvalues), dtype=eigenvalues.dtype)
    mean = eigenvalues.mean()
    rest = list(range(len(eigenvalues)))
    while len(rest) > 1:
        diagonal = matrix.diagonal()[rest]
        low, high = rest[int(diagonal.argmin())], rest[int(diagonal.argmax())]
        if matrix[high, high] - matrix[low, low] <= 1e-14 * mean.abs():
            break
        # tan of the angle that brings entry (low, low) to the mean
        below, above, between = matrix[low, low] - mean, matrix[high, high] - mean, matrix[low, high]
        tan = (-between - torch.sqrt(between.square() - below * above)) / above
        cos = (1 + tan.square()).rsqrt()
        turn = torch.stack([torch.stack([cos, cos * tan]), torch.stack([-cos * tan, cos])])
        both = [low, high]
        matrix[both] = turn @ matrix[both]
        matrix[:, both] = matrix[:, both] @ turn.T
        rotation[both] = turn @ rotation[both]
        rest.remove(low)
    return rotation
