"""Two vocabularies over the tokens that both have: probabilities, one class for the others, and its gradient."""

import pytest
import torch

from fakit.losses import outputs
from fakit.losses.shared_tokens import SERVED, over_shared

SHARED = torch.tensor([[0, 4], [3, 1], [5, 2]])


def logits(sizes=(7, 6)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_probabilities_stay_and_the_others_are_one_class(temperature):
    sides = logits()
    for z, made, ids in zip(sides, over_shared(*sides, SHARED, temperature), SHARED.unbind(1), strict=True):
        p, found = (z / temperature).softmax(-1), (made / temperature).softmax(-1)
        torch.testing.assert_close(found[:, :-1], p[:, ids])
        torch.testing.assert_close(found[:, -1], 1 - p[:, ids].sum(-1))


@pytest.mark.parametrize("name", SERVED)
def test_it_is_0_where_both_agree_and_never_more_than_over_one_vocabulary(name):
    student, teacher = logits((7, 7))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    every = torch.stack([torch.arange(7), order.argsort()], 1)  # the teacher's tokens stand in another order
    whole = outputs.LOSSES[name](student, teacher, temperature=1.0)
    ours, theirs = over_shared(student, teacher[:, order], every)
    torch.testing.assert_close(outputs.LOSSES[name](ours, theirs), whole)
    fewer = outputs.LOSSES[name](*over_shared(student, teacher[:, order], every[:4]))
    assert 0 < fewer.item() < whole.item()
    same = outputs.LOSSES[name](*over_shared(teacher, teacher[:, order], every[:4]))
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_gradients_and_a_side_without_others():
    assert torch.autograd.gradcheck(lambda s, t: outputs.forward_kl(*over_shared(s, t, SHARED, 2.0)), logits())
    student, teacher = logits((3, 6))
    ours, theirs = over_shared(
        student, teacher, SHARED.clone().fill_diagonal_(0) * 0 + torch.tensor([[0, 4], [1, 1], [2, 2]])
    )
    assert ours.shape == theirs.shape == (4, 3)
    torch.testing.assert_close(theirs.softmax(-1), teacher[:, [4, 1, 2]].softmax(-1))


def test_what_is_shared_must_be_there():
    with pytest.raises(ValueError, match=r"up to 5 of the student and 4 of the teacher, .* have 5 and 6 entries"):
        over_shared(*logits((5, 6)), SHARED)
    with pytest.raises(ValueError, match=r"0 tokens are shared.*Outputs\('uld'\)"):
        over_shared(*logits(), SHARED[:0])
