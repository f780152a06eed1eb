"""Parts of a batch, each weighed by its share, make the whole: every term, every pair of layers, every gradient."""

import pytest
import torch
from torch import Tensor

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, capture
from fakit.training.token_counts import counts, shares
from tests.families import tiny
from tests.scale.ranks import uneven

FAMILIES = {"bert": (False, False), "roberta": (False, True), "gpt2": (True, True)}  # (causal, token_logits)


def objective(attention: str = "kl") -> Objective:
    return Objective(
        LayerMap([(1, 2), (2, 3)]), Features("cosine"), Attention(attention), Outputs("reverse_kl"), Task(weight=0.5)
    )


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def losses(family: str, made: Objective, batch: dict[str, Tensor], share: dict[str, Tensor] | None = None):
    student, teacher = tiny(family, seed=1).double(), tiny(family).double()
    ours, theirs = capture(student, batch, [1, 2], [1, 2]), capture(teacher, batch, [2, 3], [2, 3])
    return student, made(ours, theirs, batch["labels"], share)


@pytest.mark.parametrize("attention", ["kl", "mse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_make_the_whole(family, attention):
    rows, made = uneven(causal=FAMILIES[family][1], rows=8), objective(attention)
    student, whole = losses(family, made, stacked(rows))
    whole.total.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    parts = [stacked(rows[:3]), stacked(rows[3:6]), stacked(rows[6:])]  # 3, 3 and 2 rows
    found = shares([counts(made, part, *FAMILIES[family]) for part in parts], gather=lambda x: x)
    got, plain, gradients = {}, {}, {}
    for part, share in zip(parts, found, strict=True):
        _, breakdown = losses(family, made, part)
        student, weighed = losses(family, made, part, share)
        weighed.total.backward()
        for name, p in student.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad / len(parts)
        for name in breakdown.terms:
            got[name] = got.get(name, 0) + weighed.terms[name] / len(parts)
            plain[name] = plain.get(name, 0) + breakdown.terms[name] / len(parts)
        for name, pairs in weighed.per_layer.items():
            for pair, value in pairs.items():
                got[name, pair] = got.get((name, pair), 0) + value / len(parts)
    for name, value in whole.terms.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )  # float32 shares
    for name in ("features", "task"):  # else the mean of means would do
        assert not torch.allclose(plain[name], whole.terms[name], rtol=1e-3)
    for name, pairs in whole.per_layer.items():
        for pair, value in pairs.items():
            torch.testing.assert_close(got[name, pair], value, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_equal_parts_weigh_exactly_1():
    part = {"features": torch.tensor(21), "task": torch.tensor(3)}
    for share in shares([part, part, part], gather=lambda x: torch.cat([x, x])):
        assert {name: value.item() for name, value in share.items()} == {"features": 1.0, "task": 1.0}


def test_the_other_processes_count():
    other = torch.tensor([[30, 1, 1]])  # features, task, parts
    (share,) = shares([{"features": torch.tensor(10), "task": torch.tensor(0)}], gather=lambda x: torch.cat([x, other]))
    assert {name: value.item() for name, value in share.items()} == {"features": 0.5, "task": 0.0}


def test_counts_of_images_and_of_terms_that_are_there():
    made = Objective(LayerMap([(1, 1)]), features=Features("mse"), task=Task())
    batch = {"pixel_values": torch.zeros(5, 3, 8, 8), "labels": torch.tensor([1, 2, -100, 0, 1])}
    assert {name: n.item() for name, n in counts(made, batch, False, False).items()} == {"features": 5, "task": 4}
