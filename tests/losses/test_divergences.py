"""Every output loss against its equation in NumPy and SciPy, position by position, and against released code."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import rel_entr, softmax
from scipy.stats import spearmanr

from fakit.losses import outputs, ranking

B, T, V = 2, 4, 9
MASK = torch.tensor([[True, True, True, False], [False, True, False, True]])
LABELS = torch.tensor([[0, 8, -100, 3], [1, 4, 7, 2]])


def logits(scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (scale * torch.randn(B, T, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def both(s, t, tau=1.0):
    return softmax(t / tau), softmax(s / tau)


def kl(p, q):
    return rel_entr(p, q).sum()


def skew_forward_kl(s, t, tau, alpha):
    p, q = both(s, t, tau)
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(s, t, tau, alpha):
    p, q = both(s, t, tau)
    return kl(q, alpha * q + (1 - alpha) * p)


def tvd(s, t, tau):
    p, q = both(s, t, tau)
    return 1 - np.minimum(p, q).sum()


def akl(s, t, tau, head):
    p, q = both(s, t, tau)
    mass, gaps = 0.0, {True: 0.0, False: 0.0}
    for number, i in enumerate(sorted(range(len(p)), key=lambda i: -p[i])):
        mass += p[i]
        gaps[number == 0 or mass <= head] += abs(p[i] - q[i])
    g_head, g_tail = gaps[True], gaps[False]
    return (g_head * kl(p, q) + g_tail * kl(q, p)) / (g_head + g_tail)


def taid(s, t, tau, share):
    return kl(softmax(((1 - share) * s + share * t) / tau), softmax(s / tau))


def dkd(s, t, tau, label, alpha, beta):
    p, q = both(s, t, tau)
    tckd = kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
    others = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
    return alpha * tckd + beta * kl(*others)


def uld(s, t, tau):
    p, q = (sorted(softmax(x / tau), reverse=True) for x in (t, s))
    return sum(abs(a - b) for a, b in itertools.zip_longest(p, q, fillvalue=0.0))


def neg_log_acceptance(s, t, tau):
    return -math.log(1 - tvd(s, t, tau))


def lk_hybrid(s, t, tau, eta):
    share, apart = math.exp(-eta * (1 - tvd(s, t, tau))), tvd(s, t, tau)
    return share * kl(*both(s, t, tau)) + (1 - share) * apart


def soft_ranks(values, strength):
    """The nearest vector to values/strength in the permutahedron, from the definition of that: no m of its numbers sum
    to more than the m largest ranks, and all of them sum to all ranks.
    """
    n, z = len(values), np.asarray(values, dtype=float)
    z = (z - z.mean()) / strength
    limits = np.cumsum(np.arange(n, 0, -1.0))
    subsets = [list(c) for m in range(1, n) for c in itertools.combinations(range(n), m)]
    constraints = [{"type": "eq", "fun": lambda r: r.sum() - limits[-1]}]
    constraints.append({"type": "ineq", "fun": lambda r: np.array([limits[len(c) - 1] - r[c].sum() for c in subsets])})
    start = np.full(n, (n + 1) / 2)
    options = {"ftol": 1e-13, "maxiter": 200}
    return minimize(lambda r: ((r - z) ** 2).sum(), start, constraints=constraints, options=options).x


def rlkd(s, t, k, strength):
    union = sorted({*np.argsort(-s)[:k], *np.argsort(-t)[:k]})
    return 1 - np.corrcoef(*(soft_ranks(x[union], strength) for x in (s, t)))[0, 1]


# loss, its parameters, the reference, from the student's and the teacher's logits of one position
CASES = [
    (outputs.skew_forward_kl, {}, lambda s, t, tau, y: skew_forward_kl(s, t, tau, 0.1)),
    (outputs.skew_forward_kl, {"alpha": 0.7}, lambda s, t, tau, y: skew_forward_kl(s, t, tau, 0.7)),
    (outputs.skew_reverse_kl, {}, lambda s, t, tau, y: skew_reverse_kl(s, t, tau, 0.1)),
    (outputs.skew_reverse_kl, {"alpha": 0.7}, lambda s, t, tau, y: skew_reverse_kl(s, t, tau, 0.7)),
    (outputs.tvd, {}, lambda s, t, tau, y: tvd(s, t, tau)),
    (outputs.akl, {}, lambda s, t, tau, y: akl(s, t, tau, 0.5)),
    (outputs.akl, {"head": 0.9}, lambda s, t, tau, y: akl(s, t, tau, 0.9)),
    (outputs.taid, {}, lambda s, t, tau, y: taid(s, t, tau, 0.4)),
    (outputs.taid, {"t": 0.9}, lambda s, t, tau, y: taid(s, t, tau, 0.9)),
    (outputs.dkd, {}, lambda s, t, tau, y: dkd(s, t, tau, y, 1, 8)),
    (outputs.dkd, {"alpha": 2.0, "beta": 0.0}, lambda s, t, tau, y: dkd(s, t, tau, y, 2, 0)),
    (outputs.uld, {}, lambda s, t, tau, y: uld(s, t, tau)),
    (outputs.neg_log_acceptance, {}, lambda s, t, tau, y: neg_log_acceptance(s, t, tau)),
    (outputs.lk_hybrid, {}, lambda s, t, tau, y: lk_hybrid(s, t, tau, 3.0)),
    (outputs.lk_hybrid, {"eta": 0.5}, lambda s, t, tau, y: lk_hybrid(s, t, tau, 0.5)),
    (outputs.rlkd, {"k": 3, "strength": 2.0}, lambda s, t, tau, y: rlkd(s, t, 3, 2.0) / tau**2),
    (
        outputs.rlkd,
        {"k": 3, "divergence": "forward_kl"},
        lambda s, t, tau, y: 2 * rlkd(s, t, 3, 1.0) / tau**2 + kl(*both(s, t, tau)),
    ),
    (
        outputs.rlkd,
        {"k": 3, "divergence": "reverse_kl", "dynamic": True},
        lambda s, t, tau, y: (
            2 * rlkd(s, t, 3, 1.0) / tau**2
            + len({*np.argsort(-s)[:3]} & {*np.argsort(-t)[:3]}) / 3 * kl(*both(s, t, tau)[::-1])
        ),
    ),
]


@pytest.mark.parametrize(("loss", "parameters", "reference"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_every_loss_is_its_equation(loss, parameters, reference, tau):
    student, teacher = logits()
    labeled = loss is outputs.dkd
    given = {"labels": LABELS} if labeled else {}
    counted = MASK & (LABELS != -100) if labeled else MASK
    found = [
        tau**2 * reference(student[b, t].numpy(), teacher[b, t].numpy(), tau, LABELS[b, t].item())
        for b, t in counted.nonzero().tolist()
    ]
    got = loss(student, teacher, MASK, tau, **parameters, **given).item()
    assert got == pytest.approx(sum(found) / len(found), rel=1e-6)


def test_limits_of_the_mixtures():
    student, teacher = logits()
    for skew, plain in ((outputs.skew_forward_kl, outputs.forward_kl), (outputs.skew_reverse_kl, outputs.reverse_kl)):
        assert skew(student, teacher, MASK, 2.0, alpha=0.0).item() == plain(student, teacher, MASK, 2.0).item()
    far = torch.tensor([[-200.0, 200.0, 0.0]])
    for skew in (outputs.skew_forward_kl, outputs.skew_reverse_kl):
        assert skew(far, -far, alpha=0.1).item() == pytest.approx(-math.log(0.1), rel=1e-6)
    assert outputs.taid(student, teacher, MASK, t=1.0).item() == outputs.forward_kl(student, teacher, MASK).item()
    assert outputs.taid(student, teacher, MASK, t=0.0).item() == 0


def test_decoupled_kd_is_the_kl_at_the_papers_coefficients():
    student, teacher = (z[:1, :1] for z in logits())
    label = torch.tensor([[4]])
    rest = 1 - teacher.softmax(-1)[0, 0, 4].item()
    found = outputs.dkd(student, teacher, labels=label, alpha=1.0, beta=rest)
    assert found.item() == pytest.approx(outputs.forward_kl(student, teacher).item(), rel=1e-12)


def test_what_each_does_not_see():
    student, teacher = logits()
    shuffled = student[..., torch.randperm(V, generator=torch.Generator().manual_seed(0))]
    assert outputs.uld(shuffled, teacher, MASK).item() == pytest.approx(outputs.uld(student, teacher, MASK).item())
    assert outputs.uld(shuffled, student, MASK).item() == pytest.approx(0, abs=1e-12)
    assert outputs.tvd(shuffled, student, MASK).item() > 0.1
    # the order at the top alone: numbers added to all logits, distances, and what is below the top of both
    order = torch.arange(12.0, 0, -1)[None]
    assert outputs.rlkd(3 * order + 5, order, k=3).item() == 0
    below = torch.cat([order[:, :4], order[:, 4:].flip(-1)], -1)
    assert outputs.rlkd(below, order, k=4).item() == 0 and outputs.rlkd(below, order, k=5).item() > 0.05


def test_labels_that_are_absent_leave_a_position_out():
    student, teacher = logits()
    nothing = outputs.dkd(student.requires_grad_(), teacher, labels=torch.full((B, T), -100))
    nothing.backward()
    assert nothing.item() == 0 and (student.grad == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: outputs.dkd(s, t), "no labels were given: .*forward_kl compares all"),
        (lambda s, t: outputs.dkd(s, t, labels=LABELS[:, :3]), r"integers \(2, 4\).*the labels are int64 \(2, 3\)"),
        (lambda s, t: outputs.dkd(s, t, labels=LABELS + 1), r"from 0 to 8, or -100 .*found \[-99, 9\] at 2 of 8"),
        (lambda s, t: outputs.dkd(s, t, labels=LABELS, alpha=0.0, beta=0.0), "not both 0; they are 0.0 and 0.0"),
        (lambda s, t: outputs.skew_forward_kl(s, t, alpha=1.0), "0 <= alpha < 1, not 1.0; 0 is forward_kl"),
        (lambda s, t: outputs.akl(s, t, head=0.0), "0 < head < 1 .* not 0.0"),
        (lambda s, t: outputs.taid(s, t, t=1.5), "t is 1.5"),
        (lambda s, t: outputs.lk_hybrid(s, t, eta=-1.0), "finite eta >= 0 says; it is -1.0"),
        (lambda s, t: outputs.rlkd(s, t, k=1), "k a whole number of 2 at least; k is 1"),
        (lambda s, t: outputs.rlkd(s, t, strength=0.0), "finite strength above 0, not 0.0"),
        (lambda s, t: outputs.rlkd(s, t, dynamic=True), "none is named: divergence=…"),
        (lambda s, t: outputs.rlkd(s, t, divergence="uld"), "divergence='uld'.*choose one of forward_kl, "),
        (lambda s, t: outputs.rlkd(s[..., :2], t[..., :2]), "these logits have 2: two have one order"),
        (
            lambda s, t: outputs.tvd(s, t[..., :5]),
            r"student has \(2, 4, 9\), teacher has \(2, 4, 5\).*Outputs\('uld'\)",
        ),
        (lambda s, t: outputs.uld(s, t[:, :2]), r"student has \(2, 4, 9\), teacher has \(2, 2, 9\)"),
    ],
)
def test_wrong_inputs_say_what_was_wanted_and_found(call, message):
    with pytest.raises(ValueError, match=message):
        call(*logits())


# what the released code says of the logits below: TRL 1.16's generalized_jsd_loss at its temperature 2 (times the 4 that
# it leaves out), which Liger 0.8.5's distillation_loss_fn equals to all digits; speculators 0.9's eager losses, float32
RELEASED = [
    ("TRL and Liger, beta 0", "forward_kl", 2.0, {}, 4.0160135214),
    ("TRL and Liger, beta 1", "reverse_kl", 2.0, {}, 3.5234992889),
    ("TRL, beta 0.1", "jsd", 2.0, {"beta": 0.1}, 0.3239874091),
    ("TRL and Liger, beta 0.5", "jsd", 2.0, {"beta": 0.5}, 0.7856139344),
    ("speculators, kl_div", "forward_kl", 1.0, {}, 3.0737905502),
    ("speculators, rkl", "reverse_kl", 1.0, {}, 2.4712288380),
    ("speculators, jsd", "jsd", 1.0, {}, 0.4159408808),
    ("speculators, tv", "tvd", 1.0, {}, 0.7694614530),
    ("speculators, nla", "neg_log_acceptance", 1.0, {}, 1.4842061996),
    ("speculators, lk_hybrid", "lk_hybrid", 1.0, {}, 1.9955793619),
]


@pytest.mark.parametrize(("source", "name", "tau", "parameters", "expected"), RELEASED, ids=lambda x: str(x))
def test_released_code_gives_the_same_numbers(source, name, tau, parameters, expected):
    i = torch.arange(2 * 3 * 7, dtype=torch.float64).reshape(2, 3, 7)
    found = outputs.LOSSES[name](3 * torch.sin(1.7 * i), 3 * torch.cos(0.9 * i * i), None, tau, **parameters)
    assert found.item() == pytest.approx(expected, rel=1e-9 if source.startswith("TRL") else 2e-7)


# -- near and far -----------------------------------------------------------------------------------------------------

NEAR = [name for name in outputs.LOSSES if name != "rlkd"]


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0])
def test_near_its_teacher_a_student_gets_its_true_loss_and_gradient(name, apart):
    generator = torch.Generator().manual_seed(2)
    teacher = 3 * torch.randn(4, 2000, generator=generator)
    student = teacher + apart * torch.randn(4, 2000, generator=generator)
    given = {"labels": torch.tensor([5, 70, 800, 1999])} if name == "dkd" else {}
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.detach().clone().to(dtype).requires_grad_()
        loss = outputs.LOSSES[name](leaf, teacher.to(dtype), **given)
        loss.backward()
        results.append((loss.item(), leaf.grad.double()))
    (found, gradient), (expected, exact) = results
    loose = 100 if name == "taid" else 1  # its target is a sum of logits, which float32 rounds
    assert expected > 0 and found == pytest.approx(expected, rel=3e-5 * loose)
    assert (gradient - exact).norm() < 1e-3 * loose * exact.norm()


@pytest.mark.parametrize("name", [name for name in outputs.LOSSES if name not in ("logit_mse", "rlkd")])
@pytest.mark.parametrize("out_of", ["student", "teacher"])
def test_an_entry_out_of_one_vocabulary_gives_a_loss_and_a_gradient(name, out_of):
    sides = {"student": torch.tensor([[1.0, 2.0, 0.5, -1.0]]), "teacher": torch.tensor([[0.5, 1.0, 2.0, 0.0]])}
    sides[out_of][:, 0] = -math.inf
    sides["student"].requires_grad_()
    given = {"labels": torch.tensor([2])} if name == "dkd" else {}
    loss = outputs.LOSSES[name](sides["student"], sides["teacher"], **given)
    loss.backward()
    assert loss.item() > 0 and not sides["student"].grad.isnan().any()


def test_a_class_that_the_teacher_excludes_altogether_is_unlearned():
    student = torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True)
    outputs.forward_kl(student, torch.tensor([[1.0, 0.0, -math.inf]])).backward()
    assert student.grad[0, 2].item() == pytest.approx(student.softmax(-1)[0, 2].item(), rel=1e-6)


def test_the_ranking_loss_of_what_is_out_of_one_vocabulary():
    student, teacher = torch.tensor([[4.0, 3.0, 2.0, -math.inf]]), torch.tensor([[4.0, 3.0, 2.0, 9.0]])
    expected = 1 - spearmanr([4, 3, 2, 1], [3, 2, 1, 4]).statistic
    assert outputs.rlkd(student, teacher, k=3).item() == pytest.approx(expected, rel=1e-6)


# -- soft ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_soft_ranks_are_the_nearest_in_the_permutahedron(strength, seed):
    values = 2 * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = ranking.soft_rank(values, strength)
    np.testing.assert_allclose(found.numpy(), soft_ranks(values.numpy(), strength), atol=1e-5)


def test_soft_ranks_leave_out_what_is_not_valid():
    values = torch.tensor([[3.0, 99.0, 2.5, -1.0], [1.0, 1.2, -99.0, 0.0]])
    valid = torch.tensor([[True, False, True, True], [True, True, False, True]])
    found = ranking.soft_rank(values, 1.0, valid)
    for row in range(2):
        kept = ranking.soft_rank(values[row, valid[row]])
        assert torch.equal(found[row, valid[row]], kept) and (found[row, ~valid[row]] == 0).all()


def test_soft_ranks_have_the_gradient_of_finite_differences():
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False, True, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda z: ranking.soft_rank(z, 0.8, valid), values)


def test_far_apart_the_ranking_loss_is_scipys():
    generator = torch.Generator().manual_seed(3)
    order = [torch.randperm(8, generator=generator).double() * 3 for _ in range(2)]
    expected = 1 - spearmanr(*order).statistic
    assert outputs.rlkd(order[0][None], order[1][None], k=8).item() == pytest.approx(expected, rel=1e-12)


def test_rows_without_an_order():
    flat, ordered = torch.zeros(1, 6, requires_grad=True), torch.arange(6.0)[None]
    assert outputs.rlkd(flat, torch.zeros(1, 6)).item() == 0
    loss = outputs.rlkd(flat, ordered, k=6)
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and flat.grad.isfinite().all() and flat.grad[0, 5] < 0 < flat.grad[0, 0]
