"""Exercises of notebook 03: what each asks for, and what a wrong answer is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fakit.similarity import match_heads, sink_share
from fakit.teaching import Exercise, one_of

Pairs = set[tuple[int, int]]


# --- 03.1 -------------------------------------------------------------------------------------------------------------


def check_distance(answer: Callable[[Tensor, Tensor], Tensor | float]) -> str | None:
    p = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    q = torch.tensor([0.1, 0.1, 0.3, 0.5], dtype=torch.float64)
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> float:
        return float(torch.where(a > 0, a * (a / b.clamp_min(1e-300)).log2(), 0.0).sum())

    divergence = (kl(p, m) + kl(q, m)) / 2
    truth, log2 = divergence**0.5, float(np.log(2))
    value = float(answer(p.clone(), q.clone()))
    known = [
        (divergence, "is the divergence; the distance is its square root"),
        ((divergence * log2) ** 0.5, "is in nats: with the logarithm to base 2 the distance reaches exactly 1"),
        (divergence * log2, "is the divergence in nats: take log2, then the square root"),
        ((2 * divergence) ** 0.5, "lacks the factor ½ of the mean of the two divergences"),
        (kl(p, m) ** 0.5, "looks at p alone: the distance is symmetric, it needs KL(q ‖ m) as well"),
    ]
    if abs(value - truth) < 1e-9:
        return None
    if value != value:
        return "your value is NaN: where p is 0, 0 · log 0 counts as 0 (`torch.special.entr` or `torch.xlogy`)."
    for wrong, why in known:
        if abs(value - wrong) < 1e-9:
            return f"your value {value:.4f} {why}."
    return f"your value for {p.tolist()} and {q.tolist()} is {value:.4f}, expected {truth:.4f}."


distance = Exercise(
    "Write the Jensen–Shannon distance of two rows $p$ and $q$, each (T,) and summing to 1, by the formula above: "
    r"logarithms to base 2. Rows hold zeros: $0 \cdot \log 0 = 0$.",
    check_distance,
    hints=[
        r"Where $p$ is 0, $p \log(p/m)$ is 0 in theory and NaN in floating point. There are functions that know.",
        r"The divergence is also $H(m) - \frac{1}{2}(H(p) + H(q))$ with the entropy $H$; "
        "`torch.special.entr(p).sum()` is $H$ in nats.",
        "```python\n"
        "def my_distance(p, q):\n"
        "    def H(row):\n"
        "        return torch.special.entr(row).sum() / np.log(2)\n\n"
        "    return (H((p + q) / 2) - (H(p) + H(q)) / 2).sqrt()\n"
        "```",
    ],
    done="the same as `head_distance` takes for one row. "
    "Unlike KL it is symmetric, and finite where one side does not look.",
    number="03.1",
    difficulty=2,
    minutes=10,
)


# --- 03.2 -------------------------------------------------------------------------------------------------------------


def best(cost: Tensor, maximize: bool = False) -> Pairs:
    return {(int(s), int(t)) for s, t in zip(*linear_sum_assignment(cost.numpy(), maximize=maximize), strict=True)}


def total(cost: Tensor, pairs: Pairs) -> float:
    return sum(float(cost[pair]) for pair in pairs)


def check_matching(answer: Callable[[Tensor], Iterable[tuple[int, int]]]) -> str | None:
    cost = torch.tensor(  # 3 student heads, 4 teacher heads
        [[0.30, 0.10, 0.60, 0.90], [0.80, 0.15, 0.70, 0.95], [0.40, 0.50, 0.85, 0.35]], dtype=torch.float64
    )
    large = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return judged(answer(cost.clone()), cost) or judged(answer(large.clone()), large)


def judged(answer: Iterable[tuple[int, int]], cost: Tensor) -> str | None:
    """What is wrong with pairs for a cost matrix."""
    students, teachers = cost.shape
    try:
        listed = [(int(s), int(t)) for s, t in answer]
    except (TypeError, ValueError):
        return "pairs (student head, teacher head) are asked for: `zip(rows, columns)` makes them of two arrays."
    pairs, truth = set(listed), best(cost)
    if pairs == truth and len(listed) == students:
        return None
    if pairs == {(t, s) for s, t in truth}:
        return "rows and columns are exchanged: your pairs are (teacher head, student head)."
    if pairs == best(cost, maximize=True):
        return "these are the pairs of the *largest* sum: a distance is a cost, not a similarity."
    if any(not (0 <= s < students and 0 <= t < teachers) for s, t in pairs):
        return f"a pair lies outside the {students} × {teachers} matrix: {sorted(pairs)}."
    if sorted(s for s, _ in listed) != list(range(students)):
        return f"every student head gets one teacher head; found the student heads {sorted(s for s, _ in listed)}."
    shared = sorted({t for _, t in pairs if sum(t == other for _, other in pairs) > 1})
    if shared:
        nearest = pairs == set(enumerate(cost.argmin(1).tolist()))
        return (
            f"teacher head {shared[0]} is given to more than one student head"
            + (", as the nearest of each row often is" if nearest else "")
            + ": the matching is one to one."
        )
    if pairs == {(i, i) for i in range(students)}:
        return "these are heads of the same number, whatever the distances say: heads have no order."
    sums = f"the sum of your pairs is {total(cost, pairs):.2f}, the smallest is {total(cost, truth):.2f}"
    if pairs == set(match_heads(cost, rule="greedy").pairs):
        return f"the nearest pair first, and so on, is the greedy rule: {sums}."
    return f"one to one, but not the best: {sums}."


matching = Exercise(
    "Write the matching of heads: from a matrix of distances (student heads, teacher heads), with at least as many "
    "teacher heads as student heads, the pairs (student head, teacher head), one to one, whose distances have the "
    "smallest sum. A list of pairs, in any order.",
    check_matching,
    hints=[
        "The nearest teacher head of each row is not enough: two rows may want the same one.",
        "`scipy.optimize.linear_sum_assignment(cost)` returns the rows and the columns of the best assignment.",
        "```python\n"
        "def my_matching(cost):\n"
        "    from scipy.optimize import linear_sum_assignment\n\n"
        "    return list(zip(*linear_sum_assignment(cost)))\n"
        "```",
    ],
    done="the same pairs as `match_heads`. While a model trains, the kit takes the greedy rule: "
    "it needs no answer from the accelerator.",
    number="03.2",
    difficulty=2,
    minutes=10,
)


# --- 03.3 -------------------------------------------------------------------------------------------------------------


def check_sinks(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str | None:
    maps = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    maps = maps * tokens[:, None, None]
    maps = maps / maps.sum(-1, keepdim=True)
    sinks = torch.tensor([[True, False, False, False, True], [True, False, True, False, False]])
    truth = sink_share(maps, tokens, sinks)
    value = torch.as_tensor(answer(maps.clone(), tokens.clone(), sinks.clone())).double()
    on_sinks = (maps * sinks[:, None, None]).sum(-1)  # (B, H, T)
    by_sentence = torch.stack([on_sinks[i][:, tokens[i]].mean(-1) for i in range(2)]).mean(0)
    if value.shape != truth.shape:
        return f"expected one number a head, shape (3,); found {tuple(value.shape)}."
    known = [
        (
            on_sinks.mean((0, 2)),
            "counts rows of padding as queries: they look at something too, and it means nothing",
        ),
        (
            by_sentence,
            "is a mean of sentence means, so that a token of a short sentence weighs more; "
            "average over all valid queries",
        ),
        (
            maps[..., 0].transpose(1, 2)[tokens].mean(0),
            "counts the first token only; the last one of each sentence is a sink too",
        ),
        (
            (maps * sinks[:, None, :, None]).sum(-2).transpose(1, 2)[tokens].mean(0),
            "sums over queries that are sinks: keys are the last dimension",
        ),
    ]
    if torch.allclose(value, truth):
        return None
    for wrong, why in known:
        if torch.allclose(value, wrong):
            return f"your result {why}."
    found, expected = ([round(v, 3) for v in values.tolist()] for values in (value, truth))
    return f"your result is {found}, expected {expected}."


sinks_of_heads = Exercise(
    "Write the sink share: from maps (B, H, T, T), mask (B, T) and sinks (B, T), both bool, the mean attention that a "
    "head gives to sinks, over all queries that are tokens. Result (H,).",
    check_sinks,
    hints=[
        "First, per query, the sum over the keys that are sinks: (B, H, T). Then the mean over the queries that count.",
        "`(maps * sinks[:, None, None, :]).sum(-1)` is (B, H, T); move H last and index with the mask.",
        "```python\n"
        "def my_sink_share(maps, mask, sinks):\n"
        "    on_sinks = (maps * sinks[:, None, None, :]).sum(-1)  # (B, H, T)\n"
        "    return on_sinks.transpose(1, 2)[mask].mean(0)\n"
        "```",
    ],
    done="padding asked nothing and was counted nowhere.",
    number="03.3",
    difficulty=2,
    minutes=10,
)


# --- 03.4 -------------------------------------------------------------------------------------------------------------


def check_maps(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str | None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 2, 3, 5, 4, generator=generator, dtype=torch.float64)  # (B, H, T, d) each
    tokens, scaling = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), 0.4
    scores = query @ key.transpose(-2, -1) * scaling
    closed = torch.finfo(scores.dtype).min
    open_keys, open_queries = tokens[:, None, None], tokens[:, None, :, None]
    truth = scores.masked_fill(~open_keys, closed).softmax(-1)
    maps = answer(query.clone(), key.clone(), tokens.clone(), scaling)
    if tuple(maps.shape) != tuple(truth.shape):
        return f"expected maps of shape {tuple(truth.shape)}, found {tuple(maps.shape)}."
    if not maps.isfinite().all():
        return "your maps hold NaN: a row whose keys are all closed has no softmax; close keys, not queries."
    known = [
        (
            scores.masked_fill(~open_queries, closed).softmax(-2),
            "the columns sum to 1 and the rows do not: as it was, each key divides itself among the queries.",
        ),
        (
            scores.masked_fill(~open_keys, closed).softmax(-2),
            "padding is closed on the right side now, but the softmax still runs over the queries: columns sum to 1, "
            "rows do not.",
        ),
        (
            scores.masked_fill(~open_queries, closed).softmax(-1),
            "rows sum to 1 now, but tokens of a short sentence look at padding: the mask closes queries, it has to "
            "close keys, the last dimension.",
        ),
        (
            scores.softmax(-1),
            "rows sum to 1, but nothing closes padding any more: short sentences give it attention.",
        ),
        (
            scores.softmax(-1) * open_keys,
            "padding is set to 0 after the softmax, so rows of short sentences sum to less than 1: close it before.",
        ),
        (
            (scores / scaling).masked_fill(~open_keys, closed).softmax(-1),
            "the scaling is lost: every map is sharper than the model's.",
        ),
    ]
    rows = tokens[:, None, :, None]  # what a padding query looks at is nobody's business
    if torch.allclose(maps * rows, truth * rows):
        return None
    for wrong, why in known:
        if torch.allclose(maps, wrong):
            return why
    sums = maps.sum(-1).transpose(1, 2)[tokens]
    error = float(((maps - truth) * rows).abs().max())
    return (
        f"rows of tokens sum to {float(sums.min()):.2f} to {float(sums.max()):.2f}, and the largest error of a cell is "
        f"{error:.2f}."
    )


repair = Exercise(
    "Repair `colleague_maps`: copy it, and change what is wrong. "
    "A row is a query; it has to share 1 among the keys that are tokens.",
    check_maps,
    hints=[
        "Look at the table's last two columns: which sums should be 1? "
        "And along which of the two last dimensions is padding closed?",
        "The softmax runs over the keys, the last dimension, and the mask (B, T) has to be laid along that dimension "
        "too: two mistakes that fit each other hide each other.",
        "```python\n"
        "def my_maps(query, key, mask, scaling):\n"
        "    scores = query @ key.transpose(-2, -1) * scaling\n"
        "    padding = torch.finfo(scores.dtype).min\n"
        "    scores = scores.masked_fill(~mask[:, None, None, :], padding)\n"
        "    return scores.softmax(-1)\n"
        "```",
    ],
    done="rows sum to 1 over the tokens. Over the wrong axis every key hands out exactly 1, so sinks get "
    "(number of sinks) / (number of tokens) in every layer of every model: the bug made the finding.",
    number="03.4",
    difficulty=2,
    minutes=10,
)


# --- 03.5 -------------------------------------------------------------------------------------------------------------


check_claim = one_of(
    {
        "a": "attributions are not maps; attention is one ingredient of an answer, not its reason, and the report did "
        "not measure reasons.",
        "b": "one seed, two students, 32 sentences: the difference may be noise. "
        "Notebook 06 says what would be needed.",
        "c": None,
        "d": "the divergence fell on sentences that neither student was trained on, so something did change.",
        "e": "one seed, two students, 32 sentences: a small difference is no proof of no effect. "
        "Notebook 06 says what would be needed.",
    }
)

claim = Exercise(
    "A report of two students, trained once each as in section 6, says: *on 32 unseen sentences the divergence of the "
    "maps is 0.12 with outputs alone and 0.08 with the attention term; the teacher's answer is given on 69 % and "
    "72 % of them.* What may one write?\n\n"
    "- a) The aligned student decides for the teacher's reasons.\n"
    "- b) Attention alignment raises how often the student agrees with the teacher.\n"
    "- c) In this run the attention term brought the maps closer on unseen sentences; "
    "what it does to the answers needs more seeds.\n"
    "- d) Nothing: the student was trained on that term.\n"
    "- e) Attention alignment does not change how often the student agrees with the teacher.",
    check_claim,
    hints=[
        "What was measured once, what was measured on unseen data, and what was not measured at all?",
        "One claim is about reasons, two are about a single pair of numbers, one forgets that the sentences were held "
        "out.",
        '`my_claim = "c"`',
    ],
    done="say what was measured, on what, how often.",
    number="03.5",
    difficulty=1,
    minutes=5,
)
