"""Teachers in 8 and 4 bits: how far they are from the full one, what they take, and a student that learns from one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.check import Bench, Check, Finding, NotRun, hold, within
from benchmarks.gpu.steps import four_terms, loss_of
from benchmarks.models import QUICK, random_batch
from fakit import load_teacher, shrink
from fakit.evaluation.quantization import QuantizationFidelity, quantization_fidelity
from fakit.tasks import embedded_teacher

# On a CPU errors are at most .045 and 4e-5 (8 bits), .29 and 5e-3 (4 bits); a GPU computes 4-bit products in bf16.
BARS = {
    "8bit": {"relative error, last layer": 0.1, "KL of the outputs": 0.002},
    "4bit": {"relative error, last layer": 0.5, "KL of the outputs": 0.05},
}
SLACK = {"relative error, last layer": 0.02, "KL of the outputs": 1e-3}  # of a GPU's errors above 1.5 times the CPU's
TEXTS = ["a large wild cat with a striped coat", "the act of giving up a right", "a dish of rice and fish"]

Compared = tuple[PreTrainedModel, PreTrainedModel, Mapping[str, Tensor]]  # full, quantized, batch


def checks() -> list[Check]:
    """The embedded classifier and a decoder with random weights, in 8 and in 4 bits."""
    made = {"MiniLM on glosses": of_the_embedded_teacher, "Llama": of_a_decoder}
    return [
        Check("quantized teachers", f"{how}, {name}", partial(measure, how))
        for how in BARS
        for name, measure in made.items()
    ]


def of_the_embedded_teacher(how: str, bench: Bench) -> Finding:
    """The kit's own teacher of glosses on texts."""

    def made(device: torch.device) -> Compared:
        full, tokenizer = embedded_teacher("glosses", device=device)
        quantized, _ = embedded_teacher("glosses", quantize=how, device=device)
        return full, quantized, tokenizer(TEXTS, return_tensors="pt", padding=True).to(device)

    _needs_bitsandbytes()
    return _fidelity(made(bench.device), None if bench.on_cpu else made(torch.device("cpu")), how)


def of_a_decoder(how: str, bench: Bench) -> Finding:
    """Saved, loaded in few bits, compared, and taught from: all four terms."""
    _needs_bitsandbytes()
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=QUICK.vocabulary, num_hidden_layers=QUICK.teacher_layers, **shape)
    batch = random_batch(QUICK, rows=3, tokens=24)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)

        def made(device: torch.device) -> Compared:
            full, quantized = (
                load_teacher(folder, quantize=bits, dtype=torch.float32, device=device) for bits in (None, how)
            )
            return full, quantized, {name: value.to(device) for name, value in batch.items()}

        compared = made(bench.device)
        found = _fidelity(compared, None if bench.on_cpu else made(torch.device("cpu")), how)
        student = shrink(load_teacher(folder, dtype=torch.float32, device="cpu"), layers=3).to(bench.device)
    losses = {}
    for name, teacher in zip(("full", "quantized"), compared[:2], strict=True):
        student.zero_grad()
        loss = loss_of((teacher, student, four_terms(), compared[2]))
        loss.backward()
        losses[f"loss, {name} teacher"] = loss.item()
    moves = all(p.grad is not None and p.grad.isfinite().all() for p in student.model.layers.parameters())
    off = abs(losses["loss, quantized teacher"] / losses["loss, full teacher"] - 1)
    wrong = hold(
        gradients=(moves, "a weight of the student has no finite gradient"),
        near=(
            off <= 0.1,
            f"the loss from the quantized teacher is {off:.1%} off, which had to be 10 % at most: {losses}",
        ),
    )
    return Finding(dict(found.numbers) | losses, found.wrong + wrong)


def _needs_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is None:
        raise NotRun("the package bitsandbytes is not installed: pip install bitsandbytes")


def _fidelity(compared: Compared, on_cpu: Compared | None, how: str) -> Finding:
    """How far the quantized model is from the full one; on a GPU hardly farther than it is on the CPU."""
    errors, report = _errors(compared)
    numbers = errors | {
        "same top-1": report.agreement,
        "share of the full weights' bytes": report.quantized_mib / report.full_mib,
    }
    wrong = within(errors, BARS[how])
    wrong += hold(form=(how in report.quantized_form, f"{how} was requested, the weights are {report.quantized_form}"))
    if on_cpu is not None:
        theirs, _ = _errors(on_cpu)
        numbers |= {f"{name}, CPU": error for name, error in theirs.items()}
        wrong += within(errors, {name: 1.5 * error + SLACK[name] for name, error in theirs.items()})
    return Finding(numbers, wrong)


def _errors(compared: Compared) -> tuple[dict[str, float], QuantizationFidelity]:
    full, quantized, batch = compared
    report = quantization_fidelity(full, quantized, [batch])
    assert report.kl is not None  # both models have logits
    return {"relative error, last layer": report.layers[-1].relative_error, "KL of the outputs": report.kl}, report
