"""What kind of model is this? Asked of the model as it is, not of its class's name or of a setting that its class may overrule."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def ties(model: nn.Module) -> dict[str, str]:
    """Which parameters are one: the name of each parameter that another name stands for already → that first name.

    Read off the weights that the model has, for settings are no evidence: T5 v1.1, Flan-T5 and mT5 set `tie_word_embeddings` to true
    whatever their file says, and transformers unties the head again where a checkpoint holds one of its own.
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
    """Give each of these parameters weights of its own, equal at first, and let the model know, as `from_pretrained` does."""
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
    """Names of parameters that `built`, made from a configuration, ties to others, and that the weights at `source` do not.

    Args:
        built: a model without its weights (on the meta device).
        source: the model itself; a folder or hub id, whose weight file lists what it holds, and whose config.json still has what the class
            of the configuration overrules; or a configuration.
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


_LAYERDROP = re.compile(r"(.*_)?layer_?drop")


def layerdrop(model: nn.Module) -> dict[str, float]:
    """Settings by which a model in training mode leaves out whole layers at random: those above 0, by name.

    LayerDrop (Fan et al. 2020): encoder_layerdrop, decoder_layerdrop, layerdrop. A dropped layer has no hidden state to be matched.
    """
    return _named(list(_layerdrops(model)))


def without_layerdrop(model: nn.Module) -> dict[str, float]:
    """Let every layer run in training mode too. Returns the settings that were above 0, by name; see `layerdrop`."""
    found = list(_layerdrops(model))
    for holder, name, _ in found:
        setattr(holder, name, 0.0)
    return _named(found)


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
