"""Feature losses against plain NumPy loops and literal numbers."""

import math

import numpy as np
import pytest
import torch

from fakit.losses import features, relational

B, T, D = 3, 4, 8
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()


def by_token(distance) -> float:
    """The mean of distance(student row, teacher row) over the tokens that MASK counts, in plain float64 loops."""
    student, teacher = tensors()
    found = [
        distance(student[b, t].numpy(), teacher[b, t].numpy()) for b in range(B) for t in range(T) if MASK[b, t].item()
    ]
    return sum(found) / len(found)


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return 2 * student, teacher + 1


def unit(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(sum(float(v) ** 2 for v in x))


def standard(x: np.ndarray) -> np.ndarray:
    centered = x - sum(x) / len(x)
    return centered / math.sqrt(sum(centered**2) / len(x) + 1e-5)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


DISTANCES = {
    "mse": lambda s, t: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / D,
    "l2": lambda s, t: math.sqrt(sum((a - b) ** 2 for a, b in zip(s, t, strict=True))),
    "cosine": lambda s, t: 1 - float(np.dot(s, t)) / (np.linalg.norm(s) * np.linalg.norm(t)),
    "normalized_mse": lambda s, t: float(((unit(s) - unit(t)) ** 2).sum()) / D,
    "layernorm_mse": lambda s, t: float(((standard(s) - standard(t)) ** 2).sum()) / D,
    "smooth_l1": lambda s, t: sum(huber(a - b) for a, b in zip(s, t, strict=True)) / D,
    "l1_cosine": lambda s, t: float(abs(s - t).sum()) / D + math.log1p(math.exp(-float(unit(s) @ unit(t)))),
    "mobilebert": lambda s, t: (
        100 * float(((standard(s) - standard(t)) ** 2).sum()) / D
        + 5000 * (sum(s) / D - sum(t) / D) ** 2
        + 5 * abs(float(np.var(s)) - float(np.var(t)))
    ),
}


def test_every_loss_is_recomputed_here_or_with_the_relations():
    assert set(DISTANCES) | set(relational.LOSSES) == set(features.LOSSES)


@pytest.mark.parametrize("name", DISTANCES)
def test_equals_a_plain_loop_over_tokens(name):
    student, teacher = tensors()
    assert features.LOSSES[name](student, teacher, MASK).item() == pytest.approx(by_token(DISTANCES[name]), rel=1e-12)


def test_literal_numbers():
    student, teacher = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    assert features.mse(student, teacher).item() == 1.0
    assert features.cosine(student, teacher).item() == pytest.approx(1 - 24 / 25, rel=1e-6)
    assert features.normalized_mse(student, teacher).item() == pytest.approx(0.04, rel=1e-6)  # ½ (.2² + .2²)
    assert features.layernorm_mse(student, teacher).item() == pytest.approx(
        4 / (1 + 4e-5), rel=1e-6
    )  # (-1, 1) against (1, -1)
    assert features.cosine(student, -student).item() == pytest.approx(2.0, rel=1e-6)


def test_normalized_mse_is_2_over_d_cosine():
    student, teacher = tensors()
    assert features.normalized_mse(student, teacher, MASK).item() == pytest.approx(
        2 / D * features.cosine(student, teacher, MASK).item(), rel=1e-12
    )


@pytest.mark.parametrize("loss", [features.cosine, features.normalized_mse, features.layernorm_mse])
def test_blind_to_each_tokens_scale(loss):
    student, teacher = tensors()
    scales = torch.linspace(0.5, 50, B * T, dtype=torch.float64).reshape(B, T, 1)
    assert loss(scales * student, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-3)


def test_layernorm_mse_is_blind_to_an_offset_and_mse_is_not():
    student, teacher = tensors()
    assert features.layernorm_mse(student + 7, teacher).item() == pytest.approx(
        features.layernorm_mse(student, teacher).item(), rel=1e-9
    )
    assert features.mse(student + 7, teacher).item() > features.mse(student, teacher).item() + 10


def test_a_row_of_zeros_has_a_finite_gradient():
    for loss in features.LOSSES.values():
        student = torch.zeros(1, 2, D, requires_grad=True)
        loss(student, torch.randn(1, 2, D)).backward()
        assert student.grad.isfinite().all()


def test_differing_widths_name_both_and_the_projection():
    with pytest.raises(ValueError, match=r"student has \(1, 2, 3\), teacher has \(1, 2, 4\).*projection='linear'"):
        features.mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("name", ["cosine", "normalized_mse"])
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_a_token_of_zeros_has_no_direction_and_a_finite_gradient(name, zero):
    student, teacher = (torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for side, values in (("student", student), ("teacher", teacher)):
        if zero in (side, "both"):
            values[0, 1] = 0.0
    student.requires_grad_()
    loss = features.LOSSES[name](student, teacher)
    loss.backward()
    others = features.LOSSES[name](student.detach(), teacher, torch.tensor([[True, False, True]])).item()
    own = 0.0 if zero == "both" else 0.5
    assert loss.item() == pytest.approx((2 * others + own * (1 if name == "cosine" else 2 / 8)) / 3, rel=1e-5)
    assert student.grad.abs().max() < 10 and student.grad[0, [0, 2]].norm() > 0
    assert student.grad[0, 1].abs().max() < 1e-8


def test_smooth_l1_is_quadratic_below_beta_and_linear_above():
    student, teacher = torch.tensor([[[0.5, 3.0]]]), torch.zeros(1, 1, 2)
    assert features.smooth_l1(student, teacher).item() == (0.125 + 2.5) / 2
    assert features.smooth_l1(student, teacher, beta=2.0).item() == (0.0625 + 2.0) / 2
    assert features.smooth_l1(student, teacher, beta=1e-9).item() == pytest.approx(1.75)  # the L1 norm
    with pytest.raises(ValueError, match=r"smooth_l1 wants beta above 0.*found 0"):
        features.smooth_l1(student, teacher, beta=0)


def test_l1_cosine_has_its_minimum_where_the_two_agree():
    """Lillama's loss as its code has it: l1_loss(a, y).mean(-1) - log sigmoid(cosine_similarity(a, y))."""
    student, teacher = tensors()
    l1 = (student - teacher).abs().mean(-1)
    theirs = l1 - torch.sigmoid(torch.nn.functional.cosine_similarity(student, teacher, dim=-1)).log()
    assert features.l1_cosine(student, teacher).item() == pytest.approx(theirs.mean().item(), rel=1e-12)
    least = features.l1_cosine(teacher, teacher).item()
    assert least == pytest.approx(math.log(1 + 1 / math.e), rel=1e-12)
    for step in (1e-3, -1e-3):
        assert features.l1_cosine(teacher + step, teacher).item() > least
        assert features.l1_cosine(teacher * (1 + step), teacher).item() > least


def test_mobilebert_sees_the_offset_and_the_scale_that_layernorm_mse_does_not():
    _, teacher = tensors()
    assert features.mobilebert(teacher + 0.5, teacher, beta=1.0, gamma=0.0, hidden=0.0).item() == pytest.approx(0.25)
    variance = teacher.var(-1, correction=0).mean().item()
    found = features.mobilebert(3 * teacher, teacher, hidden=0.0, beta=0.0, gamma=1.0).item()
    assert found == pytest.approx(8 * variance, rel=1e-12)


def numbers(*shape: int, shift: int) -> torch.Tensor:
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((7 * count + shift) % 11 - 5).view(shape) / 4


def test_equal_textbrewer():
    """TextBrewer 0.2.1.post1 (PyPI), its losses run on these numbers. Its `pkd_loss` looks at the first token alone and
    sums over dimensions. Its masked `mmd_loss` divides by the length in place of the width, which later code mended.
    """
    student, teacher = numbers(2, 4, 6, shift=1), numbers(2, 4, 6, shift=5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    assert features.mse(student, teacher, mask).item() == pytest.approx(1.75625, rel=1e-12)  # hid_mse_loss
    assert features.cosine(student, teacher, mask).item() == pytest.approx(1.4283883599254583, rel=1e-9)  # cos_loss
    first = features.normalized_mse(student[:, :1], teacher[:, :1]).item()
    assert 6 * first == pytest.approx(2.68745738392324, rel=1e-12)  # pkd_loss
    unmasked = features.nst(student, teacher[..., :3]).item()  # mmd_loss([S, S], [T, T])
    assert unmasked == pytest.approx(0.053056504991319434, rel=1e-12)
