"""Others' kernels: attention alignment under sdpa and flash attention beside eager, and Liger's losses beside ours."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from benchmarks.gpu.check import Bench, Check, Finding, NotRun, relative_error, within
from benchmarks.gpu.meter import MIB, peak_bytes, seconds
from benchmarks.gpu.steps import PAIRS, decoder, encoder, placed
from fakit import Attention, Objective, capture
from fakit.losses.fused import liger
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.fused.output_head import Head
from fakit.training.precision import bf16_is_fast

# Of maps the largest difference anywhere, of the loss and its gradient the relative one.
BARS = {"maps": 1e-5, "loss": 1e-4, "gradient": 1e-3}
HALF_BARS = {"maps": 0.2, "loss": 0.02, "gradient": 0.2}
LIGER_BARS = {"value": 1e-4, "gradient": 1e-3, "gradient of the head": 1e-3}
TAU = 2.0


def checks() -> list[Check]:
    """Each implementation of attention in two families; each divergence that Liger knows."""
    made = {"BERT": encoder, "Llama": decoder}
    aligned = [
        Check("attention", f"{implementation} beside eager, {precision}, {family}", partial(run, implementation, make))
        for implementation, precision, run in (
            ("sdpa", "float32", in_full),
            ("sdpa", "half precision", in_half),
            ("flash_attention_2", "half precision", in_half),
        )
        for family, make in made.items()
    ]
    return aligned + [Check("Liger", name, partial(beside_liger, name)) for name in liger.BETAS]


# -- attention --------------------------------------------------------------------------------------------------------


def in_full(implementation: str, make, bench: Bench) -> Finding:
    """Under an implementation in float32 on the device, beside the model's own eager maps in float64 on the CPU."""
    made = make()
    exact = _aligned(*placed(made, torch.device("cpu"), torch.float64), "eager")
    found = _aligned(*placed(made, bench.device), implementation)
    return _compared(found, exact, BARS)


def in_half(implementation: str, make, bench: Bench) -> Finding:
    """The same with weights in bf16, or in fp16 where the device has no bf16."""
    dtype = torch.bfloat16 if bench.on_cpu or bf16_is_fast(bench.device) else torch.float16
    if implementation == "flash_attention_2":
        _needs_flash(bench)
    made = make()
    made = tuple(part.to(dtype) for part in made[:3]) + made[3:]  # rounded once: both sides have the same weights
    exact = _aligned(*placed(made, torch.device("cpu"), torch.float64), "eager")
    found = _aligned(*placed(made, bench.device, dtype), implementation)
    return _compared(found, exact, HALF_BARS)


def _needs_flash(bench: Bench) -> None:
    if bench.on_cpu:
        raise NotRun("flash attention has kernels for GPUs alone")
    if torch.cuda.get_device_capability(bench.device) < (8, 0):
        raise NotRun(f"flash attention 2 wants compute capability 8.0, {torch.cuda.get_device_name(bench.device)} less")
    if not is_flash_attn_2_available():
        raise NotRun("the package flash-attn is not installed: pip install flash-attn --no-build-isolation")


def _aligned(
    teacher: PreTrainedModel, student: PreTrainedModel, objective: nn.Module, batch: dict, implementation: str
) -> dict[str, Tensor]:
    """Maps of all layers, and the attention term with its gradient."""
    for model in (teacher, student):
        model.set_attn_implementation(implementation)
    term = Objective(PAIRS, attention=Attention("kl"))
    layers = {
        side: range(1, model.config.num_hidden_layers + 1) for side, model in (("ours", student), ("theirs", teacher))
    }
    with torch.no_grad():
        theirs = capture(teacher, batch, attentions=layers["theirs"], logits=False)
    ours = capture(student, batch, attentions=layers["ours"], logits=False)
    loss = term(ours, theirs).total
    loss.backward()
    rows = batch["attention_mask"].bool().cpu()[:, None].expand(-1, student.config.num_attention_heads, -1)
    maps = [trace.attention_maps(i).detach().cpu()[rows] for trace, i in _each(ours, theirs, layers)]
    gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return {"maps": torch.cat(maps), "loss": loss, "gradient": torch.cat(gradients)}


def _each(ours, theirs, layers):
    yield from ((ours, i) for i in layers["ours"])
    yield from ((theirs, i) for i in layers["theirs"])


def _compared(found: dict[str, Tensor], exact: dict[str, Tensor], bars: dict[str, float]) -> Finding:
    errors = {name: relative_error(found[name], exact[name]) for name in ("loss", "gradient")}
    errors["maps"] = (found["maps"].double() - exact["maps"].double()).abs().max().item()
    return Finding({"exact loss": exact["loss"].item()} | errors, within(errors, bars))


# -- Liger ------------------------------------------------------------------------------------------------------------


def beside_liger(divergence: str, bench: Bench) -> Finding:
    """Liger's loss and ours, of the same hidden states and heads: both beside float64, their seconds and memory."""
    if find_spec("liger_kernel") is None:
        raise NotRun("the package liger-kernel is not installed: pip install liger-kernel")
    tokens, vocabulary, width = (4096, 128_256, 1024) if bench.full else (300, 997, 32)
    random = torch.Generator().manual_seed(0)
    sides = [torch.randn(tokens, width, generator=random) for _ in range(2)]
    heads = [torch.randn(vocabulary, width, generator=random) / width**0.5 for _ in range(2)]
    mask = torch.rand(tokens, generator=random) < 0.8

    def placed_at(device: torch.device, dtype: torch.dtype) -> tuple[Head, Head, Tensor]:
        ours, theirs, our_head, their_head = (x.to(device, dtype) for x in (*sides, *heads))
        return Head(ours.requires_grad_(), our_head.requires_grad_()), Head(theirs, their_head), mask.to(device)

    def ours(student: Head, teacher: Head, where: Tensor) -> Tensor:  # naming the vocabulary keeps Liger out of it
        options = {"divergence": divergence, "temperature": TAU, "vocab_size": vocabulary}
        return fused_outputs(student, teacher, where, **options)[0]

    def theirs(student: Head, teacher: Head, where: Tensor) -> Tensor:
        return liger.output_loss(student, teacher, where, divergence, TAU)

    given = placed_at(bench.device, torch.float32)
    exact = _step(ours, given if bench.full else placed_at(torch.device("cpu"), torch.float64))
    found = _step(theirs, given)
    errors = {name: relative_error(*pair) for name, *pair in zip(LIGER_BARS, found, exact, strict=True)}
    ways = {"ours": partial(_step, ours, given), "Liger's": partial(_step, theirs, given)}
    numbers = errors | {f"seconds, {name}": taken for name, taken in seconds(ways, bench).items()}
    if not bench.on_cpu:
        numbers |= {f"peak MiB, {name}": peak_bytes(work, bench.device) / MIB for name, work in ways.items()}
    return Finding({"our value": exact[0].item()} | numbers, within(errors, LIGER_BARS))


def _step(loss, given: tuple[Head, Head, Tensor]) -> list[Tensor]:
    value = loss(*given)
    return [value, *torch.autograd.grad(value, (given[0].hidden, given[0].weight))]
