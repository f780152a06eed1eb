"""`model_card`: the README.md of an exported student, in the form that model hubs read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from fakit.experiments.config import ExperimentConfig
    from fakit.experiments.result import RunResult
    from fakit.tasks import TextTask

OBJECTIVE = (
    "student",
    "layer_map",
    "features",
    "attention",
    "outputs",
    "task_weight",
    "terms",
    "balancing",
    "on_policy",
)
PIPELINES = {"sequence-classification": "text-classification", "regression": "text-classification"}


def model_card(config: ExperimentConfig, result: RunResult, task: TextTask, in_pairs: bool) -> str:
    """Front matter and text: whose student it is, what it learned from, what it scores, and how it is loaded.

    Args:
        in_pairs: it is saved as pairs of thin matrices, which plain transformers does not read.
    """
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = PIPELINES.get(task.kind, "text-generation")
    of_task = {"task_type": pipeline, "dataset_type": task.name, "dataset_name": task.name, "dataset_split": "test"}
    data = ModelCardData(
        model_name=config.run_id,
        base_model=None if config.teacher.id == "embedded" else config.teacher.id,
        library_name="fakit" if in_pairs else "transformers",
        pipeline_tag=pipeline,
        tags=["distillation", "fakit"],
        eval_results=[
            EvalResult(**of_task, metric_type=name, metric_value=round(value, 4))
            for name, value in result.test.items()
            if math.isfinite(value)
        ],
    )
    rows = [
        f"| {name} | {_number(result.validation.get(name))} | {_number(value)} |" for name, value in result.test.items()
    ]
    loaded = {
        True: f'from fakit.compression import low_rank\n\nmodel = low_rank.load("{config.run_id}")',
        False: f'from transformers import {_auto(task)}\n\nmodel = {_auto(task)}.from_pretrained("{config.run_id}")',
    }[in_pairs]
    teacher = "the embedded teacher of this task" if config.teacher.id == "embedded" else f"`{config.teacher.id}`"
    asked = {key: value for key, value in config.to_dict().items() if key in OBJECTIVE and value not in (None, {})}
    text = f"""# {config.run_id}

A student of {teacher}, distilled by fakit: {result.parameters:,} parameters in place of {result.teacher_parameters:,}.

```python
{loaded}
```

## Training

{result.steps} optimizer steps of {config.training.batch_size * config.training.accumulation} texts of `{task.name}` \
({result.labeled:,} labeled, {result.unlabeled:,} without a label), {result.precision}, seed {config.seed}.
Texts: {task.source} ({task.license}).

```yaml
{yaml.safe_dump(asked, sort_keys=False, allow_unicode=True).strip()}
```

The whole configuration is experiment.yaml; `fakit distill experiment.yaml` trains it again.

## Scores

| metric | validation | test |
|---|---|---|
{chr(10).join(rows)}

One run of one seed: it says what this model does, not which objective is better.
Whoever uses it answers for the license of its teacher and of its texts.
"""
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _auto(task: TextTask) -> str:
    return "AutoModelForCausalLM" if task.kind == "causal-lm" else "AutoModelForSequenceClassification"


def _number(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"
