"""Divergences over the k largest and the rest: against sums over joined classes, and as bounds of the full ones."""

import math

import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from fakit.losses import outputs
from fakit.losses.top_k import SERVED, TopK, buckets, excess_at_most

V = 40
MASK = torch.tensor([[True, True, False], [True, False, True]])


def logits(scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(2, 3, V, generator=generator, dtype=torch.float64) for _ in range(2))


def largest(teacher: torch.Tensor, k: int, *temperatures: float) -> TopK:
    """By NumPy's sorting and sums."""
    log_p = torch.from_numpy(log_softmax(teacher.numpy(), -1))
    order = log_p.argsort(dim=-1, descending=True)
    rest = log_p.gather(-1, order[..., k:])
    return TopK(
        log_p.gather(-1, order[..., :k]),
        order[..., :k],
        {tau: (rest / tau).exp().sum(-1).log() for tau in temperatures or (1.0,)},
        teacher.shape[-1],
    )


def loss(name: str, student, top, temperature=1.0, mask=None) -> float:
    return outputs.LOSSES[name](*buckets(student, top, temperature), mask, temperature).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_is_the_sum_over_joined_classes(temperature):
    student, teacher = logits()
    expected = []
    for b, t in MASK.nonzero().tolist():
        p, q = (softmax(z[b, t].numpy() / temperature) for z in (teacher, student))
        kept = teacher[b, t].argsort(descending=True)[:5].numpy()
        joined = [[*x[kept].tolist(), 1 - x[kept].sum()] for x in (p, q)]
        expected.append(temperature**2 * rel_entr(*joined).sum())
    found = loss("forward_kl", student, largest(teacher, 5, 1.0, temperature), temperature, MASK)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-10)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_served_loss_is_a_lower_bound_that_rises_with_k_to_the_full_one(name, temperature):
    for seed in range(20):
        student, teacher = logits(seed=seed)
        full = outputs.LOSSES[name](student, teacher, None, temperature).item()
        found = [loss(name, student, largest(teacher, k, temperature), temperature) for k in (1, 3, 10, 30, V - 1)]
        assert found == sorted(found) and found[0] >= 0
        assert found[-1] == pytest.approx(full, rel=1e-6) and found[-1] <= full * (1 + 1e-9)
        assert found[1] < 0.999 * full  # or nothing was joined


@pytest.mark.parametrize("name", SERVED)
def test_it_is_0_where_the_two_agree_and_whatever_the_rest(name):
    _, teacher = logits()
    top = largest(teacher, 4)
    rest = torch.ones_like(teacher).scatter(-1, top.indices, 0.0).bool()
    other = teacher.clone()
    other[rest] = teacher[rest].view(2, 3, -1).flip(-1).flatten()  # the same mass, spread otherwise
    for student in (teacher, other, other + 7):
        assert loss(name, student, top) == pytest.approx(0, abs=1e-12)
    assert outputs.LOSSES[name](other, teacher).item() > 1e-3


def test_a_rest_that_both_spread_alike_makes_it_exact():
    student, teacher = logits()
    top = largest(teacher, 4)
    rest = torch.ones_like(teacher).scatter(-1, top.indices, 0.0).bool()
    student[rest] = teacher[rest] - 1.5
    assert loss("forward_kl", student, top) == pytest.approx(outputs.forward_kl(student, teacher).item(), rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_forward_kl_lacks_is_within_its_bound(temperature):
    tightest = math.inf
    for seed in range(30):
        student, teacher = logits(scale=1 + seed / 10, seed=seed)
        for k in (1, 5, 20):
            top = largest(teacher, k, temperature)
            ours, theirs = buckets(student, top, temperature)
            full, joined = (
                torch.distributions.kl_divergence(
                    *(torch.distributions.Categorical(logits=z / temperature) for z in two)
                )
                for two in ((teacher, student), (theirs, ours))
            )
            at_most = excess_at_most(student, top, temperature)
            assert (full - joined <= at_most + 1e-12).all() and (full - joined >= -1e-12).all()
            tightest = min(tightest, (at_most - (full - joined)).min().item())
    # a rest of one class on the teacher's side, the student's unlikeliest: nothing is lost by the bound
    teacher, student = torch.tensor([[4.0, 3.0, -80.0, -80.0]]).double(), torch.tensor([[4.0, -2.0, 1.0, 1.0]]).double()
    top = largest(teacher[None], 1).map(lambda x: x[0])
    full = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=z) for z in (teacher, student)))
    joined = outputs.forward_kl(*buckets(student, top)).item()
    assert excess_at_most(student, top).item() == pytest.approx(full.item() - joined, rel=1e-9)
    assert tightest > 0


def test_total_variation_lacks_at_most_the_smaller_rest():
    for seed in range(20):
        student, teacher = logits(seed=seed)
        top = largest(teacher, 3)
        lost = outputs.tvd(student, teacher).item() - loss("tvd", student, top)
        rests = [z.softmax(-1)[..., -1] for z in buckets(student, top)]
        assert 0 <= lost <= torch.minimum(*rests).mean().item()


def test_the_gradient_is_autograds_and_leaves_the_rest_spread_as_it_is():
    student, teacher = logits()
    top = largest(teacher, 4)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: outputs.forward_kl(*buckets(z, top)), student)
    outputs.forward_kl(*buckets(student, top)).backward()
    rest = torch.ones_like(teacher).scatter(-1, top.indices, 0.0).bool()
    # every class of the rest is pulled in proportion to its own probability
    pull = (student.grad / student.detach().softmax(-1))[rest].view(2, 3, -1)
    assert torch.allclose(pull, pull[..., :1].expand_as(pull), rtol=1e-9)


def test_classes_out_of_the_vocabulary_and_half_precision():
    student, teacher = logits()
    student[..., -3:] = teacher[..., -3:] = -torch.inf
    top = largest(teacher, 4)
    full = outputs.forward_kl(student, teacher).item()
    assert 0 < loss("forward_kl", student, top) < full
    assert loss("forward_kl", student.bfloat16(), top) == pytest.approx(loss("forward_kl", student, top), rel=0.02)


def test_what_does_not_fit_is_refused():
    student, teacher = logits()
    top = largest(teacher, 4)
    with pytest.raises(ValueError, match=r"temperature 2.0 was requested, and of the 4 largest .* known at 1.0"):
        buckets(student, top, 2.0)
    for other in (student[..., :-1], student[:1]):
        with pytest.raises(ValueError, match="4 largest of 40 logits are known at positions"):
            buckets(other, top)


def test_the_losses_that_are_not_served():
    assert {*outputs.LOSSES} - {*SERVED} == {"akl", "taid", "dkd", "uld", "logit_mse", "rlkd"}
    student, teacher = logits()
    for name in ("uld", "logit_mse"):  # over joined classes they are no bounds
        assert loss(name, student, largest(teacher, 3)) > outputs.LOSSES[name](student, teacher).item()
