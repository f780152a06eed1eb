"""What a run, a baseline and a compression are measured by, in one way."""

from __future__ import annotations


def scores_of(model, dataset, task, tokenizer, teacher=None, generated=None) -> dict[str, float]:
    """All metrics of a model on a split, by name; with a teacher its agreement, too; `generated`: see `evaluate`.

    Raises:
        ValueError: the task's headline metric is not among them.
    """
    from fakit.evaluation import evaluate

    options = {"tokenizer": tokenizer, "teacher": teacher, "generated": generated}
    scores = evaluate(model, dataset, task.collator(tokenizer), task, **options)
    if task.metric not in scores:
        raise ValueError(f"the headline metric of {task.name} is {task.metric}; evaluate gave {', '.join(scores)}.")
    return scores


def parameters_of(model) -> int:
    """How many a model has, each shared one once."""
    from fakit.evaluation.cost import count_parameters

    return count_parameters(model)["parameters"]
