"""The objective: terms, weights, projections and masks, on traces made by hand and against computations by hand."""

import copy
import doctest
import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, Trace, capture, shrink
from fakit.losses import attention, features, outputs
from fakit.losses.task import task_loss
from fakit.objective import objective
from tests.families import batch, tiny

B, T, V, H = 2, 5, 11, 4
MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])
ALL = {"features": Features(), "attention": Attention(), "outputs": Outputs(), "task": Task()}
PAIRS = torch.ones(T, T).tril().bool() & MASK[:, None, :, None] & MASK[:, None, None, :]  # what causal queries may see


def trace(width: int = 8, layers: int = 3, heads: int = H, seed: int = 0, causal: bool = True, **changes) -> Trace:
    """A trace of random numbers that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    made = {
        "hidden_states": {i: draw(B, T, width) for i in range(layers + 1)},
        "maps": {i: draw(B, heads, T, T).softmax(-1) for i in range(1, layers + 1)},
        "logits": draw(B, T, V),
        "mask": MASK,
        "causal": causal,
    }
    return Trace(**(made | changes))


def labels() -> torch.Tensor:
    return torch.tensor([[-100, 3, -100, 5, 7], [1, 2, -100, -100, -100]])


# -- the sum ----------------------------------------------------------------------------------------------------------


def test_the_total_is_the_sum_of_weights_times_terms():
    layer_map = LayerMap([(1, 2), (2, 4), (3, 6)], weights=[1, 2, 5])
    aligned = Objective(
        layer_map,
        Features("cosine", weight=0.3),
        Attention("mse", weight=7.0),
        Outputs("reverse_kl", temperature=3.0, weight=0.5),
        Task(weight=2.0),
    )
    student, teacher = trace(), trace(layers=6, seed=1)
    got = aligned(student, teacher, labels())
    by_hand = {
        "features": sum(
            w * features.cosine(student.hidden_states[s], teacher.hidden_states[t], MASK)
            for (s, t), w in zip(layer_map.pairs, (1 / 8, 2 / 8, 5 / 8), strict=True)
        ),
        "attention": sum(
            w * attention.map_mse(student.maps[s], teacher.maps[t], PAIRS)
            for (s, t), w in zip(layer_map.pairs, (1 / 8, 2 / 8, 5 / 8), strict=True)
        ),
    }
    # rows that predict a labeled next token: 0 → 3, 2 → 5, 3 → 7 in row 0; 0 → 2 in row 1
    rows, positions, targets = torch.tensor([[0, 0, 3], [0, 2, 5], [0, 3, 7], [1, 0, 2]]).T
    by_hand["outputs"] = outputs.reverse_kl(student.logits[rows, positions], teacher.logits[rows, positions], None, 3.0)
    by_hand["task"] = F.cross_entropy(student.logits[rows, positions], targets)
    weights = {"features": 0.3, "attention": 7.0, "outputs": 0.5, "task": 2.0}

    assert list(got.terms) == list(got.weighted) == list(weights)
    for name, expected in by_hand.items():
        assert got.terms[name].item() == pytest.approx(expected.item(), rel=1e-12)
        assert got.weighted[name].item() == pytest.approx(weights[name] * expected.item(), rel=1e-12)
    assert got.total.item() == pytest.approx(sum(weights[n] * x.item() for n, x in by_hand.items()), rel=1e-12)


def test_per_layer_holds_each_pairs_loss_and_the_term_is_their_weighted_mean():
    aligned = Objective(LayerMap([(1, 1), (2, 3)], weights=[3, 1]), features=Features(), attention=Attention())
    student, teacher = trace(), trace(seed=1)
    got = aligned(student, teacher)
    assert list(got.per_layer) == ["features", "attention"]
    for name in got.per_layer:
        assert list(got.per_layer[name]) == [(1, 1), (2, 3)]
        first, second = got.per_layer[name].values()
        assert not first.requires_grad
        assert got.terms[name].item() == pytest.approx(0.75 * first.item() + 0.25 * second.item(), rel=1e-12)
    expected = features.mse(student.hidden_states[2], teacher.hidden_states[3], MASK)
    assert got.per_layer["features"][2, 3].item() == expected.item()


def test_equal_traces_cost_nothing_but_the_task():
    aligned = Objective(LayerMap.uniform(3, 3), Features(), Attention(), Outputs())
    assert abs(aligned(trace(), trace()).total.item()) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_every_term_alone(name):
    alone = Objective(LayerMap.uniform(3, 3), **{name: ALL[name]})
    got = alone(trace(), trace(seed=1), labels())
    assert list(got.terms) == [name] and got.total.item() == got.terms[name].item() > 0
    together = Objective(LayerMap.uniform(3, 3), **ALL)(trace(), trace(seed=1), labels())
    assert together.terms[name].item() == got.terms[name].item()


def test_a_term_may_have_its_own_map_and_embeddings_do_not_attend():
    own = Objective(LayerMap([(0, 0), (3, 3)]), Features(), Attention(), Outputs(), Task())
    got = own(trace(), trace(seed=1), labels())
    assert list(got.per_layer["features"]) == [(0, 0), (3, 3)] and list(got.per_layer["attention"]) == [(3, 3)]
    assert got.terms["attention"].item() == got.per_layer["attention"][3, 3].item()
    other = Objective(LayerMap([(3, 3)]), Features(layer_map=LayerMap([(1, 2)])), Attention())
    assert other.needs("teacher").hidden_states == {2} and other.needs("teacher").attentions == {3}


def test_losses_of_your_own():
    def largest(student, teacher, mask):
        return (student - teacher)[mask].abs().max()

    mine = Objective(
        LayerMap([(1, 1)]),
        Features(largest),
        outputs=Outputs(lambda s, t, mask, temperature: temperature * (s - t)[mask].std()),
    )
    student, teacher = trace(causal=False), trace(seed=1)
    got = mine(student, teacher)
    difference = (student.hidden_states[1] - teacher.hidden_states[1])[MASK]
    assert got.terms["features"].item() == difference.abs().max().item()
    assert got.terms["outputs"].item() == 2 * (student.logits - teacher.logits)[MASK].std().item()


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_and_temperature_change_at_any_time():
    aligned = Objective(LayerMap.uniform(3, 3), **ALL)
    first = aligned(trace(), trace(seed=1), labels())
    aligned.weights["features"] = 0.3
    aligned.weights["task"] = 4
    aligned.outputs.temperature = 5.0
    second = aligned(trace(), trace(seed=1), labels())
    assert second.weighted["features"].item() == pytest.approx(0.3 * first.terms["features"].item(), rel=1e-12)
    assert second.weighted["task"].item() == pytest.approx(4 * first.terms["task"].item(), rel=1e-12)
    assert second.terms["outputs"].item() != first.terms["outputs"].item()
    assert dict(aligned.weights) == {"features": 0.3, "attention": 1.0, "outputs": 1.0, "task": 4.0}


def test_weight_0_needs_nothing_and_computes_nothing():
    aligned = Objective(LayerMap([(1, 2), (2, 3)]), **ALL)
    assert aligned.needs("student") == objective.Needs({1, 2}, {1, 2}, True)
    assert aligned.needs("teacher") == objective.Needs({2, 3}, {2, 3}, True)
    aligned.weights["features"] = 0
    assert aligned.needs("teacher").hidden_states == aligned.needs("student").hidden_states == frozenset()
    aligned.weights["attention"] = 0
    assert aligned.needs("teacher") == objective.Needs(frozenset(), frozenset(), True)
    aligned.weights["outputs"] = 0
    assert aligned.needs("student").logits and not aligned.needs("teacher").logits and not aligned.needs_teacher()
    got = aligned(Trace(logits=trace().logits, mask=MASK, causal=True), None, labels())  # nothing else was captured
    assert list(got.terms) == list(got.weighted) == ["task"] and got.per_layer == {}
    aligned.weights["task"] = 0
    assert not aligned.needs("student").logits


def test_without_labels_the_task_is_left_out_and_needs_no_logits():
    aligned = Objective(LayerMap([(1, 1)]), features=Features(), task=Task())
    assert not aligned.needs("student", labels=False).logits and aligned.needs("student").logits
    assert list(aligned(trace(), trace(seed=1)).terms) == ["features"]


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, None])
def test_weights_are_finite_and_not_negative(weight):
    aligned = Objective(features=Features(), layer_map=LayerMap([(1, 1)]))
    with pytest.raises(ValueError, match=f"weight of 'features' is {weight}; weights are finite numbers ≥ 0"):
        aligned.weights["features"] = weight
    with pytest.raises(ValueError, match="weight of 'task'"):
        Objective(task=Task(weight=weight))
    assert aligned.weights["features"] == 1.0


# -- gradients and projections ----------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_teacher_and_all_of_the_student_gets_one():
    aligned = Objective(LayerMap([(1, 1), (3, 3)]), **ALL)
    student, teacher = trace(), trace(seed=1)
    aligned(student, teacher, labels()).total.backward()
    assert all(h.grad is None for h in teacher.hidden_states.values()) and teacher.logits.grad is None
    assert student.logits.grad is not None and student.hidden_states[2].grad is None
    for i in (1, 3):
        assert (student.hidden_states[i].grad[MASK] != 0).all() and (student.hidden_states[i].grad[~MASK] == 0).all()


def test_a_real_teacher_that_wants_gradients_gets_none():
    teacher = tiny("bert")
    student = shrink(teacher, 2)
    aligned = Objective(LayerMap.uniform(2, 3), Features(), Attention(), Outputs(), Task())
    traces = [capture(m, batch(), range(4)[: n + 1], range(1, n + 1)) for m, n in ((student, 2), (teacher, 3))]
    aligned(*traces, torch.tensor([0, 1])).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_projections_are_made_only_where_widths_differ():
    same = Objective(LayerMap.uniform(3, 6), Features()).prepare(8, 8)
    assert list(same.parameters()) == []
    same(trace(), trace(layers=6))
    assert list(same.parameters()) == []
    wider = Objective(LayerMap.uniform(3, 6), Features()).prepare(6, 8)
    assert {n: tuple(p.shape) for n, p in wider.named_parameters()} == {
        f"projections.S{s}_T{2 * s}.weight": (8, 6) for s in (1, 2, 3)
    }
    assert list(Objective(LayerMap.uniform(3, 6), outputs=Outputs()).prepare(6, 8).parameters()) == []


def test_a_projection_is_a_linear_map_that_is_trained():
    aligned = Objective(LayerMap([(1, 2)]), Features()).double().prepare(6, 8).double()
    student, teacher = trace(width=6), trace(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = aligned(student, teacher)
    weight = aligned.projections["S1_T2"].weight
    expected = features.mse(student.hidden_states[1] @ weight.T, teacher.hidden_states[2], MASK)
    assert got.total.item() == pytest.approx(expected.item(), rel=1e-12)
    got.total.backward()
    assert (weight.grad != 0).any()
    assert aligned.prepare(6, 8).projections["S1_T2"].weight is weight  # asking again makes no new one


def test_a_projection_made_in_a_call_is_warned_of():
    aligned = Objective(LayerMap([(1, 2)]), Features())
    with pytest.warns(
        UserWarning, match=r"a projection 6 → 8 for S1←T2 was made during this call.*prepare\(d_student, d_teacher\)"
    ):
        aligned(trace(width=6), trace())
    assert list(dict(aligned.named_parameters())) == ["projections.S1_T2.weight"]


def test_random_maps_prepare_every_pair_they_may_draw_and_are_redrawn():
    aligned = Objective(LayerMap.random(2, 4, seed=3), Features(), Attention()).prepare(6, 8)
    names = set(aligned.projections)
    assert names == {"S1_T1", "S1_T2", "S1_T3", "S2_T2", "S2_T3", "S2_T4"}
    drawn = set()
    for epoch in range(12):
        aligned.set_epoch(epoch)
        assert aligned.layer_map == LayerMap.random(2, 4, seed=3).for_epoch(epoch)
        assert {f"S{s}_T{t}" for s, t in aligned.layer_map} <= names
        drawn.add(tuple(aligned.layer_map))
    assert len(drawn) > 3
    own = Objective(LayerMap.uniform(2, 4), attention=Attention(layer_map=LayerMap.random(2, 9)))
    own.set_epoch(5)
    assert own.attention.layer_map == LayerMap.random(2, 9).for_epoch(5) and own.layer_map == LayerMap.uniform(2, 4)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(2, 4), (4, 2)])
def test_group_mean_averages_the_side_with_more_heads(ours, theirs):
    aligned = Objective(LayerMap([(1, 1)]), attention=Attention("mse", heads="group-mean"))
    student, teacher = trace(heads=ours), trace(heads=theirs, seed=1)
    pooled = [attention.group_mean(x.maps[1], 2) for x in (student, teacher)]
    assert aligned(student, teacher).total.item() == attention.map_mse(*pooled, PAIRS).item()


# -- outputs and task -------------------------------------------------------------------------------------------------


def test_vocab_size_cuts_both_sides_to_the_shared_vocabulary():
    aligned = Objective(outputs=Outputs(vocab_size=9))
    student, teacher = trace(causal=False), trace(seed=1)
    teacher.logits = torch.cat([teacher.logits, torch.full((B, T, 3), 50.0)], dim=-1)  # padding of the head
    expected = outputs.forward_kl(student.logits[..., :9], teacher.logits[..., :9], MASK, 2.0)
    assert aligned(student, teacher).total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_causal_outputs_without_labels_count_every_position_that_predicts_a_token():
    student, teacher = trace(), trace(seed=1)
    rows, positions = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]).T
    expected = outputs.forward_kl(student.logits[rows, positions], teacher.logits[rows, positions], None, 2.0)
    aligned = Objective(outputs=Outputs())
    assert aligned(student, teacher).total.item() == pytest.approx(expected.item(), rel=1e-12)
    unlabeled = torch.full((B, T), -100)
    assert aligned(student, teacher, unlabeled).total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_left_padding_predicts_nothing():
    mask = MASK.flip(1)  # row 1 begins with two padding tokens: the second of them does not predict the first token
    student, teacher = trace(mask=mask), trace(seed=1, mask=mask)
    rows, positions = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]).T
    expected = outputs.forward_kl(student.logits[rows, positions], teacher.logits[rows, positions], None, 2.0)
    assert Objective(outputs=Outputs())(student, teacher).total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_an_unlabeled_row_counts_in_full_beside_a_labeled_one():
    student, teacher = trace(), trace(seed=1)
    mixed = labels()
    mixed[1] = -100
    rows, positions = torch.tensor([[0, 0], [0, 2], [0, 3], [1, 0], [1, 1]]).T
    expected = outputs.forward_kl(student.logits[rows, positions], teacher.logits[rows, positions], None, 2.0)
    got = Objective(outputs=Outputs(), task=Task())(student, teacher, mixed)
    assert got.terms["outputs"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert got.terms["task"].item() == pytest.approx(
        F.cross_entropy(student.logits[0, [0, 2, 3]], torch.tensor([3, 5, 7])).item(), rel=1e-12
    )


def test_masked_language_models_match_every_token():
    student, teacher = trace(causal=False), trace(seed=1, causal=False)
    got = Objective(outputs=Outputs(), task=Task())(student, teacher, labels())
    assert got.terms["outputs"].item() == outputs.forward_kl(student.logits, teacher.logits, MASK, 2.0).item()
    rows, positions = torch.nonzero(labels() != -100).T  # no shift
    expected = F.cross_entropy(student.logits[rows, positions], labels()[rows, positions])
    assert got.terms["task"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_classification_with_unlabeled_rows():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    answers = torch.tensor([2, -100, 0, -100])
    student, teacher = Trace(logits=logits), Trace(logits=torch.randn(4, 3, dtype=torch.float64))
    got = Objective(outputs=Outputs(), task=Task())(student, teacher, answers)
    assert got.terms["task"].item() == pytest.approx(
        F.cross_entropy(logits[[0, 2]], torch.tensor([2, 0])).item(), rel=1e-12
    )
    assert got.terms["outputs"].item() == outputs.forward_kl(logits, teacher.logits, None, 2.0).item()  # all 4 rows
    nothing = task_loss(logits, torch.full((4,), -100))
    nothing.backward()
    assert nothing.item() == 0.0 and (logits.grad == 0).all()


def test_regression():
    student = Trace(logits=torch.tensor([[0.5], [2.0], [9.0]], requires_grad=True))
    teacher = Trace(logits=torch.tensor([[1.0], [2.0], [3.0]]))
    both = Objective(outputs=Outputs("logit_mse"), task=Task())
    got = both(student, teacher, torch.tensor([1.5, 4.0, -100.0]))
    assert got.terms["task"].item() == pytest.approx((1.0 + 4.0) / 2)
    assert got.terms["outputs"].item() == pytest.approx((0.25 + 0 + 36) / 3)
    nan = task_loss(student.logits, torch.tensor([1.5, 4.0, math.nan]))
    nan.backward()
    assert nan.item() == pytest.approx(2.5) and student.logits.grad.flatten().tolist() == [-1.0, -2.0, 0.0]


# -- what a breakdown says ---------------------------------------------------------------------------------------------


def test_a_breakdown_prints_itself_draws_itself_and_lets_go_of_the_graph():
    got = Objective(LayerMap([(1, 2)]), features=Features(weight=0.5))(trace(), trace(seed=1))
    raw = got.terms["features"].item()
    assert str(got) == f"total {raw / 2:.4g} = features {raw:.4g} (weighted {raw / 2:.4g})"
    assert f"| features | {raw:.4g} | {raw / 2:.4g} | S1←T2 {raw:.3g} |" in got._repr_markdown_()
    cut = got.detach()
    assert got.total.requires_grad and not cut.total.requires_grad and cut.total.item() == got.total.item()
    assert not any(x.requires_grad for x in (*cut.terms.values(), *cut.weighted.values()))


def test_docstring_examples_run():
    result = doctest.testmod(objective, extraglobs={"LayerMap": LayerMap})
    assert result.failed == 0 and result.attempted >= 2


# -- one truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "value", "instead"),
    [
        ("outputs", "loss", "reverse_kl", r"Objective\(…, outputs=Outputs\(…, loss=…\)\)"),
        ("outputs", "function", None, "make a new one"),
        ("outputs", "vocab_size", 5, "make a new one"),
        ("outputs", "chunked", False, "make a new one"),
        ("outputs", "weight", 0.5, r"objective\.weights\['outputs'\] = 0.5"),
        ("features", "projection", None, "make a new one"),
        ("features", "layer_map", LayerMap([(1, 1)]), "make a new one"),
        ("attention", "heads", "best-match", "make a new one"),
        ("attention", "relations", ("keys",), "make a new one"),
        ("task", "weight", 2.0, r"objective\.weights\['task'\] = 2.0"),
    ],
)
def test_a_term_stays_as_it_was_made(name, setting, value, instead):
    objective = Objective(LayerMap.uniform(3, 3), **ALL)
    before = objective(trace(), trace(seed=1), labels()).total.item()
    with pytest.raises(ValueError, match=rf"{setting} .* cannot be set once the term is made.*{instead}"):
        setattr(getattr(objective, name), setting, value)
    with pytest.raises(AttributeError):
        delattr(getattr(objective, name), setting)
    assert objective(trace(), trace(seed=1), labels()).total.item() == before


def test_terms_are_not_exchanged_under_an_objective():
    objective = Objective(LayerMap.uniform(3, 3), features=Features())
    with pytest.raises(ValueError, match=r"objective\.outputs cannot be set.*Make a new Objective\(…, outputs=…\)"):
        objective.outputs = Outputs("reverse_kl")


def test_the_temperature_is_one_number_wherever_it_is_set():
    objective = Objective(None, outputs=Outputs("jsd", temperature=2.0))
    expected = Objective(None, outputs=Outputs("jsd", temperature=5.0))(trace(), trace(seed=1)).total.item()
    objective.temperature = 5.0
    assert objective.outputs.temperature == 5.0 and objective(trace(), trace(seed=1)).total.item() == expected
    objective.outputs.temperature = 3.0
    assert objective.temperature == 3.0
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a temperature is finite and above 0"):
            objective.temperature = wrong
    assert objective.temperature == 3.0
    with pytest.raises(ValueError, match="no outputs term"):
        Objective(None, task=Task()).temperature = 2.0
    assert copy.deepcopy(objective).temperature == 3.0
    with pytest.raises(ValueError, match="cannot be set"):
        copy.deepcopy(objective).outputs.loss = "reverse_kl"


def test_a_terms_own_random_map_is_drawn_by_the_objective_alone():
    term = Features(layer_map=LayerMap.random(3, 6, seed=1))
    objective = Objective(LayerMap.uniform(3, 6), features=term)
    drawn = set()
    for epoch in range(6):
        objective.set_epoch(epoch)
        drawn.add(tuple(objective.pairs("features")))
    assert len(drawn) > 1 and term.layer_map == LayerMap.random(3, 6, seed=1)
