"""The configuration of a student: a teacher's, for fewer blocks or narrower ones."""

import copy
import re

from transformers import PreTrainedConfig, PreTrainedModel

from fakit.models.blocks import Stack

# Settings given once a block, in a list as long as the model is deep: those with one of these words in their name.
_PER_BLOCK = ("layer", "attention_window", "indexer_types", "intermediate_size", "activation_sparsity_pattern")
# Lists that say which blocks (counted from 0) are of a kind.
_BLOCK_NUMBERS = re.compile(
    r"(moe|mlp_only|cross_attention|rope_scaling|global_attention)_(layers|blocks)|.*(layer|block|attn).*_(ids|idxs|indices|indexes)"
)
# Lists of kinds that are repeated to the model's depth.
_REPEATED = ("block_types",)
# How many blocks, counted from the last, take their keys and values from blocks before them.
_LAST_BLOCKS = ("num_kv_shared_layers",)
# Widths that follow the hidden size where they equal it.
_OUTER_WIDTHS = ("word_embed_proj_dim", "embedding_size", "pooler_hidden_size")
# The inner width of a block's feed-forward part, under the names families give it.
_INNER_WIDTHS = (
    *("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "d_ff"),
    *("encoder_ffn_dim", "decoder_ffn_dim"),
)
# The heads of one of two stacks, where they are not num_attention_heads.
_STACK_HEADS = ("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads")


def smaller_config(
    teacher: PreTrainedModel,
    stacks: list[Stack],
    sources: list[list[int]],
    hidden_size: int | None,
    heads: int | None,
) -> PreTrainedConfig:
    """The teacher's configuration for the blocks that stay, `sources` by stack, numbered from 1; narrower where asked.

    Raises:
        ValueError: a width or a number of heads that this family cannot be given.
    """
    whole = copy.deepcopy(teacher.config)
    if hasattr(whole, "quantization_config"):
        del whole.quantization_config
    config = whole.get_text_config()
    # settings given once a block (layer_types, no_rope_layers …) follow the blocks that stay; before the depth changes,
    # which is checked against them
    overrides = _overrides(config, sources[0])
    if overrides is not None:
        config.per_layer_config = None
    before = teacher.config.get_text_config()
    for name, value in vars(before).items():
        for stack, kept in zip(stacks, sources, strict=True):
            new = _of_kept_blocks(before, name, value, len(stack.blocks), kept)
            if new is not value:
                vars(config)[name] = new
    for stack, kept in zip(stacks, sources, strict=True):
        for count in stack.counts:
            if getattr(config, count) != len(kept):  # one name may follow another, and not be there to be set
                setattr(config, count, len(kept))
    if overrides is not None:
        config.per_layer_config = overrides
    if getattr(config, "num_hidden_groups", None):
        config.num_hidden_groups = min(config.num_hidden_groups, len(sources[0]))
    if hasattr(
        config, "stage_names"
    ):  # backbones of images name their stages, and which of them they give: here the last
        config.stage_names = config.stage_names[: len(sources[0]) + 1]
        config._out_features, config._out_indices = config.stage_names[-1:], [len(sources[0])]
    if hidden_size is not None or heads is not None:
        _narrow(config, hidden_size, heads)
    return whole


def _of_kept_blocks(config: PreTrainedConfig, name: str, value, depth: int, kept: list[int]):
    """A setting of a stack of `depth` blocks for those that are kept; itself where it says nothing of single blocks."""
    if isinstance(value, list):
        if _BLOCK_NUMBERS.fullmatch(name) and all(isinstance(i, int) and i < depth for i in value):
            return [new for new, old in enumerate(kept) if old - 1 in value]
        if name in _REPEATED and 0 < len(value) < depth:
            return [value[(i - 1) % len(value)] for i in kept]
        if len(value) == depth and any(word in name for word in (*_PER_BLOCK, *_REPEATED)):
            return [value[i - 1] for i in kept]
    if name in _LAST_BLOCKS:
        return sum(i > depth - value for i in kept)
    if name.endswith(
        ("_layer_period", "_layer_offset")
    ):  # Jamba: the blocks i with i % period == offset, counted from 0
        kind = name.rpartition("_")[0]
        period, offset = getattr(config, f"{kind}_period"), getattr(config, f"{kind}_offset")
        return value if depth == len(kept) else _rhythm(period, offset, kept)[0 if name.endswith("period") else 1]
    return value


def _rhythm(period: int, offset: int, kept: list[int]) -> tuple[int, int]:
    """(period, offset) by which those of the kept blocks are of a kind that were so before;
    the old ones where there is none.
    """
    wanted = [(i - 1) % period == offset for i in kept]
    every = ((p, o) for p in range(1, len(kept) + 2) for o in range(p))
    found = ((p, o) for p, o in every if [i % p == o for i in range(len(kept))] == wanted)
    return next(found, (period, offset))


def _overrides(config: PreTrainedConfig, kept: list[int]) -> dict[int, dict] | None:
    """Settings that differ from block to block (`per_layer_config`), for the blocks that are kept;
    None where none does.
    """
    if not config.is_heterogeneous:
        return None
    layers = [config.per_layer_config[i - 1] for i in kept]
    return {
        new: {name: getattr(layer, name) for name in config.per_layer_attributes} | {"skip": layer.skip}
        for new, layer in enumerate(layers)
    }


def _narrow(config: PreTrainedConfig, hidden_size: int | None, heads: int | None) -> None:
    if config.is_heterogeneous:
        raise ValueError(
            f"hidden_size={hidden_size}, heads={heads} asked of a {type(config).__name__} whose blocks differ in "
            f"{', '.join(sorted(config.per_layer_attributes))}: narrowing needs one width and one number of heads. Cut "
            "it by depth alone, or make the student from a configuration of its own."
        )
    width, old_heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if not (isinstance(width, int) and isinstance(old_heads, int)):
        raise ValueError(
            f"hidden_size={hidden_size}, heads={heads} asked of a {type(config).__name__} of width {width} in "
            f"{old_heads} heads: narrowing needs one width and one number of heads. Cut it by depth alone, or make the "
            "student from a configuration of its own."
        )
    new_width = width if hidden_size is None else hidden_size
    head_width = getattr(config, "head_dim", None) or width // old_heads
    new_heads = heads if heads is not None else max(1, new_width // head_width)
    if not 1 <= new_width <= width:
        raise ValueError(f"hidden_size {new_width} asked of a teacher of width {width}; choose at most {width}.")
    if new_width % new_heads:
        near = [h for h in range(1, new_width + 1) if new_width % h == 0]
        raise ValueError(
            f"a width of {new_width} cannot be split into {new_heads} heads (the teacher: {width} in {old_heads}); "
            f"heads that divide it: {near}."
        )
    groups = getattr(config, "num_key_value_heads", None)
    others = {name: getattr(config, name) for name in _STACK_HEADS if isinstance(getattr(config, name, None), int)}
    config.hidden_size, config.num_attention_heads = new_width, new_heads
    for name, count in others.items():
        setattr(config, name, max(1, count * new_heads // old_heads))
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


def changed_by_saving(config: PreTrainedConfig) -> str:
    """Which setting of single blocks would be another after saving and loading; empty where none."""
    again = type(config).from_dict(config.to_dict())
    for name, value in vars(config).items():
        if (
            isinstance(value, list)
            and any(word in name for word in _PER_BLOCK)
            and getattr(again, name, value) != value
        ):
            return f"{name} {value} becomes {getattr(again, name)}"
    return ""
