"""Exercises of notebook 03: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from fakit.similarity import sink_share
from fakit.teaching import Exercise

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# what earlier cells of the notebook define
KNOWN = {
    **{"torch": torch, "np": np, "sink_share": sink_share},
    **{"Exercise": Exercise},
    "spread": {"outputs": {(1, 2): 0.11}, "outputs + attention": {(1, 2): 0.07}},
    "agreement": {"outputs": 0.7, "outputs + attention": 0.7},
}


def exercise(name: str, cell: str) -> tuple[Exercise, dict]:
    """The exercise of a check cell, and the cell's namespace."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    namespace = dict(KNOWN)
    exec(next(c.source for c in cells if c.id == cell), namespace)
    return next(v for v in namespace.values() if isinstance(v, Exercise)), namespace


def solution(task: Exercise, namespace: dict):
    """What the last hint defines under the name it gives."""
    hint = task._hints[-1]
    fenced = re.search(r"```python\n(.*?)```", hint, re.DOTALL)
    before = set(namespace)
    exec(fenced[1] if fenced else hint.strip("`"), namespace)
    (made,) = set(namespace) - before
    return namespace[made]


def on_sinks(maps, sinks):
    return (maps * sinks[:, None, None]).sum(-1)  # (B, H, T)


def jsd(p, q):
    m = (p + q) / 2
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum() / 2  # nats


DISTANCE = ("03_attention_maps", "s03-ex1-check")
SINKS = ("03_attention_maps", "s03-ex2-check")
WRITE = ("03_attention_maps", "s03-ex3-check")


@pytest.mark.parametrize("where", [DISTANCE, SINKS, WRITE], ids=lambda where: where[1])
def test_the_solution_in_the_hints_passes(where):
    task, namespace = exercise(*where)
    result = task.check(solution(task, namespace))
    assert result.status == "passes", result


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
        (WRITE, "a", "not its reason"),
        (WRITE, "b", "may be noise"),
        (WRITE, "d", "neither student was trained on"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    result = exercise(*where)[0].check(answer)
    assert result.status == "not right" and message in result.message
