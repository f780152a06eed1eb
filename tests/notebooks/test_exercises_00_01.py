"""Exercises of notebooks 00 and 01: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import linecache
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch

from fakit import LayerMap
from fakit.teaching import Exercise

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TEACHER, STUDENT = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
RAW = {"features": 0.2, "attention": 0.5, "outputs": 1.4, "task": 0.9}
SIMILARITY = np.random.default_rng(0).uniform(0.1, 0.95, (3, 7))  # no two layer pairs alike
# what earlier cells of the notebooks define
KNOWN = {
    **{"torch": torch, "LayerMap": LayerMap, "Exercise": Exercise, "S": 2, "T": 6},
    **{
        "teacher_logits": 3 * TEACHER,
        "ours": SimpleNamespace(logits=STUDENT),
        "theirs": SimpleNamespace(logits=TEACHER),
    },
    "after": SimpleNamespace(terms={name: torch.tensor(value) for name, value in RAW.items()}),
    "similarity": SimpleNamespace(values=SIMILARITY),
}

TEMPERATURE = ("00_start_here", "s10-exercise-1")
OUTPUTS = ("00_start_here", "s10-exercise-2")
WEIGHT = ("00_start_here", "s10-exercise-3")
BY_HAND = ("01_layer_mapping", "s07-exercise-1")
OFF_BY_ONE = ("01_layer_mapping", "s07-exercise-2")
MEAN = ("01_layer_mapping", "s07-exercise-3")
EVERY = [TEMPERATURE, OUTPUTS, WEIGHT, BY_HAND, OFF_BY_ONE, MEAN]


def exercise(name: str, cell: str) -> tuple[Exercise, dict]:
    """The exercise of a cell, and the cell's namespace."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    namespace = dict(KNOWN)
    exec(next(c.source for c in cells if c.id == cell), namespace)
    return next(v for v in namespace.values() if isinstance(v, Exercise)), namespace


def stub(name: str, cell: str, namespace: dict):
    """What the reader finds in the answer's cell: that cell without its last line, which checks it."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    source = next(c.source for c in cells if c.id == cell.replace("exercise", "answer"))
    *lines, last = source.strip().splitlines()
    source = "\n".join(lines)
    linecache.cache[cell] = (
        len(source),
        None,
        source.splitlines(keepends=True),
        cell,
    )  # as IPython does with its cells
    exec(compile(source, cell, "exec"), namespace)
    return namespace[re.search(r"check\((\w+)\)", last)[1]]


@pytest.mark.parametrize("where", EVERY, ids=lambda where: "-".join(where))
def test_the_solution_in_the_hints_passes_and_the_stub_is_not_done(where):
    task, namespace = exercise(*where)
    assert task.check(stub(*where, namespace)).status == "not done yet"
    code = re.search(r"```python\n(.*?)```", task._hints[-1], re.DOTALL)[1]
    exec(code, namespace)
    (name,) = {
        line.split()[0 if "=" in line else 1].split("(")[0]
        for line in code.splitlines()
        if re.match(r"(def )?my_", line)
    }
    result = task.check(namespace[name])
    assert result.status == "passes", result


def soft(logits, tau):
    return (logits / tau).softmax(-1)


def forward(student, teacher, tau):
    p, q = soft(teacher, tau), soft(student, tau)
    return (p * (p / q).log()).sum(-1)  # (B,)


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        (TEMPERATURE, 0.01, "more heat"),
        (TEMPERATURE, 1000.0, "less heat"),
        (OUTPUTS, lambda s, t, tau: forward(s, t, tau).mean(), "but for the factor τ²"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(t, s, tau).mean(), "the reverse divergence"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(s, t, tau).mean() / s.shape[-1], "divide by the number of labels"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(s, t, tau).sum(), "sum over the texts"),
        (
            OUTPUTS,
            lambda s, t, tau: -(tau**2) * (soft(t, tau) * soft(s, tau).log()).sum(-1).mean(),
            "the cross-entropy",
        ),
        (OUTPUTS, lambda s, t, tau: 0.0, "it gives 0.0000"),
        (WEIGHT, 1.4 / 1.6, "that is the inverse"),
        (WEIGHT, 1.0, "47 % of the total"),
        (BY_HAND, [(0, 3), (1, 6), (2, 9), (3, 12)], "your student layers are 0 to 3"),
        (BY_HAND, [(1, 6), (2, 12)], r"needs one teacher layer; yours are [1, 2]"),
        (BY_HAND, [(1, 4), (2, 7), (3, 10), (4, 13)], "T13 does not exist"),
        (BY_HAND, LayerMap.reverse(4, 12), "that is `reverse`"),
        (BY_HAND, [(1, 1), (2, 4), (3, 7), (4, 10)], "ends two too early"),
        (BY_HAND, LayerMap.first(4, 12), "S4 learns from T4"),
        (BY_HAND, LayerMap.last(4, 12), "evenly spaced means all alike"),
        (OFF_BY_ONE, [2, 4, 6], "what the colleague believes"),
        (OFF_BY_ONE, [0, 2, 4], "entry 1 is not layer 0"),
        (OFF_BY_ONE, [1, 3, 5, 7], "entry 7 does not exist"),
        (MEAN, float(SIMILARITY[1, 3] + SIMILARITY[2, 6]) / 2, "the mean of `uniform`"),
        (MEAN, float(SIMILARITY[1, 6] + SIMILARITY[2, 3]), "divide by their number"),
        (MEAN, float(SIMILARITY.mean()), "the whole matrix"),
        (MEAN, float(SIMILARITY[0, 5] + SIMILARITY[1, 2]) / 2, "row and column 0 are the embeddings"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    result = exercise(*where)[0].check(answer)
    assert result.status == "not right" and message in result.message, result


def test_logits_multiplied_by_the_temperature_are_recognised():
    task, _ = exercise(*TEMPERATURE)
    taus = torch.linspace(0.001, 2, 20_000).double()
    highest = (3 * TEACHER[0].double() * taus[:, None]).softmax(-1).max(-1).values
    assert "you multiply the logits by τ" in task.check(taus[(highest - 0.5).abs().argmin()].item()).message
