"""The losses that never hold logits or maps as a whole, on the device, beside whole ones in float64 on the CPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.check import Bench, Check, Finding, relative_error, within
from fakit.losses import attention, outputs
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.losses.fused.blocks import use_blocks
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.fused.output_head import Head
from fakit.losses.fused.streamed import streamed_loss
from fakit.losses.logits import asked_of

N, D, V, TAU = 600, 32, 997, 2.0  # three chunks, the last one short
BARS = {"value": 1e-5, "gradient": 1e-4, "gradient of the head": 1e-4}
B, T, HEADS, KEYS, D_HEAD = 2, 80, 4, 2, 16
SMALL_BLOCKS = {"outputs": 256 * V, "attention": B * HEADS * T * 24}  # several of each, the last one short


def checks() -> list[Check]:
    """A check of each named divergence in chunks, and of each attention loss over blocks of queries."""
    chunked = [Check("chunked outputs", name, partial(chunked_equal, name)) for name in outputs.PER_POSITION]
    streamed = [
        Check("streamed attention", f"{name}{', causal' * causal}", partial(streamed_equal, name, causal))
        for name in attention.LOSSES
        for causal in (False, True)
    ]
    return chunked + streamed


def chunked_equal(divergence: str, bench: Bench) -> Finding:
    """Chunks on the device, from hidden states and heads; whole logits on the CPU."""
    random = torch.Generator().manual_seed(0)
    sides = [torch.randn(N, D, generator=random, dtype=torch.float64).float() for _ in range(2)]
    heads = [torch.randn(V, D, generator=random, dtype=torch.float64).float() / 4 for _ in range(2)]
    mask, labels = torch.rand(N, generator=random) < 0.8, torch.randint(0, V, (N,), generator=random)

    def compute(chunked: bool, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        ours, theirs, our_head, their_head = (x.to(device, dtype) for x in (*sides, *heads))
        ours.requires_grad_()
        our_head.requires_grad_()
        given = {"labels": labels.to(device)} if "labels" in asked_of(outputs.LOSSES[divergence]) else {}
        where = mask.to(device)
        if chunked:
            both = Head(ours, our_head), Head(theirs, their_head)
            # naming the vocabulary keeps Liger, which has a check of its own, from computing it
            value = fused_outputs(
                *both, where, divergence=divergence, temperature=TAU, vocab_size=V, weights=(1.0, 0.0), **given
            )[0]
        else:
            value = outputs.LOSSES[divergence](ours @ our_head.T, theirs @ their_head.T, where, TAU, **given)
        return [value, *torch.autograd.grad(value, (ours, our_head))]

    exact = compute(False, torch.float64, torch.device("cpu"))
    with use_blocks(outputs=SMALL_BLOCKS["outputs"]):
        found = compute(True, torch.float32, bench.device)
    return _found(found, exact)


def streamed_equal(loss: str, causal: bool, bench: Bench) -> Finding:
    """Blocks of queries on the device; whole maps, or scores, on the CPU. Grouped keys, padding."""
    random = torch.Generator().manual_seed(0)
    shapes = [(B, HEADS, T, D_HEAD), (B, KEYS, T, D_HEAD)] * 2
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64).float() for shape in shapes]
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[-1, T // 2 :] = False

    def compute(streamed: bool, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        queries, keys, their_queries, their_keys = (x.to(device, dtype) for x in tensors)
        learned = queries.requires_grad_(), keys.requires_grad_()
        ours, theirs = (
            AttentionInputs(q, k, None, None, D_HEAD**-0.5, causal)
            for q, k in ((queries, keys), (their_queries, their_keys))
        )
        where = mask.to(device)
        if streamed:
            value = streamed_loss(loss, ours, theirs, where)
        else:
            pairs = where[:, None, :, None] & where[:, None, None, :]
            pairs = pairs.tril() if causal else pairs
            if loss == "score_mse":
                whole = ours.scores(), theirs.scores()
            else:
                whole = tuple(attention.over_valid_keys(side.maps(), pairs) for side in (ours, theirs))
            value = attention.LOSSES[loss](*whole, pairs)
        return [value, torch.cat([x.flatten() for x in torch.autograd.grad(value, learned)])]

    exact = compute(False, torch.float64, torch.device("cpu"))
    with use_blocks(attention=SMALL_BLOCKS["attention"]):
        found = compute(True, torch.float32, bench.device)
    return _found(found, exact)


def _found(found: list[Tensor], exact: list[Tensor]) -> Finding:
    errors = {name: relative_error(*pair) for name, *pair in zip(BARS, found, exact, strict=False)}
    return Finding({"exact value": exact[0].item()} | errors, within(errors, BARS))
