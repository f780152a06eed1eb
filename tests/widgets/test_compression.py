"""A budget on a slider and layers taken out by a press: what they show is what the library measures."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fakit.compression import low_rank
from fakit.compression.importance import divergence, leaving_out
from fakit.compression.spectra import count
from fakit.widgets import layer_remover, rank_budget


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=50, initializer_range=0.3, **sizes)
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(5, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist(), "attention_mask": [1] * 6} for row in ids]


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_the_plan_follows_the_slider_and_the_buttons(model):
    spectra = low_rank.spectra(model)
    budget = rank_budget(spectra, keep=0.9)
    assert budget.plan.after <= 0.9 * budget.plan.before and budget.plan.method == "bottom"
    budget.keep.value, budget.method.value = 80, "uniform"
    assert budget.plan.ranks == low_rank.plan(spectra, 0.8, "uniform").ranks
    assert f"→ {budget.plan.after:,} parameters" in budget.sentence and f"→ {budget.plan.after:,} " in repr(
        budget.figure
    )
    low_rank.plan(spectra, budget.keep.min / 100, "uniform")  # the slider's end can be had, what lies beyond cannot
    with pytest.raises(ValueError, match="was requested"):
        low_rank.plan(spectra, (budget.keep.min - 1) / 100, "uniform")
    student = low_rank.compress(model, plan=budget.plan)
    assert count(student) == budget.plan.after
    budget.keep.value = 100
    assert budget.plan.after == budget.plan.before and "0 of" in budget.sentence
    with pytest.raises(ValueError, match="method 'best'"):
        rank_budget(spectra, method="best")


def test_a_press_takes_a_layer_out_and_measures_what_it_costs(model, rows):
    remover = layer_remover(model, rows, collate)
    assert remover.gone == () and remover.together is None and "All 3 layers are in" in remover.sentence
    remover.buttons[2].value = True
    assert remover.together == pytest.approx(remover.prices[2])
    remover.buttons[3].value = True
    batch = collate(rows)
    with torch.no_grad():
        whole = model(**batch).logits.log_softmax(-1).double()
        with leaving_out(model, [2, 3]):
            left = model(**batch).logits.log_softmax(-1).double()
    assert remover.together == pytest.approx((whole.exp() * (whole - left)).sum(-1).mean().item(), rel=1e-4)
    assert "(2, 3)" in remover.sentence and "Without layers 2, 3" in repr(remover.figure)
    remover.buttons[2].value = remover.buttons[3].value = False
    assert remover.gone == () and divergence(model, model, rows, collate) == [pytest.approx(0.0, abs=1e-6)]


def test_both_have_a_picture_without_a_kernel(model, rows):
    for panel in (rank_budget(low_rank.spectra(model), keep=0.9), layer_remover(model, rows, collate)):
        data = panel._repr_mimebundle_()
        assert data["image/svg+xml"].startswith("<svg") and data["text/plain"].endswith(".")
