"""The output head: what turns the last hidden states (B, T, d) into logits (B, T, V),
and how to take hold of the former.

With 150,000 entries in the vocabulary, logits are the largest tensor of a training step. A loss that is given the head
and its input can make them a chunk of tokens at a time (`fakit.losses.fused.chunked`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fakit.models.blocks import without_adapter
from fakit.models.kinds import double, short_row
from fakit.models.random_state import random_state_kept

# Smaller vocabularies' logits fit beside everything else, and one product is faster than many.
LARGE_VOCABULARY = 8192


def find_head(model: nn.Module, least: int | None = None) -> nn.Linear | None:
    """The model's head over a vocabulary of `least` entries or more (a large one unless given), if it is a plain linear
    layer; None for smaller, quantized, adapted or sharded ones.
    """
    least = LARGE_VOCABULARY if least is None else least
    transformer: Any = model
    head = transformer.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = type(head) is nn.Linear and type(head.weight) in (nn.Parameter, Tensor, FakeTensor)
    return head if plain and head.weight.dim() == 2 and head.weight.shape[0] >= least else None


@contextmanager
def without_logits(head: nn.Linear) -> Iterator[list[Tensor]]:
    """While open, `head` is given no tokens, so that no logits are made;
    what it would have been given is in the list.
    """
    seen: list[Tensor] = []

    def pre_hook(module, args):
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(pre_hook)
    try:
        yield seen
    finally:
        handle.remove()


_finishes: WeakKeyDictionary = WeakKeyDictionary()  # model → (found, finish)


def find_finish(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Tensor]) -> tuple[bool, Callable | None]:
    """Whether the model's logits are its head's output, and what is done to it afterwards (a soft cap, a scale),
    at any size of logits.

    Asked of the model itself, once: it runs on a short row of text (on `inputs`, where it reads no text alone) with its
    head's output exchanged for numbers from 0.001 to 10,000 of both signs, and what becomes of each shows what follows.
    (False, None) where that is neither nothing, a scale nor a soft cap, differs from one entry of the vocabulary to
    another, or has parameters that are trained.
    """
    if model not in _finishes:
        try:
            other = double(without_adapter(model))  # ty: ignore[invalid-argument-type]
            asked = _exchanged(other, find_head(other, least=0), short_row(other))  # ty: ignore[invalid-argument-type]
        except Exception:  # whatever a model says to a row of bare text
            asked = _exchanged(model, head, inputs)
        _finishes[model] = _explained(*asked)
    return _finishes[model]


def remember_finish(model: nn.Module, finish: Callable[[Tensor], Tensor] | None) -> None:
    """What is known of a model beforehand, so that it need not be asked (`find_finish`)."""
    _finishes[model] = (True, finish)


def _exchanged(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """What was put in place of the head's output for two tokens, (1, 2, V), each time it ran;
    and the logits that the model made of it.
    """
    given: list[Tensor] = []

    def two_tokens(module, args):
        return (args[0][:1, :2], *args[1:])

    def exchange(module, args, output):
        sizes = torch.logspace(-3, 4, output.shape[-1], dtype=torch.float64, device=output.device)
        sizes[1::2] *= -1
        # a second token sees every size at another entry
        made = torch.stack([sizes, -sizes.flip(0)])[: output.shape[1]].unsqueeze(0).to(output.dtype)
        torch.set_grad_enabled(True)  # until the model returns: parameters that come after the head show in the graph
        given.append(made.requires_grad_())
        return given[-1]

    handles = [head.register_forward_pre_hook(two_tokens), head.register_forward_hook(exchange)]
    try:
        with torch.inference_mode(False), torch.no_grad(), random_state_kept(head.weight.device):
            return given, getattr(model(**inputs), "logits", None)
    finally:
        for handle in handles:
            handle.remove()


def _explained(given: list[Tensor], logits: Tensor | None) -> tuple[bool, Callable | None]:
    if len(given) != 1 or logits is None or logits.shape != given[0].shape or _trained_after(given[0], logits):
        return False, None
    before, after = given[0].detach().double(), logits.detach().double()
    if torch.equal(before, after):
        return True, None
    eps = max(torch.finfo(x.dtype).eps for x in (given[0], logits))
    candidates = [_scale(_mean(after / before, eps))]
    if cap := after.abs().max().item():
        bent = after.abs() < cap / 2  # where the cap can be undone
        candidates.append(_soft_cap(cap, _mean(cap * torch.atanh(after[bent] / cap) / before[bent], eps)))
    for finish in candidates:
        if torch.allclose(finish(before), after, rtol=16 * eps, atol=0):
            return True, finish
    return False, None


def _mean(factors: Tensor, eps: float) -> float:
    mean = factors.mean().item()
    return 1.0 if abs(mean - 1) < eps / 4 else mean


def _scale(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z * factor


def _soft_cap(cap: float, factor: float) -> Callable[[Tensor], Tensor]:
    return lambda z: cap * torch.tanh(z * (factor / cap))


def _trained_after(given: Tensor, logits: Tensor) -> bool:
    """Whether anything that gradients are kept for, beside `given`, goes into `logits`."""
    steps, seen = [logits.grad_fn], set()
    while steps:
        step = steps.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if getattr(step, "variable", given) is not given:
            return True
        steps += [before for before, _ in step.next_functions]
    return False
