"""Exercises of notebook 09: an empty stub is not done yet, the solution passes,
each classic wrong answer is told what is wrong.
"""

import pytest
import torch

from fakit import capture
from fakit.compression.importance import turning
from tests.families import tiny
from tests.notebooks.cells import assert_ladder, assert_told, exercise, solution


def cosine(before, after, dim=-1):
    return torch.cosine_similarity(before, after, dim=dim)


@pytest.mark.parametrize("name", ["influence", "survivors", "last"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("09", name, {"torch": torch})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda b, a, m: cosine(b[m], a[m]).mean(), "is the cosine itself"),
        (lambda b, a, m: 1 - cosine(b, a).mean(), "counts padding"),
        (lambda b, a, m: 1 - (cosine(b, a) * m).mean(), "divides by every position"),
        (
            lambda b, a, m: 1 - torch.stack([c[k].mean() for c, k in zip(cosine(b, a), m, strict=True)]).mean(),
            "a mean of text means",
        ),
        (lambda b, a, m: ((a - b).norm(dim=-1) / b.norm(dim=-1))[m].mean(), "is the relative change"),
        (lambda b, a, m: 1 - cosine(b[m].flatten(), a[m].flatten(), 0), "as one long vector"),
        (lambda b, a, m: 1 - cosine(b, a, 1).mean(), "along tokens"),
        (lambda b, a, m: 1 - cosine(b, a)[m], "one number is wanted"),
        (lambda b, a, m: 1 - (cosine(b, a) * m).sum() / m.sum(), "until a padded position holds NaN"),
        (lambda b, a, m: 0.5, "expected"),
    ],
)
def test_a_wrong_influence_is_told_what_is_wrong(answer, message):
    assert_told(exercise("09", "influence"), answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, removed: [i for i in range(1, n + 1) if i not in removed], "takes the numbers for the teacher's"),
        (lambda n, removed: 3, "a list of teacher layers"),
        (lambda n, removed: list(range(1, n - len(removed) + 1)), "numbers the student's layers anew"),
        (lambda n, removed: list(removed), "holds what was removed"),
        (lambda n, removed: [1], "expected"),
    ],
)
def test_wrong_survivors_are_told_what_is_wrong(answer, message):
    assert_told(exercise("09", "survivors"), answer, message)


@pytest.mark.parametrize(("letter", "message"), [("a", "what layer 6 did"), ("c", "no layer"), ("d", "many texts")])
def test_a_wrong_letter_is_told_what_was_missed(letter, message):
    assert_told(exercise("09", "last"), letter, message)
    assert_told(exercise("09", "last"), "e", "one letter")


def test_the_solution_is_what_the_library_measures():
    model = tiny("bert").eval()
    ids, valid = torch.arange(5, 17).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batch = {"input_ids": ids, "attention_mask": valid}
    rows = [{name: x[i].tolist() for name, x in batch.items()} for i in range(2)]
    found = turning(model, rows, lambda rows: {n: torch.tensor([row[n] for row in rows]) for n in batch})
    with torch.no_grad():
        states = capture(model, batch, hidden_states=range(3)).hidden_states
    mine = solution(exercise("09", "influence"), {"torch": torch})
    assert found.block_influence[2] == pytest.approx(float(mine(states[1], states[2], valid.bool())), abs=1e-6)
