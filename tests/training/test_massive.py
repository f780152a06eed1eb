"""Massive activations, planted: found where they are, and what of a term they are worth against a loss by hand."""

import logging

import pytest
import torch

from fakit import Features, LayerMap, Objective, capture, preflight, shrink
from fakit.models.blocks import stack_depths
from fakit.models.massive import in_words, massive_activations
from fakit.training.massive import share_of_massive, warn_of_massive
from tests.families import tiny

MAP = LayerMap(((1, 1), (2, 3)))


def planted(value: float = 4_000.0, family: str = "llama"):
    """A decoder whose token 3 has one huge entry in its embedding, which the residual stream carries on."""
    model = tiny(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] = value
    return model


@pytest.fixture
def batch():
    ids = torch.randint(4, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 2] = 3
    ids[0, 0] = 3
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padded on the left, so that its first token is the planted one
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_they_are_found_where_they_are(family, batch):
    model = planted(family=family)
    with torch.no_grad():
        states = capture(model, batch, hidden_states=[0, 1, 2]).hidden_states
    found = massive_activations(states, batch["attention_mask"])
    assert [one.layer for one in found] == [0, 1, 2]
    valid = states[1][batch["attention_mask"].bool()]
    for one, x in zip(found, states.values(), strict=True):
        x = x[batch["attention_mask"].bool()]
        assert one.dimensions == (5,) and one.first == pytest.approx(2 / 4)
        assert one.ratio == pytest.approx((x.abs().max() / x.abs().median()).item())
    share = valid[:, 5][valid[:, 5].abs() > 100].square().sum() / valid.square().sum()
    assert found[1].share == pytest.approx(share.item(), rel=1e-4) and found[1].share > 0.9
    assert "layers 0-2, dimension 5: up to " in in_words(found) and "50% of them at first tokens" in in_words(found)
    report = preflight(model, shrink(model, 1), batch=batch)
    assert report["massive activations"].status == "warning" and report.ok
    assert "dimension 5" in report["massive activations"].teacher and "cosine" in report["massive activations"].fix


def test_padding_and_ordinary_states_have_none(batch):
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 3, 7)
    ids[1, :2] = 3  # under the mask
    model = planted()
    given = {**batch, "input_ids": ids}
    row = preflight(model, shrink(model, 1), batch=given)["massive activations"]
    assert (row.status, row.teacher, row.student) == ("ok", "none", "none")
    objective = Objective(MAP, features=Features())
    assert share_of_massive(objective, shrink(model, 2), model, given) == {}


@pytest.mark.parametrize(("loss", "most"), [("mse", 1.0), ("cosine", 0.2)])
def test_what_of_a_term_they_are_worth(loss, most, batch, caplog):
    teacher = planted()
    student = shrink(tiny("llama", seed=1), 2)  # has none of its own
    objective = Objective(MAP, features=Features(loss))
    share = share_of_massive(objective, student, teacher, batch)["features"]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        ours = capture(student, batch, hidden_states=[1, 2]).hidden_states
        theirs = capture(teacher, batch, hidden_states=[1, 3]).hidden_states
    whole = rest = 0.0
    for s, t in MAP.pairs:
        x, y = ours[s][mask].double(), theirs[t][mask].double()
        large = (y.abs() > 100) & (y.abs() > 1000 * y.abs().median())
        for zeroed in (False, True):
            a, b = (z.masked_fill(large, 0.0) if zeroed else z for z in (x, y))
            value = (a - b).square().mean() if loss == "mse" else (1 - torch.cosine_similarity(a, b, dim=-1)).mean()
            whole, rest = (whole, rest + value.item()) if zeroed else (whole + value.item(), rest)
    assert share == pytest.approx(max(0.0, 1 - rest / whole), abs=1e-4) and share <= most
    with caplog.at_level(logging.WARNING):
        warn_of_massive(objective, student, teacher, batch)
    assert (share > 0.5) == ("features: " in caplog.text) == (loss == "mse")
    if loss == "mse":
        assert share > 0.99 and "layers 1, 3, dimension 5" in caplog.text and "take loss: cosine" in caplog.text


def test_terms_that_do_not_see_them_are_not_warned_of(batch, caplog):
    teacher = planted()
    student = shrink(teacher, 2)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 3, -100)
    for features in (Features(tokens="labeled"), Features(standardize="dimension"), Features(at="attention")):
        warn_of_massive(Objective(MAP, features=features), student, teacher, {**batch, "labels": labels})
    narrow = Objective(MAP, features=Features()).prepare(16, 32)
    warn_of_massive(narrow, shrink(teacher, 2, 16), teacher, batch)
    assert "massive" not in caplog.text


def test_a_decoder_of_other_tokens_than_its_encoder_is_looked_at_by_its_own_mask():
    teacher = planted(family="t5")
    batch = {"input_ids": torch.randint(4, 50, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    batch["labels"] = torch.full((2, 5), 7)
    batch["decoder_input_ids"] = torch.full((2, 5), 3)
    student = shrink(tiny("t5", seed=1), 2)
    pairs = LayerMap.uniform(stack_depths(student), stack_depths(teacher))
    found = share_of_massive(Objective(pairs, features=Features()), student, teacher, batch)
    assert found["features"] > 0.1  # of the decoder alone: the planted token is nowhere in the encoder's texts
