"""A term written outside of the kit works everywhere without another line: breakdown, trainer, cache,
parts of a batch, gradients, widgets.
"""

import pytest
import torch

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, Term, capture
from fakit.objective import Needs
from fakit.objective.gradients import balanced_weights, term_gradients
from fakit.training.session import TrainSession
from fakit.training.token_counts import counts, shares
from fakit.widgets import cockpit, loss_laboratory, loss_weights
from tests.families import tiny
from tests.objective.own_term import Contrastive
from tests.scale.ranks import uneven
from tests.training.runs import cache_of, data, logged, make, parts


def objective(**settings) -> Objective:
    return Objective(
        LayerMap([(1, 2), (2, 3)]), Features("mse"), task=Task(), terms={"contrast": Contrastive(**settings)}
    )


def traces(family: str = "bert"):
    rows = uneven(causal=family == "gpt2", rows=8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return capture(tiny(family, seed=1), batch, [1, 2]), capture(tiny(family), batch, [2, 3]), batch


def test_it_stands_in_the_breakdown_beside_the_others():
    ours, theirs, batch = traces()
    made = objective(weight=0.5)
    found = made(ours, theirs, batch["labels"])
    assert list(found.terms) == ["features", "task", "contrast"] == list(made.terms) == list(made.weights)
    alone = Contrastive().compare(ours, theirs.detach(), None)
    assert torch.equal(found.terms["contrast"], alone) and torch.equal(found.weighted["contrast"], 0.5 * alone)
    made.weights["contrast"] = 0
    assert "contrast" not in made(ours, theirs, batch["labels"]).terms
    assert made.needs("teacher") == Needs(hidden_states=[2, 3])
    made.weights["features"] = 0
    assert not made.needs_teacher()


@pytest.mark.parametrize("cached", [False, True])
def test_it_trains_live_and_from_a_cache(cached, tmp_path):
    runs = {}
    for name in ("live", "cached") if cached else ("live",):
        teacher, student, _ = parts(width=32)
        made = objective(weight=2.0)
        more = {}
        if name == "cached":
            cache = cache_of(tmp_path / "cache", teacher, made)
            assert cache.content.hidden_states == (2, 3) and not cache.content.logits
            more = {"teacher_cache": cache}
        trainer = make(tmp_path / name, made=(teacher, student, made), extra=more)
        trainer.train()
        runs[name] = logged(trainer, "contrast")
    assert len(runs["live"]) == 6 and runs["live"][-1] < runs["live"][0]
    if cached:
        assert runs["cached"] == pytest.approx(runs["live"], rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_its_parts_make_the_whole(family):
    rows = uneven(causal=family == "gpt2", rows=8)
    made = objective()

    def loss(part, share=None):
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
        ours, theirs = (capture(tiny(family, seed=seed).double(), batch, [1, 2, 3]) for seed in (1, 0))
        return batch, made(ours, theirs, batch["labels"], share)

    _, whole = loss(rows)
    pieces = [rows[:3], rows[3:6], rows[6:]]
    found = shares([counts(made, loss(p)[0], family == "gpt2", family == "gpt2") for p in pieces], gather=lambda x: x)
    together = sum(loss(p, s)[1].terms["contrast"] for p, s in zip(pieces, found, strict=True)) / 3
    torch.testing.assert_close(together, whole.terms["contrast"], rtol=1e-6, atol=0)
    plain = sum(loss(p)[1].terms["contrast"] for p in pieces) / 3
    assert not torch.allclose(plain, whole.terms["contrast"], rtol=1e-3)  # else the mean of means would do


def test_its_gradient_stands_in_the_laboratory_and_its_weight_on_a_slider(tmp_path):
    teacher, student, _ = parts(width=32)
    made = objective()
    batch = {name: torch.stack([row[name] for row in data(rows=4)]) for name in data(rows=4)[0]}
    found = term_gradients(made, teacher, student, [batch])
    assert set(found.terms) == {"features", "task", "contrast"} and balanced_weights(found)["contrast"] > 0
    lab = loss_laboratory(made, teacher, student, [batch])
    lab.sliders["contrast"].value = 0.25
    lab.apply.click()
    assert made.weights["contrast"] == 0.25
    weights = loss_weights(made, capture(student, batch, [1, 2]), capture(teacher, batch, [2, 3]), batch["labels"])
    assert "contrast" in weights.sliders
    trainer = make(tmp_path, made=(teacher, student, made))
    assert "contrast" in cockpit(TrainSession(trainer)).sliders


def test_two_terms_of_one_kind_have_their_own_maps_weights_and_projections():
    made = Objective(
        LayerMap([(1, 2)]),
        Features("mse"),
        outputs=Outputs("forward_kl", temperature=2.0),
        terms={
            "embeddings": Features("cosine", layer_map=LayerMap([(0, 0)]), weight=0.5),
            "again": Features("mse"),
            "sharp": Outputs("reverse_kl", temperature=1.0),
        },
    ).prepare(16, 32)
    assert set(made.projections) == {"S1_T2", "embeddings_S0_T0", "again_S1_T2"}
    assert made.needs("teacher") == Needs(hidden_states=[0, 2], logits=True)
    made.temperature = 3.0
    assert {name: term.temperature for name, term in made.terms.items() if isinstance(term, Outputs)} == {
        "outputs": 3.0,
        "sharp": 3.0,
    }


@pytest.mark.parametrize("chunked", [True, False])
def test_a_losses_own_parameters_reach_full_logits_and_chunks(chunked, monkeypatch):
    import fakit.tracing.head_finder as head_finder

    monkeypatch.setattr(head_finder, "LARGE_VOCABULARY", 8)
    rows = uneven(causal=True, rows=8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    values = {}
    for beta in (0.1, 0.5, 0.9):
        made = Objective(outputs=Outputs("jsd", beta=beta, chunked=chunked), task=Task())
        sides = []
        for seed, side in ((1, "student"), (0, "teacher")):
            needs = made.needs(side)
            sides.append(capture(tiny("gpt2", seed=seed).double(), batch, logits=needs.capture_logits))
        assert (sides[0].head is not None) == chunked
        values[beta] = made(*sides, batch["labels"]).terms["outputs"].item()
        whole = Objective(outputs=Outputs("jsd", beta=beta, chunked=False))
        full = [capture(tiny("gpt2", seed=seed).double(), batch) for seed in (1, 0)]
        assert values[beta] == pytest.approx(whole(*full, batch["labels"]).terms["outputs"].item(), rel=1e-6)
    assert len({round(value, 6) for value in values.values()}) == 3


class Wrong(Term):
    def __init__(self, needs=None, value=None):
        self.asked, self.value = needs, value

    def needs(self, side):
        return self.asked

    def compare(self, student, teacher, labels):
        return self.value


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Objective(terms={"features": Task()}), "has a name of its own"),
        (lambda: Objective(terms={"a b": Task()}), "has a name of its own"),
        (lambda: Objective(terms={"mine": Contrastive}), r"a term is .*Write Contrastive\(…\)"),
        (lambda: Objective(terms={"mine": 0.5}), "mine is 0.5; a term is"),
        (lambda: Objective(terms={"mine": Wrong({"layers": [1]})}).needs("teacher"), "the mine term.*needs.*layers"),
        (
            lambda: Objective(terms={"mine": Wrong({"hidden_states": [-1]})}).needs("teacher"),
            "layers are whole numbers",
        ),
        (
            lambda: Objective(terms={"mine": Wrong({"hidden_states": [9]})}).check_layers(2, 3),
            "needs layer 9 of the st",
        ),
        (lambda: Objective(terms={"mine": Wrong(value=1.0)})(*traces()[:2]), "gave 1.0; a loss is a scalar tensor"),
        (lambda: Objective(terms={"mine": Wrong(value=torch.ones(3))})(*traces()[:2]), r"gave a tensor \(3,\)"),
        (lambda: Outputs("jsd", gamma=1), r"jsd has no parameter 'gamma'; it has beta, and Outputs takes loss, temp"),
        (lambda: Outputs("jsd", beta=2.0), "0 < beta < 1"),
        (lambda: Outputs("forward_kl", mask=None), "no parameter 'mask'"),
        (lambda: Features("mse", beta=1), "no parameter 'beta'; it has none of its own"),
    ],
)
def test_what_is_no_term_is_refused_by_name(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_a_term_that_was_given_is_frozen_with_its_copy():
    mine = Contrastive()
    made = Objective(terms={"contrast": mine}, attention=Attention(), layer_map=LayerMap([(1, 1)]))
    with pytest.raises(ValueError, match=r"objective\.weights\['contrast'\] = 3.0 changes the weight"):
        made.terms["contrast"].weight = 3.0
    with pytest.raises(ValueError, match="cannot be set once the term is made"):
        mine.scale = 1.0
    made.weights["contrast"] = 3.0
    assert made.terms["contrast"].weight == 3.0 and mine.weight == 1.0
