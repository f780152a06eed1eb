"""What a model's head answers: classes, several labels a text, numbers; or something that is no logits at all."""

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import get_args

from torch import nn

from fakit.losses.task import REGRESSION
from fakit.models.blocks import without_adapter


def problem_type(config) -> str | None:
    """What a classifier's logits (B, C) mean, by its configuration; None where it does not say and the labels decide.

    "single_label_classification": a softmax over C classes; "multi_label_classification": C independent sigmoids;
    "regression": C numbers. As transformers has it, a head of one output that says nothing else is a regression.
    """
    stated = getattr(config, "problem_type", None)
    if stated is None and getattr(config, "num_labels", None) == 1:
        return REGRESSION
    return stated


def without_logits(model: nn.Module) -> str | None:
    """What `model` returns in place of logits, "start_logits, end_logits"; None where it returns logits,
    or does not say what it returns.

    Both its forward's return type and its source have to lack them: some families name another family's type.
    """
    forward = type(without_adapter(model)).forward
    try:
        found = inspect.signature(forward, eval_str=True).return_annotation
    except (NameError, TypeError):  # a type that its module knows for type checkers alone
        return None
    kinds = [kind for kind in (get_args(found) or (found,)) if isinstance(kind, type) and is_dataclass(kind)]
    names = {field.name for kind in kinds for field in fields(kind)}
    if not names or "logits" in names or re.search(r"\blogits=", inspect.getsource(forward)):
        return None
    own = [name for name in names if name.endswith("logits")]
    return ", ".join(sorted(own)) or "hidden states"
