"""Costs that are known exactly: parameters, products and bytes of models small enough to count by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fakit.evaluation import (
    costs,
    count_flops,
    count_parameters,
    forward_flops,
    latency,
    peak_memory,
    training_flops,
)


class Linear(nn.Module):
    """One linear layer with a transformers-like output."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def test_parameters_of_gpt2_by_hand(gpt2):
    model = gpt2(layers=2, vocab_size=35, positions=48)
    d = 32
    block = 2 * 2 * d + (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d)
    counts = count_parameters(model)
    assert counts["embeddings"] == (35 + 48) * d
    assert counts["without_embeddings"] == 2 * block + 2 * d  # the head is tied: it is the table
    assert counts["parameters"] == counts["embeddings"] + counts["without_embeddings"] == model.num_parameters()
    assert counts["trainable"] == counts["parameters"]
    assert counts["weight_bytes"] == 4 * counts["parameters"]
    model.requires_grad_(False)
    assert count_parameters(model.bfloat16()) == counts | {"trainable": 0, "weight_bytes": 2 * counts["parameters"]}


def test_flops_of_a_linear_layer():
    model, batch = Linear(7, 11), {"x": torch.randn(3, 5, 7)}
    assert forward_flops(model, batch) == 2 * 15 * 7 * 11
    assert training_flops(model, batch) == 2 * (2 * 15 * 7 * 11)  # forward, and the weight's gradient
    batch["x"].requires_grad_(True)
    model.layer.bias.requires_grad_(False)
    assert training_flops(model, batch) == 2 * (2 * 15 * 7 * 11)


def test_flops_of_attention_are_counted_on_a_cpu():
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    products = 2 * (2 * 2 * 3 * 5 * 5 * 4)  # QKᵀ and AV, multiply and add
    assert count_flops(lambda: scaled_dot_product_attention(q, q, q)) == products
    assert count_flops(lambda: scaled_dot_product_attention(q, q, q, is_causal=True)) == products
    assert count_flops(lambda: scaled_dot_product_attention(q, q, q).sum().backward()) == 3 * products


def test_flops_of_bert_by_hand(bert):
    model, d, inner, tokens = bert(labels=3, layers=2), 32, 48, 2 * 6
    batch = {"input_ids": torch.randint(5, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    block = tokens * (4 * 2 * d * d + 2 * 2 * d * inner) + 2 * (2 * 2 * 6 * 6 * d)
    head = 2 * (2 * d * d + 2 * d * 3)  # pooler and classifier see one token a text
    assert forward_flops(model, batch) == 2 * block + head
    assert training_flops(model, batch) == 3 * (2 * block + head)
    labeled = batch | {"labels": torch.tensor([0, 2])}
    assert training_flops(model, labeled) == 3 * (2 * block + head)


def test_counting_leaves_no_trace(bert):
    model = bert().train()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    batch = {"input_ids": torch.randint(5, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    costs(model, batch)
    assert model.training
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert model.bert.pooler.dense.weight.grad is None


def test_a_frozen_model_has_no_training_step():
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        training_flops(Linear(2, 2).requires_grad_(False), {"x": torch.ones(1, 2)})


def test_quantized_layers_are_refused_not_counted_as_zero():
    import bitsandbytes

    model = Linear(4, 4)
    model.layer = bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=False)
    for count in (forward_flops, training_flops):
        with pytest.raises(ValueError, match=r"8-bit or 4-bit.*without quantize="):
            count(model, {"x": torch.ones(1, 4)})


def test_four_bit_weights_count_their_logical_entries():
    from bitsandbytes.nn import Linear4bit

    model = nn.Sequential(Linear4bit(64, 32, bias=False)).to("cpu")
    counts = count_parameters(model)
    assert counts["parameters"] == 64 * 32
    assert counts["weight_bytes"] == 64 * 32 // 2


def test_latency():
    calls = []

    class Counted(Linear):
        def forward(self, x):
            calls.append(self.training)
            return super().forward(x)

    model = Counted(2, 2).train()
    result = latency(model, {"x": torch.ones(1, 2)}, runs=31, warmup=4)
    assert len(calls) == 35 and not any(calls) and model.training
    assert 0 < result.lower_quartile <= result.median <= result.upper_quartile
    assert (result.runs, result.threads, result.device) == (31, torch.get_num_threads(), "cpu")
    assert "31 runs" in str(result)
    with pytest.raises(ValueError, match="runs=29"):
        latency(model, {"x": torch.ones(1, 2)}, runs=29)


def test_latency_is_the_median_of_the_runs_after_warm_up(monkeypatch):
    clock = iter([t for seconds in [100.0, *range(1, 31)] for t in (0.0, float(seconds))])
    monkeypatch.setattr("fakit.evaluation.cost.time.perf_counter", lambda: next(clock))
    result = latency(Linear(2, 2), {"x": torch.ones(1, 2)}, runs=30, warmup=1)
    assert (result.lower_quartile, result.median, result.upper_quartile) == (8.25, 15.5, 22.75)


def test_peak_memory_is_the_highest_moment_exactly(capfd):
    kept = torch.empty(1000)

    def step():
        a = torch.empty(1000, 1000)
        b = torch.empty(500, 1000)
        del a
        c = torch.empty(250, 1000)
        return kept, b, c

    assert peak_memory(step) == 4 * 1_500_000
    assert peak_memory(lambda: None) == 0
    assert capfd.readouterr().err == ""


def test_peak_memory_sees_what_backward_needs():
    x = torch.randn(64, 256, requires_grad=True)
    with torch.no_grad():
        without = peak_memory(lambda: x.sigmoid().sigmoid().sigmoid().sum())
    assert without == 2 * 64 * 256 * 4
    # Autograd keeps all three results.
    assert peak_memory(lambda: x.sigmoid().sigmoid().sigmoid().sum()) == 3 * 64 * 256 * 4 + 4


def test_peak_memory_restores_after_an_exception(capfd):
    def step():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        peak_memory(step)
    assert peak_memory(lambda: torch.empty(10)) == 40
    with pytest.raises(ValueError, match="'cpu' and 'cuda'"):
        peak_memory(lambda: None, device="meta")


def test_costs_of_a_table_row(bert):
    model = bert()
    batch = {"input_ids": torch.randint(5, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    row = costs(model, batch)
    assert row["forward_flops"] == forward_flops(model, batch)
    assert row["training_flops"] == training_flops(model, batch)
    assert row["parameters"] == model.num_parameters()
    assert row["peak_memory"] > 2 * 6 * 48 * 4  # at least the widest activation
    assert row["threads"] == torch.get_num_threads()
    assert all(math.isfinite(value) for value in row.values())
    assert "training_flops" not in costs(model.requires_grad_(False), batch)
