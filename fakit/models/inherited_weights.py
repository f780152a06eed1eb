"""The weights that a student takes over from its teacher: which of them, and what of each."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fakit.models.blocks import Stack, find_stacks
from fakit.models.load import full_precision_state, is_quantized


def source_names(
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


def copy_weights(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    cut: PreTrainedModel,
    stacks: list[Stack],
    sources: list[list[int]],
) -> None:
    """Start a student from its teacher's weights, in place.

    Args:
        cut: the student at the teacher's width, without weights.
        stacks: the teacher's.
        sources: for each stack the blocks that stay, numbered from 1.
    """
    weights = full_precision_state(teacher) | dict(teacher.named_buffers())
    tensors = dict(student.named_parameters()) | dict(student.named_buffers())
    shapes = {n: t.shape for n, t in (*cut.named_parameters(remove_duplicate=False), *cut.named_buffers())}
    with torch.no_grad():
        for name, source in source_names(teacher, cut, stacks, sources).items():
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
