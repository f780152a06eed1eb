"""What kind of model is this? Asked of the model as it is, not of its class's name or of a setting that its class may
overrule.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.pytorch_utils import Conv1D

from fakit.models.blocks import is_encoder_decoder, without_adapter
from fakit.models.random_state import random_state_kept


def ties(model: nn.Module) -> dict[str, str]:
    """Which parameters are one: the name of each parameter that another name stands for already → that first name.

    Read off the weights that the model has, for settings are no evidence: T5 v1.1, Flan-T5 and mT5 set
    `tie_word_embeddings` to true whatever their file says, and transformers unties the head again where a checkpoint
    holds one of its own.
    """
    first: dict[tuple, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # the storage itself, not its address: meta tensors have none
        place = (parameter.untyped_storage()._cdata, parameter.storage_offset(), parameter.shape)
        if first.setdefault(place, name) != name:
            found[name] = first[place]
    return found


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give each of these parameters weights of its own, equal at first, and let the model know,
    as `from_pretrained` does.
    """
    for name in names:
        owner, _, own = name.rpartition(".")
        shared = model.get_parameter(name)
        copied = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        setattr(model.get_submodule(owner), own, copied)
        model.all_tied_weights_keys.pop(name, None)


def tied_heads(model: PreTrainedModel) -> list[str]:
    """Names of the output head's parameters that are those of the embeddings."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    heads = {id(parameter) for parameter in head.parameters()}
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if module is head
        for own, parameter in module.named_parameters()
        if id(parameter) in heads & embeddings
    ]


def untied(built: PreTrainedModel, source: PreTrainedModel | PreTrainedConfig | str | Path) -> tuple[str, ...]:
    """Names of parameters that `built`, made from a configuration, ties to others,
    and that the weights at `source` do not.

    Args:
        built: a model without its weights (on the meta device).
        source: the model itself; a folder or hub id, whose weight file lists what it holds, and whose config.json still
            has what the class of the configuration overrules; or a configuration.
    """
    if isinstance(source, PreTrainedModel):
        there = ties(source)
        return tuple(name for name in ties(built) if name not in there)
    if isinstance(source, PreTrainedConfig):  # T5 keeps under this name what its file said of `tie_word_embeddings`
        return tuple(tied_heads(built)) if getattr(source, "scale_decoder_outputs", True) is False else ()
    stored = _stored(Path(source))
    if stored:
        return tuple(name for name, first in ties(built).items() if {name, first} <= stored)
    said, _ = PreTrainedConfig.get_config_dict(str(source))
    return tuple(tied_heads(built)) if said.get("tie_word_embeddings") is False else ()


def _stored(folder: Path) -> set[str]:
    """Names of the weights that the safetensors files of a folder hold; none where it has none."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not single.is_file():
        return set()
    with safe_open(single, "pt") as weights:
        return set(weights.keys())


def head_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that say something rather than carry it on: whatever comes after the base model (a
    classifier, a language model's head and its transforms), the output embeddings,
    and layers that share their weights with an embedding.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    base = model.base_model
    inside = set() if base is model else set(base.modules())
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    return [
        name
        for name, layer in layers.items()
        if layer is output or id(layer.weight) in shared or (inside and layer not in inside)
    ]


_LAYERDROP = re.compile(r"(.*_)?layer_?drop")


def layerdrop(model: nn.Module) -> dict[str, float]:
    """Settings by which a model in training mode leaves out whole layers at random: those above 0, by name.

    LayerDrop (Fan et al. 2020): encoder_layerdrop, decoder_layerdrop, layerdrop.
    A dropped layer has no hidden state to be matched.
    """
    return _named(list(_layerdrops(model)))


def without_layerdrop(model: nn.Module) -> dict[str, float]:
    """Let every layer run in training mode too. Returns the settings that were above 0, by name; see `layerdrop`."""
    found = list(_layerdrops(model))
    for holder, name, _ in found:
        setattr(holder, name, 0.0)
    return _named(found)


def rescaled(model: nn.Module) -> list[nn.Module]:
    """Modules that change their own weights when they are evaluated, and back when they are trained.

    RWKV halves two matrices of a block, and the hidden states, after every `rescale_every` blocks, for fp16's sake: in
    evaluation its weights are not those to save or to copy,
    and its hidden states not on the scale of a model in training.
    """
    return [m for m in model.modules() if "layers_are_rescaled" in vars(m) and m.config.rescale_every > 0]


def without_rescaling(model: nn.Module) -> bool:
    """Have the weights as they were trained, and stay so in evaluation; the outputs are the same.
    True where something was changed.
    """
    found = rescaled(model)
    for module in found:
        if module.layers_are_rescaled:
            training, module.training = module.training, True
            module._rescale_layers()  # what its forward pass does on the way back to training
            module.training = training
        module.config.rescale_every = 0
    return bool(found)


def _named(found: list[tuple[object, str, float]]) -> dict[str, float]:
    """The configurations' names for them; a module's own where no configuration has one."""
    settings = {name: value for holder, name, value in found if isinstance(holder, PreTrainedConfig)}
    return settings or {name: value for _, name, value in found}


def _layerdrops(model: nn.Module) -> Iterator[tuple[object, str, float]]:
    """What holds such a setting above 0, its name and value: configurations, and modules that copied theirs."""
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if isinstance(module, PreTrainedModel)}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if _LAYERDROP.fullmatch(name) and isinstance(value, int | float) and value > 0:
                yield config, name, value
    for module in modules:
        value = vars(module).get("layerdrop")
        if isinstance(value, int | float) and value > 0:
            yield module, "layerdrop", value


# -- causal or not ----------------------------------------------------------------------------------------------------

_causal: WeakKeyDictionary = WeakKeyDictionary()  # model → its answer
_TOKENS, _LABELED = 4, 2  # of the probe's one row: its length, and the place of its one label


def is_causal_lm(model: nn.Module) -> bool:
    """True for a model whose logits at t predict token t + 1, so that labels, which stand with their own tokens,
    are shifted.

    Asked of the model, once, with a row of four tokens: which of its logits does its own loss compare with the label of
    token t? Those at t - 1 in a causal language model, a vision-language decoder or an audio decoder too. Where its
    loss takes labels as they stand, or it has none, its logits at t predict the next token all the same if they do not
    depend on it (BartForCausalLM, XLNet with attn_type="uni"). An encoder-decoder makes its decoder's inputs by
    shifting the labels, so they are not shifted again: False.
    """
    model = without_adapter(model)
    if model not in _causal:
        _causal[model] = _asked(model)
    return _causal[model]


def remember_causal(model: nn.Module, causal: bool) -> None:
    """What is known of a model beforehand, so that it need not be asked (`is_causal_lm`)."""
    _causal[model] = causal


def _asked(model: nn.Module) -> bool:
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if is_encoder_decoder(model) or all(part.get_output_embeddings() is None for part in parts):  # no head over tokens
        return False
    probe = _without_loss_warning(double(model).eval())
    if model.main_input_name == "input_ids" and not any(parameter.is_meta for parameter in model.parameters()):
        embedded, outputs = _run(probe)
        if outputs is not None:
            logits = getattr(outputs, "logits", None)
            if not isinstance(logits, Tensor) or logits.shape[:2] != (1, _TOKENS):
                return False
            return _shifts(logits, getattr(outputs, "loss", None)) or not _looks_ahead(embedded, logits)
    return _shifts(*_made_up_loss(probe))  # it reads no text alone, or has no weights


def _without_loss_warning(model: nn.Module) -> nn.Module:
    """The loss that transformers takes where a class's name is that of no loss (GPT2LMHeadModel),
    without its warning about a setting nobody set.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and getattr(part, "loss_type", None) not in LOSS_MAPPING:
            part.loss_type = "ForCausalLM"
    return model


def _run(model: nn.Module) -> tuple[list[Tensor], object]:
    """Embeddings (1, T, d) of a row of text with one label, and what the model gives for it, in one graph;
    None where it reads no text alone.
    """
    row = short_row(model)
    labels = torch.full_like(row["input_ids"], -100)
    labels[0, _LABELED] = row["input_ids"][0, _LABELED]
    seen: list[Tensor] = []

    def leaf(module, args, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.get_input_embeddings().register_forward_hook(leaf)
    alone = torch.autocast(labels.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), alone, random_state_kept(labels.device):
        for asked in ({"labels": labels}, {}):  # a class of one's own may take no labels
            seen.clear()
            try:
                return seen, model(**row, **asked)
            except Exception:  # whatever a model says to a row of bare text
                continue
    return [], None


def short_row(model: nn.Module) -> dict[str, Tensor]:
    """Inputs to ask a model with: a row of text, (1, T), of different tokens that have no meaning of their own (image,
    audio, padding).
    """
    table = model.get_input_embeddings().weight
    special = set(_token_numbers(model.config.to_dict()))
    plain = [token for token in range(table.shape[0]) if token not in special][:_TOKENS]
    ids = torch.tensor([(plain * _TOKENS)[:_TOKENS]], device=table.device)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return row | {"decoder_input_ids": ids} if is_encoder_decoder(model) else row


def _token_numbers(config: dict) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _token_numbers(value)
        elif "token" in str(name):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))


def _made_up_loss(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Logits out of the air, and what the model's loss function makes of them and one label."""
    logits = torch.zeros(1, _TOKENS, 3, requires_grad=True, device="cpu")
    labels = torch.full((1, _TOKENS), -100, device="cpu")
    labels[0, _LABELED] = 1
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return logits, model.loss_function(logits=logits, labels=labels, vocab_size=3, config=model.config)
        except Exception:  # a loss of other things than tokens
            return logits, None


def _shifts(logits: Tensor, loss: Tensor | None) -> bool:
    """The loss of the one label is of the logits before it."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient[0, _LABELED - 1].any()) and not gradient[0, _LABELED].any()


def _looks_ahead(embedded: list[Tensor], logits: Tensor) -> bool:
    """Logits depend on later tokens."""
    before = torch.zeros_like(logits)
    before[0, _LABELED - 1] = logits[0, _LABELED - 1].detach()
    gradients = torch.autograd.grad(logits, embedded, before, allow_unused=True)
    # by token, also where blocks work on (T, 1, d)
    return any(g is not None and bool(g.reshape(_TOKENS, -1)[_LABELED:].any()) for g in gradients)


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights, without hooks: running it leaves the first as it is,
    and nobody who watches that sees it.

    A forward pass may change a model for good: BigBird exchanges its attention where a row is short.
    """
    return _double(model, {})


def _double(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in made:
        new = made[module] = object.__new__(type(module))
        vars(new).update(vars(module))
        for name, value in vars(module).items():
            if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") or name.endswith("_always_called"):
                vars(new)[name] = type(value)()
            elif name in ("_parameters", "_buffers"):
                vars(new)[name] = dict(value)
        vars(new)["_modules"] = {
            name: None if child is None else _double(child, made) for name, child in module._modules.items()
        }
        if isinstance(module, PreTrainedModel):
            new.config = copy.deepcopy(module.config)
    return made[module]
