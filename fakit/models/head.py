"""The output head: what turns the last hidden states (B, T, d) into logits (B, T, V), and how to take hold of the former.

With 150,000 entries in the vocabulary, logits are the largest tensor of a training step. A loss that is given the head and its input can
make them a chunk of tokens at a time (`fakit.losses.chunked`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fakit.models.random_state import random_state_kept

# Smaller vocabularies' logits fit beside everything else, and one product is faster than many.
LARGE_VOCABULARY = 8192


def find_head(model: nn.Module) -> nn.Linear | None:
    """The model's head over a large vocabulary, if it is a plain linear layer; None for small, quantised, adapted or sharded ones."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = type(head) is nn.Linear and type(head.weight) in (nn.Parameter, Tensor)
    return head if plain and head.weight.dim() == 2 and head.weight.shape[0] >= LARGE_VOCABULARY else None


@contextmanager
def without_logits(head: nn.Linear) -> Iterator[list[Tensor]]:
    """While open, `head` is given no tokens, so that no logits are made; what it would have been given is in the list."""
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
    """Whether the model's logits are its head's output, and what is done to it afterwards (a soft cap, a scale).

    Asked of the model itself, once: it answers two tokens of `inputs` as it always does, and the answer is compared with the head's.
    """
    if model not in _finishes:
        few = {name: _two_tokens(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        seen: list[Tensor] = []
        handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with torch.no_grad(), random_state_kept(head.weight.device):
                logits = getattr(model(**few), "logits", None)
        finally:
            handle.remove()
        _finishes[model] = _explained(seen, logits, model.config.get_text_config())
    return _finishes[model]


def _two_tokens(value: Tensor) -> Tensor:
    """The first row's first two tokens of an input (B,), (B, T), (B, T, d), or of a mask (B, 1, T, T)."""
    return value[:1, :, :2, :2] if value.dim() == 4 else value[(slice(1), slice(2))[: value.dim()]]


def _explained(seen: list[Tensor], logits: Tensor | None, config) -> tuple[bool, Callable | None]:
    if len(seen) != 1 or logits is None or seen[0].shape != logits.shape:
        return False, None
    raw, logits = seen[0].double(), logits.double()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (logits.flatten() @ raw.flatten() / raw.square().sum()).item()
    candidates: list[tuple[Callable | None, Tensor]] = [(None, raw)]
    if cap:
        candidates.append((lambda z: cap * torch.tanh(z / cap), cap * torch.tanh(raw / cap)))
    candidates.append((lambda z: z * scale, raw * scale))
    for finish, made in candidates:
        if torch.allclose(made, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item()):
            return True, finish
    return False, None
