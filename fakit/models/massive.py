"""Massive activations: a few entries of the hidden states that are thousands of times as large as all others.

Pretrained decoders keep some at their first token, in one or two dimensions (Sun et al. 2024, arXiv 2402.17762;
attention sinks, Xiao et al. 2023, arXiv 2309.17453). A squared difference of hidden states sees these entries alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Sun et al. 2024: above 100, and above some 1,000 times the median magnitude of the same hidden state
SIZE, RATIO = 100.0, 1000.0


@dataclass(frozen=True)
class Massive:
    """A layer's massive activations.

    Attributes:
        layer: its number. dimensions: where they are, the largest first.
        ratio: the largest magnitude over the median one.
        share: of the layer's sum of squares, what they hold.
        first: of their number, those at the first token of a row.
    """

    layer: int
    dimensions: tuple[int, ...]
    ratio: float
    share: float
    first: float


def massive_activations(states: Mapping[int, Tensor] | Sequence[Tensor], mask: Tensor) -> list[Massive]:
    """The layers that have some, by number.

    Args:
        states: hidden states (B, T, d) by layer number, or of layers 0, 1 ….
        mask: bool (B, T), True = a token.
    """
    mask = mask.bool()
    first = mask & (mask.cumsum(1) == 1)  # (B, T)
    found = []
    for layer, x in states.items() if isinstance(states, Mapping) else enumerate(states):
        valid = x.detach()[mask.to(x.device)].float()  # (N, d)
        size = valid.abs()
        median = size.median().item()
        massive = are_massive(valid, median)
        if not massive.any():
            continue
        highest = size.masked_fill(~massive, 0.0).amax(0)  # (d,)
        dimensions = highest.argsort(descending=True)[: int((highest > 0).sum())]
        squares = valid.double().square()
        rows = massive.sum(1)[first[mask].to(x.device)].sum()
        found.append(
            Massive(
                layer=int(layer),
                dimensions=tuple(dimensions.tolist()),
                ratio=size.max().item() / median if median else torch.inf,
                share=(squares[massive].sum() / squares.sum()).item(),
                first=(rows / massive.sum()).item(),
            )
        )
    return found


def are_massive(states: Tensor, median: float) -> Tensor:
    """Which entries of hidden states are massive beside their median magnitude. bool, of their shape"""
    size = states.abs()
    return (size > SIZE) & (size > RATIO * median)


def in_words(found: Sequence[Massive]) -> str:
    """All layers in one phrase."""
    if not found:
        return "none"
    layers = [one.layer for one in found]
    top = max(found, key=lambda one: one.ratio)
    dimensions = dict.fromkeys(number for one in sorted(found, key=lambda one: -one.ratio) for number in one.dimensions)
    shown = ", ".join(map(str, list(dimensions)[:4])) + (" …" if len(dimensions) > 4 else "")
    where = "layer" if len(layers) == 1 else "layers"
    plural = "dimension" if len(dimensions) == 1 else "dimensions"
    share = sum(one.share for one in found) / len(found)
    first = sum(one.first for one in found) / len(found)
    return (
        f"{where} {_ranges(layers)}, {plural} {shown}: up to {top.ratio:,.0f} times the median, {share:.0%} of the sum "
        f"of squares, {first:.0%} of them at first tokens"
    )


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
