"""Agreement with the teacher: by hand, against loops, over any batch split, with padding of no effect."""

from __future__ import annotations

import math

import pytest
import torch

from fakit.evaluation import Agreement, AttentionDivergence, attention_jsd, ranking_agreement

STUDENT = torch.tensor([[9.0, 8, 7, 1, 0], [9, 8, 7, 1, 0], [0, 1, 2, 3, 4]])
TEACHER = torch.tensor([[5.0, 4, 3, 0, 0], [8, 9, 1, 7, 0], [4, 3, 2, 1, 0]])


def test_cr_and_mor_by_hand():
    # Top 3, student / teacher: (0 1 2 / 0 1 2), (0 1 2 / 1 0 3), (4 3 2 / 0 1 2).
    consistent, overlap = ranking_agreement(STUDENT, TEACHER, k=3)
    assert consistent.tolist() == [1, 0, 0]
    assert overlap.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    result = Agreement(k=3).update(STUDENT, TEACHER).compute()
    assert result["cr@3"] == pytest.approx(1 / 3)
    assert result["mor@3"] == pytest.approx((1 + 2 / 3 + 1 / 3) / 3)
    assert result["agreement"] == pytest.approx(1 / 3)


def test_the_same_set_in_another_order_overlaps_but_is_not_consistent():
    consistent, overlap = ranking_agreement(torch.tensor([[3.0, 2, 1]]), torch.tensor([[2.0, 3, 1]]), k=2)
    assert (consistent.item(), overlap.item()) == (0, 1)


def test_kl_is_that_of_the_teacher_against_the_student():
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    result = Agreement(k=None).update(q.log()[None], p.log()[None]).compute()
    assert result["kl"] == pytest.approx(kl, abs=1e-6)
    assert set(result) == {"agreement", "kl"}


def test_identity():
    logits = torch.randn(4, 7, 20)
    assert Agreement().update(logits, logits.clone()).compute() == {"agreement": 1, "kl": 0, "cr@5": 1, "mor@5": 1}


def test_batches_and_padding_change_nothing():
    student, teacher = torch.randn(6, 5, 12), torch.randn(6, 5, 12)
    mask = torch.rand(6, 5) > 0.4
    rows = [(student[b, t], teacher[b, t]) for b in range(6) for t in range(5) if mask[b, t]]
    expected_kl = sum(
        (t.double().softmax(0) * (t.double().log_softmax(0) - s.double().log_softmax(0))).sum().item() for s, t in rows
    ) / len(rows)
    expected_top = sum(int(s.argmax() == t.argmax()) for s, t in rows) / len(rows)

    whole = Agreement().update(student, teacher, mask).compute()
    assert whole["kl"] == pytest.approx(expected_kl, rel=1e-5)
    assert whole["agreement"] == pytest.approx(expected_top)

    poisoned = student.masked_fill(~mask[..., None], float("nan"))
    streamed = Agreement()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        streamed.update(poisoned[part], teacher[part], mask[part])
    streamed.update(student, teacher, torch.zeros_like(mask))
    assert streamed.compute() == pytest.approx(whole, rel=1e-6)
    assert streamed.positions == len(rows)


def test_a_token_the_teacher_excludes_is_no_nan():
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    assert Agreement(k=None).update(torch.zeros(1, 3), teacher).compute()["kl"] == pytest.approx(math.log(1.5))
    assert Agreement(k=None).update(teacher, teacher).compute()["kl"] == 0


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(50, 30).bfloat16(), torch.randn(50, 30).bfloat16()
    same = Agreement().update(student.float(), teacher.float()).compute()
    assert Agreement().update(student, teacher).compute() == same


def test_agreement_errors():
    with pytest.raises(ValueError, match=r"student logits.*\(2, 5\).*teacher logits.*\(2, 6\).*vocabulary"):
        Agreement().update(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"mask.*\(3,\).*\(2,\)"):
        Agreement().update(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(3))
    with pytest.raises(ValueError, match=r"k=5.*3 entries"):
        Agreement().update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no valid position"):
        Agreement().compute()


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


def test_attention_jsd_against_a_loop():
    batch, heads, length = 3, 2, 5
    lengths = [5, 3, 1]
    student, teacher = maps(batch, heads, length, length), maps(batch, heads, length, length)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    totals = torch.zeros(heads, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for h in range(heads):
            for row in range(n):
                p, q = (a[b, h, row, :n] / a[b, h, row, :n].sum() for a in (teacher, student))
                m = (p + q) / 2
                totals[h] += ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    expected = totals / sum(lengths)
    torch.testing.assert_close(attention_jsd(student, teacher, mask), expected)

    noise = torch.where(mask[:, None, None, :] & mask[:, None, :, None], student, float("nan"))
    torch.testing.assert_close(attention_jsd(noise, teacher, mask), expected)  # padding has no effect
    streamed = AttentionDivergence()
    for b in range(batch):
        streamed.update(student[b : b + 1], teacher[b : b + 1], mask[b : b + 1])
    torch.testing.assert_close(streamed.compute(), expected)


def test_attention_jsd_limits_and_symmetry():
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 4, 4)
    assert attention_jsd(student, student).tolist() == [0, 0, 0]
    torch.testing.assert_close(attention_jsd(student, teacher), attention_jsd(teacher, student))
    first, last = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    first[..., 0], last[..., 1] = 1, 1
    assert attention_jsd(first, last).item() == pytest.approx(math.log(2))
    causal = torch.ones(1, 1, 4, 4).tril() / torch.arange(1, 5)[:, None]
    assert attention_jsd(causal, causal).item() == 0


def test_attention_errors():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).*\(1, 4, 3, 3\).*heads"):
        attention_jsd(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"mask.*\(1, 4\).*\(1, 2, 3, 3\)"):
        attention_jsd(maps(1, 2, 3, 3), maps(1, 2, 3, 3), torch.ones(1, 4))
    with pytest.raises(ValueError, match="no valid query"):
        attention_jsd(maps(1, 2, 3, 3), maps(1, 2, 3, 3), torch.zeros(1, 3))


def test_a_teacher_that_says_nan_does_not_agree():
    found = Agreement(k=None).update(torch.randn(4, 3), torch.full((4, 3), torch.nan)).compute()
    assert math.isnan(found["kl"])


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_the_kl_of_models_that_hardly_differ_keeps_its_digits(apart):
    """½ Var_p(d) + O(d³) of logits that are d apart, however small that is; more rows than are taken at once."""
    teacher = torch.randn(300, 40).double()
    d = apart * torch.randn(300, 40).double()
    student, teacher = (teacher + d).float(), teacher.float()
    p = teacher.double().softmax(-1)
    d = student.double() - teacher.double()
    # log E_p exp(d) - E_p d, with the mean taken out first: no small difference of large numbers
    d = d - (p * d).sum(-1, keepdim=True)
    exact = torch.log1p((p * torch.expm1(d)).sum(-1)).mean().item()
    assert Agreement(k=None).update(student, teacher).compute()["kl"] == pytest.approx(exact, rel=1e-7)
