"""Heads and losses over chunks of tokens: equal to the losses over whole logits, whatever the chunk."""

import doctest
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fakit.losses import outputs
from fakit.losses.fused import chunked, liger
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.fused.output_head import Head
from fakit.losses.logits import asked_of
from fakit.losses.task import task_loss

B, T, V = 3, 7, 11
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [False, True, True, False, True, True, False]])
divergences = pytest.mark.parametrize("divergence", outputs.LOSSES)
LABELED = [name for name, formula in outputs.PER_POSITION.items() if "labels" in asked_of(formula)]


def make(dtype: torch.dtype = torch.float64, student: int = V, teacher: int = V, bias: bool = True) -> list[Tensor]:
    """Hidden states and heads of a student of width 4 and a teacher of width 6; the student's require a gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, T, 4), (student, 4), (student,), (B, T, 6), (teacher, 6), (teacher,))
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    if not bias:
        draws[2] = draws[5] = None
    return [x if x is None else x.requires_grad_(i < 3) for i, x in enumerate(draws)]


def heads(tensors, finish=(None, None)) -> tuple[Head, Head]:
    """The student's head and the teacher's of the six tensors that `make` gives."""
    return Head(*tensors[:3], finish[0]), Head(*tensors[3:], finish[1])


def labels() -> Tensor:
    """Some at positions that the mask leaves out, some absent where the mask counts."""
    found = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(4))
    found[0, ::2], found[2, :2] = -100, -100
    return found


def plain(
    tensors, mask, divergence, temperature, outputs_weight, task_labels, task_weight, cut=None, finish=(None, None)
):
    """The same three numbers from whole logits and the functions that notebooks show."""
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = tensors
    student = torch.nn.functional.linear(student_hidden, student_weight, student_bias)  # (B, T, V)
    teacher = torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias)
    student, teacher = (z if f is None else f(z) for z, f in zip((student, teacher), finish, strict=True))
    given = {"labels": task_labels} if divergence in LABELED else {}
    compared = outputs.LOSSES[divergence](student[..., :cut], teacher[..., :cut], mask, temperature, **given)
    task = task_loss(student, task_labels)
    return outputs_weight * compared + task_weight * task, compared, task


def assert_equal(found, expected, leaves, tolerance: float) -> None:
    """Values and gradients, of each of the three results."""
    leaves = [leaf for leaf in leaves if leaf is not None]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
        gradients = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, theirs))
        for mine, reference in zip(*gradients, strict=True):
            assert mine.dtype == reference.dtype
            assert (mine - reference).norm() <= tolerance * reference.norm()


@divergences
@pytest.mark.parametrize("chunk", [1, 4, None], ids=lambda chunk: f"chunk {chunk}")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_whole_logits(divergence, chunk, dtype, tolerance):
    tensors = make(dtype)
    found = fused_outputs(
        *heads(tensors),
        MASK,
        divergence=divergence,
        temperature=2.5,
        weights=(0.7, 0.4),
        labels=labels(),
        chunk=chunk,
    )
    assert_equal(found, plain(tensors, MASK, divergence, 2.5, 0.7, labels(), 0.4), tensors[:3], tolerance)


@divergences
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_finishing_functions_and_a_cut_vocabulary(divergence, bias):
    finish = (lambda z: 2 * torch.tanh(z / 2), lambda z: z / 3)  # Gemma's soft cap, Granite's scale
    tensors = make(student=V, teacher=V + 3, bias=bias)
    given = labels().clamp_max(V - 3)  # what is cut off is no label
    found = fused_outputs(
        *heads(tensors, finish),
        MASK,
        divergence=divergence,
        temperature=0.5,
        weights=(1.0, 2.0),
        labels=given,
        vocab_size=V - 2,
        chunk=5,
    )
    expected = plain(tensors, MASK, divergence, 0.5, 1.0, given, 2.0, cut=V - 2, finish=finish)
    assert_equal(found, expected, tensors[:3], 1e-9)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """β KL(P ‖ M) + (1 - β) KL(Q ‖ M), M = βP + (1 - β)Q, from its definition (arXiv 2306.13649),
    mean over all positions.
    """
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    kl = [(x * (x / m).log()).sum(-1) for x in (p, q)]
    return (beta * kl[0] + (1 - beta) * kl[1]).mean()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_a_parameter_reaches_every_chunk(beta):
    tensors = make()
    named, *_ = fused_outputs(*heads(tensors), divergence="jsd", parameters={"beta": beta}, chunk=4)
    bound, *_ = fused_outputs(*heads(tensors), divergence=partial(outputs.PER_POSITION["jsd"], beta=beta), chunk=4)
    whole = [head.logits() for head in heads(tensors)]
    expected = [generalized_jsd(*whole, beta), outputs.jsd(*whole, beta=beta)]
    assert_equal([named, bound], expected, tensors[:3], 1e-9)


def test_gradients_with_a_parameter_are_those_of_finite_differences():
    student, teacher = make()[:3], make()[3:]
    options = {"divergence": "jsd", "parameters": {"beta": 0.1}, "temperature": 1.5, "chunk": 4}
    assert torch.autograd.gradcheck(
        lambda *leaves: fused_outputs(Head(*leaves), Head(*teacher), MASK, **options)[0], student
    )


# finite differences see the parts that get no gradient; these equal their whole forms all the same
@pytest.mark.parametrize("divergence", [name for name in outputs.LOSSES if name not in ("akl", "taid", "lk_hybrid")])
def test_gradients_are_those_of_finite_differences(divergence):
    student, teacher = make()[:3], make()[3:]
    options = {"divergence": divergence, "temperature": 1.5, "weights": (1.0, 0.5), "labels": labels(), "chunk": 4}
    for which in range(3):
        assert torch.autograd.gradcheck(
            lambda *leaves, which=which: fused_outputs(Head(*leaves), Head(*teacher), MASK, **options)[which], student
        )


def test_a_term_beside_the_total_gets_its_own_gradient_too():
    tensors = make()
    options = {"temperature": 2.0, "weights": (0.7, 0.4), "labels": labels()}
    total, compared, task = fused_outputs(*heads(tensors), MASK, **options, chunk=4)
    expected = plain(tensors, MASK, "forward_kl", 2.0, 0.7, labels(), 0.4)
    combined = (3 * total + 5 * task, 2 * total - compared + task)
    references = (3 * expected[0] + 5 * expected[2], 2 * expected[0] - expected[1] + expected[2])
    assert_equal(combined, references, tensors[:3], 1e-9)


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.mkldnn._linear_pointwise)


class Watch(TorchDispatchMode):
    """The largest tensor that any operation returns, and how many matrix products there were."""

    largest, products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max(
            self.largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)), 0
        )
        self.products += function.overloadpacket in PRODUCTS
        return out


@divergences
def test_whole_logits_never_exist_and_backward_only_scales(divergence):
    N, vocabulary, width, chunk = 64, 120, 2, 8
    leaf = torch.randn(N, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    teacher = torch.randn(N, width), torch.randn(vocabulary, width)
    given = torch.arange(N) % vocabulary
    with Watch() as watch:
        total, _, _ = fused_outputs(
            Head(leaf, weight),
            Head(*teacher),
            divergence=divergence,
            labels=given,
            chunk=chunk,
        )
        assert watch.products == 4 * N // chunk  # two heads, two gradients
        total.backward()
    assert watch.products == 4 * N // chunk
    assert chunk * vocabulary <= watch.largest < N * vocabulary / 4


@divergences
def test_a_term_of_weight_0_is_left_out(divergence):
    tensors = make()
    nan = [torch.full_like(x, math.nan) for x in tensors[3:]]
    total, compared, task = fused_outputs(
        *heads([*tensors[:3], *nan]), MASK, divergence=divergence, weights=(0.0, 0.5), labels=labels()
    )
    assert compared is None
    logits = torch.nn.functional.linear(*tensors[:3])
    assert_equal((total, task), (0.5 * task_loss(logits, labels()), task_loss(logits, labels())), tensors[:3], 1e-9)
    assert fused_outputs(*heads(tensors), MASK, weights=(1.0, 0.0), labels=labels())[2] is None


def test_labels_that_are_all_absent_cost_nothing():
    tensors = make()
    absent = torch.full((B, T), -100)
    total, compared, task = fused_outputs(*heads(tensors), MASK, labels=absent)
    assert task.item() == 0 and total.item() == compared.item() > 0
    total, _, _ = fused_outputs(*heads(tensors), MASK, weights=(0.0, 1.0), labels=absent)
    total.backward()
    assert total.item() == 0 and all((x.grad == 0).all() for x in tensors[:3])


@divergences
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e6])
def test_padding_has_no_effect(divergence, number):
    tensors = make()
    spoilt = [x.detach().masked_fill(~MASK[..., None], number) if x.dim() == 3 else x for x in tensors]
    spoilt[0].requires_grad_()
    within = labels().masked_fill(~MASK, -100)
    found, expected = (
        fused_outputs(*heads(x), MASK, divergence=divergence, labels=within, chunk=4) for x in (spoilt, tensors)
    )
    assert found[0].item() == expected[0].item()
    gradients = [torch.autograd.grad(f[0], x[:3]) for f, x in ((found, spoilt), (expected, tensors))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert (gradients[0][0][~MASK] == 0).all()


@divergences
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_0_at_equality(divergence, dtype):
    tensors = make(dtype)[:3]
    options = {"divergence": divergence, "temperature": 2.5, "chunk": 4, "weights": (1.0, 0.0), "labels": labels()}
    total, _, _ = fused_outputs(Head(*tensors), Head(*tensors).detach(), MASK, **options)
    total.backward()
    assert abs(total.item()) < 1e-7 and all(x.grad.norm() < 1e-6 for x in tensors)


@divergences
def test_entries_out_of_both_vocabularies_count_0(divergence):
    tensors = make()
    with torch.no_grad():
        tensors[2][4] = tensors[5][4] = -math.inf
    kept = [i for i in range(V) if i != 4]
    without = [
        x.detach()[kept].requires_grad_(x.requires_grad) if i in (1, 2, 4, 5) else x for i, x in enumerate(tensors)
    ]
    given = labels().clamp_max(3)  # below the entry that is taken out
    found, expected = (
        fused_outputs(*heads(x), MASK, divergence=divergence, temperature=0.5, weights=(1.0, 0.0), labels=given)[0]
        for x in (tensors, without)
    )
    classes = V / (V - 1) if divergence == "logit_mse" else 1.0  # a mean over classes counts the entry, as equal
    assert found.item() * classes == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    assert all(x.grad.isfinite().all() for x in tensors[:3]) and tensors[2].grad[4] == 0


def test_only_what_requires_a_gradient_gets_one():
    tensors = make()
    for x in tensors[1:3]:
        x.requires_grad_(False)
    with Watch() as watch:
        fused_outputs(*heads(tensors), MASK, chunk=B * T)[0].backward()
    assert watch.products == 3  # two heads, the gradient of the hidden states
    assert tensors[0].grad.abs().sum() > 0 and tensors[1].grad is None and tensors[2].grad is None
    with torch.no_grad(), Watch() as watch:
        total, _, _ = fused_outputs(*heads(make()), MASK, chunk=B * T)
    assert watch.products == 2 and not total.requires_grad


def test_the_teacher_gets_no_gradient():
    tensors = [x.detach().requires_grad_() for x in make()]
    fused_outputs(*heads(tensors), MASK)[0].backward()
    assert [x.grad is None for x in tensors] == [False] * 3 + [True] * 3


@divergences
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_heads_in_bf16_and_losses_in_float32(divergence, autocast):
    exact, rounded = make(torch.float32), make(torch.float32 if autocast else torch.bfloat16)
    options = {"divergence": divergence, "temperature": 2.0, "labels": labels(), "chunk": 4}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, _, _ = fused_outputs(*heads(rounded), MASK, **options)
    reference, _, _ = fused_outputs(*heads(exact), MASK, **options)
    total.backward(), reference.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(reference.item(), rel=0.02) and total.item() != reference.item()
    for a, b in zip(rounded[:3], exact[:3], strict=True):
        assert a.grad.dtype == a.dtype and (a.grad.float() - b.grad).norm() < 0.05 * b.grad.norm()


def test_float16_gradients_wait_for_the_scale():
    tensors = make(torch.float16)
    small = 1e-9  # as one share among very many tokens: 0 in float16
    total, _, _ = fused_outputs(*heads(tensors), MASK, weights=(small, 0.0))
    (total / small).backward()
    reference = make(torch.float32)
    fused_outputs(*heads(reference), MASK)[0].backward()
    for a, b in zip(tensors[:3], reference[:3], strict=True):
        assert a.grad.dtype == torch.float16 and (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()


def test_backward_twice_is_twice_the_gradient():
    tensors = make()
    total, _, _ = fused_outputs(*heads(tensors), MASK)
    total.backward(retain_graph=True)
    once = [x.grad.clone() for x in tensors[:3]]
    total.backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(tensors[:3], once, strict=True))


NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.zeros(B, 5, 6)}, r"the student has \(3, 7, 4\), the teacher \(3, 5, 6\)"),
        (
            {"teacher_weight": torch.zeros(V + 1, 6).double(), "teacher_bias": None},
            r"student's logits have 11 entries, the teacher's 12.*vocab_size=11",
        ),
        ({"student_weight": torch.zeros(V, 5)}, r"student's head.*\(V, 4\).*it is torch.float32 \(11, 5\)"),
        ({"teacher_weight": torch.zeros(V, 6, dtype=torch.int8)}, r"teacher's head.*torch.int8.*A quantized head"),
        ({"vocab_size": 12}, r"vocab_size=12 .* the student has 11, the teacher 11"),
        ({"temperature": 0.0}, r"wants a finite temperature above 0, not 0.0"),
        (
            {"divergence": "jsd", "parameters": {"alpha": 0.1}},
            r"jsd has no parameter alpha; it takes beta: float = 0.5",
        ),
        ({"divergence": "jsd", "parameters": {"beta": 1.0}}, r"0 < beta < 1, not 1.0.*forward_kl and reverse_kl"),
        ({"parameters": {"beta": 0.1}}, r"forward_kl has no parameter beta; it takes none"),
        ({"divergence": len, "parameters": {"beta": 0.1}}, r"for a divergence given by name, .*functools.partial"),
        ({"divergence": "kl"}, r"'kl' is not known; choose one of \['forward_kl'"),
        (
            {"labels": torch.zeros(B, 6)},
            r"labels \(3, 6\) do not fit hidden states \(3, 7, 4\)",
        ),
        (
            {"weights": (0.0, 1.0)},
            r"nothing to compute: weights are \(0.0, 0.0\), labels are not given",
        ),
        ({"mask": torch.zeros(B, T, dtype=torch.bool)}, r"no valid position in the whole batch"),
        ({"teacher_bias": torch.zeros(V + 3)}, r"teacher's head has 11 entries and a bias of \(14,\)"),
        ({"student_hidden": torch.zeros(B, T, 4)}, r"student's hidden .* torch.float32, torch.float64: one dtype"),
        ({"chunk": 0}, r"chunk=0: a chunk has at least one token"),
        ({"mask": MASK[:, :4]}, r"wants a mask of shape \(3, 7\).* the mask has \(3, 4\)"),
    ],
)
def test_wrong_inputs_name_both_sides_and_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        change, given = dict(change), dict(zip(NAMES, make(), strict=True))
        given |= {name: change.pop(name) for name in NAMES if name in change}
        fused_outputs(*heads(list(given.values())), **{"mask": MASK} | change)


@divergences
@pytest.mark.parametrize("which", [slice(3), slice(3, None)], ids=["student", "teacher"])
def test_one_side_in_float64(which, divergence):
    tensors, wide = make(torch.float32), make(torch.float32)
    wide[which] = [x.detach().double().requires_grad_(x.requires_grad) for x in wide[which]]
    found = fused_outputs(*heads(wide), MASK, divergence=divergence, weights=(1.0, 0.4), labels=labels(), chunk=4)
    expected = plain(tensors, MASK, divergence, 1.0, 1.0, labels(), 0.4)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-5)
    for ours, theirs in zip(
        *(torch.autograd.grad(x[0], t[:3]) for x, t in ((found, wide), (expected, tensors))), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_inference_mode():
    tensors = make()
    with torch.inference_mode():
        theirs, mask, given = [x.clone() for x in tensors[3:]], MASK.clone(), labels().clone()
    found = fused_outputs(Head(*tensors[:3]), Head(*theirs), mask, weights=(1.0, 0.4), labels=given)
    assert_equal(found, fused_outputs(*heads(tensors), MASK, weights=(1.0, 0.4), labels=labels()), tensors[:3], 1e-12)


@pytest.mark.parametrize("wrong", [-1, V, V + 30000])
@pytest.mark.parametrize("way", ["whole", "in chunks"])
def test_a_label_that_is_no_class_is_refused_and_never_trained_on(wrong, way):
    tensors, odd = make(), labels()
    odd[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"from 0 to {V - 1}, or -100 .* found \[{wrong}\] at 1 of 21 positions"):
        if way == "whole":
            task_loss(torch.nn.functional.linear(*tensors[:3]), odd)
        else:
            fused_outputs(*heads(tensors), MASK, weights=(0.0, 1.0), labels=odd)


class LigersConvention:
    """liger_kernel 0.8.5's LigerFusedLinearJSDLoss from its definition: over whole logits, without τ²,
    masked by the targets.
    """

    def __init__(self, weight_hard_loss, weight_soft_loss, beta, temperature, compiled):
        assert weight_hard_loss == 0 and not compiled
        self.weight, self.beta, self.temperature = weight_soft_loss, beta, temperature

    def __call__(self, student, student_weight, teacher, teacher_weight, targets, student_bias, teacher_bias):
        q = ((student @ student_weight.t() + student_bias) / self.temperature).softmax(-1)
        p = ((teacher @ teacher_weight.t() + teacher_bias) / self.temperature).softmax(-1)
        m = self.beta * p + (1 - self.beta) * q
        kl = lambda x, y: (x * (x / y).log()).sum(-1)  # noqa: E731
        rows = {0.0: kl(p, q), 1.0: kl(q, p)}.get(self.beta, self.beta * kl(p, m) + (1 - self.beta) * kl(q, m))
        valid = targets != -100
        return self.weight * rows.masked_fill(~valid, 0.0).sum() / valid.sum()


@pytest.mark.parametrize("divergence", liger.BETAS)
@pytest.mark.parametrize("mask", [MASK, None], ids=["mask", "no mask"])
def test_liger_is_asked_for_what_we_mean(monkeypatch, divergence, mask):
    tensors = make()
    expected = fused_outputs(*heads(tensors), mask, divergence=divergence, temperature=2.5, weights=(0.7, 0.0))
    package = SimpleNamespace(LigerFusedLinearJSDLoss=LigersConvention)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(chunked_loss=package))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", package)
    monkeypatch.setattr(liger, "serves", lambda *_: True)
    monkeypatch.setattr(chunked, "_FusedOutputs", None)  # so that nothing else can have answered
    found = fused_outputs(*heads(tensors), mask, divergence=divergence, temperature=2.5, weights=(0.7, 0.0))
    assert found[2] is None
    assert_equal(found[:2], expected[:2], tensors[:3], 1e-9)


def test_liger_serves_no_cpu():
    assert not liger.serves("forward_kl", *heads(make(torch.float32)))


@divergences
def test_shapes_alone_are_enough(divergence):
    """Under torch's FakeTensorMode: nothing looks at values, and everything has its shape and dtype."""
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x) for x in make(torch.float32)]
        mask, given = mode.from_tensor(MASK), mode.from_tensor(labels())
        found = fused_outputs(*heads(tensors), mask, divergence=divergence, labels=given, vocab_size=V - 1, chunk=4)
        found[0].backward()
    assert all(isinstance(x, FakeTensor) and x.shape == () and x.dtype == torch.float32 for x in found)
    assert [x.grad.shape for x in tensors[:3]] == [x.shape for x in tensors[:3]]


def test_docstring_examples_run():
    results = doctest.testmod(chunked)
    assert results.attempted and not results.failed


@divergences
@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_small_differences_survive_in_chunks(divergence, temperature):
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(9000, 8, generator=generator)
    moved = hidden + (0.02 if temperature == 1.0 else 0.5) * torch.randn(6, 8, generator=generator)
    given = torch.arange(6) * 1000
    options = {"temperature": temperature, "weights": (1.0, 0.0), "labels": given}
    found = fused_outputs(Head(moved, weight), Head(hidden, weight), divergence=divergence, **options)
    student, teacher = moved.double() @ weight.double().T, hidden.double() @ weight.double().T
    given = {"labels": given} if divergence in LABELED else {}
    expected = outputs.LOSSES[divergence](student, teacher, None, temperature, **given).item()
    assert found[1].item() == pytest.approx(expected, rel=1e-4)


def test_labels_choose_the_class_in_every_chunk_and_where_it_counts():
    tensors, given = make(), labels()
    options = {"divergence": "dkd", "parameters": {"alpha": 2.0, "beta": 3.0}, "temperature": 1.5, "labels": given}
    found = fused_outputs(*heads(tensors), MASK, weights=(0.7, 0.0), chunk=4, **options)
    whole = [head.logits() for head in heads(tensors)]
    counted = MASK & (given != -100)
    rows = outputs.dkd(*(z[counted] for z in whole), None, 1.5, labels=given[counted], alpha=2.0, beta=3.0)
    assert found[2] is None
    assert_equal(found[:2], [0.7 * rows, rows], tensors[:3], 1e-9)
    nothing = fused_outputs(*heads(tensors), MASK, weights=(1.0, 0.0), **options | {"labels": given * 0 - 100})[0]
    assert nothing.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing, tensors[:3]))
    with pytest.raises(ValueError, match=r"'dkd' looks at the label of each position, and no labels were given.*3, 7"):
        fused_outputs(*heads(tensors), MASK, divergence="dkd")


def test_sorted_probabilities_of_two_vocabularies():
    tensors = make(student=V, teacher=V + 4)
    found = fused_outputs(*heads(tensors), MASK, divergence="uld", temperature=2.0, labels=labels(), chunk=4)
    whole = [head.logits() for head in heads(tensors)]
    expected = outputs.uld(*whole, MASK, 2.0), task_loss(whole[0], labels())
    assert_equal(found, [sum(expected), *expected], tensors[:3], 1e-9)


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "rlkd", "dkd"])
@pytest.mark.parametrize("by_itself", [False, True], ids=["total", "term"])
def test_a_temperature_that_learns(divergence, by_itself):
    parameters = {"divergence": "forward_kl"} if divergence == "rlkd" else {}
    tensors, found = make(), []
    given = {"labels": labels()} if divergence == "dkd" else {}
    for fused in (True, False):
        tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        if fused:
            options = {"divergence": divergence, "parameters": parameters, "temperature": tau, "labels": labels()}
            total, term, _ = fused_outputs(*heads(tensors), MASK, weights=(0.7, 0.0), chunk=4, **options)
        else:
            whole = [head.logits() for head in heads(tensors)]
            term = outputs.LOSSES[divergence](*whole, MASK, tau, **parameters, **given)
            total = 0.7 * term
        value = term if by_itself else total
        found.append((value, *torch.autograd.grad(value, [tau, *tensors[:3]])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert found[0][1].abs() > 1e-3
