"""A student from a teacher: fewer blocks, narrower blocks, copied or random weights."""

import copy
import inspect
import logging
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fakit.layer_maps import LayerMap
from fakit.models.blocks import Stack, check_model, find_stacks, is_encoder_decoder, without_adapter
from fakit.models.kinds import is_causal_lm, remember_causal, ties, untie, without_layerdrop, without_rescaling
from fakit.models.load import full_precision_state, is_quantized

logger = logging.getLogger(__name__)

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


def shrink(
    teacher: PreTrainedModel,
    layers: int | Sequence[int] = 3,
    hidden_size: int | None = None,
    heads: int | None = None,
    init: str = "copy",
) -> PreTrainedModel:
    """A smaller trainable model of the teacher's family, in float32, on the teacher's device.

    Args:
        teacher: a transformers model, quantized or not; it is left as it is. The adapter of a PEFT model is merged, in
            a copy.
        layers: how many blocks; they are taken evenly spaced, as `LayerMap.uniform` maps them, so student layer j
            starts from the teacher layer that will teach it. Or the teacher's block numbers themselves, 1…L, rising:
            [1, 3, 5]. In an encoder-decoder as many of each stack, or numbers of the joint count, which goes through
            the encoder and on through the decoder. Where one block serves all layers (ALBERT), it serves fewer.
        hidden_size: width; the teacher's unless given. Head width stays, so the head count shrinks with it unless
            `heads` says otherwise; the feed-forward width keeps its proportion.
        heads: attention heads; must divide hidden_size.
        init: "copy" takes the teacher's weights, embeddings and head included (cut to the leading units where
            narrower); "random" takes none.

    Raises:
        ValueError: layers the teacher does not have, a width that heads do not divide or that is above the teacher's,
            blocks of another kind than the student's (mixtures of experts that begin with plain blocks) or without a
            kind that the family cannot run without (hybrids without attention, shared keys and values without the block
            they come from), with the depths that work; two models joined to one (EncoderDecoderModel); another init.

    >>> student = shrink(teacher, layers=[1, 3, 5], hidden_size=192)  # doctest: +SKIP
    """
    if init not in ("copy", "random"):
        raise ValueError(f"init is {init!r}; a student starts from 'copy' (the teacher's weights) or 'random'.")
    check_model("the teacher", teacher)
    teacher = _plain(teacher)
    without_rescaling(teacher)
    stacks = find_stacks(teacher)
    sources = _source_layers(stacks, layers)
    cut, problem = _cut(teacher, stacks, sources, copies=init == "copy")
    if problem:
        raise ValueError(f"{problem} {_what_works(teacher, stacks, copies=init == 'copy')}")
    config = _smaller_config(teacher, stacks, sources, hidden_size, heads)
    try:
        student = type(teacher)._from_config(
            config, dtype=torch.float32, attn_implementation=teacher.config._attn_implementation
        )
    except ArithmeticError as error:  # RWKV's first weights are made of the depth less one
        raise ValueError(
            f"{type(teacher).__name__} cannot be made with {[len(kept) for kept in sources]} layers (it says: "
            f"{_first_line(error)}). Take more layers."
        ) from error
    _untie_as_in(teacher, student, stacks)
    if off := without_layerdrop(student):
        named = ", ".join(f"{name} ({value})" for name, value in off.items())
        logger.warning("The student's %s is set to 0, so that every layer runs and can be matched.", named)
    if init == "copy":
        _copy_weights(teacher, student, cut, stacks, sources)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    remember_causal(student, is_causal_lm(teacher))
    return student.to(next(teacher.parameters()).device).train().requires_grad_(True)


def why_not(teacher: PreTrainedModel, layers: Sequence[int]) -> str:
    """Why a student cannot be made of these blocks of a teacher without adapter, numbered as in `shrink`; empty where
    it can.

    Asked without making one: nothing is copied, and shapes alone are run.
    """
    stacks = find_stacks(teacher)
    return _cut(teacher, stacks, _source_layers(stacks, layers), copies=True)[1]


def _plain(teacher: nn.Module) -> PreTrainedModel:
    if without_adapter(teacher) is not teacher:
        return copy.deepcopy(teacher).merge_and_unload()
    if isinstance(getattr(teacher.config, "encoder", None), PreTrainedConfig):
        raise ValueError(
            f"{type(teacher).__name__} joins two models, each with a configuration of its own. "
            + (
                f"Shrink each, and join them again: {type(teacher).__name__}(encoder=shrink(teacher.get_encoder(), …), "
                "decoder=shrink(teacher.get_decoder(), …))."
                if "encoder" in inspect.signature(type(teacher)).parameters
                else "Make the student from a configuration of its own."
            )
        )
    return teacher


def _source_layers(stacks: list[Stack], layers: int | Sequence[int]) -> list[list[int]]:
    """For each stack, which of its own blocks stay, numbered from 1."""
    depths = [len(stack.blocks) for stack in stacks]
    total = sum(depths)
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= min(depths):
            have = total if len(depths) == 1 else f"{depths[0]} encoder and {depths[1]} decoder layers"
            each = "" if len(depths) == 1 else ", as many of each stack, or give a list"
            raise ValueError(
                f"a student of {layers} layers asked of a teacher of {have}; choose 1…{min(depths)}{each}."
            )
        return [[t for _, t in LayerMap.uniform(layers, stack_depth)] for stack_depth in depths]
    numbers = list(layers) if isinstance(layers, Iterable) else [layers]
    if (
        not numbers
        or any(not isinstance(i, int) or isinstance(i, bool) or not 1 <= i <= total for i in numbers)
        or not isinstance(layers, Iterable)
        or numbers != sorted(set(numbers))
    ):
        raise ValueError(
            f"layers {numbers} asked of a {total}-layer teacher; give a number of layers, or its block numbers "
            f"1…{total} in rising order, each once."
        )
    first = depths[0]
    sources = [[i for i in numbers if i <= first], [i - first for i in numbers if i > first]][: len(depths)]
    if not all(sources):
        raise ValueError(
            f"layers {numbers} asked of a teacher whose encoder is 1…{first} and whose decoder is {first + 1}…{total}: "
            "both stacks need a layer."
        )
    return sources


def _smaller_config(
    teacher: PreTrainedModel,
    stacks: list[Stack],
    sources: list[list[int]],
    hidden_size: int | None,
    heads: int | None,
) -> PreTrainedConfig:
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


# -- can it be cut there? ----------------------------------------------------------------------------------------------


def _cut(
    teacher: PreTrainedModel, stacks: list[Stack], sources: list[list[int]], copies: bool
) -> tuple[PreTrainedModel | None, str]:
    """The teacher cut by depth alone, without weights, and why it would be no student of it: empty where it is one.

    What a family's configuration and code demand of the blocks is asked of them: the model is made and, where its
    blocks are of several kinds, run, on the meta device.
    """
    name, asked = type(teacher).__name__, [i for kept in sources for i in kept]
    try:
        config = _smaller_config(teacher, stacks, sources, None, None)
        with torch.device("meta"):
            cut = type(teacher)._from_config(
                config, dtype=torch.bfloat16, attn_implementation=teacher.config._attn_implementation
            )
        made = [len(stack.blocks) for stack in find_stacks(cut)]
        changed = _changed_by_saving(config.get_text_config())
    except Exception as error:  # of whatever kind: it is the family's own check, or its code without one
        return None, f"{name} cannot be made of the blocks {asked} (it says: {_first_line(error)})."
    if made != [len(kept) for kept in sources]:
        return None, (
            f"{name} cannot be cut by depth: asked were {[len(kept) for kept in sources]} layers, its configuration "
            f"makes {made}. Make the student from a configuration of its own."
        )
    if changed:
        return None, f"{name} of the blocks {asked} would be another model after saving and loading: {changed}."
    if copies:
        try:
            _source_names(teacher, cut, stacks, sources)
        except ValueError as error:
            return None, str(error)
    if len(_kinds(teacher, stacks)) > 1 and (failed := _fails(cut)):
        whole = _smaller_config(teacher, stacks, [list(range(1, len(s.blocks) + 1)) for s in stacks], None, None)
        with torch.device("meta"):
            same = type(teacher)._from_config(
                whole, dtype=torch.bfloat16, attn_implementation=teacher.config._attn_implementation
            )
        if failed != _fails(same):  # else shapes alone do not answer, for this family
            return None, f"{name} does not run with the blocks {asked} alone (it says: {failed})."
    return cut, ""


def _changed_by_saving(config: PreTrainedConfig) -> str:
    again = type(config).from_dict(config.to_dict())
    for name, value in vars(config).items():
        if (
            isinstance(value, list)
            and any(word in name for word in _PER_BLOCK)
            and getattr(again, name, value) != value
        ):
            return f"{name} {value} becomes {getattr(again, name)}"
    return ""


def _fails(model: PreTrainedModel) -> str:
    """What a forward pass over two tokens says, on the meta device; empty where it runs,
    or where the model reads no text.
    """
    if model.main_input_name != "input_ids":
        return ""
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if is_encoder_decoder(model) else {})
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:  # of whatever kind: it is the family's code that runs
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _kinds(teacher: PreTrainedModel, stacks: list[Stack]) -> dict[str, list[int]]:
    """Block numbers by kind: what the configuration calls it, and the parameters that its blocks have."""
    config, groups, before = teacher.config.get_text_config(), {}, 0
    for stack in stacks:
        types = next((t for n in ("layer_types", "layers_block_type") if (t := getattr(config, n, None))), None)
        types = types if types is not None and len(types) == len(stack.blocks) else [""] * len(stack.blocks)
        for i, (block, kind) in enumerate(zip(stack.blocks, types, strict=True), before + 1):
            structure = frozenset(name for name, _ in block.named_parameters())
            groups.setdefault((kind or type(block).__name__, structure), []).append(i)
        before += len(stack.blocks)
    named = {}
    for (kind, structure), numbers in groups.items():
        others = [other for same, other in groups if same == kind and other != structure]
        own = sorted(structure - frozenset().union(*others)) if others else []
        named[f"{kind} with {own[0].rpartition('.')[0]}" if own else kind if not others else f"plain {kind}"] = numbers
    return named


def _what_works(teacher: PreTrainedModel, stacks: list[Stack], copies: bool) -> str:
    """The depths at which evenly spaced blocks make a student, and which blocks are of which kind,
    for a choice by hand.
    """
    depths = [len(stack.blocks) for stack in stacks]
    works = [n for n in range(1, min(depths) + 1) if not _cut(teacher, stacks, _source_layers(stacks, n), copies)[1]]
    kinds = "; ".join(f"{kind}: {', '.join(map(str, numbers))}" for kind, numbers in _kinds(teacher, stacks).items())
    depths = ", ".join(map(str, works)) or "none"
    return f"Depths that work, evenly spaced: {depths}. Or choose layers=[…] by their kinds ({kinds})."


def _untie_as_in(teacher: PreTrainedModel, student: PreTrainedModel, stacks: list[Stack]) -> None:
    """What the teacher does not tie, around its blocks, the student does not tie,
    whatever their configuration says of it.
    """
    theirs, outside = ties(teacher), {name for name, _ in teacher.named_parameters(remove_duplicate=False)}
    outside -= {name for name in outside for stack in stacks if name.startswith(f"{stack.name}.")}
    tied = {name: first for name, first in ties(student).items() if {name, first} <= outside}
    untie(student, [n for n, first in tied.items() if theirs.get(n, n) != theirs.get(first, first)])


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


def _source_names(
    teacher: PreTrainedModel, student: PreTrainedModel, stacks: list[Stack], sources: list[list[int]]
) -> dict[str, str]:
    """The teacher's weight that each of a student's weights starts from, by name.

    Raises:
        ValueError: a block would start from one of another kind.
    """
    theirs = dict(teacher.named_parameters(remove_duplicate=False)) | dict(teacher.named_buffers())
    ours = dict(student.named_parameters(remove_duplicate=False)) | dict(student.named_buffers())
    stored = student.state_dict().keys()  # buffers that are not stored are computed, not copied
    ours = {name: tensor for name, tensor in ours.items() if name in stored}
    prefixes, first = {}, []  # of a student's block: that of the teacher's
    for whole, cut, numbers in zip(stacks, find_stacks(student), sources, strict=True):
        first.append(_member(cut, cut.blocks[0]))
        for block, number in zip(cut.blocks, numbers, strict=True):
            name, source = (_member(stack, b) for stack, b in ((cut, block), (whole, whole.blocks[number - 1])))
            if prefixes.setdefault(name, source) != source:
                raise ValueError(
                    f"{name} of the student serves several layers, and the teacher's blocks {numbers} are not shared "
                    f"that way: they would start from {prefixes[name]} and from {source}. Choose other layers, or "
                    "init='random'."
                )
    names = {name: _source_name(name, prefixes, theirs) for name in ours}
    whole = {} if is_quantized(teacher) else theirs  # packed weights have shapes of their own
    for name, source in names.items():
        inside = any(name.startswith(prefix) for prefix in prefixes)
        if inside and source in whole and whole[source].shape != ours[name].shape:
            raise ValueError(
                f"{name} of the student, {tuple(ours[name].shape)}, would start from {source}, "
                f"{tuple(whole[source].shape)}: its blocks are not all of one kind."
            )
    for prefix, source in prefixes.items():
        has, lacks = (
            {n.removeprefix(p) for n in of if n.startswith(p)} for p, of in ((prefix, ours), (source, theirs))
        )
        missing = {n for n in lacks - has if source + n in teacher.state_dict()}
        # a first block may lack what only the later ones have: ModernBERT's norms its embeddings instead
        if missing and not (prefix in first and not any(prefix + n in theirs for n in missing)):
            raise ValueError(
                f"{prefix} of the student would start from {source} of the teacher and has no "
                f"{', '.join(sorted(missing)[:2])}: its blocks are not all of one kind."
            )
    return names


def _copy_weights(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    cut: PreTrainedModel,
    stacks: list[Stack],
    sources: list[list[int]],
) -> None:
    weights = full_precision_state(teacher) | dict(teacher.named_buffers())
    tensors = dict(student.named_parameters()) | dict(student.named_buffers())
    shapes = {n: t.shape for n, t in (*cut.named_parameters(remove_duplicate=False), *cut.named_buffers())}
    with torch.no_grad():
        for name, source in _source_names(teacher, cut, stacks, sources).items():
            if name not in tensors:  # tied to one that is copied
                continue
            tensor, weight = tensors[name], _of_kept_layers(weights[source], shapes[name], stacks, sources)
            conv1d = isinstance(student.get_submodule(name.rpartition(".")[0]), Conv1D)
            shares = [_fused_shares(name, model.config.get_text_config()) for model in (teacher, student)]
            tensor.copy_(_leading(weight, tensor.shape, *shares, dim=-1 if conv1d or tensor.dim() == 1 else -2))


def _of_kept_layers(weight: Tensor, shape: torch.Size, stacks: list[Stack], sources: list[list[int]]) -> Tensor:
    """What of a weight belongs to the kept layers, where one holds those of all,
    side by side (Gemma 3n's embeddings of each layer).
    """
    for dim, (theirs, ours) in enumerate(zip(weight.shape, shape, strict=True)):
        for stack, kept in zip(stacks, sources, strict=True):
            depth = len(stack.blocks)
            if theirs != ours and theirs % depth == 0 and theirs * len(kept) == ours * depth:
                parts = weight.split(theirs // depth, dim)
                weight = torch.cat([parts[i - 1] for i in kept], dim)
                break
    return weight


def _member(stack: Stack, block: nn.Module) -> str:
    return next(f"{stack.name}.{i}." for i, member in enumerate(stack.members) if member is block)


def _source_name(name: str, prefixes: dict[str, str], weights: dict[str, Tensor]) -> str:
    """The teacher's weight that a student's weight starts from."""
    ours = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if ours is None:
        return name
    theirs = prefixes[ours]
    source = theirs + name.removeprefix(ours)
    if source in weights:
        return source
    # T5's first block holds the position bias of all: a block that lacks nothing else may take its place
    of_block = {n.removeprefix(theirs) for n in weights if n.startswith(theirs)}
    of_first = {n.removeprefix(ours) for n in weights if n.startswith(ours)}
    if name in weights and of_block < of_first:
        return name
    raise ValueError(
        f"{name} of the student would start from {source}, which the teacher does not have: its blocks are not all of "
        "one kind. Choose layers=[…] so that each block keeps its kind, or init='random'; asked were blocks "
        f"{', '.join(prefixes.values())}"
    )


def _fused_shares(name: str, config) -> list[int]:
    """Which shares of a parameter are matrices of their own: Q, K and V, or gate and up,
    that a family computes in one product.

    Families that fuse head by head (GPT-NeoX, BLOOM) need nothing: there the leading units are the leading heads.
    """
    words = name.split(".")
    shared = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    if any(word in words for word in ("c_attn", "Wqkv", "qkv_proj")) or (shared and "query_key_value" in words):
        groups = 1 if shared else getattr(config, "num_key_value_heads", None) or config.num_attention_heads
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
