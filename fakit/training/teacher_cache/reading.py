"""Rows of a cache laid out as a batch has them: lengths, documents and attention inputs."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.training.teacher_cache.build import DOCUMENTS


class Place(NamedTuple):
    """Where a row is: its shard, its number there, the range of its tokens, and that of those with logits."""

    shard: Mapping[str, Tensor]
    local: int
    tokens: slice
    positions: slice

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.tokens.stop - self.tokens.start


def documents_of(places: Sequence[Place], mask: Tensor) -> Tensor | None:
    """The number of each token's document in its row of the batch, int64 (B, T),
    each place of padding one of its own; None for one a row.
    """
    if len(places) == len(mask) and DOCUMENTS not in places[0].shard:
        return None
    numbers, after = [], 0
    for place in places:
        one = torch.zeros(place.length, dtype=torch.long)
        own = place.shard[DOCUMENTS][place.tokens].long() if DOCUMENTS in place.shard else one
        numbers.append(own + after)
        after = int(numbers[-1][-1]) + 1
    table = torch.full(mask.shape, -1).masked_scatter_(mask, torch.cat(numbers))  # (B, T)
    both = mask[:, 1:] & mask[:, :-1]
    begins = table.diff(dim=1) != 0
    if not (begins & both).any():
        return None
    return pad((begins | ~both).long().cumsum(1), (1, 0))


def attention_of(
    settings: Mapping[str, Any], kept: Mapping[str, Tensor], mask: Tensor, documents: Tensor | None
) -> AttentionInputs:
    """Attention inputs of a layer: queries (B, H, T, d_head), keys and values (B, H_kv, T, d_head); mask,
    documents (B, T).
    """
    back, ahead = settings["back"], settings["ahead"]
    causal, allowed = ahead == 0, mask
    if back is not None or ahead not in (None, 0):  # a window
        near = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)  # (T, T)
        near = near if back is None else near.triu(-back)
        near = near if ahead is None else near.tril(ahead)
        allowed = near & mask[:, None, None, :]  # (B, 1, T, T)
    sinks = settings["sinks"]
    return AttentionInputs(
        kept["queries"],
        kept["keys"],
        kept.get("values"),
        mask=allowed,
        scaling=settings["scaling"],
        causal=causal,
        softcap=settings["softcap"],
        sinks=None if sinks is None else torch.tensor(sinks, device=mask.device),
        documents=documents,
    )


def check_lengths(name: str, rows: Sequence[int], lengths: Sequence[int], mask: Tensor, by_row: bool) -> None:
    """Raise ValueError where rows of a cache are not those that a batch's mask (B, T) is of.

    Args:
        name: the teacher's.
        lengths: tokens of each of the rows.
        by_row: its logits are one prediction a row.
    """
    wanted = mask.sum(1).tolist()
    if rows and len(rows) > len(mask):  # packed: some of them after one another make a row of the batch
        if by_row:
            raise ValueError(
                f"{len(rows)} rows of the cache asked for a batch of {len(mask)}: {name} gives one prediction a row, "
                "so its rows cannot be packed."
            )
        if {*accumulate(wanted)} <= {0, *accumulate(lengths)} and sum(wanted) == sum(lengths):
            return
        raise ValueError(
            f"{len(rows)} rows of the cache, of {lengths[:8]}{' …' if lengths[8:] else ''} tokens, asked for a "
            f"batch whose rows have {wanted[:8]}: they do not fill them one after another. Pack whole rows, or "
            "give one number a row."
        )
    if len(rows) != len(mask) or not rows:
        raise ValueError(f"{len(rows)} rows of the cache asked for a batch of {len(mask)}; give one number a row.")
    for row, found, length in zip(rows, lengths, wanted, strict=True):
        if found != length:
            raise ValueError(
                f"row {row} of the cache has {found} tokens, the batch has {length}: the batch was tokenized or "
                "truncated differently, or its rows are numbered differently, from the data set that the cache "
                "was built from."
            )
