"""Run a model and keep what was asked for: hidden states, attention inputs, logits. The model stays as it was.

Layers are numbered 0 (output of the embeddings) and i = 1…L (output of block i, before any final norm); an
encoder-decoder's decoder blocks follow its encoder's. Hidden states come from hooks on the blocks, not from the
`hidden_states` tuple, whose last entry is normed in some families. Attention comes from the attention functions' inputs
(`fakit.tracing.hooks`), whatever the implementation; families that do not use transformers' attention interface return
maps of their own under eager attention.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fakit.losses.fused.output_head import Head
from fakit.models.blocks import check_model, encoder_depth, find_blocks, is_encoder_decoder, without_adapter
from fakit.models.head_kinds import problem_type
from fakit.models.kinds import is_causal_lm, layerdrop, rescaled
from fakit.models.random_state import random_state_kept
from fakit.tracing.head_finder import find_finish, find_head, without_logits
from fakit.tracing.hooks import Recorder
from fakit.tracing.inputs import BORDERS, DECODER_INPUTS, at_places, has_decoder_inputs, prepare_inputs, token_mask
from fakit.tracing.lens import find_lens
from fakit.tracing.mlp import PLACES
from fakit.tracing.trace import BY_TOKEN, Trace


def capture(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    hidden_states: Iterable[int] = (),
    attentions: Iterable[int] = (),
    logits: bool | str = True,
    attention_outputs: Iterable[int] = (),
    lens: bool = False,
    mlp_outputs: Iterable[int] = (),
    mlp_ups: Iterable[int] = (),
    mlp_gates: Iterable[int] = (),
) -> Trace:
    """Run `model` on `batch` and keep the layers asked for. Follows torch's grad mode; leaves the model as it found it.

    Args:
        model: a transformers model.
        batch: its inputs, input_ids (B, T) and mostly attention_mask (B, T); columns that its forward pass does not
            take are left out (`fakit.tracing.inputs.prepare_inputs`), and so are `labels`: losses are the objective's;
            of an encoder-decoder that is given no decoder inputs they are shifted into decoder_input_ids, as the model
            would do. Rows may be padded on either side, or pack several documents (position_ids that start again),
            which then see nothing of each other.
        hidden_states: layer numbers 0…L; in an encoder-decoder 0…L_e are the encoder's, L_e + 1 … L_e + L_d the
            decoder's.
        attentions: layer numbers 1…L; a decoder layer's is its self-attention.
        logits: False ends the forward pass after the last layer asked for. "head" keeps the output head and its input
            in place of logits over a large vocabulary (`Trace.head`), where the model has such a head;
            the logits themselves where it has not.
        attention_outputs: layer numbers 1…L: what each block's (self-)attention adds to the hidden states, after its
            output projection (`Trace.attention_outputs`).
        mlp_outputs, mlp_ups, mlp_gates: layer numbers 1…L: what each block's MLP adds to the hidden states, and what
            its up and gate projections give (`fakit.tracing.mlp`).
        lens: keep what reads any layer's hidden states by the model's own norm and head (`Trace.lens`).

    Raises:
        ValueError: before the forward pass, for a layer the model does not have, a batch without inputs, packed rows
            for a model that mixes their documents, or a model whose attention cannot be had; after it, for a layer
            whose hidden state, attention or MLP could not be seen.

    >>> trace = capture(model, batch, hidden_states=[0, 1, 3], attentions=[1, 3])  # doctest: +SKIP
    >>> trace.hidden_states[3].shape, trace.attention_maps(3).shape  # doctest: +SKIP
    """
    check_model("what capture runs", model)
    if not isinstance(batch, Mapping):
        raise ValueError(
            "a batch is a mapping of tensors, such as a tokenizer returns with return_tensors='pt'; this one is a "
            f"{type(batch).__name__}."
        )
    hidden_states, attentions = _layer_numbers("hidden_states", hidden_states), _layer_numbers("attentions", attentions)
    attention_outputs = _layer_numbers("attention_outputs", attention_outputs)
    given = {"mlp_outputs": mlp_outputs, "mlp_ups": mlp_ups, "mlp_gates": mlp_gates}
    mlp = {name: _layer_numbers(name, layers) for name, layers in given.items()}
    inside = sorted({*attention_outputs, *(layer for layers in mlp.values() for layer in layers)})
    blocks = find_blocks(model) if hidden_states or attentions or inside else []
    if blocks and model.training:
        _check_every_layer_runs(model)
    elif hidden_states and rescaled(model):
        config: Any = model.config
        raise ValueError(
            f"hidden states were requested of {type(model).__name__} in evaluation mode, which halves them after every "
            f"{config.rescale_every} blocks, and some weights with them (rescale_every): they are not those of a model "
            "in training. Call fakit.models.without_rescaling(model) first; load_teacher, shrink and "
            "DistillationTrainer do."
        )
    _check_layers(model, hidden_states, attentions, attention_outputs, mlp, blocks)
    ready = prepare_inputs(model, batch)
    inputs = ready.inputs
    trace = Trace(
        mask=ready.mask,
        documents=ready.documents,
        causal=is_causal_lm(model),
        problem_type=problem_type(model.config),
        name=type(model).__name__,
    )
    if lens:
        trace.lens = find_lens(model)
    if is_encoder_decoder(model):
        trace.encoder_layers = encoder_depth(model)
        trace.decoder_mask = _decoder_mask(model, inputs, batch.get("labels"))
    source = _attention_source(model, blocks) if attentions or inside else "none"
    if source == "maps":
        _check_projections(model, next((n for n, x in mlp.items() if x), "attention_outputs") if inside else None)
        inputs["output_attentions"] = True
    watched = set(attentions) if source in ("interface", "sdpa") else set()
    asked = [*hidden_states, *attentions, *inside]
    last = None if logits or source == "maps" else max(asked, default=None)

    outputs = None
    places = {name: set(layers) for name, layers in mlp.items()}
    recorder = Recorder(trace, set(hidden_states), watched, last, set(attention_outputs), places)
    head = find_head(model) if logits == "head" else None
    known, finish = find_finish(model, head, _without_borders(inputs)) if head is not None else (False, None)
    with (
        recorder.watching(blocks, source if watched or inside else "none"),
        _naming_the_decoder(model, inputs),
        without_logits(head) if head is not None and known else nullcontext([]) as given,
    ):
        outputs = model(**inputs)

    _check_seen(trace, hidden_states, sorted(watched), attention_outputs)
    _check_mlp(trace, mlp, recorder)
    _batch_first(model, inputs, blocks, trace)
    if head is not None and known:
        trace.head = Head(given[0], head.weight, head.bias, finish)
    elif logits:
        trace.logits = _logits(model, outputs)
    if source == "maps":
        trace.maps = _returned_maps(model, outputs, attentions, trace)
    if ready.documents is not None:
        _keep_apart(trace)
    return trace if ready.places is None else _put_back(trace, ready.places)


# -- where attention can be seen --------------------------------------------------------------------------------------


def check_attention(model: nn.Module, outputs: bool = False) -> None:
    """Raise ValueError when nothing of the model's attention can be had; with `outputs`, not what is inside of a block:
    what its attention adds to the hidden states, its queries, its MLP.
    """
    if _attention_source(model, find_blocks(model)) == "maps" and outputs:
        _check_projections(model, "attention_outputs")


def _check_projections(model: nn.Module, asked: str | None) -> None:
    config: Any = model.config
    if asked is not None:
        raise ValueError(
            f"{asked.replace('_', ' ')} asked of {type(model).__name__}, whose blocks attend by code of their own "
            f"under {config._attn_implementation!r} attention, so that it cannot be seen where attention ends and its "
            "output projection begins. Load it with attn_implementation='sdpa' where it has that, or compare the "
            "blocks' own outputs: Features(at='block')."
        )


def _attention_source(model: nn.Module, blocks: list[nn.Module]) -> str:
    """ "interface": transformers' attention functions; "sdpa": torch's, called by the model itself; "maps":
    the model's own eager maps.
    """
    config: Any = model.config
    implementation = config._attn_implementation
    if all(_uses_attention_interface(block) for block in blocks):
        return "interface"
    if implementation == "sdpa":
        return "sdpa"
    if implementation != "eager":
        raise ValueError(
            f"attention asked of {type(model).__name__}, which does not use transformers' attention interface, and "
            f"runs {implementation!r}: its attention can be had under 'eager' attention alone. Load it with "
            "attn_implementation='eager'."
        )
    if not any(_can_return_maps(module) for module in model.modules() if isinstance(module, PreTrainedModel)):
        raise ValueError(_no_maps(model))
    return "maps"


def _uses_attention_interface(block: nn.Module) -> bool:
    return any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__]) for module in block.modules())


def _can_return_maps(model: PreTrainedModel) -> bool:
    """Its forward collects maps itself, or transformers records them as they come out of its attention modules."""
    recorded = getattr(model, "_can_record_outputs", None) or {}
    return "attentions" in recorded or "output_attentions" in inspect.signature(model.forward).parameters


def _no_maps(model: nn.Module) -> str:
    return (
        f"attention asked of {type(model).__name__}, which gives no attention maps: its "
        f"{type(find_blocks(model)[0]).__name__} blocks have no softmax attention over tokens (state spaces, Fourier "
        "transforms), or do not show it. Leave the attention term out (attention=None) and align hidden states and "
        "outputs, or use a model whose blocks attend."
    )


# -- inputs and outputs -----------------------------------------------------------------------------------------------


def _layer_numbers(name: str, asked: Iterable[int]) -> list[int]:
    try:
        numbers = list(asked)
        if not any(isinstance(i, bool) for i in numbers):
            return sorted({index(i) for i in numbers})
    except TypeError:
        pass
    raise ValueError(
        f"{name}={asked!r} was requested, and layers are whole numbers, 0 for the embeddings and i for the output of "
        f"block i: {name}=[1, 2], or {name}=range(7)."
    )


def _check_layers(
    model: nn.Module, hidden_states: list[int], attentions: list[int], outputs: list[int], mlp: Mapping, blocks
) -> None:
    for what, asked, lowest in (
        *((PLACES[name], layers, 1) for name, layers in mlp.items()),
        ("hidden state", hidden_states, 0),
        ("attention", attentions, 1),
        ("attention output", outputs, 1),
    ):
        wrong = [i for i in asked if not lowest <= i <= len(blocks)]
        if wrong:
            raise ValueError(
                f"{what} of layer {', '.join(map(str, wrong))} asked of a {len(blocks)}-layer model "
                f"({type(model).__name__}); it has layers {lowest}…{len(blocks)} (0 = embeddings, {len(blocks)} = last "
                "block)."
            )


def _check_every_layer_runs(model: nn.Module) -> None:
    if settings := layerdrop(model):
        named = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ValueError(
            f"layers asked of {type(model).__name__} in training mode, whose {named} leaves out whole layers at "
            "random: a layer that is left out has no hidden state and no attention. Turn it off: "
            "fakit.models.without_layerdrop(model) (shrink and DistillationTrainer do so)."
        )


@contextmanager
def _naming_the_decoder(model: nn.Module, inputs: dict) -> Iterator[None]:
    """Some encoder-decoders complain of other things when their decoder gets nothing."""
    try:
        yield
    except ValueError as error:
        classifies = "Classification" in type(model).__name__  # shifts the encoder's own tokens into the decoder
        if is_encoder_decoder(model) and not has_decoder_inputs(inputs) and not classifies:
            raise ValueError(
                f"{type(model).__name__} has a decoder, and the batch holds {sorted(inputs)}: no decoder_input_ids, "
                f"and no labels (B, T_dec) to make them from. Pass one of them. (The model said: {error})"
            ) from error
        raise


def _decoder_mask(model: nn.Module, inputs: dict, labels: Tensor | None) -> Tensor | None:
    """The decoder's tokens, (B, T_dec): those of its attention mask; else those that carry a label;
    else those that are no padding.
    """
    if inputs.get("decoder_attention_mask") is not None:
        return inputs["decoder_attention_mask"].bool()
    given = next((inputs[name] for name in DECODER_INPUTS if inputs.get(name) is not None), None)
    if given is None:  # models that classify shift the encoder's own tokens into the decoder
        return token_mask(inputs)
    if isinstance(labels, Tensor) and labels.shape == given.shape[:2]:
        return labels.to(given.device) != -100
    config: Any = model.config
    padding = config.get_text_config().pad_token_id
    if given.dim() == 3 or padding is None:
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    mask = given != padding
    mask[:, 0] = True  # the start token, which in T5 is the padding token
    return mask


def _logits(model: nn.Module, outputs) -> Tensor | None:
    logits = getattr(outputs, "logits", None)
    if logits is not None and not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned its logits as a {type(logits).__name__}, and not as one tensor (B, C) or "
            "(B, T, V): outputs and task cannot be compared. capture(..., logits=False); outputs=None, task=None."
        )
    if logits is None and not hasattr(outputs, "last_hidden_state"):
        raise ValueError(
            f"{type(model).__name__} returned no logits (it returned {sorted(outputs.keys())}); capture(..., "
            "logits=False)."
        )
    return logits  # None for a bare encoder, which has no head


def _check_seen(trace: Trace, hidden_states: list[int], attentions: list[int], outputs: list[int]) -> None:
    unseen = "the blocks did not run: this model leaves them out, or they are called around their hooks"
    silent = (
        "the blocks attend by code of their own and not through transformers' attention functions (Doge, "
        "BigBird-Pegasus), do not attend (state spaces and convolutions in a hybrid, windows of LongT5), or did not run"
    )
    for what, asked, seen, why in (
        ("hidden state", hidden_states, trace.hidden_states, unseen),
        ("attention", attentions, trace.attention, silent),
        ("attention output", outputs, trace.attention_outputs, silent),
    ):
        missing = [i for i in asked if i not in seen]
        if missing:
            raise ValueError(
                f"{what} of layers {missing} asked of {trace.name}, and nothing was seen there: {why}. Ask for other "
                "layers, or leave the term out."
            )


def _check_mlp(trace: Trace, mlp: Mapping[str, list[int]], recorder: Recorder) -> None:
    for place, layers in mlp.items():
        if missing := [layer for layer in layers if layer not in getattr(trace, place)]:
            why = recorder.without.get((place, missing[0]), "the blocks did not run")
            raise ValueError(
                f"{PLACES[place]} of layers {missing} asked of {trace.name}, and there is none: {why}. Ask for another "
                "place (the blocks' own outputs: Features(at='block')), or leave the term out."
            )


# -- packed rows, and rows that were moved ----------------------------------------------------------------------------


def _without_borders(inputs: dict) -> dict:
    """Inputs that can be cut: those that say at which token of all a document begins cannot."""
    return {name: value for name, value in inputs.items() if name not in BORDERS}


def _keep_apart(trace: Trace) -> None:
    """Where an attention function was given no mask of pairs (flash attention), it kept documents apart by itself."""
    for layer, inputs in trace.attention.items():
        if inputs.mask is None or inputs.mask.dim() == 2:
            trace.attention[layer] = replace(inputs, documents=trace.documents)


def _put_back(trace: Trace, places: Tensor) -> Trace:
    """The trace of rows that were moved to an edge, each token in the batch's own place again."""
    first_only = trace.encoder_layers is not None  # it is the encoder that reads the batch's tokens
    seen = [*(i for name in BY_TOKEN for i in getattr(trace, name)), *trace.attention, *trace.maps]
    last = trace.encoder_layers if first_only else max(seen, default=0)

    def moved(kept: dict, move: Callable) -> dict:
        return {i: move(x) if i <= last else x for i, x in kept.items()}

    by_place = not first_only and trace.logits is not None and trace.logits.shape[:2] == places.shape
    return replace(
        trace,
        **{name: moved(getattr(trace, name), lambda x: at_places(x, places, 1)) for name in BY_TOKEN},
        attention=moved(trace.attention, lambda x: x.at_places(places)),
        maps=moved(trace.maps, lambda x: at_places(at_places(x, places, 2), places, 3)),
        logits=at_places(trace.logits, places, 1) if by_place and trace.logits.dim() == 3 else trace.logits,
        head=trace.head
        if first_only or trace.head is None
        else replace(trace.head, hidden=at_places(trace.head.hidden, places, 1)),
    )


# -- (B, T, d) --------------------------------------------------------------------------------------------------------

# By class, whether its blocks work on (T, B, d): seen in the first batch that is not square.
_tokens_first: dict[type, bool] = {}


def _batch_first(model: nn.Module, inputs: dict, blocks: list[nn.Module], trace: Trace) -> None:
    """Turn hidden states of models whose blocks work on (T, B, d) (XLNet, FSMT) around; refuse other shapes than (B,
    T, d).
    """
    kind = type(without_adapter(model))
    every = [(getattr(trace, name), i) for name in BY_TOKEN for i in getattr(trace, name)]
    for kept, i in every:
        hidden = kept[i]
        mask = trace.layer_mask(i)
        if mask is None or mask.shape == (1, 1):
            continue
        if mask.shape[0] != mask.shape[1]:
            _tokens_first[kind] = hidden.shape[:-1] == mask.T.shape
        elif kind not in _tokens_first:
            _tokens_first[kind] = _works_tokens_first(model, inputs, blocks)
        if _tokens_first[kind]:
            hidden = kept[i] = hidden.transpose(0, 1)
        if hidden.dim() == 4:
            raise ValueError(
                f"layer {i} of {trace.name} carries {tuple(hidden.shape)}, {hidden.shape[0]} hidden states of each "
                "token side by side (AltUp in Gemma 3n), and features compare one (B, T, d). Leave the features term "
                "out (features=None) and align outputs, or use another family."
            )
        if hidden.shape[:-1] != mask.shape:
            raise ValueError(
                f"layer {i} of {trace.name} works on {tuple(hidden.shape)}, and the batch is {tuple(mask.shape)} (B, "
                "T): its tokens cannot be told apart (Longformer adds padding, ProphetNet streams, prompts tokens). "
                "Pad the batch to a multiple of the window, or use a model whose blocks work on (B, T, d)."
            )


def _works_tokens_first(model: nn.Module, inputs: dict, blocks: list[nn.Module]) -> bool:
    """What the model makes of fewer rows than tokens; runs it as far as its first block,
    without drawing from the random numbers.
    """
    mask = token_mask(inputs)
    assert mask is not None, "asked where the trace has one alone"
    rows, tokens = mask.shape
    fewer = 1 if tokens > 1 else 2
    some = {k: v[:fewer] if isinstance(v, Tensor) and v.shape[:1] == (rows,) else v for k, v in inputs.items()}
    probe = Recorder(Trace(), {0}, set(), last=0)
    device = next(model.parameters()).device
    with torch.no_grad(), random_state_kept(device), probe.watching(blocks, "none"):
        model(**some)
    return probe.trace.hidden_states[0].shape[:2] == (tokens, fewer)


def _returned_maps(model: nn.Module, outputs, attentions: list[int], trace: Trace) -> dict[int, Tensor]:
    if trace.encoder_layers is None:
        maps = getattr(outputs, "attentions", None) or ()
    else:
        maps = (*(outputs.encoder_attentions or ()), *(outputs.decoder_attentions or ()))
    if len(maps) < max(attentions) or any(maps[i - 1] is None for i in attentions):
        raise ValueError(_no_maps(model))
    for i in attentions:
        shape, mask = tuple(maps[i - 1].shape), trace.layer_mask(i)
        tokens = shape[-1] if mask is None else mask.shape[1]
        if len(shape) != 4 or shape[-2:] != (tokens, tokens):
            reason = (
                "it looks through a window or at pooled tokens"
                if len(shape) == 4
                else "what its blocks return as attentions are states of their own and no weights of a softmax over "
                "tokens (RWKV, YOSO)"
            )
            raise ValueError(
                f"attention of layer {i} of {trace.name} has shape {shape}, which is no map (B, H, T, T) over {tokens} "
                f"tokens: {reason}. Leave the attention term out (attention=None), or use a model with full attention."
            )
    return {i: maps[i - 1] for i in attentions}
