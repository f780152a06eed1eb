"""`untrained`: a student of any family that transformers has, with nothing of its teacher's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fakit.models.kinds import is_causal_lm, without_layerdrop
from fakit.models.pretrained import CLASSES

TOKENS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
"""What a student shares with its teacher because it reads the same tokens."""
ANSWERS = ("num_labels", "problem_type")
"""What it shares because it answers the same question."""


def check_settings(settings: Mapping[str, Any], where: str = "untrained") -> None:
    """Raise ValueError unless these are settings of a family, by the names of its configuration in transformers.

    Args:
        settings: as for `untrained`.
        where: how the error calls them.
    """
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        near = " or ".join(get_close_matches(str(family), CONFIG_MAPPING, n=3))
        raise ValueError(
            f"{where}.model_type: {family!r} is no family that transformers {transformers.__version__} has, as bert, "
            f"gpt2 and mamba are.{f' Did you mean {near}?' if near else ''}"
        )
    known = known_settings(family)
    if "vocab_size" not in known:
        raise ValueError(
            f"{where}.model_type: {family} is not a family of text alone: it has no vocab_size of its own."
        )
    if taken := sorted({*TOKENS, *ANSWERS, "id2label", "label2id"} & settings.keys()):
        raise ValueError(f"{where}.{taken[0]}: is the teacher's, whose tokens are read and whose answers are learned.")
    if unknown := sorted(settings.keys() - known - {"model_type"}):
        near = get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"{where}.{unknown[0]}: is no setting of {family}."
            + (f" Did you mean {near[0]}?" if near else f" They are {', '.join(sorted(known - set(TOKENS)))}.")
        )


def known_settings(family: str) -> set[str]:
    """What the configuration of a family takes, other names for the same included."""
    made = CONFIG_MAPPING[family]
    return {field.name for field in dataclasses.fields(made)} | set(made.attribute_map)


def untrained(settings: Mapping[str, Any], teacher: PreTrainedModel, task: str) -> PreTrainedModel:
    """A trainable model in float32 with random weights, on the teacher's device, for the teacher's tokens and answers.

    Draws from torch's generator.

    Args:
        settings: model_type, as "mamba", and settings of its configuration by their names in transformers.
        teacher: whose vocabulary, special tokens and classes it takes.
        task: "causal-lm" or "sequence-classification".

    Raises:
        ValueError: a family or setting that is not there, a family without a class for the task, or values that it
            refuses.

    >>> untrained({"model_type": "mamba", "hidden_size": 128, "num_hidden_layers": 2}, gpt2, "causal-lm")
    ... # doctest: +SKIP
    """
    check_settings(settings)
    family, theirs = settings["model_type"], teacher.config.get_text_config()
    known = known_settings(family)
    shared = {key: getattr(theirs, key, None) for key in known if key == "vocab_size" or key.endswith("_token_id")}
    if task == "sequence-classification":
        shared |= {"num_labels": teacher.config.num_labels, "problem_type": teacher.config.problem_type}
    own = {key: value for key, value in settings.items() if key != "model_type"}
    asked = f"an untrained {family} of {own or 'its own settings'}"
    makes = getattr(transformers, CLASSES[task])
    if CONFIG_MAPPING[family] not in makes._model_mapping:
        raise ValueError(f"{asked} was asked for a {task} task, and transformers has no {makes.__name__} of {family}.")
    try:
        config = CONFIG_MAPPING[family](**own, **shared)
        model = makes.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # of whatever kind: it is the family's own check
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{asked} cannot be made (transformers says: {said}).") from error
    without_layerdrop(model)
    if is_causal_lm(teacher) and _sees_ahead(model):
        hint = " Set is_decoder: true." if "is_decoder" in known else ""
        raise ValueError(f"{asked} sees the tokens that it is to predict, and its teacher does not.{hint}")
    return model.to(next(teacher.parameters()).device).train().requires_grad_(True)


@torch.no_grad()
def _sees_ahead(model: PreTrainedModel) -> bool:
    """Whether what it says at the first of two tokens depends on the second."""
    rows = torch.tensor([[1, 2], [1, 3]])
    first, second = model.eval()(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, 0]
    return not torch.allclose(first, second, atol=1e-5)
