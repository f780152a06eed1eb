"""Exercises of notebook 03: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import numpy as np
import pytest
import torch

from fakit.similarity import sink_share
from fakit.teaching import Exercise
from tests.notebooks.old_cells import assert_ladder, assert_told, exercise, solution, source

# what earlier cells of the notebook define
KNOWN = {
    **{"torch": torch, "np": np, "sink_share": sink_share},
    **{"Exercise": Exercise},
    "spread": {"outputs": {(1, 2): 0.11}, "outputs + attention": {(1, 2): 0.07}},
    "agreement": {"outputs": 0.7, "outputs + attention": 0.7},
    "n": 32,
}


def on_sinks(maps, sinks):
    return (maps * sinks[:, None, None]).sum(-1)  # (B, H, T)


def jsd(p, q):
    m = (p + q) / 2
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum() / 2  # nats


def scores(query, key, scaling):
    return query @ key.transpose(-2, -1) * scaling


def closed(x, mask):
    return x.masked_fill(~mask, torch.finfo(x.dtype).min)


DISTANCE = ("03_attention_maps", "s03-ex1-check")
SINKS = ("03_attention_maps", "s03-ex2-check")
MAPS = ("03_attention_maps", "s03-bug-check")
WRITE = ("03_attention_maps", "s03-ex3-check")


@pytest.mark.parametrize("where", [DISTANCE, SINKS, MAPS, WRITE], ids=lambda where: where[1])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(where):
    assert_ladder(*where, *exercise(*where, KNOWN))


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        (DISTANCE, lambda p, q: jsd(p, q) / np.log(2), "is the divergence; the distance"),
        (DISTANCE, lambda p, q: jsd(p, q).sqrt(), "is in nats"),
        (DISTANCE, lambda p, q: (2 * jsd(p, q) / np.log(2)).sqrt(), "lacks the factor ½"),
        (DISTANCE, lambda p, q: (p * (p / q).log()).sum(), "NaN"),
        (SINKS, lambda maps, mask, sinks: on_sinks(maps, sinks).mean((0, 2)), "rows of padding as queries"),
        (SINKS, lambda maps, mask, sinks: maps[..., 0].transpose(1, 2)[mask].mean(0), "the first token only"),
        (SINKS, lambda maps, mask, sinks: torch.ones(2), "one number a head"),
        (MAPS, lambda q, k, m, c: closed(scores(q, k, c), m[:, None, :, None]).softmax(-2), "as it was, each key"),
        (MAPS, lambda q, k, m, c: closed(scores(q, k, c), m[:, None, None]).softmax(-2), "still runs over the queries"),
        (MAPS, lambda q, k, m, c: closed(scores(q, k, c), m[:, None, :, None]).softmax(-1), "the mask closes queries"),
        (MAPS, lambda q, k, m, c: scores(q, k, c).softmax(-1), "nothing closes padding any more"),
        (MAPS, lambda q, k, m, c: scores(q, k, c).softmax(-1) * m[:, None, None], "set to 0 after the softmax"),
        (MAPS, lambda q, k, m, c: closed(scores(q, k, 1), m[:, None, None]).softmax(-1), "the scaling is lost"),
        (MAPS, lambda q, k, m, c: scores(q, k, c).masked_fill(~m[:, None, :, None], -torch.inf).softmax(-1), "NaN"),
        (MAPS, lambda q, k, m, c: scores(q, k, c).softmax(-1)[0], "expected maps of shape (2, 3, 5, 5)"),
        (MAPS, lambda q, k, m, c: scores(q, k, c).sigmoid(), "the largest error of a cell"),
        (WRITE, "a", "not its reason"),
        (WRITE, "b", "an equal share is no proof of no effect"),
        (WRITE, "d", "neither student was trained on"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    assert_told(exercise(*where, KNOWN)[0], answer, message)


@pytest.mark.parametrize(("aligned", "said"), [(0.6, "lowers"), (0.7, "does not change"), (0.8, "raises")])
def test_the_claim_about_answers_is_the_one_that_this_run_suggests(aligned, said):
    known = KNOWN | {"agreement": {"outputs": 0.7, "outputs + attention": aligned}}
    task, _ = exercise(*WRITE, known)
    assert f"b) Attention alignment {said} how often" in task.question
    assert_told(task, "b", "no proof" if aligned == 0.7 else "may be noise")


def test_the_planted_bug_hides_the_sinks_and_the_repair_shows_them():
    """What the notebook's table shows, on maps in which every token looks at the first."""
    task, namespace = exercise(*MAPS, KNOWN)
    exec(source("03_attention_maps", "s03-bug-function"), namespace)
    query, key, mask = torch.ones(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), torch.arange(6) < torch.tensor([[6], [3]])
    key[:, :, 0] = 3.0
    planted, repaired = (
        function(query, key, mask, 0.5)[:, 0].masked_fill(~mask[..., None], 0)[..., 0].sum() / mask.sum()
        for function in (namespace["colleague_maps"], solution(task, namespace))
    )
    assert float(planted) == pytest.approx(2 / 9) and float(repaired) > 0.9
