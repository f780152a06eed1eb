"""Feature losses against plain NumPy loops and literal numbers."""

import math

import numpy as np
import pytest
import torch

from fakit.losses import features

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


DISTANCES = {
    "mse": lambda s, t: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / D,
    "cosine": lambda s, t: 1 - float(np.dot(s, t)) / (np.linalg.norm(s) * np.linalg.norm(t)),
    "normalized_mse": lambda s, t: float(((unit(s) - unit(t)) ** 2).sum()) / D,
    "layernorm_mse": lambda s, t: float(((standard(s) - standard(t)) ** 2).sum()) / D,
}


@pytest.mark.parametrize("name", features.LOSSES)
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
