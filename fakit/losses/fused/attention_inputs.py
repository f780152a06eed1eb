"""What attention scores are made of: queries, keys and everything a layer does to their products before the softmax."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fakit.losses.reduce import at_least_float32, in_full


@dataclass
class AttentionInputs:
    """What one layer's attention function received. Queries (B, H, T, d_head); keys, values (B, H_kv, T, d_head)."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    mask: Tensor | None  # bool (True = may look) or additive float, (B or 1, H or 1, T, T); (B, T) under flash; None
    scaling: float
    causal: bool  # the function masks the future itself, because no mask says so
    softcap: float | None = None
    position_bias: Tensor | None = None  # (B or 1, H, T, T)
    sinks: Tensor | None = None  # (H,): a learned score that takes its share of every row (GPT-OSS)
    documents: Tensor | None = None  # (B, T): tokens of different documents of a packed row do not see each other

    def maps(self) -> Tensor:
        """Attention maps before dropout. Rows sum to 1, or to less where a sink takes its share. (B, H, T, T)"""
        scores = self.scores()
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)  # (B, H, T, 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]

    def scores(self) -> Tensor:
        """Scaled, capped, biased and masked scores, before the softmax; masked pairs hold the smallest float. (B, H,
        T, T)
        """
        query, key = at_least_float32(self.query), at_least_float32(self.key)
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)  # grouped heads: (B, H_kv, T, d) -> (B, H, T, d)
        with in_full(query):
            scores = query @ key.transpose(-2, -1) * self.scaling  # (B, H, T, T)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        for bias in self.biases():
            scores = scores + bias[..., : scores.shape[-1]]
        lowest = torch.finfo(scores.dtype).min
        allowed = self.allowed()
        return scores.clamp_min(lowest) if allowed is None else scores.masked_fill(~allowed, lowest).clamp_min(lowest)

    def biases(self) -> list[Tensor]:
        """What is added to the scores: the position bias, and a mask that is a float. Each (B or 1, H or 1, T, T)."""
        added = [self.position_bias, self.mask if self.mask is not None and self.mask.is_floating_point() else None]
        return [bias for bias in added if bias is not None]

    def allowed(self, start: int = 0, end: int | None = None, keys: int | None = None) -> Tensor | None:
        """Which of the first `keys` keys the queries start…end may look at; None = all. bool (B or 1, H or 1,
        rows, keys)
        """
        tokens = self.query.shape[2]
        end, keys = tokens if end is None else end, tokens if keys is None else keys
        allowed = None
        if self.mask is not None:
            if self.mask.dim() == 2:
                allowed = self.mask.bool()[:, None, None, :keys]
            else:
                allowed = self.mask[:, :, start:end, :keys] if self.mask.shape[2] > 1 else self.mask[..., :keys]
                if allowed.is_floating_point():  # additive: the families write the lowest float, or -inf
                    allowed = allowed > torch.finfo(allowed.dtype).min / 2
                allowed = allowed.bool()
        if self.causal:
            past = torch.ones(end - start, keys, dtype=torch.bool, device=self.query.device).tril(start)
            allowed = past[None, None] if allowed is None else allowed & past
        if self.documents is not None:
            same = (self.documents[:, start:end, None] == self.documents[:, None, :keys])[:, None]  # (B, 1, rows, keys)
            allowed = same if allowed is None else allowed & same
        return allowed

    def at_places(self, places: Tensor) -> "AttentionInputs":
        """The same with tokens in the order that `places` (B, T) gives each row."""
        rows = torch.arange(len(places), device=places.device)[:, None]

        def tokens(x: Tensor | None) -> Tensor | None:  # (B, H, T, d)
            return None if x is None else x[rows, :, places].transpose(1, 2)

        def pairs(x: Tensor | None) -> Tensor | None:  # (B or 1, H or 1, T or 1, T)
            if x is None:
                return None
            x = x.expand(len(places), *x.shape[1:])
            queries = places if x.shape[2] > 1 else torch.zeros_like(places[:, :1])
            return x[rows[..., None], :, queries[:, :, None], places[:, None, :]].permute(0, 3, 1, 2)

        by_token = self.mask is not None and self.mask.dim() == 2
        return replace(
            self,
            query=tokens(self.query),
            key=tokens(self.key),
            value=tokens(self.value),
            mask=self.mask.gather(1, places) if by_token else pairs(self.mask),
            position_bias=pairs(self.position_bias),
        )

    def select_heads(self, heads: Tensor) -> "AttentionInputs":
        """The same with the heads named by `heads` (H',), each with a key of its own."""

        def pick(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.dim() < 4 or x.shape[1] == 1 else x[:, heads]

        groups = self.query.shape[1] // self.key.shape[1]
        return replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, heads // groups],
            value=None,
            mask=pick(self.mask),
            position_bias=pick(self.position_bias),
            sinks=None if self.sinks is None else self.sinks[heads],
        )

    def detach(self) -> "AttentionInputs":
        """The same, cut from the graph. Nothing is copied."""
        return AttentionInputs(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(self).items()})
