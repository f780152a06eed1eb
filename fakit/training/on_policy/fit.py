"""Whether a student can write in a run, and its teacher score what it wrote: asked before any work."""

from collections.abc import Iterable

from transformers import DataCollatorWithFlattening, PreTrainedModel

from fakit.evaluation.generation import stops_of
from fakit.models.blocks import is_encoder_decoder, without_adapter
from fakit.models.kinds import is_causal_lm
from fakit.models.positions import declared_positions, longest_row
from fakit.objective.balancing import GradientNorm
from fakit.objective.objective import Objective
from fakit.training.on_policy.rollouts import Rollouts, without_labels
from fakit.training.on_policy.settings import OnPolicy
from fakit.training.on_policy.writing import no_prompts, prompt_of


def rollouts(
    on_policy: OnPolicy,
    teacher: PreTrainedModel | None,
    student: PreTrainedModel,
    objective: Objective,
    rows,
    collator=None,
    tokenizer=None,
    cached: bool = False,
) -> Rollouts | None:
    """What a trainer writes with; None where the share is 0.

    Args:
        cached: a cache stands for the teacher, which is refused.
        rows: the training data; where they are a data set with rows, all of them are looked at.

    Raises:
        ValueError: models, data or terms with which the student cannot write, or the teacher not score what it wrote.
    """
    if not isinstance(on_policy, OnPolicy):
        raise ValueError(f"on_policy is {on_policy!r}, and OnPolicy(share=…) or None was expected.")
    if not on_policy.is_on:
        return None
    if cached or teacher is None:
        raise ValueError(
            "on-policy distillation and a teacher cache: the cache holds what the teacher says of the data's texts, "
            "and what the student writes is in none. Give the teacher and leave the cache out, or leave on_policy out."
        )
    _check_student(student)
    if not without_labels(objective):
        raise ValueError(
            f"on-policy distillation has the terms {', '.join(objective.terms)}, which need labels, and what the "
            "student writes has none; add an outputs, features or attention term, or leave on_policy out."
        )
    if isinstance(objective.balancing, GradientNorm):
        raise ValueError(
            "on-policy distillation and balancing by gradient norms: the terms with labels are off in some steps, and "
            "their norms would be those of other texts. Use balancing='uncertainty', or leave one of the two out."
        )
    if isinstance(collator, DataCollatorWithFlattening):
        raise ValueError(no_prompts("rows that pack several texts (DataCollatorWithFlattening)"))
    own = on_policy.eos_token_id
    fix = "give OnPolicy(eos_token_id=…)"
    ends = tuple(stops_of(student, tokenizer, fix)) if own is None else (own,) if isinstance(own, int) else tuple(own)
    size = student.config.get_text_config().vocab_size
    if beyond := [end for end in ends if not 0 <= end < size]:
        raise ValueError(
            f"on-policy distillation: token {beyond[0]} is to end an answer, and the student "
            f"({type(without_adapter(student)).__name__}) writes tokens 0–{size - 1}; give OnPolicy(eos_token_id=…) "
            "one of these."
        )
    _check_room(on_policy, longest_prompt(rows), student=student, teacher=teacher)
    vocabulary = teacher.config.get_text_config().vocab_size
    fill = student.config.get_text_config().pad_token_id
    return Rollouts(on_policy, student, objective, ends, vocabulary, ends[0] if fill is None else fill)


def _check_student(student: PreTrainedModel) -> None:
    model = without_adapter(student)
    writes = callable(getattr(model, "can_generate", None)) and model.can_generate()
    if is_encoder_decoder(student) or not writes or not is_causal_lm(student):
        raise ValueError(
            f"on-policy distillation needs a student that writes, and {type(model).__name__} is no causal language "
            "model with generate; take a …ForCausalLM, or leave on_policy out."
        )
    if model is not student and student.active_peft_config.is_prompt_learning:  # type: ignore[operator]
        raise ValueError(
            "on-policy distillation of a student with learned prompts: what it reads is not what it is given. Use an "
            "adapter of weights (LoRA), or leave on_policy out."
        )


def longest_prompt(rows) -> int:
    """Tokens of the longest prompt of a data set; 0 where its rows are not at hand.

    Raises:
        ValueError: a row without a prompt.
    """
    return max((len(prompt_of(*row)) for row in _rows(rows)), default=0)


def _rows(rows) -> Iterable[tuple[list[int], list[int], list[int]]]:
    import datasets

    if rows is None or not hasattr(type(rows), "__len__"):
        return
    parts = rows.with_format(None).iter(1000) if isinstance(rows, datasets.Dataset) else ([row] for row in rows)
    for part in parts:
        table = part if isinstance(part, dict) else {key: [row[key] for row in part] for key in part[0]}
        if "labels" not in table or "position_ids" in table or "seq_idx" in table:
            raise ValueError(no_prompts("no labels" if "labels" not in table else "rows that pack several texts"))
        masks = table.get("attention_mask") or [None] * len(table["labels"])
        for ids, mask, labels in zip(table["input_ids"], masks, table["labels"], strict=True):
            yield _list(ids), [1] * len(ids) if mask is None else _list(mask), _list(labels)


def _list(values) -> list[int]:
    if isinstance(values, list):
        return values
    found = values.tolist() if hasattr(values, "tolist") else list(values) if isinstance(values, tuple) else values
    if not isinstance(found, list):
        raise ValueError(no_prompts(f"one label a row ({found!r})"))
    return found


def _check_room(on_policy: OnPolicy, longest: int, **models: PreTrainedModel) -> None:
    for side, model in models.items():
        positions = longest_row(model) or declared_positions(model)
        if positions and longest + on_policy.max_new_tokens > positions:
            raise ValueError(
                f"on-policy distillation: the longest prompt has {longest} tokens, max_new_tokens is "
                f"{on_policy.max_new_tokens}, and the {side} ({type(without_adapter(model)).__name__}) has {positions} "
                f"positions; set max_new_tokens to at most {max(0, positions - longest)}, or shorten the prompts."
            )
