"""The mean over a global batch is not the mean of its parts' means: what each part counts for, term by term.

A term of the objective is a mean over tokens, predicting positions or labels. Where an optimizer step takes several
parts (processes, accumulated micro-batches), the Trainer averages the parts' losses, so a token of a part with much
padding would weigh more than one of a full part. A part's share, its count over the mean count, makes up for that: the
average of share · mean is the global mean.

Exact for every named loss, with these exceptions: the MSE of maps where a window hides pairs, layers of an
encoder-decoder's decoder (tokens are counted in its encoder), heads="best-match" (each part makes its own match),
feature losses that take a batch as a whole (`gram`, `procrustes`, `cka_loss`, `correlation`, `codir`:
a part is a smaller batch), and
functions that are no mean over what counts.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fakit.objective.needs import CountedBatch
from fakit.objective.objective import Objective

Batch = Mapping[str, Tensor]


def counts(objective: Objective, batch: Batch, causal: bool, token_logits: bool) -> dict[str, Tensor]:
    """What each term's mean over a batch runs over, up to a constant factor: {term: () int64}, on the batch's device.

    Args:
        batch: what the model is given; attention_mask (B, T) and labels (B,) or (B, T) are looked at, and whether the
            student wrote it ("written"), in which terms that need labels are off.
        causal: logits at t predict the token at t + 1.
        token_logits: the model's logits are (B, T, V), not (B, C).
    """
    counted = CountedBatch(batch, causal, token_logits)
    answered = counted.labels is not None and not batch.get("written", False)
    return {name: term.count(counted) for name, term in objective.terms.items() if answered or not term.needs_labels}


def shares(parts: Sequence[dict[str, Tensor]], gather: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    """The share of each of this process's parts in a step: {term: () float32},
    with mean 1 over all parts of all processes.

    Args:
        parts: `counts` of the micro-batches of one optimizer step in this process.
        gather: puts one number (1,) of every process into one vector (processes,): one exchange a step,
            which nothing waits for.
    """
    names = sorted(set().union(*parts))
    table = torch.stack([torch.stack([part.get(n, _nothing(part)) for n in names]) for part in parts])  # (parts, terms)
    own = torch.cat([table.sum(0), table.new_tensor([len(parts)])])  # (terms + 1,)
    total = gather(own.unsqueeze(0)).sum(0)  # over the processes
    weights = table * total[-1] / total[:-1].clamp_min(1)
    return [dict(zip(names, row, strict=True)) for row in weights.float()]


def _nothing(part: dict[str, Tensor]) -> Tensor:
    return torch.zeros_like(next(iter(part.values())))
