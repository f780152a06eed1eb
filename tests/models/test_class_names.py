"""Classes of a model beside a task's: same names are put in one order, whatever the head;
what cannot be told is said.
"""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from fakit.models.class_names import adopt_classes, class_names, class_order, order_classes

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "distilbert": lambda **k: DistilBertForSequenceClassification(DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16, **k)),
    "roberta": lambda **k: RobertaForSequenceClassification(RobertaConfig(**SMALL, **k)),
    "gpt2": lambda **k: GPT2ForSequenceClassification(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, **k)),
    "llama": lambda **k: LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0, **k)),
    "bart": lambda **k: BartForSequenceClassification(
        BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, **k)
    ),
    "xlnet": lambda **k: XLNetForSequenceClassification(XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16, **k)),
}  # fmt: skip


def made(family: str, names: list[str]):
    torch.manual_seed(0)
    return MODELS[family](id2label=dict(enumerate(names))).eval()


@pytest.mark.parametrize("family", list(MODELS))
def test_the_same_names_in_another_order_are_put_in_order(family, caplog):
    model = made(family, ["Glad", "ANGRY", "so_so"])
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        order_classes(model, ["angry", "so so", "glad"], f"the {family}")
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before[:, [1, 2, 0]])
    assert class_names(model.config) == ["angry", "so so", "glad"] and model.config.label2id["glad"] == 2
    assert f"the {family} has its classes in the order Glad, ANGRY, so_so; they were put into the task's" in caplog.text
    assert not model.training


@pytest.mark.parametrize(
    ("found", "wanted", "order", "known"),
    [
        (["a", "b"], ["a", "b"], [0, 1], True),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], [1, 0], True),
        (["not-entailment", "Entailment"], ["entailment", "not_entailment"], [1, 0], True),
        (["a", "A"], ["A", "a"], [1, 0], True),  # case alone tells these apart
        (["LABEL_0", "LABEL_1"], ["no", "yes"], [0, 1], False),
        (["LABEL_1", "LABEL_0"], ["no", "yes"], [1, 0], False),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1], True),
        (["1", "0"], ["0", "1"], [1, 0], True),
        (["LABEL_0", "LABEL_1"], ["1", "2"], [0, 1], False),
        (["1 star", "2 stars"], ["1", "2"], [0, 1], False),
        (["sad", "happy"], ["spam", "ham"], [0, 1], False),
        (["bad", "good", "so so"], ["bad", "good", "neutral"], [0, 1, 2], False),
    ],
)
def test_the_order_of_classes(found, wanted, order, known):
    assert class_order(found, wanted) == (order, known)


def test_what_cannot_be_told_is_said_and_what_contradicts_is_refused(caplog):
    model = made("distilbert", ["LABEL_0", "LABEL_1", "LABEL_2"])
    weight = model.classifier.weight.clone()
    order_classes(model, ["angry", "calm", "glad"], "the teacher x")
    assert (
        "the teacher x names its classes LABEL_0, LABEL_1, LABEL_2, the task names them angry, calm, glad"
        in caplog.text
    )
    assert "output 0 is taken for 'angry'" in caplog.text and torch.equal(model.classifier.weight, weight)
    assert class_names(model.config) == ["angry", "calm", "glad"]
    with pytest.raises(
        ValueError,
        match="the teacher y: the model's classes are glad, calm, sad, the task's angry, calm, glad: glad have another place",
    ):
        order_classes(made("roberta", ["glad", "calm", "sad"]), ["angry", "calm", "glad"], "the teacher y")
    with pytest.raises(ValueError, match=r"the model has 2 classes \(a, b\), the task has 3 \(a, b, c\)"):
        class_order(["a", "b"], ["a", "b", "c"])


def test_a_student_takes_the_tasks_names_and_keeps_what_its_head_knows(caplog):
    model = made("roberta", ["c", "a", "b"])
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adopt_classes(model, ["a", "b", "c"])
        torch.testing.assert_close(model(input_ids=ids).logits, before[:, [1, 2, 0]])
    other = made("roberta", ["c", "b", "x"])
    adopt_classes(other, ["a", "b", "c"])  # its head is trained anew
    assert class_names(model.config) == class_names(other.config) == ["a", "b", "c"] and not caplog.text
