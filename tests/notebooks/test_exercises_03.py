"""Exercises of notebook 03: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import nbformat
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fakit.similarity import match_heads
from tests.notebooks.cells import NOTEBOOKS, assert_ladder, assert_told, exercise, solution

KNOWN = {"torch": torch, "np": np}  # what earlier cells of the notebook define


def on_sinks(maps, sinks):
    return (maps * sinks[:, None, None]).sum(-1)  # (B, H, T)


def jsd(p, q):
    m = (p + q) / 2
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum() / 2  # nats


def to_the_middle(p, q):
    return torch.xlogy(p, p / ((p + q) / 2)).sum() / np.log(2)  # bits


def scores(query, key, scaling):
    return query @ key.transpose(-2, -1) * scaling


def closed(x, mask):
    return x.masked_fill(~mask, torch.finfo(x.dtype).min)


def assigned(cost, **options):
    return list(zip(*linear_sum_assignment(cost, **options), strict=True))


def rolled(cost):
    """One to one, each student head with the teacher head before its own."""
    return [(s, (s - 1) % cost.shape[1]) for s in range(len(cost))]


@pytest.mark.parametrize("name", ["distance", "matching", "sinks_of_heads", "repair", "claim"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("03", name, KNOWN)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("distance", lambda p, q: jsd(p, q) / np.log(2), "is the divergence; the distance"),
        ("distance", lambda p, q: jsd(p, q).sqrt(), "is in nats"),
        ("distance", jsd, "is the divergence in nats"),
        ("distance", lambda p, q: (2 * jsd(p, q) / np.log(2)).sqrt(), "lacks the factor ½"),
        ("distance", lambda p, q: to_the_middle(p, q).sqrt(), "looks at p alone"),
        ("distance", lambda p, q: (p * (p / q).log()).sum(), "NaN"),
        ("matching", lambda cost: list(enumerate(cost.argmin(1).tolist())), "as the nearest of each row often is"),
        ("matching", lambda cost: [(s, 1) for s in range(len(cost))], "teacher head 1 is given to more than one"),
        ("matching", lambda cost: [(s, t) for t, s in enumerate(cost.argmin(0).tolist())], "every student head gets"),
        ("matching", lambda cost: assigned(cost, maximize=True), "a distance is a cost, not a similarity"),
        ("matching", lambda cost: assigned(-cost), "a distance is a cost, not a similarity"),
        ("matching", lambda cost: [(t, s) for s, t in assigned(cost)], "rows and columns are exchanged"),
        ("matching", lambda cost: assigned(cost.T), "rows and columns are exchanged"),
        ("matching", lambda cost: [(i, i) for i in range(len(cost))], "heads of the same number"),
        (
            "matching",
            lambda cost: match_heads(cost, rule="greedy").pairs,
            "the greedy rule: the sum of your pairs is 1",
        ),
        ("matching", linear_sum_assignment, "`zip(rows, columns)`"),
        ("matching", lambda cost: cost.min(), "`zip(rows, columns)`"),
        ("matching", lambda cost: assigned(cost)[:-1], "every student head gets one"),
        ("matching", lambda cost: [*assigned(cost), assigned(cost)[0]], "every student head gets one"),
        ("matching", lambda cost: [(s + 1, t + 1) for s, t in assigned(cost)], "lies outside the 3 × 4 matrix"),
        ("matching", rolled, "one to one, but not the best"),
        ("matching", lambda cost: [(0, 0), (1, 1), (2, 3)] if len(cost) == 3 else rolled(cost), "but not the best"),
        ("sinks_of_heads", lambda maps, mask, sinks: on_sinks(maps, sinks).mean((0, 2)), "rows of padding as queries"),
        ("sinks_of_heads", lambda maps, mask, sinks: maps[..., 0].transpose(1, 2)[mask].mean(0), "first token only"),
        ("sinks_of_heads", lambda maps, mask, sinks: torch.ones(2), "one number a head"),
        ("repair", lambda q, k, m, c: closed(scores(q, k, c), m[:, None, :, None]).softmax(-2), "as it was, each key"),
        ("repair", lambda q, k, m, c: closed(scores(q, k, c), m[:, None, None]).softmax(-2), "still runs over the"),
        ("repair", lambda q, k, m, c: closed(scores(q, k, c), m[:, None, :, None]).softmax(-1), "mask closes queries"),
        ("repair", lambda q, k, m, c: scores(q, k, c).softmax(-1), "nothing closes padding any more"),
        ("repair", lambda q, k, m, c: scores(q, k, c).softmax(-1) * m[:, None, None], "set to 0 after the softmax"),
        ("repair", lambda q, k, m, c: closed(scores(q, k, 1), m[:, None, None]).softmax(-1), "the scaling is lost"),
        ("repair", lambda q, k, m, c: scores(q, k, c).masked_fill(~m[:, None, :, None], -torch.inf).softmax(-1), "NaN"),
        ("repair", lambda q, k, m, c: scores(q, k, c).softmax(-1)[0], "expected maps of shape (2, 3, 5, 5)"),
        ("repair", lambda q, k, m, c: scores(q, k, c).sigmoid(), "the largest error of a cell"),
        ("claim", "a", "not its reason"),
        ("claim", "b", "the difference may be noise"),
        ("claim", "d", "neither student was trained on"),
        ("claim", "e", "no proof of no effect"),
        ("claim", "f", "one letter"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, message):
    assert_told(exercise("03", name), answer, message)


def test_the_planted_bug_hides_the_sinks_and_the_repair_shows_them():
    """What the notebook's table shows, on maps in which every token looks at the first."""
    cells = nbformat.read(NOTEBOOKS / "03_attention_maps.ipynb", as_version=4).cells
    names = dict(KNOWN)
    exec(next(cell.source for cell in cells if cell.id == "s03-bug-function"), names)
    query, key, mask = torch.ones(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), torch.arange(6) < torch.tensor([[6], [3]])
    key[:, :, 0] = 3.0
    planted, repaired = (
        function(query, key, mask, 0.5)[:, 0].masked_fill(~mask[..., None], 0)[..., 0].sum() / mask.sum()
        for function in (names["colleague_maps"], solution(exercise("03", "repair"), names))
    )
    assert float(planted) == pytest.approx(2 / 9) and float(repaired) > 0.9
