"""A student from a teacher: which blocks stay, whether the model can be cut there, and the smaller model itself."""

import copy
import inspect
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fakit.layer_maps import LayerMap
from fakit.models.blocks import Stack, check_model, find_stacks, is_encoder_decoder, without_adapter
from fakit.models.inherited_weights import copy_weights, source_names
from fakit.models.kinds import is_causal_lm, remember_causal, ties, untie, without_layerdrop, without_rescaling
from fakit.models.student_config import changed_by_saving, smaller_config

logger = logging.getLogger(__name__)


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
    config = smaller_config(teacher, stacks, sources, hidden_size, heads)
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
        copy_weights(teacher, student, cut, stacks, sources)
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
        config = smaller_config(teacher, stacks, sources, None, None)
        with torch.device("meta"):
            cut = type(teacher)._from_config(
                config, dtype=torch.bfloat16, attn_implementation=teacher.config._attn_implementation
            )
        made = [len(stack.blocks) for stack in find_stacks(cut)]
        changed = changed_by_saving(config.get_text_config())
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
            source_names(teacher, cut, stacks, sources)
        except ValueError as error:
            return None, str(error)
    if len(_kinds(teacher, stacks)) > 1 and (failed := _fails(cut)):
        whole = smaller_config(teacher, stacks, [list(range(1, len(s.blocks) + 1)) for s in stacks], None, None)
        with torch.device("meta"):
            same = type(teacher)._from_config(
                whole, dtype=torch.bfloat16, attn_implementation=teacher.config._attn_implementation
            )
        if failed != _fails(same):  # else shapes alone do not answer, for this family
            return None, f"{name} does not run with the blocks {asked} alone (it says: {failed})."
    return cut, ""


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
