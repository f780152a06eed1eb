"""The section `on_policy` of a configuration, and the tasks that it can be asked of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from fakit.experiments.schema import Count, Natural, Number, Section, Weight
from fakit.experiments.terms import built, highest, schedule_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fakit.tasks import TextTask
    from fakit.training.on_policy import OnPolicy


class OnPolicyConfig(Section):
    """In a share of the steps the student writes the answers, and the teacher scores them (`fakit.training.on_policy`).

    Example:
        >>> OnPolicyConfig(share=0.5, max_new_tokens=32).to_dict()
        {'share': 0.5, 'max_new_tokens': 32}
    """

    section: ClassVar[str] = "on_policy"
    share: Weight | schedule_at("on_policy.share") = 0.5  # of the steps: λ of GKD
    every: Count = 1  # only every so many steps; of these, `share`
    max_new_tokens: Count = 64
    temperature: Weight = 1.0  # of sampling; 0: the most likely token
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    eos_token_id: Natural | None = None  # ends an answer; null: as tokenizer and student say

    def _check(self) -> None:
        if highest(self.share) > 1:
            raise ValueError(f"on_policy.share: found {highest(self.share):g}, expected a share of the steps, 0 … 1.")

    def to_dict(self) -> dict[str, Any]:
        """Without what is as it would be anyway, but for share and max_new_tokens."""
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        always = ("share", "max_new_tokens")
        return {key: x for key, x in super().to_dict().items() if key in always or x != defaults[key]}

    def build(self, tokenizer: PreTrainedTokenizerBase, student) -> OnPolicy:
        """What a trainer takes.

        Args:
            tokenizer: ends answers, beside what the student's generation_config names.
        """
        from fakit.evaluation.generation import stops_of
        from fakit.training.on_policy import OnPolicy

        ends = tuple(stops_of(student, tokenizer)) if self.eos_token_id is None else (self.eos_token_id,)
        own = {key: getattr(self, key) for key in self.keys()}
        return OnPolicy(**own | {"share": built(self.share), "eos_token_id": ends})


def check_prompts(task: TextTask) -> None:
    """Raise ValueError for a task whose rows are no prompts with answers."""
    columns = task.train.column_names
    if task.kind != "causal-lm":
        found = f"a {task.kind} task"
    elif "turns" in columns and task.tokens != "completion":
        found = f"instruction data with labels on {task.tokens} tokens, which do not say where an answer begins"
    elif "turns" not in columns and "source" not in columns:
        found = f"texts without prompts (columns {', '.join(columns)})"
    elif task.packing:
        found = "packed: a sequence holds several prompts (options.packing)"
    else:
        return
    raise ValueError(
        f"on_policy: the student writes answers to prompts, and {task.name} is {found}; give source and target, or "
        "instruction data with tokens: completion, or set on_policy: null."
    )
