"""Where heads look, and which heads look alike. Maps are (B, H, T, T): row = query, column = key, rows sum to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fakit.losses.attention import over_valid_keys
from fakit.losses.fused import streamed

from .hsic import double


def head_distance(
    student_maps: Tensor, teacher_maps: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Jensen–Shannon distance between every student head and every teacher head, in [0,
    1] (square root of the divergence in bits).

    The divergence is averaged over query rows before the root is taken. Keys that are padding (or, causal, in the
    future) are left out and rows renormalized; rows that see fewer than two keys are all alike and do not count.

    Args:
        student_maps: (B, H_s, T, T).
        teacher_maps: (B, H_t, T, T).
        mask: bool (B, T), True where a token counts.
        causal: whether a query sees no key after it.

    Returns:
        (H_s, H_t), float64.

    Raises:
        ValueError: maps of different sequences or on different devices, mask of another shape, or no row that counts.
    """
    if student_maps.dim() != 4 or teacher_maps.dim() != 4 or _sizes(student_maps) != _sizes(teacher_maps):
        raise ValueError(
            f"student maps have shape {tuple(student_maps.shape)}, teacher maps {tuple(teacher_maps.shape)}: "
            "expected (B, H, T, T) of the same sequences, only H may differ"
        )
    if student_maps.device != teacher_maps.device:
        raise ValueError(
            f"student maps are on {student_maps.device}, teacher maps on {teacher_maps.device}: move one to the "
            "other's device"
        )
    student, rows = _visible(student_maps, mask, causal, least=2)
    teacher, _ = _visible(teacher_maps, mask, causal, least=2)
    student, teacher = student.transpose(0, 1)[:, rows], teacher.transpose(0, 1)[:, rows]  # (H, rows, T)
    teacher_entropy = _entropy(teacher).mean(-1)  # (H_t,)
    divergences = [  # one student head at a time: (H_t, rows, T) alive
        _entropy((head + teacher) / 2).mean(-1) - (_entropy(head).mean(-1) + teacher_entropy) / 2 for head in student
    ]
    return (torch.stack(divergences) / math.log(2)).clamp(0, 1).sqrt()  # rounding alone leaves [0, 1]


@dataclass(frozen=True)
class HeadMatching:
    """Pairs (student head, teacher head), made by one of the rules of `match_heads`.

    Attributes:
        pairs: by student head.
        distances: of each pair.
    """

    pairs: tuple[tuple[int, int], ...]
    distances: tuple[float, ...]

    @property
    def mean_distance(self) -> float:
        return sum(self.distances) / len(self.distances)

    def __str__(self) -> str:
        each = ", ".join(f"S{s}–T{t} {d:.3f}" for (s, t), d in zip(self.pairs, self.distances, strict=True))
        return f"Matched heads, mean Jensen–Shannon distance {self.mean_distance:.3f}: {each}"

    def _repr_markdown_(self) -> str:
        rows = [f"| {s} | {t} | {d:.3f} |" for (s, t), d in zip(self.pairs, self.distances, strict=True)]
        return "\n".join(["| student head | teacher head | distance |", "|---|---|---|", *rows])


def match_heads(distance: Tensor, rule: str = "optimal") -> HeadMatching:
    """A matching of heads for a distance matrix (H_s, H_t).

    Args:
        rule: "optimal" is one to one with the smallest total distance (Hungarian method); where the counts differ,
            heads are left over. "greedy" takes the nearest pair first, and every student head gets a teacher head: what
            `Attention(heads="best-match")` trains with, as it needs no answer from an accelerator.

    Raises:
        ValueError: another rule, not a matrix, or NaN in it.
    """
    from scipy.optimize import linear_sum_assignment

    if rule not in ("optimal", "greedy"):
        raise ValueError(f"rule {rule!r} is unknown: choose 'optimal' or 'greedy'")
    distance = double(distance).cpu()
    if distance.dim() != 2 or not distance.numel() or not distance.isfinite().all():
        raise ValueError(
            f"expected a finite matrix (student heads, teacher heads), found shape {tuple(distance.shape)}"
        )
    if rule == "greedy":
        rows, columns = range(len(distance)), streamed.match_heads(distance).tolist()
    else:
        rows, columns = linear_sum_assignment(distance.numpy())
    pairs = tuple((int(s), int(t)) for s, t in zip(rows, columns, strict=True))
    return HeadMatching(pairs, tuple(float(distance[pair]) for pair in pairs))


def attention_similarity(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """How alike two models' layers look at the input: 1 − mean Jensen–Shannon distance of best-matched heads,
    of all layer pairs.

    Args:
        student_maps: one (B, H_s, T, T) a block, first block first.
        teacher_maps: one (B, H_t, T, T) a block, of the same sequences.
        mask: bool (B, T), True where a token counts.
        causal: whether a query sees no key after it.

    Returns:
        (S + 1, T + 1), float64, by layer number, as ``LayerMap.from_similarity`` and ``LayerMap.emd`` take it. Row and
        column 0 are NaN: embeddings do not attend.

    Raises:
        ValueError: no maps on a side, maps of different sequences, or no row that counts.
    """
    if not len(student_maps) or not len(teacher_maps):
        raise ValueError(
            f"maps of both models are compared, found {len(student_maps)} layers of the student and "
            f"{len(teacher_maps)} of the teacher: capture attentions of at least one layer of each"
        )
    values = torch.full((len(student_maps) + 1, len(teacher_maps) + 1), torch.nan, dtype=torch.float64)
    for s, ours in enumerate(student_maps, start=1):
        for t, theirs in enumerate(teacher_maps, start=1):
            values[s, t] = 1 - match_heads(head_distance(ours, theirs, mask, causal)).mean_distance
    return values


def attention_entropy(
    maps: Tensor, mask: Tensor | None = None, causal: bool = False, normalized: bool = False
) -> Tensor:
    """Mean entropy of each head's rows (H,), in nats; ``normalized``: over log(keys it sees), so that 1 is uniform."""
    maps, rows = _visible(maps, mask, causal, least=2)
    entropy = _entropy(maps)  # (B, H, T)
    if normalized:
        entropy = entropy / _key_mask(maps, mask, causal).sum(-1)[:, None].clamp_min(2).double().log()
    return entropy.transpose(0, 1)[:, rows].mean(1)


def sink_share(maps: Tensor, mask: Tensor | None = None, special: Tensor | None = None, causal: bool = False) -> Tensor:
    """Mean attention of each head (H,) that goes to sinks: the first valid token and ``special`` positions.

    Args:
        maps: (B, H, T, T).
        mask: bool (B, T), True where a token counts.
        special: bool (B, T), further sink positions ([CLS], [SEP], …).
        causal: whether a query sees no key after it.

    Source: Xiao et al., attention sinks (2024); Clark et al. (2019) for [SEP].
    """
    maps, rows = _visible(maps, mask, causal, least=2)
    mask = _token_mask(maps, mask)
    sinks = mask & (mask.cumsum(1) == 1)
    if special is not None:
        if special.shape != mask.shape:
            raise ValueError(
                f"special has shape {tuple(special.shape)}, the tokens {tuple(mask.shape)}: expected (B, T)"
            )
        sinks = sinks | (special.to(mask.device).bool() & mask)
    share = (maps * sinks[:, None, None]).sum(-1)  # (B, H, T)
    return share.transpose(0, 1)[:, rows].mean(1)


def previous_token_score(maps: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Mean attention of each head (H,) from a token to the one before it (Clark et al., 2019; Olsson et al., 2022).

    Raises:
        ValueError: no valid token stands right after another.
    """
    maps, rows = _visible(maps, mask, causal, least=2)
    previous = maps.diagonal(offset=-1, dim1=-2, dim2=-1)  # (B, H, T − 1): query i + 1, key i
    pairs = rows[:, 1:] & _token_mask(maps, mask)[:, :-1]
    if not pairs.any():
        raise ValueError(
            f"no valid token stands right after another in maps {tuple(maps.shape)}: True in the mask must mark the "
            "tokens"
        )
    return previous.transpose(0, 1)[:, pairs].mean(1)


def induction_score(maps: Tensor, input_ids: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """Mean attention of each head (H,) from a token to what followed that token's earlier occurrences (Olsson et al.,
    2022).

    Only queries whose token occurred before count: repeat a random sequence twice to measure it.

    Raises:
        ValueError: no token repeats.
    """
    maps, rows = _visible(maps, mask, causal, least=2)
    valid = _token_mask(maps, mask)
    if input_ids.shape != valid.shape:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}, the tokens {tuple(valid.shape)}: expected (B, T)"
        )
    ids = input_ids.to(maps.device)
    earlier = (ids[:, :, None] == ids[:, None]).tril(-1) & valid[:, None]  # (B, query, key): key holds the same token
    after = torch.zeros_like(earlier)
    after[:, :, 1:] = earlier[:, :, :-1]
    after &= _key_mask(maps, mask, True)
    queries = after.any(-1) & rows
    if not queries.any():
        raise ValueError(
            "no token occurs twice in its sequence: an induction head needs repetition, e.g. a sequence twice"
        )
    return (maps * after[:, None]).sum(-1).transpose(0, 1)[:, queries].mean(1)


def attention_rollout(maps: Sequence[Tensor], mask: Tensor | None = None, residual: float = 0.5) -> Tensor:
    """How much of each input token reaches each position through all layers: the product of head-averaged maps.

    A = (1 − residual) · mean over heads + residual · I, one a layer, multiplied from the last to the first
    (Abnar & Zuidema, 2020).

    Args:
        maps: one (B, H, T, T) a layer, first layer first.
        mask: bool (B, T); rows and columns of padding are 0 in the result.
        residual: the share that bypasses attention.

    Returns:
        (B, T, T), float64; rows of valid tokens sum to 1.
    """
    if not len(maps):
        raise ValueError("no layers: give one map (B, H, T, T) a layer")
    if not 0 <= residual < 1:
        raise ValueError(f"residual is {residual}: the share that bypasses attention lies in [0, 1)")
    rollout: Tensor | None = None
    for layer in maps:
        if rollout is not None and _sizes(layer) != (rollout.shape[0], *rollout.shape[1:]):
            raise ValueError(
                f"maps of different sequences: {tuple(layer.shape)} after {tuple(rollout.shape)} (B, T, T)"
            )
        weights, _ = _visible(layer, mask, causal=False, least=1)
        identity = torch.diag_embed(_token_mask(weights, mask).to(weights))
        step = (1 - residual) * weights.mean(1) + residual * identity
        rollout = step if rollout is None else step @ rollout
    return rollout


def _sizes(maps: Tensor) -> tuple[int, ...]:
    return (maps.shape[0], *maps.shape[2:])


def _token_mask(maps: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(maps.shape[0], maps.shape[-1], dtype=torch.bool, device=maps.device)
    mask = mask.to(maps.device).bool()
    if mask.shape != (maps.shape[0], maps.shape[-1]):
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the maps {tuple(maps.shape)}: expected (B, T)")
    return mask


def _key_mask(maps: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """bool (B, T, T): key j is a token that query i may see."""
    mask = _token_mask(maps, mask)
    visible = mask[:, None, :] & mask[:, :, None]
    return visible.tril() if causal else visible


def _visible(maps: Tensor, mask: Tensor | None, causal: bool, least: int) -> tuple[Tensor, Tensor]:
    """Float64 maps over visible keys, rows renormalized, and the rows (B, T) that see at least ``least`` keys."""
    if maps.dim() != 4 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"maps have shape {tuple(maps.shape)}: expected (B, H, T, T)")
    keys = _key_mask(maps, mask, causal)
    rows = keys.sum(-1) >= least
    if not rows.any():
        raise ValueError(
            f"no valid token sees {least} keys in maps {tuple(maps.shape)}: True in the mask must mark the tokens"
        )
    seen = double(maps).masked_fill(~keys[:, None], 0.0)  # masked_fill: padded rows may hold NaN
    if not seen.isfinite().all() or (seen < 0).any():
        raise ValueError(
            "maps hold NaN, infinity or negative numbers at valid positions: give attention weights after the softmax"
        )
    if (seen.sum(-1).amin(1)[rows] == 0).any():
        raise ValueError("a valid query attends to no valid key: maps and mask do not belong together")
    return over_valid_keys(seen, keys[:, None]), rows


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
