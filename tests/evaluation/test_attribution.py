"""Integrated gradients: completeness, a case solved by hand, a second route;
comparison and deletion on known attributions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fakit.evaluation import attribute, compare, deletion

TEXTS = ["the film was very good", "a dull and long story", "good", "the story is not bad but short"]


def test_completeness(bert, words):
    model = bert().requires_grad_(False)
    result = attribute(model, words, TEXTS, steps=64, batch_size=3)
    sums = np.array([scores.sum() for scores in result.scores])
    np.testing.assert_allclose(sums - (result.outputs - result.baselines), result.delta, atol=1e-5)
    np.testing.assert_allclose(result.delta, 0, atol=1e-3)
    few = attribute(model, words, TEXTS, steps=1)
    np.testing.assert_allclose(few.gap * np.abs(few.outputs - few.baselines), np.abs(few.delta))
    assert (few.gap > result.gap).all()
    assert np.abs(sums).min() > 0.05
    with torch.no_grad():
        logits = torch.cat([model(**words([text], return_tensors="pt")).logits for text in TEXTS])
        blank = [" ".join(["[PAD]"] * len(text.split())) for text in TEXTS]
        baseline = torch.cat([model(**words([text], return_tensors="pt")).logits for text in blank])
    assert result.targets.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(result.outputs, logits.max(-1).values, atol=1e-4)
    np.testing.assert_allclose(result.baselines, baseline[range(4), result.targets], atol=1e-4)


def test_against_a_riemann_sum_of_our_own(bert, words):
    model, text = bert(), TEXTS[0]
    result = attribute(model, words, [text], targets=[1], steps=64)
    encoded = words([text], return_tensors="pt")
    table = model.get_input_embeddings()
    start_ids = torch.where(torch.tensor(result.special[0]), encoded["input_ids"], words.pad_token_id)
    start, end = table(start_ids).detach(), table(encoded["input_ids"]).detach()
    gradient = torch.zeros_like(start)
    points = (torch.arange(500) + 0.5) / 500
    for alpha in points:
        x = (start + alpha * (end - start)).requires_grad_()
        output = model(inputs_embeds=x, attention_mask=encoded["attention_mask"]).logits[0, 1]
        gradient += torch.autograd.grad(output, x)[0] / len(points)
    expected = (gradient * (end - start)).sum(-1)[0]
    np.testing.assert_allclose(result.scores[0], expected, atol=2e-3)


def test_shapes_tokens_and_specials(bert, words):
    result = attribute(bert(), words, TEXTS, steps=8, batch_size=2)
    assert len(result) == 4
    for i, text in enumerate(TEXTS):
        assert result.tokens[i] == ["[CLS]", *text.split(), "[SEP]"]
        assert result.special[i].tolist() == [True, *[False] * len(text.split()), True]
        assert result.scores[i].shape == result.input_ids[i].shape == (len(text.split()) + 2,)
        assert result.scores[i][[0, -1]].tolist() == [0, 0]


def test_batches_and_padding_change_nothing(bert, words):
    model = bert()
    whole = attribute(model, words, TEXTS, steps=16, batch_size=4)
    for i, text in enumerate(TEXTS):
        alone = attribute(model, words, [text], steps=16)
        np.testing.assert_allclose(whole.scores[i], alone.scores[0], atol=1e-5)


def test_the_model_is_left_as_found(bert, words):
    model = bert().train()
    model.bert.embeddings.dropout.eval()
    attribute(model, words, TEXTS, steps=4)
    deletion(model, words, attribute(model, words, TEXTS[:1], steps=4), steps=2)
    assert model.training and not model.bert.embeddings.dropout.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks and not model.get_input_embeddings()._forward_pre_hooks


def test_another_baseline_token(bert, words):
    model = bert()
    pad, mask = (attribute(model, words, TEXTS, baseline_token=token) for token in (None, "[MASK]"))
    assert (pad.baseline_token, mask.baseline_token) == ("[PAD]", "[MASK]")
    assert not np.allclose(pad.baselines, mask.baselines)
    np.testing.assert_allclose(pad.outputs, mask.outputs, atol=1e-5)


def test_twice_compared(bert, words):
    teacher, student = bert(), bert(layers=1, seed=1)
    first = attribute(teacher, words, TEXTS, steps=16)
    second = attribute(student, words, TEXTS, targets=first.targets, steps=16)
    result = compare(first, second)
    assert result["cosine"].shape == result["spearman"].shape == (4,)
    x, y = first.scores[0][1:-1], second.scores[0][1:-1]
    assert result["cosine"][0] == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    assert result["spearman"][0] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert np.isnan(result["spearman"][2]) and abs(result["cosine"][2]) == pytest.approx(1)  # one token
    same = compare(first, first)
    np.testing.assert_allclose(same["cosine"], 1)
    np.testing.assert_allclose(same["spearman"][[0, 1, 3]], 1)
    opposite = replace(first, scores=[-2 * scores for scores in first.scores])
    np.testing.assert_allclose(compare(first, opposite)["cosine"], -1)


class BagOfWords(torch.nn.Module):
    """logit of class 1 = the summed weight of the words: the right order of deletion is known."""

    def __init__(self, weights: dict[int, float]):
        super().__init__()
        self.table = torch.nn.Embedding(40, 1)
        with torch.no_grad():
            self.table.weight.zero_()
            for token, weight in weights.items():
                self.table.weight[token] = weight

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        total = (self.table(input_ids)[..., 0] * attention_mask).sum(-1)
        return type("Output", (), {"logits": torch.stack([torch.zeros_like(total), total], -1)})


def test_a_linear_model_gets_its_own_weights(words):
    good, bad, long = words.convert_tokens_to_ids(["good", "bad", "long"])
    model = BagOfWords({good: 3.0, bad: -2.0, long: 0.5})
    result = attribute(model, words, ["good the long bad story"], targets=[1], steps=4)
    np.testing.assert_allclose(result.scores[0], [0, 3, 0, 0.5, -2, 0, 0], atol=1e-6)
    assert (result.outputs[0], result.baselines[0]) == (1.5, 0)
    curve = deletion(model, words, result, steps=5, random_orders=200)

    def sigmoid(x):
        return 1 / (1 + np.exp(-np.array(x)))

    assert curve["fraction"].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(curve["ordered"][0], sigmoid([1.5, -1.5, -2, -2, -2, 0]), atol=1e-6)
    assert curve["random"].shape == (1, 200, 6)
    np.testing.assert_allclose(curve["random"][0, :, 0], sigmoid(1.5), atol=1e-6)
    np.testing.assert_allclose(curve["random"][0, :, -1], 0.5, atol=1e-6)
    one_gone = {round(float(p), 5) for p in sigmoid([-1.5, 1.5, 1.0, 3.5])}  # good, the or story, long, bad
    assert {round(float(p), 5) for p in curve["random"][0, :, 1]} == one_gone
    assert curve["gain"][0] == pytest.approx((curve["random"].mean(1) - curve["ordered"]).mean())
    assert curve["gain"][0] > 0.2
    reversed_scores = replace(result, scores=[-result.scores[0]])
    assert deletion(model, words, reversed_scores, steps=5, random_orders=200)["gain"][0] < -0.1


def test_random_orders_are_the_same_for_both_models_and_another_with_another_seed(bert, words):
    teacher = bert()
    first = attribute(teacher, words, TEXTS, steps=4)
    shuffled = replace(first, scores=[scores[::-1].copy() for scores in first.scores])
    a, b = (deletion(teacher, words, x, steps=5)["random"] for x in (first, shuffled))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, deletion(teacher, words, first, steps=5, seed=1)["random"])


def test_a_regressor_is_followed_by_its_output(bert, words):
    model = bert(labels=1)
    result = attribute(model, words, TEXTS[:2], steps=8)
    assert result.targets.tolist() == [0, 0]
    curve = deletion(model, words, result, steps=3, random_orders=1)
    np.testing.assert_allclose(curve["ordered"][:, 0], result.outputs, atol=1e-4)
    np.testing.assert_allclose(curve["ordered"][:, -1], result.baselines, atol=1e-4)


def test_an_eight_bit_model_is_attributed_a_four_bit_one_on_a_cpu_refused(bert, words, tmp_path):
    from transformers import BertForSequenceClassification, BitsAndBytesConfig

    model = bert()
    model.save_pretrained(tmp_path)
    expected = attribute(model, words, TEXTS[:2], targets=[1, 1], steps=32)

    def load(**options):
        return BertForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **options)
        )

    result = attribute(load(load_in_8bit=True), words, TEXTS[:2], targets=[1, 1], steps=32)
    assert compare(expected, result)["cosine"].min() > 0.9
    with pytest.raises(ValueError, match=r"4-bit weights on a CPU.*quantize='8bit'"):
        attribute(load(load_in_4bit=True), words, TEXTS[:2])


def test_errors(bert, words):
    model = bert()
    with pytest.raises(ValueError, match="at least one text"):
        attribute(model, words, [])
    with pytest.raises(ValueError, match="at least one text"):
        attribute(model, words, "the film")
    with pytest.raises(ValueError, match="1 targets for 4 texts"):
        attribute(model, words, TEXTS, targets=[0])
    with pytest.raises(ValueError, match=r"targets \[0, 5\] were asked of a model with 3 classes"):
        attribute(model, words, TEXTS[:2], targets=[0, 5])
    with pytest.raises(ValueError, match=r"texts \[1\].*no token of their own"):
        attribute(model, words, ["good", ""])
    with pytest.raises(ValueError, match=r"'<nothing>' is no token"):
        attribute(model, words, TEXTS, baseline_token="<nothing>")
    first = attribute(model, words, TEXTS, steps=4)
    with pytest.raises(ValueError, match="4 texts against 2"):
        compare(first, attribute(model, words, TEXTS[:2], steps=4))
    with pytest.raises(ValueError, match=r"text 0 has tokens .*film.* on one side, .*dull.* on the other"):
        compare(attribute(model, words, TEXTS[:1], steps=4), attribute(model, words, TEXTS[1:2], steps=4))
    with pytest.raises(ValueError, match="text 0 is explained for class 0 on one side, 1 on the other"):
        compare(*(attribute(model, words, TEXTS[:1], targets=[c], steps=4) for c in (0, 1)))
    with pytest.raises(ValueError, match="steps=0"):
        deletion(model, words, first, steps=0)
    words.pad_token = None
    with pytest.raises(ValueError, match="its pad token is None"):
        attribute(model, words, TEXTS[:1])
