"""Find a transformer's blocks by one rule, instead of a table of model names."""

from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# What configurations call the depth of one of two stacks; every other depth is called num_hidden_layers (which n_layer,
# n_layers … answer to).
_ENCODER_DEPTHS = ("encoder_layers", "num_encoder_layers")
_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other: all of a model's, or an encoder's or a decoder's."""

    name: str  # of the module list, in the model
    counts: list[str]  # the settings that count its layers
    members: nn.ModuleList
    blocks: list[nn.Module]  # one a layer: a member that serves several layers (ALBERT) stands here as often


def check_model(what: str, model: object) -> None:
    """Raise ValueError unless `model` has what every transformers model has: modules and a configuration.

    >>> check_model("the teacher", "bert-base-uncased")
    Traceback (most recent call last):
    ...
    ValueError: the teacher is 'bert-base-uncased' (str), and a transformers model was expected: load it, with \
fakit.load_teacher("owner/name or folder") or AutoModel….from_pretrained.
    """
    if isinstance(model, nn.Module) and getattr(model, "config", None) is not None:
        return
    found = f"a {type(model).__name__}" if isinstance(model, nn.Module) else f"{model!r} ({type(model).__name__})"
    raise ValueError(
        f"{what} is {found}, and a transformers model was expected: load it, with "
        'fakit.load_teacher("owner/name or folder") or AutoModel….from_pretrained.'
    )


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's one stack of blocks; of an encoder-decoder the encoder's and the decoder's.

    The rule: a stack is the outermost `nn.ModuleList` with as many members as the configuration counts layers; lists
    whose members are of one class go before mixed ones, and transformers' checkpointed layers before other modules. In
    an encoder-decoder it is looked for inside `get_encoder()` and inside `get_decoder()`. Where the configuration
    counts fewer `num_hidden_groups` than layers, the list is as long as those, and each member serves a run of layers.
    In a decoder that also sees or hears, it is looked for inside the language model.

    Raises:
        ValueError: no such list (the message shows the lists there are),
            or several at the same depth of the module tree.
    """
    if is_encoder_decoder(model):
        return [
            _find_stack(model, model.get_encoder(), _ENCODER_DEPTHS),
            _find_stack(model, model.get_decoder(), _DECODER_DEPTHS),
        ]
    # the configuration of a decoder alone (BartForCausalLM) may count its encoder's layers as num_hidden_layers
    alone = getattr(model.config, "is_decoder", False) or type(model).__name__.endswith("ForCausalLM")
    return [_find_stack(model, _language_model(model), _DECODER_DEPTHS if alone else ())]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, first to last, an encoder's before its decoder's:
    `find_blocks(model)[i - 1]` makes layer i. See `find_stacks`.
    """
    return [block for stack in find_stacks(model) for block in stack.blocks]


def depth(model: nn.Module) -> int:
    """Number of layers; of an encoder-decoder those of both stacks,
    its decoder's first layer being number encoder_layers + 1.
    """
    return len(find_blocks(model))


def stack_depths(model: nn.Module) -> list[int]:
    """Number of layers of each stack, as layer maps take them: [L]; of an encoder-decoder [encoder, decoder]."""
    return [len(stack.blocks) for stack in find_stacks(model)]


def encoder_depth(model: nn.Module) -> int | None:
    """Number of the encoder's layers in an encoder-decoder; None for a model of one stack."""
    return len(find_stacks(model)[0].blocks) if is_encoder_decoder(model) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """True for a model with both stacks: a T5 encoder alone and a BART decoder alone have one."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    model = without_adapter(model)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # transformers gives the model itself where it has no such part
    return encoder is not decoder and not any(part in (model, model.base_model) for part in (encoder, decoder))


def _language_model(model: nn.Module) -> nn.Module:
    """The part that the layers are looked for in: of a decoder that also sees or hears (LLaVA, InternVL)
    the language model.

    All that it is given goes through that one; towers for images and sounds may be as deep.
    Any other model is looked through as a whole.
    """
    plain = without_adapter(model)
    if plain.config.get_text_config() is plain.config or not plain.can_generate():  # CLIP's towers stand side by side
        return model
    decoder = plain.get_decoder()
    return model if decoder is None or decoder in (plain, plain.base_model) else decoder


def without_adapter(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find_stack(model: nn.Module, root: nn.Module, depths: tuple[str, ...]) -> Stack:
    config = getattr(root, "config", model.config).get_text_config()
    counts = _counts(config, depths)
    if not counts:
        raise ValueError(
            f"{type(model).__name__}'s configuration ({type(config).__name__}) names no num_hidden_layers."
        )
    groups = getattr(config, "num_hidden_groups", None)
    lists = _lists(model, root, {groups} if groups else set(counts.values()))
    for count, layers in counts.items():
        outermost = _fitting(lists, groups or layers)
        if len(outermost) == 1:
            name, members = outermost[0]
            # the members take turns of equal length, as near as it goes
            blocks = [members[i * len(members) // layers] for i in range(layers)] if groups else list(members)
            # a decoder's second name may be the encoder's first
            same = [count] if depths == _DECODER_DEPTHS else [n for n, number in counts.items() if number == layers]
            return Stack(name, same, members, blocks)
    seen = ", ".join(f"{name} ({len(m)} × {type(m[0]).__name__})" for name, m in lists) or "none"
    layers = groups or next(iter(counts.values()))
    raise ValueError(
        f"{type(model).__name__} counts {layers} layers, and {len(_fitting(lists, layers))} of its module lists could "
        f"be its blocks; lists found: {seen}. Blocks have to be modules, all in one list: pass one tower of a model "
        "that joins several, and a model of another family where a layer's parts stand in lists of their own (RoBERTa "
        "in place of XLM) or layers pool tokens between them (Funnel)."
    )


def _counts(config, depths: tuple[str, ...]) -> dict[str, int]:
    """Settings that may count a stack's layers, the likeliest first."""
    names = [*depths, "num_hidden_layers"]
    counts = {name: getattr(config, name, None) for name in names}
    return {name: count for name, count in counts.items() if isinstance(count, int)}


def _lists(
    module: nn.Module, root: nn.Module, lengths: set[int], name: str = "", inside: bool = False
) -> list[tuple[str, nn.ModuleList]]:
    """Module lists below `root`, with their names in `module`; none inside a list of one of `lengths`,
    so that this stays quick.
    """
    found = []
    inside = inside or module is root
    for own_name, child in module.named_children():
        full_name = f"{name}.{own_name}" if name else own_name
        if isinstance(child, nn.ModuleList) and len(child):
            found += [(full_name, child)] if inside else []
            if len(child) in lengths:
                continue
        found += _lists(child, root, lengths, full_name, inside)
    return found


def _fitting(lists: list[tuple[str, nn.ModuleList]], layers: int) -> list[tuple[str, nn.ModuleList]]:
    fitting = [(name, m) for name, m in lists if len(m) == layers and not isinstance(m[0], nn.ModuleList)]
    fitting = [(name, m) for name, m in fitting if len({type(block) for block in m}) == 1] or fitting
    checkpointed = [(name, m) for name, m in fitting if isinstance(m[0], GradientCheckpointingLayer)]
    return checkpointed or fitting
