"""Checks of the exercises of notebook 05."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from fakit import Features, LayerMap, Objective, shrink
from fakit.teaching import Exercise

# -- 05.1 -------------------------------------------------------------------------------------------------------------

LINEAR, KEPT = 6_525_621_760, 1_089_994_752  # Qwen2.5-7B: parameters of the blocks; of embeddings and head


def check_gigabytes(answer) -> str | bool | None:
    """The weights of a 7.6 B teacher in 8 bits, in GB; scales and norms are within the tolerance."""
    value, right = float(answer), LINEAR + 2 * KEPT
    if abs(value - right / 1e9) < 0.15:
        return None
    if abs(value - (LINEAR + KEPT) / 1e9) < 0.05:
        return "that counts one byte for every parameter; embeddings and head stay in bf16, two bytes each."
    if abs(value - 2 * (LINEAR + KEPT) / 1e9) < 0.05:
        return "that is the teacher in bf16, two bytes a parameter."
    if abs(value - right / 2**30) < 0.15:
        return "right in GiB (2³⁰ bytes); the figure uses GB (10⁹ bytes)."
    return False


gigabytes = Exercise(
    "How many **GB** do the weights of the 7.6 B teacher take in 8 bits? `linear` counts the parameters that are "
    "quantized, `kept` those of embeddings and head, which stay in bf16.",
    check_gigabytes,
    hints=[
        "One byte for what is quantized. And for what is not?",
        "A GB is 10⁹ bytes; bf16 takes two bytes.",
        "```python\nmy_gigabytes = (linear + 2 * kept) / 1e9\n```",
    ],
    done="compare: `plan('Qwen2.5-7B', 14, quantize='8bit').memory['teacher weights'] / 1e9` of the planner.",
    number="05.1",
    difficulty=1,
    minutes=4,
)


# -- 05.2 -------------------------------------------------------------------------------------------------------------


def check_error(answer) -> str | bool | None:
    """The relative error of hidden states of three texts with 6, 3 and 1 tokens, and large padding."""
    generator = torch.Generator().manual_seed(5)
    full, noise = (torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ours = full + 0.1 * noise
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])
    full[~mask] *= 10
    value = float(answer(ours.clone(), full.clone(), mask.clone()))
    gap, size = (ours - full)[mask], full[mask]  # (tokens, d)
    right = float(gap.norm() / size.norm())
    known = {
        right: None,
        float((ours - full).norm() / full.norm()): "your value counts the padding, too: use `[mask]` on both before "
        "taking norms.",
        right**2: "that is the squared ratio; take the square root.",
        float(gap.norm()): "that is the distance; relative to what? Divide by the norm of the full teacher's.",
        float(gap.norm() / ours[mask].norm()): "errors are relative to the full teacher: divide by its norm.",
        float((gap.norm(dim=-1) / size.norm(dim=-1)).mean()): "that is a mean of ratios, one a token: sum over all "
        "tokens first, then divide once.",
    }
    return next((why for wrong, why in known.items() if abs(value - wrong) < 1e-6), False)


error = Exercise(
    "Write the relative error of a quantized teacher's hidden states, `ours`, against the full one's, `full`, both "
    "(B, T, d), over the tokens that count.",
    check_error,
    hints=[
        "A norm of differences over a norm.",
        "`ours[mask]` has one row for each token that counts.",
        """```python
def my_error(ours, full, mask):
    return (ours[mask] - full[mask]).norm() / full[mask].norm()
```""",
    ],
    done="now measure one batch with it: `a, b = (capture(forms[n], batches[0], [L]) for n in ('4bit', 'full'))`, then "
    "`my_error(a.hidden_states[L], b.hidden_states[L], b.mask)`.",
    number="05.2",
    difficulty=1,
    minutes=5,
)


# -- 05.3 -------------------------------------------------------------------------------------------------------------


def _pair() -> tuple[Any, Any, Objective]:
    """A student of half its teacher's width, and features that need a projection between them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    teacher = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).eval()
    objective = Objective(LayerMap([(1, 2)]), features=Features("mse"))
    return shrink(teacher, layers=1, hidden_size=16), teacher, objective


def check_optimizer(answer) -> str | None:
    """An optimizer that holds the student's and the projection's parameters, and no others."""
    student, teacher, objective = _pair()
    asked = []  # of the objective, in order

    def watched(name: str):
        method = getattr(objective, name)

        def call(*args, **kwargs):
            asked.append(name)
            return method(*args, **kwargs)

        return call

    for name in ("prepare", "parameters"):
        setattr(objective, name, watched(name))
    optimizer = answer(student, teacher, objective)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"it returns {type(optimizer).__name__}: return the optimizer."
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    projections = list(objective.projections.parameters())
    if not projections:
        return (
            "there is no projection yet, so the first step would make one behind the optimizer's back: "
            "`objective.prepare(…)` makes it now."
        )
    if any(id(parameter) in held for parameter in teacher.parameters()):
        return "the teacher's parameters are in the optimizer, too: a teacher is read, never trained."
    if any(id(parameter) not in held for parameter in projections):
        if "parameters" in asked and asked.index("parameters") < asked.index("prepare"):
            return (
                "you ask the objective for its parameters while it has none: the projection is made one line too late."
            )
        return "the projection exists, and no group of the optimizer holds it: whose parameters are missing?"
    if any(id(parameter) not in held for parameter in student.parameters()):
        return "now the projection learns and the student stands still: the optimizer needs both."
    return None


optimizer = Exercise(
    "Why does the projection not move? Write `my_optimizer(student, teacher, objective)` so that student *and* "
    "projection learn.",
    check_optimizer,
    hints=[
        "An optimizer moves the parameters that it was given when it was made, and no others.",
        "Print `len(list(objective.parameters()))` before and after `objective.prepare(…)`.",
        """```python
def my_optimizer(student, teacher, objective):
    objective.prepare(student.config.hidden_size, teacher.config.hidden_size)
    return torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-3)
```""",
    ],
    done="run `loop_by_hand(my_optimizer)` and compare. `DistillationTrainer` prepares the objective before it builds "
    "its optimizer.",
    number="05.3",
    difficulty=2,
    minutes=10,
)
