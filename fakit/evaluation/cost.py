"""What a model costs: parameters, FLOPs, latency, memory; counted or measured, never estimated by a formula of ours."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fakit.evaluation.batches import device_of, eval_mode, inputs_of, to_device


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters with and without embeddings, each shared tensor once.

    Every `nn.Embedding` table counts as embedding (words, positions, types); an output head tied to one is that table,
    an untied head is not. A 4-bit weight counts its logical entries, not the packed bytes.

    Returns:
        "parameters", "embeddings", "without_embeddings", "trainable" (numbers) and "weight_bytes" (as stored now).
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    total = embeddings = trainable = stored = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit entries into a byte and keeps the shape apart.
        packed = getattr(parameter, "quant_state", None)
        size = parameter.numel() if packed is None else math.prod(packed.shape)
        total += size
        stored += parameter.numel() * parameter.element_size()
        embeddings += size if id(parameter) in tables else 0
        trainable += size if parameter.requires_grad else 0
    return {
        "parameters": total,
        "embeddings": embeddings,
        "without_embeddings": total - embeddings,
        "trainable": trainable,
        "weight_bytes": stored,
    }


def count_flops(step: Callable[[], object]) -> int:
    """FLOPs of whatever `step` does, by torch's FlopCounterMode: a multiply-add is 2.

    Counted are matrix products, convolutions and attention, forward and backward; element-wise work, softmax,
    normalization and look-ups are not. The counter does not know the CPU's fused attention kernel (it would count 0),
    so attention runs through the plain kernel meanwhile: the full T × T products, causal or not, without the
    recomputation of a fused backward.

    Example:
        >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def forward_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """FLOPs of one forward pass on `batch`; see `count_flops` for what counts."""
    _check_countable(model)
    inputs = inputs_of(model, batch)
    with torch.no_grad(), eval_mode(model):
        return count_flops(lambda: model(**inputs))


def training_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """FLOPs of one forward and backward pass on `batch` (without the optimizer, which does no products).

    The backward pass starts from the output's loss where the batch has labels, else from its logits. No gradient is
    left behind. To count a step that runs a teacher too, give the whole step to `count_flops`.
    """
    _check_countable(model)
    inputs = inputs_of(model, batch) | to_device(
        {name: x for name, x in batch.items() if name == "labels"}, device_of(model)
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "training_flops: no parameter of the model is trainable (a frozen teacher?); use forward_flops"
        )

    def step() -> None:
        output = model(**inputs)
        loss = output.loss if "labels" in inputs else output.logits.sum()
        torch.autograd.grad(loss, trainable, allow_unused=True)

    with torch.enable_grad(), eval_mode(model):
        return count_flops(step)


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: median and quartiles of `runs`, with `threads` CPU threads of torch, on `device`."""

    median: float
    lower_quartile: float
    upper_quartile: float
    runs: int
    threads: int
    device: str

    def __str__(self) -> str:
        low, middle, high = (1000 * t for t in (self.lower_quartile, self.median, self.upper_quartile))
        return f"{middle:.1f} ms ({low:.1f}–{high:.1f}; {self.runs} runs, {self.threads} threads, {self.device})"


def latency(model: nn.Module, batch: dict[str, Tensor], runs: int = 30, warmup: int = 5) -> Latency:
    """Time forward passes on `batch`, after `warmup` that do not count.

    Raises:
        ValueError: fewer than 30 runs; their quartiles would mean little.
    """
    if runs < 30 or warmup < 1:
        raise ValueError(
            f"latency: runs={runs}, warmup={warmup} were asked; use at least 30 runs after at least 1 warm-up"
        )
    device = device_of(model)
    inputs = inputs_of(model, batch)
    seconds = []
    with torch.no_grad(), eval_mode(model):
        for _ in range(warmup + runs):
            _synchronize(device)
            start = time.perf_counter()
            model(**inputs)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
    lower, median, upper = np.percentile(seconds[warmup:], [25, 50, 75])
    return Latency(float(median), float(lower), float(upper), runs, torch.get_num_threads(), str(device))


def peak_memory(step: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Bytes of tensors alive at once while `step` runs, beyond those alive before it (so weights are not counted).

    CUDA: torch.cuda.max_memory_allocated. CPU: the highest running sum of what torch allocates and releases meanwhile,
    as its profiler records it; the resident size of the process would miss memory that is reused and add what other
    threads do. Both leave out scratch memory that a library takes without torch.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"peak_memory: device {device} was asked; it is measured on 'cpu' and 'cuda'")
    gc.collect()  # or garbage of earlier work, let go inside, makes torch warn of releases that it cannot measure
    profile = torch.autograd.profiler.profile(profile_memory=True)
    with _silent_native_stderr():  # kineto announces every start and stop there, at any log level
        profile.__enter__()
    try:
        step()
    finally:
        with _silent_native_stderr():
            profile.__exit__(None, None, None)
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(0, int(np.cumsum(changes, dtype=np.int64).max(initial=0)))


@contextmanager
def _silent_native_stderr() -> Iterator[None]:
    """What C++ code writes to file descriptor 2 is dropped inside."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def costs(model: nn.Module, batch: dict[str, Tensor], runs: int = 30) -> dict[str, float]:
    """All costs of a model on one batch, for a table.

    Returns:
        `count_parameters`, "forward_flops" (NaN for a quantized model, see `forward_flops`), "training_flops" where
        something is trainable, "latency", "latency_lower_quartile", "latency_upper_quartile" (seconds), "threads",
        "peak_memory" of a forward pass (bytes).
    """
    results: dict[str, float] = dict(count_parameters(model))
    quantized = _is_quantized(model)
    results["forward_flops"] = math.nan if quantized else forward_flops(model, batch)
    if results["trainable"]:
        results["training_flops"] = math.nan if quantized else training_flops(model, batch)
    timing = latency(model, batch, runs)
    inputs = inputs_of(model, batch)
    with torch.no_grad(), eval_mode(model):
        memory = peak_memory(lambda: model(**inputs), device_of(model))
    return results | {
        "latency": timing.median,
        "latency_lower_quartile": timing.lower_quartile,
        "latency_upper_quartile": timing.upper_quartile,
        "threads": timing.threads,
        "peak_memory": memory,
    }


def _is_quantized(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())


def _check_countable(model: nn.Module) -> None:
    if _is_quantized(model):
        raise ValueError(
            "FLOPs: the model has bitsandbytes layers (8-bit or 4-bit), whose kernels torch's counter does not see: it "
            "would count attention alone; count the same model loaded without quantize=, the products have the same "
            "shapes"
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
