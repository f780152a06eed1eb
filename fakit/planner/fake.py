"""Models without weights: made on the meta device from a configuration, then given fake tensors,
which know their device and dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fakit.losses.fused.blocks import Block, use_blocks
from fakit.models.load import skip_patterns
from fakit.models.pretrained import CLASSES
from fakit.planner.ledger import Ledger

NF4_BLOCK = 64  # weights that share a scale (bitsandbytes' default)


def meta_model(config: PreTrainedConfig, task: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this configuration on the meta device: shapes alone."""
    auto = getattr(transformers, CLASSES[task])
    with torch.device("meta"):
        try:
            return auto.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise ValueError(
                    f"transformers makes no {task} model ({CLASSES[task]}) of a {type(config).__name__} "
                    f"({config.model_type}). Give task=… another value; of a model with images or sounds plan its text "
                    "model alone: its text_config."
                ) from error
            if "scaled_dot_product_attention" not in str(error):
                raise
            return auto.from_config(config, dtype=dtype, attn_implementation="eager", trust_remote_code=False)


def give_fake_weights(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta tensor that the model holds by a fake CPU tensor; what is tied stays tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in list(held.items()):
                if isinstance(value, Tensor):
                    held[name] = fake(value)


# -- quantized layers -------------------------------------------------------------------------------------------------


class Linear8bit(nn.Module):
    """What LLM.int8 stores for a linear layer, and what its product allocates (bitsandbytes 0.50, no outliers)."""

    def __init__(self, rows: int, columns: int, bias: Tensor | None, on_cpu: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.empty(rows, dtype=torch.float32))
        self.bias, self.on_cpu = bias, on_cpu

    def forward(self, x: Tensor) -> Tensor:
        """(…, columns) → (…, rows)"""
        half = x.flatten(0, -2).to(torch.float16)  # (N, columns)
        outliers = half.abs() >= 6.0 if self.on_cpu else None
        quantized = (half * 1.0).to(torch.int8)
        del half, outliers
        products = torch._int_mm(quantized, self.weight.t())  # (N, rows), int32
        if self.on_cpu:
            scale = torch.empty(products.shape, dtype=torch.float32)
            result = (products * scale).to(x.dtype)
        else:
            result = products.to(torch.float16).to(x.dtype)
        return result.unflatten(0, x.shape[:-1])


class Linear4bit(nn.Module):
    """What NF4 stores for a linear layer, and what its product allocates: the weight in full, for a moment."""

    def __init__(self, rows: int, columns: int, bias: Tensor | None):
        super().__init__()
        self.shape = rows, columns
        self.weight = nn.Parameter(torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(-(-rows * columns // NF4_BLOCK), dtype=torch.float32))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, columns) → (…, rows)"""
        return F.linear(x, torch.empty(self.shape, dtype=x.dtype, device=x.device), self.bias)


def quantize(model: PreTrainedModel, how: str, on_cpu: bool) -> None:
    """Exchange the layers that `load_teacher(..., quantize=how)` would quantize, on the meta device."""
    kept = HfQuantizer.get_modules_to_not_convert(model, skip_patterns(model), model._keep_in_fp32_modules)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and should_convert_module(name, kept):
            shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            with torch.device("meta"):
                new = Linear8bit(*shape, module.bias, on_cpu) if how == "8bit" else Linear4bit(*shape, module.bias)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)


# -- what is alike is run once ----------------------------------------------------------------------------------------


def run_one_of_each(blocks: list[nn.Module], kept: Collection[int], ledger: Ledger) -> None:
    """Of a teacher's blocks that nobody looks at, run one of each kind;
    the others give its output's shapes and cost what it cost.

    Args:
        blocks: one a layer; their `forward` is exchanged.
        kept: layer numbers that are captured; their blocks always run.
        ledger: where costs are booked.
    """
    known: dict[tuple, tuple] = {}  # kind → (shapes of its output, FLOPs, bytes written)
    for block in dict.fromkeys(blocks):  # one module may serve several layers
        kind = (type(block), *((name, tensor.shape, tensor.dtype) for name, tensor in block.named_parameters()))
        looked_at = any(number in kept for number, other in enumerate(blocks, 1) if other is block)
        block.forward = partial(_run_or_copy, block.forward, kind, looked_at, known, ledger)


def _run_or_copy(forward, kind: tuple, looked_at: bool, known: dict, ledger: Ledger, *args, **kwargs):
    flops, written = Counter(ledger.flops), ledger.written[ledger.phase]
    kind = (*kind, *(x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))  # batches may differ
    if looked_at or kind not in known:
        result = forward(*args, **kwargs)
        shapes = tree_map(lambda x: _Shape(x.shape, x.dtype) if isinstance(x, Tensor) else x, result)
        known[kind] = shapes, ledger.flops - flops, ledger.written[ledger.phase] - written
        return result
    shapes, flops, more = known[kind]
    result = tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype) if isinstance(x, _Shape) else x, shapes)
    ledger.flops.update(flops)
    ledger.written[ledger.phase] = written + more
    return result


@dataclass(frozen=True)
class _Shape:
    shape: torch.Size
    dtype: torch.dtype


# -- the losses' loops ------------------------------------------------------------------------------------------------


def loops_of(accelerator: bool, ledger: Ledger) -> AbstractContextManager[None]:
    """Inside, losses take the block sizes of the device that is planned for, and two blocks stand for all.

    Fake tensors are CPU tensors (torch without CUDA makes no others), so losses are told what they would run on. Blocks
    are alike: the last two are run, their memory is that of every other pair, and their FLOPs count for all.
    """

    def hand_out(blocks: Sequence[Block]) -> Iterator[Block]:
        last, outside = blocks[-2:], ledger.repeat
        if len(last) < len(blocks):
            ledger.repeat = outside * _elements(blocks) / _elements(last)
        yield from last
        ledger.repeat = outside

    return use_blocks(accelerator=accelerator, hand_out=hand_out)


def _elements(blocks: Sequence[Block]) -> int:
    return sum((block.end - block.start) * block.columns for block in blocks)
