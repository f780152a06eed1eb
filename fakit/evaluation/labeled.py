"""Logits of a causal model at the positions that predict a label, some at a time.

Logits of a whole batch, (B, T, V), are the largest tensor of an evaluation by far: at a vocabulary of 128,256 those of
4,096 tokens take 2.1 GB, and what is computed of them several times that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from fakit.tracing.trace import Trace

ENTRIES = 2**23  # of logits at once: 32 MB in float32
UNLABELED = -100


def labeled_logits(traces: Sequence[Trace], labels: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Logits of several models at the positions that predict a label, and the labels.

    Args:
        traces: of causal models on one batch, with `logits` or with the `head` that stands in their place
            (`capture(..., logits="head")`).
        labels: (B, T), -100 = not counted, not shifted: the label at t + 1 is what position t predicts.

    Yields:
        logits of each model, (n, V) each on the device of `labels`, and targets (n,); n as many as `ENTRIES` allows.
    """
    counts = pad(labels[:, 1:] != UNLABELED, (0, 1))  # (B, T): the position before each label
    places = counts.flatten().nonzero()[:, 0]  # (N,)
    targets = labels.flatten()[places + 1]
    kept = [_at(trace, places) for trace in traces]
    rows = max(1, ENTRIES // max(_vocabulary(trace) for trace in traces))
    for start in range(0, len(places), rows):
        some = slice(start, start + rows)
        yield [_logits(trace, x[some]).to(labels.device) for trace, x in zip(traces, kept, strict=True)], targets[some]


def _at(trace: Trace, places: Tensor) -> Tensor:
    """At the positions that count: what the head is given, or the logits. (N, d) or (N, V)"""
    every = trace.logits if trace.head is None else trace.head.hidden
    return every.flatten(0, 1)[places.to(every.device)]


def _vocabulary(trace: Trace) -> int:
    return trace.logits.shape[-1] if trace.head is None else trace.head.weight.shape[0]


def _logits(trace: Trace, rows: Tensor) -> Tensor:
    return rows if trace.head is None else replace(trace.head, hidden=rows).logits()
