"""A student from a teacher: fewer blocks, narrower blocks, copied or random weights."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fakit.layer_maps import LayerMap
from fakit.models.blocks import depth, find_block_list
from fakit.models.load import full_precision_state

# Settings given once a block, in a list as long as the model is deep: those with one of these words in their name.
_PER_BLOCK = ("layer", "attention_window", "indexer_types")
# Widths that follow the hidden size where they equal it.
_OUTER_WIDTHS = ("word_embed_proj_dim", "embedding_size", "pooler_hidden_size")
# The inner width of a block's feed-forward part, under the names families give it.
_INNER_WIDTHS = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")


def shrink(
    teacher: PreTrainedModel,
    layers: int | Sequence[int] = 3,
    hidden_size: int | None = None,
    heads: int | None = None,
    init: str = "copy",
) -> PreTrainedModel:
    """A smaller trainable model of the teacher's family, in float32, on the teacher's device.

    Args:
        teacher: a transformers model, quantised or not; it is left as it is.
        layers: how many blocks; they are taken evenly spaced, as `LayerMap.uniform` maps them, so student layer j starts from the
            teacher layer that will teach it. Or the teacher's block numbers themselves, 1…L, rising: [1, 3, 5].
        hidden_size: width; the teacher's unless given. Head width stays, so the head count shrinks with it unless `heads` says otherwise;
            the feed-forward width keeps its proportion.
        heads: attention heads; must divide hidden_size.
        init: "copy" takes the teacher's weights, embeddings and head included (cut to the leading units where narrower);
            "random" takes none.

    Raises:
        ValueError: layers the teacher does not have, a width that heads do not divide or that is above the teacher's, blocks of another
            kind than the student's (mixtures of experts that begin with plain blocks), another init.

    >>> student = shrink(teacher, layers=[1, 3, 5], hidden_size=192)  # doctest: +SKIP
    """
    if init not in ("copy", "random"):
        raise ValueError(f"init is {init!r}; a student starts from 'copy' (the teacher's weights) or 'random'.")
    sources = _source_layers(teacher, layers)
    config = _smaller_config(teacher, sources, hidden_size, heads)
    student = type(teacher)._from_config(
        config, dtype=torch.float32, attn_implementation=teacher.config._attn_implementation
    )
    if init == "copy":
        _copy_weights(teacher, student, sources)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(next(teacher.parameters()).device).train().requires_grad_(True)


def _source_layers(teacher: nn.Module, layers: int | Sequence[int]) -> list[int]:
    total = depth(teacher)
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= total:
            raise ValueError(f"a student of {layers} layers asked of a teacher of {total}; choose 1…{total}.")
        return [t for _, t in LayerMap.uniform(layers, total)]
    sources = list(layers)
    if (
        not sources
        or any(not isinstance(i, int) or not 1 <= i <= total for i in sources)
        or sources != sorted(set(sources))
    ):
        raise ValueError(
            f"layers {sources} asked of a {total}-layer teacher; give its block numbers 1…{total} in rising order, each once."
        )
    return sources


def _smaller_config(teacher: PreTrainedModel, sources: list[int], hidden_size: int | None, heads: int | None):
    config = copy.deepcopy(teacher.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    total = depth(teacher)
    # settings given once a block (layer_types, no_rope_layers …) follow the blocks that stay; before the depth changes, which is checked
    # against them
    for name, value in vars(teacher.config).items():
        if isinstance(value, list) and len(value) == total and any(word in name for word in _PER_BLOCK):
            vars(config)[name] = [value[i - 1] for i in sources]
    config.num_hidden_layers = len(sources)
    if hidden_size is None and heads is None:
        return config

    width, old_heads = config.hidden_size, config.num_attention_heads
    new_width = width if hidden_size is None else hidden_size
    head_width = getattr(config, "head_dim", None) or width // old_heads
    new_heads = heads if heads is not None else max(1, new_width // head_width)
    if not 1 <= new_width <= width:
        raise ValueError(f"hidden_size {new_width} asked of a teacher of width {width}; choose at most {width}.")
    if new_width % new_heads:
        near = [h for h in range(1, new_width + 1) if new_width % h == 0]
        raise ValueError(
            f"a width of {new_width} cannot be split into {new_heads} heads (the teacher: {width} in {old_heads}); heads that divide it: {near}."
        )
    config.hidden_size, config.num_attention_heads = new_width, new_heads
    groups = getattr(teacher.config, "num_key_value_heads", None)
    if groups is not None:
        # as many queries share a key as in the teacher, where the new count allows it
        config.num_key_value_heads = next(
            g for g in range(max(1, groups * new_heads // old_heads), 0, -1) if new_heads % g == 0
        )
    for name in _INNER_WIDTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, max(1, getattr(config, name) * new_width // width))
    for name in _OUTER_WIDTHS:
        if getattr(config, name, None) == width:
            setattr(config, name, new_width)
    return config


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, sources: list[int]) -> None:
    blocks = find_block_list(student)[0] + "."
    weights = full_precision_state(teacher)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            source = name
            if name.startswith(blocks):
                index, rest = name.removeprefix(blocks).split(".", 1)
                source = f"{blocks}{sources[int(index)] - 1}.{rest}"
            if source not in weights:
                raise ValueError(
                    f"{name} of the student would start from {source}, which the teacher does not have: its blocks are not all of one kind. "
                    f"Choose layers=[…] so that each block keeps its kind, or init='random'; asked were blocks {sources}."
                )
            conv1d = isinstance(student.get_submodule(name.rpartition(".")[0]), Conv1D)
            shares = [_fused_shares(name, model.config) for model in (teacher, student)]
            parameter.copy_(
                _leading(weights[source], parameter.shape, *shares, dim=-1 if conv1d or parameter.dim() == 1 else -2)
            )


def _fused_shares(name: str, config) -> list[int]:
    """Which shares of a parameter are matrices of their own: Q, K and V, or gate and up, that a family computes in one product.

    Families that fuse head by head (GPT-NeoX, BLOOM) need nothing: there the leading units are the leading heads.
    """
    words = name.split(".")
    if any(word in words for word in ("c_attn", "Wqkv", "qkv_proj")):
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return [config.num_attention_heads, groups, groups]
    return [1, 1] if any(word in words for word in ("Wi", "gate_up_proj")) else [1]


def _leading(weight: Tensor, shape: torch.Size, theirs: list[int], ours: list[int], dim: int) -> Tensor:
    """The leading units of each dimension; where matrices are fused along `dim`, of each of them."""
    if weight.shape == shape:
        return weight
    if len(ours) == 1:
        return weight[tuple(slice(0, n) for n in shape)]
    parts = weight.split([weight.shape[dim] * share // sum(theirs) for share in theirs], dim)
    sizes = [shape[dim] * share // sum(ours) for share in ours]
    kept = [part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(kept, dim)[tuple(slice(0, n) for n in shape)]
