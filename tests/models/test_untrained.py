"""A student of another family: what it shares with its teacher, what it draws, and what is refused."""

import pytest
import torch

from fakit.experiments import ExperimentConfig
from fakit.models.untrained import check_settings, untrained
from tests.families import tiny

MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.mark.parametrize(
    "settings", [MAMBA, {"model_type": "llama", **dict(list(BERT.items())[1:])}], ids=["mamba", "llama"]
)
def test_it_reads_the_teachers_tokens_and_is_of_the_generator(settings):
    teacher = tiny("gpt2")
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(untrained(settings, teacher, "causal-lm"))
    one, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in made)
    assert torch.equal(one, same) and not torch.equal(one, other)
    config = made[0].config
    assert (config.vocab_size, config.eos_token_id) == (teacher.config.vocab_size, teacher.config.eos_token_id)
    assert made[0].training and all(p.requires_grad and p.dtype == torch.float32 for p in made[0].parameters())
    assert config.model_type == settings["model_type"] and config.num_hidden_layers == 2


def test_a_classifier_has_the_teachers_classes():
    teacher = tiny("bert")
    made = untrained({**BERT, "model_type": "roberta"}, teacher, "sequence-classification")
    assert made.config.num_labels == teacher.config.num_labels and type(made).__name__.startswith("Roberta")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "untrained.model_type: None is no family"),
        ({"model_type": "mambo"}, "'mambo' is no family .* Did you mean mamba"),
        ({"model_type": "llava"}, "llava is not a family of text alone"),
        ({**MAMBA, "hiden_size": 3}, "untrained.hiden_size: is no setting of mamba. Did you mean hidden_size"),
        ({**MAMBA, "vocab_size": 3}, "untrained.vocab_size: is the teacher's"),
        ({**MAMBA, "eos_token_id": 3}, "untrained.eos_token_id: is the teacher's"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(settings, words):
    with pytest.raises(ValueError, match=words):
        check_settings(settings)
    with pytest.raises(ValueError, match=f"student.{words}" if words.startswith("untrained") else words):
        ExperimentConfig(student={"untrained": settings})


@pytest.mark.parametrize(
    ("settings", "task", "words"),
    [
        (BERT, "causal-lm", "sees the tokens that it is to predict, .* Set is_decoder: true"),
        ({"model_type": "t5"}, "causal-lm", "transformers has no AutoModelForCausalLM of t5"),
        (MAMBA, "sequence-classification", "has no AutoModelForSequenceClassification of mamba"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "causal-lm", "cannot be made .transformers says: "),
    ],
)
def test_what_a_family_cannot_be_is_said(settings, task, words):
    with pytest.raises(ValueError, match=words):
        untrained(settings, tiny("gpt2" if task == "causal-lm" else "bert"), task)


def test_a_decoder_that_is_told_so_sees_nothing_ahead():
    made = untrained({**BERT, "is_decoder": True}, tiny("gpt2"), "causal-lm")
    rows = torch.tensor([[1, 2, 3], [1, 2, 4]])
    first, second = made.eval()(input_ids=rows).logits
    torch.testing.assert_close(first[:2], second[:2])


@pytest.mark.parametrize(
    ("also", "words"),
    [
        ({"layers": 3}, "student.layers: is of a teacher that is shrunk"),
        ({"path": "x"}, "each makes a student"),
        ({"freeze_embeddings": True}, "student.freeze_embeddings: keeps weights as they are"),
        ({"lora": {"r": 2}}, "student.lora: keeps weights as they are"),
    ],
)
def test_what_does_not_go_with_it_is_refused(also, words):
    with pytest.raises(ValueError, match=words):
        ExperimentConfig(student={"untrained": MAMBA, **also})
