"""What attention scores are made of: queries, keys and everything a layer does to their products before the softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fakit.losses.reduce import at_least_float32


@dataclass
class AttentionInputs:
    """What one layer's attention function received. Queries (B, H, T, d_head); keys, values (B, H_kv, T, d_head)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # bool (True = may look) or additive float, (B or 1, H or 1, T, T); (B, T) under flash; None
    scaling: float
    causal: bool  # the function masks the future itself, because no mask says so
    softcap: float | None = None
    position_bias: Tensor | None = None  # (B or 1, H, T, T)
    sinks: Tensor | None = None  # (H,): a learned score that takes its share of every row (GPT-OSS)

    def maps(self) -> Tensor:
        """Attention maps before dropout. Rows sum to 1, or to less where a sink takes its share. (B, H, T, T)"""
        scores = self.scores()
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)  # (B, H, T, 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]

    def scores(self) -> Tensor:
        """Scaled, capped, biased and masked scores, before the softmax; masked pairs hold the smallest float. (B, H, T, T)"""
        query, key = at_least_float32(self.query), at_least_float32(self.key)
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)  # grouped heads: (B, H_kv, T, d) -> (B, H, T, d)
        scores = query @ key.transpose(-2, -1) * self.scaling  # (B, H, T, T)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        lowest = torch.finfo(scores.dtype).min
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, lowest)
        if self.mask is not None:
            mask = self.mask[:, None, None, :].bool() if self.mask.dim() == 2 else self.mask[..., : scores.shape[-1]]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, lowest)
            else:
                scores = (scores + mask).clamp_min(lowest)
        return scores

    def detach(self) -> "AttentionInputs":
        return AttentionInputs(
            **{k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(self).items()}  # shallow: no copy
        )
