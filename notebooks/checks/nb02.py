"""Exercises of notebook 02: what each asks for, and what a wrong answer is told."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fakit.similarity import Similarity, cka, hsic
from fakit.teaching import Exercise, one_of


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- 02.1 -------------------------------------------------------------------------------------------------------------


def check_hsic(answer: Callable[[Tensor, Tensor], Tensor | float]) -> str | None:
    n = 6
    x = gaussian(6, n, 4) + 1
    y = gaussian(7, n, 3) + x[:, :3]
    K, L = x @ x.T, y @ y.T
    value, truth = float(answer(K.clone(), L.clone())), hsic(x, y)
    kept = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()
    known = [
        (hsic(x, y, "biased"), "equals the biased estimator: the rows are still compared with themselves"),
        (
            float(kept) / (n * (n - 3)),
            "is the right formula with the diagonals of K and L left in: set them to 0 first",
        ),
        (truth * n * (n - 3), "lacks the division by n(n − 3)"),
        (truth * (n - 3) / (n - 1), "is divided by n(n − 1): two degrees of freedom more are lost, n(n − 3)"),
    ]
    if abs(value - truth) < 1e-9 * abs(truth):
        return None
    for wrong, why in known:
        if abs(value - wrong) < 1e-9 * abs(wrong):
            return f"your value at n = {n}, {value:.4f}, {why}."
    return f"your value at n = {n} is {value:.4f}, the debiased HSIC is {truth:.4f}; compare term by term."


debiased = Exercise(
    r"Write the debiased HSIC of two Gram matrices $K$ and $L$, $n \times n$ each. "
    r"$\tilde K$ and $\tilde L$ are their copies with a zero diagonal, $\mathbf{1}$ is a column of ones:"
    "\n\n"
    r"$$\frac{1}{n(n-3)}\left[\mathrm{tr}(\tilde K \tilde L)"
    r" + \frac{(\mathbf{1}^\top \tilde K \mathbf{1})(\mathbf{1}^\top \tilde L \mathbf{1})}{(n-1)(n-2)}"
    r" - \frac{2}{n-2}\,\mathbf{1}^\top \tilde K \tilde L \mathbf{1}\right]$$",
    check_hsic,
    hints=[
        r"`K - torch.diag(K.diagonal())` has a zero diagonal, and $\mathbf{1}^\top M \mathbf{1}$ is `M.sum()`.",
        r"For symmetric matrices $\mathrm{tr}(\tilde K \tilde L)$ is `(K * L).sum()`, and "
        r"$\mathbf{1}^\top \tilde K \tilde L \mathbf{1}$ is `(K @ L).sum()`. Mind the division by $n(n-3)$.",
        "```python\n"
        "def my_hsic(K, L):\n"
        "    n = len(K)\n"
        "    K, L = (M - torch.diag(M.diagonal()) for M in (K, L))\n"
        "    both = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2))\n"
        "    return (both - 2 / (n - 2) * (K @ L).sum()) / (n * (n - 3))\n"
        "```",
    ],
    done="the same value as `fakit.similarity.hsic`, and unbiased: its mean over independent data is 0.",
    number="02.1",
    difficulty=2,
    minutes=10,
)


# --- 02.2 -------------------------------------------------------------------------------------------------------------


def check_tokens(answer: Callable[[Tensor, Tensor, Tensor], float]) -> str | None:
    tokens = torch.arange(10) < torch.arange(12)[:, None] % 6 + 3  # (12, 10): 3 to 8 tokens a sentence
    x, y = gaussian(4, 12, 10, 6), gaussian(5, 12, 10, 6)
    y = torch.where(tokens[..., None], y + 0.5 * x, -3.0)  # what stands in the padding is one vector in each model
    x = torch.where(tokens[..., None], x, 3.0)

    def flat(layer: Tensor) -> Tensor:
        return layer.flatten(0, 1)

    def mean(layer: Tensor) -> Tensor:
        return (layer * tokens[..., None]).sum(1) / tokens.sum(1, keepdim=True)

    value, truth = float(answer(x.clone(), y.clone(), tokens.clone())), cka(x[tokens], y[tokens])
    known = [
        (
            cka(flat(x), flat(y)),
            f"still counts padding: {tokens.numel()} rows, of which only {int(tokens.sum())} are tokens",
        ),
        (
            cka(flat(x * tokens[..., None]), flat(y * tokens[..., None])),
            "sets padding to 0 and keeps its rows: both models agree on every one of them",
        ),
        (cka(mean(x), mean(y)), "compares one mean a sentence: a fine question, but not the one about tokens"),
        (cka(x[tokens], y[tokens], "biased"), "drops padding, and has become biased on the way"),
    ]
    if value != value:
        return "gives NaN: the rows you kept are all alike. True in the mask marks the tokens."
    if abs(value - truth) < 1e-9:
        return None
    for wrong, why in known:
        if abs(value - wrong) < 1e-9:
            return f"your function {why}."
    return f"your function gives {value:.3f}; of the tokens alone it is {truth:.3f}."


padding = Exercise(
    "Repair `cka_of_tokens`: padding added to a batch must change nothing. "
    "(Tokens may count as rows here: the question is padding.)",
    check_tokens,
    hints=[
        "One of the three arguments is never used.",
        "`layer[mask]` with a mask (B, T) picks rows: (number of tokens, d).",
        "```python\ndef repaired(x, y, mask):\n    return cka(x[mask], y[mask])\n```",
    ],
    done="padding is no row. In the kit every function of (B, T, d) takes the mask.",
    number="02.2",
    difficulty=1,
    minutes=5,
)


# --- 02.3 -------------------------------------------------------------------------------------------------------------


def check_order(answer: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    shuffle = torch.tensor([3, 0, 4, 1, 2, 6, 5])  # not its own inverse
    rows = gaussian(8, 7, 4)
    sent = rows[shuffle]
    found = answer(sent.clone(), shuffle.clone())
    if tuple(found.shape) != tuple(rows.shape):
        return f"your rows have shape {tuple(found.shape)}, the colleague's {tuple(sent.shape)}: reorder, drop nothing."
    if torch.equal(found, rows):
        return None
    if torch.equal(found, sent):
        return "these are still in the colleague's order."
    if torch.equal(found, sent[shuffle]):
        return "indexing with `shuffle` shuffles once more; what takes it back is the inverse permutation."
    wrong = int((found != rows).any(1).nonzero()[0])
    return f"row {wrong} is not yet sentence {wrong}; with shuffle = {shuffle.tolist()} it stands in another row."


order = Exercise(
    "A colleague sends the teacher's sentence vectors, but their data loader shuffled: "
    "row i of `rows` is sentence `shuffle[i]`. "
    "Write the function that puts them back into the order of the sentences, the student's order.",
    check_order,
    hints=[
        "You need the place of sentence j in the colleague's file, for j = 0, 1, 2 …",
        "`shuffle.argsort()` is the inverse of a permutation.",
        "```python\ndef in_order(rows, shuffle):\n    return rows[shuffle.argsort()]\n```",
    ],
    done="rows of both models must be the same inputs in the same order: unequal counts raise an error, "
    "an unequal order never does.",
    number="02.3",
    difficulty=1,
    minutes=5,
)


# --- 02.4 -------------------------------------------------------------------------------------------------------------


check_claim = one_of(
    {
        "a": "CKA is no share of information, and 0.07 lies within what chance reaches (0.09).",
        "b": "absence of evidence is no evidence of absence: the interval goes up to 0.16.",
        "c": None,
        "d": "how well a student answers was not measured: in the table of section 9 the model of the highest CKA is "
        "not the one that answers best.",
    }
)

report = Similarity(value=0.07, estimator="debiased", n=64, clusters=64, null=0.09, interval=(-0.02, 0.16))
claim = Exercise(
    f"A report says about a student's S3 and a teacher's T6: *{report}*. Which sentence may stand in the paper?\n\n"
    "- a) The two layers share 7 % of their information.\n"
    "- b) The two layers share nothing.\n"
    "- c) With these 64 sentences the similarity is not significantly different from that of shuffled ones; "
    "with more sentences it might be.\n"
    "- d) The student is a bad one.",
    check_claim,
    hints=[
        "Compare the value with what chance reaches, then look at both ends of the interval.",
        "One letter claims too much from the value, one too much from the null, one something that was not measured.",
        '`my_claim = "c"`',
    ],
    done="a value within chance is a sentence about the data one has, not about the layers.",
    number="02.4",
    difficulty=1,
    minutes=5,
)
