"""Output losses against torch.distributions, SciPy and literal numbers."""

import math
from inspect import signature

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax
from torch.distributions import Categorical, kl_divergence

from fakit.losses import outputs

B, T, V = 2, 4, 9
MASK = torch.tensor([[True, True, True, False], [False, True, False, True]])
TEMPERATURES = (0.5, 1.0, 3.0)
temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (4 * torch.randn(B, T, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def loss_of(name: str):
    """The loss of that name; one that looks at labels has class 1 everywhere."""
    loss = outputs.LOSSES[name]
    if "labels" not in signature(loss).parameters:
        return loss
    return lambda s, t, *given: loss(s, t, *given, labels=torch.ones(s.shape[:-1], dtype=torch.long))


def by_position(distance) -> float:
    student, teacher = (x.numpy() for x in logits())
    found = [distance(student[b, t], teacher[b, t]) for b in range(B) for t in range(T) if MASK[b, t].item()]
    return sum(found) / len(found)


@temperatures
def test_forward_and_reverse_kl_are_torchs_times_tau_squared(temperature):
    student, teacher = logits()
    q, p = (Categorical(logits=z[MASK] / temperature) for z in (student, teacher))
    for loss, expected in ((outputs.forward_kl, kl_divergence(p, q)), (outputs.reverse_kl, kl_divergence(q, p))):
        assert loss(student, teacher, MASK, temperature).item() == pytest.approx(
            temperature**2 * expected.mean().item(), rel=1e-12
        )


@temperatures
def test_jsd_is_scipys_at_one_half(temperature):
    expected = by_position(
        lambda s, t: temperature**2 * jensenshannon(softmax(t / temperature), softmax(s / temperature)) ** 2
    )
    assert outputs.jsd(*logits(), MASK, temperature).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.8])
def test_jsd_of_any_beta(beta):
    def distance(s, t):
        p, q = softmax(t / 2), softmax(s / 2)
        m = beta * p + (1 - beta) * q
        return 4 * (beta * rel_entr(p, m).sum() + (1 - beta) * rel_entr(q, m).sum())

    assert outputs.jsd(*logits(), MASK, 2.0, beta=beta).item() == pytest.approx(by_position(distance), rel=1e-12)


def test_jsd_divided_by_its_small_side_tends_to_the_two_kls():
    small = 1e-7
    forward, reverse = (f(*logits(), MASK, 2.0).item() for f in (outputs.forward_kl, outputs.reverse_kl))
    assert outputs.jsd(*logits(), MASK, 2.0, beta=small).item() / small == pytest.approx(forward, rel=1e-4)
    assert outputs.jsd(*logits(), MASK, 2.0, beta=1 - small).item() / small == pytest.approx(reverse, rel=1e-4)
    assert abs(forward - reverse) > 0.1  # or the two lines above could be swapped unseen


@temperatures
def test_logit_mse_does_not_depend_on_the_temperature(temperature):
    expected = by_position(lambda s, t: float(((s - t) ** 2).mean()))
    assert outputs.logit_mse(*logits(), MASK, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_tau_squared_keeps_the_gradients_size():
    student, teacher = logits()
    limits = {}
    for temperature in (100.0, 1000.0):
        z = student.clone().requires_grad_()
        outputs.forward_kl(z, teacher, MASK, temperature).backward()
        limits[temperature] = z.grad
    assert limits[1000.0].norm().item() == pytest.approx(limits[100.0].norm().item(), rel=0.05)
    # Hinton et al. 2015, eq. 4: at high temperature the gradient is that of matching centered logits
    centered = [z - z.mean(-1, keepdim=True) for z in (student, teacher)]
    expected = (centered[0] - centered[1]) / V * MASK[..., None] / MASK.sum()
    assert torch.allclose(limits[1000.0], expected, rtol=0.02, atol=1e-4)


def test_literal_numbers():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])  # Q = (½, ½), P = (¾, ¼)
    assert outputs.forward_kl(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)
    assert outputs.reverse_kl(student, teacher).item() == pytest.approx(0.143841, abs=1e-6)
    assert outputs.jsd(student, teacher).item() == pytest.approx(0.033822, abs=1e-6)
    assert outputs.logit_mse(student, teacher).item() == pytest.approx(0.603474, abs=1e-6)  # ½ (ln 3)²
    assert outputs.forward_kl(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * 0.130812, abs=4e-6)


@pytest.mark.parametrize("name", outputs.LOSSES)
def test_classification_logits_with_a_mask_over_rows(name):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.tensor([True, False, True, True])
    loss = loss_of(name)
    assert loss(student, teacher, rows).item() == pytest.approx(loss(student[rows], teacher[rows]).item(), rel=1e-12)


@pytest.mark.parametrize("name", outputs.LOSSES)
def test_extreme_logits_stay_finite(name):
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = loss_of(name)(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_forward_kl_is_cross_entropy_minus_entropy():
    student, teacher = (x.numpy() for x in logits())
    p = softmax(teacher, -1)
    cross, own = (-(p * log_softmax(z, -1)).sum(-1)[MASK.numpy()].mean() for z in (student, teacher))
    assert outputs.forward_kl(*logits(), MASK).item() == pytest.approx(float(np.subtract(cross, own)), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", outputs.LOSSES)
def test_impossible_temperatures_are_refused(name, temperature):
    with pytest.raises(ValueError, match="wants a finite temperature above 0"):
        loss_of(name)(*logits(), MASK, temperature)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2, math.nan])
def test_betas_without_a_mixture_name_the_limits(beta):
    with pytest.raises(ValueError, match=r"0 < beta < 1.*forward_kl and reverse_kl"):
        outputs.jsd(*logits(), beta=beta)


def test_differing_vocabularies_name_both_and_the_fix():
    with pytest.raises(ValueError, match=r"student has \(1, 2, 5\), teacher has \(1, 2, 6\).*Outputs\(vocab_size=N\)"):
        outputs.forward_kl(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6))


@pytest.mark.parametrize("name", outputs.LOSSES)
def test_an_entry_out_of_both_vocabularies_counts_0_and_gets_no_gradient(name):
    student, teacher = logits()
    expected = loss_of(name)(student[..., :-2], teacher[..., :-2], MASK, 0.5)
    student, teacher = student.clone(), teacher.clone()
    student[..., -2:] = teacher[..., -2:] = -math.inf
    loss = loss_of(name)(student.requires_grad_(), teacher, MASK, 0.5)
    loss.backward()
    classes = V / (V - 2) if name == "logit_mse" else 1.0  # a mean over classes counts the entries, as equal
    assert loss.item() * classes == pytest.approx(expected.item(), rel=1e-12)
    assert student.grad.isfinite().all() and (student.grad[..., -2:] == 0).all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "out_of"),
    [("forward_kl", "student"), ("reverse_kl", "teacher"), ("logit_mse", "student"), ("logit_mse", "teacher")],
)
def test_an_entry_out_of_one_vocabulary_alone_is_huge(name, out_of):
    sides = {"student": torch.randn(2, V, requires_grad=True), "teacher": torch.randn(2, V)}
    with torch.no_grad():
        sides[out_of][:, 0] = -math.inf
    loss = loss_of(name)(sides["student"], sides["teacher"])
    loss.backward()
    assert loss.item() > 1e30 and not sides["student"].grad.isnan().any()


@pytest.mark.parametrize("out_of", ["student", "teacher"])
def test_jsd_stays_below_ln_2_whatever_is_out(out_of):
    sides = {"student": torch.zeros(1, 2, requires_grad=True), "teacher": torch.zeros(1, 2)}
    with torch.no_grad():
        sides[out_of][:, 0] = -math.inf
    loss = outputs.jsd(sides["student"], sides["teacher"])
    loss.backward()
    half = np.array([0.5, 0.5])
    assert loss.item() == pytest.approx(jensenshannon(half, np.array([0.0, 1.0])) ** 2, rel=1e-6)
    assert sides["student"].grad.isfinite().all()


def test_a_student_below_its_out_entries_still_learns_from_the_others():
    student = torch.tensor([[-math.inf, 0.0, 0.0]], requires_grad=True)
    outputs.reverse_kl(student, torch.tensor([[0.0, 2.0, 0.0]])).backward()  # Q = 0 < P is no infinity here
    assert student.grad[0, 0] == 0 and student.grad[0, 1] < 0 < student.grad[0, 2]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("classes", [3, 9000])
def test_small_differences_survive_a_high_temperature_in_float32(name, classes):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(8, classes, generator=generator) for _ in range(2))
    ours = student.clone().requires_grad_()
    exact = student.double().requires_grad_()
    found = loss_of(name)(ours, teacher, None, 1000.0)
    expected = loss_of(name)(exact, teacher.double(), None, 1000.0)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (ours.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()
    # Hinton et al. 2015: in the limit half the variance of the differences (a quarter of that for the JSD at β = ½)
    variance = (student - teacher).double().var(-1, correction=0).mean().item() / 2
    assert expected.item() == pytest.approx(variance / (4 if name == "jsd" else 1), rel=0.02)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 0.1, 1.0])
def test_near_its_teacher_a_student_gets_its_true_loss(name, apart):
    generator = torch.Generator().manual_seed(2)
    teacher = 3 * torch.randn(4, 2000, generator=generator)
    teacher[:, 0] -= 200.0  # a class that the teacher gives 0 in float32
    student = teacher + apart * torch.randn(4, 2000, generator=generator)
    student[:, 0] += 190.0
    found, expected = (
        loss_of(name)(s, t).item() for s, t in ((student, teacher), (student.double(), teacher.double()))
    )
    assert expected > 0 and found == pytest.approx(expected, rel=2e-3 if name == "jsd" else 2e-5)


def test_a_class_that_the_teacher_excludes_is_unlearned_though_the_loss_is_small():
    student = torch.tensor([[8.0, 8.0, 4.0]], requires_grad=True)  # Q of the last is 0.9 %
    teacher = torch.tensor([[0.0, 0.0, -300.0]])
    loss = outputs.forward_kl(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1 - math.exp(-4) / (2 + math.exp(-4))), rel=1e-5)
    assert student.grad[0, 2].item() == pytest.approx(math.exp(-4) / (2 + math.exp(-4)), rel=1e-5)
