"""Causal or not is asked of the model: the task's loss is the model's own, whatever the class is called."""

import copy
import logging

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from fakit import Objective, Task, capture, preflight
from fakit.models.kinds import is_causal_lm
from tests.families import SIZES, VOCAB, tiny

TEXT = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"} | {"num_key_value_heads": 2}
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE |= {"image_size": 8, "patch_size": 4}
IMAGE = VOCAB - 1


def paligemma():
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, head_dim=8).to_dict(),
        vision_config=hf.SiglipVisionConfig(**EYE).to_dict(),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def gemma3():
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
        vision_config=hf.SiglipVisionConfig(**EYE).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=48,
        eoi_token_index=47,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def idefics3():
    config = hf.Idefics3Config(text_config=hf.LlamaConfig(**TEXT), vision_config=EYE, image_token_id=IMAGE)
    return hf.Idefics3ForConditionalGeneration(config)


def voxtral():
    ear = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.VoxtralConfig(text_config=hf.LlamaConfig(**TEXT), audio_config=ear, audio_token_id=IMAGE)
    return hf.VoxtralForConditionalGeneration(config)


def xlnet(**settings):
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    return hf.XLNetLMHeadModel(hf.XLNetConfig(**sizes, **settings))


class Recurrent(hf.PreTrainedModel):
    """A model of nobody's family: recurrent one way or both ways; its loss is shifted, as it stands, or not there."""

    config_class = hf.PreTrainedConfig

    def __init__(self, both_ways: bool, loss: str | None):
        super().__init__(hf.PreTrainedConfig())
        self.words, self.loss_kind = nn.Embedding(VOCAB, 16), loss
        self.mix = nn.GRU(16, 8 if both_ways else 16, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(16, VOCAB)

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **given):
        if self.loss_kind is None and given:
            raise TypeError("no labels here")
        logits, labels = self.head(self.mix(self.words(input_ids))[0]), given.get("labels")
        if labels is None:
            return CausalLMOutput(logits=logits)
        shown = (logits[:, :-1], labels[:, 1:]) if self.loss_kind == "shifted" else (logits, labels)
        return CausalLMOutput(nn.functional.cross_entropy(shown[0].flatten(0, 1), shown[1].flatten()), logits)


LOSS_IS_THEIR_OWN = {
    "paligemma": (paligemma, True),  # which looks both ways in a prompt
    "gemma3 with images": (gemma3, True),
    "idefics3": (idefics3, True),
    "voxtral": (voxtral, True),
    "llama": (lambda: tiny("llama"), True),
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)), True),
    "bert, a decoder": (lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True)), True),
    "roberta, masked": (lambda: tiny("roberta"), False),
    "xlnet, both ways": (xlnet, False),
    "xlm": (lambda: hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4)), False),
    "big bird": (lambda: hf.BigBirdForMaskedLM(hf.BigBirdConfig(**SIZES)), False),
    "t5": (lambda: tiny("t5"), False),
    "its own, shifted": (lambda: Recurrent(both_ways=True, loss="shifted"), True),
    "its own, as it stands": (lambda: Recurrent(both_ways=True, loss="as it stands"), False),
}


@pytest.mark.parametrize("name", LOSS_IS_THEIR_OWN)
def test_the_task_loss_is_the_models_own(name):
    make, causal = LOSS_IS_THEIR_OWN[name]
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(3, 40, (2, 9))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert is_causal_lm(model) == causal
    with torch.no_grad():
        trace = capture(model, rows)
        assert trace.causal == causal
        found = Objective(task=Task())(trace, None, ids).total
        torch.testing.assert_close(found, model(**rows).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "causal"),
    [
        (lambda: Recurrent(both_ways=False, loss=None), True),
        (lambda: Recurrent(both_ways=True, loss=None), False),
        (lambda: Recurrent(both_ways=False, loss="as it stands"), True),
        (lambda: hf.BartForCausalLM(tiny("bart").config), True),
        (lambda: xlnet(attn_type="uni"), True),
    ],
)
def test_without_a_shifted_loss_a_model_that_looks_back_alone_predicts_the_next_token(make, causal):
    with torch.no_grad():
        assert is_causal_lm(make().requires_grad_(False)) == causal


def test_models_that_read_no_text_alone_are_asked_by_their_loss_function():
    text = {"vocab_size": VOCAB, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4}
    config = hf.Kosmos2Config(text_config=text, vision_config=EYE, latent_query_num=2)
    assert is_causal_lm(hf.Kosmos2ForConditionalGeneration(config))
    with torch.device("meta"):
        llama, bert = hf.LlamaForCausalLM(tiny("llama").config), hf.BertForMaskedLM(tiny("bert").config)
        assert is_causal_lm(llama) and not is_causal_lm(bert)


def test_the_question_warns_of_no_setting_that_nobody_set(caplog):
    """transformers does where a class's name is that of no loss, once a process, and in red in a notebook."""
    model = tiny("gpt2")
    assert model.loss_type is None
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel("WARNING")
    try:
        logger.warning_once.__func__.cache_clear()
        assert is_causal_lm(model)
        with torch.device("meta"):
            assert is_causal_lm(hf.GPT2LMHeadModel(model.config))
    finally:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)
    assert not caplog.records and model.loss_type is None


@pytest.mark.parametrize("family", ["bert", "vit", "electra"])
def test_heads_that_are_not_over_tokens_are_not_causal(family):
    assert not is_causal_lm(tiny(family))


def test_a_model_is_left_as_it_was_and_who_watches_it_sees_nothing():
    model = hf.BigBirdForMaskedLM(hf.BigBirdConfig(**SIZES, block_size=2, num_random_blocks=1)).train()
    before, parts, ran = copy.deepcopy(model.config.to_dict()), dict(model.named_modules()), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: ran.append(1))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert not is_causal_lm(model)  # a short row makes Big Bird exchange its attention for good
    assert torch.equal(torch.rand(2), expected) and not ran
    assert model.config.to_dict() == before and model.bert.attention_type == "block_sparse"
    assert dict(model.named_modules()) == parts and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_preflight_compares_a_vision_language_teacher_with_a_text_student():
    text = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    row = preflight(idefics3().eval().requires_grad_(False), text)["task head"]
    assert (row.status, row.teacher, row.student) == ("ok", "CausalLM", "CausalLM")
