"""What every loss promises: 0 at equality, nothing from padding, float32 or better, gradients that are right."""

import doctest
import math
from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fakit.losses import attention, divergences, features, kl, logits, outputs, ranking, reduce, relational

B, T, D, V, H = 3, 5, 6, 7, 2
LABELS = torch.tensor([[3, 0, -100, 6, 2], [1, 1, 5, -100, 4], [2, 6, -100, 0, 5]])  # of classes 0 … V - 1
MASK = torch.tensor([[True] * 5, [True, True, True, False, False], [False, True, False, True, True]])


@dataclass
class Case:
    """One loss with everything the tests need to call it."""

    function: object
    kind: str  # "features" | "attention" | "outputs"
    options: dict
    least: float | None = 0.0  # where student equals teacher; None: not the same number everywhere

    def pair(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = {"features": (B, T, D), "attention": (B, H, T, T), "outputs": (B, T, V)}[self.kind]
        draws = [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        if self.kind == "attention":
            draws = [(draw / 3).softmax(-1) for draw in draws]  # no entry so small that finite differences fail
        return draws[0].to(dtype), draws[1].to(dtype)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, labels: Tensor = LABELS) -> Tensor:
        given = {"labels": labels} if "labels" in signature(self.function).parameters else {}
        return self.function(student, teacher, mask, **self.options, **given)

    def spoil(self, values: Tensor, number: float) -> Tensor:
        """The same tensor with `number` wherever MASK says padding (for maps: in rows and in columns)."""
        padding = ~MASK
        if self.kind == "attention":
            where = (padding[:, None, :, None] | padding[:, None, None, :]).expand_as(values)
        else:
            where = padding[..., None].expand_as(values)
        return values.masked_fill(where, number)


CASES = {f"features.{name}": Case(loss, "features", {}) for name, loss in features.LOSSES.items()}
CASES["features.l1_cosine"].least = math.log1p(1 / math.e)
CASES["features.codir"].least = CASES["features.margin_ranking"].least = None
CASES |= {f"attention.{name}": Case(loss, "attention", {}) for name, loss in attention.LOSSES.items()}
CASES |= {f"outputs.{name}": Case(loss, "outputs", {"temperature": 2.5}) for name, loss in outputs.LOSSES.items()}
CASES["outputs.jsd, beta .2"] = Case(outputs.jsd, "outputs", {"temperature": 0.7, "beta": 0.2})
CASES["outputs.skew_forward_kl, alpha .6"] = Case(outputs.skew_forward_kl, "outputs", {"alpha": 0.6})
CASES["outputs.dkd, beta .5"] = Case(outputs.dkd, "outputs", {"temperature": 1.5, "beta": 0.5})
CASES["outputs.rlkd, dynamic"] = Case(
    outputs.rlkd, "outputs", {"temperature": 1.5, "k": 3, "divergence": "jsd", "dynamic": True}
)

every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_loss
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_0_at_equality_and_more_elsewhere(case, mask):
    student, teacher = case.pair()
    equal = case(teacher, teacher.clone(), mask).item()
    assert case.least is None or abs(equal - case.least) < 1e-15
    assert case(student, teacher, mask).item() > equal + 1e-3


@every_loss
def test_0_at_equality_in_float32(case):
    _, teacher = case.pair(torch.float32)
    found = case(teacher, teacher.clone(), MASK).item()
    assert case.least is None or abs(found - case.least) < 1e-7


@every_loss
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e6])
def test_padding_has_no_effect_on_value_and_gradient(case, number):
    student, teacher = case.pair()
    clean = case.spoil(student, 0.25).requires_grad_()
    case(clean, case.spoil(teacher, 0.5), MASK).backward()
    spoilt = case.spoil(student, number).requires_grad_()
    loss = case(spoilt, case.spoil(teacher, number), MASK)
    loss.backward()
    assert loss.item() == case(clean, case.spoil(teacher, 0.5), MASK).item()
    assert torch.equal(spoilt.grad, clean.grad)
    assert (case.spoil(spoilt.grad, 0.0) == spoilt.grad).all()  # and padding itself gets no gradient


@every_loss
def test_a_masked_row_changes_nothing_and_stays_differentiable(case):
    student, teacher = case.pair()
    student.requires_grad_()
    mask = MASK.clone()
    mask[1] = False
    loss = case(student, teacher, mask)
    loss.backward()
    kept = torch.tensor([0, 2])
    assert loss.item() == pytest.approx(case(student[kept], teacher[kept], mask[kept], LABELS[kept]).item(), rel=1e-12)
    assert student.grad.isfinite().all() and (student.grad[1] == 0).all() and (student.grad[kept] != 0).any()


@every_loss
def test_nothing_valid_is_refused(case):
    with pytest.raises(ValueError, match="no valid position in the whole batch: all 15 entries of the mask are False"):
        case(*case.pair(), torch.zeros(B, T, dtype=torch.bool))


def fixed_parts(case: Case, student: Tensor, teacher: Tensor):
    """For a loss with parts that get no gradient: the same loss, from its equation, with these parts as they are at one
    point. Its gradient there is the loss's. None for a loss without such parts.
    """
    tau = case.options.get("temperature", 1.0)

    def kl_of(p, q):
        return (p * (p / q).log()).sum(-1)

    def softmaxes(s, t):
        return (t / tau).softmax(-1), (s / tau).softmax(-1)

    p, q = softmaxes(student.detach(), teacher.detach())
    gap = (p - q).abs()
    if case.function is outputs.akl:
        order = p.argsort(-1, descending=True)
        in_head = p.gather(-1, order).cumsum(-1) <= 0.5
        in_head[..., 0] = True
        share = (gap.gather(-1, order) * in_head).sum(-1) / gap.sum(-1)

        def rows(s, t):
            p, q = softmaxes(s, t)
            return share * kl_of(p, q) + (1 - share) * kl_of(q, p)
    elif case.function is outputs.taid:
        ours = student.detach().clone()  # gradcheck moves it

        def rows(s, t):
            return kl_of(*softmaxes(s, 0.6 * ours + 0.4 * t))
    elif case.function is outputs.lk_hybrid:
        share = (-3 * (1 - gap.sum(-1) / 2)).exp()

        def rows(s, t):
            p, q = softmaxes(s, t)
            return share * kl_of(p, q) + (1 - share) * (p - q).abs().sum(-1) / 2
    else:
        return None
    return lambda s, t, mask: tau**2 * reduce.masked_mean(rows(s, t), mask)


@every_loss
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_gradients_are_those_of_finite_differences(case, mask):
    student, teacher = (x.requires_grad_() for x in case.pair())
    plain = fixed_parts(case, student, teacher)
    assert torch.autograd.gradcheck(lambda s, t: (plain or case)(s, t, mask), (student, teacher))
    if plain is not None:
        found, expected = case(student, teacher, mask), plain(student, teacher, mask)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        for ours, theirs in zip(*(torch.autograd.grad(x, (student, teacher)) for x in (found, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case, dtype):
    student, teacher = case.pair(dtype)
    loss = case(student, teacher, MASK)
    assert loss.dtype == torch.float32
    exact = case(student.double(), teacher.double(), MASK)  # of the same rounded numbers
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert case(student.double(), teacher.double(), MASK).dtype == torch.float64


@every_loss
def test_autocast_changes_nothing(case):
    student, teacher = case.pair(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case(student, teacher, MASK)
    assert inside.dtype == torch.float32 and inside.item() == case(student, teacher, MASK).item()


@every_loss
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_and_large_numbers_give_finite_values_and_gradients(case, scale):
    student, teacher = case.pair(torch.float32)
    if case.kind != "attention":  # whose rows sum to 1
        student, teacher = scale * student, scale * teacher
    loss = case(student.requires_grad_(), teacher, MASK)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@st.composite
def padded_batches(draw, classes: int) -> dict:
    """Sizes of a batch, which tokens are valid, and padding on either side: of any shape, one token and one text too."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    valid = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = draw(st.lists(valid, min_size=rows, max_size=rows).filter(lambda of: any(map(any, of))))
    return {
        "mask": torch.tensor(mask),
        "width": draw(st.integers(classes, 9)),
        "padding": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "seed": draw(st.integers(0, 2**31)),
    }


@every_loss
@given(st.data())
def test_of_any_shape_padding_changes_nothing(case, data):
    batch = data.draw(padded_batches(classes=3 if case.function is ranking.rlkd else 2))  # rlkd refuses two classes
    mask, width, (before, after) = batch["mask"], batch["width"], batch["padding"]
    rows, length = mask.shape
    generator = torch.Generator().manual_seed(batch["seed"])
    shape = (rows, H, length, length) if case.kind == "attention" else (rows, length, width)
    sides = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    sides = [side.softmax(-1) if case.kind == "attention" else side for side in sides]
    labels = torch.randint(0, width, (rows, length), generator=generator)

    def value_and_gradient(sides: list[Tensor], mask: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        student = sides[0].detach().requires_grad_()
        loss = case(student, sides[1], mask, labels)
        (gradient,) = torch.autograd.grad(loss, student)
        return loss.item(), gradient

    tight, gradient = value_and_gradient(sides, mask, labels)
    assert math.isfinite(tight) and gradient.isfinite().all()
    around = (before, after, before, after) if case.kind == "attention" else (0, 0, before, after)
    pad = torch.nn.functional.pad
    wider = [pad(side, around, value=torch.nan) for side in sides]
    wide, spread = value_and_gradient(wider, pad(mask, (before, after)), pad(labels, (before, after), value=-100))
    assert wide == pytest.approx(tight, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(spread, pad(gradient, around), rtol=1e-8, atol=1e-12)


@every_loss
def test_a_mask_of_ones_is_no_mask_and_integers_are_bools(case):
    student, teacher = case.pair()
    ones = torch.ones(B, T, dtype=torch.long)
    assert case(student, teacher, ones).item() == pytest.approx(case(student, teacher).item(), rel=1e-12)
    assert case(student, teacher, MASK.long()).item() == case(student, teacher, MASK).item()


@every_loss
def test_masks_and_shapes_that_do_not_fit_are_refused(case):
    student, teacher = case.pair()
    with pytest.raises(ValueError, match=r"wants a mask of shape \(3, 5\).* the mask has \(3, 4\).*attention_mask"):
        case(student, teacher, MASK[:, :4])
    with pytest.raises(ValueError, match=r"student has \(3, .*teacher has \(2, "):
        case(student, teacher[:2])


MODULES = [features, relational, attention, outputs, reduce, divergences, kl, logits, ranking]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    assert doctest.testmod(module).failed == 0


def test_masked_mean_broadcasts_the_mask_from_the_left():
    values = torch.tensor([[[1.0, 3.0], [100.0, 100.0]], [[5.0, 7.0], [9.0, 11.0]]])  # (2, 2, 2)
    assert reduce.masked_mean(values, torch.tensor([[True, False], [True, True]])).item() == 6.0
    assert reduce.masked_mean(values, torch.tensor([False, True])).item() == 8.0
    assert reduce.masked_mean(values, None).item() == 29.5
