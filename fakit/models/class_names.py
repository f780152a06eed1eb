"""Class names of a model beside a task's: the same names in another order are put in order,
others are said or refused.
"""

import logging
import re
from collections.abc import Sequence
from functools import cache
from unicodedata import normalize

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def class_names(config: PreTrainedConfig) -> list[str]:
    """The names of a classifier's outputs, in order."""
    return [str(config.id2label.get(number, f"LABEL_{number}")) for number in range(config.num_labels)]


def set_class_names(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Name the outputs, for whoever loads the model."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def class_order(found: Sequence[str], wanted: Sequence[str]) -> tuple[list[int], bool]:
    """Which output of a model stands for each class of a task, and whether the names say so.

    Names agree where they differ in case, blanks, hyphens and underscores alone. LABEL_3 is output 3 of a model that
    nobody named: it is taken for class 3, and the names say so only where the task's are numbers, too. Names that share
    nothing are taken in the order they have.

    Args:
        found, wanted: names of the model's outputs, and of the task's classes.

    Returns:
        order: order[i] is the output for the task's class i. known: False where the order had to be supposed.

    Raises:
        ValueError: other counts, or some names shared, in other places.

    Example:
        >>> class_order(["POSITIVE", "NEGATIVE"], ["negative", "positive"])
        ([1, 0], True)
    """
    if len(found) != len(wanted):
        raise ValueError(
            f"the model has {len(found)} classes ({_listed(found)}), the task has {len(wanted)} ({_listed(wanted)})."
        )
    numbers = [re.fullmatch(r"LABEL_(\d+)", name) for name in found]
    if unnamed := all(numbers):
        found = [match[1] for match in numbers if match]
    ours, theirs = _plain(found), _plain(wanted)
    if set(ours) == set(theirs):
        return [ours.index(name) for name in theirs], True
    every = [str(number) for number in range(len(found))]
    if unnamed and sorted(found) == sorted(every):
        return [found.index(number) for number in every], False
    moved = [wanted[i] for i, name in enumerate(theirs) if name in ours and ours.index(name) != i]
    if moved:
        raise ValueError(
            f"the model's classes are {_listed(found)}, the task's {_listed(wanted)}: {_listed(moved)} have another "
            "place, and the others have no counterpart. Name the classes alike, in the model's config.id2label or in "
            "the data."
        )
    return list(range(len(found))), False


def _plain(names: Sequence[str]) -> list[str]:
    """Names without what does not tell them apart; as they are, where that would make two of them one."""
    plain = [re.sub(r"[\s_-]+", " ", normalize("NFKC", str(name)).casefold()).strip() for name in names]
    return plain if len(set(plain)) == len(plain) else [str(name).strip() for name in names]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:20])) + (" …" if len(names) > 20 else "")


def order_classes(
    model: PreTrainedModel, names: Sequence[str], who: str = "the model", warn: bool = True
) -> PreTrainedModel:
    """Put a classifier's outputs into the order of `names`, and name them so; changes the model.

    Where the model's own names say nothing about the order (LABEL_0 …, or other words),
    a warning says what was supposed.

    Args:
        names: the task's classes. who: what messages call the model. warn: say what was supposed or reordered.

    Raises:
        ValueError: what `class_order` raises, or outputs in another order that no linear layer makes by itself.
    """
    found = class_names(model.config)
    try:
        order, known = class_order(found, names)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    if warn and not known:
        _warn(
            f"{who} names its classes {_listed(found)}, the task names them {_listed(names)}: whether they stand in "
            f"one order cannot be told, and output {order[0]} is taken for {names[0]!r}, and so on. If that is wrong, "
            "set the model's config.id2label."
        )
    if order != sorted(order):
        if warn:
            _warn(
                f"{who} has its classes in the order {_listed(found)}; they were put into the task's: {_listed(names)}."
            )
        _permute(model, order, who)
    set_class_names(model.config, names)
    return model


def adopt_classes(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Name a student's outputs as its task does; a head that was trained for the same classes in another order is
    reordered.
    """
    try:
        order_classes(model, names, "the student", warn=False)
    except ValueError:  # a head for other classes: training makes it one for these
        set_class_names(model.config, names)


@cache  # a study loads a teacher once a run
def _warn(message: str) -> None:
    logger.warning(message)


def _permute(model: PreTrainedModel, order: list[int], who: str) -> None:
    """Reorder the rows of the last layer, found by what its reordering does to the logits."""
    before = _logits(model)
    layers = [
        m
        for m in model.modules()
        if type(m) is nn.Linear and m.out_features == len(order) and m.weight.is_floating_point()
    ]
    inverse = [order.index(number) for number in range(len(order))]
    for layer in reversed(layers):
        _reorder(layer, order)
        if torch.allclose(_logits(model), before[:, order], rtol=1e-4, atol=1e-5):
            return
        _reorder(layer, inverse)
    raise ValueError(
        f"{who} ({type(model).__name__}) has its classes in another order than the task, and no linear layer of "
        f"{len(order)} outputs makes its logits alone, so they cannot be reordered. Reorder the classes of the data "
        "instead."
    )


def _reorder(layer: nn.Linear, order: list[int]) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits (1, C) of a few tokens, the last an end where the model knows one: BART reads its classes off it."""
    config = model.config.get_text_config()
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    was_training = model.training
    few = [3, 4, 5 if end is None else end]
    ids = torch.tensor([[min(number, config.vocab_size - 1) for number in few]], device=model.device)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    model.train(was_training)
    return logits
