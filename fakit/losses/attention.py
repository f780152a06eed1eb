"""Attention alignment: does the student look where the teacher looks?

Every function takes student maps (B, H, T, T), teacher maps (B, H, T, T), rows = queries summing to 1 over keys, and
mask, bool (B, T), True = counts: a pair takes part when its query and its key both count. Or mask says it pair by pair,
bool (B, 1, T, T), for causal models whose queries see no later keys. The mean is over queries that count (KL)
or pairs that count (MSE). `score_mse` is given scores in place of maps, before the softmax.
"""

import torch
from torch import Tensor

from fakit.losses.fused.streamed import streamed_map_kl
from fakit.losses.reduce import at_least_float32, check_mask, check_same_shape, masked_mean

__all__ = ["LOSSES", "group_mean", "head_costs", "map_kl", "map_mse", "over_valid_keys", "score_mse", "streamed_map_kl"]

_FIX = "Head counts that differ need Attention(..., heads='group-mean')."


def _prepare(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    check_same_shape(name, student, teacher, "B H T T", _FIX)
    by_pair = mask is not None and mask.dim() == 4
    check_mask(name, mask, (student.shape[0], 1, *student.shape[2:]) if by_pair else student.shape[0::2])
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if mask is None:
        return student, teacher, None
    pairs = mask.bool() if by_pair else mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]  # (B, 1, T, T)
    return student, teacher, pairs


def over_valid_keys(maps: Tensor, valid: Tensor) -> Tensor:
    """Maps whose rows sum to 1 over the valid keys, so that the others take no part in the softmax either.

    Args:
        maps: (…, T, T), rows are queries. What stands at a key that is not valid is replaced, not multiplied: it may be
            NaN.
        valid: bool, True = counts; broadcast against `maps`, so (B, 1, 1, T) masks keys and (B, 1, T, T) pairs.

    Returns:
        (…, T, T): 0 where not valid; a row without any attention on valid keys is 0 throughout.
    """
    maps = maps.masked_fill(~valid, 0.0)
    total = maps.sum(-1, keepdim=True)
    return maps / torch.where(total > 0, total, 1.0)


def map_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(A_T ‖ A_S) = Σ_k a_T log(a_T / a_S), mean over batch, heads and valid queries. MiniLM (Wang et al. 2020).

    Where the teacher looks and the student gives exactly 0, the smallest normal float stands in,
    so the loss is large and finite.
    """
    student, teacher, pairs = _prepare("map_kl", student, teacher, mask)
    if pairs is not None:
        student, teacher = over_valid_keys(student, pairs), over_valid_keys(teacher, pairs)
    tiny = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log()  # (B, H, T, T)
    queries = None if pairs is None else pairs.any(-1).expand(student.shape[:3])  # (B, H, T)
    return masked_mean((teacher * log_ratio).sum(-1), queries)


def map_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (a_S - a_T)² over batch, heads and valid (query, key) pairs: ‖A_S - A_T‖²_F of arXiv 2412.19449,
    as a mean.
    """
    student, teacher, pairs = _prepare("map_mse", student, teacher, mask)
    if pairs is not None:  # before the square, whose gradient would carry a NaN of padding
        student, teacher = student.masked_fill(~pairs, 0.0), teacher.masked_fill(~pairs, 0.0)
    return masked_mean((student - teacher).square(), None if pairs is None else pairs.expand_as(student))


def score_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (s_S - s_T)² over batch, heads and valid (query, key) pairs, of scores q·k/√d before the softmax, (B, H,
    T, T). TinyBERT (Jiao et al. 2020, eq. 7).

    Ours: pairs that are masked take no part. TinyBERT's code sets scores below -100 to 0 on both sides, so that a
    masked pair counts as one without error, and a real score that low loses its gradient. Unlike maps, scores carry an
    offset of each row that the softmax takes out: the loss is not blind to it.
    """
    return map_mse(student, teacher, mask)


def group_mean(maps: Tensor, heads: int) -> Tensor:
    """Average neighboring heads down to `heads`. (B, H, T, T) -> (B, heads, T, T); H must be a multiple of `heads`."""
    if maps.shape[1] % heads:
        raise ValueError(
            f"group-mean averages {maps.shape[1]} heads in equal groups, and {maps.shape[1]} is no multiple of "
            f"{heads}. Choose a student whose head count divides the teacher's, or heads='best-match', or "
            "Attention('relations')."
        )
    return maps.unflatten(1, (heads, maps.shape[1] // heads)).mean(2)


def head_costs(measure, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`measure` of every student head against every teacher head. (B, H_S, T, T), (B, H_T, T, T) -> (H_S, H_T)"""
    rows = [
        [measure(student[:, [h]], teacher[:, [g]], mask) for g in range(teacher.shape[1])]
        for h in range(student.shape[1])
    ]
    return torch.stack([torch.stack(row) for row in rows])


LOSSES = {"kl": map_kl, "mse": map_mse, "score_mse": score_mse}
