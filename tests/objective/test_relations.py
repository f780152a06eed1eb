"""Losses that compare relations stand in a Features term as the others do, without a projection."""

import pytest
import torch

from fakit import Features, LayerMap, Objective, Outputs, Task, capture
from fakit.experiments.terms import FeaturesConfig
from fakit.losses import relational
from fakit.losses.features import LOSSES
from fakit.training.fit import check_fit
from fakit.training.token_counts import counts, shares
from tests.families import tiny
from tests.scale.ranks import uneven
from tests.training.runs import logged, make, parts

RELATIONS = [name for name, loss in relational.LOSSES.items() if loss.widths_differ]


def traces(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    student = tiny("bert", seed=1, hidden_size=16, intermediate_size=24)
    return [capture(model.double(), batch, [1, 2]) for model in (student, tiny("bert"))], batch


def term(name: str, **settings) -> Objective:
    return Objective(LayerMap([(1, 1), (2, 2)]), Features(name, **settings))


@pytest.mark.parametrize("name", LOSSES)
def test_a_projection_is_learned_only_where_the_loss_needs_equal_widths(name):
    made = term(name).double().prepare(16, 32).double()
    assert set(made.projections) == (set() if name in RELATIONS else {"S1_T1", "S2_T2"})
    (ours, theirs), batch = traces(uneven(causal=False, rows=8))
    found = made(ours, theirs)
    found.total.backward()
    assert found.total.item() > 0 and set(found.per_layer["features"]) == {(1, 1), (2, 2)}
    for (s, t), value in found.per_layer["features"].items():
        states = ours.hidden_states[s], theirs.hidden_states[t]
        if name not in RELATIONS:
            states = made.projections[f"S{s}_T{t}"](states[0]), states[1]
        assert value.item() == LOSSES[name](*states, batch["attention_mask"].bool()).item()
    forbidden = term(name, projection=None)
    if name in RELATIONS:
        assert forbidden(ours, theirs).total.item() == found.total.item()
    else:
        with pytest.raises(ValueError, match="no projection is allowed"):
            forbidden(ours, theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_widths_that_differ_are_refused_before_training_only_where_they_matter(name):
    teacher, student, _ = parts()
    if name in RELATIONS:
        check_fit(teacher, student, term(name, projection=None))
    else:
        with pytest.raises(ValueError, match="the student is 16 wide, the teacher 32"):
            check_fit(teacher, student, term(name, projection=None))


@pytest.mark.parametrize(
    "name", ["l2", "smooth_l1", "mobilebert", "nst", "margin_ranking", "similarity", "rkd_distance", "rkd_angle"]
)
def test_parts_of_a_batch_make_the_whole(name):
    torch.manual_seed(0)
    rows, made = uneven(causal=False, rows=8), term(name).double().prepare(16, 32).double()
    pieces = [rows[:3], rows[3:6], rows[6:]]

    def loss(part, share=None):
        (ours, theirs), batch = traces(part)
        return made(ours, theirs, None, share).terms["features"].item(), batch

    whole, _ = loss(rows)
    found = shares([counts(made, loss(p)[1], causal=False, token_logits=False) for p in pieces], gather=lambda x: x)
    together = sum(loss(p, s)[0] for p, s in zip(pieces, found, strict=True)) / 3
    assert together == pytest.approx(whole, rel=1e-6)
    assert sum(loss(p)[0] for p in pieces) / 3 != pytest.approx(whole, rel=1e-5)  # else the mean of means would do


def test_a_losss_parameters_reach_it_and_are_checked_when_the_term_is_made():
    (ours, theirs), _ = traces(uneven(causal=False, rows=8))
    values = [Objective(LayerMap([(1, 1)]), Features("codir", scale=s)).double() for s in (5.0, 40.0)]
    values = [made.prepare(16, 32).double() for made in values]
    values[1].load_state_dict(values[0].state_dict())
    low, high = (made(ours, theirs).total.item() for made in values)
    assert abs(low - high) > 1e-3
    with pytest.raises(ValueError, match="beta above 0"):
        Features("smooth_l1", beta=-1)
    with pytest.raises(ValueError, match=r"Features\('gram', beta=1\).*gram has no parameter 'beta'; it has none"):
        Features("gram", beta=1)


def test_a_file_names_them_and_their_parameters():
    config = FeaturesConfig.from_dict({"loss": "mobilebert", "beta": 10.0, "weight": 2.0})
    assert config.to_dict() == {"loss": "mobilebert", "weight": 2.0, "beta": 10.0}
    assert config.build(lambda given: LayerMap.none()).parameters == {"beta": 10.0}
    for name in LOSSES:
        assert FeaturesConfig.from_dict({"loss": name}).build(lambda given: LayerMap.none()).function is LOSSES[name]


@pytest.mark.parametrize("name", RELATIONS)
def test_a_narrower_student_comes_closer_without_a_projection(name, tmp_path):
    teacher, student, _ = parts()
    made = Objective(LayerMap([(2, 3)]), Features(name, weight=1.0), outputs=Outputs(weight=0), task=Task(weight=0))
    trainer = make(tmp_path, made=(teacher, student, made), num_train_epochs=3)
    trainer.train()
    assert not made.projections
    losses = logged(trainer, "features")
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
