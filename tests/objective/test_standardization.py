"""The teacher on an even scale: what its statistics are, what they do to a term, and that they stay with the objective."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fakit import Features, LayerMap, Objective, Trace, capture
from fakit.experiments.terms import FeaturesConfig
from fakit.objective.feature_terms import Dynamics, LayerAttention, Pooled
from fakit.objective.standardization import Moments, Standardization, even_rotation, hadamard
from tests.families import tiny
from tests.training.runs import cache_of, data, logged, make, parts

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool()
MAP = LayerMap([(1, 2), (2, 3)])


def states(width: int, seed: int, rows: int = 3) -> Tensor:
    """Dimensions of very different sizes that go together; a mean far from 0; NaN in padding."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-1, 2, width, dtype=torch.float64)
    drawn = torch.randn(rows, 4, width, generator=generator, dtype=torch.float64)
    mask = MASK.repeat(rows // 3, 1)
    return ((drawn @ mixed) * sizes + 50).masked_fill(~mask.unsqueeze(-1), torch.nan)


def trace(width: int, layers, seed: int, rows: int = 3) -> Trace:
    found = {i: states(width, seed + i, rows) for i in layers}
    return Trace(hidden_states=found, mask=MASK.repeat(rows // 3, 1))


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 24, 96, 312, 384, 768])
def test_hadamard_matrices_are(width):
    found = hadamard(width)
    assert (found.abs() == 1).all()
    assert torch.equal(found @ found.T, width * torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("width", [3, 5, 6, 12, 14, 50, 52, 64])
def test_an_even_rotation_brings_any_variances_to_their_mean(width):
    assert (hadamard(width) is None) is (width in (3, 5, 6, 14, 50, 52))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(width, generator=generator, dtype=torch.float64).mul(4).exp()  # over many magnitudes
        rotation = even_rotation(values)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
        spread = (rotation @ values.diag() @ rotation.T).diagonal()
        torch.testing.assert_close(spread, values.mean().expand(width), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["dimension", "phi_s"])
@pytest.mark.parametrize("width", [6, 8])
def test_statistics_of_batches_are_those_of_all_tokens(kind, width):
    side = trace(width, [2], seed=3, rows=12)
    made = Objective(LayerMap([(1, 2)]), Features("mse", standardize=kind)).double()
    parts_of_it = [
        Trace(hidden_states={2: side.hidden_states[2][rows]}, mask=side.mask[rows])
        for rows in (slice(0, 2), slice(2, 3), slice(3, 12))
    ]
    name = f"{kind}_T2"
    assert made.fit_standardization(iter(parts_of_it)) == {name: int(side.mask.sum())} == made.standardizations
    module = made.projections[name].double()
    tokens = side.hidden_states[2][side.mask].numpy()
    np.testing.assert_allclose(module.mean.numpy(), tokens.mean(0), rtol=1e-6)
    given = torch.from_numpy(tokens)
    found = module(given)
    np.testing.assert_allclose(found.mean(0).numpy(), 0, atol=1e-4)
    np.testing.assert_allclose(found.var(0).numpy(), 1, rtol=1e-5)  # every dimension, which is the claim
    if kind == "dimension":
        np.testing.assert_allclose(
            found.numpy(), (tokens - tokens.mean(0)) / tokens.std(0, ddof=1), rtol=1e-4, atol=1e-5
        )
    else:  # a rotation and one scale: invertible, and distances keep their ratios
        eigenvalues = np.linalg.eigvalsh(np.cov(tokens.T))
        product = (module.weight @ module.weight.T * eigenvalues.mean()).numpy()
        np.testing.assert_allclose(product, np.eye(width), atol=1e-5)
        back = torch.linalg.solve(module.weight, found.T).T + module.mean
        torch.testing.assert_close(back, given, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            torch.pdist(found) * eigenvalues.mean() ** 0.5, torch.pdist(given), rtol=1e-5, atol=0
        )


def test_processes_have_one_statistic():
    rows = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 3 + 9 for n in (4, 7)]
    for whole in (True, False):
        moments = [Moments(5, whole) for _ in range(4)]
        for number, made in enumerate(moments[:2]):
            made.add(rows[number])
            made.add(rows[number][:0])  # a batch without tokens
        for x in rows:
            moments[2].add(x)
        together = [torch.stack([getattr(m, n) for m in moments[:2]]) for n in ("mean", "spread")]
        answers = iter([torch.tensor([4, 7]), *together])
        found = moments[0].gathered(lambda x, answers=answers: next(answers))
        assert found.tokens == 11 == moments[2].tokens
        torch.testing.assert_close(found.mean, torch.cat(rows).mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.spread, moments[2].spread, rtol=1e-12, atol=1e-10)
        wanted = torch.cov(torch.cat(rows).T) * 10
        torch.testing.assert_close(found.spread, wanted if whole else wanted.diagonal(), rtol=1e-10, atol=1e-10)


def test_a_dimension_that_never_changes_is_centered_and_nothing_but_equal_tokens_is_refused():
    module, moments = Standardization("dimension", 3), Moments(3, whole=False)
    moments.add(torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 8.0]]))
    module.set(moments)
    torch.testing.assert_close(module(torch.tensor([[2.0, 5.0, 4.0], [2.0, 6.0, 4.0]]))[:, 1], torch.tensor([0.0, 1.0]))
    same = Moments(3, whole=True)
    same.add(torch.ones(4, 3))
    with pytest.raises(ValueError, match="wants tokens that differ; found 4, all the same"):
        Standardization("phi_s", 3).set(same)


@pytest.mark.parametrize("kind", ["dimension", "phi_s"])
def test_a_term_compares_with_the_standardized_teacher(kind):
    ours, theirs = trace(4, [1, 2], seed=1), trace(8, [2, 3], seed=5)
    made = Objective(MAP, Features("mse", standardize=kind), terms={"more": Features("cosine", standardize=kind)})
    made = made.prepare(4, 8).double()
    assert made.standardizations == {f"{kind}_T2": 0, f"{kind}_T3": 0}
    assert set(made.projection_parameters) == {"S1_T2", "S2_T3", "more_S1_T2", "more_S2_T3"}
    with pytest.raises(ValueError, match=r"layer 2, whose statistics are not there: objective\.fit_standardization"):
        made(ours, theirs)
    made.fit_standardization([theirs])
    found = made(ours, theirs)
    for (s, t), value in found.per_layer["features"].items():
        x, y = ours.hidden_states[s][MASK], theirs.hidden_states[t][MASK]
        module = made.projections[f"{kind}_T{t}"]
        if kind == "dimension":
            target = (y - y.mean(0)) / y.std(0)
        else:
            target = (y - y.mean(0)) @ module.weight.T
        projected = x @ made.projections[f"S{s}_T{t}"].weight.T
        assert value.item() == pytest.approx((projected - target).square().mean().item(), rel=1e-5)
    assert not any("weight" in name and kind in name for name, _ in made.named_parameters())  # nothing trains it
    rest = made.fit_projections([clean(ours)], [clean(theirs)])
    assert all(0 <= share <= 1 for share in rest.values())
    assert made(ours, theirs).terms["features"] < found.terms["features"]


def clean(side: Trace) -> Trace:
    return Trace(hidden_states={i: h.nan_to_num(nan=1.0) for i, h in side.hidden_states.items()}, mask=side.mask)


def test_a_student_of_the_teachers_width_goes_through_the_same_map():
    theirs, ours = trace(6, [2, 3], seed=5), trace(6, [1, 2], seed=1)
    made = Objective(MAP, Features("mse", standardize="phi_s", projection=None)).double()
    made.fit_standardization([theirs])
    copied = Trace(hidden_states={1: theirs.hidden_states[2], 2: theirs.hidden_states[3]}, mask=MASK)
    assert made(copied, theirs).total.item() == 0.0
    plain = Objective(MAP, Features("mse")).double()(ours, theirs)
    for (s, t), value in made(ours, theirs).per_layer["features"].items():
        y = theirs.hidden_states[t][MASK].numpy()
        scale = np.linalg.eigvalsh(np.cov(y.T)).mean()  # a rotation and a scale: the plain error over the scale
        assert value.item() == pytest.approx(plain.per_layer["features"][s, t].item() / scale, rel=1e-5)
    for hidden in ours.hidden_states.values():
        hidden.requires_grad_()
    made(ours, theirs).total.backward()
    grad = ours.hidden_states[1].grad
    assert grad[MASK].abs().sum() > 0 and (grad[~MASK] == 0).all()


def test_it_is_in_the_objectives_state():
    theirs = trace(8, [2, 3], seed=5)
    made = Objective(MAP, Features("mse", standardize="phi_s")).prepare(8, 8)
    made.fit_standardization([theirs])
    again = Objective(MAP, Features("mse", standardize="phi_s")).prepare(8, 8)
    again.load_state_dict(made.state_dict())
    assert again.standardizations == made.standardizations == {"phi_s_T2": 7, "phi_s_T3": 7}
    ours = trace(8, [1, 2], seed=1)
    assert again(ours, theirs).total.item() == made(ours, theirs).total.item()


def test_what_cannot_be_standardized_is_refused():
    for wrong, message in (
        (lambda: Features("mse", standardize="whiten"), "is not known; choose one of 'dimension', 'phi_s', or None"),
        (lambda: Features("gram", standardize="phi_s"), "this loss compares relations within each model"),
        (lambda: Features("mse", standardize_batches=4), "for a standardization; standardize='phi_s'"),
        (lambda: Features("mse", standardize="phi_s", standardize_batches=0), "a number of batches, 1 or more"),
        (lambda: LayerAttention(standardize="phi_s"), "would put each on a scale of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="no term of this objective standardizes"):
        Objective(MAP, Features()).fit_standardization([trace(8, [2, 3], seed=5)])
    with pytest.raises(ValueError, match="the traces hold nothing for phi_s_T3"):
        Objective(MAP, Features(standardize="phi_s")).fit_standardization([trace(8, [2], seed=5)])
    made = Objective(MAP, Features("mse", standardize="phi_s"))
    made.fit_standardization([trace(8, [2, 3], seed=5)])
    with pytest.raises(ValueError, match="is 8 wide, the layer 6: this objective was prepared for another teacher"):
        made(trace(6, [1, 2], seed=1), trace(6, [2, 3], seed=5))


# -- the trainer ------------------------------------------------------------------------------------------------------

TERMS = {
    "phi_s": lambda **more: Features("mse", standardize="phi_s", layer_map=MAP, **more),
    "dimension at attention": lambda **more: Features(
        "mse", standardize="dimension", at="attention", layer_map=MAP, **more
    ),
    "pooled": lambda **more: Pooled("mse", standardize="dimension", layer_map=MAP, **more),
    "dynamics": lambda **more: Dynamics("mse", standardize="phi_s", layer_map=MAP, **more),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_trainer_gathers_over_the_first_batches(name, tmp_path):
    runs, found = {}, {}
    for how in ("by hand", "live", "cached"):
        teacher, student, _ = parts()
        torch.manual_seed(0)
        made, more = Objective(terms={"it": TERMS[name](standardize_batches=None if how == "by hand" else 2)}), {}
        if how == "by hand":
            with torch.no_grad():
                rows = data()[:8]
                batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
                made.prepare(16, 32).fit_standardization([capture(teacher, batch, [2, 3], attention_outputs=[2, 3])])
            torch.manual_seed(0)
            for projection in made.projections.values():
                if isinstance(projection, torch.nn.Linear):
                    projection.reset_parameters()
        if how == "cached":
            cache = cache_of(tmp_path / "cache", teacher, made)
            more = {"teacher_cache": cache}
        trainer = make(tmp_path / how.replace(" ", ""), made=(teacher, student, made), extra=more, num_train_epochs=4)
        trainer.train()
        runs[how], found[how] = logged(trainer, "it"), made.standardizations
    assert runs["live"] == pytest.approx(runs["by hand"], rel=1e-3)
    assert runs["cached"] == pytest.approx(runs["live"], rel=1e-3)
    assert len(runs["live"]) == 24 and sum(runs["live"][-6:]) < sum(runs["live"][:6])
    tokens = sum(int(row["attention_mask"].sum()) for row in data()[:8])
    assert all(set(kinds.values()) == {tokens} for kinds in found.values())


def test_a_run_that_goes_on_has_the_statistics_of_its_start(tmp_path):
    def trainer(folder, **changes):
        teacher, student, _ = parts()
        torch.manual_seed(0)
        made = Objective(terms={"it": TERMS["phi_s"](standardize_batches=1)})
        return make(folder, made=(teacher, student, made), save_strategy="steps", save_steps=3, **changes)

    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.gather_standardization = lambda batches: pytest.fail("gathered anew")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(again, "it")[-3:] == logged(whole, "it")[-3:]
    assert again.objective.standardizations == whole.objective.standardizations


def test_a_run_without_statistics_is_refused_with_both_ways(tmp_path):
    teacher, student, _ = parts()
    trainer = make(tmp_path, made=(teacher, student, Objective(terms={"it": TERMS["phi_s"]()})))
    with pytest.raises(ValueError, match=r"fit_standardization\(teacher_traces\) gathers them.*standardize_batches=N"):
        trainer.train()


def test_gathering_leaves_the_runs_random_numbers_alone(tmp_path):
    """Dropout and shuffled rows: a run that gathers sees the same batches and draws the same as one that was given them."""
    runs = []
    for gathers in (True, False):
        teacher, student, _ = parts()
        torch.manual_seed(0)
        made = Objective(terms={"it": TERMS["phi_s"](standardize_batches=2)})
        trainer = make(tmp_path / str(gathers), made=(teacher, student, made), train_sampling_strategy="random")
        if not gathers:
            trainer.objective.load_state_dict(runs[0][1])
        before = {name: value.clone() for name, value in made.state_dict().items() if "phi_s" in name}
        assert bool(before["projections.phi_s_T2.tokens"]) is not gathers
        start = {name: value.clone() for name, value in made.state_dict().items() if "phi_s" not in name}
        trainer.train()
        kept = {name: value.clone() for name, value in made.state_dict().items() if "phi_s" in name}
        runs.append((logged(trainer, "it"), kept | start))
    assert runs[0][0] == runs[1][0]


def test_a_random_map_has_statistics_of_every_layer_it_may_draw():
    made = Objective(LayerMap.random(2, 4), Features("mse", standardize="dimension")).prepare(8, 8)
    assert sorted(made.standardizations) == [f"dimension_T{t}" for t in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="the traces hold nothing for dimension_T1"):
        made.fit_standardization([trace(8, [2, 3, 4], seed=5)])
    made.fit_standardization([trace(8, [1, 2, 3, 4], seed=5)])
    assert set(made.standardizations.values()) == {7}


def test_a_file_names_it():
    config = FeaturesConfig.from_dict({"standardize": "phi_s", "standardize_batches": 8})
    term = config.build(lambda pairs: LayerMap(pairs))
    assert (term.standardize, term.standardize_batches) == ("phi_s", 8)
    assert not {"standardize", "standardize_batches"} & FeaturesConfig.from_dict({}).to_dict().keys()
    with pytest.raises(ValueError, match=r"features\.standardize"):
        FeaturesConfig.from_dict({"standardize": "zca"})


def test_a_real_teachers_massive_dimensions_are_even_afterwards():
    teacher = tiny("llama")
    teacher.model.layers[0].mlp.down_proj.weight.data[5] *= 300  # one dimension hundreds of times the others
    batch = {key: torch.stack([row[key] for row in data(causal=True)]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        side = capture(teacher, batch, [1])
    made = Objective(LayerMap([(1, 1)]), Features("mse", standardize="phi_s"))
    made.fit_standardization([side])
    valid = side.mask
    before = side.hidden_states[1][valid].var(0)
    after = made.projections["phi_s_T1"](side.hidden_states[1])[valid].var(0)
    assert before.max() / before.median() > 1e3 and after.max() / after.min() < 1.01
