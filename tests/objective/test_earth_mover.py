"""BERT-EMD: the flow is the cheapest, its gradient goes through the costs alone, and masses move as in their code."""

import itertools

import numpy as np
import pytest
import torch

from fakit import Features, LayerMap, Objective, Trace
from fakit.experiments.terms import build_further_term
from fakit.objective.earth_mover import EarthMover, cheapest_flow
from tests.objective.states import EVERY, MASK, OURS, THEIRS, trace
from tests.training.runs import cache_of, logged, make, parts


def costs_by_hand(ours: Trace = OURS, theirs: Trace = THEIRS) -> np.ndarray:
    found = [
        [((ours.hidden_states[s][MASK] - theirs.hidden_states[t][MASK]) ** 2).mean().item() for t in (1, 2, 3)]
        for s in (1, 2)
    ]
    return np.array(found)


def test_the_flow_is_the_cheapest_of_all():
    """Two layers onto three: a flow has one free number per entry of its first row, searched on a grid."""
    double = {"dtype": torch.float64}
    for seed in range(4):
        costs = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed), **double)
        student, teacher = torch.tensor([0.6, 0.4], **double), torch.tensor([0.5, 0.3, 0.2], **double)
        flow = cheapest_flow(costs, student, teacher)
        torch.testing.assert_close(flow.sum(1), student, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(flow.sum(0), teacher, rtol=1e-7, atol=1e-9)
        best = np.inf
        for a, b in itertools.product(np.linspace(0, 0.5, 51), np.linspace(0, 0.3, 31)):
            first = np.array([a, b, 0.6 - a - b])
            second = teacher.numpy() - first
            if min(first.min(), second.min()) >= -1e-12:
                best = min(best, float((np.stack([first, second]) * costs.numpy()).sum()))
        assert float((flow * costs).sum()) == pytest.approx(best, abs=1e-9)


def test_the_loss_is_the_flow_times_the_costs_and_its_gradient_leaves_the_flow_alone():
    made = Objective(EVERY, terms={"it": EarthMover(cost_attention=False)}).double()
    ours = Trace(hidden_states={i: h.clone().requires_grad_() for i, h in OURS.hidden_states.items()}, mask=MASK)
    found = made(ours, THEIRS)
    costs = costs_by_hand()
    flow = cheapest_flow(torch.from_numpy(costs), torch.full((2,), 0.5), torch.full((3,), 1 / 3)).numpy()
    assert found.total.item() == pytest.approx(float((flow * costs).sum()), rel=1e-7)
    shares = made.pairs("it")
    assert set(shares) == set(found.per_layer["it"]) and len(shares) <= 4  # a vertex has S + T - 1 entries at most
    for (s, t), share in shares.items():
        assert share == pytest.approx(flow[s - 1, t - 1], rel=1e-6)
        assert found.per_layer["it"][s, t].item() == pytest.approx(costs[s - 1, t - 1], rel=1e-10)
    found.total.backward()
    for s in (1, 2):
        valid = OURS.hidden_states[s].nan_to_num()
        expected = sum(
            flow[s - 1, t - 1] * 2 * (valid - THEIRS.hidden_states[t].nan_to_num()) / (MASK.sum() * 6)
            for t in (1, 2, 3)
        )
        torch.testing.assert_close(ours.hidden_states[s].grad, expected, rtol=1e-6, atol=1e-12)
    assert made.terms["it"].masses["student"] == {1: 0.5, 2: 0.5}


def test_cost_attention_moves_masses_as_their_code_does():
    made = Objective(EVERY, terms={"it": EarthMover()}).double()
    student, teacher = np.full(2, 0.5), np.full(3, 1 / 3)
    term = made.terms["it"]
    for _ in range(3):
        loss = made(OURS, THEIRS).total.item()
        costs = costs_by_hand()
        flow = cheapest_flow(torch.from_numpy(costs), torch.from_numpy(student), torch.from_numpy(teacher)).numpy()
        assert loss == pytest.approx(float((flow * costs).sum()), rel=1e-6)
        # get_new_layer_weight of their released code, in its own steps
        for weights, cost in ((student, (flow * costs).sum(1)), (teacher, (flow * costs).sum(0))):
            weights[:] = cost / weights
            weights[:] = weights.sum() / weights
            weights[:] = weights / weights.sum()
        assert list(term.masses["student"].values()) == pytest.approx(student.tolist(), rel=1e-6)
        assert list(term.masses["teacher"].values()) == pytest.approx(teacher.tolist(), rel=1e-6)
    before = made.state_dict()["projections.it_masses.teacher"].clone()
    with torch.no_grad():
        made(OURS, THEIRS)
    made.eval()
    made(OURS, THEIRS)
    assert torch.equal(made.state_dict()["projections.it_masses.teacher"], before)  # moved by training alone
    made.train()
    with made.buffers_kept():
        made(OURS, THEIRS)
        assert not torch.equal(made.state_dict()["projections.it_masses.teacher"], before)
    assert torch.equal(made.state_dict()["projections.it_masses.teacher"], before)  # a measurement leaves it alone
    again = Objective(EVERY, terms={"it": EarthMover()}).prepare(6, 6).double()
    again.load_state_dict(made.state_dict())
    assert again.terms["it"].masses == term.masses and made.projection_parameters == {}


def test_where_nothing_costs_anything_masses_stay():
    made = Objective(LayerMap([(1, 1), (1, 2)]), terms={"it": EarthMover()}).double()
    theirs = Trace(hidden_states={1: OURS.hidden_states[1], 2: THEIRS.hidden_states[2]}, mask=MASK)
    assert made(OURS, theirs).total > 0
    assert made.terms["it"].masses == {"student": {1: 1.0}, "teacher": {1: 0.5, 2: 0.5}}


def test_a_nan_is_named_and_a_map_with_holes_is_refused():
    made = Objective(EVERY, terms={"it": EarthMover()}).double()
    broken = Trace(hidden_states={i: h.clone() for i, h in THEIRS.hidden_states.items()}, mask=MASK)
    broken.hidden_states[2][MASK] = torch.nan
    with pytest.raises(ValueError, match=r"(?s)it.*teacher's .* hidden states of layer 2 are not finite"):
        made(OURS, broken)
    with pytest.raises(ValueError, match="EarthMover lets every student layer learn from every teacher layer"):
        Objective(LayerMap([(1, 1), (2, 2)]), terms={"it": EarthMover()}).prepare(6, 6)


def test_one_projection_for_all_and_each_loss():
    made = Objective(EVERY, terms={"it": EarthMover("cosine")}).prepare(4, 6).double()
    assert made.projection_parameters == {"it_all": 24}
    assert made(trace(4, 2, seed=5), THEIRS).total > 0
    gram = Objective(EVERY, terms={"it": EarthMover("gram")}).prepare(4, 6).double()
    assert gram.projection_parameters == {} and gram(trace(4, 2, seed=5), THEIRS).total > 0
    one = Objective(LayerMap([(2, 3)]), terms={"it": EarthMover()}).double()(OURS, THEIRS).total.item()
    assert one == Objective(LayerMap([(2, 3)]), Features("mse")).double()(OURS, THEIRS).total.item()


def test_it_trains_the_same_live_and_from_a_cache_and_goes_on_where_it_stopped(tmp_path):
    runs, masses = {}, {}
    for how in ("live", "cached", "resumed"):
        teacher, student, _ = parts()
        torch.manual_seed(0)
        made, more = Objective(terms={"it": EarthMover(layer_map=EVERY)}), {}
        if how == "cached":
            cache = cache_of(tmp_path / "cache", teacher, made)
            more = {"teacher_cache": cache}
        steps = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
        trainer = make(tmp_path / how, made=(teacher, student, made), extra=more, **steps)
        trainer.train(resume_from_checkpoint=str(tmp_path / "live" / "checkpoint-3") if how == "resumed" else None)
        runs[how], masses[how] = logged(trainer, "it"), made.terms["it"].masses
    assert runs["cached"] == pytest.approx(runs["live"], rel=1e-4)
    assert runs["resumed"][-9:] == runs["live"][-9:] and masses["resumed"] == masses["live"]
    assert runs["live"][-1] < runs["live"][0]
    assert sum(masses["live"]["teacher"].values()) == pytest.approx(1) and masses["live"]["student"] != {1: 0.5, 2: 0.5}


def test_a_file_names_it():
    given = {"kind": "earth_mover", "loss": "mse", "cost_attention": False, "layer_map": [[1, 1], [1, 2]]}
    term = build_further_term("it", given, lambda pairs: LayerMap(pairs))
    assert isinstance(term, EarthMover) and term.cost_attention is False and term.shared is True
