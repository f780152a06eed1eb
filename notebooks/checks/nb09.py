"""Checks of the exercises of notebook 09."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fakit.teaching import Exercise, one_of

INFLUENCE_HINT = """```python
def my_influence(before, after, mask):
    cosines = torch.cosine_similarity(before[mask], after[mask], dim=-1)
    return 1 - cosines.mean()
```"""

SURVIVORS_HINT = """```python
def my_survivors(layers, removed):
    left = list(range(1, layers + 1))
    for place in removed:
        del left[place - 1]
    return left
```"""


# -- 09.1 -------------------------------------------------------------------------------------------------------------


def check_influence(answer) -> str | None:
    """Block influence over three texts of 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(9)
    before = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    after = before + 0.7 * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    cosines = torch.cosine_similarity(before, after, dim=-1)  # (B, T)
    truth = float(1 - cosines[valid].mean())
    found = answer(before.clone(), after.clone(), valid.clone())
    if getattr(found, "numel", lambda: 1)() != 1:
        return f"one number is wanted, the mean over tokens; yours has shape {tuple(found.shape)}."
    value = float(found)
    if abs(value - truth) > 1e-9:
        wrong = _wrong_influences(before, after, valid, cosines)
        why = next((why for why, other in wrong.items() if abs(value - other) < 1e-9), None)
        return f"your value {value:.4f} {why}." if why else f"your value is {value:.4f}, expected {truth:.4f}."
    before[~valid] = float("nan")
    if not math.isfinite(float(answer(before, after, valid))):
        return "right, until a padded position holds NaN: take the valid tokens out by index."
    return None


def _wrong_influences(before: Tensor, after: Tensor, valid: Tensor, cosines: Tensor) -> dict[str, float]:
    """What is wrong → the value that it makes."""
    by_text = torch.stack([row[counts].mean() for row, counts in zip(cosines, valid, strict=True)]).mean()
    changed = (after - before).norm(dim=-1) / before.norm(dim=-1)
    wrong = {
        "is the cosine itself: influence is 1 minus it": cosines[valid].mean(),
        "counts padding": 1 - cosines.mean(),
        "divides by every position, padding too": 1 - (cosines * valid).mean(),
        "is a mean of text means: a token of a short text weighs more than one of a long text": 1 - by_text,
        "is the relative change, ‖h_i − h_{i−1}‖ / ‖h_{i−1}‖: that sees length, too": changed[valid].mean(),
        "compares each text's states as one long vector: the cosine is of tokens": 1
        - torch.cosine_similarity(before[valid].flatten(), after[valid].flatten(), dim=0),
        "is taken along tokens: the cosine is along the last axis, of features": 1
        - torch.cosine_similarity(before, after, dim=1).mean(),
    }
    return {why: float(value) for why, value in wrong.items()}


influence = Exercise(
    "Write block influence: 1 minus the mean cosine between a token's state before a block and after it, over the "
    "tokens where the mask is True, whatever padding holds.",
    check_influence,
    hints=[
        "Which tokens do you need at all? Along which axis is a state?",
        "`before[mask]` is (n, d). `torch.cosine_similarity(…, dim=-1)` gives one cosine a token.",
        INFLUENCE_HINT,
    ],
    done="0 for a block that only makes states longer, whatever that does to the outputs.",
    number="09.1",
    difficulty=1,
    minutes=5,
)


# -- 09.2 -------------------------------------------------------------------------------------------------------------


def check_survivors(answer) -> str | None:
    """Several rounds, each by the places of the student of that round."""
    for layers, removed in ((6, [3]), (6, [3, 4]), (6, [1, 1, 1]), (12, [7, 7, 2, 9]), (4, [])):
        truth = _survivors(layers, removed)
        found = answer(layers, list(removed))
        if not isinstance(found, Sequence):
            return f"a list of teacher layers is wanted; yours is {found!r}."
        found = list(found)
        if found == truth:
            continue
        where = f"{layers} layers, removed {removed}"
        known = {
            "takes the numbers for the teacher's: in round 2, place 4 is no longer teacher layer 4": [
                i for i in range(1, layers + 1) if i not in removed
            ],
            "counts from 0: layers are numbered from 1": [i - 1 for i in truth],
            "takes out one place too far: place 1 is the first layer": _survivors(layers, [r + 1 for r in removed]),
            "holds what was removed: what stays is wanted": [i for i in range(1, layers + 1) if i not in truth],
            "numbers the student's layers anew: the teacher's are wanted": list(range(1, len(truth) + 1)),
        }
        why = next((why for why, wrong in known.items() if found == wrong), None)
        return f"{where}: your answer {found} {why}." if why else f"{where}: you have {found}, expected {truth}."
    return None


def _survivors(layers: int, removed: Sequence[int]) -> list[int]:
    left = list(range(1, layers + 1))
    for place in removed:
        if place <= len(left):
            del left[place - 1]
    return left


survivors = Exercise(
    "In each round one layer goes; `removed` holds its place in the student of *that* round, from 1 on. Which of the "
    "teacher's `layers` layers stay? For 6 layers and `[3, 4]` they are `[1, 2, 4, 6]`.",
    check_survivors,
    hints=[
        "After round 1 of the example, places 1, 2, 3, 4, 5 hold the teacher layers 1, 2, 4, 5, 6.",
        "Start with the list 1 … layers, and delete one place of it a round.",
        SURVIVORS_HINT,
    ],
    done="the map of the rounds together: student place j was this teacher layer.",
    number="09.2",
    difficulty=2,
    minutes=5,
)


# -- 09.3 -------------------------------------------------------------------------------------------------------------

last = Exercise(
    "The teacher has 6 layers, and a round has taken out layer 6. The student's last layer was the teacher's layer 5. "
    "At which teacher layer should it aim while it is healed?\n\n"
    "- a) at 5, which it was\n- b) at 6\n- c) at the mean of both\n- d) at none: only the outputs count",
    one_of(
        {
            "a": "then nobody learns what layer 6 did. What does the head read?",
            "b": None,
            "c": "no layer of the teacher makes that, and no head was trained on it.",
            "d": "outputs alone can do it with many texts; the state that the head reads says more with few.",
        }
    ),
    hints=[
        "The head stays as it is. On which states was it trained?",
        "The head reads the output of the last layer, whichever layer that is.",
        '`my_last = "b"`',
    ],
    done="what comes last has to be what the head knows.",
    number="09.3",
    difficulty=1,
    minutes=2,
)
