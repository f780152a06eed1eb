"""What a model is given of a batch: its own columns, no key/value cache, rows without padding before them,
documents apart.

Everything that runs a model on a batch asks here, so that training, evaluation and a teacher cache give it the same.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from fakit.models.blocks import find_blocks, is_encoder_decoder, without_adapter
from fakit.models.random_state import random_state_kept
from fakit.tracing.hooks import Recorder
from fakit.tracing.trace import Trace

# Where a packed row says where its documents begin, beside position_ids: hybrids' kernels and flash attention.
BORDERS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What tokenizers give: the columns of a model that names none.
MODEL_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
# Settings of a forward pass that would keep what only generation reads: keys and values, states, XLNet's memory.
_CACHES = ("use_cache", "use_mems")


@dataclass
class ModelInputs:
    """One batch as a model is given it.

    Attributes:
        inputs: the arguments of its forward pass, on its device.
        mask: bool (B, T), the batch's tokens, in the batch's own places; None for images and sounds.
        documents: int64 (B, T), the number of each token's document in its row; None where every row is one document.
        places: int64 (B, T), where each place of the batch stands in what the model reads;
            None where it stands at the same one.
    """

    inputs: dict
    mask: Tensor | None
    documents: Tensor | None = None
    places: Tensor | None = None


def prepare_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> ModelInputs:
    """What `model` is given of a batch.

    * The columns that its forward pass takes (`taken_columns`), without `labels`: losses are the objective's. An
      encoder-decoder that is given no decoder inputs gets the labels, shifted, as the model would do.
    * No key/value cache: nobody reads it. (A packed row is not taken apart where there is one.)
    * Rows padded on the left are read as the same rows padded on the right: as they are, where the model sees to that
      itself (rotary and relative positions, positions made of the mask); with position_ids that count tokens alone; or
      moved to the left edge, where no position_ids are taken or a classifier looks at the first place. Which of them,
      is asked of the model (`left_padding`).
    * Packed rows, whose position_ids start again (or that carry seq_idx or cu_seq_lens_q), get position_ids and no
      attention mask: this is how transformers keeps documents apart. A place of padding is a document of its own.

    Raises:
        ValueError: a batch without inputs, decoder inputs that cannot be made,
            packed rows for a model that would mix their documents.
    """
    taken = taken_columns(model)
    inputs: dict[str, Any] = {
        name: x for name, x in batch.items() if name != "labels" and (taken is None or name in taken)
    }
    expected = dict.fromkeys(["input_ids", "inputs_embeds", "pixel_values", model.main_input_name])
    if not any(name in inputs for name in expected):
        raise ValueError(
            f"a batch holds input_ids (B, T), inputs_embeds (B, T, d) or pixel_values; this one holds {sorted(batch)}, "
            f"and {type(model).__name__} takes {model.main_input_name}. Pass what the tokenizer or the collator "
            "returns."
        )
    _check_tokens(batch)
    labels = batch.get("labels")
    if (
        is_encoder_decoder(model)
        and not has_decoder_inputs(inputs)
        and isinstance(labels, Tensor)
        and labels.dim() == 2
    ):
        inputs["decoder_input_ids"] = _shifted(model, labels)
    device = next(model.parameters()).device
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    mask = token_mask(batch)  # also of a model that does not look at it (FNet)
    mask = None if mask is None else mask.to(device)
    documents, places = find_documents(batch), None
    if documents is not None and mask is not None:
        refuse_mixing(model, rows=len(documents))
        documents = documents.to(device)
        inputs = _packed(inputs, documents, mask)
    elif mask is not None and not mask[:, 0].all() and (way := left_padding(model)) != "as it is":
        if way == "positions":
            inputs.setdefault("position_ids", positions_of(mask).view(inputs["attention_mask"].shape))
        else:
            places = (torch.arange(mask.shape[1], device=device) + mask.long().argmax(1, keepdim=True)) % mask.shape[1]
            inputs = {name: _moved(x, places, mask) if _by_token(name, x, mask) else x for name, x in inputs.items()}
            places = places.argsort(1)  # and back
    for name in _CACHES:
        if name not in inputs and taken is not None and name in taken:
            inputs[name] = False
    return ModelInputs(inputs, mask, documents, places)


def _check_tokens(batch: Mapping[str, Any]) -> None:
    """Raise ValueError for token ids that are no integers (B, T), or none at all."""
    ids = batch.get("input_ids")
    if ids is None:
        return
    found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
    if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids are integers (B, T), and this batch holds {found}. One row is input_ids[None]; a tokenizer "
            "gives tensors with return_tensors='pt'."
        )
    if not ids.numel():
        raise ValueError(
            f"input_ids hold no token: they are {found}, (B, T). Leave empty rows out, and batches without rows."
        )


# -- columns ----------------------------------------------------------------------------------------------------------

_signatures: dict[type, tuple[frozenset[str], bool]] = {}


def taken_columns(model: nn.Module) -> frozenset[str] | None:
    """The columns that a model's forward pass takes; None for one that names none of them (**kwargs alone)
    and holds no model that does.

    A forward pass with **kwargs hands them on: to the class it is derived from, and to the models inside (a
    classifier's base model, the language model of a vision-language model), so what these name is taken too.
    """
    model = without_adapter(model)
    named, open_ended = _named(type(model))
    if not open_ended:
        return named
    inside = [type(m) for m in model.modules() if isinstance(m, PreTrainedModel)]
    named = named.union(*(_named(kind)[0] for kind in inside))
    # positions are taken by who names them: attention functions are handed them, and leave them unread
    return named | (frozenset(TransformersKwargs.__annotations__) - {"position_ids"}) if named else None


def _named(kind: type) -> tuple[frozenset[str], bool]:
    """The names that the forward pass of a class takes, and whether it takes others too."""
    if kind not in _signatures:
        names: set[str] = set()
        open_ended = True
        for base in kind.__mro__:
            if base is nn.Module or not open_ended:
                break
            if "forward" in vars(base):
                parameters = inspect.signature(vars(base)["forward"]).parameters.values()
                names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
                open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters)
        _signatures[kind] = frozenset(names - {"self"}), open_ended
    return _signatures[kind]


def has_decoder_inputs(inputs: Mapping) -> bool:
    """True where the decoder is given tokens of its own."""
    return any(inputs.get(name) is not None for name in DECODER_INPUTS)


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads to say `labels`: they themselves, one place to the right, as the model would make it.
    (B, T_dec)
    """
    transformer: Any = model
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return transformer.prepare_decoder_input_ids_from_labels(labels=labels)
    start, padding = transformer.config.decoder_start_token_id, transformer.config.pad_token_id
    if start is None or padding is None:
        raise ValueError(
            f"decoder inputs of {type(model).__name__} cannot be made from labels: decoder_start_token_id is {start}, "
            f"pad_token_id {padding} in its configuration. Set both, or pass decoder_input_ids."
        )
    return nn.functional.pad(labels[:, :-1], (1, 0), value=start).masked_fill(labels == -100, padding)


# -- the side of the padding ------------------------------------------------------------------------------------------


def token_mask(inputs: Mapping) -> Tensor | None:
    """The tokens that count, bool (B, T); None for an image or a sound:
    its number of patches or frames is the model's business.
    """
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if tokens is None:
        return None
    # multiple choice: (B, N, T), and every choice is a row of its own to the blocks
    choices = tokens.dim() - (2 if inputs.get("input_ids") is not None else 3)
    tokens = tokens.flatten(0, choices)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 + choices:
        return mask.flatten(0, choices).bool()  # (B, T)
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count the tokens of a mask (B, T) alone, from 0; 0 in the padding before them. int64 (B, T)"""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


_ways: WeakKeyDictionary = WeakKeyDictionary()  # model → what its rows need that are padded on the left


def left_padding(model: nn.Module) -> str:
    """What a model needs to read rows that are padded on the left as if they were padded on the right;
    asked of the model itself, once.

    Returns:
        "as it is": nothing; "positions": position_ids; "moved": tokens at the left edge.
    """
    if model not in _ways:
        # what XLNet says of a row is read off the last place of all, so that rows padded on the right would be wrong
        last = getattr(model.config, "summary_type", None) == "last"
        try:
            _ways[model] = "as it is" if last else _left_padding(model)
        except (
            ValueError,
            RuntimeError,
        ):  # blocks that cannot be found, lengths that it does not take: moving suits everyone
            _ways[model] = "moved"
    return _ways[model]


def _left_padding(model: nn.Module) -> str:
    ids = _some_tokens(model, _PROBE)
    config: Any = model.config
    padding = getattr(config.get_text_config(), "pad_token_id", None) or 0
    padded = nn.functional.pad(ids, (_PADDING, 0), value=padding)
    mask = nn.functional.pad(torch.ones_like(ids), (_PADDING, 0))
    alone = _ask(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    if _agree(_ask(model, input_ids=padded, attention_mask=mask), alone):
        return "as it is"
    taken = taken_columns(model)
    takes_positions = taken is not None and "position_ids" in taken
    if takes_positions and _agree(
        _ask(model, input_ids=padded, attention_mask=mask, position_ids=positions_of(mask)), alone
    ):
        return "positions"
    return "moved"


def _agree(padded: list[Tensor], alone: list[Tensor]) -> bool:
    """True where what is said of the tokens is the same to rounding; what the embeddings give (the first) has none."""
    for number, (theirs, ours) in enumerate(zip(padded, alone, strict=True)):
        theirs = (
            theirs[:, -ours.shape[1] :] if theirs.dim() > 2 and theirs.shape[1] == ours.shape[1] + _PADDING else theirs
        )
        rounding = torch.finfo(ours.dtype).eps * (1 if number == 0 else 32)
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > rounding * ours.abs().max():
            return False
    return True


def _by_token(name: str, x, mask: Tensor) -> bool:
    """True for an input with an entry for each token: (B, T), (B, T, n), (B / N, N, T), or positions (n, B, T)."""
    if not isinstance(x, Tensor) or name.startswith("decoder_"):
        return False
    if x.dim() == 3 and x.shape[:2].numel() == len(mask) and x.shape[2] == mask.shape[1]:
        return True
    return (x.dim() in (2, 3) and x.shape[:2] == mask.shape) or (name == "position_ids" and x.shape[-2:] == mask.shape)


def _moved(x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    if x.shape[:2] == mask.shape:
        return at_places(x, places, 1)
    if x.shape[1:] == mask.shape:
        return at_places(x, places, 2, 1)
    return at_places(x.flatten(0, 1), places, 1).view(x.shape)


def at_places(x: Tensor, places: Tensor, dim: int, rows: int = 0) -> Tensor:
    """`x` with the entries along `dim` (T) in the order that `places` (B, T) gives its row along `rows` (B,
    or 1 for all).
    """
    shape, size = [1] * x.dim(), list(x.shape)
    shape[rows], shape[dim] = places.shape
    size[rows] = len(places)
    return x.expand(size).gather(dim, places.view(shape).expand(size))


# -- packed rows ------------------------------------------------------------------------------------------------------


def find_documents(batch: Mapping) -> Tensor | None:
    """The number of each token's document within its row, int64 (B, T); None where every row is one document.

    Documents begin where position_ids do not go on by one (as transformers sees it; under an attention mask, which
    speaks of rows with padding, only in rows where they go back), where seq_idx changes, or where cu_seq_lens_q says.
    Each place of padding is one of its own.
    """
    tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
    if tokens is None or tokens.dim() == 1 or tokens.shape[1] < 2 or batch.get("input_ids", tokens[..., 0]).dim() != 2:
        return None
    shape, mask = tokens.shape[:2], batch.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.dim() == 2 else None
    both = None if mask is None else mask[:, 1:] & mask[:, :-1]  # (B, T - 1)
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() <= 2 and positions.shape[-1] == shape[1]:
        step = positions.expand(shape).diff(dim=1)  # (B, T - 1)
        begins = step != 1
        if both is not None and not (both & (step <= 0)).any():
            return None
    elif batch.get("seq_idx") is not None:
        begins = batch["seq_idx"].expand(shape).diff(dim=1) != 0
    elif batch.get("cu_seq_lens_q") is not None:
        begins = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
        begins.view(-1)[batch["cu_seq_lens_q"][1:-1].to(tokens.device).long()] = True
        begins = begins[:, 1:]
    else:
        return None
    if not begins.any():
        return None
    begins = begins if both is None else begins | ~both
    return nn.functional.pad(begins.long().cumsum(1), (1, 0))


def _packed(inputs: dict, documents: Tensor, mask: Tensor) -> dict:
    """Inputs without attention mask, whose position_ids say where documents begin."""
    positions = inputs.get("position_ids")
    if positions is None:
        places = torch.arange(documents.shape[1], device=documents.device)
        first = nn.functional.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
        positions = places - torch.where(first, places, 0).cummax(1).values
    positions = positions.expand(documents.shape)
    # one place of padding never goes on from another, nor a document from it
    positions = torch.where(mask, positions, positions.masked_fill(~mask, torch.iinfo(positions.dtype).max).min())
    return {name: x for name, x in inputs.items() if name != "attention_mask"} | {"position_ids": positions}


_reasons: WeakKeyDictionary = (
    WeakKeyDictionary()
)  # model → why it cannot keep documents apart, by whether there are several rows


def refuse_mixing(model: nn.Module, rows: int = 1) -> None:
    """Raise ValueError for a model that cannot keep the documents of packed rows apart;
    asked of the model itself, once.

    Args:
        model: it is run on three tiny documents.
        rows: of a batch. Flash attention keeps documents of one row apart, not of several.
    """
    if (reason := _reason(model, rows > 1)) is not None:
        alone = " One row a batch it can (batch_size 1, and accumulation)." if rows > 1 and not _reason(model) else ""
        raise ValueError(
            f"the batch packs several documents into a row, and {type(without_adapter(model)).__name__} cannot keep "
            f"them apart: {reason}.{alone} Give each document a row of its own, padded (DataCollatorWithPadding, or "
            "packing: false), or use models that can (GPT-2, Llama, Mistral, Gemma …)."
        )


def _reason(model: nn.Module, several: bool = False) -> str | None:
    """Why it cannot keep documents apart; None where it can."""
    known = _reasons.setdefault(model, {})
    if several not in known:
        known[several] = _why_mixed(model, 2 if several else 1)
    return known[several]


def _why_mixed(model: nn.Module, rows: int) -> str | None:
    if is_encoder_decoder(model):
        return "an encoder-decoder reads one document a row"
    taken = taken_columns(model)
    if taken is not None and "position_ids" not in taken:
        return "its forward pass takes no position_ids, which say where a document begins"
    ids = _some_tokens(model, 4 * _PROBE).expand(rows, -1)
    ids, others = ids[:, : 3 * _PROBE].contiguous(), ids[:, 3 * _PROBE :]
    changed = ids.clone()
    changed[:, _PROBE : 2 * _PROBE] = others
    positions = torch.arange(_PROBE, device=ids.device).repeat(3).expand(rows, -1).contiguous()
    last = ids[:, -_PROBE:].contiguous()
    packed = _ask(model, input_ids=ids, position_ids=positions)
    other = _ask(model, input_ids=changed, position_ids=positions)
    alone = _ask(model, input_ids=last, position_ids=positions[:, -_PROBE:].contiguous())
    if any(x.shape[:2] != ids.shape for x in packed):
        return "it gives one prediction for a row, and every document wants one of its own"
    quantized = any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
    for whole, varied, own in zip(packed, other, alone, strict=True):
        tolerance = max(1e-4, 2 * torch.finfo(whole.dtype).eps, 0.05 if quantized else 0.0) * whole.abs().max()
        difference = (whole - varied).abs()
        before, behind = difference[:, :_PROBE].max(), difference[:, -_PROBE:].max()
        if whole is not packed[0] and before > tolerance:
            return f"an earlier document sees what a later one says (attention both ways){_beside(before, tolerance)}"
        if whole is not packed[0] and behind > tolerance:
            return (
                "a later document sees what an earlier one says (its attention does not ask for position_ids, or its "
                f"blocks hand on a state){_beside(behind, tolerance)}"
            )
        allowed = tolerance if whole is packed[0] else 8 * tolerance
        if (moved := (whole[:, -_PROBE:] - own).abs().max()) > allowed:
            return f"a document behind another one is given other positions than alone{_beside(moved, allowed)}"
    return None


def _beside(difference: Tensor, tolerance: Tensor) -> str:
    return f": what it says changes by {difference.item():.2g}, where rounding explains {tolerance.item():.2g}"


# -- asking the model -------------------------------------------------------------------------------------------------

_PROBE, _PADDING = 4, 5  # tokens of a document, and padding before one, that a model is asked about


def _some_tokens(model: nn.Module, number: int) -> Tensor:
    """Different token ids that mean nothing special, as far as the vocabulary reaches. (1, number)"""
    transformer: Any = model
    config = transformer.config.get_text_config()
    size = transformer.get_input_embeddings().weight.shape[0]
    special = {value for key, value in vars(config).items() if key.endswith("token_id") and isinstance(value, int)}
    plain = [i for i in range(size) if i not in special][-number:]
    device = next(model.parameters()).device
    return torch.tensor(plain * (number // len(plain) + 1), device=device)[None, :number]


def _ask(model: nn.Module, **inputs: Any) -> list[Tensor]:
    """What the embeddings give (B, T, d), and all that the model says, without a trace in modes and random numbers."""
    taken = taken_columns(model)
    if taken is not None:
        inputs = {name: x for name, x in inputs.items() if name in taken}
        inputs |= {name: False for name in _CACHES if name in taken}
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, -2:]
    device = next(model.parameters()).device
    recorder = Recorder(Trace(), {0}, set(), None)
    with (
        torch.no_grad(),
        random_state_kept(device),
        evaluated(model),
        torch.autocast(device.type, enabled=False),
        recorder.watching(find_blocks(model), "none"),
    ):
        outputs = model(**inputs)
    said = [x for x in outputs.values() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
    return [recorder.trace.hidden_states[0], *said]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode, every part of it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
