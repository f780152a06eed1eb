"""Maps from evidence: the earth mover's flow, and attention as the similarity a map is made from."""

import pytest
import torch

from fakit import LayerMap
from fakit.similarity import attention_similarity


def numbered(values):
    """(S, T) → (S+1) × (T+1), embeddings NaN."""
    values = torch.as_tensor(values, dtype=torch.float64)
    matrix = torch.full((values.shape[0] + 1, values.shape[1] + 1), torch.nan, dtype=torch.float64)
    matrix[1:, 1:] = values
    return matrix


# -- emd
# ----------------------------------------------------------------------------------------------------------------


def test_emd_of_as_many_layers_is_the_best_assignment():
    matrix = numbered(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    found = LayerMap.emd(matrix)
    assert found.pairs == LayerMap.from_similarity(matrix, "assignment").pairs
    assert found.pair_weights == pytest.approx([0.25] * 4)


def test_emd_moves_every_mass_and_is_cheapest():
    similarity = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = LayerMap.emd(numbered(similarity))
    flow = found.weights(3, 6).double()[1:, 1:]
    torch.testing.assert_close(flow.sum(1), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-6, rtol=0)
    best = float((flow * similarity).sum())
    for order in torch.cartesian_prod(*[torch.arange(6)] * 3).tolist():  # any other flow of halves of a teacher layer
        other = torch.zeros(3, 6, dtype=torch.float64)
        for s in range(3):
            other[s, order[s]] += 1 / 6
        rest = other.sum(0)
        if (rest > 1 / 6 + 1e-9).any():
            continue
        left = [t for t in range(6) if rest[t] == 0]
        for s, t in enumerate(left):
            other[s, t] += 1 / 6
        assert best >= float((other * similarity).sum()) - 1e-9


def test_emd_is_many_to_many_with_one_pair_a_constraint_at_most():
    found = LayerMap.emd(numbered(torch.rand(3, 6, generator=torch.Generator().manual_seed(2))))
    assert sorted(found.teacher_layers) == [1, 2, 3, 4, 5, 6] and found.student_layers == [1, 2, 3]
    assert 6 <= len(found) <= 3 + 6 - 1  # a vertex of the transport polytope
    assert found.name == "emd" and sum(found.pair_weights) == pytest.approx(1)


def test_emd_masses_decide_how_much_a_layer_teaches():
    matrix = numbered([[0.9, 0.1], [0.2, 0.8]])
    found = LayerMap.emd(matrix, student_weights=[3, 1], teacher_weights=[1, 1])
    assert dict(zip(found.pairs, found.pair_weights, strict=True)) == pytest.approx(
        {(1, 1): 0.5, (1, 2): 0.25, (2, 2): 0.25}
    )
    alone = LayerMap.emd(matrix, teacher_weights=[0, 1])
    assert alone.teacher_layers == [2]


def test_emd_of_costs_is_that_of_their_negative():
    costs = torch.rand(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 40
    assert LayerMap.emd(numbered(costs), cost=True) == LayerMap.emd(numbered(-costs))


def test_emd_refuses():
    with pytest.raises(ValueError, match=r"emd wants a matrix \(S\+1\) × \(T\+1\)"):
        LayerMap.emd(torch.ones(3))
    broken = numbered([[0.5, 0.5]])
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf at \(student, teacher\) \[\(1, 2\)\]"):
        LayerMap.emd(broken)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="emd wants 2 finite student masses ≥ 0"):
            LayerMap.emd(numbered(torch.ones(2, 2)), student_weights=weights)


# -- attention
# ------------------------------------------------------------------------------------------------------------


def maps(seed, heads, causal=False):
    scores = 2 * torch.randn(2, heads, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if causal:
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("causal", [False, True])
def test_layers_that_look_alike_are_found_whatever_the_order_of_their_heads(causal):
    teacher = [maps(seed, 4, causal) for seed in range(6)]
    student = [teacher[t - 1][:, torch.randperm(4, generator=torch.Generator().manual_seed(t))] for t in (2, 3, 6)]
    found = attention_similarity(student, teacher, causal=causal)
    assert found.shape == (4, 7)
    assert found[0].isnan().all() and found[:, 0].isnan().all()  # embeddings do not attend
    assert [float(found[s, t]) for s, t in ((1, 2), (2, 3), (3, 6))] == pytest.approx([1, 1, 1])
    assert found[1:, 1:].max() <= 1 and found[1, 1] < 0.9
    for method in ("monotone", "assignment"):
        assert LayerMap.from_similarity(found, method).pairs == [(1, 2), (2, 3), (3, 6)]
    assert LayerMap.emd(found).weights[1, 2] > 0


def test_padding_and_numbers_of_heads_do_not_matter():
    teacher, student = [maps(0, 4)], [maps(0, 4)[:, :2]]
    mask = torch.arange(7) < torch.tensor([7, 5])[:, None]
    broken = [layer.clone() for layer in student]
    broken[0][1, :, 5:] = torch.nan
    assert float(attention_similarity(broken, teacher, mask)[1, 1]) == pytest.approx(1)


def test_maps_of_both_models_are_needed():
    with pytest.raises(ValueError, match="found 0 layers of the student and 1 of the teacher"):
        attention_similarity([], [maps(0, 2)])
