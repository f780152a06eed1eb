"""Attention losses against torch.distributions, NumPy loops and literal numbers."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from fakit.losses import attention

B, H, T = 2, 3, 5
LENGTHS = (5, 3)
MASK = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]


def maps(causal: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps over all T keys, padding included: what is left after masking has to be renormalized by the loss."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, B, H, T, T, generator=generator, dtype=torch.float64)
    if causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    student, teacher = scores.softmax(-1)
    return student, teacher


def test_map_kl_is_torchs_kl_over_the_valid_keys_of_valid_queries():
    student, teacher = maps()
    found = [
        kl_divergence(Categorical(probs=teacher[b, h, q, :n]), Categorical(probs=student[b, h, q, :n])).item()
        for b, n in enumerate(LENGTHS)
        for h in range(H)
        for q in range(n)
    ]
    assert len(found) == H * sum(LENGTHS)
    assert attention.map_kl(student, teacher, MASK).item() == pytest.approx(sum(found) / len(found), rel=1e-12)


def test_over_valid_keys_rows_sum_to_1_over_them_and_padding_may_hold_anything():
    maps = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [torch.nan, torch.inf, -1.0]])
    valid = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    found = attention.over_valid_keys(maps, valid)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_causal_map_kl_leaves_the_future_out():
    student, teacher = maps(causal=True)
    found = [
        sum(
            t * math.log(t / s)
            for s, t in zip(student[b, h, q, : q + 1].tolist(), teacher[b, h, q, : q + 1].tolist(), strict=True)
        )
        for b in range(B)
        for h in range(H)
        for q in range(T)
    ]
    assert attention.map_kl(student, teacher).item() == pytest.approx(sum(found) / len(found), rel=1e-12)


def test_map_mse_is_the_mean_over_pairs_of_valid_tokens():
    student, teacher = (x.numpy() for x in maps())
    found = [
        (student[b, h, q, k] - teacher[b, h, q, k]) ** 2
        for b, n in enumerate(LENGTHS)
        for h in range(H)
        for q in range(n)
        for k in range(n)
    ]
    assert attention.map_mse(*maps(), MASK).item() == pytest.approx(sum(found) / len(found), rel=1e-12)


def test_score_mse_is_the_mean_over_unmasked_pairs():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (20 * torch.randn(2, B, H, T, T, generator=generator, dtype=torch.float64)).unbind()
    past = torch.ones(T, T, dtype=torch.bool).tril()
    pairs = past & MASK[:, None, :, None] & MASK[:, None, None, :]  # (B, 1, T, T)
    masked = [x.masked_fill(~pairs, torch.finfo(torch.float32).min) for x in (student, teacher + 1)]
    found = [
        (float(student[b, h, q, k]) - float(teacher[b, h, q, k]) - 1) ** 2
        for b, n in enumerate(LENGTHS)
        for h in range(H)
        for q in range(n)
        for k in range(q + 1)
    ]
    assert attention.score_mse(*masked, pairs).item() == pytest.approx(sum(found) / len(found), rel=1e-12)


def test_literal_numbers():
    student, teacher = torch.tensor([[[[0.5, 0.5]] * 2]]), torch.tensor([[[[0.75, 0.25]] * 2]])
    assert attention.map_kl(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)  # .75 ln 1.5 + .25 ln .5
    assert attention.map_kl(teacher, student).item() == pytest.approx(0.143841, abs=1e-6)  # .5 ln ⅔ + .5 ln 2
    assert attention.map_mse(student, teacher).item() == 0.0625


def test_a_student_that_gives_exactly_0_is_punished_finitely():
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], requires_grad=True)
    loss = attention.map_kl(student, torch.full((1, 1, 2, 2), 0.5))
    loss.backward()
    assert 10 < loss.item() < 100 and student.grad.isfinite().all()


def test_group_mean_averages_neighbors():
    student, _ = maps()
    grouped = attention.group_mean(student.repeat(1, 2, 1, 1), 3)  # heads 0 1 2 0 1 2 -> (0 1) (2 0) (1 2)
    assert torch.equal(grouped[:, 0], (student[:, 0] + student[:, 1]) / 2)
    assert torch.equal(grouped[:, 1], (student[:, 2] + student[:, 0]) / 2)
    assert torch.allclose(grouped.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    with pytest.raises(ValueError, match="averages 3 heads in equal groups, and 3 is no multiple of 2"):
        attention.group_mean(student, 2)


def test_differing_heads_name_both_and_the_fix():
    with pytest.raises(ValueError, match=r"student has \(1, 2, 4, 4\), teacher has \(1, 3, 4, 4\).*group-mean"):
        attention.map_kl(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 4, 4))
