"""The mean over a global batch is not the mean of its parts' means: what each part counts for, term by term.

A term of the objective is a mean over tokens, predicting positions or labels. Where an optimiser step takes several parts (processes,
accumulated micro-batches), the Trainer averages the parts' losses, so a token of a part with much padding would weigh more than one
of a full part. A part's share, its count over the mean count, makes up for that: the average of share · mean is the global mean.

Exact for every named loss, with these exceptions: the MSE of maps where a window hides pairs, layers of an encoder-decoder's decoder
(tokens are counted in its encoder), heads="best-match" (each part makes its own match), and functions that are no mean over what counts.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fakit.objective.objective import Objective, predicting_positions
from fakit.tracing.inputs import find_documents
from fakit.tracing.trace import Trace

Batch = Mapping[str, Tensor]


def counts(objective: Objective, batch: Batch, causal: bool, token_logits: bool) -> dict[str, Tensor]:
    """What each term's mean over a batch runs over, up to a constant factor: {term: () int64}, on the batch's device.

    Args:
        batch: what the model is given; attention_mask (B, T) and labels (B,) or (B, T) are looked at.
        causal: logits at t predict the token at t + 1.
        token_logits: the model's logits are (B, T, V), not (B, C).
    """
    mask, labels = _tokens(batch), batch.get("labels")
    # labels of the tokens' shape are the tokens' (token classification); floats are several labels a text
    token_logits |= labels is not None and labels.shape == mask.shape and not labels.is_floating_point()
    documents = find_documents(batch)  # of packed rows, (B, T)
    rows = mask.new_tensor(len(mask), dtype=torch.long)
    lengths = mask.sum(1) if documents is None else _lengths(mask, documents)  # (B,), or of each document
    found = {"features": lengths.sum(), "attention": lengths.sum()}
    if objective.attention is not None and objective.attention.loss == "mse":  # a mean over pairs of tokens
        found["attention"] = (lengths * (lengths + 1) // 2 if causal else lengths**2).sum()
    found["outputs"] = _positions(mask, batch, causal, documents).sum() if token_logits else rows
    if labels is not None:
        labels = Trace(mask=mask, documents=documents, causal=causal).own_labels(labels)
        labels = labels[:, 1:] if causal and labels.dim() == 2 else labels
        found["task"] = ((labels != -100) & ~labels.isnan()).sum()
    return {name: count for name, count in found.items() if name in objective.weights}


def shares(parts: Sequence[dict[str, Tensor]], gather: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    """The share of each of this process's parts in a step: {term: () float32}, with mean 1 over all parts of all processes.

    Args:
        parts: `counts` of the micro-batches of one optimiser step in this process.
        gather: puts one number (1,) of every process into one vector (processes,): one exchange a step, which nothing waits for.
    """
    names = sorted(set().union(*parts))
    table = torch.stack([torch.stack([part.get(n, _nothing(part)) for n in names]) for part in parts])  # (parts, terms)
    own = torch.cat([table.sum(0), table.new_tensor([len(parts)])])  # (terms + 1,)
    total = gather(own.unsqueeze(0)).sum(0)  # over the processes
    weights = table * total[-1] / total[:-1].clamp_min(1)
    return [dict(zip(names, row, strict=True)) for row in weights.float()]


def _nothing(part: dict[str, Tensor]) -> Tensor:
    return torch.zeros_like(next(iter(part.values())))


def _tokens(batch: Batch) -> Tensor:
    """The tokens that count, bool (B, T); one a row where there is no padding to tell (an image)."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() in (2, 3):  # (B, N, T): multiple choice, every choice a row
        return mask.flatten(0, -2).bool()
    found = next(value for value in batch.values() if isinstance(value, Tensor))
    ids = batch.get("input_ids")
    return (
        torch.ones_like(ids, dtype=torch.bool).flatten(0, -2)
        if ids is not None
        else found.new_ones(len(found), 1).bool()
    )


def _lengths(mask: Tensor, documents: Tensor) -> Tensor:
    """Tokens of every document of packed rows. (B · T,), 0 where there are no more"""
    return torch.zeros_like(documents).scatter_add_(1, documents, mask.long()).flatten()


def _positions(mask: Tensor, batch: Batch, causal: bool, documents: Tensor | None) -> Tensor:
    """The positions that predict something, as the objective's outputs term sees them. bool (B, T') or (B, T' - 1)"""
    labels = batch.get("labels")
    if batch.get("decoder_attention_mask") is not None:
        return batch["decoder_attention_mask"].bool()
    if not causal and labels is not None and labels.shape != mask.shape:  # a decoder's
        return labels != -100
    return predicting_positions(mask, labels, causal, documents)
