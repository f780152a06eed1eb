"""What a model is, asked of the model: which of its parameters are one."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fakit import capture, load_teacher, shrink
from fakit.models.kinds import tied_heads, ties, untied
from tests.families import EVERY, VOCAB, batch_for, tiny

_T5 = {k: v for k, v in EVERY["t5"][1]().to_dict().items() if k not in ("tie_word_embeddings", "architectures")}
UNTIED = {
    "t5": (hf.T5ForConditionalGeneration, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": (hf.MT5ForConditionalGeneration, {**_T5, "model_type": "mt5"}),
    "umt5": (hf.UMT5ForConditionalGeneration, {**_T5, "model_type": "umt5"}),
    "longt5": (hf.LongT5ForConditionalGeneration, {**_T5, "model_type": "longt5"}),
}


def published(folder: Path, family: str) -> Path:
    """A checkpoint as the hub has them: its configuration says that the head is not tied,
    its weights hold a head of their own.
    """
    kind, settings = UNTIED[family]
    settings = settings | {"tie_word_embeddings": False, "architectures": [kind.__name__]}
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = kind(hf.AutoConfig.from_pretrained(folder)).state_dict()
    weights = {name: w.clone() for name, w in weights.items() if not name.endswith("embed_tokens.weight")}
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", UNTIED)
def test_a_head_of_its_own_stays_one_whatever_the_configuration_says(family, tmp_path):
    teacher = load_teacher(published(tmp_path, family), task="seq2seq-lm")
    assert teacher.config.tie_word_embeddings and not tied_heads(teacher)
    student = shrink(teacher, layers=3).eval()
    inputs = batch_for(teacher)
    with torch.no_grad():
        logits = capture(student, inputs).logits
        assert torch.equal(logits, capture(teacher, inputs).logits)
        student.save_pretrained(tmp_path / "student")
        again = type(student).from_pretrained(tmp_path / "student")
        assert torch.equal(capture(again.eval(), inputs).logits, logits)
    assert ties(student) == ties(teacher) == ties(again)
    assert ties(student) == {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    random = shrink(teacher, layers=1, init="random")
    assert not tied_heads(random)
    random.lm_head.weight.data.zero_()
    assert random.shared.weight.abs().sum() > 0


@pytest.mark.parametrize("family", ["t5", "gpt2", "bart", "bert", "roberta", "llama"])
def test_ties_of_students_are_those_of_their_teachers(family):
    teacher = tiny(family)
    student = shrink(teacher, layers=2)
    assert ties(student) == ties(teacher) and bool(tied_heads(student)) == (family in ("t5", "gpt2", "bart", "roberta"))


def test_a_head_that_was_untied_by_hand_stays_so():
    teacher = tiny("gpt2")
    teacher.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    student = shrink(teacher, layers=3).eval()
    with torch.no_grad():
        assert torch.equal(student(**(ids := {"input_ids": torch.arange(6)[None]})).logits, teacher(**ids).logits)


def test_what_is_untied_is_read_off_the_weights_the_file_or_the_model(tmp_path):
    folder = published(tmp_path, "mt5")
    built = hf.MT5ForConditionalGeneration(hf.AutoConfig.from_pretrained(folder))
    head = ("lm_head.weight",)
    assert untied(built, folder) == untied(built, load_teacher(folder, task="seq2seq-lm")) == head
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert untied(built, folder) == head  # by its config.json alone
    save_file({n: w for n, w in weights.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    assert untied(built, folder) == ()  # the weights have the last word
    assert untied(built, built) == untied(built, built.config) == ()


def test_a_model_that_rescales_its_weights_in_evaluation(tmp_path):
    """RWKV halves weights and hidden states when it is evaluated: not what a student is copied from,
    matched with or saved as.
    """
    torch.manual_seed(0)
    config = hf.RwkvConfig(
        vocab_size=50, hidden_size=16, attention_hidden_size=16, num_hidden_layers=5, context_length=16, rescale_every=2
    )
    model, batch = hf.RwkvForCausalLM(config).eval(), {"input_ids": torch.arange(16).view(2, 8)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="halves them after every 2 blocks"):
        capture(model, batch, hidden_states=[4])
    before = model.train()(**batch).logits  # as it is trained; no dropout
    model.eval()(**batch)
    assert not torch.equal(
        model.state_dict()["rwkv.blocks.4.feed_forward.value.weight"],
        weights["rwkv.blocks.4.feed_forward.value.weight"],
    )
    student = shrink(model, layers=5)  # of a teacher that has run
    for name, value in weights.items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-6)
    training, evaluated = student.train(), model
    states = [capture(m, batch, hidden_states=range(6)).hidden_states for m in (training, evaluated)]
    for layer, theirs in states[1].items():
        torch.testing.assert_close(states[0][layer], theirs, rtol=1e-5, atol=1e-6)
    student.eval()(**batch)
    student.save_pretrained(tmp_path)
    again = hf.RwkvForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, before, rtol=1e-5, atol=1e-6)
