"""Fidelity: how closely a student follows its teacher, whatever the labels say.

The accumulators are streaming: `update` once a batch, `compute` at the end; the batch split changes nothing, and
padding takes no part. Sums are kept in float64 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fakit.losses.attention import over_valid_keys

ENTRIES = 2**21  # of logits whose divergence is taken at once: 16 MB in float64, and some of them


def ranking_agreement(student_logits: Tensor, teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Per row: is the ordered top-k the same (CR@k), and which share of the top-k is common (MOR@k)?

    Source: RLKD (Peng & Zhang, arXiv 2409.12545), whose metrics are the means of these over positions.

    Args:
        student_logits, teacher_logits: (N, V). k: 1…V.

    Returns:
        consistent (N,) in {0, 1} and overlap (N,) in 0…1, float64.
    """
    _check_same(student_logits, teacher_logits)
    size = student_logits.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"ranking_agreement: k={k} was asked of logits with {size} entries; use 1 ≤ k ≤ {size}")
    student_top = student_logits.topk(k, dim=-1).indices  # (N, k)
    teacher_top = teacher_logits.topk(k, dim=-1).indices  # (N, k)
    consistent = (student_top == teacher_top).all(dim=-1)
    overlap = (student_top[:, :, None] == teacher_top[:, None, :]).any(dim=-1).sum(dim=-1) / k
    return consistent.double(), overlap.double()


class Agreement:
    """Streaming agreement of two models' outputs.

    Args:
        k: depth of CR@k and MOR@k; None leaves the two out (they say nothing about two classes).
        acceptance: also Σ_v min(P(v), Q(v)) = 1 - TV at temperature 1, the chance that a token which the student
            proposes is kept by the teacher (Leviathan et al. 2023, arXiv 2211.17192; see `DraftQuality`).

    Example:
        >>> agreement = Agreement(k=None)
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
        >>> agreement.update(logits, logits).compute()
        {'agreement': 1.0, 'kl': 0.0}
    """

    def __init__(self, k: int | None = 5, acceptance: bool = False):
        self.k, self.acceptance = k, acceptance
        self.positions = 0
        self._sums: dict[str, float] = {}

    def update(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Agreement:
        """Add one batch.

        Args:
            student_logits, teacher_logits: (N, C) or (B, T, V), over the same vocabulary.
            mask: bool (N,) or (B, T), True = counts. None counts every row.

        Raises:
            ValueError: the shapes differ, or the mask does not fit them.
        """
        _check_same(student_logits, teacher_logits)
        rows = student_logits.shape[:-1]
        if mask is not None and mask.shape != rows:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, the logits' positions are {tuple(rows)}; give one bool each"
            )
        student, teacher = student_logits.detach(), teacher_logits.detach()
        if mask is None:
            student, teacher = student.flatten(0, -2).float(), teacher.flatten(0, -2).float()  # (N, V) each
        else:
            keep = mask.bool().to(student.device)
            student, teacher = student[keep].float(), teacher[keep].float()
        if len(student) == 0:
            return self
        values = {"agreement": student.argmax(-1) == teacher.argmax(-1)}
        some = max(1, ENTRIES // student.shape[-1])
        values["kl"] = torch.cat([_kl(*rows) for rows in zip(teacher.split(some), student.split(some), strict=True)])
        if self.acceptance:
            values["acceptance"] = torch.minimum(teacher.softmax(-1), student.softmax(-1)).double().sum(-1)
        if self.k is not None:
            values[f"cr@{self.k}"], values[f"mor@{self.k}"] = ranking_agreement(student, teacher, self.k)
        for name, each in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + each.double().sum().item()
        self.positions += len(student)
        return self

    def compute(self) -> dict[str, float]:
        """Means over all counted positions.

        Returns:
            "agreement" (share of equal top-1), "kl" (KL(teacher ‖ student) at temperature 1, nats); where asked for
            "acceptance", and with k "cr@k", "mor@k".
        """
        if self.positions == 0:
            raise ValueError(
                "Agreement: no valid position was counted; call update with a mask that has True somewhere"
            )
        return {name: total / self.positions for name, total in self._sums.items()}


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each row, (n, V) → (n,). In float64: its summands, of both signs, are larger than their
    sum by far where two models hardly differ, and float32 would leave three or four digits of it.
    """
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    p = log_p.exp()
    # Where the teacher gives no probability at all (a logit of -inf) the term is 0, not 0 · inf. NaN stays NaN.
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def attention_jsd(student_maps: Tensor, teacher_maps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Jensen–Shannon divergence of attention maps, per head: ½ KL(A_T ‖ M) + ½ KL(A_S ‖ M), M = ½ (A_T + A_S).

    Args:
        student_maps, teacher_maps: (B, H, T, T), rows are queries.
        mask: bool (B, T), True = counts, for queries and keys alike; rows are renormalized over the keys that count.

    Returns:
        (H,) float64, in nats, 0…log 2: means over all queries that count.
    """
    return AttentionDivergence().update(student_maps, teacher_maps, mask).compute()


class AttentionDivergence:
    """Streaming form of `attention_jsd` over batches; heads are compared one to one."""

    def __init__(self):
        self.queries = 0
        self._total: Tensor | float = 0.0

    def update(self, student_maps: Tensor, teacher_maps: Tensor, mask: Tensor | None = None) -> AttentionDivergence:
        """Add one batch; see `attention_jsd` for the shapes."""
        _check_same(
            student_maps, teacher_maps, "maps", "(B, H, T, T); match the heads first where their numbers differ"
        )
        batch, _, length, keys = student_maps.shape
        mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != (batch, length) or keys != length:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, the maps {tuple(student_maps.shape)}; "
                "give maps (B, H, T, T) and mask (B, T)"
            )
        mask = mask.to(student_maps.device)
        student, teacher = (
            over_valid_keys(maps.detach().double(), mask[:, None, None, :]) for maps in (student_maps, teacher_maps)
        )
        middle = (student + teacher) / 2
        divergence = sum(0.5 * torch.xlogy(a, a / middle.where(middle > 0, 1.0)).sum(-1) for a in (student, teacher))
        # (B, H, T). A row whose keys are all masked may be NaN: filled, not multiplied. Rounding may give -1e-17.
        divergence = divergence.masked_fill(~mask[:, None, :], 0.0).clamp_min(0.0)
        self.queries += int(mask.sum())
        self._total = self._total + divergence.sum(dim=(0, 2)).cpu()  # (H,)
        return self

    def compute(self) -> Tensor:
        """(H,) float64: the mean over the queries counted so far, in nats."""
        if self.queries == 0:
            raise ValueError(
                "attention JSD: no valid query was counted; call update with a mask that has True somewhere"
            )
        return self._total / self.queries


def _check_same(student: Tensor, teacher: Tensor, what: str = "logits", shape: str = "(N, C) or (B, T, V)") -> None:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            f"student {what} have shape {tuple(student.shape)}, teacher {what} {tuple(teacher.shape)}; "
            f"both must be {shape}"
            + ("; a padded vocabulary is cut to the shared one by logits[..., :size]" if what == "logits" else "")
        )
