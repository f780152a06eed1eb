"""How evaluation runs a model: as it would be used, quickly, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOKENS = 4096
"""Of a batch, padding too: many short texts or a few long ones, so that memory does not grow with their length."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own training flag restored after, also after an exception."""
    found = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in found.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go."""
    return next(model.parameters()).device


def to_device(batch, device: torch.device) -> dict[str, Tensor]:
    """A collated batch as a plain dict of tensors on `device`."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def inputs_of(model: nn.Module, batch) -> dict:
    """What a forward pass of `model` is given of a batch: of a transformers model its own columns,
    without labels and cache.
    """
    from transformers import PreTrainedModel

    from fakit.models.blocks import without_adapter
    from fakit.tracing.inputs import prepare_inputs

    if isinstance(without_adapter(model), PreTrainedModel):
        return prepare_inputs(model, batch).inputs
    return to_device(batch, device_of(model))


def rows_of(dataset) -> list[dict]:
    """The encoded examples; ValueError where there are none or they are no encoded examples."""
    rows = list(dataset)
    if not rows:
        raise ValueError("the dataset is empty; evaluation needs at least one encoded example")
    if "input_ids" not in rows[0]:
        raise ValueError(
            f"the dataset has columns {sorted(rows[0])}, evaluation needs input_ids and attention_mask; "
            "encode it first: task.encode('test', tokenizer)"
        )
    return rows


def by_length(lengths: Sequence[int], batch_size: int, tokens: int | None = TOKENS) -> Iterator[list[int]]:
    """Indices in batches of similar length: little padding. Longest first: what does not fit fails at once.

    A batch has at most `batch_size` rows, and at most `tokens` tokens with its padding, or one row; None
    asks for rows alone.
    """
    if batch_size < 1 or (tokens is not None and tokens < 1):
        raise ValueError(f"batch_size={batch_size}, tokens={tokens} was asked; use at least 1 of each")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        rows = batch_size if tokens is None else min(batch_size, max(1, tokens // longest))
        yield order[start : start + rows]
        start += rows


def length_sorted_batches(
    rows: Sequence[dict], collator: Callable, batch_size: int, device: torch.device, tokens: int | None = TOKENS
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Collated batches on `device` with the indices of their rows."""
    for indices in by_length([len(row["input_ids"]) for row in rows], batch_size, tokens):
        yield indices, to_device(collator([rows[index] for index in indices]), device)
