"""The streamed attention loss equals the plain one over full maps, in value and in gradient, without storing a map."""

import pytest
import torch

from fakit.losses import streamed
from fakit.losses.attention import map_kl, streamed_map_kl


def inputs(B=2, H=4, H_kv=4, T=13, d_student=5, d_teacher=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, d):
        return torch.randn(B, heads, T, d, generator=generator, dtype=torch.float64).to(dtype)

    return draw(H, d_student), draw(H_kv, d_student), draw(H, d_teacher), draw(H, d_teacher)


def plain(sq, sk, tq, tk, mask, student_scale, teacher_scale, causal):
    maps = []
    for q, k, scale in ((sq, sk, student_scale), (tq, tk, teacher_scale)):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -1e30)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e30)
        maps.append(scores.softmax(-1))
    return map_kl(*maps, mask)


MASK = torch.ones(2, 13, dtype=torch.bool)
MASK[0, 9:] = False
MASK[1, :3] = False


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("block", [1, 500, 2**20])
def test_value_and_gradient_equal_the_plain_loss(monkeypatch, dtype, tolerance, causal, mask, heads, block):
    monkeypatch.setattr(streamed, "_BLOCK", block)
    sq, sk, tq, tk = inputs(H_kv=heads, dtype=dtype)
    values, gradients = [], []
    for function in (plain, streamed_map_kl):
        q, k = sq.clone().requires_grad_(), sk.clone().requires_grad_()
        loss = function(q, k, tq, tk, mask, 0.4, 0.3, causal)
        (3 * loss).backward()
        values.append(loss.detach())
        gradients += [q.grad, k.grad]
    torch.testing.assert_close(values[1], values[0], rtol=tolerance, atol=0)
    scale = gradients[0].abs().max().item()
    for found, expected in ((gradients[2], gradients[0]), (gradients[3], gradients[1])):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_zero_at_equality_and_gradcheck():
    sq, sk, _, _ = inputs()
    assert streamed_map_kl(sq, sk, sq, sk, MASK, 0.5, 0.5).item() == 0.0
    sq, sk, tq, tk = inputs(B=1, H=2, H_kv=1, T=4)
    tk = tk[:, :1]
    arguments = (sq.requires_grad_(), sk.requires_grad_(), tq, tk, MASK[:1, :4], 0.4, 0.3, True)
    assert torch.autograd.gradcheck(streamed_map_kl, arguments)


def test_padding_has_no_effect_not_even_nan():
    sq, sk, tq, tk = inputs()
    expected = streamed_map_kl(sq, sk, tq, tk, MASK)
    noise = ~MASK[:, None, :, None]
    found = streamed_map_kl(*(x.masked_fill(noise, float("nan")) for x in (sq, sk, tq, tk)), MASK)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_half_precision_inputs_are_compared_in_float32():
    arguments = [x.to(torch.bfloat16) for x in inputs()]
    found = streamed_map_kl(*arguments, MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, streamed_map_kl(*(x.float() for x in arguments), MASK), rtol=1e-6, atol=0)


def test_shapes_that_do_not_fit_are_refused_with_both_sides():
    sq, sk, tq, tk = inputs()
    with pytest.raises(ValueError, match=r"student has \(2, 4, 13, 5\).*teacher \(2, 3, 13, 7\).*group-mean"):
        streamed_map_kl(sq, sk, tq[:, :3], tk[:, :3])
    with pytest.raises(ValueError, match="no valid position"):
        streamed_map_kl(sq, sk, tq, tk, torch.zeros(2, 13, dtype=torch.bool))
