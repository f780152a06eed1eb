"""A model against a coarser form of itself: by hand, over any batch split, with padding of no effect,
in many families.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fakit.evaluation import attention_jsd, quantization_fidelity, weight_bytes
from fakit.models import load_teacher
from fakit.tracing.capture import capture
from tests.families import EAGER_ONLY, LAYERS, batch, batch_for, tiny


def coarser(family: str, **changes):
    """The model and the same with every matrix rounded to 16 steps a row, as in 4 bits."""
    full, rounded = tiny(family, **changes), tiny(family, **changes)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 8
                parameter.copy_((parameter / step).round() * step)
    return full, rounded


@pytest.fixture(scope="module")
def pair():
    return coarser("bert")


def padded(rows: int = 4) -> dict[str, torch.Tensor]:
    """The last row has padding."""
    return batch(rows=rows, tokens=8, padding=3)


def test_every_number_by_hand(pair):
    full, rounded = pair
    inputs = padded()
    found = quantization_fidelity(full, rounded, [inputs])
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs, ours = (capture(model, inputs, range(LAYERS + 1), range(1, LAYERS + 1)) for model in pair)
    for i in range(LAYERS + 1):
        h, q = theirs.hidden_states[i][mask].double(), ours.hidden_states[i][mask].double()  # (N, d)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(h, q, strict=True)]
        assert found[i].relative_error == pytest.approx(float((q - h).norm() / h.norm()), rel=1e-9)
        assert found[i].cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
        assert found[i].relative_error > 1e-3 and found[i].cosine < 1
    assert found[0].attention_jsd is None
    for i in range(1, LAYERS + 1):
        jsd = attention_jsd(ours.attention_maps(i), theirs.attention_maps(i), mask).mean()
        assert found[i].attention_jsd == pytest.approx(float(jsd), rel=1e-9) and 0 < found[i].attention_jsd < math.log(
            2
        )
    p, q = theirs.logits.double().softmax(-1), ours.logits.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.largest_logit_difference == pytest.approx(float((ours.logits - theirs.logits).abs().max()))
    assert (found.texts, found.tokens) == (4, int(mask.sum()))


def test_batches_and_padding_change_nothing(pair):
    inputs = padded()
    whole = quantization_fidelity(*pair, [inputs])
    parts = ({name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 4)))
    streamed = quantization_fidelity(*pair, parts)
    wider = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in inputs.items()}
    for other in (streamed, quantization_fidelity(*pair, [wider])):
        assert (other.texts, other.tokens, other.agreement) == (whole.texts, whole.tokens, whole.agreement)
        assert other.kl == pytest.approx(whole.kl, rel=1e-3)
        for ours, theirs in zip(other.rows(), whole.rows(), strict=True):
            assert {k: v or 0 for k, v in ours.items()} == pytest.approx(
                {k: v or 0 for k, v in theirs.items()}, rel=1e-4
            )


def test_the_same_model_is_exact(pair):
    found = quantization_fidelity(pair[0], pair[0], [padded()])
    assert {(row.relative_error, row.attention_jsd or 0.0) for row in found.layers} == {(0.0, 0.0)}
    assert (found.kl, found.agreement, found.largest_logit_difference) == (0, 1, 0)
    assert [row.cosine for row in found.layers] == pytest.approx([1.0] * (LAYERS + 1))


def test_errors_are_relative_to_the_full_model(pair):
    full, rounded = pair
    there, back = (
        quantization_fidelity(*models, [padded()], layers=[LAYERS]) for models in ((full, rounded), (rounded, full))
    )
    with torch.no_grad():
        norms = [
            capture(m, padded(), [LAYERS]).hidden_states[LAYERS][padded()["attention_mask"].bool()].norm() for m in pair
        ]
    assert there[LAYERS].relative_error / back[LAYERS].relative_error == pytest.approx(
        float(norms[1] / norms[0]), rel=1e-5
    )


def test_only_the_layers_asked_for(pair):
    whole = quantization_fidelity(*pair, [padded()])
    some = quantization_fidelity(*pair, [padded()], layers=[3, 1, 3])
    assert some.layers == (whole[1], whole[3])
    with pytest.raises(ValueError, match=r"layer 2 was not compared.*\[1, 3\]"):
        some[2]
    bare = quantization_fidelity(*pair, [padded()], layers=[2], attentions=False, logits=False)
    assert bare[2].relative_error == whole[2].relative_error and bare[2].attention_jsd is None
    assert bare.kl is bare.agreement is bare.largest_logit_difference is None
    answers = quantization_fidelity(*pair, [padded()], layers=[])
    assert answers.layers == () and answers.kl == whole.kl


@pytest.mark.parametrize("family", [*EAGER_ONLY, "llama", "gpt2", "albert", "modernbert", "t5", "bart", "vit"])
def test_other_families(family):
    full, rounded = coarser(family)
    inputs = batch_for(full, rows=3, tokens=9)
    found = quantization_fidelity(full, rounded, [inputs])
    layers = 2 * LAYERS if family in ("t5", "bart") else LAYERS
    assert [row.layer for row in found.layers] == list(range(layers + 1))
    assert all(0 < row.relative_error < math.inf and -1 <= row.cosine < 1 for row in found.layers[1:])
    assert all(0 < row.attention_jsd < math.log(2) for row in found.layers[1:])
    assert found.kl > 0 and found.texts == 3
    if family in ("llama", "gpt2", "bloom"):  # every token predicts, but padding
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            theirs, ours = (model(**inputs).logits[mask].double() for model in (full, rounded))
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
        assert found.kl == pytest.approx(float(kl), rel=1e-9)
    assert found.tokens == (3 * 5 if family == "vit" else 3 * 9 - 2)  # 4 patches and [CLS]


def test_regression_has_no_distribution():
    found = quantization_fidelity(*coarser("bert", num_labels=1), [padded()])
    assert found.kl is None and found.agreement is None and found.largest_logit_difference > 0


def test_models_stay_as_they_were(pair):
    full, rounded = coarser("bert", hidden_dropout_prob=0.0)
    full.train()
    rounded.classifier.train()
    before = [module.training for model in (full, rounded) for module in model.modules()]
    found = quantization_fidelity(full, rounded, [padded()])
    assert [module.training for model in (full, rounded) for module in model.modules()] == before
    assert found == quantization_fidelity(*pair, [padded()])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A classifier wide enough for bitsandbytes' blocks of 64."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    folder = tmp_path_factory.mktemp("stored")
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_a_really_quantized_teacher(stored):
    full = load_teacher(stored, task="sequence-classification")
    forms = {q: load_teacher(stored, task="sequence-classification", quantize=q) for q in ("8bit", "4bit")}
    found = {q: quantization_fidelity(full, model, [padded()]) for q, model in forms.items()}
    for q, result in found.items():
        assert (result.full_form, result.quantized_form) == ("float32", q)
        assert result[0].relative_error < 1e-6  # embeddings are not quantized
        assert 0 < result[1].relative_error < 1
    assert found["8bit"][2].relative_error < found["4bit"][2].relative_error
    assert found["8bit"][2].attention_jsd < found["4bit"][2].attention_jsd
    assert found["4bit"].quantized_mib < found["8bit"].quantized_mib < found["8bit"].full_mib


def test_the_scales_are_weighed(stored):
    full = load_teacher(stored, task="sequence-classification")
    assert weight_bytes(full) == sum(p.numel() * 4 for p in full.parameters())
    linear = [m for m in full.bert.encoder.modules() if isinstance(m, torch.nn.Linear)]
    weights, rows = sum(m.weight.numel() for m in linear), sum(m.weight.shape[0] for m in linear)
    eight = load_teacher(stored, task="sequence-classification", quantize="8bit")
    quantized = {name for name, p in eight.named_parameters() if p.dtype == torch.int8}
    inside = {name for name in quantized if ".encoder." in name}
    assert len(inside) == len(linear)
    other = sum(p.numel() * p.element_size() for n, p in eight.named_parameters() if n not in inside)
    beyond = sum(p.shape[0] * 4 for n, p in eight.named_parameters() if n in quantized - inside)
    before = weight_bytes(eight)
    assert before == weights + 4 * rows + other + beyond
    with torch.no_grad():
        eight(**padded())
    assert weight_bytes(eight) == before  # bitsandbytes moves the scales at the first pass


def test_it_prints_and_draws_itself(pair):
    found = quantization_fidelity(*pair, [padded()])
    text, drawn = str(found), found._repr_markdown_()
    for shown in (text, drawn):
        assert "attention JSD (nats)" in shown and f"{found[2].relative_error:.4f}" in shown
        assert f"same top-1 {found.agreement:.1%}" in shown and f"of {found.full_mib:.1f} MiB" in shown
        assert "4 texts, 29 tokens" in shown and "BertForSequenceClassification: float32 against float32" in shown
    assert len({line.count("|") for line in drawn.splitlines() if line.startswith("|")}) == 1
    assert len(re.findall(r"^\| \d \|", drawn, re.M)) == LAYERS + 1


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_hidden_layers": 2}, "layers 3 and 2"),
        ({"hidden_size": 64}, "width 32 and 64"),
        ({"vocab_size": 51}, "vocabulary 50 and 51"),
        ({"num_attention_heads": 2}, "attention heads 4 and 2"),
        ({"num_labels": 5}, "classes 2 and 5"),
    ],
)
def test_models_of_two_shapes_are_refused_before_any_work(pair, changes, names):
    def never():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(ValueError, match=rf"differ in {names}.*load_teacher"):
        quantization_fidelity(pair[0], tiny("bert", **changes), never())


def test_errors_say_what_was_asked(pair):
    with pytest.raises(ValueError, match=r"layers \[-1, 9\].*3-layer.*0…3"):
        quantization_fidelity(*pair, [padded()], layers=[9, 1, -1])
    with pytest.raises(ValueError, match=r"one batch.*\[batch\]"):
        quantization_fidelity(*pair, padded())
    empty = padded() | {"attention_mask": torch.zeros(4, 8, dtype=torch.long)}
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no token that counts"):
            quantization_fidelity(*pair, batches)
