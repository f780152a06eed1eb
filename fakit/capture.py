"""Run a model and keep what was asked for: hidden states, attention inputs, logits. The model stays as it was.

Layers are numbered 0 (output of the embeddings) and i = 1…L (output of block i, before any final norm). Hidden states come from hooks
on the blocks, not from the `hidden_states` tuple, whose last entry is normed in some families. Attention is taken where transformers
hands it over, at the functions of `transformers.AttentionInterface`: there every implementation (eager, sdpa, flash) receives the same
queries, keys and values, after rotary embedding, so the maps can be had although sdpa and flash never return them.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fakit.losses.attention_inputs import AttentionInputs
from fakit.models.blocks import find_blocks
from fakit.trace import Trace


def capture(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    hidden_states: Iterable[int] = (),
    attentions: Iterable[int] = (),
    logits: bool = True,
) -> Trace:
    """Run `model` on `batch` and keep the layers asked for. Follows torch's grad mode; leaves the model as it found it.

    Args:
        model: a transformers model.
        batch: its inputs, input_ids (B, T) and mostly attention_mask (B, T). `labels` are left out: losses are the objective's.
        hidden_states: layer numbers 0…L.
        attentions: layer numbers 1…L.
        logits: False ends the forward pass after the last layer asked for.

    Raises:
        ValueError: before the forward pass, for a layer the model does not have or a batch without inputs; after it, for a layer
            whose hidden state or attention could not be seen.

    >>> trace = capture(model, batch, hidden_states=[0, 1, 3], attentions=[1, 3])  # doctest: +SKIP
    >>> trace.hidden_states[3].shape, trace.attention_maps(3).shape  # doctest: +SKIP
    """
    hidden_states, attentions = sorted(set(hidden_states)), sorted(set(attentions))
    blocks = find_blocks(model) if hidden_states or attentions else []
    _check_layers(model, hidden_states, attentions, blocks)
    inputs = _inputs(model, batch)
    trace = Trace(mask=_token_mask(inputs), causal=is_causal_lm(model), name=type(model).__name__)
    by_interface = not attentions or _uses_attention_interface(blocks[0])
    if not by_interface:  # BLOOM, DeBERTa, Falcon …: only their own eager maps exist
        _check_eager(model)
        inputs["output_attentions"] = True
    last = None if logits or not by_interface else max([*hidden_states, *attentions], default=None)

    recorder = _Recorder(trace, set(hidden_states), set(attentions) if by_interface else set(), last)
    token = _recorder.set(recorder)
    handles = recorder.hook(blocks)
    try:
        with _watching_attention() if recorder.attentions else nullcontext():
            outputs = model(**inputs)
    except _EnoughSeen:
        outputs = None
    finally:
        for handle in handles:
            handle.remove()
        _recorder.reset(token)

    _check_seen(trace, hidden_states, sorted(recorder.attentions))
    if logits:
        trace.logits = _logits(model, outputs)
    if not by_interface:
        trace.maps = _returned_maps(model, outputs, attentions)
    return trace


def is_causal_lm(model: nn.Module) -> bool:
    """True for a model whose logits at t predict token t + 1: a causal language model of transformers, or a subclass of one."""
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(kind.__name__ in names for kind in type(model).__mro__)


# -- the hooks --------------------------------------------------------------------------------------------------------


class _EnoughSeen(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


class _Recorder:
    """Writes into a trace while the model runs. `layer` is the block the forward pass is in; one module may serve several layers."""

    def __init__(self, trace: Trace, hidden_states: set[int], attentions: set[int], last: int | None):
        self.trace, self.hidden_states, self.attentions, self.last = trace, hidden_states, attentions, last
        self.layer = 0

    def hook(self, blocks: list[nn.Module]) -> list:
        handles = []
        for block in dict.fromkeys(blocks):  # each module once, though it may serve several layers
            numbers = [i for i, other in enumerate(blocks, 1) if other is block]
            handles.append(block.register_forward_pre_hook(self._entering(numbers), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leaving))
        return handles

    def _entering(self, numbers: list[int]):
        def pre_hook(block, args, kwargs=None):
            if _recorder.get() is not self:  # another thread's forward pass through the same model
                return
            # a shared block serves its layers in turn; any other one has exactly one number
            self.layer = next((i for i in numbers if i > self.layer), numbers[0])
            if self.layer == 1 and 0 in self.hidden_states:
                self.trace.hidden_states[0] = args[0] if args else kwargs["hidden_states"]
                if self.last == 0:
                    raise _EnoughSeen

        return pre_hook

    def _leaving(self, block, args, output):
        if _recorder.get() is not self:
            return
        if self.layer in self.hidden_states:
            self.trace.hidden_states[self.layer] = output[0] if isinstance(output, tuple) else output
        if self.layer == self.last:
            raise _EnoughSeen

    def attention(self, module, query, key, value, attention_mask=None, *_, **options):
        # the first call of a block is its self-attention; a decoder's cross-attention comes second
        if self.layer not in self.attentions or self.layer in self.trace.attention:
            return
        scaling, causal = options.get("scaling"), options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        self.trace.attention[self.layer] = AttentionInputs(
            query,
            key,
            value,
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            # sdpa masks the future by itself when no mask does; flash does whenever the module is causal
            causal=bool(causal) and (attention_mask is None or attention_mask.dim() == 2) and query.shape[2] > 1,
            softcap=options.get("softcap"),
            position_bias=options.get("position_bias"),
            sinks=options.get("s_aux"),
        )


_recorder: ContextVar[_Recorder | None] = ContextVar("fakit_recorder", default=None)  # of this thread's capture
_lock = threading.Lock()
_watchers = 0  # captures under way in all threads: the first one in puts the watch up, the last one out takes it down


@contextmanager
def _watching_attention() -> Iterator[None]:
    """While open, attention functions report their inputs to their thread's recorder, then do what they always do.

    Watched is the question "which function?" that every attention module asks of transformers' table, not the table: no entry and no
    configuration changes, so mask building, kernels and gradient checkpointing see what they always see. Forward passes of other
    threads run through untouched.
    """
    global _watchers
    with _lock:
        if _watchers == 0:
            ask = ALL_ATTENTION_FUNCTIONS.get_interface
            ALL_ATTENTION_FUNCTIONS.get_interface = lambda *args, **kwargs: _reporting(ask(*args, **kwargs))
        _watchers += 1
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1
            if _watchers == 0:
                del ALL_ATTENTION_FUNCTIONS.get_interface  # the class's own shows again


def _reporting(function: Callable) -> Callable:
    def attention(*args, **kwargs):
        if (recorder := _recorder.get()) is not None:
            recorder.attention(*args, **kwargs)
        return function(*args, **kwargs)

    return attention


def _uses_attention_interface(block: nn.Module) -> bool:
    return any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__]) for module in block.modules())


# -- inputs and outputs -----------------------------------------------------------------------------------------------


def _check_layers(model: nn.Module, hidden_states: list[int], attentions: list[int], blocks: list[nn.Module]) -> None:
    for what, asked, lowest in (("hidden state", hidden_states, 0), ("attention", attentions, 1)):
        wrong = [i for i in asked if not lowest <= i <= len(blocks)]
        if wrong:
            raise ValueError(
                f"{what} of layer {', '.join(map(str, wrong))} asked of a {len(blocks)}-layer model ({type(model).__name__}); "
                f"it has layers {lowest}…{len(blocks)} (0 = embeddings, {len(blocks)} = last block)."
            )


def _inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "input_ids" not in inputs and "inputs_embeds" not in inputs and "pixel_values" not in inputs:
        raise ValueError(
            f"a batch holds input_ids (B, T), inputs_embeds (B, T, d) or pixel_values; this one holds {sorted(batch)}. "
            "Pass what the tokenizer or the collator returns."
        )
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _token_mask(inputs: dict) -> Tensor | None:
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() == 2:
        return inputs["attention_mask"].bool()  # (B, T)
    if "pixel_values" in inputs:
        return None  # an image has no padding; its number of patches is the model's business
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _logits(model: nn.Module, outputs) -> Tensor | None:
    logits = getattr(outputs, "logits", None)
    if logits is None and not hasattr(outputs, "last_hidden_state"):
        raise ValueError(
            f"{type(model).__name__} returned no logits (it returned {sorted(outputs.keys())}); capture(..., logits=False)."
        )
    return logits  # None for a bare encoder, which has no head


def _check_seen(trace: Trace, hidden_states: list[int], attentions: list[int]) -> None:
    for what, asked, seen in (
        ("hidden state", hidden_states, trace.hidden_states),
        ("attention", attentions, trace.attention),
    ):
        missing = [i for i in asked if i not in seen]
        if missing:
            raise ValueError(
                f"{what} of layers {missing} asked of {trace.name}, and nothing was seen there: the blocks did not run (layerdrop), or have "
                "no attention. Ask for other layers, or leave the term out."
            )
    for i, hidden in trace.hidden_states.items():
        if trace.mask is not None and hidden.shape[:-1] != trace.mask.shape:
            raise ValueError(
                f"layer {i} of {trace.name} works on {tuple(hidden.shape)}, and the batch is {tuple(trace.mask.shape)} (B, T): its tokens cannot "
                "be told apart (XLNet turns batch and tokens around, Longformer adds padding). Use a model whose blocks work on (B, T, d)."
            )


def _check_eager(model: nn.Module) -> None:
    """Falcon under sdpa returns maps, but adds its bool mask to the scores: other implementations' maps are not to be trusted."""
    implementation = model.config._attn_implementation
    if implementation != "eager":
        raise ValueError(
            f"attention asked of {type(model).__name__}, which does not use transformers' attention interface: its maps can only be had "
            f"under 'eager' attention, and it runs {implementation!r}. Load it with attn_implementation='eager'."
        )


def _returned_maps(model: nn.Module, outputs, attentions: list[int]) -> dict[int, Tensor]:
    maps = getattr(outputs, "attentions", None)
    if not maps or any(maps[i - 1] is None for i in attentions):
        raise ValueError(
            f"attention of layers {attentions} asked of {type(model).__name__}, which returned no attention maps: these blocks may have "
            "no attention. Ask for other layers, or leave the attention term out."
        )
    return {i: maps[i - 1] for i in attentions}
