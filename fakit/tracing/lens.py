"""The logit lens: any layer's hidden states through what a model does to its last ones, its final norm and its head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fakit.losses.fused.output_head import Head
from fakit.models.blocks import find_blocks, without_adapter
from fakit.models.kinds import double, short_row
from fakit.models.random_state import random_state_kept
from fakit.tracing.head_finder import find_finish, find_head, without_logits


@dataclass(frozen=True)
class LogitLens:
    """logits = finish(head(scale · tail(hidden))), as the model does it to the output of its last block.

    Attributes:
        tail: the modules between the last block and the head: a norm, a transform; one that the head is part of ends
            there.
        head: the output head.
        scale: of what the head is given (T5).
        finish: of the logits: a soft cap, a scale; None for nothing.
    """

    tail: tuple[nn.Module, ...]
    head: nn.Linear
    scale: float
    finish: Callable[[Tensor], Tensor] | None

    def __call__(self, hidden: Tensor, norm: bool = True, train: bool = False) -> Head:
        """The head and its input in place of logits (B, T, V).

        Args:
            hidden: any layer's, (B, T, d).
            norm: go through the tail; without, the head is given hidden states as they are.
            train: let gradients into the tail's and the head's weights; else they reach hidden states alone.
        """
        if norm:
            for module in self.tail:
                hidden = self._through(module, hidden, train)
            hidden = hidden if self.scale == 1 else hidden * self.scale
        weight, bias = self.head.weight, self.head.bias
        if not train:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return Head(hidden, weight, bias, self.finish)

    def _through(self, module: nn.Module, hidden: Tensor, train: bool) -> Tensor:
        weights = {} if train else {name: p.detach() for name, p in module.named_parameters()}
        if not any(part is self.head for part in module.modules()):
            return functional_call(module, weights, (hidden,))
        with without_logits(self.head) as given:
            functional_call(module, weights, (hidden,))
        return given[0]


_found: WeakKeyDictionary = WeakKeyDictionary()  # model → names of the tail's modules, scale, finish


def find_lens(model: nn.Module) -> LogitLens:
    """What the model does to its last hidden states, asked of the model itself, once, with a short row of text.

    Raises:
        ValueError: a model without a plain linear head over a vocabulary, or one that does something else between its
            last block and its head, or after it, than modules one after another, a scale and a soft cap.
    """
    plain: Any = without_adapter(model)
    head = find_head(plain, least=0)
    if head is None:
        raise ValueError(
            f"a lens asked of {type(plain).__name__}, which has no plain linear head over a vocabulary: it has none at "
            "all (a classifier, a bare encoder), or a quantized, adapted or sharded one. Compare hidden states: "
            "Features(…)."
        )
    if plain not in _found:
        _found[plain] = _asked(plain, head)
    names, scale, finish = _found[plain]
    return LogitLens(tuple(plain.get_submodule(name) for name in names), head, scale, finish)


def _asked(model: Any, head: nn.Linear) -> tuple[list[str], float, Callable | None]:
    other = double(model).eval()
    inner = find_head(other, least=0)
    assert inner is not None, "the double has the model's own head"
    try:
        row = short_row(other)
        tail, last, given = _watched(other, inner, row)
        known, finish = find_finish(model, head, row)
    except Exception as error:  # whatever a model says to a row of bare text
        raise _no_lens(model) from error
    if last is None or given is None or not known:
        raise _no_lens(model)
    with torch.no_grad():
        reached = LogitLens(tuple(tail), inner, 1.0, None)(last).hidden
    if reached.shape != given.shape:
        raise _no_lens(model)
    ours, theirs = reached.double(), given.double()
    scale = float((ours * theirs).sum() / ours.square().sum())
    eps = torch.finfo(given.dtype).eps
    scale = 1.0 if abs(scale - 1) < 4 * eps else scale
    if not torch.allclose(scale * ours, theirs, rtol=16 * eps, atol=16 * eps * float(theirs.abs().max())):
        raise _no_lens(model)
    names = {module: name for name, module in other.named_modules()}
    return [names[module] for module in tail], scale, finish


def _no_lens(model: nn.Module) -> ValueError:
    return ValueError(
        f"a lens asked of {type(model).__name__}: what it does between its last block and its logits could not be "
        "followed, or is more than modules one after another, a scale and a soft cap. Compare hidden states: "
        "Features(…)."
    )


def _watched(model: nn.Module, head: nn.Linear, inputs: dict) -> tuple[list[nn.Module], Tensor | None, Tensor | None]:
    """The modules that the last block's output goes through on its way to the head; that output, and the head's input.

    A module is on the way when it is given what the last one gave; what is inside of it is its own affair.
    """
    blocks = find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    tail: list[nn.Module] = []
    last = current = given = active = None

    def leaving_block(block, args, output):
        nonlocal last, current, active
        last = current = (
            next(x for x in output if isinstance(x, Tensor)) if isinstance(output, tuple | list) else output
        )
        active = None
        tail.clear()

    def entering(module, args, kwargs):
        nonlocal active, given
        if given is not None:
            return
        if module is head:
            given = args[0]
        elif active is None and current is not None and not isinstance(module, nn.Dropout):
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is not None and first.shape == current.shape and first.data_ptr() == current.data_ptr():
                active = module
                tail.append(module)

    def leaving(module, args, output):
        nonlocal active, current
        if module is active and given is None:
            active, current = None, output if isinstance(output, Tensor) else output[0]

    handles = [blocks[-1].register_forward_hook(leaving_block)]
    for module in model.modules():
        if module not in inside:
            handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(module.register_forward_hook(leaving))
    try:
        with torch.inference_mode(False), torch.no_grad(), random_state_kept(head.weight.device):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tail, last, given
