"""On-policy distillation: in some of the steps the student writes the answers, and the teacher says what it would have
written at each of their tokens (GKD, Agarwal et al. 2024, arXiv 2306.13649).

    prompt + answer of the data  →  prompt + what the student writes  →  teacher, student, objective as ever

What of a row is prompt its labels say: what stands before its last run of labeled tokens, and all of a row without a
label. The tokens that the student wrote, its end of sequence included, are labeled in their stead. They say which
tokens count, and are no answers to learn: terms that need labels (the task's loss) are off in such a step.

No gradient goes through the writing, as in GKD. It draws from the run's seed, the step, the micro-batch and the
process alone, so that a resumed run writes the same, and the run's other random numbers are as if nothing was written.
"""

from fakit.training.on_policy.settings import OnPolicy

__all__ = ["OnPolicy"]
