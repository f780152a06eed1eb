"""What layers are worth: by leaving them out, and by how far they turn the hidden states."""

import math

import pytest
import torch
from transformers import default_data_collator

from fakit import shrink
from fakit.compression.importance import MEASURES, divergence, importance, leaving_out, turning
from fakit.models import find_blocks
from tests.families import FAMILIES, batch, tiny
from tests.training.runs import data


def rows(padding: int = 2, count: int = 6) -> list[dict]:
    return [{name: row[name] for name in ("input_ids", "attention_mask")} for row in data(padding=padding, rows=count)]


def parity(model) -> float:
    """A quality: how the model's logits fall on a fixed batch."""
    return model(**batch()).logits.double().sum().item()


def with_identity(family: str, layer: int):
    """A model whose layer adds nothing to what it is given."""
    model = tiny(family)
    with torch.no_grad():
        for name, parameter in find_blocks(model)[layer - 1].named_parameters():
            if any(end in name for end in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    return model


# -- leaving out ------------------------------------------------------------------------------------------------------


# ALBERT is refused, and ModernBERT's first block is built otherwise than its later ones
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("albert", "modernbert")])
@pytest.mark.parametrize("layer", [1, 2])
def test_without_a_layer_a_model_is_the_one_that_never_had_it(family, layer):
    model, inputs = tiny(family, "eager" if family == "gemma2" else "sdpa"), batch()  # its soft cap has no sdpa
    with torch.no_grad(), leaving_out(model, [layer]):
        left = model(**inputs).logits
    with torch.no_grad():
        cut = shrink(model, layers=[i for i in (1, 2, 3) if i != layer]).eval()(**inputs).logits
        whole = model(**inputs).logits
    kept = inputs["attention_mask"].bool() if left.dim() == 3 else slice(None)
    assert torch.allclose(left[kept], cut[kept], atol=1e-4)
    assert not torch.allclose(left[kept], whole[kept], atol=1e-3)


def test_a_model_is_left_as_it_was_found_also_after_an_error():
    model = tiny("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = {name: parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(**batch()).logits
    with pytest.raises(RuntimeError, match="stop"), leaving_out(model, [1, 3]):
        raise RuntimeError("stop")
    assert not any(block._forward_hooks for block in find_blocks(model))
    assert {name: {**vars(module)} for name, module in model.named_modules()}.keys() == before.keys()
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_keeps_the_mode_and_draws_no_random_numbers(training):
    model = tiny("bert", hidden_dropout_prob=0.5).train(training)
    state = torch.get_rng_state()
    for measure in MEASURES:
        importance(model, measure, rows(), default_data_collator, quality=parity)
    assert model.training is training and torch.equal(torch.get_rng_state(), state)


# -- an identity costs nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_identity_layer_costs_nothing(family, measure):
    costs = importance(with_identity(family, 2), measure, rows(), default_data_collator, quality=parity)
    assert list(costs) == [1, 2, 3] and costs[2] == 0.0
    assert all(abs(costs[i]) > 1e-4 for i in (1, 3))


# -- against an independent computation -------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [1, 2, 3])
def test_block_influence_and_angles_as_recomputed_in_float64(run):
    model, texts = tiny("llama"), rows()
    found = turning(model, texts, default_data_collator, run=run, batch_size=4)
    states, seen = [], {}
    handles = [block.register_forward_hook(lambda m, a, o: states.append(o)) for block in find_blocks(model)]
    handles.append(model.model.embed_tokens.register_forward_hook(lambda m, a, o: states.append(o)))
    for row in texts:  # one text at a time, and without its padding
        states.clear()
        length = int(row["attention_mask"].sum())
        with torch.no_grad():
            model(input_ids=row["input_ids"][None, :length])
        for i, hidden in enumerate(states):
            seen.setdefault(i, []).append(hidden[0].double())
    for handle in handles:
        handle.remove()
    h = [torch.cat(seen[i]) for i in range(4)]
    cosine = lambda i, j: torch.nn.functional.cosine_similarity(h[i], h[j], dim=-1)  # noqa: E731
    assert found.tokens == len(h[0]) and found.run == run
    for i in (1, 2, 3):
        assert found.block_influence[i] == pytest.approx(float(1 - cosine(i - 1, i).mean()), abs=1e-6)
    assert list(found.angular_distance) == list(range(1, 5 - run))
    for i, distance in found.angular_distance.items():
        angle = torch.arccos(cosine(i - 1, i - 1 + run)).mean() / math.pi
        assert distance == pytest.approx(float(angle), abs=1e-6)


def test_the_divergence_is_that_of_the_smaller_model():
    model, texts = tiny("llama"), rows()
    student = shrink(model, layers=[1, 3])
    (expected,) = divergence(model, student, texts, default_data_collator)
    total = 0.0
    for row in texts:
        length = int(row["attention_mask"].sum())
        with torch.no_grad():
            theirs, ours = (
                m(input_ids=row["input_ids"][None, :length]).logits[0, :-1].double() for m in (model, student.eval())
            )
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    total /= sum(int(row["attention_mask"].sum()) - 1 for row in texts)
    assert expected == pytest.approx(total, rel=1e-4)
    assert importance(model, "kl", texts, default_data_collator)[2] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("measure", ["kl", "block_influence", "angular_distance"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_and_the_split_into_batches_change_nothing(family, measure):
    model = tiny(family)
    wider = [
        {name: torch.nn.functional.pad(x, (0, 5), value=7 if name == "input_ids" else 0) for name, x in row.items()}
        for row in rows()
    ]
    found = importance(model, measure, rows(), default_data_collator, batch_size=6)
    for texts, size in ((wider, 6), (rows(), 2)):
        assert importance(model, measure, texts, default_data_collator, batch_size=size) == pytest.approx(
            found, rel=1e-4
        )


def test_quality_is_lost_by_as_much_as_the_function_says():
    model = tiny("bert")
    costs = importance(model, "quality", quality=parity)
    for i in (1, 2, 3):
        assert costs[i] == pytest.approx(
            parity(model) - parity(shrink(model, layers=sorted({1, 2, 3} - {i})).eval()), rel=1e-3
        )


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"measure": "taylor"}, "importance 'taylor' is not known; choose one of 'kl', 'quality', 'block_influence'"),
        ({"measure": "quality"}, "importance 'quality' was asked, and no function"),
        ({"measure": "quality", "quality": lambda model: math.nan}, "quality gave nan"),
        ({"measure": "kl", "data": None}, "looks at texts: give data="),
        ({"measure": "kl", "data": []}, "dataset is empty"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        importance(tiny("bert"), **({"data": rows(), "collator": default_data_collator} | settings))


@pytest.mark.parametrize("family, said", [("t5", "two stacks, an encoder of 3"), ("albert", "3 layers share 1 blocks")])
def test_models_whose_layers_cannot_be_told_apart_are_refused(family, said):
    with pytest.raises(ValueError, match=said):
        importance(tiny(family), "kl", rows(), default_data_collator)


@pytest.mark.parametrize("layers", [[0], [4], [True], ["1"]])
def test_layers_that_are_not_there_cannot_be_left_out(layers):
    with pytest.raises(ValueError, match="has layers 1…3"), leaving_out(tiny("bert"), layers):
        raise AssertionError("the context was entered")


@pytest.mark.parametrize("run", [0, 4, 1.0, True])
def test_runs_that_do_not_fit_are_refused(run):
    with pytest.raises(ValueError, match="choose 1…3"):
        turning(tiny("bert"), rows(), default_data_collator, run=run)


def test_a_regression_has_no_divergence():
    with pytest.raises(ValueError, match="single output is 0 whatever the models say"):
        importance(tiny("bert", num_labels=1), "kl", rows(), default_data_collator)


def test_states_without_a_direction_are_refused():
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    with pytest.raises(ValueError, match=r"layer 0 are not finite, or 0 throughout, at \d+ of \d+ tokens"):
        turning(model, rows(), default_data_collator)


def test_without_a_valid_token_there_is_nothing_to_measure():
    empty = [
        {name: torch.zeros_like(x) if name == "attention_mask" else x for name, x in row.items()} for row in rows()
    ]
    with pytest.raises(ValueError, match="no valid token"):
        turning(tiny("bert"), empty, default_data_collator)
