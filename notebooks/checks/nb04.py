"""Checks of the exercises of notebook 04."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fakit.losses.features import mse
from fakit.losses.outputs import forward_kl
from fakit.teaching import Exercise

PULL_HINT = """```python
def my_pull(student_logits, teacher_logits, tau):
    q, p = (x.div(tau).softmax(-1) for x in (student_logits, teacher_logits))
    return tau * (q - p) / len(student_logits)
```"""

PADDING_HINT = """```python
def my_feature_loss(student, teacher, mask):
    return (student[mask] - teacher[mask]).square().mean()
```"""

BALANCE_HINT = """```python
def my_balance(norms, weights):
    pull = weights["task"] * norms["task"]
    return {
        name: pull / norms[name] if weight > 0 and name != "task" else weight
        for name, weight in weights.items()
    }
```"""


# -- 04.1 -------------------------------------------------------------------------------------------------------------


def check_padding(answer) -> str | None:
    """A masked mean squared error: three sentences of 6, 3 and 1 tokens, 4 features."""
    generator = torch.Generator().manual_seed(4)
    s, t = (torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])
    truth = float(mse(s, t, valid))
    try:
        value = float(answer(s.clone(), t.clone(), valid.clone()))
    except RuntimeError as error:
        return (
            f"it raised `{error}`: the mask is (B, T), the tensors are (B, T, d); "
            "`mask[..., None]` gives it a third axis."
        )
    if abs(value - truth) > 1e-9:
        known = _wrong_means((s - t).square(), valid)
        why = next((why for wrong, why in known.items() if abs(value - wrong) < 1e-9), None)
        return f"your value {value:.4f} {why}." if why else f"your value is {value:.4f}, expected {truth:.4f}."
    s[~valid] = float("nan")
    if not math.isfinite(float(answer(s, t, valid))):
        return (
            "right, until a padded position holds NaN or infinity: 0 · NaN is NaN. Take the valid positions out by "
            "index instead of multiplying by the mask."
        )
    return None


def _wrong_means(square: Tensor, valid: Tensor) -> dict[float, str]:
    """Value → what is wrong with it."""
    kept = square * valid[..., None]  # (B, T, d)
    by_sentence = torch.stack([row[counts].mean() for row, counts in zip(square, valid, strict=True)]).mean()
    return {
        float(kept.mean()): "still divides by every position, padding too: padding is zeroed in the numerator and "
        "counted in the denominator",
        float(square.mean()): "does not look at the mask at all",
        float(by_sentence): "is a mean of sentence means: a token of a short sentence weighs more than one of a long "
        "sentence. Average over all valid tokens",
        float(kept.sum() / valid.sum()): "sums over the d features: divide by d as well",
        float(kept.sum()): "is a sum: it grows with batch and length",
    }


padding = Exercise(
    "Repair `suspicious_loss`: write the mean squared error over valid tokens and features, whatever the padding "
    "holds.",
    check_padding,
    hints=[
        "Padding adds 0 to the numerator. And to the denominator?",
        "`mse_loss` divides by B · T · d. By what should it be divided? Or: which rows should it be given?",
        PADDING_HINT,
    ],
    done="masked in the numerator *and* in the denominator.",
    number="04.1",
    difficulty=1,
    minutes=6,
)


# -- 04.2 -------------------------------------------------------------------------------------------------------------


def check_pull(answer) -> str | None:
    """The gradient of the soft-label loss for 5 texts and 7 classes at τ = 3."""
    generator = torch.Generator().manual_seed(3)
    s, t = (3 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    tau = 3.0
    leaf = s.clone().requires_grad_()
    (truth,) = torch.autograd.grad(forward_kl(leaf, t, None, temperature=tau), leaf)
    found = answer(s.clone(), t.clone(), tau)
    shape = tuple(getattr(found, "shape", ()))
    if shape != tuple(s.shape):
        return f"one number for each logit, (B, C) = {tuple(s.shape)}; yours has shape {shape}."
    found = found.detach()
    if not bool(found.isfinite().all()):
        return "your gradient is not finite: take softmax, no logarithm is needed any more."
    if torch.allclose(found, truth, atol=1e-9):
        return None
    for why, wrong in _wrong_pulls(s, t, tau, truth).items():
        if torch.allclose(found, wrong, atol=1e-9):
            return f"your gradient {why}."
    return f"at τ = {tau:g} your gradient is off by up to {float((found - truth).abs().max()):.3f}."


def _wrong_pulls(s: Tensor, t: Tensor, tau: float, truth: Tensor) -> dict[str, Tensor]:
    """What is wrong → the gradient, (B, C), that it makes."""
    texts, classes = s.shape
    q, p, q_sharp, p_sharp = s.div(tau).softmax(-1), t.div(tau).softmax(-1), s.softmax(-1), t.softmax(-1)
    return {
        "points the other way: a gradient points uphill, and the loss rises where the student gives an answer more "
        "than the teacher does": -truth,
        "is the gradient of a sum over texts: the loss is their mean": truth * texts,
        "lacks a factor: τ² stands before the loss, and the logits inside are divided by τ": (q - p) / texts,
        "has τ² whole: the logits inside are divided by τ, the chain rule takes one τ back": tau**2 * (q - p) / texts,
        "is the gradient of the loss without its τ²": (q - p) / tau / texts,
        "softens nothing: both softmaxes are taken at τ": tau * (q_sharp - p_sharp) / texts,
        "softens the teacher alone: the student's logits are divided by τ as well": tau * (q_sharp - p) / texts,
        "is a mean over classes too: a loss sums over classes": truth / classes,
    }


pull = Exercise(
    "How hard does the soft-label loss pull on each logit? Write the gradient of `outputs_by_hand` with respect to the "
    "student's logits, (B, C), as a formula: no autograd.",
    check_pull,
    hints=[
        "For the cross-entropy of one text with one label the gradient is softmax(logits) minus the one-hot label. "
        "What stands in the label's place here?",
        "Both sides at τ; then the chain rule for what is inside, logits / τ, the factor τ² before the loss, and the "
        "mean over B texts.",
        PULL_HINT,
    ],
    done="the pull is the difference of two distributions: it ends where they are equal.",
    number="04.2",
    difficulty=3,
    minutes=12,
)


# -- 04.3 -------------------------------------------------------------------------------------------------------------

NORMS = {"features": 0.5, "attention": 2.0, "outputs": 8.0, "task": 4.0}
WEIGHTS = {"features": 1.0, "attention": 0.0, "outputs": 1.0, "task": 0.5}
BALANCED = {"features": 4.0, "attention": 0.0, "outputs": 0.25, "task": 0.5}


def check_balance(answer) -> str | None:
    """Balanced weights of four terms, of which attention is off."""
    found = answer(dict(NORMS), dict(WEIGHTS))
    if not isinstance(found, dict) or set(found) != set(NORMS):
        return f"return a dictionary with a weight for each of {', '.join(NORMS)}; found {found!r}."
    found = {name: float(found[name]) for name in NORMS}

    def same(**changes: float) -> bool:
        return all(abs(found[name] - (BALANCED | changes)[name]) < 1e-9 for name in NORMS)

    if same():
        return None
    if found["attention"] != 0:
        return "attention has weight 0: it is off, and stays off; you switched it on."
    if same(features=0.5 * 0.5 / 4, outputs=0.5 * 8 / 4):
        return "your ratio is upside down: a term with a large gradient needs a *small* weight."
    if same(features=8.0, outputs=0.5, task=1.0) or same(features=8.0, outputs=0.5):
        return "you left out the task's own weight: it pulls with 0.5 · 4.0, not with 4.0."
    if found["task"] != 0.5:
        return "the task is the reference: its weight stays as it is."
    pulls = {name: found[name] * NORMS[name] for name in ("features", "outputs")}
    return f"the weighted norms should be 0.5 · 4.0 = 2.0 each; yours are {pulls}."


balance = Exercise(
    "Write the balance: from the gradient norms of the raw losses and the present weights (both {term: number}) make "
    "the weights under which each term that is on pulls as hard as the task does now. A term of weight 0 stays off.",
    check_balance,
    hints=[
        "How hard does the task pull now? That is what w_i · norm_i has to be.",
        "Keep the task's weight, keep zeros; for the others divide the task's pull by the term's norm.",
        BALANCE_HINT,
    ],
    done="two lines, no search.",
    number="04.3",
    difficulty=2,
    minutes=8,
)
