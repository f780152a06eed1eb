"""Maps from the student's width to the teacher's, trained beside the student and left out of its export."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

Projection = Literal["linear", "orthogonal", "mlp"]
KINDS = get_args(Projection)


class MLP(nn.Module):
    """d_S → d_T → d_T with a GELU between."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first, self.second = nn.Linear(in_features, out_features), nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_S) -> (…, d_T)"""
        return self.second(nn.functional.gelu(self.first(x)))


def make_projection(kind: str, d_student: int, d_teacher: int) -> nn.Module:
    """A trainable map (…, d_S) → (…, d_T).

    Args:
        kind: "linear" (FitNets, TinyBERT; no bias), "orthogonal" (a linear map whose rows or columns stay orthonormal:
            it turns the student and cannot stretch it; Miles et al. 2024, arXiv 2403.06213), or "mlp" (`MLP`).

    Raises:
        ValueError: another kind.
    """
    if kind == "mlp":
        return MLP(d_student, d_teacher)
    if kind not in KINDS:
        raise ValueError(f"projection={kind!r} is not known; choose one of {', '.join(KINDS)} or None.")
    linear = nn.Linear(d_student, d_teacher, bias=False)
    return orthogonal(linear) if kind == "orthogonal" else linear


class LeastSquares:
    """The best linear map of one projection, from sums over any number of batches. float64.

    Args:
        name: the projection's, for messages.
        projection: a linear or an orthogonal one.

    Raises:
        ValueError: another one.
    """

    def __init__(self, name: str, projection: nn.Module):
        if not isinstance(projection, nn.Linear):
            raise ValueError(
                f"projection {name} is a {type(projection).__name__}, which has no least-squares solution; fit "
                "linear and orthogonal ones."
            )
        self.projection = projection
        d_student, d_teacher = projection.in_features, projection.out_features
        self.gram = torch.zeros(d_student, d_student, dtype=torch.float64)  # XᵀX
        self.cross = torch.zeros(d_student, d_teacher, dtype=torch.float64)  # XᵀY
        self.squares = 0.0  # ‖Y‖²

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows (…, d_S) of the student and (…, d_T) of the teacher."""
        x, y = (z.detach().flatten(0, -2).double().cpu() for z in (x, y))
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.squares += float(y.square().sum())

    @torch.no_grad()
    def solve(self) -> float:
        """Set the projection to min_W ‖X W - Y‖, among orthogonal ones if it is one (Procrustes).

        Returns:
            the share of ‖Y‖² that it leaves, 0…1 (an orthogonal one may leave more).
        """
        if torch.nn.utils.parametrize.is_parametrized(self.projection):
            left, _, right = torch.linalg.svd(self.cross, full_matrices=False)
            solution = left @ right
        else:
            solution = torch.linalg.pinv(self.gram, hermitian=True) @ self.cross  # (d_S, d_T); also at rank deficiency
        weight = next(self.projection.parameters())
        solution_there = solution.T.to(weight.device, weight.dtype)
        if torch.nn.utils.parametrize.is_parametrized(self.projection):
            self.projection.weight = solution_there
        else:
            weight.copy_(solution_there)
        rest = self.squares - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return float(rest) / self.squares if self.squares else 0.0
