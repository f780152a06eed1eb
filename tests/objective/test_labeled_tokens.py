"""Features at the tokens that carry a label: those alone, the same over parts of a batch, in a file and in training."""

from dataclasses import replace

import pytest
import torch

from fakit import Features, LayerMap, Objective, capture
from fakit.experiments.config import ExperimentConfig
from fakit.objective.feature_terms import Dynamics, Flow, LayerAttention, Pooled
from fakit.objective.positions import labeled_tokens
from fakit.training.token_counts import counts, shares
from tests.families import tiny
from tests.objective.states import EVERY, MASK, OURS, THEIRS

MAP = LayerMap([(1, 1), (2, 3)])
LABELS = torch.tensor([[-100, 7, 7, 7], [7, -100, -100, -100], [-100, -100, 7, -100]])  # 7 where MASK is False, too
LEARNED = torch.tensor(
    [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]
).bool()  # of the second text all: its label is padding's
TERMS = {
    "features": lambda **more: Features("mse", layer_map=MAP, **more),
    "relations": lambda **more: Features("gram", layer_map=MAP, **more),
    "pooled": lambda **more: Pooled("cosine", layer_map=MAP, **more),
    "dynamics": lambda **more: Dynamics(layer_map=MAP, **more),
    "flow": lambda **more: Flow(layer_map=MAP, **more),
    "layer attention": lambda **more: LayerAttention(layer_map=EVERY, **more),
}


def loss(term, *sides, labels=LABELS):
    return Objective(terms={"it": term}).prepare(6, 6).double()(*sides, labels).terms["it"].item()


def test_which_tokens_carry_a_label():
    assert torch.equal(labeled_tokens(MASK, LABELS), LEARNED)
    packed, documents = torch.ones(1, 6).bool(), torch.tensor([[0, 0, 0, 1, 1, 2]])
    labels = torch.tensor([[-100, 7, 7, -100, -100, 7]])
    wanted = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()  # the second document has no label, so all of it counts
    assert torch.equal(labeled_tokens(packed, labels, documents), wanted)


@pytest.mark.parametrize("name", TERMS)
def test_what_has_no_label_has_no_part(name):
    found = loss(TERMS[name](tokens="labeled"), OURS, THEIRS)
    narrowed = [replace(side, mask=LEARNED) for side in (OURS, THEIRS)]
    assert found == pytest.approx(loss(TERMS[name](), *narrowed), rel=1e-12)
    assert found != pytest.approx(loss(TERMS[name](), OURS, THEIRS), rel=1e-3)
    spoilt = {i: x.masked_fill(~LEARNED.unsqueeze(-1), 99.0) for i, x in OURS.hidden_states.items()}
    assert loss(TERMS[name](tokens="labeled"), replace(OURS, hidden_states=spoilt), THEIRS) == found
    assert loss(TERMS[name](tokens="labeled"), OURS, THEIRS, labels=None) == loss(TERMS[name](), OURS, THEIRS)


@pytest.mark.parametrize("name", ["features", "pooled", "dynamics", "flow"])
def test_parts_of_a_batch_make_the_whole(name):
    torch.manual_seed(0)
    made = Objective(terms={"it": TERMS[name](tokens="labeled")}).prepare(32, 32).double()
    student, teacher = tiny("gpt2", seed=1).double(), tiny("gpt2").double()
    batch = {"input_ids": torch.randint(3, 30, (6, 7)), "attention_mask": torch.ones(6, 7).long()}
    batch["attention_mask"][0, 4:] = batch["attention_mask"][3, 2:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(6, 7) < 0.6, -100)

    def value(rows, share=None):
        part = {key: x[rows] for key, x in batch.items()}
        sides = [capture(m, {k: x for k, x in part.items() if k != "labels"}, [0, 1, 2, 3]) for m in (student, teacher)]
        return made(*sides, part["labels"], share).terms["it"].item(), part

    pieces = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = [counts(made, value(p)[1], causal=True, token_logits=True) for p in pieces]
    together = sum(value(p, s)[0] for p, s in zip(pieces, shares(parts, gather=lambda x: x), strict=True)) / 3
    assert together == pytest.approx(value(slice(0, 6))[0], rel=1e-6)


def test_labels_of_texts_and_other_words_are_refused():
    with pytest.raises(ValueError, match=r"Features\(tokens='answers'\) is not known; choose one of 'all', 'labeled'"):
        Features(tokens="answers")
    with pytest.raises(ValueError, match=r"it compares tokens that carry a label .* labels are \(3,\) beside \(3, 4\)"):
        loss(Features(layer_map=MAP, tokens="labeled"), OURS, THEIRS, labels=torch.tensor([0, 1, 0]))


def test_a_file_says_it():
    config = ExperimentConfig(features={"tokens": "labeled"})
    assert config.features.tokens == "labeled" and config.to_dict()["features"]["tokens"] == "labeled"
    assert "tokens" not in ExperimentConfig().to_dict()["features"]  # ids of runs stay
    assert config.features.build(lambda pairs: MAP).tokens == "labeled"
