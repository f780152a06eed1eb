"""The blocks of a model, found by one rule."""

import pytest
import torch
import transformers as hf
from torch import nn

from fakit import capture, shrink
from fakit.models import find_blocks
from fakit.models.blocks import depth, encoder_depth, find_stacks
from tests.families import EVERY, LAYERS, SEQ2SEQ, VOCAB, tiny

# What each family calls its list of blocks: written down here to check the rule, which knows none of them.
NAMES = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "albert": "albert.encoder.albert_layer_groups",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
    "modernbert": "model.layers",
    "deberta-v2": "deberta.encoder.layer",
    "deberta-v3": "deberta.encoder.layer",
    "xlnet": "transformer.layer",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt-neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "phi": "model.layers",
    "mixtral": "model.layers",
    "qwen3-moe": "model.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "t5": "encoder.block decoder.block",
    "bart": "model.encoder.layers model.decoder.layers",
    "vit": "vit.layers",
}


@pytest.mark.parametrize("family", EVERY)
def test_every_familys_blocks_in_order(family):
    model = tiny(family, "eager")
    names = NAMES[family].split()
    assert [stack.name for stack in find_stacks(model)] == names
    assert depth(model) == LAYERS * len(names) and encoder_depth(model) == (LAYERS if family in SEQ2SEQ else None)
    places = [0] * LAYERS if family == "albert" else range(LAYERS)
    assert find_blocks(model) == [model.get_submodule(f"{name}.{i}") for name in names for i in places]


def test_groups_of_shared_blocks_serve_runs_of_layers():
    config = tiny("albert").config
    config.num_hidden_layers, config.num_hidden_groups = 5, 2
    model = hf.AlbertForMaskedLM._from_config(config)
    groups = list(model.albert.encoder.albert_layer_groups)
    assert [groups.index(block) for block in find_blocks(model)] == [
        int(i / (5 / 2)) for i in range(5)
    ]  # ALBERT's own rule


def test_stacks_of_different_depth():
    t5 = hf.T5ForConditionalGeneration._from_config(
        hf.T5Config(**{**tiny("t5").config.to_dict(), "num_decoder_layers": 2})
    )
    assert [len(stack.blocks) for stack in find_stacks(t5)] == [3, 2]
    assert [stack.counts for stack in find_stacks(t5)] == [["num_hidden_layers"], ["num_decoder_layers"]]
    changed = {**tiny("bart").config.to_dict(), "encoder_layers": 1}
    bart = hf.BartForConditionalGeneration._from_config(hf.BartConfig(**changed))
    assert [len(stack.blocks) for stack in find_stacks(bart)] == [1, 3]


def test_one_stack_of_an_encoder_decoder_alone():
    changed = {**tiny("bart").config.to_dict(), "encoder_layers": 2, "is_encoder_decoder": False}
    decoder = hf.BartForCausalLM._from_config(hf.BartConfig(**changed))
    assert find_stacks(decoder)[0].name == "model.decoder.layers" and depth(decoder) == 3
    encoder = hf.T5EncoderModel._from_config(tiny("t5").config)
    assert find_stacks(encoder)[0].name == "encoder.block" and encoder_depth(encoder) is None


def test_lists_of_other_modules_as_long_as_the_model_is_deep_are_not_its_blocks():
    model = tiny("llama")
    model.model.projections = nn.ModuleList([nn.Linear(2, 2) for _ in range(LAYERS)])  # as Gemma 3n has
    model.model.nested = nn.ModuleList([nn.ModuleList() for _ in range(LAYERS)])
    assert find_blocks(model) == list(model.model.layers)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=VOCAB, emb_dim=16, n_layers=3, n_heads=2)),
            r"counts 3 layers, and 4 .*transformer.attentions \(3 × MultiHeadAttention\).*RoBERTa in place of XLM",
        ),
        (
            lambda: hf.FunnelForMaskedLM(
                hf.FunnelConfig(vocab_size=VOCAB, block_sizes=[1, 1, 1], d_model=16, n_head=2)
            ),
            r"counts 3 layers, and 0 .*pool tokens between them \(Funnel\)",
        ),
    ],
)
def test_models_whose_blocks_are_no_modules_in_one_list_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(model())


def test_a_list_of_as_many_experts_inside_a_block_is_no_second_list():
    model = tiny("bert", num_hidden_layers=2)
    model.bert.encoder.layer[0].experts = hf.pytorch_utils.nn.ModuleList([model.classifier, model.classifier])
    assert find_blocks(model) == list(model.bert.encoder.layer)


def test_a_depth_that_no_list_has_names_the_lists_there_are():
    model = tiny("bert")
    model.config.num_hidden_layers = 5
    with pytest.raises(
        ValueError, match=r"counts 5 layers, and 0 .* lists found: bert.encoder.layer \(3 × BertLayer\)"
    ):
        find_blocks(model)


def test_a_model_without_layers_says_so():
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    config.num_layers = config.num_hidden_layers = None
    model = tiny("bert")
    model.config = config
    with pytest.raises(ValueError, match=r"configuration \(SwinConfig\) names no num_hidden_layers"):
        depth(model)


_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
_TEXT = _TOWER | {"vocab_size": VOCAB, "num_key_value_heads": 2, "pad_token_id": 0}
_IMAGES = _TOWER | {"image_size": 8, "patch_size": 4}
SEEING = {  # towers for images as deep as the language model
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**_IMAGES), text_config=hf.LlamaConfig(**_TEXT))
    ),
    "internvl": lambda: hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=_IMAGES | {"image_size": [8, 8], "patch_size": [4, 4]},
            text_config=_TEXT | {"model_type": "qwen2"},
        )
    ),
    "qwen2-vl": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config=_TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
        )
    ),
}


@pytest.mark.parametrize("family", SEEING)
def test_the_blocks_of_a_model_that_sees_are_its_language_models_whatever_the_towers_depth(family):
    torch.manual_seed(0)
    teacher = SEEING[family]().eval()
    assert [stack.name for stack in find_stacks(teacher)] == ["model.language_model.layers"]
    student = shrink(teacher, layers=[1, 3]).eval()
    towers = [{n: p for n, p in m.named_parameters() if "language_model" not in n} for m in (student, teacher)]
    assert towers[0].keys() == towers[1].keys() and all(torch.equal(p, towers[1][n]) for n, p in towers[0].items())
    ids = {"input_ids": torch.arange(3, 10)[None]}
    with torch.no_grad():
        assert sorted(capture(student, ids, [0, 1, 2], [1, 2]).hidden_states) == [0, 1, 2]
        whole = shrink(teacher, layers=3).eval()
        assert torch.equal(capture(whole, ids).logits, capture(teacher, ids).logits)


def test_two_towers_side_by_side_have_no_one_stack():
    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=_IMAGES))
    with pytest.raises(ValueError, match="pass one tower of a model that joins several"):
        find_stacks(model)
